"""Room 02: the offline annotator. It writes triplets without a paid model, and every row says so.

It composes them from what is known of a training image: the drawn scene's description, a release's
attributes (EmoSet's annotations) or captions (keywords), else from what can be measured: brightness,
colourfulness (Hasler and Suesstrunk 2003) and dominant colours.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from emonb.samples import open_picture
from emonb.triplets import load_prompts, make_triplet, prompts_sha256, three_triplets

__all__ = ["dominant_colors", "offline_triplets"]

_ATTRIBUTES = {  # EmoSet's annotation fields: sentence of the conversation, of the reasoning
    "facial_expression": ("There is a face with the expression {}.", "The {} face speaks to the viewer."),
    "human_action": ("Somebody is {}.", "One follows what is being done: {}."),
}
_COLORS = ("The main colours are {}.", "Its main colours are {}.")


def offline_triplets(row: dict[str, Any], labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The three triplets of one training image, composed without a paid model.

    Args:
        row: a row of the sample table; `objects`, `scene`, `facial_expression`, `human_action` or `caption`
            are used where present; where none is, the dominant colours of the picture at `path`.
        labels: the taxonomy's labels in their order.
    """
    prompts = load_prompts()
    origin = {"source": "offline", "model": "emonb-offline-annotator", "prompt_sha256": prompts_sha256()}
    turn = int(row["sha256"][:8], 16)  # which wording of the instruction: varied, yet reproducible
    parts, known, extra = _usable(row), _known(row, prompts), _extra(row)
    written = []
    for side, kind in enumerate(("conversation", "reasoning")):
        frames = prompts[kind]
        sentences = [frames[name].format(**known) for name in parts[:-1]]
        sentences += [sentence[side] for sentence in extra]
        sentences.append(frames["measured"].format(**known))
        if kind == "reasoning":
            sentences.append(frames["closing"][row["label"]])
        instruction = frames["instructions"][turn % len(frames["instructions"])]
        written.append(make_triplet(row, kind, instruction, " ".join(sentences), **origin))
    yield from three_triplets(row, labels, origin, *written)


def _usable(row: dict[str, Any]) -> list[str]:
    """Which sentence frames can be filled for this image, in reading order."""
    names = ["objects"] if _has(row, "objects") else []
    if _has(row, "scene"):
        names.append("scene")
    if not names and _has(row, "caption"):
        names.append("caption")
    return [*names, "measured"]


def _extra(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Sentences on attributes, or on the colours of a picture of which nothing else is known."""
    found = [
        tuple(frame.format(str(row[name]).replace("_", " ")) for frame in frames)
        for name, frames in _ATTRIBUTES.items()
        if _has(row, name)
    ]
    if not found and _usable(row) == ["measured"] and row.get("path"):
        names = _enumerate(dominant_colors(open_picture(row["path"])))
        return [tuple(frame.format(names) for frame in _COLORS)]
    return found


def _has(row: dict[str, Any], name: str) -> bool:
    value = row.get(name)
    if value is None or isinstance(value, str | list | tuple | np.ndarray):
        return value is not None and len(value) > 0
    return not pd.isna(value)


def _known(row: dict[str, Any], prompts: dict[str, Any]) -> dict[str, str]:
    names = list(row["objects"]) if _has(row, "objects") else []
    return {
        "objects": _enumerate([f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]),
        "scene": row["scene"] if _has(row, "scene") else "",
        "caption": row["caption"] if _has(row, "caption") else "",
        "brightness": _word(prompts["brightness"], row["brightness"]),
        "colorfulness": _word(prompts["colorfulness"], row["colorfulness"]),
    }


def _enumerate(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _word(scale: list[tuple[float, str]], value: float) -> str:
    return next((word for bound, word in scale if value < bound), scale[-1][1])


def dominant_colors(image: Image.Image, most: int = 3) -> list[str]:
    """Names of the colours that cover most of a picture, most frequent first; each covers at least 15 %.

    Median cut to eight colours at 64 x 64 px; each is named by hue, saturation and value (our bounds), and
    equal names are added up.
    """
    small = image.convert("RGB").resize((64, 64)).quantize(8, Image.Quantize.MEDIANCUT)
    palette = np.array(small.getpalette()).reshape(-1, 3)
    share: dict[str, float] = {}
    for count, index in small.getcolors():
        name = _color_name(*(palette[index] / 255))
        share[name] = share.get(name, 0) + count / 64**2
    ordered = sorted(share, key=lambda name: (-share[name], name))
    return [name for name in ordered[:most] if share[name] >= 0.15] or ordered[:1]


def _color_name(red: float, green: float, blue: float) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    if value < 0.2:
        return "black"
    if saturation < 0.15:
        return "white" if value > 0.85 else "grey"
    degrees = hue * 360
    if 10 <= degrees < 50 and value < 0.65:
        return "brown"
    if degrees >= 320:
        return "pink" if degrees < 345 and value > 0.7 else "red"
    bounds = ((15, "red"), (45, "orange"), (70, "yellow"), (165, "green"), (260, "blue"), (320, "purple"))
    return next(name for bound, name in bounds if degrees < bound)
