"""The house rules: arrows point down, every module is on the map, one list of packages, commands that exist."""

import ast
import re
import tomllib
from collections.abc import Iterator

import yaml
from conftest import ROOT
from packaging.requirements import Requirement

# An import may only point to an earlier line, or into its own package. In a line, no one imports another.
LAYERS = [
    "errors",
    "files",
    "settings",
    "machine reach training",
    "progress store",
    "data",
    "triplets vlm teacher distill gate",
    "tuning",
    "model predictions",
    "metrics cost",
    "claims tables",
    "figures",
    "world releases annotate show rehearse",
    "pipeline",
    "run",
    "headless",
    "cli",
    "__main__",
]
LEVEL = {name: level for level, line in enumerate(LAYERS) for name in line.split()}
MODULES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "emonb").rglob("*.py"))}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line[0].isalnum()]


def imports(tree: ast.AST) -> Iterator[str]:
    """What a module imports from emonb anywhere, but for the type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [f"{module}.{alias.name}" if module else alias.name for alias in node.names]
            yield from (name for name in names if name.startswith("emonb."))
        yield from imports(node)


def test_no_module_needs_what_windows_lacks_to_be_imported():
    """And no signal is named that is not everywhere."""
    lacking = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "syslog", "posix", "readline"}
    for path, tree in MODULES.items():
        for node in (node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module}
            assert not lacking & names, path
        named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not named & {"SIGHUP", "SIGALRM", "SIGKILL", "SIGUSR1", "alarm", "fork", "getuid"}, path


def test_arrows_point_down():
    for path, tree in MODULES.items():
        own = path.relative_to(ROOT / "emonb").with_suffix("").parts[0]
        assert own in LEVEL or own == "__init__", f"{own}: belongs into no layer"
        for name in imports(tree):
            room = name.split(".")[1]
            down = room == own or LEVEL[room] < LEVEL[own]
            assert down, f"{path.relative_to(ROOT)} imports {name}: an arrow upward or sideways"
        assert "__all__" not in [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


def test_resource_entries_are_read_by_literal_names():
    """Else a key would depend on more of the file than is read."""
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "resource" and path.stem != "reach":
                assert all(isinstance(a, ast.Constant) for a in node.args), f"{path.name}:{node.lineno}"


def test_the_map_in_the_readme_has_every_module_and_no_other():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {*re.findall(r"`emonb/(\w+(?:\.py|/))`", text)} - {"profiles/", "resources/"}
    there = {p.relative_to(ROOT / "emonb").parts for p in MODULES if not p.name.startswith("__")}
    assert named == {parts[0] if len(parts) == 1 else f"{parts[0]}/" for parts in there}


def test_the_lock_pins_torch_and_every_package_that_the_project_needs():
    pins = {r.name.lower(): str(r.specifier) for r in LOCKED}
    assert pins["torch"] == "==2.14.1"
    assert pins["torchvision"] == "==0.29.1"
    assert all(pin.startswith("==") for pin in pins.values())
    for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]):
        wanted = Requirement(line)
        pin = pins.get(wanted.name.lower())
        assert pin, f"{wanted.name} is not locked"
        assert wanted.specifier.contains(pin.removeprefix("==")), f"{line}, locked {pin}"
    assert "://" not in (ROOT / "requirements.lock").read_text()


def test_one_list_of_packages():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert {d for d in environment if isinstance(d, str)} == {f"python={PROJECT['requires-python'][2:]}", "pip"}
    assert next(d["pip"] for d in environment if isinstance(d, dict)) == ["-r requirements.lock", "-e ."]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert f"ruff=={hooks['repos'][0]['rev'][1:]}" in PROJECT["optional-dependencies"]["dev"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_commands_and_links_in_the_documents_exist():
    from emonb.cli import app

    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    commands = {c.name or c.callback.__name__ for c in app.registered_commands} | {"data"}
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", ".ci/run", "notebooks/README.md")]
    for page in (*pages, *ROOT.glob(".github/workflows/*"), *ROOT.glob("docs/**/*.md")):
        text = page.read_text(encoding="utf-8")
        assert {*re.findall(r"(?:`|^\s*|run: |\$ )make ([a-z]+)", text, flags=re.MULTILINE)} <= targets, page
        assert {*re.findall(r"-m emonb ([a-z]+)", text)} <= commands, page
        for link in re.findall(r"\]\(([^)\s#]+)", re.sub(r"`[^`]*`", "", text)):
            assert re.match(r"https?:|mailto:", link) or (page.parent / link).exists(), f"{page.name} links {link}"
