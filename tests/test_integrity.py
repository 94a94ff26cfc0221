"""Room 01: what is wrong or unusual about pictures is found, counted, and shown without doing harm."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import tracemalloc
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFile
from pipeline import paint
from release_folders import PAIR, sentiment

from emonb import integrity
from emonb.imports import import_release
from emonb.integrity import KINDS, Inspection, duplicates, inspect_picture, inspected, leakage, problem_table
from emonb.integrity_page import dataset_page, examples
from emonb.listing import listing_digest
from emonb.releases import read_release
from emonb.sheets import picture_rows

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8))
HOSTILE = [
    "a b.jpg",
    "-rf.jpg",
    "--out.jpg",
    "'quote'.jpg",
    'a" onerror="alert(1).jpg',
    "<script>alert(1)<.jpg",
    "&amp;&lt;.jpg",
    "line\nbreak\r\t.jpg",
    "100%20%s%d{x}$HOME`id`.jpg",
    "ünï-猫-🙂.jpg",
    "right\u202eto left.jpg",
    "back\\slash.jpg",
    "#?;=.jpg",
]


def encoded(form="JPEG", image=NOISE, **options):
    """A picture as the bytes of a file."""
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def half(form):
    return (whole := encoded(form))[: len(whole) // 2]


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(exif=exif)


def moving(form):
    return encoded(form, save_all=True, append_images=[NOISE.rotate(90), NOISE.rotate(180)])


def broken_png():
    """A PNG whose compressed data are damaged in the middle."""
    whole = bytearray(encoded("PNG"))
    whole[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    return bytes(whole)


def bomb(side=60_000):
    """A PNG of a hundred bytes that says it is 60,000 x 60,000 px."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9)))]
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def depth_16():
    ramp = np.linspace(0, 65535, 64 * 48).reshape(64, 48).astype("uint16")
    return encoded("PNG", Image.fromarray(ramp))


UNFIT = [
    ("zero.jpg", b"", "empty"),
    ("cut.jpg", half("JPEG"), "truncated"),
    ("cut.png", half("PNG"), "truncated"),
    ("cut.webp", half("WEBP"), "truncated"),
    ("header.png", encoded("PNG")[:20], "truncated"),
    ("broken.png", broken_png(), "damaged"),
    ("text.jpg", b"dear reader, this is no picture", "not_a_picture"),
    ("sound.webp", b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(40), "not_a_picture"),
    ("drawing.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_a_picture"),
    ("bomb.png", bomb(), "decompression_bomb"),
    ("bomb9500.png", bomb(9_500), "decompression_bomb"),  # below the bound at which Pillow itself refuses
]
UNUSUAL = [
    ("plain.jpg", encoded(), ()),
    ("plain.png", encoded("PNG"), ()),
    ("PLAIN.JPEG", encoded(), ()),
    ("really png.jpg", encoded("PNG"), ("wrong_suffix",)),
    ("grey.jpg", encoded(image=NOISE.convert("L")), ("greyscale",)),
    ("bits.png", encoded("PNG", NOISE.convert("1")), ("greyscale",)),
    ("grey16.png", depth_16(), ("greyscale",)),
    ("print.jpg", encoded(image=NOISE.convert("CMYK")), ("cmyk",)),
    ("few.png", encoded("PNG", NOISE.convert("P")), ("palette",)),
    ("clear.png", encoded("PNG", NOISE.convert("RGBA")), ()),
    ("turned.jpg", turned(), ("exif_rotated",)),
    ("moving.webp", moving("WEBP"), ("animated",)),
    ("moving gif.png", moving("GIF"), ("wrong_suffix", "animated", "palette")),
    ("wide.png", encoded("PNG", Image.new("RGB", (4097, 2), "red")), ("very_large",)),
    ("damaged exif.jpg", encoded(exif=b"Exif\0\0garbage, no TIFF header"), ()),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("name", "content", "kind"), UNFIT, ids=[row[0] for row in UNFIT])
def test_what_cannot_be_used_and_why(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    found = inspect_picture(tmp_path / name)
    assert found.kinds == ("unreadable", kind)
    assert found.sha256 == ""
    assert KINDS[kind].left_out


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(("name", "content", "kinds"), UNUSUAL, ids=[row[0] for row in UNUSUAL])
def test_what_is_unusual_but_can_be_used(tmp_path, name, content, kinds):
    (tmp_path / name).write_bytes(content)
    found = inspect_picture(tmp_path / name)
    assert found.kinds == kinds
    assert len(found.sha256) == 64
    assert not any(KINDS[kind].left_out for kind in kinds)
    assert 0.3 < found.brightness <= 1


def test_sixteen_bits_keep_their_shades(tmp_path):
    (tmp_path / "grey16.png").write_bytes(depth_16())
    assert inspect_picture(tmp_path / "grey16.png").brightness == pytest.approx(0.5, abs=0.02)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 60_000])
