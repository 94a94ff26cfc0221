"""Room 03: the vision-language model. Loading, visual tokens, scored answers, free generation.

Nothing here knows how large the model is or, but for `docs/models.md`'s few differences, of which class: the stand-in,
Qwen2-VL-7B and SmolVLM take the same path. Its processor says how a picture stands in a prompt. The vision tower is
frozen in the paper, so its tokens are computed once per picture and handed to the language model as
`mm_encoder_outputs`, transformers' own way in for precomputed visual tokens.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PaliGemmaProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from emonb.data import answer_text, as_seen, open_picture, question
from emonb.errors import EmonbError
from emonb.files import resource
from emonb.machine import get_device, hub_offline
from emonb.settings import checkpoint_of

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft 0.21 asks by the old name

PAPER_BASE = "Qwen/Qwen2-VL-7B-Instruct"
CLASSES = (  # transformers' model_type: each is tested, others are refused (docs/models.md)
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "smolvlm", "idefics3", "llava", "llava_next"),
    *("llava_onevision", "gemma3", "internvl", "paligemma"),
)
Picture = str | Path | Image.Image


# ---- loading -------------------------------------------------------------------------------------------------------


@dataclass
class VLM:
    """A model of one of `CLASSES` with its processor; pictures are shrunk to `max_side` px (authors' code)."""

    model: Any  # transformers model, or a PeftModel around it
    processor: Any
    max_side: int

    @property
    def core(self) -> Any:
        """The `...Model` that holds vision tower and language model, under LoRA or not."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return model.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def language(self) -> Any:
        """The language model, without its output matrix."""
        return self.core.get_decoder()

    @property
    def width(self) -> int:
        """Width D of a merged visual token, which is that of the language model."""
        return self.core.config.get_text_config().hidden_size

    @property
    def merge_size(self) -> int:
        """Patches of `VisualTokens.grid` along a side of one visual token (2 in Qwen2-VL)."""
        return getattr(self.core.config.vision_config, "spatial_merge_size", 1)

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def placeholder_id(self) -> int:
        """What stands for a whole picture in `prompt_ids`: in most classes the same token."""
        return self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)


def load_vlm(
    base: str = "stand-in",
    *,
    dtype: str = "float32",
    quantize_4bit: bool = False,
    attention: str = "auto",
    max_side: int = 1024,
    processor: Mapping[str, Any] | None = None,
    adapter: Path | None = None,
) -> VLM:
    """Load a VLM by hub name, local folder or "stand-in", optionally with a LoRA adapter, frozen, on its device.

    Args:
        quantize_4bit: NF4 with double quantisation (authors' code); on CUDA only.
        attention: transformers' name of the attention code; "auto": FlashAttention 2 where it can run, else sdpa.
        processor: options of the image processor that differ from its file, as of `load_processor`.

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
    if (kind := _from_pretrained(AutoConfig, base).model_type) not in CLASSES:
        raise _wrong_model(base, f"a {kind} is not known to take visual tokens")
    taught = load_processor(base, processor)
    model, report = _from_pretrained(AutoModelForImageTextToText, base, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise _missing(base, f"lacks {len(missing)} tensors of the model, first {missing[0]}")
    if not quantized:
        model = model.to(device)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model.name_or_path = base  # peft writes this into adapters: a name, not a path of this machine
    return VLM(model.eval().requires_grad_(False), taught, max_side)


def load_processor(base: str, options: Mapping[str, Any] | None = None) -> Any:
    """A VLM's processor (tokenizer, image processor, chat template), without its weights; raises as `load_vlm`.

    `options` of its image processor differ from its file: `do_image_splitting: false`, say, for one view a picture.
    """
    processor = _from_pretrained(AutoProcessor, base)
    parts = [getattr(processor, name, None) for name in ("tokenizer", "image_processor", "image_token")]
    if None in parts or not (processor.chat_template or isinstance(processor, PaliGemmaProcessor)):
        raise _wrong_model(base, "its processor lacks a tokenizer, an image processor or a chat template")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    own = processor.image_processor.to_dict()
    if odd := ", ".join(sorted({*(options or {})} - {*own})):
        known = ", ".join(sorted(name for name in own if name.startswith(("do_", "size", "max_", "min_"))))
        raise EmonbError(f"setting vlm.processor: {odd}: {base!r} has no such option; it has {known}")
    if options:
        processor.image_processor = type(processor.image_processor).from_dict(own | {**options})
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
    except ImportError as error:
        raise EmonbError(f"setting vlm.base: {base!r} needs another package: {' '.join(str(error).split())}") from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
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
        f"setting vlm.base: {base!r} cannot be used ({problem}); choose an instruction-tuned model of "
        f"{', '.join(CLASSES)}; the paper's is {PAPER_BASE}"
    )


# ---- visual tokens -------------------------------------------------------------------------------------------------


@dataclass
class VisualTokens:
    """All that the language model takes of a batch of pictures: one [n_i, D * L] float16 tensor per picture.

    The first D columns are the merged visual tokens; the others are the deepstack features of Qwen3-VL, side
    by side (L = 1 + their number; L = 1 in all other classes). `grid` holds the [B, 3] patch grids of the Qwen
    classes, and [B, 1] numbers of tokens of others. `frames`: token ids that stand for each picture in a prompt, with
    one for a run of visual tokens; SmolVLM, say, marks the parts into which it cuts a picture.
    """

    tokens: list[Tensor]
    grid: Tensor
    width: int | None = None  # D; None where L = 1
    frames: list[list[int]] | None = None  # None: nothing but visual tokens

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


def patches(vlm: VLM, images: Sequence[Picture]) -> dict[str, Any]:
    """Pictures as the vision tower takes them, by the names of its arguments, on the CPU; with `counts`, `frames`."""
    processor, image = vlm.processor, vlm.image_token_id
    options = {"padding": True, "return_tensors": "pt", "return_text_replacement_offsets": True}
    pictures, text = [[shown(i, vlm.max_side)] for i in images], [processor.image_token] * len(images)
    inputs = dict(processor(images=pictures, text=text, **options))
    places = [found[0]["replacement"].strip() for found in inputs.pop("text_replacement_offsets")]
    rows = processor.tokenizer(places, add_special_tokens=False)["input_ids"]
    runs = [[(token, len([*run])) for token, run in groupby(row)] for row in rows]
    frames = [[t for token, n in found for t in [token] * (1 if token == image else n)] for found in runs]
    counts = torch.tensor([row.count(image) for row in rows])
    return {**inputs, "counts": counts, "frames": frames if any(len(f) > 1 for f in frames) else None}


@torch.no_grad()  # not inference_mode: the tokens may become part of a training graph
def visual_tokens(vlm: VLM, images: Sequence[Picture], cut: dict[str, Any] | None = None) -> VisualTokens:
    """One pass of the frozen vision tower and merger.

    The tokens are rounded to float16, the precision they have on disk, so that a cached and a fresh picture give
    the same answer.

    Args:
        cut: their `patches`, where another thread has made them already.
    """
    inputs = cut or patches(vlm, images)
    taken = inspect.signature(vlm.core.get_image_features).parameters.keys() & inputs
    output = vlm.core.get_image_features(**{k: inputs[k].to(vlm.device) for k in taken}, return_dict=True)
    levels = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]  # by picture, or in one
    flat = torch.cat([torch.cat([t.reshape(-1, t.shape[-1]) for t in level]).half() for level in levels], -1)
    if len(flat) != inputs["counts"].sum():
        raise _wrong_model(vlm.model.name_or_path, f"it sees {len(flat)} tokens for {inputs['counts'].sum()} places")
    grid = inputs["image_grid_thw"] if "image_grid_thw" in taken else inputs["counts"][:, None]
    return VisualTokens(list(flat.split(inputs["counts"].tolist())), grid.cpu(), vlm.width, inputs["frames"])


# ---- questions and answers as tokens -------------------------------------------------------------------------------


def prompt_text(vlm: VLM, instruction: str) -> str:
    """The chat prompt for one picture, by the model's own template, ready for an answer."""
    return _dialogue(vlm.processor, instruction)


def _dialogue(processor: Any, instruction: str, answer: str | None = None) -> str:
    if not processor.chat_template:  # PaliGemma, whose processor completes this
        return processor.image_token + instruction
    system = {"role": "system", "content": [{"type": "text", "text": resource("prompts.yaml", "system")}]}
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]}]
    if answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    options = {"tokenize": False, "add_generation_prompt": not answer}
    if "enable_thinking" in processor.chat_template:  # Qwen3.5's; an answer is scored without thoughts before it
        options["enable_thinking"] = False
    try:
        return processor.apply_chat_template([system, *messages], **options)
    except TemplateError:  # a class without system messages
        return processor.apply_chat_template(messages, **options)


