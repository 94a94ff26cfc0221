"""What the stand-in sees and reads in pre-training: drawn scenes, dialogues about them, common sense as text alone.

The wording is in `pretraining.yaml`. The emotion of a scene is never mentioned: pictures pair objects and backgrounds
at random, and feelings occur only in text about objects and words (our choice, see the model card).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from emonb.data import TAXONOMIES
from emonb.files import resource
from emonb.progress import progress
from emonb.triplets import listing, with_article
from emonb.world import (
    SIDE,
    Background,
    Camera,
    Scene,
    draw_scene,
    glyph_names,
    measured_words,
)
from tools.pretrain.checkpoint import MERGE, PATCH, frames, vocabulary, words

Turn = tuple[str, str]  # question, answer
CELLS, CELL = (SIDE // (PATCH * MERGE)) ** 2, PATCH * MERGE  # 16 merged tokens of 24 px
TOLD = 0.3  # share of a cell that a sticker must cover for the cell to be named after it
# how often a kind of question is asked; a caption or list stands alone, or later answers would copy from it
LISTS = {"caption": 0.6, "objects": 0.4}
DETAILS = {"one_object": 0.27, "place": 0.30, "yes_no": 0.10, "count": 0.03, "background": 0.30}
TEXT_KINDS = {"suggests": 0.45, "plain_suggests": 0.12, "examples": 0.13, "feeling": 0.10, "repeat": 0.20}
POSITIVE = {"amusement", "awe", "contentment", "excitement", "joy", "positive"}
NEUTRAL_FEELING = {"surprise"}


# ---- the pool of scenes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """A scene with the measured brightness and colourfulness words of its picture."""

    scene: Scene
    brightness: str
    colourfulness: str


@dataclass
class Pool:
    """Drawn scenes: patches (N, 64, 432) uint8 in merge order, descriptions, targets (N, ...) per name group."""

    patches: Tensor
    seen: list[Described]
    glyphs: Tensor  # (N, 16) index into the group "glyph"; the last is "nothing"
    background: dict[str, Tensor]  # group -> (N,)

    def __len__(self) -> int:
        return len(self.seen)


def name_groups() -> dict[str, list[str]]:
    """The names among which a visual token chooses, per group."""
    world = resource("lexicon.yaml")
    return {
        "glyph": [*glyph_names(), "nothing"],
        "hue": list(world["hues"]),
        "brightness": [word for _, word in resource("prompts.yaml", "brightness")],
        "texture": list(world["textures"]),
        "light": list(world["lights"]),
        "colourfulness": [word for _, word in resource("prompts.yaml", "colorfulness")],
    }


def draw_pool(size: int, seed: int) -> Pool:
    """Draw `size` scenes with their descriptions and stage-A targets; 28 kB of memory each."""
    rng, groups = np.random.default_rng([seed, 77]), name_groups()
    index = {group: {name: i for i, name in enumerate(names)} for group, names in groups.items()}
    pictures, seen, glyphs = np.empty((size, SIDE, SIDE, 3), np.uint8), [], []
    for i in progress(range(size), "drawing the pool"):
        pictures[i], scene = random_scene(rng)
        seen.append(Described(scene, *measured_words(pictures[i])))
        glyphs.append(cell_glyphs(scene, index["glyph"]))
    named = {
        "hue": [s.scene.hue for s in seen],
        "brightness": [s.scene.brightness for s in seen],
        "texture": [s.scene.texture for s in seen],
        "light": [s.scene.light for s in seen],
        "colourfulness": [s.colourfulness for s in seen],
    }
    background = {group: torch.tensor([index[group][name] for name in names]) for group, names in named.items()}
    return Pool(to_patches(pictures), seen, torch.tensor(glyphs), background)


def random_scene(rng: np.random.Generator) -> tuple[np.ndarray, Scene]:
    """Objects, background and camera each at random: nothing in the pool hints at an emotion."""
    world, names = resource("lexicon.yaml"), glyph_names()
    objects = [names[i] for i in rng.choice(len(names), int(rng.integers(2, 4)), replace=False)]

    def pick(group: str) -> str:
        return _pick(rng, list(world[group]))

    background = Background(pick("hues"), float(rng.uniform(0.15, 0.95)), pick("textures"), pick("lights"))
    camera = Camera(rng.uniform(2, 8), rng.uniform(0.8, 1.2), rng.uniform(0.9, 1.1), rng.choice((0, 0, 0.1, 0.3)))
    return draw_scene(rng, objects, background, camera)


def cell_glyphs(scene: Scene, index: dict[str, int]) -> list[int]:
    """For each of the 16 cells the glyph that covers most of it, "nothing" below `TOLD`."""
    best, out = [TOLD] * CELLS, [index["nothing"]] * CELLS
    for name, box in zip(scene.objects, scene.boxes, strict=True):
        for cell in range(CELLS):
            top, left = CELL * (cell // 4), CELL * (cell % 4)
            share = overlap(box, (left, top, CELL, CELL)) / CELL**2
            if share > best[cell]:
                best[cell], out[cell] = share, index[name]
    return out


def overlap(box: tuple[int, int, int], window: tuple[int, int, int, int]) -> int:
    """Square pixels of a sticker's box (x, y, side) inside a window (x, y, wide, high)."""
    (x, y, side), (left, top, wide, high) = box, window
    return max(0, min(x + side, left + wide) - max(x, left)) * max(0, min(y + side, top + high) - max(y, top))


