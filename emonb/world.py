"""The drawn world: five labelled datasets of drawn scenes, 96 x 96 pictures of pictograms on a background.

They stand in for the paper's datasets where none is on disk (our choice: a laptop run needs no download); accuracies
on them are not comparable with the paper's. A scene has *content* (glyphs of matplotlib's DejaVu Sans, drawn as
stickers) and a *mood* (hue, brightness, texture, light); its emotion shows in one of them, or in both. What can be
drawn, and which emotion it is associated with, is read from `resources/lexicon.yaml`. Ignore it
if you have photographs.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from importlib import util
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from emonb.data import TAXONOMIES, brightness_colorfulness
from emonb.errors import EmonbError
from emonb.files import resource
from emonb.settings import SPLITS
from emonb.triplets import listing

SIDE = 96  # pixels; 16 merged visual tokens of the stand-in
INK, HALO = (22, 20, 28), (250, 250, 250)
COLUMNS = ("image_id", "path", "split", "label", "caption", "objects", "scene")
COLUMNS += ("evidence", "off_mood", "drawn_as", "noisy")
DRAWN = ("mini-fi", "mini-emoset", "mini-emotion6", "mini-flickr", "mini-instagram")

# ---- datasets ------------------------------------------------------------------------------------------------------


def draw_dataset(
    name: str,
    folder: Path,
    sizes: Mapping[str, int],
    redraw: int = 0,
    without: Mapping[str, Collection[str]] | None = None,
) -> pd.DataFrame:
    """Draw one of the datasets in `DRAWN`, byte-equal every time: `folder/images/<split>/<label>/<number>.png`.

    `sizes` are images per split; fewer than classes raise `EmonbError`. `redraw`: another number gives other test
    images, and the same ones for training. With `without`, {image_id: objects}, these images alone are drawn again,
    as they were but for these objects. Returns one row per image, with `COLUMNS`: path (relative to folder), label
    (after noise), evidence (content, mood or both), off_mood (content before another emotion's mood), drawn_as (the
    emotion before noise), noisy (label was swapped), ...
    """
    domain = resource("lexicon.yaml", "datasets")[name]
    labels, own, pools = TAXONOMIES[domain["taxonomy"]].labels, np.random.default_rng(zlib.crc32(name.encode())), {}
    for label in ("", *labels):  # the glyphs that this dataset uses, "": neutral ones; fixed by its name
        names = glyph_names(domain["taxonomy"], label)
        keep = own.permutation(len(names))[: max(3, round(domain["glyphs"] * len(names)))]
        pools[label] = [names[i] for i in sorted(keep)]
    camera = Camera(domain["grain"], domain["saturation"], domain["contrast"], domain["vignette"])
    rows = []
    for number, split in enumerate(SPLITS):
        size = sizes[split]
        if without is not None and not any(image_id.startswith(f"{split}/") for image_id in without):
            continue
        if size < len(labels):
            raise EmonbError(f"dataset {name}: {split} has {size} images for {len(labels)} classes; raise world sizes")
        rng = np.random.default_rng([redraw if split == "test" else 0, zlib.crc32(name.encode()), number])
        latent = [labels[i % len(labels)] for i in rng.permutation(size)]
        evidence = rng.choice(("content", "mood", "both"), size, p=domain["evidence"]).tolist()
        given = _swap_labels(rng, latent, domain["noise"])
        for label in labels:
            (folder / "images" / split / label).mkdir(parents=True, exist_ok=True)
        for i in range(size):
            objects, background, off_mood = _compose(rng, latent[i], evidence[i], domain, pools)
            image_id = f"{split}/{given[i]}/{i:05d}"
            pixels, scene = draw_scene(rng, objects, background, camera, (without or {}).get(image_id, ()))
            if without is not None and image_id not in without:
                continue
            path = f"images/{image_id}.png"
            Image.fromarray(pixels).save(folder / path, compress_level=1)
            told = (scene.caption, list(scene.objects), scene.phrase, evidence[i], off_mood, latent[i])
            rows.append((image_id, path, split, given[i], *told, given[i] != latent[i]))
    return pd.DataFrame(rows, columns=COLUMNS)


def _compose(
    rng: np.random.Generator, label: str, evidence: str, domain: Mapping[str, Any], pools: Mapping[str, list[str]]
) -> tuple[list[str], Background, bool]:
    """Objects and background so that the emotion shows only where `evidence` says; is the mood another emotion's?"""
    moods = resource("lexicon.yaml", "labels")[domain["taxonomy"]]
    count, telling = int(rng.integers(2, 4)), int(rng.integers(1, 3))
    objects = [] if evidence == "mood" else rng.choice(pools[label], telling, replace=False).tolist()
    objects += rng.choice(pools[""], count - len(objects), replace=False).tolist()
    mood = str(rng.choice(moods[label]))
    if evidence == "content":
        others = [m for other, names in moods.items() if other != label for m in names]
        mood = str(rng.choice(others)) if rng.random() < domain["off_mood"] else "neutral"
    return objects, mood_background(rng, mood), evidence == "content" and mood != "neutral"


