"""What an answer costs: parameters that are needed for it, and milliseconds per picture on this machine.

Parameters are counted in the real architectures on torch's meta device: no weights, no download. The article prints
1.09 B for the VLM and "0.003 %" of additional parameters. Times are of one picture at a time, as a user asks: they
include reading and decoding the file and all preprocessing, and on a GPU end when the GPU has finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from emonb.distill import StudentHead
from emonb.files import resource
from emonb.gate import make_gate
from emonb.predictions import model_name
from emonb.settings import Settings, VLMSettings, checkpoint_of, load_settings

if TYPE_CHECKING:
    from emonb.model import EmoVLMKD

_NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_TEXT = {  # and vocabulary, and whether embedding and output matrix are one; source: config.json on the hub, Qwen/...
    "Qwen/Qwen2-VL-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen2-VL-2B-Instruct": (1536, 8960, 28, 12, 2, 151936, True),
}
_PARTS = {  # rows of the parameter table -> names of `system_counts`
    "VLM: vision tower": "vision tower",
    "VLM: merger": "merger",
    "VLM: language model with embeddings": "language model",
    "VLM: of these, embedding and output matrices": "embeddings",
    "VLM: all": "total",
    "LoRA on q, k, v, o": "lora",
    "head (distillation module)": "head",
    "gate, concat & linear": "gate",
    "EmoVLM-KD: all": "emovlmkd",
}
_NETWORKS = {"ViT-B/16-384 (teacher)": "vit", "ResNet-50": "resnet", "VGG-16": "vgg"}
Measured = tuple[Callable[[str], Any], int, int]  # path of a picture -> anything; parameters needed, trained here
PICTURES, WARM_UP = 16, 2  # timed pictures, and untimed ones before them; ours: some seconds a dataset on a laptop


def vlm_config(base: str) -> Any:
    """A fresh config of a key of `_TEXT` (no file needed), "stand-in", or a folder with config.json."""
    from transformers import AutoConfig, Qwen2VLConfig

    if base not in _TEXT:
        return AutoConfig.from_pretrained(checkpoint_of(base), local_files_only=True)
    *sizes, vocabulary, tied = _TEXT[base]
    text = {**dict(zip(_NAMES, sizes, strict=True)), "vocab_size": vocabulary}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    vision = {"hidden_size": text["hidden_size"]}  # both have the tower that is transformers' default
    return Qwen2VLConfig(tie_word_embeddings=tied, text_config=text, vision_config=vision)


def count(*modules: nn.Module) -> int:
    """Parameters of these modules, shared ones once; a weight packed to 4 bits counts as what it stands for."""
    found = nn.ModuleList(modules).parameters()
    return sum(math.prod((getattr(p, "quant_state", None) or p).shape) for p in found)


@cache
def count_vlm(base: str, lora_r: int = 8, targets: tuple[str, ...] = VLMSettings().lora_targets) -> dict[str, int]:
    """Parameters by part of a VLM: a published name, "stand-in", or a folder with config.json.

    `total` counts tied matrices once; `lora` is r x (in + out) over the targeted layers of the language model;
    `features` is the width of the merged visual tokens, the head's input.
    """
    from transformers import AutoModelForImageTextToText

    config = vlm_config(base)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    language, merger = model.model.get_decoder(), ("merger", "connector", "multi_modal_projector")
    eyes = count(*_eyes(model.model, language))
    joining = count(*(part for name, part in model.model.named_modules() if name.rsplit(".", 1)[-1] in merger))
    tuned = [layer for name, layer in language.named_modules() if name.rsplit(".", 1)[-1] in targets]
    return {
        "vision tower": eyes - joining,
        "merger": joining,
        "language model": count(model) - eyes,
        "embeddings": count(model.get_input_embeddings(), model.get_output_embeddings()),
        "total": count(model),
        "lora": sum(lora_r * (layer.in_features + layer.out_features) for layer in tuned),
        "features": config.get_text_config().hidden_size,  # merged visual tokens are as wide as the language model
    }


def _eyes(core: nn.Module, language: nn.Module) -> list[nn.Module]:
    """What comes before the language model: vision tower and merger."""
    return [part for part in core.children() if part is not language]


def system_counts(settings: Settings, classes: int) -> dict[str, int]:
    """Parameters of a run's own parts (see `count_vlm`) and models: the VLM, the networks, head, gate, emovlmkd."""
    from emonb.teacher import build_network

    sizes = dict(count_vlm(settings.vlm.base, settings.vlm.lora_r, settings.vlm.lora_targets))
    with torch.device("meta"):
        sizes["head"] = count(StudentHead(sizes["features"], settings.distill.hidden, classes))
        sizes["gate"] = count(make_gate(settings.gate.kind, classes))
        for model, network in settings.teacher.networks.items():
            building = {**network.building, "pretrained": False, "weights": None}
            sizes[model] = count(build_network(classes=classes, **building))
    tuned = sizes["total"] + sizes["lora"]
    whole = {"vlm_zero_shot": sizes["total"], "vlm_tuned": tuned, "emovlmkd": tuned + sizes["head"] + sizes["gate"]}
    return sizes | whole


