"""The releases of the field as they are downloaded, and plain trees of pictures: one small reader for each.

A reader finds out which pictures a release has and how they are labelled; it opens none of them (that is
`emonb.data.build_samples`) and writes nothing.
"""

from __future__ import annotations

import csv
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from emonb.data import TAXONOMIES
from emonb.errors import EmonbError
from emonb.files import read_json
from emonb.settings import SPLITS

BASS_BOUNDS = 4.5, 5.5  # ours: US mean valence on a 1-9 scale, the ambiguous middle left out
OASIS_BOUNDS = 3.625, 4.375  # ours: the same share of OASIS's 1-7 scale
MIKELS, EKMAN, SENTIMENT = (TAXONOMIES[name].labels for name in ("mikels8", "ekman6", "sentiment2"))
_EMOTION6 = ("valence", "arousal", *EKMAN, "neutral")  # order of the numbers in a file without header (paper)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_ATTRIBUTES = ("scene", "facial_expression", "human_action")  # EmoSet's, as text
_ANNOTATION = "annotation"  # the folder of EmoSet's attributes
FI_FOLDER = "emotion_dataset"  # which some unpack without
Problems = dict[str, list[str]]


@dataclass(frozen=True)
class Release:
    """What a reader found; problems and their image ids by kind, paths relative to `root`, ids to `pictures`."""

    frame: pd.DataFrame  # image_id, path, label and optionally split, group (kept in one split), caption, objects, ...
    root: Path
    labels: tuple[str, ...] | None = None  # class order; None: to be inferred
    problems: Mapping[str, list[str]] = field(default_factory=dict)
    missing: Sequence[str] = ()  # lists or folders of splits that are not there
    pictures: Path | None = None  # None: the root
    placeholders: bool = False  # whether exact copies stand for removed photos
    found: Mapping[str, int] = field(default_factory=dict)  # pictures in the release, before any is left out


def _refused(file: Path, why: str) -> EmonbError:
    return EmonbError(f"{file}: {why}; take the released file")


# ---- releases with lists -------------------------------------------------------------------------------------------


def read_emoset(source: Path) -> Release:
    """EmoSet-118K: `info.json`, `{train,val,test}.json` and `annotation/<emotion>/*.json`; either form of rows."""
    file, info = source / "info.json", read_json(source / "info.json")
    table = info.get("emotion", info) if isinstance(info, dict) else None  # the official file has it below `emotion`
    labels = table.get("label2idx") if isinstance(table, dict) else None
    if not isinstance(labels, dict) or set(labels) != set(MIKELS):
        raise _refused(file, f"field 'label2idx' must name {', '.join(MIKELS)}")
    lists = [s for s in ("test", "val", "train") if (source / f"{s}.json").is_file()]
    if not lists:
        raise EmonbError(f"{source}: none of train.json, val.json, test.json beside info.json; add the lists")
    parts = {s: _emoset_list(source / f"{s}.json").assign(split=s) for s in lists}
    frame, problems = _present(pd.concat(parts.values(), ignore_index=True), source)
    # a picture of two lists counts as test first: the official score
    frame = pd.concat([frame[frame["split"] == s] for s in SPLITS], ignore_index=True)
    if (source / _ANNOTATION).is_dir():
        frame, problems["annotation_missing"] = _with_attributes(frame, source, frame["annotation"])
    missing = [f"{s}.json" for s in ("train", "test") if s not in lists]
    found = {"total": sum(map(len, parts.values())), **{s: len(part) for s, part in parts.items()}}
    return Release(frame.drop(columns="annotation"), source, MIKELS, problems, missing, found=found)


def _emoset_list(file: Path) -> pd.DataFrame:
    rows = read_json(file)
    if not isinstance(rows, list) or not rows:
        raise _refused(file, "must be a list of rows [emotion, image, annotation]")
    for number, row in enumerate(rows, 1):
        whole = isinstance(row, list) and len(row) in (3, 4) and all(isinstance(x, str) for x in (row[0], *row[-2:]))
        if not whole or row[0] not in MIKELS:
            forms = "[emotion, image, annotation] or [emotion, id, image, annotation]"
            why = f"row {number} is {json.dumps(row)[:120]}, not {forms} with an emotion of {', '.join(MIKELS)}"
            raise _refused(file, why)
    paths, annotations = ([plain_text(row[i]) for row in rows] for i in (-2, -1))
    columns = {"image_id": paths, "label": [row[0] for row in rows], "path": paths, "annotation": annotations}
    return pd.DataFrame(columns, dtype="str")


