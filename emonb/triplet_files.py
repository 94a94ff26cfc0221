"""Room 02: who may write a triplets file now, and which batches are under way for it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emonb.errors import EmonbError
from emonb.files import make_folder

__all__ = ["batches_path", "locked_triplets", "read_batches", "refuse_open_batches"]


@contextmanager
def locked_triplets(path: Path) -> Iterator[None]:
    """Hold a triplets file for one writer; raises `EmonbError` while another process has it."""
    make_folder(path.parent)
    with path.with_name(f".{path.stem}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EmonbError(
                f"triplets/{path.name}: another process is asking for these answers; "
                "wait until it has ended: nothing shall be paid twice"
            ) from None
        yield


def batches_path(path: Path) -> Path:
    """`<dataset>.batches.json` beside `<dataset>.jsonl`: the parts and how far each is."""
    return path.with_name(f"{path.stem}.batches.json")


def read_batches(path: Path) -> list[dict[str, Any]]:
    """The Batch API's parts that were made for a triplets file; raises `EmonbError` for a damaged note of them."""
    file = batches_path(path)
    if not file.is_file():
        return []
    try:
        parts = json.loads(file.read_text(encoding="utf-8"))["parts"]
        if all({"name", "status", "images", "form", "asked_of", "prompt_sha256"} <= part.keys() for part in parts):
            return parts
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise EmonbError(
        f"triplets/{file.name}: damaged; restore a copy. Without it, batches under way are paid a second time: "
        f"cancel them at the server first (their metadata `emonb` begins with {path.stem!r}), then delete it"
    )


def refuse_open_batches(path: Path) -> None:
    """Raise `EmonbError` while batches are under way: their images would be paid twice, or their answers replaced."""
    still = [part for part in read_batches(path) if part["status"] != "merged"]
    if still:
        images = sum(part["images"] for part in still)
        raise EmonbError(
            f"{len(still)} batches with {images:,} images are not fetched yet; fetch them with --annotator batch "
            f"(or delete triplets/{batches_path(path).name}: what was submitted is paid all the same)"
        )
