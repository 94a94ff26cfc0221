"""Room 02: image-instruction-response triplets for instruction tuning (paper: section on instruction tuning).

Three kinds: *categorical* (pick one of the C emotions), *conversation* (key visual elements) and
*reasoning* (why the image evokes the emotion, without naming it). The paper has GPT-4 write them: `annotate`
and `annotator` ask a paid model; `offline` composes them without one; `triplet_import` takes other people's.
Here are the contract, the file that holds them (`OUT/triplets/<dataset>.jsonl`) and the stage.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from emonb.errors import EmonbError
from emonb.files import atomic_write
from emonb.progress import progress
from emonb.samples import count_samples, iter_samples, sample_labels
from emonb.settings import Settings
from emonb.store import Artifact, Store
from emonb.triplet_files import locked_triplets, refuse_open_batches

__all__ = [
    "FIELDS",
    "KINDS",
    "answered_images",
    "categorical_instruction",
    "has_paid_answers",
    "load_prompts",
    "make_triplet",
    "prompts_sha256",
    "read_triplets",
    "resolve_annotator",
    "three_triplets",
    "triplet_line",
    "triplet_lines",
    "triplets_path",
    "triplets_stage",
    "validate_triplet",
]

KINDS = ("categorical", "conversation", "reasoning")
FIELDS = (
    "image_id",
    "kind",
    "instruction",
    "response",
    "source",
    "model",
    "created",
    "prompt_sha256",
    "usage",
)


@functools.cache
def load_prompts() -> dict[str, Any]:
    """The wording of all questions and of the offline annotator (`resources/prompts.yaml`)."""
    text = resources.files("emonb").joinpath("resources", "prompts.yaml").read_text("utf-8")
    return yaml.safe_load(text)


@functools.cache
def prompts_sha256() -> str:
    """Hash of `resources/prompts.yaml`."""
    return hashlib.sha256(resources.files("emonb").joinpath("resources", "prompts.yaml").read_bytes()).hexdigest()


def categorical_instruction(labels: Sequence[str]) -> str:
    """The question of training and of every evaluation, with the labels in the taxonomy's order."""
    return load_prompts()["categorical"]["instruction"].format(labels=", ".join(labels))


def triplets_stage(settings: Settings, store: Store, dataset: str) -> Artifact:
    """Triplets of the training images as `triplets.jsonl` (stage `triplets`), and a plain copy for people.

    Who writes them is `settings.triplets.annotator`. `openai` and `batch` ask for what is still missing in
    `OUT/triplets/<dataset>.jsonl`; `auto` takes what that file holds, and the offline annotator where there is
    none. Keywords, captions and scene descriptions are read here and nowhere else: no model sees them at test.

    Raises:
        EmonbError: a damaged file; no API key; the offline annotator would replace answers that were paid for.
    """
    samples = store.find("samples", dataset)
    annotator = resolve_annotator(settings, dataset)
    plain = triplets_path(settings, dataset)
    if annotator == "offline":
        artifact = _offline_artifact(store, dataset, samples)
        with locked_triplets(plain):  # a paid run that has no answer yet must not find its file replaced
            refuse_open_batches(plain)
            if has_paid_answers(plain, thorough=True):
                raise EmonbError(
                    f"{plain.name}: holds answers that were paid for; set triplets.annotator to auto to use them "
                    "(or leave out --annotator), or choose another results folder with OUT (--out)"
                )
            copy = (artifact.path / "triplets.jsonl").read_bytes()
            if not plain.is_file() or plain.read_bytes() != copy:
                atomic_write(plain, copy)
        return artifact
    if annotator in ("openai", "batch"):
        from emonb.annotate import INTERRUPTED, annotate

        summary = annotate(settings, samples, dataset, batch=annotator == "batch")
        if summary.stopped.startswith(INTERRUPTED):
            raise EmonbError("interrupted; what was answered is saved: run it again to go on")
    return _written_artifact(store, dataset, samples, plain)


def triplets_path(settings: Settings, dataset: str) -> Path:
    """`OUT/triplets/<dataset>.jsonl`."""
    return settings.out_path / "triplets" / f"{dataset}.jsonl"


def resolve_annotator(settings: Settings, dataset: str) -> str:
    """`offline`, `openai`, `batch`, or `written` for a file of answers that is there already."""
    chosen = settings.triplets.annotator
    if chosen != "auto":
        return chosen
    return "written" if has_paid_answers(triplets_path(settings, dataset)) else "offline"


