"""A tiny world for the rooms' tests: flat colours with an emotion each, an untrained VLM, small settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from emonb import answers, data, distill, features, gate, teacher, triplets, tuning, vlm
from emonb.workspace import Workspace, open_workspace

COLORS = {"joy": (220, 60, 40), "anger": (40, 190, 60), "sadness": (40, 60, 220)}


def paint(path: Path, color: tuple[int, int, int], seed: int, size: tuple[int, int] = (96, 96)) -> None:
    """A picture of one colour with some noise."""
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(color) + noise).clip(0, 255).astype("uint8")).save(path)


def three_pictures(folder: Path) -> list[Path]:
    """A square, a wide and a tall one, with different numbers of visual tokens."""
    for i, size in enumerate([(96, 96), (192, 96), (60, 200)]):
        paint(folder / f"{i}.png", (200, 90 * i, 40), seed=i, size=size)
    return sorted(folder.iterdir())


def make_tree(root: Path, sizes: dict[str, int], colors: dict = COLORS) -> Path:
    """`root/<split>/<emotion>/*.png`."""
    for s, (split, n) in enumerate(sizes.items()):
        for e, (emotion, color) in enumerate(colors.items()):
            for i in range(n):
                paint(root / split / emotion / f"{i}.png", color, seed=1000 * s + 100 * e + i)
    return root


def tiny_workspace(folder: Path, base: Path, images: Path, dataset: str, **vlm_settings: object) -> Workspace:
    """A workspace on a folder of pictures with an untrained VLM."""
    network = {"image_size": 32, "epochs": 4, "lr": 3e-3, "batch_size": 8, "optimizer": "adamw"}
    tree = {
        "datasets": [dataset],
        "seeds": [0, 1],
        "vlm": {
            "base": str(base), "dtype": "float32", "quantize_4bit": False, "cache_visual_tokens": True,
            "batch_size": 7, "epochs": 1, "lr": 1e-2, "train_batch_size": 8, "gradient_accumulation": 1,
            "gradient_checkpointing": False, "reasons": 2, "max_new_tokens": 4, **vlm_settings,
        },
        "teacher": {"networks": {"vit": {
            **network, "name": "vit_tiny_patch16_224",
            "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        }}},
        "distill": {
            "hidden": [32], "depths": [[32]], "alphas": [0.0, 0.5], "standardize": True, "epochs": 40, "lr": 3e-3,
        },
        "gate": {"epochs": 80, "lr": 3e-2, "kinds": ["concat", "cross"]},
        "report": {"bootstrap": 200},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return open_workspace(str(folder / "tiny.yaml"), images=str(images), out=str(folder / "out"))


def run_stages(ws: Workspace, dataset: str) -> dict:
    """All stages up to the gates, as the notebooks call them; returns stage -> artefact."""
    s, store = ws.settings, ws.store
    made = {"samples": data.samples_stage(s, store, dataset), "triplets": triplets.triplets_stage(s, store, dataset)}
    base = vlm.load_vlm(s.vlm)
    made["features"] = features.features_stage(s, store, dataset, base)
    made["base_predictions"] = answers.predictions_stage(s, store, dataset, base)
    made["adapter"] = tuning.adapter_stage(s, store, dataset, base)
    made["vlm_predictions"] = answers.predictions_stage(s, store, dataset, base, made["adapter"])
    made["teacher"] = teacher.teacher_stage(s, store, dataset, "vit")
    made["head"] = distill.head_stage(s, store, dataset)
    made["gate"] = gate.gate_stage(s, store, dataset)
    return made
