"""Parameter counts, computed from the real architectures on torch's meta device: no weights, no download.

The article prints 1.09 B for the VLM and "0.003 %" of additional parameters; both are set beside
what the architectures give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pandas as pd

from emonb.paper_values import added_parameters_percent, paper_rows
from emonb.settings import NetworkSettings, Settings, checkpoint_of

__all__ = [
    "QWEN2_VL",
    "count_gate",
    "count_head",
    "count_network",
    "count_vlm",
    "parameter_table",
    "share_table",
    "system_counts",
    "vlm_config",
]

_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
# Source: config.json of the two public checkpoints (Hugging Face hub, Qwen/...).
QWEN2_VL: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-VL-7B-Instruct": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2-VL-2B-Instruct": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
_PAPER_BASE = "Qwen/Qwen2-VL-7B-Instruct"
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # authors' code; the summary names q, k, v only


def count_head(features: int, hidden: Sequence[int], classes: int) -> int:
    """Parameters of an MLP features -> hidden... -> classes: weights and biases."""
    widths = [features, *hidden, classes]
    return sum(i * o + o for i, o in pairwise(widths))


def count_gate(classes: int) -> int:
    """Parameters of the concat & linear gate: (2 C) x C weights and C biases."""
    return 2 * classes * classes + classes


def count_network(network: NetworkSettings, classes: int) -> int:
    """Parameters of a vision network with a classifier for `classes` emotions."""
    import torch

    from emonb.teacher import build_network  # the one place that knows how a network is built

    with torch.device("meta"):
        return _size(build_network(network.model_copy(update={"pretrained": False}), classes))


@cache
def count_vlm(base: str = _PAPER_BASE, lora_r: int = 8, targets: tuple[str, ...] = _TARGETS) -> dict[str, int]:
    """Parameters by part of a Qwen-VL model: a key of `QWEN2_VL`, "stand-in", a folder with config.json, a hub name.

    `total` counts tied matrices once; `lora` is r x (in + out) over the targeted layers of the
    language model; `features` is the width of the merged visual tokens, the head's input.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    config = vlm_config(base)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    visual, language = model.model.visual, model.model.language_model
    lora = sum(
        lora_r * (layer.in_features + layer.out_features)
        for name, layer in language.named_modules()
        if name.rsplit(".", 1)[-1] in targets
    )
    embeddings = {id(p): p.numel() for p in (language.embed_tokens.weight, model.lm_head.weight)}
    return {
        "vision tower": _size(visual) - _size(visual.merger),
        "merger": _size(visual.merger),
        "language model": _size(model) - _size(visual),
        "embeddings": sum(embeddings.values()),
        "total": _size(model),
        "lora": lora,
        "features": config.text_config.hidden_size,  # merged visual tokens are as wide as the language model
    }


def _size(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def vlm_config(base: str) -> Any:
    """A fresh config of a key of `QWEN2_VL` (no file needed), "stand-in", or a folder with config.json."""
    from transformers import AutoConfig, Qwen2VLConfig

    if base in QWEN2_VL:
        text = dict(QWEN2_VL[base])
        rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
        tied = text.pop("tie_word_embeddings")
        return Qwen2VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config={**_VISION, "hidden_size": text["hidden_size"]},
            tie_word_embeddings=tied,
        )
    return AutoConfig.from_pretrained(checkpoint_of(base), local_files_only=True)


def system_counts(settings: Settings, classes: int) -> dict[str, int]:
    """Parameters of a run's own models: vlm_tuned (with LoRA), the networks, head, gate, emovlmkd."""
    vlm = count_vlm(settings.vlm.base, settings.vlm.lora_r, settings.vlm.lora_targets)
    counts = {"vlm_zero_shot": vlm["total"], "vlm_tuned": vlm["total"] + vlm["lora"]}
    for model, network in settings.teacher.networks.items():
        counts[model] = count_network(network, classes)
    counts["head"] = count_head(vlm["features"], settings.distill.hidden, classes)
    counts["emovlmkd"] = counts["vlm_tuned"] + counts["head"] + count_gate(classes)
    return counts


