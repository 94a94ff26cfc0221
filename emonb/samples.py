"""Ground floor: reading a sample table and its pictures, for every room above."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError

from emonb.errors import EmonbError
from emonb.settings import project_root
from emonb.store import Artifact, read_json

__all__ = ["brightness_colorfulness", "open_picture", "read_samples", "sample_labels"]


def read_samples(artifact: Artifact, split: str | None = None) -> pd.DataFrame:
    """Sample table with absolute paths; `frame.attrs["labels"]` is the class order."""
    meta = read_json(artifact.path / "meta.json")
    root = artifact.path if meta["root"] == "." else (project_root() / meta["root"]).resolve()
    frame = pd.read_parquet(artifact.path / "samples.parquet")
    frame["path"] = [str(root / p) for p in frame["path"]]
    if split is not None:
        frame = frame[frame["split"] == split].reset_index(drop=True)
    frame.attrs["labels"] = meta["labels"]
    return frame


def sample_labels(artifact: Artifact) -> list[str]:
    """Class order of a sample table."""
    return read_json(artifact.path / "meta.json")["labels"]


def open_picture(path: str | Path) -> Image.Image:
    """A picture as people see it: EXIF rotation applied, RGB, transparency on white.

    Raises:
        EmonbError: not a readable picture; the message names the file.
    """
    try:
        with Image.open(path) as raw:
            image = ImageOps.exif_transpose(raw)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EmonbError(f"{path}: not a readable picture ({error}); replace or remove the file") from None


def brightness_colorfulness(image: Image.Image) -> tuple[float, float]:
    """Mean HSV value (0-1) and colourfulness of Hasler and Suesstrunk (2003) divided by 109.

    109 is their "extremely colourful". Measured on at most 256 x 256 px.
    """
    small = image.copy()
    small.thumbnail((256, 256))
    rgb = np.asarray(small, dtype=np.float64)
    rg = rgb[..., 0] - rgb[..., 1]
    yb = (rgb[..., 0] + rgb[..., 1]) / 2 - rgb[..., 2]
    colorfulness = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
    return float(rgb.max(axis=-1).mean() / 255), float(colorfulness / 109)
