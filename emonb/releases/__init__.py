"""Which release a folder holds, and how it is read; where to get each stands in `resources/releases.yaml`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from emonb.errors import EmonbError
from emonb.files import resource
from emonb.releases.readers import (
    FI_FOLDER,
    MIKELS,
    SENTIMENT,
    Release,
    read_bass,
    read_emoset,
    read_emotion6,
    read_fi,
    read_oasis,
    read_sentiment,
    read_tree,
)
from emonb.settings import SPLITS

READERS: dict[str, Callable[[Path], Release]] = {
    "emoset": read_emoset,
    "emotion6": read_emotion6,
    "fi": read_fi,
    "flickr": read_sentiment,
    "instagram": read_sentiment,
    "oasis": read_oasis,
    "bass": read_bass,
    "folder": read_tree,
}
_FILES = {"emotion6": "ground_truth.txt", "oasis": "OASIS.csv", "bass": "BASS_data.csv", "emoset": "info.json"}
_EMOTIONS = {"fi": MIKELS, "flickr": SENTIMENT, "instagram": SENTIMENT}


def recognise(source: Path, name: str = "") -> str:
    """Name of the format of a release folder, by its files; a tree of unknown origin is `folder`.

    FI's bare emotion folders look like any other tree: they are `fi` only where the dataset has that name, because
    FI's reader also looks for the placeholders of removed photos. Flickr and Instagram are read as plain trees.
    """
    with _reading(source):
        form = next((form for form in _FILES if _fits(form, source)), "folder")
        emoset = ("image", *(f"{split}.json" for split in SPLITS))
        if form == "emoset" and not any((source / name).exists() for name in emoset):  # info.json may lie anywhere
            form = "folder"
        if form == "folder" and ((source / FI_FOLDER).is_dir() or (name == "fi" and _fits("fi", source))):
            form = "fi"
        return form


def read_release(form: str, source: Path, partial: bool = False) -> Release:
    """Read a release of a named format.

    Args:
        form: a key of `READERS`.
        source: its folder.
        partial: take a release whose list or folder for train or test is missing.

    Raises:
        EmonbError: unknown format, no such folder, files of another format, or a split missing.
    """
    if form not in READERS:
        raise EmonbError(f"format {form!r}: unknown; use one of {', '.join(READERS)}")
    if not source.is_dir():
        raise EmonbError(f"{source}: no such folder; give the folder that the release was unpacked into")
    with _reading(source):
        if not _fits(form, source):
            raise EmonbError(_wrong_folder(form, source))
        release = READERS[form](source)
    if release.missing and not partial:
        needed = "train/ and test/" if release.missing[0].endswith("/") else "train.json and test.json"
        raise EmonbError(
            f"{source}: {' and '.join(release.missing)} missing: needs both {needed}; add what is missing, or take "
            "what is there: python -m emonb data import ... --allow-missing-split"
        )
    return release


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """A folder or file that cannot be read is one clear error."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else source
        raise EmonbError(f"{where}: cannot be read ({error.strerror}); give yourself permission to read it") from None


def _fits(form: str, folder: Path) -> bool:
    """Whether a folder has the file of a format, or a folder of one of its emotions."""
    if form in _FILES:
        return (folder / _FILES[form]).is_file()
    parents = [p for p in (folder, *(folder / name for name in (FI_FOLDER, *SPLITS))) if p.is_dir()]
    names = {p.name.lower() for parent in parents for p in parent.iterdir() if p.is_dir()}
    return form not in _EMOTIONS or not names.isdisjoint(_EMOTIONS[form])


def _wrong_folder(form: str, source: Path) -> str:
    """What a format is made of, what was found instead, and where it may be."""
    names = [repr(p.name + "/" * p.is_dir()) for p in sorted(source.iterdir()) if not p.name.startswith(".")]
    found = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
    message = f"{source}: no {form} release: it is made of {release_facts(form)['made_of']}; found {found}"
    other = recognise(source)
    if other not in ("folder", form):
        return f"{message}; this looks like {other}"
    below = [p for p in sorted(source.iterdir()) if p.is_dir() and _fits(form, p)]
    return f"{message}; did you mean {below[0]}?" if below else f"{message}; give the folder it was unpacked into"


def release_facts(form: str) -> dict[str, Any]:
    """What is recorded about a release: `made_of`, official `sizes`, whether they are `about` right, ..."""
    return resource("releases.yaml").get(form, {})


def release_table() -> pd.DataFrame:
    """Where to get each release: one row a format of the field, as far as known."""
    unknown, rows = "not recorded here", []
    for form, facts in resource("releases.yaml").items():
        total = facts.get("sizes", {}).get("total")
        row = {
            "release": f"{facts['title']} ({facts['cite']})",
            "pictures": f"{'about ' * facts.get('about', False)}{total:,}" if total else unknown,
            **{key: facts.get(key, unknown) for key in ("size", "licence", "registration", "page")},
        }
        rows.append({**row, "made of": facts["made_of"], "format": form})
    return pd.DataFrame(rows)
