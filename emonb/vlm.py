"""Room 03, first half: the vision-language model. Visual tokens, scored answers, free generation.

Nothing here knows how large the model is: the stand-in and Qwen2-VL-7B take the same path. The vision
tower is frozen in the paper, so its merged tokens are computed once per image and handed to the
language model as `mm_encoder_outputs`, transformers' own way in for precomputed visual tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from emonb.checkpoints import load_model, load_processor
from emonb.settings import VLMSettings
from emonb.triplets import categorical_instruction, load_prompts
from emonb.visual import PictureInputs, VisualTokens, picture_inputs, shown

__all__ = [
    "VLM",
    "PictureInputs",
    "VisualTokens",
    "answer_distribution",
    "answer_ids",
    "answer_tokens",
    "dialogue_ids",
    "generate",
    "load_processor",
    "load_vlm",
    "make_batch",
    "picture_inputs",
    "prompt_text",
    "visual_tokens",
]

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft 0.21 asks by the old name


@dataclass
class VLM:
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL with its processor."""

    model: Any  # transformers model, or a PeftModel around it
    processor: Any
    max_side: int

    @property
    def core(self) -> Any:
        """The `...Model` that holds `visual` and `language_model`, under LoRA or not."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return model.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        """Width D of a merged visual token, which is that of the language model."""
        return self.core.config.text_config.hidden_size

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id


@dataclass
class _ImageOutput(BaseModelOutputWithPooling):
    """What `get_image_features` returns in any of the classes: per level and image, tokens of (n_i, D)."""

    deepstack_features: list[list[torch.Tensor]] | None = None


def load_vlm(settings: VLMSettings, adapter: Path | None = None) -> VLM:
    """Load the base VLM, by hub name, local folder or "stand-in", optionally with a LoRA adapter.

    Raises:
        EmonbError: weights that are not on this machine, with the command that fetches them.
    """
    processor, model = load_processor(settings), load_model(settings)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model.name_or_path = settings.base  # peft writes this into adapters: a name, not a path of this machine
    return VLM(model.eval().requires_grad_(False), processor, settings.max_side)


@torch.no_grad()  # not inference_mode: the tokens may become part of a training graph
def visual_tokens(vlm: VLM, images: Sequence[str | Path | Image.Image] | PictureInputs) -> VisualTokens:
    """One pass of the frozen vision tower and merger.

    The tokens are rounded to float16, the precision they have on disk, so that a cached and a fresh
    image give the same answer.
    """
    inputs = images if isinstance(images, PictureInputs) else picture_inputs(vlm.processor, images, vlm.max_side)
    pixels, grid = inputs.pixel_values.to(vlm.device), inputs.grid.to(vlm.device)
    output = vlm.core.get_image_features(pixels, grid, return_dict=True)
    levels = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    tokens = [torch.cat([t.half() for t in image], -1) for image in zip(*levels, strict=True)]
    return VisualTokens(tokens, inputs.grid.cpu(), vlm.width)


def prompt_text(vlm: VLM, instruction: str) -> str:
    """The chat prompt for one image, by the model's own template, ready for an answer."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": load_prompts()["system"]}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]},
    ]
    return vlm.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def dialogue_ids(vlm: VLM, instruction: str, response: str | None = None) -> tuple[list[int], list[int]]:
    """Token ids of the chat prompt (one image placeholder) and of the response with its end marks."""
    tokenizer = vlm.processor.tokenizer
    ids = tokenizer(prompt_text(vlm, instruction), add_special_tokens=False)["input_ids"]
    return ids, [] if response is None else answer_ids(vlm, response)


def answer_ids(vlm: VLM, response: str) -> list[int]:
    """Token ids of a response with its end marks."""
    return vlm.processor.tokenizer(response + "<|im_end|>\n", add_special_tokens=False)["input_ids"]


