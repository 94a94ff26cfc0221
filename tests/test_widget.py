"""The cells of notebook 09 for a picture of one's own: bytes in, an answer out."""

from __future__ import annotations

import datetime
import io
import re
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from assembled import HOSTILE, LABELS, assembled, picture, results
from conftest import ROOT

from emonb.show.opinions import find_teacher, opinions

NOTEBOOK = nbformat.read(ROOT / "notebooks" / "09_try_your_image.ipynb", 4)
CELLS = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
CODE = [next(text for text in CELLS if part in text) for part in ("def token_map", "def show(", "FileUpload")]
IMPORTS = "\n".join(re.findall(r"^(?:import|from) .+", "\n".join(CELLS), re.MULTILINE))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("widget"), assembled()
    paths = [str(folder / f"{i}.png") for i in range(4)]
    for path in paths:
        picture().save(path)
    table = pd.DataFrame({"path": paths, "label": [LABELS[i] for i in (0, 1, 1, 2)]})
    made = results(folder, model)
    others = {"teacher": find_teacher(made, LABELS), "stranger": lambda pictures, visual: [""] * len(visual)}
    return {"model": model, "others": others, "table": table, "run": SimpleNamespace(out=folder), "dataset": made.name}


@pytest.fixture
def names(world, monkeypatch):
    """The names that the cells define."""
    monkeypatch.delenv("EMONB_HEADLESS", raising=False)
    found = dict(world)
    exec(IMPORTS, found)
    found["display"] = lambda shown: print(f"[{type(shown).__name__}]")
    for text in CODE:
        exec(text, found)
    return found


def upload(names, name, data):
    """What the browser sends when a file is chosen."""
    now = datetime.datetime.now(tz=datetime.UTC)
    file = {"name": name, "type": "image/png", "size": len(data), "content": memoryview(data), "last_modified": now}
    names["upload"].value = (file,)


def png():
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    return buffer.getvalue()


def test_a_file_of_ones_own_is_answered_and_its_name_is_text(world, names, capsys):
    upload(names, "\x1b[31m.png", png())
    text = capsys.readouterr().out
    expected = opinions(world["model"], [picture()], ["x"], **world["others"], texts=True)[0]
    assert f"\\x1b[31m.png: {expected['emotion']} ({expected['confidence']:.0%})" in text
    assert "\x1b[31m" not in text
    assert expected["reasons"].split()[0] in text
    assert text.count("[Image]") == 2
    assert names["upload"].value == (), "the same file can be chosen again"


def test_no_map_is_drawn_over_a_picture_that_is_nothing_the_models_know(names, capsys):
    names["others"] = {"stranger": lambda pictures, visual: ["unlike any"]}
    upload(names, "a.png", png())
    text = capsys.readouterr().out
    assert "Careful, this picture is: unlike any" in text
    assert text.count("[Image]") == 1


@pytest.mark.parametrize("data", [b"no picture", b"", png()[:120]])
def test_a_bad_file_is_one_message(names, data, capsys):
    upload(names, HOSTILE, data)
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith(f"{HOSTILE}: could not be answered (the file: not a readable picture")


def test_one_sample_an_emotion_and_other_faults(names, capsys):
    sample = names["sample"]
    options = dict(sample.options)
    assert list(options) == ["", *(f"{label}: {i}.png" for label, i in zip(LABELS, (0, 1, 3), strict=False))]
    sample.value = options["anger: 1.png"]
    assert "1.png: " in capsys.readouterr().out

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    names["opinions"] = fails
    upload(names, "a.png", png())
    assert capsys.readouterr().out.endswith("a.png: could not be answered (out of memory)\n")


def test_headless_prints_one_sentence(world, monkeypatch, capsys):
    monkeypatch.setenv("EMONB_HEADLESS", "1")
    exec(f"{IMPORTS}\n{CODE[2]}", dict(world))
    assert capsys.readouterr().out == "Run this notebook to choose a picture of your own here.\n"
