"""What is wrong or odd about the pictures of a dataset: the kinds of problems, the report and its tables."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from emonb.data import table_folder, thumbnail
from emonb.errors import UnreadablePicture
from emonb.files import read_json, visible
from emonb.releases.readers import is_file_below

LEFT_OUT = {
    "empty": "0 bytes",
    "truncated": "the file ends before the picture does: copy or download it again",
    "damaged": "the picture's data are broken: copy or download it again",
    "not_a_picture": "named like a picture, the content is none (of JPEG, PNG, WebP, GIF, BMP, TIFF)",
    "decompression_bomb": "more than 89 million pixels: it would fill the memory",
    "no_access": "the file cannot be opened: no permission, or the disk fails",
    "broken_link": "a link to a file that is not there, or back to itself or to a folder above it",
    "undecodable_name": "the file's name is not valid UTF-8: rename it",
    "unused_file": "lies beside the pictures and is no .jpg, .jpeg, .png or .webp of an emotion",
    "listed_but_missing": "the release lists it, the file is not there",
    "placeholder": "exactly the same picture many times or under different emotions: a removed photo",
    "ambiguous_valence_left_out": "the raters' mean valence lies in the ambiguous middle",
    "no_rating": "the release gives no rating",
}
KEPT = {
    "listed_twice": "the release lists it more than once: the first of test, val, train counts",
    "annotation_missing": "its annotation file is missing or damaged: no attributes for the triplets",
    "tied_label": "two emotions have the same highest probability: the first in class order is the label",
    "neutral_dominant": "neutral has the highest probability; labelled with the strongest of the six",
    "duplicate": "exactly the same picture twice within a split",
    "duplicate_across_splits": "exactly the same picture in two splits: leakage",
    "wrong_suffix": "the name claims another format than the picture has; read by its content",
    "animated": "several frames: the first is used",
    "exif_rotated": "stored rotated or mirrored: turned as the camera says",
    "greyscale": "stored without colours",
    "cmyk": "stored in printing colours: converted",
    "palette": "stored with a palette: converted",
    "very_large": "over 4096 px a side or 25 million pixels: slow to read",
}
KINDS = LEFT_OUT | KEPT
UNKNOWN = "not known here"


def problem_table(reports: Mapping[str, Mapping[str, Any]], names: int = 3) -> pd.DataFrame:
    """The problems of several datasets: `dataset`, `problem`, `pictures`, `consequence`, `meaning`, `names`.

    Args:
        reports: dataset -> content of its `integrity.json`.
        names: how many names of pictures stand in a row; all of them are in `integrity.json`.
    """
    rows = []
    for dataset, report in reports.items():
        for kind, ids in report["problems"].items():
            shown = ", ".join(map(visible, ids[:names])) + f" and {len(ids) - names} more" * (len(ids) > names)
            fate, meaning = "kept" if kind in KEPT else "left out", KINDS.get(kind, "")  # "": of an earlier version
            rows.append((dataset, kind, len(ids), fate, meaning, shown))
    return pd.DataFrame(rows, columns=["dataset", "problem", "pictures", "consequence", "meaning", "names"])


def problem_examples(folder: Path, each: int = 6) -> dict[str, list[Image.Image]]:
    """Small pictures of each kind of problem that can be shown, `each` at most; kinds in the order of `KINDS`.

    Args:
        folder: of a result of the stage `samples`; names in its report that lead elsewhere show nothing.
        each: so many a kind.
    """
    pictures, found = table_folder(folder, "pictures"), {}
    for kind, ids in read_json(folder / "integrity.json")["problems"].items():
        for image_id in (i for i in ids[:each] if is_file_below(pictures, i)):
            with suppress(UnreadablePicture), warnings.catch_warnings():  # most often that is the problem
                warnings.simplefilter("ignore")
                picture = thumbnail(pictures / image_id, 96)
                found.setdefault(kind, []).append(picture)
    return found


def size_table(reports: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Sizes of releases before anything was left out: `dataset`, `part`, `found`, `official`; drawn sets have none."""
    rows = []
    for dataset, report in reports.items():
        about = "about " if report["expected"].get("about") else ""
        for part, found in report["found"].items():
            official = report["expected"].get(part)
            rows.append((dataset, part, found, f"{about}{official:,}" if official else UNKNOWN))
    return pd.DataFrame(rows, columns=["dataset", "part", "found", "official"])
