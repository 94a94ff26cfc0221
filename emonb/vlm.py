"""Room 03: the vision-language model. Loading, visual tokens, scored answers, free generation.

Nothing here knows how large the model is: the stand-in and Qwen2-VL-7B take the same path, as do Qwen2.5-VL and
Qwen3-VL. The vision tower is frozen in the paper, so its merged tokens are computed once per picture and handed to
the language model as `mm_encoder_outputs`, transformers' own way in for precomputed visual tokens.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from emonb.data import answer_text, as_seen, open_picture, question
from emonb.errors import EmonbError
from emonb.files import resource
from emonb.machine import get_device, hub_offline
from emonb.settings import checkpoint_of

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft 0.21 asks by the old name

PAPER_BASE = "Qwen/Qwen2-VL-7B-Instruct"
Picture = str | Path | Image.Image


# ---- loading -------------------------------------------------------------------------------------------------------


@dataclass
class VLM:
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL with its processor; pictures are shrunk to `max_side` px (authors' code)."""

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
    def merge_size(self) -> int:
        """Patches along a side of one merged visual token (2 in Qwen2-VL)."""
        return self.core.config.vision_config.spatial_merge_size

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id


def load_vlm(
    base: str = "stand-in",
    *,
    dtype: str = "float32",
    quantize_4bit: bool = False,
    attention: str = "auto",
    max_side: int = 1024,
    adapter: Path | None = None,
) -> VLM:
    """Load a VLM by hub name, local folder or "stand-in", optionally with a LoRA adapter, frozen, on its device.

    Args:
        quantize_4bit: NF4 with double quantisation (authors' code); on CUDA only.
        attention: transformers' name of the attention code; "auto": FlashAttention 2 where it can run, else sdpa.

    Raises:
        EmonbError: weights that are missing, damaged or of another kind of model, with the command that fetches
            them; an option that this machine cannot fulfil.
    """
    if os.environ.get("EMONB_HEADLESS") == "1":  # the runner has its own bar; outputs stay free of others
        transformers.utils.logging.disable_progress_bar()
    device = get_device()
    quantized = quantize_4bit and device.type == "cuda"
    options = {
        "dtype": getattr(torch, dtype),
        "attn_implementation": attention_code(attention, dtype, device),
        "quantization_config": _nf4() if quantized else None,
        **({"device_map": {"": device}} if quantized else {}),
    }
    processor = load_processor(base)
    model, report = _from_pretrained(AutoModelForImageTextToText, base, output_loading_info=True, **options)
    offered = inspect.signature(model.model.forward).parameters if hasattr(model, "model") else {}
    if not {"mm_encoder_outputs", "mm_token_type_ids", "image_grid_thw"} <= set(offered):
        raise _wrong_model(base, f"{type(model).__name__} does not take visual tokens")
    if missing := sorted(report["missing_keys"]):
        raise _missing(base, f"lacks {len(missing)} tensors of the model, first {missing[0]}")
    if not quantized:
        model = model.to(device)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model.name_or_path = base  # peft writes this into adapters: a name, not a path of this machine
    return VLM(model.eval().requires_grad_(False), processor, max_side)


def load_processor(base: str) -> Any:
    """A VLM's processor (tokenizer, image processor, chat template), without its weights; raises as `load_vlm`."""
    processor = _from_pretrained(AutoProcessor, base)
    parts = [getattr(processor, name, None) for name in ("tokenizer", "image_processor", "chat_template")]
    if None in parts:
        raise _wrong_model(base, "its processor lacks a tokenizer, an image processor or a chat template")
    if "<|im_end|>" not in processor.tokenizer.get_vocab():
        raise _wrong_model(base, "its tokenizer does not know <|im_end|>, the end of a Qwen message")
    return processor


def attention_code(attention: str, dtype: str, device: torch.device) -> str:
    """What "auto" means here; raises `EmonbError` where FlashAttention is asked for and cannot run."""
    needs = {
        "a CUDA device": device.type == "cuda",
        "vlm.dtype bfloat16 or float16": dtype != "float32",
        "the package flash-attn (`pip install flash-attn --no-build-isolation`)": is_flash_attn_2_available(),
    }
    lacking = [what for what, there in needs.items() if not there]
    if attention == "auto":
        return "sdpa" if lacking else "flash_attention_2"
    if attention == "flash_attention_2" and lacking:
        raise EmonbError(f"setting vlm.attention: flash_attention_2 needs {', '.join(lacking)}; or write auto")
    return attention


def _nf4() -> BitsAndBytesConfig:
    if not is_bitsandbytes_available():
        raise EmonbError(
            "setting vlm.quantize_4bit: 4-bit loading on CUDA needs bitsandbytes; install it with "
            "`pip install -e '.[gpu]'` in the checkout, or set vlm.quantize_4bit to false"
        )
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options)


