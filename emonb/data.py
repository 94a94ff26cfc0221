"""Room 01: from releases, folders or the drawn world to one checked sample table per dataset.

The sample table (`samples.parquet`) has one row per usable picture: `image_id` (from the relative path),
`path`, `split`, `label`, `sha256`, `brightness`, `colorfulness` and what the source knows besides
(`caption`, `objects`, `scene`, ...). What was wrong with the others is in `integrity.json` beside it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd

from emonb.emotions import Taxonomy, infer_taxonomy, taxonomy_for_dataset
from emonb.errors import EmonbError
from emonb.miniworld import DRAWN, draw_dataset
from emonb.progress import progress
from emonb.samples import brightness_colorfulness, open_picture, read_samples, sample_labels
from emonb.settings import SPLITS, Settings, project_root
from emonb.store import Artifact, Store, read_json, write_json

__all__ = ["build_samples", "integrity_report", "read_samples", "sample_labels", "samples_stage"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
_ANNOTATION = "annotation"  # EmoSet's folder of attributes
_ATTRIBUTES = ("scene", "facial_expression", "human_action")
SPLIT_SEED = 42  # authors' code: the seed of every split they make
BASS_POSITIVE, BASS_NEGATIVE = 5.5, 4.5  # ours: US mean valence on a 1-9 scale, the ambiguous middle left out


def samples_stage(settings: Settings, store: Store, dataset: str) -> Artifact:
    """Sample table of one dataset as an artefact (stage `samples`)."""
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
        code = ["emonb.data", "emonb.samples", "emonb.miniworld", "emonb.scenes", "emonb.textures"]
    else:
        source = settings.images_path / dataset
        params = {"source": os.path.relpath(source, project_root()), "listing": _listing_digest(source)}
        code = ["emonb.data", "emonb.samples"]

    def build(folder: Path) -> None:
        if drawn:
            frame, problems = draw_dataset(dataset, folder, sizes), {}
            root, labels = folder, taxonomy.labels
            stored_root = "."
        else:
            frame, problems, root = _read_release(dataset, source)
            labels = (taxonomy_for_dataset(dataset) or infer_taxonomy(frame["label"], str(source))).labels
            stored_root = os.path.relpath(root, project_root())
        samples, more = build_samples(frame, root, labels, where=dataset if drawn else str(source))
        samples.to_parquet(folder / "samples.parquet", index=False, row_group_size=4096)  # read in parts
        write_json(folder / "meta.json", {"labels": list(labels), "root": stored_root, "drawn": drawn})
        write_json(folder / "integrity.json", integrity_report(samples, labels, {**problems, **more}))

    return store.get("samples", dataset, build, params=params, code=code)


def build_samples(
    frame: pd.DataFrame, root: Path, labels: Iterable[str], *, where: str
) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """Check every picture of a raw table and make the sample table.

    Args:
        frame: columns `image_id`, `path` (relative to root), `label` and optionally `split`, `group`.
        root: folder that the paths are relative to.
        labels: the taxonomy's labels.
        where: name of the source, for messages.

    Returns:
        The sample table, and the problems found: kind -> list of image ids.

    Raises:
        EmonbError: a label outside the taxonomy, no usable picture, or a class missing from a split.
    """
    taxonomy = Taxonomy(where, tuple(labels))
    for label in frame["label"].unique():
        taxonomy.index(label)
    rows, unreadable = [], []
    for row in progress(frame.to_dict("records"), f"pictures of {Path(where).name}"):
        try:
            path = root / row["path"]
            brightness, colorfulness = brightness_colorfulness(open_picture(path))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except EmonbError:
            unreadable.append(row["image_id"])
            continue
        rows.append({**row, "sha256": digest, "brightness": brightness, "colorfulness": colorfulness})
    if not rows:
        raise EmonbError(f"{where}: no readable picture; put .jpg, .png or .webp files into <split>/<emotion>/")
    samples = _split(pd.DataFrame(rows), where).drop(columns="group", errors="ignore")
    _check_counts(samples, taxonomy, where)
    problems = {"unreadable": unreadable, "duplicate_across_splits": _leaks(samples)}
    return samples, problems


def integrity_report(samples: pd.DataFrame, labels: Iterable[str], problems: dict[str, list[str]]) -> dict:
    """`counts[split][emotion]` and `problems[kind]`, the content of `integrity.json`."""
    table = pd.crosstab(samples["split"], samples["label"])
    counts = {s: {e: int(table.get(e, {}).get(s, 0)) for e in labels} for s in SPLITS}
    return {"counts": counts, "problems": {k: sorted(v) for k, v in problems.items() if len(v)}}


def _listing_digest(source: Path) -> str:
    """Names, sizes and times of all files below a folder: changes when the data change."""
    if not source.is_dir():
        raise EmonbError(f"{source}: no such folder; IMAGES must be the folder that contains {source.name!r}")
    text = [
        f"{p.relative_to(source)}|{p.stat().st_size}|{p.stat().st_mtime_ns}"
        for p in sorted(source.rglob("*"))
        if p.is_file()
    ]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _read_release(name: str, source: Path) -> tuple[pd.DataFrame, dict[str, list[str]], Path]:
    """Raw table, problems and root of a dataset on disk, recognised by its files."""
    if (source / "BASS_data.csv").is_file():
        return (*_read_bass(source), source)
    return _read_tree(source), {}, source


def _read_tree(source: Path) -> pd.DataFrame:
    """`<split>/<emotion>/*` or `<emotion>/*`."""
    folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    split_folders = [p for p in folders if p.name in SPLITS]
    if split_folders and {"train", "test"} - {p.name for p in split_folders}:
        raise EmonbError(f"{source}: has {[p.name for p in split_folders]} but needs both train/ and test/")
    rows = []
    for split in split_folders or [None]:
        parent = split or source
        for emotion in sorted(p for p in parent.iterdir() if p.is_dir() and not p.name.startswith((".", _ANNOTATION))):
            pictures = sorted(p for p in emotion.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
            if not pictures:
                raise EmonbError(f"{emotion}: class without pictures; add .jpg, .png or .webp files or remove it")
            for p in pictures:
                relative = p.relative_to(source)
                row = {"image_id": str(relative), "path": str(relative), "label": emotion.name}
                rows.append({**row, "split": split.name} if split else row)
    if not rows:
        raise EmonbError(f"{source}: zero pictures; expected <train|val|test>/<emotion>/*.jpg (or .png, .webp)")
    return _with_annotations(pd.DataFrame(rows), source)


def _with_annotations(frame: pd.DataFrame, source: Path) -> pd.DataFrame:
    """Add EmoSet's attributes where the tree has `annotation/<emotion>/<name>.json`: for the triplets alone."""
    if not (source / _ANNOTATION).is_dir():
        return frame
    rows = []
    for path, label in zip(frame["path"], frame["label"], strict=True):
        file = source / _ANNOTATION / label / f"{Path(path).stem}.json"
        found = read_json(file) if file.is_file() else {}
        if not isinstance(found, dict):
            raise EmonbError(f"{file}: must be an object with EmoSet's fields; correct or remove the file")
        objects = found.get("object") or []
        row = {"objects": [_words(x) for x in ([objects] if isinstance(objects, str) else objects)]}
        rows.append({**row, **{name: _words(found[name]) for name in _ATTRIBUTES if found.get(name)}})
    return frame.join(pd.DataFrame(rows, index=frame.index).reindex(columns=["objects", *_ATTRIBUTES]))


