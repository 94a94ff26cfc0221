"""Room 01: is a picture fit to be used? What can be wrong with one, and with several that are the same.

Every kind of problem has a name, a sentence and a consequence (`KINDS`): left out, or kept and reported.
`unreadable` sums up all pictures that cannot be used as such; the finer kinds say why.
"""

from __future__ import annotations

import errno
import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pandas as pd
from PIL import Image, UnidentifiedImageError

from emonb.progress import progress
from emonb.samples import as_seen, brightness_colorfulness

__all__ = [
    "KINDS",
    "Inspection",
    "Kind",
    "duplicates",
    "inspect_all",
    "inspect_picture",
    "merged",
    "placeholders",
    "problems_of",
]


class Kind(NamedTuple):
    """What a problem means and what became of the pictures that have it."""

    meaning: str
    left_out: bool


KINDS = {
    "unreadable": Kind("cannot be read as a picture (the sum of the next kinds, and files without permission)", True),
    "empty": Kind("0 bytes", True),
    "truncated": Kind("the file ends before the picture does: copy or download it again", True),
    "damaged": Kind("the picture's data are broken: copy or download it again", True),
    "not_a_picture": Kind("named like a picture, the content is none (of JPEG, PNG, WebP, GIF, BMP, TIFF)", True),
    "decompression_bomb": Kind("more than 89 million pixels: it would fill the memory", True),
    "symlink_loop": Kind("a link that leads back to itself or to a folder above it", True),
    "broken_link": Kind("a link to a file that is not there", True),
    "undecodable_name": Kind("the file's name is not valid UTF-8: rename it", True),
    "unused_file": Kind("a file beside the pictures that is no .jpg, .jpeg, .png or .webp", True),
    "listed_but_missing": Kind("the release lists it, the file is not there", True),
    "listed_twice": Kind("the release lists it more than once: the first of test, val, train counts", False),
    "annotation_missing": Kind("its annotation file is missing or damaged: no attributes for the triplets", False),
    "placeholder": Kind("exactly the same picture many times or under different emotions: a removed photo", True),
    "ambiguous_valence_left_out": Kind("the raters' mean valence lies in the ambiguous middle", True),
    "no_rating": Kind("the release gives no rating", True),
    "tied_label": Kind("two emotions have the same highest probability", True),
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
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF", b"GIF8")
_MODES = {"greyscale": ("1", "L", "LA", "I", "F", "I;16", "I;16B"), "cmyk": ("CMYK",), "palette": ("P", "PA")}
_LARGE_SIDE, _LARGE_AREA = 4096, 25_000_000  # px
_BOMB_AREA = 89_478_485  # px; Pillow's own bound for its warning
_ORIENTATION = 0x0112  # EXIF tag
_MANY_COPIES = 5  # ours: this many exact copies in a web-crawled set are no accident
_BLOCK = 512  # pictures handed to the threads at a time: memory does not grow with the dataset


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
        return Inspection(("unreadable", "symlink_loop") if error.errno == errno.ELOOP else ("unreadable",))


def _decode(file: BinaryIO, size: int, suffix: str, digest: str) -> Inspection:
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    try:
        with Image.open(file, formats=_OPENED) as image:
            if image.width * image.height > _BOMB_AREA:
                return Inspection(("unreadable", "decompression_bomb"))
            kinds = tuple(_peculiarities(image, suffix))
            brightness, colorfulness = brightness_colorfulness(as_seen(image))
    except Image.DecompressionBombError:
        return Inspection(("unreadable", "decompression_bomb"))
    except UnidentifiedImageError:  # a known beginning and no more: cut off within the header
        return Inspection(("unreadable", "truncated" if head.startswith(_MAGIC) else "not_a_picture"))
    except Exception as error:  # decoders raise nearly anything on hostile data
        short = head[:4] == b"RIFF" and int.from_bytes(head[4:8], "little") + 8 > size  # WebP says its length
        return Inspection(("unreadable", "truncated" if short or "truncated" in str(error).lower() else "damaged"))
    return Inspection(kinds, digest, brightness, colorfulness)


def _peculiarities(image: Image.Image, suffix: str) -> Iterator[str]:
    """What is unusual about a picture whose header was read."""
    if suffix not in _FORMATS[image.format]:
        yield "wrong_suffix"
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        yield "animated"
    if image.getexif().get(_ORIENTATION, 1) not in (0, 1):
        yield "exif_rotated"
    yield from (kind for kind, modes in _MODES.items() if image.mode in modes)
    if max(image.size) > _LARGE_SIDE or image.width * image.height > _LARGE_AREA:
        yield "very_large"


def inspect_all(paths: Sequence[Path], what: str) -> Iterator[Inspection]:
    """Inspect pictures in their order, on two threads or more: Pillow decodes without Python's lock.

    Args:
        paths: the pictures.
        what: what the progress bar says.
    """
    threads = max(2, min(8, os.cpu_count() or 1))
    with ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files would fill the screen; KINDS report them
        blocks = (paths[i : i + _BLOCK] for i in range(0, len(paths), _BLOCK))
        found = (inspection for block in blocks for inspection in pool.map(inspect_picture, block))
        yield from progress(found, what, total=len(paths))


def problems_of(image_ids: Sequence[str], inspections: Sequence[Inspection]) -> dict[str, list[str]]:
    """Kind -> ids of the pictures that have it."""
    problems: dict[str, list[str]] = {}
    for image_id, inspection in zip(image_ids, inspections, strict=True):
        for kind in inspection.kinds:
            problems.setdefault(kind, []).append(image_id)
    return problems


def merged(*parts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The problems of several steps in one: kind -> image ids."""
    problems: dict[str, list[str]] = {}
    for part in parts:
        for kind, image_ids in part.items():
            problems.setdefault(kind, []).extend(image_ids)
    return problems


def duplicates(samples: pd.DataFrame) -> dict[str, list[str]]:
    """Images whose exact bytes also occur within their split, or in another one (leakage)."""
    splits = samples.groupby("sha256")["split"].transform("nunique")
    within = samples.duplicated(["sha256", "split"], keep=False)
    return {
        "duplicate": samples.loc[within, "image_id"].tolist(),
        "duplicate_across_splits": samples.loc[splits > 1, "image_id"].tolist(),
    }


def placeholders(samples: pd.DataFrame) -> list[str]:
    """Images that stand for removed photos: five exact copies or more, or copies under different emotions."""
    groups = samples.groupby("sha256")["label"]
    found = (groups.transform("size") >= _MANY_COPIES) | (groups.transform("nunique") > 1)
    return samples.loc[found, "image_id"].tolist()
