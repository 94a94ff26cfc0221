"""The report over whole, partial and damaged results folders; its links; executed notebooks for the repository."""

import json
import re
import shutil
from html import unescape
from urllib.parse import unquote

import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from conftest import BROWSER
from exploring import pictures, store_samples
from lab import pages_from_disk
from PIL import Image
from reporting import NAMES, edit_run, make_results, write_notebook
from synthetic import frame_of

from emonb.errors import EmonbError
from emonb.predictions import QUARTET, model_color, model_name, write_predictions
from emonb.settings import project_root
from emonb.show import notebooks
from emonb.show.report import write_report


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


@pytest.fixture
def small(made, tmp_path):
    """A folder that holds the tables alone, whose page is made at once."""
    shutil.copytree(
        made, tmp_path / "small", ignore=lambda folder, names: {*names} & {"predictions", "figures", "site"}
    )
    return tmp_path / "small"


def page_of(out):
    """The page, written again, with the explorer's data taken out, and the sentences at its top."""
    problems = write_report(out)
    text = (out / "index.html").read_text(encoding="utf-8")
    box = re.search(r"<div class=problems.*?</div>", text, flags=re.DOTALL)
    assert [unescape(line) for line in re.findall(r"<li>(.*?)</li>", box[0])] == problems if box else not problems
    return re.sub(r'<script type="application/json">.*?</script>', "", text, flags=re.DOTALL), problems


def values(text, *names):
    """What these attributes say in a page, in its order."""
    tags = BeautifulSoup(text, "html.parser").find_all()
    return [tag[name] for tag in tags for name in names if tag.get(name)]


def broken_links(out):
    """Links of index.html and site/*.html that lead nowhere: (page, address)."""
    pages = [out / "index.html", *sorted((out / "site").glob("*.html"))]
    read = {page.resolve(): page.read_text(encoding="utf-8") for page in pages}
    places, found = {page: {*values(text, "id", "name")} for page, text in read.items()}, []
    for page, text in read.items():
        for address in values(text, "href", "src"):
            target, _, fragment = address.partition("#")
            if re.match(r"data:|https?://|mailto:", target):
                continue
            file = (page.parent / unquote(target)).resolve() if target else page
            within = not fragment or file not in read or {fragment, unquote(fragment)} & places[file]
            if not (file.is_file() and within):
                found.append((page.name, address))
    return found


def test_whole_run_shows_everything_and_complains_of_nothing(made):
    page, problems = page_of(made)
    assert problems == []
    for words in ("drawn data", "0123456789", "as locked", "1.5 min", "2026-01-02 03:04 UTC", "emonb-explorer"):
        assert words in page
    assert page.count("<img ") == len(list((made / "figures").glob("*.png")))
    assert page.count("<details class='claim ") == 13
    assert "<details><summary>Confusion matrices: mini-fi (drawn) (2)</summary>" in page
    places = ("class=finding", *(f"<section id={i}>" for i in ("result", "claims", "evidence", "departures", "files")))
    assert [page.index(place) for place in places] == sorted(map(page.index, places))
    legend = page.partition("class=legend>")[2].partition("</div>")[0]
    there = dict(re.findall(r"color:(#\w+)'>.*?<em>(.*?)</em>", legend, re.DOTALL))
    assert {model_color(model): model_name(model) for model in (*QUARTET, "resnet", "vgg")}.items() <= there.items()
    for rival in ("plain average, VLM and head", "plain average, VLM and ViT", "linear probe"):
        assert f"<em>{rival}</em>" in legend, "a rival that needs little training stands in the chart"
    links = {*values(page, "href")}
    assert {"site/04_teacher.html", "tables/main.csv", "tables/main.md", "tables/main.tex", "./run.json"} <= links


def finding_of(out):
    return unescape(page_of(out)[0].partition("class=finding>")[2].partition("</p>")[0])


