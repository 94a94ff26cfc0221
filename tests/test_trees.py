"""Other people's folders and lists: what is clear is read, what is not is refused with what to type."""

from __future__ import annotations

import json
import shutil

import pytest
from release_folders import EKMAN, MIKELS, PAIR, bring, emoset, listed, make_release, make_tree, paint, stage
from typer.testing import CliRunner

from emonb.cli import app
from emonb.data import read_samples
from emonb.errors import EmonbError
from emonb.releases import read_release, recognise
from emonb.releases.imports import Reading
from emonb.releases.lists import located
from emonb.releases.names import own_names, read_classes, split_of

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
        (["0", "1"], "alphabetical order, as Keras has it.* --map '0=negative,1=positive'"),
        ([*EKMAN, "neutral"], r"'neutral' is none of .*'neutral=' leaves it out.*--classes 'anger,.*neutral"),
    ],
)
def test_other_class_names_are_refused_with_a_way_that_works(found, words):
    with pytest.raises(EmonbError, match=words) as caught:
        read_classes(found, None, {}, "x")
    way = str(caught.value).split("--map '")[1].split("'")[0].replace("=CLASS", "=")
    assert {*read_classes(found, None, own_names([way]), "x")[0]} == {*found}
    with pytest.raises(EmonbError, match=rf"--map 'hapy=joy': no class has that name; there are {sorted(found)[0]}, "):
        read_classes(found, None, own_names(["hapy=joy"]), "x")


@pytest.mark.parametrize(
    "text", ["image_file,caption\nTrain/Awe/0.JPG,a hill\n1.png,\n", "id,image_file,caption\nI7|0.jpg|a hill\n"]
)
def test_captions_beside_the_pictures_are_what_the_annotator_reads(tmp_path, text):
    source = make_tree(tmp_path / "src", {"train": 2, "val": 1, "test": 1}, ("awe", "fear"))
    (source / "captions.csv").write_text(text)
    release = read_release("folder", source)
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
    (source / "classes.txt").write_text("wild\nwild\n")
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
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_as_people_have_them(tmp_path, kind):
    source = listed(tmp_path / "src", LISTS[kind])
    assert recognise(source) == "list"
    frame, report, _ = bring("list", source, tmp_path / "out")
    assert frame.groupby(["split", "label"]).size().to_dict() == {(s, e): 3 for s in ALL for e in MIKELS}
    assert report["problems"] == {}
    assert frame["image_id"].str.fullmatch(r"photos/\w+\.jpg").all()


AWE = "path,label\nphotos/val00.jpg,awe\n"
TWO_WAYS = {
    r"a\.csv or b\.csv\? Give the one": {"a.csv": AWE, "b.csv": AWE},
    "path in column 'image' or 'file'": {"a.csv": "image,file,label\nx,y,awe\n"},
    "'photos/val00.jpg' is 'awe' as well as 'fear'": {"a.csv": AWE + "photos/val00.jpg,fear\n"},
    "split 'later' is none of train": {"a.csv": "path,label,split\nphotos/val00.jpg,awe,later\n"},
    "no column for the label in path, what": {"a.csv": "path,what\nphotos/val00.jpg,awe\n"},
    "cannot be read as a table": {"a.csv": "path,label\na.jpg,awe,1,2\n"},
}


@pytest.mark.parametrize("words", TWO_WAYS)
def test_lists_that_contradict_themselves_are_refused(tmp_path, words):
    source, lists = listed(tmp_path / "src", lambda table, root: None), TWO_WAYS[words]
    for name, text in lists.items():
        (source / name).write_text(text)
    with pytest.raises(EmonbError, match=words):
        read_release("list", source / "a.csv" if len(lists) == 1 else source)


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
    source = emoset(tmp_path / "deeper" / "EmoSet-118K")
    as_released, (change, encoding) = read_release("emoset", source).frame, REWRITTEN[how]
    for split in ALL:
        rows = change(json.loads((source / f"{split}.json").read_text()))
        (source / f"{split}.json").write_text(json.dumps(rows), encoding=encoding)
    assert recognise(source.parent) == "emoset"
    assert read_release("emoset", source.parent).frame.equals(as_released)


@pytest.mark.parametrize("content", ['[["awe", "ima', "<!DOCTYPE html><title>Quota exceeded</title>"])
def test_a_download_that_failed_says_where_to_get_it_again(tmp_path, content):
    (emoset(tmp_path) / "train.json").write_text(content)
    with pytest.raises(EmonbError, match=r"train\.json: .*(Unterminated|a web page).*; get it again from https://vcc"):
        read_release("emoset", tmp_path)


def test_a_table_with_semicolons_and_decimal_commas(tmp_path):
    source = make_release("bass", tmp_path / "src")
    whole, file = read_release("bass", source).frame, source / "BASS_data.csv"
    file.write_text(file.read_text().replace(",", ";").replace("; ", ", ").replace(".0", ",0"), "utf-16")
    assert read_release("bass", source).frame.equals(whole)
