"""Ground floor: files written whole or not at all, entries of the resource files, locks between processes."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, SoftFileLock, Timeout

from emonb.errors import EmonbError

# some network file systems and FUSE mounts
_NO_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.ENOTTY, errno.EPERM}
_MARK = ".emonb"
_OURS = {"run.json": "notebooks", "import.json": "source", "report.json": "steps"}  # files of ours -> a field of each
_RESULTS = ("artifacts/*/*.json", "predictions/*__*.parquet", "triplets/*.jsonl")  # of runs without a mark
_NOTHING = re.compile(r"\..*|lost\+found|Thumbs\.db|desktop\.ini")  # an empty folder may hold


def make_folder(path: Path) -> Path:
    """Create a folder that can be written; raises `EmonbError` naming it and the remedy."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)  # another thread has looked, too
    except (OSError, RecursionError) as error:  # the latter of a thousand folders in each other
        reason = getattr(error, "strerror", None) or error
        raise EmonbError(f"{path}: cannot write ({reason}); choose another folder with OUT (--out)") from None
    return path


def results_folder(path: Path) -> Path:
    """The folder of a run; raises `EmonbError` for one that is not there, or is none."""
    if not (path / "run.json").is_file():
        raise EmonbError(f"{path}: no results folder; make one with: python -m emonb run")
    return path


def claim_folder(path: Path, option: str = "OUT (--out)") -> Path:
    """Create a folder of ours, and mark it; raises as `refuse_foreign` and `make_folder`."""
    refuse_foreign(path, option)
    make_folder(path)
    if not _is_ours(path):
        (path / _MARK).write_text("emonb made this folder and may replace what it wrote here\n", encoding="utf-8")
    return path


def refuse_foreign(path: Path, option: str, ours: bool = False) -> None:
    """Raise `EmonbError` for a folder with files that are not of emonb: nobody's shall be overwritten.

    `ours`: it is known to be; `option`: how people name another.
    """
    there = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    others = [name for name in there if not _NOTHING.fullmatch(name)]
    if others and not (ours or _is_ours(path)):  # looked at last: others may be making it just now
        what = f"holds {', '.join(others[:3])}{', ...' * (len(others) > 3)} and nothing of emonb"
        raise EmonbError(f"{path}: {what}; choose a new or empty folder with {option}")


def _is_ours(path: Path) -> bool:
    for name, field in _OURS.items():
        with suppress(EmonbError, TypeError):
            if field in read_json(path / name):
                return True
    return (path / _MARK).is_file() or any(next(path.glob(pattern), None) for pattern in _RESULTS)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never half."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, obj: Any) -> None:
    """Write JSON atomically, readable, with a final newline."""
    atomic_write(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path, otherwise: str = "") -> str:
    """Text of a file: UTF-8, 16 or 32, told apart by the mark or the zeros at its beginning; else `otherwise`.

    Raises `EmonbError` naming the file and what is wrong.
    """
    try:
        content = Path(path).read_bytes()
        encoding = json.detect_encoding(content)
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if otherwise and encoding.startswith("utf-8"):
            return content.decode(otherwise, "replace")
        byte = f"byte {content[error.start]:#04x} at {error.start}"
        wrong = f"{byte} is no {encoding.upper()}, perhaps Latin-1; save the file as UTF-8"
    except OSError as error:
        wrong = f"cannot be read ({error.strerror}); correct the file's name or its permissions"
    raise EmonbError(f"{path}: {wrong}")


def read_json(path: Path, remedy: str = "delete it and run again") -> Any:
    """Read JSON in any UTF; raises `EmonbError` naming a file that is missing or damaged, with the remedy."""
    content = b""
    try:
        content = Path(path).read_bytes()
        return json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        why = "it is a web page" if content.lstrip().startswith(b"<") else getattr(error, "strerror", None) or error
        raise EmonbError(f"{path}: cannot be read as JSON ({why}); {remedy}") from None


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which the last would win silently."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, first = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if first.setdefault((key.tag, str(key.value)), key) is not key:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is there twice", problem_mark=key.start_mark)
        return node


def read_yaml(path: Path, remedy: str = "correct the file") -> Any:
    """Read YAML in any UTF; raises `EmonbError` naming the file, what is wrong, also a key twice, and the line."""
    text = read_text(path)
    try:
        return yaml.load(text, _EachKeyOnce)
    except Exception as error:  # besides YAML's own what a value meets, such as a 13th month or a bottomless nest
        mark, about = getattr(error, "problem_mark", None), [getattr(error, n, "") for n in ("context", "problem")]
        line = f"line {mark.line + 1}: " if mark else ""
        why = " ".join((", ".join(filter(None, about)) or str(error)).split())[:200]
        raise EmonbError(f"{path}: {line}not valid YAML ({why}); {remedy}") from None


def file_digest(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Put a finished file into another folder without copying it, where the file system can."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def resource_path(*parts: str) -> Path:
    """A file or folder below `emonb/resources/`."""
    return Path(__file__).with_name("resources").joinpath(*parts)


def resource(file: str, *entry: str) -> Any:
    """An entry of a YAML file in `emonb/resources/`, e.g. `resource("prompts.yaml", "categorical", "instruction")`.

    Written with literal names it is part of the key of every result whose code comes by (see `emonb.store`).
    """
    found = _tree(file)
    for name in entry:
        found = found[name]
    return found


@functools.cache
def _tree(file: str) -> Any:
    return read_yaml(resource_path(file))


@contextmanager
def locked(path: Path, busy: str = "") -> Iterator[None]:
    """Hold a lock between processes; it is free again when its holder dies.

    Args:
        path: the lock's file.
        busy: message of the `EmonbError` raised while another process holds the lock; "": wait for it.
    """
    soft = SoftFileLock(path.with_name(f"{path.name}.soft"))
    for lock in (FileLock(path, fallback_to_soft=False), soft):
        try:
            lock.acquire(timeout=0 if busy else -1)
            break
        except Timeout:
            raise EmonbError(busy) from None
        except OSError as error:
            if lock is soft or error.errno not in _NO_FLOCK:
                raise
            _say_no_flock()
    try:
        yield
    finally:
        lock.release()


@functools.cache
def _say_no_flock() -> None:
    """Once a process; not in a notebook of a run, whose process has said it."""
    if os.environ.get("EMONB_HEADLESS") != "1":
        said = "no file locks here (flock): marker files take their place; one machine at a time"
        print(f"emonb: {said}", file=sys.stderr)
