"""First draft of the stage `triplets`, to be merged into `pipeline.py`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from emonb.data import read_samples, sample_labels
from emonb.errors import EmonbError
from emonb.files import atomic_write
from emonb.progress import progress
from emonb.store import Artifact, Recipe, stage
from emonb.triplets import KINDS, has_paid_answers, offline_triplets, prompts_sha256, triplet_line, triplet_lines

if TYPE_CHECKING:
    from emonb.run import Run


@stage("02_triplets")
def triplets(run: Run, dataset: str, *, samples: Artifact) -> Recipe:
    """Triplets of the training images, `triplets.jsonl`; a plain copy for people in `OUT/triplets`.

    Who writes them is `settings.triplets.annotator`: `auto` takes the answers in `OUT/triplets/<dataset>.jsonl`, and
    the offline annotator where there are none; `openai` and `batch` first ask for what is missing there. Keywords,
    captions and scene descriptions are read here and nowhere else: no model sees them at test.
    """
    path, asked = run.out / "triplets" / f"{dataset}.jsonl", run.settings.triplets
    written = has_paid_answers(path)
    if asked.annotator in ("openai", "batch"):
        from emonb import annotate

        frame, labels = read_samples(samples.path), sample_labels(samples.path)
        stopped = annotate.write_triplets(frame, labels, path, asked, batch=asked.annotator == "batch")
        if stopped.startswith("interrupted"):
            raise EmonbError("interrupted; what was answered is saved: run it again to go on")
        written = True
    if asked.annotator == "offline" or not written:
        return _offline_triplets(samples, path)
    return _written_triplets(dataset, samples, path)


def _offline_triplets(samples: Artifact, path: Path) -> Recipe:
    from emonb.annotate.batch import refuse_open_parts
    from emonb.annotate.log import lock_triplets

    with lock_triplets(path):  # a paid run that has no answer yet must not find its file replaced
        refuse_open_parts(path)
        if has_paid_answers(path):
            raise EmonbError(
                f"{path.name}: holds answers that were paid for; set triplets.annotator to auto to use them "
                "(or leave out --annotator), or choose another results folder with OUT (--out)"
            )

    def build(folder: Path, parts: Path) -> None:
        rows, labels = read_samples(samples.path, "train").to_dict("records"), sample_labels(samples.path)
        with (folder / "triplets.jsonl").open("w", encoding="utf-8") as file:
            for row in progress(rows, f"offline triplets of {path.stem}"):
                file.writelines(map(triplet_line, offline_triplets(row, labels)))
        with lock_triplets(path):
            refuse_open_parts(path)
            if not has_paid_answers(path):
                atomic_write(path, (folder / "triplets.jsonl").read_bytes())

    return Recipe(build, {"annotator": "offline", "prompts": prompts_sha256()})


def _written_triplets(dataset: str, samples: Artifact, path: Path) -> Recipe:
    """A snapshot of the triplets file, validated, in the samples' order: arrival must not decide the training."""
    if not path.is_file() or not path.stat().st_size:
        raise EmonbError(
            f"triplets/{path.name}: no triplets yet; the reasons, if any, stand in {path.stem}.rejected.jsonl; "
            f"ask again: python -m emonb triplets --dataset {dataset}"
        )

    def build(folder: Path, parts: Path) -> None:
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

    with path.open("rb") as file:
        return Recipe(build, {"written": hashlib.file_digest(file, "sha256").hexdigest()})
