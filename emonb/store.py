"""The store: results of a stage under a key of everything that they depend on.

A result lives in `OUT/artifacts/<stage>/<key>/`. It is built in a temporary folder, under a lock for
its key, and renamed when it is complete: a killed run (kill -9 included) leaves no half result, and
the next one goes on from the last finished result. Long stages keep finished parts beside it, from which
the next run goes on. Under a launcher all processes call `get` together; the main one decides and writes.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from emonb.errors import EmonbError
from emonb.files import (
    atomic_write,
    code_hash,
    git_state,
    library_versions,
    make_folder,
    plain,
    read_json,
    write_json,
)
from emonb.machine import peak_memory
from emonb.parallel import agree, is_main, process_count, wait

__all__ = [
    "STAGES",
    "Artifact",
    "NotThere",
    "Store",
    "atomic_write",
    "code_hash",
    "folder_digest",
    "git_state",
    "library_versions",
    "make_folder",
    "read_json",
    "write_json",
]

# Which notebook builds which stage: for error messages, and for FORCE.
STAGES = {
    "samples": "01_data",
    "triplets": "02_triplets",
    "base_predictions": "03_instruction_tuning",
    "adapter": "03_instruction_tuning",
    "features": "03_instruction_tuning",
    "vlm_predictions": "03_instruction_tuning",
    "teacher": "04_teacher",
    "head": "05_distillation",
    "gate": "06_gate",
    "model": "06_gate",
    "cost": "06_gate",
}
_PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Artifact:
    """One finished result: a folder that nobody changes any more."""

    stage: str
    name: str
    key: str
    path: Path

    @property
    def provenance(self) -> dict[str, Any]:
        """How it was made: params, inputs, code, seconds, memory, versions, commit."""
        return read_json(self.path / _PROVENANCE)

    @property
    def digest(self) -> str:
        """sha256 over the relative names and contents of its files, provenance excepted."""
        return self.provenance["digest"]


class NotThere(Exception):
    """A store that only looks was asked for a result that would have to be made."""


class Store:
    """The results below one folder; `force` names stages to rebuild once by this object."""

    def __init__(self, root: Path, *, force: Collection[str] = ()) -> None:
        """Open or create the store; raises `EmonbError` without write permission."""
        self.root = make_folder(Path(root))
        self._force = frozenset(force)
        self._forced: set[tuple[str, str]] = set()
        self._looks = False

    def looking(self) -> Store:
        """The same store for looking only: `get` raises `NotThere` instead of making a result."""
        store = copy.copy(self)
        store._looks = True
        return store

    def was_made(self, artifact: Artifact) -> None:
        """Another process has made this result for this object: `force` does not ask for it again."""
        self._forced.add((artifact.name, artifact.key))

    def get(
        self,
        stage: str,
        name: str,
        build: Callable[..., None],
        *,
        params: Mapping[str, Any] | None = None,
        inputs: Sequence[Artifact] = (),
        code: Sequence[str] = (),
        parts: bool = False,
    ) -> Artifact:
        """The result for this key: the stored one, or built now by `build(folder)`.

        Args:
            stage: one of `STAGES` (others are allowed in tests).
            name: what it is about, e.g. `mini-fi` or `mini-fi--vit`; part of the key.
            build: fills an empty folder.
            params: everything else that the result depends on; JSON types, tuples or pydantic models.
            inputs: results of earlier stages; their digests enter the key.
            code: modules whose code (without docstrings and comments) enters the key.
            parts: call `build(folder, parts)` in every process; what it puts into the folder `parts` (finished
                shards, checkpoints) outlives a kill.
        """
        recipe = {
            "stage": stage,
            "name": name,
            "params": json.loads(_canonical(params or {})),
            "inputs": [{"stage": a.stage, "name": a.name, "key": a.key, "digest": a.digest} for a in inputs],
            "code": code_hash(*code),
        }
        digests = [entry["digest"] for entry in recipe["inputs"]]
        key = hashlib.sha256(_canonical({**recipe, "inputs": digests}).encode()).hexdigest()[:16]
        folder = make_folder(self.root / stage)
        artifact = Artifact(stage, name, key, folder / key)
        forced = stage in self._force and (name, key) not in self._forced
        if self._looks:
            if forced or not _is_complete(artifact.path):
                raise NotThere(f"{stage} of {name}")
            return artifact
        with _locked(folder / f".{key}.lock") if is_main() else nullcontext():
            hit = agree(not forced and _is_complete(artifact.path))
            if not hit:
                self._forced.add((name, key))
                _build(artifact, build, recipe, parts, forced)
            if is_main():
                write_json(folder / f"{name}.json", {"key": key})
                self._log(artifact, hit)
            wait()
        return artifact

    def find(self, stage: str, name: str) -> Artifact:
        """What `get` produced last for this name; raises `EmonbError` naming the notebook that makes it."""
        pointer = self.root / stage / f"{name}.json"
        remedy = f"run notebook {STAGES.get(stage, 'of this stage')} first, with the same settings"
        try:
            key = read_json(pointer)["key"]
        except (EmonbError, KeyError, TypeError):
            raise EmonbError(f"{pointer}: no {stage} result for {name!r}; {remedy}") from None
        artifact = Artifact(stage, name, key, self.root / stage / key)
        if not _is_complete(artifact.path):
            raise EmonbError(f"{artifact.path}: the {stage} result for {name!r} is gone or damaged; {remedy}")
        return artifact

    def _log(self, artifact: Artifact, hit: bool) -> None:
        made = artifact.provenance
        event = {
            "time": _now(),
            "notebook": os.environ.get("EMONB_NOTEBOOK", ""),
            "stage": artifact.stage,
            "name": artifact.name,
            "key": artifact.key,
            "hit": hit,
            "seconds": made["seconds"],
            "created": made["created"],
            "peak_memory_mb": made["peak_memory_mb"],
        }
        with (self.root / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")  # one short write in append mode: lines never mix


def _build(artifact: Artifact, build: Callable[..., None], recipe: dict[str, Any], parts: bool, forced: bool) -> None:
    """Build under the lock: temporary folder, provenance, flush to disk, rename."""
    temporary, old, kept = (artifact.path.with_name(f".{artifact.key}.{end}") for end in ("tmp", "old", "parts"))
    if is_main():
        for stale in (temporary, old, *([kept] if forced else [])):  # we hold the lock, so their writer is dead
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        if parts:
            kept.mkdir(exist_ok=True)
    wait()
    start = time.perf_counter()
    try:
        with peak_memory() as peak:
            build(temporary, *([kept] if parts else []))
        wait()
        if is_main():
            seconds = round(time.perf_counter() - start, 3)
            _finish(artifact, recipe, seconds, peak[0], temporary, old)
            shutil.rmtree(kept, ignore_errors=True)
    except OSError as error:
        if error.errno in (13, 28, 30):  # no permission, disk full, read-only file system
            raise EmonbError(f"{artifact.path}: cannot write ({error.strerror}); free it or set OUT") from error
        raise
    finally:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _finish(
    artifact: Artifact, recipe: dict[str, Any], seconds: float, peak_memory_mb: float, temporary: Path, old: Path
) -> None:
    """Note how the result was made, flush it to disk and put it in its place."""
    provenance = {
        **{k: recipe[k] for k in ("stage", "name")},
        "key": artifact.key,
        **{k: recipe[k] for k in ("params", "inputs", "code")},
        "seed": recipe["params"].get("seed", recipe["params"].get("seeds")),
        "digest": folder_digest(temporary),
        "files": _sizes(temporary),
        "created": _now(),
        "seconds": seconds,
        "peak_memory_mb": peak_memory_mb,
        "processes": process_count(),
        "versions": library_versions(),
        "git": git_state(),
    }
    write_json(temporary / _PROVENANCE, provenance)
    for path in temporary.rglob("*"):
        if path.is_file():
            _fsync(path)
    if artifact.path.exists():  # forced, or damaged
        artifact.path.rename(old)
    temporary.rename(artifact.path)
    _fsync(artifact.path.parent)


def _is_complete(path: Path) -> bool:
    """Whether provenance is readable and every file has the size that it had."""
    try:
        return read_json(path / _PROVENANCE)["files"] == _sizes(path)
    except (EmonbError, KeyError, TypeError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / _PROVENANCE)


def folder_digest(folder: Path) -> str:
    """sha256 over relative names and contents of a folder's files, provenance excepted."""
    digest = hashlib.sha256()
    for path in _files(folder):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _canonical(obj: Any) -> str:
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), default=plain)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the kernel frees it when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
