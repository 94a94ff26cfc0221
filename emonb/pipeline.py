"""What is made of what: the stages in their order, each with what it reads, what it calls and what it writes.

A stage says what its result depends on (it yields that), and then makes it in the folder that it gets, if the store
sees that it must be made; what it puts into `parts` outlives a kill. Keyword-only parameters are the results that it
is made of. Rooms compute; here alone their inputs are read and their outputs written. What imports torch is imported
where it is used: the runner, and processes that only draw, need none of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from emonb import annotate
from emonb.data import open_picture, parse_emotion, question, read_samples, sample_labels, taxonomy_for_dataset
from emonb.errors import EmonbError, StoppedEarly
from emonb.files import file_digest, link_or_copy, read_json, resource, write_json
from emonb.machine import get_device, is_main, process_count, process_index, wait_for_all
from emonb.predictions import (
    first_seed,
    head_model,
    make_predictions,
    one_word_predictions,
    probabilities,
    read_predictions,
    write_predictions,
)
from emonb.progress import progress
from emonb.releases import Release
from emonb.releases.imports import listing_digest, read_dataset, write_table
from emonb.settings import SPLITS, Settings, VLMSettings, checkpoint_of, project_root
from emonb.store import Artifact, Making, stage
from emonb.triplets import KINDS, has_paid_answers, offline_triplets, triplet_line, triplet_lines
from emonb.world import DRAWN, draw_dataset

if TYPE_CHECKING:
    from torch import Tensor

    from emonb.cost import Measured
    from emonb.distill import Cached
    from emonb.gate import Opinions
    from emonb.model import EmoVLMKD
    from emonb.run import Run
    from emonb.vlm import VLM, VisualTokens

Trained = tuple[Any, list[dict[str, Any]], dict[str, Any]]  # net, training curve, [N, C] logits of each split


Tables = Mapping[str, pd.DataFrame]  # of each split: image_id, label and perhaps path
KNOWN = 2048  # pictures by whose traits strangers are told: 4 kB a picture for a 1 k wide VLM; ours
SHARD = 512  # pictures; ours: minutes of work for a 7B model, and a multiple of the usual batch sizes


# ---- 01, 02: pictures and triplets ---------------------------------------------------------------------------------


@stage("01_data", side_by_side=True)
def samples(run: Run, dataset: str) -> Making:
    """Sample table of one dataset: drawn, imported, or a release on disk.

    Files: `samples.parquet`, `meta.json` (labels, root), `integrity.json`; of a drawn one also `images/`.
    """
    folder = dataset_folder(run.settings, dataset)
    return _on_disk(folder, dataset, run.settings.classes.get(dataset, ())) if folder else _drawn(run, dataset)


def dataset_folder(settings: Settings, dataset: str) -> Path | None:
    """Where a dataset lies; None: it is drawn. Raises `EmonbError` for one that is neither drawn nor there."""
    root = settings.images_path
    if root is not None and not root.is_dir():
        raise EmonbError(f"images: {root} is no folder; give the parent of the datasets' folders (--images, IMAGES)")
    if dataset in DRAWN:
        return None
    if root is None:
        raise EmonbError(
            f"unknown dataset {dataset!r}; drawn ones are {', '.join(DRAWN)}; "
            "for one on disk also give its parent folder: --images ROOT (IMAGES=ROOT)"
        )
    if dataset == "emotion6-majority" and not (root / dataset).is_dir():
        dataset = "emotion6"  # one release, two readings
    if not (root / dataset).is_dir():
        there = ", ".join(sorted(path.name for path in root.glob("*/"))[:20]) or "no folder"
        raise EmonbError(f"{root / dataset}: no such folder; IMAGES must be its parent, but holds: {there}")
    return root / dataset


def _drawn(run: Run, dataset: str) -> Making:
    taxonomy = taxonomy_for_dataset(dataset)
    sizes = dict(zip(SPLITS, getattr(run.settings.world, taxonomy.name), strict=True))
    redraw = run.settings.world.redraw
    folder, _ = yield {"source": "drawn", "sizes": sizes, "redraw": redraw}
    release = Release(draw_dataset(dataset, folder, sizes, redraw), folder, taxonomy.labels)
    meta = write_table(release, folder, dataset, "drawn", where=dataset)
    write_json(folder / "meta.json", {**meta, "root": ".", "drawn": True})


def _on_disk(source: Path, dataset: str, classes: Sequence[str]) -> Making:
    own = {"classes": [*classes]} if classes else {}
    folder, _ = yield {"source": os.path.relpath(source, project_root()), "listing": listing_digest(source), **own}
    meta = read_dataset(source, folder, dataset, classes)
    root = os.path.relpath(meta["root"], project_root())
    write_json(folder / "meta.json", {**meta, "root": root, "drawn": False})


@stage("02_triplets")
def triplets(run: Run, dataset: str, *, samples: Artifact) -> Making:
    """Triplets of the training images: `triplets.jsonl`.

    Who writes them is `settings.triplets.annotator`: `auto` takes the answers in `OUT/triplets/<dataset>.jsonl`, and
    the offline annotator where there are none; `openai` and `batch` first ask for what is missing there. Keywords,
    captions and scene descriptions are read here and nowhere else: no model sees them at test.
    """
    path, terms = run.out / "triplets" / f"{dataset}.jsonl", run.settings.triplets
    if terms.annotator in ("openai", "batch"):
        frame, labels = read_samples(samples.path), sample_labels(samples.path)
        by_batch, stopped = terms.annotator == "batch", ""
        if is_main():
            stopped = annotate.write_triplets(frame, labels, path, terms, batch=by_batch)
        if stopped:
            raise StoppedEarly(f"{dataset}: {stopped}; or set triplets.annotator: auto to use what is there")
        wait_for_all()
    elif terms.annotator == "offline" or not has_paid_answers(path):
        if is_main():
            annotate.refuse_offline(path)
        return _offline_triplets(dataset, samples)
    return _written_triplets(dataset, samples, path)


def _offline_triplets(dataset: str, samples: Artifact) -> Making:
    folder, _ = yield {"annotator": "offline"}
    rows, labels = read_samples(samples.path, "train").to_dict("records"), sample_labels(samples.path)
    with (folder / "triplets.jsonl").open("w", encoding="utf-8") as file:
        for row in progress(rows, f"offline triplets of {dataset}"):
            file.writelines(map(triplet_line, offline_triplets(row, labels)))


def _written_triplets(dataset: str, samples: Artifact, path: Path) -> Making:
    """A snapshot of the triplets file, validated, in the samples' order: arrival must not decide the training."""
    if not path.is_file() or not path.stat().st_size:
        raise EmonbError(
            f"triplets/{path.name}: no triplets yet; the reasons, if any, stand in {path.stem}.rejected.jsonl; "
            f"ask again: python -m emonb triplets --dataset {dataset}"
        )
    folder, _ = yield {"written": file_digest(path)}
    train = read_samples(samples.path, "train", ["image_id"])["image_id"]
    order = {image_id: i for i, image_id in enumerate(train)}
    found = [t for t in triplet_lines(path) if t["image_id"] in order]  # another split: perhaps a test image now
    if not found:
        raise EmonbError(
            f"triplets/{path.name}: none of its images is a training image of {dataset}; it belongs to other "
            "pictures: move it away, or point IMAGES at them"
        )
    found.sort(key=lambda t: (order[t["image_id"]], KINDS.index(t["kind"])))
    with (folder / "triplets.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(map(triplet_line, found))


# ---- 03: the vision-language model ---------------------------------------------------------------------------------


def _base(settings: VLMSettings) -> dict[str, Any]:
    """What features and answers depend on: the base VLM, how it is loaded, and how pictures are batched."""
    folder = Path(checkpoint_of(settings.base))
    provenance = folder / "provenance.json"  # checkpoints made here have one
    files = (file for file in sorted(folder.glob("[!.]*")) if file.is_file())
    made = read_json(provenance) if provenance.is_file() else {file.name: _ending(file) for file in files}
    cached = {"cache_visual_tokens": settings.cache_visual_tokens, "batch_size": settings.batch_size}
    return {**settings.loading, **cached, "provenance": made or None}


def _ending(file: Path) -> str:
    """What tells other weights of the same name: length and a hash of the last 64 kB; the whole may have gigabytes."""
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - 2**16))
        return f"{size} {hashlib.sha256(opened.read()).hexdigest()[:16]}"


