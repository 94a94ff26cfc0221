"""Prediction files: what is written is read, and a damaged file is named; who is right where, one seed per image."""

import json
import re

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
    files = [tmp_path / "deep" / name for name in "ab"]
    for file in files:
        pr.write_predictions(file, frame)
    again = pr.read_predictions(files[0], LABELS)
    pd.testing.assert_frame_equal(again, frame, check_dtype=False)
    assert again.attrs["labels"] == pr.prediction_labels(again) == LABELS
    assert sorted((tmp_path / "deep").iterdir()) == files, "temporary file left behind"
    assert files[0].read_bytes() == files[1].read_bytes()


def test_files_of_the_first_edition_are_read(frame, tmp_path):
    """They came in row groups, without pandas' own metadata and repeats."""
    pr.write_predictions(tmp_path / "y", frame)
    frame = frame.drop(columns="repeat")
    kinds = {"seed": pa.int64(), "parsed": pa.bool_(), **{f"p_{name}": pa.float64() for name in LABELS}}
    schema = pa.schema([(c, kinds.get(c, pa.string())) for c in frame], metadata={"emonb.labels": json.dumps(LABELS)})
    with pq.ParquetWriter(tmp_path / "x", schema) as file:
        for i in range(3):
            file.write_table(pa.Table.from_pandas(frame[i : i + 1], schema, preserve_index=False))
    pd.testing.assert_frame_equal(*(pr.read_predictions(tmp_path / name) for name in "xy"))


def spoil(column, value):
    return lambda frame: frame.assign(**{column: [value, *frame[column][1:]]})


