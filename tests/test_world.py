"""The drawn world: the same pictures as ever, balanced, and described truthfully."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from emonb import world
from emonb.data import TAXONOMIES, taxonomy_for_dataset
from emonb.errors import EmonbError
from emonb.files import resource
from emonb.run import open_run
from emonb.triplets import listing, offline_triplets, suggested
from emonb.vlm import load_processor

SMOKE = {"mikels8": (96, 32, 64), "ekman6": (72, 24, 48), "sentiment2": (48, 16, 32)}
PIXELS = {
    "mini-fi": "a9bfde119963ab8e",
    "mini-emoset": "152dbda2319898cd",
    "mini-emotion6": "71d16aba70202b2f",
    "mini-flickr": "26494a1650500298",
    "mini-instagram": "ef8d040fab36e1dd",
}  # sha256 over the pixels of all pictures of these sizes; a change makes every published number another


@pytest.fixture(scope="module", params=world.DRAWN)
def drawn(request, tmp_path_factory):
    """Name, table and folder of each drawn dataset."""
    sizes = dict(zip(("train", "val", "test"), SMOKE[taxonomy_for_dataset(request.param).name], strict=True))
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, world.draw_dataset(request.param, folder, sizes), folder


def test_pictures_are_the_same_as_ever(drawn):
    name, frame, folder = drawn
    pixels = [np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))]
    assert {p.shape for p in pixels} == {(world.SIDE, world.SIDE, 3)}
    assert hashlib.sha256(b"".join(p.tobytes() for p in pixels)).hexdigest()[:16] == PIXELS[name]
    assert all((folder / path).is_file() for path in frame["path"])
    counts = frame.groupby(["split", "label"]).size().unstack(fill_value=0)
    assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all()


def test_descriptions_are_true(drawn):
    name, frame, _ = drawn
    taxonomy, domain = taxonomy_for_dataset(name), resource("lexicon.yaml", "datasets")[name]
    moods, looks = resource("lexicon.yaml", "labels")[taxonomy.name], resource("lexicon.yaml", "moods")
    told = {label: set(world.glyph_names(taxonomy.name, label)) for label in taxonomy.labels}
    for row in frame[~frame["noisy"]].itertuples():
        assert len(row.objects) in (2, 3)
        assert row.caption.startswith(listing(row.objects))
        signs = [label for label in taxonomy.labels if set(row.objects) & told[label]]
        assert signs == ([] if row.evidence == "mood" else [row.label])
        texture = row.scene.partition(" with ")[2] or "plain"
        assert row.evidence == "content" or texture in {t for m in moods[row.label] for t in looks[m]["textures"]}
        assert not set(row.caption.replace(",", "").split()) & set(taxonomy.labels)
        assert row.evidence == "content" or not row.off_mood
    assert ((frame["drawn_as"] != frame["label"]) == frame["noisy"]).all()
    content = frame[frame["evidence"] == "content"]
    assert content["off_mood"].mean() == pytest.approx(domain["off_mood"], abs=0.2)
    assert frame["noisy"].mean() == pytest.approx(domain["noise"], abs=0.03)
    shares = frame["evidence"].value_counts(normalize=True)
    assert [shares[k] for k in ("content", "mood", "both")] == pytest.approx(domain["evidence"], abs=0.13)


def test_redrawn_test_pictures_are_others_and_the_training_stays(drawn, tmp_path):
    name, frame, _ = drawn
    other = world.draw_dataset(name, tmp_path, frame["split"].value_counts().to_dict(), redraw=1)
    same = frame["caption"].eq(other["caption"]).groupby(frame["split"]).mean()
    assert same["train"] == same["val"] == 1 > 0.2 > same["test"]
    with pytest.raises(EmonbError, match=r"val has 1 images for \d classes"):
        world.draw_dataset(name, tmp_path / "few", {"train": 8, "val": 1, "test": 8})


@pytest.fixture(scope="module")
def taught(drawn):
    """Labels, sample table and offline triplets (rows of three) of all pictures of a drawn dataset."""
    name, frame, _ = drawn
    labels, scale = taxonomy_for_dataset(name).labels, np.linspace(0, 1, len(frame))
    hashes = [hashlib.sha256(image_id.encode()).hexdigest() for image_id in frame["image_id"]]
    frame = frame.assign(sha256=hashes, brightness=scale, colorfulness=scale)
    return labels, frame, [offline_triplets(row, labels) for row in frame.to_dict("records")]


def test_no_word_that_the_offline_annotator_writes_is_unknown_to_the_stand_in(taught):
    tokenizer = load_processor("stand-in").tokenizer
    said = {t[field] for three in taught[2] for t in three for field in ("instruction", "response")}
    said |= {re.sub(r"{\w+}", "", text) for texts in resource("lexicon.yaml", "reasons").values() for text in texts}
    unknown = [text for text in sorted(said) if tokenizer.unk_token_id in tokenizer(text)["input_ids"]]
    assert not unknown


def test_no_sentence_gives_the_label_away_yet_the_reasoning_fits_it(taught):
    labels, frame, made = taught
    said, label = pd.Series([three[2]["response"] for three in made]), frame["label"]
    often = label.groupby(said.str.findall(r"[^.]+\.").str[-1]).agg(["size", "nunique"]).query("size > 6")
    assert len(often) > 1
    assert often["nunique"].min() >= min(3, len(labels)), often
    objects = "|".join(sorted(world.glyph_names(), key=len, reverse=True))
    words = CountVectorizer().fit_transform(said.str.replace(rf"\b(?:an? )?(?:{objects})\b", "", regex=True))
    half, guess = len(said) // 2, LogisticRegression(max_iter=1000)
    assert guess.fit(words[:half], label[:half]).score(words[half:], label[half:]) < 0.85
    known = pd.DataFrame({"label": label, "suggested": [suggested(text, labels) for text in said]})[~frame["noisy"]]
    assert all(own in some or not some for own, some in known.itertuples(index=False)), "none: a plain background"
    assert known["suggested"].str.len().ge(1).mean() > 0.9


def test_a_picture_is_drawn_again_without_an_object(tmp_path):
    sizes = {"train": 8, "val": 8, "test": 8}
    frame = world.draw_dataset("mini-fi", tmp_path / "whole", sizes).set_index("image_id")
    (same, less) = frame.query("split == 'test'").index[[2, 5]]
    without = {same: [], less: frame.at[less, "objects"][:1]}
    again = world.draw_dataset("mini-fi", tmp_path / "again", sizes, without=without)
    assert again["image_id"].tolist() == [same, less]
    for image_id, low, high in ((same, -1, 1), (less, 300, 44**2)):  # a sticker's pixels, and no others
        old, new = (np.asarray(Image.open(tmp_path / f / frame.at[image_id, "path"])) for f in ("whole", "again"))
        assert low < (old != new).any(axis=2).sum() < high


def test_the_picture_that_is_followed_is_a_trap_and_not_mislabelled(tmp_path, monkeypatch):
    run = open_run("smoke", out=str(tmp_path / "out"))
    rows = {"image_id": [*"abcdefghi"], "noisy": [True, False, *[False] * 7], "off_mood": [True, False, *[True] * 7]}
    table = pd.DataFrame(rows)
    for shown, followed in ((table, "h"), (table[:4], "d"), (table[:2], "a"), (table[["image_id"]], "a")):
        monkeypatch.setattr(run, "samples", lambda dataset, split, shown=shown: shown)
        assert run.example["image_id"] == followed


def test_lexicon_is_consistent():
    lexicon = resource("lexicon.yaml")
    looks = [world.Background("grey", 0.7, texture, "even") for texture in lexicon["textures"]]
    drawn = [world.draw_background(np.random.default_rng(0), look, world.Camera()) for look in looks]
    assert len({pixels.tobytes() for pixels in drawn}) == len(looks) == 17
    assert tuple(lexicon["datasets"]) == world.DRAWN
    assert len({row[0] for row in lexicon["glyphs"].values()}) == len(lexicon["glyphs"]) >= 90
    for row in lexicon["glyphs"].values():
        assert len(row) == 1 or [label in t.labels for label, t in zip(row[1:], TAXONOMIES.values(), strict=True)]
    for mood in lexicon["moods"].values():
        assert all(set(mood[kind]) <= set(lexicon[kind]) for kind in ("textures", "hues", "lights"))


def test_glyphs_look_different_and_none_is_missing_from_the_font():
    background = world.Background("grey", 0.7, "plain", "even")
    drawn, camera = set(), world.Camera(grain=0)
    for name in world.glyph_names():
        drawn.add(world.draw_scene(np.random.default_rng(0), [name], background, camera)[0].tobytes())
    assert len(drawn) == len(world.glyph_names())


def test_stickers_stay_inside_and_apart_and_background_is_as_bright_as_asked():
    rng = np.random.default_rng(2)
    for _ in range(60):
        _, scene = world.draw_scene(rng, ["skull", "atom", "rook"], world.mood_background(rng, "awe"), world.Camera())
        for i, (x, y, side) in enumerate(scene.boxes):
            assert 0 <= min(x, y) <= max(x, y) <= world.SIDE - side
            assert all(max(abs(x - u), abs(y - v)) >= min(side, s) - 2 for u, v, s in scene.boxes[:i])
    for value, word in ((0.2, "dark"), (0.85, "bright")):
        look = world.Background("blue", value, "rain", "even")
        assert world.draw_scene(rng, ["skull"], look, world.Camera())[1].brightness == word
    assert world.measured_words(np.zeros((4, 4, 3), np.uint8)) == ("dark", "grey")
