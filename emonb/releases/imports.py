"""From a release to a checked table; `python -m emonb data import` makes it a dataset that a run can use.

`OUT/<name>/` gets the sample table, the integrity report and `import.json`, which records where the pictures are:
they are neither copied nor linked, so that a read-only source and a file system without links serve too. The folder
appears when it is complete; an error or a kill leaves none, or the earlier import.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from emonb.data import build_samples, infer_taxonomy, taxonomy_for_dataset, write_samples
from emonb.errors import EmonbError
from emonb.files import make_folder, read_json, resource, write_json
from emonb.releases import READERS, Release, read_release, recognise, release_facts
from emonb.releases.integrity import KINDS, UNKNOWN, problem_table, size_table
from emonb.releases.readers import plain_text
from emonb.settings import SPLITS

IMPORT_FILE = "import.json"
_FILES = {"samples.parquet", "integrity.json", "integrity.html", IMPORT_FILE}  # the page: of earlier versions


def write_table(
    release: Release, folder: Path, dataset: str, form: str, *, where: str, partial: bool = False
) -> dict[str, Any]:
    """Check every picture of a release and write `samples.parquet` and `integrity.json`.

    Labels that the format (or "drawn") does not fix follow from the dataset's name, or from the labels found.
    `where` names the source in messages, `partial` allows that a split is missing as a whole.

    Returns:
        `labels` (class order), `format`, and the folders `root` of paths and `pictures` of image ids.

    Raises:
        EmonbError: as `emonb.data.build_samples`.
    """
    labels = release.labels
    if labels is None:
        labels = (taxonomy_for_dataset(dataset) or infer_taxonomy(release.frame["label"].unique(), where)).labels
    samples, problems = build_samples(
        release.frame, release.root, labels, where=where, partial=partial, drop_placeholders=release.placeholders
    )
    for kind, image_ids in release.problems.items():
        problems[kind] = [*problems.get(kind, ()), *image_ids]
    table = pd.crosstab(samples["split"], samples["label"]).reindex(index=SPLITS, columns=labels, fill_value=0)
    official = release_facts(form)
    sizes = official.get("sizes")
    report = {
        "counts": table.to_dict("index"),
        "problems": {kind: sorted(problems[kind]) for kind in KINDS if problems.get(kind)},
        "found": release.found,
        "expected": {**sizes, "about": official.get("about", False)} if sizes else {},
    }
    write_samples(samples, folder)
    write_json(folder / "integrity.json", report)
    pictures = release.pictures or release.root
    return {"labels": list(labels), "format": form, "root": release.root, "pictures": pictures}


def read_dataset(source: Path, folder: Path) -> dict[str, Any]:
    """As `write_table` for a dataset on disk: an import, or a release as it was unpacked."""
    if (source / IMPORT_FILE).is_file():
        return read_import(source, folder)
    form = recognise(source, source.name)
    return write_table(read_release(form, source), folder, source.name, form, where=str(source))


def read_import(imported: Path, folder: Path) -> dict[str, Any]:
    """As `write_table`, from what `python -m emonb data import` wrote.

    Raises:
        EmonbError: a file is missing or damaged, the pictures changed since, or the table lacks a split.
    """
    record = _record(imported)
    source = record["source"]
    words = ["data", "import", record.get("format"), source, "--out", imported.parent, "--name", imported.name]
    again = f"import again: python -m emonb {shlex.join(map(str, words))}"
    try:
        pd.read_parquet(imported / "samples.parquet")
        listed, meta = record["listing"], {key: record[key] for key in ("labels", "format", "root", "pictures")}
        counts = read_json(imported / "integrity.json")["counts"]
        absent = [split for split in SPLITS if not any(counts[split].values())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EmonbError(f"{imported}: the import is damaged ({error}); {again}") from None
    if listed != listing_digest(Path(source)):
        raise EmonbError(f"{imported}: files in {source} changed since the import; {again}")
    if absent:
        raise EmonbError(
            f"{imported}: imported with --allow-missing-split, has no {' and no '.join(absent)}; a run needs all of "
            f"{', '.join(SPLITS)}: add what is missing to {source} and {again}"
        )
    for name in ("samples.parquet", "integrity.json"):
        shutil.copyfile(imported / name, folder / name)
    return meta


def _record(imported: Path) -> dict[str, Any]:
    """The content of `import.json`; its source is there."""
    file = imported / IMPORT_FILE
    record = read_json(file)
    if not isinstance(record, dict) or not isinstance(record.get("source"), str):
        raise EmonbError(f"{file}: field 'source' missing; delete the folder {imported} and import again")
    if not Path(record["source"]).is_dir():
        gone = f"the source {record['source']} is gone"
        raise EmonbError(f"{file}: {gone}; put it back, or import again from where it is now")
    return record


def listing_digest(folder: Path) -> str:
    """Sixteen digits that change when a file is added, removed, renamed or written, in an import's source too."""
    digest, roots = hashlib.sha256(), [str(folder)]
    if (folder / IMPORT_FILE).is_file():
        roots.append(_record(folder)["source"])
    for root in roots:
        for line in _listed(root, "", set()):
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _listed(folder: str, prefix: str, seen: set[str]) -> Iterator[str]:
    """Path, bytes and time (ns) of every file below a folder, in order; each folder once, so that loops end."""
    if (place := os.path.realpath(folder)) in seen:
        return
    seen.add(place)
    with suppress(OSError):  # no permission, or gone since
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            with suppress(OSError):  # a broken link
                state = entry.stat()
                if stat.S_ISDIR(state.st_mode):
                    yield from _listed(entry.path, f"{prefix}{entry.name}/", seen)
                elif stat.S_ISREG(state.st_mode):
                    yield f"{prefix}{entry.name}|{state.st_size}|{state.st_mtime_ns}\n"


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
        form: a key of `READERS`.
        source: the release's folder; only read.
        out: the folder of datasets, later `IMAGES`.
        name: the dataset's name; default: the format's, for `folder` the source's.
        allow_missing_split: import a release without train or test; a run refuses it, other tools need not.
        say: gets one line for each finding.

    Raises:
        EmonbError: another format, a missing list, a name that is taken, a folder that cannot be written, ...
    """
    if form in READERS and source.is_dir():  # else read_release says what is wrong
        name = name or (source.resolve().name if form == "folder" else form)
        _check_target(name, source, out)
    release = read_release(form, source, allow_missing_split)
    target = out / name
    with _assembled(target) as folder:
        listed = listing_digest(source)
        meta = write_table(release, folder, name, form, where=str(source), partial=allow_missing_split)
        places = {key: str(path.resolve()) for key, path in meta.items() if isinstance(path, Path)}
        record = {**meta, "source": str(source.resolve()), **places, "listing": listed}
        write_json(folder / IMPORT_FILE, record)
    for line in _summary(target):
        say(line)
    return target


def _check_target(name: str, source: Path, out: Path) -> None:
    """Raise unless `out/name` is free, or an earlier import, and no part of the source."""
    drawn = resource("lexicon.yaml", "datasets")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or "__" in name or name in drawn:
        raise EmonbError(
            f"--name {name!r}: use letters, digits, single _ . and -, and none of the drawn ones ({', '.join(drawn)})"
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
    """An empty folder that takes its place as `target` when the block ends without error."""
    with TemporaryDirectory(prefix=f".{target.name}.", dir=make_folder(target.parent)) as work:
        new = Path(work) / "new"
        try:
            new.mkdir()
            yield new
            if target.exists():
                target.rename(Path(work) / "old")
            new.rename(target)
        except OSError as error:
            raise EmonbError(f"{target}: cannot write ({error.strerror}); free it or choose --out") from error


def _summary(target: Path) -> Iterator[str]:
    reports = {target.name: read_json(target / "integrity.json")}
    sizes = {split: sum(counts.values()) for split, counts in reports[target.name]["counts"].items()}
    yield f"{target.name}: {sum(sizes.values())} pictures ({', '.join(f'{s} {n}' for s, n in sizes.items())})"
    for _, part, found, official in size_table(reports).itertuples(index=False):
        if official not in (UNKNOWN, f"{found:,}"):
            yield f"  {part}: {found:,} in the release, officially {official}"
    for _, kind, pictures, fate, meaning, _ in problem_table(reports).itertuples(index=False):
        yield f"  {kind}: {pictures} ({fate}) {meaning}"
    empty = [split for split, n in sizes.items() if not n]
    if empty:
        yield f"  no {' and no '.join(empty)}: a run needs all splits and will refuse this dataset"
    yield f"report: {target / 'integrity.json'}"
    if not empty:
        yield f"next: make reproduce DATASETS={target.name} IMAGES={shlex.quote(str(target.parent))}"
