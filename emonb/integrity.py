"""Room 01: is a picture fit to be used? What can be wrong with one, and with several that are the same.

Every kind of problem has a name, a sentence and a consequence (`KINDS`): left out, or kept and reported.
`unreadable` sums up all pictures that cannot be used as such; the finer kinds say why.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from emonb.parallel import cores
from emonb.progress import progress
from emonb.samples import as_seen, brightness_colorfulness
from emonb.settings import SPLITS

__all__ = [
    "KINDS",
    "Inspection",
    "Kind",
    "duplicates",
    "file_codes",
    "inspect_picture",
    "inspected",
    "leakage",
    "merged",
    "open_safely",
    "placeholders",
    "problem_table",
]


class Kind(NamedTuple):
    """What a problem means, what became of the pictures that have it, and whether they can be shown."""

    meaning: str
    left_out: bool
    shown: bool = True


KINDS = {
    "unreadable": Kind("no picture can be read from the file; the kinds that follow say why", True, False),
    "empty": Kind("0 bytes", True, False),
    "truncated": Kind("the file ends before the picture does: copy or download it again", True, False),
    "damaged": Kind("the picture's data are broken: copy or download it again", True, False),
    "not_a_picture": Kind(
        "named like a picture, the content is none (of JPEG, PNG, WebP, GIF, BMP, TIFF)", True, False
    ),
    "decompression_bomb": Kind("more than 89 million pixels: it would fill the memory", True, False),
    "no_access": Kind("the file cannot be opened: no permission, or the disk fails", True, False),
    "symlink_loop": Kind("a link that leads back to itself or to a folder above it", True, False),
    "broken_link": Kind("a link to a file that is not there", True, False),
    "undecodable_name": Kind("the file's name is not valid UTF-8: rename it", True, False),
    "unused_file": Kind("lies beside the pictures and is no .jpg, .jpeg, .png or .webp of an emotion", True, False),
    "listed_but_missing": Kind("the release lists it, the file is not there", True, False),
    "listed_twice": Kind("the release lists it more than once: the first of test, val, train counts", False),
    "annotation_missing": Kind("its annotation file is missing or damaged: no attributes for the triplets", False),
    "placeholder": Kind("exactly the same picture many times or under different emotions: a removed photo", True),
    "ambiguous_valence_left_out": Kind("the raters' mean valence lies in the ambiguous middle", True),
    "no_rating": Kind("the release gives no rating", True),
    "tied_label": Kind("two emotions have the same highest probability: the first in class order is the label", False),
    "neutral_dominant": Kind("neutral has the highest probability; labelled with the strongest of the six", False),
    "duplicate": Kind("exactly the same picture twice within a split", False),
    "duplicate_across_splits": Kind("exactly the same picture in two splits: leakage", False),
    "wrong_suffix": Kind("the name claims another format than the picture has; read by its content", False),
    "animated": Kind("several frames: the first is used", False),
    "exif_rotated": Kind("stored rotated or mirrored: turned as the camera says", False),
    "greyscale": Kind("stored without colours", False),
    "cmyk": Kind("stored in printing colours: converted", False),
    "palette": Kind("stored with a palette: converted", False),
    "very_large": Kind("over 4096 px a side or 25 million pixels: slow to read", False),
}
_FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),  # a phone's JPEG with a second picture in it
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
}  # nothing else is opened: Pillow hands some formats to other programs
_OPENED = tuple(name for name in _FORMATS if name != "MPO")  # which Pillow opens as JPEG
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")
_MODES = {"greyscale": ("1", "L", "LA", "I", "F", "I;16", "I;16B"), "cmyk": ("CMYK",), "palette": ("P", "PA")}
_LARGE_SIDE, _LARGE_AREA = 4096, 25_000_000  # px
_BOMB_AREA = 89_478_485  # px; Pillow's own bound for its warning
_ORIENTATION = 0x0112  # EXIF tag
_MANY_COPIES = 5  # ours: this many exact copies in a web-crawled set are no accident
_BLOCK = 512  # pictures handed to the threads at a time: memory does not grow with the dataset
_ONE_LARGE = threading.Lock()  # large pictures are decoded one at a time: each may take a gigabyte


@dataclass(frozen=True)
class Inspection:
    """What was found out about one picture; `sha256` is "" for one that cannot be used."""

    kinds: tuple[str, ...] = ()
    sha256: str = ""
    brightness: float = 0.0
    colorfulness: float = 0.0


def inspect_picture(path: Path) -> Inspection:
    """Read one picture completely: its hash, its measures and what is wrong or unusual about it."""
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return Inspection(("unreadable", "empty"))
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return _decode(file, size, Path(path).suffix.lower(), digest)
    except OSError as error:
        return Inspection(("unreadable", "symlink_loop" if error.errno == errno.ELOOP else "no_access"))


def _decode(file: BinaryIO, size: int, suffix: str, digest: str) -> Inspection:
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    try:
        with Image.open(file, formats=_OPENED) as image:
            if image.width * image.height > _BOMB_AREA:
                return Inspection(("unreadable", "decompression_bomb"))
            kinds = tuple(_peculiarities(image, suffix))
            with _ONE_LARGE if "very_large" in kinds else nullcontext():
                brightness, colorfulness = brightness_colorfulness(as_seen(image))
    except Image.DecompressionBombError:
        return Inspection(("unreadable", "decompression_bomb"))
    except UnidentifiedImageError:  # a known beginning and no more: cut off within the header
        return Inspection(("unreadable", "truncated" if _begins(head) else "not_a_picture"))
    except Exception as error:  # decoders raise nearly anything on hostile data
        short = head[:4] == b"RIFF" and int.from_bytes(head[4:8], "little") + 8 > size  # WebP says its length
        return Inspection(("unreadable", "truncated" if short or "truncated" in str(error).lower() else "damaged"))
    return Inspection(kinds, digest, brightness, colorfulness)


def _begins(head: bytes) -> bool:
    """Whether a file's first bytes are those of a picture."""
    return head.startswith(_MAGIC) or (head.startswith(b"RIFF") and b"WEBP".startswith(head[8:12]))


