"""Room 06: the gate weighs the VLM's answer and the distilled head (paper: section on the gate).

`h = [one-hot(VLM answer) ; softmax(student)]`, `logits = W h + b`; only the gate trains, by cross-entropy.
Five gates are compared. The authors' code feeds the student's raw logits where the paper says
probabilities; both are trained here, as is a gate that sees the VLM's whole distribution.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emonb.emotions import check_labels
from emonb.errors import EmonbError
from emonb.fit import fit, outputs, set_seed
from emonb.predictions import (
    PredictionWriter,
    make_predictions,
    prediction_labels,
    probabilities,
    read_predictions,
)
from emonb.progress import progress
from emonb.settings import SPLITS, GateSettings, Settings
from emonb.store import Artifact, Store, read_json, write_json

__all__ = ["GATES", "average", "gate_inputs", "gate_names", "gate_stage", "load_gate", "make_gate", "one_hot"]


class _Gate(nn.Module):
    arity = 2  # inputs that the training loop passes on: VLM (B, C) and head (B, C)


class ConcatGate(_Gate):
    """Concat & linear: the paper's choice, 2C x C weights and C biases."""

    def __init__(self, classes: int):
        super().__init__()
        self.linear = nn.Linear(2 * classes, classes)

    def forward(self, vlm: Tensor, head: Tensor) -> Tensor:
        return self.linear(torch.cat([vlm, head], -1))


class BilinearGate(_Gate):
    """Bilinear form of the two inputs, then linear."""

    def __init__(self, classes: int):
        super().__init__()
        self.bilinear, self.linear = nn.Bilinear(classes, classes, classes), nn.Linear(classes, classes)

    def forward(self, vlm: Tensor, head: Tensor) -> Tensor:
        return self.linear(self.bilinear(vlm, head))


class MixtureGate(_Gate):
    """Mixture of three linear experts on the concatenated inputs, weighted by a softmax router."""

    def __init__(self, classes: int, experts: int = 3):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2 * classes, classes) for _ in range(experts))
        self.router = nn.Linear(2 * classes, experts)

    def forward(self, vlm: Tensor, head: Tensor) -> Tensor:
        both = torch.cat([vlm, head], -1)
        answers = torch.stack([expert(both) for expert in self.experts], 1)
        return (self.router(both).softmax(-1)[..., None] * answers).sum(1)


class DynamicGate(_Gate):
    """Dynamic weighting: a softmax over the two inputs' weights, their weighted sum, then linear."""

    def __init__(self, classes: int):
        super().__init__()
        self.weigh, self.linear = nn.Linear(2 * classes, 2), nn.Linear(classes, classes)

    def forward(self, vlm: Tensor, head: Tensor) -> Tensor:
        weight = self.weigh(torch.cat([vlm, head], -1)).softmax(-1)
        return self.linear(weight[:, :1] * vlm + weight[:, 1:] * head)


class CrossGate(_Gate):
    """Cross gating: each input's sigmoid gates the other, summed, then linear."""

    def __init__(self, classes: int):
        super().__init__()
        self.from_vlm, self.from_head = nn.Linear(classes, classes), nn.Linear(classes, classes)
        self.linear = nn.Linear(classes, classes)

    def forward(self, vlm: Tensor, head: Tensor) -> Tensor:
        return self.linear(self.from_vlm(vlm).sigmoid() * head + self.from_head(head).sigmoid() * vlm)


GATES = {
    "concat": ConcatGate,
    "bilinear": BilinearGate,
    "moe": MixtureGate,
    "dynamic": DynamicGate,
    "cross": CrossGate,
}


def make_gate(kind: str, classes: int) -> nn.Module:
    """A fresh gate of one of the five kinds."""
    return GATES[kind](classes)


def one_hot(answer: Tensor, parsed: Tensor) -> Tensor:
    """(B, C) scores or probabilities -> (B, C) one-hot answer; an unparsable answer is all zeros."""
    hot = nn.functional.one_hot(answer.argmax(-1), answer.shape[-1]).float()
    return hot * parsed[:, None].float()


def gate_names(settings: GateSettings) -> dict[str, tuple[str, str]]:
    """Every gate to train: model name -> (kind, inputs). `emovlmkd` is the paper's.

    Inputs: `probabilities` (paper), `logits` (authors' code) or `soft` (the VLM's whole distribution).
    """
    names = {"emovlmkd": (settings.kind, "probabilities")}
    names |= {f"gate_{k}": (k, "probabilities") for k in settings.kinds if k != settings.kind}
    return names | {f"gate_{settings.kind}_{i}": (settings.kind, i) for i in ("logits", "soft")}


