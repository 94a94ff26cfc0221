"""Every format of a release is read, recognised and imported; wrong folders give one clear error."""

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
from release_folders import bring, make_release, make_tree, paint, stage, state

from emonb.data import read_samples
from emonb.errors import EmonbError
from emonb.files import resource
from emonb.releases import READERS, read_release, recognise
from emonb.releases.imports import listing_digest


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
    assert list(report["counts"]["test"]) == list(made.MIKELS)
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
    assert list(report["counts"]["train"]) == list(made.EKMAN)


def test_fi_s_placeholders_are_left_out_before_the_split(tmp_path):
    tree = made.fi(tmp_path / "src") / "emotion_dataset"
    shutil.copy(tree / "anger" / "0.jpg", tree / "anger" / "copy.jpg")  # two under one emotion are none
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
    with pytest.raises(EmonbError, match=r"a; release: no such folder"):
        stage(out, "flickr", tmp_path / "run")


OURS = [
    ("samples.parquet", b"PAR1 cut", r"samples\.parquet: damaged \("),
    ("meta.json", b"{}", r"meta\.json: field 'root' missing"),
    ("meta.json", "{'f\xfcr'".encode("latin-1"), r"meta\.json: cannot be read as JSON "),
    ("import.json", b'{"source": "x"', r"import\.json: cannot be read as JSON "),
    ("import.json", b"[]", r"import\.json: field 'source' missing or no text"),
    ("import.json", b'{"source": 1}', r"import\.json: field 'source' missing or no text"),
    ("import.json", b'{"source": "x", "format": "fi", "reading": {"x": 1}}', r"import\.json: field 'reading': "),
    ("import.json", b'{"source": "x", "format": "fi", "reading": {"names": 1}}', r"import\.json: field 'reading': "),
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
