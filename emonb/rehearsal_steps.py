"""A few real steps of every stage of the VLM, timed: what `emonb.rehearsal` runs at each depth.

The package's own functions are called wherever a stage has one for a single step. Each function here returns seconds
per unit by cost name (see `emonb.projection.ours`), seconds of the
stage's own `step`, and the batch that fitted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from emonb.rehearsal_bench import Bench, Step
from emonb.triplets import categorical_instruction, load_prompts
from emonb.tuning import IGNORE, add_lora, response_loss
from emonb.vlm import VLM, answer_distribution, dialogue_ids, make_batch, visual_tokens

__all__ = ["VLM_STEPS"]


def features(bench: Bench) -> tuple[dict[str, float], int]:
    """Vision tower and merger, with the picture's scaling and patching before them."""
    seconds, batch = bench.halved(
        lambda n: bench.time(lambda: visual_tokens(bench.vlm, [bench.picture] * n)), bench.batch
    )
    bench.notes["visual_tokens"] = len(bench.tokens(1).tokens[0])
    return {"tower": seconds / batch, "step": seconds}, batch


def score(bench: Bench) -> tuple[dict[str, float], int]:
    """The answer distribution of the base model."""
    seconds, batch = _score(bench, bench.vlm)
    return {"score": seconds / batch, "step": seconds}, batch


def score_tuned(bench: Bench) -> tuple[dict[str, float], int]:
    """The answer distribution with a LoRA adapter on the model."""
    with _tuned(bench) as tuned:
        seconds, batch = _score(bench, tuned)
    return {"score_tuned": seconds / batch, "step": seconds}, batch


def _score(bench: Bench, vlm: VLM) -> tuple[float, int]:
    """Labels of two words each: with the real tokenizer most labels have several tokens, which costs a second pass."""
    labels = [f"{label} {other}" for label, other in zip(bench.labels, bench.labels[::-1], strict=True)]

    def measure(batch: int) -> float:
        visual = bench.tokens(batch)
        return bench.time(lambda: answer_distribution(vlm, visual, labels))

    return bench.halved(measure, bench.batch)


def lora(bench: Bench) -> tuple[dict[str, float], int]:
    """Forward and backward of micro-batches with gradient checkpointing as set, and one optimizer update."""
    config = bench.settings.vlm

    def measure(batch: int) -> float:
        inputs = _training_batch(bench, batch)
        return bench.time(lambda: _backward(tuned, inputs, config.gradient_accumulation))

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()

    with _tuned(bench) as tuned:
        tuned.model.train()
        if config.gradient_checkpointing:
            tuned.model.get_base_model().activation_checkpointing_enable()
        trained = [p for p in tuned.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.lr)
        try:
            seconds, batch = bench.halved(measure, config.train_batch_size)
            change = bench.time(update)
        finally:
            optimizer.zero_grad()
            tuned.model.eval()
    step = seconds / batch * config.train_batch_size * config.gradient_accumulation + change
    return {"lora": seconds / batch, "lora_update": change, "step": step}, batch


def _training_batch(bench: Bench, batch: int) -> dict[str, Any]:
    """Sequences of the longest kind: the reasons, four sentences as the annotator is asked for."""
    prompts = load_prompts()["reasoning"]
    response = " ".join(list(prompts["closing"].values())[:4])
    prompt, answer = dialogue_ids(bench.vlm, prompts["instructions"][0], response)
    inputs = make_batch(bench.vlm, [prompt + answer] * batch, bench.tokens(batch), pad_left=False)
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    labels[:, -len(answer) :] = inputs["input_ids"][:, -len(answer) :]
    bench.notes["sequence_tokens"] = labels.shape[1]
    return {**inputs, "labels": labels, "use_cache": False}


def _backward(vlm: VLM, inputs: dict[str, Any], accumulation: int) -> None:
    labels = inputs["labels"]
    outputs = vlm.model(**{name: value for name, value in inputs.items() if name != "labels"})
    loss = response_loss(outputs, labels, int((labels != IGNORE).sum()) * accumulation)
    loss.backward()
    if not loss.isfinite():
        raise FloatingPointError("the loss of random weights is not finite")


def generate(bench: Bench) -> tuple[dict[str, float], int]:
    """One image at a time (authors' code): the prompt, then sampled tokens on the KV cache."""
    prompt, _ = dialogue_ids(bench.vlm, categorical_instruction(bench.labels))
    tokenizer = bench.vlm.processor.tokenizer
    answer = load_prompts()["categorical"]["response"].format(label="anger") + "<|im_end|>"
    bench.notes["shortest_answer"] = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    with _tuned(bench) as tuned, torch.inference_mode():
        batch = make_batch(tuned, [prompt], bench.tokens(1), pad_left=True)
        bench.notes["prompt_tokens"] = batch["input_ids"].shape[1]
        prefill = bench.time(lambda: tuned.model(**batch, use_cache=True, logits_to_keep=1))
        output = tuned.model(**batch, use_cache=True, logits_to_keep=1)
        place = (batch["attention_mask"].sum(1, keepdim=True) + tuned.core.rope_deltas).expand(3, -1, -1)
        state = {"logits": output.logits, "place": place}

        def token() -> None:
            chances = (state["logits"][:, -1].float() / 0.8).softmax(-1)  # authors' code: temperature 0.8
            state["logits"] = tuned.model(
                input_ids=torch.multinomial(chances, 1),
                position_ids=state["place"],
                past_key_values=output.past_key_values,
                use_cache=True,
            ).logits
            state["place"] = state["place"] + 1

        seconds = bench.time(token)
    return {"prefill": prefill, "token": seconds, "step": prefill + bench.notes["shortest_answer"] * seconds}, 1


@contextmanager
def _tuned(bench: Bench) -> Iterator[VLM]:
    """The model with a fresh LoRA adapter, and without it afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 switches checkpointing on by its old name
        tuned = add_lora(bench.vlm, bench.settings.vlm)
    try:
        tuned.model.eval()
        yield tuned
    finally:
        bench.vlm.model = tuned.model.unload().requires_grad_(False)


VLM_STEPS = {
    "features": Step(features, {"tower": "image"}, tower=True),
    "zero-shot answers": Step(score, {"score": "image"}),
    "LoRA": Step(lora, {"lora": "sequence", "lora_update": "optimizer update"}),
    "tuned answers": Step(score_tuned, {"score_tuned": "image"}),
    "generation": Step(generate, {"prefill": "image", "token": "token"}),
}
