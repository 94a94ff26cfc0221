"""Room 01: plain trees of pictures, `<split>/<emotion>/*` or `<emotion>/*`, and what lies around in them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from emonb.errors import EmonbError
from emonb.settings import SPLITS
from emonb.store import read_json

__all__ = ["SUFFIXES", "file_problem", "names_in", "plain_text", "read_tree", "with_attributes"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_ANNOTATION = "annotation"  # EmoSet's folder of attributes
_ATTRIBUTES = pa.schema(
    [("objects", pa.list_(pa.string())), *((n, pa.string()) for n in ("scene", "facial_expression", "human_action"))]
)
_BLOCK = 1024  # annotations held as Python objects at a time
Problems = dict[str, list[str]]


def read_tree(root: Path) -> tuple[pd.DataFrame, Problems, list[str]]:
    """Raw table of `<train|val|test>/<emotion>/*` or `<emotion>/*`; folder names count in lower case.

    Args:
        root: the tree.

    Returns:
        Columns `image_id`, `path`, `label` and, where the tree has them, `split` and EmoSet's attributes; the
        problems, kind -> image ids; the split folders that are missing of train/ and test/.

    Raises:
        EmonbError: no pictures, or a class without pictures.
    """
    problems: Problems = {}
    found = [p for p in sorted(root.iterdir()) if p.name.lower() in SPLITS and p.is_dir()]
    parents = sorted(found, key=lambda p: SPLITS.index(p.name.lower()))
    missing = [f"{s}/" for s in ("train", "test") if parents and s not in {p.name.lower() for p in parents}]
    if parents:
        for path in _class_folders(root, root, problems):
            if path not in parents:
                _report(problems, "unused_file", path, root)
    parts = []
    for parent in parents or [root]:
        for emotion in _class_folders(parent, root, problems):
            pictures = _pictures(emotion, root, problems)
            if not pictures:
                raise EmonbError(f"{emotion}: class without pictures; add .jpg, .png or .webp files or remove it")
            part = pd.DataFrame({"image_id": pd.Series(pictures, dtype="str")}).assign(label=emotion.name.lower())
            parts.append(part.assign(split=parent.name.lower()) if parents else part)
    if not parts:
        raise EmonbError(f"{root}: zero pictures; expected <train|val|test>/<emotion>/*.jpg (or .png, .webp)")
    frame = pd.concat(parts, ignore_index=True)
    frame.insert(1, "path", frame["image_id"])
    if (root / _ANNOTATION).is_dir():  # as EmoSet's: annotation/<emotion>/<name>.json
        files = (Path(_ANNOTATION, Path(p).parent.name, f"{Path(p).stem}.json") for p in frame["path"])
        frame, problems["annotation_missing"] = with_attributes(frame, root, map(str, files), strict=True)
    return frame, problems, missing


def with_attributes(
    frame: pd.DataFrame, root: Path, files: Iterable[str], *, strict: bool = False
) -> tuple[pd.DataFrame, list[str]]:
    """A raw table with EmoSet's attributes as columns, for the triplets alone.

    Args:
        frame: the raw table.
        root: the folder that the files are relative to.
        files: the annotation file of each row.
        strict: a damaged annotation is an error, as in a tree of one's own; of a release it is reported.

    Returns:
        The table with `objects` (list of text), `scene`, `facial_expression` and `human_action`; image ids of the
        pictures whose annotation is missing or damaged: they have no objects and no attributes.

    Raises:
        EmonbError: strict, and an annotation is no JSON object.
    """
    blocks, lacking = [], []
    named = zip(frame["image_id"], files, strict=True)
    while block := list(islice(named, _BLOCK)):
        rows = []
        for image_id, file in block:
            row = _attributes(root, file, strict)
            rows.append(row or {"objects": []})
            if row is None:
                lacking.append(image_id)
        blocks.append(pa.Table.from_pylist(rows, schema=_ATTRIBUTES))
    table = pa.concat_tables(blocks) if blocks else _ATTRIBUTES.empty_table()
    columns = {"objects": pd.Series(pd.arrays.ArrowExtensionArray(table["objects"]), index=frame.index)}
    for name in _ATTRIBUTES.names[1:]:
        columns[name] = pd.Series(table[name].to_pandas(), dtype="str").set_axis(frame.index)
    return frame.assign(**columns), lacking


def _attributes(root: Path, file: str, strict: bool) -> dict[str, Any] | None:
    """Attributes of one picture, or None where the annotation is missing or damaged."""
    if file_problem(root, file):
        return None
    try:
        found = read_json(root / file)
        if not isinstance(found, dict):
            raise EmonbError(f"{root / file}: must be an object with EmoSet's fields; correct or remove the file")
    except EmonbError:
        if strict:
            raise
        return None
    objects = found.get("object") or []
    row = {"objects": [_words(x) for x in (objects if isinstance(objects, list) else [objects])]}
    return {**row, **{name: _words(found[name]) for name in _ATTRIBUTES.names[1:] if found.get(name)}}


def file_problem(root: Path, path: str) -> str | None:
    """`symlink_loop` or `listed_but_missing` for what is no file below the root, None for a file.

    A pipe, a folder, and a path that leads out of the release count as missing.
    """
    if os.path.isabs(path) or ".." in path.split("/"):
        return "listed_but_missing"
    try:
        return None if stat.S_ISREG(os.stat(root / path).st_mode) else "listed_but_missing"
    except OSError as error:
        return "symlink_loop" if error.errno == errno.ELOOP else "listed_but_missing"
    except ValueError:  # a NUL character in a list's file name
        return "listed_but_missing"


def names_in(folder: Path) -> str:
    """The first names in a folder as text, for messages."""
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if not p.name.startswith("."))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(repr(n) for n in names[:8]) + more or "nothing"


def plain_text(text: str) -> str:
    """Text that every file format can hold: bytes of a name that are not UTF-8, and halves of characters, escaped."""
    if text.isascii():
        return text
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        data = text.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def _class_folders(parent: Path, root: Path, problems: Problems) -> list[Path]:
    """Folders of a folder that can be emotions; what cannot be used is a problem."""
    folders = []
    for path in sorted(parent.iterdir()):
        if path.name.startswith((".", _ANNOTATION)):
            continue
        if path.is_symlink() and _leads_back(path):
            _report(problems, "symlink_loop", path, root)
        elif path.is_dir():
            if plain_text(path.name) == path.name:
                folders.append(path)
            else:
                _report(problems, "undecodable_name", path, root)
        elif path.suffix.lower() in SUFFIXES:  # a picture without emotion
            _report(problems, "unused_file", path, root)
    return folders


def _pictures(emotion: Path, root: Path, problems: Problems) -> list[str]:
    """Paths of a class folder's pictures, relative to the root; everything else is a problem."""
    found, below = [], str(emotion.relative_to(root))
    for name in sorted(os.listdir(emotion)):
        kind = _kind(os.path.join(emotion, name), name)
        if kind == "picture":
            found.append(f"{below}/{name}")
        elif kind:
            _report(problems, kind, emotion / name, root)
    return found


def _kind(path: str, name: str) -> str | None:
    """`picture`, a kind of problem, or None for what nobody misses: hidden files, macOS's `._photo.jpg` included."""
    picture = os.path.splitext(name)[1].lower() in SUFFIXES
    if name.startswith("._") or (name.startswith(".") and not picture):
        return None
    if os.path.islink(path):
        if _leads_back(Path(path)):
            return "symlink_loop"
        if not os.path.exists(path):
            return "broken_link"
    if not (picture and os.path.isfile(path)):
        return "unused_file"
    return "picture" if plain_text(name) == name else "undecodable_name"


def _leads_back(link: Path) -> bool:
    """Whether a link leads to itself or to a folder above it."""
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, up to Python 3.12
        return isinstance(error, RuntimeError) or error.errno == errno.ELOOP
    return target in link.parent.resolve().parents or target == link.parent.resolve()


def _report(problems: Problems, kind: str, path: Path, root: Path) -> None:
    folder = "/" if kind == "unused_file" and path.is_dir() else ""
    problems.setdefault(kind, []).append(plain_text(str(path.relative_to(root))) + folder)


def _words(value: object) -> str:
    return plain_text(" ".join(str(value).replace("_", " ").split()))
