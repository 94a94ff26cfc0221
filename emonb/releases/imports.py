"""From a release to a checked table; `python -m emonb data import` makes it a dataset that a run can use.

`OUT/<name>/` gets the sample table, the integrity report and `import.json`, which records where the pictures are:
they are neither copied nor linked, so that a read-only source and a file system without links serve too. A run reads
the release itself, as it is then.
"""

from __future__ import annotations

import hashlib
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
import pyarrow as pa
from pyarrow import parquet
from pydantic import Field, TypeAdapter, ValidationError

from emonb.data import inspected, taxonomy_for_dataset, with_splits
from emonb.errors import EmonbError, visible
from emonb.files import make_folder, read_json, refuse_foreign, resource, write_json
from emonb.releases import READERS, Release, plain_text, read_release, recognise
from emonb.releases.lists import walk
from emonb.releases.names import clean, own_classes, read_classes
from emonb.settings import SPLITS, check_dataset_name

IMPORT_FILE = "import.json"
LEFT_OUT = {
    "damaged": "the file is empty, ends before the picture does, or its data are broken: copy or download it again",
    "not_a_picture": "named like a picture, the content is none (of JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF)",
    "decompression_bomb": "more than 89 million pixels: it would fill the memory",
    "no_access": "the file cannot be opened: no permission, no regular file, or over 1 GB",
    "broken_link": "a link that leads nowhere",
    "unused_file": "is no picture of an emotion by its ending and folder, or its name is not valid UTF-8",
    "leftover": "made by macOS, Windows, a NAS, git or Jupyter: passed over",
    "left_out_as_told": "--map says so",
    "no_label": "the list gives it no label or no split",
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
    "strip": "over 100 times as long as wide: white is added, for no model takes it as it is",
}
KINDS = LEFT_OUT | KEPT  # of problems, in the order of a report
UNREADABLE = ("damaged", "not_a_picture", "decompression_bomb", "no_access")  # more of them is a failing disk or copy


class Reading(NamedTuple):
    """How a user wants a source to be read; an import records it, so that runs read it the same way."""

    names: Mapping[str, str] = {}  # cleaned name of a class or split -> what it stands for, "": out
    classes: Sequence[str] = ()  # an own taxonomy in its order
    allow_missing_class: bool = False  # those without any picture are no classes here; val and test may lack some
    max_unreadable: Annotated[float, Field(ge=0, le=1)] = 0.05  # share of the pictures that are there; ours


