"""The report over whole, partial and damaged results folders."""

import json
import re
import shutil
from html import unescape

import pandas as pd
import pytest
from reporting import DATASETS, edit_run, make_results, write_notebook

from emonb.report import write_report


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished folder with its report."""
    out = make_results(tmp_path_factory.mktemp("whole") / "out")
    write_report(out)
    return out


@pytest.fixture
def out(made, tmp_path):
    """A copy of the finished folder to damage."""
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def page_of(out):
    """The page, written again, with the explorer's data taken out."""
    text = write_report(out).read_text(encoding="utf-8")
    return re.sub(r'<script type="application/json">.*?</script>', "", text, flags=re.DOTALL)


def problems(page):
    """The sentences at the top of the page."""
    box = re.search(r"<div class=problems.*?</div>", page, flags=re.DOTALL)
    return [unescape(line) for line in re.findall(r"<li>(.*?)</li>", box[0])] if box else []


def test_whole_run_shows_everything_and_complains_of_nothing(made):
    page = page_of(made)
    assert problems(page) == []
    assert "drawn data" in page
    assert "0123456789" in page
    assert page.count("<img ") == len(list((made / "figures").glob("*.png")))
    assert page.count("class='card claim") == 8
    assert 'class="emonb-explorer"' in page
    assert "<details><summary>Confusion matrices: mini-fi (2)</summary>" in page
    order = [page.index(f"<section id={i}>") for i in ("result", "claims", "explorer", "departures", "files")]
    assert order == sorted(order)
    links = set(re.findall(r"href='([^'#]+)'", page))
    assert {"site/04_teacher.html", "tables/main.csv", "tables/main.md", "tables/main.tex", "run.json"} <= links
    assert [link for link in links if not (made / link).is_file()] == []


def test_numbers_of_the_main_table_are_those_of_the_csv(made):
    table = pd.read_csv(made / "tables" / "main.csv")
    row = table[(table["row"] == "emovlmkd") & (table["dataset"] == "mini-fi (drawn)")].iloc[0]
    page = page_of(made)
    cells = re.search(r"<tr class=own><th scope=row>EmoVLM-KD</th>(.*?)</tr>", page)[1]
    assert f">{row['paper']:.2f}</td>" in cells
    assert re.search(
        rf">(<b>)?{row['ours']:.1f}(</b>)? <span class=ci>\[{row['ci_low']:.1f}, {row['ci_high']:.1f}\]", cells
    )


def test_same_results_same_bytes(made, tmp_path):
    first = (made / "index.html").read_bytes()
    assert write_report(made).read_bytes() == first
    shutil.rmtree(made / "site")
    assert write_report(made).read_bytes() == first


def test_nothing_beside_the_page_is_needed(made):
    page = (made / "index.html").read_text()
    assert "default-src 'none'; img-src data:" in page
    assert not re.search(r"<link|<iframe|@import|<script[^>]+src|url\((?!data:)", page)
    assert all(source.startswith("data:image/") for source in re.findall(r"<img[^>]*? src='([^']*)", page))


