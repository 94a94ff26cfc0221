"""Time and peak memory of every stage as the dataset grows: the work must grow with it, the memory must not.

    python bench/growth.py --pictures 1000 4000 16000 --out build/bench/growth

Placeholder pictures in EmoSet's form (96 px, see import_scale.py), the stand-in VLM, and so few epochs that the
training says nothing: what is measured is how a stage reads, computes and writes. Every stage runs in a process of
its own; seconds and memory are those of its provenance, so that start and imports do not count as its time. Writes
`growth.json` and prints a table; the last column is the growth of the peak in bytes a picture between the two
largest sizes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from import_scale import made_up, release

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
    for stage in STAGES:
        command = [sys.executable, "-m", "emonb", "stage", stage, "--profile", str(profile)]
        subprocess.run([*command, "--images", str(images), "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
        made = provenance(out, stage)
        found[stage] = {"seconds": made["seconds"], "peak_memory_mb": made["peak_memory_mb"]}
        print(f"{n} pictures, {stage}: {made['seconds']:.1f} s, {made['peak_memory_mb']:.0f} MB", flush=True)
    shutil.rmtree(images)
    shutil.rmtree(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--out", type=Path, default=Path("build/bench/growth"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[int, dict] = {}
    for n in sorted(options.pictures):
        found[n] = measured(n, options.out)
        (options.out / "growth.json").write_text(json.dumps(found, indent=1))
    sizes = sorted(found)
    print(f"{'stage':18s}" + "".join(f"{n:>10,} s {n:>8,} MB" for n in sizes) + "   B a picture")
    for stage in STAGES:
        cells = "".join(f"{found[n][stage]['seconds']:12.1f} {found[n][stage]['peak_memory_mb']:11.0f}" for n in sizes)
        grown = ""
        if len(sizes) > 1:
            low, high = (found[n][stage]["peak_memory_mb"] for n in sizes[-2:])
            grown = f"{(high - low) * 2**20 / (sizes[-1] - sizes[-2]):14.0f}"
        print(f"{stage:18s}{cells}{grown}")


if __name__ == "__main__":
    main()
