"""Are the VLM's reasons those of its answer? Agreement, pictures drawn again, and the line that is shown."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from exploring import judge

from emonb.show.reasons import AGREES, EXCHANGED, NAMED, OTHER, agreement, judge_reasons, reasons_note
from emonb.triplets import suggested
from emonb.vlm import answer_distribution, load_vlm, visual_tokens
from emonb.world import draw_dataset

LABELS = ("positive", "negative")


def test_a_reason_suggests_what_most_of_its_words_go_with():
    labels = ("amusement", "anger", "awe", "contentment", "disgust", "excitement", "fear", "sadness")
    assert suggested("What moves the viewer: a hot spring and a Skull.", labels) == ["contentment", "fear"]
    assert suggested("A hot spring. The background, dim grey with web, a skull.", labels) == ["fear"]
    assert suggested("The rook and the telephone.", labels) == suggested("", labels) == []
    said = pd.DataFrame({"prediction": ["fear", "awe", "anger"], "raw_text": ["a skull", "a comet", "a telephone"]})
    found = agreement(said, labels)
    assert found[AGREES].tolist() == [1, 1, 0]
    assert found[EXCHANGED].tolist() == [0, 0, 0]
    assert agreement(said.assign(raw_text="a skull"), labels)[EXCHANGED].tolist() == [1, 0, 0]


def test_pictures_without_what_a_reason_names_and_without_something_else(tmp_path, one_thread):
    sizes, vlm, redraw = {"train": 2, "val": 2, "test": 6}, load_vlm(), partial(draw_dataset, "mini-flickr")
    frame = redraw(tmp_path / "whole", sizes)
    test = frame[frame["split"] == "test"].set_index("image_id")
    named = {i: objects[:1] for i, objects in test["objects"].items()}
    answers = {}
    for what, gone in {NAMED: named, OTHER: {i: objects[1:2] for i, objects in test["objects"].items()}}.items():
        again = redraw(tmp_path / what[:12], sizes, without=gone)["path"]
        scores = answer_distribution(vlm, visual_tokens(vlm, [tmp_path / what[:12] / path for path in again]), LABELS)
        answers[what] = [LABELS[k] for k in scores.argmax(1).tolist()]
    texts = [f"With a {names[0]} in it." for names in named.values()]
    for what, said in answers.items():
        shown = pd.DataFrame({"image_id": test.index, "prediction": said, "raw_text": texts})
        judged = judge_reasons(vlm, "mini-flickr", shown, frame, LABELS, redraw, 50).set_index("measure")
        assert judged["n"].tolist() == [6] * 4
        other = {NAMED: OTHER, OTHER: NAMED}[what]
        assert judged.at[what, "value"] == 0
        assert judged.at[other, "value"] == pytest.approx(100 * np.mean(np.not_equal(*answers.values())))
    nothing = judge_reasons(vlm, "mini-flickr", shown.assign(raw_text="the light"), frame, LABELS, redraw, 50)
    assert nothing["n"].tolist() == [6, 6, 0, 0]


def test_the_line_is_made_of_the_table(tmp_path):
    assert reasons_note(tmp_path, "mini-fi") == ""
    judge(tmp_path, "mini-fi")
    line = "The VLM's reasons suggest its own answer in 61 % of 64 texts, reasons of other pictures in 20 %. "
    line += "Without objects that they name it answers otherwise in 41 % of 46 pictures, "
    line += "without as many others in 24 %."
    assert (reasons_note(tmp_path, "mini-fi"), reasons_note(tmp_path, "other")) == (line, "")
    said = pd.DataFrame({"image_id": ["a", "b"], "prediction": LABELS, "raw_text": ["a skull", "a rat"]})
    judge_reasons(None, "photos", said, None, LABELS, None).to_csv(tmp_path / "tables" / "reasons.csv")
    assert "drawn pictures only" in reasons_note(tmp_path, "photos")
    (tmp_path / "tables" / "reasons.csv").write_text("dataset,measure\nphotos")
    assert reasons_note(tmp_path, "photos") == ""
