"""Room 01: the releases of the field as they are downloaded; one small reader for each format.

A reader finds out which pictures a release has and how they are labelled; it opens none of them (that is
`data.build_samples`) and writes nothing. `releases.py` chooses the reader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from emonb.emotions import TAXONOMIES
from emonb.errors import EmonbError
from emonb.settings import SPLITS
from emonb.store import read_json
from emonb.trees import file_problem, plain_text, read_tree, with_attributes

__all__ = [
    "Release",
    "read_bass",
    "read_emoset",
    "read_emotion6",
    "read_fi",
    "read_folder",
    "read_oasis",
    "read_sentiment",
]

BASS_POSITIVE, BASS_NEGATIVE = 5.5, 4.5  # ours: US mean valence on a 1-9 scale, the ambiguous middle left out
OASIS_POSITIVE, OASIS_NEGATIVE = 4.375, 3.625  # ours: the same share of OASIS's 1-7 scale
_EKMAN = TAXONOMIES["ekman6"].labels
_EMOTION6 = (*_EKMAN, "neutral")  # order of the probabilities in a file without header (paper)


@dataclass(frozen=True)
class Release:
    """What a reader found.

    `frame` has `image_id`, `path` (relative to `root`), `label` and optionally `split`, `group` (kept in one
    split), `caption`, `objects`, `scene`, ...; `problems` are image ids by kind; image ids are paths below
    `pictures`; `labels` None: to be inferred; `missing`: splits without list or folder.
    """

    frame: pd.DataFrame
    root: Path
    labels: tuple[str, ...] | None = None
    problems: Mapping[str, list[str]] = field(default_factory=dict)
    missing: Sequence[str] = ()
    pictures: Path | None = None
    placeholders: bool = False  # whether exact copies stand for removed photos
    found: Mapping[str, int] = field(default_factory=dict)  # pictures in the release, before any is left out


def read_emoset(source: Path) -> Release:
    """EmoSet-118K: `info.json`, `{train,val,test}.json` and `annotation/<emotion>/*.json`; either form of rows."""
    classes = _emoset_labels(source / "info.json")
    lists = [s for s in ("test", "val", "train") if (source / f"{s}.json").is_file()]
    if not lists:
        raise EmonbError(f"{source}: none of train.json, val.json, test.json beside info.json; add the lists")
    frame = pd.concat([_emoset_list(source / f"{s}.json", s, classes) for s in lists], ignore_index=True)
    found = {"total": len(frame), **{s: int((frame["split"] == s).sum()) for s in lists}}
    frame, problems = _present(frame, source)  # a picture of two lists counts as test first: the official score
    order = frame["split"].map({s: i for i, s in enumerate(SPLITS)})
    frame = frame.loc[order.sort_values(kind="stable").index].reset_index(drop=True)
    if (source / "annotation").is_dir():
        frame, problems["annotation_missing"] = with_attributes(frame, source, frame["annotation"])
    missing = [f"{s}.json" for s in ("train", "test") if s not in lists]
    return Release(frame.drop(columns="annotation"), source, classes, problems, missing, found=found)


def _emoset_labels(file: Path) -> tuple[str, ...]:
    """Mikels' labels, after a check of `label2idx` (at the top, or below `emotion` as in the official file)."""
    info = read_json(file)
    table = info.get("emotion", info) if isinstance(info, dict) else None
    found = table.get("label2idx") if isinstance(table, dict) else None
    labels = TAXONOMIES["mikels8"].labels
    if not isinstance(found, dict) or set(found) != set(labels):
        raise EmonbError(f"{file}: field 'label2idx' must name {', '.join(labels)}; take the released file")
    return labels


