"""Room 02: files of the Batch API: which parts are under way, and the results that were fetched."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from emonb.annotation import Annotation
from emonb.errors import EmonbError
from emonb.files import read_json

__all__ = ["custom_id", "download", "index_lines", "refuse_open_batches", "state_file"]


def refuse_open_batches(work: Annotation) -> None:
    """Raise `EmonbError` while batches are under way: their images would be paid twice."""
    file = state_file(work)
    still = [part for part in (read_json(file)["parts"] if file.is_file() else []) if part["status"] != "merged"]
    if still:
        images = sum(part["images"] for part in still)
        raise EmonbError(
            f"{len(still)} batches with {images:,} images are not fetched yet; fetch them with --annotator batch "
            f"(or delete triplets/{file.name}: what was submitted is paid all the same)"
        )


def state_file(work: Annotation) -> Path:
    """`OUT/triplets/<dataset>.batches.json`: the parts and how far each is."""
    return work.log.path.with_name(f"{work.dataset}.batches.json")


def download(sdk: Any, file_id: str, path: Path) -> None:
    """Fetch a result file whole or not at all: it is on disk before it has its name."""
    partial = path.with_suffix(".partial")
    with sdk.files.with_streaming_response.content(file_id) as response:
        response.stream_to_file(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def index_lines(path: Path) -> dict[str, tuple[Path, int]]:
    """Where the line of each request is: custom_id -> file, byte offset."""
    found, offset = {}, 0
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError, KeyError, TypeError):  # a line that cannot be read: its image is asked again
                found[json.loads(line)["custom_id"]] = (path, offset)
            offset += len(line)
    return found


def custom_id(image_id: str) -> str:
    """Short and free of odd characters; the same in every run."""
    return hashlib.sha256(image_id.encode()).hexdigest()[:40]