def _peculiarities(image: Image.Image, suffix: str) -> Iterator[str]:
    """What is unusual about a picture whose header was read."""
    if suffix not in _FORMATS[image.format]:
        yield "wrong_suffix"
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        yield "animated"
    if image.getexif().get(_ORIENTATION) in range(2, 9):
        yield "exif_rotated"
    yield from (kind for kind, modes in _MODES.items() if image.mode in modes)
    if max(image.size) > _LARGE_SIDE or image.width * image.height > _LARGE_AREA:
        yield "very_large"


def open_safely(path: Path) -> Image.Image | None:
    """A picture as people see it, for a thumbnail; None for what is none, or too large."""
    try:
        with path.open("rb") as file, Image.open(file, formats=_OPENED) as image:
            return as_seen(image) if image.width * image.height <= _BOMB_AREA else None
    except Exception:  # decoders raise nearly anything on hostile data; the report says what is wrong with it
        return None


def inspected(frame: pd.DataFrame, root: Path, what: str) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """Inspect every picture of a table.

    On two threads or more (Pillow decodes without Python's lock), in blocks and compact columns: what stays in
    memory is about 100 bytes a picture and the ids of those with a problem.

    Args:
        frame: columns `image_id`, `path`.
        root: folder that the paths are relative to.
        what: what the progress bar says.

    Returns:
        The table with `sha256` ("" for a picture that cannot be used), `brightness` and `colorfulness`; the
        problems: kind -> image ids.
    """
    hashes, problems = np.zeros(len(frame), "S64"), {}
    measures = np.zeros((2, len(frame)))
    found = progress(_inspections(root / path for path in frame["path"]), what, total=len(frame))
    for i, (image_id, inspection) in enumerate(zip(frame["image_id"], found, strict=True)):
        hashes[i] = inspection.sha256
        measures[:, i] = inspection.brightness, inspection.colorfulness
        for kind in inspection.kinds:
            problems.setdefault(kind, []).append(image_id)
    sha256 = pd.Series(pa.array(hashes).cast(pa.string()).to_pandas(), dtype="str").set_axis(frame.index)
    return frame.assign(sha256=sha256, brightness=measures[0], colorfulness=measures[1]), problems


def _inspections(paths: Iterator[Path]) -> Iterator[Inspection]:
    with ThreadPoolExecutor(max(2, min(8, cores()))) as pool:
        while block := list(islice(paths, _BLOCK)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's remarks on odd files would fill the screen: see KINDS
                done = list(pool.map(inspect_picture, block))
            yield from done


def merged(*parts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The problems of several steps in one: kind -> image ids."""
    problems: dict[str, list[str]] = {}
    for part in parts:
        for kind, image_ids in part.items():
            problems.setdefault(kind, []).extend(image_ids)
    return problems


def problem_table(reports: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The problems of several datasets: `dataset`, `problem`, `pictures`, `consequence`, `meaning`.

    Args:
        reports: dataset -> content of its `integrity.json`.
    """
    rows = [
        (name, kind, len(ids), "left out" if KINDS[kind].left_out else "kept", KINDS[kind].meaning)
        for name, report in reports.items()
        for kind, ids in report["problems"].items()
    ]
    return pd.DataFrame(rows, columns=["dataset", "problem", "pictures", "consequence", "meaning"])


def duplicates(samples: pd.DataFrame) -> dict[str, list[str]]:
    """Images whose exact bytes also occur within their split, or in another one (leakage)."""
    files = file_codes(samples)
    splits = samples["split"].groupby(files).transform("nunique")
    within = samples[["split"]].assign(file=files).duplicated(keep=False)
    return {
        "duplicate": samples.loc[within, "image_id"].tolist(),
        "duplicate_across_splits": samples.loc[splits > 1, "image_id"].tolist(),
    }


def file_codes(samples: pd.DataFrame) -> np.ndarray:
    """A number for each picture, the same for the same bytes: grouping by it takes less memory than by `sha256`."""
    raw = np.fromiter((bytes.fromhex(x) for x in samples["sha256"]), "S32", len(samples))
    return np.unique(raw, return_inverse=True)[1]


def leakage(samples: pd.DataFrame) -> dict[str, int]:
    """How many different pictures (by their bytes) occur in both of two splits: `train and test`, ... -> number."""
    found = {split: samples.loc[samples["split"] == split, "sha256"] for split in SPLITS}
    return {f"{a} and {b}": len({*found[a]} & {*found[b]}) for a, b in combinations(SPLITS, 2)}


def placeholders(samples: pd.DataFrame) -> list[str]:
    """Images that stand for removed photos: five exact copies or more, or copies under different emotions."""
    groups = samples["label"].groupby(file_codes(samples))
    found = (groups.transform("size") >= _MANY_COPIES) | (groups.transform("nunique") > 1)
    return samples.loc[found, "image_id"].tolist()
