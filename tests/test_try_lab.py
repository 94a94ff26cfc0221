"""The controls of notebook 09 in JupyterLab: a file goes in, the answer comes out; and once the kernel is gone."""

import json
import urllib.request

import nbformat
import pytest
from assembled import assembled, picture, results
from conftest import BROWSER
from exploring import HOSTILE
from lab import browser_page, command, jupyterlab, open_notebook, run_cell

from emonb.opinions import opinions
from emonb.try_widget import SENTENCE

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")

CODE = """from emonb.try_widget import try_image
from emonb.workspace import open_workspace

controls = try_image(open_workspace("mini", datasets="mini-fi", out={out!r}))"""


def test_a_file_goes_in_the_answer_comes_out(tmp_path):
    model = assembled()
    ws = results(tmp_path, model)
    (tmp_path / "files").mkdir()
    picture().save(tmp_path / HOSTILE)
    cell = nbformat.v4.new_code_cell(CODE.format(out=str(ws.out)))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), tmp_path / "files" / "try.ipynb")
    expected = opinions(model, [picture()], names=[HOSTILE], texts=True)[0]
    with jupyterlab(tmp_path / "files") as address, browser_page() as (page, outside):
        said = []
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.set_default_timeout(60_000)  # the kernel loads torch
        open_notebook(page, address, "try")
        run_cell(page)
        page.locator(".jp-OutputArea-output").first.wait_for()
        assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts() == []
        controls = page.locator(".emonb-try")
        controls.wait_for()
        assert not page.get_by_text(SENTENCE).is_visible()
        choose(page, controls, tmp_path / HOSTILE)
        controls.locator("img").nth(2).wait_for()
        text = controls.inner_text()
        assert f"{HOSTILE}: {expected.emotion} ({expected.confidence():.0%})" in text
        assert expected.lean.sentence in text
        assert expected.reasons in text
        assert controls.locator("img[src=x]").count() == 0
        assert all(controls.locator("img").evaluate_all("all => all.map(i => i.naturalWidth > 0)"))
        (tmp_path / "bad.png").write_text("no picture")
        choose(page, controls, tmp_path / "bad.png")
        controls.get_by_text("bad.png: not a JPEG, PNG or WebP picture").wait_for()

        command(page, "docmanager:save")
        page.locator(".jp-mod-current.jp-mod-dirty").wait_for(state="detached")
        gone(address)
        open_notebook(page, address, "try")
        page.get_by_text(SENTENCE).wait_for()
        page.get_by_text("Error displaying widget").wait_for(state="hidden")
        page.get_by_text("Loading widget").wait_for(state="hidden")
        assert said == []
        assert outside == []


def choose(page, controls, path):
    """Choose a file as people do: by the button, whose file dialog the browser hands to us."""
    with page.expect_file_chooser() as chooser:
        controls.locator("button").click()
    chooser.value.set_files(path)


def gone(address):
    """Shut down every kernel of the server."""
    with urllib.request.urlopen(f"{address}/api/sessions") as answer:
        sessions = json.load(answer)
    for session in sessions:
        request = urllib.request.Request(f"{address}/api/sessions/{session['id']}", method="DELETE")
        urllib.request.urlopen(request).close()