def read_emotion6(source: Path) -> Release:
    """Emotion6: `ground_truth.txt` with valence, arousal and seven probabilities; `images/<emotion>/<n>.jpg`.

    The label is the strongest of the six emotions, whatever folder the picture lies in (the folder is the word
    that was searched for). Where two are equally strong, the first in class order counts, and where most raters
    felt nothing (neutral), the strongest of the six: the paper has six classes and uses all 1,980 pictures. Both
    are reported, so that they can be left out of a comparison.
    """
    table = _emotion6_table(source / "ground_truth.txt")
    table.insert(1, "path", "images/" + table["image_id"])
    table.insert(2, "label", "")
    frame, problems = _present(table, source)
    six = frame[[f"share_{e}" for e in EKMAN]].to_numpy()  # [N, 6]
    frame["label"] = np.array(EKMAN)[six.argmax(axis=1)]
    tied = (six >= six.max(axis=1, keepdims=True) - 1e-9).sum(axis=1) > 1
    neutral = frame["share_neutral"].to_numpy() > six.max(axis=1)
    problems["tied_label"] = frame.loc[tied, "image_id"].tolist()
    problems["neutral_dominant"] = frame.loc[neutral, "image_id"].tolist()
    return Release(frame, source, EKMAN, problems, pictures=source / "images", found={"total": len(table)})


def _emotion6_table(file: Path) -> pd.DataFrame:
    """`image_id`, valence, arousal and `share_<emotion>` from a file with or without header."""
    table = _cells(file, sep="\t", header=None, quoting=csv.QUOTE_NONE)
    first, where = [cell.lower() for cell in table.iloc[0]], [*range(1, 10)]
    headed = int(pd.isna(pd.to_numeric(first[-1], errors="coerce")))
    if headed:
        where = [next((i for i, cell in enumerate(first) if name in cell), -1) for name in _EMOTION6]
    if -1 in where or len(first) < 10:
        raise _refused(file, f"needs a file name and {', '.join(_EMOTION6)}, tab-separated")
    names = [*_EMOTION6[:2], *(f"share_{e}" for e in _EMOTION6[2:])]
    numbers = table.iloc[headed:, where].apply(pd.to_numeric, errors="coerce").set_axis(names, axis=1)
    fine = numbers.iloc[:, 2:].apply(lambda share: share.between(0, 1)).all(axis=1)
    if not fine.all():
        row = fine.idxmin() + 1
        raise _refused(file, f"row {row} must have probabilities 0-1 of {', '.join(_EMOTION6[2:])}")
    names = table[0].str.strip().str.replace("\\", "/").str.removeprefix("images/")
    numbers.insert(0, "image_id", names)
    return numbers.reset_index(drop=True)


def read_bass(source: Path) -> Release:
    """BASS: silhouettes with human valence ratings; the middle is left out and counted.

    Pictures of one concept (abuse, abuse2, ...) form a group that stays in one split. The raters'
    keywords become captions, which only the training triplets use.
    """
    table = _csv(source / "BASS_data.csv", {"file_name", "val_mean_us", "keywords"})
    names = table["file_name"]
    frame = pd.DataFrame({"image_id": names, "path": "images/" + names, "label": ""})
    frame["caption"] = table["keywords"].str.strip()
    frame["group"] = [re.sub(r"\d+$", "", Path(name).stem) for name in names]
    return _by_valence(frame, table["val_mean_us"], BASS_BOUNDS, source, source / "images")


def read_oasis(source: Path) -> Release:
    """OASIS: photos with mean valence on 1-7; pictures of one theme (Acorns 1, Acorns 2, ...) stay in one split."""
    table = _csv(source / "OASIS.csv", {"Theme", "Category", "Valence_mean"})
    folder = next((f for f in ("images", "Images") if (source / f).is_dir()), ".")
    # Some themes end with a space, in the table or in the file's name.
    files = {p.stem.strip(): p.name for p in sorted((source / folder).iterdir()) if p.suffix.lower() == ".jpg"}
    themes = table["Theme"].str.strip()
    paths = [str(Path(folder, files.get(theme, f"{theme}.jpg"))) for theme in themes]
    words = themes.str.replace(r"\s*\d+$", "", regex=True).str.lower()
    frame = pd.DataFrame({"image_id": paths, "path": paths, "label": "", "caption": words, "group": words})
    frame["category"] = table["Category"].str.strip()
    return _by_valence(frame, table["Valence_mean"], OASIS_BOUNDS, source, source)


