"""Room 03: the VLM's answers about every picture, zero-shot and tuned, as stages."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from emonb.emotions import parse_emotion
from emonb.features import VisualSource, base_params
from emonb.parallel import is_main
from emonb.predictions import PredictionWriter, make_predictions, write_predictions
from emonb.progress import progress
from emonb.samples import read_samples, sample_labels
from emonb.settings import SPLITS, Settings, VLMSettings
from emonb.shards import Shard, make_shards, shards_of
from emonb.store import Artifact, Store, read_json, write_json
from emonb.triplets import categorical_instruction, load_prompts
from emonb.tuning import adapted
from emonb.vlm import VLM, answer_distribution, generate

__all__ = ["predictions_stage"]

CODE = ["emonb.vlm", "emonb.visual", "emonb.checkpoints", "emonb.features", "emonb.answers", "emonb.shards"]


def predictions_stage(
    settings: Settings, store: Store, dataset: str, vlm: VLM, adapter: Artifact | None = None
) -> Artifact:
    """Scored answers of every image (stages `base_predictions`, or `vlm_predictions` with an adapter).

    `predictions.parquet` has p = softmax over the candidates' log-probabilities. The tuned model also
    writes `generated.parquet`: greedy free answers to some test images, parsed, and its reasons as text.
    Zero-shot answers are needed for val and test only, so train is left out there.
    """
    samples, features = store.find("samples", dataset), store.find("features", dataset)
    labels, config = sample_labels(samples), settings.vlm
    splits = SPLITS if adapter else SPLITS[1:]

    def build(folder: Path, parts: Path) -> None:
        with adapted(vlm, adapter) if adapter else nullcontext(vlm) as model:
            shards, files = score(model, parts)
            if is_main():
                merge(model, shards, files, folder, parts)

    def score(model: VLM, parts: Path) -> tuple[list[Shard], list[Path]]:
        sources = {s: VisualSource(model, features, samples, s, config.cache_visual_tokens) for s in splits}

        def ask(shard: Shard, file: Path) -> None:
            batches = sources[shard.split].batches(shard.batches(config.batch_size))
            save_file({"scores": torch.cat([answer_distribution(model, b, labels).cpu() for b in batches])}, file)

        shards = shards_of({s: len(source.ids) for s, source in sources.items()})
        return shards, make_shards(shards, parts, ".safetensors", ask, f"answers for {dataset}")

    def merge(model: VLM, shards: list[Shard], files: list[Path], folder: Path, parts: Path) -> None:
        asked = _asked(read_samples(samples, "test", ["image_id", "path", "split", "label"]), config.reasons)
        reasons = _texts(model, asked, _reasoning(), config, parts / "reasons.json") if adapter else {}
        frames = {s: read_samples(samples, s, ["image_id", "label"]) for s in splits}
        with PredictionWriter(folder / "predictions.parquet", labels) as out:
            for shard, file in zip(shards, files, strict=True):
                rows = frames[shard.split].iloc[shard.start : shard.stop]
                text = [reasons.get(image_id, "") for image_id in rows["image_id"]]
                scores = load_file(file)["scores"]
                out.add_scores(rows["image_id"], shard.split, rows["label"], scores, settings.seed, raw_text=text)
        if adapter and config.reasons:
            texts = _texts(model, asked, categorical_instruction(labels), config, parts / "free_answers.json")
            write_predictions(folder / "generated.parquet", _free_answers(asked, texts, labels, settings.seed), labels)

    params = {
        **base_params(config),
        **config.model_dump(include={"batch_size", "reasons", "max_new_tokens"}),
    }
    inputs = [samples, features, *([adapter] if adapter else [])]
    stage = "vlm_predictions" if adapter else "base_predictions"
    return store.get(stage, dataset, build, params=params, inputs=inputs, code=CODE, parts=True)


def _asked(test: pd.DataFrame, n: int) -> pd.DataFrame:
    """Evenly spaced test images, at most n."""
    return test.iloc[np.unique(np.linspace(0, len(test) - 1, min(n, len(test))).astype(int))] if n else test[:0]


def _reasoning() -> str:
    return load_prompts()["reasoning"]["instructions"][0]


def _texts(vlm: VLM, asked: pd.DataFrame, instruction: str, settings: VLMSettings, kept: Path) -> dict[str, str]:
    """image_id -> the VLM's own words, for people to read; kept in a file so that a killed run need not ask again."""
    if kept.is_file():
        return read_json(kept)
    paths, texts = asked["path"].tolist(), []
    for i in progress(range(0, len(paths), settings.batch_size), kept.stem.replace("_", " ")):
        texts += generate(vlm, paths[i : i + settings.batch_size], instruction, settings.max_new_tokens)
    found = dict(zip(asked["image_id"], texts, strict=True))
    write_json(kept, found)
    return found


def _free_answers(asked: pd.DataFrame, texts: dict[str, str], labels: list[str], seed: int) -> pd.DataFrame:
    """Greedy generation instead of scoring; an answer that cannot be parsed stays unparsed."""
    said = [texts[image_id] for image_id in asked["image_id"]]
    named = [parse_emotion(text, labels) for text in said]
    p = np.array([[label == name for label in labels] for name in named], dtype=float)
    p[[name is None for name in named]] = 1 / len(labels)
    return make_predictions(
        asked["image_id"],
        asked["split"],
        asked["label"],
        p,
        labels,
        seed=seed,
        raw_text=said,
        parsed=[name is not None for name in named],
    )
