"""The report in a browser, from disk: nothing is asked for, names stay text, it fits a phone, and it prints."""

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import BROWSER
from exploring import pictures, store_samples
from lab import pages_from_disk
from PIL import Image
from reporting import edit_run, make_results, write_notebook
from synthetic import frame_of

from emonb.predictions import write_predictions
from emonb.show.report import write_report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")

EVIL = "<img src=x onerror=alert(1)>"
CLIPPED = """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide') && !e.closest('.skip')
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className)"""
INKS = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = make_results(tmp_path_factory.mktemp("report") / "out")
    write_report(out)
    return out


@pytest.fixture
def opened(chromium):
    with pages_from_disk(chromium) as open_file:
        yield lambda out, **options: open_file(out / "index.html", **options)


def test_alone_in_a_folder_it_shows_its_figures_and_its_explorer(made, tmp_path, opened):
    shutil.copy(made / "index.html", tmp_path)
    page = opened(tmp_path)
    page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("[...document.images].every(i => i.alt.length > 3)")
    explorer = page.locator(".emonb-explorer")
    count = explorer.locator("td button.hit").first
    images = int(count.inner_text())
    count.click()
    assert explorer.locator(".card").count() == images > 0
    assert count.evaluate("e => getComputedStyle(e).boxShadow") != "none", "the chosen cell is marked"
    sprite = explorer.locator(".thumb").last.evaluate("e => getComputedStyle(e).backgroundImage")
    assert sprite.startswith('url("data:image/webp')
    numbers = "e => [getComputedStyle(e).textAlign, getComputedStyle(e).fontVariantNumeric]"
    assert page.locator("#table-main td.n").first.evaluate(numbers) == ["right", "tabular-nums"]


def test_the_policy_stops_what_would_be_loaded(made, tmp_path, chromium):
    evil = f"<img id=other src=other.png>{EVIL}<script>document.title = 'evil'</script></body>"
    (tmp_path / "index.html").write_text((made / "index.html").read_text().replace("</body>", evil))
    Image.new("RGB", (9, 9)).save(tmp_path / "other.png")
    page = chromium.new_page()
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto((tmp_path / "index.html").as_uri())
    title, width = page.title(), page.locator("#other").evaluate("e => e.naturalWidth")
    page.close()
    assert title.startswith("EmoVLM-KD, reproduced")
    assert (dialogs, width) == ([], 0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone_in_light_and_dark(made, opened, scheme):
    page = opened(made, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate(CLIPPED) == []
    box = page.locator("#table-main .wide")
    before = box.locator("tbody th").first.bounding_box()["x"]
    box.evaluate("e => { e.scrollLeft = 40 }")
    assert box.evaluate("e => e.scrollLeft") == 40
    assert box.locator("tbody th").first.bounding_box()["x"] == before
    lighter = [sum(int(x) for x in color[4:-1].split(",")) for color in page.evaluate(INKS)]
    assert (lighter[0] > lighter[1]) == (scheme == "dark")


def test_hostile_names_and_texts_are_text(tmp_path, opened):
    out = make_results(tmp_path / "out")
    labels, frames = ["<u>awe</u>", EVIL], {}
    truth = [labels[i % 2] for i in range(8)]
    for k, model in enumerate(("vit", "emovlmkd", EVIL)):
        frame = frame_of([labels[(i + k) % 2] for i in range(8)], truth, labels, rng=np.random.default_rng(k))
        frame["image_id"] = [f"{EVIL}{i}" for i in range(8)]
        frame["raw_text"] = f"</script>{EVIL}"
        frames[EVIL, model] = frame
        write_predictions(out / "predictions" / f"{EVIL}__{model}.parquet", frame)
    store_samples(out, pictures(out / "pictures", frames))
    (out / "predictions" / f"{EVIL}__head.parquet").write_bytes(b"<b>")
    for path in (out / "tables").glob("*.csv"):
        frame = pd.read_csv(path).astype(object)
        hit = {"name", "dataset", "paper_dataset", "decided_by", "rule", "why", "verdict"} & set(frame.columns)
        frame.loc[frame.index[0], list(hit)] = EVIL
        frame.rename(columns={"topic": EVIL}).to_csv(path, index=False)
        path.with_suffix(".md").write_text(f"**{EVIL}**\n")
    shutil.copy(out / "tables" / "gates.csv", out / "tables" / f"{EVIL}.csv")
    (out / "tables" / f"{EVIL}2.csv").write_text("")
    for end in ("", "__x"):
        Image.new("RGB", (9, 9)).save(out / "figures" / f"confusion_{EVIL}{end}.png")
    write_notebook(out, EVIL)

    def spoil(run):
        run.update(profile=EVIL, written=EVIL, seeds=[EVIL], git={"commit": EVIL})
        run.update(versions=dict.fromkeys(run["versions"], EVIL))
        run.update(lock={"locked": False, "differs": {EVIL: EVIL}}, differs_from_notebooks={EVIL: [EVIL, EVIL]})
        run["machine"].update(cpu=EVIL, gpu=EVIL)
        run["settings"]["datasets"] = [EVIL, "mini-fi"]
        run["notebooks"] |= {EVIL: {"status": EVIL}, "04_teacher": {"status": "failed", "error": f"{EVIL}\u202e"}}

    edit_run(out, spoil)
    write_report(out)
    page = opened(out)
    assert page.locator("img[src='x'], img[onerror]").count() == 0
    text = page.locator("body").inner_text()
    failed, damaged = f"notebook 04_teacher failed: {EVIL}\\u202e", f"{EVIL}: predictions of head are damaged"
    for place in (failed, damaged, f"{EVIL}, 2 cores"):
        assert place in text, place
    for part in ("h1, .eyebrow", "#result", "#claims", "#confusion", "#departures", "#more", "#files", ".problems"):
        found = " ".join(page.locator(part).all_text_contents())
        assert EVIL.lower() in found.lower(), part
    explorer = page.locator(".emonb-explorer")
    assert explorer.locator("th[scope=row]").all_text_contents() == labels
    explorer.locator("td button:not(.none)").first.click()
    card = explorer.locator(".card").first
    assert EVIL in card.inner_text()
    assert {*card.locator("details p").all_text_contents()} == {f"</script>{EVIL}"}
