"""The command line: `python -m emonb run | report | stage | data | triplets | rehearse | doctor | ...`."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from emonb.errors import EmonbError

app = typer.Typer(
    help="EmoVLM-KD reproduced in notebooks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # its traceback shows local variables, and with them the key
)
data = typer.Typer(help="Datasets on disk.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")


def _path(text: str | Path) -> Path:
    """A path as it is meant: `~` is the home also in quotes and after `=`, where no shell says so."""
    if not str(text).strip():
        raise typer.BadParameter("is blank; name a file or folder")
    return Path(os.path.expanduser(text))


def _from_root(path: str) -> str:
    """A path relative to the user's folder, relative to the project: notebooks then hold no machine path."""
    from emonb.settings import project_root

    return os.path.relpath(_path(path), project_root()) if path else ""


def _profile(profile: str) -> str:
    """A profile's name as it is, its file's path as `_from_root` gives it."""
    return _from_root(profile) if profile.endswith((".yaml", ".yml")) else profile


_WHICH = "smoke, mini, photos, paper, paper-2b, or the path of a .yaml file"
_FORMATS = "emoset, emotion6, fi, flickr, instagram, oasis, bass, folder, or list (CSV, JSONL, parquet)"
_KEEP = "stages of which an older result is taken in spite of changed code; its provenance says so"
Profile = Annotated[str, Option(callback=_profile, help=_WHICH)]
Datasets = Annotated[str, Option(help="comma-separated names; default: the profile's")]
Images = Annotated[
    str, Option(callback=_from_root, help="folder of datasets, <images>/<dataset>/...; default: the drawn world")
]
Out = Annotated[str, Option(callback=_from_root, help="results folder; default: build/<profile>")]
Results = Annotated[Path, Option(parser=_path, help="results folder, whole or partial")]
Seeds = Annotated[str, Option(help="comma-separated; default: the profile's")]
Force = Annotated[str, Option(help="comma-separated stages to recompute, or all")]
Keep = Annotated[str, Option(help=_KEEP)]
MaxCost = Annotated[float | None, Option(help="USD for a dataset, earlier runs included; default: the profile's, 25")]
Concurrency = Annotated[int | None, Option(help="requests at a time; default: the profile's")]
Price = Annotated[str, Option(help="IN,OUT: USD per million tokens of a model without a known price")]
NoPrice = Annotated[bool, Option("--no-price", help="a model without a price; no limit is kept")]


def _terms(no_price: bool, **given: Any) -> dict[str, Any]:
    """What of the settings of triplets is given: the terms on which a paid model is asked."""
    if no_price and given["price"]:
        raise EmonbError("--price, --no-price: contradict each other; leave out one of them")
    if given["model"] is not None and not given["model"].strip():
        raise EmonbError("--model: is blank; name a vision model that the server has")
    given["price"] = given["price"] or ("none" if no_price else None)
    return {name: value for name, value in given.items() if value not in (None, "")}


@app.command()
def run(
    profile: Profile = "mini",
    datasets: Datasets = "",
    images: Images = "",
    out: Out = "",
    seeds: Seeds = "",
    force: Force = "",
    keep: Keep = "",
    notebooks: Annotated[str, Option(help="comma-separated numbers, e.g. 01,02; default: all")] = "",
    review: Annotated[str, Option(callback=_from_root, help="a review of labels that the explorer saved")] = "",
    ask: Annotated[
        str, Option(metavar="MODEL", help="first ask a served vision model, which becomes a row of the tables")
    ] = "",
    ask_images: Annotated[
        int | None, Option(min=0, help="test pictures of each dataset that it is asked about, 0: all; default: 500")
    ] = None,
    max_cost: MaxCost = None,
    price: Price = "",
    no_price: NoPrice = False,
    concurrency: Concurrency = None,
) -> None:
    """Execute the notebooks that are not up to date and write the report.

    Exit code 3: the served model was asked about a part only (a limit on the cost, or useless answers).
    """
    given = locals()
    from emonb.headless import run as run_notebooks

    terms = _terms(
        model=given.pop("ask") or None, **{n: given.pop(n) for n in ("no_price", "max_cost", "price", "concurrency")}
    )
    asked = [*terms, *["ask_images"] * (ask_images is not None)]
    if asked and not ask:
        option = "no-price" if no_price else asked[0].replace("_", "-")
        raise EmonbError(f"--{option}: is about a served model; name it with --ask MODEL")
    run_notebooks(**given | {"ask_images": 500 if ask_images is None else ask_images}, ask=terms)


