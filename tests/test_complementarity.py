"""Who is right where: counts against plain pandas, deterministic examples, one seed per image."""

import numpy as np
import pandas as pd
import pytest
from synthetic import synthetic

from emonb import complementarity as co
from emonb.emotions import TAXONOMIES
from emonb.settings import load_settings

LABELS = TAXONOMIES["mikels8"].labels


@pytest.fixture(scope="module")
def predictions():
    return synthetic(("mini-fi", "mini-emotion6", "mini-flickr"), n=160)


@pytest.fixture(scope="module")
def table(predictions):
    return co.joint(predictions, "mini-fi")


def test_joint_takes_the_first_seed_and_joins_by_name(predictions, table):
    assert len(table) == 160
    assert table.index.is_monotonic_increasing
    shuffled = {key: frame.sample(frac=1, random_state=1) for key, frame in predictions.items()}
    pd.testing.assert_frame_equal(table, co.joint(shuffled, "mini-fi"))
    head = predictions["mini-fi", "head"].query("seed == 0").set_index("image_id")["prediction"]
    assert table["head"].tolist() == head.loc[table.index].tolist()


def test_joint_without_predictions_is_empty():
    assert co.joint({}, "mini-fi").empty


def test_groups_are_the_four_cases(table):
    grouped = co.with_groups(table)
    vlm, vit = (table[m] == table["label"] for m in ("vlm_tuned", "vit"))
    for name, mask in zip(co.GROUPS, (vlm & vit, vlm & ~vit, ~vlm & vit, ~vlm & ~vit), strict=True):
        assert (grouped["group"] == name).tolist() == mask.tolist()


def test_table_rows_add_up(predictions):
    settings = load_settings("smoke")
    found = co.complementarity_table(predictions, settings)
    counts = [g.replace(" ", "_") for g in co.GROUPS]
    assert (found[counts].sum(axis=1) == found["n"]).all()
    for _, part in found.groupby("dataset"):
        whole, single = part[part["emotion"] == "all"].iloc[0], part[part["emotion"] != "all"]
        assert (single[counts].sum() == whole[counts]).all()
        assert whole["oracle"] == pytest.approx(100 - 100 * whole["neither_right"] / whole["n"])
        assert whole["disagreement"] == pytest.approx(whole["only_vlm"] + whole["only_vit"])
        assert whole["only_vlm_low"] <= whole["only_vlm"] <= whole["only_vlm_high"]
    assert found["dataset"].str.contains("drawn").all()
    assert tuple(found.query("dataset == 'mini-fi (drawn)'")["emotion"]) == ("all", *LABELS)
    assert co.complementarity_table({}, settings).empty


def test_agreement_is_symmetric_with_ones(table):
    matrix = co.agreement_matrix(co.with_groups(table))
    assert np.allclose(matrix, matrix.T)
    assert np.allclose(np.diag(matrix), 1)
    assert "group" not in matrix.columns
    assert matrix.to_numpy().min() > 0.1  # half of each synthetic error comes from the image


def test_examples_are_what_they_say_and_repeat(table):
    chosen = co.select_examples(table, 3)
    rules = {
        "vlm": (True, False, True), "vit": (False, True, True), "gate": (False, False, True),
    }  # fmt: skip
    right = chosen[["vlm_tuned", "vit", "emovlmkd"]].eq(chosen["label"], axis=0)
    for case, row in zip(chosen["case"], right.itertuples(index=False, name=None), strict=True):
        assert row == rules[case] if case in rules else (row[0] != row[1] and not row[2])
    assert list(dict.fromkeys(chosen["case"])) == list(co.CASES)
    assert chosen.groupby("case").size().max() <= 3
    assert all(part["label"].is_unique for _, part in chosen.groupby("case")), "emotions take turns"
    shuffled = co.select_examples(table.sample(frac=1, random_state=0), 3)
    pd.testing.assert_frame_equal(chosen, shuffled)


def test_examples_of_a_run_with_failed_models(table):
    chosen = co.select_examples(table.drop(columns="emovlmkd"))
    assert set(chosen["case"]) == {"vlm", "vit"}
    none = co.select_examples(table.drop(columns="vit"))
    assert none.empty
    assert "case" in none.columns


def test_a_table_without_pairs_keeps_its_columns(predictions):
    settings = load_settings("smoke")
    full = co.complementarity_table(predictions, settings)
    none = co.complementarity_table({}, settings)
    assert list(none.columns) == list(full.columns)
    partial = {key: frame for key, frame in predictions.items() if key != ("mini-fi", "vit")}
    there = co.complementarity_table(partial, settings)["dataset"].unique().tolist()
    assert there == ["mini-emotion6 (drawn)", "mini-flickr (drawn)"]


def test_intersections_are_counted_per_table(predictions, table):
    other = co.joint(predictions, "mini-flickr")
    counts = co.intersections({"a": table, "b": other.iloc[:100]})
    hits = table[list(co.QUARTET)].eq(table["label"], axis=0)
    assert counts.index.names == list(co.QUARTET)
    assert counts.sum().tolist() == [160, 100]
    for combination, n in counts["a"].items():
        assert n == (hits == list(combination)).all(axis=1).sum()
    share = (counts / counts.sum()).sum(axis=1)
    assert share.is_monotonic_decreasing
    fewer = co.intersections({"a": table.drop(columns="vit"), "b": other})
    assert fewer.index.names == ["vlm_tuned", "head", "emovlmkd"]
    assert co.intersections({}).empty


def test_answers_of_one_image_come_from_every_model(predictions):
    found = co.answers(predictions, "mini-fi", "test/00000.png").set_index("model")
    assert list(found.index[:3]) == ["VLM, zero-shot", "VLM, tuned", "VLM, free generation"]
    assert found.loc["VLM, free generation", "answer"] == "(unparsable)"
    assert not found.loc["VLM, free generation", "right"]
    assert np.isnan(found.loc["VLM, free generation", "confidence"])
    assert len(found) == 8
