"""The cache: results of the stages under a key of everything that they depend on.

A result lives in `OUT/artifacts/<stage>/<key>/`. Its key is made of the parameters, the digests of the results that
it was made of, and the code and resource entries that its stage reaches (`emonb.reach` finds them). It is built in a
temporary folder, under a lock for its key, and renamed when it is complete: a killed run (kill -9 included) leaves no
half result, and the next one goes on from the last finished one. Long stages keep finished parts beside it. Under a
launcher all processes call `get` together; the main one decides and writes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from emonb.errors import EmonbError
from emonb.files import locked, make_folder, plain, read_json, write_json
from emonb.machine import git_state, is_main, library_versions, peak_memory, process_count, wait_for_all

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


@dataclass(frozen=True)
class Recipe:
    """What a stage says of one result: how it is made, and what it depends on besides its code.

    Attributes:
        build: called as `build(folder, parts)`, in every process; fills the empty `folder`. What it puts into
            `parts` (finished shards, checkpoints) outlives a kill and is there when it is called again.
        params: JSON types, tuples or settings sections.
        inputs: results of earlier stages, besides the `needs` of the stage.
        root: the function of `emonb.pipeline` whose code counts; "": the stage's own.
    """

    build: Callable[[Path, Path], None]
    params: Mapping[str, Any]
    inputs: Sequence[Artifact] = ()
    root: str = ""

    def made_of(self, needs: Iterable[Artifact]) -> Recipe:
        """The same recipe with more inputs."""
        return replace(self, inputs=(*needs, *self.inputs))


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline.

    Attributes:
        name: as in `artifacts/<name>/` and FORCE.
        notebook: the one that makes it.
        recipe: called as `recipe(run, *job, **needs)`; returns a `Recipe`.
        side_by_side: several results at a time, each with one thread, where the settings say so.
        needs: stages whose results it is made of: the keyword-only parameters of `recipe`.
    """

    name: str
    notebook: str
    recipe: Callable[..., Recipe]
    side_by_side: bool
    needs: tuple[str, ...]


STAGES: dict[str, Stage] = {}  # in pipeline order, filled by `stage` when `emonb.pipeline` is imported


