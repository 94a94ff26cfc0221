"""Room 01: emotions, pictures, splits and the sample table; every bad input gives one clear error."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from release_folders import PAIR, make_tree, stage

from emonb.data import (
    TAXONOMIES,
    brightness_colorfulness,
    check_labels,
    parse_emotion,
    question,
    read_samples,
    with_splits,
)
from emonb.errors import EmonbError

ALL = {"train": 4, "val": 2, "test": 3}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (ALL, ALL),
        ({"train": 20, "test": 3}, {"train": 18, "val": 2, "test": 3}),  # val: a stratified tenth of train
        ({"": 20}, {"train": 16, "val": 2, "test": 2}),
    ],
)
def test_splits_of_a_tree(tmp_path, sizes, expected):
    make_tree(tmp_path / "pets", sizes)
    folder = stage(tmp_path, "pets").path
    frame = read_samples(folder)
    assert frame.attrs["labels"] == ["positive", "negative"]
    counts = frame.groupby(["split", "label"]).size().to_dict()
    assert counts == {(split, label): n for split, n in expected.items() for label in PAIR}
    assert frame["image_id"].is_unique
    assert all(Image.open(path).size == (24, 24) for path in frame["path"])
    part = read_samples(folder, "test", ["image_id", "label"])
    assert [*part.columns] == ["image_id", "label"]
    assert len(part) == 2 * expected["test"]


def remove(*patterns):
    """Damage to a tree: files that fit, and folders with what is in them, are gone."""
    return lambda root: [shutil.rmtree(p) if p.is_dir() else p.unlink() for x in patterns for p in root.glob(x)]


BAD = [
    (remove("train/negative/*"), ["split 'train' (4 readable pictures)", "negative", "--map NAME="]),
    (remove("test/negative"), ["split 'test'", "negative", "add some"]),
    (lambda root: (root / "val" / "positive").rename(root / "val" / "gleeful"), ["--map 'gleeful=CLASS'"]),
    (remove("*"), ["zero pictures", "<train|val|test>"]),
    (remove("val/negative", "val/positive/0.jpg"), ["split 'val' (1 readable pictures)", "negative"]),
    (
        lambda root: [p.write_bytes(b"") for p in root.glob("*/*/*")],
        ["18 of 18 pictures (100%)", "--max-unreadable 1"],
    ),
    (remove("test"), ["split 'test' (0 readable pictures)", "--allow-missing-split"]),
    (remove("val", "*/*/3.jpg"), ["has 3 pictures"]),
    (shutil.rmtree, ["no such folder", "IMAGES"]),
]


@pytest.mark.parametrize(("damage", "words"), BAD, ids=[words[0] for _, words in BAD])
def test_bad_trees_give_one_clear_error_and_no_partial_table(tmp_path, damage, words):
    damage(make_tree(tmp_path / "pets", ALL))
    with pytest.raises(EmonbError) as caught:
        stage(tmp_path, "pets")
    assert [w for w in [*words, "pets"] if w not in str(caught.value)] == []
    assert not list((tmp_path / "out").rglob("samples.parquet"))
    with pytest.raises(EmonbError, match="unknown dataset 'mini-fee'; drawn ones are mini-fi, mini-emoset"):
        stage("", "mini-fee", "out")


@pytest.mark.parametrize("sizes", [{"": 30}, {"train": 30, "test": 2}])
def test_a_split_made_here_keeps_copies_together(tmp_path, sizes):
    folder = make_tree(tmp_path / "pets", sizes) / next(iter(sizes)) / "positive"
    for i in range(10):
        shutil.copy(folder / f"{i}.jpg", folder / f"copy{i}.jpg")
    frame = read_samples(stage(tmp_path, "pets").path)
    copies = frame.groupby("sha256")["split"]
    assert (copies.size() > 1).sum() == 10
    assert copies.nunique().max() == 1


@pytest.mark.parametrize(
    ("own", "groups", "sizes"),
    [
        (None, 30, {"train": 36, "val": 6, "test": 18}),
        ("train", 30, {"train": 54, "val": 6, "test": 8}),
        (None, 8, "8 groups"),
        ("train", 9, "9 groups"),
        (None, 60, "9 pictures"),
    ],
)
def test_groups_stay_in_one_split_also_beside_splits_of_the_release_and_few_are_told(own, groups, sizes):
    few = 18 if sizes == "9 pictures" else 60
    table = pd.DataFrame({"label": ["joy", "fear"] * (few // 2)}).assign(group=lambda t: t.index // 2 % groups)
    table["sha256"] = table.index.astype(str)
    if own:
        table = pd.concat([table.assign(split=own), table[:8].assign(split="test", group=-1)], ignore_index=True)
    if isinstance(sizes, str):
        with pytest.raises(EmonbError, match=f"{sizes}.*, too few to split off val; give at least 10"):
            with_splits(table, "pets")
        return
    made = with_splits(table, "pets")
    assert made["split"].value_counts().to_dict() == sizes
    assert made.groupby("group")["split"].nunique().max() == 1


def test_labels_of_an_artefact_are_checked_with_their_order():
    check_labels(["joy", "fear"], ("joy", "fear"), "file")
    with pytest.raises(EmonbError, match="file: class order"):
        check_labels(["joy", "fear"], ("fear", "joy"), "file")


@pytest.mark.parametrize(
    ("text", "emotion"),
    [
        ("{'emotion': 'fear'}", "fear"),
        ('{"Emotion": "Frightening"}', "fear"),
        ("emotion: happiness", None),
        ("It looks sad, very sad.", "sadness"),
        ("Not sad but amusing.", "amusement"),
        ("It isn't fear.", None),
        ("Fear or awe.", None),
        ("", None),
    ],
)
def test_a_free_answer_names_one_emotion_or_none(text, emotion):
    assert parse_emotion(text, TAXONOMIES["mikels8"].labels) == emotion
    assert "amusement, anger, awe" in question(TAXONOMIES["mikels8"].labels)


def test_brightness_and_colorfulness_of_known_pictures():
    assert brightness_colorfulness(Image.new("RGB", (9, 9), "white")) == (1.0, 0.0)
    assert brightness_colorfulness(Image.new("RGB", (9, 9), "black")) == (0.0, 0.0)
    brightness, colorfulness = brightness_colorfulness(Image.new("RGB", (9, 9), (255, 0, 0)))
    # Hasler and Suesstrunk by hand: rg = 255, yb = 127.5, no spread: 0.3 * sqrt(255^2 + 127.5^2) / 109
    assert brightness == 1.0
    assert colorfulness == pytest.approx(0.3 * np.hypot(255, 127.5) / 109)