@app.command()
def stage(
    name: Annotated[str, Argument(help="samples, triplets, features, ... (docs/guide.md), or all")],
    profile: Profile = "mini",
    datasets: Datasets = "",
    images: Images = "",
    out: Out = "",
    seeds: Seeds = "",
    force: Force = "",
    keep: Keep = "",
) -> None:
    """One long step without a notebook; under `accelerate launch -m emonb stage ...` by several processes."""
    from emonb.run import make_with_needs, open_run

    opened = open_run(profile, datasets, out, images=images, seeds=seeds, force=force, keep=keep)
    make_with_needs(opened, name, say=typer.echo)


@app.command()
def triplets(
    dataset: Annotated[str, Option(help="name of the dataset")],
    profile: Profile = "mini",
    annotator: Annotated[str, Option(help="openai, batch or offline; default: the profile's")] = "",
    estimate: Annotated[bool, Option("--estimate", help="print tokens and price, send nothing")] = False,
    max_cost: MaxCost = None,
    price: Price = "",
    no_price: NoPrice = False,
    concurrency: Concurrency = None,
    model: Annotated[str | None, Option(help="a vision model of the server; default: the profile's")] = None,
    import_file: Annotated[str, Option("--import", help="a JSON file of the authors', or EmoVIT-style")] = "",
    patient: Annotated[bool, Option("--wait/--no-wait", help="batch: wait, or submit and fetch later")] = True,
    images: Images = "",
    out: Out = "",
) -> None:
    """Write the triplets of one dataset: by a paid model, without one, or from somebody else's file.

    Exit code 3: stopped early, at the limit on the cost or after useless answers; what was paid is kept.
    """
    from emonb import annotate
    from emonb.annotate.others import import_triplets
    from emonb.annotate.request import estimate_text
    from emonb.data import read_samples, sample_labels
    from emonb.run import Run
    from emonb.settings import load_settings
    from emonb.triplets import has_paid_answers

    if estimate and import_file:
        raise EmonbError("--estimate, --import: contradict each other; leave out one of them")
    changes = {"annotator": annotator, "max_cost": max_cost, "concurrency": concurrency, "model": model}
    changes = _terms(no_price, price=price, **changes)
    given = {"profile": profile, "datasets": dataset, "images": images, "out": out}
    settings, stopped = load_settings(**given, triplets=changes), ""
    if len(settings.datasets) != 1:
        raise EmonbError(f"--dataset {dataset!r}: name one dataset")
    dataset = settings.datasets[0]  # of two readings of Emotion6 that of the profile
    terms = settings.triplets
    if paid := terms.annotator in ("batch", "openai") and not (estimate or import_file):
        annotate.check_server(terms)
    opened = Run(settings)
    samples = opened.make("samples")[dataset].path
    path, batch = opened.out / "triplets" / f"{dataset}.jsonl", terms.annotator == "batch"
    asked = read_samples(samples), sample_labels(samples), path, terms
    if estimate:
        typer.echo(estimate_text(*asked, batch=batch))
        return
    if import_file:
        import_triplets(_path(import_file), *asked, say=typer.echo)
    elif paid:
        stopped = annotate.write_triplets(*asked, batch=batch, patient=patient, say=typer.echo)
        if not has_paid_answers(path):
            typer.echo("no triplets yet")
            raise typer.Exit(0 if annotate.open_batches(path) and not stopped else 3)
    if import_file or paid:  # what is there, without asking again
        opened = Run(load_settings(**given, triplets={"annotator": "auto"}))
    key = opened.make("triplets")[dataset].key
    typer.echo(f"triplets/{dataset}.jsonl; result: artifacts/triplets/{key}/triplets.jsonl")
    raise typer.Exit(3 if stopped else 0)


