"""Whatever a picture file holds: it is used, or named and left out; trouble of the disk is not the picture's."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from release_folders import bring, encoded, make_tree, stage

from emonb.data import inspect_picture, open_picture, read_samples, sizes_of, thumbnail
from emonb.errors import EmonbError, PassingTrouble, UnreadablePicture
from emonb.releases.imports import KEPT, KINDS, LEFT_OUT, Reading
from emonb.vlm import shown

RAMP = np.linspace(0, 255, 40 * 24).reshape(24, 40)
GRADIENT = Image.fromarray(RAMP.astype("uint8"))
RGB = GRADIENT.convert("RGB")
TURNED = Image.Exif()
TURNED[0x0112] = 6
MOVING = {"save_all": True, "append_images": [RGB.rotate(90), RGB.rotate(180)]}
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype="uint8"))
WHOLE = {form: encoded(RGB, form) for form in ("JPEG", "PNG", "WEBP")}
HALF = {form: whole[: len(whole) // 2] for form, whole in WHOLE.items()}
HOSTILE = [
    "a b.jpg", "-rf.jpg", "--out.jpg", "'quote'.jpg", 'a" onerror="alert(1).jpg', "<script>alert(1)<.jpg",
    "&amp;&lt;.jpg", "line\nbreak\r\t.jpg", "100%20%s%d{x}$HOME`id`.jpg", "ünï-猫-🙂.jpg", "right\u202eto left.jpg",
    "back\\slash.jpg", "#?;=.jpg",
]  # fmt: skip


def chunk(kind, body):
    """A part of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(side):
    """A PNG of a hundred bytes that says how large it is."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9)))


def with_chunk(kind, body):
    """A sound PNG with one more chunk before its pixels."""
    at = WHOLE["PNG"].index(b"IDAT") - 4
    return WHOLE["PNG"][:at] + chunk(kind, body) + WHOLE["PNG"][at:]


LONG = zlib.compress(b"prompt " * 300_000)
UNFIT = [
    ("zero.jpg", b"", "damaged"),
    ("cut.jpg", HALF["JPEG"], "damaged"),
    ("cut.png", HALF["PNG"], "damaged"),
    ("cut.webp", HALF["WEBP"], "damaged"),
    ("header.png", WHOLE["PNG"][:20], "damaged"),
    ("broken.png", HALF["PNG"] + bytes(40) + WHOLE["PNG"][len(HALF["PNG"]) + 40 :], "damaged"),
    ("nearly whole.jpg", WHOLE["JPEG"][:-9], "damaged"),
    ("cut, with an end.jpg", encoded(NOISE)[:-400], "damaged"),
    ("cut progressive.jpg", encoded(NOISE, progressive=True)[:-40], "damaged"),
    ("no number.tiff", encoded(Image.fromarray(np.full((4, 4), np.nan, "float32")), "TIFF"), "damaged"),
    ("text.jpg", b"dear reader, this is no picture", "not_a_picture"),
    ("sound.webp", b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(40), "not_a_picture"),
    ("drawing.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_a_picture"),
    ("bomb.png", bomb(60_000), "decompression_bomb"),
    ("bomb9500.png", bomb(9_500), "decompression_bomb"),  # below the bound at which Pillow itself refuses
]
AS_BROWSERS_SHOW_IT = [
    ("plain.jpg", WHOLE["JPEG"], ()),
    ("plain.png", WHOLE["PNG"], ()),
    ("PLAIN.JPEG", WHOLE["JPEG"], ()),
    ("really png.jpg", WHOLE["PNG"], ()),
    ("modern.avif", encoded(RGB, "AVIF"), ()),
    ("grey.jpg", encoded(GRADIENT), ("greyscale",)),
    ("grey16.png", encoded(Image.fromarray((RAMP * 257).astype("uint16")), "PNG"), ("greyscale",)),  # keeps its shades
    ("float.tiff", encoded(GRADIENT.convert("F"), "TIFF"), ("greyscale",)),
    ("float of 1.tiff", encoded(Image.fromarray((RAMP / 255).astype("float32")), "TIFF"), ("greyscale",)),
    ("float of 16.tiff", encoded(Image.fromarray((RAMP * 257).astype("float32")), "TIFF"), ("greyscale",)),
    ("32 bits.tiff", encoded(Image.fromarray((RAMP * 8e6).astype("int32")), "TIFF"), ("greyscale",)),
    ("32 bits of 8.tiff", encoded(Image.fromarray(RAMP.astype("int32")), "TIFF"), ("greyscale",)),
    ("below 0.tiff", encoded(Image.fromarray((RAMP - 255).astype("float32")), "TIFF"), ("greyscale",)),
    (
        "holes.tiff",
        encoded(Image.fromarray(np.where(RAMP < 1, np.nan, RAMP).astype("float32")), "TIFF"),
        ("greyscale",),
    ),
    ("no end mark.jpg", WHOLE["JPEG"][:-2], ()),
    ("half an end mark.jpg", WHOLE["JPEG"][:-1], ()),
    ("no end mark, in steps.jpg", encoded(RGB, progressive=True)[:-2], ()),
    ("print.jpg", encoded(RGB.convert("CMYK")), ("cmyk",)),
    ("clear.png", encoded(RGB.convert("RGBA"), "PNG"), ()),
    ("moving.webp", encoded(RGB, "WEBP", **MOVING), ("animated",)),
    ("moving gif.png", encoded(RGB, "GIF", **MOVING), ("animated", "palette")),
    ("a phone's mpo.jpg", encoded(RGB, "MPO", save_all=True, append_images=[RGB]), ()),
    ("damaged exif.jpg", encoded(RGB, exif=b"Exif\0\0garbage, no TIFF header"), ()),
    ("broken exif.jpg", encoded(RGB, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"), ()),
    ("broken exif.png", with_chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"), ()),
    ("long text.png", with_chunk(b"zTXt", b"parameters\0\0" + LONG), ()),
    ("long plain text.png", with_chunk(b"tEXt", b"parameters\0" + b"x" * 3_000_000), ()),
    ("long profile.png", with_chunk(b"iCCP", b"profile\0\0" + LONG), ()),
]
OTHERWISE = [
    ("bits.png", encoded(RGB.convert("1"), "PNG"), ("greyscale",)),
    ("few.png", encoded(RGB.convert("P"), "PNG"), ("palette",)),
    ("turned.jpg", encoded(RGB, exif=TURNED), ("exif_rotated",)),
    ("wide.png", encoded(Image.new("RGB", (4097, 50), "red"), "PNG"), ("very_large",)),
    ("strip.png", encoded(Image.new("RGB", (5, 1500), "red"), "PNG"), ("strip",)),
]
USED = AS_BROWSERS_SHOW_IT + OTHERWISE


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("name", "content", "kind"), UNFIT, ids=[row[0] for row in UNFIT])
def test_what_cannot_be_used_and_why(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    assert inspect_picture(tmp_path / name) == ((kind,), "", 0, 0)
    assert kind in LEFT_OUT
    for source, called in ((tmp_path / name, re.escape(name)), (content, "yours")):
        with pytest.raises(UnreadablePicture, match=f"{called}: not a readable picture"):
            open_picture(source, "" if source == tmp_path / name else called)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(("name", "content", "kinds"), USED, ids=[row[0] for row in USED])
def test_what_can_be_used_and_what_is_unusual_about_it(tmp_path, name, content, kinds):
    (tmp_path / name).write_bytes(content)
    found = inspect_picture(tmp_path / name)
    assert (found.kinds, found.sha256) == (kinds, hashlib.sha256(content).hexdigest())
    assert set(kinds) <= set(KEPT)
    assert 0.3 < found.brightness <= 1
    if (name, content, kinds) in AS_BROWSERS_SHOW_IT:
        picture = open_picture(tmp_path / name)
        assert (picture.mode, picture.size) == ("RGB", (40, 24))
        assert abs(picture.getpixel((20, 12))[0] - GRADIENT.getpixel((20, 12))) < 12


def test_pictures_as_people_see_them(tmp_path):
    for form in ("JPEG", "PNG", "TIFF", "WEBP"):  # turned once, not again by a model's processor
        turned = open_picture(encoded(GRADIENT, form, exif=TURNED))
        assert turned.size == shown(turned, 99).size == (24, 40)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    turned = open_picture(encoded(GRADIENT, xmp=xmp, comment=b"at home"))
    assert (turned.size, shown(turned, 99).size, turned.info) == ((24, 40), (24, 40), {})
    (tmp_path / "large.jpg").write_bytes(encoded(Image.new("RGB", (400, 200), "red"), exif=TURNED))
    assert open_picture(tmp_path / "large.jpg", side=40).height < 400
    assert thumbnail(tmp_path / "large.jpg", 40).size == (20, 40)
    assert thumbnail(Image.new("RGB", (2, 500)), 100).size == (1, 100)
    assert thumbnail(Image.new("RGB", (8, 4)), 100).size == (100, 50)
    strip = open_picture(encoded(Image.new("RGB", (3, 1500), "red"), "PNG"))
    assert strip.size == (15, 1500)
    white, red = (255, 255, 255), (255, 0, 0)
    assert [strip.getpixel((x, 700)) for x in (0, 5, 6, 8, 9, 14)] == [white, white, red, red, white, white]
    for clear in (encoded(Image.new("P", (3, 2)), "PNG", transparency=0), encoded(Image.new("RGBA", (8, 8)), "PNG")):
        assert open_picture(clear).getpixel((0, 0)) == white


def test_files_that_cannot_be_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", tmp_path, Path("/dev/zero")):
        assert inspect_picture(path).kinds == ("no_access",)

    def refuse(self, *arguments, **options):  # played: root may read everything
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "private.jpg").write_bytes(WHOLE["JPEG"])
    monkeypatch.setattr(Path, "open", refuse)
    assert inspect_picture(tmp_path / "private.jpg").kinds == ("no_access",)


picture_files = st.builds(
    lambda *parts: damaged(*parts),
    st.sampled_from(["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "F"]),
    st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 30, 900])),
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]),
    st.booleans(),
    st.one_of(st.none(), st.integers(0, 400)),
    st.lists(st.tuples(st.integers(12, 400), st.integers(0, 255)), max_size=4),
)
names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20)


def damaged(mode, size, form, exif, cut, flips):
    """A picture's file, cut off or with some bytes changed behind its dimensions."""
    gray = GRADIENT.resize(size).convert({"F": "F", "I;16": "I"}.get(mode, "RGB"))
    try:
        data = bytearray(encoded(gray.convert(mode), form, exif=TURNED if exif else b""))
    except (OSError, ValueError):  # a format that has no such mode
        data = bytearray(encoded(GRADIENT.resize(size), form))
    for at, value in flips:
        if 40 < at < len(data):
            data[at] = value
    return bytes(data if cut is None else data[:cut])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=picture_files, side=st.integers(1, 60))