def truncate(path, size=200):
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    "dataset missing": (
        lambda out: [p.unlink() for p in (out / "predictions").glob("mini-flickr__*")],
        r"^mini-flickr: no predictions of any model$",
    ),
    "models missing": (
        lambda out: [(out / "predictions" / f"mini-flickr__{m}.parquet").unlink() for m in ("vit", "head")],
        r"^mini-flickr: no predictions of vit, head$",
    ),
    "predictions truncated": (
        lambda out: truncate(out / "predictions" / "mini-fi__vit.parquet"),
        r"^mini-fi: predictions of vit are damaged: ",
    ),
    "no predictions": (lambda out: shutil.rmtree(out / "predictions"), r"^no predictions$"),
    "no run.json": (lambda out: (out / "run.json").unlink(), r"^run\.json is missing: "),
    "damaged run.json": (lambda out: truncate(out / "run.json"), r"^run\.json is damaged: "),
    "run.json of another kind": (lambda out: (out / "run.json").write_text("[1, 2]"), r"^run\.json is damaged"),
    "strange values in run.json": (
        lambda out: edit_run(out, lambda run: run.update(totals=[1], machine="x", notebooks=3, settings=None)),
        r"^run\.json: its settings cannot be read",
    ),
    "failed notebook": (
        lambda out: edit_run(
            out, lambda run: run["notebooks"]["04_teacher"].update(status="failed", error="In [3]: ValueError: no <b>")
        ),
        r"^notebook 04_teacher failed: In \[3\]: ValueError: no <b>$",
    ),
    "failed notebook without a record": (
        lambda out: [(out / "run.json").unlink(), write_notebook(out, "04_teacher", ("KeyError", "'x'"))],
        r"^notebook 04_teacher failed: KeyError: 'x'$",
    ),
    "stopped": (
        lambda out: edit_run(out, lambda run: run["notebooks"]["04_teacher"].update(status="stopped")),
        r"^notebook 04_teacher was stopped",
    ),
    "half a notebook": (
        lambda out: truncate(out / "notebooks" / "01_data.ipynb", 40),
        r"^notebooks/01_data\.ipynb is damaged",
    ),
    "empty table": (lambda out: (out / "tables" / "main.csv").write_text(""), r"^tables/main\.csv is damaged: "),
    "table of garbage": (
        lambda out: (out / "tables" / "claims.csv").write_bytes(b"\x00\xff\x1f" * 50),
        r"^tables/claims\.csv is damaged: ",
    ),
    "other columns": (
        lambda out: (out / "tables" / "main.csv").write_text("a,b\n1,2\n"),
        r"^tables/main\.csv is damaged: no column",
    ),
    "words for numbers": (
        lambda out: pd.read_csv(path := out / "tables" / "main.csv").assign(ours="many").to_csv(path, index=False),
        r"^the chart of the main result cannot be shown: ",
    ),
    "empty figure": (
        lambda out: (out / "figures" / "agreement.png").write_bytes(b""),
        r"^figures/agreement\.png is damaged: 0 bytes$",
    ),
    "half a figure": (
        lambda out: truncate(out / "figures" / "agreement.png", 60),
        r"^figures/agreement\.png is damaged: ",
    ),
    "no figures": (lambda out: shutil.rmtree(out / "figures"), r"^Not made in this run: .*figure agreement"),
    "no samples": (
        lambda out: shutil.rmtree(out / "artifacts"),
        r"^mini-fi: not in the explorer: ",
    ),
    "damaged triplets": (
        lambda out: [(out / "triplets").mkdir(), (out / "triplets" / "mini-fi.jsonl").write_text("{\n")],
        None,
    ),
}  # what is done to the folder, and what the page must say


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_and_the_rest_is_shown(out, damage):
    spoil, said = DAMAGE[damage]
    spoil(out)
    page = page_of(out)
    if said:
        assert [line for line in problems(page) if re.search(said, line)], problems(page)
    for section in ("departures", "files"):
        assert f"<section id={section}>" in page
    assert ("<section id=result>" in page) == (damage not in ("empty table", "other columns"))
    assert ('class="emonb-explorer"' in page) == (damage not in ("no predictions", "no samples"))


def test_an_empty_folder_has_a_page(tmp_path):
    page = page_of(tmp_path)
    assert any("run.json is missing" in line for line in problems(page))
    assert "No notebook was executed" in page


def test_outputs_of_an_earlier_run_are_left_out(out):
    edit_run(out, lambda run: run["notebooks"]["07_tables"].update(outputs={"tables/main.csv": "x"}))
    page = page_of(out)
    assert "table-main" in page
    assert "table-gates" not in page
    assert any(line.startswith("Not made in this run: table claims") for line in problems(page))


def test_report_command(out, capsys):
    from typer.testing import CliRunner

    from emonb.cli import app

    (out / "index.html").unlink()
    shown = CliRunner().invoke(app, ["report", "--out", str(out)])
    assert shown.exit_code == 0
    assert (out / "index.html").is_file()
    assert "index.html" in shown.output
    edit_run(out, lambda run: run["notebooks"]["04_teacher"].update(status="failed", error="In [3]: why"))
    shown = CliRunner().invoke(app, ["report", "--out", str(out)])
    assert "notebook 04_teacher failed: In [3]: why" in shown.output
    missing = CliRunner().invoke(app, ["report", "--out", str(out / "nowhere")])
    assert missing.exit_code != 0
    assert "no such results folder" in str(missing.exception)
    assert not (out / "nowhere").exists()


def test_settings_of_other_datasets_name_what_is_gone(out):
    edit_run(out, lambda run: run["settings"].update(datasets=[*DATASETS, "mini-emoset"]))
    assert "mini-emoset: no predictions of any model" in problems(page_of(out))
    assert json.loads((out / "run.json").read_text())["settings"]["datasets"][-1] == "mini-emoset"
