"""Scenes of the drawn world: 96 x 96 pictures of pictograms on a background, and what can be said about them.

A scene has *content* (glyphs of matplotlib's DejaVu Sans, drawn as stickers) and a *mood* (hue, brightness, texture,
light). What can be drawn, and which emotion it is associated with, is read from `resources/lexicon.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import util
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from emonb.data import TAXONOMIES, brightness_colorfulness
from emonb.files import resource
from emonb.world.textures import draw_texture, hsv, lit

SIDE = 96  # pixels; 16 merged visual tokens of the stand-in
INK, HALO = (22, 20, 28), (250, 250, 250)


@dataclass(frozen=True)
class Background:
    """What is behind the stickers: names from the lexicon, `value` = mean HSV value aimed at (0-1)."""

    hue: str
    value: float
    texture: str
    light: str


@dataclass(frozen=True)
class Camera:
    """How a dataset's pictures were taken: factors, grain (sd, 0-255), darkening towards the corners (0-1)."""

    grain: float = 3.0
    saturation: float = 1.0
    contrast: float = 1.0
    vignette: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Ground truth of one picture; objects in reading order, boxes (x, y, side) in pixels."""

    objects: tuple[str, ...]
    boxes: tuple[tuple[int, int, int], ...]
    hue: str
    brightness: str
    texture: str
    light: str

    @property
    def phrase(self) -> str:
        """The background in a few words, e.g. `dark blue with rain`."""
        return f"{self.brightness} {self.hue}{self._texture}"

    @property
    def caption(self) -> str:
        """One sentence about all that is visible, without any emotion."""
        return f"{listing(self.objects)} on a {self.brightness} {self.hue} background{self._texture}"

    @property
    def _texture(self) -> str:
        return "" if self.texture == "plain" else f" with {self.texture}"


def glyph_names(taxonomy: str | None = None, label: str | None = None) -> list[str]:
    """Names of all glyphs; of those associated with `label` of `taxonomy`; label "" = the neutral ones."""
    column = 1 + list(TAXONOMIES).index(taxonomy) if taxonomy else 0
    glyphs = resource("lexicon.yaml", "glyphs")
    return [n for n, row in glyphs.items() if label is None or (row[column] if len(row) > 1 else "") == label]


def with_article(name: str) -> str:
    """`skull` -> `a skull`, `atom` -> `an atom`; plurals stay bare."""
    if name in ("scissors", "scales", "hammers", "notes", "crossed swords"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def listing(objects: Sequence[str]) -> str:
    """`a skull, a heart and an urn`."""
    *others, last = map(with_article, objects)
    return f"{', '.join(others)} and {last}" if others else last


def measured_words(picture: np.ndarray) -> tuple[str, str]:
    """Brightness and colourfulness words of a [H, W, 3] uint8 picture, by the limits in `prompts.yaml`."""
    measured = brightness_colorfulness(Image.fromarray(picture))[1]
    colour = next(word for limit, word in resource("prompts.yaml", "colorfulness") if measured < limit)
    return _brightness_word(picture), colour


def _value(picture: np.ndarray) -> float:
    return picture.max(axis=-1).mean()  # of HSV, 0-255


def _brightness_word(picture: np.ndarray) -> str:
    return next(w for limit, w in resource("prompts.yaml", "brightness") if _value(picture) / 255 < limit)


@lru_cache(1)
def _font() -> ImageFont.FreeTypeFont:
    fonts = Path(util.find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"  # no import: it takes 1 s
    return ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), 160)


@lru_cache(None)
def _glyph_mask(name: str) -> Image.Image:
    """A glyph (0-255) in a 128 px square, its larger side filling it."""
    character = chr(resource("lexicon.yaml", "glyphs")[name][0])
    left, top, right, bottom = _font().getbbox(character)
    side = max(right - left, bottom - top)
    mask = Image.new("L", (side, side))
    at = ((side - (right - left)) // 2 - left, (side - (bottom - top)) // 2 - top)
    ImageDraw.Draw(mask).text(at, character, fill=255, font=_font())
    mask = mask.resize((128, 128), Image.Resampling.BICUBIC)
    thin = np.asarray(mask).mean() < 60  # hairline glyphs vanish at sticker size: thicken them
    return mask.filter(ImageFilter.MaxFilter(5)) if thin else mask


@lru_cache(None)
def _sticker(name: str, side: int, angle: int) -> tuple[Image.Image, Image.Image]:
    """Dark glyph with a white halo, (RGB, alpha), `side` pixels wide: the halo keeps it legible anywhere."""
    glyph = _glyph_mask(name).rotate(angle, Image.Resampling.BICUBIC, expand=True)
    glyph = glyph.crop(glyph.getbbox())
    glyph.thumbnail((side - 5, side - 5), Image.Resampling.LANCZOS)
    left, top = (side - glyph.width) // 2, (side - glyph.height) // 2
    glyph = glyph.crop((-left, -top, side - left, side - top))
    picture = Image.composite(Image.new("RGB", glyph.size, INK), Image.new("RGB", glyph.size, HALO), glyph)
    return picture, glyph.filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.BoxBlur(0.6))


def _places(rng: np.random.Generator, sides: Sequence[int]) -> list[tuple[int, int, int]]:
    """Non-overlapping boxes near a 12 px grid; the four quarters when chance finds none in twelve tries."""
    last = SIDE - np.array(sides)[:, None]
    steps = np.minimum(rng.integers(0, 6, (12, len(sides), 2)), last // 12)
    corners = np.clip(12 * steps + rng.integers(-2, 4, steps.shape), 0, last)  # [tries, objects, 2]
    for found in corners.tolist():
        boxes = [(x, y, side) for (x, y), side in zip(found, sides, strict=True)]
        if all(max(abs(x - u), abs(y - v)) >= min(s, t) - 2 for (x, y, s), (u, v, t) in combinations(boxes, 2)):
            return boxes
    quarters = rng.permutation(4)[: len(sides)].tolist()
    return [(3 + 48 * (q % 2), 3 + 48 * (q // 2), side) for q, side in zip(quarters, sides, strict=True)]


def draw_background(rng: np.random.Generator, background: Background, camera: Camera) -> np.ndarray:
    """The mood alone: [96, 96, 3] float32 in 0-255, its mean HSV value close to `background.value`."""
    hue, saturation = resource("lexicon.yaml", "hues")[background.hue]
    hue = (hue + rng.uniform(-0.02, 0.02)) % 1
    saturation = float(np.clip(saturation * rng.uniform(0.8, 1.2) * camera.saturation, 0, 1))
    canvas = Image.fromarray(lit(hsv(hue, saturation, 0.6), background.light, rng).astype(np.uint8))
    draw_texture(background.texture, canvas, hue, saturation, rng)
    picture = np.asarray(canvas, np.float32)
    picture = picture * (255 * background.value / max(_value(picture), 1.0))
    mean = picture.mean((0, 1))
    # the strength of light and texture varies on its own, or the spread of the pixels would name the texture
    return np.clip(mean + (picture - mean) * camera.contrast * rng.uniform(0.6, 1.15), 0, 255)


def draw_scene(
    rng: np.random.Generator, objects: Sequence[str], background: Background, camera: Camera = Camera()
) -> tuple[np.ndarray, Scene]:
    """Draw one picture.

    Args:
        rng: decides places, angles and all jitter.
        objects: one to four names of `glyph_names()`.
        background: the mood.
        camera: grain, saturation, contrast, vignette.

    Returns:
        [96, 96, 3] uint8 picture and its description.
    """
    behind = draw_background(rng, background, camera)
    sides = [int(s) for s in rng.choice((34, 36, 38, 40, 42), len(objects))]
    boxes = _places(rng, sides)
    order = sorted(range(len(objects)), key=lambda i: (boxes[i][1] + boxes[i][2] / 2 >= SIDE / 2, boxes[i][0]))
    picture = Image.fromarray(behind.astype(np.uint8))
    for i in order:
        sticker, alpha = _sticker(objects[i], boxes[i][2], int(rng.integers(-3, 4)) * 5)
        picture.paste(sticker, boxes[i][:2], alpha)
    pixels = np.asarray(picture, np.float32)
    if camera.vignette:
        axis = np.linspace(-1, 1, SIDE, dtype=np.float32) ** 2
        pixels = pixels * (1 - camera.vignette * (axis[:, None, None] + axis[None, :, None]) / 2)
    if camera.grain:
        pixels = pixels + camera.grain * rng.standard_normal((SIDE, SIDE, 1), dtype=np.float32)
    objects, boxes = zip(*((objects[i], boxes[i]) for i in order), strict=True)
    seen = background.hue, _brightness_word(behind), background.texture, background.light
    return np.clip(pixels, 0, 255).astype(np.uint8), Scene(objects, boxes, *seen)


def mood_background(rng: np.random.Generator, mood: str) -> Background:
    """A background drawn from one mood of the lexicon."""
    row = resource("lexicon.yaml", "moods")[mood]
    typical = rng.random() < resource("lexicon.yaml", "typical_hue")
    hue = rng.choice(row["hues"] if typical else list(resource("lexicon.yaml", "hues")))
    value, texture, light = rng.uniform(*row["value"]), rng.choice(row["textures"]), rng.choice(row["lights"])
    return Background(str(hue), float(value), str(texture), str(light))
