"""Room 01: emotions in a fixed order, pictures as people see them, and one checked sample table per dataset.

The sample table (`samples.parquet`) has one row per usable picture: `image_id` (from the relative path),
`path`, `split`, `label`, `sha256`, `brightness`, `colorfulness` and what the source knows besides
(`caption`, `objects`, `scene`, ...). What was wrong with the others is in `integrity.json` beside it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError
from pyarrow import parquet

from emonb.errors import EmonbError, UnreadablePicture
from emonb.files import read_json, resource
from emonb.machine import cores
from emonb.progress import progress
from emonb.settings import SPLITS, project_root

SPLIT_SEED = 42  # authors' code: the seed of every split they make

# ---- emotions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taxonomy:
    """An emotion model: a name and its labels in their fixed order.

    The authors' code takes the class order from the directory listing, so that label indices of teacher, student and
    gate can disagree; here each artefact stores its labels and is checked on load.
    """

    name: str
    labels: tuple[str, ...]


_MIKELS = ("amusement", "anger", "awe", "contentment", "disgust", "excitement", "fear", "sadness")
TAXONOMIES = {
    "mikels8": Taxonomy("mikels8", _MIKELS),  # Mikels et al. 2005; FI and EmoSet
    "ekman6": Taxonomy("ekman6", ("anger", "disgust", "fear", "joy", "sadness", "surprise")),  # Emotion6
    "sentiment2": Taxonomy("sentiment2", ("positive", "negative")),  # Flickr, Instagram, BASS, OASIS
}
_DATASETS = {
    "mikels8": ("fi", "emoset"),
    "ekman6": ("emotion6",),
    "sentiment2": ("flickr", "instagram", "bass", "oasis"),
}


def taxonomy_for_dataset(name: str) -> Taxonomy | None:
    """Taxonomy of a known dataset (`fi`, `mini-fi`, ...), or None for an unknown name."""
    known = (key for key, datasets in _DATASETS.items() if name.removeprefix("mini-") in datasets)
    return TAXONOMIES.get(next(known, ""))


def infer_taxonomy(labels: Iterable[str], where: str) -> Taxonomy:
    """The smallest taxonomy that contains all labels.

    Args:
        labels: label names as found in a dataset.
        where: the folder or file they came from, for the error message.

    Raises:
        EmonbError: no taxonomy contains all of them.
    """
    found = set(labels)
    for taxonomy in sorted(TAXONOMIES.values(), key=lambda t: len(t.labels)):
        if found and found <= set(taxonomy.labels):
            return taxonomy
    best = max(TAXONOMIES.values(), key=lambda t: len(found & set(t.labels)))
    odd = ", ".join(repr(x) for x in sorted(found - set(best.labels))) or "none"
    raise EmonbError(
        f"{where}: labels outside every taxonomy: {odd}; rename the folders to labels of one taxonomy: "
        + "; ".join(f"{t.name} ({', '.join(t.labels)})" for t in TAXONOMIES.values())
    )


def check_labels(found: Sequence[str], expected: Sequence[str], where: str) -> None:
    """Raise `EmonbError` unless an artefact's stored labels equal the expected ones, order included."""
    if list(found) != list(expected):
        raise EmonbError(
            f"{where}: class order is {list(found)} but {list(expected)} was expected; "
            "the file belongs to another taxonomy or was edited: delete it and run again"
        )


WORD_FORMS = {
    "amusement": ("amused", "amusing"),
    "anger": ("angry", "angered"),
    "awe": ("awed", "awestruck"),
    "contentment": ("content", "contented"),
    "disgust": ("disgusted", "disgusting"),
    "excitement": ("excited", "exciting"),
    "fear": ("fearful", "afraid", "scared", "frightening"),
    "sadness": ("sad", "saddened"),
    "joy": ("joyful", "joyous"),
    "surprise": ("surprised", "surprising"),
}  # that a free answer may use for a label; ours


def parse_emotion(text: str, labels: Sequence[str]) -> str | None:
    """The label that a free answer names, or None. Never a default class.

    The value of an `emotion` field counts first; else the one label (or a form of it, such as "fearful")
    that the text names without a "not" before it. Two different labels are no answer.
    """
    forms = {form: label for label in labels for form in (label, *WORD_FORMS.get(label, ()))}
    text = text.lower()
    field = re.search(r"emotion\s*['\"]?\s*[:=]\s*['\"]?\s*([a-z]+)", text)
    if field:
        return forms.get(field.group(1))
    named = re.findall(r"(\bnot\s+|n't\s+)?\b(" + "|".join(map(re.escape, forms)) + r")\b", text)
    found = {forms[word] for negation, word in named if not negation}
    return found.pop() if len(found) == 1 else None