def to_patches(pictures: np.ndarray) -> Tensor:
    """(N, 96, 96, 3) uint8 to (N, 64, 432): 12 px patches in Qwen2-VL's order (2 x 2 blocks, channel first)."""
    n, k = len(pictures), SIDE // CELL
    x = torch.from_numpy(pictures).view(n, k, MERGE, PATCH, k, MERGE, PATCH, 3)
    return x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(n, k * k * MERGE * MERGE, 3 * PATCH * PATCH).contiguous()


def to_pictures(patches: Tensor) -> Tensor:
    """(N, 3, 96, 96) uint8: `to_patches` undone."""
    k = SIDE // CELL
    x = patches.view(-1, k, k, MERGE, MERGE, 3, PATCH, PATCH)
    return x.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, 3, SIDE, SIDE)


# ---- dialogues -----------------------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, items: Sequence):
    return items[int(rng.integers(len(items)))]


def _kind(rng: np.random.Generator, shares: dict[str, float]) -> str:
    return str(list(shares)[int(np.searchsorted(np.cumsum(list(shares.values())), rng.random()))])


def caption_dialogue(rng: np.random.Generator, seen: Described) -> list[Turn]:
    """One question that is answered by a caption or a list of the objects."""
    question, answer = _pick(rng, frames()["image"][_kind(rng, LISTS)])
    told = _scene_words(rng, seen)
    return [(question.format(**told), answer.format(**told))]


def image_dialogue(rng: np.random.Generator, seen: Described, turns: int = 3) -> list[Turn]:
    """Questions with short answers about one picture: objects, places, background."""
    out = []
    for _ in range(turns):
        kind = _kind(rng, DETAILS)
        question, answer = _pick(rng, frames()["image"][kind])
        told = _scene_words(rng, seen)
        if kind == "place" and [_place(b) for b in seen.scene.boxes].count(told["place"]) > 1:
            question, answer = frames()["image"]["place"][0]  # the other question would have two answers
        out.append((question.format(**told), answer.format(**told)))
    return out


def text_dialogue(rng: np.random.Generator, turns: int = 3) -> list[Turn]:
    """Common sense without a picture: which emotion word an object suggests, what a feeling is like."""
    out = []
    for _ in range(turns):
        kind, told = _kind(rng, TEXT_KINDS), _text_words(rng)
        question, answer = _pick(rng, frames()["text"][kind])
        if kind == "plain_suggests":  # no list of labels in the question: the finest taxonomy is meant
            told["label"] = resource("lexicon.yaml", "glyphs")[told["glyph"]][1]
        out.append((question.format(**told), answer.format(**told)))
    return out


def _place(box: tuple[int, int, int]) -> str:
    """`top left`, ...: the quarter in which a box's centre lies."""
    x, y, side = box
    across = "left" if x + side / 2 < SIDE / 2 else "right"
    return f"{'top' if y + side / 2 < SIDE / 2 else 'bottom'} {across}"


