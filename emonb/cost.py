"""What an answer costs: parameters that are needed for it, and milliseconds per picture on this machine.

Parameters are counted in the real architectures on torch's meta device: no weights, no download. The article
prints 1.09 B for the VLM and "0.003 %" of additional parameters; both are set beside what the architectures
give. Times are of one picture at a time, as a user asks: they include reading and decoding the file and all
preprocessing, and on a GPU end when the GPU has finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from emonb.files import resource
from emonb.predictions import dataset_title, model_name
from emonb.settings import Settings, checkpoint_of

if TYPE_CHECKING:
    from emonb.model import EmoVLMKD

# ---- parameters of architectures -----------------------------------------------------------------------------------

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
_PAPER_BASE, _SMALLER = QWEN2_VL
_PRINTED_AS = {
    "VLM: all": "vlm_tuned",
    "ViT-B/16-384 (teacher)": "vit",
    "head (distillation module)": "head",
    "EmoVLM-KD: all": "emovlmkd",
}  # part -> the paper's row with its parameters
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # authors' code; the summary names q, k, v only


def vlm_config(base: str) -> Any:
    """A fresh config of a key of `QWEN2_VL` (no file needed), "stand-in", or a folder with config.json."""
    from transformers import AutoConfig, Qwen2VLConfig

    if base not in QWEN2_VL:
        return AutoConfig.from_pretrained(checkpoint_of(base), local_files_only=True)
    text = dict(QWEN2_VL[base])
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    return Qwen2VLConfig(
        tie_word_embeddings=text.pop("tie_word_embeddings"),
        text_config={**text, "rope_parameters": rope},
        vision_config={**_VISION, "hidden_size": text["hidden_size"]},
    )


def count(*modules: nn.Module) -> int:
    """Parameters of these modules, shared ones once; a weight packed to 4 bits counts as what it stands for."""
    found = {id(p): p for module in modules for p in module.parameters()}.values()
    packed = {id(p): p.quant_state for p in found if getattr(p, "quant_state", None) is not None}
    return sum(math.prod(packed[id(p)].shape) if id(p) in packed else p.numel() for p in found)


def count_head(features: int, hidden: Sequence[int], classes: int) -> int:
    """Parameters of an MLP features -> hidden... -> classes: weights and biases."""
    return sum(i * o + o for i, o in pairwise([features, *hidden, classes]))


def count_gate(classes: int) -> int:
    """Parameters of the concat & linear gate: (2 C) x C weights and C biases."""
    return 2 * classes * classes + classes


def count_network(name: str, classes: int, **options: Any) -> int:
    """Parameters of a vision network with a classifier for `classes` emotions; options: of `teacher.build_network`."""
    from emonb.teacher import build_network

    with torch.device("meta"):
        return count(build_network(name, classes, **{**options, "pretrained": False, "weights": None}))


@cache
def count_vlm(base: str = _PAPER_BASE, lora_r: int = 8, targets: tuple[str, ...] = _TARGETS) -> dict[str, int]:
    """Parameters by part of a Qwen-VL model: a key of `QWEN2_VL`, "stand-in", a folder with config.json, a hub name.

    `total` counts tied matrices once; `lora` is r x (in + out) over the targeted layers of the
    language model; `features` is the width of the merged visual tokens, the head's input.
    """
    from transformers import AutoModelForImageTextToText

    config = vlm_config(base)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    visual, language = model.model.visual, model.model.language_model
    tuned = [layer for name, layer in language.named_modules() if name.rsplit(".", 1)[-1] in targets]
    return {
        "vision tower": count(visual) - count(visual.merger),
        "merger": count(visual.merger),
        "language model": count(model) - count(visual),
        "embeddings": count(language.embed_tokens, model.lm_head),
        "total": count(model),
        "lora": sum(lora_r * (layer.in_features + layer.out_features) for layer in tuned),
        "features": config.text_config.hidden_size,  # merged visual tokens are as wide as the language model
    }


def system_counts(settings: Settings, classes: int) -> dict[str, int]:
    """Parameters of a run's own models: vlm_tuned (with LoRA), the networks, head, gate, emovlmkd."""
    vlm = count_vlm(settings.vlm.base, settings.vlm.lora_r, settings.vlm.lora_targets)
    counts = {"vlm_zero_shot": vlm["total"], "vlm_tuned": vlm["total"] + vlm["lora"]}
    for model, network in settings.teacher.networks.items():
        counts[model] = count_network(classes=classes, **network.building)
    counts["head"] = count_head(vlm["features"], settings.distill.hidden, classes)
    return counts | {"emovlmkd": counts["vlm_tuned"] + counts["head"] + count_gate(classes)}


