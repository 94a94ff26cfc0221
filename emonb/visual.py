"""Room 03: pictures as the vision tower takes them, and what it makes of them. No model is needed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from emonb.samples import open_picture

__all__ = ["PictureInputs", "VisualTokens", "picture_inputs", "shown"]


@dataclass
class PictureInputs:
    """Pictures as the vision tower takes them: (sum of patches, C) pixel values and (B, 3) patch grids."""

    pixel_values: torch.Tensor
    grid: torch.Tensor

    def __len__(self) -> int:
        return len(self.grid)


@dataclass
class VisualTokens:
    """All that the language model takes of a batch of pictures: one (n_i, D * L) float16 tensor per image.

    The first D columns are the merged visual tokens; the others are the deepstack features of Qwen3-VL, side
    by side (L = 1 + their number; L = 1 in Qwen2-VL and Qwen2.5-VL). `grid` holds the (B, 3) patch grids.
    """

    tokens: list[torch.Tensor]
    grid: torch.Tensor
    width: int | None = None  # D; None where L = 1

    def __len__(self) -> int:
        return len(self.grid)

    def pooled(self) -> torch.Tensor:
        """(B, D) mean of each image's merged tokens: the student's input (paper: distillation)."""
        return torch.stack([t[:, : self.width].float().mean(0) for t in self.tokens])


def shown(image: str | Path | Image.Image, max_side: int) -> Image.Image:
    """What the VLM is shown: a picture or a copy of it, at most `max_side` px long (authors' code)."""
    picture = image.copy() if isinstance(image, Image.Image) else open_picture(image)
    picture.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return picture


def picture_inputs(processor: Any, images: Sequence[str | Path | Image.Image], max_side: int) -> PictureInputs:
    """Decode, shrink and cut into patches, on the CPU and without the model: work for a DataLoader's workers.

    Args:
        processor: `VLM.processor`.
        images: paths or PIL images, which stay as they are.
        max_side: longest side in pixels; larger pictures are shrunk (authors' code).

    Raises:
        UnreadablePicture: a file that is no picture.
    """
    pictures = [shown(image, max_side) for image in images]
    inputs = processor.image_processor(pictures, return_tensors="pt")
    return PictureInputs(inputs["pixel_values"], inputs["image_grid_thw"])
