"""Work on many images in shards: each is one file, made once, by any process, and kept until all are there.

A shard is a run of images of one split. Its size is fixed, so that the batches, and with them the results, are
the same whoever works on it: one process or eight, at once or after a kill.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from emonb.parallel import agree, process_count, process_index, wait
from emonb.progress import progress

__all__ = ["SHARD", "Shard", "ahead", "link", "make_shards", "shards_of"]

T, R = TypeVar("T"), TypeVar("R")
SHARD = 512  # images; ours: minutes of work for a 7B model, and a multiple of the usual batch sizes


@dataclass(frozen=True)
class Shard:
    """Images `start` to `stop` (exclusive) of a split, in the sample table's order."""

    split: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of its file, without ending; names sort in the order of the images."""
        return f"{self.split}-{self.start // SHARD:05d}"

    def batches(self, size: int) -> list[slice]:
        """Its images in batches, as positions in the split."""
        return [slice(i, min(i + size, self.stop)) for i in range(self.start, self.stop, size)]


def shards_of(sizes: Mapping[str, int]) -> list[Shard]:
    """All shards in a fixed order: splits as given, images as in the table.

    Args:
        sizes: images per split.
    """
    starts = [(split, size, i) for split, size in sizes.items() for i in range(0, size, SHARD)]
    return [Shard(split, i, min(i + SHARD, size)) for split, size, i in starts]


def make_shards(
    shards: Sequence[Shard], folder: Path, ending: str, make: Callable[[Shard, Path], None], what: str
) -> list[Path]:
    """The shards' files in order; what is missing is made now, by all processes together.

    Args:
        shards: all of them.
        folder: where the files are kept; all processes must see it.
        ending: of the files, with the dot.
        make: writes the file of one shard.
        what: for the progress bar.
    """
    files = [folder / f"{shard.name}{ending}" for shard in shards]
    missing = agree([i for i, file in enumerate(files) if not file.is_file()])  # one view for all
    mine = missing[process_index() :: process_count()]
    for i in progress(mine, what, unit="shard"):
        partial = files[i].with_name(f".{files[i].name}.partial")
        make(shards[i], partial)
        os.replace(partial, files[i])
    wait()
    return files


def ahead(prepare: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`prepare(item)` for each item in order, made by threads while the caller works on those before.

    Args:
        prepare: decodes pictures, say: work that releases Python's lock.
        items: what it is called with.
        threads: 0: no thread, each is made when it is asked for. At most `threads` + 1 results are held.
    """
    if not threads:
        yield from map(prepare, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(prepare, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def link(files: Sequence[Path], folder: Path) -> None:
    """Put finished files into another folder without copying them, where the file system can."""
    for file in files:
        try:
            os.link(file, folder / file.name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, folder / file.name)
