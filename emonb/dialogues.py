"""What the stand-in reads in pre-training: dialogues about drawn scenes, and common sense as text alone.

The frames are in `resources/pretraining.yaml`. The emotion of a scene is never mentioned: pictures pair objects and
backgrounds at random, and feelings occur only in text about objects and words (our choice, see the model card).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from emonb.emotions import TAXONOMIES
from emonb.scenes import SIDE, Scene, glyph_names, lexicon, listing, with_article
from emonb.standin import resource, vocabulary

__all__ = ["Described", "Encoder", "caption_dialogue", "image_dialogue", "text_dialogue"]

Turn = tuple[str, str]
# how often a kind of question is asked; a caption or list stands alone, or later answers would copy from it
LISTS = {"caption": 0.6, "objects": 0.4}
DETAILS = {"one_object": 0.27, "place": 0.30, "yes_no": 0.10, "count": 0.03, "background": 0.30}
TEXT_KINDS = {"suggests": 0.45, "plain_suggests": 0.12, "examples": 0.13, "feeling": 0.10, "repeat": 0.20}
POSITIVE = {"amusement", "awe", "contentment", "excitement", "joy", "positive"}
NEUTRAL_FEELING = {"surprise"}


@dataclass(frozen=True)
class Described:
    """A scene with the measured brightness and colourfulness words of its picture."""

    scene: Scene
    brightness: str
    colourfulness: str


@lru_cache(1)
def _frames() -> dict:
    return resource("pretraining.yaml")


def _pick(rng: np.random.Generator, items: Sequence):
    return items[int(rng.integers(len(items)))]


def _kind(rng: np.random.Generator, shares: dict[str, float]) -> str:
    return str(list(shares)[int(np.searchsorted(np.cumsum(list(shares.values())), rng.random()))])


def place_of(box: tuple[int, int, int]) -> str:
    """`top left`, ...: the quarter in which a box's centre lies."""
    x, y, side = box
    across = "left" if x + side / 2 < SIDE / 2 else "right"
    return f"{'top' if y + side / 2 < SIDE / 2 else 'bottom'} {across}"


def _scene_words(rng: np.random.Generator, seen: Described) -> dict[str, str]:
    scene, names = seen.scene, glyph_names()
    k = int(rng.integers(len(scene.objects)))
    absent = [n for n in (_pick(rng, names) for _ in range(3)) if n not in scene.objects]
    choice = [*absent, scene.objects[k]]
    here = rng.random() < 0.5 or not absent
    world = lexicon()
    return {
        "objects": listing(scene.objects),
        "names": ", ".join(scene.objects),
        "first": with_article(scene.objects[0]),
        "present": scene.objects[k],
        "a_present": with_article(scene.objects[k]),
        "choice": ", ".join(choice[i] for i in rng.permutation(len(choice))),
        "place": place_of(scene.boxes[k]),
        "asked": with_article(scene.objects[k] if here else absent[0]),
        "yes": "yes" if here else "no",
        "count": ("one", "two", "three", "four")[len(scene.objects) - 1],
        "scene": scene.phrase,
        "hue": scene.hue,
        "background_brightness": scene.brightness,
        "texture": scene.texture,
        "light": scene.light,
        "brightness": seen.brightness,
        "colourfulness": seen.colourfulness,
        "hues": ", ".join(world["hues"]),
        "textures": ", ".join(world["textures"]),
        "lights": ", ".join(world["lights"]),
        "brightnesses": _brightnesses(),
    }


@lru_cache(1)
def _brightnesses() -> str:
    return ", ".join(word for _, word in resource("prompts.yaml")["brightness"])


def caption_dialogue(rng: np.random.Generator, seen: Described) -> list[Turn]:
    """One question that is answered by a caption or a list of the objects."""
    question, answer = _pick(rng, _frames()["image"][_kind(rng, LISTS)])
    words = _scene_words(rng, seen)
    return [(question.format(**words), answer.format(**words))]