def test_the_run_is_told_in_a_sentence_that_follows_its_verdicts(small):
    path = small / "tables" / "claims.csv"
    table = pd.read_csv(path).assign(detectable=2.345, value=0.2, ci_low=-0.3, ci_high=0.7)
    table["decided_by"] = "EmoVLM-KD - tuned VLM"
    said = {"holds": "2.5 ± 1.2 points above the tuned VLM", "does not hold": "2.5 ± 1.2 points below the tuned VLM"}
    for verdict, words in (said | {"undecided": "undecided against the tuned VLM (+2.5 ± 1.2 points)"}).items():
        numbers = [-2.54, -3.74, -1.34] if verdict == "does not hold" else [2.54, 1.34, 3.74]
        table.loc[table["claim"] == "C6", ["value", "ci_low", "ci_high"]] = numbers
        table.assign(verdict=verdict).to_csv(path, index=False)
        assert (", detectable 2.3" in page_of(small)[0]) == (verdict == "undecided"), "what the run could have found"
        finding = finding_of(small)
        assert finding.startswith(f"On drawn pictures: EmoVLM-KD is {words}")
        assert finding.endswith("+0.2 ± 0.5 where the mood shows the emotion, -0.2 ± 0.5 where the content does.")
        assert ("Distillation is undecided over all (+0.2 ± 0.5)" in finding) == (verdict == "undecided")
    table.assign(verdict="undecided", value=table["value"].mask(table["claim"] == "C6")).to_csv(path, index=False)
    modules = small / "tables" / "modules.csv"
    modules.rename(small / "tables" / "kept.csv")
    table[~table["claim"].isin(["E1", "E2"])].assign(verdict="perhaps").to_csv(path, index=False)
    assert finding_of(small).endswith("Distillation is undecided over all (+0.2 ± 0.5)."), (
        "an unknown verdict decides none"
    )
    untested = table["claim"].isin(["C6", "C2b"])
    table.assign(ci_low=table["ci_low"].mask(untested), value=table["value"].mask(untested)).to_csv(path, index=False)
    assert finding_of(small) == "", "what was not tested is no finding"


def test_the_plain_average_is_in_the_sentence_ahead_or_behind(small):
    claims, path = pd.read_csv(small / "tables" / "claims.csv"), small / "tables" / "modules.csv"
    claims[claims["claim"] == "C1"].to_csv(small / "tables" / "claims.csv", index=False)
    table = pd.read_csv(path)
    rows = table["row"] == "average_vlm_head"
    for gains, words in {
        (2.0, 4.0): "3.0 points below a plain average of VLM and head (which is ahead on 2 of 2)",
        (2.0, 0.0): "1.0 points below a plain average of VLM and head (which is ahead on 1 of 2)",
        (-2.0, 0.5): "0.8 points above a plain average of VLM and head (which is behind on 1 of 2)",
        (0.5, 0.1): "undecided against a plain average of VLM and head (-0.3 points), ahead on 0 of 2 and behind on 0",
        (
            3.0,
            -2.0,
        ): "undecided against a plain average of VLM and head (-0.5 points), ahead on 1 of 2 and behind on 1",
    }.items():
        for column, off in (("gain", 0), ("gain_low", -1), ("gain_high", 1)):
            table.loc[rows, column] = [gain + off for gain in gains]
        table.to_csv(path, index=False)
        assert finding_of(small) == f"On drawn pictures: EmoVLM-KD is {words}. "
    one = table["dataset"].iloc[0]
    table[table["dataset"] == one].to_csv(path, index=False)
    assert finding_of(small) == "On drawn pictures: EmoVLM-KD is 3.0 points below a plain average of VLM and head. "
    table[~rows].to_csv(path, index=False)
    assert finding_of(small) == ""


