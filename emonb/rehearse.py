"""`python -m emonb rehearse`: what a run at the paper's size would cost on this machine, by arithmetic, in seconds.

The operations of every step are counted on torch's meta device, without weights, and divided by the rate at which
this machine multiplies matrices of the model's own shape; a generated token reads every weight once, so it is bounded
by how fast they are read. How far off such estimates are is shown by real steps beside them.
"""

from __future__ import annotations

import copy
import math
import os
import timeit
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from emonb.cost import count_vlm, vlm_config
from emonb.data import TAXONOMIES, question, taxonomy_for_dataset
from emonb.errors import EmonbError
from emonb.files import atomic_write, make_folder, resource, write_json
from emonb.machine import get_device, git_state, library_versions, machine
from emonb.predictions import dataset_title, is_drawn
from emonb.settings import Settings, TripletSettings, VLMSettings, load_settings
from emonb.tables import markdown_text
from emonb.tuning import add_lora
from emonb.vlm import VLM, answer_ids, load_processor, prompt_ids

LABELS = TAXONOMIES["mikels8"].labels
_SHORT = {"7b": "Qwen/Qwen2-VL-7B-Instruct", "2b": "Qwen/Qwen2-VL-2B-Instruct"}
# (train, val, test) where lists are recorded; else a total, split 80/10/10 as an unsplit tree is on import: ours
_IMAGES = {"fi": 23_000, "emoset": (94_481, 5_905, 17_716), "emotion6": 1_980}  # paper, official lists, paper
_UNKNOWN = 10_000  # images of any other dataset
Price = Callable[[TripletSettings, tuple[int, int], int, Sequence[str]], Mapping[str, float]]