def image_dialogue(rng: np.random.Generator, seen: Described, turns: int = 3) -> list[Turn]:
    """Questions with short answers about one picture: objects, places, background."""
    out = []
    for _ in range(turns):
        kind = _kind(rng, DETAILS)
        question, answer = _pick(rng, _frames()["image"][kind])
        words = _scene_words(rng, seen)
        if kind == "place" and [place_of(b) for b in seen.scene.boxes].count(words["place"]) > 1:
            question, answer = _frames()["image"]["place"][0]  # the other question would have two answers
        out.append((question.format(**words), answer.format(**words)))
    return out


@lru_cache(1)
def _associations() -> list[tuple[str, str, str]]:
    """(glyph, taxonomy, label) of every association in the lexicon."""
    rows = lexicon()["glyphs"].items()
    return [(g, t, row[1 + i]) for g, row in rows if len(row) > 1 for i, t in enumerate(TAXONOMIES)]


@lru_cache(1)
def _plain_words() -> list[str]:
    return [w for w in vocabulary() if re.fullmatch(r"[a-z]+", w)]


def _text_words(rng: np.random.Generator) -> dict[str, str]:
    glyph, taxonomy, label = _pick(rng, _associations())
    labels = list(TAXONOMIES[taxonomy].labels)
    other = _pick(rng, [x for x in labels if x != label])
    if rng.random() < 0.5:
        labels = [labels[i] for i in rng.permutation(len(labels))]
    closing = _closings()[label].removeprefix("Together they ")
    sign = "positive" if label in POSITIVE else "negative"
    words = [_pick(rng, _plain_words()) for _ in range(int(rng.integers(3, 9)))]
    return {
        "glyph": glyph,
        "a_glyph": with_article(glyph),
        "label": label,
        "other": other,
        "labels": ", ".join(labels),
        "sign": "positive or negative" if label in NEUTRAL_FEELING else sign,
        "closing": f"Such things {closing}",
        "words": " ".join(words),
        "word": words[0],
        "other_word": words[1],
    }


@lru_cache(1)
def _closings() -> dict[str, str]:
    """The closing sentence of each label from `prompts.yaml`: what the feeling is like."""
    return resource("prompts.yaml")["reasoning"]["closing"]


def text_dialogue(rng: np.random.Generator, turns: int = 3) -> list[Turn]:
    """Common sense without a picture: which emotion word an object suggests, what a feeling is like."""
    out = []
    for _ in range(turns):
        kind, words = _kind(rng, TEXT_KINDS), _text_words(rng)
        question, answer = _pick(rng, _frames()["text"][kind])
        if kind == "plain_suggests":  # no list of labels in the question: the finest taxonomy is meant
            words["label"] = lexicon()["glyphs"][words["glyph"]][1]
        out.append((question.format(**words), answer.format(**words)))
    return out


class Encoder:
    """Turns dialogues into padded token ids, exactly as chat template and tokenizer would (a test compares)."""

    def __init__(self) -> None:
        self.ids = {w: i for i, w in enumerate(vocabulary())}
        self.system = self._words("system " + resource("prompts.yaml")["system"])

    def _words(self, text: str) -> list[int]:
        return [self.ids[w] for w in re.findall(r"\w+|[^\w\s]", text.lower())]

    def encode(self, turns: Sequence[Turn], picture: bool) -> tuple[list[int], list[int]]:
        """Token ids of one dialogue and, per position, 1 where the token is to be learned (answers)."""
        start, end = self.ids["<|im_start|>"], self.ids["<|im_end|>"]
        ids, learn = [start, *self.system, end], []
        for number, (question, answer) in enumerate(turns):
            ids += [start, self.ids["user"]]
            if picture and number == 0:
                ids += [self.ids["<|vision_start|>"], *[self.ids["<|image_pad|>"]] * 16, self.ids["<|vision_end|>"]]
            ids += [*self._words(question), end, start, self.ids["assistant"]]
            learn += [0] * (len(ids) - len(learn))
            ids += [*self._words(answer), end]
            learn += [1] * (len(ids) - len(learn))
        return ids, learn
