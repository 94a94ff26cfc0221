"""The explorer in a browser, from disk and in JupyterLab: clicks against pandas, keyboard, CSV, light and dark."""

import csv
import re

import nbformat
import pandas as pd
import pytest
from conftest import BROWSER
from exploring import SHOWN, store_samples, world
from lab import browser_page, jupyterlab, open_notebook, pages_from_disk, run_cell
from test_explorer import by_pandas

from emonb.predictions import joint, model_name, prediction_labels, read_review, write_predictions
from emonb.show import explorer
from emonb.show.notebooks import sign

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")


@pytest.fixture
def opened(chromium):
    with pages_from_disk(chromium) as open_file:
        yield open_file


def exported(folder, *outputs):
    """A notebook with these HTML outputs as the page that a run leaves in `site/`."""
    from nbconvert import HTMLExporter

    outputs = [nbformat.v4.new_output("display_data", {"text/html": html}) for html in outputs]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("explore(predictions)", outputs=outputs)])
    exporter = HTMLExporter(require_js_url="", mathjax_url="", mermaid_js_url="", jquery_url="")
    page = folder / "page.html"
    page.write_text(exporter.from_notebook_node(nb)[0], encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    predictions = world(folder)
    html = explorer.explorer_html(predictions)
    bare = folder / "bare.html"
    bare.write_text(f"<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>{html}")
    return predictions, exported(folder, html, html), bare


def pick(view, control, name):
    """Choose the option that starts with this text."""
    box = view.get_by_role("combobox", name=control, exact=True)
    options = box.locator("option").all_text_contents()
    box.select_option(index=next(i for i, text in enumerate(options) if re.sub(r" \(\d+\)$", "", text) == name))


def longest(picture):
    """The longer side of a picture on the screen."""
    return round(max(picture.bounding_box()[side] for side in ("width", "height")))


def names_in(view):
    """File names of the list, all pages of it."""
    while view.locator(".more").is_visible():
        view.locator(".more").click()
    return view.locator(".panel .card code").all_text_contents()


CASES = [("mini-fi", "emovlmkd", "all"), ("mini-fi", "vlm_zero_shot", "VLM and ViT disagree")]


@pytest.mark.parametrize(("dataset", "model", "keep"), [*CASES, ("mini-flickr", "head", "all models wrong")])
def test_a_cell_lists_exactly_its_images(made, opened, dataset, model, keep):
    predictions, _, page = made
    view = opened(page).locator(".emonb-explorer")
    pick(view, "Dataset", f"{dataset} (drawn)")
    pick(view, "Matrix of", model_name(model))
    pick(view, "Images", keep)
    part = by_pandas(joint(predictions, dataset, SHOWN), keep)
    labels = prediction_labels(predictions[dataset, model])
    counts = pd.crosstab(part["label"], part[model]).reindex(index=labels, columns=labels, fill_value=0)
    buttons = view.locator("td button")
    assert [int(text) for text in buttons.all_text_contents()] == counts.to_numpy().ravel().tolist()
    filled = [(r, c) for r in labels for c in labels if counts.at[r, c]]
    for true, said in [*filled[:3], filled[-1]]:
        buttons.nth(labels.index(true) * len(labels) + labels.index(said)).click()
        expected = part.index[(part["label"] == true) & (part[model] == said)]
        found = names_in(view)
        assert len(found) == len(set(found))
        assert set(found) == set(expected)
        assert f"{len(expected)} image" in view.get_by_role("status").text_content()
    pick(view, "Show", "row %")
    share = 100 * counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
    shown = [int(text) for text in buttons.all_text_contents()]
    assert abs(share.to_numpy().ravel() - shown).max() <= 0.5 + 1e-9


def test_a_card_tells_every_models_answer(made, opened):
    predictions, _, page = made
    view = opened(page).locator(".emonb-explorer")
    pick(view, "Matrix of", "ViT")
    frame = predictions["mini-fi", "vit"].set_index("image_id")
    labels = prediction_labels(frame)
    first, row = frame.iloc[0], frame.iloc[1]
    view.locator("td button").nth(labels.index(row["label"]) * 8 + labels.index(row["prediction"])).click()
    card = view.locator(".card", has=view.page.get_by_text(row.name, exact=True))
    lines = card.locator(".answers li").all_text_contents()
    assert len(lines) == len(SHOWN)
    mark = "✓" if row["label"] == row["prediction"] else "✗"
    assert lines[2] == f"{mark} ViT: {row['prediction']} {100 * row.filter(like='p_').max():.0f} %"
    card.get_by_text("tuned VLM says").click()
    assert card.get_by_text("It looks calm.").is_visible()
    assert card.get_by_text("suggest its own answer in 61 % of 64 texts").is_visible()
    image = card.locator(".thumb").evaluate("e => getComputedStyle(e).backgroundImage")
    assert image.startswith('url("data:image/webp;base64,UklG')
    assert longest(card.locator(".thumb")) == 80
    card.get_by_role("button", name=f"{row.name}: large").click()
    dialog = view.get_by_role("dialog")
    assert longest(dialog.locator(".thumb")) == 480
    assert dialog.locator("code").text_content() == row.name
    assert dialog.get_by_text("It looks calm.").is_visible()
    names = names_in(view)
    view.page.keyboard.press("ArrowRight")
    after = names[names.index(row.name) + 1 :][:1] or [row.name]
    assert dialog.locator("code").text_content() == after[0]
    view.page.keyboard.press("Escape")
    assert not dialog.is_visible()
    view.locator("td button").nth(labels.index(first["label"]) * 8 + labels.index(first["prediction"])).click()
    assert view.get_by_text("picture cannot be read").count() == 1


def downloaded(view, button):
    """Text and name of the file that a button makes."""
    with view.page.expect_download() as download:
        view.get_by_role("button", name=button).click()
    return open(download.value.path(), encoding="utf-8-sig", newline="").read(), download.value.suggested_filename


def test_which_fearful_pictures_does_the_vlm_call_sad_and_what_do_the_others_say(made, opened):
    predictions, _, path = made
    page = opened(path)
    kinds = "['change', 'click', 'keydown', 'wheel']"
    page.evaluate(f"n = 0; for (const kind of {kinds}) addEventListener(kind, () => n++, true)")
    view = page.locator(".emonb-explorer")
    pick(view, "Matrix of", "tuned VLM")
    view.get_by_role("button", name=re.compile("true fear, answer sadness")).click()
    table = joint(predictions, "mini-fi", SHOWN).query("label == 'fear' and vlm_tuned == 'sadness'")
    assert len(table) > 1
    assert set(names_in(view)) == set(table.index)
    assert 0 < page.evaluate("n") <= 3
    bars = view.locator(".bar")
    others = [model for model in SHOWN if model != "vlm_tuned"]
    heads = [bar.locator("> span").text_content() for bar in bars.all()]
    assert heads == [f"{model_name(model)} of {len(table)}" for model in others]
    for bar, model in zip(bars.all(), others, strict=True):
        said = [text.split(" ", 1)[::-1] for text in bar.locator("button").all_text_contents()]
        assert {name: int(n) for name, n in said} == table[model].value_counts().to_dict()
        assert [name for name, _ in said if name == "fear"] == [said[0][0]] * ("fear" in set(table[model]))
    for _ in range(2):  # a part is a second filter, and of what is left the others' bars are; again: all
        bars.nth(1).locator("button").last.click()
        pressed = bars.nth(1).locator("button[aria-pressed=true]")
        part = table[table["vit"] == pressed.text_content().split(" ", 1)[1]] if pressed.count() else table
        assert set(names_in(view)) == set(part.index)
        said = bars.nth(3).locator("button").all_text_contents()
        assert sum(int(text.split()[0]) for text in said) == len(part)
        heads = [bars.nth(m).locator("small").text_content() for m in (1, 3)]
        assert heads == [f"of {len(table)}", f"of {len(part)}"]
    bars.nth(1).locator("button").last.click()
    address = view.get_by_role("link", name="Link to this view").evaluate("a => a.href")
    assert page.url == address
    found, status = names_in(view), view.get_by_role("status").first.text_content()
    text, name = downloaded(view, "CSV of these images")
    assert name == f"mini-fi_true_fear_tuned_VLM_sadness_ViT_{table['vit'][found[0]]}.csv"
    rows = [*csv.DictReader(text.splitlines())]
    assert [row["image_id"] for row in rows] == found
    for row in rows:
        answers = {model: row[model_name(model)] for model in SHOWN}
        assert answers == table.loc[row["image_id"], list(SHOWN)].to_dict()
        assert (row["label"], row["dataset"]) == ("fear", "mini-fi")
    again = opened(path)
    again.goto(address)
    again.reload()
    view = again.locator(".emonb-explorer")
    assert view.get_by_role("status").first.text_content() == status
    assert names_in(view) == found


def test_no_cell_of_the_csv_is_a_formula(tmp_path, opened):
    made = world(tmp_path, ("mini-fi",), n=8)
    evil = ['=HYPERLINK("http://x","a")', "+1", "-1", "@a", "\t=1", 'a"b,c\nd', "<b>", "plain"]
    made.update({key: frame.assign(image_id=frame["image_id"].map(lambda name: evil[int(name[5:10])]))
                 for key, frame in made.items()})  # fmt: skip
    store_samples(tmp_path, {"mini-fi": pd.DataFrame({"image_id": evil, "path": "gone.png", "caption": "=1+1"})})
    view = opened(exported(tmp_path, explorer.explorer_html(made))).locator(".emonb-explorer")
    view.get_by_role("button", name="Review labels").click()
    view.get_by_role("button", name="Review a random sample").click()
    text, name = downloaded(view, "CSV of these images")
    assert name == "mini-fi_random_sample.csv"
    cells = [cell for line in csv.reader(text.splitlines(keepends=True)) for cell in line]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert {name if name[0] in "a<p" else f"'{name}" for name in evil} <= set(cells)
    assert {"caption", "'=1+1", "tuned VLM says", "It looks calm."} <= set(cells)


def test_marks_of_a_review_are_counted_kept_and_saved(made, opened, tmp_path):
    predictions, _, path = made
    page = opened(path)
    view = page.locator(".emonb-explorer")
    view.get_by_role("button", name="Review labels").click()
    view.get_by_role("button", name=re.compile("true fear, answer sadness")).click()
    first, second = names_in(view)[:2]
    mark = lambda name, word: view.get_by_role("group", name=f"review of {name}").get_by_role("button", name=word)  # noqa: E731
    mark(first, "also right: sadness").click()
    mark(second, "label is right").click()
    mark(second, "mislabelled").click()
    desk = view.locator(".desk")
    assert desk.get_by_text("2 images reviewed: 2 errors of EmoVLM-KD").is_visible()
    view.get_by_role("button", name="Review a random sample").click()
    sample = names_in(view)
    assert len(sample) == 96, "a quarter of 1,000 pictures is more than there are"
    assert sample != sorted(sample)
    pressed = view.locator(".marks [aria-pressed=true]")
    assert pressed.count() == 0, "who reviews the sample looks at each picture anew"
    mark(sample[0], "label is right").click()
    mark(first, "label is right").click()
    assert pressed.count() == 2
    look = "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
    assert len({*pressed.first.evaluate(look)}) == 2
    page.reload()
    view.get_by_role("button", name="Review labels").click()
    assert desk.get_by_text("3 images reviewed: 2 random sample, 1 errors of EmoVLM-KD").is_visible()
    (tmp_path / "review.json").write_text(downloaded(view, "Save the review")[0])
    saved = read_review(tmp_path / "review.json").set_index("image_id", drop=False).to_dict("index")
    labels = predictions["mini-fi", "vit"].set_index("image_id")["label"]
    shape = {"dataset": "mini-fi", "also_right": []}
    expected = {
        first: {"mark": "label is right", "view": "random sample"},
        second: {"mark": "mislabelled", "view": "errors of EmoVLM-KD"},
        sample[0]: {"mark": "label is right", "view": "random sample"},
    }
    assert saved == {k: shape | v | {"image_id": k, "label": labels[k]} for k, v in expected.items()}


def test_keyboard_alone_is_enough(made, opened):
    predictions, _, page = made
    page = opened(page)
    view = page.locator(".emonb-explorer")
    now = "document.querySelector('.emonb-explorer').shadowRoot.activeElement?.getAttribute('aria-label')"
    for name in ("Dataset", "Matrix of", "Images", "Show"):
        page.keyboard.press("Tab")
        assert page.evaluate(now) == name
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate(now).startswith("true amusement, answer amusement: ")
    assert view.locator("td button[tabindex='0']").count() == 1, "the matrix is one stop of the Tab key"
    for key, where in (
        ("ArrowRight", "true amusement, answer anger"),
        ("ArrowDown", "true anger, answer anger"),
        ("End", "true anger, answer sadness"),
        ("ArrowRight", "true anger, answer sadness"),
        ("Control+End", "true sadness, answer sadness"),
        ("Control+Home", "true amusement, answer amusement"),
        ("ArrowUp", "true amusement, answer amusement"),
        ("ArrowDown", "true anger, answer amusement"),
        ("ArrowRight", "true anger, answer anger"),
    ):
        page.keyboard.press(key)
        assert page.evaluate(now).startswith(f"{where}: "), key
    page.keyboard.press("Enter")
    table = joint(predictions, "mini-fi", SHOWN).query("label == 'anger' and emovlmkd == 'anger'")
    assert set(names_in(view)) == set(table.index)
    assert view.get_by_role("status").text_content().startswith("True anger, answer of EmoVLM-KD: anger.")
    assert view.locator("td button[aria-pressed='true']").count() == 1
    assert view.get_by_role("grid").get_by_role("row").count() == 9
    assert view.get_by_role("gridcell").count() == 64
    unnamed = view.locator("button, select").evaluate_all("all => all.filter(e => !e.ariaLabel && !e.textContent)")
    assert unnamed == []


def test_two_views_are_alive_and_apart_and_follow_the_theme(made, opened):
    _, page, _ = made
    page = opened(page, color_scheme="dark")
    views = page.locator(".emonb-explorer")
    views.nth(0).locator("td button").first.click()
    assert views.nth(0).locator(".card").count() > 0
    assert views.nth(1).locator(".card").count() == 0
    pick(views.nth(1), "Matrix of", "ViT")
    chosen = views.nth(0).get_by_role("combobox", name="Matrix of").locator("option:checked")
    assert chosen.text_content() == "EmoVLM-KD"
    assert views.first.get_attribute("data-dark") is None, "the exported page is light whatever the system says"
    page.evaluate("document.body.dataset.jpThemeLight = 'false'")
    page.wait_for_function("document.querySelector('.emonb-explorer').hasAttribute('data-dark')")


def test_runs_where_the_script_is_copied_to_the_end(made, tmp_path, opened):
    """As front ends do that put the HTML in place first and then run its scripts."""
    _, _, bare = made
    late = tmp_path / "late.html"
    late.write_text(bare.read_text().replace("</script><script>", "</script><script type='text/plain'>", 1))
    page = opened(late)
    assert page.locator(".emonb-explorer td").count() == 0
    page.evaluate("""() => {
      const copy = document.createElement("script");
      copy.text = [...document.scripts].at(-1).text;
      document.body.append(copy);
    }""")
    assert page.locator(".emonb-explorer td button").count() == 64


def test_fits_a_phone(made, opened):
    _, page, bare = made
    for path in (page, bare):
        view = opened(path, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
        host = view.locator(".emonb-explorer").first
        host.locator("td button").nth(9).tap()
        assert host.locator(".card").count() > 0
        assert 0 <= host.get_by_role("status").first.bounding_box()["y"] < 370, "the result is in view"
        assert host.bounding_box()["width"] <= 360
        assert host.locator(".grid").evaluate("e => e.scrollWidth - e.clientWidth") <= 0, "no cell is cut off"
        assert host.locator(".card").first.evaluate("e => e.scrollWidth - e.clientWidth") <= 0
        for part in host.locator(".bar button").all():
            box = part.bounding_box()
            for text in (span.bounding_box() for span in part.locator("span").all()):
                fits = text["x"] + text["width"] <= box["x"] + box["width"]
                assert fits or text["y"] >= box["y"] + box["height"] - 2, "out of sight, below the part"
        cell = host.locator("td button").first.bounding_box()
        assert min(cell["width"], cell["height"]) >= 24  # WCAG 2.2, target size
        assert view.evaluate("document.documentElement.scrollWidth") <= 360 or path == page


# ---- in JupyterLab: live with a kernel, from the executed notebook without one, and not trusted

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
        assert page.evaluate(active).startswith("true amusement, answer anger")
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