def _words(value: object) -> str:
    return " ".join(str(value).replace("_", " ").split())


def _read_bass(source: Path) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """BASS: silhouettes with human valence ratings; the middle is left out and counted.

    Pictures of one concept (abuse, abuse2, ...) form a group that stays in one split. The raters'
    keywords become captions, which only the training triplets use.
    """
    table = pd.read_csv(source / "BASS_data.csv")
    missing = {"file_name", "val_mean_us", "keywords"} - set(table.columns)
    if missing:
        raise EmonbError(f"{source / 'BASS_data.csv'}: column {sorted(missing)} missing; take the released file")
    valence = pd.to_numeric(table["val_mean_us"], errors="coerce")
    label = np.select([valence >= BASS_POSITIVE, valence <= BASS_NEGATIVE], ["positive", "negative"], "")
    frame = pd.DataFrame(
        {
            "image_id": table["file_name"],
            "path": "images/" + table["file_name"],
            "label": label,
            "caption": table["keywords"].fillna("").str.strip(),
            "group": [re.sub(r"\d+$", "", Path(n).stem) for n in table["file_name"]],
        }
    )
    middle = frame.loc[frame["label"] == "", "image_id"].tolist()
    return frame[frame["label"] != ""].reset_index(drop=True), {"ambiguous_valence_left_out": middle}


def _split(samples: pd.DataFrame, where: str) -> pd.DataFrame:
    """Give every row a split, keeping the release's own where it has one.

    Without any: 60/10/30 by groups where there are groups (ours: BASS is so small that a tenth for the
    test would leave 40 pictures), else 80/10/10. With train and test only: 10 % of train becomes val.
    """
    if "split" in samples and (samples["split"] == "val").any():
        return samples
    if "group" in samples:
        parts = _folds(samples, samples["group"], 10)
        split = np.select([parts < 6, parts < 7], ["train", "val"], "test")
    elif "split" not in samples:
        parts = _folds(samples, None, 10, where)
        split = np.select([parts < 8, parts < 9], ["train", "val"], "test")
    else:
        split = samples["split"].to_numpy(dtype=object)
        train = np.flatnonzero(split == "train")
        split[train[_folds(samples.iloc[train], None, 10, where) == 9]] = "val"
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


def _check_counts(samples: pd.DataFrame, taxonomy: Taxonomy, where: str) -> None:
    for split in SPLITS:
        present = set(samples.loc[samples["split"] == split, "label"])
        absent = [x for x in taxonomy.labels if x not in present]
        if absent:
            n = int((samples["split"] == split).sum())
            raise EmonbError(
                f"{where}: split {split!r} ({n} readable pictures) has none of class {', '.join(absent)}; "
                f"add pictures to {split}/{absent[0]}/ or leave that class out of all splits and of the taxonomy"
            )


def _leaks(samples: pd.DataFrame) -> list[str]:
    """Images whose exact bytes also occur in another split."""
    splits = samples.groupby("sha256")["split"].transform("nunique")
    return samples.loc[splits > 1, "image_id"].tolist()
