"""The stand-in: a Qwen2-VL of 1.5 M parameters with its processor, the same classes as the 7B model.

The checkpoint that is made of it loads by `AutoModelForImageTextToText.from_pretrained` and
`AutoProcessor.from_pretrained` like Qwen/Qwen2-VL-7B-Instruct (our choice: the paper's pipeline must run where no GPU
and no network is).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from emonb.data import TAXONOMIES
from emonb.files import resource, resource_path

BASE = resource_path("base")
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<unk>",
)
PATCH, MERGE, TEMPORAL = 12, 2, 2
PIXELS = 96 * 96  # every picture is resized to about this area: 16 merged tokens for a square one
# Qwen2-VL's own message format; line breaks are white space to the word-level tokenizer
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n{{ default_system }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_HERE = Path(__file__).parent


@functools.cache
def frames() -> dict[str, Any]:
    """The questions and answers of the pre-training, `pretraining.yaml`."""
    return yaml.safe_load((_HERE / "pretraining.yaml").read_text("utf-8"))


def words(text: str) -> list[str]:
    """Words and marks of a text as the tokenizer splits it."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def words_of_resources() -> list[str]:
    """Every word and mark that the prompts, the lexicon, the pre-training texts and the labels use, sorted.

    What `vocabulary.txt` was made of; whoever adds a word to these files needs a new file and a new base.
    """
    texts = [*_strings(resource("prompts.yaml")), *_strings(frames())]
    texts += [name for group in ("glyphs", "hues", "textures", "lights") for name in resource("lexicon.yaml", group)]
    texts += [label for taxonomy in TAXONOMIES.values() for label in taxonomy.labels]
    texts += ["system user assistant a an and on with the . , : ; ? ! ' \" { } ( ) [ ] - / 0 1 2 3 4 5 6 7 8 9"]
    return sorted({word for text in texts for word in words(text.replace("_", " "))})


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield str(key)
            yield from _strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value)
    elif isinstance(node, str):
        yield node


def vocabulary() -> list[str]:
    """The frozen vocabulary (`vocabulary.txt`), special tokens first."""
    return [*SPECIAL, *(_HERE / "vocabulary.txt").read_text("utf-8").split()]


def build_processor() -> Qwen2VLProcessor:
    """`Qwen2VLProcessor` for 12 px patches: a 96 x 96 picture gives 16 merged tokens, others about as many."""
    size = {"shortest_edge": PIXELS * 3 // 4, "longest_edge": PIXELS}
    common = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": TEMPORAL, "size": size}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**common),
        tokenizer=_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**common),
        chat_template=CHAT_TEMPLATE.replace("{{ default_system }}", resource("prompts.yaml", "system")),
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Word-level: lower case, marks split off; decoding puts marks and quotes back in place."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary())}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "isolated")]
    )
    marks = [decoders.Replace(f" {m}", m) for m in ".,:;?!"]
    quotes = [decoders.Replace(old, new) for old, new in (("{ ' ", "{'"), (" ' }", "'}"), (" ': ' ", "': '"))]
    quotes += [decoders.Replace(old, new) for old, new in ((" ', ' ", "', '"), (" - ", "-"))]
    spaces = decoders.WordPiece(prefix="##", cleanup=False)  # a space before every word but the first
    core.decoder = decoders.Sequence([spaces, decoders.Fuse(), *marks, *quotes])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<|endoftext|>", "<|im_end|>", "<unk>")],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """The 1.5 M-parameter architecture (our choice: trains on two cores in half an hour)."""
    special = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special["<|endoftext|>"],
    }
    vision = {
        "depth": 4,
        "embed_dim": 96,
        "hidden_size": 128,
        "num_heads": 4,
        "mlp_ratio": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )


def save(folder: Path, model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor) -> None:
    """Write a checkpoint: weights in float16 (half the size), the config asking for float32 on loading."""
    model.save_pretrained(folder)
    weights = {k: v.to(torch.float16).contiguous() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
