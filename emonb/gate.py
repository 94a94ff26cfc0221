"""Room 06: the gate weighs the VLM's answer and the distilled head (paper: section on the gate).

`h = [one-hot(VLM answer) ; softmax(student)]`, `logits = W h + b`; only the gate trains, by cross-entropy. Five
gates are compared. The authors' code feeds the student's raw logits where the paper says probabilities; both are
trained here, as is a gate that sees the VLM's whole distribution.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emonb.training import Best, accuracy, warn_if_short


class ConcatGate(nn.Module):
    """Concat & linear: the paper's choice, 2C x C weights and C biases."""

    def __init__(self, classes: int):
        super().__init__()
        self.linear = nn.Linear(2 * classes, classes)

    def forward(self, vlm: Tensor, head: Tensor) -> Tensor:
        return self.linear(torch.cat([vlm, head], -1))


class BilinearGate(nn.Module):
    """Bilinear form of the two inputs, then linear."""

    def __init__(self, classes: int):
        super().__init__()
        self.bilinear, self.linear = nn.Bilinear(classes, classes, classes), nn.Linear(classes, classes)

    def forward(self, vlm: Tensor, head: Tensor) -> Tensor:
        return self.linear(self.bilinear(vlm, head))


class MixtureGate(nn.Module):
    """Mixture of three linear experts on the concatenated inputs, weighted by a softmax router."""

    def __init__(self, classes: int, experts: int = 3):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2 * classes, classes) for _ in range(experts))
        self.router = nn.Linear(2 * classes, experts)

    def forward(self, vlm: Tensor, head: Tensor) -> Tensor:
        both = torch.cat([vlm, head], -1)
        answers = torch.stack([expert(both) for expert in self.experts], 1)
        return (self.router(both).softmax(-1)[..., None] * answers).sum(1)


class DynamicGate(nn.Module):
    """Dynamic weighting: a softmax over the two inputs' weights, their weighted sum, then linear."""

    def __init__(self, classes: int):
        super().__init__()
        self.weigh, self.linear = nn.Linear(2 * classes, 2), nn.Linear(classes, classes)

    def forward(self, vlm: Tensor, head: Tensor) -> Tensor:
        weight = self.weigh(torch.cat([vlm, head], -1)).softmax(-1)
        return self.linear(weight[:, :1] * vlm + weight[:, 1:] * head)


class CrossGate(nn.Module):
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


class Opinions(NamedTuple):
    """What a gate learns from: N pictures of a split, in one order."""

    vlm: Tensor  # [N, C] one-hot answer, or the whole distribution
    head: Tensor  # [N, C] probabilities of the distilled head, or its logits
    labels: Tensor  # [N] class indices


def make_gate(kind: str, classes: int) -> nn.Module:
    """A fresh gate of one of the five kinds."""
    return GATES[kind](classes)


def one_hot(answer: Tensor, parsed: Tensor) -> Tensor:
    """[B, C] scores or probabilities -> [B, C] one-hot answer; an unparsable answer ([B] parsed) is all zeros."""
    hot = nn.functional.one_hot(answer.argmax(-1), answer.shape[-1]).float()
    return hot * parsed[:, None].float()


def gate_inputs(vlm: Tensor, parsed: Tensor, student: Tensor, inputs: str) -> tuple[Tensor, Tensor]:
    """What a gate sees of N pictures: VLM [N, C] and head [N, C].

    Args:
        vlm: [N, C] probabilities of the VLM's answers.
        parsed: [N], False where an answer could not be parsed.
        student: [N, C] logits of the head.
        inputs: `probabilities` (paper: one-hot answer, softmax of the head), `logits` (authors' code: one-hot
            answer, raw logits) or `soft` (both as probabilities).
    """
    answer = vlm if inputs == "soft" else one_hot(vlm, parsed)
    return answer, student if inputs == "logits" else student.softmax(-1)


def train_gate(
    kind: str,
    train: Opinions,
    val: Opinions,
    *,
    epochs: int = 10,
    lr: float = 1e-4,
    weight_decay: float = 1e-4,
    batch_size: int = 1,
    seed: int = 0,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train one gate with Adam by cross-entropy on labels, keep the epoch with the best val accuracy.

    Defaults are the authors' code's. Returns the gate and its training curve; warns as `train_head`.
    """
    torch.manual_seed(seed)
    gate = make_gate(kind, train.vlm.shape[1])
    warn_if_short(gate, lr, epochs * math.ceil(len(train.labels) / batch_size), f"gate ({kind})")
    optimizer = torch.optim.Adam(gate.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    shuffle, best = torch.Generator().manual_seed(seed), Best(gate)
    for epoch in range(1, epochs + 1):
        gate.train()
        total = 0.0
        for rows in torch.randperm(len(train.labels), generator=shuffle).split(batch_size):
            vlm, head, y = train.vlm[rows], train.head[rows], train.labels[rows]  # [B, C], [B, C], [B]
            loss = nn.functional.cross_entropy(gate(vlm, head), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
        best.keep(gate, epoch, total / len(train.labels), accuracy(gate, [val.vlm, val.head], val.labels))
    gate.load_state_dict(best.weights)
    return gate.eval(), best.rows
