"""Room 03: LoRA instruction tuning on the triplets (paper: section on instruction tuning)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import get_scheduler

from emonb.errors import EmonbError
from emonb.machine import get_device, is_main, process_count, process_index
from emonb.progress import progress
from emonb.training import load_checkpoint, mixed_seed, save_checkpoint, warn_if_short
from emonb.vlm import VLM, VisualTokens, answer_ids, make_batch, prompt_ids

IGNORE = -100  # torch's cross-entropy leaves these targets out
SAVE_EVERY = 200  # steps at least between two checkpoints


def add_lora(
    vlm: VLM,
    *,
    r: int = 8,
    alpha: int = 8,
    dropout: float = 0.05,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
) -> VLM:
    """Put a fresh LoRA adapter on the language model's attention projections; the rest stays frozen.

    r 8 and alpha 8 (paper) on q, k, v (paper) and o (authors' code). A fresh adapter changes no answer. A quantised
    base stays as it is, too: peft's `prepare_model_for_kbit_training` (authors' code) would turn its other weights to
    float32 in place, and every later answer of this base would be another model's.
    """
    inside = next(name for name, module in vlm.model.named_modules() if module is vlm.language)
    layers = rf"{re.escape(inside)}\..*\.({'|'.join(targets)})"
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers, task_type="CAUSAL_LM")
    try:
        return VLM(get_peft_model(vlm.model, config), vlm.processor, vlm.max_side)
    except ValueError:  # peft found nothing to adapt
        known = sorted(
            {name.split(".")[-1] for name, part in vlm.language.named_modules() if isinstance(part, nn.Linear)}
        )
        raise EmonbError(
            f"setting vlm.lora_targets: no {', '.join(targets)} here; layers are {', '.join(known)}"
        ) from None


@contextmanager
def adapted(vlm: VLM, adapter: Path) -> Iterator[VLM]:
    """The tuned VLM: the base in memory with a stored LoRA adapter on it, and without it again afterwards."""
    tuned = VLM(PeftModel.from_pretrained(vlm.model, adapter).eval(), vlm.processor, vlm.max_side)
    try:
        yield tuned
    finally:
        vlm.model = tuned.model.unload()


def save_adapter(vlm: VLM, folder: Path) -> None:
    """Write the adapter alone, as peft does: the embeddings are frozen."""
    vlm.model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template


def training_batch(
    vlm: VLM,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    visual: VisualTokens,
    learn: str = "response",
) -> tuple[dict[str, Any], Tensor]:
    """Model inputs of B dialogues, and their targets [B, T], IGNORE where nothing is to be learnt.

    Learnt are the response's tokens; with `learn` "all" (authors' code) also the prompt's, but for the picture's.
    Words that the tokenizer does not know are left out: they teach nothing.
    """
    dialogues, lengths = [[*p, *a] for p, a in zip(prompts, answers, strict=True)], [len(a) for a in answers]
    batch = make_batch(vlm, dialogues, visual, pad_left=False, answered=lengths)
    places = torch.arange(batch["input_ids"].shape[1], device=vlm.device)
    ends = batch["attention_mask"].sum(1, keepdim=True)  # [B, 1]
    wanted = places < ends
    seen = ends - torch.tensor([[len(ids) - 1] for ids in dialogues], device=vlm.device)  # [B, 1] of the picture
    at = torch.tensor([[ids.index(vlm.placeholder_id)] for ids in dialogues], device=vlm.device)
    wanted &= (places < at) | (places >= at + seen)
    if learn == "response":
        wanted &= places >= ends - torch.tensor(lengths, device=vlm.device)[:, None]
    for token in never_learnt(vlm):
        wanted &= batch["input_ids"] != token
    return batch, batch["input_ids"].masked_fill(~wanted, IGNORE)


def never_learnt(vlm: VLM) -> list[int]:
    """Tokens that are never targets: those of pictures, and what stands for unknown words."""
    unknown, pictures = vlm.processor.tokenizer.unk_token_id, [vlm.image_token_id, vlm.placeholder_id]
    return pictures if unknown is None else [*pictures, unknown]


def response_loss(logits: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """Cross-entropy of a step's target tokens, each with the same weight.

    Args:
        logits: [B, T, V] of one part of the step.
        targets: [B, T] token ids, IGNORE where nothing is to be learnt.
        tokens: targets in the whole step, so that it does not matter into how many parts it is cut.
    """
    wanted = targets[:, 1:]  # the logits at a place are for the token after it
    learnt = wanted != IGNORE
    predicted = logits[:, :-1][learnt].float()
    return nn.functional.cross_entropy(predicted, wanted[learnt], reduction="sum") / tokens


def plan_steps(examples: int, epochs: float, size: int, seed: int) -> list[list[int]]:
    """Examples of each optimiser step: `size` of them, in a new order every epoch; a rest is left out."""
    per_epoch, steps = max(1, examples // size), []
    for epoch in range(math.ceil(epochs)):
        order = torch.randperm(examples, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch))).tolist()
        steps += [order[i * size : (i + 1) * size] for i in range(per_epoch)]
    return steps[: math.ceil(epochs * per_epoch)]


def step_gradients(
    vlm: VLM,
    rows: Sequence[dict[str, Any]],
    see: Callable[[Sequence[str]], VisualTokens],
    parts: Sequence[slice],
    learn: str = "response",
    backward: Callable[[Tensor], Any] = Tensor.backward,
    model: nn.Module | None = None,
) -> float:
    """Add the gradients of one optimiser step, part by part; returns the loss of these parts.

    Args:
        vlm: with an adapter.
        rows: the step's triplets: `image_id`, `instruction`, `response`.
        see: gives the visual tokens of pictures by their ids.
        parts: what goes through the model at a time.
        learn: "response" or "all", see `training_batch`.
        backward: called with each part's loss.
        model: `vlm.model`, perhaps wrapped for several processes.
    """
    prompts = [prompt_ids(vlm, row["instruction"]) for row in rows]
    answers = [answer_ids(vlm, row["response"]) for row in rows]
    learnt = [[*p[1:], *a] if learn == "all" else a for p, a in zip(prompts, answers, strict=True)]
    never, half = never_learnt(vlm), vlm.model.dtype == torch.bfloat16
    tokens = sum(token not in never for row in learnt for token in row)
    total = 0.0
    for part in parts:
        visual = see([row["image_id"] for row in rows[part]])
        batch, targets = training_batch(vlm, prompts[part], answers[part], visual, learn)
        # the output matrix has a row for every word: leave out the places before all that is learnt
        keep = targets.shape[1] - int((targets != IGNORE).any(0).int().argmax()) + 1
        with torch.autocast(vlm.device.type, torch.bfloat16, enabled=half):  # as the VLM is loaded (authors' code)
            logits = (model or vlm.model)(**batch, use_cache=False, logits_to_keep=keep).logits  # [B, keep, V]
        loss = response_loss(logits, targets[:, -keep:], tokens)
        backward(loss)
        total += loss.item()
    return total


def tune(
    vlm: VLM,
    triplets: Sequence[dict[str, Any]],
    see: Callable[[Sequence[str]], VisualTokens],
    *,
    epochs: float = 5,
    lr: float = 1e-4,
    schedule: str = "constant",
    warmup_ratio: float = 0.03,
    max_grad_norm: float = 0.3,
    batch_size: int = 1,
    accumulation: int = 1,
    learn: str = "response",
    gradient_checkpointing: bool = False,
    seed: int = 0,
    checkpoint: Path | None = None,
    what: str = "LoRA",
) -> list[dict[str, Any]]:
    """Train the adapter with AdamW, in bfloat16 autocast where the VLM is loaded so. Defaults: see `VLMSettings`.

    Several processes share each step, so that it sees the same examples however many there are.

    Args:
        vlm, triplets, see, learn: as for `step_gradients`; the adapter is trained in place.
        schedule: transformers' name of the learning rate's schedule.
        accumulation: parts of `batch_size` triplets in a step.
        checkpoint: file from which a killed training goes on.

    Returns:
        Training curve: rows of epoch, step, split, metric, value.
    """
    if len(triplets) <= batch_size * (accumulation - 1):
        raise EmonbError(
            f"setting vlm.gradient_accumulation ({accumulation}): a step of so many parts of {batch_size} needs more "
            f"than these {len(triplets)} triplets; lower it"
        )
    if accumulation % process_count():
        raise EmonbError(
            f"setting vlm.gradient_accumulation ({accumulation}): the parts of a step cannot be shared by "
            f"{process_count()} processes; make it a multiple of that, or change --num_processes"
        )
    plan = plan_steps(len(triplets), epochs, batch_size * accumulation, seed)
    mine = range(process_index(), accumulation, process_count())  # the parts of a step that this process takes
    parts = [slice(i * batch_size, (i + 1) * batch_size) for i in mine]
    accelerator = Accelerator(cpu=get_device().type == "cpu")
    if gradient_checkpointing:
        vlm.model.enable_input_require_grads()
        vlm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    random = [p for name, p in vlm.model.named_parameters() if "lora_A" in name]  # B starts at zero
    warn_if_short(nn.ParameterList(random), lr, len(plan), "LoRA")
    weights = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    warmup = math.ceil(warmup_ratio * len(plan))
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=len(plan))
    model = accelerator.prepare_model(vlm.model)
    losses: list[float] = []
    if state := load_checkpoint(checkpoint, vlm.device):
        set_peft_model_state_dict(vlm.model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        losses = state["losses"]
        del state  # its tensors on the device
    model.train()
    for step in progress(range(len(losses), len(plan)), what, unit="step"):
        rows = [triplets[i] for i in plan[step]]
        torch.manual_seed(mixed_seed(seed, step, process_index()))  # of dropout: a killed run goes on with the same
        # the processes' gradients are averaged, the step's loss is their sum
        loss = step_gradients(vlm, rows, see, parts, learn, lambda x: accelerator.backward(x * process_count()), model)
        accelerator.clip_grad_norm_(weights, max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss)
        if checkpoint and is_main() and (step + 1) % max(SAVE_EVERY, len(plan) // 20) == 0:
            state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "losses": losses}
            save_checkpoint(
                checkpoint, {**state, "adapter": get_peft_model_state_dict(vlm.model, save_embedding_layers=False)}
            )
    vlm.model.eval()
    return _curve(losses, len(plan) / epochs)


def _curve(losses: Sequence[float], per_epoch: float, points: int = 40) -> list[dict[str, Any]]:
    """Some 40 points: means of equally many steps."""
    every = max(1, len(losses) // points)
    ends = range(every, len(losses) + 1, every)
    common = {"split": "train", "metric": "loss"}
    return [
        {"epoch": end / per_epoch, "step": end, **common, "value": sum(losses[end - every : end]) / every}
        for end in ends
    ]
