"""Room 01: which release a folder holds, what each release is made of, and its official sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import pandas as pd
import yaml

from emonb.emotions import TAXONOMIES
from emonb.errors import EmonbError
from emonb.release_readers import (
    Release,
    read_bass,
    read_emoset,
    read_emotion6,
    read_fi,
    read_folder,
    read_oasis,
    read_sentiment,
)
from emonb.settings import SPLITS
from emonb.trees import names_in

__all__ = ["FORMATS", "Format", "Release", "read_release", "recognise", "release_table"]


@dataclass(frozen=True)
class Format:
    """A release: its reader, what it is made of, the files without which it is another, and its official sizes."""

    read: Callable[[Path], Release]
    made_of: str
    needs: tuple[str, ...] = ()
    expected: Mapping[str, int] = field(default_factory=dict)
    about: bool = False  # whether the official size is a round figure


FORMATS = {
    "emoset": Format(
        read_emoset,
        "info.json, train.json, val.json, test.json, image/<emotion>/*.jpg, annotation/<emotion>/*.json",
        ("info.json",),
        {"total": 118_102, "train": 94_481, "val": 5_905, "test": 17_716},
    ),
    "emotion6": Format(
        read_emotion6, "ground_truth.txt, images/<emotion>/*.jpg", ("ground_truth.txt",), {"total": 1_980}
    ),
    "fi": Format(read_fi, "emotion_dataset/<emotion>/*.jpg", (), {"total": 23_000}, about=True),
    "flickr": Format(read_sentiment, "positive/*.jpg, negative/*.jpg, or below train/, val/, test/"),
    "instagram": Format(read_sentiment, "positive/*.jpg, negative/*.jpg, or below train/, val/, test/"),
    "oasis": Format(read_oasis, "OASIS.csv, images/<Theme>.jpg", ("OASIS.csv",), {"total": 900}),
    "bass": Format(read_bass, "BASS_data.csv, images/*.png", ("BASS_data.csv",), {"total": 583}),
    "folder": Format(read_folder, "<train|val|test>/<emotion>/*.jpg (or .png, .webp), or <emotion>/*.jpg"),
}


def recognise(source: Path, name: str = "") -> str:
    """Name of the format of a release folder, by its files; a tree of unknown origin is `folder`.

    FI's bare emotion folders look like any other tree: they are `fi` only where the dataset has that name, because
    FI's readers also look for the placeholders of removed photos. Flickr and Instagram are read as plain trees.
    """
    with _reading(source):
        for form in ("emotion6", "oasis", "bass"):
            if not _lacking(form, source):
                return form
        lists = any((source / f"{split}.json").is_file() for split in SPLITS)
        if not _lacking("emoset", source) and (lists or (source / "image").is_dir()):  # an info.json may lie anywhere
            return "emoset"
        known = (source / "emotion_dataset").is_dir() or (name == "fi" and _has_folders("fi", source))
        return "fi" if known else "folder"


def read_release(name: str, source: Path, partial: bool = False) -> Release:
    """Read a release of a named format.

    Args:
        name: a key of `FORMATS`.
        source: its folder.
        partial: take a release whose list or folder for train or test is missing.

    Raises:
        EmonbError: unknown format, no such folder, files of another format, or a split missing.
    """
    if name not in FORMATS:
        raise EmonbError(f"format {name!r}: unknown; use one of {', '.join(FORMATS)}")
    if not source.is_dir():
        raise EmonbError(f"{source}: no such folder; give the folder that the release was unpacked into")
    with _reading(source):
        if _lacking(name, source) or (name != "folder" and not _has_folders(name, source)):
            raise EmonbError(_wrong_folder(name, source))
        release = FORMATS[name].read(source)
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


def release_table() -> pd.DataFrame:
    """Where to get each release: one row a format of the field, as far as known (`resources/releases.yaml`).

    Columns: `release`, `pictures` (official number), `size`, `licence`, `registration`, `page`, `made of`,
    `format` (for `python -m emonb data import`).
    """
    unknown = "not recorded here"
    known = yaml.safe_load(resources.files("emonb").joinpath("resources", "releases.yaml").read_text(encoding="utf-8"))
    rows = []
    for name, facts in known.items():
        total = FORMATS[name].expected.get("total")
        rows.append(
            {
                "release": f"{facts['title']} ({facts['cite']})",
                "pictures": f"{'about ' * FORMATS[name].about}{total:,}" if total else unknown,
                **{key: facts.get(key, unknown) for key in ("size", "licence", "registration", "page")},
                "made of": FORMATS[name].made_of,
                "format": name,
            }
        )
    return pd.DataFrame(rows)


def _lacking(name: str, source: Path) -> list[str]:
    """Files without which a folder is no release of a format."""
    return [file for file in FORMATS[name].needs if not (source / file).is_file()]


def _has_folders(name: str, source: Path) -> bool:
    """Whether a format that is a tree of certain emotions has a folder of one of them."""
    if FORMATS[name].needs:
        return True
    labels = TAXONOMIES["mikels8" if name == "fi" else "sentiment2"].labels
    parents = [source, source / "emotion_dataset", *(source / s for s in SPLITS)]
    folders = {p.name.lower() for parent in parents if parent.is_dir() for p in parent.iterdir() if p.is_dir()}
    return bool(folders & set(labels))


def _wrong_folder(name: str, source: Path) -> str:
    """What a format is made of, what was found instead, and where it may be."""
    message = f"{source}: no {name} release: it is made of {FORMATS[name].made_of}; found {names_in(source)}"
    other = recognise(source)
    if other not in ("folder", name):
        return f"{message}; this looks like {other}"
    below = [p for p in sorted(source.iterdir()) if p.is_dir() and _fits(name, p)]
    return f"{message}; did you mean {below[0]}?" if below else f"{message}; give the folder it was unpacked into"


def _fits(name: str, folder: Path) -> bool:
    return not _lacking(name, folder) and _has_folders(name, folder)