def parameter_table(settings: Settings | None = None, classes: int = 8) -> pd.DataFrame:
    """Parts of the paper's system and, for other models, of this run's: parameters, share, printed value.

    Columns: system, part, parameters, percent_of_vlm (of all parameters of that system's VLM), paper.
    """
    hidden = settings.distill.hidden if settings else (1024,)
    networks = {"ViT-B/16-384 (teacher)": "vit_base_patch16_384", "ResNet-50": "resnet50", "VGG-16": "vgg16"}
    paper = {name: count_network(timm_name, classes) for name, timm_name in networks.items()}
    systems = [
        ("paper: Qwen2-VL-7B-Instruct, ViT-B/16-384", count_vlm(), paper),
        ("smaller sister: Qwen2-VL-2B-Instruct", count_vlm(_SMALLER), {}),
    ]
    if settings is not None and settings.vlm.base not in QWEN2_VL:
        own = count_vlm(settings.vlm.base, settings.vlm.lora_r, settings.vlm.lora_targets)
        counts = system_counts(settings, classes)
        systems.append((f"this run: {settings.vlm.base}", own, {m: counts[m] for m in settings.teacher.networks}))
    rows = []
    for system, vlm, others in systems:
        head, gate, total = count_head(vlm["features"], hidden, classes), count_gate(classes), vlm["total"]
        parts = {
            "VLM: vision tower": vlm["vision tower"],
            "VLM: merger": vlm["merger"],
            "VLM: language model with embeddings": vlm["language model"],
            "VLM: of these, embedding and output matrices": vlm["embeddings"],
            "VLM: all": total,
            "LoRA on q, k, v, o": vlm["lora"],
            "head (distillation module)": head,
            "gate, concat & linear": gate,
            "EmoVLM-KD: all": total + vlm["lora"] + head + gate,
        }
        rows += [(system, part, size, 100 * size / total) for part, size in parts.items()]
        rows += [(system, part, size, np.nan) for part, size in others.items()]
    table = pd.DataFrame(rows, columns=["system", "part", "parameters", "percent_of_vlm"])
    printed = table["part"].map(_PRINTED_AS).map(_printed()).where(table["system"] == systems[0][0])
    return table.assign(paper=printed.astype(float))


def share_table(classes: int = 8) -> pd.DataFrame:
    """The added parameters' share, by what they are divided: readings of the printed 0.003 %.

    Columns: reading, added, of, value, unit. As a *fraction* of the printed 1.09 B the head is 0.0034:
    the printed "0.003 %" reads like that fraction with a percent sign behind it. And 1.09 B is the size
    of the embedding and output matrices alone, which 4-bit loading leaves whole (our reading of it).
    """
    vlm, of, nothing = count_vlm(), _printed()["vlm_tuned"], float("nan")
    head = count_head(vlm["features"], (1024,), classes)
    added = head + count_gate(classes) + vlm["lora"]
    stated = resource("paper_values.yaml", "added_parameters_percent", "value")
    records = [
        ("printed in the article", nothing, nothing, stated, "%"),
        ("head / 1.09 B, the size printed for the VLM", head, of, 100 * head / of, "%"),
        ("the same as a fraction", head, of, head / of, ""),
    ]
    for reading, part, whole in (
        ("head / embedding and output matrices of Qwen2-VL-7B", head, vlm["embeddings"]),
        ("head / all of Qwen2-VL-7B", head, vlm["total"]),
        ("head, gate and LoRA / all of Qwen2-VL-7B", added, vlm["total"]),
    ):
        records.append((reading, part, whole, 100 * part / whole, "%"))
    return pd.DataFrame(records, columns=["reading", "added", "of", "value", "unit"])


