"""A picture and a model's answer that are markup, through notebooks 07 and 08 and their pages: both show as text."""

from __future__ import annotations

import shutil

import pandas as pd
import papermill
import pytest
from conftest import BROWSER, ROOT
from lab import pages_from_disk
from test_report import broken_links

from emonb.files import file_digest, read_json, write_json
from emonb.predictions import read_predictions, write_predictions
from emonb.show.report import write_report
from emonb.store import Store

NAME = "<img src=x onerror=alert(1)>.png"
ANSWER = "</script><script>alert(2)</script><b id=bold>sad</b> $x$ **no** `code`"
DATASET = "mini-flickr"


@pytest.fixture(scope="module")
def hostile(smoke_run, tmp_path_factory):
    """Results of one dataset; the first test picture, which the notebooks follow, has the name and the answer."""
    out = tmp_path_factory.mktemp("hostile") / "out"
    shutil.copytree(smoke_run.out, out)
    samples = Store(out / "artifacts").find("samples", DATASET)
    table = pd.read_parquet(samples.path / "samples.parquet")
    row = table.index[table["split"] == "test"][0]
    old = table.at[row, "image_id"]
    path = samples.path / table.at[row, "path"]
    path.rename(path.with_name(NAME))
    table.loc[row, "path"] = str((path.parent / NAME).relative_to(samples.path))
    table.loc[row, "image_id"] = f"test/{NAME}"
    table.to_parquet(samples.path / "samples.parquet")
    provenance = read_json(samples.path / "provenance.json")
    files = [p for p in samples.path.rglob("*") if p.is_file() and p.name != "provenance.json"]
    provenance["files"] = {p.relative_to(samples.path).as_posix(): p.stat().st_size for p in files}
    provenance["sha256"] |= {"samples.parquet": file_digest(samples.path / "samples.parquet")}
    write_json(samples.path / "provenance.json", provenance)
    changed = 0
    for file in (out / "predictions").glob(f"{DATASET}__*.parquet"):
        frame = read_predictions(file)
        mine = frame["image_id"] == old
        frame.loc[mine, "image_id"] = f"test/{NAME}"
        if file.stem.endswith(("vlm_tuned", "vlm_generated")):
            frame.loc[mine, "raw_text"] = ANSWER
        write_predictions(file, frame)
        changed += int(mine.sum())
    assert changed > 10
    for name in ("07_tables", "08_complementarity"):
        target = out / "notebooks" / f"{name}.ipynb"
        target.unlink()
        parameters = {"profile": "smoke", "datasets": DATASET, "out": str(out)}
        papermill.execute_notebook(str(ROOT / "notebooks" / target.name), str(target), parameters, progress_bar=False)
    write_report(out)
    return out


def test_every_link_of_a_run_leads_somewhere(smoke_run):
    assert len(list((smoke_run.out / "site").glob("*.html"))) == 9
    assert broken_links(smoke_run.out) == []


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("name", ["site/08_complementarity.html", "site/07_tables.html", "index.html"])
def test_names_and_answers_are_text_in_every_page(hostile, chromium, name):
    assert broken_links(hostile) == []
    with pages_from_disk(chromium) as opened:
        page = opened(hostile / name)
        if name != "site/07_tables.html":
            explorer = page.locator(".emonb-explorer")
            if explorer.get_by_label("Dataset").count():
                explorer.get_by_label("Dataset").select_option(label=f"{DATASET} (drawn)")
            for cell in explorer.locator("td button").all():  # two emotions: four cells, all pictures
                cell.click()
                if explorer.locator(".card code", has_text=NAME).count():
                    break
            card = explorer.locator(".card").filter(has_text=NAME)
            assert card.count() == 1
            card.locator("summary").first.click()
            assert ANSWER in card.locator("details p").first.inner_text()
        page.wait_for_timeout(300)  # an onerror would have fired
        assert page.locator("#bold, img[src=x]").count() == 0
