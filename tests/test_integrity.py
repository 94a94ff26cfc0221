"""What is wrong or unusual about pictures is found and told without doing harm."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from release_folders import bring, encoded, make_tree

from emonb.data import inspect_picture, open_picture
from emonb.errors import UnreadablePicture
from emonb.releases.imports import KEPT, KINDS, LEFT_OUT, Reading

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8))
HOSTILE = [
    "a b.jpg", "-rf.jpg", "--out.jpg", "'quote'.jpg", 'a" onerror="alert(1).jpg', "<script>alert(1)<.jpg",
    "&amp;&lt;.jpg", "line\nbreak\r\t.jpg", "100%20%s%d{x}$HOME`id`.jpg", "ünï-猫-🙂.jpg", "right\u202eto left.jpg",
    "back\\slash.jpg", "#?;=.jpg",
]  # fmt: skip
TURNED = Image.Exif()
TURNED[0x0112] = 6
MOVING = {"save_all": True, "append_images": [NOISE.rotate(90), NOISE.rotate(180)]}
DEPTH_16 = Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(64, 48).astype("uint16"))
WHOLE = {form: encoded(NOISE, form) for form in ("JPEG", "PNG", "WEBP")}
HALF = {form: whole[: len(whole) // 2] for form, whole in WHOLE.items()}


def bomb(side=60_000):
    """A PNG of a hundred bytes that says it is 60,000 x 60,000 px."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9)))]
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


UNFIT = [
    ("zero.jpg", b"", "damaged"),
    ("cut.jpg", HALF["JPEG"], "damaged"),
    ("cut.png", HALF["PNG"], "damaged"),
    ("cut.webp", HALF["WEBP"], "damaged"),
    ("header.png", WHOLE["PNG"][:20], "damaged"),
    ("broken.png", HALF["PNG"] + bytes(40) + WHOLE["PNG"][len(HALF["PNG"]) + 40 :], "damaged"),
    ("text.jpg", b"dear reader, this is no picture", "not_a_picture"),
    ("sound.webp", b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(40), "not_a_picture"),
    ("drawing.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_a_picture"),
    ("bomb.png", bomb(), "decompression_bomb"),
    ("bomb9500.png", bomb(9_500), "decompression_bomb"),  # below the bound at which Pillow itself refuses
]
UNUSUAL = [
    ("plain.jpg", WHOLE["JPEG"], ()),
    ("plain.png", WHOLE["PNG"], ()),
    ("PLAIN.JPEG", WHOLE["JPEG"], ()),
    ("really png.jpg", WHOLE["PNG"], ()),
    ("grey.jpg", encoded(NOISE.convert("L")), ("greyscale",)),
    ("bits.png", encoded(NOISE.convert("1"), "PNG"), ("greyscale",)),
    ("grey16.png", encoded(DEPTH_16, "PNG"), ("greyscale",)),
    ("print.jpg", encoded(NOISE.convert("CMYK")), ("cmyk",)),
    ("few.png", encoded(NOISE.convert("P"), "PNG"), ("palette",)),
    ("clear.png", encoded(NOISE.convert("RGBA"), "PNG"), ()),
    ("turned.jpg", encoded(NOISE, exif=TURNED), ("exif_rotated",)),
    ("moving.webp", encoded(NOISE, "WEBP", **MOVING), ("animated",)),
    ("moving gif.png", encoded(NOISE, "GIF", **MOVING), ("animated", "palette")),
    ("wide.png", encoded(Image.new("RGB", (4097, 50), "red"), "PNG"), ("very_large",)),
    ("strip.png", encoded(Image.new("RGB", (5, 1500), "red"), "PNG"), ("strip",)),
    ("damaged exif.jpg", encoded(NOISE, exif=b"Exif\0\0garbage, no TIFF header"), ()),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("name", "content", "kind"), UNFIT, ids=[row[0] for row in UNFIT])
