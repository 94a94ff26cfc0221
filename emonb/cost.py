"""What an answer costs: parameters that are needed for it, and milliseconds per picture on this machine.

Measured right after the model is assembled (notebook 06). One picture at a time, as a user asks; the time
includes reading and decoding the file and all preprocessing, and on a GPU ends when the GPU has finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

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

PICTURES, WARM_UP = 16, 2  # timed pictures, and untimed ones before them; ours: some seconds a dataset on a laptop

Answer = Callable[[str], Any]  # path of a picture -> anything


class Model(NamedTuple):
    """A model to measure; `within` is entered around each answer, outside the measured time."""

    answer: Answer
    parameters: int = 0  # all that are needed to answer
    trainable: int = 0  # of these, trained here
    within: Callable[[], AbstractContextManager] = nullcontext


def count(modules: Sequence[nn.Module]) -> int:
    """Parameters of these modules, shared ones once; a weight packed to 4 bits counts as what it stands for."""
    found = {id(p): p for module in modules for p in module.parameters()}
    packed = (getattr(p, "quant_state", None) for p in found.values())
    return sum(math.prod(q.shape) if q is not None else p.numel() for p, q in zip(found.values(), packed, strict=True))


def milliseconds(
    models: Mapping[str, Model], paths: Sequence[str], device: torch.device, warm_up: int = WARM_UP
) -> dict[str, np.ndarray]:
    """Wall time of each answer, {model: (N,) in milliseconds}, after some untimed ones of the first pictures.

    The models take turns picture by picture: what else the machine does meanwhile slows all of them alike.
    """

    def finish() -> None:
        if device.type == "cuda":  # kernels are only queued when a call returns
            torch.cuda.synchronize(device)

    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for number, path in enumerate([*paths[:warm_up], *paths]):
            for name, model in models.items():
                with model.within():
                    finish()
                    start = time.perf_counter()
                    model.answer(path)
                    finish()
                    seconds = time.perf_counter() - start
                if number >= warm_up:
                    taken[name].append(1000 * seconds)
    return {name: np.array(values) for name, values in taken.items()}


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
        with adapted(base, needed["adapter"]) as tuned:
            models = {**_vlm_models(settings, tuned, needed), **{n: _network(a) for n, a in networks.items()}}
            taken = milliseconds(models, paths, base.device)
        gpu = base.device.type == "cuda"
        device = torch.cuda.get_device_name(base.device) if gpu else base.device.type
        rows = []
        for name, model in models.items():
            low, median, high = np.percentile(taken[name], [25, 50, 75]).round(3).tolist()
            times = {"ms_median": median, "ms_low": low, "ms_high": high, "n": len(paths), "device": device}
            rows.append({"model": name, "parameters": model.parameters, "trainable": model.trainable, **times})
        write_json(folder / "cost.json", rows)

    params = {"pictures": PICTURES, "warm_up": WARM_UP, "seed": settings.seed, **settings.vlm.model_dump(mode="json")}
    inputs = [*needed.values(), *networks.values()]
    return store.get("cost", dataset, build, params=params, inputs=inputs, code=["emonb.cost"])


def _vlm_models(settings: Settings, tuned: VLM, needed: Mapping[str, Artifact]) -> dict[str, Model]:
    """VLM before and after tuning, the head on the vision tower, and the assembled model."""
    labels = read_json(needed["head"].path / "heads.json")["labels"]
    student = distill.load_head(needed["head"], "head", settings.seed)
    gating = gate.load_gate(needed["gate"], "emovlmkd", settings.seed)
    whole = EmoVLMKD(tuned, student, gating, {"labels": labels}).eval()
    lora = sum(p.numel() for name, p in tuned.model.named_parameters() if "lora_" in name)
    everything = count([tuned.model])

    def ask(path: str) -> torch.Tensor:
        return answer_distribution(tuned, visual_tokens(tuned, [path]), labels)

    def head(path: str) -> torch.Tensor:
        return student(visual_tokens(tuned, [path]).pooled().to(tuned.device))

    added = count([student, gating])
    return {
        "vlm_zero_shot": Model(ask, everything - lora, 0, tuned.model.disable_adapter),
        "vlm_tuned": Model(ask, everything, lora),
        "head": Model(head, count([tuned.core.visual, student]), count([student])),
        "emovlmkd": Model(lambda path: whole([path]), everything + added, lora + added),
    }


def _network(artifact: Artifact) -> Model:
    net, settings, labels = load_network(artifact)
    device = get_device()
    net.to(device)

    def answer(path: str) -> torch.Tensor:
        one = Pictures(pd.DataFrame({"path": [path], "label": labels[:1]}), labels, settings)
        return net(one[0][0][None].to(device))

    return Model(answer, count([net]), count([net]))


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
