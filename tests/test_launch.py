"""Launch without a clone: badges and the first cell of notebooks; a wheel with all that a run needs."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile

import nbformat
import pytest
from conftest import ROOT, emonb
from test_house import PROJECT

from emonb.headless import NOTEBOOKS
from emonb.show.notebooks import write_site

REPOSITORY = PROJECT["urls"]["Repository"]
SLUG = REPOSITORY.removeprefix("https://github.com/")
PAGES = [ROOT / "README.md", ROOT / "docs" / "guide.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]
EXPECTED = {
    "colab-badge.svg)](": "https://colab.research.google.com/github/{}/blob/main/notebooks/{}.ipynb",
    "badge_logo.svg)](": "https://mybinder.org/v2/gh/{}/main?urlpath=lab/tree/build/smoke/notebooks/{}.ipynb",
}


def install_cell(name: str) -> str:
    (cell,) = (c for c in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells if c.get("id") == "install")
    return cell.source


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_badges_and_commands_name_the_repository_of_pyproject(page):
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"(?:colab\.research\.google\.com/github|mybinder\.org/v2/gh)/([\w.-]+/[\w.-]+)/", text)
    found += re.findall(r"git(?:\+| clone )https://github\.com/([\w.-]+/[\w.-]+)", text)
    remedy = f"sed -i 's#{(set(found) - {SLUG} or {SLUG}).pop()}#{SLUG}#' README.md docs/guide.md notebooks/*.ipynb"
    assert {*found} <= {SLUG}, f"the address in pyproject.toml is {REPOSITORY}; type: {remedy}"
    for start, address in EXPECTED.items() if page.stem in (*NOTEBOOKS, "README") else ():
        right = start + address.format(SLUG, page.stem if page.stem in NOTEBOOKS else "01_data") + ")"
        assert text.count(right) == 1, f"{page.name} lacks {right}"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_first_cell_installs_emonb_where_it_is_not_and_else_does_nothing(name, monkeypatch):
    said, shell = [], type("Shell", (), {"run_line_magic": lambda self, *what: said.append(what)})
    exec(install_cell(name), {"get_ipython": shell})
    assert said == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(install_cell(name), {"get_ipython": shell})
    assert said == [("pip", f"install --quiet git+{REPOSITORY}")]


def test_pages_of_a_run_have_neither_badges_nor_the_first_cell(tmp_path):
    *_, name = NOTEBOOKS
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "notebooks")
    assert write_site(tmp_path, "") == []
    page = (tmp_path / "site" / f"{name}.html").read_text(encoding="utf-8")
    assert not [word for word in ("mybinder.org", "find_spec") if word in page]


def test_every_notebook_and_page_of_docs_is_in_the_published_navigation():
    toc = (ROOT / "docs" / "site" / "toc.yml").read_text(encoding="utf-8")
    entries = re.findall(r"(?:file|glob|root): (\S+)", toc)
    found = {entry: {*ROOT.glob(f"{entry}.md"), *ROOT.glob(f"{entry}.ipynb")} for entry in entries}
    assert [entry for entry, pages in found.items() if not pages] == []
    assert {*ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*.*")} <= set().union(*found.values())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built without a network and without traces in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info", ".ipynb_checkpoints")
    for folder in ("emonb", "notebooks", "docs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=junk)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = ["pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", str(out), str(source)]
    subprocess.run([sys.executable, "-m", *command], check=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_all_that_a_run_reads_and_is_small(wheel):
    assert wheel.stat().st_size < 15e6
    packed = {*zipfile.ZipFile(wheel).namelist()}
    there = {p for p in (ROOT / "emonb").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    there |= {ROOT / "emonb" / "notebooks" / f"{name}.ipynb" for name in NOTEBOOKS}
    assert {str(path.relative_to(ROOT)) for path in there} - packed == set()
    assert {"emonb/resources/base/model.safetensors", "emonb/resources/networks/vit.safetensors"} <= packed
    assert "emonb/docs/glossary.md" in packed, "the words that pages explain"


AS_IN_THE_PAPER = """
from: smoke
datasets: [mini-flickr]
seeds: [0]
vlm: {dtype: bfloat16, attention: auto, cache_visual_tokens: false, batch_size: 8, gradient_checkpointing: true}
distill: {lengths: []}
"""


def test_a_run_from_the_wheel_in_an_empty_folder_computes_as_the_paper_s_profile_does(wheel, tmp_path):
    """All that the paper's profile does otherwise than smoke, but for its sizes and what needs a GPU."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "mine.yaml").write_text(AS_IN_THE_PAPER)
    options = {"cwd": empty, "env": {**os.environ, "PYTHONPATH": str(tmp_path / "site")}}
    for command in (["stage", "all"], ["run", "--notebooks", "03,06,09"]):  # those that compare ways of computing
        process = emonb(*command, "--profile", "mine.yaml", **options)
        said, _ = process.communicate()
        assert process.returncode == 0, said
    assert {path.name for path in empty.iterdir()} == {"build", "mine.yaml"}
    cells = nbformat.read(empty / "build" / "mine" / "notebooks" / "09_try_your_image.ipynb", 4).cells
    assert "files written" in str([cell.outputs for cell in cells if cell.cell_type == "code"])