def _emoset_list(file: Path, split: str, labels: Sequence[str]) -> pd.DataFrame:
    rows = read_json(file)
    if not isinstance(rows, list) or not rows:
        raise EmonbError(f"{file}: must be a list of rows [emotion, image, annotation]; take the released file")
    for number, row in enumerate(rows, 1):
        whole = isinstance(row, list) and len(row) in (3, 4) and all(isinstance(x, str) for x in (row[0], *row[-2:]))
        if not whole or row[0] not in labels:
            raise EmonbError(
                f"{file}: row {number} is {json.dumps(row)[:120]}, not [emotion, image, annotation] or "
                f"[emotion, id, image, annotation] with an emotion of {', '.join(labels)}; take the released file"
            )
    columns = {"label": [r[0] for r in rows]}
    columns |= {name: [plain_text(r[i]) for r in rows] for name, i in (("path", -2), ("annotation", -1))}
    return pd.DataFrame({"image_id": columns["path"], **columns}, dtype="str").assign(split=split)


def read_emotion6(source: Path) -> Release:
    """Emotion6: `ground_truth.txt` with valence, arousal and seven probabilities; `images/<emotion>/<n>.jpg`.

    The label is the strongest of the six emotions, whatever folder the picture lies in (the folder is the word
    that was searched for). Where two are equally strong, the first in class order counts, and where most raters
    felt nothing (neutral), the strongest of the six: the paper has six classes and uses all 1,980 pictures. Both
    are reported, so that they can be left out of a comparison.
    """
    table = _emotion6_table(source / "ground_truth.txt")
    names = table["image_id"].str.replace("\\", "/").str.removeprefix("images/")
    six = table[[f"share_{e}" for e in _EKMAN]].to_numpy()
    label = np.array(_EKMAN)[six.argmax(axis=1)]
    frame = table.assign(image_id=names, path="images/" + names, label=label)
    frame, problems = _present(frame[["image_id", "path", "label", *table.columns[1:]]], source)
    six = frame[[f"share_{e}" for e in _EKMAN]].to_numpy()
    tied = (six >= six.max(axis=1, keepdims=True) - 1e-9).sum(axis=1) > 1
    neutral = frame["share_neutral"].to_numpy() > six.max(axis=1)
    problems |= {
        "tied_label": frame.loc[tied, "image_id"].tolist(),
        "neutral_dominant": frame.loc[neutral, "image_id"].tolist(),
    }
    found = {"total": len(table)}
    return Release(frame, source, _EKMAN, problems, pictures=source / "images", found=found)


def _emotion6_table(file: Path) -> pd.DataFrame:
    """`image_id`, valence, arousal and `share_<emotion>` from a file with or without header."""
    lines = [line.split("\t") for line in _text(file).split("\n") if line.strip()]  # as \u2028 may be in a name
    header = [cell.lower() for cell in lines[0]] if lines and not _is_number(lines[0][-1]) else None
    names = ("valence", "arousal", *_EMOTION6)
    where = list(range(1, 10))
    if header:
        where = [next((i for i, cell in enumerate(header) if name in cell), -1) for name in names]
    if not lines or -1 in where:
        raise EmonbError(f"{file}: needs a file name and {', '.join(names)}, tab-separated; take the released file")
    rows = []
    for number, cells in enumerate(lines[1:] if header else lines, 2 if header else 1):
        values = [float(cells[i]) if i < len(cells) and _is_number(cells[i]) else -1.0 for i in where]
        if not all(0 <= p <= 1 for p in values[2:]):
            raise EmonbError(f"{file}: row {number} must have probabilities 0-1 of {', '.join(_EMOTION6)}")
        rows.append([cells[0].strip(), *values])
    return pd.DataFrame(rows, columns=["image_id", "valence", "arousal", *(f"share_{e}" for e in _EMOTION6)])


def read_bass(source: Path) -> Release:
    """BASS: silhouettes with human valence ratings; the middle is left out and counted.

    Pictures of one concept (abuse, abuse2, ...) form a group that stays in one split. The raters'
    keywords become captions, which only the training triplets use.
    """
    table = _csv(source / "BASS_data.csv", {"file_name", "val_mean_us", "keywords"})
    names = table["file_name"]
    frame = pd.DataFrame(
        {
            "image_id": names,
            "path": "images/" + names,
            "label": "",
            "caption": table["keywords"].str.strip(),
            "group": [re.sub(r"\d+$", "", Path(n).stem) for n in names],
        }
    )
    return _by_valence(frame, table["val_mean_us"], (BASS_NEGATIVE, BASS_POSITIVE), source, source / "images")


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
    return _by_valence(frame, table["Valence_mean"], (OASIS_NEGATIVE, OASIS_POSITIVE), source, source)