def _swap_labels(rng: np.random.Generator, labels: list[str], share: float) -> list[str]:
    """Label noise as swaps between two images of different classes: the class counts stay as they are."""
    given, order = list(labels), rng.permutation(len(labels)).tolist()
    for _ in range(round(share * len(labels) / 2)):
        i = order.pop()
        j = next(k for k in order if labels[k] != labels[i])
        order.remove(j)
        given[i], given[j] = labels[j], labels[i]
    return given


# ---- scenes --------------------------------------------------------------------------------------------------------


class Background(NamedTuple):
    """What is behind the stickers: names from the lexicon, `value` = mean HSV value aimed at (0-1)."""

    hue: str
    value: float
    texture: str
    light: str


class Camera(NamedTuple):
    """How a dataset's pictures were taken: factors, grain (sd, 0-255), darkening towards the corners (0-1)."""

    grain: float = 3.0
    saturation: float = 1.0
    contrast: float = 1.0
    vignette: float = 0.0


class Scene(NamedTuple):
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
        return f"{self.brightness} {self.hue} with {self.texture}".removesuffix(" with plain")

    @property
    def caption(self) -> str:
        """One sentence about all that is visible, without any emotion."""
        behind = f"{self.brightness} {self.hue} background with {self.texture}".removesuffix(" with plain")
        return f"{listing(self.objects)} on a {behind}"


def glyph_names(taxonomy: str | None = None, label: str | None = None) -> list[str]:
    """Names of all glyphs; of those associated with `label` of `taxonomy`; label "" = the neutral ones."""
    column = 1 + list(TAXONOMIES).index(taxonomy) if taxonomy else 0
    glyphs = resource("lexicon.yaml", "glyphs")
    return [n for n, row in glyphs.items() if label is None or (row[column] if len(row) > 1 else "") == label]


def measured_words(picture: np.ndarray) -> tuple[str, str]:
    """Brightness and colourfulness words of a [H, W, 3] uint8 picture, by the limits in `prompts.yaml`."""
    measured = brightness_colorfulness(Image.fromarray(picture))[1]
    colour = next(word for limit, word in resource("prompts.yaml", "colorfulness") if measured < limit)
    return _brightness_word(picture), colour


def _value(picture: np.ndarray) -> float:
    return picture.max(axis=-1).mean()  # of HSV, 0-255


def _brightness_word(picture: np.ndarray) -> str:
    return next(w for limit, w in resource("prompts.yaml", "brightness") if _value(picture) / 255 < limit)


