"""`python -m emonb triplets`: the triplets of one dataset from the shell, as notebook 02 makes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emonb.settings import Settings, load_settings
from emonb.store import Artifact, Store, write_json
from emonb.triplets import answered_images, resolve_annotator, triplets_path, triplets_stage

__all__ = ["estimate_text", "import_file_into", "write_triplets"]


def write_triplets(
    profile: str,
    dataset: str,
    *,
    images: str = "",
    out: str = "",
    changes: dict[str, Any] | None = None,
    only_estimate: bool = False,
    import_file: str = "",
    patient: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Write `OUT/triplets/<dataset>.jsonl` and its artefact, or only print what it would cost.

    Args:
        profile, images, out: as for `python -m emonb run`.
        dataset: one dataset of the profile, of the drawn world or of `images`.
        changes: fields of `settings.triplets` to change.
        only_estimate: print tokens and price, send nothing, write nothing but the sample table.
        import_file: take the triplets from this JSON file.
        patient: with the Batch API: wait until all is there.
        say: gets the messages.
    """
    from emonb.data import samples_stage
    from emonb.run import check_datasets

    settings = load_settings(profile, datasets=dataset, images=images, out=out, triplets=changes or {})
    check_datasets(settings)
    store = Store(settings.out_path / "artifacts")
    samples = samples_stage(settings, store, dataset)
    annotator = resolve_annotator(settings, dataset)
    if only_estimate:
        say(estimate_text(settings, samples, dataset, batch=annotator == "batch"))
        return
    if import_file:
        import_file_into(settings, samples, dataset, Path(import_file), say=say)
    elif annotator in ("openai", "batch"):
        from emonb.annotate import annotate

        summary = annotate(settings, samples, dataset, batch=annotator == "batch", patient=patient, say=say)
        if not summary.accepted:
            say("no triplets yet")
            return
    if annotator != "offline" or import_file:  # what is there, without asking again
        settings = load_settings(profile, datasets=dataset, images=images, out=out, triplets={"annotator": "auto"})
    artifact = triplets_stage(settings, store, dataset)
    source = "offline annotator" if annotator == "offline" and not import_file else "answers in the file"
    say(f"{source}: {triplets_path(settings, dataset).relative_to(settings.out_path)}")
    say(f"artefact: artifacts/triplets/{artifact.key}/triplets.jsonl")


def estimate_text(settings: Settings, samples: Artifact, dataset: str, *, batch: bool) -> str:
    """The estimate as people read it: images, tokens, price range per kind and in all, and what is assumed."""
    from emonb.annotate import estimate
    from emonb.prices import load_prices
    from emonb.samples import count_samples
    from emonb.transport import public_name

    prices, model = load_prices(settings.triplets), public_name(settings.triplets.model)
    done = answered_images(triplets_path(settings, dataset))
    table = estimate(settings, samples, batch=batch, without=done)
    total = table.iloc[-1]
    mode = " by the Batch API" if batch else ""
    images = f"{count_samples(samples, 'train'):,} training images" + (f", {len(done):,} of them done" if done else "")
    lines = [
        f"{dataset}: {images}; {model}{mode}, prices of {prices.as_of}",
        "",
        table.to_string(index=False, formatters={c: "{:,.4f}".format for c in table if c.startswith("usd")}),
        "",
        "low, high: short or long sentences, as many as the prompt asks for, right at the first time;",
        f"worst: each image asked {1 + settings.triplets.retries} times, each answer of "
        f"{settings.triplets.max_output_tokens} tokens",
    ]
    if prices.find(settings.triplets.model) is None:
        where = settings.triplets.prices or "emonb/resources/prices.yaml"
        lines.append(f"the price of {model!r} is unknown: add it to {where}")
    else:
        low, high, worst = (f"${total[f'usd_{case}']:,.2f}" for case in ("low", "high", "worst"))
        lines.append(f"total: {low} to {high}, at worst {worst}; nothing was sent")
    return "\n".join(lines)


def import_file_into(
    settings: Settings, samples: Artifact, dataset: str, path: Path, *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Append the triplets of somebody else's file for images that have none, and report what could not be used.

    Returns:
        The report, which also stands in `OUT/triplets/<dataset>.import.json`.

    Raises:
        EmonbError: the file cannot be read, or no triplet in it fits.
    """
    from emonb.answer_log import AnswerLog
    from emonb.samples import read_samples, sample_labels
    from emonb.triplet_import import import_triplets

    frame = read_samples(samples)[["image_id", "label", "split", "sha256"]]
    found = import_triplets(path, frame, sample_labels(samples))
    groups: dict[str, list[dict[str, Any]]] = {}
    for triplet in found.triplets:
        groups.setdefault(triplet["image_id"], []).append(triplet)
    with AnswerLog(triplets_path(settings, dataset)) as log:
        new = [group for image_id, group in groups.items() if image_id not in log.done]
        for group in new:
            log.accept(group)
    report = {**found.report, "images_added": len(new), "images_already_there": len(groups) - len(new)}
    write_json(triplets_path(settings, dataset).with_name(f"{dataset}.import.json"), report)
    kinds = Counter(triplet["kind"] for group in new for triplet in group)
    say(f"{path.name} ({report['format']}): {len(new):,} images added, {dict(kinds)}")
    if len(new) < len(groups):
        say(f"{len(groups) - len(new):,} images had triplets already: left as they are")
    for reason, problem in report["problems"].items():
        say(f"  {problem['count']:,} x {reason}, e.g. {problem['examples'][0]}")
    return report
