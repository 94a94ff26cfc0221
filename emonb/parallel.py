"""Several processes, one result: `accelerate launch -m emonb stage ...`, on GPUs or machines that share OUT.

Without a launcher there is one process and every function here returns at once. accelerate starts the process
group (NCCL on GPUs, gloo on CPUs); nothing but these few functions knows how many processes there are.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = [
    "agree",
    "alone",
    "cores",
    "group",
    "is_main",
    "launched",
    "process_count",
    "process_index",
    "sharded",
    "total",
    "wait",
]

T = TypeVar("T")
_ALONE: list[bool] = []
_PATIENCE = timedelta(days=7)  # one process may work for hours on what the others wait for; a dead one ends them all


def launched() -> bool:
    """Whether a launcher has started this process, and perhaps others like it."""
    return "LOCAL_RANK" in os.environ


def process_count() -> int:
    """Number of processes that make one result together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if launched() and not _ALONE else 1


def cores() -> int:
    """Cores for threads and loader workers of this process: its share, if others like it run on this machine."""
    from loky import cpu_count

    beside = int(os.environ.get("EMONB_SIDE_BY_SIDE", "1"))  # `side_by_side` says it to the processes that it starts
    return max(1, cpu_count() // (process_count() * beside))


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process does not count on the others: for what only one of them does."""
    _ALONE.append(True)
    try:
        yield
    finally:
        _ALONE.pop()


def process_index() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if process_count() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that decides, merges and writes results."""
    return process_index() == 0


@functools.cache
def group() -> PartialState:
    """accelerate's state of this process: its device, and the process group, which is started here."""
    import torch
    from accelerate import PartialState

    options = {"timeout": _PATIENCE} if process_count() > 1 else {}
    return PartialState(cpu=not torch.cuda.is_available(), **options)


def wait() -> None:
    """Wait until every process is here."""
    if process_count() > 1:
        group().wait_for_everyone()


def agree(value: T) -> T:
    """The main process's value, for all: what is to be done is decided once."""
    if process_count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    group()
    return broadcast_object_list([value])[0]


def total(value: float) -> float:
    """The sum of a number over all processes."""
    if process_count() == 1:
        return value
    import torch

    number = torch.tensor(value, dtype=torch.float64, device=group().device)
    torch.distributed.all_reduce(number)
    return number.item()


def sharded() -> bool:
    """Whether the launcher spreads one model over the processes (FSDP, DeepSpeed ZeRO-3).

    Then no part of the model can be called alone, and every process must call the whole one equally often.
    """
    if process_count() == 1:
        return False
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return True
    from transformers.integrations import is_deepspeed_zero3_enabled

    zero3: Any = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return zero3 or is_deepspeed_zero3_enabled()