def test_a_claim_says_what_its_numbers_are_and_on_how_many_datasets_it_holds(small):
    path = small / "tables" / "claims.csv"
    table = pd.read_csv(path)
    assert [*table.loc[table["claim"] == "C7", "dataset"]] == ["mini-fi (drawn)", "mini-flickr (drawn)", "all"]
    near = "KL(teacher || head): alpha 0 - ours"
    values = {"value": 0.05, "ci_low": 0.0461, "ci_high": 0.054, "decided_by": near, "share": 40.0, "verdict": "holds"}
    points = {"value": -0.45, "ci_low": -2.0, "ci_high": 1.0, "decided_by": "head - other", "share": np.nan}
    table["share"] = 100.0
    for dataset, said in (("mini-fi (drawn)", points | {"verdict": "undecided"}), ("mini-flickr (drawn)", values)):
        table.loc[(table["claim"] == "C7") & (table["dataset"] == dataset), [*said]] = [*said.values()]
    table.loc[(table["claim"] == "C7") & (table["dataset"] == "all"), [*values]] = [*values.values()]
    table.to_csv(path, index=False)
    cards = BeautifulSoup(page_of(small)[0], "html.parser").select("details.claim")
    card = next(card for card in cards if card.select_one(".id").text == "C7")
    texts = [" ".join(part.text.split()) for part in (card.summary, *card.select("li"))]
    assert "(holds on 1 of 2 datasets alone) in 8 of 20 resamplings" in texts[0]
    assert texts[0].endswith("+0.050 [0.046, 0.054] nats")
    assert "-0.5 [-2.0, 1.0] points" in texts[1]
    assert texts[1].endswith("head - other in 0 of 20 resamplings")
    assert near not in texts[2], "the comparison of the heading is not repeated"
    assert [len(part.select(".shaky")) for part in (card.summary, *card.select("li"))] == [1, 1, 1]
    alike = next(card for card in cards if card.select_one(".id").text == "C8")
    assert not alike.select(".alone, .shaky")


def test_an_interval_stands_in_the_cell_of_its_value_with_as_many_decimals(small):
    frame = pd.DataFrame({"value": [9.876, 12.0], "ci_low": [8.0, 11.5], "ci_high": [10.25, 12.5], "p": [3e-9, 0.04]})
    frame.assign(drawn=True).to_csv(small / "tables" / "reasons.csv", index=False)
    table = BeautifulSoup(page_of(small)[0], "html.parser").select_one("#table-reasons table")
    cells = [[" ".join(cell.text.split()) for cell in row.select("th, td")] for row in table.select("tr")]
    assert cells[1:] == [["9.9 [8.0, 10.2]", "< 0.0001", "yes"], ["12.0 [11.5, 12.5]", "0.040", "yes"]]


def test_every_link_leads_somewhere_and_pages_lead_on(made):
    assert broken_links(made) == []
    page = (made / "site" / "04_teacher.html").read_text()
    links = values(page, "href", "src")
    pages = ["../index.html", "01_data.html", "07_tables.html"]
    text = ["../tables/main.csv", "07_tables.html#End"]
    assert [a for a in links if not a.startswith(("#", "data:"))] == [*pages, *text]
    last = (made / "site" / "08_complementarity.html").read_text()
    assert "09_try_your_image.html" not in last
    assert '<a title="not in this run">that</a>' in last, "a notebook that was not executed is no link"


def test_links_to_files_of_the_project_and_elsewhere_and_in_data(out):
    words = "[words](../docs/glossary.md#tau) [list](README.md) [gone](../docs/none.md) [here](#End) "
    words += "[paper](https://arxiv.org/abs/1) <script>var x = '<a href=\"no.md\">'</script>"
    write_notebook(out, "01_data", words)
    write_report(out)
    links = values(text := (out / "site" / "01_data.html").read_text(), "href")
    assert broken_links(out) == []
    targets = [(out / "site" / a.partition("#")[0]).resolve() for a in links if a.endswith((".md", ".md#tau"))]
    assert targets == [project_root() / "docs" / "glossary.md", project_root() / "notebooks" / "README.md"]
    assert "https://arxiv.org/abs/1" in links
    assert '<a href="no.md">\'</script>' in text, "what a script holds stays"


