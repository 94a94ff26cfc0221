"""Room 05: the distilled head. A small MLP on the VLM's mean visual token learns from labels and teacher.

The rest of the VLM stays frozen, so features and teacher logits are computed once and every ablation trains on the
cached tensors (paper: knowledge distillation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emonb.training import Best, accuracy, outputs, warn_if_short


class Cached(NamedTuple):
    """What a head learns from: N pictures of a split, in one order."""

    features: Tensor  # [N, D] mean visual token of each picture
    teacher: Tensor  # [N, C] the teacher's logits
    labels: Tensor  # [N] class indices


class StudentHead(nn.Module):
    """MLP from the mean merged visual token to emotion logits: hidden layers, GELU, dropout (authors' code)."""

    def __init__(self, features: int, hidden: Sequence[int], classes: int, dropout: float = 0.1):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        layers: list[nn.Module] = []
        for width, following in zip([features, *hidden], hidden, strict=False):
            layers += [nn.Linear(width, following), nn.GELU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear([features, *hidden][-1], classes))

    def standardize_by(self, features: Tensor) -> None:
        """Shift and scale from now on by mean and deviation of (N, D) training features, in double precision."""
        n, blocks = len(features), features.split(4096)
        mean = sum(block.double().sum(0) for block in blocks) / n
        squares = sum((block.double() - mean).square().sum(0) for block in blocks)
        self.mean.copy_(mean)
        self.deviation.copy_((squares / (n - 1)).sqrt().clamp_min(1e-6))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] pooled visual tokens -> [B, C] logits."""
        return self.layers((features - self.mean) / self.deviation)


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, alpha: float = 0.5, tau: float = 2.0, target: str = "label"
) -> Tensor:
    """alpha tau^2 KL(p_teacher^tau || p_student^tau) + (1 - alpha) CE(label, p_student); KL in the batch mean (paper).

    Args:
        student, teacher: [B, C] logits.
        labels: [B] class indices.
        alpha: weight of the distillation term, 0 to 1.
        tau: temperature; the factor tau^2 keeps the gradient's scale (Hinton et al. 2015).
        target: "label" (paper, code), or "teacher": its argmax, as in the article's sketch.
    """
    log_student = (student / tau).log_softmax(-1)
    log_teacher = (teacher / tau).log_softmax(-1)
    kl = nn.functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    hard = labels if target == "label" else teacher.argmax(-1)
    return alpha * tau**2 * kl + (1 - alpha) * nn.functional.cross_entropy(student, hard)


def train_head(
    train: Cached,
    val: Cached,
    *,
    hidden: Sequence[int] = (1024,),
    alpha: float = 0.5,
    tau: float = 2.0,
    target: str = "label",
    dropout: float = 0.1,
    standardize: bool = False,
    epochs: int = 5,
    lr: float = 1e-5,
    weight_decay: float = 1e-4,
    batch_size: int = 1,
    seed: int = 0,
) -> tuple[StudentHead, list[dict[str, Any]]]:
    """Train one head with Adam and keep the epoch with the best val accuracy; returns it and its curve.

    Defaults are the paper's and the authors' code's. Warns where so few steps can hardly move it.
    """
    torch.manual_seed(seed)
    head = StudentHead(train.features.shape[1], hidden, train.teacher.shape[1], dropout)
    if standardize:
        head.standardize_by(train.features)
    head.to(train.features.device)
    warn_if_short(head, lr, epochs * math.ceil(len(train.labels) / batch_size), "head")
    optimizer = torch.optim.Adam(head.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    shuffle, best = torch.Generator().manual_seed(seed), Best(head)
    for epoch in range(1, epochs + 1):
        head.train()
        total = 0.0
        for rows in torch.randperm(len(train.labels), generator=shuffle).split(batch_size):
            x, t, y = train.features[rows].float(), train.teacher[rows], train.labels[rows]  # [B, D], [B, C], [B]
            loss = distillation_loss(head(x), t, y, alpha=alpha, tau=tau, target=target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
        best.keep(head, epoch, total / len(train.labels), accuracy(head, [val.features], val.labels))
    head.load_state_dict(best.weights)
    return head.eval(), best.rows


def out_of_fold(train: Cached, val: Cached, *, folds: int = 5, seed: int = 0, **options: Any) -> Tensor:
    """[N, C] logits about the N training pictures, each by a head that was trained without it (ours).

    From them a gate can learn how right a head is about new pictures (stacking: Wolpert 1992). `options`: of
    `train_head`.
    """
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    logits = torch.zeros_like(train.teacher)
    for fold in order.chunk(folds):
        known = order[~torch.isin(order, fold)].sort().values
        head, _ = train_head(Cached(*(tensor[known] for tensor in train)), val, seed=seed, **options)
        logits[fold] = outputs(head, train.features[fold])
    return logits.cpu()
