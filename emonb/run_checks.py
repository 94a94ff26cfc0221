"""What a run checks before it starts: its datasets, its notebooks, and that it is alone in its folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emonb.errors import EmonbError
from emonb.settings import Settings

__all__ = ["check_datasets", "exclusive", "is_chosen"]


def check_datasets(settings: Settings) -> None:
    """Raise `EmonbError` for a dataset that is neither drawn nor below the images folder."""
    from emonb.miniworld import DRAWN

    root = settings.images_path
    if root is not None and not root.is_dir():
        raise EmonbError(f"images: {root} is no folder; give the parent of the datasets' folders (--images, IMAGES)")
    for name in settings.datasets:
        if name in DRAWN:
            continue
        if root is None:
            raise EmonbError(
                f"datasets: unknown dataset {name!r}; drawn ones are {', '.join(DRAWN)}; "
                "for one on disk also give its parent folder: --images ROOT (IMAGES=ROOT)"
            )
        if not (root / name).is_dir():
            there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:20]) or "no folder"
            raise EmonbError(f"datasets: no folder {root / name}; {root} holds: {there}")


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Hold the lock of a results folder; raises `EmonbError` if another run holds it."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EmonbError(f"{out}: another run is writing here; wait for it or choose another OUT") from None
        yield


def is_chosen(source: Path, notebooks: str) -> bool:
    """Whether a comma-separated list of numbers or names (empty: all) names this notebook."""
    wanted = [part.strip() for part in notebooks.split(",") if part.strip()]
    return not wanted or any(source.stem == part or source.stem.split("_")[0] == part for part in wanted)
