"""The controls of notebook 09: bytes in, an answer out, without a browser and in JupyterLab."""

from __future__ import annotations

import datetime
import io

import nbformat
import pandas as pd
import pytest
from assembled import HOSTILE, LABELS, assembled, picture, results
from conftest import BROWSER
from lab import browser_page, jupyterlab, open_notebook, run_cell

from emonb.show import widget
from emonb.show.opinions import find_teacher, opinions
from emonb.show.widget import SENTENCE, try_image


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("widget"), assembled()
    paths = [str(folder / f"{i}.png") for i in range(4)]
    for path in paths:
        picture().save(path)
    samples = pd.DataFrame({"path": paths, "label": [LABELS[i] for i in (0, 1, 1, 2)]})
    return model, find_teacher(results(folder, model), LABELS), samples


@pytest.fixture
def controls(world, monkeypatch):
    monkeypatch.setattr(widget, "display", lambda shown, **options: print(f"[{type(shown).__name__}]"))
    return try_image(*world).children


def upload(button, name, data):
    """What the browser sends when a file is chosen."""
    now = datetime.datetime.now(tz=datetime.UTC)
    file = {"name": name, "type": "image/png", "size": len(data), "content": memoryview(data), "last_modified": now}
    button.value = (file,)


def png():
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    return buffer.getvalue()


def test_a_file_of_ones_own_is_answered(world, controls, capsys):
    model, teacher, _ = world
    upload(controls[0], "\x1b[31m.png", png())
    text = capsys.readouterr().out
    expected = opinions(model, [picture()], ["x"], teacher=teacher, texts=True)[0]
    assert f"\\x1b[31m.png: {expected.emotion} ({expected.confidence():.0%})" in text
    assert "\x1b[31m" not in text
    assert expected.reasons.split()[0] in text
    assert text.count("[Image]") == 3


@pytest.mark.parametrize("data", [b"no picture", b"", png()[:120]])
def test_a_bad_file_is_one_message(controls, data, capsys):
    upload(controls[0], HOSTILE, data)
    said = capsys.readouterr().out.splitlines()
    assert said[-2] == f"Looking at {HOSTILE} ..."
    assert said[-1].startswith(f"{HOSTILE}: not a readable picture")


def test_one_sample_an_emotion_and_other_faults(controls, capsys, monkeypatch):
    button, sample, _ = controls
    options = dict(sample.options)
    assert list(options) == ["", *(f"{label}: {i}.png" for label, i in zip(LABELS, (0, 1, 3), strict=False))]
    sample.value = options["anger: 1.png"]
    upload(button, "own.png", png())
    assert sample.value == ""
    sample.value = options["anger: 1.png"]
    assert button.value == ()
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("Looking")] == [
        f"Looking at {name}.png ..." for name in ("1", "own", "1")
    ]

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(widget, "opinions", fails)
    upload(button, "a.png", png())
    assert capsys.readouterr().out.endswith("a.png: could not be answered (out of memory)\n")


def test_headless_prints_one_sentence(world, monkeypatch, capsys):
    monkeypatch.setenv("EMONB_HEADLESS", "1")
    assert try_image(*world) is None
    assert capsys.readouterr().out == SENTENCE + "\n"


CODE = """import pandas as pd
from emonb.model import EmoVLMKD
from emonb.show.widget import try_image

model = EmoVLMKD.from_pretrained({!r})
try_image(model, None, pd.DataFrame({{"path": [], "label": []}}));"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_in_jupyterlab_a_file_goes_in_and_the_answer_comes_out(world, tmp_path):
    model, _, _ = world
    picture().save(tmp_path / HOSTILE)
    expected = opinions(model, [picture()], [HOSTILE], texts=True)[0]
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    notebook["cells"] = [nbformat.v4.new_code_cell(CODE.format(str(results(tmp_path, model))))]
    (tmp_path / "files").mkdir()
    nbformat.write(notebook, tmp_path / "files" / "try.ipynb")
    with jupyterlab(tmp_path / "files") as address, browser_page() as (page, outside):
        said = []
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.set_default_timeout(60_000)  # the kernel loads torch
        open_notebook(page, address, "try")
        run_cell(page)
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Your picture").click()
        chooser.value.set_files(tmp_path / HOSTILE)
        answer = page.locator(".jp-OutputArea-output .widget-output")
        answer.locator("img").nth(2).wait_for()
        assert f"{HOSTILE}: {expected.emotion} ({expected.confidence():.0%})" in answer.inner_text()
        assert all(answer.locator("img").evaluate_all("all => all.map(i => i.naturalWidth > 0)"))
        assert answer.locator("img[src=x]").count() == 0
        assert (said, outside) == ([], [])
