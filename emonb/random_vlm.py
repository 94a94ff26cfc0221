"""The real architecture with random weights, whole or with a few layers: what a rehearsal measures.

No download: the sizes stand in `emonb.parameters`, and time and memory do not depend on what a weight says.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emonb.errors import EmonbError
from emonb.parameters import QWEN2_VL, vlm_config
from emonb.settings import checkpoint_of
from emonb.standin import build_processor, build_tokenizer
from emonb.vlm import VLM

__all__ = ["build_vlm", "has_nf4", "load_config", "own_processor", "resolve_base", "weight_bytes"]

_SHORT = {"7b": "Qwen/Qwen2-VL-7B-Instruct", "2b": "Qwen/Qwen2-VL-2B-Instruct"}
_PIXELS = {"shortest_edge": 3136, "longest_edge": 12_845_056}  # preprocessor_config.json of the public checkpoints
_BLOCK = 2**22  # random values that are drawn; larger weights repeat them


def resolve_base(model: str) -> str:
    """`7b`, `2b`, "stand-in", a name in `QWEN2_VL`, or a folder with config.json, as `vlm_config` takes it.

    Raises:
        EmonbError: anything else.
    """
    base = _SHORT.get(model.lower(), model)
    if base in QWEN2_VL or base == "stand-in" or (Path(base) / "config.json").is_file():
        return base
    raise EmonbError(
        f"model {model!r}: unknown; use 7b, 2b, stand-in or a folder that holds the config.json of a Qwen2-VL"
    )


def load_config(base: str) -> Any:
    """The architecture of `resolve_base`'s answer; raises `EmonbError` for a config.json of something else."""
    path = Path(checkpoint_of(base)) / "config.json"
    try:
        config = vlm_config(base)
        sizes = (config.vision_config.depth, config.text_config.num_hidden_layers, config.text_config.vocab_size)
        if config.model_type != "qwen2_vl" or min(sizes) < 1:
            raise ValueError(f"model_type {config.model_type!r}, layers and vocabulary {sizes}")
    except Exception as error:  # a strict config raises what its field's check raises
        why = str(error).strip().splitlines()[0]
        raise EmonbError(f"{path}: no Qwen2-VL architecture ({why}); give another folder with --model") from None
    return config


def own_processor(base: str) -> bool:
    """Whether the checkpoint brings its own processor; else prompts get the stand-in's word-level tokenizer."""
    folder = Path(checkpoint_of(base))
    return any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def has_nf4() -> bool:
    """Whether 4-bit weights can be made here."""
    return importlib.util.find_spec("bitsandbytes") is not None


def weight_bytes(counts: dict[str, int], precision: str) -> float:
    """Bytes of all weights. NF4 keeps the embedding and output matrices in 16 bits and stores scales beside the rest.

    4 bits, and 8 bits per block of 64 weights with double quantisation (QLoRA paper): 0.516 bytes a weight.
    """
    size = 4 if precision == "float32" else 2
    if precision == "nf4":
        return counts["embeddings"] * size + (counts["total"] - counts["embeddings"]) * 0.516
    return counts["total"] * size


def build_vlm(
    base: str,
    precision: str,
    device: torch.device,
    max_side: int,
    layers: int | None = None,
    attention: str = "sdpa",
) -> VLM:
    """A frozen VLM with random weights, made in its own precision on the device: no float32 copy of it ever exists.

    Args:
        base: from `resolve_base`.
        precision: float32, bfloat16, float16, or nf4 (bitsandbytes, with bfloat16 for what stays whole).
        max_side: longest side of a picture, pixels.
        layers: blocks of the vision tower and of the language model; None is all of them.
        attention: transformers' name of the attention code, as `attention_of` gives it.
    """
    from transformers import Qwen2VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    config, processor = load_config(base), _processor(base)
    if layers is not None:
        config.vision_config.depth = config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    if not own_processor(base):
        _use_tokens_of(config, processor.tokenizer)
    dtype = torch.bfloat16 if precision == "nf4" else getattr(torch, precision)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with no_init_weights():  # reserves addresses; no page is touched before a weight moves to the device
            model = Qwen2VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    block = torch.empty(_BLOCK, dtype=dtype, device=device).normal_(0, 0.02)
    if precision == "nf4":
        _quantize(model, block)
    for module in list(model.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.__class__.__name__ != "Params4bit":
                setattr(module, name, nn.Parameter(_random(weight, block, name), requires_grad=False))
    model.tie_weights()
    model.set_attn_implementation(attention)
    return VLM(model.to(device).eval(), processor, max_side)


def _random(weight: Tensor, block: Tensor, name: str) -> Tensor:
    """Small normal values for matrices, ones for scales, zeros for shifts: activations stay finite at any depth."""
    if weight.ndim < 2:
        return torch.full(weight.shape, float(name == "weight"), dtype=block.dtype, device=block.device)
    repeats = -(-weight.numel() // len(block))
    return block.repeat(repeats)[: weight.numel()].view(weight.shape)


def _quantize(model: Any, block: Tensor) -> None:
    """Linear layers as `load_vlm` has them in 4 bits: NF4, double quantisation, bfloat16 compute (authors' code)."""
    import bitsandbytes
    from transformers.quantizers.base import get_keys_to_not_convert

    whole = set(get_keys_to_not_convert(model))
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name in whole:
            continue
        layer = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            module.bias is not None,
            torch.bfloat16,
            quant_type="nf4",
            compress_statistics=True,
            device="meta",
        )
        options = dict(layer.weight.__dict__)
        weight = bitsandbytes.nn.Params4bit(_random(module.weight, block, "weight"), requires_grad=False, **options)
        layer.weight = weight.to(block.device)
        model.set_submodule(name, layer)
    model.is_quantized = model.is_loaded_in_4bit = True  # what `add_lora` and peft ask for


def _processor(base: str) -> Any:
    """The checkpoint's own processor, or Qwen2-VL's picture settings with the stand-in's tokenizer."""
    if own_processor(base):
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(checkpoint_of(base), local_files_only=True)
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    vision = load_config(base).vision_config
    common = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "size": _PIXELS,
    }
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**common),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**common),
        chat_template=build_processor().chat_template,
    )


def _use_tokens_of(config: Any, tokenizer: Any) -> None:
    """Point the architecture's special token ids at those of the tokenizer that writes the prompts."""
    ids = tokenizer.convert_tokens_to_ids
    config.image_token_id, config.video_token_id = ids("<|image_pad|>"), ids("<|video_pad|>")
    config.vision_start_token_id, config.vision_end_token_id = ids("<|vision_start|>"), ids("<|vision_end|>")
    config.text_config.pad_token_id = tokenizer.pad_token_id
    config.text_config.eos_token_id = tokenizer.eos_token_id