@lru_cache(maxsize=1)
def _load(loading: str) -> VLM:
    from emonb.vlm import load_vlm

    return load_vlm(**json.loads(loading))


def base_vlm(run: Run) -> VLM:
    """The base VLM, loaded once."""
    return _load(json.dumps(run.settings.vlm.loading))


@stage("03_instruction_tuning")
def features(run: Run, dataset: str, *, samples: Artifact) -> Making:
    """Each picture once through the frozen vision tower.

    Files: `<split>.pooled.npy` [N, D] float16 and `<split>.grid.npy` [N, 3]; `ids.json` with each split's image ids in
    order; with `vlm.cache_visual_tokens` also `<split>-<number>.safetensors`, shards of `tokens` [sum of n_i, D]. Of a
    class whose pictures stand between other tokens also these (`VisualTokens.frames`): `<split>.frames.npy` [F], each
    picture's ended by -1.
    """
    import torch

    config = run.settings.vlm
    folder, parts = yield _base(config)
    tables = _tables(samples)

    def see(split: str, rows: range) -> dict[str, Tensor]:
        seen = list(_see(base_vlm(run), tables[split]["path"].iloc[rows].tolist(), config.batch_size))
        pooled, grid = torch.cat([v.pooled().half().cpu() for v in seen]), torch.cat([v.grid for v in seen])
        if not pooled.isfinite().all():
            raise EmonbError(f"visual tokens of {dataset}: more than float16 holds; check vlm.base")
        tokens = [t.cpu() for v in seen for t in v.tokens if config.cache_visual_tokens]
        frames = [token for v in seen for frame in v.frames or () for token in (*frame, -1)]
        more = {"tokens": torch.cat(tokens)} if tokens else {}
        return {"pooled": pooled, "grid": grid, **more} | ({"frames": torch.tensor(frames)} if frames else {})

    shards = _make_shards(tables, parts, see, f"visual tokens of {dataset}")
    if is_main():
        for name in ("pooled", "grid", "frames"):
            for split, tensor in _joined(shards, name).items():
                np.save(folder / f"{split}.{name}.npy", tensor.numpy())
        for file in (file for files in shards.values() for file in files if config.cache_visual_tokens):
            link_or_copy(file, folder / file.name)
        write_json(folder / "ids.json", {s: table["image_id"].tolist() for s, table in tables.items()})


