"""Room 05: the distilled head. A small MLP on the VLM's mean visual token learns from labels and teacher.

Loss (paper, knowledge distillation): `alpha * tau^2 * KL(p_teacher^tau || p_student^tau)
+ (1 - alpha) * CE(label, p_student)`, alpha 0.5, tau 2. The rest of the VLM stays frozen, so features and
teacher logits are computed once and every ablation trains on the cached tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emonb.fit import Columns, fit, outputs, set_seed
from emonb.predictions import PredictionWriter
from emonb.progress import progress
from emonb.rows import blocks, split_rows
from emonb.samples import read_samples, sample_labels
from emonb.settings import SPLITS, DistillSettings, Settings
from emonb.store import Artifact, Store, read_json, write_json

__all__ = [
    "StudentHead",
    "distillation_loss",
    "head_names",
    "head_stage",
    "load_head",
    "read_pooled",
]


class StudentHead(nn.Module):
    """MLP from the mean merged visual token to emotion logits: hidden layers, GELU, dropout (authors' code).

    With `standardize`, features are shifted and scaled by the training set's mean and deviation first.
    """

    arity = 1  # inputs that the training loop passes on

    def __init__(self, features: int, hidden: Sequence[int], classes: int, dropout: float = 0.1):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        layers: list[nn.Module] = []
        for width, following in zip([features, *hidden], hidden, strict=False):
            layers += [nn.Linear(width, following), nn.GELU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear([features, *hidden][-1], classes))

    def standardize_by(self, features: Columns) -> None:
        """Take mean and deviation from (N, D) training features, a block at a time, in double precision."""
        n = len(features)
        mean = sum(features[b].double().sum(0) for b in blocks(n)) / n
        squares = sum((features[b].double() - mean).square().sum(0) for b in blocks(n))
        self.mean.copy_(mean)
        self.deviation.copy_((squares / (n - 1)).sqrt().clamp_min(1e-6))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) pooled visual tokens -> (B, C) logits."""
        return self.layers((features - self.mean) / self.deviation)


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, alpha: float, tau: float, target: str = "label"
) -> Tensor:
    """The paper's loss; KL in the batch mean.

    Args:
        student, teacher: (B, C) logits.
        labels: (B,) class indices.
        alpha: weight of the distillation term, 0 to 1.
        tau: temperature; the factor tau^2 keeps the gradient's scale (Hinton et al. 2015).
        target: "label" (paper, code), or "teacher": its argmax, as in the article's sketch.
    """
    log_student = (student / tau).log_softmax(-1)
    log_teacher = (teacher / tau).log_softmax(-1)
    kl = nn.functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    hard = labels if target == "label" else teacher.argmax(-1)
    return alpha * tau**2 * kl + (1 - alpha) * nn.functional.cross_entropy(student, hard)


def head_names(settings: DistillSettings) -> dict[str, tuple[tuple[int, ...], float]]:
    """Every head to train: model name -> (hidden layers, alpha). `head` is the paper's setting."""
    names = {"head": (settings.hidden, settings.alpha)}
    names |= {f"head_alpha{a:g}": (settings.hidden, a) for a in settings.alphas if a != settings.alpha}
    names |= {f"head_depth{len(d)}": (d, settings.alpha) for d in settings.depths if d != settings.hidden}
    return names


def read_pooled(features: Artifact, teacher: Artifact, samples: Artifact, split: str) -> dict[str, Columns | list]:
    """One split's data in one order: `ids`, `features` (N, D), `teacher` (N, C) logits, `labels` (N,).

    The features are read from disk as they are asked for; the others are small.
    """
    ids = read_json(features.path / "ids.json")[split]
    logits = load_file(teacher.path / "logits.safetensors")[split]
    row = {image_id: i for i, image_id in enumerate(read_json(teacher.path / "ids.json")[split])}
    order = sample_labels(samples)
    gold = read_samples(samples, split, ["image_id", "label"]).set_index("image_id").loc[ids, "label"]
    return {
        "ids": ids,
        "features": split_rows(features.path, split, "pooled"),
        "teacher": logits[[row[i] for i in ids]],
        "labels": torch.tensor([order.index(x) for x in gold]),
    }