def _printed() -> dict[str, float]:
    """Parameters that the paper prints, by model."""
    return {row["row"]: row["parameters"] for row in resource("paper_values.yaml", "tables", "modules")}


# ---- time of an answer ---------------------------------------------------------------------------------------------

PICTURES, WARM_UP = 16, 2  # timed pictures, and untimed ones before them; ours: some seconds a dataset on a laptop


class Measured(NamedTuple):
    """A model to measure; `within` is entered around each answer, outside the measured time."""

    answer: Callable[[str], Any]  # path of a picture -> anything
    parameters: int = 0  # all that are needed to answer
    trainable: int = 0  # of these, trained here
    within: Callable[[], AbstractContextManager] = nullcontext


def parts_of(model: EmoVLMKD) -> dict[str, Measured]:
    """The assembled model and what it is made of: the VLM before and after tuning, the head on the vision tower."""
    from emonb.vlm import answer_distribution, visual_tokens

    tuned = model.seeing()
    lora = sum(p.numel() for name, p in tuned.model.named_parameters() if "lora_" in name)
    everything, added = count(tuned.model), count(model.head, model.gate)

    def ask(path: str) -> torch.Tensor:
        return answer_distribution(tuned, visual_tokens(tuned, [path]), model.labels)

    def head(path: str) -> torch.Tensor:
        return model.head(visual_tokens(tuned, [path]).pooled().to(tuned.device))

    return {
        "vlm_zero_shot": Measured(ask, everything - lora, 0, tuned.model.disable_adapter),
        "vlm_tuned": Measured(ask, everything, lora),
        "head": Measured(head, count(tuned.core.visual, model.head), count(model.head)),
        "emovlmkd": Measured(lambda path: model([path]), everything + added, lora + added),
    }


def measure(
    models: Mapping[str, Measured], paths: Sequence[str], device: torch.device, warm_up: int = WARM_UP
) -> list[dict[str, Any]]:
    """Wall time of one answer, in milliseconds, after some untimed ones of the first pictures.

    The models take turns picture by picture: what else the machine does meanwhile slows all of them alike.

    Returns:
        A row for each model: model, parameters, trainable, ms_median, ms_low, ms_high (quartiles), n, device.
    """

    def now() -> float:
        if device.type == "cuda":  # kernels are only queued when a call returns
            torch.cuda.synchronize(device)
        return time.perf_counter()

    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for path in [*paths[:warm_up], *paths]:
            for name, model in models.items():
                with model.within():
                    start = now()
                    model.answer(path)
                    taken[name].append(1000 * (now() - start))
    machine, rows = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, []
    for name, model in models.items():
        low, median, high = np.percentile(taken[name][-len(paths) :], [25, 50, 75]).round(3).tolist()
        spent = {"ms_median": median, "ms_low": low, "ms_high": high, "n": len(paths), "device": machine}
        rows.append({"model": name, "parameters": model.parameters, "trainable": model.trainable, **spent})
    return rows


def cost_table(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """The `cost` table from {dataset: rows of `measure`}: one row per dataset and model."""
    names = ["dataset", "model", "name", "parameters", "trainable", "ms_median", "ms_low", "ms_high", "n", "device"]
    rows = [
        {"dataset": dataset_title(dataset), "name": model_name(row["model"]), **row}
        for dataset, found in measured.items()
        for row in found
    ]
    table = pd.DataFrame(rows, columns=names)
    table.attrs["caption"] = (
        "Table cost: parameters needed for an answer, those trained here, and milliseconds per picture (median and "
        "quartiles over n test pictures, one at a time, decoding and preprocessing included). The head's cost "
        "includes the vision tower that it reads; the tuned models' the adapter, not merged into the weights."
    )
    return table