def test_a_bomb_is_never_decoded(tmp_path, monkeypatch, side):
    def decode(self):
        raise AssertionError("decoded")  # would be told as damaged

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    (tmp_path / "bomb.png").write_bytes(bomb(side))
    assert inspect_picture(tmp_path / "bomb.png").kinds == ("unreadable", "decompression_bomb")
    (tmp_path / "plain.png").write_bytes(encoded("PNG"))
    assert inspect_picture(tmp_path / "plain.png").kinds == ("unreadable", "damaged")


def test_memory_grows_by_little_a_picture(tmp_path, monkeypatch):
    def look(path):  # decoding is not what grows
        return Inspection((), hashlib.sha256(path.name.encode()).hexdigest(), 0.5, 0.5)

    monkeypatch.setattr(integrity, "inspect_picture", look)

    def peak(n):
        names = pd.Series([f"image/contentment/contentment_{i:06}.jpg" for i in range(n)], dtype="str")
        tracemalloc.start()
        found, problems = inspected(pd.DataFrame({"image_id": names, "path": names}), tmp_path, "names")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (found["sha256"].nunique(), problems) == (n, {})
        return peak

    peak(600)  # what is loaded and cached on first use
    assert (peak(6_000) - peak(1_000)) / 5_000 < 400  # bytes; the sha256 alone is 64


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "gone.jpg").symlink_to("nothing.jpg")
    assert inspect_picture(tmp_path / "loop.jpg").kinds == ("unreadable", "symlink_loop")
    assert inspect_picture(tmp_path / "gone.jpg").kinds == ("unreadable", "no_access")
    assert inspect_picture(tmp_path).kinds == ("unreadable", "no_access")


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "private.jpg"
    path.write_bytes(encoded())
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything: the refusal is played
        whole = Path.open

        def refuse(self, *arguments, **options):
            if self == path:
                raise PermissionError(13, "Permission denied", str(path))
            return whole(self, *arguments, **options)

        monkeypatch.setattr(Path, "open", refuse)
    assert inspect_picture(path).kinds == ("unreadable", "no_access")


def import_tree(tmp_path, spoil, **options):
    """A small tree, spoilt, imported as `folder`: the sample table, the report, the page."""
    source = sentiment(tmp_path / "tree")
    spoil(source)
    target = import_release("folder", source, tmp_path / "out", say=str, **options)
    report = json.loads((target / "integrity.json").read_text())
    return pd.read_parquet(target / "samples.parquet"), report, (target / "integrity.html").read_text()


def surroundings(root):
    """All that can lie around in a tree."""
    folder = root / "train" / "positive"
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "gone.jpg").symlink_to("nothing.jpg")
    (folder / "up.jpg").symlink_to(root)
    (root / "train" / "again").symlink_to(root / "train")
    (folder / "notes.txt").write_text("notes")
    (folder / "more").mkdir()
    (folder / ".hidden").touch()
    (folder / "._0.jpg").write_bytes(b"a Mac's second half of a file")
    (root / "train" / "stray.jpg").write_bytes(encoded())
    (root / "documents").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    shutil.copyfile(folder / "0.jpg", os.fsencode(folder) + b"/latin-\xfc.jpg")
    os.mkdir(os.fsencode(root / "train") + b"/fr\xf6hlich")


def test_everything_around_the_pictures_is_told(tmp_path):
    frame, report, page = import_tree(tmp_path, surroundings)
    assert report["problems"] == {
        "broken_link": ["train/positive/gone.jpg"],
        "symlink_loop": ["train/again", "train/positive/loop.jpg", "train/positive/up.jpg"],
        "undecodable_name": ["train/fr\\xf6hlich", "train/positive/latin-\\xfc.jpg"],
        "unused_file": [
            "documents/",
            "train/positive/more/",
            "train/positive/notes.txt",
            "train/positive/pipe.jpg",
            "train/stray.jpg",
        ],
    }
    assert len(frame) == 14
    assert "latin-\\\\xfc.jpg" in page or "latin-\\xfc.jpg" in page


def all_kinds(root):
    for name, content, _ in (*UNFIT, *UNUSUAL):
        (root / "train" / "positive" / name).write_bytes(content)
    shutil.copy(root / "train" / "negative" / "0.jpg", root / "test" / "negative" / "leak.jpg")
    shutil.copy(root / "val" / "negative" / "0.jpg", root / "val" / "negative" / "twice.jpg")


