"""Room 01: emotions in a fixed order, pictures as people see them, and one checked sample table per dataset.

The sample table (`samples.parquet`) has one row per usable picture: `image_id` (from the relative path),
`path`, `split`, `label`, `sha256`, `brightness`, `colorfulness` and what the source knows besides
(`caption`, `objects`, `scene`, ...). What was wrong with the others is in `integrity.json` beside it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import re
import stat
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from emonb.errors import EmonbError, PassingTrouble, UnreadablePicture
from emonb.files import read_json, resource
from emonb.machine import cores
from emonb.progress import progress
from emonb.settings import SPLITS, project_root

SPLIT_SEED = 42  # authors' code: the seed of every split they make

# ---- emotions ------------------------------------------------------------------------------------------------------


class Taxonomy(NamedTuple):
    """An emotion model: its name, its labels in their fixed order, and the datasets of the field that use it.

    The authors' code takes the class order from the directory listing, so that label indices of teacher, student and
    gate can disagree; here each artefact stores its labels and is checked on load.
    """

    name: str
    labels: tuple[str, ...]
    datasets: tuple[str, ...] = ()


_MIKELS = ("amusement", "anger", "awe", "contentment", "disgust", "excitement", "fear", "sadness")
_EKMAN = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
TAXONOMIES = {
    "mikels8": Taxonomy("mikels8", _MIKELS, ("fi", "emoset")),  # Mikels et al. 2005
    "ekman6": Taxonomy("ekman6", _EKMAN, ("emotion6", "emotion6-majority")),
    "sentiment2": Taxonomy("sentiment2", ("positive", "negative"), ("flickr", "instagram", "bass", "oasis")),
}


def taxonomy_for_dataset(name: str) -> Taxonomy | None:
    """Taxonomy of a known dataset (`fi`, `mini-fi`, ...), or None for an unknown name."""
    return next((t for t in TAXONOMIES.values() if name.removeprefix("mini-") in t.datasets), None)


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
    words = "|".join(map(re.escape, sorted(forms, key=len, reverse=True)))  # own labels may have several words
    if field := re.search(r"emotion\s*['\"]?\s*[:=]\s*['\"]?\s*(?=\w)", text):
        first = re.match(rf"(?:{words})\b", text[field.end() :])
        return forms[first.group()] if first else None
    named = re.findall(rf"(\bnot\s+|n't\s+)?\b({words})\b", text)
    found = {forms[word] for negation, word in named if not negation}
    return found.pop() if len(found) == 1 else None


def question(labels: Sequence[str]) -> str:
    """The question of training and of every evaluation, with the labels in the taxonomy's order."""
    return resource("prompts.yaml", "categorical", "instruction").format(labels=", ".join(labels))


def answer_text(label: str) -> str:
    """The answer that the question asks for: `{'emotion': 'awe'}`."""
    return resource("prompts.yaml", "categorical", "response").format(label=label)


# ---- pictures ------------------------------------------------------------------------------------------------------

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # no other: Pillow hands some to other programs
ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")  # what is looked at
_LEFTOVERS = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "#snapshot", "@recycle", "@tmp",
    "$recycle.bin", "recycler", "system volume information", "lost+found", "icon\r", "__pycache__",
}  # fmt: skip
Image.MAX_IMAGE_PIXELS = 89_478_485 // 2  # Pillow refuses twice as many, and would warn of fewer
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**28  # prompts and profiles pass Pillow's 1 MB
warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd files
_LONGEST = 100  # times the short side; ours: Qwen2-VL refuses 200, and shrinking rounds
_TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))  # by EXIF's orientation
_WAITS = (0.1, 0.5, 2, 0)  # seconds after each try
_PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN,
    errno.EINTR, errno.EBUSY, errno.ENOTCONN, errno.ENOLINK, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETUNREACH,
}  # fmt: skip


