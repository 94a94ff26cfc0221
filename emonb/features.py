"""Room 03: one pass over the pictures. Visual features of the frozen vision tower, as a stage.

The authors' schedule runs the vision tower in every epoch of the distillation and asks the VLM again in
every epoch of the gate; here each image is seen once, and all that follows works on what is stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emonb.progress import progress
from emonb.samples import read_samples
from emonb.settings import SPLITS, Settings, VLMSettings
from emonb.store import Artifact, Store, read_json, write_json
from emonb.vlm import VLM, VisualTokens, visual_tokens

__all__ = ["VisualSource", "base_params", "features_stage", "load_features"]


def base_params(settings: VLMSettings) -> dict[str, Any]:
    """What features and answers depend on: the base VLM, its precision and what it is shown."""
    params = settings.model_dump(include={"base", "dtype", "quantize_4bit", "max_side", "cache_visual_tokens"})
    provenance = Path(settings.checkpoint) / "provenance.json"  # checkpoints made here have one
    return {**params, "provenance": read_json(provenance) if provenance.is_file() else None}


def features_stage(settings: Settings, store: Store, dataset: str, vlm: VLM) -> Artifact:
    """Pooled (and, if asked for, token-level) visual features of all images (stage `features`).

    Files per split: `<split>.safetensors` with `pooled` (N, D) float16, `grid` (N, 3) and, with
    `vlm.cache_visual_tokens`, `tokens` (sum of n_i, D) float16; `ids.json` with the image ids in order.
    """
    samples = store.find("samples", dataset)
    config = settings.vlm

    def build(folder: Path) -> None:
        frame, ids = read_samples(samples), {}
        for split in SPLITS:
            part = frame[frame["split"] == split]
            ids[split] = part["image_id"].tolist()
            batches = range(0, len(part), config.batch_size)
            pooled, tokens, grids = [], [], []
            for i in progress(batches, f"visual tokens of {dataset}, {split}"):
                visual = visual_tokens(vlm, part["path"].iloc[i : i + config.batch_size].tolist())
                pooled.append(visual.pooled().half().cpu())
                grids.append(visual.grid)
                if config.cache_visual_tokens:
                    tokens += [t.cpu() for t in visual.tokens]
            arrays = {"pooled": torch.cat(pooled), "grid": torch.cat(grids)}
            if tokens:
                arrays["tokens"] = torch.cat(tokens)
            save_file(arrays, folder / f"{split}.safetensors")
        write_json(folder / "ids.json", ids)

    params = {**base_params(config), "batch_size": config.batch_size}
    return store.get("features", dataset, build, params=params, inputs=[samples], code=["emonb.vlm", "emonb.features"])


def load_features(artifact: Artifact, split: str) -> tuple[list[str], torch.Tensor]:
    """Image ids and their pooled features, (N, D) float32."""
    with safe_open(artifact.path / f"{split}.safetensors", framework="pt") as file:
        pooled = file.get_tensor("pooled").float()
    return read_json(artifact.path / "ids.json")[split], pooled


class VisualSource:
    """Visual tokens of a split by image id: from the cache, or from the picture when there is none."""

    def __init__(self, vlm: VLM, features: Artifact, samples: Artifact, split: str):
        self.vlm = vlm
        frame = read_samples(samples, split)
        self.paths = dict(zip(frame["image_id"], frame["path"], strict=True))
        self.ids = read_json(features.path / "ids.json")[split]
        arrays = load_file(features.path / f"{split}.safetensors")
        self.grid, self.tokens = arrays["grid"], arrays.get("tokens")
        merge = vlm.core.config.vision_config.spatial_merge_size**2
        self.ends = (self.grid.prod(1) // merge).cumsum(0).tolist()
        self.row = {image_id: i for i, image_id in enumerate(self.ids)}

    def __call__(self, image_ids: list[str]) -> VisualTokens:
        """Tokens of the given images, in the given order."""
        if self.tokens is None:
            return visual_tokens(self.vlm, [self.paths[i] for i in image_ids])
        rows = [self.row[i] for i in image_ids]
        tokens = [self.tokens[self.ends[r - 1] if r else 0 : self.ends[r]] for r in rows]
        return VisualTokens(tokens, self.grid[rows])