def _by_valence(
    frame: pd.DataFrame, valence: pd.Series, bounds: tuple[float, float], source: Path, pictures: Path
) -> Release:
    """Label a table of pictures by mean valence: the middle, both bounds excluded, has no label."""
    rating = pd.to_numeric(valence, errors="coerce")
    negative, positive = rating <= bounds[0], rating >= bounds[1]
    told = {
        "ambiguous_valence_left_out": frame.loc[~(positive | negative | rating.isna()), "image_id"].tolist(),
        "no_rating": frame.loc[rating.isna(), "image_id"].tolist(),
    }
    rated = frame.assign(label=np.where(positive, "positive", "negative"))[positive | negative]
    present, problems = _present(rated, source)
    return Release(present, source, SENTIMENT, told | problems, pictures=pictures, found={"total": len(frame)})


def _csv(file: Path, columns: set[str]) -> pd.DataFrame:
    """A table that has these columns; rows without any of them are left out."""
    table = _cells(file)
    missing = columns - set(table.columns)
    if missing:
        raise _refused(file, f"column {', '.join(sorted(missing))} missing")
    return table[(table[sorted(columns)] != "").any(axis=1)].reset_index(drop=True)


def _cells(file: Path, **options: Any) -> pd.DataFrame:
    """A table with all cells as text, so that no name is taken for a number or a missing value."""
    try:
        table = pd.read_csv(file, encoding="utf-8-sig", dtype="str", keep_default_na=False, na_values=[], **options)
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise _refused(file, f"cannot be read as a table ({error})") from None
    return table.fillna("")  # rows that end early


def _present(frame: pd.DataFrame, source: Path) -> tuple[pd.DataFrame, Problems]:
    """The listed pictures that are there, each once, and the problems: kind -> image ids.

    Raises:
        EmonbError: more than half are missing: the pictures are elsewhere, or not unpacked.
    """
    twice = frame.loc[frame.duplicated("image_id"), "image_id"].unique().tolist()
    frame = frame.drop_duplicates("image_id")
    there = np.array([is_file_below(source, path) for path in frame["path"]], dtype=bool)
    absent = frame[~there]
    if 2 * len(absent) > len(frame):
        raise EmonbError(
            f"{source}: {len(absent)} of {len(frame)} listed pictures are not there, such as "
            f"{absent['path'].iloc[0]!r}; unpack the pictures of the release into this folder"
        )
    problems = {"listed_twice": twice, "listed_but_missing": absent["image_id"].tolist()}
    return frame[there].reset_index(drop=True), problems


def is_file_below(root: Path, path: str) -> bool:
    """Whether a path that a list gives is a file of the release: no folder or pipe, and nothing outside the root."""
    try:
        return not os.path.isabs(path) and ".." not in path.split("/") and stat.S_ISREG(os.stat(root / path).st_mode)
    except (OSError, ValueError):  # not there, a loop of links; a NUL character in the name
        return False


def _with_attributes(frame: pd.DataFrame, root: Path, files: Iterable[str]) -> tuple[pd.DataFrame, list[str]]:
    """A raw table with EmoSet's attributes, for the triplets alone: `objects` (list of text), `scene`, ...

    `files` are the annotation files of its rows. Returned are, too, the image ids of pictures whose file is missing
    or damaged: they have no objects and no attributes.
    """
    columns, lacking = {name: [] for name in ("objects", *_ATTRIBUTES)}, []
    for image_id, file in zip(frame["image_id"], files, strict=True):
        try:
            found = read_json(root / file) if is_file_below(root, file) else None
        except EmonbError:
            found = None
        if not isinstance(found, dict):
            found = {}
            lacking.append(image_id)
        objects = found.get("object") or []
        columns["objects"].append([_words(x) for x in (objects if isinstance(objects, list) else [objects])])
        for name in _ATTRIBUTES:
            columns[name].append(_words(found[name]) if found.get(name) else None)
    objects = pd.arrays.ArrowExtensionArray(pa.array(columns["objects"], pa.list_(pa.string())))
    text = {name: pd.Series(columns[name], dtype="str", index=frame.index) for name in _ATTRIBUTES}
    return frame.assign(objects=pd.Series(objects, index=frame.index), **text), lacking


