"""Room 01: every format of a release is read, recognised and imported; wrong folders give one clear error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pandas as pd
import pytest
from conftest import ROOT, emonb
from pipeline import paint
from release_folders import EKMAN, FORMS, MIKELS, emoset, emotion6, fi, make_release, oasis, sentiment

from emonb import data
from emonb.errors import EmonbError
from emonb.freshness import fingerprints
from emonb.imports import import_release
from emonb.releases import FORMATS, read_release, recognise, release_table
from emonb.settings import load_settings
from emonb.store import Store

LISTS = ROOT.parent / "shared" / "data" / "emoset-lists"


def bring(form, source, out, **options):
    """Import; returns the sample table, the report and the lines said."""
    lines = []
    folder = import_release(form, source, out, say=lines.append, **options)
    report = json.loads((folder / "integrity.json").read_text())
    return pd.read_parquet(folder / "samples.parquet"), report, lines


def stage(root, name, out):
    settings = load_settings("smoke", datasets=name, images=str(root), out=str(out))
    return data.samples_stage(settings, Store(settings.out_path / "artifacts"), name)


def tree_state(root):
    """Names, sizes and times of everything below a folder."""
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in root.rglob("*"))


@pytest.mark.parametrize("form", FORMS)
def test_an_imported_dataset_is_what_a_run_reads_directly(form, tmp_path):
    source = make_release(form, tmp_path / "direct" / "pets")
    before = tree_state(source)
    frame, report, _ = bring(form, source, tmp_path / "imported", name="pets")
    imported = data.read_samples(stage(tmp_path / "imported", "pets", tmp_path / "out1"))
    assert len(imported) == len(frame) > 0
    assert all(os.path.isfile(p) for p in imported["path"])
    counts = {s: {e: n for e, n in c.items() if n} for s, c in report["counts"].items()}
    assert counts == {s: Counter(g["label"]) for s, g in imported.groupby("split")}
    direct = data.read_samples(stage(tmp_path / "direct", "pets", tmp_path / "out2"))
    pd.testing.assert_frame_equal(imported, direct)
    assert recognise(source) == (form if form not in ("flickr", "instagram") else "folder")
    assert tree_state(source) == before
    assert not [p for p in (tmp_path / "imported").rglob("*") if p.suffix in (".jpg", ".png") or p.is_symlink()]


@pytest.mark.parametrize("with_id", [False, True])
def test_emoset_in_both_forms_of_rows(tmp_path, with_id):
    source = emoset(tmp_path / "src", with_id, {"train": 3, "val": 1, "test": 2})
    frame, report, lines = bring("emoset", source, tmp_path / "out")
    assert frame["split"].value_counts().to_dict() == {"train": 24, "test": 16, "val": 8}
    assert list(report["counts"]["test"]) == list(MIKELS)
    first = frame[frame["image_id"] == "image/awe/awe_train_00000.jpg"].iloc[0]
    assert list(first["objects"]) == ["Street light", "Dog"]
    assert tuple(first[["scene", "facial_expression", "human_action"]]) == ("dark street", "happy", "playing guitar")
    other = frame[frame["image_id"] == "image/fear/fear_train_00001.jpg"].iloc[0]
    assert list(other["objects"]) == []
    assert pd.isna(other["scene"])
    assert report["expected"] == {"total": 118_102, "train": 94_481, "val": 5_905, "test": 17_716, "about": False}
    assert report["found"] == {"total": 48, "train": 24, "val": 8, "test": 16}
    assert "  test: 16 in the release, officially 17716" in lines


def test_emoset_with_a_flat_info_and_without_annotations(tmp_path):
    source = emoset(tmp_path)
    (source / "info.json").write_text(json.dumps({"label2idx": {e: i for i, e in enumerate(MIKELS)}}))
    shutil.rmtree(source / "annotation")
    assert "objects" not in read_release("emoset", source).frame


def test_emoset_s_damaged_and_missing_annotations_are_reported(tmp_path):
    source = emoset(tmp_path)
    (source / "annotation/awe/awe_test_00000.json").write_text("{")
    (source / "annotation/fear/fear_test_00000.json").unlink()
    assert read_release("emoset", source).problems["annotation_missing"] == [
        "image/awe/awe_test_00000.jpg",
        "image/fear/fear_test_00000.jpg",
    ]


def test_emoset_without_train_list_only_when_told_and_never_in_a_run(tmp_path):
    source = emoset(tmp_path / "src")
    (source / "train.json").unlink()
    with pytest.raises(EmonbError, match=r"train\.json missing.*--allow-missing-split"):
        bring("emoset", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    frame, _, lines = bring("emoset", source, tmp_path / "out", allow_missing_split=True)
    assert set(frame["split"]) == {"val", "test"}
    assert "  no train: a run needs all splits and will refuse this dataset" in lines
    with pytest.raises(EmonbError, match=r"allow-missing-split, has no train"):
        stage(tmp_path / "out", "emoset", tmp_path / "run")


def test_a_missing_val_list_is_split_off_train(tmp_path):
    source = emoset(tmp_path / "src", sizes={"train": 10, "val": 1, "test": 1})
    (source / "val.json").unlink()
    frame, _, _ = bring("emoset", source, tmp_path / "out")
    assert frame["split"].value_counts().to_dict() == {"train": 72, "val": 8, "test": 8}


def test_a_picture_of_two_lists_counts_once_as_test(tmp_path):
    source = emoset(tmp_path / "src")
    train, test = (json.loads((source / f"{s}.json").read_text()) for s in ("train", "test"))
    (source / "train.json").write_text(json.dumps([*train, test[0]]))
    release = read_release("emoset", source)
    assert release.problems["listed_twice"] == [test[0][1]]
    assert release.frame.set_index("image_id").loc[test[0][1], "split"] == "test"
    assert release.frame["split"].tolist() == ["train"] * 16 + ["val"] * 8 + ["test"] * 8


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (["awe"], "row 1"),
        (["awe", 7, "a.json"], "row 1"),
        (["joy", "image/x.jpg", "a.json"], "an emotion of"),
        ("awe", "row 1"),
    ],
)
def test_a_damaged_list_names_its_row(tmp_path, row, words):
    source = emoset(tmp_path)
    (source / "val.json").write_text(json.dumps([row]))
    with pytest.raises(EmonbError, match=words) as caught:
        read_release("emoset", source)
    assert "val.json" in str(caught.value)


@pytest.mark.parametrize("form", ["emoset", "emotion6", "oasis", "bass"])
def test_absent_pictures_are_reported_until_they_are_more_than_half(form, tmp_path):
    source = make_release(form, tmp_path / "src")
    pictures = sorted(p for p in source.rglob("*") if p.suffix in (".jpg", ".png"))
    whole = read_release(form, source)
    pictures[0].unlink()
    release = read_release(form, source)
    [missing] = release.problems["listed_but_missing"]
    assert missing.endswith(pictures[0].name)
    assert len(release.frame) == len(whole.frame) - 1
    for path in pictures[1 : 2 * len(pictures) // 3]:
        path.unlink()
    with pytest.raises(EmonbError, match=r"\d+ of \d+ listed pictures are not there, such as"):
        read_release(form, source)


def test_a_list_cannot_lead_out_of_the_release(tmp_path):
    source = emoset(tmp_path / "src")
    paint(tmp_path / "secret.jpg", (1, 1, 1), 0)
    rows = json.loads((source / "val.json").read_text())
    rows += [["awe", "../secret.jpg", "a"], ["awe", str(tmp_path / "secret.jpg"), "a"], ["awe", "nul\0.jpg", "a"]]
    (source / "val.json").write_text(json.dumps(rows))
    assert len(read_release("emoset", source).problems["listed_but_missing"]) == 3


@pytest.mark.parametrize("header", [True, False])
def test_emotion6_labels_are_the_strongest_of_six(tmp_path, header):
    frame, report, _ = bring("emotion6", emotion6(tmp_path / "src", header), tmp_path / "out")
    assert report["problems"]["tied_label"] == ["fear/tie.jpg"]
    assert report["problems"]["neutral_dominant"] == ["joy/neutral.jpg"]
    rows = frame.set_index("image_id")
    assert rows.loc["fear/tie.jpg", "label"] == "anger"
    assert len(rows) == 62
    assert rows.loc["joy/neutral.jpg", "label"] == "sadness"
    assert rows.loc["anger/1.jpg", "label"] == "anger"
    assert rows.loc["anger/1.jpg", "share_anger"] == 0.7
    assert rows.loc["anger/1.jpg", "valence"] == 4.5
    assert list(report["counts"]["train"]) == list(EKMAN)
    assert report["found"] == {"total": 62}
    assert report["expected"]["total"] == 1980


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("anger/1.jpg\t1\t2\t0.5\t0.5", "row 1"),
        ("anger/1.jpg\t1\t2\t0.5\t0.5\t0\t0\t0\t0\tnan", "tab-separated"),  # no number at the end: a header
        ("anger/1.jpg\t1\t2\t7\t0.5\t0\t0\t0\t0\t0", "row 1 must have probabilities"),
        ("", "tab-separated"),
    ],
)
def test_a_damaged_ground_truth_names_its_row(tmp_path, line, words):
    source = emotion6(tmp_path)
    (source / "ground_truth.txt").write_text(line + "\n")
    with pytest.raises(EmonbError, match=words) as caught:
        read_release("emotion6", source)
    assert "ground_truth.txt" in str(caught.value)


def test_fi_s_placeholders_are_left_out_before_the_split(tmp_path):
    frame, report, lines = bring("fi", fi(tmp_path / "src"), tmp_path / "out")
    left = [*(f"awe/removed{i}.jpg" for i in range(5)), "fear/both.jpg", "sadness/both.jpg"]
    assert report["problems"] == {"placeholder": left}
    assert not set(left) & set(frame["image_id"])
    assert frame["split"].value_counts().to_dict() == {"train": 64, "val": 8, "test": 8}
    assert "  total: 87 in the release, officially about 23000" in lines


def test_two_copies_under_one_emotion_are_no_placeholder(tmp_path):
    tree = fi(tmp_path / "src") / "emotion_dataset"
    shutil.copy(tree / "anger" / "0.jpg", tree / "anger" / "copy.jpg")
    frame, _, _ = bring("fi", tmp_path / "src", tmp_path / "out")
    assert {"anger/0.jpg", "anger/copy.jpg"} <= set(frame["image_id"])


def test_sentiment_trees_without_splits_and_with_capital_letters(tmp_path):
    source = sentiment(tmp_path / "src", {"": 20})
    (source / "positive").rename(source / "Positive")
    frame, _, _ = bring("flickr", source, tmp_path / "out")
    assert frame.groupby(["split", "label"]).size().to_dict() == {
        (s, e): n for s, n in {"train": 16, "val": 2, "test": 2}.items() for e in ("positive", "negative")
    }


def test_oasis_themes_stay_together_and_the_middle_is_counted(tmp_path):
    source = oasis(tmp_path / "src")
    (source / "images" / "Theme a 2.jpg").rename(source / "images" / "Theme a 2 .jpg")  # the space in the file's name
    frame, report, _ = bring("oasis", source, tmp_path / "out")
    assert report["problems"] == {"ambiguous_valence_left_out": ["images/Wall 1.jpg"]}
    assert frame["caption"].nunique() == 30
    assert frame.groupby("caption")["split"].nunique().max() == 1
    assert frame["label"].value_counts().to_dict() == {"positive": 30, "negative": 30}
    assert report["found"] == {"total": 61}


def test_a_picture_without_rating_has_no_label(tmp_path):
    source = oasis(tmp_path)
    table = pd.read_csv(source / "OASIS.csv")
    table.loc[3, "Valence_mean"] = None
    table.to_csv(source / "OASIS.csv", index=False)
    assert read_release("oasis", source).problems["no_rating"] == ["images/Theme b 2.jpg"]


@pytest.mark.parametrize("form", [f for f in FORMS if f != "folder"])
def test_a_wrong_folder_says_what_is_needed_and_what_was_found(form, tmp_path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(EmonbError) as caught:
        read_release(form, tmp_path)
    words = [FORMATS[form].made_of, "'notes.txt', 'papers/'", str(tmp_path)]
    assert [w for w in words if w not in str(caught.value)] == []


def test_a_wrong_folder_leads_to_the_right_one(tmp_path):
    emotion6(tmp_path / "downloads" / "Emotion6")
    with pytest.raises(EmonbError, match=r"did you mean .*downloads/Emotion6\?"):
        read_release("emotion6", tmp_path / "downloads")
    with pytest.raises(EmonbError, match="this looks like emotion6"):
        read_release("fi", tmp_path / "downloads" / "Emotion6")
    with pytest.raises(EmonbError, match="format 'emoset2': unknown; use one of emoset, "):
        read_release("emoset2", tmp_path)
    with pytest.raises(EmonbError, match="no such folder"):
        read_release("fi", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "a/b"}, "--name 'a/b'"),
        ({"name": "mini-fi"}, "none of the drawn ones"),
        ({"name": "taken"}, "is there already and was not imported"),
        ({"out": "src/images"}, "lies in the source"),
        ({"out": "file/below"}, "cannot write"),
        ({"out": "src/.."}, None),
    ],
)
def test_names_and_folders_that_cannot_be_used(tmp_path, options, words):
    source = sentiment(tmp_path / "src")
    (tmp_path / "file").touch()
    (tmp_path / "out" / "taken").mkdir(parents=True)
    before = tree_state(tmp_path)
    arguments = (tmp_path / options.get("out", "out"),)
    if words is None:  # beside the source is fine
        bring("flickr", source, *arguments)
        return
    with pytest.raises(EmonbError, match=words):
        bring("flickr", source, *arguments, name=options.get("name", ""))
    assert tree_state(tmp_path) == before


def test_an_error_leaves_nothing_and_an_earlier_import_stays(tmp_path):
    source = sentiment(tmp_path / "src")
    bring("flickr", source, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out" / "flickr").iterdir()}
    shutil.rmtree(source / "test" / "negative")
    with pytest.raises(EmonbError, match="split 'test'"):
        bring("flickr", source, tmp_path / "out")
    with pytest.raises(EmonbError, match="split 'test'"):
        bring("flickr", source, tmp_path / "new")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out" / "flickr").iterdir()} == before
    assert list((tmp_path / "new").iterdir()) == []
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["flickr"]


def test_two_imports_of_the_same_files_are_the_same(tmp_path):
    source = fi(tmp_path / "src")
    first, second = (import_release("fi", source, tmp_path / n, say=str) for n in ("a", "b"))
    assert {p.name for p in first.iterdir()} == {"samples.parquet", "import.json", "integrity.json", "integrity.html"}
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_a_killed_import_leaves_no_dataset_and_the_next_one_works(tmp_path):
    source = sentiment(tmp_path / "src")
    code = (
        "import sys, time, pathlib, emonb.imports as i\n"
        "i.integrity_page = lambda *a: time.sleep(60)\n"  # killed with the table written and the report not
        "i.import_release('flickr', pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(tmp_path / "out")], cwd=ROOT)
    half = tmp_path / "out" / ".flickr.importing"
    deadline = time.monotonic() + 60
    while not (half / "integrity.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(EmonbError, match="imported by another process"):
        bring("flickr", source, tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (half / "samples.parquet").exists()
    assert not (tmp_path / "out" / "flickr").exists()
    frame, _, _ = bring("flickr", source, tmp_path / "out")
    assert len(frame) == 14
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["flickr"]


def test_a_change_of_the_source_is_noticed(tmp_path):
    source = sentiment(tmp_path / "src")
    bring("flickr", source, tmp_path / "out")
    settings = load_settings("smoke", datasets="flickr", images=str(tmp_path / "out"))
    notebooks = sorted((ROOT / "notebooks").glob("01*.ipynb"))
    before = fingerprints(notebooks, settings)
    stage(tmp_path / "out", "flickr", tmp_path / "run")
    paint(source / "test" / "positive" / "new.jpg", (9, 9, 9), 1)
    assert fingerprints(notebooks, settings) != before
    with pytest.raises(EmonbError, match="changed since the import; import again: python -m emonb data import flickr"):
        stage(tmp_path / "out", "flickr", tmp_path / "run")
    source.rename(tmp_path / "moved")
    with pytest.raises(EmonbError, match="is gone; put it back"):
        stage(tmp_path / "out", "flickr", tmp_path / "run")


def test_bare_folders_of_fi_are_recognised_by_the_dataset_s_name(tmp_path):
    tree = fi(tmp_path / "src") / "emotion_dataset"
    (tmp_path / "images").mkdir()
    tree.rename(tmp_path / "images" / "fi")
    shutil.copytree(tmp_path / "images" / "fi", tmp_path / "images" / "pets")
    problems = [
        json.loads((stage(tmp_path / "images", name, tmp_path / "run").path / "integrity.json").read_text())[
            "problems"
        ]
        for name in ("fi", "pets")
    ]
    assert len(problems[0]["placeholder"]) == 7
    assert "placeholder" not in problems[1]
    assert len(problems[1]["duplicate"]) >= 5


def test_a_tree_beside_an_info_json_is_no_emoset(tmp_path):
    source = sentiment(tmp_path / "src")
    (source / "info.json").write_text("{}")
    assert recognise(source) == "folder"
    assert len(read_release("folder", source).frame) == 14
    lists = emoset(tmp_path / "emoset")
    for split in ("train", "val", "test"):
        (lists / f"{split}.json").unlink()
    assert recognise(lists) == "emoset"
    with pytest.raises(EmonbError, match=r"none of train\.json, val\.json, test\.json"):
        read_release("emoset", lists)


def test_split_folders_in_capital_letters(tmp_path):
    source = sentiment(tmp_path / "src")
    (source / "train").rename(source / "Train")
    frame = read_release("flickr", source).frame
    assert frame["split"].value_counts().to_dict() == {"train": 6, "val": 4, "test": 4}
    assert all((source / path).is_file() for path in frame["path"])


@pytest.mark.parametrize("name", ["", "007", "None", "nan", "../middle.png", "nul\\udcff.png"])
def test_odd_names_in_a_table_are_text(tmp_path, name):
    source = make_release("bass", tmp_path / "src")
    with (source / "BASS_data.csv").open("a", encoding="utf-8") as file:
        file.write(f"{name},8.0,\n,,\n")
    release = read_release("bass", source)
    assert release.problems["listed_but_missing"] == [name]
    assert len(release.frame) == 60


def test_halves_of_characters_in_a_list_are_escaped(tmp_path):
    source = emoset(tmp_path / "src")
    text = (source / "val.json").read_text()
    row = r', ["awe", "image/awe/\udcff\ud800.jpg", "annotation/\udcff.json"]]'
    (source / "val.json").write_text(text.rstrip("]") + "]" + row)
    (source / "annotation/awe/awe_test_00000.json").write_text("[" * 100_000)
    (source / "annotation/fear/fear_test_00000.json").write_text(r'{"scene": "\ud800", "object": [1, null]}')
    frame, report, _ = bring("emoset", source, tmp_path / "out")
    assert report["problems"]["listed_but_missing"] == [r"image/awe/\udcff\ud800.jpg"]
    assert report["problems"]["annotation_missing"] == ["image/awe/awe_test_00000.jpg"]
    row = frame.set_index("image_id").loc["image/fear/fear_test_00000.jpg"]
    assert (row["scene"], list(row["objects"])) == (r"\ud800", ["1", "None"])


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    source = sentiment(tmp_path / "src")
    closed = source / "train" / "positive"
    closed.chmod(0)
    if os.access(closed, os.R_OK):  # root may read everything: the refusal is played
        whole = os.listdir

        def refuse(path="."):
            if os.fspath(path) == str(closed):
                raise PermissionError(13, "Permission denied", str(closed))
            return whole(path)

        monkeypatch.setattr(os, "listdir", refuse)
    try:
        with pytest.raises(EmonbError, match=r"train/positive: cannot be read \(Permission denied\); give yourself"):
            bring("flickr", source, tmp_path / "out")
    finally:
        closed.chmod(0o755)
    assert not (tmp_path / "out" / "flickr").exists()


def test_a_source_whose_name_is_no_text(tmp_path):
    source = sentiment(tmp_path / "src").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(EmonbError, match=r"caf\\xe9: this folder's name is not valid UTF-8; rename it"):
        bring("flickr", source, tmp_path / "out")
    result = emonb("data", "import", "flickr", os.fsencode(source), "--out", str(tmp_path / "out"))
    assert (result.returncode, result.output.count("\n")) == (1, 1)
    assert not (tmp_path / "out").exists()


def test_an_import_does_not_remove_what_it_did_not_write(tmp_path):
    source = sentiment(tmp_path / "src")
    bring("flickr", source, tmp_path / "out")
    (tmp_path / "out" / "flickr" / "my notes.txt").write_text("keep me")
    with pytest.raises(EmonbError, match=r"flickr: holds my notes\.txt, which no import wrote"):
        bring("flickr", source, tmp_path / "out")
    assert (tmp_path / "out" / "flickr" / "my notes.txt").read_text() == "keep me"


def test_what_to_type_next_is_quoted(tmp_path):
    source = sentiment(tmp_path / "a; release")
    _, _, lines = bring("flickr", source, tmp_path / "my images")
    assert lines[-1] == f"next: make reproduce DATASETS=flickr IMAGES='{tmp_path}/my images'"
    (source / "test" / "positive" / "0.jpg").unlink()
    with pytest.raises(EmonbError, match=r"data import flickr '.*a; release' --out '.*my images' --name flickr"):
        stage(tmp_path / "my images", "flickr", tmp_path / "run")


def test_where_to_get_each_release():
    table = release_table().set_index("format")
    assert set(table.index) == set(FORMATS) - {"folder"}
    assert table.loc["emoset", "pictures"] == "118,102"
    assert table.loc["fi", "pictures"] == "about 23,000"
    assert table.loc["bass", "licence"] == "CC BY 4.0"
    assert (table != "").all(axis=None)
    assert set(table["page"].str.partition("://")[0]) <= {"https", "not recorded here"}


def test_a_damaged_import_is_named(tmp_path):
    bring("flickr", sentiment(tmp_path / "src"), tmp_path / "out")
    (tmp_path / "out" / "flickr" / "samples.parquet").write_bytes(b"PAR1")
    with pytest.raises(EmonbError, match="the import is damaged"):
        stage(tmp_path / "out", "flickr", tmp_path / "run")
    (tmp_path / "out" / "flickr" / "import.json").write_text("[]")
    with pytest.raises(EmonbError, match=r"import\.json: field 'source' missing"):
        stage(tmp_path / "out", "flickr", tmp_path / "run")


def test_command_line(tmp_path):
    sentiment(tmp_path / "a release")
    result = emonb("data", "import", "instagram", "a release", "--out", "images", cwd=tmp_path)
    assert result.returncode == 0, result.output
    assert "instagram: 14 pictures (train 6, val 4, test 4)" in result.output
    assert (tmp_path / "images" / "instagram" / "integrity.html").is_file()
    wrong = emonb("data", "import", "fi", "a release", "--out", "images", cwd=tmp_path)
    assert wrong.returncode == 1
    assert wrong.output.startswith("emonb: a release: no fi release: it is made of emotion_dataset/<emotion>/*.jpg")
    assert len(wrong.output.splitlines()) == 1


def test_the_official_emoset_lists(tmp_path):
    if not (LISTS / "val.json").is_file():
        pytest.skip("EmoSet's official lists are not beside this checkout")
    for name in ("info.json", "val.json"):
        shutil.copyfile(LISTS / name, tmp_path / name)
    rows = json.loads((LISTS / "val.json").read_text())
    for _, image, _ in rows:
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / image).touch()
    release = read_release("emoset", tmp_path, partial=True)
    assert release.found == {"total": 5905, "val": FORMATS["emoset"].expected["val"]}
    assert Counter(release.frame["label"]) == Counter(row[0] for row in rows)
    assert list(release.missing) == ["train.json", "test.json"]


def test_the_real_bass_release_is_imported(tmp_path):
    source = ROOT.parent / "shared" / "data" / "bass"
    if not (source / "BASS_data.csv").is_file():
        pytest.skip("the BASS release is not beside this checkout")
    frame, report, _ = bring("bass", source, tmp_path)
    assert report["found"]["total"] == report["expected"]["total"] == 583
    assert len(frame) == 583 - len(report["problems"]["ambiguous_valence_left_out"])
    assert sum(n for counts in report["counts"].values() for n in counts.values()) == len(frame)
