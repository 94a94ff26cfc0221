"""The cache: results of the stages under a key of everything that they depend on.

A result lives in `OUT/artifacts/<stage>/<key>/`. Its key is made of the parameters, the digests of the results that
it was made of, and the code and resource entries that its stage reaches, which are found by themselves (`reached`).
It is built in a temporary folder, under a lock for its key, and renamed when it is complete: a killed run (kill -9
included) leaves no half result, and the next one goes on from the last finished one. Long stages keep finished parts
beside it. Under a launcher all processes call `get` together; the main one decides and writes.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from emonb.errors import EmonbError
from emonb.files import locked, make_folder, plain, read_json, resource, write_json
from emonb.machine import agree, git_state, is_main, library_versions, peak_memory, process_count, wait_for_all

_PROVENANCE = "provenance.json"
# Modules that carry values and files and compute no result: what they hand over enters the key by its value.
_MACHINERY = {f"emonb.{m}" for m in ("errors", "files", "settings", "machine", "progress", "store", "run", "headless")}


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
    """

    build: Callable[[Path, Path], None]
    params: Mapping[str, Any]
    inputs: Sequence[Artifact] = ()


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
            code: what the stage reaches (see `reached`).
        """
        made_of, artifact = self._keyed(stage, name, recipe, code)
        folder = make_folder(artifact.path.parent)
        with locked(folder / f".{artifact.key}.lock") if is_main() else nullcontext():
            forced = self._is_forced(artifact)
            if is_main() and not forced and not _is_complete(artifact.path) and stage in self.keep:
                self._keep(artifact, made_of)
            hit = agree(not forced and _is_complete(artifact.path))
            if not hit:
                self.was_made(artifact)
                _build(artifact, recipe.build, made_of, forced)
            if is_main():
                write_json(folder / f"{name}.json", {"key": artifact.key})
                self._log(artifact, hit)
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

    def _log(self, artifact: Artifact, hit: bool) -> None:
        made = artifact.provenance
        event = {
            "time": _now(),
            "notebook": os.environ.get("EMONB_NOTEBOOK", ""),
            **{"stage": artifact.stage, "name": artifact.name, "key": artifact.key, "hit": hit},
            **{field: made[field] for field in ("seconds", "created", "peak_memory_mb")},
        }
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


# ---- what a function reaches ---------------------------------------------------------------------------------------


def reached(*starts: tuple[str, str], skip: Collection[str] = _MACHINERY) -> dict[str, str]:
    """The code and resource entries that functions of emonb use, directly or through others, by name.

    Followed are the functions, classes and constants named in the code, also through imports inside functions, and
    literal calls of `resource`. Docstrings, comments and the words of raised errors do not count.

    Args:
        starts: `(module, name)` of functions.
        skip: modules that are not followed.

    Returns:
        `module:name` or `file:entry...` -> hash of what stands there.
    """
    found: dict[str, str] = {}
    waiting = list(starts)
    while waiting:
        module, name = waiting.pop()
        if f"{module}:{name}" in found or module in skip:
            continue
        definition = _definitions(module).get(name)
        if definition is None:
            continue
        if isinstance(definition, tuple):  # imported there: followed to where it is defined
            waiting.append(definition)
            continue
        found[f"{module}:{name}"] = definition.code
        waiting += definition.uses
        for file, *entry in definition.entries:
            found[":".join((file, *entry))] = _hash(json.dumps(resource(file, *entry), sort_keys=True, default=str))
    return found


@dataclass(frozen=True)
class _Definition:
    """A function, class or constant: hash of its code, names that it uses, resource entries that it reads."""

    code: str
    uses: list[tuple[str, str]]
    entries: list[tuple[str, ...]]


@functools.cache
def _definitions(module: str) -> dict[str, _Definition | tuple[str, str]]:
    """What a module of emonb defines, by name; what it imports from emonb, as `(module, name)`."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return {}
    return definitions_of(Path(spec.origin).read_text(encoding="utf-8"), module)


def definitions_of(source: str, module: str) -> dict[str, _Definition | tuple[str, str]]:
    """`_definitions` of a source text; the name "" stands for what is not inside a function or class."""
    tree = _Bare().visit(ast.parse(source))
    imported, groups = _imports(tree), {}
    for node in tree.body:
        names = _targets(node)
        for name in names or [""]:
            groups.setdefault(name, []).append(node)
    made: dict[str, _Definition | tuple[str, str]] = {name: where for name, where in imported.items() if where[1]}
    for name, nodes in groups.items():
        uses = {use for node in nodes for use in _uses(node, module, groups, imported)}
        entries = {entry for node in nodes for entry in _entries(node, module)}
        code = _hash("\n".join(map(ast.unparse, nodes)))
        made[name] = _Definition(code, sorted(uses - {(module, name)}), sorted(entries))
    return made


class _Bare(ast.NodeTransformer):
    """Takes docstrings and the words of raised errors out of a tree."""

    def visit(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                node.body = node.body[1:]
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return node


def _targets(node: ast.stmt) -> list[str]:
    """Names that a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [n.id for target in targets if target is not None for n in ast.walk(target) if isinstance(n, ast.Name)]


def _imports(tree: ast.AST) -> dict[str, tuple[str, str]]:
    """Local name -> `(module, name)`, or `(module, "")` for a module, of all imports from emonb in a tree."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "emonb":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = importlib.util.find_spec(node.module) and _is_module(whole)
                found[alias.asname or alias.name] = (whole, "") if is_module else (node.module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "emonb" and alias.asname:
                    found[alias.asname] = (alias.name, "")
    return found


@functools.cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _uses(
    node: ast.AST, module: str, own: Iterable[str], imported: Mapping[str, tuple[str, str]]
) -> Iterable[tuple[str, str]]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            if part.id in own:
                yield module, part.id
            elif part.id in imported and imported[part.id][1]:
                yield imported[part.id]
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            base, name = imported.get(part.value.id, ("", "-"))
            if not name:  # a module's function, as in `vlm.generate`
                yield base, part.attr


def _entries(node: ast.AST, module: str) -> Iterable[tuple[str, ...]]:
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "resource":
            names = []
            for argument in part.args:
                if not isinstance(argument, ast.Constant):
                    break  # a computed entry: all that may be read is part of the key
                names.append(argument.value)
            if not names:
                raise ValueError(f"{module}: resource() wants the name of its file as a literal")
            yield tuple(names)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
