"""`python -m emonb predict`: files, folders, JSON, pictures without an answer, names that bite."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from assembled import HOSTILE, LABELS, assembled, picture, results
from exploring import judge

from emonb.errors import EmonbError, PassingTrouble
from emonb.files import make_folder, write_json
from emonb.show import opinions as room
from emonb.show.opinions import opinions
from emonb.show.predict import default_model, find_pictures, predict

RAW = os.fsdecode(b"\xff\xfe.png")  # not UTF-8
RED = "\x1b[31mred\r\n.png"  # colours a terminal, and begins a new line
NAMES = ["-x.png", RAW, RED, HOSTILE]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = assembled()
    return model, results(tmp_path_factory.mktemp("predict"), model)


@pytest.fixture
def album(tmp_path, monkeypatch):
    """A folder of pictures with hostile names, in two depths, and files that are no pictures; we are inside."""
    folder = tmp_path / "album"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        picture((90 + 10 * i, 90)).save(folder / name)
    picture().save(folder / "more" / "B.JPG", "JPEG")
    (folder / "damaged.webp").write_bytes(b"RIFF")
    (folder / "notes.txt").write_text("no picture")
    (folder / "loop").symlink_to(folder)
    monkeypatch.chdir(folder)
    return folder


def complaints(err):
    """Standard error without bars."""
    return [line for line in err.splitlines() if line.startswith("emonb: ")]


def test_json_is_all_that_is_printed_and_a_damaged_picture_is_named(made, album, capsys):
    assert predict([Path("-x.png"), Path(), Path()], made[1], as_json=True) == 2  # in more than one pass
    out, err = capsys.readouterr()
    found = json.loads(out.encode("ascii"))
    assert sorted(item["image"] for item in found) == sorted([*NAMES, "more/B.JPG"] * 2 + ["-x.png"])
    assert found[0]["models"]["ViT"]["answer"] in LABELS
    twice = [item["confidence"] for item in found if item["image"] == "-x.png"]
    assert twice[0] == twice[1] == twice[2]
    assert [line[:55] for line in complaints(err)] == ["emonb: damaged.webp: could not be answered (the file: n"] * 2


def test_text_names_each_answer_and_cannot_steer_the_terminal(made, album, capsys):
    model, folder = made
    judge(folder.parent.parent, "mini-fi")
    assert predict([album], folder, reasons=True) == 1
    out, err = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in out + "".join(complaints(err)))
    assert "\\x1b[31mred\\r\\n.png: " in out
    assert "\\udcff\\udcfe.png: " in out
    first = opinions(model, [picture((90, 90))], ["x"])[0]
    said = f"{first['emotion']} ({first['confidence']:.0%})\n  VLM:  {first['models']['VLM']['answer']} "
    assert f"album/-x.png: {said}" in out
    for word in ("ViT:", "leaned on", "Key elements:", "Reasons:", "Judged: The VLM's"):
        assert out.count(word) == 5


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE])
def test_trouble_of_the_disk_stops_with_its_reason_and_prints_what_was_answered(
    made, album, capsys, monkeypatch, code
):
    whole = Path.open

    def refuse(self, *arguments, **options):
        if self.name == "B.JPG":
            raise OSError(code, "played trouble")
        return whole(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(PassingTrouble, match=r"cannot be read now \(played trouble, 4 times\)"):
        predict([Path("-x.png"), Path("more"), Path(RAW)], made[1], as_json=True)
    assert len(json.loads(capsys.readouterr().out)) == 1


def strip(error, monkeypatch):
    """One more picture, at which the model raises, as a processor does at a strip of 1:300."""
    asked = room.opinions

    def opinions(model, pictures, names, **options):
        if any(image.size == (33, 5) for image in pictures):
            raise error
        return asked(model, pictures, names, **options)

    picture((33, 5)).save("zz.png")
    monkeypatch.setattr(room, "opinions", opinions)


@pytest.mark.parametrize("as_json", [True, False])
def test_a_picture_that_fails_late_takes_no_other_along(made, album, as_json, capsys, monkeypatch):
    strip(ValueError("absolute aspect\nratio"), monkeypatch)
    assert predict([album], made[1], as_json=as_json) == 2
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 5 if as_json else out.count("Gate:") == 5
    assert complaints(err)[-1] == f"emonb: {album}/zz.png: could not be answered (absolute aspect\\nratio)"


def test_of_25_pictures_24_are_answered_where_one_is_bad(made, tmp_path, capsys):
    for i in range(23):
        picture((30 + i, 30)).save(tmp_path / f"{i:02}.png")
    picture((900, 3)).save(tmp_path / "strip.bmp")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert predict([tmp_path], made[1], as_json=True) == 1
    out, err = capsys.readouterr()
    assert (len(json.loads(out)), len(complaints(err))) == (24, 1)
    assert "pipe.jpg: could not be answered (the file: not a readable picture ([Errno 22] no regular file" in err


def test_what_was_answered_before_a_stop_is_printed(made, album, capsys, monkeypatch):
    strip(KeyboardInterrupt(), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        predict([*map(Path, NAMES[:3] * 3), Path("zz.png")], made[1], as_json=True)
    assert len(json.loads(capsys.readouterr().out)) == 8, "those of the first pass"


def test_folders_are_searched_in_order_and_links_do_not_loop(album):
    found = [path.relative_to(album).as_posix() for path in find_pictures([album])]
    assert found == sorted([*NAMES, "damaged.webp", "more/B.JPG"])
    with pytest.raises(EmonbError, match="gone: no such picture or folder"):
        find_pictures([album / "gone"])
    (album / "empty").mkdir()
    with pytest.raises(EmonbError, match="empty: no picture in this folder"):
        find_pictures([album / "empty"])


def test_what_a_folder_holds_besides_pictures_is_told(album, capsys):
    for name in ("._a.jpg", "__MACOSX/a.jpg", "more/@eaDir/SYNO_THUMB.jpg", ".ipynb_checkpoints/a.jpg", "b.HEIC"):
        (album / name).parent.mkdir(exist_ok=True)
        picture().save(album / name, "PNG")
    assert len(find_pictures([album])) == len(NAMES) + 2
    told = capsys.readouterr().err
    assert (
        "4 made by macOS, Windows, a NAS or Jupyter passed over; 2 files with an ending not taken: b.HEIC, n" in told
    )


@pytest.mark.parametrize("absent", ["gone.jpg", "empty", "/dev/null", "x" * 300 + ".jpg", "-x.png/inner.jpg"])
def test_what_is_not_there_takes_no_other_along(made, album, capsys, absent):
    (album / "empty").mkdir()
    assert predict([Path(absent), Path("-x.png")], made[1], as_json=True) == 1
    out, err = capsys.readouterr()
    assert [item["image"] for item in json.loads(out)] == ["-x.png"]
    assert [line[:20] for line in complaints(err)] == [f"emonb: {absent}: could not"[:20]]


def test_default_model_is_the_first_of_the_mini_results(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('name = "emonb"')
    monkeypatch.chdir(tmp_path)
    picture().save("a.png")
    with pytest.raises(EmonbError, match="build/mini/models/mini-fi: no such model folder"):
        predict([Path("a.png")])
    for name in ("mini-emoset", "mini-fi"):
        write_json(make_folder(tmp_path / "build" / "mini" / "models" / name) / "config.json", {})
    assert default_model().as_posix() == "build/mini/models/mini-fi"
