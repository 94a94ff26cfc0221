"""Files written whole or not at all, and what identifies this machine's software."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from emonb.errors import EmonbError
from emonb.settings import project_root

__all__ = [
    "atomic_write",
    "code_hash",
    "git_state",
    "library_versions",
    "make_folder",
    "plain",
    "read_json",
    "visible",
    "write_json",
]

_LIBRARIES = ("torch", "torchvision", "transformers", "timm", "peft", "numpy", "pandas", "scikit-learn")


def make_folder(path: Path) -> Path:
    """Create a folder that can be written; raises `EmonbError` naming it and the remedy."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)  # another thread has looked, too
    except OSError as error:
        reason = error.strerror or str(error)
        raise EmonbError(f"{path}: cannot write ({reason}); choose another folder with OUT (--out)") from None
    return path


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
    atomic_write(path, json.dumps(obj, indent=2, ensure_ascii=False, default=plain) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; raises `EmonbError` naming a file that is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EmonbError(f"{path}: cannot be read as JSON ({error}); delete it and run again") from None


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of Python and the libraries that a result depends on."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return versions


@functools.cache
def git_state() -> dict[str, Any]:
    """Commit of the project and whether tracked files differ from it; {} outside a checkout."""
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        run = functools.partial(subprocess.run, cwd=project_root(), capture_output=True, text=True, check=True)
        commit, status = (run(command).stdout.strip() for command in commands)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit, "dirty": bool(status)}


def plain(obj: Any) -> Any:
    """For `json.dumps(default=...)`: settings sections and sets; TypeError for anything else."""
    if hasattr(obj, "model_dump"):
        return obj.model_dump(mode="json")
    if isinstance(obj, set | frozenset):
        return sorted(obj)
    raise TypeError(f"{type(obj).__name__} cannot be part of a key: use numbers, text, lists or dicts")


@functools.cache
def code_hash(*modules: str) -> str:
    """Hash of modules' code; comments, layout and docstrings do not count."""
    digest = hashlib.sha256()
    for module in sorted(modules):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ValueError(f"no source for module {module!r}")
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0] if node.body else None
                if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                    node.body = node.body[1:]
        digest.update(f"{module}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:16]


def visible(text: object) -> str:
    """A name or a model's text that cannot steer a terminal or a page: what does not print becomes an escape.

    Control and format characters, such as those that turn the direction of writing, and bytes that are no UTF-8.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