def write_table(
    release: Release,
    folder: Path,
    dataset: str,
    form: str,
    *,
    where: str,
    reading: Reading = Reading(),  # noqa: B008 (it cannot be changed)
    partial: bool = False,
    source: str = "",
) -> dict[str, Any]:
    """Check every picture of a release, then write `integrity.json` and `samples.parquet`, or nothing.

    Labels that neither `reading` nor the format (or "drawn") fixes follow from the dataset's name, or from the labels
    found. `where` names the source in messages, `partial` allows a split to be missing as a whole; an import notes its
    `source`. Returns `labels` (class order), `format`, and the folder `root` of paths. Raises `EmonbError` for a label
    outside the taxonomy, too many unreadable pictures, no usable one, or a class or split missing.
    """
    taxonomy, problems, notes = taxonomy_for_dataset(dataset), dict(release.problems), [*release.notes]
    own = own_classes(reading.classes, where) if reading.classes else None
    fixed = own or release.labels or (taxonomy and taxonomy.labels)
    if release.frame.empty:
        gone = ", ".join(map(visible, problems.get("listed_but_missing", ())[:3]))
        why = f"no readable picture; put them where the release has them (not there: {gone}, ...)"
        raise EmonbError(f"{where}: {why if gone else 'no row has a picture and a label; complete the list'}")
    frame = release.frame
    if dataset == "emotion6-majority" and "label_majority" in frame:
        frame = frame.assign(label=frame["label_majority"])
    read, labels = read_classes({*frame["label"]}, fixed, reading.names, where)
    if renamed := [f"{name} as {label}" for name, label in read.items() if label and label != clean(name)]:
        notes.append(f"classes are read so: {', '.join(renamed)}")
    frame = frame.assign(label=frame["label"].map(read))
    out = frame.loc[frame["label"] == "", "image_id"]
    problems["left_out_as_told"] = [*problems.get("left_out_as_told", ()), *out]
    samples, seen = inspected(frame[frame["label"] != ""], release.root, f"pictures of {dataset}")
    problems |= seen
    _check_readable(problems, len(frame) - len(out) - len(seen.get("broken_link", ())), reading.max_unreadable, where)
    if form == "fi":  # copies that are no accident: five and more in a web-crawled set (ours), or two labels
        groups = samples["label"].groupby(samples["sha256"])
        copies = (groups.transform("size") >= 5) | (groups.transform("nunique") > 1)
        problems["placeholder"], samples = samples.loc[copies, "image_id"], samples[~copies].reset_index(drop=True)
    if samples.empty:
        raise EmonbError(f"{where}: no readable picture that is not left out; see to the files, or to --map")
    if missing := [label for label in labels if label not in {*samples["label"]}]:
        if not reading.allow_missing_class:
            raise EmonbError(
                f"{where}: no picture of {', '.join(missing)} in any split; add some, or import it with "
                "--allow-missing-class, or with the classes that there are: --classes a,b,c"
            )
        labels = [label for label in labels if label not in missing]
        notes.append(f"without {', '.join(missing)}: not comparable with results of all classes")
    if "val" in {*release.found, *frame.get("split", ())} and not (samples["split"] == "val").any():
        remedy = "see to these files; only if val is to be made from train, leave it out: --map NAME="
        raise EmonbError(f"{where}: split 'val' (0 readable pictures) has none of those it should have; {remedy}")
    samples = with_splits(samples, where).drop(columns="group", errors="ignore")
    counts = pd.crosstab(samples["split"], samples["label"]).reindex(index=SPLITS, columns=labels, fill_value=0)
    for split, row in counts.iterrows():
        lacking = ", ".join(row.index[row == 0])
        if lacking and row.any() and split != "train" and reading.allow_missing_class:
            notes.append(f"{split} has none of {lacking}: it says nothing of them")
        elif lacking and (row.any() or not partial):
            raise EmonbError(
                f"{where}: split {split!r} ({row.sum()} readable pictures) has none of {lacking}; add some, leave "
                "the class out of all splits (--map NAME=) or, of val and test, import it with --allow-missing-class; "
                "without any train or test (a run needs all): data import ... --allow-missing-split"
            )
    within, splits = samples.duplicated(["split", "sha256"], keep=False), samples["split"].groupby(samples["sha256"])
    problems["duplicate"] = samples.loc[within, "image_id"]
    problems["duplicate_across_splits"] = samples.loc[splits.transform("nunique") > 1, "image_id"]
    there = {*samples["image_id"]}
    problems = {kind: [i for i in ids if kind not in KEPT or i in there] for kind, ids in problems.items()}
    official = resource("releases.yaml").get(form, {})
    sizes = official.get("sizes")
    report = {
        "counts": counts.to_dict("index"),
        "problems": {kind: sorted(ids) for kind in KINDS if (ids := problems.get(kind))},
        "found": release.found,
        "expected": {**sizes, "about": official.get("about", False)} if sizes else {},
        "notes": notes,
    }
    meta = {"labels": list(labels), "format": form, "root": str(release.root.resolve())}
    make_folder(folder)
    if source:
        write_json(folder / IMPORT_FILE, {**meta, "source": source, "reading": reading._asdict()})
    write_json(folder / "integrity.json", report)
    table = pa.Table.from_pandas(samples, preserve_index=False).replace_schema_metadata(None)  # for any reader
    parquet.write_table(table, folder / "samples.parquet", row_group_size=4096)
    return meta


def _check_readable(problems: Mapping[str, Sequence[str]], there: int, most: float, where: str) -> None:
    """Raise `EmonbError` if a greater share than `most` of the pictures that are there cannot be read."""
    bad = {kind: problems[kind] for kind in UNREADABLE if kind in problems}
    count = sum(map(len, bad.values()))
    if count > most * there:
        kinds = "; ".join(f"{kind} {len(ids)}, such as {ids[0]}" for kind, ids in bad.items())
        raise EmonbError(
            f"{where}: {count} of {there} pictures ({count / there:.0%}) cannot be read, more than {most:.0%} "
            f"({kinds}); mend them, or import it with --max-unreadable {min(1, math.ceil(100 * count / there) / 100)}"
        )


def read_dataset(folder: Path, out: Path, dataset: str = "", classes: Sequence[str] = ()) -> dict[str, Any]:
    """As `write_table`, into `out`, for a dataset on disk: a release as it was unpacked, or an import.

    `dataset` is by default the folder's name; `classes` are an own taxonomy, instead of the import's.
    """
    form, source, reading = _origin(folder)
    reading = reading._replace(classes=classes or reading.classes)
    release = read_release(form, source, reading.names)
    return write_table(release, out, dataset or folder.name, form, where=str(source), reading=reading)


