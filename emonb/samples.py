"""Ground floor: reading a sample table and its pictures, for every room above."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from pyarrow import parquet

from emonb.errors import UnreadablePicture
from emonb.settings import project_root
from emonb.store import Artifact, read_json

__all__ = [
    "as_seen",
    "brightness_colorfulness",
    "count_samples",
    "iter_samples",
    "open_picture",
    "read_samples",
    "sample_labels",
    "table_folder",
]


def read_samples(artifact: Artifact, split: str | None = None, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Sample table with absolute paths; `frame.attrs["labels"]` is the class order.

    Args:
        artifact: the table.
        split: its rows of this split only.
        columns: these columns only.
    """
    root = table_folder(artifact)
    filters = None if split is None else [("split", "==", split)]
    wanted = None if columns is None else list(columns)
    frame = pd.read_parquet(artifact.path / "samples.parquet", columns=wanted, filters=filters)
    if "path" in frame:
        frame["path"] = [str(root / p) for p in frame["path"]]
    frame.attrs["labels"] = sample_labels(artifact)
    return frame


def table_folder(artifact: Artifact, which: str = "root") -> Path:
    """The folder that a table's paths (`root`) or image ids (`pictures`) are relative to."""
    folder = read_json(artifact.path / "meta.json")[which]
    return artifact.path if folder == "." else (project_root() / folder).resolve()


def iter_samples(
    artifact: Artifact, split: str | None = None, columns: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of a sample table one by one, with absolute paths: memory does not grow with the table."""
    root = table_folder(artifact)
    wanted = None if columns is None else list(dict.fromkeys([*columns, "split"]))
    for batch in parquet.ParquetFile(artifact.path / "samples.parquet").iter_batches(1024, columns=wanted):
        for row in batch.to_pylist():
            if split is None or row["split"] == split:
                yield {**row, "path": str(root / row["path"])} if "path" in row else row


def count_samples(artifact: Artifact, split: str) -> int:
    """Number of images of a split."""
    return len(read_samples(artifact, split, ["split"]))


def sample_labels(artifact: Artifact) -> list[str]:
    """Class order of a sample table."""
    return read_json(artifact.path / "meta.json")["labels"]


def open_picture(path: str | Path) -> Image.Image:
    """A picture as people see it: EXIF rotation applied, RGB, transparency on white.

    Raises:
        UnreadablePicture: not a readable picture; the message names the file.
    """
    try:
        with Image.open(path) as raw:
            return as_seen(raw)
    except Exception as error:  # PIL's decoders raise what they meet: struct.error, ValueError, SyntaxError, ...
        raise UnreadablePicture(f"{path}: not a readable picture ({error}); replace or remove the file") from None


def as_seen(raw: Image.Image) -> Image.Image:
    """An opened picture with EXIF rotation applied, in RGB, 16 bits as 8, transparency on white."""
    image = ImageOps.exif_transpose(raw)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip at 255, so that all is white
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype("uint8"))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


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
