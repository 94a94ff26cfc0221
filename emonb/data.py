"""Room 01: from releases, folders or the drawn world to one checked sample table per dataset.

The sample table (`samples.parquet`) has one row per usable picture: `image_id` (from the relative path),
`path`, `split`, `label`, `sha256`, `brightness`, `colorfulness` and what the source knows besides
(`caption`, `objects`, `scene`, ...). What was wrong with the others is in `integrity.json` beside it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from emonb.emotions import Taxonomy, infer_taxonomy, taxonomy_for_dataset
from emonb.errors import EmonbError
from emonb.integrity import KINDS, duplicates, file_codes, inspected, merged, placeholders
from emonb.listing import IMPORT_FILE, listing_digest, source_of
from emonb.miniworld import DRAWN, draw_dataset
from emonb.releases import FORMATS, Release, read_release, recognise
from emonb.samples import read_samples, sample_labels
from emonb.settings import SPLITS, Settings, project_root
from emonb.store import Artifact, Store, read_json, write_json

__all__ = [
    "SampleTable",
    "build_samples",
    "integrity_report",
    "read_import",
    "read_samples",
    "sample_labels",
    "sample_table",
    "samples_stage",
    "write_samples",
]

_CODE = ["emonb.data", "emonb.samples", "emonb.integrity"]
SPLIT_SEED = 42  # authors' code: the seed of every split they make


@dataclass(frozen=True)
class SampleTable:
    """A checked sample table and what belongs to it.

    `labels`: class order; `root`, `pictures`: the folders that paths and image ids are relative to; `report`: the
    content of `integrity.json`; `form`: the release's format, or `drawn`.
    """

    samples: pd.DataFrame
    labels: tuple[str, ...]
    root: Path
    pictures: Path
    report: dict[str, Any]
    form: str


def samples_stage(settings: Settings, store: Store, dataset: str) -> Artifact:
    """Sample table of one dataset as an artefact (stage `samples`): drawn, imported, or a release on disk."""
    drawn = dataset in DRAWN
    if not drawn and settings.images_path is None:
        raise EmonbError(
            f"unknown dataset {dataset!r}: drawn ones are {', '.join(DRAWN)}; "
            "for a dataset on disk also give its folder's parent: IMAGES=ROOT"
        )
    if drawn:
        taxonomy = taxonomy_for_dataset(dataset)
        sizes = dict(zip(SPLITS, getattr(settings.world, taxonomy.name), strict=True))
        lexicon = resources.files("emonb").joinpath("resources", "lexicon.yaml").read_bytes()
        params = {"source": "drawn", "sizes": sizes, "lexicon": hashlib.sha256(lexicon).hexdigest()}
        code = [*_CODE, "emonb.miniworld", "emonb.scenes", "emonb.textures"]
    else:
        source = settings.images_path / dataset
        if not source.is_dir():
            raise EmonbError(f"{source}: no such folder; IMAGES must be the folder that contains {source.name!r}")
        params = {"source": os.path.relpath(source, project_root()), "listing": listing_digest(source)}
        code = [*_CODE, "emonb.releases", "emonb.release_readers", "emonb.trees"]

    def build(folder: Path) -> None:
        if drawn:
            release = Release(draw_dataset(dataset, folder, sizes), folder, taxonomy.labels)
            table = sample_table(release, dataset, "drawn", where=dataset)
        elif (source / IMPORT_FILE).is_file():
            table = read_import(source)
        else:
            form = recognise(source, dataset)
            table = sample_table(read_release(form, source), dataset, form, where=str(source))
        write_samples(table.samples, folder)
        paths = {"root": table.root, "pictures": table.pictures}
        meta = {key: "." if drawn else os.path.relpath(path, project_root()) for key, path in paths.items()}
        write_json(folder / "meta.json", {"labels": list(table.labels), "drawn": drawn, "format": table.form, **meta})
        write_json(folder / "integrity.json", table.report)

    return store.get("samples", dataset, build, params=params, code=code)


def sample_table(release: Release, dataset: str, form: str, *, where: str, partial: bool = False) -> SampleTable:
    """Check every picture of a release of a format; raises as `build_samples`.

    Labels that the format does not fix follow from the dataset's name, or from the labels found.
    """
    labels = release.labels
    if labels is None:
        labels = (taxonomy_for_dataset(dataset) or infer_taxonomy(release.frame["label"].unique(), where)).labels
    samples, problems = build_samples(
        release.frame, release.root, labels, where=where, partial=partial, drop_placeholders=release.placeholders
    )
    report = integrity_report(samples, labels, merged(release.problems, problems))
    official = FORMATS[form].expected if form in FORMATS else {}
    report["found"] = dict(release.found)
    report["expected"] = {**official, "about": FORMATS[form].about} if official else {}
    return SampleTable(samples, labels, release.root, release.pictures or release.root, report, form)


def read_import(folder: Path) -> SampleTable:
    """The sample table that `python -m emonb data import` wrote.

    Raises:
        EmonbError: a file is missing or damaged, the pictures changed since, or the table lacks a split.
    """
    source = source_of(folder)
    record, report = read_json(folder / IMPORT_FILE), read_json(folder / "integrity.json")
    words = ["data", "import", record.get("format"), source, "--out", folder.parent, "--name", folder.name]
    again = f"python -m emonb {shlex.join(map(str, words))}"
    try:
        samples = pd.read_parquet(folder / "samples.parquet")
        labels, root, pictures = tuple(record["labels"]), Path(record["root"]), Path(record["pictures"])
        listed, form, _ = record["listing"], record["format"], (report["counts"], report["problems"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EmonbError(f"{folder}: the import is damaged ({error}); import again: {again}") from None
    if listed != listing_digest(source):
        raise EmonbError(f"{folder}: files in {source} changed since the import; import again: {again}")
    absent = [split for split in SPLITS if not (samples["split"] == split).any()]
    if absent:
        raise EmonbError(
            f"{folder}: imported with --allow-missing-split, has no {' and no '.join(absent)}; a run needs all of "
            f"{', '.join(SPLITS)}: add what is missing to {source} and import again: {again}"
        )
    return SampleTable(samples, labels, root, pictures, report, form)


def write_samples(samples: pd.DataFrame, folder: Path) -> None:
    """Write `samples.parquet`, in groups of rows so that it can be read in parts; plain columns for any reader."""
    table = pa.Table.from_pandas(samples, preserve_index=False).replace_schema_metadata(None)
    parquet.write_table(table, folder / "samples.parquet", row_group_size=4096)


def build_samples(
    frame: pd.DataFrame,
    root: Path,
    labels: Iterable[str],
    *,
    where: str,
    partial: bool = False,
    drop_placeholders: bool = False,
) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """Check every picture of a raw table and make the sample table.

    Args:
        frame: columns `image_id`, `path` (relative to root), `label` and optionally `split`, `group`.
        root: folder that the paths are relative to.
        labels: the taxonomy's labels.
        where: name of the source, for messages.
        partial: whether a split may be missing as a whole.
        drop_placeholders: leave out exact copies that stand for removed photos.

    Returns:
        The sample table, and the problems found: kind (see `integrity.KINDS`) -> list of image ids.

    Raises:
        EmonbError: a label outside the taxonomy, no usable picture, or a class missing from a split.
    """
    taxonomy = Taxonomy(where, tuple(labels))
    for label in frame["label"].unique():
        taxonomy.index(label)
    measured, problems = inspected(frame, root, f"pictures of {Path(where).name}")
    samples = measured[measured["sha256"] != ""].reset_index(drop=True)
    if drop_placeholders:
        problems["placeholder"] = placeholders(samples)
        samples = samples[~samples["image_id"].isin(problems["placeholder"])].reset_index(drop=True)
    if samples.empty:
        raise EmonbError(f"{where}: no readable picture; put .jpg, .png or .webp files into <split>/<emotion>/")
    samples = _split(samples, where).drop(columns="group", errors="ignore")
    _check_counts(samples, taxonomy, where, partial)
    return samples, merged(problems, duplicates(samples))


def integrity_report(samples: pd.DataFrame, labels: Iterable[str], problems: dict[str, list[str]]) -> dict:
    """`counts[split][emotion]` and `problems[kind]`, the content of `integrity.json`."""
    table = pd.crosstab(samples["split"], samples["label"])
    counts = {s: {e: int(table.get(e, {}).get(s, 0)) for e in labels} for s in SPLITS}
    kinds = [kind for kind in sorted(problems, key=[*KINDS].index) if len(problems[kind])]
    return {"counts": counts, "problems": {kind: sorted(problems[kind]) for kind in kinds}}


def _split(samples: pd.DataFrame, where: str) -> pd.DataFrame:
    """Give every row a split, keeping the release's own where it has one.

    Without any: 60/10/30 by groups where there are groups (ours: BASS is so small that a tenth for the
    test would leave 40 pictures), else 80/10/10. With train and test only: 10 % of train becomes val. Exact
    copies follow the first one (ours), so that a split made here leaks nothing.
    """
    if "split" in samples and ((samples["split"] == "val").any() or not (samples["split"] == "train").any()):
        return samples
    if "group" in samples:
        parts = _folds(samples, samples["group"], 10)
        return samples.assign(split=np.select([parts < 6, parts < 7], ["train", "val"], "test"))
    if "split" not in samples:
        parts = _folds(samples, None, 10, where)
        samples = samples.assign(split=np.select([parts < 8, parts < 9], ["train", "val"], "test"))
        return samples.assign(split=samples["split"].groupby(file_codes(samples)).transform("first"))
    split = samples["split"].to_numpy(dtype=object)
    train = np.flatnonzero(split == "train")
    split[train[_folds(samples.iloc[train], None, 10, where) == 9]] = "val"
    split[train] = pd.Series(split[train]).groupby(file_codes(samples)[train]).transform("first")
    return samples.assign(split=split)


def _folds(samples: pd.DataFrame, groups: pd.Series | None, n: int, where: str = "") -> np.ndarray:
    """Fold number of each row, stratified by label (and kept together by group), seed 42 as the authors'."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    smallest = samples["label"].value_counts()
    if groups is None and smallest.min() < n:
        raise EmonbError(
            f"{where}: class {smallest.idxmin()!r} has {smallest.min()} pictures, too few to split off val; "
            f"give at least {n} or make the split folders train/, val/ and test/ yourself"
        )
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    fold = np.empty(len(samples), dtype=int)
    splitter = kind(n_splits=n, shuffle=True, random_state=SPLIT_SEED)
    for i, (_, rows) in enumerate(splitter.split(samples, samples["label"], groups)):
        fold[rows] = i
    return fold


def _check_counts(samples: pd.DataFrame, taxonomy: Taxonomy, where: str, partial: bool) -> None:
    for split in SPLITS:
        present = set(samples.loc[samples["split"] == split, "label"])
        if partial and not present:
            continue
        absent = [x for x in taxonomy.labels if x not in present]
        if absent:
            n = int((samples["split"] == split).sum())
            raise EmonbError(
                f"{where}: split {split!r} ({n} readable pictures) has none of class {', '.join(absent)}; "
                f"add pictures to {split}/{absent[0]}/ or leave that class out of all splits and of the taxonomy"
            )
