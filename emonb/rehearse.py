"""`python -m emonb rehearse`: what a run at the paper's size would cost on this machine, by arithmetic, in minutes.

The operations of every step are counted on torch's meta device, without weights, and divided by the rate at which
this machine multiplies matrices of the model's own shape. How far off that is, one real layer of the model shows.
Ignore it until you want to rent a GPU.
"""

from __future__ import annotations

import copy
import timeit
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from emonb.cost import count_vlm, vlm_config
from emonb.data import TAXONOMIES
from emonb.errors import EmonbError
from emonb.files import atomic_write, claim_folder, write_json
from emonb.machine import get_device, git_state, machine
from emonb.predictions import dataset_title
from emonb.settings import Settings, VLMSettings, load_settings
from emonb.tables import markdown_text
from emonb.tuning import add_lora
from emonb.vlm import VLM

QUESTION, REASONS = 59, 50  # tokens of the prompt's text and of four sentences, as the stand-in cuts them
_SHORT = {"7b": "Qwen/Qwen2-VL-7B-Instruct", "2b": "Qwen/Qwen2-VL-2B-Instruct"}
_IMAGES = {"fi": 23_000, "emoset": 118_102, "emotion6": 1_980}  # paper, official lists, paper; here split 80/10/10


def rehearse(
    profile: str, *, model: str, dataset_size: int, image_side: int, device: str, out: Path, price: Callable
) -> Path:
    """Estimate every step, write `report.json` and `report.md` into `out`, and return the latter's path.

    Options are those of the command; `price` gives USD by case for triplets of settings, a picture's size, the number
    of pictures, and emotions. Raises `EmonbError` for an unknown profile, model or device.
    """
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise EmonbError(f"rehearse: no device {device!r} here; use --device auto or cpu (cuda needs an NVIDIA GPU)")
    settings, where = load_settings(profile), get_device() if device == "auto" else torch.device(device)
    base, vlm = _SHORT.get(model.lower(), model) or settings.vlm.base, settings.vlm
    try:
        config, counts = vlm_config(base), count_vlm(base, vlm.lora_r, vlm.lora_targets)
        if config.model_type != "qwen2_vl":
            raise ValueError(f"its model_type is {config.model_type}")
    except Exception as error:  # a strict config raises what its field's check raises
        why, known = str(error).strip().splitlines()[0], "7b, 2b, stand-in or a folder with a Qwen2-VL's config.json"
        raise EmonbError(f"rehearse: model {base!r}: no Qwen2-VL architecture ({why}); use {known}") from None
    picture, folder = (image_side, image_side * 3 // 4), claim_folder(out, "--out")
    report = {
        "model": Path(base).name if Path(base).is_dir() else base,
        "profile": settings.profile,
        **machine(),
        "device": where.type,
        "load average": round(psutil.getloadavg()[0], 1),
        "torch": torch.__version__,
        "commit": git_state().get("commit", "unknown"),
        "picture, px": " x ".join(map(str, picture)),
        "parameters": counts["total"],
        "parameters of LoRA": counts["lora"],
        **costs(config, vlm, counts, min(image_side, vlm.max_side), where),
        "datasets": {},
    }
    for name in settings.datasets:
        images = _IMAGES.get(name, dataset_size)
        pooled, train = 2e-9 * counts["features"] * images, round(0.8 * images)  # float16
        usd = price(settings.triplets, picture, train, TAXONOMIES["mikels8"].labels)
        report["datasets"][dataset_title(name)] = {
            "images": images,
            **hours(report["steps"], images, settings),
            **{"features, GB": pooled, "visual tokens, GB": pooled * report["visual tokens"]},
            **{f"triplets, {case} USD": x for case, x in usd.items() if pd.notna(x)},
        }
    write_json(folder / "report.json", report)
    atomic_write(folder / "report.md", _page(report))
    return folder / "report.md"


def costs(config: Any, vlm: VLMSettings, counts: Mapping[str, int], side: int, device: torch.device) -> dict[str, Any]:
    """What a picture of this long side (pixels) costs: its visual tokens, memory, TFLOP and seconds of the `steps`.

    NF4 takes 0.516 bytes a weight (QLoRA paper). A LoRA step keeps the adapter with Adam's moments and, for each
    token, logits, the layers' inputs, and in a layer three tensors of the MLP's width and ten of the model's in
    float32 (counted in transformers' Qwen2-VL); of one layer at a time with gradient checkpointing.
    """
    text, dtype, cell = config.text_config, getattr(torch, vlm.dtype), 2 * config.vision_config.patch_size
    layer, grid = copy.deepcopy(config), (round(side * 3 / 4 / cell), round(side / cell))
    layer.vision_config.depth = layer.text_config.num_hidden_layers = 1
    layer.text_config.layer_types, layer.text_config.vocab_size = text.layer_types[:1], 1024
    models, steps, visual = [], {}, grid[0] * grid[1]
    for of, on in ((config, "meta"), (layer, "meta"), (layer, device)):
        with torch.device(on):
            model = VLM(AutoModelForImageTextToText.from_config(of, dtype=dtype), None, 0)
            models.append(add_lora(model, **vlm.lora).model.get_base_model().train())
        if vlm.gradient_checkpointing:
            models[-1].activation_checkpointing_enable()
    a = torch.randn(visual + QUESTION, text.hidden_size, device=device).to(dtype)
    b = torch.randn(text.intermediate_size, text.hidden_size, device=device).to(dtype)
    rate = 2 * len(a) * b.numel() / _timed(lambda: a @ b.T)
    for name in ("tower", "answer", "LoRA step"):
        whole, part, real = (partial(step, name, model, grid) for model in models)
        estimated, measured = operations(part) / rate, _timed(real)
        check = {"one layer, estimated": estimated, "measured": measured, "measured / estimated": measured / estimated}
        steps[name] = {"TFLOP": operations(whole) / 1e12, "seconds": operations(whole) / rate, **check}
    wide, layers = dtype.itemsize, text.num_hidden_layers
    kept = (3 * text.intermediate_size * wide + 40 * text.hidden_size) * (1 if vlm.gradient_checkpointing else layers)
    kept += layers * text.hidden_size * wide + 2 * text.vocab_size * wide
    whole = counts["embeddings"] if vlm.quantize_4bit and device.type == "cuda" else counts["total"]
    memory = {
        "weights, GB": (whole * wide + 0.516 * (counts["total"] - whole)) / 1e9,
        "LoRA step, GB more": (16 * counts["lora"] + vlm.train_batch_size * (visual + QUESTION + REASONS) * kept)
        / 1e9,
    }
    return {"visual tokens": visual, "TFLOP/s": rate / 1e12, **memory, "steps": steps}


def step(name: str, model: Any, grid: tuple[int, int]) -> None:
    """`tower`, scored `answer` or `LoRA step` for one picture of (high, wide) visual tokens, on any device."""
    (high, wide), vision, learns = grid, model.config.vision_config, name == "LoRA step"
    with torch.device(model.device), torch.set_grad_enabled(learns):
        if name == "tower":
            size = torch.tensor([[1, 2 * high, 2 * wide]], device="cpu")
            pixels = torch.zeros(4 * high * wide, 2 * vision.in_channels * vision.patch_size**2, dtype=model.dtype)
            model.model.visual(pixels, grid_thw=size, position_ids=torch.zeros(len(pixels), 2, dtype=torch.long))
            return
        length = high * wide + QUESTION + learns * REASONS
        embeds = torch.zeros(1, length, model.config.text_config.hidden_size, dtype=model.dtype, requires_grad=learns)
        places = torch.zeros(3, 1, length, dtype=torch.long)
        seen = model.model.language_model(inputs_embeds=embeds, position_ids=places, use_cache=False)[0]
        logits = model.lm_head(seen if learns else seen[:, -1])
        if learns:
            logits.mean().backward()


def operations(function: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products in a call; on the meta device nothing is computed."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def _timed(function: Callable[[], Any]) -> float:
    """Seconds of a call, on a GPU until it has finished: the best of three."""
    gpu = torch.cuda.is_available()
    return min(timeit.repeat(lambda: (function(), gpu and torch.cuda.synchronize()), number=1, repeat=3))


def hours(steps: Mapping[str, Mapping[str, float]], images: int, settings: Settings) -> dict[str, float]:
    """Hours under our schedule and, at least, under the authors', for so many images split 80/10/10.

    Ours sees each picture once, and again where tokens are not kept (`vlm.cache_visual_tokens`). Theirs runs the tower
    in each epoch of the distillation, and the VLM answers in each epoch of the gate (their code): counted as scored
    answers, for how long the written ones are is not known.
    """
    tower, answer, lora = (images * cost["seconds"] / 3600 for cost in steps.values())
    again = 0 if settings.vlm.cache_visual_tokens else tower
    tuning = 0.8 * len(settings.vlm.triplet_kinds) * settings.vlm.epochs
    ours = tower + (0.2 + 1) * (answer + again) + tuning * (lora + again)  # zero-shot of val and test, tuned of all
    answers = 0.8 * settings.gate.epochs + 2 * 0.1  # each epoch's, and two models' of test
    theirs = tuning * (lora + tower) + 0.8 * settings.distill.epochs * tower + answers * (answer + tower)
    return {"hours, ours": ours, "hours, authors' at least": theirs}


def _page(report: Mapping[str, Any]) -> str:
    facts = {name: {"value": x} for name, x in report.items() if not isinstance(x, dict)}
    parts = {"what": facts, "step": report["steps"], "dataset": report["datasets"]}
    frames = [pd.DataFrame.from_dict(part, "index").rename_axis(name) for name, part in parts.items()]
    tables = [markdown_text(f.map(lambda x: float(f"{x:.2g}") if isinstance(x, float) else x)) for f in frames]
    return f"""# Rehearsal

Estimates for this machine, by arithmetic; those of a CPU say nothing about a GPU, those of a busy machine nothing.

{tables[0]}
One picture: operations, seconds by them, and seconds of one layer beside those that it really took.

{tables[1]}
Not counted: teacher, heads and gates (some per cent at most), reading pictures, unpacking 4-bit weights, and how many
words the authors' answers have. Sizes that are not recorded are those of --dataset-size.

{tables[2]}"""
