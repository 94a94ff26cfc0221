"""Backgrounds of the drawn world: light and the seventeen textures, drawn with Pillow on a 96 px canvas."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageDraw

Ink = tuple[int, int, int]


def hsv(hue: float, saturation: float, value: float) -> Ink:
    """A colour as 0-255 RGB from hue, saturation, value in 0-1 (hue wraps, the others are clipped)."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return int(255 * r), int(255 * g), int(255 * b)


def lit(colour: Ink, light: str, rng: np.random.Generator, side: int = 96) -> np.ndarray:
    """A [side, side, 3] float32 surface of one colour under one of the lexicon's lights."""
    axis, centre = np.linspace(0, 1, side, dtype=np.float32), rng.uniform(0.4, 0.6, 2).astype(np.float32)
    if light in ("middle", "edges"):
        radius = 2 * np.sqrt((axis - centre[0]) ** 2 + (axis[:, None] - centre[1]) ** 2) - 0.75
        field = radius if light == "edges" else -radius
    else:
        slope = {"even": 0, "above": -1, "below": 1}[light]
        field = np.repeat((slope * (2 * axis - 1))[:, None], side, 1)
    return np.minimum((1 + 0.45 * field)[..., None] * np.asarray(colour, np.float32), 255)


class Textures:
    """A lit canvas and its inks; each method draws the texture of its name over it.

    Attributes:
        light, dark: shades of the background.
        ink: one of the two.
    """

    def __init__(self, rng: np.random.Generator, canvas: Image.Image, hue: float, saturation: float) -> None:
        self.rng, self.canvas, self.hue, self.saturation = rng, canvas, hue, saturation
        self.draw = ImageDraw.Draw(canvas)
        self.light = hsv(hue + rng.uniform(-0.04, 0.04), saturation * 0.5, 0.92)
        self.dark = hsv(hue + rng.uniform(-0.04, 0.04), saturation, 0.28)
        self.ink = self.light if rng.random() < 0.5 else self.dark

    def _points(self, n: int) -> np.ndarray:
        return self.rng.uniform(0, 96, (n, 2))

    def plain(self) -> None:
        """Nothing but the light."""

    def rain(self) -> None:
        slant, length = self.rng.uniform(-4, 4), self.rng.uniform(9, 15)
        for x, y in self._points(48):
            self.draw.line((x, y, x + slant, y + length), fill=self.light, width=1)

    def snow(self) -> None:
        for x, y in self._points(46):
            self.draw.circle((x, y), self.rng.uniform(1, 2.4), fill=self.light)

    def stars(self) -> None:
        for x, y in self._points(30):
            r = self.rng.uniform(1.5, 4)
            self.draw.line((x - r, y, x + r, y), fill=self.light)
            self.draw.line((x, y - r, x, y + r), fill=self.light)

    def confetti(self) -> None:
        for x, y in self._points(44):
            u, v = self.rng.uniform(-4, 4, 2)
            s, t = -0.6 * v, 0.6 * u
            shade = hsv(self.rng.random(), max(self.saturation, 0.3), self.rng.uniform(0.45, 1))
            self.draw.polygon((x, y, x + u, y + v, x + u + s, y + v + t, x + s, y + t), fill=shade)

    def bubbles(self) -> None:
        for x, y in self._points(18):
            self.draw.circle((x, y), self.rng.uniform(3, 9), outline=self.light, width=2)

    def smoke(self) -> None:
        cells = int(self.rng.integers(4, 7))  # noise on a coarse grid, blown up
        noise = np.clip((self.rng.random((cells, cells)) - 0.25) * 255 / 0.75, 0, 255).astype(np.uint8)
        mask = Image.fromarray(noise).resize(self.canvas.size, Image.Resampling.BICUBIC)
        self.canvas.paste(self.ink, mask=mask)

    def rays(self) -> None:
        (cx, cy), n, turn = self.rng.uniform(28, 68, 2), int(self.rng.integers(7, 11)), self.rng.random()
        for k in range(n):
            a, c = 2 * np.pi * (k + turn) / n, 2 * np.pi * (k + turn + 0.45) / n
            outer = (cx + 140 * np.cos(a), cy + 140 * np.sin(a), cx + 140 * np.cos(c), cy + 140 * np.sin(c))
            self.draw.polygon((cx, cy, *outer), fill=self.ink)

    def cracks(self) -> None:
        for _ in range(int(self.rng.integers(4, 7))):
            at, angle, path = self._points(1)[0], self.rng.uniform(0, 2 * np.pi), []
            for _ in range(12):
                path.append(tuple(at))
                angle += self.rng.uniform(-0.9, 0.9)
                at = at + 9 * np.array([np.cos(angle), np.sin(angle)])
            self.draw.line(path, fill=self.ink, width=2)

    def stains(self) -> None:
        for x, y in self._points(11):
            r = self.rng.uniform(3, 8)
            for u, v in self.rng.uniform(-r, r, (4, 2)):
                self.draw.circle((x + u, y + v), r * self.rng.uniform(0.4, 0.9), fill=self.ink)

    def hills(self) -> None:
        x = np.arange(0, 100, 4)
        for k, base in enumerate(np.array([38, 58, 78]) + self.rng.uniform(-4, 4, 3)):
            height, width, shift = self.rng.uniform(4, 9), self.rng.uniform(9, 18), self.rng.uniform(0, 6)
            crest = base + height * np.sin(x / width + shift)
            shade = hsv(self.hue + 0.02 * k, self.saturation, 0.62 - 0.16 * k)
            self.draw.polygon([*zip(x, crest, strict=True), (96, 96), (0, 96)], fill=shade)

    def waves(self) -> None:
        x, wide, high = np.arange(-2, 100, 3), self.rng.uniform(4, 7), self.rng.uniform(2, 4)
        for y in np.arange(self.rng.uniform(2, 8), 96, self.rng.uniform(9, 13)):
            self.draw.line([*zip(x, y + high * np.sin(x / wide + y), strict=True)], fill=self.ink, width=2)

    def zigzags(self) -> None:
        x, high = np.arange(-4, 104, 7), self.rng.uniform(5, 8)
        for y in np.arange(self.rng.uniform(2, 10), 96, self.rng.uniform(14, 20)):
            self.draw.line([(u, y + (high if i % 2 else -high)) for i, u in enumerate(x)], fill=self.ink, width=2)

    def web(self) -> None:
        cx, cy = self.rng.uniform(20, 76, 2)
        angles = 2 * np.pi * (np.arange(9) + self.rng.random()) / 9
        spokes = np.stack([np.cos(angles), np.sin(angles)], 1)
        for u, v in spokes:
            self.draw.line((cx, cy, cx + 140 * u, cy + 140 * v), fill=self.ink)
        for r in np.arange(8, 90, self.rng.uniform(10, 14)):
            ring = [(cx + r * u, cy + r * v) for u, v in spokes]
            self.draw.line([*ring, ring[0]], fill=self.ink)

    def stripes(self) -> None:
        step, lean = self.rng.uniform(13, 19), self.rng.choice((-1, 1)) * self.rng.uniform(0.6, 1.2)
        for x in np.arange(-130, 230, step):
            self.draw.line((x, 0, x + 96 * lean, 96), fill=self.ink, width=5)

    def checks(self) -> None:
        step, (ox, oy) = int(self.rng.integers(10, 15)), self.rng.integers(0, 12, 2)
        for i in range(-1, 96 // step + 2):
            for j in range(-1 - i % 2, 96 // step + 2, 2):
                x, y = i * step - ox, (j + 1) * step - oy
                self.draw.rectangle((x, y, x + step - 1, y + step - 1), fill=self.ink)

    def flames(self) -> None:
        for shade, height in ((self.dark, 62), (self.light, 40)):
            for x in np.arange(-6, 102, 12) + self.rng.uniform(-3, 3):
                top = 96 - height * self.rng.uniform(0.6, 1.2)
                self.draw.polygon((x, 97, x + self.rng.uniform(4, 12), top, x + 15, 97), fill=shade)
