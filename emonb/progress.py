"""Progress of long loops: a bar for a person, a small file for the runner's one overall bar."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from emonb.parallel import is_main

__all__ = ["follow", "progress", "read_progress"]

T = TypeVar("T")
_EVERY = 0.5  # seconds between two notes to the runner
_EVERY_LINE = 10.0  # seconds between two lines in a log


def progress(
    iterable: Iterable[T],
    what: str,
    total: int | None = None,
    unit: str = "it",
    note: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Iterate and show how far it is.

    In a notebook or terminal this is a tqdm bar. Under the runner (EMONB_HEADLESS=1) nothing is
    printed, so that executed notebooks stay free of bars; the state goes to $EMONB_PROGRESS_FILE.

    Args:
        iterable: what is gone through.
        what: what is running.
        total: number of items, if known.
        unit: name of an item.
        note: what else to show, such as money spent; with it a log that is no terminal gets a line every 10 s.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if not is_main():  # of several processes one shows how far it is
        yield from iterable
        return
    if os.environ.get("EMONB_HEADLESS") == "1":
        yield from _noted(iterable, what, total, note)
        return
    from tqdm.auto import tqdm

    silent = _no_screen()
    last = time.monotonic()
    with tqdm(iterable, desc=what, total=total, unit=unit, leave=False, disable=silent) as bar:
        for n, item in enumerate(bar, 1):
            yield item
            if note is None:
                continue
            bar.set_postfix_str(note(), refresh=False)
            if silent and time.monotonic() - last >= _EVERY_LINE:
                last = time.monotonic()
                print(f"{what} {n}/{total or '?'}: {note()}", file=sys.stderr, flush=True)


def follow(futures: Sequence[Future], what: str, notes: Sequence[Path]) -> None:
    """Show how far the jobs of other processes are, until all are done or one has failed.

    Args:
        futures: the jobs.
        what: what they do.
        notes: for each job the file that its process has as $EMONB_PROGRESS_FILE.
    """
    headless = os.environ.get("EMONB_HEADLESS") == "1"
    own = os.environ.get("EMONB_PROGRESS_FILE")
    from tqdm.auto import tqdm

    shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=len(futures), desc=what, bar_format=shape, leave=False, disable=headless or _no_screen()) as bar:
        left = set(futures)
        while left and not any(f.done() and f.exception() for f in futures):
            left = wait(futures, timeout=_EVERY, return_when=FIRST_EXCEPTION).not_done
            running = [_read(note) for future, note in zip(futures, notes, strict=True) if not future.done()]
            said = "; ".join(filter(None, map(_said, running)))
            bar.set_postfix_str(said, refresh=False)
            bar.update(len(futures) - len(left) + sum(map(_share, running)) - bar.n)
            if headless and own:
                state = {"what": what, "n": len(futures) - len(left), "total": len(futures), "note": said}
                _note(Path(own), json.dumps(state))
    if headless and own:
        _forget(Path(own))


def read_progress(path: Path) -> str:
    """The runner's side: the inner loop as text, e.g. `features mini-fi 12/40`, or ""."""
    return _said(_read(path))


def _no_screen() -> bool:
    return "ipykernel" not in sys.modules and not sys.stderr.isatty()


def _read(path: Path) -> dict[str, Any]:
    """What a loop noted last; empty if there is nothing yet."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {**{key: state[key] for key in ("what", "n", "total")}, "note": state.get("note", "")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _said(state: Mapping[str, Any]) -> str:
    if not state:
        return ""
    said = f"{state['what']} {state['n']}" + (f"/{state['total']}" if state["total"] else "")
    return f"{said}, {state['note']}" if state["note"] else said


def _share(state: Mapping[str, Any]) -> float:
    """How much of its inner loop a job has done, from 0 to 1."""
    return state["n"] / state["total"] if state and state["total"] else 0.0


def _noted(iterable: Iterable[T], what: str, total: int | None, note: Callable[[], str] | None) -> Iterator[T]:
    path = os.environ.get("EMONB_PROGRESS_FILE")
    last = 0.0
    for n, item in enumerate(iterable):
        if path and time.monotonic() - last >= _EVERY:
            last = time.monotonic()
            _note(Path(path), json.dumps({"what": what, "n": n, "total": total, "note": note() if note else ""}))
        yield item
    if path:
        _forget(Path(path))


def _forget(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _note(path: Path, text: str) -> None:
    with suppress(OSError):  # a lost note is no reason to lose a training
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
