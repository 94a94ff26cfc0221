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
import symtable
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from emonb.files import resource

# Modules that carry values and files and compute no result: what they hand over enters the key by its value.
_MACHINERY = {f"emonb.{m}" for m in ("errors", "files", "settings", "machine", "progress", "store", "reach", "run")}


def reached(*starts: tuple[str, str], skip: Collection[str] = _MACHINERY) -> dict[str, str]:
    """The code and resource entries that functions `(module, name)` of emonb use, directly or through others.

    Followed are the functions, classes and constants named in the code, but for those of the modules `skip`, also
    through imports inside functions, and literal calls of `resource`. Docstrings, comments and the words of raised
    errors do not count. Returns `module:name` or `file:entry...` -> hash of what stands there.
    """
    found: dict[str, str] = {}
    waiting = list(starts)
    while waiting:
        module, name = waiting.pop()
        definition = None if module in skip else _module(module).get(name)
        if definition is None or f"{module}:{name}" in found:
            continue
        waiting += definition.uses
        if definition.code:
            found[f"{module}:{name}"] = _hash(definition.code)
        for file, *entry in definition.entries:
            found[":".join((file, *entry))] = _hash(json.dumps(resource(file, *entry), sort_keys=True, default=str))
    return found


def reached_by(cells: str) -> dict[str, str]:
    """What a notebook's code cells reach of emonb (see `reached`)."""
    uses = {use for definition in _definitions(cells, "").values() for use in definition.uses}
    return reached(*uses, skip=())


class _Definition(NamedTuple):
    """A function, class or constant: its code, names that it uses, resource entries that it reads.

    One that is imported has no code and uses what it stands for.
    """

    code: str
    uses: list[tuple[str, str]]
    entries: set[tuple[str, ...]]


def _file_of(module: str) -> Path | None:
    """The source file of a module of emonb."""
    place = Path(__file__).parent.joinpath(*module.split(".")[1:])
    return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)


@functools.cache
def _module(name: str) -> dict[str, _Definition]:
    """What a module of emonb defines, by name."""
    file = _file_of(name) if name else None
    return _definitions(file.read_text(encoding="utf-8"), name) if file else {}


def _definitions(source: str, module: str) -> dict[str, _Definition]:
    """What a source text defines or imports from emonb, by name; "" stands for what has no name."""
    tree = _Bare().visit(ast.parse(source))
    imported, groups = _imports(tree), {}
    for node in tree.body:
        top = symtable.symtable(ast.unparse(node), "", "exec")
        names = [s.get_name() for s in top.get_symbols() if s.is_assigned() and not s.is_imported()]
        for name in names or [""]:
            groups.setdefault(name, []).append(node)
    made = {name: _Definition("", [where], set()) for name, where in imported.items() if where[1]}
    for name, nodes in groups.items():
        code = "\n".join(map(ast.unparse, nodes))
        used, uses, entries = _names(symtable.symtable(code, "", "exec")) - {name}, set(), set()
        uses |= {(module, other) for other in used & {*groups, *made}}
        for part in (part for node in nodes for part in ast.walk(node)):
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in used:
                where, within = imported.get(part.value.id, ("", "-"))
                uses |= set() if within else {(where, part.attr)}  # a module's function, as in `vlm.generate`
            if isinstance(part, ast.Call) and getattr(part.func, "id", "") == "resource":
                literal = itertools.takewhile(lambda argument: isinstance(argument, ast.Constant), part.args)
                entries.add(tuple(argument.value for argument in literal))  # of a computed one: all that may be read
        made[name] = _Definition(code, sorted(uses), entries - {()})
    return made


class _Bare(ast.NodeTransformer):
    """Takes docstrings and the words of raised errors out of a tree."""

    def visit(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "EmonbError":  # made here, raised elsewhere
            node.args = []
        return node


def _imports(tree: ast.AST) -> dict[str, tuple[str, str]]:
    """Local name -> `(module, name)`, or `(module, "")` for a module, of all imports from emonb in a tree."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "emonb":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found[alias.asname or alias.name] = (whole, "") if _file_of(whole) else (node.module, alias.name)
    return found


def _names(table: symtable.SymbolTable) -> set[str]:
    """Names that a piece of code takes from its module or imports itself; local ones hide those around them."""
    top = table.get_type() == "module"
    used = (s for s in table.get_symbols() if s.is_imported() or (s.is_referenced() and (top or s.is_global())))
    return {s.get_name() for s in used}.union(*map(_names, table.get_children()))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
