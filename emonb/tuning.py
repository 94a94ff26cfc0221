"""Room 03, second half: features, LoRA instruction tuning and the VLM's predictions, as stages.

The authors' schedule asks the VLM again in every epoch of the gate; here each image is seen once:
one pass of the vision tower gives the features, and scored answers are stored as predictions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from emonb import vlm as rooms
from emonb.predictions import make_predictions, write_predictions
from emonb.progress import progress
from emonb.samples import read_samples, sample_labels
from emonb.settings import Settings, VLMSettings
from emonb.store import Artifact, Store, read_json, write_json
from emonb.triplets import categorical_instruction, load_prompts, read_triplets
from emonb.vlm import VLM, VisualTokens

__all__ = [
    "VisualSource",
    "adapter_stage",
    "add_lora",
    "features_stage",
    "load_features",
    "predictions_stage",
    "tune",
]

CODE = ["emonb.vlm", "emonb.tuning"]
IGNORE = -100  # torch's cross-entropy leaves these targets out
SPLITS = ("train", "val", "test")


def _base_params(settings: VLMSettings) -> dict[str, Any]:
    params = settings.model_dump(include={"base", "dtype", "quantize_4bit", "max_side", "cache_visual_tokens"})
    if settings.base == "stand-in":
        from emonb.standin import BASE_PATH

        provenance = BASE_PATH / "provenance.json"
        params["provenance"] = read_json(provenance) if provenance.is_file() else None
    return params


# ----------------------------------------------------------------------------- one pass over the images
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
                visual = rooms.visual_tokens(vlm, part["path"].iloc[i : i + config.batch_size].tolist())
                pooled.append(visual.pooled().half().cpu())
                grids.append(visual.grid)
                if config.cache_visual_tokens:
                    tokens += [t.cpu() for t in visual.tokens]
            arrays = {"pooled": torch.cat(pooled), "grid": torch.cat(grids)}
            if tokens:
                arrays["tokens"] = torch.cat(tokens)
            save_file(arrays, folder / f"{split}.safetensors")
        write_json(folder / "ids.json", ids)

    params = {**_base_params(config), "batch_size": config.batch_size}
    return store.get("features", dataset, build, params=params, inputs=[samples], code=CODE)


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
            return rooms.visual_tokens(self.vlm, [self.paths[i] for i in image_ids])
        rows = [self.row[i] for i in image_ids]
        tokens = [self.tokens[self.ends[r - 1] if r else 0 : self.ends[r]] for r in rows]
        return VisualTokens(tokens, self.grid[rows])


# ----------------------------------------------------------------------------------- instruction tuning
def add_lora(vlm: VLM, settings: VLMSettings) -> VLM:
    """Put a fresh LoRA adapter on the language model's attention projections; the rest stays frozen.

    r 8 and alpha 8 (paper) on q, k, v (paper) and o (authors' code). A fresh adapter changes no answer.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if getattr(vlm.model, "is_quantized", False):
        prepare_model_for_kbit_training(vlm.model, use_gradient_checkpointing=settings.gradient_checkpointing)
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=rf".*language_model.*\.({'|'.join(settings.lora_targets)})",
        task_type="CAUSAL_LM",
    )
    return VLM(get_peft_model(vlm.model, config), vlm.processor, vlm.max_side)


def adapter_stage(settings: Settings, store: Store, dataset: str, vlm: VLM) -> Artifact:
    """Instruction-tune on the triplets (stage `adapter`): a peft adapter and `history.json`."""
    samples, triplets = store.find("samples", dataset), store.find("triplets", dataset)
    features = store.find("features", dataset)
    config = settings.vlm

    def build(folder: Path) -> None:
        torch.manual_seed(settings.seed)  # before the adapter is drawn
        tuned = add_lora(vlm, config)
        frame = read_triplets(triplets.path / "triplets.jsonl")
        frame = frame[frame["kind"].isin(config.triplet_kinds)]
        source = VisualSource(tuned, features, samples, "train")
        try:
            history = tune(tuned, frame, source, config, seed=settings.seed, what=f"LoRA of {dataset}")
            tuned.model.save_pretrained(folder)
        finally:
            vlm.model = tuned.model.unload()  # the base again, without the adapter
        write_json(folder / "history.json", history)

    keys = {"batch_size", "reasons", "max_new_tokens"}
    params = {**config.model_dump(exclude=keys), "seed": settings.seed, **_base_params(config)}
    return store.get("adapter", dataset, build, params=params, inputs=[samples, triplets, features], code=CODE)


