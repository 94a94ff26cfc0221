"""Prediction files: what is written is read, and a damaged file is named; who is right where, one seed per image."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import synthetic

from emonb import predictions as pr
from emonb.errors import EmonbError
from emonb.metrics import accuracy
from emonb.settings import load_settings

LABELS = ["surprise", "anger", "joy"]  # not alphabetical on purpose


@pytest.fixture
def frame():
    p = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    gold, texts = ["anger", "surprise", "anger"], ["{'emotion': 'anger'}", "no idea", None]
    options = {"seed": 4, "raw_text": texts, "parsed": [True, False, True]}
    return pr.make_predictions(["b", "a", "c"], ["test"] * 3, gold, p, LABELS, **options)


def test_round_trip_keeps_values_order_and_labels(frame, tmp_path):
    assert frame["prediction"].tolist() == ["anger", "", "joy"]
    assert np.allclose(pr.probabilities(frame)[1], 1 / 3), "an unparsable answer is no class"
    assert accuracy(frame) == pytest.approx(100 / 3), "and wrong, though its p would have been right"
    for name in "ab":
        pr.write_predictions(tmp_path / "deep" / name, frame)
    again = pr.read_predictions(tmp_path / "deep" / "a", LABELS)
    assert again.attrs["labels"] == pr.prediction_labels(again) == LABELS
    assert list(again["image_id"]) == ["b", "a", "c"]
    assert np.array_equal(pr.probabilities(again), pr.probabilities(frame))
    assert again["raw_text"].isna().tolist() == [False, False, True]
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["a", "b"], "temporary file left behind"
    assert len({(tmp_path / "deep" / name).read_bytes() for name in "ab"}) == 1


def test_files_of_the_first_edition_are_read(frame, tmp_path):
    """They came in row groups, without pandas' own metadata."""
    kinds = {"seed": pa.int64(), "parsed": pa.bool_(), **{f"p_{name}": pa.float64() for name in LABELS}}
    schema = pa.schema([(c, kinds.get(c, pa.string())) for c in frame], metadata={"emonb.labels": json.dumps(LABELS)})
    with pq.ParquetWriter(tmp_path / "x", schema) as file:
        for i in range(3):
            file.write_table(pa.Table.from_pandas(frame[i : i + 1], schema, preserve_index=False))
    pr.write_predictions(tmp_path / "y", frame)
    pd.testing.assert_frame_equal(*(pr.read_predictions(tmp_path / name) for name in "xy"))


def spoil(column, value):
    return lambda frame: frame.assign(**{column: [value, *frame[column][1:]]})


