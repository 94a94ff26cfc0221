"""Room 05: the loss against a float64 reference written from the formula, and the head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emonb.distill import StudentHead, distillation_loss, head_names
from emonb.fit import fit, set_seed
from emonb.settings import DistillSettings


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("target", ["label", "teacher"])
def test_loss_equals_the_formula(alpha, tau, target):
    rng = np.random.default_rng(0)
    student, teacher, labels = rng.normal(size=(6, 8)) * 3, rng.normal(size=(6, 8)) * 3, rng.integers(0, 8, 6)
    p, q = softmax(teacher / tau), softmax(student / tau)
    kl = (p * (np.log(p) - np.log(q))).sum(axis=1).mean()
    hard = labels if target == "label" else teacher.argmax(axis=1)
    ce = -np.log(softmax(student))[np.arange(6), hard].mean()
    expected = alpha * tau**2 * kl + (1 - alpha) * ce
    got = distillation_loss(*map(torch.tensor, (student, teacher, labels)), alpha=alpha, tau=tau, target=target)
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_heads_of_the_paper():
    names = head_names(DistillSettings())
    assert names["head"] == ((1024,), 0.5)
    assert names["head_depth5"] == ((1024, 512, 256, 128, 64), 0.5)
    assert sorted(names) == sorted(
        ["head", "head_alpha0", "head_alpha0.25", "head_alpha0.75", "head_alpha1"]
        + [f"head_depth{d}" for d in (2, 3, 4, 5)]
    )
    assert sum(p.numel() for p in StudentHead(3584, (1024,), 8).parameters()) == 3_679_240  # paper: 3.7 M


def test_standardised_head_does_not_see_shift_and_scale():
    set_seed(0)
    x = torch.randn(50, 4)
    head = StudentHead(4, (8,), 3).eval()
    head.standardize_by(x)
    plain = head(x)
    head.standardize_by(x * 100 + 7)
    assert torch.allclose(head(x * 100 + 7), plain, atol=1e-4)


def test_fit_keeps_the_best_val_epoch_and_repeats():
    set_seed(0)
    x, y = torch.randn(64, 5), torch.randint(0, 3, (64,))
    runs = []
    for _ in range(2):
        set_seed(1)
        net = StudentHead(5, (16,), 3, dropout=0.1)
        rows = fit(
            net, (x, y), (x[:20], y[:20]), lambda logits, _, labels: torch.nn.functional.cross_entropy(logits, labels),
            epochs=6, lr=0.3, weight_decay=0.0, batch_size=16, seed=1,
        )  # fmt: skip
        accuracy = (net(x[:20]).argmax(-1) == y[:20]).double().mean().item() * 100
        assert accuracy == pytest.approx(max(r["value"] for r in rows if r["split"] == "val"))
        runs.append(net(x))
    assert torch.equal(*runs)
