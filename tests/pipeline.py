"""The tiny run that all tests share: flat colours with a mood each, an untrained VLM, every stage in seconds."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from emonb import tuning
from emonb.run import Run, open_run
from emonb.store import STAGES, Artifact

DATASET = "moods"
JOB = {"teacher": (DATASET, "vit")}  # what a stage is done for, if not for the dataset
# The taxonomy's order is positive, negative: that of the folders would exchange the two.
MOODS = {"negative": (40, 60, 220), "positive": (220, 60, 40)}


def paint(path: Path, color: tuple[int, int, int], seed: int, size: tuple[int, int] = (96, 96)) -> Path:
    """A picture of one colour with some noise."""
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(color) + noise).clip(0, 255).astype("uint8")).save(path)
    return path


def make_tree(root: Path, sizes: dict[str, int]) -> Path:
    """`root/<split>/<mood>/*.png`, so many of each."""
    for s, (split, n) in enumerate(sizes.items()):
        for m, (mood, color) in enumerate(MOODS.items()):
            for i in range(n):
                paint(root / split / mood / f"{i}.png", color, seed=1000 * s + 100 * m + i)
    return root


def tiny_profile(file: Path, base: Path | str, **vlm: object) -> Path:
    """A profile under which every stage takes seconds; `vlm` changes settings of that section."""
    options = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    vit = {"name": "vit_tiny_patch16_224", "image_size": 32, "kwargs": options, "epochs": 4, "lr": 3e-3}
    tree = {
        "datasets": [DATASET],
        "seeds": [0],
        "repeats": 2,
        "vlm": {
            "base": str(base), "dtype": "float32", "quantize_4bit": False, "cache_visual_tokens": True,
            "batch_size": 7, "lora_dropout": 0, "epochs": 1, "lr": 1e-3, "train_batch_size": 8,
            "gradient_accumulation": 2, "gradient_checkpointing": False, "reasons": 2, "max_new_tokens": 4, **vlm,
        },
        "teacher": {"networks": {"vit": {**vit, "batch_size": 8, "optimizer": "adamw"}}},
        "distill": {
            "hidden": [32], "depths": [[32], [32, 16]], "alphas": [0.0], "standardize": True, "epochs": 30, "lr": 3e-3,
            "lengths": [0.5],
        },
        "gate": {"epochs": 80, "lr": 3e-2, "kinds": ["concat", "cross"]},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(tree))
    return file


@dataclass(frozen=True)
class Tiny:
    """A finished tiny run."""

    run: Run
    profile: Path
    images: Path

    def artifact(self, stage: str, run: Run | None = None) -> Artifact:
        """The result of a stage, of this run or of another one of its settings."""
        return (run or self.run).find(stage, *JOB.get(stage, (DATASET,)))

    def open(self, out: Path, *, profile: Path | None = None, force: str = "") -> Run:
        """A run of the same pictures in another folder."""
        return open_run(str(profile or self.profile), images=str(self.images), out=str(out), force=force)

    def again(self, out: Path, without: Sequence[str]) -> Run:
        """The same run in another folder, with a copy of all results but those of some stages."""
        for folder in (self.run.out / "artifacts").iterdir():
            if folder.is_dir() and folder.name not in without:
                shutil.copytree(folder, out / "artifacts" / folder.name)
        return self.open(out)


def make_tiny(folder: Path, base: Path) -> Tiny:
    """The tiny run, on one thread."""
    make_tree(folder / "images" / DATASET, {"train": 16, "val": 6, "test": 8})
    profile, threads = tiny_profile(folder / "tiny.yaml", base), torch.get_num_threads()
    run = open_run(str(profile), images=str(folder / "images"), out=str(folder / "out"))
    torch.set_num_threads(1)
    for stage in STAGES:
        run.make(stage)
    torch.set_num_threads(threads)
    return Tiny(run, profile, folder / "images")


def make_and_die(profile: str, images: str, out: str, stage: str, step: int) -> None:
    """In a process of its own: make a stage and end by kill -9 in optimiser step `step`; 0: once a file is there."""
    recipe, plain, steps, tuning.SAVE_EVERY = STAGES[stage].recipe, torch.optim.AdamW.step, [], 2
    torch.set_num_threads(1)

    def counted(*arguments, **options):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments, **options)

    def watch(*folders: Path) -> None:
        while not any(file.is_file() for folder in folders for file in folder.rglob("*")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    def mortal(*arguments, **needs):
        made = recipe(*arguments, **needs)

        def build(*folders: Path) -> None:
            if not step:
                threading.Thread(target=watch, args=folders, daemon=True).start()
            made.build(*folders)
            time.sleep(5)

        return made._replace(build=build)

    torch.optim.AdamW.step = counted
    STAGES[stage] = STAGES[stage]._replace(recipe=mortal)
    open_run(profile, images=images, out=out).make(stage)
