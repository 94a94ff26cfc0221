"""The releases of the field as they are downloaded, and plain trees of pictures: one small reader for each.

A reader finds out which pictures a release has and how they are labelled; it opens none of them (that is
`emonb.releases.imports`) and writes nothing. Where to get each release stands in `resources/releases.yaml`.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from emonb.data import TAXONOMIES
from emonb.errors import EmonbError
from emonb.files import read_json, resource
from emonb.settings import SPLITS

MIKELS, EKMAN, SENTIMENT = (TAXONOMIES[name].labels for name in ("mikels8", "ekman6", "sentiment2"))
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_FI = "emotion_dataset"  # a folder that some unpack without
_PARTS = {  # by which a release is recognised
    "emotion6": "ground_truth.txt",
    "oasis": "OASIS.csv",
    "bass": "BASS_data.csv",
    "emoset": "image/amusement",
    "fi": _FI,
}


@dataclass(frozen=True)
class Release:
    """What a reader found; paths are relative to `root`."""

    frame: pd.DataFrame  # image_id, path, label and optionally split, group (kept in one split), caption, objects, ...
    root: Path
    labels: Sequence[str] | None = None  # class order; None: to be inferred
    problems: dict[str, list[str]] = field(default_factory=dict)  # kind -> image ids
    found: Mapping[str, int] = field(default_factory=dict)  # pictures in the release, before any is left out


def recognise(source: Path, name: str = "") -> str:
    """Name of the format of a release folder, by its files; a tree of unknown origin is `folder`.

    FI's bare emotion folders look like any other tree: they are `fi` only where the dataset has that name, because
    FI's reader also looks for the placeholders of removed photos. Flickr and Instagram are read as plain trees.
    """
    found = (form for form, part in _PARTS.items() if os.path.exists(source / part))
    return next(found, "fi" if name == "fi" else "folder")


def read_release(form: str, source: Path) -> Release:
    """Read a release of a named format, a key of `READERS`.

    Raises `EmonbError`: unknown format, no such folder, files of another format or none, or no permission to read.
    """
    if form not in READERS:
        raise EmonbError(f"format {form!r}: unknown; use one of {', '.join(READERS)}")
    if not source.is_dir():
        raise EmonbError(f"{source}: no such folder; give the folder that the release was unpacked into")
    if form != "fi" and not os.path.exists(source / _PARTS.get(form, ".")):
        made_of = resource("releases.yaml")[form]["made_of"]
        raise EmonbError(f"{source}: no {form} release: it is made of {made_of}; give the folder that holds these")
    try:
        return READERS[form](source)
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else source
        raise EmonbError(f"{where}: cannot be read ({error.strerror}); give yourself permission to read it") from None


# ---- releases with lists -------------------------------------------------------------------------------------------


def read_emoset(source: Path) -> Release:
    """EmoSet-118K: lists `{train,val,test}.json`, of which the last counts, and `annotation/<emotion>/*.json`."""
    lists = [_emoset_list(source, split) for split in SPLITS if (source / f"{split}.json").is_file()]
    if not lists:
        raise EmonbError(f"{source}: none of train.json, val.json, test.json beside info.json; add the lists")
    release = _release(pd.concat(lists, ignore_index=True), source, MIKELS)
    files = release.frame.pop("annotation")
    if (source / "annotation").is_dir():
        seen = pd.DataFrame([_annotated(source, file) for file in files], columns=["objects", "scene"])
        types = {"objects": pd.ArrowDtype(pa.list_(pa.string())), "scene": "str"}
        release = replace(release, frame=release.frame.join(seen.astype(types)))
    return release


def _emoset_list(source: Path, split: str) -> pd.DataFrame:
    """The rows of a list, `[emotion, image, annotation]` or `[emotion, id, image, annotation]`."""
    file = source / f"{split}.json"
    rows = read_json(file)
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        whole = isinstance(row, list) and len(row) in (3, 4) and all(isinstance(x, str) for x in (row[0], *row[-2:]))
        if not whole or row[0] not in MIKELS:
            form = f"[emotion, image, annotation] with an emotion of {', '.join(MIKELS)}"
            raise EmonbError(f"{file}: row {number} is {row!r:.120}, not {form}; take the released file")
    table = [(plain_text(row[-2]), row[0], plain_text(row[-2]), plain_text(row[-1])) for row in rows]
    return pd.DataFrame(table, columns=["image_id", "label", "path", "annotation"], dtype="str").assign(split=split)


def _annotated(root: Path, file: str) -> tuple[list[str], str | None]:
    """Objects and scene of an annotation of EmoSet, for the triplets alone; none where it is damaged or absent."""
    with suppress(EmonbError, AttributeError):
        found = read_json(root / file) if _is_file_below(root, file) else {}
        objects = found.get("object") or []
        objects = [_words(name) for name in (objects if isinstance(objects, list) else [objects])]
        return objects, _words(found.get("scene") or "") or None
    return [], None


def _words(value: object) -> str:
    return plain_text(" ".join(str(value).replace("_", " ").split()))


def read_emotion6(source: Path) -> Release:
    """Emotion6: `ground_truth.txt` with valence, arousal and seven probabilities; `images/<emotion>/<n>.jpg`.

    The label is the folder, the word that was searched for (authors' tree), also in `label_folder`. `label_majority`
    is the raters' strongest of the six emotions. Where two are equally strong, the first in class order counts, and
    where most raters felt nothing (neutral), the strongest of the six. Both are reported, as is where the two labels
    differ. A dataset named `emotion6-majority` takes the raters' label.
    """
    columns = {f"[{name}]": name for name in ("valence", "arousal")}
    columns |= {f"[prob. {emotion}]": f"share_{emotion}" for emotion in (*EKMAN, "neutral")}
    table = _table(source / "ground_truth.txt", ["[image_filename]"], [*columns], sep="\t", quoting=csv.QUOTE_NONE)
    table = table.dropna().rename(columns=columns)
    names = table.pop("[image_filename]")
    shares = [f"share_{emotion}" for emotion in EKMAN]
    table["label_folder"] = names.str.split("/").str[0].str.lower()
    table["label_majority"] = table[shares].idxmax(axis=1).str.removeprefix("share_")
    label = table["label_folder"]
    frame = pd.DataFrame({"image_id": names, "path": "images/" + names, "label": label}).join(table)
    release = _release(frame, source, EKMAN)
    frame, best = release.frame, release.frame[shares].max(axis=1)
    tied = frame[shares].ge(best - 1e-9, axis=0).sum(axis=1) > 1
    release.problems["tied_label"] = frame.loc[tied, "image_id"].tolist()
    release.problems["neutral_dominant"] = frame.loc[frame["share_neutral"] > best, "image_id"].tolist()
    differ = frame["label_folder"] != frame["label_majority"]
    release.problems["raters_differ"] = frame.loc[differ, "image_id"].tolist()
    return release


def read_bass(source: Path) -> Release:
    """BASS: silhouettes with human valence ratings; the middle is left out and counted.

    Pictures of one concept (abuse, abuse2, ...) form a group that stays in one split. The raters'
    keywords become captions, which only the training triplets use.
    """
    table = _table(source / "BASS_data.csv", ["file_name", "keywords"], ["val_mean_us"])
    names, valence = table["file_name"], table["val_mean_us"]
    label = np.select([valence <= 4.5, valence >= 5.5], ["negative", "positive"], "")  # ours: of the US raters' 1-9
    frame = pd.DataFrame({"image_id": names, "path": "images/" + names, "label": label})
    frame["caption"] = table["keywords"].str.strip()
    frame["group"] = [re.sub(r"\d+$", "", Path(name).stem) for name in names]
    return _release(frame, source, SENTIMENT)


def read_oasis(source: Path) -> Release:
    """OASIS: photos with mean valence on 1-7; pictures of one theme (Acorns 1, Acorns 2, ...) stay in one split."""
    table = _table(source / "OASIS.csv", ["Theme"], ["Valence_mean"])
    # some themes end with a space, in the table or in the file's name
    files, themes = {p.stem.strip(): p.name for p in (source / "images").iterdir()}, table["Theme"].str.strip()
    paths = [f"images/{files.get(theme, f'{theme}.jpg')}" for theme in themes]
    words = themes.str.replace(r"\s*\d+$", "", regex=True).str.lower()
    valence = table["Valence_mean"]  # ours: the same share of 1-7 as BASS' of 1-9
    label = np.select([valence <= 3.625, valence >= 4.375], ["negative", "positive"], "")
    frame = pd.DataFrame({"image_id": paths, "path": paths, "label": label, "caption": words, "group": words})
    return _release(frame, source, SENTIMENT)


def _table(file: Path, text: list[str], numbers: list[str], **options: Any) -> pd.DataFrame:
    """Columns of a CSV file, in this order; rows whose first one is empty are left out.

    No name is taken for a number or a missing value.
    """
    types = dict.fromkeys(text, "str") | dict.fromkeys(numbers, "float64")
    options |= {"keep_default_na": False, "na_values": dict.fromkeys(numbers, "")}
    try:
        table = pd.read_csv(file, usecols=[*types], dtype=types, encoding="utf-8-sig", **options)
    except ValueError as error:  # pandas' parser errors, too
        raise EmonbError(f"{file}: needs columns {', '.join(types)} ({error}); take the released file") from None
    return table.loc[table[text[0]] != "", [*types]].reset_index(drop=True)


def _release(listed: pd.DataFrame, source: Path, labels: Sequence[str]) -> Release:
    """A release of the listed pictures that have a label (the ambiguous middle: "") and are there, each once.

    Of several rows for one picture the last counts.
    """
    rated = listed[listed["label"] != ""]
    frame = rated.drop_duplicates("image_id", keep="last")
    there = np.array([_is_file_below(source, path) for path in frame["path"]], dtype=bool)
    problems = {
        "listed_but_missing": frame.loc[~there, "image_id"].tolist(),
        "listed_twice": rated.loc[rated.duplicated("image_id"), "image_id"].unique().tolist(),
        "ambiguous_valence_left_out": listed.loc[listed["label"] == "", "image_id"].tolist(),
    }
    found = {"total": len(listed), **Counter(listed.get("split", ()))}
    return Release(frame[there].reset_index(drop=True), source, labels, problems, found)


def _is_file_below(root: Path, path: str) -> bool:
    """Whether a path that a list gives is a file of the release: no folder or pipe, and nothing outside the root."""
    return not os.path.isabs(path) and ".." not in path.split("/") and os.path.isfile(root / path)


def plain_text(text: str) -> str:
    """Text that every file format can hold: bytes of a name that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


# ---- trees of folders ----------------------------------------------------------------------------------------------


def read_fi(source: Path) -> Release:
    """FI: `emotion_dataset/<emotion>/*.jpg`, where one and the same picture stands for photos that were removed."""
    return read_tree(source / _FI if (source / _FI).is_dir() else source, MIKELS)


def read_tree(root: Path, labels: Sequence[str] | None = None) -> Release:
    """`<train|val|test>/<emotion>/*` or `<emotion>/*`; folder names count in lower case, the rest is reported.

    Raises `EmonbError` where there are no pictures.
    """
    unused: list[Path] = []
    top = list(_entries(root, unused))
    splits = [path for split in SPLITS for path in top if path.name.lower() == split and path.is_dir()]
    unused += [path for path in top if splits and path not in splits]
    rows: list[tuple[str, ...]] = []
    for emotion in [path for split in splits for path in _entries(split, unused)] if splits else top:
        inside = list(_entries(emotion, unused)) if emotion.is_dir() else []
        # a broken link is for the inspection to tell
        fit = [p for p in inside if p.suffix.lower() in _SUFFIXES and (p.is_file() or not p.exists())]
        unused += {*inside} - {*fit} if fit else [emotion]
        named = emotion.name.lower(), emotion.parent.name.lower()
        rows += [(path := str(p.relative_to(root)), path, *named) for p in fit]
    if not rows:
        raise EmonbError(f"{root}: zero pictures; expected <train|val|test>/<emotion>/*.jpg (or .png, .webp)")
    frame = pd.DataFrame(rows, columns=["image_id", "path", "label", "split"], dtype="str")
    frame = frame if splits else frame.drop(columns="split")
    problems = {"unused_file": [plain_text(str(p.relative_to(root))) + "/" * p.is_dir() for p in unused]}
    return Release(frame, root, labels, problems, {"total": len(frame)})


def _entries(folder: Path, unused: list[Path]) -> Iterator[Path]:
    """What lies in a folder, in order, without hidden files; names that are no UTF-8 are unused."""
    for path in sorted(folder.iterdir()):
        if plain_text(path.name) != path.name:
            unused.append(path)
        elif not path.name.startswith("."):
            yield path


READERS: dict[str, Callable[[Path], Release]] = {
    "emoset": read_emoset,
    "emotion6": read_emotion6,
    "fi": read_fi,
    "flickr": partial(read_tree, labels=SENTIMENT),
    "instagram": partial(read_tree, labels=SENTIMENT),
    "oasis": read_oasis,
    "bass": read_bass,
    "folder": read_tree,
}