def _scene_words(rng: np.random.Generator, seen: Described) -> dict[str, str]:
    scene, names, world = seen.scene, glyph_names(), resource("lexicon.yaml")
    k = int(rng.integers(len(scene.objects)))
    absent = [n for n in (_pick(rng, names) for _ in range(3)) if n not in scene.objects]
    choice = [*absent, scene.objects[k]]
    here = rng.random() < 0.5 or not absent
    return {
        "objects": listing(scene.objects),
        "names": ", ".join(scene.objects),
        "first": with_article(scene.objects[0]),
        "present": scene.objects[k],
        "a_present": with_article(scene.objects[k]),
        "choice": ", ".join(choice[i] for i in rng.permutation(len(choice))),
        "place": _place(scene.boxes[k]),
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
        "brightnesses": ", ".join(word for _, word in resource("prompts.yaml", "brightness")),
    }


def _text_words(rng: np.random.Generator) -> dict[str, str]:
    glyph, taxonomy, label = _pick(rng, _associations())
    labels = list(TAXONOMIES[taxonomy].labels)
    other = _pick(rng, [x for x in labels if x != label])
    if rng.random() < 0.5:
        labels = [labels[i] for i in rng.permutation(len(labels))]
    closing = resource("prompts.yaml", "reasoning", "closing")[label].removeprefix("Together they ")
    sign = "positive" if label in POSITIVE else "negative"
    repeated = [_pick(rng, _plain_words()) for _ in range(int(rng.integers(3, 9)))]
    return {
        "glyph": glyph,
        "a_glyph": with_article(glyph),
        "label": label,
        "other": other,
        "labels": ", ".join(labels),
        "sign": "positive or negative" if label in NEUTRAL_FEELING else sign,
        "closing": f"Such things {closing}",
        "words": " ".join(repeated),
        "word": repeated[0],
        "other_word": repeated[1],
    }


@functools.cache
def _associations() -> list[tuple[str, str, str]]:
    """(glyph, taxonomy, label) of every association in the lexicon."""
    rows = resource("lexicon.yaml", "glyphs").items()
    return [(g, t, row[1 + i]) for g, row in rows if len(row) > 1 for i, t in enumerate(TAXONOMIES)]


@functools.cache
def _plain_words() -> list[str]:
    return [w for w in vocabulary() if re.fullmatch(r"[a-z]+", w)]


class Encoder:
    """Turns dialogues into token ids, exactly as chat template and tokenizer would (a test compares)."""

    def __init__(self) -> None:
        self.ids = {w: i for i, w in enumerate(vocabulary())}
        self.system = self.words("system " + resource("prompts.yaml", "system"))

    def words(self, text: str) -> list[int]:
        """Token ids of a text."""
        return [self.ids[w] for w in words(text)]

    def encode(self, turns: Sequence[Turn], picture: bool) -> tuple[list[int], list[int]]:
        """Token ids of one dialogue and, per position, 1 where the token is to be learned (answers)."""
        start, end = self.ids["<|im_start|>"], self.ids["<|im_end|>"]
        ids, learn = [start, *self.system, end], []
        for number, (question, answer) in enumerate(turns):
            ids += [start, self.ids["user"]]
            if picture and number == 0:
                ids += [self.ids["<|vision_start|>"], *[self.ids["<|image_pad|>"]] * CELLS]
                ids += [self.ids["<|vision_end|>"]]
            ids += [*self.words(question), end, start, self.ids["assistant"]]
            learn += [0] * (len(ids) - len(learn))
            ids += [*self.words(answer), end]
            learn += [1] * (len(ids) - len(learn))
        return ids, learn


def lessons_digest(seed: int = 0, size: int = 64) -> str:
    """A hash of the first lessons that a base is given: scenes, targets, dialogues. Pixels are left out.

    It stands in the provenance of a checkpoint, and a test compares it: whoever changes the lexicon, the prompts or
    the lessons sees that the base must be made again.
    """
    pool, rng, encoder = draw_pool(size, seed), np.random.default_rng([seed, 2]), Encoder()
    told = [[p.scene.objects, p.scene.boxes, p.scene.phrase, p.scene.light, p.colourfulness] for p in pool.seen]
    asked = [encoder.encode(make(rng, p), True) for p in pool.seen for make in (caption_dialogue, image_dialogue)]
    asked += [encoder.encode(text_dialogue(rng), False) for _ in range(size)]
    text = json.dumps([vocabulary(), told, pool.glyphs.tolist(), asked])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
