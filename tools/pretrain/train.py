"""Pre-training of the stand-in: a vision tower that names what it sees, then a language model on top.

Stage A: each of the 16 merged visual tokens names what it covers (glyph, or nothing) and the background behind it
(hue, brightness, texture, light, colourfulness) by its product with the words' embeddings.
Stage B: the tower is frozen, its tokens are computed once, and the language model learns the dialogues of
`lessons`. Everything follows from one seed (our choice throughout: Qwen2-VL's own pre-training is not repeatable on a
laptop; the principle kept is that no emotion of a scene is ever shown).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids

from emonb.progress import progress
from emonb.world import SIDE
from tools.pretrain.checkpoint import MERGE, PATCH, build_processor, model_config, save
from tools.pretrain.lessons import (
    CELLS,
    Encoder,
    Pool,
    caption_dialogue,
    draw_pool,
    image_dialogue,
    name_groups,
    text_dialogue,
)

POOL, STEPS_A, STEPS_B = 40_000, 3800, 2000  # chosen for 25 minutes on two cores
BATCH_A, LR_A = 48, 3e-3
BATCH_B, LR_B = (32, 20, 12), 2e-3  # captions, questions, text alone
Log = Callable[[str], None]
Pixels = tuple[Tensor, Tensor]  # mean and deviation per channel


def rebuild(
    folder: Path,
    *,
    seed: int = 0,
    steps_a: int = STEPS_A,
    steps_b: int = STEPS_B,
    pool: int = POOL,
    measure: bool = True,
    log: Log = print,
) -> Path:
    """Make the base again from a seed and write it, its model card and provenance to `folder`.

    Args:
        folder: the checkpoint's folder; files of the same names are replaced when all is done.
        seed: decides pool, weights and order.
        steps_a: optimiser steps of the vision tower.
        steps_b: optimiser steps of the language model.
        pool: scenes to draw.
        measure: whether to measure the health for the model card (half a minute).
        log: takes one line of text at a time.

    Returns:
        The folder.
    """
    from tools.pretrain.health import measure_health, write_card

    torch.manual_seed(seed)
    processor = build_processor()
    model = Qwen2VLForConditionalGeneration(model_config(processor.tokenizer))
    pixels = pixel_statistics(processor)
    marks = [("pool", time.monotonic())]
    scenes = draw_pool(pool, seed)
    marks.append(("stage_a", time.monotonic()))
    train_tower(model, scenes, pixels, steps_a, seed, log)
    marks.append(("stage_b", time.monotonic()))
    tokens = visual_tokens(model, scenes.patches, pixels)
    train_language(model, scenes, tokens, steps_b, seed, log)
    marks.append(("end", time.monotonic()))
    seconds = {name: round(after - at) for (name, at), (_, after) in pairwise(marks)}
    save(folder, model.eval(), processor)
    health = measure_health(folder, seed + 1, log) if measure else {}
    write_card(folder, {"seed": seed, "pool": pool, "steps_a": steps_a, "steps_b": steps_b}, seconds, health)
    return folder


def pixel_statistics(processor: Qwen2VLProcessor) -> Pixels:
    """Mean and spread per channel by which the processor normalises pictures."""
    return tuple(torch.tensor(getattr(processor.image_processor, f"image_{x}")) for x in ("mean", "std"))


# ---- stage A: the vision tower -------------------------------------------------------------------------------------


def train_tower(
    model: Qwen2VLForConditionalGeneration, pool: Pool, pixels: Pixels, steps: int, seed: int, log: Log
) -> None:
    """Stage A: every visual token names its glyph and its background."""
    encoder, groups, embedding = Encoder(), name_groups(), model.get_input_embeddings()
    parameters = [*model.model.visual.parameters(), embedding.weight]
    optimizer, schedule = _optimizer(parameters, LR_A, steps)
    nothing, began = len(groups["glyph"]) - 1, time.monotonic()
    batches = shuffled(len(pool), min(BATCH_A, len(pool)), np.random.default_rng([seed, 1]))

    def scores(tokens: Tensor, group: str) -> Tensor:  # (B * 16, names)
        names = [embedding.weight[encoder.words(name)].mean(0) for name in groups[group]]
        return (tokens @ torch.stack(names).T).flatten(0, 1)

    for step in progress(range(steps), "stage A, vision tower"):
        rows = next(batches)
        tokens = F.layer_norm(tower(model.model.visual, pool.patches[rows], *pixels), (embedding.embedding_dim,))
        target = pool.glyphs[rows].flatten()
        each = F.cross_entropy(scores(tokens, "glyph"), target, reduction="none")
        glyph = each[target != nothing].mean()
        loss = glyph + 0.3 * each[target == nothing].mean()
        for group, wanted in pool.background.items():
            loss = loss + 0.25 * F.cross_entropy(scores(tokens, group), wanted[rows].repeat_interleave(CELLS))
        _step(loss, parameters, optimizer, schedule)
        if step % 100 == 0 or step == steps - 1:
            log(f"A {step}/{steps} loss {loss.item():.3f} glyph {glyph.item():.3f} {time.monotonic() - began:.0f} s")


def tower(visual: nn.Module, patches: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Merged visual tokens (B, 16, hidden) of uint8 patches (B, 64, 432).

    The same arithmetic as `visual(pixel_values, grid_thw)`, but all pictures in one attention call instead of
    one call each, and the two identical frames of a still picture folded into one (a test compares both).
    """
    b, n, _ = patches.shape
    x = patches.float().view(b, n, 3, -1) / 255
    x = ((x - mean.view(3, 1)) / std.view(3, 1)).flatten(2)
    h = F.linear(x, visual.patch_embed.proj.weight.sum(2).flatten(1))
    grid = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]])
    cos, sin = visual.rotary_pos_emb(h, get_vision_position_ids(grid, MERGE))
    for block in visual.blocks:
        heads = block.attn.num_heads
        q, key, v = block.attn.qkv(block.norm1(h)).view(b, n, 3, heads, -1).unbind(2)
        q, key = apply_rotary_pos_emb_vision(q, key, cos, sin)
        q, key, v = (t.transpose(1, 2) for t in (q, key, v))
        mixed = F.scaled_dot_product_attention(q, key, v).transpose(1, 2).reshape(b, n, -1)
        h = h + block.attn.proj(mixed)
        h = h + block.mlp(block.norm2(h))
    return visual.merger(h).view(b, CELLS, -1)


