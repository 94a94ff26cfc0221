"""Prediction files: what is written is read, and a damaged file is named with its column and remedy."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from emonb.emotions import TAXONOMIES
from emonb.errors import EmonbError
from emonb.metrics import accuracy
from emonb.predictions import (
    PredictionWriter,
    load_all,
    make_predictions,
    model_name,
    prediction_labels,
    probabilities,
    read_predictions,
    write_predictions,
)

LABELS = ["surprise", "anger", "joy"]  # not alphabetical on purpose


@pytest.fixture
def frame():
    p = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    texts = ["{'emotion': 'anger'}", "no idea", None]
    return make_predictions(
        ["b", "a", "c"], ["test"] * 3, ["anger", "surprise", "anger"], p, LABELS, seed=4,
        raw_text=texts, parsed=[True, False, True],
    )  # fmt: skip


def test_round_trip_keeps_values_order_and_labels(frame, tmp_path):
    write_predictions(tmp_path / "deep" / "x.parquet", frame, LABELS)
    again = read_predictions(tmp_path / "deep" / "x.parquet", LABELS)
    assert again.attrs["labels"] == prediction_labels(again) == LABELS
    assert list(again["image_id"]) == ["b", "a", "c"]
    assert np.allclose(probabilities(again), probabilities(frame))
    assert again["raw_text"].isna().tolist() == [False, False, True]
    assert again["seed"].unique().tolist() == [4]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.parquet"], "temporary file left behind"


def test_unparsable_answer_is_wrong_and_no_class(frame):
    assert frame["prediction"].tolist() == ["anger", "", "joy"]
    assert np.allclose(probabilities(frame)[1], 1 / 3)
    assert accuracy(frame) == pytest.approx(100 / 3)  # the unparsable one would have been right by its p


def test_same_bytes_twice(frame, tmp_path):
    for name in "ab":
        write_predictions(tmp_path / name, frame, LABELS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("taxonomy", TAXONOMIES.values(), ids=lambda t: t.name)
def test_scrambled_class_order_is_refused_not_permuted(taxonomy, tmp_path):
    order = list(reversed(taxonomy.labels))
    p = np.eye(len(order))
    frame = make_predictions([*"abcdefgh"[: len(order)]], ["test"] * len(order), order, p, order)
    assert accuracy(frame) == 100
    write_predictions(tmp_path / "x.parquet", frame, order)
    with pytest.raises(EmonbError, match="class order"):
        read_predictions(tmp_path / "x.parquet", taxonomy.labels)
    with pytest.raises(EmonbError, match="class order"):
        write_predictions(tmp_path / "y.parquet", frame, taxonomy.labels)


def spoil(column, value):
    def change(frame):
        frame.loc[0, column] = value
        return frame

    return change


BAD = {
    "not finite": (spoil("p_anger", np.nan), r"p_anger.*not finite"),
    "sum": (spoil("p_anger", 0.9), "sum to 1"),
    "negative": (lambda f: f.assign(p_anger=f["p_anger"] - 1, p_joy=f["p_joy"] + 1), "sum to 1"),
    "label": (spoil("label", "rage"), "'label'.*outside"),
    "prediction": (spoil("prediction", "rage"), "'prediction'"),
    "class for an unparsable answer": (lambda f: f.assign(prediction="joy"), "'prediction'"),
    "not the argmax": (spoil("prediction", "joy"), "class order and probabilities disagree"),
    "missing column": (lambda f: f.drop(columns="seed"), "'seed'"),
    "extra column": (lambda f: f.assign(note=""), "'note'"),
    "twice": (lambda f: f.assign(image_id="a"), "twice"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_frames_are_named(frame, tmp_path, change, message):
    with pytest.raises(EmonbError, match=message) as error:
        write_predictions(tmp_path / "x.parquet", change(frame), LABELS)
    assert "x.parquet" in str(error.value)
    assert not (tmp_path / "x.parquet").exists()


def test_bad_files_are_named(frame, tmp_path):
    with pytest.raises(EmonbError, match=r"none\.parquet.*run the notebook"):
        read_predictions(tmp_path / "none.parquet")
    (tmp_path / "bytes.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(EmonbError, match=r"bytes\.parquet.*not a readable"):
        read_predictions(tmp_path / "bytes.parquet")
    frame.to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(EmonbError, match=r"emonb\.labels"):
        read_predictions(tmp_path / "plain.parquet")
    write_predictions(tmp_path / "x.parquet", frame, LABELS)
    table = pq.read_table(tmp_path / "x.parquet")
    edited = table.set_column(2, "label", table["prediction"])
    pq.write_table(edited.replace_schema_metadata(table.schema.metadata), tmp_path / "x.parquet")
    with pytest.raises(EmonbError, match="'label'"):  # the unparsable "" is no label
        read_predictions(tmp_path / "x.parquet")


def test_wrong_shape_is_refused():
    with pytest.raises(EmonbError, match="shape"):
        make_predictions(["a"], ["test"], ["joy"], np.ones((1, 2)) / 2, LABELS)


def test_load_all_finds_datasets_and_models(frame, tmp_path):
    for name in ("mini-fi__vit", "mini-fi__gate_moe", "other__vit"):
        write_predictions(tmp_path / f"{name}.parquet", frame, LABELS)
    assert set(load_all(tmp_path, ["mini-fi"])) == {("mini-fi", "vit"), ("mini-fi", "gate_moe")}
    with pytest.raises(EmonbError, match="nowhere"):
        load_all(tmp_path, ["nowhere"])


def test_model_names():
    assert model_name("head_depth2") == "head, 2 hidden layers"
    assert model_name("head_alpha0.25") == "head, alpha = 0.25"
    assert model_name("something") == "something"


def test_written_in_parts_is_the_same_file(frame, tmp_path):
    write_predictions(tmp_path / "whole.parquet", frame, LABELS)
    with PredictionWriter(tmp_path / "parts.parquet", LABELS) as out:
        for i in range(len(frame)):
            out.add(frame.iloc[i : i + 1])
        assert not (tmp_path / "parts.parquet").exists(), "half a file is seen by nobody"
    pd.testing.assert_frame_equal(*(read_predictions(tmp_path / f"{n}.parquet") for n in ("whole", "parts")))


def test_an_error_between_parts_leaves_the_old_file(frame, tmp_path):
    path = tmp_path / "x.parquet"
    write_predictions(path, frame, LABELS)
    before = path.read_bytes()

    def write_half() -> None:
        with PredictionWriter(path, LABELS) as out:
            out.add(frame)
            out.add(frame.assign(**{f"p_{LABELS[0]}": 0.9}))

    with pytest.raises(EmonbError, match="sum to 1"):
        write_half()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]


def test_one_split_alone(frame, tmp_path):
    both = pd.concat([frame.assign(split="val"), frame.assign(split="test")], ignore_index=True)
    write_predictions(tmp_path / "a__b.parquet", both, LABELS)
    test = read_predictions(tmp_path / "a__b.parquet", split="test")
    assert test["split"].unique().tolist() == ["test"]
    assert test["image_id"].tolist() == frame["image_id"].tolist()
    assert len(load_all(tmp_path, split="val")["a", "b"]) == len(frame)