def test_numbers_of_the_main_table_are_those_of_the_csv(made):
    table = pd.read_csv(made / "tables" / "main.csv")
    row = table[(table["row"] == "emovlmkd") & (table["dataset"] == "mini-fi (drawn)")].iloc[0]
    cells = re.search(r"<tr class=own><th scope=row>EmoVLM-KD</th>(.*?)</tr>", page_of(made)[0], re.DOTALL)[1]
    assert f">{row['paper']:.2f}</td>" in cells
    interval = rf"\[{row['ci_low']:.1f}, {row['ci_high']:.1f}\]"
    assert re.search(rf">{row['ours']:.1f} <span class=ci>{interval}", cells), "bold would say: the best of all"


def test_what_is_built_into_the_drawn_world_is_said_at_the_top_by_the_numbers_of_the_table(out):
    path = out / "tables" / "evidence.csv"
    table = pd.read_csv(path)
    rest = (table["row"] == "only_vit") & (table["evidence"] == "no false mood")
    n = table["evidence"].map({"content": 20, "mood": 10, "both": 10, "all": 40, "no false mood": 25})
    table.assign(n=n, value=table["value"].mask(rest, 12.34)).to_csv(path, index=False)
    top, _, rest = page_of(out)[0].partition("<main")
    assert "75 % of the former carry another emotion's mood" in unescape(top)
    assert "50 % of its test pictures show their emotion in what is drawn alone" in top
    assert re.search(r"only the ViT on [\d.]+ % and 12.3 %", top)
    levels = pd.read_csv(out / "tables" / "main.csv").groupby("dataset")[["chance", "ceiling"]].max()
    drawn = re.findall(r"<i class=(\w+) style='left:([\d.]+)%'>", rest)
    assert [float(x) for _, x in drawn] == levels.round(2).to_numpy().ravel().tolist()
    path.unlink()
    assert "former carry" not in page_of(out)[0]


def test_same_results_same_bytes_and_nothing_beside_the_page_is_needed(made):
    first = (made / "index.html").read_bytes()
    shutil.rmtree(made / "site")
    write_report(made)
    assert (made / "index.html").read_bytes() == first
    page = first.decode()
    assert "default-src 'none'; img-src data:" in page
    assert not re.search(r"<link|<iframe|@import|<script[^>]+src|url\((?!data:)", page)
    assert all(source.startswith("data:image/") for source in re.findall(r"<img[^>]*? src='([^']*)", page))


def record(name, **values):
    return lambda out: edit_run(out, lambda run: run["notebooks"][name].update(values))


def run(**values):
    return lambda out: edit_run(out, lambda run: run.update(values))


def cut(path, size=200):
    return lambda out: (out / path).write_bytes((out / path).read_bytes()[:size])


def gone(pattern):
    return lambda out: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in out.glob(pattern)]


def text(path, content):
    return lambda out: [(out / path).parent.mkdir(exist_ok=True), (out / path).write_text(content)]


def words_for_numbers(out):
    path = out / "tables" / "main.csv"
    pd.read_csv(path).assign(ours="many").to_csv(path, index=False)


