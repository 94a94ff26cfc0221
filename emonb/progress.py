"""Progress of long loops: a bar for a person, a small file for the runner's one overall bar."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

__all__ = ["progress", "read_progress"]

T = TypeVar("T")
_EVERY = 0.5  # seconds between two notes to the runner


def progress(iterable: Iterable[T], what: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterate and show how far it is.

    In a notebook or terminal this is a tqdm bar. Under the runner (EMONB_HEADLESS=1) nothing is
    printed, so that executed notebooks stay free of bars; the state goes to $EMONB_PROGRESS_FILE.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if os.environ.get("EMONB_HEADLESS") == "1":
        yield from _noted(iterable, what, total)
        return
    from tqdm.auto import tqdm

    silent = "ipykernel" not in sys.modules and not sys.stderr.isatty()
    yield from tqdm(iterable, desc=what, total=total, unit=unit, leave=False, disable=silent)


def read_progress(path: Path) -> str:
    """The runner's side: the inner loop as text, e.g. `features mini-fi 12/40`, or ""."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return f"{state['what']} {state['n']}" + (f"/{state['total']}" if state["total"] else "")
    except (OSError, ValueError, KeyError, TypeError):  # none yet
        return ""


def _noted(iterable: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    path = os.environ.get("EMONB_PROGRESS_FILE")
    last = 0.0
    for n, item in enumerate(iterable):
        if path and time.monotonic() - last >= _EVERY:
            last = time.monotonic()
            _note(Path(path), json.dumps({"what": what, "n": n, "total": total}))
        yield item
    if path:
        with suppress(OSError):
            Path(path).unlink(missing_ok=True)


def _note(path: Path, text: str) -> None:
    with suppress(OSError):  # a lost note is no reason to lose a training
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