def prompt_ids(vlm: VLM, instruction: str) -> list[int]:
    """Token ids of the chat prompt, with one placeholder for the picture."""
    processor, text = vlm.processor, prompt_text(vlm, instruction)
    text = processor.prepare_inputs_layout(images=[Image.new("RGB", (1, 1))], text=[text])[1][0]
    mark = processor.image_token
    place = getattr(processor, "full_image_sequence", mark)  # Gemma 3: empty lines around a picture, part of the text
    around = place[: -len(place.lstrip())] + mark + place[len(place.rstrip()) :]
    text = text.replace(mark, around)
    return processor.tokenizer(text, add_special_tokens=_adds_start(processor, text))["input_ids"]


def _adds_start(processor: Any, prompt: str) -> bool:
    """Whether the tokenizer should add its mark of a text's start: not if the template has done so (transformers)."""
    return not prompt.startswith(processor.tokenizer.bos_token or prompt)


@lru_cache(maxsize=8)
def _answer_marks(processor: Any) -> tuple[str, str, str]:
    """The end of every prompt, what the template writes between it and an answer, and what ends an answer."""
    if not processor.chat_template:
        return "\n", "", processor.tokenizer.eos_token
    prompt, (start, _, end) = _dialogue(processor, "?"), _dialogue(processor, "?", "ANSWER").rpartition("ANSWER")
    between = start.removeprefix(prompt) if start.startswith(prompt) else ""
    return prompt.rpartition("?")[2], between, end if end.strip() else processor.tokenizer.eos_token