def question(labels: Sequence[str]) -> str:
    """The question of training and of every evaluation, with the labels in the taxonomy's order."""
    return resource("prompts.yaml", "categorical", "instruction").format(labels=", ".join(labels))


def answer_text(label: str) -> str:
    """The answer that the question asks for: `{'emotion': 'awe'}`."""
    return resource("prompts.yaml", "categorical", "response").format(label=label)


# ---- pictures ------------------------------------------------------------------------------------------------------

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),  # a phone's JPEG with a second picture in it; Pillow opens it as JPEG
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
}
_OPENED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # nothing else: Pillow hands some formats to other programs
_MAX_AREA = 89_478_485  # px; Pillow's own bound for its warning


@contextmanager
def _opened(source: Path | str | BinaryIO) -> Iterator[Image.Image]:
    """A picture of which only the header was read; raises as Pillow does, `DecompressionBombError` included."""
    with Image.open(source, formats=_OPENED) as raw:
        if raw.width * raw.height > _MAX_AREA:
            raise Image.DecompressionBombError(
                f"{raw.width} x {raw.height} px, over {_MAX_AREA // 10**6} million pixels"
            )
        yield raw


def open_picture(source: Path | str | bytes, name: str = "", *, side: int = 0) -> Image.Image:
    """A picture as people see it: EXIF rotation applied, RGB, transparency on white.

    Args:
        source: a file, or what it holds.
        name: what messages call it; default: the file's path.
        side: of a large JPEG decode only what a picture of this longest side (px) needs; 0: all.

    Raises:
        UnreadablePicture: not a readable picture, or over 89 million pixels; the message names the file.
    """
    try:
        with _opened(io.BytesIO(source) if isinstance(source, bytes) else source) as raw:
            if side:
                raw.draft(None, (2 * side, 2 * side))
            return as_seen(raw)
    except Exception as error:  # PIL's decoders raise what they meet: struct.error, ValueError, SyntaxError, ...
        name = name or ("picture" if isinstance(source, bytes) else str(source))
        raise UnreadablePicture(f"{name}: not a readable picture ({error}); replace or remove the file") from None


def as_seen(raw: Image.Image) -> Image.Image:
    """An opened picture with EXIF rotation applied, in RGB, 16 bits as 8, transparency on white."""
    image = ImageOps.exif_transpose(raw)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip at 255, so that all is white
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype("uint8"))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def thumbnail(picture: Path | str | Image.Image, side: int = 192) -> Image.Image:
    """A picture at a fixed longest side (px), small ones enlarged; raises `UnreadablePicture`."""
    if not isinstance(picture, Image.Image):
        picture = open_picture(picture, side=side)
    scale = side / max(picture.size)
    size = tuple(max(1, round(x * scale)) for x in picture.size)
    return picture.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)


def brightness_colorfulness(image: Image.Image) -> tuple[float, float]:
    """Mean HSV value (0-1) and colourfulness of Hasler and Suesstrunk (2003) divided by 109.

    109 is their "extremely colourful". Measured on at most 256 x 256 px.
    """
    small = image.copy()
    small.thumbnail((256, 256))
    rgb = np.asarray(small, dtype=np.float64)
    rg = rgb[..., 0] - rgb[..., 1]
    yb = (rgb[..., 0] + rgb[..., 1]) / 2 - rgb[..., 2]
    colorfulness = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
    return float(rgb.max(axis=-1).mean() / 255), float(colorfulness / 109)


# ---- is a picture fit to be used? ----------------------------------------------------------------------------------

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")
_MODES = {"greyscale": ("1", "L", "LA", "I", "F", "I;16", "I;16B"), "cmyk": ("CMYK",), "palette": ("P", "PA")}
_LARGE_SIDE, _LARGE_AREA = 4096, 25_000_000  # px
_ORIENTATION = 0x0112  # EXIF tag
_BLOCK = 512  # pictures handed to the threads at a time: memory does not grow with the dataset
_MANY_COPIES = 5  # ours: this many exact copies in a web-crawled set are no accident
_ONE_LARGE = threading.Lock()  # large pictures are decoded one at a time: each may take a gigabyte


class Inspection(NamedTuple):
    """What was found out about one picture."""

    kinds: tuple[str, ...] = ()  # what is wrong or unusual, by the names that `emonb.releases.integrity` explains
    sha256: str = ""  # of the file; "": the picture cannot be used
    brightness: float = 0.0
    colorfulness: float = 0.0