@pytest.mark.filterwarnings("error")  # Pillow's remarks must not reach the screen either
def test_counts_and_problems_follow_from_the_table(tmp_path):
    frame, report, page = import_tree(tmp_path, all_kinds)
    assert set(report) == {"counts", "problems", "found", "expected"}
    table = frame.groupby(["split", "label"]).size()
    assert {(s, e): n for s, by in report["counts"].items() for e, n in by.items()} == table.to_dict()
    problems = {kind: sorted(ids) for kind, ids in report["problems"].items()}
    assert problems == report["problems"]
    tree = "train/positive/"
    expected = {"unreadable": [tree + name for name, _, _ in UNFIT]}
    for name, _, kinds in (*((n, c, (k,)) for n, c, k in UNFIT), *UNUSUAL):
        for kind in kinds:
            expected.setdefault(kind, []).append(tree + name)
    expected["duplicate"] = [f"{tree}PLAIN.JPEG", f"{tree}plain.jpg", "val/negative/0.jpg", "val/negative/twice.jpg"]
    expected["duplicate"] += [f"{tree}really png.jpg", f"{tree}plain.png"]
    expected["duplicate_across_splits"] = ["test/negative/leak.jpg", "train/negative/0.jpg"]
    assert problems == {kind: sorted(ids) for kind, ids in expected.items()}
    left_out = {i for kind, ids in problems.items() if KINDS[kind].left_out for i in ids}
    assert not left_out & set(frame["image_id"])
    kept = {i for kind, ids in problems.items() if not KINDS[kind].left_out for i in ids}
    assert kept <= set(frame["image_id"])
    assert report["found"]["total"] == len(frame) + len(left_out)
    parsed = Page(page)
    assert parsed.rows("kind") == {
        kind: [f"{len(ids)}", "left out" if KINDS[kind].left_out else "kept"] for kind, ids in problems.items()
    }
    assert parsed.tags["img"] == sum(min(8, len(ids)) for kind, ids in problems.items() if KINDS[kind].shown)


