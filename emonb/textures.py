"""Backgrounds of the drawn world: light and the seventeen textures, drawn with Pillow on a 96 px canvas."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["TEXTURES", "draw_texture", "hsv", "lit"]

Ink = tuple[int, int, int]


def hsv(hue: float, saturation: float, value: float) -> Ink:
    """A colour as 0-255 RGB from hue, saturation, value in 0-1 (hue wraps, the others are clipped)."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return int(255 * r), int(255 * g), int(255 * b)


def lit(colour: Ink, light: str, rng: np.random.Generator, side: int = 96) -> np.ndarray:
    """A (side, side, 3) float32 surface of one colour under one of the lexicon's lights."""
    axis, centre = np.linspace(0, 1, side, dtype=np.float32), rng.uniform(0.4, 0.6, 2).astype(np.float32)
    if light in ("middle", "edges"):
        radius = 2 * np.sqrt((axis - centre[0]) ** 2 + (axis[:, None] - centre[1]) ** 2) - 0.75
        field = radius if light == "edges" else -radius
    else:
        slope = {"even": 0, "above": -1, "below": 1}[light]
        field = np.repeat((slope * (2 * axis - 1))[:, None], side, 1)
    return np.minimum((1 + 0.45 * field)[..., None] * np.asarray(colour, np.float32), 255)


class _Brush:
    """A canvas with its inks: `light` and `dark` shades of the background, `vary` for jittered ones."""

    def __init__(self, rng: np.random.Generator, canvas: Image.Image, hue: float, saturation: float):
        self.rng, self.canvas, self.hue, self.saturation = rng, canvas, hue, saturation
        self.draw = ImageDraw.Draw(canvas)
        self.light = hsv(hue + rng.uniform(-0.04, 0.04), saturation * 0.5, 0.92)
        self.dark = hsv(hue + rng.uniform(-0.04, 0.04), saturation, 0.28)
        self.ink = self.light if rng.random() < 0.5 else self.dark

    def points(self, n: int) -> np.ndarray:
        return self.rng.uniform(0, 96, (n, 2))

    def any_hue(self) -> Ink:
        return hsv(self.rng.random(), max(self.saturation, 0.3), self.rng.uniform(0.45, 1))

    def clouds(self, cells: int, low: float) -> Image.Image:
        """A soft random mask (0-255): noise on a coarse grid, blown up."""
        noise = np.clip((self.rng.random((cells, cells)) - low) * 255 / (1 - low), 0, 255).astype(np.uint8)
        return Image.fromarray(noise).resize(self.canvas.size, Image.Resampling.BICUBIC)


def _rain(b: _Brush) -> None:
    slant, length = b.rng.uniform(-4, 4), b.rng.uniform(9, 15)
    for x, y in b.points(48):
        b.draw.line((x, y, x + slant, y + length), fill=b.light, width=1)


def _snow(b: _Brush) -> None:
    for x, y in b.points(46):
        r = b.rng.uniform(1, 2.4)
        b.draw.ellipse((x - r, y - r, x + r, y + r), fill=b.light)


def _stars(b: _Brush) -> None:
    for x, y in b.points(30):
        r = b.rng.uniform(1.5, 4)
        b.draw.line((x - r, y, x + r, y), fill=b.light)
        b.draw.line((x, y - r, x, y + r), fill=b.light)


def _confetti(b: _Brush) -> None:
    for x, y in b.points(44):
        u, v = b.rng.uniform(-4, 4, 2)
        s, t = -0.6 * v, 0.6 * u
        b.draw.polygon((x, y, x + u, y + v, x + u + s, y + v + t, x + s, y + t), fill=b.any_hue())


def _bubbles(b: _Brush) -> None:
    for x, y in b.points(18):
        r = b.rng.uniform(3, 9)
        b.draw.ellipse((x - r, y - r, x + r, y + r), outline=b.light, width=2)


def _smoke(b: _Brush) -> None:
    b.canvas.paste(b.ink, mask=b.clouds(int(b.rng.integers(4, 7)), 0.25))


def _rays(b: _Brush) -> None:
    (cx, cy), n, turn = b.rng.uniform(28, 68, 2), int(b.rng.integers(7, 11)), b.rng.random()
    for k in range(n):
        a, c = 2 * np.pi * (k + turn) / n, 2 * np.pi * (k + turn + 0.45) / n
        reach = 140
        outer = (cx + reach * np.cos(a), cy + reach * np.sin(a), cx + reach * np.cos(c), cy + reach * np.sin(c))
        b.draw.polygon((cx, cy, *outer), fill=b.ink)


