"""The explorer in JupyterLab: live with a kernel, from the executed notebook without one, and not trusted."""

import nbformat
import pytest
from conftest import BROWSER
from exploring import SHOWN, world
from lab import browser_page, jupyterlab, open_notebook, run_cell

from emonb.predictions import joint, write_predictions
from emonb.show import explorer
from emonb.show.notebooks import sign

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")

HTML = '.jp-OutputArea-output[data-mime-type="text/html"]'
CODE = """from emonb.predictions import load_all
from emonb.show.explorer import explore

explore(load_all("predictions"))"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with predictions, the run's pictures, and notebooks: to be run, executed, and not trusted."""
    root = tmp_path_factory.mktemp("lab")
    folder = root / "files"
    (folder / "predictions").mkdir(parents=True)
    predictions = world(folder)
    for (dataset, model), frame in predictions.items():
        write_predictions(folder / "predictions" / f"{dataset}__{model}.parquet", frame)
    shown = [nbformat.v4.new_output("display_data", {"text/html": explorer.explorer_html(predictions)})]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    (root / "signed").mkdir()
    for name, outputs in (("live", []), ("executed", shown), ("strange", shown)):
        cell = nbformat.v4.new_code_cell(CODE if name != "strange" else f"{CODE}  #", outputs=outputs)
        notebook = nbformat.v4.new_notebook(cells=[cell], metadata=kernel)
        nbformat.write(notebook, (root / "signed" if name == "executed" else folder) / f"{name}.ipynb")
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


def test_live_with_a_kernel_and_twice(lab, chromium):
    folder, table = lab
    with jupyterlab(folder) as address, browser_page(chromium) as page:
        open_notebook(page, address, "live")
        run_cell(page)
        page.locator(".jp-OutputArea-output").first.wait_for()
        assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts() == []
        view = page.locator(f"{HTML} .emonb-explorer")
        view.locator("td button").first.wait_for()
        check_a_cell(view, table)
        kinds = page.locator(".jp-OutputArea-output").evaluate_all("all => all.map(e => e.dataset.mimeType)")
        assert kinds == ["text/html"]
        for key in ("d", "d", "ArrowRight"):
            page.keyboard.press(key)
        assert page.locator(".jp-CodeCell").count() == 1, "the shortcut that deletes a cell stays off"
        active = "document.querySelector('.emonb-explorer').shadowRoot.activeElement.ariaLabel"
        assert page.evaluate(active).startswith("true amusement, predicted anger")
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:create-output-view') }")
        second = page.locator(".jp-LinkedOutputView .emonb-explorer")
        second.locator("td button").first.wait_for()
        assert second.locator(".card").count() == 0
        check_a_cell(second, table)


def test_executed_notebook_without_a_kernel(lab, chromium):
    folder, table = lab
    kernels = "--KernelSpecManager.allowed_kernelspecs=none"
    with jupyterlab(folder, kernels) as address, browser_page(chromium) as page:
        open_notebook(page, address, "executed", kernel=False)
        view = page.locator(f"{HTML} .emonb-explorer")
        view.locator("td button").first.wait_for()
        check_a_cell(view, table)
        open_notebook(page, address, "strange", kernel=False)
        text = page.locator(HTML)
        text.wait_for()
        assert text.inner_text().strip().startswith("To click through"), "what a sanitiser leaves"