DAMAGE = {
    "dataset missing": (gone("predictions/mini-flickr__*"), "mini-flickr: no predictions of any model"),
    "predictions truncated": (cut("predictions/mini-fi__vit.parquet"), "mini-fi: predictions of vit are damaged: "),
    "no predictions": (gone("predictions"), "predictions cannot be shown: "),
    "damaged run.json": (cut("run.json"), "run.json cannot be shown: "),
    "run.json of another kind": (text("run.json", "[1, 2]"), "run.json cannot be shown: "),
    "strange run.json": (run(totals=[1], machine="x", notebooks=3, settings=None), "settings of run.json cannot be"),
    "stopped": (record("04_teacher", status="stopped"), "notebook 04_teacher was stopped"),
    "notebook gone": (gone("notebooks/01_data.ipynb"), "notebooks/01_data.ipynb is missing"),
    "half a notebook": (cut("notebooks/01_data.ipynb", 40), "notebooks/01_data.ipynb cannot be shown as a page: "),
    "empty table": (text("tables/main.csv", ""), "table main cannot be shown: "),
    "garbage": (text("tables/claims.csv", "\x00\x1f" * 50), "table claims cannot be shown: "),
    "words for numbers": (words_for_numbers, "table main cannot be shown: "),
    "half a figure": (cut("figures/agreement.png", 60), "figure agreement cannot be shown: "),
    "no figures": (gone("figures"), "Not made in this run: figures "),
    "no samples": (gone("artifacts"), "mini-fi in the explorer cannot be shown: "),
    "damaged triplets": (text("triplets/mini-fi.jsonl", "{\n"), ""),
}  # what is done to the folder, and how a sentence of the page begins


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_each_time_and_the_rest_is_shown(out, damage):
    spoil, said = DAMAGE[damage]
    spoil(out)
    for _ in range(2 if "notebook" in damage else 1):  # pages that are there are not made again
        page, problems = page_of(out)
        assert not said or [line for line in problems if line.startswith(said)], problems
    for section in ("departures", "files"):
        assert f"<section id={section}>" in page
    assert ("<section id=result>" in page) == (damage not in ("empty table", "words for numbers"))
    assert ('class="emonb-explorer"' in page) == (damage not in ("no predictions", "no samples"))
    assert broken_links(out) == []


def test_an_empty_folder_has_a_page(tmp_path):
    page, problems = page_of(tmp_path)
    assert any(line.startswith("run.json cannot be shown") for line in problems)
    assert "No notebook was executed" in page


def test_outputs_of_an_earlier_run_are_left_out(out):
    record("07_tables", files=["tables/main.csv", "tables/main.md"])(out)
    page, problems = page_of(out)
    assert "table-main" in page
    assert "table-gates" not in page
    assert any(line.startswith("Not made in this run: tables claims") for line in problems)


def test_a_matrix_of_somebody_s_model_is_not_called_ours(out):
    shutil.copy(next((out / "figures").glob("*.png")), out / "figures" / "confusion_mini-fi_big_vit.png")
    record("08_complementarity", files=["figures/confusion_mini-fi_big_vit.png"])(out)
    page, _ = page_of(out)
    assert "Confusion: big_vit on mini-fi (drawn)" in page
    assert "Confusion matrices: mini-fi (drawn)" in page


def test_other_packages_than_the_lock_and_the_notebooks_are_named(out):
    differs = {"locked": False, "differs": {"torch": "2.15.0, 2.14.1"}}
    run(lock=differs, differs_from_notebooks={"numpy": ["2.4", "2.3"]})(out)
    page, _ = page_of(out)
    assert "not as locked (here, locked): torch 2.15.0, 2.14.1" in page
    before = page[: page.index("<div class=block id=")]  # any table
    assert "may differ a little from those of the committed notebooks: numpy 2.4, 2.3." in before


def test_report_command(out):
    from typer.testing import CliRunner

    from emonb.cli import app

    (out / "index.html").unlink()
    record("04_teacher", status="failed", error="In [3]: why")(out)
    shown = CliRunner().invoke(app, ["report", "--out", str(out)])
    assert shown.exit_code == 0
    assert (out / "index.html").is_file()
    assert "index.html" in shown.output
    assert "notebook 04_teacher failed: In [3]: why" in shown.output
    missing = CliRunner().invoke(app, ["report", "--out", str(out / "nowhere")])
    assert "no such results folder" in str(missing.exception)
    assert not (out / "nowhere").exists()


