"""Rooms 05 and 06: loss, head and gates against float64 references written from the formulae; their loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emonb.distill import Cached, StudentHead, distillation_loss, train_head
from emonb.gate import GATES, Opinions, gate_inputs, make_gate, one_hot, train_gate
from emonb.model import load_gate, load_head, save_module
from emonb.settings import DistillSettings, GateSettings
from emonb.training import mixed_seed, outputs

pytestmark = pytest.mark.usefixtures("one_thread")


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("target", ["label", "teacher"])
def test_the_loss_equals_the_formula(alpha, tau, target):
    rng = np.random.default_rng(0)
    student, teacher, labels = rng.normal(size=(6, 8)) * 3, rng.normal(size=(6, 8)) * 3, rng.integers(0, 8, 6)
    p, q = softmax(teacher / tau), softmax(student / tau)
    kl = (p * (np.log(p) - np.log(q))).sum(axis=1).mean()
    hard = labels if target == "label" else teacher.argmax(axis=1)
    ce = -np.log(softmax(student))[np.arange(6), hard].mean()
    expected = alpha * tau**2 * kl + (1 - alpha) * ce
    got = distillation_loss(*map(torch.tensor, (student, teacher, labels)), alpha=alpha, tau=tau, target=target)
    assert got.item() == pytest.approx(expected, rel=1e-12)


def reference(kind: str, w: dict[str, np.ndarray], v: np.ndarray, s: np.ndarray) -> np.ndarray:
    """A gate's logits by the paper's words: v the VLM's answer, s the head's probabilities."""

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    both = np.concatenate([v, s], axis=1)
    if kind == "concat":
        return linear("linear", both)
    if kind == "bilinear":
        return linear("linear", np.einsum("ni,kij,nj->nk", v, w["bilinear.weight"], s) + w["bilinear.bias"])
    if kind == "moe":
        share = softmax(linear("router", both))
        return sum(share[:, [e]] * linear(f"experts.{e}", both) for e in range(3))
    if kind == "dynamic":
        share = softmax(linear("weigh", both))
        return linear("linear", share[:, [0]] * v + share[:, [1]] * s)
    return linear("linear", sigmoid(linear("from_vlm", v)) * s + sigmoid(linear("from_head", s)) * v)


@pytest.mark.parametrize("kind", GATES)
def test_each_gate_equals_its_formula_and_learns_whom_to_trust(kind, tmp_path):
    """The VLM is right on classes 0 and 1, the head on class 2: any of the five gates beats both."""
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (300,))
    eye, wrong = torch.eye(3), (labels + 1) % 3
    vlm = eye[torch.where(labels < 2, labels, torch.randint(0, 2, (300,)))]
    head = eye[torch.where(labels == 2, labels, torch.where(torch.rand(300) < 0.5, wrong % 2, labels))]
    data = Opinions(vlm, head * 0.8 + 0.1 / 3, labels)
    gate, curve = train_gate(kind, data, data, epochs=50, lr=0.1, batch_size=50, seed=0)
    assert max(row["value"] for row in curve if row["split"] == "val") > 95
    weights = {name: value.double().numpy() for name, value in gate.state_dict().items()}
    expected = reference(kind, weights, vlm.double().numpy(), data.head.double().numpy())
    np.testing.assert_allclose(outputs(gate, vlm, data.head), expected, atol=1e-4)
    save_module(gate, tmp_path / "gate.safetensors")
    assert torch.equal(load_gate(tmp_path / "gate.safetensors", kind, 3)(vlm, data.head), gate(vlm, data.head))


def test_an_unparsed_answer_is_zeros_and_the_inputs_are_as_named():
    p, student = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]]), torch.tensor([[2.0, 0.0]] * 3)
    parsed = torch.tensor([True, False, True])
    assert one_hot(p, parsed).tolist() == [[0, 1], [0, 0], [1, 0]]
    for inputs, wanted in {
        "probabilities": (one_hot(p, parsed), student.softmax(-1)),
        "logits": (one_hot(p, parsed), student),
        "soft": (p, student.softmax(-1)),
    }.items():
        assert all(map(torch.equal, gate_inputs(p, parsed, student, inputs), wanted)), inputs


def test_heads_and_gates_are_the_papers():
    heads, gates = DistillSettings().heads, GateSettings().gates
    assert heads["head"] == {"hidden": (1024,), "alpha": 0.5}
    assert heads["head_depth5"] == {"hidden": (1024, 512, 256, 128, 64), "alpha": 0.5}
    assert len(heads) == 9
    assert sum(p.numel() for p in StudentHead(3584, (1024,), 8).parameters()) == 3_679_240  # paper: 3.7 M
    assert gates["emovlmkd"] == ("concat", "probabilities")
    assert sum(p.numel() for p in make_gate("concat", 8).parameters()) == 2 * 8 * 8 + 8
    assert {"gate_bilinear", "gate_moe", "gate_dynamic", "gate_cross", "gate_concat_logits"} < set(gates)


def test_a_standardised_head_does_not_see_shift_and_scale():
    torch.manual_seed(0)
    x, head = torch.randn(50, 4), StudentHead(4, (8,), 3).eval()
    head.standardize_by(x)
    plain = head(x)
    np.testing.assert_allclose(head.deviation, x.double().numpy().std(axis=0, ddof=1), rtol=1e-6)
    head.standardize_by(x * 100 + 7)
    assert torch.allclose(head(x * 100 + 7), plain, atol=1e-4)


def test_a_head_keeps_its_best_epoch_repeats_with_its_seed_and_is_loaded_as_saved(tmp_path):
    torch.manual_seed(0)
    data = Cached(torch.randn(64, 5).half(), torch.randn(64, 3), torch.randint(0, 3, (64,)))
    val = Cached(*(tensor[:20] for tensor in data))
    options = {"hidden": (16,), "epochs": 6, "lr": 0.3, "batch_size": 16, "standardize": True}
    runs = [train_head(data, val, **options, seed=seed) for seed in (1, 1, 2)]
    logits = [outputs(head, data.features) for head, _ in runs]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    values = [row["value"] for row in runs[0][1] if row["split"] == "val"]
    accuracy = 100 * (logits[0][:20].argmax(-1) == val.labels).double().mean().item()
    assert accuracy == pytest.approx(max(values))
    save_module(runs[0][0], tmp_path / "head.safetensors")
    assert torch.equal(outputs(load_head(tmp_path / "head.safetensors", (16,), 3), data.features), logits[0])


def test_a_mixed_seed_is_one_of_32_bits():
    seeds = {mixed_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert max(seeds) < 2**32