def gate_inputs(vlm: pd.DataFrame, student: Tensor, inputs: str) -> tuple[Tensor, Tensor, Tensor]:
    """What a gate sees: VLM (N, C), head (N, C), and the label indices (N,).

    Args:
        vlm: the VLM's predictions of one split.
        student: (N, C) logits of the head for the same images in the same order.
        inputs: `probabilities` (paper: one-hot answer, softmax of the head), `logits` (authors' code:
            one-hot answer, raw logits) or `soft` (both as probabilities).
    """
    labels = prediction_labels(vlm)
    answer = torch.tensor(probabilities(vlm), dtype=torch.float32)
    if inputs != "soft":
        answer = one_hot(answer, torch.tensor(vlm["parsed"].tolist()))
    student = student if inputs == "logits" else student.softmax(-1)
    return answer, student, torch.tensor([labels.index(x) for x in vlm["label"]])


def gate_stage(settings: Settings, store: Store, dataset: str) -> Artifact:
    """Train all gates of all seeds (stage `gate`); seed k of a gate reads seed k of the head.

    Files: `<model>.seed<k>.safetensors`, `gates.json`, `history.json` (of `emovlmkd`), `<model>.parquet`.
    """
    vlm_artifact, head_artifact = store.find("vlm_predictions", dataset), store.find("head", dataset)
    config = settings.gate

    def build(folder: Path) -> None:
        labels = read_json(head_artifact.path / "heads.json")["labels"]
        answers = vlm_artifact.path / "predictions.parquet"
        parts = {s: read_predictions(answers, labels, split=s) for s in SPLITS}
        logits = load_file(head_artifact.path / "logits.safetensors")
        missing = [seed for seed in settings.seeds if f"train.seed{seed}" not in logits]
        if missing:
            raise EmonbError(f"{head_artifact.path}: no head of seed {missing}; run notebook 05 with these seeds")
        file = head_artifact.path / "head.parquet"
        order = {s: _rows(read_predictions(file, labels, split=s), parts[s]) for s in SPLITS}
        history = []
        jobs = [(name, *spec) for name, spec in gate_names(config).items()]
        for name, kind, inputs in progress(jobs, f"gates of {dataset}", unit="gate"):
            with PredictionWriter(folder / f"{name}.parquet", labels) as out:
                for seed in settings.seeds:
                    data = {s: gate_inputs(parts[s], logits[f"{s}.seed{seed}"][order[s]], inputs) for s in SPLITS}
                    gate, curve = train_gate(kind, data["train"], data["val"], config, seed)
                    save_file(gate.state_dict(), folder / f"{name}.seed{seed}.safetensors")
                    if name == "emovlmkd":
                        history += curve
                    for split, part in parts.items():
                        out.add_scores(part["image_id"], split, part["label"], outputs(gate, data[split]), seed)
        kinds = {name: {"kind": k, "inputs": i} for name, (k, i) in gate_names(config).items()}
        write_json(folder / "gates.json", {"labels": labels, "gates": kinds})
        write_json(folder / "history.json", history)

    params = {**config.model_dump(), "seeds": list(settings.seeds)}
    inputs = [vlm_artifact, head_artifact]
    code = ["emonb.gate", "emonb.fit", "emonb.rows"]
    return store.get("gate", dataset, build, params=params, inputs=inputs, code=code)


def _rows(head: pd.DataFrame, vlm: pd.DataFrame) -> list[int]:
    """Positions of the VLM's images in the head's order (that of any one seed)."""
    ids = head.loc[head["seed"] == head["seed"].iloc[0], "image_id"]
    position = {image_id: i for i, image_id in enumerate(ids)}
    return [position[image_id] for image_id in vlm["image_id"]]


def train_gate(
    kind: str, train: tuple[Tensor, ...], val: tuple[Tensor, ...], settings: GateSettings, seed: int
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train one gate by cross-entropy on labels; returns it (eval mode) with its training curve."""
    set_seed(seed)
    gate = make_gate(kind, train[0].shape[1])
    options = settings.model_dump(include={"epochs", "lr", "weight_decay", "batch_size"})

    def loss(logits: Tensor, _vlm: Tensor, _head: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels)

    curve = fit(gate, train, val, loss, seed=seed, **options)
    return gate, curve


def load_gate(artifact: Artifact, name: str, seed: int) -> nn.Module:
    """A trained gate."""
    meta = read_json(artifact.path / "gates.json")
    gate = make_gate(meta["gates"][name]["kind"], len(meta["labels"]))
    gate.load_state_dict(load_file(artifact.path / f"{name}.seed{seed}.safetensors"))
    return gate.eval()


def average(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """The honest rival of any gate: the mean of two models' probabilities, nothing trained.

    With several seeds in `second`, one average per seed.
    """
    labels = prediction_labels(first)
    check_labels(prediction_labels(second), labels, "predictions to average")
    rows = []
    for seed, part in second.groupby("seed"):
        part = part.set_index("image_id").loc[first["image_id"]].reset_index()
        p = np.mean([probabilities(first), probabilities(part)], axis=0)
        columns = (first[c].tolist() for c in ("image_id", "split", "label"))
        rows.append(make_predictions(*columns, p, labels, seed=int(seed)))
    return pd.concat(rows, ignore_index=True)