# ---- in a browser, from disk: nothing is asked for, names stay text, it fits a phone -------------------------------

in_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
EVIL = "<img src=x onerror=alert(1)>"
CLIPPED = """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide') && !e.closest('.skip')
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className)"""
INKS = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"


@pytest.fixture
def opened(chromium):
    with pages_from_disk(chromium) as open_file:
        yield lambda out, **options: open_file(out / "index.html", **options)


@in_browser
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


@in_browser
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


@in_browser
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


@in_browser
def test_hostile_names_and_texts_are_text(out, opened):
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


# ---- for the repository --------------------------------------------------------------------------------------------

HEAD, TAIL = "# Title\n<!-- results: make notebooks writes them -->\n", "<!-- end of results -->\nThe rest.\n"


def test_readme_gets_the_runs_numbers_and_picture(made, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(HEAD + "stale figures\n" + TAIL)
    notebooks.refresh_readme(made, readme)
    text = readme.read_text()
    assert text.startswith(HEAD)
    assert text.endswith(TAIL)
    assert "stale" not in text
    main = pd.read_csv(made / "tables" / "main.csv").query("row == 'emovlmkd'").iloc[0]
    numbers = rf"\| EmoVLM-KD +\| {main['ours']:.1f}.\[{main['ci_low']:.1f},.{main['ci_high']:.1f}\] .*\| +79.51 \|"
    assert re.search(numbers, text)
    assert re.search(r"Ahead of EmoVLM-KD, .* wholly above 0: (none|.* on \d of \d datasets)\.", text)
    drawn = made / "figures" / "complementarity_venn.png"
    assert (tmp_path / "docs" / "pictures" / "complementarity.png").read_bytes() == drawn.read_bytes()
    notebooks.refresh_readme(made, readme)
    assert readme.read_text() == text
    readme.write_text("# Title\n")
    with pytest.raises(EmonbError, match="markers"):
        notebooks.refresh_readme(made, readme)
    assert readme.read_text() == "# Title\n"


def test_notebooks_go_back_clean_after_a_finished_mini_run(out, tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text('name = "emonb"')
    monkeypatch.setattr(notebooks, "project_root", lambda: tmp_path)
    with pytest.raises(EmonbError, match="finished run of the profile mini"):
        notebooks.copy_back(out)
    run(profile="mini")(out)
    path = out / "notebooks" / "08_complementarity.ipynb"
    nb = nbformat.read(path, as_version=4)
    html = '<div class="emonb-explorer"><p>How to.</p></div><script type="application/json">{}</script>'
    nb.cells[1].outputs = [nbformat.v4.new_output("display_data", {"text/html": html, "image/png": "AA=="})]
    kept = {"tags": ["shown"], "emonb": {"shows": "emonb.gate:one_hot"}}
    nb.cells[1].metadata = {"papermill": {"duration": 1.0}, **kept}
    nb.cells[0].metadata["papermill"] = {"duration": 1.0}  # of a text
    nb.metadata |= {"papermill": {"output_path": str(out)}, "emonb": {"versions": {"torch": "2"}, "fingerprint": "x"}}
    nbformat.write(nb, path)
    assert [p.stem for p in notebooks.copy_back(out)] == list(NAMES)
    back = json.loads((tmp_path / "notebooks" / path.name).read_text())
    assert back["cells"][1]["metadata"] == kept
    data = back["cells"][1]["outputs"][0]["data"]
    assert "".join(data["text/html"]) == '<div class="emonb-explorer"><p>How to.</p></div>'
    assert data["image/png"]
    assert back["metadata"]["emonb"] == {"versions": {"torch": "2"}}, "a later run says which versions it has instead"
    assert str(out) not in json.dumps(back)
    assert "papermill" not in json.dumps(back["cells"])
    record("04_teacher", status="failed")(out)
    with pytest.raises(EmonbError, match="unfinished: \\['04_teacher'\\]"):
        notebooks.copy_back(out)