@data.command("import")
def import_data(
    form: Annotated[str, Argument(metavar="FORMAT", help=_FORMATS)],
    source: Annotated[Path, Argument(metavar="SRC", parser=_path, help="folder of the release; it is only read")],
    out: Annotated[Path, Option(parser=_path, help="folder of datasets, later IMAGES; gets <name>/")],
    name: Annotated[str, Option(help="name of the dataset; default: the format's, or the folder's")] = "",
    allow_missing_split: Annotated[
        bool, Option("--allow-missing-split", help="although train or test is missing")
    ] = False,
    map_names: Annotated[
        list[str], Option("--map", help="NAME=CLASS or NAME=SPLIT, with commas or repeated; NAME= leaves it out")
    ] = [],  # noqa: B006 (typer copies it)
    classes: Annotated[str, Option(help="an own taxonomy in its order, with commas; or in SRC/classes.txt")] = "",
    allow_missing_class: Annotated[
        bool,
        Option("--allow-missing-class", help="although a class has no picture, or val or test has none of it"),
    ] = False,
    max_unreadable: Annotated[float, Option(min=0, max=1, help="share of unreadable pictures that stops")] = 0.05,
) -> None:
    """Check a release as downloaded and write its sample table and an integrity report; no picture is copied."""
    from emonb.releases.imports import Reading, import_release
    from emonb.releases.names import own_names

    own = tuple(part for part in classes.split(",") if part.strip())
    reading = Reading(own_names(map_names), own, allow_missing_class, max_unreadable)
    import_release(
        form, source, out, name=name, reading=reading, allow_missing_split=allow_missing_split, say=typer.echo
    )


@app.command()
def rehearse(
    profile: Profile = "paper",
    model: Annotated[str, Option(help="7b, 2b, stand-in, or a folder; default: the profile's")] = "",
    dataset_size: Annotated[int, Option(min=10, help="images of Flickr, Instagram or yours")] = 10_000,
    image_side: Annotated[int, Option(min=56, help="long side of the pictures in pixels")] = 1024,
    device: Annotated[str, Option(help="auto, cpu or cuda")] = "auto",
    out: Annotated[Path, Option(parser=_path, help="folder of report.md and report.json")] = Path("build/rehearsal"),
) -> None:
    """What a run of this size would take on this machine: operations counted, speed measured; hours, memory, cost."""
    from emonb.annotate.request import estimate_table
    from emonb.rehearse import rehearse as project

    def price(settings, picture, images, labels):
        total = estimate_table(settings, [picture], images, labels, batch=False).iloc[-1]
        return {case: float(total[f"usd_{case}"]) for case in ("low", "high", "worst")}

    options = {"model": model, "dataset_size": dataset_size, "image_side": image_side, "device": device, "out": out}
    typer.echo(project(profile, **options, price=price))


@app.command()
def report(out: Results = Path("build/mini")) -> None:
    """Write the report of a results folder again: index.html, and the executed notebooks as pages."""
    from emonb.show.report import write_report

    if not out.is_dir():
        raise EmonbError(f"{out}: no such results folder; make one with: python -m emonb run")
    for line in write_report(out):
        typer.echo(line)
    typer.echo(str(out / "index.html"))


@app.command()
def compare(runs: Annotated[list[Path], Argument(parser=_path, help="two or more results folders")]) -> None:
    """What differs between two runs, and where it begins; of more, how often each verdict comes out.

    Exit code 0: nothing differs, 1: something does, 2: an error.
    """
    from emonb.show import compare as comparing

    try:
        if len(runs) < 2:
            raise EmonbError("compare: give two results folders, or more")
        if len(runs) == 2:
            found = comparing.compare(*runs)
            text, same = str(found), found.same
        else:
            counts = comparing.verdict_counts(runs)
            text, same = counts.to_string(), (counts == len(runs)).any(axis=1).all()
    except (EmonbError, OSError) as error:
        _say(error)
        raise typer.Exit(2) from None
    typer.echo(text)
    raise typer.Exit(0 if same else 1)


