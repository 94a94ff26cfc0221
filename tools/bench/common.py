"""What the measurements share: a small drawn dataset, the stand-in, a clock, and one JSON file each."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from emonb.files import make_folder, write_json
from emonb.machine import git_state, library_versions, machine, peak_memory
from emonb.run import Run, open_run
from emonb.tuning import adapted
from emonb.vlm import VLM

DATASET = "mini-fi"  # drawn: eight emotions


def arguments(doc: str | None, run: bool = True) -> argparse.ArgumentParser:
    """A parser that shows the part's text and knows `--out`; with `--drawn` where it measures the small run."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of the results")
    if run:
        sizes = {"type": int, "nargs": 3, "default": (1040, 200, 600), "metavar": ("TRAIN", "VAL", "TEST")}
        parser.add_argument("--drawn", **sizes, help="pictures drawn for the small run that all parts share")
    return parser


def small_run(options: argparse.Namespace, force: str = "") -> Run:
    """The mini profile on one drawn dataset, tuned for one epoch: made once below `out`, found by the next part.

    Args:
        force: stages to make anew.
    """
    tree = yaml.safe_load(resources.files("emonb").joinpath("profiles", "mini.yaml").read_text(encoding="utf-8"))
    tree |= {"datasets": [DATASET], "side_by_side": False, "world": {"mikels8": list(options.drawn)}}
    tree["vlm"] |= {"epochs": 1, "reasons": 0}
    profile = make_folder(options.out.resolve()) / "profile.yaml"
    profile.write_text(yaml.safe_dump(tree), encoding="utf-8")
    run = open_run(str(profile), out=str(profile.with_name("run")), force=force)
    for stage in ("samples", "triplets", "features", "adapter"):
        run.make(stage)
    return run


@contextmanager
def tuned(run: Run) -> Iterator[VLM]:
    """The stand-in under its LoRA adapter."""
    with adapted(run.vlm, run.find("adapter", DATASET).path) as vlm:
        yield vlm


@contextmanager
def clock() -> Iterator[dict[str, float]]:
    """`seconds` and `peak_memory_mb` of the block, in the yielded dictionary when it ends."""
    found: dict[str, float] = {}
    with peak_memory() as peak:
        start = time.perf_counter()
        yield found
        found["seconds"] = time.perf_counter() - start
    found["peak_memory_mb"] = peak[0]


def save(out: Path, name: str, found: Mapping[str, Any]) -> None:
    """Write `<name>.json`: what was found, and on what it was measured."""
    written = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "load_average": os.getloadavg()[0],  # above the number of threads in use: another job ran, do not trust it
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "git": git_state(),
    }
    path = make_folder(out) / f"{name}.json"
    write_json(path, {**found, **written})
    print(path)
