"""Tiny random-weight checkpoints of each VLM class, with the classes' own processors and a toy tokenizer."""

from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import ROOT

from emonb.data import TAXONOMIES
from emonb.files import resource

QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
QWEN += ["<|image_pad|>", "<|video_pad|>"]
TILES = [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
PARTS = ["<pad>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *TILES]
FAMILIES = {  # transformers' names of the classes, and the marks of their tokenizers: first padding, then the end
    "qwen2_vl": ("Qwen2VL", QWEN),
    "qwen2_5_vl": ("Qwen2_5_VL", QWEN),
    "qwen3_vl": ("Qwen3VL", QWEN),
    "qwen3_5": ("Qwen3_5", QWEN),
    "smolvlm": ("SmolVLM", [*PARTS, "<|im_start|>"]),
    "idefics3": ("Idefics3", [*PARTS, "<|begin_of_text|>"]),
    "llava": ("Llava", ["<pad>", "</s>", "<s>", "<image>"]),
    "llava_next": ("LlavaNext", ["<pad>", "</s>", "<s>", "<image>"]),
    "llava_onevision": ("LlavaOnevision", [*QWEN, "<image>", "<video>"]),
    "gemma3": ("Gemma3", ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"]),
    "internvl": ("InternVL", [*QWEN, "<img>", "</img>", "<IMG_CONTEXT>"]),
    "paligemma": ("PaliGemma", ["<pad>", "<eos>", "<bos>", "<image>"]),
}
FAMILIES["gemma3"][1].extend(["<end_of_image>", "<image_soft_token>"])
NAMED = {  # marks that a processor asks its tokenizer for by name
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    "internvl": {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"},
}
NAMED["internvl"]["video_token"] = "<|video_pad|>"
TEMPLATES = ROOT / "tests" / "chat_templates"
WIDTH, SPREAD = 32, 0.3  # weights so wide that pictures and words change the answers by far more than rounding does
SIDE, PATCH = 56, 14  # of a vision tower's picture, in the classes that know one size


def toy_tokenizer(family: str, size: int = 700) -> transformers.PreTrainedTokenizerFast:
    """A BPE tokenizer trained on the prompts: labels of several tokens, and nothing is unknown.

    Bytes as Qwen's; LLaVA's writes a space before the first word of a text, Gemma's joins empty lines.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    marks, core = FAMILIES[family][1], Tokenizer(models.BPE())
    labels = [label for taxonomy in TAXONOMIES.values() for label in taxonomy.labels]
    texts, alphabet = [str(resource("prompts.yaml")), *labels], pre_tokenizers.ByteLevel.alphabet()
    if family in ("llava", "gemma3"):
        first, texts = "first" if family == "llava" else "never", [*["\n\n", "\n\n\n"] * 99, *texts]
        split = pre_tokenizers.Split("\n", "isolated")
        words = pre_tokenizers.Metaspace(prepend_scheme=first)
        core.pre_tokenizer = words if family == "gemma3" else pre_tokenizers.Sequence([split, words])
        core.decoder, alphabet = decoders.Metaspace(prepend_scheme=first), [*map(chr, range(32, 127)), "\n", "▁"]
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=marks, initial_alphabet=alphabet)
    core.train_from_iterator(texts, trainer)
    start = next((mark for mark in ("<s>", "<bos>") if mark in marks), None)
    if start:
        single = [(start, core.token_to_id(start))]
        core.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=single)
    named = {"pad_token": marks[0], "eos_token": "<|im_end|>" if marks[0] == QWEN[0] else marks[1], "bos_token": start}
    if family in ("smolvlm", "idefics3"):
        named["eos_token"] = "<end_of_utterance>"
    others = {**NAMED.get(family, {}), "additional_special_tokens": marks[1:]}
    if family in NAMED:
        others = {"extra_special_tokens": NAMED[family]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **named, **others)


def processor_of(family: str) -> transformers.ProcessorMixin:
    """The family's own processor class with its real chat template; `ours_*` stand for such as cannot be had."""
    template = next(iter(TEMPLATES.glob(f"*{family}.jinja")), None) if family != "paligemma" else None
    common: dict[str, Any] = {"tokenizer": toy_tokenizer(family)}
    common["chat_template"] = template and (TEMPLATES / template).read_text("utf-8")
    tile, grids = {"height": SIDE, "width": SIDE}, [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    patched = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family.startswith("qwen"):
        options = {"patch_size": 16 if family[4] == "3" else 14, "merge_size": 2, "temporal_patch_size": 2}
        options["size"] = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
        video = "Qwen3VLVideoProcessor" if family[4] == "3" else "Qwen2VLVideoProcessor"
        common["video_processor"] = getattr(transformers, video)(**options)
        images = transformers.Qwen2VLImageProcessor(**options)
    elif family in ("smolvlm", "idefics3"):
        options = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
        images = getattr(transformers, f"{FAMILIES[family][0]}ImageProcessor")(**options)
        common["image_seq_len"] = 4
        if family == "smolvlm":
            sampling = {"fps": 1, "max_frames": 4, "video_size": {"longest_edge": SIDE}}
            common["video_processor"] = transformers.SmolVLMVideoProcessor(video_sampling=sampling, **options)
    elif family in ("llava", "llava_next"):
        kind = transformers.CLIPImageProcessor if family == "llava" else transformers.LlavaNextImageProcessor
        more = {} if family == "llava" else {"image_grid_pinpoints": grids}
        images, common = kind(size={"shortest_edge": SIDE}, crop_size=tile, **more), common | patched
    elif family == "llava_onevision":
        images = transformers.LlavaOnevisionImageProcessor(size=tile, image_grid_pinpoints=grids)
        common |= {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
        common["video_processor"] = transformers.LlavaOnevisionVideoProcessor(size=tile)
    elif family == "internvl":
        images = transformers.GotOcr2ImageProcessor(size=tile, crop_to_patches=True, min_patches=1, max_patches=4)
        common |= {"image_seq_length": 4, "video_processor": transformers.InternVLVideoProcessor(size=tile)}
    elif family == "gemma3":
        images, common["image_seq_length"] = transformers.Gemma3ImageProcessor(size=tile), 4
    else:
        images = transformers.SiglipImageProcessor(size=tile)
        images.image_seq_length = 16
    kind = {"qwen3_5": "Qwen3VL"}.get(family, FAMILIES[family][0])
    return getattr(transformers, f"{kind}Processor")(image_processor=images, **common)


def config_of(family: str, tokenizer) -> transformers.PreTrainedConfig:
    """Two layers of width 32, each class with what is its own: windows, deepstack, linear attention, tiles."""
    text = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": len(tokenizer), "initializer_range": SPREAD}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": SIDE, "patch_size": PATCH, "initializer_range": SPREAD}
    image = {"gemma3": "<image_soft_token>", "internvl": "<IMG_CONTEXT>"}.get(family, "<image>")
    options: dict[str, Any] = {"image_token_id": tokenizer.convert_tokens_to_ids(image), "tie_word_embeddings": False}
    if family.startswith("qwen"):
        vision, rope = _qwen(family, text)
        text["rope_parameters"] = rope
        names = {"image": "image_pad", "video": "video_pad"}
        names |= {name: name for name in ("vision_start", "vision_end")}
        options |= {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    elif family in ("smolvlm", "idefics3"):
        text["model_type"], options["scale_factor"] = "llama", 2
    elif family in ("llava", "llava_next"):
        text["model_type"], vision["model_type"] = "llama", "clip_vision_model"
    elif family == "llava_onevision":
        text["model_type"], vision["model_type"] = "qwen2", "siglip_vision_model"
        vision["vision_use_head"] = False
        options["video_token_id"] = tokenizer.convert_tokens_to_ids("<video>")
    elif family == "gemma3":
        text |= {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
        text["layer_types"] = ["sliding_attention", "full_attention"]
        vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}
        options |= {"mm_tokens_per_image": 4, "boi_token_id": tokenizer.boi_token_id}
        options["eoi_token_id"] = tokenizer.eoi_token_id
    elif family == "internvl":
        text["model_type"] = "qwen2"
        options["image_seq_length"] = 4
    else:
        text |= {"model_type": "gemma", "head_dim": 16}
        vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}
        options |= {"projection_dim": WIDTH, "hidden_size": WIDTH}
    if family in ("llava_next", "llava_onevision"):
        options["image_grid_pinpoints"] = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    kind = getattr(transformers, f"{FAMILIES[family][0]}Config")
    return kind(text_config=text, vision_config=vision, **options)


def _qwen(family: str, text: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A Qwen's vision and its rotary positions; completes `text`."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 14, "initializer_range": SPREAD}
    if family == "qwen2_vl":
        return vision | {"embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}, rope
    vision |= {"hidden_size": 48, "intermediate_size": 48, "out_hidden_size": WIDTH}
    if family == "qwen2_5_vl":
        return vision | {"window_size": 56, "fullatt_block_indexes": [1]}, rope
    vision |= {"patch_size": 16, "num_position_embeddings": 64}
    text |= {"head_dim": WIDTH // 2}
    if family == "qwen3_vl":
        vision |= {"depth": 3, "deepstack_visual_indexes": [0, 1]}
        return vision, rope | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text |= {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8}
    text |= {"linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    return vision, rope | {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5}


def save_family(folder: Path, family: str) -> Path:
    """Write a checkpoint folder like one from the hub."""
    processor = processor_of(family)
    torch.manual_seed(0)
    kind = getattr(transformers, f"{FAMILIES[family][0]}ForConditionalGeneration")
    model = kind(config_of(family, processor.tokenizer))
    marks = processor.tokenizer.convert_tokens_to_ids(FAMILIES[family][1])
    model.lm_head.weight.data[marks] = 0  # a trained model does not answer with placeholders either
    if family == "gemma3":  # zeros at first: it would see nothing
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=SPREAD)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
