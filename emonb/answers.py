"""Room 03: the VLM's answers about every picture, zero-shot and tuned, as stages."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from emonb.emotions import parse_emotion
from emonb.features import VisualSource, base_params
from emonb.predictions import make_predictions, write_predictions
from emonb.progress import progress
from emonb.samples import read_samples, sample_labels
from emonb.settings import SPLITS, Settings, VLMSettings
from emonb.store import Artifact, Store
from emonb.triplets import categorical_instruction, load_prompts
from emonb.tuning import adapted
from emonb.vlm import VLM, answer_distribution, generate

__all__ = ["predictions_stage"]

CODE = ["emonb.vlm", "emonb.features", "emonb.answers"]


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

    def build(folder: Path) -> None:
        with adapted(vlm, adapter) if adapter else nullcontext(vlm) as model:
            answer(model, folder)

    def answer(model: VLM, folder: Path) -> None:
        frame = read_samples(samples)
        reasons = _reasons(model, frame, config) if adapter else {}
        parts = []
        for split in SPLITS if adapter else SPLITS[1:]:
            source = VisualSource(model, features, samples, split)
            scores = []
            for i in progress(range(0, len(source.ids), config.batch_size), f"answers for {dataset}, {split}"):
                visual = source(source.ids[i : i + config.batch_size])
                scores.append(answer_distribution(model, visual, labels).cpu())
            p = torch.cat(scores).double().softmax(-1).numpy()
            gold = frame.set_index("image_id").loc[source.ids, "label"].tolist()
            text = [reasons.get(image_id, "") for image_id in source.ids]
            split_column = [split] * len(p)
            parts.append(
                make_predictions(source.ids, split_column, gold, p, labels, seed=settings.seed, raw_text=text)
            )
        write_predictions(folder / "predictions.parquet", pd.concat(parts, ignore_index=True), labels)
        if adapter and config.reasons:
            write_predictions(folder / "generated.parquet", _free_answers(model, frame, labels, settings), labels)

    params = {
        **base_params(config),
        **config.model_dump(include={"batch_size", "reasons", "max_new_tokens"}),
    }
    inputs = [samples, features, *([adapter] if adapter else [])]
    stage = "vlm_predictions" if adapter else "base_predictions"
    return store.get(stage, dataset, build, params=params, inputs=inputs, code=CODE)


def _asked(frame: pd.DataFrame, n: int) -> pd.DataFrame:
    """Evenly spaced test images, at most n."""
    test = frame[frame["split"] == "test"]
    return test.iloc[np.unique(np.linspace(0, len(test) - 1, min(n, len(test))).astype(int))] if n else test[:0]


def _reasons(vlm: VLM, frame: pd.DataFrame, settings: VLMSettings) -> dict[str, str]:
    """image_id -> the VLM's own reasons, for people to read."""
    asked = _asked(frame, settings.reasons)
    instruction = load_prompts()["reasoning"]["instructions"][0]
    texts = _in_batches(vlm, asked["path"].tolist(), instruction, settings, "reasons")
    return dict(zip(asked["image_id"], texts, strict=True))


def _free_answers(vlm: VLM, frame: pd.DataFrame, labels: list[str], settings: Settings) -> pd.DataFrame:
    """Greedy generation instead of scoring; an answer that cannot be parsed stays unparsed."""
    asked = _asked(frame, settings.vlm.reasons)
    paths = asked["path"].tolist()
    texts = _in_batches(vlm, paths, categorical_instruction(labels), settings.vlm, "free answers")
    named = [parse_emotion(text, labels) for text in texts]
    p = np.array([[label == name for label in labels] for name in named], dtype=float)
    p[[name is None for name in named]] = 1 / len(labels)
    return make_predictions(
        asked["image_id"].tolist(),
        asked["split"].tolist(),
        asked["label"].tolist(),
        p,
        labels,
        seed=settings.seed,
        raw_text=texts,
        parsed=[name is not None for name in named],
    )


def _in_batches(vlm: VLM, paths: list[str], instruction: str, settings: VLMSettings, what: str) -> list[str]:
    texts: list[str] = []
    for i in progress(range(0, len(paths), settings.batch_size), what):
        texts += generate(vlm, paths[i : i + settings.batch_size], instruction, settings.max_new_tokens)
    return texts