def stage(notebook: str, *, side_by_side: bool = False) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:
    """Declare a function as the stage of its name; see `Stage`."""

    def declare(recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
        given = inspect.signature(recipe).parameters.values()
        needs = tuple(p.name for p in given if p.kind is inspect.Parameter.KEYWORD_ONLY)
        STAGES[recipe.__name__] = Stage(recipe.__name__, notebook, recipe, side_by_side, needs)
        return recipe

    return declare


class Store:
    """The results below one folder.

    Args:
        root: `OUT/artifacts`.
        force: stages to rebuild, each result once by this object.
        keep: stages of which an older result is taken in spite of changed code; its provenance says so.
    """

    def __init__(self, root: Path, *, force: Collection[str] = (), keep: Collection[str] = ()) -> None:
        self.root = make_folder(Path(root))
        self.force, self.keep = frozenset(force), frozenset(keep)
        self._done: set[tuple[str, str]] = set()  # forced ones that were rebuilt

    def get(self, stage: str, name: str, recipe: Recipe, code: Mapping[str, str]) -> Artifact:
        """The result of a recipe: the stored one, or built now.

        Args:
            stage, name: what it is, and about what, e.g. `teacher`, `mini-fi--vit`; part of the key.
            recipe: how it is made.
            code: what the stage reaches (see `reach.reached`).
        """
        made_of, artifact = self._keyed(stage, name, recipe, code)
        folder = make_folder(artifact.path.parent)
        with locked(folder / f".{artifact.key}.lock") if is_main() else nullcontext():
            forced = self._is_forced(artifact)
            if is_main() and not forced and not _is_complete(artifact.path) and stage in self.keep:
                self._keep(artifact, made_of)
            wait_for_all()
            hit = not forced and _is_complete(artifact.path)
            if not hit:
                self.was_made(artifact)
                _build(artifact, recipe.build, made_of, forced)
            if is_main():
                write_json(folder / f"{name}.json", {"key": artifact.key})
                self.note_use(artifact, hit)
            wait_for_all()
        return artifact

    def has(self, stage: str, name: str, recipe: Recipe, code: Mapping[str, str]) -> bool:
        """Whether `get` would find this result without building."""
        artifact = self._keyed(stage, name, recipe, code)[1]
        return not self._is_forced(artifact) and _is_complete(artifact.path)

    def was_made(self, artifact: Artifact) -> None:
        """It has been built for this object, perhaps by another process: `force` does not ask for it again."""
        self._done.add((artifact.name, artifact.key))

    def find(self, stage: str, name: str) -> Artifact:
        """What `get` produced last for this name; raises `EmonbError` naming the notebook that makes it."""
        pointer = self.root / stage / f"{name}.json"
        maker = STAGES[stage].notebook if stage in STAGES else "of this stage"
        remedy = f"run notebook {maker} first, with the same settings"
        try:
            key = read_json(pointer)["key"]
        except (EmonbError, KeyError, TypeError):
            raise EmonbError(f"{pointer}: no {stage} result for {name!r}; {remedy}") from None
        artifact = Artifact(stage, name, key, self.root / stage / key)
        if not _is_complete(artifact.path):
            raise EmonbError(f"{artifact.path}: the {stage} result for {name!r} is gone or damaged; {remedy}")
        return artifact

    def _is_forced(self, artifact: Artifact) -> bool:
        return artifact.stage in self.force and (artifact.name, artifact.key) not in self._done

    def _keyed(
        self, stage: str, name: str, recipe: Recipe, code: Mapping[str, str]
    ) -> tuple[dict[str, Any], Artifact]:
        made_of = {
            "stage": stage,
            "name": name,
            "params": json.loads(_canonical(recipe.params)),
            "inputs": [{"stage": a.stage, "name": a.name, "key": a.key, "digest": a.digest} for a in recipe.inputs],
            "code": dict(sorted(code.items())),
        }
        digests = [entry["digest"] for entry in made_of["inputs"]]
        key = hashlib.sha256(_canonical({**made_of, "inputs": digests}).encode()).hexdigest()[:16]
        return made_of, Artifact(stage, name, key, self.root / stage / key)

    def _keep(self, artifact: Artifact, made_of: Mapping[str, Any]) -> None:
        """Put the newest result that differs in its code only under the new key; its files are linked, not copied."""

        def same(provenance: Mapping[str, Any]) -> bool:
            digests = [[entry["digest"] for entry in made["inputs"]] for made in (provenance, made_of)]
            return digests[0] == digests[1] and all(provenance[k] == made_of[k] for k in ("stage", "name", "params"))

        found = [read_json(path) | {"at": path.parent} for path in artifact.path.parent.glob(f"[!.]*/{_PROVENANCE}")]
        found = [p for p in found if same(p) and _is_complete(p["at"])]
        if not found:
            return
        old = max(found, key=lambda p: p["created"])
        was, now = old["code"], made_of["code"]
        changed = sorted(n for n in {*was, *now} if was.get(n) != now.get(n)) if isinstance(was, dict) else ["all"]
        temporary = artifact.path.with_name(f".{artifact.key}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(old["at"], temporary, copy_function=_link)
        (temporary / _PROVENANCE).unlink()
        kept = {"from": old["key"], "made": old["created"], "changed_code": changed}
        record = {k: v for k, v in old.items() if k != "at"}
        write_json(temporary / _PROVENANCE, {**record, "key": artifact.key, "code": now, "kept": kept})
        temporary.rename(artifact.path)

    def note_use(self, artifact: Artifact, hit: bool = True) -> None:
        """Tell the runner that a notebook has used a result; `hit`: it was there before."""
        cost = {field: artifact.provenance[field] for field in ("seconds", "created", "peak_memory_mb")}
        self.note(stage=artifact.stage, name=artifact.name, key=artifact.key, hit=hit, **cost)

    def note(self, **event: Any) -> None:
        """Tell the runner what a notebook has used or written: a line of `events.jsonl`."""
        event = {"time": _now(), "notebook": os.environ.get("EMONB_NOTEBOOK", ""), **event}
        with (self.root / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")  # one short write in append mode: lines never mix


def _build(artifact: Artifact, build: Callable[[Path, Path], None], made_of: dict[str, Any], forced: bool) -> None:
    """Build under the lock: temporary folder, provenance, flush to disk, rename."""
    temporary, old, kept = (artifact.path.with_name(f".{artifact.key}.{end}") for end in ("tmp", "old", "parts"))
    if is_main():
        for stale in (temporary, old, *([kept] if forced else [])):  # we hold the lock, so their writer is dead
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        kept.mkdir(exist_ok=True)
    wait_for_all()
    start = time.perf_counter()
    try:
        with peak_memory() as peak:
            build(temporary, kept)
        wait_for_all()
        if is_main():
            seconds = round(time.perf_counter() - start, 3)
            _finish(artifact, made_of, {"seconds": seconds, "peak_memory_mb": peak[0]}, temporary, old)
            shutil.rmtree(kept, ignore_errors=True)
    except OSError as error:
        if error.errno in (13, 28, 30):  # no permission, disk full, read-only file system
            raise EmonbError(f"{artifact.path}: cannot write ({error.strerror}); free it or set OUT") from error
        raise
    finally:
        if is_main():
            for rest in (temporary, old):
                shutil.rmtree(rest, ignore_errors=True)
            if kept.is_dir() and not any(kept.iterdir()):
                kept.rmdir()


def _finish(artifact: Artifact, made_of: dict[str, Any], cost: dict[str, float], temporary: Path, old: Path) -> None:
    """Note how the result was made, flush it to disk and put it in its place."""
    provenance = {
        **made_of,
        "key": artifact.key,
        "seed": made_of["params"].get("seed", made_of["params"].get("seeds")),
        "digest": folder_digest(temporary),
        "files": _sizes(temporary),
        "created": _now(),
        **cost,
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


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


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
