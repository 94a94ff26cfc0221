"""Room 06: the gates and what they see."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from synthetic import frame_of

from emonb.errors import EmonbError
from emonb.gate import GATES, _rows, average, gate_inputs, gate_names, make_gate, one_hot, train_gate
from emonb.predictions import probabilities
from emonb.settings import GateSettings

LABELS = ("sadness", "joy", "anger")  # scrambled on purpose


def test_concat_gate_is_w_h_plus_b():
    gate = make_gate("concat", 3)
    vlm, head = torch.rand(4, 3), torch.rand(4, 3)
    h = torch.cat([vlm, head], 1)
    assert torch.allclose(gate(vlm, head), h @ gate.linear.weight.T + gate.linear.bias)


@pytest.mark.parametrize("kind", GATES)
def test_each_gate_learns_whom_to_trust(kind):
    """VLM right on classes 0 and 1, head on class 2: any of the five gates beats both."""
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (300,))
    wrong = (labels + 1) % 3
    eye = torch.eye(3)
    vlm = eye[torch.where(labels < 2, labels, torch.randint(0, 2, (300,)))]
    head = eye[torch.where(labels == 2, labels, torch.where(torch.rand(300) < 0.5, wrong % 2, labels))]
    data = (vlm, head * 0.8 + 0.1 / 3, labels)
    _, curve = train_gate(kind, data, data, GateSettings(epochs=50, lr=0.1, batch_size=50), seed=0)
    assert max(r["value"] for r in curve if r["split"] == "val") > 95


def test_unparsed_answers_are_zeros_and_inputs_are_named():
    label = ["joy", "anger", "sadness"]
    vlm = frame_of(["joy", "anger", "joy"], label, LABELS, parsed=[True, True, False])
    student = torch.tensor([[2.0, 0.0, -1.0]] * 3)
    answer, p, gold = gate_inputs(vlm, student, "probabilities")
    assert answer.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert gold.tolist() == [1, 2, 0]
    assert torch.allclose(p, student.softmax(-1))
    assert torch.equal(gate_inputs(vlm, student, "logits")[1], student)
    assert torch.allclose(gate_inputs(vlm, student, "soft")[0].double(), torch.tensor(probabilities(vlm)))


def test_one_hot_of_ties_and_unparsed():
    assert one_hot(torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([True, False])).tolist() == [[1, 0], [0, 0]]


def test_rows_follow_the_vlms_order():
    head = pd.DataFrame({"image_id": ["a", "b", "c"] * 2, "seed": [0] * 3 + [1] * 3})
    assert _rows(head, pd.DataFrame({"image_id": ["c", "a", "b"]})) == [2, 0, 1]


def test_names_follow_the_settings():
    names = gate_names(GateSettings())
    assert names["emovlmkd"] == ("concat", "probabilities")
    assert names["gate_concat_logits"] == ("concat", "logits")
    assert {"gate_bilinear", "gate_moe", "gate_dynamic", "gate_cross", "gate_concat_soft"} < set(names)


def test_average_aligns_images_and_keeps_seeds():
    label = ["joy", "anger", "sadness", "joy"]
    first = frame_of(label, label, LABELS)
    second = pd.concat([frame_of(label, label, LABELS, seed=s).iloc[::-1] for s in (0, 1)], ignore_index=True)
    mean = average(first, second)
    assert mean["seed"].tolist() == [0] * 4 + [1] * 4
    expected = (probabilities(first) + probabilities(second[second["seed"] == 0])[::-1]) / 2
    np.testing.assert_allclose(probabilities(mean[mean["seed"] == 0]), expected)
    with pytest.raises(EmonbError, match="class order"):
        average(first, frame_of(label, label, LABELS[::-1]))