def head_stage(settings: Settings, store: Store, dataset: str) -> Artifact:
    """Train all heads of all seeds (stage `head`).

    Files: `<model>.seed<k>.safetensors`, `heads.json` (sizes, labels), `history.json` and
    `logits.safetensors` (both of `head`), and `<model>.parquet` predictions with all seeds.
    """
    samples, features = store.find("samples", dataset), store.find("features", dataset)
    teacher = store.find("teacher", f"{dataset}--{settings.teacher.teacher}")
    config, order = settings.distill, sample_labels(samples)

    def build(folder: Path) -> None:
        data = {s: read_pooled(features, teacher, samples, s) for s in SPLITS}
        history, logits = [], {}
        jobs = [(name, *spec) for name, spec in head_names(config).items()]
        for name, hidden, alpha in progress(jobs, f"heads of {dataset}", unit="head"):
            with PredictionWriter(folder / f"{name}.parquet", order) as out:
                for seed in settings.seeds:
                    net, curve = train_head(data, hidden, alpha, len(order), config, seed)
                    save_file(net.state_dict(), folder / f"{name}.seed{seed}.safetensors")
                    scores = {s: outputs(net, (data[s]["features"],)) for s in SPLITS}
                    if name == "head":
                        history += curve
                        logits |= {f"{split}.seed{seed}": x for split, x in scores.items()}
                    for split, x in scores.items():
                        _add_predictions(out, data[split], split, x, order, seed)
        save_file(logits, folder / "logits.safetensors")
        sizes = {name: list(hidden) for name, (hidden, _) in head_names(config).items()}
        width = data["train"]["features"].shape[1]
        write_json(folder / "heads.json", {"features": width, "hidden": sizes, "labels": order})
        write_json(folder / "history.json", history)

    params = {**config.model_dump(), "seeds": list(settings.seeds)}
    inputs = [samples, features, teacher]
    code = ["emonb.distill", "emonb.fit", "emonb.rows"]
    return store.get("head", dataset, build, params=params, inputs=inputs, code=code)


def _add_predictions(
    out: PredictionWriter, data: dict[str, Any], split: str, logits: Tensor, order: list[str], seed: int
) -> None:
    for block in blocks(len(logits)):
        gold = [order[i] for i in data["labels"][block].tolist()]
        out.add_scores(data["ids"][block], split, gold, logits[block], seed)


def train_head(
    data: dict[str, dict],
    hidden: Sequence[int],
    alpha: float,
    classes: int,
    settings: DistillSettings,
    seed: int,
) -> tuple[StudentHead, list[dict]]:
    """Train one head on cached tensors; returns it (eval mode) with its training curve."""
    set_seed(seed)
    net = StudentHead(data["train"]["features"].shape[1], hidden, classes, settings.dropout)
    if settings.standardize:
        net.standardize_by(data["train"]["features"])
    train, val = (tuple(data[s][k] for k in ("features", "teacher", "labels")) for s in ("train", "val"))

    def loss(logits: Tensor, _features: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return distillation_loss(logits, teacher, labels, alpha=alpha, tau=settings.tau, target=settings.target)

    options = settings.model_dump(include={"epochs", "lr", "weight_decay", "batch_size"})
    curve = fit(net, train, val, loss, seed=seed, **options)
    return net, curve


def load_head(artifact: Artifact, name: str, seed: int) -> StudentHead:
    """A trained head."""
    sizes = read_json(artifact.path / "heads.json")
    net = StudentHead(sizes["features"], sizes["hidden"][name], len(sizes["labels"]))
    net.load_state_dict(load_file(artifact.path / f"{name}.seed{seed}.safetensors"))
    return net.eval()