def _origin(folder: Path) -> tuple[str, Path, Reading]:
    """Format and folder of a dataset's release, and how it is read: what was imported, or the dataset's own folder."""
    file, remedy = folder / IMPORT_FILE, "delete that folder and import again"
    if not file.is_file():
        return recognise(folder, folder.name), folder, Reading()
    record = read_json(file, remedy)
    for name in ("source", "format"):
        if not isinstance(record, dict) or not isinstance(record.get(name), str):
            raise EmonbError(f"{file}: field {name!r} missing or no text; {remedy}")
    if record["format"] not in READERS:
        raise EmonbError(f"{file}: field 'format' is {record['format']!r}, none of {', '.join(READERS)}; {remedy}")
    try:
        reading = TypeAdapter(Reading).validate_python(record.get("reading", {}))
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']} (found {first['input']!r:.60})"
        raise EmonbError(f"{file}: field 'reading': {why}; {remedy}") from None
    if not os.path.exists(source := Path(record["source"])):
        raise EmonbError(f"{file}: its source {source}: no such folder; move it back, or {remedy}")
    return record["format"], source, reading


def listing_digest(folder: Path) -> str:
    """Sixteen digits that change when a file is added, removed, renamed or written, in an import's source too."""
    lines, source = list[str](), _origin(folder)[1]
    for root in dict.fromkeys([folder, source.parent if source.is_file() else source]):
        for place, _, files in walk(root):
            for file in files:
                with suppress(OSError):  # a broken link
                    about = os.stat(os.path.join(place, file))
                    lines.append(f"{os.path.relpath(place, root)}/{file}|{about.st_size}|{about.st_mtime_ns}\n")
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def import_release(
    form: str,
    source: Path,
    out: Path,
    *,
    name: str = "",
    reading: Reading = Reading(),  # noqa: B008 (it cannot be changed)
    allow_missing_split: bool = False,
    say: Callable = print,
) -> Path:
    """Import a release from a folder, which is only read, and return the dataset's folder, `out/<name>`.

    The name is by default the format's, for `folder` and `list` the source's. Without train or test only if told so: a
    run refuses such a dataset, other tools need not. `say` gets one line for each finding. Raises `EmonbError` for
    another format, a missing list, a name that is taken, a folder that cannot be written, ...
    """
    root, drawn = Path(os.path.realpath(source)), resource("lexicon.yaml", "datasets")
    name = name or ((root.stem if root.is_file() else root.name) if form in ("folder", "list") else form)
    target = out / name
    if (plain := plain_text(str(root))) != str(root):
        raise EmonbError(f"{plain}: this folder's name is not valid UTF-8; rename it")
    try:
        check_dataset_name(name)
    except ValueError as error:
        raise EmonbError(f"--name {name!r}: {error}") from None
    if name in drawn:
        raise EmonbError(f"--name {name!r}: choose none of the drawn ones ({', '.join(drawn)})")
    if Path(os.path.realpath(out)).is_relative_to(root):
        raise EmonbError(f"--out {out}: lies in the source, which is only read; choose a folder outside {root}")
    refuse_foreign(target, "--name or --out")
    release, where = read_release(form, source, reading.names), {"where": str(source), "source": str(root)}
    make_folder(out)
    write_table(release, target, name, form, reading=reading, partial=allow_missing_split, **where)
    report = read_json(target / "integrity.json")
    sizes = {split: sum(counts.values()) for split, counts in report["counts"].items()}
    say(f"{name}: {sum(sizes.values())} pictures ({', '.join(f'{s} {n}' for s, n in sizes.items())})")
    about = "about " * report["expected"].get("about", False)
    for part, found in report["found"].items():
        official = report["expected"].get(part, found)
        if found != official:
            say(f"  {part}: {found:,} in the release, officially {about}{official:,}")
    for note in report["notes"]:
        say(f"  {visible(note)}")
    for kind, ids in report["problems"].items():
        say(f"  {kind}: {len(ids)} ({'kept' if kind in KEPT else 'left out'}) {KINDS[kind]}")
    if left := report["found"]["total"] - sum(sizes.values()):
        say(f"  left out: {left} of {report['found']['total']} pictures ({left / report['found']['total']:.1%})")
    empty = " and no ".join(split for split, n in sizes.items() if not n)
    next_step = f"next: make reproduce {shlex.quote(f'DATASETS={name}')} IMAGES={shlex.quote(str(out))}"
    say(f"report: {target / 'integrity.json'}")
    say(f"no {empty}: a run needs all splits and will refuse this dataset" if empty else next_step)
    return target
