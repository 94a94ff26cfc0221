"""What the training loops share: the epoch that is kept, outputs block by block, checkpoints."""

from __future__ import annotations

import copy
import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 4096  # rows
_WARNED: set[tuple[str, float, int]] = set()  # once is enough: a grid trains dozens of nets alike


class Best:
    """The training curve so far and the epoch to keep: that of the best val accuracy (ours: the earliest of equals).

    Attributes:
        rows: epoch, split, metric, value: training loss and val accuracy (percent) of each epoch.
    """

    def __init__(self, net: nn.Module) -> None:
        self.rows: list[dict[str, Any]] = []
        self.accuracy, self.weights = -1.0, copy.deepcopy(net.state_dict())

    def keep(self, net: nn.Module, epoch: int, loss: float, accuracy: float) -> None:
        """Note an epoch, and its weights if it is the best so far."""
        self.rows.append({"epoch": epoch, "split": "train", "metric": "loss", "value": loss})
        self.rows.append({"epoch": epoch, "split": "val", "metric": "accuracy", "value": accuracy})
        if accuracy > self.accuracy:
            self.accuracy, self.weights = accuracy, copy.deepcopy(net.state_dict())


def warn_if_short(net: nn.Module, lr: float, steps: int, what: str) -> None:
    """Warn of a training that leaves a net near its random start: lr x steps below half of its mean weight (ours).

    Adam moves a weight by about `lr` a step at most (Kingma and Ba 2015, section 2.1). In the authors' settings a
    step is one image; with 64 images a step and the same learning rate, a gate on Emotion6 hardly moves.
    """
    start = torch.cat([p.detach().abs().flatten() for p in net.parameters() if p.ndim > 1]).mean().item()
    if lr * steps < start / 2 and (what, lr, steps) not in _WARNED:
        _WARNED.add((what, lr, steps))
        warnings.warn(
            f"{what}: {steps:,} steps at a learning rate of {lr:g} move a weight by {lr * steps:.2g} at most, and it "
            f"starts at random at {start:.2g}: what is learnt hardly shows; take more epochs or a smaller batch",
            stacklevel=3,
        )


@torch.inference_mode()
def outputs(net: nn.Module, *inputs: Tensor) -> Tensor:
    """[N, C] logits of a net for inputs of N rows, a block of rows at a time, without dropout."""
    net.eval()
    blocks = range(0, len(inputs[0]), _BLOCK)
    return torch.cat([net(*(x[i : i + _BLOCK].float() for x in inputs)) for i in blocks])


def accuracy(net: nn.Module, inputs: Sequence[Tensor], labels: Tensor) -> float:
    """Percent of N rows whose highest logit is that of the label [N]."""
    return 100 * (outputs(net, *inputs).argmax(-1) == labels).double().mean().item()


def mixed_seed(*numbers: int) -> int:
    """One seed out of several numbers, in the 32 bits that torch's CPU generator makes use of."""
    return zlib.crc32(repr(numbers).encode())


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state of a training, from which a killed run goes on; the old or the new file is there, never half."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path | None, device: torch.device) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote, or None where there is nothing yet."""
    return torch.load(path, map_location=device, weights_only=True) if path and path.is_file() else None
