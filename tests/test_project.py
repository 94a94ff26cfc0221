"""The house rules: notebooks as they are committed, sizes of modules, one list of dependencies."""

from __future__ import annotations

import json
import re
import statistics
import tomllib
from itertools import groupby

import pytest
import yaml
from conftest import ROOT

from emonb.run import NOTEBOOKS as NAMES

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMETERS = {"profile": "mini", "datasets": "", "images": "", "out": "", "seeds": "", "force": ""}
MACHINE_PATH = re.compile(r"/(?:home|root|Users|tmp|work|usr|opt|var)/[\w.-]+|site-packages")

pytestmark = pytest.mark.filterwarnings("ignore::nbformat.warnings.MissingIDFieldWarning")


def cells_of(path):
    """Cells of a notebook as dictionaries."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_of(path):
    """Sources of the code cells."""
    return ["".join(c["source"]).strip() for c in cells_of(path) if c["cell_type"] == "code"]


@pytest.fixture(params=NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def notebook(request):
    """Each committed notebook."""
    return request.param


def test_all_nine_are_there():
    assert [p.stem for p in NOTEBOOKS] == list(NAMES)


def test_opens_with_a_title_and_prose(notebook):
    first = cells_of(notebook)[0]
    assert first["cell_type"] == "markdown"
    assert "".join(first["source"]).startswith("# ")
    assert len("".join(first["source"]).split()) > 20


def test_one_parameters_cell_the_same_in_all(notebook):
    tagged = [c for c in cells_of(notebook) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    source = "".join(tagged[0]["source"])
    found = dict(re.findall(r'^(\w+): str = "(.*?)"  # \S', source, flags=re.MULTILINE))
    assert found == PARAMETERS, source
    assert len(source.splitlines()) == len(PARAMETERS)
    first = next(c for c in cells_of(NOTEBOOKS[0]) if "parameters" in c["metadata"].get("tags", []))
    assert source == "".join(first["source"])


def test_kernel_is_portable(notebook):
    assert json.loads(notebook.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["name"] == "python3"


def test_executed_in_order_without_errors(notebook):
    code = [c for c in cells_of(notebook) if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [output for c in code for output in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"], "a warning or a progress bar is committed"


def test_no_machine_path_and_small(notebook):
    text = notebook.read_text(encoding="utf-8")
    for cell in cells_of(notebook):
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
            assert not MACHINE_PATH.findall(json.dumps(output)), "machine path in an output"
        assert not MACHINE_PATH.findall("".join(cell["source"]))
    assert "injected-parameters" not in text
    assert len(text.encode()) < 1_000_000


def test_short_cells_between_prose(notebook):
    lengths = [len(source.splitlines()) for source in code_of(notebook)]
    assert max(lengths) <= 40
    assert statistics.median(lengths) <= 8
    runs = [len(list(group)) for kind, group in groupby(c["cell_type"] for c in cells_of(notebook)) if kind == "code"]
    assert max(runs) <= 3


def test_ends_with_takeaways_differences_and_files(notebook):
    prose = "\n".join("".join(c["source"]) for c in cells_of(notebook) if c["cell_type"] == "markdown")
    for heading in ("Takeaways", "Differences from the paper", "Files written"):
        assert heading in prose, heading


@pytest.mark.parametrize("module", sorted((ROOT / "emonb").glob("*.py")), ids=lambda p: p.stem)
def test_modules_are_small(module):
    assert len(module.read_text(encoding="utf-8").splitlines()) < 300


def test_environment_installs_from_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = next(d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert project["requires-python"] == f">={python.removeprefix('python=')}"
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-e .[dev]"], "a second list of packages would drift"
    assert "dev" in project["optional-dependencies"]
    assert {d for d in environment["dependencies"] if isinstance(d, str)} == {python, "pip"}


def test_commands_in_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md", ".ci/run", ".github/workflows/ci.yml"):
        text = (ROOT / document).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:`|^\s*|run: |\$ )make ([a-z]+)", text, flags=re.MULTILINE))
        assert named <= targets, f"{document} names {named - targets}"


def test_pre_commit_uses_the_pinned_ruff():
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    pinned = next(d.removeprefix("ruff==") for d in dev if d.startswith("ruff=="))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks["repos"][0]["rev"] == f"v{pinned}"


def test_ci_script_is_executable():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
