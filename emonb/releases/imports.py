"""From a release to a checked table; `python -m emonb data import` makes it a dataset that a run can use.

`OUT/<name>/` gets the sample table, the integrity report and `import.json`, which records where the pictures are:
they are neither copied nor linked, so that a read-only source and a file system without links serve too. A run reads
the release itself, as it is then.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from emonb.data import infer_taxonomy, inspected, taxonomy_for_dataset, with_splits
from emonb.errors import EmonbError
from emonb.files import make_folder, read_json, resource, write_json
from emonb.releases import Release, plain_text, read_release, recognise
from emonb.settings import SPLITS

IMPORT_FILE = "import.json"
LEFT_OUT = {
    "damaged": "the file is empty, ends before the picture does, or its data are broken: copy or download it again",
    "not_a_picture": "named like a picture, the content is none (of JPEG, PNG, WebP, GIF, BMP, TIFF)",
    "decompression_bomb": "more than 89 million pixels: it would fill the memory",
    "no_access": "the file cannot be opened: a link that leads nowhere, no permission, or the disk fails",
    "unused_file": "is no .jpg, .jpeg, .png or .webp of an emotion, or its name is not valid UTF-8",
    "listed_but_missing": "the release lists it, the file is not there",
    "placeholder": "exactly the same picture many times or under different emotions: a removed photo",
    "ambiguous_valence_left_out": "the raters' mean valence lies in the ambiguous middle, or there is none",
}
KEPT = {
    "listed_twice": "the release lists it more than once: the last of train, val, test counts",
    "raters_differ": "the raters' strongest emotion is not the folder's: label_majority and label_folder have both",
    "tied_label": "two emotions have the same highest probability: the first in class order is the raters' label",
    "neutral_dominant": "neutral has the highest probability; the raters' label is the strongest of the six",
    "duplicate": "exactly the same picture twice within a split",
    "duplicate_across_splits": "exactly the same picture in two splits: leakage",
    "animated": "several frames: the first is used",
    "exif_rotated": "stored rotated or mirrored: turned as the camera says",
    "greyscale": "stored without colours",
    "cmyk": "stored in printing colours: converted",
    "palette": "stored with a palette: converted",
    "very_large": "over 4096 px a side or 25 million pixels: slow to read",
}
KINDS = LEFT_OUT | KEPT  # of problems, in the order of a report


def write_table(
    release: Release, folder: Path, dataset: str, form: str, *, where: str, partial: bool = False, source: str = ""
) -> dict[str, Any]:
    """Check every picture of a release, then write `integrity.json` and `samples.parquet`, or nothing.

    Labels that the format (or "drawn") does not fix follow from the dataset's name, or from the labels found. `where`
    names the source in messages, `partial` allows a split to be missing as a whole; an import notes its `source`.
    Returns `labels` (class order), `format`, and the folder `root` of paths. Raises `EmonbError` for a label outside
    the taxonomy, no usable picture, or a class or split missing.
    """
    frame, labels = release.frame, release.labels
    if dataset == "emotion6-majority" and "label_majority" in frame:
        frame = frame.assign(label=frame["label_majority"])
    if labels is None:
        labels = (taxonomy_for_dataset(dataset) or infer_taxonomy({*frame["label"]}, where)).labels
    if odd := {*frame["label"]} - {*labels}:
        raise EmonbError(f"{where}: label {min(odd)!r} is not one of: {', '.join(labels)}; rename its folder")
    samples, problems = inspected(frame, release.root, f"pictures of {dataset}")
    if form == "fi":  # copies that are no accident: five and more in a web-crawled set (ours), or two labels
        groups = samples["label"].groupby(samples["sha256"])
        copies = (groups.transform("size") >= 5) | (groups.transform("nunique") > 1)
        problems["placeholder"], samples = samples.loc[copies, "image_id"], samples[~copies].reset_index(drop=True)
    if samples.empty:
        raise EmonbError(f"{where}: no readable picture; put them where the release has them, or <split>/<emotion>/")
    samples = with_splits(samples, where).drop(columns="group", errors="ignore")
    counts = pd.crosstab(samples["split"], samples["label"]).reindex(index=SPLITS, columns=labels, fill_value=0)
    for split, row in counts.iterrows():
        if not row.all() and (row.any() or not partial):
            lacking = ", ".join(row.index[row == 0])
            raise EmonbError(
                f"{where}: split {split!r} ({row.sum()} readable pictures) has none of {lacking}; add some or leave "
                "the class out of all splits; without any train or test (a run needs all): data import ... "
                "--allow-missing-split"
            )
    within, splits = samples.duplicated(["split", "sha256"], keep=False), samples["split"].groupby(samples["sha256"])
    problems["duplicate"] = samples.loc[within, "image_id"]
    problems["duplicate_across_splits"] = samples.loc[splits.transform("nunique") > 1, "image_id"]
    every = {kind: sorted([*problems.get(kind, ()), *release.problems.get(kind, ())]) for kind in KINDS}
    official = resource("releases.yaml").get(form, {})
    sizes = official.get("sizes")
    report = {
        "counts": counts.to_dict("index"),
        "problems": {kind: ids for kind, ids in every.items() if ids},
        "found": release.found,
        "expected": {**sizes, "about": official.get("about", False)} if sizes else {},
    }
    meta = {"labels": list(labels), "format": form, "root": str(release.root.resolve())}
    make_folder(folder)
    if source:
        write_json(folder / IMPORT_FILE, {**meta, "source": source})
    write_json(folder / "integrity.json", report)
    table = pa.Table.from_pandas(samples, preserve_index=False).replace_schema_metadata(None)  # for any reader
    parquet.write_table(table, folder / "samples.parquet", row_group_size=4096)
    return meta


def read_dataset(folder: Path, out: Path, dataset: str = "") -> dict[str, Any]:
    """As `write_table`, into `out`, for a dataset on disk: a release as it was unpacked, or an import."""
    form, source = _origin(folder)
    return write_table(read_release(form, source), out, dataset or folder.name, form, where=str(source))


def _origin(folder: Path) -> tuple[str, Path]:
    """Format and folder of a dataset's release: what was imported, or the dataset's folder itself."""
    if not (folder / IMPORT_FILE).is_file():
        return recognise(folder, folder.name), folder
    record = read_json(folder / IMPORT_FILE)
    if not isinstance(record, dict) or not {"format", "source"} <= record.keys():
        raise EmonbError(f"{folder / IMPORT_FILE}: field 'source' missing; delete that folder and import again")
    return str(record["format"]), Path(str(record["source"]))


def listing_digest(folder: Path) -> str:
    """Sixteen digits that change when a file is added, removed, renamed or written, in an import's source too."""
    lines, seen = list[str](), set[str]()
    for root in (folder, _origin(folder)[1]):
        for place, folders, files in os.walk(root, followlinks=True):
            if (real := os.path.realpath(place)) in seen:  # each folder once, so that loops end
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            for file in sorted(files):
                with suppress(OSError):  # a broken link
                    about = os.stat(os.path.join(place, file))
                    lines.append(f"{os.path.relpath(place, root)}/{file}|{about.st_size}|{about.st_mtime_ns}\n")
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def import_release(
    form: str, source: Path, out: Path, *, name: str = "", allow_missing_split: bool = False, say: Callable = print
) -> Path:
    """Import a release from a folder, which is only read, and return the dataset's folder, `out/<name>`.

    The name is by default the format's, for `folder` the source's. Without train or test only if told so: a run
    refuses such a dataset, other tools need not. `say` gets one line for each finding. Raises `EmonbError` for another
    format, a missing list, a name that is taken, a folder that cannot be written, ...
    """
    name = name or (source.resolve().name if form == "folder" else form)
    release, target, root = read_release(form, source), out / name, source.resolve()
    drawn = resource("lexicon.yaml", "datasets")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or "__" in name or name in drawn:
        raise EmonbError(
            f"--name {name!r}: use letters, digits, single _ . and -, and none of the drawn ones ({', '.join(drawn)})"
        )
    if (plain := plain_text(str(root))) != str(root):
        raise EmonbError(f"{plain}: this folder's name is not valid UTF-8; rename it")
    if out.resolve().is_relative_to(root):
        raise EmonbError(f"--out {out}: lies in the source, which is only read; choose a folder outside {root}")
    if os.path.lexists(target) and not (target / IMPORT_FILE).is_file():
        raise EmonbError(f"{target}: is there already and was not imported; choose another --name or --out")
    make_folder(out)
    write_table(release, target, name, form, where=str(source), partial=allow_missing_split, source=str(root))
    report = read_json(target / "integrity.json")
    sizes = {split: sum(counts.values()) for split, counts in report["counts"].items()}
    say(f"{name}: {sum(sizes.values())} pictures ({', '.join(f'{s} {n}' for s, n in sizes.items())})")
    about = "about " * report["expected"].get("about", False)
    for part, found in report["found"].items():
        official = report["expected"].get(part, found)
        if found != official:
            say(f"  {part}: {found:,} in the release, officially {about}{official:,}")
    for kind, ids in report["problems"].items():
        say(f"  {kind}: {len(ids)} ({'kept' if kind in KEPT else 'left out'}) {KINDS[kind]}")
    empty = " and no ".join(split for split, n in sizes.items() if not n)
    next_step = f"next: make reproduce DATASETS={name} IMAGES={shlex.quote(str(out))}"
    say(f"report: {target / 'integrity.json'}")
    say(f"no {empty}: a run needs all splits and will refuse this dataset" if empty else next_step)
    return target