def answer_ids(vlm: VLM, response: str, *, ended: bool = True) -> list[int]:
    """Token ids of a response where it stands: after the prompt, with what the template puts before and behind it."""
    prompt, before, after = _answer_marks(vlm.processor)
    text = before + response + (after if ended else "")
    start, whole, alone = vlm.processor.tokenizer([prompt, prompt + text, text], add_special_tokens=False)["input_ids"]
    return whole[len(start) :] if whole[: len(start)] == start else alone


class _Tokens(list):
    """Tokens by picture for the classes that join them, and in one tensor for those that ask for one."""

    def to(self, *where: Any) -> Tensor:
        return torch.cat(self)[None].to(*where)


@dataclass
class _ImageOutput(BaseModelOutputWithPooling):
    """What `get_image_features` returns in any of the classes: per level and picture, tokens of [n_i, D]."""

    deepstack_features: list[list[Tensor]] | None = None


def make_batch(
    vlm: VLM,
    sequences: Sequence[Sequence[int]],
    visual: VisualTokens,
    *,
    pad_left: bool,
    answered: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Model inputs: expand each picture's placeholder to its visual tokens, pad, and add the types.

    Args:
        sequences: B lists of token ids with one placeholder each.
        visual: the B pictures' tokens.
        pad_left: for generation and scoring; training pads on the right.
        answered: how many of each sequence's last tokens are an answer; default 0. The others see each other in
            PaliGemma.
    """
    expanded, image = [], vlm.image_token_id
    for ids, tokens, frame in zip(sequences, visual.tokens, visual.frames or [[image]] * len(visual), strict=True):
        at, run = list(ids).index(vlm.placeholder_id), len(tokens) // frame.count(image)
        seen = [token for mark in frame for token in [mark] * (run if mark == image else 1)]
        expanded.append([*ids[:at], *seen, *ids[at + 1 :]])
    width = max(map(len, expanded))
    ids = torch.full((len(expanded), width), vlm.processor.tokenizer.pad_token_id)
    mask, answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.int)
    for row, sequence in enumerate(expanded):
        end = width if pad_left else len(sequence)
        ids[row, end - len(sequence) : end] = torch.tensor(sequence)
        mask[row, end - len(sequence) : end] = 1
        answer[row, end - answered[row] if answered else end : end] = 1
    device, dtype, seen = vlm.device, vlm.core.get_input_embeddings().weight.dtype, (ids == image).int()
    merged, *deep = zip(*(t.to(device, dtype).split(vlm.width, -1) for t in visual.tokens), strict=True)
    output = _ImageOutput(pooler_output=_Tokens(merged), deepstack_features=[list(x) for x in deep] or None)
    types = {"mm_token_type_ids": seen, "token_type_ids": seen if vlm.processor.chat_template else answer}
    known = {**types, "image_grid_thw": visual.grid}.items()
    offered = inspect.signature(vlm.core.forward).parameters
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        **{name: x.to(device) for name, x in known if name in offered},
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
    answers = [answer_ids(vlm, answer_text(label), ended=False) for label in labels]
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
    begun = len(prefix) - len(prompt_ids(vlm, instruction or question(labels)))
    batch = make_batch(vlm, [prefix] * len(visual), visual, pad_left=True, answered=[begun] * len(visual))
    longest = max(map(len, tails))
    output = vlm.model(**batch, use_cache=longest > 1, logits_to_keep=1)
    first = output.logits[:, -1].float().log_softmax(-1)  # [B, V]
    scores = first[:, [t[0] for t in tails]]
    return scores if longest == 1 else scores + rest_of_answers(vlm, batch, output.cache, tails)


def rest_of_answers(vlm: VLM, batch: dict[str, Any], cache: Any, tails: Sequence[Sequence[int]]) -> Tensor:
    """[B, C] log-probabilities of the candidates' tokens after the first, on the prefix's KV cache."""
    longer = [i for i, tail in enumerate(tails) if len(tail) > 1]
    rows, count, width = len(batch["input_ids"]), len(longer), max(map(len, tails)) - 1
    padded = torch.tensor([(tails[i] + [0] * width)[: width + 1] for i in longer], device=vlm.device)
    real = torch.tensor([[k + 1 < len(tails[i]) for k in range(width)] for i in longer], device=vlm.device)
    cache.reorder_cache(torch.arange(rows, device=vlm.device).repeat_interleave(count))  # linear attention's, too
    mask = batch["attention_mask"].repeat_interleave(count, 0)
    where = {}  # other classes go on where the prefix ended, padding included: rotary positions are relative
    if getattr(vlm.core, "rope_deltas", None) is not None:
        start = batch["attention_mask"].sum(1, keepdim=True) + vlm.core.rope_deltas
        positions = (start + torch.arange(width, device=vlm.device)).repeat_interleave(count, 0)
        where = {"position_ids": positions.expand(3, -1, -1)}
    output = vlm.model(
        input_ids=padded[:, :width].repeat(rows, 1),
        attention_mask=torch.cat([mask, mask.new_ones(rows * count, width)], 1),
        cache=cache,
        use_cache=True,
        **where,
    )
    logp = output.logits.float().log_softmax(-1).view(rows, count, width, -1)
    more = logp.gather(-1, padded[:, 1:].expand(rows, -1, -1)[..., None])[..., 0]
    scores = more.new_zeros(rows, len(tails))
    scores[:, longer] = (more * real).sum(-1)
    return scores


@torch.inference_mode()
def generate(vlm: VLM, images: Sequence[Picture], instruction: str, max_new_tokens: int) -> list[str]:
    """Greedy free answers, through the processor and `generate` as anyone would call them."""
    pictures = [[shown(image, vlm.max_side)] for image in images]
    tokenizer, text = vlm.processor.tokenizer, prompt_text(vlm, instruction)
    options = {"add_special_tokens": _adds_start(vlm.processor, text), "padding": True, "return_tensors": "pt"}
    tokenizer.padding_side = "left"
    inputs = vlm.processor(images=pictures, text=[text] * len(pictures), **options).to(vlm.device)
    inputs.pop("labels", None)  # PaliGemma's, for training
    output = vlm.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