def make_batch(
    vlm: VLM, sequences: Sequence[Sequence[int]], visual: VisualTokens | PictureInputs, *, pad_left: bool
) -> dict[str, Any]:
    """Model inputs: expand each image placeholder to its visual tokens, pad, and add the types.

    Args:
        sequences: B lists of token ids with one image placeholder each.
        visual: the B images' tokens; or their pixels, so that the model's own forward runs the vision tower:
            under FSDP and DeepSpeed ZeRO-3 a part of the model cannot be called alone.
        pad_left: for generation and scoring; training pads on the right.
    """
    merge = vlm.core.config.vision_config.spatial_merge_size**2
    expanded = []
    for ids, grid in zip(sequences, visual.grid, strict=True):
        at = list(ids).index(vlm.image_token_id)
        expanded.append([*ids[:at], *[vlm.image_token_id] * (int(grid.prod()) // merge), *ids[at + 1 :]])
    width = max(map(len, expanded))
    pad = vlm.processor.tokenizer.pad_token_id
    ids = torch.full((len(expanded), width), pad)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(expanded):
        where = slice(width - len(sequence), width) if pad_left else slice(0, len(sequence))
        ids[row, where] = torch.tensor(sequence)
        mask[row, where] = 1
    device = vlm.device
    batch = {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "mm_token_type_ids": (ids == vlm.image_token_id).int().to(device),
        "image_grid_thw": visual.grid.to(device),
    }
    if isinstance(visual, PictureInputs):
        return {**batch, "pixel_values": visual.pixel_values.to(device)}
    return {**batch, "mm_encoder_outputs": {"image": _image_output(vlm, visual)}}


def _image_output(vlm: VLM, visual: VisualTokens) -> _ImageOutput:
    """Stored tokens in the form in which the model's forward takes them."""
    dtype = vlm.core.get_input_embeddings().weight.dtype
    merged, *deep = zip(*(t.to(vlm.device, dtype).split(vlm.width, -1) for t in visual.tokens), strict=True)
    return _ImageOutput(pooler_output=list(merged), deepstack_features=[list(x) for x in deep] or None)


def answer_tokens(
    vlm: VLM, labels: Sequence[str], instruction: str | None = None
) -> tuple[list[int], list[list[int]]]:
    """Prompt ids up to where the candidate answers differ, and each candidate's own token ids.

    The candidates' common end (the closing quote and brace) is left out unless one label's tokens begin
    another's, so that the candidates' probabilities are those of distinct continuations.
    """
    frame = load_prompts()["categorical"]["response"]
    prompt, _ = dialogue_ids(vlm, instruction or categorical_instruction(labels))
    encode = vlm.processor.tokenizer
    answers = [encode(frame.format(label=x), add_special_tokens=False)["input_ids"] for x in labels]
    start = _common(answers)
    tails = [a[start:] for a in answers]
    end = _common([t[::-1] for t in tails])
    cut = [t[: len(t) - end] for t in tails]
    distinct = all(a != b[: len(a)] for i, a in enumerate(cut) for j, b in enumerate(cut) if i != j)
    return [*prompt, *answers[0][:start]], cut if distinct else tails


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning."""
    length = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


@torch.inference_mode()
def answer_distribution(
    vlm: VLM, visual: VisualTokens | PictureInputs, labels: Sequence[str], instruction: str | None = None
) -> torch.Tensor:
    """(B, C) log-probabilities of the C candidate answers, unnormalised over the candidates.

    One forward of the shared prefix; labels of several tokens are finished on its KV cache. Deterministic
    and always parseable, where the authors sample up to 256 tokens at temperature 0.8 (our choice).
    """
    prefix, tails = answer_tokens(vlm, labels, instruction)
    batch = make_batch(vlm, [prefix] * len(visual), visual, pad_left=True)
    longest = max(map(len, tails))
    output = vlm.model(**batch, use_cache=longest > 1, logits_to_keep=1)
    first = output.logits[:, -1].float().log_softmax(-1)
    scores = first[:, [t[0] for t in tails]]
    if longest == 1:
        return scores
    count, device = len(tails), scores.device
    width = longest - 1
    ids = torch.tensor([(t + [0] * longest)[:width] for t in tails], device=device)
    wanted = torch.tensor([(t + [0] * longest)[1:longest] for t in tails], device=device)
    real = torch.tensor([[k + 1 < len(t) for k in range(width)] for t in tails], device=device)
    cache = output.past_key_values
    cache.batch_repeat_interleave(count)
    mask = batch["attention_mask"].repeat_interleave(count, 0)
    start = batch["attention_mask"].sum(1, keepdim=True) + vlm.core.rope_deltas
    positions = (start + torch.arange(width, device=device)).repeat_interleave(count, 0)
    rows = len(visual)
    output = vlm.model(
        input_ids=ids.repeat(rows, 1),
        attention_mask=torch.cat([mask, mask.new_ones(rows * count, width)], 1),
        position_ids=positions.expand(3, -1, -1),
        past_key_values=cache,
        use_cache=True,
    )
    logp = output.logits.float().log_softmax(-1).view(rows, count, width, -1)
    more = logp.gather(-1, wanted.expand(rows, -1, -1)[..., None])[..., 0]
    return scores + (more * real).sum(-1)


@torch.inference_mode()
def generate(vlm: VLM, images: Sequence[str | Path | Image.Image], instruction: str, max_new_tokens: int) -> list[str]:
    """Greedy free answers, through the processor and `generate` as anyone would call them."""
    pictures = [shown(image, vlm.max_side) for image in images]
    tokenizer = vlm.processor.tokenizer
    tokenizer.padding_side = "left"
    text = [prompt_text(vlm, instruction)] * len(pictures)
    inputs = vlm.processor(images=pictures, text=text, padding=True, return_tensors="pt")
    inputs = inputs.to(vlm.device)
    output = vlm.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