def test_any_file_is_a_picture_that_models_take_or_is_named(tmp_path, content, side):
    path = tmp_path / "any.jpg"
    path.write_bytes(content)
    found = inspect_picture(path)
    if found.sha256:
        picture = open_picture(path)
        assert picture.mode == "RGB"
        assert max(picture.size) <= 100 * min(picture.size)
        assert max(thumbnail(path, side).size) == side
        assert len(sizes_of([str(path)], 1)) == 1
    else:
        assert found.kinds[0] in LEFT_OUT
        with pytest.raises(UnreadablePicture, match=r"any\.jpg: not a readable picture"):
            open_picture(path)


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.dictionaries(names, picture_files, max_size=4))
def test_no_picture_of_a_folder_is_lost_without_a_word(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("any")
    folder, put = make_tree(root / "src") / "train" / "positive", 0
    for name, content in files.items():
        path = folder / f"{name[:60]}.png"
        if len(path.name.encode()) < 250 and not path.exists():
            path.write_bytes(content)
            put += 1
    frame, report, _ = bring("folder", root / "src", root / "out", reading=Reading(max_unreadable=1))
    told = {id for kind in LEFT_OUT for id in report["problems"].get(kind, ())}
    assert len(frame) + len(told) == 14 + put
    assert not told & {*frame["image_id"]}


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EMFILE, errno.ENOMEM])
def test_trouble_that_passes_is_waited_for_and_lasting_trouble_is_named(tmp_path, monkeypatch, code):
    path, whole, waited = tmp_path / "a.png", Path.open, []
    path.write_bytes(WHOLE["PNG"])
    trouble = MemoryError() if code == errno.ENOMEM else OSError(code, "played trouble")

    def refuse(self, *arguments, **options):
        if self.suffix in (".png", ".jpg") and len(waited) < lasting:
            raise trouble
        return whole(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("time.sleep", waited.append)
    lasting = 2
    assert open_picture(path).size == (40, 24)
    lasting = 10**9
    for look in (open_picture, inspect_picture):
        with pytest.raises(PassingTrouble, match=r"a\.png: cannot be read now .*4 times") as caught:
            look(path)
    assert ("ulimit -n" in str(caught.value)) == (code == errno.EMFILE)
    with pytest.raises(EmonbError, match="cannot be read now"):  # the import stops: these are no bad pictures
        bring("folder", make_tree(tmp_path / "src"), tmp_path / "out")
    assert not (tmp_path / "out" / "src").exists()


def test_many_unreadable_pictures_stop_an_import_unless_told_and_absent_ones_do_not_count(tmp_path):
    root = make_tree(tmp_path / "src", {"": 30})
    for i in range(3):
        (root / "positive" / f"{i}.jpg").write_bytes(b"")
        (root / "negative" / f"gone{i}.jpg").symlink_to("nowhere")
    _, _, lines = bring("folder", root, tmp_path / "out")
    assert "  left out: 6 of 63 pictures (9.5%)" in lines
    (root / "negative" / "0.jpg").write_bytes(b"")
    words = r"4 of 60 pictures \(7%\).* more than 5% .*damaged 4, .*--max-unreadable 0\.07"
    with pytest.raises(EmonbError, match=words):
        bring("folder", root, tmp_path / "out")
    assert len(bring("folder", root, tmp_path / "out", reading=Reading(max_unreadable=0.07))[0]) == 56
    assert len(read_samples(stage(tmp_path / "out", "src", tmp_path / "run").path)) == 56


def test_everything_around_the_pictures_is_told(tmp_path):
    root, pos = make_tree(tmp_path / "tree"), "train/positive"
    folder = root / pos
    for name, to in {"loop.jpg": "loop.jpg", "gone.jpg": "nothing.jpg", "up.jpg": root, "../again": root}.items():
        (folder / name).symlink_to(to)
    for name in ("notes.txt", ".hidden", "._0.jpg"):  # the last: a Mac's second half of a file
        (folder / name).write_bytes(b"x")
    (folder / "more").mkdir()
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


@pytest.mark.filterwarnings("error")  # Pillow's remarks must not reach the screen either
def test_counts_and_problems_follow_from_the_table(tmp_path):
    source, tree, expected = make_tree(tmp_path / "tree"), "train/positive/", {}
    for name, content, kinds in (*((n, c, (k,)) for n, c, k in UNFIT), *USED):
        (source / tree / name).write_bytes(content)
        for kind in kinds:
            expected.setdefault(kind, []).append(tree + name)
    shutil.copy(source / "train" / "negative" / "0.jpg", source / "test" / "negative" / "leak.jpg")
    shutil.copy(source / "val" / "negative" / "0.jpg", source / "val" / "negative" / "twice.jpg")
    expected["duplicate"] = [f"{tree}PLAIN.JPEG", f"{tree}plain.jpg", "val/negative/0.jpg", "val/negative/twice.jpg"]
    expected["duplicate"] += [f"{tree}really png.jpg", f"{tree}plain.png"]
    expected["duplicate_across_splits"] = ["test/negative/leak.jpg", "train/negative/0.jpg"]
    frame, report, lines = bring("folder", source, tmp_path / "out", reading=Reading(max_unreadable=0.3))
    assert set(report) == {"counts", "problems", "found", "expected", "notes"}
    table = frame.groupby(["split", "label"]).size()
    assert {(s, e): n for s, by in report["counts"].items() for e, n in by.items()} == table.to_dict()
    problems = report["problems"]
    assert problems == {kind: sorted(ids) for kind, ids in expected.items()}
    total = len(UNFIT) + len(frame)
    assert f"  left out: {len(UNFIT)} of {total} pictures ({len(UNFIT) / total:.1%})" in lines
    left_out = {i for kind in LEFT_OUT for i in problems.get(kind, ())}
    assert not left_out & set(frame["image_id"])
    assert {i for kind in KEPT for i in problems.get(kind, ())} <= set(frame["image_id"])
    assert report["found"]["total"] == len(frame) + len(left_out)
    for kind, ids in problems.items():
        assert f"  {kind}: {len(ids)} ({'kept' if kind in KEPT else 'left out'}) {KINDS[kind]}" in lines


def test_hostile_names_are_names(tmp_path):
    source = make_tree(tmp_path / '-x --out <script>alert("1")\n100%&amp;ü')
    for i, name in enumerate(HOSTILE):  # greyscale: every one is in the report
        (source / "train" / "positive" / name).write_bytes(encoded(GRADIENT.rotate(9 * i)))
    frame, report, _ = bring("flickr", source, tmp_path / "out")
    ids = {f"train/positive/{name}" for name in HOSTILE}
    assert json.loads((tmp_path / "out" / "flickr" / "import.json").read_text())["source"] == str(source)
    assert report["problems"] == {"greyscale": sorted(ids)}
    assert ids <= {path for path in frame["path"] if (source / path).is_file()} <= {*frame["image_id"]}