def is_leftover(name: str) -> bool:
    """Whether macOS, Windows, a NAS, git or Jupyter has put a file or folder there: passed over and counted."""
    return name.startswith((".", "~$")) or name.casefold() in _LEFTOVERS


def open_picture(source: Path | str | bytes, name: str = "", *, side: int = 0) -> Image.Image:
    """A picture as people see it (`as_seen`): the one door for import, training, VLM, annotator, pages and predict.

    `source` is a regular file, or what it holds, which messages call `name`. With `side` only as much of a large JPEG
    is decoded as a picture of this longest side (px) needs. Raises `UnreadablePicture` for a bad file, also one over
    89 million pixels; `PassingTrouble` where disk, network or memory fail, and fail again: then the file may be sound.
    """
    name = name or ("picture" if isinstance(source, bytes) else str(source))

    def look(content: bytes, end: bytes) -> Image.Image:
        with _opened(content + end) as raw:
            if side:
                raw.draft(None, (2 * side, 2 * side))
            return as_seen(raw)

    try:
        return _looked_at(source, look, name)
    except PassingTrouble:
        raise
    except Exception as error:  # PIL's decoders raise what they meet: struct.error, ValueError, SyntaxError, ...
        why = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UnreadablePicture(f"{name}: not a readable picture ({why}); replace or remove the file") from None


def _opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=_FORMATS)


def _seen(content: bytes, look: Callable[[bytes, bytes], Any]) -> Any:
    """What `look` makes of a file's content, and of the mark at the end that a JPEG may lack: browsers show it.

    If pixels are missing, too, they come out of whatever bytes follow, so that two endings give two pictures.
    """
    try:
        return look(content, b"")
    except OSError as error:
        if error.errno or not content.startswith(b"\xff\xd8"):
            raise
        cut, mark = content.rstrip(b"\xff"), b"\xff\xd9"
        one, other = (np.asarray(_opened(cut + more + mark)) for more in (b"", b"\xa5\x3c\x5a\x96" * 99))
        if not np.array_equal(one, other):
            raise
        return look(content, mark)


def _looked_at(source: Path | str | bytes, look: Callable[[bytes, bytes], Any], name: object = "") -> Any:
    """What `look` makes of a file's content, tried again after trouble that may pass; if it stays, `PassingTrouble`.

    A regular file: a pipe would wait for ever, a device never end.
    """
    for wait in _WAITS:
        try:
            if isinstance(source, bytes):
                return _seen(source, look)
            if not stat.S_ISREG((about := Path(source).stat()).st_mode) or about.st_size > 2**30:
                raise OSError(errno.EINVAL, "no regular file, or over 1 GB")
            return _seen(Path(source).read_bytes(), look)
        except (OSError, MemoryError) as error:
            trouble = error if isinstance(error, OSError) else OSError(errno.ENOMEM, "out of memory")
            if trouble.errno not in _PASSING:
                raise
            time.sleep(wait)
    files = trouble.errno in (errno.EMFILE, errno.ENFILE)
    remedy = "allow more open files: ulimit -n 4096" if files else "see to the disk, the network drive or the memory"
    why, name = f"{trouble.strerror or trouble}, {len(_WAITS)} times", name if isinstance(source, bytes) else source
    raise PassingTrouble(f"{name}: cannot be read now ({why}); {remedy}, then run again: what is finished is kept")