def parameter_table(settings: Settings | None = None, classes: int = 8) -> pd.DataFrame:
    """Parts of the paper's system and, for other models, of this run's: parameters, share, printed value.

    Columns: system, part, parameters, percent_of_vlm (of all parameters of that system's VLM), paper.
    """
    printed = {row: values.get("parameters") for row, values in paper_rows("modules").items()}
    hidden = tuple(settings.distill.hidden) if settings else (1024,)
    rows = _parts("paper: Qwen2-VL-7B-Instruct, ViT-B/16-384", count_vlm(), hidden, classes, printed)
    rows += [
        (rows[0][0], name, count_network(NetworkSettings(name=timm_name), classes), None, paper)
        for name, timm_name, paper in (
            ("ViT-B/16-384 (teacher)", "vit_base_patch16_384", printed["vit"]),
            ("ResNet-50", "resnet50", None),
            ("VGG-16", "vgg16", None),
        )
    ]
    small = count_vlm("Qwen/Qwen2-VL-2B-Instruct")
    rows += _parts("smaller sister: Qwen2-VL-2B-Instruct", small, hidden, classes, {})
    if settings is not None and settings.vlm.base not in QWEN2_VL:
        own = count_vlm(settings.vlm.base, settings.vlm.lora_r, settings.vlm.lora_targets)
        name = f"this run: {settings.vlm.base}"
        rows += _parts(name, own, hidden, classes, {})
        counts = system_counts(settings, classes)
        rows += [(name, model, counts[model], None, None) for model in settings.teacher.networks]
    frame = pd.DataFrame(rows, columns=["system", "part", "parameters", "of", "paper"])
    frame["percent_of_vlm"] = 100 * frame["parameters"] / frame.pop("of")
    return frame.astype({"paper": float, "percent_of_vlm": float})[
        ["system", "part", "parameters", "percent_of_vlm", "paper"]
    ]


def _parts(
    system: str, vlm: Mapping[str, int], hidden: Sequence[int], classes: int, printed: Mapping[str, Any]
) -> list[tuple]:
    head, gate, total = count_head(vlm["features"], hidden, classes), count_gate(classes), vlm["total"]
    parts = [
        ("VLM: vision tower", vlm["vision tower"], None),
        ("VLM: merger", vlm["merger"], None),
        ("VLM: language model with embeddings", vlm["language model"], None),
        ("VLM: of these, embedding and output matrices", vlm["embeddings"], None),
        ("VLM: all", total, printed.get("vlm_tuned")),
        ("LoRA on q, k, v, o", vlm["lora"], None),
        ("head (distillation module)", head, printed.get("head")),
        ("gate, concat & linear", gate, None),
        ("EmoVLM-KD: all", total + vlm["lora"] + head + gate, printed.get("emovlmkd")),
    ]
    return [(system, part, count, total, paper) for part, count, paper in parts]


def share_table(classes: int = 8) -> pd.DataFrame:
    """The added parameters' share, by what they are divided: readings of the printed 0.003 %.

    Columns: reading, added, of, value, unit. As a *fraction* of the printed 1.09 B the head is 0.0034:
    the printed "0.003 %" reads like that fraction with a percent sign behind it. And 1.09 B is the size
    of the embedding and output matrices alone, which 4-bit loading leaves whole (our reading of it).
    """
    vlm = count_vlm()
    head = count_head(vlm["features"], (1024,), classes)
    everything = head + count_gate(classes) + vlm["lora"]
    printed = paper_rows("modules")["vlm_tuned"]["parameters"]
    rows = [
        ("head / 1.09 B, the size printed for the VLM", head, printed),
        ("head / embedding and output matrices of Qwen2-VL-7B", head, vlm["embeddings"]),
        ("head / all of Qwen2-VL-7B", head, vlm["total"]),
        ("head, gate and LoRA / all of Qwen2-VL-7B", everything, vlm["total"]),
    ]
    records = [(reading, added, of, 100 * added / of, "%") for reading, added, of in rows]
    records.insert(1, ("the same as a fraction", head, printed, head / printed, ""))
    records.insert(0, ("printed in the article", float("nan"), float("nan"), added_parameters_percent(), "%"))
    return pd.DataFrame(records, columns=["reading", "added", "of", "value", "unit"])