@stage("03_instruction_tuning")
def base_predictions(run: Run, dataset: str, *, samples: Artifact, features: Artifact) -> Making:
    """Zero-shot answers: `predictions.parquet` of val and test, p = softmax over the candidates' log-probabilities."""
    folder, parts = yield {**_base(run.settings.vlm), "seed": run.settings.seed}
    scores = _answers(run, base_vlm(run), samples, features, SPLITS[1:], parts)
    if is_main():
        frame = _predictions(_tables(samples), scores, run.settings.seed, {})
        write_predictions(folder / "predictions.parquet", frame)


@stage("03_instruction_tuning", side_by_side=True)
def adapter(run: Run, dataset: str, seed: int, *, samples: Artifact, triplets: Artifact, features: Artifact) -> Making:
    """LoRA instruction tuning on the triplets: a peft adapter and `history.json`."""
    import torch

    from emonb.tuning import add_lora, save_adapter, tune

    config = run.settings.vlm
    params = {**_base(config), **config.lora, **config.tuning}
    folder, parts = yield {**params, "triplet_kinds": config.triplet_kinds, "seed": seed}
    torch.manual_seed(seed)  # before the adapter is drawn
    base = base_vlm(run)
    tuned = add_lora(base, **config.lora)
    lines = triplet_lines(triplets.path / "triplets.jsonl")
    rows = [row for row in lines if row["kind"] in config.triplet_kinds]
    see = Source(tuned, features, samples, "train")
    options = {"seed": seed, "checkpoint": parts / "checkpoint.pt", "what": f"LoRA of {dataset}, seed {seed}"}
    try:
        history = tune(tuned, rows, see, **config.tuning, **options)
        if is_main():
            save_adapter(tuned, folder)
            write_json(folder / "history.json", history)
    finally:
        base.model = tuned.model.unload()  # the base again, without the adapter


