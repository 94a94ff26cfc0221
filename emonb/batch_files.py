"""Room 02: files of the Batch API: which parts are under way, and the results that were fetched."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["GONE", "custom_id", "download", "index_lines"]

GONE = (
    "the batch {part} or its answers are not at this server (another account? deleted?); to ask again, remove it "
    "from triplets/{file}"
)  # what a 404 means


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
