"""`python -m emonb data import`: a release as downloaded becomes a dataset that a run can use.

`OUT/<name>/` gets the sample table, the integrity report (JSON and a page) and `import.json`, which records where
the pictures are: they are neither copied nor linked, so that a read-only source and a file system without links
serve too. The folder appears when it is complete; an error or a kill leaves none, or the earlier import.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emonb.data import sample_table, write_samples
from emonb.errors import EmonbError
from emonb.integrity import KINDS
from emonb.integrity_page import integrity_page
from emonb.listing import IMPORT_FILE, listing_digest
from emonb.miniworld import DRAWN
from emonb.releases import FORMATS, read_release
from emonb.store import atomic_write, make_folder, write_json
from emonb.trees import plain_text

__all__ = ["import_release"]

_FILES = {"samples.parquet", "integrity.json", "integrity.html", IMPORT_FILE}


def import_release(
    form: str,
    source: Path,
    out: Path,
    *,
    name: str = "",
    allow_missing_split: bool = False,
    say: Callable[[str], Any] = print,
) -> Path:
    """Import a release and return the dataset's folder, `out/<name>`.

    Args:
        form: a key of `releases.FORMATS`.
        source: the release's folder; only read.
        out: the folder of datasets, later `IMAGES`.
        name: the dataset's name; default: the format's, for `folder` the source's.
        allow_missing_split: import a release without train or test; a run refuses it, other tools need not.
        say: gets one line for each finding.

    Raises:
        EmonbError: another format, a missing list, a name that is taken, a folder that cannot be written, ...
    """
    if form in FORMATS and source.is_dir():  # else read_release says what is wrong
        name = name or (source.resolve().name if form == "folder" else form)
        _check_target(name, source, out)
    release = read_release(form, source, allow_missing_split)
    target = out / name
    with _assembled(target) as folder:
        listed = listing_digest(source)
        table = sample_table(release, name, form, where=str(source), partial=allow_missing_split)
        write_samples(table.samples, folder)
        write_json(folder / "integrity.json", table.report)
        atomic_write(folder / "integrity.html", integrity_page(name, form, source, table.pictures, table.report))
        places = {"source": source, "root": table.root, "pictures": table.pictures}
        record = {"format": form, **{key: str(path.resolve()) for key, path in places.items()}}
        write_json(folder / IMPORT_FILE, {**record, "labels": list(table.labels), "listing": listed})
    for line in _summary(name, table.report, target):
        say(line)
    return target


def _check_target(name: str, source: Path, out: Path) -> None:
    """Raise unless `out/name` is free, or an earlier import, and no part of the source."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or "__" in name or name in DRAWN:
        raise EmonbError(
            f"--name {name!r}: use letters, digits, single _ . and -, and none of the drawn ones ({', '.join(DRAWN)})"
        )
    if plain_text(str(source.resolve())) != str(source.resolve()):
        raise EmonbError(f"{plain_text(str(source))}: this folder's name is not valid UTF-8; rename it")
    if out.resolve().is_relative_to(source.resolve()):
        raise EmonbError(f"--out {out}: lies in the source, which is only read; choose a folder outside {source}")
    target = out / name
    if os.path.lexists(target) and not (target / IMPORT_FILE).is_file():
        raise EmonbError(
            f"{target}: is there already and was not imported; choose another --name or --out"
            + (f" (IMAGES={out} reads it as it is)" if target.is_dir() else "")
        )
    foreign = sorted({p.name for p in target.iterdir()} - _FILES) if target.is_dir() else []
    if foreign:
        raise EmonbError(f"{target}: holds {', '.join(foreign)}, which no import wrote; move that elsewhere first")


@contextmanager
def _assembled(target: Path) -> Iterator[Path]:
    """An empty folder beside the target that takes its place when the block ends without error."""
    make_folder(target.parent)
    folder, old = (target.with_name(f".{target.name}.{end}") for end in ("importing", "old"))
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when its holder dies
        except BlockingIOError:
            raise EmonbError(f"{target}: is being imported by another process; wait for it") from None
        if not folder.is_dir() or os.fstat(handle).st_ino != folder.stat().st_ino:  # it took its place just now
            raise EmonbError(f"{target}: was imported by another process at the same time; look at it first")
        try:
            shutil.rmtree(old, ignore_errors=True)
            for stale in folder.iterdir():  # of an import that was killed
                stale.unlink()
            yield folder
            if target.exists():
                target.rename(old)
            folder.rename(target)
        except OSError as error:
            if error.errno in (13, 28, 30):  # no permission, disk full, read-only file system
                raise EmonbError(f"{target}: cannot write ({error.strerror}); free it or choose --out") from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(handle)


def _summary(name: str, report: dict[str, Any], target: Path) -> Iterator[str]:
    total = sum(sum(counts.values()) for counts in report["counts"].values())
    splits = ", ".join(f"{split} {sum(counts.values())}" for split, counts in report["counts"].items())
    yield f"{name}: {total} pictures ({splits})"
    for split, official in report["expected"].items():
        found = report["found"].get(split)
        if split != "about" and found is not None and found != official:
            about = "about " if report["expected"]["about"] else ""
            yield f"  {split}: {found} in the release, officially {about}{official}"
    for kind, image_ids in report["problems"].items():
        yield f"  {kind}: {len(image_ids)} ({'left out' if KINDS[kind].left_out else 'kept'}) {KINDS[kind].meaning}"
    empty = [split for split, counts in report["counts"].items() if not sum(counts.values())]
    if empty:
        yield f"  no {' and no '.join(empty)}: a run needs all splits and will refuse this dataset"
    yield f"report: {target / 'integrity.html'}"
    if not empty:
        yield f"next: make reproduce DATASETS={name} IMAGES={shlex.quote(str(target.parent))}"