class Page(HTMLParser):
    """A page as a browser takes it: how often each element occurs, attributes, text, tables by their first head."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts, self.tables, self.inside = {}, set(), [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attributes:
            self.attributes.add(name)
            if name in ("src", "href"):
                assert value.startswith(("data:image/jpeg;base64,", "#")), value
        if tag == "table":
            self.inside = True
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "table"

    def handle_data(self, data):
        self.texts.append(data)
        if self.inside and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data

    def rows(self, head):
        """Rows of the table whose first head cell is `head`: first cell -> the others."""
        table = next(t for t in self.tables if t[0][0] == head)
        return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in table[1:]}


def visible(name):
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def test_hostile_names_from_file_to_page(tmp_path):
    def spoil(root):
        for i, name in enumerate(HOSTILE):
            data = encoded(image=NOISE.rotate(i).convert("L"))  # greyscale: every one is in the report
            (root / "train" / "positive" / name).write_bytes(data)
        hostile = root / "train" / "positive" / '"><img src=x onerror=alert(1)>.jpg'
        hostile.write_bytes(b"no picture")

    frame, report, page = import_tree(tmp_path, spoil)
    ids = [f"train/positive/{name}" for name in HOSTILE]
    assert report["problems"]["greyscale"] == sorted(ids)
    rows = frame.set_index("image_id").loc[ids]
    assert all((tmp_path / "tree" / path).is_file() for path in rows["path"])
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert parsed.tags["img"] == 8  # thumbnails, none from a name
    assert parsed.attributes <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "style", "href", "id", "src", "alt", "open",
    }  # fmt: skip
    assert [i for i in ids if visible(i) not in parsed.texts] == []
    assert 'train/positive/"><img src=x onerror=alert(1)>.jpg' in parsed.texts
    assert "\u202e" not in page


@pytest.mark.parametrize("name", ['<script>alert("1")', "-x --out y", "a\nb", "100%&amp;", "ünï"])
def test_a_hostile_name_of_the_release_itself(tmp_path, name):
    source = sentiment(tmp_path / name)
    target = import_release("flickr", source, tmp_path / "out", say=str)
    assert json.loads((target / "import.json").read_text())["source"] == str(source)
    parsed = Page((target / "integrity.html").read_text())
    assert "script" not in parsed.tags
    assert visible(str(source)) in parsed.texts


def test_more_names_than_fit_are_in_the_json(tmp_path):
    def spoil(root):
        for i in range(205):
            (root / "train" / "positive" / f"empty{i:03}.jpg").touch()

    _, report, page = import_tree(tmp_path, spoil)
    assert len(report["problems"]["empty"]) == 205
    assert "and 5 more in integrity.json" in page
    assert "empty204" not in page


def test_a_source_is_never_written_to(tmp_path):
    source = sentiment(tmp_path / "tree")
    folders = [source, *(p for p in source.rglob("*") if p.is_dir())]
    for path in folders:
        path.chmod(0o555)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ctime_ns) for p in (source, *source.rglob("*"))}
    try:
        import_release("folder", source, tmp_path / "out", say=str)
        assert {p: (p.stat().st_mtime_ns, p.stat().st_ctime_ns) for p in (source, *source.rglob("*"))} == before
    finally:
        for path in folders:
            path.chmod(0o755)


def test_leakage_counts_pictures_by_pairs_of_splits():
    rows = [("train", "a"), ("train", "a"), ("test", "a"), ("val", "b"), ("test", "b"), ("train", "c"), ("val", "a")]
    frame = pd.DataFrame(rows, columns=["split", "letter"]).assign(image_id=list("1234567"))
    frame["sha256"] = [64 * x for x in frame["letter"]]
    assert leakage(frame) == {"train and val": 1, "train and test": 1, "val and test": 2}
    assert duplicates(frame)["duplicate"] == ["1", "2"]
    assert duplicates(frame)["duplicate_across_splits"] == ["1", "2", "3", "4", "5", "7"]


@pytest.mark.parametrize("sizes", [{"": 30}, {"train": 30, "test": 2}])
def test_a_split_made_here_keeps_copies_together(tmp_path, sizes):
    source = sentiment(tmp_path / "src", sizes)
    for i in range(10):
        folder = source / next(iter(sizes)) / "positive"
        shutil.copy(folder / f"{i}.jpg", folder / f"copy{i}.jpg")
    target = import_release("flickr", source, tmp_path / "out", say=str)
    problems = json.loads((target / "integrity.json").read_text())["problems"]
    assert list(problems) == ["duplicate"]
    assert len(problems["duplicate"]) == 20


def test_a_change_behind_a_linked_folder_is_noticed(tmp_path):
    source = sentiment(tmp_path / "src")
    (tmp_path / "elsewhere").mkdir()
    (source / "train").rename(tmp_path / "elsewhere" / "train")
    (source / "train").symlink_to(tmp_path / "elsewhere" / "train")
    (source / "train" / "up").symlink_to(tmp_path / "elsewhere")
    assert len(read_release("flickr", source).frame) == 14
    before = listing_digest(source)
    assert listing_digest(source) == before
    paint(tmp_path / "elsewhere" / "train" / "positive" / "new.jpg", PAIR["positive"], 1)
    assert listing_digest(source) != before


def test_the_page_and_the_examples_of_a_run(tmp_path):
    from test_releases import stage

    all_kinds(sentiment(tmp_path / "images" / "pets"))
    artifact = stage(tmp_path / "images", "pets", tmp_path / "out")
    found = examples(artifact, each=2)
    assert {"greyscale", "cmyk", "palette", "animated", "exif_rotated", "duplicate_across_splits"} <= set(found)
    assert not {"empty", "truncated", "unreadable"} & set(found)
    assert all(0 < len(pictures) <= 2 and max(p.size) <= 96 for pictures in found.values() for p in pictures)
    shown = [ax for ax in picture_rows(found, "examples").axes if ax.images]
    assert len(shown) == sum(map(len, found.values()))
    page = Page(dataset_page("pets", artifact))
    report = json.loads((artifact.path / "integrity.json").read_text())
    table = problem_table({"pets": report}).set_index("problem")
    assert page.rows("kind") == {kind: [str(row["pictures"]), row["consequence"]] for kind, row in table.iterrows()}
    assert set(table.index) == set(report["problems"])


def test_a_report_that_names_files_outside_shows_none_of_them(tmp_path):
    from test_releases import stage

    source = sentiment(tmp_path / "images" / "pets")
    paint(tmp_path / "images" / "secret.jpg", (1, 2, 3), 1)
    artifact = stage(tmp_path / "images", "pets", tmp_path / "out")
    report = json.loads((artifact.path / "integrity.json").read_text())
    os.mkfifo(source / "pipe.jpg")
    names = ["../secret.jpg", str(tmp_path / "images" / "secret.jpg"), "pipe.jpg", "absent.jpg", "nul\0.jpg"]
    report["problems"] = {"ambiguous_valence_left_out": names}
    (artifact.path / "integrity.json").write_text(json.dumps(report))
    assert examples(artifact) == {}
    assert "img" not in Page(dataset_page("pets", artifact)).tags
