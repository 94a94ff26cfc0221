"""The explorer's data against pandas: counts, filters, choice of pictures, sheets, and names that bite."""

import base64
import copy
import hashlib
import io
import json
import re
import shutil

import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from exploring import HOSTILE, SHOWN, TEXT, hostile_world, store_samples, world
from PIL import Image

from emonb.errors import EmonbError
from emonb.files import resource_path
from emonb.predictions import joint, load_all, make_predictions, model_name, prediction_labels, write_predictions
from emonb.show import explorer
from emonb.show.notebooks import write_site


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return world(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def html(made):
    return explorer.explorer_html(made)


def data_of(html):
    """The JSON block of an explorer."""
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL).group(1))


def numbers(text):
    """What the script reads out of packed numbers."""
    return [ord(letter) - 48 for letter in text]


def by_pandas(table, name):
    """The images of a filter, in other words than the package's."""
    wrong = table.drop(columns="label").apply(lambda column: column != table["label"])
    return table.loc[
        {
            "all": wrong.any(axis=1) | True,
            "VLM right, ViT wrong": ~wrong["vlm_tuned"] & wrong["vit"],
            "ViT right, VLM wrong": wrong["vlm_tuned"] & ~wrong["vit"],
            "all models wrong": wrong.all(axis=1),
            "EmoVLM-KD right, VLM and ViT wrong": (wrong["vlm_tuned"] & wrong["vit"]) > wrong["emovlmkd"],
            "VLM and ViT disagree": table["vlm_tuned"] != table["vit"],
        }[name]
    ]


def test_every_count_that_the_script_makes_is_a_crosstab(made, html):
    for one, dataset in zip(data_of(html)["sets"], ("mini-fi", "mini-flickr"), strict=True):
        table = joint(made, dataset, SHOWN)
        assert one["models"] == [model_name(m) for m in SHOWN]
        assert one["labels"] == one["columns"] == prediction_labels(made[dataset, "vit"])
        assert len(one["filters"]) == 6
        for f, name in enumerate(one["filters"]):
            part = by_pandas(table, name)
            kept = [bits >> f & 1 for bits in numbers(one["mask"])]
            assert sorted(i for i, keep in zip(one["id"], kept, strict=True) if keep) == sorted(part.index)
            for m, model in enumerate(SHOWN):
                expected = pd.crosstab(part["label"], part[model])
                expected = expected.reindex(index=one["labels"], columns=one["columns"], fill_value=0)
                found = np.zeros_like(expected)
                np.add.at(found, (numbers(one["label"]), numbers(one["answer"][m])), kept)
                assert (found == expected.to_numpy()).all()


def test_what_the_drawn_world_knows_of_a_picture_is_told(tmp_path):
    made = world(tmp_path, datasets=("mini-fi",), n=24)
    table = pd.read_parquet(next(tmp_path.rglob("samples.parquet")))
    name = table["image_id"][5]
    table = table.assign(drawn_as="awe", noisy=table["image_id"] == name, evidence="content", caption="a red car")
    store_samples(tmp_path, {"mini-fi": table.assign(off_mood=table["image_id"] == name)})
    one = data_of(explorer.explorer_html(made, limit=12))["sets"][0]
    place = one["id"].index(name)
    assert numbers(one["drawn"]) == [one["labels"].index("awe") if i == place else -1 for i in range(24)]
    where = [one["kinds"][kind] for kind in numbers(one["kind"])]
    assert where == ["content, before another emotion's mood" if i == place else "content" for i in range(24)]
    assert one["caption"] == ["a red car"] * 24


def test_each_image_has_its_own_facts(made, html):
    one = data_of(html)["sets"][0]
    assert one["title"] == "mini-fi (drawn)"
    frame = made["mini-fi", "head"].query("seed == 0").set_index("image_id")
    for i, name in enumerate(one["id"]):
        assert one["labels"][numbers(one["label"])[i]] == frame.at[name, "label"]
        assert one["columns"][numbers(one["answer"][3])[i]] == frame.at[name, "prediction"]
        assert numbers(one["sure"][3])[i] == pytest.approx(100 * frame.loc[name].filter(like="p_").max(), abs=0.501)
    assert one["text"] == [{}, {"1": "It looks calm.", "2": "a" * explorer.LONGEST + "…"}, {}, {}, {}]
    assert [line[:9] for line in one["judged"]] == ["", "The VLM's", "", "", ""]
    assert not any(data_of(html)["sets"][1]["judged"]), "not in the table of reasons"


