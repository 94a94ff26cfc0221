"""Matrices that are too long for the memory: rows of safetensors files, read when they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emonb.errors import EmonbError

__all__ = ["MEMORY", "Rows", "blocks", "split_rows"]

MEMORY = 512 * 2**20  # bytes; a smaller matrix is held, of a larger one only what is asked for (ours)
_BLOCK = 4096  # rows
_TYPES = {"F16": (np.float16, torch.float16), "F32": (np.float32, torch.float32), "I64": (np.int64, torch.int64)}


class Rows:
    """The tensors of one name in several safetensors files, one below the other, as one (N, D) matrix.

    Read with plain file reads, not through a memory map, whose pages would count as the process's memory.

    Args:
        files: in the order of the rows.
        name: of the tensor in each file.
        memory: bytes up to which the whole matrix is held.

    Raises:
        EmonbError: a file is missing or damaged, or the tensors do not fit together.
    """

    def __init__(self, files: Sequence[Path], name: str, memory: int = MEMORY) -> None:
        self._files, places = list(files), [_place(Path(file), name) for file in files]
        self._offsets, lengths = [p[0] for p in places], [p[1][0] for p in places]
        kinds = {(kind, tuple(shape[1:])) for _, shape, kind in places}
        if len(kinds) != 1:
            raise EmonbError(
                f"{files[0] if files else name}: {name!r} differs between files; delete them and run again"
            )
        kind, rest = kinds.pop()
        self._numpy, self.dtype = _TYPES[kind]
        self._ends = np.cumsum([0, *lengths])
        self.shape = (int(self._ends[-1]), *rest)
        self._width = int(np.prod(rest, dtype=np.int64))
        fits = self.shape[0] * self._width * np.dtype(self._numpy).itemsize <= memory
        self._held = self._span(0, self.shape[0]) if fits else None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Tensor:
        """Rows by slice (step 1) or by a list of positions, in that order."""
        if self._held is not None:
            return self._held[rows if isinstance(rows, slice | Tensor) else list(rows)]
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            return self._span(start, stop)
        wanted = np.asarray(rows, dtype=np.int64)
        found = np.empty((len(wanted), self._width), self._numpy)
        files = np.searchsorted(self._ends, wanted, side="right") - 1
        size = self._width * found.itemsize
        for number in np.unique(files):
            handle = os.open(self._files[number], os.O_RDONLY)
            try:
                for at in np.flatnonzero(files == number):
                    offset = self._offsets[number] + int(wanted[at] - self._ends[number]) * size
                    found[at] = np.frombuffer(os.pread(handle, size, offset), self._numpy)
            finally:
                os.close(handle)
        return torch.from_numpy(found).view(-1, *self.shape[1:])

    def _span(self, start: int, stop: int) -> Tensor:
        """Rows start to stop (exclusive), which may lie in several files."""
        found = np.empty((max(0, stop - start), self._width), self._numpy)
        for number, (first, last) in enumerate(pairwise(self._ends)):
            low, high = max(start, first), min(stop, last)
            if low < high:
                with Path(self._files[number]).open("rb") as file:
                    file.seek(self._offsets[number] + int(low - first) * self._width * found.itemsize)
                    file.readinto(memoryview(found[low - start : high - start]).cast("B"))
        return torch.from_numpy(found).view(-1, *self.shape[1:])


def split_rows(folder: Path, split: str, name: str) -> Rows:
    """The tensor `name` of all shards of a split: the files that `emonb.shards` names, in the order of the images."""
    return Rows(sorted(folder.glob(f"{split}-*.safetensors")), name)


def blocks(length: int, size: int = _BLOCK) -> Iterator[slice]:
    """Slices that cover a length: for what need not be held at once."""
    return (slice(i, min(i + size, length)) for i in range(0, length, size))


def _place(file: Path, name: str) -> tuple[int, list[int], str]:
    """Byte offset, shape and type of a tensor: a safetensors file begins with the length of its JSON header."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            entry = json.loads(opened.read(size))[name]
        return 8 + size + entry["data_offsets"][0], entry["shape"], entry["dtype"]
    except (OSError, ValueError, KeyError) as error:
        raise EmonbError(f"{file}: cannot read {name!r} ({error}); delete the result's folder and run again") from None