@stage("03_instruction_tuning", side_by_side=True)
def vlm_predictions(
    run: Run, dataset: str, seed: int, *, samples: Artifact, features: Artifact, adapter: Artifact
) -> Making:
    """The tuned VLM's answers: `predictions.parquet` of all splits.

    The first seed's reasons for some test pictures stand there, and in `generated.parquet` its greedy free answers
    about these, parsed.
    """
    from emonb.tuning import adapted

    config, labels = run.settings.vlm, sample_labels(samples.path)
    reasons = config.reasons if seed == run.settings.seed else 0  # for people; generation takes longer than scoring
    words = {"reasons": reasons, "max_new_tokens": config.max_new_tokens, "seed": seed}
    folder, parts = yield {**_base(config), **words}
    tables = _tables(samples)
    last = len(tables["test"]) - 1
    asked = tables["test"].iloc[np.unique(np.linspace(0, last, min(reasons, last + 1)).astype(int))]
    with adapted(base_vlm(run), adapter.path) as tuned:
        why = resource("prompts.yaml", "reasoning", "instructions")[0]
        said = _texts(tuned, asked, why, config, parts / "reasons.json")
        answers = _texts(tuned, asked, question(labels), config, parts / "free_answers.json")
        scores = _answers(run, tuned, samples, features, SPLITS, parts)
    if is_main():
        write_predictions(folder / "predictions.parquet", _predictions(tables, scores, seed, said))
    if is_main() and reasons:  # an answer that cannot be parsed stays unparsed
        texts = [answers[image_id] for image_id in asked["image_id"]]
        about = (asked["image_id"], ["test"] * len(asked), asked["label"])
        named = [parse_emotion(text, labels) for text in texts]
        frame = one_word_predictions(*about, named, labels, seed=seed, raw_text=texts)
        write_predictions(folder / "generated.parquet", frame)


