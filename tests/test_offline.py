"""Room 02: the offline annotator on any folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
from annotating import make_pictures, opened, read_lines
from PIL import Image

from emonb.emotions import TAXONOMIES
from emonb.errors import EmonbError
from emonb.offline import dominant_colors, offline_triplets
from emonb.settings import load_settings
from emonb.store import Store
from emonb.triplets import KINDS, load_prompts, read_triplets, triplets_stage

ROW = {"image_id": "a.png", "sha256": "0" * 64, "brightness": 0.2, "colorfulness": 0.6, "label": "fear"}
LABELS = TAXONOMIES["mikels8"].labels


def texts(**fields):
    return {t["kind"]: t["response"] for t in offline_triplets({**ROW, **fields}, LABELS)}


def test_three_kinds_from_a_scene_description():
    got = texts(objects=["skull", "umbrella"], scene="dark blue with rain", caption="ignored")
    assert tuple(got) == KINDS
    assert got["categorical"] == "{'emotion': 'fear'}"
    assert got["conversation"] == (
        "The image shows a skull and an umbrella. The background is dark blue with rain. "
        "The picture is dark and vivid."
    )
    assert got["reasoning"].startswith("One looks at a skull and an umbrella first.")


def test_captions_or_measurements_serve_where_nothing_is_described():
    assert "The picture is about fight, rage." in texts(caption="fight, rage")["conversation"]
    assert texts()["conversation"] == "The picture is dark and vivid."
    assert texts(objects=None, scene=float("nan"), caption="")["conversation"] == "The picture is dark and vivid."


def test_emoset_s_attributes_are_used():
    got = texts(objects=np.array(["dog"]), scene="forest path", facial_expression="frown", human_action="running")
    assert "The image shows a dog. The background is forest path." in got["conversation"]
    assert "There is a face with the expression frown. Somebody is running." in got["conversation"]
    assert "The frown face" in got["reasoning"]


@pytest.mark.parametrize("taxonomy", TAXONOMIES.values(), ids=list(TAXONOMIES))
def test_no_reasoning_names_its_emotion(taxonomy):
    from emonb.answer_checks import names_emotion

    for label in taxonomy.labels:
        row = {**ROW, "label": label, "objects": ["heart"], "scene": "warm red"}
        reasoning = [t for t in offline_triplets(row, taxonomy.labels) if t["kind"] == "reasoning"]
        assert names_emotion(reasoning[0]["response"], label) is None
    assert set(taxonomy.labels) <= set(load_prompts()["reasoning"]["closing"])


def test_every_row_says_that_it_is_offline():
    assert {t["source"] for t in offline_triplets(ROW, LABELS)} == {"offline"}


@pytest.mark.parametrize(
    ("color", "name"),
    [
        ((250, 20, 20), "red"), ((20, 30, 240), "blue"), ((20, 200, 40), "green"), ((250, 240, 30), "yellow"),
        ((5, 5, 5), "black"), ((250, 250, 250), "white"), ((128, 128, 128), "grey"), ((110, 70, 30), "brown"),
        ((255, 140, 10), "orange"), ((150, 40, 220), "purple"), ((255, 100, 200), "pink"), ((120, 10, 20), "red"),
    ],
)  # fmt: skip
def test_colours_have_the_names_that_people_use(color, name):
    assert dominant_colors(Image.new("RGB", (50, 50), color)) == [name]


def test_dominant_colours_are_ordered_by_area_and_small_ones_left_out():
    image = Image.new("RGB", (100, 100), (20, 30, 240))
    image.paste((250, 20, 20), (0, 0, 100, 30))
    image.paste((250, 240, 30), (0, 0, 20, 20))
    assert dominant_colors(image) == ["blue", "red"]


def test_a_folder_of_which_nothing_is_known_gets_colours_and_labels(tmp_path):
    images = make_pictures(tmp_path / "images", 12)
    settings, _, path = opened(tmp_path, images)
    store = Store(settings.out_path / "artifacts")
    artifact = triplets_stage(settings, store, "small")
    frame = read_triplets(path)
    assert set(frame["source"]) == {"offline"}
    assert len(frame) == 36
    assert frame.loc[frame["kind"] == "conversation", "response"].str.contains("The main colours are").all()
    assert (artifact.path / "triplets.jsonl").read_bytes() == path.read_bytes()
    assert triplets_stage(settings, store, "small") == artifact


def test_emoset_s_annotations_beside_a_tree_reach_the_triplets(tmp_path):
    images = make_pictures(tmp_path / "images", 12)
    folder = images / "small" / "annotation" / "fear"
    folder.mkdir(parents=True)
    first = sorted((images / "small/train/fear").iterdir())[0]
    annotation = {"image_id": first.stem, "emotion": "fear", "scene": "dark_street", "object": ["street_lamp"],
                  "human_action": "walking"}  # fmt: skip
    (folder / f"{first.stem}.json").write_text(json.dumps(annotation))
    settings, _, path = opened(tmp_path, images)
    triplets_stage(settings, Store(settings.out_path / "artifacts"), "small")
    said = {t["image_id"]: t["response"] for t in read_lines(path) if t["kind"] == "conversation"}
    known = said.pop(f"train/fear/{first.name}")
    assert "a street lamp. The background is dark street. Somebody is walking." in known
    assert all("main colours" in text for text in said.values())


def test_a_damaged_annotation_is_named(tmp_path):
    images = make_pictures(tmp_path / "images", 12)
    folder = images / "small" / "annotation" / "fear"
    folder.mkdir(parents=True)
    for text in ("[1]", "{"):
        (folder / "00002.json").write_text(text)
        with pytest.raises(EmonbError, match=r"00002.json"):
            opened(tmp_path, images)


def test_answers_that_were_paid_for_are_not_replaced(tmp_path):
    images = make_pictures(tmp_path / "images", 6)
    settings, _, path = opened(tmp_path, images)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"image_id": "x", "source": "openai"}) + "\n")
    forced = load_settings(
        str(tmp_path / "asking.yaml"),
        datasets="small",
        images=str(images),
        out=str(tmp_path / "out"),
        triplets={"annotator": "offline"},
    )
    with pytest.raises(EmonbError, match="paid for"):
        triplets_stage(forced, Store(settings.out_path / "artifacts"), "small")
    assert "openai" in path.read_text()
