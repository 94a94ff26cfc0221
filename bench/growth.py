"""Time and peak memory of every stage as the dataset grows: the work must grow with it, the memory must not.

    python bench/growth.py --pictures 1000 4000 16000

Placeholder pictures in EmoSet's form (96 px, see import_scale.py), the stand-in VLM, and so few epochs that the
training says nothing: what is measured is how a stage reads, computes and writes. Every stage runs in a process of
its own, forked after the libraries are imported; seconds and memory are those of its provenance, so that start and
imports do not count as its time. Writes `growth.json` and prints a table. Each stage's time is set against a straight
line: `time_exponent` is the slope of log seconds over log pictures between the two largest sizes (1 = linear), and
`bytes_per_picture` the growth of the peak memory between them.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import yaml
from import_scale import made_up, release
from measure import arguments, save

from emonb import answers, data, distill, gate, teacher, triplets  # noqa: F401 - imported once, before the forks
from emonb.stages import run_stage
from emonb.workspace import open_workspace

STAGES = (
    "samples", "triplets", "features", "base_predictions", "adapter", "vlm_predictions", "teacher", "head", "gate",
)  # fmt: skip
NETWORK = {
    "name": "vit_tiny_patch16_224", "image_size": 32, "epochs": 1, "batch_size": 64, "lr": 1.0e-3,
    "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
}  # fmt: skip
PROFILE = {
    "datasets": ["emoset"],
    "seeds": [0, 1, 2],
    "vlm": {
        "base": "stand-in", "dtype": "float32", "quantize_4bit": False, "cache_visual_tokens": False, "batch_size": 64,
        "train_batch_size": 32, "gradient_accumulation": 1, "gradient_checkpointing": False, "lora_dropout": 0,
        "reasons": 8, "max_new_tokens": 8,
    },
    "teacher": {"networks": {"vit": NETWORK}},
    "distill": {"epochs": 1, "batch_size": 256, "depths": [[1024]], "alphas": [0.0, 0.5]},
    "gate": {"epochs": 1, "batch_size": 256, "kinds": ["concat", "cross"]},
}  # fmt: skip
STEPS = 40  # LoRA steps at every size


FORK = multiprocessing.get_context("fork")  # the parent computes nothing, so that no thread is lost in the fork


def stage(name: str, profile: Path, images: Path, out: Path) -> None:
    """One stage, in a process of its own."""
    os.environ["EMONB_HEADLESS"] = "1"
    run_stage(name, open_workspace(str(profile), images=str(images), out=str(out)), say=str)


def provenance(out: Path, stage: str) -> dict:
    file = max((out / "artifacts" / stage).glob("[0-9a-f]*/provenance.json"), key=lambda f: f.stat().st_mtime)
    return json.loads(file.read_text())


def measured(n: int, work: Path) -> dict[str, dict[str, float]]:
    """Seconds and peak MB of every stage at n pictures."""
    images, out = work / f"images-{n}", work / f"out-{n}"
    shutil.rmtree(out, ignore_errors=True)
    lists = made_up(n)
    release(images / "emoset", lists)
    train = len(lists["train"])
    epochs = STEPS * PROFILE["vlm"]["train_batch_size"] / (3 * train)
    profile = work / f"growth-{n}.yaml"
    profile.write_text(yaml.safe_dump({**PROFILE, "vlm": {**PROFILE["vlm"], "epochs": epochs}}))
    found = {}
    for name in STAGES:
        process = FORK.Process(target=stage, args=(name, profile, images, out))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"stage {name} at {n} pictures ended with {process.exitcode}")
        made = provenance(out, name)
        found[name] = {"seconds": made["seconds"], "peak_memory_mb": made["peak_memory_mb"]}
        print(f"{n} pictures, {name}: {made['seconds']:.1f} s, {made['peak_memory_mb']:.0f} MB", flush=True)
    shutil.rmtree(images)
    shutil.rmtree(out)
    return found


def grown(found: dict[int, dict]) -> dict[str, dict[str, float]]:
    """Per stage, between the two largest sizes: how time and memory grow."""
    if len(found) < 2:
        return {}
    small, large = sorted(found)[-2:]
    rows = {}
    for name in STAGES:
        low, high = found[small][name], found[large][name]
        rows[name] = {
            "time_exponent": math.log(high["seconds"] / low["seconds"]) / math.log(large / small),
            "bytes_per_picture": (high["peak_memory_mb"] - low["peak_memory_mb"]) * 2**20 / (large - small),
        }
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1000, 4000, 16000])
    options = parser.parse_args()
    start, work = time.monotonic(), options.out / "growth"
    work.mkdir(parents=True, exist_ok=True)
    found: dict[int, dict] = {}
    for n in sorted(options.pictures):
        found[n] = measured(n, work)
        result: dict[str, Any] = {"lora_steps": STEPS, "sizes": {str(k): v for k, v in found.items()}}
        save(options.out, "growth", {**result, "growth": grown(found)}, time.monotonic() - start)
    sizes, rows = sorted(found), grown(found)
    print(f"{'stage':18s}" + "".join(f"{n:>10,} s {n:>8,} MB" for n in sizes) + "   exponent   B a picture")
    for name in STAGES:
        cells = "".join(f"{found[n][name]['seconds']:12.1f} {found[n][name]['peak_memory_mb']:11.0f}" for n in sizes)
        end = f"{rows[name]['time_exponent']:11.2f} {rows[name]['bytes_per_picture']:13.0f}" if rows else ""
        print(f"{name:18s}{cells}{end}")


if __name__ == "__main__":
    main()