class Source:
    """Visual tokens of a split by image id: from the cache of `features`, or from the picture where there is none."""

    def __init__(self, vlm: VLM, features: Artifact, samples: Artifact, split: str):
        import torch
        from safetensors.torch import load_file

        table = _tables(samples, features)[split]
        self.vlm, self.ids, self.paths = vlm, table["image_id"].tolist(), table["path"].tolist()
        self.row = {image_id: i for i, image_id in enumerate(self.ids)}
        self.grid = torch.from_numpy(np.load(features.path / f"{split}.grid.npy"))
        self.frames = None
        if (framed := features.path / f"{split}.frames.npy").is_file():
            ids = np.load(framed)
            self.frames = [frame[:-1].tolist() for frame in np.split(ids, np.flatnonzero(ids < 0) + 1)[:-1]]
        counts, self.tokens = (self.grid.prod(1) // vlm.merge_size**2).split(SHARD), []
        for i, file in enumerate(sorted(features.path.glob(f"{split}-*.safetensors"))):
            self.tokens += load_file(file)["tokens"].split(counts[i].tolist())

    def __call__(self, image_ids: Sequence[str]) -> VisualTokens:
        """Visual tokens of the given pictures, in the given order."""
        from emonb.vlm import VisualTokens, visual_tokens

        rows = [self.row[i] for i in image_ids]
        if not self.tokens:
            return visual_tokens(self.vlm, [self.paths[row] for row in rows])
        frames = self.frames and [self.frames[row] for row in rows]
        return VisualTokens([self.tokens[row] for row in rows], self.grid[rows], self.vlm.width, frames)

    def batches(self, rows: range, size: int) -> Iterator[VisualTokens]:
        """Visual tokens of the pictures at these positions, batch after batch."""
        if not self.tokens:
            return _see(self.vlm, [self.paths[row] for row in rows], size)
        return (self(self.ids[i : min(i + size, rows.stop)]) for i in rows[::size])


def _see(vlm: VLM, paths: Sequence[str], size: int) -> Iterator[VisualTokens]:
    """Visual tokens of pictures in batches; for a GPU other processes decode the next ones meanwhile."""
    from torch.utils.data import DataLoader

    from emonb.vlm import patches, visual_tokens

    workers = 4 if vlm.device.type == "cuda" else 0
    loader = DataLoader(paths, size, collate_fn=partial(patches, vlm), num_workers=workers)
    return (visual_tokens(vlm, (), cut) for cut in loader)


def _answers(
    run: Run, vlm: VLM, samples: Artifact, features: Artifact, splits: Sequence[str], parts: Path
) -> dict[str, Tensor]:
    """[N, C] log-probabilities of the candidate answers about every picture of some splits."""
    import torch

    from emonb.vlm import answer_distribution

    labels, size = sample_labels(samples.path), run.settings.vlm.batch_size
    sources = {s: Source(vlm, features, samples, s) for s in splits}

    def ask(split: str, rows: range) -> dict[str, Tensor]:
        scores = [answer_distribution(vlm, batch, labels).cpu() for batch in sources[split].batches(rows, size)]
        return {"scores": torch.cat(scores)}

    ids = {s: source.ids for s, source in sources.items()}
    return _joined(_make_shards(ids, parts, ask, f"answers for {samples.name}"), "scores")


def _texts(vlm: VLM, asked: pd.DataFrame, instruction: str, config: VLMSettings, kept: Path) -> dict[str, str]:
    """image id -> the VLM's own words, for people to read; kept in a file so that a killed run need not ask again."""
    from emonb.vlm import generate

    if is_main() and not kept.is_file():
        paths, size, texts = asked["path"].tolist(), config.batch_size, []
        for i in progress(range(0, len(paths), size), kept.stem.replace("_", " ")):
            texts += generate(vlm, paths[i : i + size], instruction, config.max_new_tokens)
        write_json(kept, dict(zip(asked["image_id"], texts, strict=True)))
    return read_json(kept) if is_main() else {}


def _predictions(
    tables: Tables, scores: Mapping[str, Tensor], seed: int, said: Mapping[str, str] | None = None, repeat: int = 0
) -> pd.DataFrame:
    """Predictions of the splits of `scores` ([N, C] logits or log-probabilities); `said`: image id -> VLM's words."""
    frames = []
    for split, logits in scores.items():
        ids, labels, p = tables[split]["image_id"], tables[split].attrs["labels"], logits.double().softmax(-1).numpy()
        texts = None if said is None else [said.get(image_id, "") for image_id in ids]
        options = {"seed": seed, "repeat": repeat, "raw_text": texts}
        frames.append(make_predictions(ids, [split] * len(p), tables[split]["label"], p, labels, **options))
    return pd.concat(frames, ignore_index=True)


def _tables(samples: Artifact, *made: Artifact) -> Tables:
    """The sample tables; raises `EmonbError` for a result that was made of other ones."""
    tables = {s: read_samples(samples.path, s, ["image_id", "path", "label"]) for s in SPLITS}
    ids = {s: table["image_id"].tolist() for s, table in tables.items()}
    for artifact in made:
        if read_json(artifact.path / "ids.json") != ids:
            raise EmonbError(f"{artifact.path}: made of other samples; delete the folder and run again")
    return tables


# ---- work in shards ------------------------------------------------------------------------------------------------


def _make_shards(
    pictures: Mapping[str, Sized], parts: Path, make: Callable[[str, range], dict[str, Tensor]], what: str
) -> dict[str, list[Path]]:
    """Work on the pictures of each split in shards, made once each, by any process, and kept until all are there.

    A shard's size is fixed, so that the batches, and with them the results, are the same whoever works on it. `make`,
    called with split and positions, gives what is in its file; returns the files of each split in their order.
    """
    from safetensors.torch import save_file

    todo = [(s, range(i, min(i + SHARD, len(x)))) for s, x in pictures.items() for i in range(0, len(x), SHARD)]
    files = {(split, rows): parts / f"{split}-{rows.start // SHARD:05d}.safetensors" for split, rows in todo}
    mine = [shard for shard in todo[process_index() :: process_count()] if not files[shard].is_file()]
    for shard in progress(mine, what, unit="shard"):
        partial_file = parts / f".{files[shard].name}.partial"
        save_file(make(*shard), partial_file)
        partial_file.replace(files[shard])
    wait_for_all()
    return {s: [file for (split, _), file in files.items() if split == s] for s in pictures}


def _joined(shards: Mapping[str, Sequence[Path]], name: str) -> dict[str, Tensor]:
    import torch
    from safetensors import safe_open

    opened = {s: [safe_open(file, "pt") for file in files] for s, files in shards.items()}
    found = {s: [file.get_tensor(name) for file in files if name in {*file.keys()}] for s, files in opened.items()}
    return {s: torch.cat(tensors) for s, tensors in found.items() if tensors}


# ---- 04: teachers --------------------------------------------------------------------------------------------------


@stage("04_teacher", side_by_side=True)
def teacher(run: Run, dataset: str, network: str, seed: int, *, samples: Artifact) -> Making:
    """One conventional network.

    Files: `model.safetensors`, `config.json`, `history.json`, `logits.safetensors` ([N, C] per split, with
    `ids.json`: what the student learns from) and `predictions.parquet`.
    """
    import torch
    from safetensors.torch import save_file

    from emonb.model import save_module
    from emonb.teacher import LAYOUT, Pictures, build_network, colours_of, predict_network, train_network, weights_hash

    config, labels = run.settings.teacher.networks[network], sample_labels(samples.path)
    start = weights_hash(config.name, config.weights)
    folder, parts = yield {**config.model_dump(), "network": network, "seed": seed, "start": start}
    torch.manual_seed(seed)
    tables = _tables(samples)
    net = build_network(classes=len(labels), **config.building).to(get_device(), **LAYOUT)
    pictures, colours = {}, colours_of(config.name, config.pretrained, config.weights)
    for split, table in tables.items():
        targets = [labels.index(label) for label in table["label"]]
        pictures[split] = Pictures(table["path"].tolist(), targets, config.image_size, colours, config.crop_scale)
    options = {"seed": seed, "checkpoint": parts / "checkpoint.pt", "what": f"{network} on {dataset}, seed {seed}"}
    train = pictures["train"].augmented(seed)
    history = train_network(net, train, pictures["val"], **config.training, **options)

    def see(split: str, rows: range) -> dict[str, Tensor]:
        return {"logits": predict_network(net, pictures[split], rows)}

    logits = _joined(_make_shards(tables, parts, see, f"{network}'s answers for {dataset}"), "logits")
    if is_main():
        save_module(net, folder / "model.safetensors")
        save_file(logits, folder / "logits.safetensors")
        write_json(folder / "ids.json", {s: table["image_id"].tolist() for s, table in tables.items()})
        write_json(folder / "config.json", {"labels": labels, "network": config.model_dump()})
        write_json(folder / "history.json", history)
        write_predictions(folder / "predictions.parquet", _predictions(tables, logits, seed))


# ---- 05, 06: head, gate, the assembled model -----------------------------------------------------------------------


def cached_tensors(samples: Artifact, features: Artifact, teacher: Artifact) -> dict[str, Cached]:
    """What the heads learn from: of each split features (mapped, not read), logits of the teacher, labels."""
    import torch
    from safetensors.torch import load_file

    from emonb.distill import Cached

    labels, logits, data = sample_labels(samples.path), load_file(teacher.path / "logits.safetensors"), {}
    for split, table in _tables(samples, features, teacher).items():
        pooled = torch.from_numpy(np.load(features.path / f"{split}.pooled.npy", mmap_mode="c"))
        data[split] = Cached(pooled, logits[split], torch.tensor([labels.index(label) for label in table["label"]]))
    return data


@stage("05_distillation", side_by_side=True)
def head(run: Run, dataset: str, seed: int, *, samples: Artifact, features: Artifact, teacher: Artifact) -> Making:
    """All heads of a pipeline; the paper's and the one without teacher several times.

    Files: `<model>.safetensors` of the first time, `heads.json` (sizes, labels), `history.json` (of `head`),
    `logits.safetensors` (`<model>.<split>.repeat<k>` of what gates read; `head_oof.train`: out of fold), and
    `<model>.parquet` predictions. Heads with a schedule of their own, and those out of fold, are of the first seed.
    """
    from safetensors.torch import save_file

    from emonb.distill import Cached, out_of_fold, train_head
    from emonb.training import mixed_seed, outputs

    config, repeats, first = run.settings.distill, run.settings.repeats, seed == run.settings.seed
    params = {**config.model_dump(), "heads": config.heads, "seed": seed, "repeats": repeats, "first": first}
    folder, _ = yield params
    data = cached_tensors(samples, features, teacher)
    there = {s: Cached(*(tensor.to(get_device()) for tensor in cached)) for s, cached in data.items()}

    def train(name: str, repeat: int) -> Trained:
        options = {**config.training, **config.heads[name], "seed": mixed_seed(seed, repeat)}
        short = "lr" in config.heads[name]  # on purpose
        with warnings.catch_warnings(action="ignore") if short else nullcontext():
            net, curve = train_head(there["train"], there["val"], **options)
        return net.cpu(), curve, {s: outputs(net, cached.features) for s, cached in data.items()}

    times = {name: 1 for name, own in config.heads.items() if first or "lr" not in own}
    times |= {name: repeats for name in ("head", head_model(config, alpha=0.0)) if name in times}
    read = {gate["head"] for gate in run.settings.gates.values()}
    kept = _train_all(folder, times, seed, train, _tables(samples), f"heads of {dataset}, seed {seed}", read)
    if first:
        options = {**config.training, **config.heads["head"], "seed": mixed_seed(seed)}
        kept["head_oof.train.repeat0"] = out_of_fold(there["train"], there["val"], **options)
    save_file(kept, folder / "logits.safetensors")
    sizes = {name: list(setting["hidden"]) for name, setting in config.heads.items()}
    width = data["train"].features.shape[1]
    write_json(folder / "heads.json", {"features": width, "hidden": sizes, "labels": sample_labels(samples.path)})


def _train_all(
    folder: Path,
    times: Mapping[str, int],
    seed: int,
    train: Callable[[str, int], Trained],
    tables: Tables,
    what: str,
    keep: Collection[str] = (),
) -> dict[str, Tensor]:
    """Train and write every head or gate so many times, and the curve of the first one.

    Returns the logits of those to `keep`, as `<name>.<split>.repeat<k>`.
    """
    from emonb.model import save_module

    kept = {}
    for name in progress(times, what, unit="model"):
        frames = []
        for repeat in range(times[name]):
            net, curve, scores = train(name, repeat)
            frames.append(_predictions(tables, scores, seed, repeat=repeat))
            kept |= {f"{name}.{split}.repeat{repeat}": logits for split, logits in scores.items() if name in keep}
            if not repeat:
                save_module(net, folder / f"{name}.safetensors")
            if not repeat and name == next(iter(times)):
                write_json(folder / "history.json", curve)
        write_predictions(folder / f"{name}.parquet", pd.concat(frames, ignore_index=True))
    return kept


@stage("06_gate", side_by_side=True)
def gate(run: Run, dataset: str, seed: int, *, vlm_predictions: Artifact, head: Artifact) -> Making:
    """All gates of a pipeline, the paper's several times: it then reads the head that was trained at that time.

    That which learns from val is chosen on train. Out of fold (first seed) are the head's answers, not the VLM's.

    Files: `<model>.safetensors` of the first time, `gates.json`, `<model>.parquet`, `history.json` (of `emovlmkd`).
    """
    from safetensors.torch import load_file

    from emonb.gate import train_gate
    from emonb.training import mixed_seed, outputs

    config, repeats, gates = run.settings.gate, run.settings.repeats, run.settings.gates
    if seed != run.settings.seed:
        gates = {name: gate for name, gate in gates.items() if gate["learns_from"] != "oof"}
    folder, _ = yield {**config.model_dump(), "gates": gates, "seed": seed, "repeats": repeats}
    labels = read_json(head.path / "heads.json")["labels"]
    logits = load_file(head.path / "logits.safetensors")
    answers = {s: read_predictions(vlm_predictions.path / "predictions.parquet", labels, split=s) for s in SPLITS}
    order = {s: rows_of(head.path / "head.parquet", s, answers[s]["image_id"]) for s in SPLITS}

    def train(name: str, repeat: int) -> Trained:
        def told(head: str, s: str) -> Opinions:
            return opinions(answers[s], logits[f"{head}.{s}.repeat{repeat}"][order[s]], gates[name]["inputs"])

        data, learns_from = {s: told(gates[name]["head"], s) for s in SPLITS}, gates[name]["learns_from"]
        known = told("head_oof", "train") if learns_from == "oof" else data["train"]
        pair = (known, data["val"]) if learns_from != "val" else (data["val"], known)
        net, curve = train_gate(gates[name]["kind"], *pair, **config.training, seed=mixed_seed(seed, repeat))
        return net, curve, {s: outputs(net, x.vlm, x.head) for s, x in data.items()}

    times = {name: repeats if name == "emovlmkd" else 1 for name in gates}
    _train_all(folder, times, seed, train, answers, f"gates of {dataset}, seed {seed}")
    write_json(folder / "gates.json", {"labels": labels, "gates": gates})


def opinions(frame: pd.DataFrame, student: Tensor, inputs: str) -> Opinions:
    """What a gate learns from, out of the VLM's predictions of a split and the head's logits in the same order."""
    import torch

    from emonb.gate import Opinions, gate_inputs

    p, parsed = torch.tensor(probabilities(frame), dtype=torch.float32), torch.tensor(frame["parsed"].tolist())
    labels = frame.attrs["labels"]
    gold = torch.tensor([labels.index(label) for label in frame["label"]])
    return Opinions(*gate_inputs(p, parsed, student, inputs), gold)


def rows_of(file: Path, split: str, ids: Iterable[str]) -> list[int]:
    """Positions of pictures in the order of a prediction file (that of any one seed)."""
    there = first_seed(read_predictions(file, split=split))["image_id"]
    position = {image_id: i for i, image_id in enumerate(there)}
    return [position[image_id] for image_id in ids]


@stage("06_gate")
def model(
    run: Run, dataset: str, *, samples: Artifact, features: Artifact, adapter: Artifact, head: Artifact, gate: Artifact
) -> Making:
    """The assembled model of the first seed, and what it has seen; also copied to `OUT/models/<dataset>`."""
    from safetensors.torch import save_file

    from emonb.show.opinions import SEEN
    from emonb.tuning import adapted

    config = _config(run, dataset, head)
    folder, _ = yield config
    with adapted(base_vlm(run), adapter.path) as tuned:
        sources = [Source(tuned, features, samples, split) for split in ("train", "val")]
        save_file(_seen(sources, run.settings.vlm.batch_size), folder / SEEN)
        assemble(tuned, head.path, gate.path, config).save_pretrained(folder)


def _seen(sources: Sequence[Source], size: int) -> dict[str, Tensor]:
    """By what `find_stranger` tells pictures unlike these: the traits of at most `KNOWN` of them, `size` at a time."""
    import torch

    from emonb.show.opinions import familiar_limit, traits

    step, found = -(-sum(len(source.ids) for source in sources) // KNOWN), []
    for source in sources:
        rows = range(0, len(source.ids), step)
        for some in (rows[i : i + size] for i in range(0, len(rows), size)):
            visual = source([source.ids[row] for row in some])
            found.append(traits([source.paths[row] for row in some], visual))
    known, shapes = torch.cat(found), torch.cat([source.grid for source in sources]).unique(dim=0)
    return {"known": known, "limit": torch.tensor(familiar_limit(known)), "shapes": shapes}


def _config(run: Run, dataset: str, head: Artifact) -> dict[str, Any]:
    """What `EmoVLMKD.from_pretrained` needs to know."""
    settings, labels = run.settings, read_json(head.path / "heads.json")["labels"]
    hidden, kind = list(settings.distill.hidden), settings.gate.kind
    config = {"model_type": "emovlm-kd", "dataset": dataset, "labels": labels, "hidden": hidden, "gate": kind}
    return {**config, "vlm": settings.vlm.model_dump(mode="json"), "seed": settings.seed}


def assemble(tuned: VLM, head: Path, gate: Path, config: Mapping[str, Any]) -> EmoVLMKD:
    """The parts of one seed as one model."""
    from emonb.model import EmoVLMKD, load_gate, load_head

    classes = len(config["labels"])
    student = load_head(head / "head.safetensors", config["hidden"], classes)
    gating = load_gate(gate / "emovlmkd.safetensors", config["gate"], classes)
    return EmoVLMKD(tuned, student, gating, dict(config)).eval()


@stage("06_gate")
def cost(run: Run, dataset: str, *, samples: Artifact, adapter: Artifact, head: Artifact, gate: Artifact) -> Making:
    """What an answer of each model costs (`cost.json`); a stored result stays as it was measured."""
    from emonb.cost import PICTURES, WARM_UP, measure, parts_of
    from emonb.tuning import adapted

    settings, networks = run.settings, {}
    for name in settings.teacher.networks:
        with suppress(EmonbError):  # a network that failed has no cost
            networks[name] = run.find("teacher", dataset, name)
    params = {"pictures": PICTURES, "warm_up": WARM_UP, "seed": settings.seed, **settings.vlm.model_dump(mode="json")}
    folder, _ = yield {**params, "networks": {name: artifact.digest for name, artifact in networks.items()}}
    paths = read_samples(samples.path, "test", ["path"])["path"].head(PICTURES).tolist()
    with adapted(base_vlm(run), adapter.path) as tuned:
        models = parts_of(assemble(tuned, head.path, gate.path, _config(run, dataset, head)))
        models |= {name: _measured(artifact.path) for name, artifact in networks.items()}
        write_json(folder / "cost.json", measure(models, paths, tuned.device))


def _measured(folder: Path) -> Measured:
    """A conventional network as `cost.measure` takes it."""
    from emonb.cost import count
    from emonb.teacher import load_network, network_input

    net, settings, _ = load_network(folder)
    net.to(get_device())

    def answer(path: str) -> Tensor:
        return net(network_input([open_picture(path)], settings).to(get_device()))

    return answer, count(net), count(net)