def _words(value: object) -> str:
    return plain_text(" ".join(str(value).replace("_", " ").split()))


def plain_text(text: str) -> str:
    """Text that every file format can hold: bytes of a name that are not UTF-8, and halves of characters, escaped."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        data = text.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


# ---- trees of folders ----------------------------------------------------------------------------------------------


def read_fi(source: Path) -> Release:
    """FI: `emotion_dataset/<emotion>/*.jpg`, where one and the same picture stands for photos that were removed."""
    folder = source / FI_FOLDER
    return read_tree(folder if folder.is_dir() else source, MIKELS, placeholders=True)


def read_sentiment(source: Path) -> Release:
    """Flickr and Instagram: `positive/` and `negative/`, with or without split folders."""
    return read_tree(source, SENTIMENT)


def read_tree(root: Path, labels: tuple[str, ...] | None = None, placeholders: bool = False) -> Release:
    """`<train|val|test>/<emotion>/*` or `<emotion>/*`; folder names count in lower case.

    Raises:
        EmonbError: no pictures, or a class without pictures.
    """
    problems: Problems = {}
    parts = []
    splits = [p for name in SPLITS for p in sorted(root.iterdir()) if p.name.lower() == name and p.is_dir()]
    missing = [f"{name}/" for name in ("train", "test") if splits and name not in {p.name.lower() for p in splits}]
    for path in _scan(root, root, problems, folders=True) if splits else ():
        if path not in splits:
            _tell(problems, "unused_file", path, root)
    for parent in splits or [root]:
        for emotion in _scan(parent, root, problems, folders=True):
            paths = [str(p.relative_to(root)) for p in _scan(emotion, root, problems, folders=False)]
            if not paths:
                raise EmonbError(f"{emotion}: class without pictures; add .jpg, .png or .webp files or remove it")
            part = pd.DataFrame({"image_id": paths, "path": paths}, dtype="str").assign(label=emotion.name.lower())
            parts.append(part.assign(split=parent.name.lower()) if splits else part)
    if not parts:
        raise EmonbError(f"{root}: zero pictures; expected <train|val|test>/<emotion>/*.jpg (or .png, .webp)")
    frame = pd.concat(parts, ignore_index=True)
    if (root / _ANNOTATION).is_dir():  # as EmoSet's: annotation/<emotion>/<name>.json
        files = (f"{_ANNOTATION}/{Path(p).parent.name}/{Path(p).stem}.json" for p in frame["path"])
        frame, problems["annotation_missing"] = _with_attributes(frame, root, files)
    return Release(frame, root, labels, problems, missing, root, placeholders, {"total": len(frame)})


def _scan(folder: Path, root: Path, problems: Problems, folders: bool) -> list[Path]:
    """The class folders, or else the pictures, in a folder; what cannot be used is a problem."""
    found, above = [], {folder.resolve(), *folder.resolve().parents}
    for path in sorted(folder.iterdir()):
        picture = path.suffix.lower() in _SUFFIXES
        if path.name.startswith("._" if picture else ".") or (folders and path.name.startswith(_ANNOTATION)):
            continue  # nobody misses hidden files, macOS's `._photo.jpg` included
        if path.is_symlink() and (not path.exists() or path.resolve() in above):
            _tell(problems, "broken_link", path, root)
        elif not (path.is_dir() if folders else picture and path.is_file()):
            if picture or not folders:  # a picture without emotion; no picture among the pictures
                _tell(problems, "unused_file", path, root)
        elif plain_text(path.name) != path.name:
            _tell(problems, "undecodable_name", path, root)
        else:
            found.append(path)
    return found


def _tell(problems: Problems, kind: str, path: Path, root: Path) -> None:
    folder = "/" if kind == "unused_file" and path.is_dir() else ""
    problems.setdefault(kind, []).append(plain_text(str(path.relative_to(root))) + folder)
