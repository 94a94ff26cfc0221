"""The cache: results of the stages under a key of everything that they depend on.

A result lives in `OUT/artifacts/<stage>/<key>/`. Its key is made of the parameters, the digests of the results that
it was made of, and the code and resource entries that its stage reaches (`emonb.reach` finds them). It is built in a
temporary folder, under a lock for its key, and renamed when it is complete: a killed run (kill -9 included) leaves no
half result, and the next one goes on from the last finished one. Long stages keep finished parts beside it. Under a
launcher all processes call `get` together; the main one decides and writes.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from emonb.errors import EmonbError
from emonb.files import file_digest, link_or_copy, locked, make_folder, read_json, write_json
from emonb.machine import git_state, is_main, library_versions, peak_memory, process_count, wait_for_all
from emonb.reach import reached

_PROVENANCE = "provenance.json"


class Artifact(NamedTuple):
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


class Recipe(NamedTuple):
    """What a stage says of one result: how it is made, and what it depends on.

    `build(folder, parts)`, called in every process, fills the empty `folder`; what it puts into `parts` (finished
    shards, checkpoints) outlives a kill. `params` are JSON types or tuples, `inputs` results of earlier stages, `code`
    what `reach.reached` found.
    """

    build: Callable[[Path, Path], Any]
    params: Mapping[str, Any]
    inputs: Sequence[Artifact] = ()
    code: Mapping[str, str] = {}


class Stage(NamedTuple):
    """A step of the pipeline.

    `recipe(run, *job, **needs)` gives a `Recipe`; its keyword-only parameters, `needs`, are the stages whose results
    it is made of. `seeded`: the last part of a job is a seed. `side_by_side`: several results at a time, each with one
    thread, where the settings say so.
    """

    name: str
    notebook: str
    recipe: Callable[..., Recipe]
    side_by_side: bool
    needs: tuple[str, ...]
    seeded: bool


STAGES: dict[str, Stage] = {}  # in pipeline order, filled by `stage` when `emonb.pipeline` is imported
Making = Generator[Mapping[str, Any], tuple[Path, Path], None]


def stage(notebook: str, *, side_by_side: bool = False) -> Callable[[Callable[..., Making]], Callable[..., Recipe]]:
    """Declare a generator as the stage of its name: it yields its params, gets folder and parts, and builds."""

    def declare(function: Callable[..., Making]) -> Callable[..., Recipe]:
        given = inspect.signature(function).parameters
        needs = tuple(p.name for p in given.values() if p.kind is inspect.Parameter.KEYWORD_ONLY)

        @functools.wraps(function)
        def recipe(*job: Any, **inputs: Artifact) -> Recipe:
            making = function(*job, **inputs)
            params = next(making)

            def build(*folders: Path) -> None:
                with suppress(StopIteration):
                    making.send(folders)

            return Recipe(build, params, [*inputs.values()], stage_code(making.__name__))

        STAGES[function.__name__] = Stage(function.__name__, notebook, recipe, side_by_side, needs, "seed" in given)
        return recipe

    return declare


@functools.cache
def stage_code(name: str) -> dict[str, str]:
    """Code and resource entries that a stage, or another function of `emonb.pipeline`, reaches."""
    return reached(("emonb.pipeline", name))


class Store:
    """The results below one folder.

    Args:
        root: `OUT/artifacts`.
        force: stages whose results are made again if they are older than this object.
        keep: stages of which an older result is taken in spite of changed code; its provenance says so.
    """

    def __init__(self, root: Path, *, force: Collection[str] = (), keep: Collection[str] = ()) -> None:
        self.root, self.force, self.keep, self.opened = Path(root), force, keep, _now()

    def get(self, stage: str, name: str, recipe: Recipe) -> Artifact:
        """The result of a recipe: the stored one, or built now.

        `stage` and `name`, e.g. `head` and `mini-fi--seed0`, are part of its key.
        """
        made_of, artifact = self._keyed(stage, name, recipe)
        folder = make_folder(artifact.path.parent)
        temporary, parts = (folder / f".{artifact.key}.{end}" for end in ("tmp", "parts"))
        with locked(folder / f".{artifact.key}.lock") if is_main() else nullcontext():
            if is_main():
                shutil.rmtree(temporary, ignore_errors=True)  # we hold the lock, so its writer is dead
                if stage in self.keep and not _is_sound(artifact.path):
                    _keep(artifact, made_of, temporary)
                if not self._is_there(artifact):
                    if stage in self.force:
                        shutil.rmtree(parts, ignore_errors=True)
                    temporary.mkdir()
                    parts.mkdir(exist_ok=True)
            wait_for_all()
            wanted = temporary.is_dir()  # so the main process has decided
            if wanted:
                _build(artifact, recipe, made_of, temporary, parts)
            if is_main():
                write_json(folder / f"{name}.json", {"key": artifact.key})
                self._note_use(artifact, hit=not wanted)
            wait_for_all()
        return artifact

    def has(self, stage: str, name: str, recipe: Recipe) -> bool:
        """Whether `get` would find this result without building."""
        return self._is_there(self._keyed(stage, name, recipe)[1])

    def find(self, stage: str, name: str) -> Artifact:
        """What `get` produced last for this name; raises `EmonbError` naming the notebook that makes it."""
        pointer = self.root / stage / f"{name}.json"
        remedy = f"run notebook {STAGES[stage].notebook if stage in STAGES else 'of this stage'} first"
        try:
            key = f"{read_json(pointer)['key']:.16}"
        except (EmonbError, KeyError, TypeError, ValueError):
            raise EmonbError(f"{pointer}: no {stage} result for {name!r}; {remedy}, with the same settings") from None
        artifact = Artifact(stage, name, key, self.root / stage / key)
        if not _is_sound(artifact.path):
            raise EmonbError(f"{artifact.path}: the {stage} result for {name!r} is gone or damaged; {remedy}")
        self._note_use(artifact, hit=True)
        return artifact

    def _is_there(self, artifact: Artifact) -> bool:
        forced = artifact.stage in self.force
        return _is_sound(artifact.path) and not (forced and artifact.provenance["created"] < self.opened)

    def _keyed(self, stage: str, name: str, recipe: Recipe) -> tuple[dict[str, Any], Artifact]:
        made_of = {
            "stage": stage,
            "name": name,
            "params": json.loads(json.dumps(recipe.params)),
            "inputs": [{"stage": a.stage, "name": a.name, "key": a.key, "digest": a.digest} for a in recipe.inputs],
            "code": recipe.code,
        }
        text = json.dumps(_essence(made_of) | {"code": recipe.code}, sort_keys=True, separators=(",", ":"))
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        return made_of, Artifact(stage, name, key, self.root / stage / key)

    def _note_use(self, artifact: Artifact, hit: bool) -> None:
        cost = {field: artifact.provenance.get(field) for field in ("seconds", "created", "peak_memory_mb")}
        self.note(stage=artifact.stage, name=artifact.name, key=artifact.key, hit=hit, **cost)

    def note(self, **event: Any) -> None:
        """Tell the runner what a notebook has used or written: a line in the file $EMONB_EVENTS."""
        with open(os.environ.get("EMONB_EVENTS") or os.devnull, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")  # one short write in append mode: lines never mix


def _essence(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """What a key is made of besides the code; of inputs the content counts, not how they were made."""
    digests = [entry["digest"] for entry in made_of["inputs"]]
    return {"inputs": digests, **{name: made_of[name] for name in ("stage", "name", "params")}}


def _keep(artifact: Artifact, made_of: Mapping[str, Any], temporary: Path) -> None:
    """Put the newest result that differs in its code only under the new key; its files are linked, not copied."""
    there = [read_json(path / _PROVENANCE) for path in artifact.path.parent.glob("[!.]*/") if _is_sound(path)]
    found = [old for old in there if _essence(old) == _essence(made_of)]
    if not found:
        return
    old, now = max(found, key=lambda old: old["created"]), made_of["code"]
    changed = sorted({name for name, _ in old["code"].items() ^ now.items()})
    shutil.copytree(artifact.path.with_name(old["key"]), temporary, copy_function=link_or_copy)
    (temporary / _PROVENANCE).unlink()
    kept = {"from": old["key"], "made": old["created"], "changed_code": changed}
    write_json(temporary / _PROVENANCE, {**old, "key": artifact.key, "code": now, "kept": kept})
    _replace(artifact.path, temporary)


def _build(artifact: Artifact, recipe: Recipe, made_of: Mapping[str, Any], temporary: Path, parts: Path) -> None:
    """Build under the lock: fill the temporary folder, say how, flush it to disk, put it in its place."""
    start = time.perf_counter()
    try:
        with peak_memory() as peak:
            recipe.build(temporary, parts)
        wait_for_all()
        if is_main():
            hashed = {path.relative_to(temporary).as_posix(): file_digest(path) for path in _files(temporary)}
            provenance = {
                **made_of,
                "key": artifact.key,
                "seed": made_of["params"].get("seed"),
                "digest": hashlib.sha256("".join(f"{name}\0{x}\n" for name, x in hashed.items()).encode()).hexdigest(),
                "files": _sizes(temporary),
                "sha256": {name: digest for name, digest in hashed.items() if "/" not in name},
                "created": _now(),
                "seconds": round(time.perf_counter() - start, 3),
                "peak_memory_mb": peak[0],
                "processes": process_count(),
                "versions": library_versions(),
                "git": git_state(),
            }
            write_json(temporary / _PROVENANCE, provenance)
            for path in _files(temporary):
                with path.open("rb") as file:
                    os.fsync(file)
            _replace(artifact.path, temporary)
            shutil.rmtree(parts)
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        if isinstance(error, (OSError, EmonbError)) or shutil.disk_usage(temporary.parent).free > 2**16:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary.parent)) from error
    finally:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)


def _replace(path: Path, temporary: Path) -> None:
    """Put a complete folder in the place of what is there: one that was forced, or damaged."""
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def _is_sound(path: Path) -> bool:
    """Whether files have the sizes that they had and hold what they held; in folders not: pictures are many."""
    with suppress(EmonbError, KeyError, TypeError):
        made = read_json(path / _PROVENANCE)
        if made["files"] == _sizes(path):
            files = tuple((file, file.stat().st_mtime_ns) for file in sorted(path.iterdir()) if file.is_file())
            return made.get("sha256", now := _digests(files)) == now
    return False


@functools.cache  # looked at once by a process, unless a file is written to
def _digests(files: tuple[tuple[Path, int], ...]) -> dict[str, str]:
    return {file.name: file_digest(file) for file, _ in files if file.name != _PROVENANCE}


def _sizes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / _PROVENANCE)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
