"""What processes side by side do in the tests: a module of its own, so that they begin at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from emonb.errors import EmonbError


def job(folder: Path, name: str, *deeds: str) -> tuple[str, int, str]:
    """Notes that it was done, after the deed that is named for it; returns its name, its parent and its threads."""
    for which, deed in (d.split(":") for d in deeds):
        if which == name and deed == "fail":
            raise EmonbError(f"{name}: no good")
        if which == name and deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if which == name and deed == "sleep":
            (folder / f"{name} sleeps").touch()
            time.sleep(60)
    (folder / name).touch()
    return name, os.getppid(), os.environ.get("OMP_NUM_THREADS", "")