def test_what_cannot_be_used_and_why(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    assert inspect_picture(tmp_path / name) == ((kind,), "", 0, 0)
    assert kind in LEFT_OUT
    with pytest.raises(UnreadablePicture):
        open_picture(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(("name", "content", "kinds"), UNUSUAL, ids=[row[0] for row in UNUSUAL])
def test_what_is_unusual_but_can_be_used(tmp_path, name, content, kinds):
    (tmp_path / name).write_bytes(content)
    found = inspect_picture(tmp_path / name)
    assert found.kinds == kinds
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert set(kinds) <= set(KEPT)
    assert 0.3 < found.brightness <= 1
    if name == "grey16.png":  # sixteen bits keep their shades
        assert found.brightness == pytest.approx(0.5, abs=0.02)


def test_files_that_cannot_be_opened(tmp_path, monkeypatch):
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "gone.jpg").symlink_to("nothing.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert {inspect_picture(tmp_path / name).kinds for name in ("loop.jpg", "gone.jpg")} == {("broken_link",)}
    assert {inspect_picture(Path(name)).kinds for name in (tmp_path / "pipe.jpg", tmp_path, "/dev/zero")} == {
        ("no_access",)
    }

    def refuse(self, *arguments, **options):  # played: root may read everything
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "private.jpg").write_bytes(WHOLE["JPEG"])
    monkeypatch.setattr(Path, "open", refuse)
    assert inspect_picture(tmp_path / "private.jpg").kinds == ("no_access",)


def test_everything_around_the_pictures_is_told(tmp_path):
    root, pos = make_tree(tmp_path / "tree"), "train/positive"
    folder = root / pos
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "gone.jpg").symlink_to("nothing.jpg")
    (folder / "up.jpg").symlink_to(root)
    (root / "train" / "again").symlink_to(root)
    (folder / "notes.txt").write_text("notes")
    (folder / "more").mkdir()
    (folder / ".hidden").touch()
    (folder / "._0.jpg").write_bytes(b"a Mac's second half of a file")
    (root / "train" / "stray.jpg").write_bytes(WHOLE["JPEG"])
    (root / "documents").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    shutil.copyfile(folder / "0.jpg", os.fsencode(folder) + b"/latin-\xfc.jpg")
    os.mkdir(os.fsencode(root / "train") + b"/fr\xf6hlich")
    frame, report, _ = bring("folder", root, tmp_path / "out")
    assert report["problems"] == {
        "broken_link": [f"{pos}/gone.jpg", f"{pos}/loop.jpg"],
        "leftover": [f"{pos}/._0.jpg", f"{pos}/.hidden"],
        "unused_file": [
            "documents/", "train/again/", r"train/fr\udcf6hlich/", rf"{pos}/latin-\udcfc.jpg", f"{pos}/more/",
            f"{pos}/notes.txt", f"{pos}/pipe.jpg", f"{pos}/up.jpg/", "train/stray.jpg",
        ],
    }  # fmt: skip
    assert len(frame) == 14


def all_kinds(root):
    for name, content, _ in (*UNFIT, *UNUSUAL):
        (root / "train" / "positive" / name).write_bytes(content)
    shutil.copy(root / "train" / "negative" / "0.jpg", root / "test" / "negative" / "leak.jpg")
    shutil.copy(root / "val" / "negative" / "0.jpg", root / "val" / "negative" / "twice.jpg")


@pytest.mark.filterwarnings("error")  # Pillow's remarks must not reach the screen either
def test_counts_and_problems_follow_from_the_table(tmp_path):
    source = make_tree(tmp_path / "tree")
    all_kinds(source)
    frame, report, lines = bring("folder", source, tmp_path / "out", reading=Reading(max_unreadable=0.3))
    assert set(report) == {"counts", "problems", "found", "expected", "notes"}
    table = frame.groupby(["split", "label"]).size()
    assert {(s, e): n for s, by in report["counts"].items() for e, n in by.items()} == table.to_dict()
    tree, expected = "train/positive/", {}
    for name, _, kinds in (*((n, c, (k,)) for n, c, k in UNFIT), *UNUSUAL):
        for kind in kinds:
            expected.setdefault(kind, []).append(tree + name)
    expected["duplicate"] = [f"{tree}PLAIN.JPEG", f"{tree}plain.jpg", "val/negative/0.jpg", "val/negative/twice.jpg"]
    expected["duplicate"] += [f"{tree}really png.jpg", f"{tree}plain.png"]
    expected["duplicate_across_splits"] = ["test/negative/leak.jpg", "train/negative/0.jpg"]
    assert "  left out: 11 of 43 pictures (25.6%)" in lines
    problems = report["problems"]
    assert problems == {kind: sorted(ids) for kind, ids in expected.items()}
    left_out = {i for kind in LEFT_OUT for i in problems.get(kind, ())}
    assert not left_out & set(frame["image_id"])
    assert {i for kind in KEPT for i in problems.get(kind, ())} <= set(frame["image_id"])
    assert report["found"]["total"] == len(frame) + len(left_out)
    for kind, ids in problems.items():
        assert f"  {kind}: {len(ids)} ({'kept' if kind in KEPT else 'left out'}) {KINDS[kind]}" in lines


def test_hostile_names_are_names(tmp_path):
    source = make_tree(tmp_path / '-x --out <script>alert("1")\n100%&amp;ü')
    for i, name in enumerate(HOSTILE):  # greyscale: every one is in the report
        (source / "train" / "positive" / name).write_bytes(encoded(NOISE.rotate(i).convert("L")))
    frame, report, _ = bring("flickr", source, tmp_path / "out")
    ids = [f"train/positive/{name}" for name in HOSTILE]
    assert json.loads((tmp_path / "out" / "flickr" / "import.json").read_text())["source"] == str(source)
    assert report["problems"] == {"greyscale": sorted(ids)}
    assert all((source / path).is_file() for path in frame["path"])
    assert set(ids) <= set(frame["image_id"])