def rehearse(
    profile: str = "paper",
    *,
    model: str = "",
    dataset_size: int | None = None,
    image_side: int = 1024,
    device: str = "auto",
    out: Path = Path("build/rehearsal"),
    price: Price | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Estimate every stage and write `report.json` and `report.md`.

    Args:
        profile: as for `python -m emonb run`.
        model: 7b, 2b, stand-in, or a folder with config.json; "" is the profile's.
        dataset_size: images of each dataset whose size is not recorded here; None: hours are per 10,000.
        image_side: long side of the pictures, pixels; the short one is three quarters of it.
        device: auto, cpu or cuda.
        out: folder of the report.
        price: gives USD `low`, `high`, `worst` of the triplets of so many pictures of a size; None leaves them out.
        say: gets the messages.

    Returns:
        The report as it stands in report.json.

    Raises:
        EmonbError: an unknown model, device or profile.
    """
    if image_side < 56 or (dataset_size is not None and dataset_size < 10):
        raise EmonbError("rehearse: --image-side must be at least 56 (pixels), --dataset-size at least 10 (images)")
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise EmonbError(f"rehearse: no device {device!r} here; use --device auto or cpu (cuda needs an NVIDIA GPU)")
    settings, where = load_settings(profile), get_device() if device == "auto" else torch.device(device)
    base, vlm = _SHORT.get(model.lower(), model) or settings.vlm.base, settings.vlm
    config, picture = _architecture(base), (image_side, image_side * 3 // 4)
    folder, counts = make_folder(Path(out)), count_vlm(base, vlm.lora_r, vlm.lora_targets)
    report: dict[str, Any] = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "profile": settings.profile,
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "machine": {**machine(), "load_average": round(os.getloadavg()[0], 2)},
        "versions": library_versions(),
        "git": git_state(),
        "model": Path(base).name if Path(base).is_dir() else base,
        "parameters": counts,
        "picture": picture,
        "annotator": settings.triplets.model,
        **_costs(config, vlm, counts, picture, where),
        "datasets": {},
    }
    for name in settings.datasets:
        images = _images(name, settings, dataset_size)
        pooled = 2 * sum(images.values()) * counts["features"]  # float16
        usd = price(settings.triplets, picture, images["train"], LABELS) if price else {}
        report["datasets"][name] = {
            "images": images,
            "seconds": schedules(report["seconds"], images, settings, report["tokens"]["shortest"]),
            "disk": {"pooled": pooled, "tokens": pooled * report["tokens"]["visual"]},
            "usd": {case: x for case, x in usd.items() if math.isfinite(x)},  # unknown prices are left out
        }
    write_json(folder / "report.json", report)
    atomic_write(folder / "report.md", "\n".join(_page(report)) + "\n")
    say(f"{folder / 'report.md'}")
    return report


def _architecture(base: str) -> Any:
    try:
        config = vlm_config(base)
        if config.model_type != "qwen2_vl":
            raise ValueError(f"its model_type is {config.model_type}")
    except Exception as error:  # a strict config raises what its field's check raises
        why = str(error).strip().splitlines()[0]
        known = "7b, 2b, stand-in or a folder that holds the config.json of a Qwen2-VL"
        raise EmonbError(f"rehearse: model {base!r}: no Qwen2-VL architecture ({why}); use {known}") from None
    return config


def _images(name: str, settings: Settings, given: int | None) -> dict[str, int]:
    """Images of a dataset by split."""
    size: Any = _IMAGES.get(name, given or _UNKNOWN)
    if is_drawn(name):
        size = getattr(settings.world, taxonomy_for_dataset(name).name)
    if isinstance(size, int):
        size = (size - 2 * round(size / 10), round(size / 10), round(size / 10))
    return dict(zip(("train", "val", "test"), size, strict=True))


# ---- what a step costs ---------------------------------------------------------------------------------------------


def _costs(
    config: Any, vlm: VLMSettings, counts: Mapping[str, int], picture: tuple[int, int], device: torch.device
) -> dict[str, Any]:
    """Tokens, operations, rates of this machine, seconds, bytes, and estimates with real steps beside them."""
    text, dtype = config.text_config, getattr(torch, vlm.dtype)
    grid, tokens = _lengths(config, picture, vlm)
    work = {name: operations(step) for name, step in _steps(config, vlm, grid, tokens, "meta").items()}
    rate = matmul_rate(device, dtype, tokens["prompt"], text)
    reading = matmul_rate(device, dtype, 1, text) / 2 * dtype.itemsize  # one row: the weights are what is read
    read = counts["language model"] - counts["embeddings"] + text.vocab_size * text.hidden_size  # of these, the output
    seconds = {name: count / rate for name, count in work.items()} | {"token": read * dtype.itemsize / reading}
    part, what = config, "the whole model"
    if device.type == "cpu" or torch.cuda.mem_get_info(device)[0] < 1.2 * counts["total"] * dtype.itemsize:
        part, what = copy.deepcopy(config), "one layer of the model"  # of the real width: some seconds
        part.vision_config.depth = part.text_config.num_hidden_layers = 1
        part.text_config.layer_types, part.text_config.vocab_size = part.text_config.layer_types[:1], 1024
    small = vlm.model_copy(update={"dtype": "float32"})  # as the laptop's profile has it
    compared = ((what, part, vlm), ("the stand-in", vlm_config("stand-in"), small))
    return {
        "tokens": tokens,
        "operations": work,
        "rates": {"matmul": rate, "reading": reading, "dtype": vlm.dtype},
        "seconds": seconds,
        "bytes": _bytes(text, vlm, counts, tokens["sequence"], packed=vlm.quantize_4bit and device.type == "cuda"),
        "check": [row for one in compared for row in _compare(*one, grid, tokens, device)],
    }


def operations(step: Callable[[], Any]) -> float:
    """Floating-point operations of the matrix products of a step; on the meta device nothing is computed."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def timed(step: Callable[[], Any]) -> float:
    """Seconds of a step, on a GPU until it has finished: the best of some after a warm-up, or one long one."""

    def once() -> float:
        return timeit.timeit(lambda: (step(), torch.cuda.is_available() and torch.cuda.synchronize()), number=1)

    first = once()
    return first if first > 2 else min(once() for _ in range(3 if first > 0.1 else 20))


def matmul_rate(device: torch.device, dtype: torch.dtype, rows: int, text: Any) -> float:
    """Operations a second of so many rows times a matrix of the language model's MLP."""
    a = torch.randn(rows, text.hidden_size, device=device).to(dtype)
    b = torch.randn(text.intermediate_size, text.hidden_size, device=device).to(dtype)
    return 2 * a.shape[0] * b.numel() / timed(lambda: a @ b.T)


def _lengths(config: Any, picture: tuple[int, int], settings: VLMSettings) -> tuple[tuple[int, int], dict[str, int]]:
    """Patches of a picture (high, wide); tokens: `visual`, of `prompt`, training `sequence`, shortest, longest answer.

    Words are those of the stand-in's tokenizer: a real one cuts some of them in two. The training sequence is of the
    longest kind of triplet, reasons of four sentences.
    """
    vision, vlm = config.vision_config, VLM(None, load_processor("stand-in"), settings.max_side)
    merge, scale = vision.spatial_merge_size, min(1.0, settings.max_side / max(picture))
    high, wide = (max(1, round(side * scale / (vision.patch_size * merge))) for side in picture[::-1])
    closing = resource("prompts.yaml", "reasoning", "closing")
    short = resource("prompts.yaml", "categorical", "response").format(label="anger")
    prompt = len(prompt_ids(vlm, question(LABELS))) - 1 + high * wide  # one placeholder stands for the picture
    sequence = prompt + len(answer_ids(vlm, " ".join(list(closing.values())[:4])))
    tokens = {"visual": high * wide, "prompt": prompt, "sequence": sequence}
    tokens |= {"shortest": len(answer_ids(vlm, short)), "longest": settings.max_new_tokens}
    return (high * merge, wide * merge), tokens


def _steps(
    config: Any, vlm: VLMSettings, grid: tuple[int, int], tokens: Mapping[str, int], device: str
) -> dict[str, Callable[[], None]]:
    """The steps of a model with random weights on one picture, on any device: meta to count, a real one to time."""
    from transformers import AutoModelForImageTextToText

    vision, dtype = config.vision_config, getattr(torch, vlm.dtype)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        model = add_lora(VLM(model, None, 0), r=vlm.lora_r, targets=vlm.lora_targets).model.get_base_model()
    if vlm.gradient_checkpointing:
        model.activation_checkpointing_enable()

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def read(length: int) -> torch.Tensor:
        embeds = zeros(1, length, config.text_config.hidden_size).requires_grad_(torch.is_grad_enabled())
        places = zeros(3, 1, length, dtype=torch.long)
        return model.model.language_model(inputs_embeds=embeds, position_ids=places, use_cache=False)[0]

    @torch.no_grad()
    def tower() -> None:
        patches, size = math.prod(grid), vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        places = zeros(patches, 2, dtype=torch.long)
        model.model.visual(zeros(patches, size), grid_thw=torch.tensor([[1, *grid]]), position_ids=places)

    @torch.no_grad()
    def answer() -> None:
        model.eval().lm_head(read(tokens["prompt"])[:, -1])

    def lora() -> None:
        model.train().lm_head(read(tokens["sequence"])).mean().backward()
        model.zero_grad()

    return {"tower": tower, "answer": answer, "lora": lora}


def _bytes(text: Any, vlm: VLMSettings, counts: Mapping[str, int], length: int, *, packed: bool) -> dict[str, float]:
    """Bytes of the weights, and of a LoRA step beside them: adapter with Adam's moments, activations, logits.

    4-bit NF4 takes 0.516 bytes a weight (QLoRA paper), the embedding and output matrices stay in 16 bits. A token
    keeps three tensors of the MLP's width and, in float32, ten of the model's in each layer (counted in
    transformers' Qwen2-VL); with gradient checkpointing in one layer at a time, and the inputs of the others.
    """
    wide, layers = getattr(torch, vlm.dtype).itemsize, text.num_hidden_layers
    layer = 3 * text.intermediate_size * wide + 10 * text.hidden_size * 4
    kept = layer + layers * text.hidden_size * wide if vlm.gradient_checkpointing else layers * layer
    step = vlm.train_batch_size * length * (kept + 2 * text.vocab_size * wide)  # logits and their gradient
    whole = counts["embeddings"] if packed else counts["total"]
    return {"weights": whole * wide + 0.516 * (counts["total"] - whole), "LoRA step": step + 16 * counts["lora"]}


def _compare(
    what: str, config: Any, vlm: VLMSettings, grid: tuple[int, int], tokens: Mapping[str, int], device: torch.device
) -> list[dict[str, Any]]:
    """Estimates beside real steps of a model with random weights; `ratio` is measured over estimated."""
    rate = matmul_rate(device, getattr(torch, vlm.dtype), tokens["prompt"], config.text_config)
    counted, real = (_steps(config, vlm, grid, tokens, on) for on in ("meta", str(device)))
    rows = []
    for name, step in real.items():
        estimated, measured = operations(counted[name]) / rate, timed(step)
        numbers = {"estimated": estimated, "measured": measured, "ratio": measured / estimated}
        rows.append({"model": what, "step": name, **numbers})
    return rows


# ---- hours ---------------------------------------------------------------------------------------------------------


def schedules(
    cost: Mapping[str, float], images: Mapping[str, int], settings: Settings, shortest: int
) -> dict[str, dict[str, float]]:
    """Seconds per stage under our schedule and under the authors'.

    Ours sends each image through the vision tower once; without `vlm.cache_visual_tokens` again wherever the language
    model needs it. The authors' runs the tower in each epoch of the distillation, and in each epoch of the gate writes
    the VLM's answer to each image again, one at a time (their code); how long these answers are is not known, nor
    whether there is a pass over val. Teacher, heads and gates are not counted: some per cent of either at most.

    Args:
        cost: seconds per picture of `tower`, `answer`, `lora`, and of a generated `token`.
        images: of `train`, `val`, `test`.
        settings: of the profile; its `vlm.max_new_tokens` is the length of the longest answer.
        shortest: tokens of the shortest answer.
    """
    train, every, longest = images["train"], sum(images.values()), settings.vlm.max_new_tokens
    sequences = train * len(settings.vlm.triplet_kinds) * settings.vlm.epochs

    def ours(again: float) -> dict[str, float]:
        return {
            "features": every * cost["tower"],
            "zero-shot answers": (every - train) * (cost["answer"] + again),
            "LoRA": sequences * (cost["lora"] + again),
            "tuned answers": every * (cost["answer"] + again),
        }

    def authors(tokens: int) -> dict[str, float]:
        written = cost["tower"] + cost["answer"] + tokens * cost["token"]
        return {
            "LoRA": sequences * (cost["lora"] + cost["tower"]),
            "distillation": settings.distill.epochs * train * cost["tower"],
            "gate": settings.gate.epochs * train * written,
            "test answers": 2 * images["test"] * written,
        }

    theirs = {"authors', shortest answers": authors(shortest), "authors', longest": authors(longest)}
    return {"ours": ours(cost["tower"]), "ours, tokens kept": ours(0.0), **theirs}


# ---- the page ------------------------------------------------------------------------------------------------------


def _two(value: float) -> str:
    """Two significant digits, thousands separated."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def _table(head: str, rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; `head` has its columns between semicolons."""
    texts = [[_two(x) if isinstance(x, float) else str(x) for x in row] for row in rows]
    return "\n" + markdown_text(pd.DataFrame(texts, columns=head.split("; ")))


def _page(report: Mapping[str, Any]) -> list[str]:
    """report.md from the tree of report.json."""
    here, tokens, counts, rates, memory = (
        report[name] for name in ("machine", "tokens", "parameters", "rates", "bytes")
    )
    work = [[name, count / 1e12, report["seconds"][name]] for name, count in report["operations"].items()]
    work.append(["a generated token", "-", report["seconds"]["token"]])
    hours, rest = [], []
    for name, found in report["datasets"].items():
        title, (_, kept, *theirs) = dataset_title(name), found["seconds"].values()
        size = f"{sum(found['images'].values()):,}{'' if name in _IMAGES or is_drawn(name) else ' (not recorded)'}"
        totals = [sum(stages.values()) for stages in found["seconds"].values()]
        after = [(t["distillation"] + t["gate"]) / (kept["features"] + kept["tuned answers"]) for t in theirs]
        ratios = (" to ".join(_two(x) for x in part) for part in ([t / totals[1] for t in totals[2:]], after))
        hours.append([title, size, *(total / 3600 for total in totals), *ratios])
        rest.append([title, *(size / 1e9 for size in found["disk"].values()), *found["usd"].values()])
    usd = f"; triplets by {report['annotator']}, USD: low; high; worst" if rest[0][3:] else ""
    return [
        f"# Rehearsal: {report['model']} on {here['cpu'] if report['device'] == 'cpu' else report['device']}",
        "",
        f"{report['written']}, profile {report['profile']}, commit {report['git'].get('commit', 'unknown')[:12]}, "
        f"torch {report['versions']['torch']}; {here['cores']} cores, {here['memory_gb']} GB, "
        f"{here['gpu'] or 'no GPU'}, load average {here['load_average']}. Estimates for this machine, by arithmetic; "
        "those of a CPU say nothing about a GPU."
        + " **The machine was busy: run it again when it is idle.**"
        * (here["load_average"] > here["cores"]),
        "",
        f"- Parameters: {counts['total']:,} (vision tower {counts['vision tower'] + counts['merger']:,}, language "
        f"model {counts['language model']:,}); LoRA {counts['lora']:,} more.",
        f"- Memory: weights {_two(memory['weights'] / 1e9)} GB, a LoRA step {_two(memory['LoRA step'] / 1e9)} GB more "
        "(adapter with Adam's moments, activations by the tensors that a layer keeps, logits).",
        f"- A picture of {' x '.join(map(str, report['picture']))} px is {tokens['visual']:,} visual tokens; with its "
        f"question {tokens['prompt']:,}, a training sequence {tokens['sequence']:,} (words cut as by the stand-in).",
        f"- This machine: {_two(rates['matmul'] / 1e12)} TFLOP/s in products of the model's shape ({rates['dtype']}), "
        f"{_two(rates['reading'] / 1e9)} GB/s of weights read for one token.",
        _table("step, one picture; TFLOP; estimated seconds", work),
        "Estimates beside real steps, in seconds; the ratio is how much longer the real step took:",
        _table("model; step; estimated; measured; ratio", [list(row.values()) for row in report["check"]]),
        "Hours. Not counted: teacher, heads and gates (some per cent at most), reading pictures, and what unpacking "
        f"4-bit weights costs. How long the authors' answers are is not known: {tokens['shortest']} to "
        f"{tokens['longest']} tokens.",
        _table(f"dataset; images; {'; '.join(found['seconds'])}; authors' / ours, kept; the same after tuning", hours),
        _table(f"dataset; pooled features, GB; all visual tokens, GB{usd}", rest),
    ]
