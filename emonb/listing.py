"""The files of a dataset on disk: names, sizes and times, which say whether it changed.

An imported dataset is a small folder with `import.json`, which records where the pictures are: nothing is
copied, the source is never written to and no link has to survive a move of the folder.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

from emonb.errors import EmonbError
from emonb.files import read_json

__all__ = ["IMPORT_FILE", "listing", "listing_digest", "source_of"]

IMPORT_FILE = "import.json"


def source_of(folder: Path) -> Path | None:
    """The folder that a dataset was imported from, or None for one that was not imported.

    Raises:
        EmonbError: `import.json` is damaged, or the folder it names is gone.
    """
    file = folder / IMPORT_FILE
    if not file.is_file():
        return None
    record = read_json(file)
    if not isinstance(record, dict) or not isinstance(record.get("source"), str):
        raise EmonbError(f"{file}: field 'source' missing; delete the folder {folder} and import again")
    source = Path(record["source"])
    if not source.is_dir():
        raise EmonbError(f"{file}: the source {source} is gone; put it back, or import again from where it is now")
    return source


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Path, bytes and time (ns) of every file below a folder, and below the source of an imported one, sorted."""
    source = source_of(folder)
    return [*_files(folder), *(_files(source) if source else [])]


def listing_digest(folder: Path) -> str:
    """Sixteen digits that change when a file is added, removed, renamed or written."""
    text = "\n".join(f"{path}|{size}|{time}" for path, size, time in listing(folder))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _files(folder: Path) -> list[tuple[str, int, int]]:
    found = []
    for parent, _, names in os.walk(folder):  # follows no links to folders, so that a loop ends
        for name in names:
            path = os.path.join(parent, name)
            with suppress(OSError):  # a broken link, or gone since
                state = os.stat(path)
                if stat.S_ISREG(state.st_mode):
                    found.append((os.path.relpath(path, folder), state.st_size, state.st_mtime_ns))
    return sorted(found)
