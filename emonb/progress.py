"""Ground floor: progress of long loops. A bar for a person, a file for the runner's one overall bar."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from emonb.machine import is_main

T = TypeVar("T")


def progress(
    iterable: Iterable[T],
    what: str,
    total: int | None = None,
    unit: str = "it",
    note: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Iterate and show how far it is, by tqdm: in a notebook, a terminal, or every ten seconds in a log.

    Under the runner (EMONB_HEADLESS=1) executed notebooks stay free of bars: the state goes to $EMONB_PROGRESS_FILE.
    `what` is running; `total`: items, if the iterable cannot tell; `note`: what else to show, such as money spent.
    """
    from tqdm.auto import tqdm

    headless, screen = os.environ.get("EMONB_HEADLESS") == "1", "ipykernel" in sys.modules or sys.stderr.isatty()
    path = Path(os.environ.get("EMONB_PROGRESS_FILE") or os.devnull)
    silent = not is_main() or headless or not (screen or note)  # of several processes one shows how far it is
    pace = {} if screen else {"mininterval": 10, "maxinterval": 60}
    with tqdm(iterable, desc=what, total=total, unit=unit, leave=False, disable=silent, **pace) as bar:
        for n, item in enumerate(bar):
            if headless and is_main():
                with suppress(OSError):  # a lost note is no reason to lose a training
                    path.write_text(f"{what} {n}/{len(bar) if bar.total else '?'}", encoding="utf-8")
            yield item
            if note is not None:
                bar.set_postfix_str(note(), refresh=False)
    with suppress(OSError):
        path.write_text("", encoding="utf-8")
