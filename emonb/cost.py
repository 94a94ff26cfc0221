"""What an answer costs: parameters that are needed for it, and milliseconds per picture on this machine.

Measured right after the model is assembled (notebook 06). One picture at a time, as a user asks; the time
includes reading and decoding the file and all preprocessing, and on a GPU ends when the GPU has finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from emonb import distill, gate
from emonb.errors import EmonbError
from emonb.fit import get_device
from emonb.model import EmoVLMKD
from emonb.paper_values import dataset_title
from emonb.predictions import model_name
from emonb.samples import read_samples
from emonb.settings import Settings
from emonb.store import Artifact, Store, read_json, write_json
from emonb.teacher import load_network
from emonb.teacher_training import Pictures
from emonb.tuning import adapted
from emonb.vlm import VLM, answer_distribution, visual_tokens

__all__ = ["cost_stage", "cost_table", "count", "milliseconds"]

PICTURES, WARM_UP = 32, 4  # timed pictures, and untimed ones before them; ours

Answer = Callable[[str], Any]  # path of a picture -> anything


def count(modules: Sequence[nn.Module]) -> int:
    """Parameters of these modules, shared ones once; a weight packed to 4 bits counts as what it stands for."""
    found = {id(p): p for module in modules for p in module.parameters()}
    packed = (getattr(p, "quant_state", None) for p in found.values())
    return sum(math.prod(q.shape) if q is not None else p.numel() for p, q in zip(found.values(), packed, strict=True))


def milliseconds(answer: Answer, paths: Sequence[str], device: torch.device, warm_up: int = WARM_UP) -> np.ndarray:
    """Wall time of each answer, (N,) in milliseconds, after some untimed ones of the first pictures."""

    def finish() -> None:
        if device.type == "cuda":  # kernels are only queued when a call returns
            torch.cuda.synchronize(device)

    taken = []
    with torch.inference_mode():
        for path in paths[:warm_up]:
            answer(path)
        for path in paths:
            finish()
            start = time.perf_counter()
            answer(path)
            finish()
            taken.append(1000 * (time.perf_counter() - start))
    return np.array(taken)


def cost_stage(settings: Settings, store: Store, dataset: str, base: VLM) -> Artifact:
    """Measure every model of a dataset (stage `cost`); `cost.json` has a row per model.

    Each row: model, parameters (all that are needed to answer), trainable (of these, trained here), ms_median,
    ms_low, ms_high (quartiles), n, device. A stored result stays as it was measured; `force="cost"` measures anew.

    Args:
        base: the VLM without adapter, already in memory.
    """
    needed = {s: store.find(s, dataset) for s in ("samples", "adapter", "head", "gate")}
    networks = {}
    for name in settings.teacher.networks:
        with suppress(EmonbError):  # a network that failed has no cost
            networks[name] = store.find("teacher", f"{dataset}--{name}")

    def build(folder: Path) -> None:
        paths = read_samples(needed["samples"], "test", ["path"])["path"].head(PICTURES).tolist()
        rows = _vlm_rows(settings, base, needed, paths)
        rows += [_network_row(name, artifact, paths) for name, artifact in networks.items()]
        write_json(folder / "cost.json", rows)

    params = {"pictures": PICTURES, "warm_up": WARM_UP, "seed": settings.seed, **settings.vlm.model_dump(mode="json")}
    inputs = [*needed.values(), *networks.values()]
    return store.get("cost", dataset, build, params=params, inputs=inputs, code=["emonb.cost"])


def _vlm_rows(settings: Settings, base: VLM, needed: Mapping[str, Artifact], paths: list[str]) -> list[dict]:
    """VLM before and after tuning, the head on the vision tower, and the assembled model."""
    labels = read_json(needed["head"].path / "heads.json")["labels"]

    def ask(vlm: VLM) -> Answer:
        return lambda path: answer_distribution(vlm, visual_tokens(vlm, [path]), labels)

    def row(model: str, modules: Sequence[nn.Module], trained: int, answer: Answer) -> dict[str, Any]:
        return _row(model, count(modules), trained, milliseconds(answer, paths, base.device), base.device)

    rows = [row("vlm_zero_shot", [base.model], 0, ask(base))]
    student = distill.load_head(needed["head"], "head", settings.seed)
    gating = gate.load_gate(needed["gate"], "emovlmkd", settings.seed)
    with adapted(base, needed["adapter"]) as tuned:
        whole = EmoVLMKD(tuned, student, gating, {"labels": labels}).eval()
        lora = sum(p.numel() for name, p in tuned.model.named_parameters() if "lora_" in name)
        rows.append(row("vlm_tuned", [tuned.model], lora, ask(tuned)))

        def head(path: str) -> torch.Tensor:
            return student(visual_tokens(tuned, [path]).pooled().to(tuned.device))

        rows.append(row("head", [tuned.core.visual, student], count([student]), head))
        trained = lora + count([student, gating])
        rows.append(row("emovlmkd", [tuned.model, student, gating], trained, lambda path: whole([path])))
    return rows


def _network_row(name: str, artifact: Artifact, paths: list[str]) -> dict[str, Any]:
    net, settings, labels = load_network(artifact)
    device = get_device()
    net.to(device)

    def answer(path: str) -> torch.Tensor:
        one = Pictures(pd.DataFrame({"path": [path], "label": labels[:1]}), labels, settings, train=False)
        return net(one[0][0][None].to(device))

    size = count([net])
    return _row(name, size, size, milliseconds(answer, paths, device), device)


def _row(model: str, parameters: int, trained: int, taken: np.ndarray, device: torch.device) -> dict[str, Any]:
    low, median, high = np.percentile(taken, [25, 50, 75]).round(3).tolist()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    times = {"ms_median": median, "ms_low": low, "ms_high": high, "n": len(taken), "device": name}
    return {"model": model, "parameters": parameters, "trainable": trained, **times}


def cost_table(artifacts: Mapping[str, Artifact]) -> pd.DataFrame:
    """The `cost` table from {dataset: artefact}: one row per dataset and model."""
    names = ["dataset", "model", "name", "parameters", "trainable", "ms_median", "ms_low", "ms_high", "n", "device"]
    rows = [
        {"dataset": dataset_title(dataset), "name": model_name(row["model"]), **row}
        for dataset, artifact in artifacts.items()
        for row in read_json(artifact.path / "cost.json")
    ]
    table = pd.DataFrame(rows, columns=names)
    table.attrs["caption"] = (
        "Table cost: parameters needed for an answer, those trained here, and milliseconds per picture (median and "
        "quartiles over n test pictures, one at a time, decoding and preprocessing included). The head's cost "
        "includes the vision tower that it reads; the tuned models' the adapter, not merged into the weights."
    )
    return table