def _cracks(b: _Brush) -> None:
    for _ in range(int(b.rng.integers(4, 7))):
        at, angle, path = b.points(1)[0], b.rng.uniform(0, 2 * np.pi), []
        for _ in range(12):
            path.append(tuple(at))
            angle += b.rng.uniform(-0.9, 0.9)
            at = at + 9 * np.array([np.cos(angle), np.sin(angle)])
        b.draw.line(path, fill=b.ink, width=2)


def _stains(b: _Brush) -> None:
    for x, y in b.points(11):
        r = b.rng.uniform(3, 8)
        for u, v in b.rng.uniform(-r, r, (4, 2)):
            s = r * b.rng.uniform(0.4, 0.9)
            b.draw.ellipse((x + u - s, y + v - s, x + u + s, y + v + s), fill=b.ink)


def _hills(b: _Brush) -> None:
    x = np.arange(0, 100, 4)
    for k, base in enumerate(np.array([38, 58, 78]) + b.rng.uniform(-4, 4, 3)):
        crest = base + b.rng.uniform(4, 9) * np.sin(x / b.rng.uniform(9, 18) + b.rng.uniform(0, 6))
        shade = hsv(b.hue + 0.02 * k, b.saturation, 0.62 - 0.16 * k)
        b.draw.polygon([*zip(x, crest, strict=True), (96, 96), (0, 96)], fill=shade)


def _waves(b: _Brush) -> None:
    x, wide, high = np.arange(-2, 100, 3), b.rng.uniform(4, 7), b.rng.uniform(2, 4)
    for y in np.arange(b.rng.uniform(2, 8), 96, b.rng.uniform(9, 13)):
        b.draw.line([*zip(x, y + high * np.sin(x / wide + y), strict=True)], fill=b.ink, width=2)


def _zigzags(b: _Brush) -> None:
    x, high = np.arange(-4, 104, 7), b.rng.uniform(5, 8)
    for y in np.arange(b.rng.uniform(2, 10), 96, b.rng.uniform(14, 20)):
        b.draw.line([(u, y + (high if i % 2 else -high)) for i, u in enumerate(x)], fill=b.ink, width=2)


def _web(b: _Brush) -> None:
    cx, cy = b.rng.uniform(20, 76, 2)
    angles = 2 * np.pi * (np.arange(9) + b.rng.random()) / 9
    spokes = np.stack([np.cos(angles), np.sin(angles)], 1)
    for u, v in spokes:
        b.draw.line((cx, cy, cx + 140 * u, cy + 140 * v), fill=b.ink)
    for r in np.arange(8, 90, b.rng.uniform(10, 14)):
        ring = [(cx + r * u, cy + r * v) for u, v in spokes]
        b.draw.line([*ring, ring[0]], fill=b.ink)


def _stripes(b: _Brush) -> None:
    step, lean = b.rng.uniform(13, 19), b.rng.choice((-1, 1)) * b.rng.uniform(0.6, 1.2)
    for x in np.arange(-130, 230, step):
        b.draw.line((x, 0, x + 96 * lean, 96), fill=b.ink, width=5)


def _checks(b: _Brush) -> None:
    step, (ox, oy) = int(b.rng.integers(10, 15)), b.rng.integers(0, 12, 2)
    for i in range(-1, 96 // step + 2):
        for j in range(-1 - i % 2, 96 // step + 2, 2):
            x, y = i * step - ox, (j + 1) * step - oy
            b.draw.rectangle((x, y, x + step - 1, y + step - 1), fill=b.ink)


def _flames(b: _Brush) -> None:
    for shade, height in ((b.dark, 62), (b.light, 40)):
        for x in np.arange(-6, 102, 12) + b.rng.uniform(-3, 3):
            top = 96 - height * b.rng.uniform(0.6, 1.2)
            b.draw.polygon((x, 97, x + b.rng.uniform(4, 12), top, x + 15, 97), fill=shade)


TEXTURES: dict[str, Callable[[_Brush], None]] = {
    "plain": lambda b: None,
    "rain": _rain,
    "snow": _snow,
    "stars": _stars,
    "confetti": _confetti,
    "bubbles": _bubbles,
    "smoke": _smoke,
    "rays": _rays,
    "cracks": _cracks,
    "stains": _stains,
    "hills": _hills,
    "waves": _waves,
    "zigzags": _zigzags,
    "web": _web,
    "stripes": _stripes,
    "checks": _checks,
    "flames": _flames,
}


def draw_texture(
    rng: np.random.Generator, canvas: Image.Image, texture: str, hue: float, saturation: float
) -> np.ndarray:
    """Draw a texture of `TEXTURES` over a lit canvas (in place); returns it as (96, 96, 3) float32."""
    TEXTURES[texture](_Brush(rng, canvas, hue, saturation))
    return np.asarray(canvas, np.float32)
