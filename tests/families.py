"""Tiny random-weight checkpoints of the Qwen-VL classes, with the real chat templates and a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from conftest import ROOT

from emonb.data import TAXONOMIES
from emonb.files import resource

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
FAMILIES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
TEMPLATES = ROOT / "tests" / "chat_templates"
WIDTH, SPREAD = 32, 0.3  # weights so wide that pictures and words change the answers by far more than rounding does


def byte_level_tokenizer(size: int = 700) -> transformers.PreTrainedTokenizerFast:
    """A BPE tokenizer like Qwen's, trained on the prompts: labels of several tokens, and nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    labels = [label for taxonomy in TAXONOMIES.values() for label in taxonomy.labels]
    core.train_from_iterator([str(resource("prompts.yaml")), *labels], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>", additional_special_tokens=SPECIAL[1:]
    )


def processor_of(family: str) -> transformers.ProcessorMixin:
    """The family's own processor class with its real chat template."""
    stem, patch = FAMILIES[family], 16 if family == "qwen3_vl" else 14
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    common = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    video = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
    return getattr(transformers, f"{stem}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(**common),
        tokenizer=byte_level_tokenizer(),
        video_processor=getattr(transformers, video)(**common),
        chat_template=(TEMPLATES / f"{family}.jinja").read_text("utf-8"),
    )


def config_of(family: str, tokenizer) -> transformers.PreTrainedConfig:
    """Two layers of width 32, each class with what is its own: windows (2.5), deepstack (3)."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": len(tokenizer), "initializer_range": SPREAD}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 14, "initializer_range": SPREAD}
    if family == "qwen2_vl":
        vision |= {"embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 48, "intermediate_size": 48, "out_hidden_size": WIDTH}
    if family == "qwen2_5_vl":
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
    if family == "qwen3_vl":
        vision |= {"depth": 3, "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
        text |= {"head_dim": WIDTH // 2}
    marks = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for key, mark in marks.items()}
    return getattr(transformers, f"{FAMILIES[family]}Config")(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        **ids,
        tie_word_embeddings=False,
    )


def save_family(folder: Path, family: str) -> Path:
    """Write a checkpoint folder like one from the hub."""
    processor = processor_of(family)
    torch.manual_seed(0)
    kind = getattr(transformers, f"{FAMILIES[family]}ForConditionalGeneration")
    model = kind(config_of(family, processor.tokenizer))
    model.lm_head.weight.data[: len(SPECIAL)] = 0  # a trained model does not answer with placeholders either
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