def parameter_table(settings: Settings, classes: int = 8) -> pd.DataFrame:
    """Parts of the paper's system and, for other models, of this run's: parameters, share, printed value.

    Columns: system, part, parameters, percent_of_vlm (of all parameters of that system's VLM), paper.
    """
    printed = {row["row"]: row["parameters"] for row in resource("paper_values.yaml", "tables", "modules")}
    printed["total"] = printed["vlm_tuned"]
    systems = [
        ("paper: Qwen2-VL-7B-Instruct, ViT-B/16-384", load_settings("paper"), _NETWORKS, printed),
        ("smaller sister: Qwen2-VL-2B-Instruct", load_settings("paper-2b"), {}, {}),
    ]
    if settings.vlm.base not in _TEXT:
        networks = {model_name(model): model for model in settings.teacher.networks}
        systems.append((f"this run: {settings.vlm.base}", settings, networks, {}))
    rows = []
    for system, own, networks, paper in systems:
        sizes = system_counts(own, classes)
        for part, name in {**_PARTS, **networks}.items():
            share = 100 * sizes[name] / sizes["total"] if part in _PARTS else float("nan")
            rows.append((system, part, sizes[name], share, paper.get(name)))
    return pd.DataFrame(rows, columns=["system", "part", "parameters", "percent_of_vlm", "paper"])


def parts_of(model: EmoVLMKD) -> dict[str, Measured]:
    """The assembled model and what it is made of: the VLM before and after tuning, the head on the vision tower."""
    from emonb.vlm import answer_distribution, visual_tokens

    tuned = model.seeing()
    lora = sum(p.numel() for name, p in tuned.model.named_parameters() if "lora_" in name)
    everything, added = count(tuned.model), count(model.head, model.gate)

    def ask(path: str) -> torch.Tensor:
        return answer_distribution(tuned, visual_tokens(tuned, [path]), model.labels)

    def ask_untuned(path: str) -> torch.Tensor:
        with tuned.model.disable_adapter():
            return ask(path)

    def head(path: str) -> torch.Tensor:
        return model.head(visual_tokens(tuned, [path]).pooled().to(tuned.device))

    return {
        "vlm_zero_shot": (ask_untuned, everything - lora, 0),
        "vlm_tuned": (ask, everything, lora),
        "head": (head, count(*_eyes(tuned.core, tuned.language), model.head), count(model.head)),
        "emovlmkd": (lambda path: model([path]), everything + added, lora + added),
    }


def measure(models: Mapping[str, Measured], paths: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    """Wall time of an answer, after untimed ones: model, parameters, trainable, ms_median, quartiles, n, device.

    The models take turns picture by picture: what else the machine does meanwhile slows all of them alike.
    """

    def now() -> float:
        if device.type == "cuda":  # kernels are only queued when a call returns
            torch.cuda.synchronize(device)
        return 1000 * time.perf_counter()

    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for path, (name, (answer, *_)) in product([*paths[:WARM_UP], *paths], models.items()):
            start = now()
            answer(path)
            taken[name].append(now() - start)
    where, rows = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, []
    for name, (_, parameters, trainable) in models.items():
        low, median, high = np.percentile(taken[name][-len(paths) :], [25, 50, 75]).round(3).tolist()
        spent = {"ms_median": median, "ms_low": low, "ms_high": high, "n": len(paths), "device": where}
        rows.append({"model": name, "parameters": parameters, "trainable": trainable, **spent})
    return rows
