"""A folder of small pictures and settings for tests that ask a loopback server for triplets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from emonb.data import samples_stage
from emonb.settings import Settings, load_settings
from emonb.store import Artifact, Store
from emonb.triplets import triplets_path

EMOTIONS = ("anger", "disgust", "fear", "joy", "sadness", "surprise")  # Ekman's six
KEY = "sk-test-0123456789abcdef"


def make_pictures(root: Path, train: int, dataset: str = "small") -> Path:
    """`root/<dataset>/<split>/<emotion>/*.png`: `train` training pictures of noise, each with its own bytes."""
    rng = np.random.default_rng(0)
    for split, n in {"train": train, "val": 6, "test": 6}.items():
        for i in range(n):
            path = root / dataset / split / EMOTIONS[i % 6] / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(path)
    return root


def write_profile(folder: Path, sizes: tuple[int, int, int] | None = None, **triplets: Any) -> str:
    """A profile file like `smoke` with these triplet settings (and sizes of drawn sets); returns its path."""
    tree = yaml.safe_load((Path(__file__).parent.parent / "emonb/profiles/smoke.yaml").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    if sizes:
        tree["world"] = dict.fromkeys(tree["world"], sizes)
    path = folder / "asking.yaml"
    path.write_text(yaml.safe_dump({**tree, "triplets": {"timeout_s": 2, **triplets}}))
    return str(path)


def opened(folder: Path, images: Path, dataset: str = "small", **triplets: Any) -> tuple[Settings, Artifact, Path]:
    """Settings, sample table and the triplets file of a dataset, results in `folder/out`."""
    profile = write_profile(folder, **triplets)
    settings = load_settings(profile, datasets=dataset, images=str(images), out=str(folder / "out"))
    samples = samples_stage(settings, Store(settings.out_path / "artifacts"), dataset)
    return settings, samples, triplets_path(settings, dataset)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All records of a JSON Lines file; [] if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