@app.command()
def doctor(out: Results = Path("build")) -> None:
    """Check this environment: [OK] or [FAIL] with the remedy, line by line."""
    import psutil

    from emonb.files import make_folder
    from emonb.machine import LOCK, lock_state

    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.eye(4)[:1], torch.ones(1), 0.5)  # fails when the two were built for different ones
        fit, versions = True, f"{torch.__version__}, {torchvision.__version__}"
    except Exception as error:  # whatever is broken here is the finding
        fit, versions = False, f"{type(error).__name__}: {error}"
    lock = lock_state()
    differs = "; ".join(f"{name}: {both}" for name, both in lock["differs"].items())
    known = "as locked" if lock["locked"] else f"no {LOCK} here to compare with"
    memory, disk = psutil.virtual_memory().available / 2**30, shutil.disk_usage(make_folder(out)).free / 2**30
    findings = {
        "torch and torchvision agree": (fit, f"{versions}; Python {sys.version.split()[0]}"),
        "libraries": (True, f"not as in {LOCK} (installed, locked): {differs}" if differs else known),
        "free memory": (memory >= 5, f"{memory:.1f} GB; 5 are needed: close other programs"),
        "free disk": (disk >= 2, f"{disk:.1f} GB; 2 are needed: choose another --out"),
    }
    for what, (fine, finding) in findings.items():
        typer.echo(f"[{'OK' if fine else 'FAIL'}] {what}: {finding}")
    raise typer.Exit(not all(fine for fine, _ in findings.values()))


@app.command()
def predict(
    image: Annotated[list[Path], Argument(parser=_path, help="pictures, or folders of them; -x.png after --")],
    model: Annotated[Path | None, Option(parser=_path, help="a saved model; default: the first of build/mini")] = None,
    as_json: Annotated[bool, Option("--json", help="print one JSON list, an entry a picture")] = False,
    reasons: Annotated[bool, Option("--reasons", help="ask the VLM what it sees and why, too")] = False,
) -> None:
    """The emotion of any picture, and what each part of the model says.

    Pictures that cannot be answered are named on standard error, the others are answered, and the exit code is 1.
    """
    from emonb.show.predict import predict as answer

    if answer(image, model, as_json=as_json, reasons=reasons):
        raise typer.Exit(1)


@app.command()
def notebooks(out: Results = Path("build/mini")) -> None:
    """Copy the executed notebooks back into notebooks/, clean, and the headline figures into the README."""
    from emonb.files import results_folder
    from emonb.settings import project_root
    from emonb.show.notebooks import copy_back, refresh_readme

    for path in copy_back(results_folder(out)):
        typer.echo(str(path))
    refresh_readme(out, project_root() / "README.md")


# What the user can do about an error of the system that is no fault of ours.
_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "set OUT (--out) to a folder that you may write to"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room or set OUT (--out); finished results are kept"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files: ulimit -n 4096"),
    errno.EIO: "the disk fails; set OUT (--out) to another one",
    errno.ENOENT: "correct the path, or change to a folder that is still there",
}


def _say(error: EmonbError | OSError) -> None:
    """Tell of a user's mistake, or of what the system refuses, in a line; raise again what is neither."""
    if isinstance(error, OSError):
        if not error.filename and error.errno not in _REMEDIES:
            raise error
        where, remedy = error.filename or "a file", _REMEDIES.get(error.errno, "name another file or folder")
        error = EmonbError(f"{where}: cannot be read or written ({error.strerror or error}); {remedy}")
    print(f"emonb: {error}", file=sys.stderr)


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 1 (3: stopped early), never a traceback."""
    from emonb.machine import settle

    try:
        settle()
        app()
    except (EmonbError, OSError) as error:
        _say(error)
        sys.exit(getattr(error, "exit_code", 1))
    except SystemExit as end:
        if end.code == 130:  # what typer makes of Ctrl-C
            print("emonb: stopped; the next run goes on from the finished results", file=sys.stderr)
        raise
