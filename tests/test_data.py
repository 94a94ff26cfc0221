"""Room 01: importers, splits, integrity; every bad input gives one clear error."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image
from pipeline import COLORS, make_tree, paint

from emonb import data, emotions, releases, samples
from emonb.emotions import TAXONOMIES, Taxonomy, infer_taxonomy
from emonb.errors import EmonbError
from emonb.settings import load_settings
from emonb.store import Store

PAIR = {"positive": (220, 60, 40), "negative": (40, 60, 220)}


def stage(root, name="pets", out=None):
    settings = load_settings("smoke", datasets=name, images=str(root), out=str(out or root / "out"))
    return data.samples_stage(settings, Store(settings.out_path / "artifacts"), name)


def test_tree_with_all_splits(tmp_path):
    make_tree(tmp_path / "pets", {"train": 4, "val": 2, "test": 3}, PAIR)
    frame = data.read_samples(stage(tmp_path))
    assert frame.attrs["labels"] == ["positive", "negative"]
    assert frame.groupby(["split", "label"]).size().to_dict() == {
        (s, e): n for s, n in {"train": 4, "val": 2, "test": 3}.items() for e in PAIR
    }
    assert frame["image_id"].is_unique
    assert all(Image.open(p).size == (96, 96) for p in frame["path"])


def test_missing_val_is_a_stratified_tenth_of_train(tmp_path):
    make_tree(tmp_path / "pets", {"train": 20, "test": 3}, PAIR)
    frame = data.read_samples(stage(tmp_path))
    assert frame[frame["split"] == "val"]["label"].value_counts().to_dict() == {"positive": 2, "negative": 2}
    assert (frame["split"] == "test").sum() == 6


def test_tree_without_splits_is_split_80_10_10(tmp_path):
    make_tree(tmp_path, {"pets": 20}, PAIR)
    counts = data.read_samples(stage(tmp_path)).groupby("split")["label"].value_counts()
    assert counts.to_dict() == {(s, e): n for s, n in {"train": 16, "val": 2, "test": 2}.items() for e in PAIR}


def test_unreadable_pictures_are_reported_and_left_out(tmp_path):
    root = make_tree(tmp_path / "pets", {"train": 4, "val": 2, "test": 3}, PAIR)
    (root / "train" / "positive" / "zero.png").touch()
    (root / "train" / "positive" / "<b>lie.jpg").write_text("this is no picture")
    whole = (root / "test" / "negative" / "0.png").read_bytes()
    (root / "test" / "negative" / "cut.png").write_bytes(whole[: len(whole) // 2])
    shutil.copy(root / "test" / "positive" / "0.png", root / "train" / "positive" / "leak.png")
    artifact = stage(tmp_path)
    report = json.loads((artifact.path / "integrity.json").read_text())
    assert report["problems"]["unreadable"] == [
        "test/negative/cut.png",
        "train/positive/<b>lie.jpg",
        "train/positive/zero.png",
    ]
    assert report["problems"]["duplicate_across_splits"] == ["test/positive/0.png", "train/positive/leak.png"]
    assert report["counts"]["train"] == {"positive": 5, "negative": 4}


def empty_class(root):
    (root / "train" / "negative").rename(root / "elsewhere")
    (root / "train" / "negative").mkdir()


def no_class_in_test(root):
    shutil.rmtree(root / "test" / "negative")


def unknown_label(root):
    (root / "train" / "positive").rename(root / "train" / "gleeful")


def no_pictures(root):
    shutil.rmtree(root)
    root.mkdir()


def one_picture_in_val(root):
    shutil.rmtree(root / "val" / "negative")
    for path in list((root / "val" / "positive").iterdir())[1:]:
        path.unlink()


def only_unreadable(root):
    for path in root.rglob("*.png"):
        path.write_bytes(b"")


def no_test(root):
    shutil.rmtree(root / "test")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (empty_class, ["train/negative", "class without pictures", "remove it"]),
        (no_class_in_test, ["split 'test'", "negative", "add pictures"]),
        (unknown_label, ["'gleeful'", "rename the folders"]),
        (no_pictures, ["zero pictures", "<train|val|test>"]),
        (one_picture_in_val, ["split 'val' (1 readable pictures)", "negative"]),
        (only_unreadable, ["no readable picture", "put .jpg"]),
        (no_test, ["needs both train/ and test/"]),
        (shutil.rmtree, ["no such folder", "IMAGES"]),
    ],
)
def test_bad_trees_give_one_clear_error_and_no_partial_table(tmp_path, damage, words):
    damage(make_tree(tmp_path / "pets", {"train": 4, "val": 2, "test": 3}, PAIR))
    with pytest.raises(EmonbError) as caught:
        stage(tmp_path)
    assert [w for w in [*words, "pets"] if w not in str(caught.value)] == []
    assert not list((tmp_path / "out").rglob("samples.parquet"))


def test_too_few_pictures_for_a_split(tmp_path):
    make_tree(tmp_path, {"pets": 5}, PAIR)
    with pytest.raises(EmonbError, match="has 5 pictures, too few"):
        stage(tmp_path)


def test_unknown_dataset_names_the_drawn_ones():
    settings = load_settings("smoke", datasets="mini-fee")
    with pytest.raises(EmonbError, match="mini-fi, mini-emoset"):
        data.samples_stage(settings, None, "mini-fee")


def test_taxonomy_is_inferred_in_its_own_order(monkeypatch):
    assert infer_taxonomy(["sadness", "joy", "anger"], "x").name == "ekman6"
    assert infer_taxonomy(["awe", "fear"], "x").name == "mikels8"
    scrambled = Taxonomy("scrambled", ("sadness", "joy", "anger"))
    monkeypatch.setattr(emotions, "TAXONOMIES", {"scrambled": scrambled})
    assert infer_taxonomy(COLORS, "x").labels == ("sadness", "joy", "anger")
    with pytest.raises(EmonbError, match="label 'calm' is not in taxonomy 'mikels8'"):
        TAXONOMIES["mikels8"].index("calm")


def test_exif_rotation_and_transparency(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert samples.open_picture(tmp_path / "turned.jpg").size == (20, 40)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert samples.open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_brightness_and_colorfulness_of_known_pictures():
    assert samples.brightness_colorfulness(Image.new("RGB", (9, 9), "white")) == (1.0, 0.0)
    assert samples.brightness_colorfulness(Image.new("RGB", (9, 9), "black")) == (0.0, 0.0)
    brightness, colorfulness = samples.brightness_colorfulness(Image.new("RGB", (9, 9), (255, 0, 0)))
    # Hasler and Suesstrunk by hand: rg = 255, yb = 127.5, no spread: 0.3 * sqrt(255^2 + 127.5^2) / 109
    assert brightness == 1.0
    assert colorfulness == pytest.approx(0.3 * (255**2 + 127.5**2) ** 0.5 / 109)


def bass_release(root, n=60):
    rows = []
    for i in range(n):
        name = f"{'abcdefghijklmnopqrstuvwxyz'[i // 2 % 26]}{'x' * (i // 52)}{'' if i % 2 == 0 else 2}.png"
        paint(root / "images" / name, PAIR["positive" if i // 2 % 2 else "negative"], seed=i)
        rows.append({"file_name": name, "val_mean_us": 7.0 if i // 2 % 2 else 2.0, "keywords": "a, b"})
    rows.append({"file_name": "middle.png", "val_mean_us": 5.0, "keywords": ""})
    pd.DataFrame(rows).to_csv(root / "BASS_data.csv", index=False)


def test_bass_release_keeps_concepts_together_and_counts_the_middle(tmp_path):
    bass_release(tmp_path / "bass")
    artifact = stage(tmp_path, "bass")
    frame = data.read_samples(artifact)
    concept = frame["image_id"].str.replace(r"\d*\.png$", "", regex=True)
    assert frame.groupby(concept)["split"].nunique().max() == 1
    assert len(frame) == 60
    report = json.loads((artifact.path / "integrity.json").read_text())
    assert report["problems"]["ambiguous_valence_left_out"] == ["middle.png"]


def test_real_bass_release():
    root = ROOT.parent / "shared" / "data"
    if not (root / "bass" / "BASS_data.csv").is_file():
        pytest.skip("the BASS release is not beside this checkout")
    release = releases.read_release("bass", root / "bass")
    frame, problems = release.frame, release.problems
    valence = pd.read_csv(root / "bass" / "BASS_data.csv")["val_mean_us"]
    assert len(frame) == ((valence >= 5.5) | (valence <= 4.5)).sum()
    assert len(frame) + len(problems["ambiguous_valence_left_out"]) == 583
    assert frame.loc[frame["group"] == "abuse", "image_id"].tolist() == ["abuse.png", "abuse2.png"]
