"""The files of a dataset on disk: names, sizes and times, which say whether it changed.

An imported dataset is a small folder with `import.json`, which records where the pictures are: nothing is
copied, the source is never written to and no link has to survive a move of the folder.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from emonb.errors import EmonbError
from emonb.files import read_json

__all__ = ["IMPORT_FILE", "listing_digest", "source_of"]

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


def listing_digest(folder: Path) -> str:
    """Sixteen digits that change when a file is added, removed, renamed or written, in an import's source too."""
    digest = hashlib.sha256()
    for root in filter(None, (folder, source_of(folder))):
        for path, size, time in _files(str(root), "", set()):
            digest.update(f"{path}|{size}|{time}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _files(folder: str, prefix: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, int, int]]:
    """Path, bytes and time (ns) of every file below a folder, in order; each folder once, so that loops end."""
    with suppress(OSError):  # a broken link, no permission, or gone since
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            return
        seen.add((state.st_dev, state.st_ino))
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            with suppress(OSError):
                state = os.stat(path)
                if stat.S_ISDIR(state.st_mode):
                    yield from _files(path, f"{prefix}{name}/", seen)
                elif stat.S_ISREG(state.st_mode):
                    yield prefix + name, state.st_size, state.st_mtime_ns
