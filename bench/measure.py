"""What the measurements of this folder share: a small drawn dataset, the stand-in, a clock, and one JSON file each."""

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

from emonb.data import samples_stage
from emonb.features import features_stage
from emonb.files import git_state, library_versions, make_folder, write_json
from emonb.machine import keep_freed_memory, machine, peak_memory
from emonb.settings import Settings, load_settings
from emonb.store import Store
from emonb.triplets import triplets_stage
from emonb.tuning import adapted, adapter_stage
from emonb.vlm import VLM, load_vlm

DATASET = "mini-fi"  # drawn: eight emotions


def small_run(out: Path) -> tuple[Settings, Store]:
    """The mini profile on one drawn dataset, tuned for one epoch: what every measurement starts from.

    Made once below `out` and found there by the next measurement.
    """
    keep_freed_memory()  # as every run
    base = yaml.safe_load((resources.files("emonb") / "profiles" / "mini.yaml").read_text(encoding="utf-8"))
    base |= {"datasets": [DATASET], "vlm": {**base["vlm"], "epochs": 1, "reasons": 0}}
    folder = out / "run"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    settings = load_settings(str(folder / "profile.yaml"), out=str(folder))
    store = Store(settings.out_path / "artifacts")
    samples_stage(settings, store, DATASET)
    triplets_stage(settings, store, DATASET)
    vlm = load_vlm(settings.vlm)
    features_stage(settings, store, DATASET, vlm)
    adapter_stage(settings, store, DATASET, vlm)
    return settings, store


@contextmanager
def tuned(settings: Settings, store: Store) -> Iterator[VLM]:
    """The stand-in under its LoRA adapter."""
    with adapted(load_vlm(settings.vlm), store.find("adapter", DATASET)) as vlm:
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


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's text and knows `--out`, the folder of the results."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    return parser


def save(out: Path, name: str, found: Mapping[str, Any], seconds: float) -> Path:
    """Write `<name>.json`: what was found, and on what it was measured."""
    path = make_folder(out) / f"{name}.json"
    written = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "load_average": os.getloadavg()[0],  # above the number of threads in use: another job ran, do not trust it
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "git": git_state(),
        "measurement_seconds": round(seconds, 1),
    }
    write_json(path, {**found, **written})
    return path
