"""Ground floor: device, seeds, and the one training loop of the small modules (head and gate) on cached tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emonb.parallel import group, process_count
from emonb.rows import Rows, blocks

__all__ = ["Columns", "fit", "get_device", "outputs", "set_seed"]

Columns = Tensor | Rows  # of N rows


def get_device() -> torch.device:
    """The accelerator if there is one, under a launcher this process's own, else the CPU."""
    if process_count() > 1:
        return group().device
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
    train: tuple[Columns, ...],
    val: tuple[Columns, ...],
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
        train, val: tensors (or `rows.Rows`) of equal length N, the last one the (N,) label indices.
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
            batch = [_part(t, order[i : i + batch_size]) for t in train]
            value = loss(net(*_inputs(net, batch)), *batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += value.item() * len(batch[-1])
        net.eval()
        accuracy = (outputs(net, val).argmax(-1) == val[-1]).double().mean().item() * 100
        for split, metric, value in (("train", "loss", total / size), ("val", "accuracy", accuracy)):
            rows.append({"epoch": epoch, "split": split, "metric": metric, "value": value, "seed": seed})
        if accuracy > best:
            best, kept = accuracy, copy.deepcopy(net.state_dict())
    net.load_state_dict(kept)
    return rows


@torch.inference_mode()
def outputs(net: nn.Module, data: tuple[Columns, ...]) -> Tensor:
    """(N, C) logits of a net for tensors or `rows.Rows` of N rows, a block at a time."""
    return torch.cat([net(*_inputs(net, [_part(t, block) for t in data])) for block in blocks(len(data[-1]))])


def _part(column: Columns, rows: slice | Tensor) -> Tensor:
    """Some rows as float32 where they are stored shorter."""
    part = column[rows]
    return part.float() if part.is_floating_point() else part


def _inputs(net: nn.Module, batch: Sequence[Tensor]) -> list[Tensor]:
    """The first `net.arity` tensors of a batch are the net's inputs, the rest are for the loss."""
    return list(batch[: net.arity])