def has_paid_answers(path: Path, *, thorough: bool = False) -> bool:
    """Whether a triplets file holds anything that the offline annotator cannot write again.

    Its first line tells, since the two are never mixed; `thorough` reads all lines, before the file is replaced.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        paid = (b'"source": "offline"' not in line for line in lines)
        return any(paid) if thorough else next(paid, False)


def answered_images(path: Path) -> set[str]:
    """Images that have triplets in a file which the offline annotator did not write; a torn last line is passed by."""
    found = set()
    if has_paid_answers(path):
        with path.open("rb") as file:
            for line in file:
                with suppress(ValueError, KeyError, TypeError):
                    found.add(json.loads(line)["image_id"])
    return found


def _offline_artifact(store: Store, dataset: str, samples: Artifact) -> Artifact:
    from emonb.offline import offline_triplets

    def build(folder: Path) -> None:
        labels = sample_labels(samples)
        rows = iter_samples(samples, "train")
        with (folder / "triplets.jsonl").open("w", encoding="utf-8") as file:
            for row in progress(rows, f"offline triplets of {dataset}", count_samples(samples, "train")):
                for triplet in offline_triplets(row, labels):
                    file.write(triplet_line(triplet))

    params = {"annotator": "offline", "prompts": prompts_sha256()}
    code = ["emonb.triplets", "emonb.offline"]
    return store.get("triplets", dataset, build, params=params, inputs=[samples], code=code)


def _written_artifact(store: Store, dataset: str, samples: Artifact, plain: Path) -> Artifact:
    """A snapshot of the triplets file, validated, in the samples' order: arrival must not decide the training."""
    if not plain.is_file() or not plain.stat().st_size:
        raise EmonbError(
            f"triplets/{plain.name}: no triplets yet; the reasons, if any, stand in {plain.stem}.rejected.jsonl; "
            f"ask again: python -m emonb triplets --dataset {dataset}"
        )

    def build(folder: Path) -> None:
        ids = (row["image_id"] for row in iter_samples(samples, "train", columns=["image_id"]))
        order = {image_id: i for i, image_id in enumerate(ids)}
        places = []
        for triplet, _, offset in triplet_lines(plain):
            if triplet["image_id"] in order:  # another split may have made a paid image a test image: left out
                places.append((order[triplet["image_id"]], KINDS.index(triplet["kind"]), offset))
        if not places:
            raise EmonbError(
                f"triplets/{plain.name}: none of its images is a training image of {dataset}; it belongs to other "
                "pictures: move it away, or point IMAGES at them"
            )
        with plain.open("rb") as source, (folder / "triplets.jsonl").open("wb") as target:
            for _, _, offset in sorted(places):
                source.seek(offset)
                target.write(source.readline().rstrip(b"\n") + b"\n")

    with plain.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return store.get("triplets", dataset, build, params={"written": digest}, inputs=[samples], code=["emonb.triplets"])


def make_triplet(
    row: dict[str, Any],
    kind: str,
    instruction: str,
    response: str,
    *,
    source: str,
    model: str,
    prompt_sha256: str | None,
    created: str | None = None,
    usage: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One triplet as the contract has it; `created` is None where equal inputs must give equal files."""
    return {
        "image_id": row["image_id"],
        "kind": kind,
        "instruction": instruction,
        "response": response,
        "source": source,
        "model": model,
        "created": created,
        "prompt_sha256": prompt_sha256,
        "usage": usage,
        **more,
    }


def three_triplets(
    row: dict[str, Any],
    labels: Sequence[str],
    origin: dict[str, Any],
    conversation: dict[str, Any],
    reasoning: dict[str, Any],
) -> list[dict[str, Any]]:
    """The image's three triplets in the order of `KINDS`: the categorical one follows from the label."""
    response = load_prompts()["categorical"]["response"].format(label=row["label"])
    return [make_triplet(row, KINDS[0], categorical_instruction(labels), response, **origin), conversation, reasoning]


def triplet_line(triplet: dict[str, Any]) -> str:
    """A triplet as a line of JSON, newline included."""
    return json.dumps(triplet, ensure_ascii=False) + "\n"


def validate_triplet(triplet: dict[str, Any], where: str) -> None:
    """Raise `EmonbError` naming file, line and field unless a triplet is complete and of a known kind."""
    missing = [field for field in FIELDS if not isinstance(triplet, dict) or field not in triplet]
    if missing:
        raise EmonbError(f"{where}: field {missing[0]!r} missing; delete the line and make the triplets again")
    if triplet["kind"] not in KINDS:
        raise EmonbError(f"{where}: field 'kind' is {triplet['kind']!r}; use one of {', '.join(KINDS)}")
    for field in ("image_id", "instruction", "response"):
        if not isinstance(triplet[field], str) or not triplet[field].strip():
            raise EmonbError(f"{where}: field {field!r} is empty; delete the line and make the triplets again")


def read_triplets(path: Path) -> pd.DataFrame:
    """Read and validate a triplets file (JSONL); one row per triplet, duplicates refused."""
    return pd.DataFrame((triplet for triplet, _, _ in triplet_lines(path)), columns=list(FIELDS))


def triplet_lines(path: Path) -> Iterator[tuple[dict[str, Any], str, int]]:
    """Validated triplets of a file, each with `file, line n` for messages and its byte offset."""
    seen: set[int] = set()  # hashes: a third of the memory of the names
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.parent.name}/{path.name}, line {number}"
            if not line.strip():
                offset += len(line)
                continue
            try:
                triplet = json.loads(line)
            except ValueError as error:
                reason = getattr(error, "msg", "not UTF-8")
                raise EmonbError(f"{where}: not JSON ({reason}); delete the line and run again") from None
            validate_triplet(triplet, where)
            key = (triplet["image_id"], triplet["kind"])
            if hash(key) in seen:
                raise EmonbError(f"{where}: {key} occurs twice; delete one of the lines")
            seen.add(hash(key))
            yield triplet, where, offset
            offset += len(line)