def as_seen(raw: Image.Image) -> Image.Image:
    """An opened picture in RGB, turned as EXIF says, 16 bits as 8, transparency on white, the first of its frames.

    One that is over 100 times as long as wide gets white on both sides, up to that: no model takes a longer strip.
    """
    raw.load()
    image = raw.transpose(_TURNS[turn]) if (turn := _orientation(raw)) in _TURNS else raw
    if image.mode.startswith(("I", "F")):  # Pillow would clip at 255, so that all is white
        image = Image.fromarray(_eight_bits(np.asarray(image), image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    x, y = (max(0, -(-max(image.size) // _LONGEST) - side) for side in image.size)  # what is missing
    image = ImageOps.expand(image, (x // 2, y // 2, x - x // 2, y - y // 2), "white") if x or y else image
    image.info = {name: image.info[name] for name in ("icc_profile",) if name in image.info}  # EXIF has been obeyed
    return image


def _eight_bits(grey: np.ndarray, mode: str) -> np.ndarray:
    """Grey of 16 bits as 8; of 32 bits, which say nothing of white, by the least usual scale that holds all values.

    Raises ValueError where none is a number.
    """
    if "16" in mode:
        return (grey // 256).astype("uint8")
    known = grey[np.isfinite(grey)].astype("float64")
    low, high = min(0.0, known.min()), known.max()
    white = next((most for most in (1, 255, 65535) if high <= most), high)
    grey = np.nan_to_num(grey.astype("float64"), nan=low, posinf=white, neginf=low)
    return ((grey - low) / (white - low) * 255).round().astype("uint8")


def _orientation(raw: Image.Image) -> Any:
    """EXIF's orientation; None where there is none, or EXIF is broken."""
    with suppress(Exception):
        return raw.getexif().get(0x0112)
    return None


def sizes_of(paths: Sequence[str], most: int) -> list[tuple[int, int]]:
    """Width and height of at most so many of the pictures, spread evenly; unreadable: none."""
    sizes = []
    for path in paths[:: max(1, -(-len(paths) // most))]:
        with suppress(Exception):
            sizes.append(_looked_at(path, lambda content, end: _opened(content + end).size))
    return sizes


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

_ODD = {
    "exif_rotated": lambda image: _orientation(image) in _TURNS,
    "greyscale": lambda image: image.mode in ("1", "L", "LA", "I", "F", "I;16", "I;16B"),
    "cmyk": lambda image: image.mode == "CMYK",
    "palette": lambda image: image.mode in ("P", "PA"),
    "very_large": lambda image: max(image.size) > 4096 or image.width * image.height > 25_000_000,
    "strip": lambda image: max(image.size) > _LONGEST * min(image.size),
}
_ONE_LARGE = threading.Lock()  # large pictures are decoded one at a time: each may take a gigabyte


class Inspection(NamedTuple):
    """What was found out about one picture."""

    kinds: tuple[str, ...] = ()  # what is wrong or unusual, by the names that `emonb.releases.imports` explains
    sha256: str = ""  # of the file; "": the picture cannot be used
    brightness: float = 0.0
    colorfulness: float = 0.0


def inspect_picture(path: Path) -> Inspection:
    """Read one picture completely: its hash, its measures and what is wrong or unusual about it.

    Raises `PassingTrouble`, as `open_picture` does.
    """

    def look(content: bytes, end: bytes) -> Inspection:
        try:
            image = _opened(content + end)
        except UnidentifiedImageError:  # empty, or a known beginning and no more: cut off within the header
            cut = not content or content.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8")) or content[8:12] == b"WEBP"
            return Inspection(("damaged" if cut else "not_a_picture",))
        with image, _ONE_LARGE if _ODD["very_large"](image) else nullcontext():
            measures = brightness_colorfulness(as_seen(image))
            kinds = [kind for kind, fits in _ODD.items() if fits(image)]
            with suppress(Exception):  # a later frame is damaged: it is not looked at
                if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: from a phone
                    kinds.insert(0, "animated")
        return Inspection(tuple(kinds), hashlib.sha256(content).hexdigest(), *measures)

    try:
        return _looked_at(path, look)
    except PassingTrouble:
        raise
    except Image.DecompressionBombError:
        return Inspection(("decompression_bomb",))
    except Exception as error:  # decoders raise nearly anything on hostile data
        code = getattr(error, "errno", None)
        kind = "broken_link" if code in (errno.ENOENT, errno.ELOOP) else "no_access" if code else "damaged"
        return Inspection((kind,))


def inspected(frame: pd.DataFrame, root: Path, what: str) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """The pictures of a table that can be used, with `sha256`, `brightness` and `colorfulness`; kind -> image ids.

    `frame` has the columns `image_id` and `path`, relative to `root`; `what` stands beside the progress bar.
    """
    threads = Parallel(max(2, min(8, cores())), prefer="threads", return_as="generator")  # Pillow decodes without GIL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files would fill the screen
        each = threads(delayed(inspect_picture)(root / path) for path in frame["path"])
        found = pd.DataFrame(progress(each, what, total=len(frame)), columns=Inspection._fields, index=frame.index)
    told = frame[["image_id"]].assign(kind=found.pop("kinds")).explode("kind").dropna()
    frame = frame.assign(**found)
    usable = frame[frame["sha256"] != ""].reset_index(drop=True)
    return usable, told.groupby("kind")["image_id"].agg(list).to_dict()


# ---- the sample table ----------------------------------------------------------------------------------------------


def read_samples(folder: Path, split: str | None = None, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Sample table of a result of the stage `samples`, all or a part of it, with absolute paths.

    `frame.attrs["labels"]` is the class order. Raises `EmonbError` for a damaged file.
    """
    filters, file = None if split is None else [("split", "==", split)], folder / "samples.parquet"
    try:
        frame = pd.read_parquet(file, columns=columns and [*columns], filters=filters)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise EmonbError(f"{file}: damaged ({' '.join(str(error).split())}); delete {folder} and run again") from None
    if "path" in frame:
        root = _meta(folder, "root")
        root = folder if root == "." else (project_root() / root).resolve()
        frame["path"] = [str(root / path) for path in frame["path"]]
    frame.attrs["labels"] = sample_labels(folder)
    return frame


def sample_labels(folder: Path) -> list[str]:
    """Class order of a sample table."""
    return _meta(folder, "labels")


def _meta(folder: Path, field: str) -> Any:
    file, remedy = folder / "meta.json", f"delete {folder} and run again"
    try:
        return read_json(file, remedy)[field]
    except (KeyError, TypeError):
        raise EmonbError(f"{file}: field {field!r} missing; {remedy}") from None


def with_splits(samples: pd.DataFrame, where: str) -> pd.DataFrame:
    """Give every row a split, keeping the release's own where it has one.

    Without any: 60/10/30 by groups where there are groups (ours: BASS is so small that a tenth for the
    test would leave 40 pictures), else 80/10/10. With train and test only: 10 % of train becomes val. Exact
    copies follow the first one (ours), so that a split made here leaks nothing.
    """
    own = samples.get("split")
    if own is not None and ((own == "val").any() or not (own == "train").any()):
        return samples
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    free = samples if own is None else samples[own == "train"]
    groups, sizes = free.get("group"), free["label"].value_counts()
    found, least = f"class {sizes.idxmin()!r} has {sizes.min()} pictures", sizes.min()
    if groups is not None:
        least = min(groups.nunique(), sizes.max())
        found = f"there are {groups.nunique()} groups, {sizes.max()} pictures in the largest class"
    if least < 10:
        raise EmonbError(
            f"{where}: {found}, too few to split off val; give at least 10, or make the splits yourself: folders "
            "train/, val/ and test/, or a column split of the list"
        )
    kind, fold = StratifiedKFold if groups is None else StratifiedGroupKFold, np.empty(len(free), dtype=int)
    splitter = kind(n_splits=10, shuffle=True, random_state=SPLIT_SEED)
    for i, (_, rows) in enumerate(splitter.split(free, free["label"], groups)):
        fold[rows] = i
    shares = (9, 1, 0) if own is not None else (8, 1, 1) if groups is None else (6, 1, 3)
    split = pd.Series(np.repeat(SPLITS, shares)[fold], index=free.index, dtype="str")
    if groups is None:
        split = split.groupby(free["sha256"]).transform("first")
    return samples.assign(split=split if own is None else own.where(own != "train", split))
