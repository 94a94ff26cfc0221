"""Material for students: the prompts in the notebooks, the page about the notebooks, the glossary.

A prompt is a paragraph that begins with **Try it.** Text in backticks stands literally in a code cell above it; only
text in backticks right after the word "to" is new, and takes the place of the last that is not: change `alpha = 0.5`
to `alpha = 0.9`, then to `alpha = 0`. What is changed stands below all that the cell saves or computes as a stage.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator

import pytest
from conftest import ROOT

from emonb.run import NOTEBOOKS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "notebooks" / "README.md", ROOT / "docs" / "glossary.md"]


def cells(name: str) -> list[tuple[str, str]]:
    """(type, source) of a notebook's cells."""
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [(c["cell_type"], "".join(c["source"])) for c in notebook["cells"]]


def prompts(name: str) -> list[tuple[str, list[str]]]:
    """Every prompt of a notebook with the code cells above it."""
    found, above = [], []
    for kind, source in cells(name):
        if kind == "code":
            above.append(source)
            continue
        paragraphs = re.split(r"\n\s*\n", source)
        found += [(p, list(above)) for p in paragraphs if p.startswith("**Try it.**")]
    return found


def pieces(prompt: str) -> Iterator[tuple[str, str | None]]:
    """(text in backticks, None), or (old text, new text) where it follows the word "to"."""
    old = None
    for to, text in re.findall(r"(\bto\s+)?`([^`]+)`", prompt):
        if to and old is not None:
            yield old, text
        else:
            old = text
            yield old, None


def slugs(text: str) -> list[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_pieces_of_a_prompt():
    prompt = "Change `a = 1` to `a = 2`, then\nto `a = 3`; look at `b`, and change it to `c`."
    expected = [("a = 1", None), ("a = 1", "a = 2"), ("a = 1", "a = 3"), ("b", None), ("b", "c")]
    assert list(pieces(prompt)) == expected


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_two_or_three_prompts_each_with_a_change_and_a_question(name):
    found = [prompt for prompt, _ in prompts(name)]
    assert 2 <= len(found) <= 3
    for prompt in found:
        assert "?" in prompt, f"asks nothing: {prompt}"
        assert any(new for _, new in pieces(prompt)), f"changes nothing: {prompt}"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_prompts_speak_of_code_that_is_there_and_leave_results_alone(name):
    for prompt, above in prompts(name):
        for old, new in pieces(prompt):
            cell = next((code for code in reversed(above) if old in code), None)
            assert cell is not None, f"`{old}` stands in no code cell above: {prompt}"
            if new is None:
                continue
            assert cell.count(old) == 1, f"`{old}` stands more than once in the cell: {prompt}"
            changed = cell.replace(old, new)
            assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(cell)), f"`{new}` changes nothing"
            below = cell[cell.index(old) :]
            assert not re.search(r"\bws\.save_|(_stage|side_by_side)\(", below), (
                f"changing `{old}` changes results: {prompt}"
            )


def test_page_about_the_notebooks_lists_all_with_minutes_and_prerequisites():
    text = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    names = [re.search(r"\((\w+)\.ipynb\)", row[0]) for row in rows]
    table = {found.group(1): row[1:] for found, row in zip(names, rows, strict=True) if found}
    assert list(table) == list(NOTEBOOKS)
    for name, (teaches, reading, computing, prerequisites) in table.items():
        assert len(teaches.split()) >= 5, name
        assert re.search(r"\d|under one", reading), name
        assert re.search(r"\d|under one", computing), name
        assert prerequisites, name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_of_the_pages_resolve(page):
    text = re.sub(r"^    .*$|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|mailto:", link)]
    assert links or page.name == "CONTRIBUTING.md"
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links {link}"
        assert not anchor or anchor in slugs(target.read_text(encoding="utf-8")), f"{page.name} links {link}"


def test_glossary_is_found_and_its_links_from_notebooks_resolve():
    anchors = slugs((ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"))
    assert len(anchors) == len(set(anchors))
    for page in (ROOT / "README.md", ROOT / "notebooks" / "README.md"):
        assert "docs/glossary.md" in page.read_text(encoding="utf-8"), page
    prose = "\n".join(source for name in NOTEBOOKS for kind, source in cells(name) if kind == "markdown")
    assert "docs/glossary.md" in prose
    assert set(re.findall(r"glossary\.md#([\w-]+)", prose)) <= set(anchors)


@pytest.mark.parametrize(
    "term", ["emotion models", "KL divergence", "temperature", "LoRA", "gate", "logits", "McNemar's test"]
)
def test_glossary_explains(term):
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    entries = dict(re.findall(r"^### (.+)\n\n((?:(?!#).+\n)+)", text, flags=re.MULTILINE))
    entry = next((body for heading, body in entries.items() if heading.lower() == term.lower()), "")
    assert len(entry.split()) >= 10, f"{term}: no entry"


def test_commands_on_the_page_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^\s*)make ([a-z]+)", (ROOT / "notebooks" / "README.md").read_text(), re.MULTILINE))
    assert named, "how to run is not said"
    assert named <= targets
