"""The releases of the field as they are downloaded, and plain trees of pictures: one small reader for each.

A reader finds out which pictures a release has and how they are labelled; it opens none of them (that is
`emonb.releases.imports`) and writes nothing. Where to get each release stands in `resources/releases.yaml`.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from emonb.data import ENDINGS, TAXONOMIES, is_leftover
from emonb.errors import EmonbError
from emonb.files import read_json, read_text, resource
from emonb.releases.lists import LIST_ENDINGS, caption_key, find_lists, listed_rows, located, read_captions, read_table
from emonb.releases.names import clean, own_classes, split_of, split_within
from emonb.settings import SPLITS

MIKELS, EKMAN, SENTIMENT = (TAXONOMIES[name].labels for name in ("mikels8", "ekman6", "sentiment2"))
KNOWN = {label for taxonomy in TAXONOMIES.values() for label in taxonomy.labels}
_FI = "emotion_dataset"  # a folder that some unpack without
_CLASSES = "classes.txt"
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
    notes: Sequence[str] = ()  # what was read in another way than it was written
    problems: dict[str, list[str]] = field(default_factory=dict)  # kind -> image ids
    found: Mapping[str, int] = field(default_factory=dict)  # pictures in the release, before any is left out


def recognise(source: Path, name: str = "") -> str:
    """Name of the format of a release folder, by its files; a list of paths and labels is `list`, else it is `folder`.

    FI's bare emotion folders look like any other tree: they are `fi` only where the dataset has that name, because
    FI's reader also looks for the placeholders of removed photos. Flickr and Instagram are read as plain trees.
    Raises `EmonbError` for a list beside folders of emotions.
    """
    inner = _unpacked(source, *_PARTS.values())
    if found := [form for form, part in _PARTS.items() if os.path.exists(inner / part)]:
        return found[0]
    if name == "fi" or not (lists := find_lists(source)[0]):
        return "fi" if name == "fi" else "folder"
    if folders := [p.name for p in (*source.glob("*/"), *source.glob("*/*/")) if clean(p.name) in KNOWN]:
        both = f"holds the list {lists[0].name} and folders such as {folders[0]}"
        raise EmonbError(f"{source}: {both}; which one counts? Say: data import list, or data import folder")
    return "list"


def read_release(form: str, source: Path, names: Mapping[str, str] | None = None) -> Release:
    """Read a release of a named format, a key of `READERS`; `names` are the user's readings of folders and splits.

    Raises `EmonbError`: unknown format, no such folder, files of another format or none, or no permission to read.
    """
    if form not in READERS:
        raise EmonbError(f"format {form!r}: unknown; use one of {', '.join(READERS)}")
    if form == "list" and not source.is_dir():
        if not source.is_file():
            raise EmonbError(f"{source}: no such list or folder; give a file, or the folder that it lies in")
        if not source.name.lower().endswith(LIST_ENDINGS):
            raise EmonbError(f"{source}: no list by its ending; save it as {', '.join(LIST_ENDINGS)}")
    elif not source.is_dir():
        what = "a file, no folder" if source.is_file() else "no such folder"
        raise EmonbError(f"{source}: {what}; give the folder that the release was unpacked into")
    source = _unpacked(source, _PARTS.get(form, "."))
    if form != "fi" and not os.path.exists(source / _PARTS.get(form, ".")) and source.is_dir():
        made_of = resource("releases.yaml")[form]["made_of"]
        raise EmonbError(f"{source}: no {form} release: it is made of {made_of}; give the folder that holds these")
    try:
        beside = source if source.is_dir() else source.parent
        return _with_captions(READERS[form](source, names or {}), beside / "captions.csv")
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else source
        raise EmonbError(f"{where}: cannot be read ({error.strerror}); give yourself permission to read it") from None


def _with_captions(release: Release, file: Path) -> Release:
    """With the captions of a file beside the pictures, from which the offline annotator writes."""
    if not file.is_file():
        return release
    known, keys = read_captions(file), release.frame["path"].map(caption_key)
    found = keys.map(known).fillna(keys.str.rsplit("/", n=1).str[-1].map(known))
    frame = release.frame.assign(caption=found.fillna(release.frame.get("caption", "")))
    note = f"{file.name}: captions of {found.notna().sum()} of {len(found)} pictures"
    return replace(release, frame=frame, notes=[*release.notes, note])


def _unpacked(source: Path, *parts: str) -> Path:
    """The folder that has one of the parts: this one, or one below it, as archives unpack into one of their name."""
    inner = [p for p in source.glob("*/") if not is_leftover(p.name)] if source.is_dir() else []
    fits = (folder for folder in (source, *inner) if any(os.path.exists(folder / part) for part in parts))
    return next(fits, source)


def classes_beside(folder: Path) -> tuple[str, ...] | None:
    """The own taxonomy of a source: the lines of its `classes.txt`, but for remarks, or one line with commas."""
    files = [file for file in sorted(folder.iterdir()) if file.name.casefold() == _CLASSES and file.is_file()]
    if len(files) > 1:
        raise EmonbError(f"{folder}: {files[0].name} or {files[1].name}? Remove one")
    if not files:
        return None
    lines = [line for line in read_text(files[0], "cp1252").splitlines() if line.strip() and line.lstrip()[0] != "#"]
    return own_classes(lines[0].split(",") if len(lines) == 1 else lines, files[0])


# ---- releases with lists -------------------------------------------------------------------------------------------


def read_emoset(source: Path, names: Mapping[str, str]) -> Release:
    """EmoSet-118K: lists `{train,val,test}.json`, of which the last counts, and `annotation/<emotion>/*.json`."""
    lists = [_emoset_list(source, split) for split in SPLITS if os.path.lexists(source / f"{split}.json")]
    if not lists:
        raise EmonbError(f"{source}: none of train.json, val.json, test.json beside info.json; add the lists")
    release = _release(pd.concat(lists, ignore_index=True), source, MIKELS)
    files = release.frame.pop("annotation")
    if (source / "annotation").is_dir():
        found = [_annotated(source / file) for file in located(files, source)]
        seen = pd.DataFrame(found, columns=["objects", "scene"])
        types = {"objects": pd.ArrowDtype(pa.list_(pa.string())), "scene": "str"}
        release = replace(release, frame=release.frame.join(seen.astype(types)))
    return release


def _emoset_list(source: Path, split: str) -> pd.DataFrame:
    """The rows of a list, `[emotion, image, annotation]` or `[emotion, id, image, annotation]`.

    An emotion may be written in capitals, or as the number that `info.json` gives it.
    """
    file, numbers = source / f"{split}.json", {}
    remedy = f"get it again from {resource('releases.yaml', 'emoset', 'page')}"
    rows = read_json(file, remedy)
    with suppress(EmonbError, AttributeError, KeyError, TypeError):
        numbers = {str(i): name for name, i in read_json(source / "info.json")["emotion"]["label2idx"].items()}
    table = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        whole = isinstance(row, list) and len(row) in (3, 4) and all(isinstance(x, str) for x in row[-2:])
        label = clean(numbers.get(str(row[0]), row[0])) if whole else ""
        if label not in MIKELS:
            form = f"[emotion, image, annotation] with an emotion of {', '.join(MIKELS)}"
            raise EmonbError(f"{file}: row {number} is {row!r:.120}, not {form}; {remedy}")
        table.append((plain_text(row[-2]), label, plain_text(row[-2]), plain_text(row[-1])))
    return pd.DataFrame(table, columns=["image_id", "label", "path", "annotation"], dtype="str").assign(split=split)


def _annotated(file: Path) -> tuple[list[str], str | None]:
    """Objects and scene of an annotation of EmoSet, for the triplets alone; none where it is damaged or absent."""
    with suppress(EmonbError, AttributeError):
        found = read_json(file) if file.is_file() else {}
        objects = found.get("object") or []
        objects = [_words(name) for name in (objects if isinstance(objects, list) else [objects])]
        return objects, _words(found.get("scene") or "") or None
    return [], None


def _words(value: object) -> str:
    return plain_text(" ".join(str(value).replace("_", " ").split()))


def read_emotion6(source: Path, names: Mapping[str, str]) -> Release:
    """Emotion6: `ground_truth.txt` with valence, arousal and seven probabilities; `images/<emotion>/<n>.jpg`.

    The label is the folder, the word that was searched for (authors' tree), also in `label_folder`. `label_majority`
    is the raters' strongest of the six emotions. Where two are equally strong, the first in class order counts, and
    where most raters felt nothing (neutral), the strongest of the six. Both are reported, as is where the two labels
    differ. A dataset named `emotion6-majority` takes the raters' label.
    """
    columns = {f"[{name}]": name for name in ("valence", "arousal")}
    columns |= {f"[prob. {emotion}]": f"share_{emotion}" for emotion in (*EKMAN, "neutral")}
    table = _table(source / "ground_truth.txt", ["[image_filename]"], [*columns], quoting=csv.QUOTE_NONE)
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


def read_bass(source: Path, names: Mapping[str, str]) -> Release:
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


def read_oasis(source: Path, names: Mapping[str, str]) -> Release:
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
    """Columns of a release's table, in this order; rows whose first one is empty are left out."""
    table, columns = read_table(file, **options), [*text, *numbers]
    try:
        values = table[columns].copy()
        for name in numbers:  # in half of the world a decimal comma
            values[name] = table[name].str.strip().str.replace(",", ".").replace("", "nan").astype("float64")
    except (KeyError, ValueError) as error:
        raise EmonbError(f"{file}: needs columns {', '.join(columns)} ({error}); take the released file") from None
    return values[values[text[0]] != ""].reset_index(drop=True)


def _release(listed: pd.DataFrame, source: Path, labels: Sequence[str] | None) -> Release:
    """A release of the listed pictures that have a label (the ambiguous middle: "") and are there, each once.

    Of several rows for one picture the last counts.
    """
    where = pd.Series(located(listed["path"], source), index=listed.index, dtype="str")
    same, there = listed["image_id"] == listed["path"], where != ""
    listed = listed.assign(image_id=listed["image_id"].mask(same & there, where), path=where)
    rated = listed[listed["label"] != ""]
    frame = rated.drop_duplicates("image_id", keep="last")
    problems = {
        "listed_but_missing": frame.loc[frame["path"] == "", "image_id"].tolist(),
        "listed_twice": rated.loc[rated.duplicated("image_id"), "image_id"].unique().tolist(),
        "ambiguous_valence_left_out": listed.loc[listed["label"] == "", "image_id"].tolist(),
    }
    once = listed.drop_duplicates("image_id", keep="last")
    found = {"total": len(once), **Counter(filter(None, once.get("split", ())))}
    return Release(frame[frame["path"] != ""].reset_index(drop=True), source, labels, (), problems, found)


def plain_text(text: str) -> str:
    """Text that every file format can hold: bytes of a name that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


# ---- other people's lists and folders ------------------------------------------------------------------------------


def read_list(source: Path, names: Mapping[str, str]) -> Release:
    """Lists of paths and labels (see `emonb.releases.lists`), in a folder or one as a file; the folders do not count.

    The split is a column, or the name of the list or of its folder. Raises `EmonbError` where lists or rows contradict
    each other.
    """
    root, files, others = source.parent, [source], {}
    if source.is_dir():
        root, (files, others) = source, find_lists(source)
    splits = {file: _split_named(file, root, names)[1] for file in files}
    notes = [f"{file.relative_to(root)} is left out: --map says so" for file in files if splits[file] == ""]
    files = [file for file in files if splits[file] != ""]
    notes += _passed_over(others, files, root, names)
    tables = {file: _list_of(file, root, names, splits[file]) for file in files}
    whole = [file for file, table in tables.items() if "split" not in table]
    if whole and len(files) > 1:
        which = f"{' or '.join(file.name for file in files)}? Give the one: data import list {files[0]}"
        if split := [file for file in files if file not in whole]:
            which = f"{split[0].name} tells its split, {whole[0].name} does not; "
            which += f"remove that one, or leave it out: --map '{whole[0].stem}='"
        raise EmonbError(f"{source}: {which}")
    frame = pd.concat(tables.values(), ignore_index=True).fillna("")
    for told in (name for name in ("label", "split") if name in frame):
        each = frame[frame[told] != ""].groupby("path")[told].unique()
        if len(odd := each[each.str.len() > 1]):
            both = " as well as ".join(map(repr, odd.iloc[0][:2]))
            why = f"{odd.index[0]!r} is {both} ({len(odd)} such {told}s); keep one row of each"
            raise EmonbError(f"{files[0]}: {why}")
    left = frame["label"] == ""
    left |= frame["split"] == "" if "split" in frame else False
    release = _release(frame.assign(image_id=frame["path"], label=frame["label"].mask(left, "")), root, None)
    release.problems["no_label"] = release.problems.pop("ambiguous_valence_left_out")
    return replace(release, labels=classes_beside(root), notes=notes)


def _list_of(file: Path, root: Path, names: Mapping[str, str], split: str | None) -> pd.DataFrame:
    """The rows of one list with paths relative to `root`; `split` counts where it has no column for it."""
    rows, base = listed_rows(file), os.path.relpath(file.parent, root)
    below = [path and os.path.normpath(os.path.join(base, path)) for path in located(rows["path"], file.parent)]
    rows["path"] = [new or plain_text(old) for new, old in zip(below, rows["path"], strict=True)]
    if "split" in rows:
        read = {value: value and split_of(value, names, file) for value in rows["split"].unique()}
        if odd := [value for value, split in read.items() if split is None]:
            why = f"split {odd[0]!r} is none of train, val, test; say --map '{odd[0]}=val' or so"
            raise EmonbError(f"{file}: {why}")
        rows["split"] = rows["split"].map(read)
    elif split:
        rows["split"] = split
    return rows


def _passed_over(others: Mapping[Path, str], lists: Sequence[Path], root: Path, names: Mapping[str, str]) -> list[str]:
    """Notes about files that look like lists and are none.

    Raises `EmonbError` for one that stands for a split by its name, or where there is no list besides.
    """
    if others and not lists:
        raise EmonbError("; ".join([*others.values()][:3]))
    if not lists:
        raise EmonbError(f"{root}: no list of paths and labels; save yours as {', '.join(LIST_ENDINGS)}")
    for file, why in others.items():
        word, split = _split_named(file, root, names)
        named = word == file.stem or file.name in {other.name for other in lists}
        if split and named and len(file.parts) == len(lists[0].parts):
            raise EmonbError(f"{why}, or leave it out: --map '{word}='")
    told = [why for file, why in others.items() if file.name != "captions.csv"]
    return [f"passed over: {why}" for why in told[:3]] + [f"passed over: {len(told) - 3} more"] * (len(told) > 3)


def _split_named(file: Path, root: Path, names: Mapping[str, str]) -> tuple[str, str | None]:
    """The name of a list, or of its folder, that stands for a split, and the split (see `split_of`)."""
    for word in (file.stem, *file.relative_to(root).parts[:-1]):
        if (split := split_of(word, names, file)) is not None:
            return word, split
    return file.stem, None


def read_fi(source: Path, names: Mapping[str, str]) -> Release:
    """FI: `emotion_dataset/<emotion>/*.jpg`, where one and the same picture stands for photos that were removed."""
    return read_tree(source / _FI if (source / _FI).is_dir() else source, names, MIKELS)


def read_tree(root: Path, names: Mapping[str, str], labels: Sequence[str] | None = None) -> Release:
    """`<train|val|test>/<emotion>/*`, `<emotion>/*` or `<emotion>/<split>/*`, also below a folder of a single name.

    Pictures deeper below an emotion belong to it. Raises `EmonbError` where there are no pictures, or the folders can
    be read in two ways.
    """
    pictures, unused, leftovers = _pictures(root)
    labels = labels or classes_beside(root)
    parts = {path: path.relative_to(root).parts[:-1] for path in pictures}
    splits = {name: split_of(name, names, root) for name in sorted({name for p in parts.values() for name in p})}
    at = min((n for p in parts.values() for n, name in enumerate(p) if splits[name]), default=None)
    deep = {path: p for path, p in parts.items() if len(p) > (at or 0)}
    level = [sorted(filter(None, folders)) for folders in map(set, zip_longest(*deep.values()))]  # names by depth
    first = next((n for n, folders in enumerate(level) if len(folders) > 1), len(level) - 1)  # where names differ
    kind = first if at is None or first < at else at + 1
    below = level[kind + 1] if kind + 1 < len(level) and kind + 1 != at else []
    if at is not None and 2 * len(deep) < len(parts):
        raise _two_ways(root, f"{level[at][0]}/ a split or an album", f"with --map '{level[at][0]}=' if an album")
    if at is not None and first < at and at + 1 < len(level):
        raise _two_ways(root, f"the emotion {level[first][0]!r} or {level[at + 1][0]!r}", "from a folder of one kind")
    asked = [name for name in level[kind] if at is None and split_within(name)] if below else []
    if both := [name for name in below if asked or clean(name) in KNOWN | {*(labels or ())}]:
        way = ",".join(f"{name}={split_within(name) or 'SPLIT'}" for name in level[kind])
        way = "from a folder of one kind" + f"; of splits, with --map '{way}'" * (at is None)
        raise _two_ways(root, f"the emotion {level[kind][0]!r} or {both[0]!r} below it", way)
    named = level[at] if at is not None else ()
    for name in named:
        if splits[name] is None:
            way = f"with --map '{name}=val' or another, or without it: --map '{name}='"
            raise _two_ways(root, f"{name}/ a split", way)
        if same := [other for other in named if splits[other] and splits[other] == splits[name] and other < name]:
            raise _two_ways(root, f"{same[0]}/ or {name}/ {splits[name]}", f"with --map '{name}=' to leave one out")
    rows, left = [], []
    for path, p in deep.items():
        split, name = "" if at is None else splits[p[at]], str(path.relative_to(root))
        if at is not None and split == "":
            left.append(path)
        elif len(p) > kind:
            rows.append((name, name, p[kind], split))
    unused += [path for path, p in parts.items() if len(p) <= max(kind, at or 0)]
    if not rows:
        wanted = f"<train|val|test>/<emotion>/*.jpg (or {', '.join(ENDINGS[1:])})"
        raise EmonbError(f"{root}: zero pictures; expected {wanted}, or a list of paths and labels: data import list")
    frame = pd.DataFrame(rows, columns=["image_id", "path", "label", "split"], dtype="str")
    frame = frame if at is not None else frame.drop(columns="split")
    unused = [path for path in unused if (path.parent, path.name.casefold()) != (root, _CLASSES)]
    problems = {
        kind: [plain_text(str(path.relative_to(root))) + "/" * path.is_dir() for path in paths]
        for kind, paths in (("unused_file", unused), ("leftover", leftovers), ("left_out_as_told", left))
    }
    notes = [f"{name}/ is read as {splits[name]}" for name in named if splits[name] not in ("", clean(name))]
    return Release(frame, root, labels, notes, problems, {"total": len(frame) + len(left)})


def _two_ways(root: Path, which: str, way: str) -> EmonbError:
    """The error about folders that can be read in two ways."""
    return EmonbError(f"{root}: is {which}? Import it {way}")


def _pictures(folder: Path, above: frozenset[str] = frozenset()) -> tuple[list[Path], list[Path], list[Path]]:
    """Pictures below a folder in order, what is none, and leftovers; links to folders are followed, not in circles.

    A folder without any picture is told as one.
    """
    pictures, unused, leftovers = [], [], []
    above |= {os.path.realpath(folder)}
    for path in sorted(folder.iterdir()):
        if is_leftover(path.name):
            leftovers.append(path)
        elif plain_text(path.name) != path.name:
            unused.append(path)
        elif path.is_dir():
            inside = ([], [], []) if os.path.realpath(path) in above else _pictures(path, above)
            pictures += inside[0]
            unused += inside[1] if inside[0] else [path]
            leftovers += inside[2]
        else:  # a broken link is for the inspection to tell
            fit = path.suffix.lower() in ENDINGS and (path.is_file() or not path.exists())
            (pictures if fit else unused).append(path)
    return pictures, unused, leftovers


READERS: dict[str, Callable[[Path, Mapping[str, str]], Release]] = {
    "emoset": read_emoset,
    "emotion6": read_emotion6,
    "fi": read_fi,
    "flickr": partial(read_tree, labels=SENTIMENT),
    "instagram": partial(read_tree, labels=SENTIMENT),
    "oasis": read_oasis,
    "bass": read_bass,
    "list": read_list,
    "folder": read_tree,
}
