"""Room 01: plain trees of pictures, `<split>/<emotion>/*` or `<emotion>/*`, and what lies around in them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pandas as pd

from emonb.errors import EmonbError
from emonb.settings import SPLITS
from emonb.store import read_json

__all__ = ["SUFFIXES", "attributes", "file_problem", "names_in", "read_tree", "with_attributes"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
_ANNOTATION = "annotation"  # EmoSet's folder of attributes
_ATTRIBUTES = ("scene", "facial_expression", "human_action")
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
    parents = [root / split for split in SPLITS if (root / split).is_dir()]
    missing = [f"{s}/" for s in ("train", "test") if parents and not (root / s).is_dir()]
    emotions = [(p, e) for p in parents or [root] for e in _class_folders(p, root, problems)]
    rows = []
    for parent, emotion in emotions:
        pictures = _pictures(emotion, root, problems)
        if not pictures:
            raise EmonbError(f"{emotion}: class without pictures; add .jpg, .png or .webp files or remove it")
        for path in pictures:
            row = {"image_id": path, "path": path, "label": emotion.name.lower()}
            rows.append({**row, "split": parent.name} if parents else row)
    if not rows:
        raise EmonbError(f"{root}: zero pictures; expected <train|val|test>/<emotion>/*.jpg (or .png, .webp)")
    frame = pd.DataFrame(rows)
    if (root / _ANNOTATION).is_dir():
        files = [
            root / _ANNOTATION / Path(p).parent.name / f"{Path(p).stem}.json" for p in frame["path"]
        ]  # as EmoSet does: annotation/<emotion>/<name>.json
        frame = with_attributes(frame, [attributes(f) if f.is_file() else {} for f in files])
    return frame, problems, missing


def attributes(file: Path) -> dict[str, Any]:
    """EmoSet's attributes of one picture: `objects` (list) and, where present, scene, expression and action.

    Raises:
        EmonbError: the file is no JSON object.
    """
    found = read_json(file)
    if not isinstance(found, dict):
        raise EmonbError(f"{file}: must be an object with EmoSet's fields; correct or remove the file")
    objects = found.get("object") or []
    row = {"objects": [_words(x) for x in (objects if isinstance(objects, list) else [objects])]}
    return {**row, **{name: _words(found[name]) for name in _ATTRIBUTES if found.get(name)}}


def with_attributes(frame: pd.DataFrame, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A raw table with the attributes as columns: for the triplets alone."""
    rows = [{"objects": [], **row} for row in rows]
    return frame.join(pd.DataFrame(rows, index=frame.index).reindex(columns=["objects", *_ATTRIBUTES]))


def file_problem(path: Path) -> str | None:
    """`symlink_loop` or `listed_but_missing` for what is no file (a pipe and a folder are none); None for a file."""
    try:
        return None if stat.S_ISREG(os.stat(path).st_mode) else "listed_but_missing"
    except OSError as error:
        return "symlink_loop" if error.errno == errno.ELOOP else "listed_but_missing"
    except ValueError:  # a NUL character in a list's file name
        return "listed_but_missing"


def names_in(folder: Path) -> str:
    """The first names in a folder as text, for messages."""
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if not p.name.startswith("."))
    return (
        ", ".join(repr(n) for n in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
    )


def _class_folders(parent: Path, root: Path, problems: Problems) -> list[Path]:
    folders = []
    for path in sorted(parent.iterdir()):
        if path.name.startswith((".", _ANNOTATION)):
            continue
        if path.is_symlink() and _leads_back(path):
            problems.setdefault("symlink_loop", []).append(_shown(path, root))
        elif path.is_dir():
            folders.append(path)
    return folders


def _pictures(emotion: Path, root: Path, problems: Problems) -> list[str]:
    """Paths of a class folder's pictures, relative to the root; everything else is a problem."""
    found = []
    for path in sorted(emotion.iterdir()):
        kind = _kind(path)
        if kind == "picture":
            found.append(str(path.relative_to(root)))
        elif kind:
            problems.setdefault(kind, []).append(_shown(path, root))
    return found


def _kind(path: Path) -> str | None:
    """`picture`, a kind of problem, or None for what nobody misses (hidden files, folders)."""
    picture = path.suffix.lower() in SUFFIXES
    if path.is_symlink():
        if _leads_back(path):
            return "symlink_loop"
        if not path.exists():
            return "broken_link"
    if not path.is_file():
        return None
    if not picture:
        return None if path.name.startswith(".") else "unused_file"
    try:
        path.name.encode()
    except UnicodeEncodeError:
        return "undecodable_name"
    return "picture"


def _leads_back(link: Path) -> bool:
    """Whether a link leads to itself or to a folder above it."""
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, up to Python 3.12
        return isinstance(error, RuntimeError) or error.errno == errno.ELOOP
    return target in link.parent.resolve().parents or target == link.parent.resolve()


def _shown(path: Path, root: Path) -> str:
    """A path as text that every file format can hold."""
    return str(path.relative_to(root)).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _words(value: object) -> str:
    return " ".join(str(value).replace("_", " ").split())