def _from_pretrained(kind: Any, base: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(checkpoint_of(base), local_files_only=hub_offline(), **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise _missing(base, f"cannot be loaded ({reason})") from None


def _missing(base: str, problem: str) -> EmonbError:
    name = base if base.count("/") == 1 and not Path(checkpoint_of(base)).is_dir() else PAPER_BASE
    folder = f"models/{name.split('/')[1]}"
    return EmonbError(
        f"setting vlm.base: {base!r} {problem}; fetch it with `hf download {name} --local-dir {folder}` and write "
        f"`vlm: {{base: {folder}}}` into the profile's YAML file. No network here: run the command on a machine that "
        "has one and copy the folder"
    )


def _wrong_model(base: str, problem: str) -> EmonbError:
    return EmonbError(
        f"setting vlm.base: {base!r} cannot be used ({problem}); choose a Qwen2-VL, Qwen2.5-VL or Qwen3-VL "
        f"Instruct model, the paper's is {PAPER_BASE}"
    )


# ---- visual tokens -------------------------------------------------------------------------------------------------


@dataclass
class VisualTokens:
    """All that the language model takes of a batch of pictures: one [n_i, D * L] float16 tensor per picture.

    The first D columns are the merged visual tokens; the others are the deepstack features of Qwen3-VL, side
    by side (L = 1 + their number; L = 1 in Qwen2-VL and Qwen2.5-VL). `grid` holds the [B, 3] patch grids.
    """

    tokens: list[Tensor]
    grid: Tensor
    width: int | None = None  # D; None where L = 1

    def __len__(self) -> int:
        return len(self.grid)

    def pooled(self) -> Tensor:
        """[B, D] mean of each picture's merged tokens: the student's input (paper: distillation)."""
        return torch.stack([t[:, : self.width].float().mean(0) for t in self.tokens])


def shown(image: Picture, max_side: int) -> Image.Image:
    """What the VLM is shown: a picture or a copy of it, at most `max_side` px long (authors' code)."""
    picture = as_seen(image) if isinstance(image, Image.Image) else open_picture(image)
    picture.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return picture


def patches(vlm: VLM, images: Sequence[Picture]) -> tuple[Tensor, Tensor]:
    """Pictures as the vision tower takes them: [sum of patches, P] pixels and [B, 3] patch grids; on the CPU."""
    inputs = vlm.processor.image_processor([shown(image, vlm.max_side) for image in images], return_tensors="pt")
    return inputs["pixel_values"], inputs["image_grid_thw"]


@torch.no_grad()  # not inference_mode: the tokens may become part of a training graph
def visual_tokens(vlm: VLM, images: Sequence[Picture], cut: tuple[Tensor, Tensor] | None = None) -> VisualTokens:
    """One pass of the frozen vision tower and merger.

    The tokens are rounded to float16, the precision they have on disk, so that a cached and a fresh picture give
    the same answer.

    Args:
        cut: their `patches`, where another thread has made them already.
    """
    pixels, grid = cut or patches(vlm, images)
    output = vlm.core.get_image_features(pixels.to(vlm.device), grid.to(vlm.device), return_dict=True)
    levels = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    tokens = [torch.cat([t.half() for t in image], -1) for image in zip(*levels, strict=True)]
    return VisualTokens(tokens, grid.cpu(), vlm.width)


# ---- questions and answers as tokens -------------------------------------------------------------------------------


def prompt_text(vlm: VLM, instruction: str) -> str:
    """The chat prompt for one picture, by the model's own template, ready for an answer."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": resource("prompts.yaml", "system")}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]},
    ]
    return vlm.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prompt_ids(vlm: VLM, instruction: str) -> list[int]:
    """Token ids of the chat prompt, with one placeholder for the picture."""
    return vlm.processor.tokenizer(prompt_text(vlm, instruction), add_special_tokens=False)["input_ids"]


def answer_ids(vlm: VLM, response: str) -> list[int]:
    """Token ids of a response with its end marks."""
    return vlm.processor.tokenizer(response + "<|im_end|>\n", add_special_tokens=False)["input_ids"]


@dataclass
class _ImageOutput(BaseModelOutputWithPooling):
    """What `get_image_features` returns in any of the classes: per level and picture, tokens of [n_i, D]."""

    deepstack_features: list[list[Tensor]] | None = None


def make_batch(
    vlm: VLM, sequences: Sequence[Sequence[int]], visual: VisualTokens, *, pad_left: bool
) -> dict[str, Any]:
    """Model inputs: expand each picture's placeholder to its visual tokens, pad, and add the types.

    Args:
        sequences: B lists of token ids with one placeholder each.
        visual: the B pictures' tokens.
        pad_left: for generation and scoring; training pads on the right.
    """
    expanded = []
    for ids, grid in zip(sequences, visual.grid, strict=True):
        at, count = list(ids).index(vlm.image_token_id), int(grid.prod()) // vlm.merge_size**2
        expanded.append([*ids[:at], *[vlm.image_token_id] * count, *ids[at + 1 :]])
    width = max(map(len, expanded))
    ids = torch.full((len(expanded), width), vlm.processor.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(expanded):
        where = slice(width - len(sequence), width) if pad_left else slice(0, len(sequence))
        ids[row, where] = torch.tensor(sequence)
        mask[row, where] = 1
    device, dtype = vlm.device, vlm.core.get_input_embeddings().weight.dtype
    merged, *deep = zip(*(t.to(device, dtype).split(vlm.width, -1) for t in visual.tokens), strict=True)
    output = _ImageOutput(pooler_output=list(merged), deepstack_features=[list(x) for x in deep] or None)
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "mm_token_type_ids": (ids == vlm.image_token_id).int().to(device),
        "image_grid_thw": visual.grid.to(device),
        "mm_encoder_outputs": {"image": output},
    }


# ---- answers -------------------------------------------------------------------------------------------------------


def answer_tokens(
    vlm: VLM, labels: Sequence[str], instruction: str | None = None
) -> tuple[list[int], list[list[int]]]:
    """Prompt ids up to where the candidate answers differ, and each candidate's own token ids.

    The candidates' common end (the closing quote and brace) is left out unless one label's tokens begin
    another's, so that the candidates' probabilities are those of distinct continuations.
    """
    encode = vlm.processor.tokenizer
    answers = [encode(answer_text(label), add_special_tokens=False)["input_ids"] for label in labels]
    start = common_start(answers)
    tails = [a[start:] for a in answers]
    end = common_start([t[::-1] for t in tails])
    cut = [t[: len(t) - end] for t in tails]
    distinct = all(a != b[: len(a)] for i, a in enumerate(cut) for j, b in enumerate(cut) if i != j)
    return [*prompt_ids(vlm, instruction or question(labels)), *answers[0][:start]], cut if distinct else tails


def common_start(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning."""
    differs = (i for i, column in enumerate(zip(*sequences, strict=False)) if len(set(column)) > 1)
    return next(differs, min(map(len, sequences)))


@torch.inference_mode()
def answer_distribution(
    vlm: VLM, visual: VisualTokens, labels: Sequence[str], instruction: str | None = None
) -> Tensor:
    """[B, C] log-probabilities of the C candidate answers, unnormalised over the candidates.

    One forward of the shared prefix; labels of several tokens are finished on its KV cache. Deterministic
    and always parseable, where the authors sample up to 256 tokens at temperature 0.8 (our choice).
    """
    prefix, tails = answer_tokens(vlm, labels, instruction)
    batch = make_batch(vlm, [prefix] * len(visual), visual, pad_left=True)
    longest = max(map(len, tails))
    output = vlm.model(**batch, use_cache=longest > 1, logits_to_keep=1)
    first = output.logits[:, -1].float().log_softmax(-1)  # [B, V]
    scores = first[:, [t[0] for t in tails]]
    return scores if longest == 1 else scores + rest_of_answers(vlm, batch, output.past_key_values, tails)


def rest_of_answers(vlm: VLM, batch: dict[str, Any], cache: Any, tails: Sequence[Sequence[int]]) -> Tensor:
    """[B, C] log-probabilities of the candidates' tokens after the first, on the prefix's KV cache."""
    rows, count, width = len(batch["input_ids"]), len(tails), max(map(len, tails)) - 1
    padded = torch.tensor([(t + [0] * width)[: width + 1] for t in tails], device=vlm.device)
    real = torch.tensor([[k + 1 < len(t) for k in range(width)] for t in tails], device=vlm.device)
    cache.batch_repeat_interleave(count)
    mask = batch["attention_mask"].repeat_interleave(count, 0)
    start = batch["attention_mask"].sum(1, keepdim=True) + vlm.core.rope_deltas
    positions = (start + torch.arange(width, device=vlm.device)).repeat_interleave(count, 0)
    output = vlm.model(
        input_ids=padded[:, :width].repeat(rows, 1),
        attention_mask=torch.cat([mask, mask.new_ones(rows * count, width)], 1),
        position_ids=positions.expand(3, -1, -1),
        past_key_values=cache,
        use_cache=True,
    )
    logp = output.logits.float().log_softmax(-1).view(rows, count, width, -1)
    more = logp.gather(-1, padded[:, 1:].expand(rows, -1, -1)[..., None])[..., 0]
    return (more * real).sum(-1)


@torch.inference_mode()
def generate(vlm: VLM, images: Sequence[Picture], instruction: str, max_new_tokens: int) -> list[str]:
    """Greedy free answers, through the processor and `generate` as anyone would call them."""
    pictures = [shown(image, vlm.max_side) for image in images]
    tokenizer = vlm.processor.tokenizer
    tokenizer.padding_side = "left"
    text = [prompt_text(vlm, instruction)] * len(pictures)
    inputs = vlm.processor(images=pictures, text=text, padding=True, return_tensors="pt").to(vlm.device)
    output = vlm.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
