"""What a rehearsal's steps work on: the picture, the device, the clock, and a batch that shrinks until it fits."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from emonb.settings import Settings
from emonb.vlm import VLM, VisualTokens, visual_tokens

__all__ = ["Bench", "Step", "is_out_of_memory", "noise_picture", "release"]

_PATIENCE = 12.0  # seconds: a step that takes longer is measured once, without a warm-up


class Step(NamedTuple):
    """One stage to measure: what it runs, the units of its costs, and whose layers its time is linear in."""

    run: Callable[[Bench], tuple[dict[str, float], int]]
    units: dict[str, str]
    tower: bool = False  # layers of the vision tower, else of the language model


@dataclass
class Bench:
    """What the steps work on."""

    settings: Settings
    device: torch.device
    picture: Image.Image
    jpeg: Path
    labels: list[str]
    rows: int  # training rows for head and gates
    batch: int  # images of a pass without gradient, at most
    repeats: int
    vlm: VLM | None = None
    visual: VisualTokens | None = None  # of `picture`, once they have been needed
    notes: dict[str, Any] = field(default_factory=dict)

    def time(self, step: Callable[[], Any]) -> float:
        """Median seconds of a step after a warm-up, the device's queue included."""
        seconds = self._once(step)
        if seconds > _PATIENCE:
            return seconds
        times: list[float] = []
        while len(times) < self.repeats and sum(times) < _PATIENCE:
            times.append(self._once(step))
        return statistics.median(times)

    def _once(self, step: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def halved(self, measure: Callable[[int], float], batch: int) -> tuple[float, int]:
        """Seconds of a step at the largest batch that fits: halved until the memory is enough."""
        while True:
            try:
                return measure(batch), batch
            except Exception as error:
                if batch == 1 or not is_out_of_memory(error):
                    raise
            batch //= 2
            release()

    def tokens(self, batch: int) -> VisualTokens:
        """Visual tokens of so many pictures."""
        if self.visual is None:
            self.visual = visual_tokens(self.vlm, [self.picture])
        return replace(self.visual, tokens=self.visual.tokens * batch, grid=self.visual.grid.repeat(batch, 1))


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may help: torch raises RuntimeError on a CPU, its own class on a GPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def release() -> None:
    """Give memory back that nobody uses any more, to the system too, so that peaks do not carry the past."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def noise_picture(width: int, height: int) -> Image.Image:
    """A picture with smooth shapes and fine grain, so that its JPEG is about as large as a photograph's."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (max(2, height // 32), max(2, width // 32), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray((smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8))
