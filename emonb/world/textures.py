"""Backgrounds of the drawn world: light and the seventeen textures, drawn with Pillow on a 96 px canvas."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageDraw

Ink = tuple[int, ...]


def hsv(hue: float, saturation: float, value: float) -> Ink:
    """A colour as 0-255 RGB from hue, saturation, value in 0-1 (hue wraps, the others are clipped)."""
    rgb = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return tuple(int(255 * x) for x in rgb)


def lit(colour: Ink, light: str, rng: np.random.Generator) -> np.ndarray:
    """A [96, 96, 3] float32 surface of one colour under one of the lexicon's lights."""
    axis, (x, y) = np.linspace(0, 1, 96, dtype=np.float32), rng.uniform(0.4, 0.6, 2).astype(np.float32)
    radius = 2 * np.sqrt((axis - x) ** 2 + (axis[:, None] - y) ** 2) - 0.75
    down = np.repeat((2 * axis - 1)[:, None], 96, 1)
    field = {"even": 0 * down, "above": -down, "below": down, "middle": -radius, "edges": radius}[light]
    return np.minimum((1 + 0.45 * field)[..., None] * np.asarray(colour, np.float32), 255)


def draw_texture(name: str, canvas: Image.Image, hue: float, saturation: float, rng: np.random.Generator) -> None:
    """Draw one of the lexicon's textures over a lit canvas, in shades of its colour (0-1); `plain` draws nothing."""
    draw = ImageDraw.Draw(canvas)
    light = hsv(hue + rng.uniform(-0.04, 0.04), saturation * 0.5, 0.92)
    dark = hsv(hue + rng.uniform(-0.04, 0.04), saturation, 0.28)
    ink = light if rng.random() < 0.5 else dark

    def points(n: int) -> np.ndarray:
        return rng.uniform(0, 96, (n, 2))

    match name:
        case "rain":
            slant, length = rng.uniform(-4, 4), rng.uniform(9, 15)
            for x, y in points(48):
                draw.line((x, y, x + slant, y + length), fill=light)
        case "snow":
            for x, y in points(46):
                draw.circle((x, y), rng.uniform(1, 2.4), fill=light)
        case "bubbles":
            for x, y in points(18):
                draw.circle((x, y), rng.uniform(3, 9), outline=light, width=2)
        case "stains":
            for x, y in points(11):
                r = rng.uniform(3, 8)
                for u, v in rng.uniform(-r, r, (4, 2)):
                    draw.circle((x + u, y + v), r * rng.uniform(0.4, 0.9), fill=ink)
        case "stars":
            for x, y in points(30):
                r = rng.uniform(1.5, 4)
                draw.line((x - r, y, x + r, y), fill=light)
                draw.line((x, y - r, x, y + r), fill=light)
        case "confetti":
            for x, y in points(44):
                u, v = rng.uniform(-4, 4, 2)
                corners = (x, y), (x + u, y + v), (x + u - 0.6 * v, y + v + 0.6 * u), (x - 0.6 * v, y + 0.6 * u)
                draw.polygon(corners, fill=hsv(rng.random(), max(saturation, 0.3), rng.uniform(0.45, 1)))
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
                (start,), angle = points(1), rng.uniform(0, 2 * np.pi)
                angles = np.cumsum([angle, *rng.uniform(-0.9, 0.9, 12)])[1:12]
                path = np.cumsum([start, *(9 * np.stack([np.cos(angles), np.sin(angles)], 1))], axis=0)
                draw.line(path.ravel().tolist(), fill=ink, width=2)
        case "hills":
            x = np.arange(0, 100, 4)
            for k, base in enumerate(np.array([38, 58, 78]) + rng.uniform(-4, 4, 3)):
                height, width, shift = rng.uniform(4, 9), rng.uniform(9, 18), rng.uniform(0, 6)
                crest = zip(x, base + height * np.sin(x / width + shift), strict=True)
                shade = hsv(hue + 0.02 * k, saturation, 0.62 - 0.16 * k)
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
