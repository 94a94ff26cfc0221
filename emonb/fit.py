"""Ground floor: device, seeds, and the one training loop of the small modules (head and gate) on cached tensors."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fit", "get_device", "set_seed"]


def get_device() -> torch.device:
    """The GPU if there is one, else the CPU; of several processes (`accelerate launch`), each has its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState  # it also joins the processes into a group

        return PartialState().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch, so that equal settings give equal weights on one machine."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def fit(
    net: nn.Module,
    train: tuple[Tensor, ...],
    val: tuple[Tensor, ...],
    loss: Callable[..., Tensor],
    *,
    epochs: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Train with Adam (paper) and keep the epoch with the best val accuracy (ours: earliest of equals).

    Args:
        net: called as `net(*inputs)`; returns (B, C) logits.
        train, val: tensors of equal length N, the last one the (N,) label indices.
        loss: called as `loss(logits, *batch)` with the batch's tensors, labels last.
        seed: shuffles the batches; the weights are drawn by the caller.

    Returns:
        Training curve: rows of epoch, split, metric, value, seed. `net` holds the chosen epoch.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    generator = torch.Generator().manual_seed(seed)
    rows, best, kept = [], -1.0, copy.deepcopy(net.state_dict())
    size = len(train[-1])
    for epoch in range(1, epochs + 1):
        net.train()
        order, total = torch.randperm(size, generator=generator), 0.0
        for i in range(0, size, batch_size):
            batch = [t[order[i : i + batch_size]] for t in train]
            value = loss(net(*_inputs(net, batch)), *batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += value.item() * len(batch[-1])
        net.eval()
        with torch.inference_mode():
            accuracy = (net(*_inputs(net, val)).argmax(-1) == val[-1]).double().mean().item() * 100
        for split, metric, value in (("train", "loss", total / size), ("val", "accuracy", accuracy)):
            rows.append({"epoch": epoch, "split": split, "metric": metric, "value": value, "seed": seed})
        if accuracy > best:
            best, kept = accuracy, copy.deepcopy(net.state_dict())
    net.load_state_dict(kept)
    return rows


def _inputs(net: nn.Module, batch: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    """The first `net.arity` tensors of a batch are the net's inputs, the rest are for the loss."""
    return list(batch[: net.arity])
