"""The drawn world: reproducible, balanced, and described truthfully."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emonb.emotions import TAXONOMIES, taxonomy_for_dataset
from emonb.errors import EmonbError
from emonb.miniworld import DRAWN, draw_dataset
from emonb.scenes import (
    SIDE,
    Background,
    Camera,
    draw_scene,
    glyph_names,
    lexicon,
    listing,
    measured_words,
    mood_background,
)
from emonb.textures import TEXTURES

SMOKE = {"mikels8": (96, 32, 64), "ekman6": (72, 24, 48), "sentiment2": (48, 16, 32)}


def _sizes(name: str) -> dict[str, int]:
    return dict(zip(("train", "val", "test"), SMOKE[taxonomy_for_dataset(name).name], strict=True))


def _digest(folder: Path) -> str:
    files = sorted(folder.rglob("*.png"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in DRAWN}
    return {name: (draw_dataset(name, f, _sizes(name)), f) for name, f in folders.items()}


def test_same_seed_gives_equal_bytes_and_rows(drawn, tmp_path):
    frame, folder = drawn["mini-flickr"]
    again = draw_dataset("mini-flickr", tmp_path, _sizes("mini-flickr"))
    assert frame.equals(again)
    assert _digest(folder) == _digest(tmp_path)


def test_another_seed_and_another_dataset_differ(drawn, tmp_path):
    other = draw_dataset("mini-flickr", tmp_path, _sizes("mini-flickr"), seed=1)
    assert _digest(tmp_path) != _digest(drawn["mini-flickr"][1])
    assert list(other["caption"]) != list(drawn["mini-flickr"][0]["caption"])
    assert len({_digest(folder) for _, folder in drawn.values()}) == len(DRAWN)


@pytest.mark.parametrize("name", DRAWN)
def test_every_class_in_every_split_and_balanced(drawn, name):
    frame, folder = drawn[name]
    labels = taxonomy_for_dataset(name).labels
    counts = frame.groupby(["split", "label"]).size().unstack(fill_value=0)
    assert set(counts.columns) == set(labels)
    assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all()
    assert all((folder / path).is_file() for path in frame["path"])
    assert list(frame["image_id"]) == [p.removeprefix("images/").removesuffix(".png") for p in frame["path"]]
    with Image.open(folder / frame["path"][0]) as picture:
        assert (picture.size, picture.mode) == ((SIDE, SIDE), "RGB")


@pytest.mark.parametrize("name", DRAWN)
def test_descriptions_are_true(drawn, name):
    frame, _ = drawn[name]
    taxonomy = taxonomy_for_dataset(name)
    moods = lexicon()["labels"][taxonomy.name]
    told = {label: set(glyph_names(taxonomy.name, label)) for label in taxonomy.labels}
    for row in frame[~frame["noisy"]].itertuples():
        assert len(row.objects) in (2, 3)
        assert row.caption.startswith(listing(row.objects))
        signs = [label for label in taxonomy.labels if set(row.objects) & told[label]]
        assert signs == ([] if row.evidence == "mood" else [row.label])
        if row.evidence != "content":
            texture = row.scene.partition(" with ")[2] or "plain"
            assert texture in {t for mood in moods[row.label] for t in lexicon()["moods"][mood]["textures"]}
        assert not set(row.caption.replace(",", "").split()) & set(taxonomy.labels)


@pytest.mark.parametrize("name", DRAWN)
def test_label_noise_and_evidence_have_their_shares(drawn, name):
    frame, _ = drawn[name]
    domain = lexicon()["datasets"][name]
    assert frame["noisy"].mean() == pytest.approx(domain["noise"], abs=0.03)
    told = frame["evidence"].value_counts(normalize=True)
    assert [told[k] for k in ("content", "mood", "both")] == pytest.approx(domain["evidence"], abs=0.13)


def test_wrong_name_and_too_few_pictures_are_refused(tmp_path):
    with pytest.raises(EmonbError, match="mini-fi"):
        draw_dataset("mini-bass", tmp_path, {"train": 8, "val": 8, "test": 8})
    with pytest.raises(EmonbError, match=r"val has 3 images for 8 classes"):
        draw_dataset("mini-fi", tmp_path, {"train": 8, "val": 3, "test": 8})


def test_lexicon_is_consistent():
    world = lexicon()
    assert set(world["textures"]) == set(TEXTURES)
    codes = [row[0] for row in world["glyphs"].values()]
    assert len(set(codes)) == len(codes) >= 90
    for row in world["glyphs"].values():
        assert len(row) == 1 or [label in t.labels for label, t in zip(row[1:], TAXONOMIES.values(), strict=True)]
    for mood in world["moods"].values():
        assert set(mood["textures"]) <= set(TEXTURES)
        assert set(mood["hues"]) <= set(world["hues"])
        assert set(mood["lights"]) <= set(world["lights"])
    for name in DRAWN:
        assert sum(world["datasets"][name]["evidence"]) == pytest.approx(1)


def test_glyphs_look_different_and_none_is_missing_from_the_font():
    background, looks = Background("grey", 0.7, "plain", "even"), set()
    for name in glyph_names():
        pixels, scene = draw_scene(np.random.default_rng(0), [name], background, Camera(grain=0))
        assert scene.objects == (name,)
        looks.add(pixels.tobytes())
    assert len(looks) == len(glyph_names())


def test_stickers_stay_inside_and_apart_and_background_is_as_bright_as_asked():
    rng = np.random.default_rng(2)
    for _ in range(60):
        _, scene = draw_scene(rng, ["skull", "atom", "rook"], mood_background(rng, "awe"))
        for i, (x, y, side) in enumerate(scene.boxes):
            assert 0 <= x <= SIDE - side
            assert 0 <= y <= SIDE - side
            for u, v, other in scene.boxes[:i]:
                assert abs(x - u) >= min(side, other) - 2 or abs(y - v) >= min(side, other) - 2
    dark, light = (
        draw_scene(rng, ["skull"], Background("blue", value, "rain", "even"))[1].brightness for value in (0.2, 0.85)
    )
    assert (dark, light) == ("dark", "bright")
    assert measured_words(np.zeros((4, 4, 3), np.uint8)) == ("dark", "grey")


def test_mood_is_not_readable_from_six_pixel_statistics():
    """The trial's 93 % made mood trivial; a vision model must have something to learn here."""
    from emonb.base_health import six_statistics

    assert 0.3 < six_statistics(7, (900, 300)) < 0.75
