"""Room 02: the offline annotator and the triplets file."""

from __future__ import annotations

import json

import pytest

from emonb.emotions import TAXONOMIES
from emonb.errors import EmonbError
from emonb.offline import offline_triplets
from emonb.triplets import KINDS, load_prompts, read_triplets

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


@pytest.mark.parametrize("taxonomy", TAXONOMIES.values(), ids=list(TAXONOMIES))
def test_no_reasoning_names_its_emotion(taxonomy):
    for label in taxonomy.labels:
        row = {**ROW, "label": label, "objects": ["heart"], "scene": "warm red"}
        reasoning = [t for t in offline_triplets(row, taxonomy.labels) if t["kind"] == "reasoning"]
        assert label not in reasoning[0]["response"].lower()
    assert set(taxonomy.labels) <= set(load_prompts()["reasoning"]["closing"])


def test_every_row_says_that_it_is_offline():
    assert {t["source"] for t in offline_triplets(ROW, LABELS)} == {"offline"}


def write(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_read_back_and_bad_lines(tmp_path):
    good = list(offline_triplets(ROW, LABELS))
    assert len(read_triplets(write(tmp_path / "t.jsonl", good))) == 3
    without = {k: v for k, v in good[1].items() if k != "response"}
    bad = {
        "line 2: not JSON": [good[0], '{"image_id": "b'],
        "line 2: field 'response' missing": [good[0], without],
        "field 'kind' is 'poem'": [{**good[0], "kind": "poem"}],
        "field 'response' is empty": [{**good[0], "response": " "}],
        "occurs twice": [good[0], good[0]],
    }
    for message, rows in bad.items():
        with pytest.raises(EmonbError) as caught:
            read_triplets(write(tmp_path / "bad.jsonl", rows))
        assert message in str(caught.value)
        assert "bad.jsonl" in str(caught.value)
