"""Many small pictures in one file: sheets of thumbnails, for pages that ask for nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from emonb.samples import as_seen

__all__ = ["ACROSS", "SIDE", "TILES", "sprites"]

SIDE = 80  # px, longest side of a thumbnail
ACROSS, TILES = 32, 1024  # thumbnails per row and per sheet: 3,072 px square, far below WebP's 16,383
QUALITY = 50  # of WebP: about 1.6 kB a picture as base64, measured on drawn ones


def sprites(paths: Sequence[str | None]) -> tuple[list[str], list[tuple[int, int]]]:
    """Thumbnails on sheets of at most `TILES`, as WebP in base64, and each one's size; (0, 0) = no picture."""
    sheets, sizes = [], []
    for start in range(0, len(paths), TILES):
        part = [_thumbnail(path) for path in paths[start : start + TILES]]
        across, down = min(len(part), ACROSS), -(-len(part) // ACROSS)
        sheet = Image.new("RGB", (across * SIDE, down * SIDE), "white")
        for i, picture in enumerate(part):
            if picture:
                sheet.paste(picture, (i % ACROSS * SIDE, i // ACROSS * SIDE))
            sizes.append(picture.size if picture else (0, 0))
        buffer = io.BytesIO()
        sheet.save(buffer, "WEBP", quality=QUALITY, method=2)
        sheets.append(base64.b64encode(buffer.getvalue()).decode())
    return sheets, sizes


def _thumbnail(path: str | None) -> Image.Image | None:
    """A picture of at most `SIDE` px, or None where it is missing or damaged: the others are still worth showing."""
    try:
        with Image.open(path) as raw:
            raw.draft(None, (2 * SIDE, 2 * SIDE))  # of a large JPEG only what is needed
            picture = as_seen(raw)
    except Exception:  # PIL's decoders raise what they meet; None is no path
        return None
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(x * scale)) for x in picture.size)
    return picture.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