BAD = {
    "not finite": (spoil("p_anger", np.nan), "sum to 1"),
    "sum": (spoil("p_anger", 0.9), "sum to 1"),
    "negative": (lambda f: f.assign(p_anger=f["p_anger"] - 1, p_joy=f["p_joy"] + 1), "sum to 1"),
    "label": (spoil("label", "rage"), "label.*outside"),
    "prediction": (spoil("prediction", "rage"), "must be a label"),
    "class for an unparsable answer": (lambda f: f.assign(prediction="joy"), "must be a label"),
    "not the argmax": (spoil("prediction", "joy"), "class order and probabilities disagree"),
    "missing column": (lambda f: f.drop(columns="seed"), "columns are"),
    "order of columns": (lambda f: f[["split", "image_id", *f.columns[2:]]], "columns are"),
    "twice": (lambda f: f.assign(image_id="a"), "twice"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_frames_are_named_and_leave_the_old_file(frame, tmp_path, change, message):
    pr.write_predictions(tmp_path / "x.parquet", frame)
    before = (tmp_path / "x.parquet").read_bytes()
    with pytest.raises(EmonbError, match=message) as error:
        pr.write_predictions(tmp_path / "x.parquet", change(frame))
    assert "x.parquet" in str(error.value)
    assert (tmp_path / "x.parquet").read_bytes() == before


def test_bad_files_are_named_and_a_scrambled_class_order_is_not_permuted(frame, tmp_path):
    with pytest.raises(EmonbError, match=r"none\.parquet.*run the notebook"):
        pr.read_predictions(tmp_path / "none.parquet")
    (tmp_path / "bytes.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(EmonbError, match=r"bytes\.parquet.*no predictions"):
        pr.read_predictions(tmp_path / "bytes.parquet")
    frame.to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(EmonbError, match=r"emonb\.labels"):
        pr.read_predictions(tmp_path / "plain.parquet")
    pr.write_predictions(tmp_path / "x.parquet", frame)
    with pytest.raises(EmonbError, match=r"x\.parquet.*class order"):
        pr.read_predictions(tmp_path / "x.parquet", sorted(LABELS))
    table = pq.read_table(tmp_path / "x.parquet")
    pq.write_table(table.set_column(2, "label", table["prediction"]), tmp_path / "x.parquet")
    with pytest.raises(EmonbError, match="column label"):  # the unparsable "" is no label
        pr.read_predictions(tmp_path / "x.parquet")
    with pytest.raises(EmonbError, match="shape"):
        pr.make_predictions(["a"], ["test"], ["joy"], np.ones((1, 2)) / 2, LABELS)


def test_one_split_alone(frame, tmp_path):
    both = pd.concat([frame.assign(split="val"), frame.assign(split="test")], ignore_index=True)
    pr.write_predictions(tmp_path / "a__b.parquet", both)
    test = pr.load_all(tmp_path, split="test")["a", "b"]
    pd.testing.assert_frame_equal(test[["image_id", "split"]], frame[["image_id", "split"]])
    assert pr.read_predictions(tmp_path / "a__b.parquet", split="train").empty


def test_models_have_one_list_of_names_and_colours():
    assert pr.model_name("head_depth2") == "head, 2 hidden layers"
    assert pr.model_name("head_alpha0.25") == "head, alpha = 0.25"
    assert pr.model_name("something") == "something"
    assert set(pr.QUARTET) < set(pr.MAIN)
    assert len({pr.model_color(m) for m in (*pr.MAIN, "something")}) == len(pr.MAIN) + 1
    expected = pr.expected_models(load_settings("paper"))
    assert len(set(expected)) == len(expected) == 24
    assert all(pr.model_name(model) != model for model in expected)
    assert set(pr.MODELS) < set(expected)


# ---- a folder of files ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Predictions of two datasets by three models."""
    found = synthetic(("mini-fi", "mini-flickr"), n=16, models=("vit", "head", "resnet"))
    for (dataset, model), frame in found.items():
        pr.write_predictions(tmp_path / f"{dataset}__{model}.parquet", frame)
    return tmp_path


def test_a_damaged_file_is_an_error_unless_partial_is_asked_for(folder):
    assert set(pr.load_all(folder, ["mini-fi"])) == {("mini-fi", m) for m in ("vit", "head", "resnet")}
    with pytest.raises(EmonbError, match="nowhere"):
        pr.load_all(folder, ["nowhere"])
    path = folder / "mini-fi__vit.parquet"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(EmonbError, match="mini-fi__vit"):
        pr.load_all(folder)
    found = pr.load_all(folder, partial=True)
    assert len(found) == 5
    assert found.folder == folder
    (problem,) = found.problems.values()
    assert problem.startswith("mini-fi: predictions of vit are damaged: ")
    assert "\n" not in problem
    assert str(folder) not in problem
    for path, content in zip(folder.iterdir(), [b"", b"PAR1", b"not a table" * 99] * 2, strict=True):
        path.write_bytes(content)
    with pytest.raises(EmonbError, match=r"no predictions of any dataset.*head are damaged"):
        pr.load_all(folder, partial=True)


def test_gaps_name_dataset_and_models_once(folder):
    settings = load_settings("smoke", datasets="mini-fi,mini-flickr,mini-emoset")
    (folder / "mini-fi__head.parquet").write_bytes(b"")
    damaged, *lines = pr.gaps(pr.load_all(folder, partial=True), settings.datasets, pr.expected_models(settings))
    assert damaged.startswith("mini-fi: predictions of head are damaged")
    told = dict(line.split(": no predictions of ") for line in lines)
    assert tuple(told) == settings.datasets
    there = {"vit", "head", "resnet"}
    assert set(told["mini-fi"].split(", ")) == set(pr.expected_models(settings)) - there
    assert told["mini-flickr"] == told["mini-fi"]
    assert told["mini-emoset"] == "any model"
    assert pr.gaps(pr.load_all(folder, ["mini-flickr"]), ["mini-flickr"], there) == []


# ---- several models on the same images -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predictions():
    return synthetic(("mini-fi", "mini-flickr"), n=160)


@pytest.fixture(scope="module")
def table(predictions):
    return pr.joint(predictions, "mini-fi")


def test_joint_takes_the_first_seed_and_joins_by_name(predictions, table):
    assert list(table.columns) == ["label", *pr.MAIN]
    shuffled = {key: frame.sample(frac=1, random_state=1) for key, frame in predictions.items()}
    pd.testing.assert_frame_equal(table, pr.joint(shuffled, "mini-fi"))
    head = predictions["mini-fi", "head"].query("seed == 0").set_index("image_id")["prediction"]
    assert table["head"].tolist() == head.loc[table.index].tolist()
    assert pr.joint({}, "mini-fi").empty


def test_examples_are_what_they_say_and_repeat(table):
    chosen = pr.select_examples(table, 3)
    rules = {"vlm": (True, False, True), "vit": (False, True, True), "gate": (False, False, True)}
    right = chosen[["vlm_tuned", "vit", "emovlmkd"]].eq(chosen["label"], axis=0)
    for case, row in zip(chosen["case"], right.itertuples(index=False, name=None), strict=True):
        assert row == rules[case] if case in rules else (row[0] != row[1] and not row[2])
    assert list(dict.fromkeys(chosen["case"])) == list(pr.CASES)
    assert chosen.groupby("case").size().max() <= 3
    assert all(part["label"].is_unique for _, part in chosen.groupby("case")), "emotions take turns"
    pd.testing.assert_frame_equal(chosen, pr.select_examples(table.sample(frac=1, random_state=0), 3))
    none = pr.select_examples(table.drop(columns="vit"))
    assert none.empty
    assert "case" in none.columns


def test_intersections_are_counted_per_table(predictions, table):
    other = pr.joint(predictions, "mini-flickr")
    counts = pr.intersections({"a": table, "b": other.iloc[:100]})
    hits = table[list(pr.QUARTET)].eq(table["label"], axis=0)
    assert counts.sum().tolist() == [160, 100]
    for combination, n in counts["a"].items():
        assert n == (hits == list(combination)).all(axis=1).sum()
    assert (counts / counts.sum()).sum(axis=1).is_monotonic_decreasing
    assert pr.intersections({"a": table.drop(columns="vit")}).index.names == ["vlm_tuned", "head", "emovlmkd"]
    assert pr.intersections({}).empty