@lru_cache(None)
def _glyph_mask(name: str) -> Image.Image:
    """A glyph (0-255) in a 128 px square, its larger side filling it."""
    fonts = Path(util.find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"  # no import: it takes 1 s
    font = ImageFont.truetype(fonts / "DejaVuSans.ttf", 160)
    character = chr(resource("lexicon.yaml", "glyphs")[name][0])
    left, top, right, bottom = font.getbbox(character)
    side = max(right - left, bottom - top)
    mask = Image.new("L", (side, side))
    at = ((side - (right - left)) // 2 - left, (side - (bottom - top)) // 2 - top)
    ImageDraw.Draw(mask).text(at, character, fill=255, font=font)
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


def _places(rng: np.random.Generator, sides: np.ndarray) -> list[tuple[int, int, int]]:
    """Non-overlapping boxes near a 12 px grid; the four quarters when chance finds none in twelve tries."""
    last = SIDE - sides[:, None]
    steps = np.minimum(rng.integers(0, 6, (12, len(sides), 2)), last // 12)
    corners = np.clip(12 * steps + rng.integers(-2, 4, steps.shape), 0, last)  # [tries, objects, 2]
    for found in corners.tolist():
        boxes = [(x, y, side) for (x, y), side in zip(found, sides.tolist(), strict=True)]
        if all(max(abs(x - u), abs(y - v)) >= min(s, t) - 2 for (x, y, s), (u, v, t) in combinations(boxes, 2)):
            return boxes
    quarters = rng.permutation(4)[: len(sides)].tolist()
    return [(3 + 48 * (q % 2), 3 + 48 * (q // 2), side) for q, side in zip(quarters, sides.tolist(), strict=True)]


def draw_background(rng: np.random.Generator, background: Background, camera: Camera) -> np.ndarray:
    """The mood alone: [96, 96, 3] float32 in 0-255, its mean HSV value close to `background.value`."""
    hue, saturation = resource("lexicon.yaml", "hues")[background.hue]
    hue = (hue + rng.uniform(-0.02, 0.02)) % 1
    saturation = float(np.clip(saturation * rng.uniform(0.8, 1.2) * camera.saturation, 0, 1))
    axis, (x, y) = np.linspace(0, 1, SIDE, dtype=np.float32), rng.uniform(0.4, 0.6, 2).astype(np.float32)
    far = 2 * np.sqrt((axis - x) ** 2 + (axis[:, None] - y) ** 2) - 0.75
    down = np.repeat((2 * axis - 1)[:, None], SIDE, 1)
    shine = {"even": 0 * down, "above": -down, "below": down, "middle": -far, "edges": far}[background.light]
    surface = (1 + 0.45 * shine)[..., None] * np.array(_hsv(hue, saturation, 0.6), np.float32)
    canvas = Image.fromarray(np.minimum(surface, 255).astype(np.uint8))
    _draw_texture(background.texture, canvas, hue, saturation, rng)
    picture = np.asarray(canvas, np.float32)
    picture = picture * (255 * background.value / max(_value(picture), 1.0))
    mean = picture.mean((0, 1))
    # the strength of light and texture varies on its own, or the spread of the pixels would name the texture
    return np.clip(mean + (picture - mean) * camera.contrast * rng.uniform(0.6, 1.15), 0, 255)


def draw_scene(
    rng: np.random.Generator,
    objects: Sequence[str],
    background: Background,
    camera: Camera,
    hidden: Collection[str] = (),
) -> tuple[np.ndarray, Scene]:
    """Draw one picture of one to four glyphs: [96, 96, 3] uint8, and its description.

    `rng` decides places, angles and all jitter, which are the same where some of the glyphs are `hidden`.
    """
    behind = draw_background(rng, background, camera)
    boxes = _places(rng, rng.choice((34, 36, 38, 40, 42), len(objects)))
    placed = zip(objects, boxes, strict=True)
    placed = sorted(placed, key=lambda item: (item[1][1] + item[1][2] / 2 >= SIDE / 2, item[1][0]))
    picture = Image.fromarray(behind.astype(np.uint8))
    for name, (x, y, side) in placed:
        sticker, alpha = _sticker(name, side, int(rng.integers(-3, 4)) * 5)
        if name not in hidden:
            picture.paste(sticker, (x, y), alpha)
    pixels = np.asarray(picture, np.float32)
    if camera.vignette:
        axis = np.linspace(-1, 1, SIDE, dtype=np.float32) ** 2
        pixels = pixels * (1 - camera.vignette * (axis[:, None, None] + axis[None, :, None]) / 2)
    if camera.grain:
        pixels = pixels + camera.grain * rng.standard_normal((SIDE, SIDE, 1), dtype=np.float32)
    seen = background.hue, _brightness_word(behind), background.texture, background.light
    return np.clip(pixels, 0, 255).astype(np.uint8), Scene(*zip(*placed, strict=True), *seen)


def mood_background(rng: np.random.Generator, mood: str) -> Background:
    """A background drawn from one mood of the lexicon."""
    row = resource("lexicon.yaml", "moods")[mood]
    typical = rng.random() < resource("lexicon.yaml", "typical_hue")
    hue = rng.choice(row["hues"] if typical else list(resource("lexicon.yaml", "hues")))
    value, texture, light = rng.uniform(*row["value"]), rng.choice(row["textures"]), rng.choice(row["lights"])
    return Background(str(hue), float(value), str(texture), str(light))


def _hsv(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    """A colour as 0-255 RGB from hue, saturation, value in 0-1 (hue wraps, the others are clipped)."""
    rgb = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return tuple(int(255 * x) for x in rgb)


def _draw_texture(name: str, canvas: Image.Image, hue: float, saturation: float, rng: np.random.Generator) -> None:
    """Draw one of the lexicon's textures over a lit canvas, in shades of its colour (0-1); `plain` draws nothing."""
    draw = ImageDraw.Draw(canvas)
    light = _hsv(hue + rng.uniform(-0.04, 0.04), saturation * 0.5, 0.92)
    dark = _hsv(hue + rng.uniform(-0.04, 0.04), saturation, 0.28)
    ink = light if rng.random() < 0.5 else dark
    match name:
        case "rain":
            slant, length = rng.uniform(-4, 4), rng.uniform(9, 15)
            for x, y in rng.uniform(0, SIDE, (48, 2)):
                draw.line((x, y, x + slant, y + length), fill=light)
        case "snow":
            for x, y in rng.uniform(0, SIDE, (46, 2)):
                draw.circle((x, y), rng.uniform(1, 2.4), fill=light)
        case "bubbles":
            for x, y in rng.uniform(0, SIDE, (18, 2)):
                draw.circle((x, y), rng.uniform(3, 9), outline=light, width=2)
        case "stains":
            for x, y in rng.uniform(0, SIDE, (11, 2)):
                r = rng.uniform(3, 8)
                for u, v in rng.uniform(-r, r, (4, 2)):
                    draw.circle((x + u, y + v), r * rng.uniform(0.4, 0.9), fill=ink)
        case "stars":
            for x, y in rng.uniform(0, SIDE, (30, 2)):
                r = rng.uniform(1.5, 4)
                draw.line((x - r, y, x + r, y), fill=light)
                draw.line((x, y - r, x, y + r), fill=light)
        case "confetti":
            for x, y in rng.uniform(0, SIDE, (44, 2)):
                u, v = rng.uniform(-4, 4, 2)
                corners = (x, y), (x + u, y + v), (x + u - 0.6 * v, y + v + 0.6 * u), (x - 0.6 * v, y + 0.6 * u)
                draw.polygon(corners, fill=_hsv(rng.random(), max(saturation, 0.3), rng.uniform(0.45, 1)))
        case "smoke":  # noise on a coarse grid, blown up
            cells = int(rng.integers(4, 7))
            noise = np.clip((rng.random((cells, cells)) - 0.25) * 255 / 0.75, 0, 255).astype(np.uint8)
            canvas.paste(ink, mask=Image.fromarray(noise).resize(canvas.size, Image.Resampling.BICUBIC))
        case "rays":
            (x, y), n, turn = rng.uniform(28, 68, 2), int(rng.integers(7, 11)), rng.random()
            for k in range(n):
                angles = (2 * np.pi * (k + part) / n for part in (turn, turn + 0.45))
                draw.polygon([(x, y), *((x + 140 * np.cos(a), y + 140 * np.sin(a)) for a in angles)], fill=ink)
        case "web":
            (x, y), turn = rng.uniform(20, 76, 2), rng.random()
            spokes = [(np.cos(a), np.sin(a)) for a in 2 * np.pi * (np.arange(9) + turn) / 9]
            for u, v in spokes:
                draw.line((x, y, x + 140 * u, y + 140 * v), fill=ink)
            for r in np.arange(8, 90, rng.uniform(10, 14)):
                draw.line([(x + r * u, y + r * v) for u, v in (*spokes, spokes[0])], fill=ink)
        case "cracks":
            for _ in range(int(rng.integers(4, 7))):
                start, angle = rng.uniform(0, SIDE, 2), rng.uniform(0, 2 * np.pi)
                angles = np.cumsum([angle, *rng.uniform(-0.9, 0.9, 12)])[1:12]
                path = np.cumsum([start, *(9 * np.stack([np.cos(angles), np.sin(angles)], 1))], axis=0)
                draw.line(path.ravel().tolist(), fill=ink, width=2)
        case "hills":
            x = np.arange(0, 100, 4)
            for k, base in enumerate(np.array([38, 58, 78]) + rng.uniform(-4, 4, 3)):
                height, width, shift = rng.uniform(4, 9), rng.uniform(9, 18), rng.uniform(0, 6)
                crest = zip(x, base + height * np.sin(x / width + shift), strict=True)
                shade = _hsv(hue + 0.02 * k, saturation, 0.62 - 0.16 * k)
                draw.polygon([*crest, (96, 96), (0, 96)], fill=shade)
        case "waves":
            x, wide, high = np.arange(-2, 100, 3), rng.uniform(4, 7), rng.uniform(2, 4)
            for y in np.arange(rng.uniform(2, 8), 96, rng.uniform(9, 13)):
                draw.line([*zip(x, y + high * np.sin(x / wide + y), strict=True)], fill=ink, width=2)
        case "zigzags":
            x, high = np.arange(-4, 104, 7), rng.uniform(5, 8) * np.resize([-1, 1], 16)
            for y in np.arange(rng.uniform(2, 10), 96, rng.uniform(14, 20)):
                draw.line([*zip(x, y + high, strict=True)], fill=ink, width=2)
        case "stripes":
            step, lean = rng.uniform(13, 19), rng.choice((-1, 1)) * rng.uniform(0.6, 1.2)
            for x in np.arange(-130, 230, step):
                draw.line((x, 0, x + 96 * lean, 96), fill=ink, width=5)
        case "checks":
            step, (left, top) = int(rng.integers(10, 15)), rng.integers(0, 12, 2)
            for i, k in np.ndindex(96 // step + 3, 96 // step + 4):
                if (i + k) % 2 == 0:
                    x, y = (i - 1) * step - left, (k - 1) * step - top
                    draw.rectangle((x, y, x + step - 1, y + step - 1), fill=ink)
        case "flames":
            for shade, height in ((dark, 62), (light, 40)):
                for x in np.arange(-6, 102, 12) + rng.uniform(-3, 3):
                    top = 96 - height * rng.uniform(0.6, 1.2)
                    draw.polygon((x, 97, x + rng.uniform(4, 12), top, x + 15, 97), fill=shade)