def inspect_picture(path: Path) -> Inspection:
    """Read one picture completely: its hash, its measures and what is wrong or unusual about it."""
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return Inspection(("empty",))
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            return _decode(file, size, Path(path).suffix.lower(), digest)
    except OSError as error:
        return Inspection(("broken_link" if error.errno == errno.ELOOP else "no_access",))


def _decode(file: BinaryIO, size: int, suffix: str, digest: str) -> Inspection:
    head = file.read(16)
    file.seek(0)
    webp = head[:4] == b"RIFF" and b"WEBP".startswith(head[8:12])
    try:
        with _opened(file) as image:
            kinds = tuple(_peculiarities(image, suffix))
            with _ONE_LARGE if "very_large" in kinds else nullcontext():
                return Inspection(kinds, digest, *brightness_colorfulness(as_seen(image)))
    except Image.DecompressionBombError:
        kind = "decompression_bomb"
    except UnidentifiedImageError:  # a known beginning and no more: cut off within the header
        kind = "truncated" if webp or head.startswith(_MAGIC) else "not_a_picture"
    except Exception as error:  # decoders raise nearly anything on hostile data
        short = webp and int.from_bytes(head[4:8], "little") + 8 > size  # WebP says its length
        kind = "truncated" if short or "truncated" in str(error).lower() else "damaged"
    return Inspection((kind,))


def _peculiarities(image: Image.Image, suffix: str) -> Iterator[str]:
    """What is unusual about a picture whose header was read."""
    if suffix not in _SUFFIXES[image.format]:
        yield "wrong_suffix"
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        yield "animated"
    if image.getexif().get(_ORIENTATION) in range(2, 9):
        yield "exif_rotated"
    yield from (kind for kind, modes in _MODES.items() if image.mode in modes)
    if max(image.size) > _LARGE_SIDE or image.width * image.height > _LARGE_AREA:
        yield "very_large"


def inspected(frame: pd.DataFrame, root: Path, what: str) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """Inspect every picture of a table, on two threads or more (Pillow decodes without Python's lock).

    Args:
        frame: columns `image_id`, `path`.
        root: folder that the paths are relative to.
        what: what the progress bar says.

    Returns:
        The table with `sha256` ("" for a picture that cannot be used), `brightness` and `colorfulness`; the
        problems: kind -> image ids.
    """
    problems: dict[str, list[str]] = {}
    found = [*progress(_inspections(root / path for path in frame["path"]), what, total=len(frame))]
    for image_id, inspection in zip(frame["image_id"], found, strict=True):
        for kind in inspection.kinds:
            problems.setdefault(kind, []).append(image_id)
    measured = {name: [getattr(i, name) for i in found] for name in ("sha256", "brightness", "colorfulness")}
    return frame.assign(**measured), problems


