"""Calibration: bins and error against a plain loop, on cases that can be counted by hand."""

import numpy as np
import pandas as pd
import pytest
from synthetic import synthetic

from emonb.metrics import calibration_error, reliability
from emonb.model_tables import calibration_table
from emonb.predictions import make_predictions


def said(sure, right):
    """A frame of two emotions: confidence of each answer, and whether it is right."""
    label = ["joy" if hit else "fear" for hit in right]
    p = np.array([[s, 1 - s] for s in sure])
    ids = [f"{i}.png" for i in range(len(label))]
    return make_predictions(ids, ["test"] * len(ids), label, p, ["joy", "fear"])


def test_counted_by_hand():
    """Three of four right at 0.9, one of two at 0.6: gaps 0.15 and 0.1."""
    frame = said([0.9] * 4 + [0.6] * 2, [1, 1, 1, 0, 1, 0])
    table = reliability(frame)
    assert table["n"].tolist() == [2, 4]
    assert table["accuracy"].tolist() == [0.5, 0.75]
    assert table["confidence"].tolist() == pytest.approx([0.6, 0.9])
    assert calibration_error(frame) == pytest.approx(100 * (2 * 0.1 + 4 * 0.15) / 6)


def test_a_bin_ends_with_its_upper_edge_and_certainty_has_one():
    table = reliability(said([0.6, 0.601, 1.0], [1, 1, 1]), bins=5)
    assert table["low"].tolist() == pytest.approx([0.4, 0.6, 0.8])
    assert table["high"].tolist() == pytest.approx([0.6, 0.8, 1.0])
    assert calibration_error(said([1.0] * 3, [1, 1, 1])) == 0


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_equals_a_plain_loop(bins):
    frame = synthetic(("mini-fi",), n=120, models=("vit",))["mini-fi", "vit"]
    sure = frame[[c for c in frame if c.startswith("p_")]].max(axis=1)
    total = 0.0
    for k in range(bins):
        inside = (sure > k / bins) & (sure <= (k + 1) / bins)
        if inside.any():
            hit = (frame["prediction"] == frame["label"])[inside].mean()
            total += inside.mean() * abs(hit - sure[inside].mean())
    assert calibration_error(frame, bins) == pytest.approx(100 * total)


def test_table_takes_the_first_seed_and_leaves_out_what_is_missing():
    predictions = synthetic(("mini-fi", "mini-flickr"), n=64, models=("vit", "head"))
    del predictions["mini-flickr", "vit"]
    table = calibration_table(predictions, ("mini-fi", "mini-flickr"))
    assert list(zip(table["dataset"], table["model"], strict=True)) == [
        ("mini-fi (drawn)", "vit"), ("mini-fi (drawn)", "head"), ("mini-flickr (drawn)", "head"),
    ]  # fmt: skip
    head = predictions["mini-fi", "head"].query("seed == 0")
    assert table.loc[1, "n"] == 64
    assert table.loc[1, "accuracy"] == pytest.approx(100 * (head["prediction"] == head["label"]).mean())
    assert table.loc[1, "confidence"] == pytest.approx(100 * head.filter(like="p_").max(axis=1).mean())
    assert "Guo et al. 2017" in table.attrs["caption"]
    assert isinstance(table, pd.DataFrame)
