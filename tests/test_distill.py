"""Rooms 05 and 06: loss, head and gates against float64 references written from the formulae; their loops."""

import numpy as np
import pytest
import torch

from emonb.distill import Cached, StudentHead, distillation_loss, out_of_fold, train_head
from emonb.gate import GATES, Opinions, gate_inputs, make_gate, one_hot, train_gate
from emonb.model import load_gate, load_head, save_module
from emonb.settings import DistillSettings, load_settings
from emonb.training import mixed_seed, outputs

pytestmark = pytest.mark.usefixtures("one_thread")


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("target", ["label", "teacher"])
def test_the_loss_equals_the_formula(alpha, tau, target):
    rng = np.random.default_rng(0)
    student, teacher, labels = rng.normal(size=(6, 8)) * 3, rng.normal(size=(6, 8)) * 3, rng.integers(0, 8, 6)
    p, q = softmax(teacher / tau), softmax(student / tau)
    kl = (p * (np.log(p) - np.log(q))).sum(axis=1).mean()
    hard = labels if target == "label" else teacher.argmax(axis=1)
    ce = -np.log(softmax(student))[np.arange(6), hard].mean()
    got = distillation_loss(*map(torch.tensor, (student, teacher, labels)), alpha=alpha, tau=tau, target=target)
    assert got.item() == pytest.approx(alpha * tau**2 * kl + (1 - alpha) * ce, rel=1e-12)


def layer(module: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
    return x @ module.weight.detach().numpy().T + module.bias.detach().numpy()


def by_hand(kind: str, gate: torch.nn.Module, v: np.ndarray, s: np.ndarray) -> np.ndarray:
    """A gate's logits by the paper's words: v the VLM's answer, s the head's probabilities."""
    both = np.concatenate([v, s], axis=1)
    if kind == "concat":
        return layer(gate.linear, both)
    if kind == "bilinear":
        weight, bias = (t.detach().numpy() for t in (gate.bilinear.weight, gate.bilinear.bias))
        return layer(gate.linear, np.einsum("ni,kij,nj->nk", v, weight, s) + bias)
    if kind == "moe":
        share = softmax(layer(gate.router, both))
        return sum(share[:, [e]] * layer(expert, both) for e, expert in enumerate(gate.experts))
    if kind == "dynamic":
        share = softmax(layer(gate.weigh, both))
        return layer(gate.linear, share[:, [0]] * v + share[:, [1]] * s)
    opens = [1 / (1 + np.exp(-layer(*pair))) for pair in ((gate.from_vlm, v), (gate.from_head, s))]
    return layer(gate.linear, opens[0] * s + opens[1] * v)


@pytest.mark.parametrize("kind", GATES)
def test_each_gate_equals_its_formula_and_is_loaded_as_saved(kind, tmp_path):
    torch.manual_seed(0)
    gate, v, s = make_gate(kind, 3), torch.rand(7, 3), torch.rand(7, 3)
    save_module(gate, tmp_path / "gate.safetensors")
    assert torch.equal(load_gate(tmp_path / "gate.safetensors", kind, 3)(v, s), gate(v, s))
    expected = by_hand(kind, gate.double(), v.double().numpy(), s.double().numpy())
    np.testing.assert_allclose(gate(v.double(), s.double()).detach(), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", GATES)
def test_each_gate_learns_whom_to_trust(kind):
    """The VLM is right on classes 0 and 1, the head on class 2: any of the five gates beats both."""
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (300,))
    eye, wrong = torch.eye(3), (labels + 1) % 3
    vlm = eye[torch.where(labels < 2, labels, torch.randint(0, 2, (300,)))]
    head = eye[torch.where(labels == 2, labels, torch.where(torch.rand(300) < 0.5, wrong % 2, labels))]
    data = Opinions(vlm, head * 0.8 + 0.1 / 3, labels)
    _, curve = train_gate(kind, data, data, epochs=50, lr=0.1, batch_size=50, seed=0)
    assert max(row["value"] for row in curve if row["split"] == "val") > 95


def test_an_unparsed_answer_is_zeros_and_the_inputs_are_as_named():
    p, student = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]]), torch.tensor([[2.0, 0.0]] * 3)
    parsed, soft = torch.tensor([True, False, True]), student.softmax(-1)
    hot = one_hot(p, parsed)
    assert hot.tolist() == [[0, 1], [0, 0], [1, 0]]
    for inputs, wanted in {"probabilities": (hot, soft), "logits": (hot, student), "soft": (p, soft)}.items():
        assert all(map(torch.equal, gate_inputs(p, parsed, student, inputs), wanted)), inputs


def test_heads_and_gates_are_the_papers():
    heads, gates = DistillSettings().heads, load_settings("paper").gates
    assert heads["head"] == {"hidden": (1024,), "alpha": 0.5}
    assert heads["head_depth5"] == {"hidden": (1024, 512, 256, 128, 64), "alpha": 0.5}
    assert sum(p.numel() for p in StudentHead(3584, (1024,), 8).parameters()) == 3_679_240  # paper: 3.7 M
    paper = {"kind": "concat", "inputs": "probabilities", "head": "head", "learns_from": "train"}
    assert gates["emovlmkd"] == paper
    assert gates["gate_depth5"] == paper | {"head": "head_depth5"}
    assert gates["gate_concat_val"] == paper | {"learns_from": "val"}
    assert {"gate_bilinear", "gate_moe", "gate_dynamic", "gate_cross", "gate_concat_logits"} < set(gates)


def test_lengths_of_training_hold_learning_rate_times_steps_and_passes_equal():
    """1: what the authors' code does with so many images, one a step, whatever the batch."""
    for images, size in ((1040, 128), (16_000, 1)):
        config = DistillSettings(batch_size=size, lengths=(0.125, 1, 8))
        for length, own in config.schedules.items():
            assert own["lr"] * own["epochs"] * images / size == pytest.approx(length * 5 * 1e-5 * images)
            assert own["epochs"] == max(5, 5 * length)
        assert config.heads["head_depth2_x8"] == {"hidden": (1024, 512), "alpha": 0.5} | config.schedules[8]
        assert "head_depth3_x8" not in config.heads, "printed: 1, 2, 5"


def test_out_of_fold_answers_are_of_heads_that_have_not_seen_the_picture():
    """Labels that nothing tells: a head recites those that it has seen, and knows none of the others."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (60,), generator=rng)
    data = Cached(torch.randn(60, 90, generator=rng), 4.0 * torch.nn.functional.one_hot(labels, 2), labels)
    options = {"hidden": (64,), "epochs": 30, "lr": 1e-2, "batch_size": 20}
    both = outputs(train_head(data, data, **options)[0], data.features), out_of_fold(data, data, **options)
    seen, unseen = ((logits.argmax(1) == labels).double().mean().item() for logits in both)
    assert seen > 0.95
    assert 0.25 < unseen < 0.75


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
    best = max(row["value"] for row in runs[0][1] if row["split"] == "val")
    assert 100 * (logits[0][:20].argmax(-1) == val.labels).double().mean().item() == pytest.approx(best)
    save_module(runs[0][0], tmp_path / "head.safetensors")
    assert torch.equal(outputs(load_head(tmp_path / "head.safetensors", (16,), 3), data.features), logits[0])


def test_a_mixed_seed_is_one_of_32_bits():
    seeds = {mixed_seed(a, b) for a in range(20) for b in range(20)}
    assert (len(seeds), max(seeds) < 2**32) == (400, True)