def read_fi(source: Path) -> Release:
    """FI: `emotion_dataset/<emotion>/*.jpg`, where one and the same picture stands for photos that were removed."""
    folder = source / "emotion_dataset"
    return _tree(folder if folder.is_dir() else source, TAXONOMIES["mikels8"].labels, placeholders=True)


def read_sentiment(source: Path) -> Release:
    """Flickr and Instagram: `positive/` and `negative/`, with or without split folders."""
    return _tree(source, TAXONOMIES["sentiment2"].labels)


def read_folder(source: Path) -> Release:
    """Any tree `<train|val|test>/<emotion>/*` or `<emotion>/*`."""
    return _tree(source, None)


def _tree(root: Path, labels: tuple[str, ...] | None, placeholders: bool = False) -> Release:
    frame, problems, missing = read_tree(root)
    return Release(frame, root, labels, problems, missing, root, placeholders, {"total": len(frame)})


def _present(frame: pd.DataFrame, source: Path) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """The listed pictures that are there, each once, and the problems: kind -> image ids.

    Raises:
        EmonbError: more than half are missing: the pictures are elsewhere, or not unpacked.
    """
    twice = frame.loc[frame.duplicated("image_id"), "image_id"].unique().tolist()
    frame = frame.drop_duplicates("image_id")
    kinds = np.array([file_problem(source, p) or "" for p in frame["path"]], dtype=object)
    absent = frame[kinds != ""]
    if 2 * len(absent) > len(frame):
        raise EmonbError(
            f"{source}: {len(absent)} of {len(frame)} listed pictures are not there, such as "
            f"{absent['path'].iloc[0]!r}; unpack the pictures of the release into this folder"
        )
    problems = {k: frame.loc[kinds == k, "image_id"].tolist() for k in ("listed_but_missing", "symlink_loop")}
    return _kept(frame, kinds == ""), {"listed_twice": twice, **problems}


def _by_valence(
    frame: pd.DataFrame, valence: pd.Series, bounds: tuple[float, float], source: Path, pictures: Path
) -> Release:
    """Label a table of pictures by mean valence: the middle, both bounds excluded, has no label."""
    rating = pd.to_numeric(valence, errors="coerce")
    positive, negative = rating >= bounds[1], rating <= bounds[0]
    problems = {
        "ambiguous_valence_left_out": frame.loc[~(positive | negative | rating.isna()), "image_id"].tolist(),
        "no_rating": frame.loc[rating.isna(), "image_id"].tolist(),
    }
    frame = frame.assign(label=np.where(positive, "positive", "negative"))
    present, more = _present(_kept(frame, (positive | negative).to_numpy()), source)
    labels, found = TAXONOMIES["sentiment2"].labels, {"total": len(frame)}
    return Release(present, source, labels, {**problems, **more}, pictures=pictures, found=found)


def _kept(frame: pd.DataFrame, rows: np.ndarray) -> pd.DataFrame:
    return frame[rows].reset_index(drop=True)


def _csv(file: Path, columns: set[str]) -> pd.DataFrame:
    """A table with all cells as text, so that no name is taken for a number or a missing value."""
    try:
        table = pd.read_csv(file, encoding="utf-8-sig", dtype="str", keep_default_na=False, na_values=[])
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise EmonbError(f"{file}: cannot be read as a table ({error}); take the released file") from None
    missing = columns - set(table.columns)
    if missing:
        raise EmonbError(f"{file}: column {', '.join(sorted(missing))} missing; take the released file")
    table = table.fillna("")  # rows that end early
    return table[(table[sorted(columns)] != "").any(axis=1)].reset_index(drop=True)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise EmonbError(f"{file}: cannot be read as text ({error}); take the released file") from None


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text))
    except ValueError:
        return False