def _inspections(paths: Iterator[Path]) -> Iterator[Inspection]:
    with ThreadPoolExecutor(max(2, min(8, cores()))) as pool:
        while block := list(islice(paths, _BLOCK)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's remarks on odd files would fill the screen
                done = list(pool.map(inspect_picture, block))
            yield from done


def duplicates(samples: pd.DataFrame) -> dict[str, list[str]]:
    """Images whose exact bytes also occur within their split, or in another one (leakage)."""
    splits = samples["split"].groupby(samples["sha256"]).transform("nunique")
    within = samples.duplicated(["split", "sha256"], keep=False)
    return {
        "duplicate": samples.loc[within, "image_id"].tolist(),
        "duplicate_across_splits": samples.loc[splits > 1, "image_id"].tolist(),
    }


def leakage(samples: pd.DataFrame) -> dict[str, int]:
    """How many different pictures (by their bytes) occur in both of two splits: `train and test`, ... -> number."""
    found = {split: samples.loc[samples["split"] == split, "sha256"] for split in SPLITS}
    return {f"{a} and {b}": len({*found[a]} & {*found[b]}) for a, b in combinations(SPLITS, 2)}


def _placeholders(samples: pd.DataFrame) -> list[str]:
    """Images that stand for removed photos: five exact copies or more, or copies under different emotions."""
    groups = samples["label"].groupby(samples["sha256"])
    found = (groups.transform("size") >= _MANY_COPIES) | (groups.transform("nunique") > 1)
    return samples.loc[found, "image_id"].tolist()


# ---- the sample table ----------------------------------------------------------------------------------------------


def read_samples(folder: Path, split: str | None = None, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Sample table with absolute paths; `frame.attrs["labels"]` is the class order.

    Args:
        folder: of a result of the stage `samples`.
        split: its rows of this split only.
        columns: these columns only.
    """
    filters = None if split is None else [("split", "==", split)]
    wanted = None if columns is None else list(columns)
    frame = pd.read_parquet(folder / "samples.parquet", columns=wanted, filters=filters)
    if "path" in frame:
        root = table_folder(folder)
        frame["path"] = [str(root / p) for p in frame["path"]]
    frame.attrs["labels"] = sample_labels(folder)
    return frame


def sample_labels(folder: Path) -> list[str]:
    """Class order of a sample table."""
    return read_json(folder / "meta.json")["labels"]


def table_folder(folder: Path, which: str = "root") -> Path:
    """The folder that a table's paths (`root`) or image ids (`pictures`) are relative to."""
    found = read_json(folder / "meta.json")[which]
    return folder if found == "." else (project_root() / found).resolve()


def write_samples(samples: pd.DataFrame, folder: Path) -> None:
    """Write `samples.parquet`, in groups of rows so that it can be read in parts; plain columns for any reader."""
    table = pa.Table.from_pandas(samples, preserve_index=False).replace_schema_metadata(None)
    parquet.write_table(table, folder / "samples.parquet", row_group_size=4096)


def build_samples(
    frame: pd.DataFrame,
    root: Path,
    labels: Sequence[str],
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
        The sample table, and the problems found: kind -> list of image ids.

    Raises:
        EmonbError: a label outside the taxonomy, no usable picture, or a class missing from a split.
    """
    odd = sorted(set(frame["label"]) - set(labels))
    if odd:
        raise EmonbError(f"{where}: label {odd[0]!r} is not one of: {', '.join(labels)}; rename its folder")
    measured, problems = inspected(frame, root, f"pictures of {Path(where).name}")
    samples = measured[measured["sha256"] != ""].reset_index(drop=True)
    if drop_placeholders:
        problems["placeholder"] = _placeholders(samples)
        samples = samples[~samples["image_id"].isin(problems["placeholder"])].reset_index(drop=True)
    if samples.empty:
        raise EmonbError(f"{where}: no readable picture; put .jpg, .png or .webp files into <split>/<emotion>/")
    samples = _split(samples, where).drop(columns="group", errors="ignore")
    _check_counts(samples, labels, where, partial)
    return samples, problems | duplicates(samples)


def _split(samples: pd.DataFrame, where: str) -> pd.DataFrame:
    """Give every row a split, keeping the release's own where it has one.

    Without any: 60/10/30 by groups where there are groups (ours: BASS is so small that a tenth for the
    test would leave 40 pictures), else 80/10/10. With train and test only: 10 % of train becomes val. Exact
    copies follow the first one (ours), so that a split made here leaks nothing.
    """
    own, groups = samples.get("split"), samples.get("group")
    if own is not None and ((own == "val").any() or not (own == "train").any()):
        return samples
    free = samples if own is None else samples[own == "train"]
    shares = (6, 1, 3) if groups is not None else (8, 1, 1) if own is None else (9, 1, 0)
    split = pd.Series(np.repeat(SPLITS, shares)[_folds(free, groups, where)], index=free.index, dtype="str")
    if groups is None:
        split = split.groupby(free["sha256"]).transform("first")
    return samples.assign(split=split if own is None else own.where(own != "train", split))


def _folds(samples: pd.DataFrame, groups: pd.Series | None, where: str) -> np.ndarray:
    """Fold 0-9 of each row [N], stratified by label (and kept together by group)."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    smallest = samples["label"].value_counts()
    if groups is None and smallest.min() < 10:
        raise EmonbError(
            f"{where}: class {smallest.idxmin()!r} has {smallest.min()} pictures, too few to split off val; "
            "give at least 10 or make the split folders train/, val/ and test/ yourself"
        )
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    fold = np.empty(len(samples), dtype=int)
    splitter = kind(n_splits=10, shuffle=True, random_state=SPLIT_SEED)
    for i, (_, rows) in enumerate(splitter.split(samples, samples["label"], groups)):
        fold[rows] = i
    return fold


def _check_counts(samples: pd.DataFrame, labels: Sequence[str], where: str, partial: bool) -> None:
    for split in SPLITS:
        present = set(samples.loc[samples["split"] == split, "label"])
        absent = [label for label in labels if label not in present]
        if absent and (present or not partial):
            n = int((samples["split"] == split).sum())
            raise EmonbError(
                f"{where}: split {split!r} ({n} readable pictures) has none of class {', '.join(absent)}; "
                f"add pictures to {split}/{absent[0]}/ or leave that class out of all splits and of the taxonomy"
            )
