"""Figures inside the report: small pictures as data, with what is seen, of how many images and seeds."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from urllib.parse import quote

from emonb.report_site import file_links
from emonb.report_words import figure_words

__all__ = ["as_data", "figure_html"]

_PHOTOS = ("qualitative_examples", "samples_")  # thumbnails: WebP; everything else: PNG of 128 colours
_WIDEST = {True: 1000, False: 1500}  # pixels, photos or not


def as_data(path: Path) -> tuple[str, int, int]:
    """A PNG file as a data address of a few ten kB, with its width and height in pixels.

    Measured on the mini profile: PNG of 128 colours is a third of the saved PNG and of the SVG, and sharp;
    thumbnails are smaller as WebP. Equal files give equal texts.
    """
    import PIL.Image

    photo = path.stem.startswith(_PHOTOS)
    with PIL.Image.open(path) as file:
        picture = file.convert("RGB")
    widest = _WIDEST[photo]
    if picture.width > widest:
        size = (widest, round(picture.height * widest / picture.width))
        picture = picture.resize(size, PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if photo:
        picture.save(buffer, "WEBP", quality=80, method=4)
    else:
        picture.quantize(128, dither=PIL.Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    kind = "webp" if photo else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", *picture.size


def figure_html(path: Path, how_many: str) -> str:
    """A figure with its caption and links to the files; raises OSError where the file is no picture."""
    words = figure_words(path.stem)
    address, width, height = as_data(path)
    links = file_links(path.parent.parent, "figures", path.stem, ("svg", "png"))
    alt = f"{words.title}. {words.text}".strip()
    said = " ".join(filter(None, [words.text, how_many if words.seeds else "", words.seeds]))
    return (
        f"<figure class=picture id='figure-{quote(path.stem)}'><div class=sheet>"
        f"<img src='{address}' width={width} height={height} alt='{escape(alt, quote=True)}'></div>"
        f"<figcaption><b>{escape(words.title)}.</b> {escape(said)} <span class=files>{links}</span>"
        "</figcaption></figure>"
    )