@torch.no_grad()
def visual_tokens(model: Qwen2VLForConditionalGeneration, patches: Tensor, pixels: Pixels) -> Tensor:
    """Merged tokens (N, 16, hidden) of all patches, in batches."""
    return torch.cat([tower(model.model.visual, part, *pixels) for part in patches.split(256)])


# ---- stage B: the language model -----------------------------------------------------------------------------------


def train_language(
    model: Qwen2VLForConditionalGeneration, pool: Pool, tokens: Tensor, steps: int, seed: int, log: Log
) -> None:
    """Stage B: captions, questions and common sense on the frozen tower's tokens."""
    encoder, rng, began = Encoder(), np.random.default_rng([seed, 2]), time.monotonic()
    parameters = [p for n, p in model.named_parameters() if ".visual." not in n]
    optimizer, schedule = _optimizer(parameters, LR_B, steps)
    captions, questions, texts = BATCH_B
    batches = shuffled(len(pool), min(captions + questions, len(pool)), np.random.default_rng([seed, 3]))
    for step in progress(range(steps), "stage B, language model"):
        rows = next(batches)
        parts = [(caption_dialogue, rows[:captions], 1.0), (image_dialogue, rows[captions:], 0.6)]
        losses = []
        for make, chosen, weight in parts:
            encoded = [encoder.encode(make(rng, pool.seen[i]), True) for i in chosen.tolist()]
            if encoded:
                losses.append(weight * dialogue_loss(model, encoded, tokens[chosen]))
        encoded = [encoder.encode(text_dialogue(rng), False) for _ in range(texts)]
        losses.append(0.4 * dialogue_loss(model, encoded, None))
        _step(sum(losses), parameters, optimizer, schedule)
        if step % 100 == 0 or step == steps - 1:
            shown = " ".join(f"{x.item():.3f}" for x in losses)
            log(f"B {step}/{steps} losses {shown} {time.monotonic() - began:.0f} s")


def dialogue_loss(
    model: Qwen2VLForConditionalGeneration, encoded: list[tuple[list[int], list[int]]], tokens: Tensor | None
) -> Tensor:
    """Mean cross-entropy of the answers of right-padded dialogues; `tokens` (B, 16, hidden) for pictures."""
    width = max(len(ids) for ids, _ in encoded)
    pad = model.config.text_config.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in encoded])
    learn = torch.tensor([row + [0] * (width - len(row)) for _, row in encoded]).bool()
    embeds = model.get_input_embeddings()(ids)
    image = ids == model.config.image_token_id
    if tokens is not None:
        embeds = embeds.masked_scatter(image[..., None], tokens.flatten(0, 1))
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=positions(ids, model.config.image_token_id), use_cache=False
    ).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden[:, :-1][learn[:, 1:]]), ids[:, 1:][learn[:, 1:]])


def positions(ids: Tensor, image_token: int) -> Tensor:
    """Qwen2-VL's (3, B, T) rotary positions for rows that hold at most one square picture of 16 tokens."""
    side = int(CELLS**0.5)
    image = (ids == image_token).long()
    order = image.cumsum(1) - 1  # 0..15 inside the picture
    text = torch.arange(ids.shape[1]).expand_as(ids)
    first = torch.where(image.any(1), image.argmax(1), ids.shape[1])[:, None]
    after = (text >= first + CELLS).long()
    flat = text - after * (CELLS - side)  # the picture takes `side` positions, not 16
    inside = (first, first + order // side, first + order % side)  # time, height, width
    return torch.stack([torch.where(image.bool(), axis, flat) for axis in inside])


# ---- steps ---------------------------------------------------------------------------------------------------------


def _optimizer(parameters: list[nn.Parameter], lr: float, steps: int):
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    warm = max(1, min(100, steps // 10))

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + np.cos(np.pi * min(1.0, step / steps))) + 1e-3)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def shuffled(size: int, batch: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Endless shuffled index batches, each pass over the pool in a new order."""
    left = np.empty(0, np.int64)
    while True:
        if len(left) < batch:
            left = np.concatenate([left, rng.permutation(size)])
        yield torch.from_numpy(left[:batch].copy())
        left = left[batch:]


def _step(loss: Tensor, parameters: list[nn.Parameter], optimizer, schedule) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
