"""Whatever a picture file holds: it is used, or named and left out; trouble of the disk is not the picture's."""

from __future__ import annotations

import errno
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
from emonb.releases.imports import LEFT_OUT, Reading
from emonb.vlm import shown

TURNED = Image.Exif()
TURNED[0x0112] = 6
GRADIENT = Image.fromarray(np.linspace(0, 255, 40 * 24).reshape(24, 40).astype("uint8"))


def with_chunk(kind, body):
    """A sound PNG with one more chunk before its pixels."""
    data = encoded(GRADIENT, "PNG")
    at = data.index(b"IDAT") - 4
    return (
        data[:at] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) + data[at:]
    )


LONG = zlib.compress(b"prompt " * 300_000)
SEEN_BY_BROWSERS = {
    "long text.png": with_chunk(b"zTXt", b"parameters\0\0" + LONG),
    "long plain text.png": with_chunk(b"tEXt", b"parameters\0" + b"x" * 3_000_000),
    "long profile.png": with_chunk(b"iCCP", b"profile\0\0" + LONG),
    "broken exif.png": with_chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
    "broken exif.jpg": encoded(GRADIENT, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"),
    "print.jpg": encoded(GRADIENT.convert("CMYK")),
    "two.mpo": encoded(GRADIENT, "MPO", save_all=True, append_images=[GRADIENT]),
    "float.tiff": encoded(GRADIENT.convert("F"), "TIFF"),
    "modern.avif": encoded(GRADIENT, "AVIF"),
}


@pytest.mark.parametrize("name", SEEN_BY_BROWSERS)
def test_what_a_browser_shows_is_used(tmp_path, name):
    (tmp_path / name).write_bytes(SEEN_BY_BROWSERS[name])
    assert inspect_picture(tmp_path / name).sha256
    picture = open_picture(tmp_path / name)
    assert (picture.mode, picture.size) == ("RGB", (40, 24))
    assert abs(picture.getpixel((20, 12))[0] - GRADIENT.getpixel((20, 12))) < 12


def test_a_picture_turned_once_stays_so_and_a_strip_gets_white_on_both_sides(tmp_path):
    for form in ("JPEG", "PNG", "TIFF", "WEBP"):
        turned = open_picture(encoded(GRADIENT, form, exif=TURNED))
        assert turned.size == shown(turned, 99).size == (24, 40)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    turned = open_picture(encoded(GRADIENT, xmp=xmp, comment=b"at home"))
    assert (turned.size, shown(turned, 99).size, turned.info) == ((24, 40), (24, 40), {})
    strip = open_picture(encoded(Image.new("RGB", (3, 1500), "red"), "PNG"))
    assert strip.size == (15, 1500)
    assert [strip.getpixel((x, 700)) for x in (0, 5, 6, 8, 9, 14)] == [(255,) * 3] * 2 + [(255, 0, 0)] * 2 + [
        (255,) * 3
    ] * 2
    clear = encoded(Image.new("P", (3, 2)), "PNG", transparency=0)
    assert open_picture(clear).getpixel((0, 0)) == (255, 255, 255)


picture_files = st.builds(
    lambda mode, size, form, exif, cut, flips: damaged(mode, size, form, exif, cut, flips),
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
    path.write_bytes(encoded(GRADIENT, "PNG"))
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
    with pytest.raises(
        EmonbError, match=r"4 of 60 pictures \(7%\).* more than 5% .*damaged 4, .*--max-unreadable 0\.07"
    ):
        bring("folder", root, tmp_path / "out")
    assert len(bring("folder", root, tmp_path / "out", reading=Reading(max_unreadable=0.07))[0]) == 56
    assert len(read_samples(stage(tmp_path / "out", "src", tmp_path / "run").path)) == 56
