"""Room 03: LoRA instruction tuning on the triplets (paper: section on instruction tuning), as a stage."""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from emonb.errors import EmonbError
from emonb.features import VisualSource, base_params
from emonb.fit import get_device
from emonb.parallel import is_main, process_count, sharded
from emonb.progress import progress
from emonb.settings import Settings, VLMSettings
from emonb.store import Artifact, Store, write_json
from emonb.triplets import triplet_lines
from emonb.vlm import VLM, answer_ids, dialogue_ids, make_batch

__all__ = ["TripletRows", "adapted", "adapter_stage", "add_lora", "tune"]

CODE = ["emonb.vlm", "emonb.visual", "emonb.checkpoints", "emonb.features", "emonb.tuning"]
_SAVE_EVERY = 200  # steps at least between two checkpoints
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

    def build(folder: Path, parts: Path) -> None:
        torch.manual_seed(settings.seed)  # before the adapter is drawn
        tuned = add_lora(vlm, config)
        rows = TripletRows(triplets.path / "triplets.jsonl", config.triplet_kinds)
        source = VisualSource(tuned, features, samples, "train", config.cache_visual_tokens)
        try:
            what = f"LoRA of {dataset}"
            history = tune(tuned, rows, source, config, seed=settings.seed, what=what, folder=folder, parts=parts)
        finally:
            if not sharded():
                vlm.model = tuned.model.unload()  # the base again, without the adapter
        if is_main():
            write_json(folder / "history.json", history)

    keys = {"batch_size", "reasons", "max_new_tokens"}
    params = {**config.model_dump(exclude=keys), "seed": settings.seed, **base_params(config)}
    inputs = [samples, triplets, features]
    return store.get("adapter", dataset, build, params=params, inputs=inputs, code=CODE, parts=True)


class TripletRows(Dataset):
    """Triplets of a checked JSONL file, read line by line: the memory holds where the lines begin."""

    def __init__(self, path: Path, kinds: Collection[str]) -> None:
        self.path, self.starts = path, array("q")
        for triplet, _, start in triplet_lines(path):
            if triplet["kind"] in kinds:
                self.starts.append(start)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self.starts[i])
            return json.loads(file.readline())


def tune(
    vlm: VLM,
    triplets: Dataset,
    source: VisualSource,
    settings: VLMSettings,
    *,
    seed: int,
    what: str,
    folder: Path,
    parts: Path,
) -> list[dict[str, Any]]:
    """Train the adapter with transformers' Trainer; only response tokens count in the loss.

    Words that the tokenizer does not know are left out of the loss: they teach nothing. Several processes share
    each batch, so that a step sees the same examples however many there are.

    Args:
        triplets: rows with `image_id`, `instruction` and `response`.
        source: visual tokens by image id.
        folder: where the adapter goes.
        parts: checkpoints, from which a killed training goes on.

    Returns:
        Training curve: rows of epoch, step, split, metric, value.

    Raises:
        EmonbError: a batch that cannot be shared by this number of processes.
    """
    unknown = vlm.processor.tokenizer.unk_token_id
    prompt_ids = lru_cache(maxsize=1024)(lambda instruction: dialogue_ids(vlm, instruction)[0])

    def collate(rows: list[dict]) -> dict[str, Any]:
        visual = source([row["image_id"] for row in rows])
        prompts = [prompt_ids(row["instruction"]) for row in rows]
        answers = [answer_ids(vlm, row["response"]) for row in rows]
        batch = make_batch(vlm, [p + a for p, a in zip(prompts, answers, strict=True)], visual, pad_left=False)
        labels = torch.full_like(batch["input_ids"], IGNORE)
        for i, (answer, length) in enumerate(zip(answers, batch["attention_mask"].sum(1).tolist(), strict=True)):
            targets = [IGNORE if token == unknown else token for token in answer]
            labels[i, length - len(targets) : length] = torch.tensor(targets)
        return {**batch, "labels": labels}

    size, accumulation = _shared_batch(settings)
    together = settings.train_batch_size * settings.gradient_accumulation
    steps = int(len(triplets) * settings.epochs / together)
    arguments = TrainingArguments(
        output_dir=str(parts),
        num_train_epochs=settings.epochs,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.lr_schedule,
        warmup_steps=settings.warmup_ratio,  # transformers 5: below 1 it is a share of all steps
        max_grad_norm=settings.max_grad_norm,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        activation_checkpointing=settings.gradient_checkpointing,
        optim="adamw_torch",
        seed=seed,
        logging_steps=max(1, steps // 40),  # some 40 points on the curve
        save_strategy="steps",
        save_steps=max(_SAVE_EVERY, steps // 20),
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=len(triplets) >= together,  # else accelerate fills the last batch with the first images
        dataloader_pin_memory=False,  # the collator's tensors are on the device already
        ddp_find_unused_parameters=False,
        use_cpu=get_device().type == "cpu",
    )
    trainer = _AdapterTrainer(
        vlm.model, arguments, train_dataset=triplets, data_collator=collate, compute_loss_func=response_loss
    )
    trainer.add_callback(_Bar(what))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(parts)))
    trainer.save_model(str(folder))
    vlm.model.eval()
    logs = (log for log in trainer.state.log_history if "loss" in log)
    common = {"split": "train", "metric": "loss"}
    return [{"epoch": log["epoch"], "step": log["step"], **common, "value": log["loss"]} for log in logs]


def response_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """Cross-entropy of a step's response tokens, each with the same weight.

    The model's own loss weighs every part of a step alike, so that the answer would depend on how the step is
    split into accumulated batches and processes.

    Args:
        outputs: with `logits` (B, T, V).
        labels: (B, T) token ids, `IGNORE` where nothing is to be learnt.
        num_items_in_batch: number of response tokens in the whole step, over all processes.
    """
    targets = labels[:, 1:]
    learnt = targets != IGNORE
    logits = outputs.logits[:, :-1][learnt].float()
    return torch.nn.functional.cross_entropy(logits, targets[learnt], reduction="sum") / num_items_in_batch


def _shared_batch(settings: VLMSettings) -> tuple[int, int]:
    """Batch size and accumulation of one process, so that a step of all sees as many examples as the settings say."""
    n, size, accumulation = process_count(), settings.train_batch_size, settings.gradient_accumulation
    if accumulation % n == 0:
        return size, accumulation // n
    if size % n == 0:
        return size // n, accumulation
    raise EmonbError(
        f"settings vlm.train_batch_size ({size}) and vlm.gradient_accumulation ({accumulation}): neither can be "
        f"shared by {n} processes; change one of them to a multiple of {n}, or --num_processes"
    )


class _AdapterTrainer(Trainer):
    """A Trainer that saves the adapter alone: the embeddings are frozen, the arguments are in the provenance."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        options = {"save_embedding_layers": False, **({"state_dict": state_dict} if state_dict else {})}
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir or self.args.output_dir, **options)


class _Bar(TrainerCallback):
    """Show the steps in our own progress bar."""

    def __init__(self, what: str):
        self.what = what

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = iter(progress(range(state.global_step, state.max_steps), self.what, unit="step"))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        next(self.bar, None)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        next(self.bar, None)


@contextmanager
def adapted(vlm: VLM, adapter: Artifact) -> Iterator[VLM]:
    """The tuned VLM: the base in memory with a stored LoRA adapter on it, and without it again afterwards."""
    from peft import PeftModel

    tuned = VLM(PeftModel.from_pretrained(vlm.model, adapter.path).eval(), vlm.processor, vlm.max_side)
    try:
        yield tuned
    finally:
        vlm.model = tuned.model.unload()