BAD = {
    "not finite": (spoil("p_anger", np.nan), "sum to 1"),
    "negative": (lambda f: f.assign(p_anger=f["p_anger"] - 1, p_joy=f["p_joy"] + 1), "sum to 1"),
    "label": (spoil("label", "rage"), "label.*outside"),
    "prediction": (spoil("prediction", "rage"), "must be a label"),
    "class for an unparsable answer": (lambda f: f.assign(prediction="joy"), "must be a label"),
    "not the argmax": (spoil("prediction", "joy"), "class order and probabilities disagree"),
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
    (tmp_path / "bytes").write_bytes(b"PAR1 nothing")
    frame[["image_id"]].to_parquet(tmp_path / "other")
    pr.write_predictions(tmp_path / "x", frame)
    frame.assign(label=frame["prediction"]).to_parquet(tmp_path / "no label")  # the unparsable "" is none
    said = {"none": "run the notebook", "bytes": "no predictions", "other": "columns are", "no label": "column label"}
    for name, message in said.items():
        with pytest.raises(EmonbError, match=f"{name}: .*{message}"):
            pr.read_predictions(tmp_path / name)
    with pytest.raises(EmonbError, match=r"x: class order"):
        pr.read_predictions(tmp_path / "x", sorted(LABELS))


def test_one_split_alone(frame, tmp_path):
    both = pd.concat([frame.assign(split="val"), frame.assign(split="test")], ignore_index=True)
    pr.write_predictions(tmp_path / "a__b.parquet", both)
    test = pr.load_all(tmp_path, split="test")["a", "b"]
    pd.testing.assert_frame_equal(test[["image_id", "split"]], frame[["image_id", "split"]])
    assert pr.read_predictions(tmp_path / "a__b.parquet", split="train").empty


def test_models_have_one_list_of_names_and_colours():
    assert pr.model_name("head_depth2") == "head, 2 hidden layers"
    assert pr.model_name("gate_depth5") == "EmoVLM-KD, 5 hidden layers"
    assert pr.model_name("head_depth1_x0.125") == "head, 1 hidden layer, 0.125 x the authors' training"
    assert pr.model_name("head_alpha0.25") == "head, alpha = 0.25"
    assert pr.model_name("something") == "something"
    assert [*map(pr.dataset_title, ("mini-fi", "mini-cats", "fi"))] == ["mini-fi (drawn)", "mini-cats", "FI"]
    assert set(pr.QUARTET) < set(pr.MAIN)
    assert len({pr.model_color(m) for m in (*pr.MAIN, "something")}) == len(pr.MAIN) + 1
    expected = pr.expected_models(load_settings("paper"))
    assert len(set(expected)) == len(expected) == 34
    assert all(pr.model_name(model) != model for model in expected)
    assert set(pr.MODELS) - {"vit_scratch"} < set(expected), "from scratch is a row of the laptop alone"


@pytest.fixture
def folder(tmp_path):
    """Predictions of two datasets by three models."""
    found = synthetic(("mini-fi", "mini-flickr"), n=16, models=("vit", "head", "resnet"))
    for (dataset, model), frame in found.items():
        pr.write_predictions(tmp_path / f"{dataset}__{model}.parquet", frame)
    return tmp_path


def test_somebody_s_predictions_of_other_labels_or_without_probabilities_are_told(folder):
    theirs = pr.read_predictions(folder / "mini-fi__vit.parquet")
    other = theirs["label"].map({"awe": "anger", "anger": "awe"}).fillna(theirs["label"])
    theirs.assign(label=other).to_parquet(folder / "mini-fi__mine.parquet")
    with pytest.raises(EmonbError, match=r"mini-fi__mine\.parquet: column label: '\w+' of \S+, which is '\w+' here"):
        pr.load_all(folder)
    found = pr.load_all(folder, partial=True)
    assert ("mini-fi", "mine") not in found
    assert "mine are of other labels" in found.problems["mini-fi", "mine"]
    classes = [name for name in theirs if name.startswith("p_")]
    turned = [classes[-1 - classes.index(name)] if name in classes else name for name in theirs]
    theirs[turned].to_parquet(folder / "mini-fi__mine.parquet")
    with pytest.raises(EmonbError, match=r"mini-fi__mine\.parquet: columns p_\.\.\.: sadness, .* order is amusement,"):
        pr.load_all(folder)
    bare = theirs[[name for name in theirs if not name.startswith("p_")]]
    bare.to_parquet(folder / "mini-fi__mine.parquet")
    with pytest.raises(EmonbError, match="no column p_<label>"):
        pr.load_all(folder)


def test_a_damaged_file_is_an_error_unless_partial_is_asked_for(folder):
    assert set(pr.load_all(folder, ["mini-fi"])) == {("mini-fi", m) for m in ("vit", "head", "resnet")}
    with pytest.raises(EmonbError, match="nowhere"):
        pr.load_all(folder, ["nowhere"])
    path = folder / "mini-fi__vit.parquet"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(EmonbError, match="mini-fi__vit"):
        pr.load_all(folder)
    found = pr.load_all(folder, partial=True)
    assert (len(found), found.folder) == (5, folder)
    (problem,) = found.problems.values()
    assert problem.startswith("mini-fi: predictions of vit are damaged: ")
    assert not re.search(f"\n|{folder}", problem)
    for path in folder.iterdir():
        path.write_bytes(b"not a table" * 99)
    with pytest.raises(EmonbError, match=r"no predictions of any dataset.*head are damaged"):
        pr.load_all(folder, partial=True)


def test_gaps_name_dataset_and_models_once(folder):
    settings = load_settings("smoke", datasets="mini-fi,mini-flickr,mini-emoset")
    expected, there = pr.expected_models(settings), {"vit", "head", "resnet"}
    (folder / "mini-fi__head.parquet").write_bytes(b"")
    damaged, *lines = pr.gaps(pr.load_all(folder, partial=True), settings.datasets, expected)
    assert damaged.startswith("mini-fi: predictions of head are damaged")
    fi, flickr, emoset = (line.split(": no predictions of ") for line in lines)
    assert set(fi[1].split(", ")) == set(flickr[1].split(", ")) == set(expected) - there
    assert emoset == ["mini-emoset", "any model"]
    assert pr.gaps(pr.load_all(folder, ["mini-flickr"]), ["mini-flickr"], there) == []


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


def test_an_average_pairs_seeds_and_a_picture_counts_the_seeds_that_say_the_same(predictions, tmp_path):
    one = pr.test_rows(predictions, "mini-flickr", "head")
    twice = pd.concat([one, one.assign(repeat=1)], ignore_index=True)
    mean = pr.average(one.sample(frac=1, random_state=0), twice)
    assert sorted(set(zip(mean["seed"], mean["repeat"], strict=True))) == [(s, r) for s in (0, 1, 2) for r in (0, 1)]
    wanted = one.set_index(["image_id", "seed"])["prediction"]
    found = mean[mean["repeat"] == 1].set_index(["image_id", "seed"])["prediction"]
    assert found.loc[wanted.index].equals(wanted), "a seed with itself"
    single = pr.average(pr.first_seed(one), twice)
    assert len(single) == len(mean), "one seed goes with all"
    alike = pr.seeds_alike(twice)
    said = one.pivot(index="image_id", columns="seed", values="prediction")
    assert alike.tolist() == [1 + (row[0] == row[1]) + (row[0] == row[2]) for row in said.to_numpy()]
    assert 1 < alike.mean() < 3
    pr.write_predictions(tmp_path / "predictions" / "d__emovlmkd.parquet", one)
    share = f"{(alike == 3).mean():.0%}"
    assert pr.how_alike(tmp_path / "models" / "d") == (
        f"the first of 3 pipelines, which give the same answer to {share} of the test pictures"
    )
    assert pr.how_alike(tmp_path / "models" / "other") == ""


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