def tune(
    vlm: VLM, triplets: pd.DataFrame, source: VisualSource, settings: VLMSettings, *, seed: int, what: str
) -> list[dict[str, Any]]:
    """Train the adapter with transformers' Trainer; only response tokens count in the loss.

    Words that the tokenizer does not know are left out of the loss: they teach nothing.

    Returns:
        Training curve: rows of epoch, step, split, metric, value.
    """
    from tempfile import TemporaryDirectory

    unknown = vlm.processor.tokenizer.unk_token_id
    examples = []
    for row in triplets.to_dict("records"):
        prompt, answer = rooms.dialogue_ids(vlm, row["instruction"], row["response"])
        targets = [IGNORE if token == unknown else token for token in answer]
        examples.append({"image_id": row["image_id"], "prompt": prompt, "answer": answer, "targets": targets})

    def collate(rows: list[dict]) -> dict[str, Any]:
        visual = source([row["image_id"] for row in rows])
        batch = rooms.make_batch(vlm, [r["prompt"] + r["answer"] for r in rows], visual, pad_left=False)
        labels = torch.full_like(batch["input_ids"], IGNORE)
        for i, (row, length) in enumerate(zip(rows, batch["attention_mask"].sum(1).tolist(), strict=True)):
            labels[i, length - len(row["targets"]) : length] = torch.tensor(row["targets"])
        return {**batch, "labels": labels}

    steps = int(len(examples) * settings.epochs / settings.train_batch_size / settings.gradient_accumulation)
    with TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=settings.epochs,
            learning_rate=settings.lr,
            lr_scheduler_type=settings.lr_schedule,
            warmup_steps=settings.warmup_ratio,  # transformers 5: below 1 it is a share of all steps
            max_grad_norm=settings.max_grad_norm,
            per_device_train_batch_size=settings.train_batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation,
            activation_checkpointing=settings.gradient_checkpointing,
            optim="adamw_torch",
            seed=seed,
            logging_steps=max(1, steps // 40),  # some 40 points on the curve
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,  # the collator's tensors are on the device already
            use_cpu=vlm.device.type == "cpu",
        )
        curve = _Curve(what)
        trainer = Trainer(vlm.model, arguments, train_dataset=examples, data_collator=collate, callbacks=[curve])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    vlm.model.eval()
    return curve.rows


class _Curve(TrainerCallback):
    """Keep the training loss, and show the steps in our own progress bar."""

    def __init__(self, what: str):
        self.what, self.rows, self.bar = what, [], None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = iter(progress(range(state.max_steps), self.what, unit="step"))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        next(self.bar, None)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        next(self.bar, None)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            row = {"epoch": logs["epoch"], "step": state.global_step, "split": "train", "metric": "loss"}
            self.rows.append({**row, "value": logs["loss"]})


# ------------------------------------------------------------------------------------------ predictions
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
    model = load_adapter(vlm, adapter) if adapter else vlm

    def build(folder: Path) -> None:
        frame = read_samples(samples)
        reasons = _reasons(model, frame, config) if adapter else {}
        parts = []
        for split in SPLITS if adapter else SPLITS[1:]:
            source = VisualSource(model, features, samples, split)
            scores = []
            for i in progress(range(0, len(source.ids), config.batch_size), f"answers for {dataset}, {split}"):
                visual = source(source.ids[i : i + config.batch_size])
                scores.append(rooms.answer_distribution(model, visual, labels).cpu())
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
        **_base_params(config),
        **config.model_dump(include={"batch_size", "reasons", "max_new_tokens"}),
    }
    inputs = [samples, features, *([adapter] if adapter else [])]
    stage = "vlm_predictions" if adapter else "base_predictions"
    try:
        return store.get(stage, dataset, build, params=params, inputs=inputs, code=CODE)
    finally:
        if adapter:
            vlm.model = model.model.unload()


def load_adapter(vlm: VLM, adapter: Artifact) -> VLM:
    """The tuned VLM: the base in memory with a stored LoRA adapter on it."""
    from peft import PeftModel

    return VLM(PeftModel.from_pretrained(vlm.model, adapter.path).eval(), vlm.processor, vlm.max_side)


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
    named = [rooms.parse_emotion(text, labels) for text in texts]
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
        texts += rooms.generate(vlm, paths[i : i + settings.batch_size], instruction, settings.max_new_tokens)
    return texts
