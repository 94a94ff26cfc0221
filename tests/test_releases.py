"""Releases, folders and lists: what is clear is read, what is not is refused with what to type."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import release_folders as made
from conftest import ROOT
from PIL import Image
from release_folders import EKMAN, MIKELS, PAIR, bring, listed, make_release, make_tree, paint, stage, state
from typer.testing import CliRunner

from emonb.cli import app
from emonb.data import read_samples
from emonb.errors import EmonbError
from emonb.files import resource
from emonb.releases import READERS, read_release, recognise
from emonb.releases.imports import Reading, listing_digest
from emonb.releases.lists import located
from emonb.releases.names import own_names, read_classes, split_of


@pytest.mark.parametrize("form", READERS)
def test_an_imported_dataset_is_what_a_run_reads_directly(form, tmp_path):
    source = make_release(form, tmp_path / "direct" / "pets")
    before = state(source)
    frame, report, _ = bring(form, source, tmp_path / "imported", name="pets")
    files = sorted(p.name for p in (tmp_path / "imported" / "pets").iterdir())
    assert files == ["import.json", "integrity.json", "samples.parquet"]
    imported = read_samples(stage(tmp_path / "imported", "pets", tmp_path / "out1").path)
    assert len(imported) == len(frame) > 0
    assert all(os.path.isfile(p) for p in imported["path"])
    counts = {s: {e: n for e, n in c.items() if n} for s, c in report["counts"].items()}
    assert counts == {s: Counter(g["label"]) for s, g in imported.groupby("split")}
    pd.testing.assert_frame_equal(imported, read_samples(stage(source.parent, "pets", tmp_path / "out2").path))
    assert recognise(source) == (form if form not in ("flickr", "instagram") else "folder")
    assert state(source) == before


@pytest.mark.parametrize("with_id", [False, True])
def test_emoset_in_both_forms_of_rows(tmp_path, with_id):
    source = made.emoset(tmp_path / "src", with_id, {"train": 3, "val": 1, "test": 2})
    frame, report, lines = bring("emoset", source, tmp_path / "out")
    assert frame["split"].value_counts().to_dict() == {"train": 24, "test": 16, "val": 8}
    assert list(report["counts"]["test"]) == list(MIKELS)
    rows = frame.set_index("image_id").loc[["image/awe/awe_train_00000.jpg", "image/fear/fear_train_00001.jpg"]]
    assert [*map(list, rows["objects"])] == [["Street light", "Dog"], []]
    assert rows["scene"].fillna("none").tolist() == ["dark street", "none"]
    assert report["expected"] == {"total": 118_102, "train": 94_481, "val": 5_905, "test": 17_716, "about": False}
    assert report["found"] == {"total": 48, "train": 24, "val": 8, "test": 16}
    assert "  test: 16 in the release, officially 17,716" in lines


def test_emoset_with_damaged_or_no_annotations(tmp_path):
    source = made.emoset(tmp_path)
    (source / "annotation/awe/awe_test_00000.json").write_text("[" * 100_000)
    (source / "annotation/fear/fear_test_00000.json").unlink()
    rows = read_release("emoset", source).frame.query("split == 'test' and label in ('awe', 'fear')")
    assert rows["objects"].tolist() == [[], []]
    assert rows["scene"].isna().all()
    shutil.rmtree(source / "annotation")
    assert "objects" not in read_release("emoset", source).frame


def test_emoset_without_train_list_only_when_told_and_never_in_a_run(tmp_path):
    source = made.emoset(tmp_path / "src")
    (source / "train.json").unlink()
    with pytest.raises(EmonbError, match=r"split 'train' \(0 .*--allow-missing-split"):
        bring("emoset", source, tmp_path / "out")
    assert not [*(tmp_path / "out").iterdir()]
    frame, _, lines = bring("emoset", source, tmp_path / "out", allow_missing_split=True)
    assert set(frame["split"]) == {"val", "test"}
    assert "no train: a run needs all splits and will refuse this dataset" in lines
    with pytest.raises(EmonbError, match=r"split 'train' \(0 .*a run needs all"):
        stage(tmp_path / "out", "emoset", tmp_path / "run")


def test_a_picture_of_two_lists_counts_once_as_test(tmp_path):
    source = made.emoset(tmp_path / "src")
    train, test = (json.loads((source / f"{s}.json").read_text()) for s in ("train", "test"))
    (source / "train.json").write_text(json.dumps([*train, test[0]]))
    release = read_release("emoset", source)
    assert release.problems["listed_twice"] == [test[0][1]]
    assert release.frame.set_index("image_id").loc[test[0][1], "split"] == "test"
    assert release.frame["split"].tolist() == ["train"] * 16 + ["val"] * 8 + ["test"] * 8


DAMAGED = [
    ("emoset", "train.json", '[["awe", "ima', "Unterminated .*; get it again from https://vcc"),  # a download failed
    ("emoset", "train.json", "<!DOCTYPE html><title>Quota exceeded</title>", "a web page.*; get it again from https"),
    ("emoset", "val.json", '[["awe", 7, "a.json"]]', "row 1 is"),
    ("emoset", "val.json", '[["joy", "image/x.jpg", "a.json"]]', "an emotion of amusement"),
    ("emoset", "val.json", '"awe"', "row 1 is 'awe', not"),
    ("emotion6", "ground_truth.txt", "anger/1.jpg\t1\t2\t0.5\t0.5\n", r"needs columns \[image_filename\], \[valence"),
    ("emotion6", "ground_truth.txt", "\n", "cannot be read as a table"),
    ("bass", "BASS_data.csv", "file_name,keywords\na.png,x\n", "needs columns .*'val_mean_us'"),
    ("bass", "BASS_data.csv", "file_name,val_mean_us,keywords\na.png,high,x\n", "could not convert string to float"),
]


@pytest.mark.parametrize(("form", "name", "content", "words"), DAMAGED)
def test_a_damaged_list_is_named_with_its_row(tmp_path, form, name, content, words):
    source = make_release(form, tmp_path)
    (source / name).write_text(content)
    with pytest.raises(EmonbError, match=words) as caught:
        read_release(form, source)
    assert name in str(caught.value)


@pytest.mark.parametrize("form", ["emoset", "emotion6", "oasis", "bass"])
def test_absent_pictures_are_reported_and_a_wrong_folder_is_told_what_is_needed(form, tmp_path):
    source = make_release(form, tmp_path / "src")
    whole, first, *others = read_release(form, source), *sorted(p for p in source.rglob("*.*g"))
    first.unlink()
    release = read_release(form, source)
    [missing] = release.problems["listed_but_missing"]
    assert missing.endswith(first.name)
    assert len(release.frame) == len(whole.frame) - 1
    for path in others:
        path.unlink()
    with pytest.raises(EmonbError, match="no readable picture; put them where the release has them"):
        bring(form, source, tmp_path / "out")
    with pytest.raises(EmonbError) as caught:
        read_release(form, make_tree(tmp_path / "pets"))
    assert f"pets: no {form} release: it is made of {resource('releases.yaml')[form]['made_of']}" in str(caught.value)


def test_a_list_cannot_lead_out_of_the_release_and_odd_characters_are_escaped(tmp_path):
    source = made.emoset(tmp_path / "src")
    paint(tmp_path / "secret.jpg", (1, 1, 1), 0)
    (source / "loop.jpg").symlink_to("loop.jpg")
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "nul\0.jpg", "loop.jpg", "image/awe/\udcff\ud800.jpg"]
    rows = json.loads((source / "val.json").read_text()) + [["awe", name, "annotation/\udcff.json"] for name in names]
    (source / "val.json").write_text(json.dumps(rows))
    (source / "annotation/fear/fear_test_00000.json").write_text(r'{"scene": "\ud800", "object": [1, null]}')
    frame, report, _ = bring("emoset", source, tmp_path / "out")
    assert report["problems"]["listed_but_missing"] == sorted([*names[:4], r"image/awe/\udcff\ud800.jpg"])
    row = frame.set_index("image_id").loc["image/fear/fear_test_00000.jpg"]
    assert (row["scene"], list(row["objects"])) == (r"\ud800", ["1", "None"])


def test_emotion6_has_the_folder_s_label_and_the_raters_and_its_name_chooses(tmp_path):
    source = made.emotion6(tmp_path / "src")
    with (source / "ground_truth.txt").open("a") as file:
        file.write("joy/cut.jpg\t4.5")
    frame, report, _ = bring("emotion6", source, tmp_path / "out")
    odd = ["fear/tie.jpg", "joy/neutral.jpg"]
    assert report["problems"] == {"raters_differ": odd, "tied_label": odd[:1], "neutral_dominant": odd[1:]}
    rows = frame.set_index("image_id")
    assert len(rows) == report["found"]["total"] == 62
    assert rows.loc[[*odd, "anger/1.jpg"], "label_majority"].tolist() == ["anger", "sadness", "anger"]
    assert rows["label"].equals(rows["label_folder"].rename("label"))
    assert rows.loc[odd, "label"].tolist() == ["fear", "joy"]
    raters, *_ = bring("emotion6", source, tmp_path / "out", name="emotion6-majority")
    assert raters["label"].equals(raters["label_majority"].rename("label"))
    assert rows.loc["anger/1.jpg", ["share_anger", "valence"]].tolist() == [0.7, 4.5]
    assert list(report["counts"]["train"]) == list(EKMAN)


def test_fi_s_placeholders_are_left_out_before_the_split(tmp_path):
    tree = made.fi(tmp_path / "src") / "emotion_dataset"
    shutil.copy(tree / "anger" / "0.jpg", tree / "anger" / "copy.jpg")  # two under one emotion are none
    for i in range(5):  # what would be told of a picture that is kept is not of these
        Image.new("L", (40, 30), 99).save(tree / "awe" / f"removed{i}.jpg")
    frame, report, lines = bring("fi", tmp_path / "src", tmp_path / "out")
    left = [*(f"awe/removed{i}.jpg" for i in range(5)), "fear/both.jpg", "sadness/both.jpg"]
    assert report["problems"] == {"placeholder": left, "duplicate": ["anger/0.jpg", "anger/copy.jpg"]}
    assert not set(left) & set(frame["image_id"])
    assert len(frame) == 81
    assert "  total: 88 in the release, officially about 23,000" in lines


def test_oasis_themes_stay_together_and_the_middle_is_counted(tmp_path):
    source = made.oasis(tmp_path / "src")
    (source / "images" / "Theme a 2.jpg").rename(source / "images" / "Theme a 2 .jpg")  # the space in the file's name
    table = pd.read_csv(source / "OASIS.csv")
    table.loc[4, "Valence_mean"] = None
    table.to_csv(source / "OASIS.csv", index=False)
    frame, report, _ = bring("oasis", source, tmp_path / "out")
    assert report["problems"] == {"ambiguous_valence_left_out": ["images/Theme b 2.jpg", "images/Wall 1.jpg"]}
    assert frame.groupby("caption")["split"].nunique().max() == 1
    assert frame["label"].value_counts().to_dict() == {"positive": 29, "negative": 30}
    assert report["found"] == {"total": 61}


def test_odd_names_in_a_table_are_text(tmp_path):
    source, names = make_release("bass", tmp_path / "src"), ["007", "None", "nan", "../middle.png", "nul\\udcff.png"]
    with (source / "BASS_data.csv").open("a", encoding="utf-8") as file:
        file.write("".join(f"{name},8.0,\n,,\n" for name in names))
    release = read_release("bass", source)
    assert release.problems["listed_but_missing"] == names
    assert len(release.frame) == 60


def test_recognition_of_what_looks_alike(tmp_path):
    source, lists = make_tree(tmp_path / "src"), made.emoset(tmp_path / "emoset")
    (source / "info.json").write_text("{}")  # may lie anywhere
    for split in ("train", "val", "test"):
        (lists / f"{split}.json").unlink()
    tree = made.fi(tmp_path / "fi") / "emotion_dataset"  # FI's bare folders are recognised by the dataset's name
    found = recognise(source), recognise(lists), recognise(tree, "fi"), recognise(tree, "pets")
    assert found == ("folder", "emoset", "fi", "folder")
    with pytest.raises(EmonbError, match=r"none of train\.json, val\.json, test\.json"):
        read_release("emoset", lists)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    closed, whole = make_tree(tmp_path / "src") / "train" / "positive", Path.iterdir

    def refuse(self):  # played: root may read everything
        if self == closed:
            raise PermissionError(13, "Permission denied", str(closed))
        return whole(self)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(EmonbError, match=r"train/positive: cannot be read \(Permission denied\); give yourself"):
        bring("folder", tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out" / "src").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "a/b"}, "--name 'a/b'"),
        ({"name": "a__b"}, "--name 'a__b'"),
        ({"name": "mini-fi"}, "none of the drawn ones"),
        ({"name": "taken"}, "holds mine.txt and nothing of emonb; choose a new or empty folder with --name or --out"),
        ({"out": "src/images"}, "lies in the source"),
        ({"out": "file/below"}, "cannot write"),
    ],
)
def test_names_and_folders_that_cannot_be_used(tmp_path, options, words):
    source = make_tree(tmp_path / "src")
    (tmp_path / "file").touch()
    (tmp_path / "out" / "taken").mkdir(parents=True)
    (tmp_path / "out" / "taken" / "mine.txt").touch()
    before = state(tmp_path)
    with pytest.raises(EmonbError, match=words):
        bring("flickr", source, tmp_path / options.get("out", "out"), name=options.get("name", ""))
    assert state(tmp_path) == before
    no_text = source.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(EmonbError, match=r"caf\\udce9: this folder's name is not valid UTF-8; rename it"):
        bring("flickr", no_text, tmp_path / "out")


def test_an_error_leaves_nothing_and_an_earlier_import_and_foreign_files_stay(tmp_path):
    source, folder = make_tree(tmp_path / "src"), tmp_path / "out" / "flickr"
    bring("flickr", source, tmp_path / "out")
    before = state(folder)
    shutil.rmtree(source / "test" / "negative")
    for name in ("", "new"):
        with pytest.raises(EmonbError, match="split 'test'"):
            bring("flickr", source, tmp_path / "out", name=name)
    assert state(folder) == before
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["flickr"]
    paint(source / "test" / "negative" / "new.jpg", (9, 9, 9), 1)
    (folder / "my notes.txt").write_text("keep me")
    assert len(bring("flickr", source, tmp_path / "out")[0]) == 13
    assert (folder / "my notes.txt").read_text() == "keep me"


def test_a_killed_import_harms_nothing_and_the_next_one_works(tmp_path):
    source, out = make_tree(tmp_path / "src"), tmp_path / "out"
    code = (
        "import sys, os, pathlib, emonb.releases.imports as i\n"  # killed with all written but the table
        "i.parquet.write_table = lambda *table, **options: os.kill(os.getpid(), 9)\n"
        "i.import_release('flickr', *map(pathlib.Path, sys.argv[1:]))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(source), str(out)], cwd=ROOT).returncode == -9
    assert len(read_samples(stage(out, "flickr", tmp_path / "run").path)) == 14
    assert len(bring("flickr", source, out)[0]) == 14


def test_a_run_reads_the_release_as_it_is_now_and_what_to_type_is_quoted(tmp_path):
    source, out = make_tree(tmp_path / "a; release"), tmp_path / "my images"
    (tmp_path / "elsewhere").mkdir()
    (source / "train").rename(tmp_path / "elsewhere" / "Train")  # a linked folder, in capitals, with a loop in it
    (source / "Train").symlink_to(tmp_path / "elsewhere" / "Train")
    (source / "Train" / "up").symlink_to(tmp_path / "elsewhere")
    _, report, lines = bring("flickr", source, out)
    assert report["counts"]["train"] == {"positive": 3, "negative": 3}
    assert lines[-1] == f"next: make reproduce DATASETS=flickr IMAGES='{out}'"
    file = out / "flickr" / "import.json"  # with fields that earlier versions wrote
    file.write_text(json.dumps({**json.loads(file.read_text()), "pictures": str(source), "listing": "0" * 16}))
    before = listing_digest(out / "flickr")
    assert len(read_samples(stage(out, "flickr", tmp_path / "run").path)) == 14
    paint(tmp_path / "elsewhere" / "Train" / "positive" / "new.jpg", (9, 9, 9), 1)
    assert listing_digest(out / "flickr") != before
    assert len(read_samples(stage(out, "flickr", tmp_path / "run").path)) == 15
    source.rename(tmp_path / "moved")
    with pytest.raises(
        EmonbError, match=r"flickr/import\.json: its source .*a; release: no such folder; move it back"
    ):
        stage(out, "flickr", tmp_path / "run")


OURS = [
    ("samples.parquet", b"PAR1 cut", r"samples\.parquet: damaged \("),
    ("meta.json", b"{}", r"meta\.json: field 'root' missing"),
    ("meta.json", "{'f\xfcr'".encode("latin-1"), r"meta\.json: cannot be read as JSON "),
    ("import.json", b'{"source": "x"', r"import\.json: cannot be read as JSON "),
    ("import.json", b"[]", r"import\.json: field 'source' missing or no text"),
    ("import.json", b'{"source": 1}', r"import\.json: field 'source' missing or no text"),
    ("import.json", b'{"source": "x", "format": "f"}', r"import\.json: field 'format' is 'f', none of emoset, "),
    ("import.json", b'{"source": "x", "format": "fi", "reading": {"x": 1}}', r"import\.json: field 'reading': "),
    ("import.json", b'{"source": "x", "format": "fi", "reading": {"names": 1}}', r"import\.json: field 'reading': "),
    ("import.json", b'{"source": "x", "format": "fi", "reading": {"classes": 3}}', "field 'reading': classes: "),
    ("import.json", b'{"source": "x", "format": "fi", "reading": {"classes": "ab"}}', "field 'reading': classes: "),
    ("import.json", b'{"source": "x", "format": "fi", "reading": {"names": {"a": 3}}}', "'reading': names.a: "),
    ("import.json", b'{"source": "x", "format": "fi", "reading": null}', "field 'reading': "),
]


@pytest.mark.parametrize(("file", "content", "words"), OURS)
def test_a_damaged_file_of_ours_is_named_with_its_remedy(tmp_path, file, content, words):
    bring("flickr", make_tree(tmp_path / "src"), tmp_path / "out")
    made, imported = stage(tmp_path / "out", "flickr", tmp_path / "run").path, tmp_path / "out" / "flickr"
    read, folder, remedy = read_samples, made, "delete .* and run again"
    if file == "import.json":
        read, folder, remedy = listing_digest, imported, "delete that folder and import again"
    (folder / file).write_bytes(content)
    with pytest.raises(EmonbError, match=f"{words}.*; {remedy}"):
        read(folder)


def test_what_is_known_about_each_release():
    facts = resource("releases.yaml")
    with pytest.raises(EmonbError, match="format 'emoset2': unknown; use one of emoset, "):
        read_release("emoset2", Path())
    assert {*facts} == {*READERS} - {"folder", "list"}
    assert all({"title", "cite", "made_of", "licence"} <= {*row} for row in facts.values())


# ---- other people's folders and lists -------------------------------------------------------------------------------

ALL = {"train": 3, "val": 2, "test": 1}


@pytest.mark.parametrize(
    "names",
    [("train", "validation", "test"), ("Training", "valid", "TESTING"), ("train_set", "dev", "test images"),
     ("my.zip/data/train", "my.zip/data/val", "my.zip/data/test")],
)  # fmt: skip
def test_split_folders_by_their_usual_names_and_a_level_deeper(tmp_path, names):
    make_tree(tmp_path / "src", dict(zip(names, ALL.values(), strict=True)))
    frame, report, lines = bring("folder", tmp_path / "src", tmp_path / "out")
    assert frame["split"].value_counts().to_dict() == {split: 2 * n for split, n in ALL.items()}
    assert report["problems"] == {}
    assert ("  dev/ is read as val" in lines) == ("dev" in names)
    assert (split_of("trainset", {}), split_of("labels_train", {})) == ("train", "train")
    assert split_of("x", {}) is split_of("retrain", {}) is None


def test_emotions_above_splits_and_pictures_in_folders_below_an_emotion(tmp_path):
    for split, n in ALL.items():
        for i in range(n):
            for emotion in PAIR:
                paint(tmp_path / "a" / emotion / split / f"{i}.jpg", (9, 9, 9), i)
                paint(tmp_path / "b" / split / emotion / f"album {i}" / "x.JFIF.jpg", (9, 9, 9), i)
    for name in ("a", "b"):
        frame, *_ = bring("folder", tmp_path / name, tmp_path / "out")
        assert frame.groupby(["split", "label"]).size().to_dict() == {(s, e): n for s, n in ALL.items() for e in PAIR}


@pytest.mark.parametrize(
    ("sizes", "words", "way"),
    [
        ({"train": 3, "eval": 2, "test": 1}, "'eval' the val or the test split", "eval=val"),
        ({"train": 3, "val": 2, "test": 1, "holdout 2": 1}, "is holdout 2/ a split", "holdout 2="),
        ({"train": 3, "val": 2, "dev": 2, "test": 1}, "is dev/ or val/ val", "dev="),
        ({"": 3, "positive/train": 1}, "is train/ a split or an album", ""),
        ({"a/train": 3, "a/test": 2, "b/train": 1}, "is the emotion 'a' or 'negative'", ""),
        ({"train/negative": 3, "test/negative": 1}, "is the emotion 'negative' or 'negative' below it", ""),
        (
            {"train2017": 3, "val2017": 2, "test2017": 1},
            "'test2017' or 'negative' below",
            "test2017=test,train2017=train,val2017=val",
        ),
        ({"01_train": 3, "02-dev": 2, "x test": 1}, "of splits, with --map", "01_train=train,02-dev=val,x test=test"),
        ({"fold1": 3, "fold2": 2, "fold3": 1}, "fold1=SPLIT,fold2=SPLIT", "fold1=train,fold2=val,fold3=test"),
    ],
)
def test_folders_that_can_be_read_in_two_ways_are_refused_until_told(tmp_path, sizes, words, way):
    make_tree(tmp_path / "src", sizes)
    with pytest.raises(EmonbError, match=words):
        bring("folder", tmp_path / "src", tmp_path / "out")
    if way:
        bring("folder", tmp_path / "src", tmp_path / "out", reading=Reading(own_names([way])))
        table = read_samples(stage(tmp_path / "out", "src", tmp_path / "run").path)  # a run reads it the same way
        assert table["split"].value_counts().to_dict() == {"train": 6, "val": 4, "test": 2}


def test_what_machines_leave_behind_is_passed_over_and_counted(tmp_path):
    root = make_tree(tmp_path / "src", {"": 10})
    made = ["__MACOSX/positive/._0.jpg", "@eaDir/0.jpg", "$RECYCLE.BIN/0.jpg", "System Volume Information/x",
            ".ipynb_checkpoints/0-checkpoint.jpg", "lost+found/0.jpg", "positive/Thumbs.db", "positive/@eaDir/S.jpg",
            "positive/desktop.ini", "positive/._1.jpg", ".DS_Store"]  # fmt: skip
    for name in made:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    frame, report, lines = bring("folder", root, tmp_path / "out")
    assert len(frame) == 20
    assert {*report["problems"]} == {"leftover"}
    assert any(line.startswith(f"  leftover: {len(made)} (left out) ") for line in lines)


@pytest.mark.parametrize(
    ("found", "labels"),
    [
        ([f"{i}_{label}" for i, label in enumerate(MIKELS)], MIKELS),
        ([f"{i:02}. {label.upper()} " for i, label in enumerate(EKMAN)], EKMAN),
        (["sadness", "joy", "anger"], EKMAN),
        (["awe", "fear"], MIKELS),
    ],
)
def test_class_names_with_numbers_case_and_blanks(found, labels):
    read, order = read_classes(found, None, {}, "x")
    assert (order, {*read.values()} <= {*labels}, len({*read.values()})) == (labels, True, len(found))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (["happiness", "anger"], "--map 'happiness=joy'"),
        (["pos", "neg"], "--map 'neg=negative,pos=positive'"),
        (["0", "1"], "alphabetical order, as in Keras.* --map '0=negative,1=positive'"),
        ([*EKMAN, "neutral"], r"'neutral' is none of .*'neutral=' leaves it out.*--classes 'anger,.*neutral"),
        (["0.0", "1.0"], "alphabetical order, as in Keras.* --map '0.0=negative,1.0=positive'"),
        (["1", "2"], "--map '1=negative,2=positive'"),
    ],
)
def test_other_class_names_are_refused_with_a_way_that_works(found, words):
    with pytest.raises(EmonbError, match=words) as caught:
        read_classes(found, None, {}, "x")
    way = str(caught.value).split("--map '")[1].split("'")[0].replace("=CLASS", "=")
    assert {*read_classes(found, None, own_names([way]), "x")[0]} == {*found}
    with pytest.raises(EmonbError, match=rf"--map 'hapy=joy': no class has that name; there are {sorted(found)[0]}, "):
        read_classes(found, None, own_names(["hapy=joy", "afraid=fear,x=joy"]), "x")  # always the first


@pytest.mark.parametrize(
    ("found", "fixed", "words", "way"),
    [
        (
            ["0", "1"],
            ("zebra", "ant"),
            "the order given.* --map '0=zebra,1=ant'; or .*Keras.* '0=ant,1=zebra'",
            "0=zebra,1=ant",
        ),
        (["0.0", "1.0"], ("zebra", "ant"), "--map '0.0=zebra,1.0=ant'; or ", "0=zebra,1=ant"),
        (["3 stars", "4 stars"], None, "--classes a,b,c and a --map of each", "3 stars=joy,4 stars=fear"),
        (["a|b", "c\x1b[31m"], None, r"'c\\x1b\[31m' is none of .* --classes a,b,c and", "a|b=joy,c\x1b[31m=fear"),
        (["joy, calm", "fear"], None, "rename 'joy, calm': neither --map nor --classes takes", ""),
    ],
)
def test_a_taxonomy_is_only_advised_where_it_would_be_taken(found, fixed, words, way):
    with pytest.raises(EmonbError, match=words) as caught:
        read_classes(found, fixed, {}, "x")
    assert str(caught.value).isprintable()
    if way:
        assert len(read_classes(found, fixed, own_names([way]), "x")[0]) == len(found)


@pytest.mark.parametrize("given", ["pos=positive,pos=negative", "Pos=positive,pos=", "=joy", "a=b=c", "pos:positive"])
def test_maps_that_say_nothing_or_two_things_are_refused(given):
    with pytest.raises(EmonbError, match="--map '"):
        own_names([given])
    with pytest.raises(EmonbError, match="--map leaves out every class"):
        read_classes(["pos", "neg"], None, own_names(["pos=,neg=", "pos="]), "x")


@pytest.mark.parametrize(
    "text", ["image_file,caption\nTrain/Awe/0.JPG,a hill\n1.png,\n", "id,image_file,caption\nI7|0.jpg|a hill\n"]
)
def test_captions_beside_the_pictures_are_what_the_annotator_reads(tmp_path, text):
    source = make_tree(tmp_path / "src", {"train": 2, "val": 1, "test": 1}, ("awe", "fear"))
    (source / "captions.csv").write_text(text)
    release = read_release("folder", source)
    (source / "labels.csv").write_text("path,label\ntrain/awe/0.jpg,awe\n")
    assert [*read_release("list", source / "labels.csv").frame["caption"]] == ["a hill"]
    said = release.frame.set_index("path")["caption"]
    told = said[said != ""]
    wanted = ["train/awe/0.jpg"] if "Train" in text else [path for path in said.index if path.endswith("/0.jpg")]
    assert sorted(told.index) == sorted(wanted)
    assert {*told} == {"a hill"}
    assert f"captions.csv: captions of {len(wanted)} of {len(said)} pictures" in release.notes
    (source / "captions.csv").write_text("caption\na hill\n")
    with pytest.raises(EmonbError, match=r"captions\.csv: columns caption; one must be path or image"):
        read_release("folder", source)


def test_an_own_taxonomy_and_missing_classes_only_when_told(tmp_path):
    source = make_tree(tmp_path / "src", ALL, ("Calm_sea", "1 wild"))
    with pytest.raises(EmonbError, match="--classes 'wild,calm sea'"):
        bring("folder", source, tmp_path / "out")
    own = ["wild", "calm sea"]
    made = stage(tmp_path, "src", tmp_path / "run", classes={"src": own})
    assert read_samples(made.path).attrs["labels"] == own
    (source / "classes.txt").write_text("0 calm sea\nwild\n", encoding="utf-16")
    assert list(bring("folder", source, tmp_path / "out")[1]["counts"]["test"]) == ["calm sea", "wild"]
    (source / "classes.txt").unlink()
    for text in ("# mine\n\n wild\ncalm sea\n", "wild, calm sea\n", "wild 0\ncalm sea 1\n"):
        (source / "Classes.TXT").write_text(text)
        _, report, _ = bring("folder", source, tmp_path / "out")
        assert (list(report["counts"]["test"]), report["problems"]) == (["wild", "calm sea"], {})
    (source / "classes.txt").write_text("wild\nwild\n")
    with pytest.raises(EmonbError, match=r"Classes\.TXT or classes\.txt\? Remove one"):
        bring("folder", source, tmp_path / "out")
    (source / "Classes.TXT").unlink()
    with pytest.raises(EmonbError, match=r"classes\.txt: 'wild' is there twice"):
        bring("folder", source, tmp_path / "out")
    seven = make_tree(tmp_path / "seven", ALL, MIKELS[:7])
    with pytest.raises(EmonbError, match=r"no picture of sadness in any split; .*--allow-missing-class"):
        bring("folder", seven, tmp_path / "out")
    _, report, lines = bring("folder", seven, tmp_path / "out", reading=Reading(allow_missing_class=True))
    assert list(report["counts"]["val"]) == [*MIKELS[:7]]
    assert "  without sadness: not comparable with results of all classes" in lines
    eight = make_tree(tmp_path / "eight", ALL, MIKELS)
    for split in ("test", "train"):
        shutil.rmtree(eight / split / "awe")
        with pytest.raises(EmonbError, match=rf"split '{split}' .* has none of awe; .*--allow-missing-class"):
            bring("folder", eight, tmp_path / "out", reading=Reading(allow_missing_class=split == "train"))
        if split == "test":
            _, report, lines = bring("folder", eight, tmp_path / "out", reading=Reading(allow_missing_class=True))
            assert report["counts"]["test"]["awe"] == 0
            assert "  test has none of awe: it says nothing of them" in lines


def test_the_command_takes_maps_classes_and_a_list_s_file(tmp_path):
    make_tree(tmp_path / "src", {"": 10}, ("happy", "angry", "none"))
    make = ["data", "import", "folder", str(tmp_path / "src"), "--out", str(tmp_path / "out")]
    given = "--classes anger,joy --map happy=joy,angry=anger --map none= --max-unreadable 0"
    assert CliRunner().invoke(app, [*make, *given.split()]).exit_code == 0
    table = read_samples(stage(tmp_path / "out", "src", tmp_path / "run").path)
    assert (table.attrs["labels"], len(table)) == (["anger", "joy"], 20)
    listed(tmp_path / "list")
    make[2:4] = ["list", str(tmp_path / "list" / "labels.csv")]
    assert CliRunner().invoke(app, make).exit_code == 0
    assert len(read_samples(stage(tmp_path / "out", "labels", tmp_path / "run").path)) == 72


def by_split(write):
    return lambda table, root: [write(rows, root, split) for split, rows in table.groupby("split")]


LISTS = {
    "as Excel writes it": lambda t, r: (r / "a.csv").write_text("sep=;\n" + t.to_csv(sep=";", index=False), "utf-16"),
    "with a BOM and tabs": lambda t, r: t.to_csv(r / "a.tsv", sep="\t", encoding="utf-8-sig"),
    "parquet": lambda t, r: t.assign(size=3).to_parquet(r / "a.parquet"),
    "backslashes": lambda t, r: t.assign(path=t["path"].str.replace("/", "\\")).to_csv(r / "a.csv"),
    "another machine's": lambda t, r: t.assign(path="C:\\Users\\me\\set\\" + t["path"]).to_csv(r / "a.csv"),
    "another case": lambda t, r: t.assign(path="./" + t["path"].str.upper()).to_csv(r / "a.csv"),
    "names alone": lambda t, r: t.assign(path=t["path"].str.removeprefix("photos/")).to_csv(r / "a.csv"),
    "no endings": lambda t, r: t.assign(id=t["path"].str[7:-4], file_id=0).drop(columns="path").to_csv(r / "a.csv"),
    "a list a split": by_split(lambda t, r, s: t[["path", "label"]].to_csv(r / f"{s}_labels.csv")),
    "other columns": lambda t, r: t.set_axis(["Filename", "Emotion", "Subset"], axis=1).to_csv(r / "a.csv"),
    "Latin-1": lambda t, r: (r / "a.csv").write_text(t.assign(note="für").to_csv(), "latin-1"),
    "packed": lambda t, r: t.to_csv(r / "a.csv.gz"),
    "JSON lines": lambda t, r: (r / "a.ndjson").write_text(
        "\r\n".join(row.to_json(force_ascii=False) for _, row in t.assign(caption="a\u2028b\x85c").iterrows())
    ),
    "an index": lambda t, r: t.astype({"label": "category"}).set_index("path").to_parquet(r / "a.parquet"),
    "a column twice": lambda t, r: t.assign(emotion=t["label"].str.upper(), set=t["split"]).to_csv(r / "a.csv"),
    "among other tables": lambda t, r: [
        t.to_csv(r / "a.csv"), t.drop(columns="label").to_csv(r / "metadata.csv"), (r / "notes.csv").touch(),
        (r / "captions.csv").write_text("image,caption\nx,y\n"), (r / "._train.csv").write_bytes(b"\0\5")
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", LISTS)
def test_lists_as_people_have_them(tmp_path, kind):
    source = listed(tmp_path / "src", LISTS[kind])
    assert recognise(source) == "list"
    frame, report, _ = bring("list", source, tmp_path / "out")
    assert frame.groupby(["split", "label"]).size().to_dict() == {(s, e): 3 for s in ALL for e in MIKELS}
    assert report["problems"] == {}
    assert frame["image_id"].str.fullmatch(r"photos/\w+\.jpg").all()
    passed = [note for note in report["notes"] if "passed over: " in note]
    assert len(passed) == 2 * (kind == "among other tables")
    assert all("metadata.csv: no column for the label" in n or "notes.csv: cannot be read" in n for n in passed)


SPOILT = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "cannot be read as a table": lambda file: file.write_bytes(b""),
    "it is a web page": lambda file: file.write_text("<!DOCTYPE html><title>Quota</title>"),
    "no column for the label in path, klass": lambda file: file.write_text("path,klass\nphotos/val00.jpg,awe\n"),
    "holds no row": lambda file: file.write_text("path,label\n"),
    "no regular file": lambda file: [file.unlink(), file.symlink_to("gone")],
    "none of those it should have": lambda file: file.write_text("path,label\nphotos/gone.jpg,awe\n"),
}
WRITERS = {"csv": pd.DataFrame.to_csv, "parquet": pd.DataFrame.to_parquet,
           "jsonl": lambda rows, file: rows.to_json(file, orient="records", lines=True)}  # fmt: skip


@pytest.mark.parametrize(("ending", "how"), [*(("csv", how) for how in SPOILT if how != "cut"), ("jsonl", "cut"),
                                             ("parquet", "cut")])  # fmt: skip
@pytest.mark.parametrize("place", ["{}.", "labels_{}.", "{}/metadata."])
def test_a_split_whose_list_is_spoilt_is_never_made_anew(tmp_path, ending, how, place):
    def write(table, root):
        for split, rows in table.groupby("split"):
            file = root / (place.format(split) + ending)
            file.parent.mkdir(exist_ok=True)
            WRITERS[ending](rows[["path", "label"]].reset_index(drop=True), file)

    source = listed(tmp_path / "src", write, n=1)
    assert read_release("list", source).frame["split"].value_counts().to_dict() == {"train": 8, "val": 8, "test": 8}
    SPOILT[how](source / (place.format("val") + ending))
    words = "cannot be read as a table" if how == "cut" else how
    with pytest.raises(EmonbError, match=rf"{place.format('val')}{ending}: .*{words}|'val' .* {words}") as caught:
        bring("list", source, tmp_path / "out")
    if "leave it out: --map '" in str(caught.value):
        way = str(caught.value).split("--map '")[1].removesuffix("'")
        left = read_release("list", source, own_names([way]))
        assert {*left.frame["split"]} == {"train", "test"}
        assert any("val" in note for note in left.notes)


AWE = "path,label\nphotos/val00.jpg,awe\n"
TWO_WAYS = {
    r"a\.csv or b\.csv\? Give the one": {"a.csv": AWE, "b.csv": AWE},
    "path in column 'image' or 'file'": {"a.csv": "image,file,label\nx,y,awe\n"},
    "'photos/val00.jpg' is 'awe' as well as 'fear'": {"a.csv": AWE + "photos/val00.jpg,fear\n"},
    "split 'later' is none of train": {"a.csv": "path,label,split\nphotos/val00.jpg,awe,later\n"},
    "no column for the label in path, what": {"a.csv": "path,what\nphotos/val00.jpg,awe\n"},
    "cannot be read as a table": {"a.csv": "path,label\na.jpg,awe,1,2\n"},
    "label in column 'label' or 'label.1' .such as 'awe' or 'fear'": {"a.csv": "path,label,label\nx,awe,fear\n"},
    "label in column 'label' or 'class'": {"a.csv": "path,label,class\nx,awe,fear\n"},
    "path in column 'path' or 'path.1'": {"a.csv": "path,path,label\nx,y,awe\n"},
    "split in column 'split' or 'set'": {"a.csv": "path,label,split,set\nx,awe,val,test\n"},
    r"a\.csv: holds no row": {"a.csv": "path,label,split\n"},
    r"a\.csv: no column for the path in PK\\x03\\x04": {"a.csv": "PK\3\4\x1b[31m\nx"},
    r"no column for the path in \\x1b\[31m": {"a.csv": "\x1b[31m,label\nx,y\n"},
    r"split 'tr\\x1b\[31m' is none of train": {"a.csv": "path,label,split\nx,awe,tr\x1b[31m\n"},
    r"line 3 column \d+": {"a.jsonl": '{"path": "a", "label": "awe"}\n' * 2 + '{"path": "b", "la'},
    r"train\.csv tells its split, sample_submission\.csv does not; .*--map 'sample_submission='": {
        "train.csv": AWE, "sample_submission.csv": "id,label\n1,awe\n"},
}  # fmt: skip


@pytest.mark.parametrize("words", TWO_WAYS)
def test_lists_that_contradict_themselves_are_refused(tmp_path, words):
    source, lists = listed(tmp_path / "src", lambda table, root: None), TWO_WAYS[words]
    for name, text in lists.items():
        (source / name).write_text(text)
    with pytest.raises(EmonbError, match=words):
        read_release("list", source / name if len(lists) == 1 else source)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.csv", r"gone\.csv: no such list or folder; give a file"),
        ("a.xlsx", r"a\.xlsx: no list by its ending; save it as \.csv"),
        ("a.json", r"a\.json: no list by its ending"),
        ("", r"no list of paths and labels; save yours as \.csv"),
    ],
)
def test_what_is_no_list_by_its_ending(tmp_path, name, words):
    for other in ("a.xlsx", "a.json", "classes.txt"):
        (tmp_path / other).write_bytes(b"PK\3\4\x1b[31m")
    with pytest.raises(EmonbError, match=words):
        read_release("list", tmp_path / name)


def test_rows_that_are_there_twice_and_rows_without_a_label_are_counted_once(tmp_path):
    def write(table, root):
        pd.concat([table, table[:4], table[:1].assign(path="x.jpg", label="")]).to_csv(root / "a.csv")

    _, report, lines = bring("list", listed(tmp_path / "src", write), tmp_path / "out")
    assert {kind: len(ids) for kind, ids in report["problems"].items()} == {"no_label": 1, "listed_twice": 4}
    assert "  left out: 1 of 73 pictures (1.4%)" in lines


def test_a_list_beside_folders_of_emotions_is_no_list_unasked(tmp_path):
    make_tree(tmp_path / "src", ALL)
    (tmp_path / "src" / "labels.csv").write_text("path,label\ntrain/positive/0.jpg,negative\n")
    with pytest.raises(EmonbError, match=r"the list labels\.csv and folders such as"):
        recognise(tmp_path / "src")
    assert len(bring("folder", tmp_path / "src", tmp_path / "out")[0]) == 12
    with pytest.raises(EmonbError, match=r"such as '0\.jpg', lie in test/negative/ or test/positive/\? Write"):
        located(["0.jpg"], tmp_path / "src")


REWRITTEN = {
    "in UTF-16 with a BOM": (lambda rows: rows, "utf-16"),
    "with a BOM": (lambda rows: rows, "utf-8-sig"),
    "with numbers": (lambda rows: [[MIKELS.index(row[0]), *row[1:]] for row in rows], "utf-8"),
    "in capitals, from Windows": (
        lambda rows: [[f" {row[0].title()}", *(rf"D:\set\{x}".replace("/", "\\") for x in row[1:])] for row in rows],
        "utf-8",
    ),
}


@pytest.mark.parametrize("how", REWRITTEN)
def test_emosets_lists_saved_again(tmp_path, how):
    source = made.emoset(tmp_path / "deeper" / "EmoSet-118K")
    as_released, (change, encoding) = read_release("emoset", source).frame, REWRITTEN[how]
    for split in ALL:
        rows = change(json.loads((source / f"{split}.json").read_text()))
        (source / f"{split}.json").write_text(json.dumps(rows), encoding=encoding)
    assert recognise(source.parent) == "emoset"
    assert read_release("emoset", source.parent).frame.equals(as_released)


def test_a_table_with_semicolons_and_decimal_commas(tmp_path):
    source = make_release("bass", tmp_path / "src")
    whole, file = read_release("bass", source).frame, source / "BASS_data.csv"
    file.write_text(file.read_text().replace(",", ";").replace("; ", ", ").replace(".0", ",0"), "utf-16")
    assert read_release("bass", source).frame.equals(whole)
