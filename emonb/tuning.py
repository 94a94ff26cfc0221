"""Room 03: LoRA instruction tuning on the triplets (paper: section on instruction tuning), as a stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from emonb.features import VisualSource, base_params
from emonb.progress import progress
from emonb.settings import Settings, VLMSettings
from emonb.store import Artifact, Store, write_json
from emonb.triplets import read_triplets
from emonb.vlm import VLM, dialogue_ids, make_batch

__all__ = ["adapted", "adapter_stage", "add_lora", "tune"]

CODE = ["emonb.vlm", "emonb.features", "emonb.tuning"]
IGNORE = -100  # torch's cross-entropy leaves these targets out


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
            tuned.model.save_pretrained(folder, save_embedding_layers=False)  # they are frozen
        finally:
            vlm.model = tuned.model.unload()  # the base again, without the adapter
        write_json(folder / "history.json", history)

    keys = {"batch_size", "reasons", "max_new_tokens"}
    params = {**config.model_dump(exclude=keys), "seed": settings.seed, **base_params(config)}
    return store.get("adapter", dataset, build, params=params, inputs=[samples, triplets, features], code=CODE)


def tune(
    vlm: VLM, triplets: pd.DataFrame, source: VisualSource, settings: VLMSettings, *, seed: int, what: str
) -> list[dict[str, Any]]:
    """Train the adapter with transformers' Trainer; only response tokens count in the loss.

    Words that the tokenizer does not know are left out of the loss: they teach nothing.

    Returns:
        Training curve: rows of epoch, step, split, metric, value.
    """
    unknown = vlm.processor.tokenizer.unk_token_id
    examples = []
    for row in triplets.to_dict("records"):
        prompt, answer = dialogue_ids(vlm, row["instruction"], row["response"])
        targets = [IGNORE if token == unknown else token for token in answer]
        examples.append({"image_id": row["image_id"], "prompt": prompt, "answer": answer, "targets": targets})

    def collate(rows: list[dict]) -> dict[str, Any]:
        visual = source([row["image_id"] for row in rows])
        batch = make_batch(vlm, [r["prompt"] + r["answer"] for r in rows], visual, pad_left=False)
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


@contextmanager
def adapted(vlm: VLM, adapter: Artifact) -> Iterator[VLM]:
    """The tuned VLM: the base in memory with a stored LoRA adapter on it, and without it again afterwards."""
    from peft import PeftModel

    tuned = VLM(PeftModel.from_pretrained(vlm.model, adapter.path).eval(), vlm.processor, vlm.max_side)
    try:
        yield tuned
    finally:
        vlm.model = tuned.model.unload()
