"""Room 03: one pass over the pictures. Visual features of the frozen vision tower, as a stage.

The authors' schedule runs the vision tower in every epoch of the distillation and asks the VLM again in
every epoch of the gate; here each image is seen once, and all that follows works on what is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file

from emonb.errors import EmonbError
from emonb.parallel import is_main, sharded
from emonb.rows import split_rows
from emonb.samples import read_samples
from emonb.settings import SPLITS, Settings, VLMSettings
from emonb.shards import Shard, ahead, link, make_shards, shards_of
from emonb.store import Artifact, Store, read_json, write_json
from emonb.vlm import VLM, PictureInputs, VisualTokens, picture_inputs, visual_tokens

__all__ = ["VisualSource", "base_params", "features_stage", "load_features"]


def base_params(settings: VLMSettings) -> dict[str, Any]:
    """What features and answers depend on: the base VLM, its precision and what it is shown."""
    params = settings.model_dump(include={"base", "dtype", "quantize_4bit", "max_side", "cache_visual_tokens"})
    provenance = Path(settings.checkpoint) / "provenance.json"  # checkpoints made here have one
    return {**params, "provenance": read_json(provenance) if provenance.is_file() else None}


def features_stage(settings: Settings, store: Store, dataset: str, vlm: VLM) -> Artifact:
    """Pooled (and, if asked for, token-level) visual features of all images (stage `features`).

    Files: `<split>-<number>.safetensors`, a shard each, with `pooled` (N, D) float16, `grid` (N, 3) and, with
    `vlm.cache_visual_tokens`, `tokens` (sum of n_i, D) float16; `ids.json` with each split's image ids in order.
    """
    samples = store.find("samples", dataset)
    config = settings.vlm

    def build(folder: Path, parts: Path) -> None:
        frames = {s: read_samples(samples, s, ["image_id", "path"]) for s in SPLITS}

        def see(shard: Shard, file: Path) -> None:
            pooled, tokens, grids = [], [], []
            paths = frames[shard.split]["path"]
            for visual in _seen(vlm, (paths.iloc[batch] for batch in shard.batches(config.batch_size))):
                pooled.append(visual.pooled().half().cpu())
                grids.append(visual.grid)
                if config.cache_visual_tokens:
                    tokens += [t.cpu() for t in visual.tokens]
            arrays = {"pooled": torch.cat(pooled), "grid": torch.cat(grids)}
            if not arrays["pooled"].isfinite().all():
                raise EmonbError(f"visual tokens of {dataset}: more than float16 holds; check vlm.base")
            save_file({**arrays, **({"tokens": torch.cat(tokens)} if tokens else {})}, file)

        shards = shards_of({s: len(frame) for s, frame in frames.items()})
        files = make_shards(shards, parts, ".safetensors", see, f"visual tokens of {dataset}")
        if is_main():
            link(files, folder)
            write_json(folder / "ids.json", {s: frame["image_id"].tolist() for s, frame in frames.items()})

    params = {**base_params(config), "batch_size": config.batch_size}
    code = ["emonb.vlm", "emonb.visual", "emonb.checkpoints", "emonb.features", "emonb.shards"]
    return store.get("features", dataset, build, params=params, inputs=[samples], code=code, parts=True)


def _seen(vlm: VLM, batches: Iterable[pd.Series]) -> Iterator[VisualTokens]:
    """Visual tokens of batches of paths; on a GPU threads decode the next pictures meanwhile."""
    threads = 4 if vlm.device.type == "cuda" else 0
    inputs = ahead(lambda paths: picture_inputs(vlm.processor, paths.tolist(), vlm.max_side), batches, threads)
    return (visual_tokens(vlm, pictures) for pictures in inputs)


def load_features(artifact: Artifact, split: str, at_most: int | None = None) -> tuple[list[str], torch.Tensor]:
    """Image ids and pooled features, (N, D) float32, of the first images of a split (default: of all), in memory."""
    ids = read_json(artifact.path / "ids.json")[split][:at_most]
    return ids, split_rows(artifact.path, split, "pooled")[: len(ids)].float()


class VisualSource:
    """Visual tokens of a split by image id: from the cache, or from the picture when there is none."""

    def __init__(self, vlm: VLM, features: Artifact, samples: Artifact, split: str, cached: bool):
        self.vlm = vlm
        frame = read_samples(samples, split, ["image_id", "path"])
        self.ids, self.paths = frame["image_id"].tolist(), frame["path"]
        if self.ids != read_json(features.path / "ids.json")[split]:
            raise EmonbError(f"{features.path}: made of other samples; delete the folder and run notebook 03 again")
        self.grid = split_rows(features.path, split, "grid")
        self.tokens = split_rows(features.path, split, "tokens") if cached else None
        merge = vlm.core.config.vision_config.spatial_merge_size**2
        self.ends = (self.grid[:].prod(1) // merge).cumsum(0)
        self.row = {image_id: i for i, image_id in enumerate(self.ids)}

    def __call__(self, image_ids: Sequence[str]) -> VisualTokens | PictureInputs:
        """What the model needs of the given images, in the given order; pixels where it cannot be called in parts."""
        rows = [self.row[i] for i in image_ids]
        if self.tokens is None:
            inputs = picture_inputs(self.vlm.processor, self.paths.iloc[rows].tolist(), self.vlm.max_side)
            return inputs if sharded() else visual_tokens(self.vlm, inputs)
        tokens = [self.tokens[int(self.ends[r - 1]) if r else 0 : int(self.ends[r])] for r in rows]
        return VisualTokens(tokens, self.grid[rows], self.vlm.width)

    def batches(self, batches: Sequence[slice]) -> Iterator[VisualTokens]:
        """Visual tokens of the split's images by position, batch after batch."""
        if self.tokens is None:
            return _seen(self.vlm, (self.paths.iloc[batch] for batch in batches))
        return (self(self.ids[batch]) for batch in batches)
