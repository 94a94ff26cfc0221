"""What a function reaches: the code and resource entries that its result depends on, found by name.

Keys of results and fingerprints of notebooks are made of it, so that an edit makes anew what it changes, and nothing
else. Modules are read as text; nothing is run.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from emonb.files import resource

# Modules that carry values and files and compute no result: what they hand over enters the key by its value.
_MACHINERY = {f"emonb.{m}" for m in ("errors", "files", "settings", "machine", "progress", "store", "reach", "run")}


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


def reached_by(cells: str) -> dict[str, str]:
    """What a notebook's code cells reach of emonb (see `reached`)."""
    made = _definitions_of(cells, "")
    return reached(*{use for d in made.values() if isinstance(d, _Definition) for use in d.uses if use[0]}, skip=())


def _file_of(module: str) -> Path | None:
    """The source file of a module of emonb."""
    place = Path(__file__).parent.joinpath(*module.split(".")[1:])
    return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)


@functools.cache
def _definitions(module: str) -> dict[str, _Definition | tuple[str, str]]:
    """What a module of emonb defines, by name; what it imports from emonb, as `(module, name)`."""
    file = _file_of(module)
    return _definitions_of(file.read_text(encoding="utf-8"), module) if file else {}


def _definitions_of(source: str, module: str) -> dict[str, _Definition | tuple[str, str]]:
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
        entries = {entry for node in nodes for entry in _entries(node)}
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
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "EmonbError":  # made here, raised elsewhere
            node.args = []
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
                found[alias.asname or alias.name] = (whole, "") if _file_of(whole) else (node.module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "emonb" and alias.asname:
                    found[alias.asname] = (alias.name, "")
    return found


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_SCOPES = (*_FUNCTIONS, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _uses(
    node: ast.AST,
    module: str,
    own: Iterable[str],
    imported: Mapping[str, tuple[str, str]],
    local: frozenset = frozenset(),
) -> Iterable[tuple[str, str]]:
    """What a piece of code uses of its module and of emonb; parameters and local variables hide names around them."""
    if isinstance(node, _SCOPES):
        local = local | _locals(node)
    if isinstance(node, ast.Name) and node.id not in local:
        if node.id in own:
            yield module, node.id
        elif node.id in imported and imported[node.id][1]:
            yield imported[node.id]
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in local:
        base, name = imported.get(node.value.id, ("", "-"))
        if not name:  # a module's function, as in `vlm.generate`
            yield base, node.attr
    for part in ast.iter_child_nodes(node):
        yield from _uses(part, module, own, imported, local)


def _locals(scope: ast.AST) -> frozenset[str]:
    """Names that a function or comprehension binds itself, but for imports."""
    found, waiting = set(), list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if not isinstance(node, (*_SCOPES, ast.ClassDef)):
            waiting += ast.iter_child_nodes(node)
    return frozenset(found)


def _entries(node: ast.AST) -> Iterable[tuple[str, ...]]:
    """Resource entries that are read by literal names; of a computed entry, all that may be read."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "resource":
            literal = itertools.takewhile(lambda argument: isinstance(argument, ast.Constant), part.args)
            if names := tuple(argument.value for argument in literal):
                yield names


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
