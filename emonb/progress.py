"""Ground floor: progress of long loops. A bar for a person, a file for the runner's one overall bar."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

from emonb.machine import is_main

T = TypeVar("T")


def progress(
    iterable: Iterable[T],
    what: str,
    total: int | None = None,
    unit: str = "it",
    note: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Iterate and show how far it is, by tqdm.

    In a notebook or terminal this is a bar; in a log with a `note` a line every ten seconds. Under the runner
    (EMONB_HEADLESS=1) executed notebooks stay free of bars: tqdm writes into $EMONB_PROGRESS_FILE.

    Args:
        iterable: what is gone through.
        what: what is running.
        total: number of items, if known.
        unit: name of an item.
        note: what else to show, such as money spent.
    """
    headless = os.environ.get("EMONB_HEADLESS") == "1"
    path = os.environ.get("EMONB_PROGRESS_FILE") if headless else None
    if not is_main() or (headless and not path):  # of several processes one shows how far it is
        yield from iterable
        return
    from tqdm import tqdm as plain
    from tqdm.auto import tqdm

    options: dict[str, Any] = {"desc": what, "total": total, "unit": unit}
    try:
        if path:
            form = "{desc} {n_fmt}/{total_fmt}, {remaining} left{postfix}"
            bar = plain(iterable, file=_Last(path), bar_format=form, mininterval=0.5, ncols=200, **options)
        elif "ipykernel" in sys.modules or sys.stderr.isatty():
            bar = tqdm(iterable, leave=False, **options)
        else:
            bar = plain(
                iterable, file=_Lines(sys.stderr), disable=note is None, mininterval=10, leave=False, **options
            )
        for item in bar:
            yield item
            if note is not None:
                bar.set_postfix_str(note(), refresh=False)
    finally:
        if path:
            with suppress(OSError):
                Path(path).unlink(missing_ok=True)


def read_progress(path: Path) -> str:
    """The runner's side: the inner loop as text, e.g. `features mini-fi 12/40, 00:03 left`, or ""."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


class _Last:
    """A file that holds the last line only; a lost one is no reason to lose a training."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def write(self, text: str) -> None:
        if text.strip():
            with suppress(OSError):
                temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
                temporary.write_text(text.strip("\r\n "), encoding="utf-8")
                temporary.replace(self.path)

    def flush(self) -> None:
        """Nothing is held back."""


class _Lines:
    """A log: a state of the bar a line, none more often than every ten seconds."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.last = stream, time.monotonic()

    def write(self, text: str) -> None:
        if text.strip() and time.monotonic() - self.last >= 10:
            self.last = time.monotonic()
            print(text.strip("\r\n "), file=self.stream, flush=True)

    def flush(self) -> None:
        """Lines are flushed as they are written."""
