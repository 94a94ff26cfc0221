"""The explorer in JupyterLab: live with a kernel, from the executed notebook without one, and not trusted."""

import nbformat
import pytest
from conftest import BROWSER
from exploring import SHOWN, world
from lab import browser_page, command, jupyterlab, open_notebook, run_cell

from emonb import explorer
from emonb.clean import sign
from emonb.complementarity import joint
from emonb.predictions import prediction_labels, write_predictions
from emonb.store import Store, write_json

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")

HTML = '.jp-OutputArea-output[data-mime-type="text/html"] .emonb-explorer'
CODE = """from emonb.explorer import explore
from emonb.predictions import load_all

explore(load_all("predictions"))"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with predictions, the run's pictures, and notebooks: to be run, executed, and not trusted."""
    root = tmp_path_factory.mktemp("lab")
    folder = root / "files"
    (folder / "pictures").mkdir(parents=True)
    predictions, samples = world(folder / "pictures")
    for (dataset, model), frame in predictions.items():
        path = folder / "predictions" / f"{dataset}__{model}.parquet"
        write_predictions(path, frame, prediction_labels(frame))
    for dataset, table in samples.items():

        def build(target, table=table):
            table.assign(split="test").to_parquet(target / "samples.parquet")
            write_json(target / "meta.json", {"root": ".", "labels": []})

        Store(folder / "artifacts").get("samples", dataset, build)
    html = explorer.explorer_html(predictions, samples=samples)
    shown = [nbformat.v4.new_output("display_data", {"text/html": html})]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    for name, outputs in (("live", []), ("executed", shown), ("strange", shown)):
        cell = nbformat.v4.new_code_cell(CODE if name != "strange" else f"{CODE}  #", outputs=outputs)
        notebook = nbformat.v4.new_notebook(cells=[cell], metadata=kernel)
        nbformat.write(notebook, folder / f"{name}.ipynb")
    (root / "signed").mkdir()
    (folder / "executed.ipynb").rename(root / "signed" / "executed.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_DATA_DIR", str(root / "DATA"))
        sign(root / "signed")  # as a run does with its executed notebooks
    (root / "signed" / "executed.ipynb").rename(folder / "executed.ipynb")
    return folder, joint(predictions, "mini-fi", SHOWN)


def check_a_cell(view, table):
    """Click the first cell of EmoVLM-KD's matrix and compare the list with pandas."""
    view.locator("td button").first.click()
    names = view.locator(".card code").all_text_contents()
    assert names
    assert set(names) == set(table.query("label == 'amusement' and emovlmkd == 'amusement'").index)


def test_live_with_a_kernel_and_twice(made):
    folder, table = made
    with jupyterlab(folder) as address, browser_page() as (page, outside):
        open_notebook(page, address, "live")
        run_cell(page)
        page.locator(".jp-OutputArea-output").first.wait_for()
        assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts() == []
        view = page.locator(HTML)
        view.locator("td button").first.wait_for()
        check_a_cell(view, table)
        kinds = page.locator(".jp-OutputArea-output").evaluate_all("all => all.map(e => e.dataset.mimeType)")
        assert kinds == ["image/png", "text/html"]
        page.keyboard.press("d")
        page.keyboard.press("d")
        page.keyboard.press("ArrowRight")
        assert page.locator(".jp-CodeCell").count() == 1, "the shortcut that deletes a cell stays off"
        active = "document.querySelector('.emonb-explorer').shadowRoot.activeElement.ariaLabel"
        assert page.evaluate(active).startswith("true amusement, predicted anger")
        command(page, "notebook:create-output-view")
        second = page.locator(".jp-LinkedOutputView .emonb-explorer")
        second.locator("td button").first.wait_for()
        assert second.locator(".card").count() == 0
        check_a_cell(second, table)
        assert outside == []


def test_executed_notebook_without_a_kernel(made):
    folder, table = made
    options = "--KernelSpecManager.allowed_kernelspecs=none"
    with jupyterlab(folder, options) as address, browser_page() as (page, outside):
        open_notebook(page, address, "executed", kernel=False)
        view = page.locator(HTML)
        view.locator("td button").first.wait_for()
        check_a_cell(view, table)
        open_notebook(page, address, "strange", kernel=False)
        text = page.locator('.jp-OutputArea-output[data-mime-type="text/html"]')
        text.wait_for()
        assert text.inner_text().strip().startswith("The picture above shows"), "what a sanitiser leaves"
        assert outside == []
