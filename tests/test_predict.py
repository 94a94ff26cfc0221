"""`python -m emonb predict`: files, folders, JSON, damaged pictures, names that bite."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from assembled import LABELS, assembled, picture, results
from conftest import ROOT

from emonb import predict_command
from emonb.errors import EmonbError
from emonb.files import visible
from emonb.opinions import opinions
from emonb.predict_command import as_text, default_model, find_pictures, predict

RAW = os.fsdecode(b"\xff\xfe.png")  # not UTF-8
RED = "\x1b[31mred\r\n.png"  # colours a terminal, and begins a new line
NAMES = ["-x.png", RAW, RED, "<img src=x onerror=alert(1)>.png"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("predict")
    model = assembled()
    ws = results(root, model)
    return model, ws.out / "models" / "mini-fi"


@pytest.fixture
def album(tmp_path):
    """A folder of pictures with hostile names, in two depths, and files that are no pictures."""
    folder = tmp_path / "album"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        picture((90 + 10 * i, 90)).save(folder / name)
    picture().save(folder / "more" / "B.JPG", "JPEG")
    (folder / "damaged.webp").write_bytes(b"RIFF")
    (folder / "notes.txt").write_text("no picture")
    (folder / "loop").symlink_to(folder)
    return folder


def run(images, folder, **options):
    """The command in this process: failures, standard output, standard error."""
    out, err = [], []
    options = {"as_json": False, "reasons": False, **options}
    failed = predict(images, folder, say=out.append, complain=err.append, **options)
    return failed, out, err


def test_from_the_shell_json_is_all_that_is_printed(made, album):
    _, folder = made
    command = [sys.executable, "-m", "emonb", "predict", "--json", "--model", str(folder), "--", "-x.png", "."]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=album, env=env, capture_output=True)
    assert done.returncode == 1, done.stderr.decode()
    found = json.loads(done.stdout.decode("ascii"))
    names = ["-x.png", "-x.png", NAMES[3], "more/B.JPG", RED, RAW]
    assert sorted(item["image"] for item in found) == sorted(names)
    assert found[0]["models"]["ViT"]["answer"] in LABELS
    twice = [item["confidence"] for item in found if item["image"] == "-x.png"]
    assert twice[0] == pytest.approx(twice[1], abs=2e-3)
    err = done.stderr.decode().splitlines()
    assert [line for line in err if line.startswith("emonb: ")] == [
        "emonb: damaged.webp: not a JPEG, PNG or WebP picture, whatever its name says"
    ]
    assert b"\x1b" not in done.stderr
    assert "Traceback" not in done.stderr.decode()


def test_text_names_each_answer_and_cannot_steer_the_terminal(made, album):
    model, folder = made
    failed, out, err = run([album], folder)
    assert failed == 1
    assert len(out) == 5
    assert len(err) == 2
    assert "damaged.webp: not a JPEG" in err[1]
    text = "\n".join(out)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "\\x1b[31mred\\r\\n.png: " in text
    assert "\\udcff\\udcfe.png: " in text
    first = opinions(model, [album / "-x.png"])[0]
    assert f"album/-x.png: {first.emotion} ({first.confidence():.0%})\n  VLM:  {first.answers['VLM']} " in text
    assert first.lean.sentence.split(".")[0] in text
    assert "ViT:" in text
    assert "Reasons:" not in text


def test_reasons_are_asked_for(made, album):
    model, folder = made
    _, out, _ = run([album / "-x.png"], folder, as_json=True, reasons=True)
    assert json.loads(out[0])[0]["reasons"] == model.say([album / "-x.png"])[0]
    opinion = opinions(model, [picture()], names=["x"], texts=True)[0]
    assert "  Key elements: " in as_text(opinion)


def test_batches_answer_as_one_does(made, album, monkeypatch):
    _, folder = made
    monkeypatch.setattr(predict_command, "BATCH", 2)
    _, small, _ = run([album], folder, as_json=True)
    monkeypatch.undo()
    _, large, _ = run([album], folder, as_json=True)
    pairs = list(zip(json.loads(small[0]), json.loads(large[0]), strict=True))
    assert [a["image"] for a, _ in pairs] == [b["image"] for _, b in pairs]
    for a, b in pairs:
        assert a["confidence"] == pytest.approx(b["confidence"], abs=2e-3)


def test_only_damaged_pictures_give_an_empty_list(made, album):
    failed, out, _ = run([album / "damaged.webp"], made[1], as_json=True)
    assert (failed, out) == (1, ["[]"])


def test_folders_are_searched_in_order_and_links_do_not_loop(album):
    found = [path.relative_to(album).as_posix() for path in find_pictures([album])]
    assert found == sorted(found)
    assert set(found) == {*NAMES, "damaged.webp", "more/B.JPG"}
    with pytest.raises(EmonbError, match="gone: no such picture or folder"):
        find_pictures([album / "gone"])
    (album / "empty").mkdir()
    with pytest.raises(EmonbError, match="empty: no picture in this folder"):
        find_pictures([album / "empty"])


def test_default_model_is_the_first_of_the_mini_results(made, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('name = "emonb"')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EmonbError, match=r"no model in build/mini/models: make one with python -m emonb run"):
        default_model()
    for name in ("mini-emoset", "mini-fi"):
        (tmp_path / "build" / "mini" / "models" / name).mkdir(parents=True)
        (tmp_path / "build" / "mini" / "models" / name / "config.json").write_text("{}")
    assert default_model().as_posix() == "build/mini/models/mini-fi"


def test_direction_marks_are_visible():
    assert visible("a\u202egnp.exe\u200b") == "a\\u202egnp.exe\\u200b"
    assert visible("émotion 感情.png") == "émotion 感情.png"