def test_a_model_that_somebody_else_trained_is_shown(tmp_path):
    predictions = world(tmp_path, ("mini-fi",), n=24)
    predictions["mini-fi", "theirs"] = predictions["mini-fi", "vit"]
    found = data_of(explorer.explorer_html(predictions))["sets"][0]
    assert found["models"] == [*map(model_name, SHOWN[:-1]), "theirs", model_name(SHOWN[-1])]
    assert found["answer"][-2] == found["answer"][SHOWN.index("vit")]


def test_same_bytes_from_the_same_data_in_any_order(made, html):
    shuffled = copy.copy(made)
    shuffled.update({key: frame.sample(frac=1, random_state=3) for key, frame in made.items()})
    assert explorer.explorer_html(shuffled) == html
    uid = re.compile(r'data-emonb="(\w{16})"')
    assert uid.findall(html) != uid.findall(explorer.explorer_html(made, ["mini-flickr"]))


def test_an_eighth_is_a_random_sample_then_errors_of_the_vlm_come_and_small_cells_are_whole(made):
    table = joint(made, "mini-fi", SHOWN)
    wrong = table.drop(columns="label").ne(table["label"], axis=0)
    chance = sorted(table.index, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    for limit in (12, 40, 96):
        chosen = explorer.choose_images(table, limit)
        assert len(chosen) == limit
        assert (np.diff(chosen) > 0).all()
        names, sample = set(table.index[chosen]), set(chance[: limit // 8])
        rest = names - sample
        assert sample <= names
        for errors in (wrong["vlm_tuned"], wrong[["vlm_tuned", "emovlmkd"]].any(axis=1), wrong.any(axis=1)):
            assert rest <= set(table.index[errors]) or set(table.index[errors]) <= names
        cells = table[wrong["vlm_tuned"]].groupby(["label", "vlm_tuned"]).groups.values()
        most = max(len(rest & set(cell)) for cell in cells)
        assert all(set(cell) <= names for cell in cells if len(cell) < most)
    full, less = (data_of(explorer.explorer_html(made, ["mini-fi"], limit=k))["sets"][0] for k in (96, 12))
    assert [less["id"][i] for i in less["sample"]] == chance[:1]
    assert len(less["size"]) == 12
    assert sorted(less["id"]) == full["id"]
    answers = [dict(zip(one["id"], numbers(one["answer"][2]), strict=True)) for one in (full, less)]
    assert answers[0] == answers[1]


def test_a_page_of_a_run_leads_to_its_explorer_and_to_entries_of_the_glossary(html, tmp_path):
    output = nbformat.v4.new_output("display_data", {"text/html": html})
    words = nbformat.v4.new_markdown_cell("[k](../docs/glossary.md#kappa), [m](../docs/glossary.md#mcnemars-test)")
    cells = [words, nbformat.v4.new_code_cell("explore()", outputs=[output])]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "08.ipynb")
    assert write_site(tmp_path, "") == []
    page = BeautifulSoup((tmp_path / "site" / "08.html").read_text(encoding="utf-8"), "html.parser")
    places = [page.find(id=link["href"][1:]) for link in page.select('a[href^="#"]')]
    assert [place["class"] for place in places[:1]] == [["emonb-explorer"]]
    assert [place.text for place in places[1:]] == ["Kappa", "McNemar's test"]
    assert len(page.select(".words dd")) == 2


def test_names_and_texts_stay_data(tmp_path):
    html = explorer.explorer_html(hostile_world(tmp_path))
    assert [tag.name for tag in BeautifulSoup(html, "html.parser").find_all()] == ["div", "p", "script", "script"]
    block = re.search(r'json">(.*?)</script>', html, re.DOTALL).group(1)
    assert "<" not in block
    assert block.isascii()
    one = data_of(html)["sets"][0]
    assert HOSTILE in one["id"]
    assert one["text"][0]["0"] == TEXT
    assert one["labels"][2] == "</script>"


def test_script_and_style_cannot_end_their_block_and_ask_for_nothing():
    for kind in ("js", "css"):
        text = resource_path(f"explorer.{kind}").read_text(encoding="utf-8")
        for bad in ("</", "<!--", "innerHTML", "http", "@import", "eval(", "getElementById"):
            assert bad not in text, (kind, bad)


def test_sheets_hold_each_picture_at_its_place_and_stay_small(tmp_path):
    colors = [(250, 20, 20), (20, 250, 20), (20, 20, 250)]
    for i, color in enumerate(colors):
        Image.new("RGB", (200, 100 + 100 * i), color).save(tmp_path / f"{i}.png")
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    paths = [str(tmp_path / f"{i % 3}.png") for i in range(explorer.TILES + 5)]
    paths[7], paths[8] = None, str(tmp_path / "damaged.png")
    sheets, sizes = explorer.sprites(paths)
    opened = [Image.open(io.BytesIO(base64.b64decode(sheet))) for sheet in sheets]
    side = explorer.SIDE
    assert [(sheet.format, sheet.size) for sheet in opened] == [("WEBP", (32 * side,) * 2), ("WEBP", (5 * side, side))]
    assert sizes[7] == sizes[8] == (0, 0)
    assert sizes[:3] == [(80, 40), (80, 80), (53, 80)], "the picture's shape is kept"
    assert explorer.sprites(paths[:2], 160)[1] == [(160, 80), (160, 160)]
    for i in (0, 31, 32, 1023, 1024, 1028):
        k = i % explorer.TILES
        at = (k % 32 * side + 10, k // 32 * side + 10)
        assert np.abs(np.subtract(opened[i // explorer.TILES].convert("RGB").getpixel(at), colors[i % 3])).max() < 25


def test_unparsable_answers_have_a_column_and_no_confidence(made):
    frame = made["mini-fi", "vit"]
    labels, p = prediction_labels(frame), frame.filter(like="p_").to_numpy()
    parsed = np.arange(len(frame)) % 5 > 0
    free = make_predictions(frame["image_id"], frame["split"], frame["label"], p, labels, parsed=parsed)
    predictions = copy.copy(made)
    predictions.clear()
    predictions.update({("mini-fi", "vgg"): free, ("mini-fi", "vit"): frame})
    one = data_of(explorer.explorer_html(predictions))["sets"][0]
    assert one["columns"] == [*labels, "(unparsable)"]
    vgg = one["models"].index("VGG")
    assert [answer == 8 for answer in numbers(one["answer"][vgg])] == (~parsed).tolist()
    assert [sure < 0 for sure in numbers(one["sure"][vgg])] == (~parsed).tolist()
    assert one["filters"] == ["all", "all models wrong"], "filters without their models are left out"


def test_one_line_finds_the_pictures_of_the_run(made, tmp_path, monkeypatch):
    for (dataset, model), frame in made.items():
        (tmp_path / "predictions").mkdir(exist_ok=True)
        write_predictions(tmp_path / "predictions" / f"{dataset}__{model}.parquet", frame.assign(raw_text=None))
    with pytest.raises(EmonbError, match=r"artifacts/samples/mini-fi.json: no samples result"):
        explorer.explorer_html(load_all(tmp_path / "predictions"))
    assert not (tmp_path / "artifacts").exists(), "looking leaves nothing behind"
    shutil.copytree(made.folder.parent / "artifacts", tmp_path / "artifacts")
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    explorer.explore(load_all(tmp_path / "predictions"))
    (page,) = shown
    assert [one["title"] for one in data_of(page.data)["sets"]] == ["mini-fi (drawn)", "mini-flickr (drawn)"]
    assert sum(size == [0, 0] for size in data_of(page.data)["sets"][0]["size"]) == 1


def test_mistakes_are_named(made):
    with pytest.raises(EmonbError, match=r"fi: no test image .* there are predictions of mini-fi, mini-flickr"):
        explorer.explorer_html(made, ["fi"])
