"""Which way the gate leaned: parts that add up, and words that follow the numbers."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

from emonb.errors import EmonbError
from emonb.gate import GATES, make_gate
from emonb.lean import gate_lean, lean_figure

LABELS = ["joy", "anger", "sadness"]


def inputs(answer, *head):
    """A one-hot answer, or zeros for None, and probabilities."""
    hot = torch.zeros(3)
    if answer is not None:
        hot[LABELS.index(answer)] = 1
    return hot, torch.tensor(head)


def gate_of(vlm, head, bias=(0, 0, 0)):
    """The paper's gate with these weights on the diagonals."""
    gate = make_gate("concat", 3)
    with torch.no_grad():
        gate.linear.weight.copy_(torch.cat([torch.eye(3) * vlm, torch.eye(3) * head], 1))
        gate.linear.bias.copy_(torch.tensor(bias))
    return gate


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", GATES)
def test_parts_add_up_to_the_lead(kind, seed):
    torch.manual_seed(seed)
    gate, (answer, head) = make_gate(kind, 3), inputs(LABELS[seed % 3], 0.5, 0.3, 0.2)
    lean = gate_lean(gate, answer, head, LABELS)
    logits = gate(answer[None], head[None])[0]
    first, second = LABELS.index(lean.emotion), LABELS.index(lean.rival)
    assert first == logits.argmax()
    assert lean.margin == pytest.approx((logits[first] - logits[second]).item(), abs=1e-6)
    assert lean.margin >= 0
    assert lean.vlm + lean.head + lean.rest == pytest.approx(lean.margin, abs=1e-6)
    if kind == "concat":
        bias = gate.linear.bias
        assert lean.method == "halves"
        assert lean.rest == pytest.approx((bias[first] - bias[second]).item(), abs=1e-5)


@pytest.mark.parametrize("kind", GATES)
def test_ablation_is_what_the_gate_says_without_an_input(kind):
    torch.manual_seed(1)
    gate, (answer, head) = make_gate(kind, 3), inputs("anger", 0.7, 0.2, 0.1)
    lean = gate_lean(gate, answer, head, LABELS, "ablation")
    first, second = LABELS.index(lean.emotion), LABELS.index(lean.rival)
    for part, without in ((lean.vlm, (answer * 0, head)), (lean.head, (answer, torch.full((3,), 1 / 3)))):
        logits = gate(*(x[None] for x in without))[0]
        assert lean.margin - part == pytest.approx((logits[first] - logits[second]).item(), abs=1e-6)
    assert lean.method == "ablation"


def test_disagreement_is_judged_between_the_two():
    answer, head = inputs("joy", 0.1, 0.2, 0.7)
    follows_vlm = gate_lean(gate_of(2, 1), answer, head, LABELS)
    assert (follows_vlm.emotion, follows_vlm.rival, follows_vlm.leaned_on) == ("joy", "sadness", "VLM")
    assert (follows_vlm.vlm, follows_vlm.head) == (pytest.approx(2), pytest.approx(-0.6))
    follows_head = gate_lean(gate_of(1, 3), answer, head, LABELS)
    assert (follows_head.emotion, follows_head.rival, follows_head.leaned_on) == ("sadness", "joy", "head")
    assert "leaned on the head: to the lead of sadness over joy, the head adds +1.80 and the VLM's answer -1.00" in (
        follows_head.sentence
    )
    third = gate_lean(gate_of(1, 1, (0, 9, 0)), *inputs("joy", 0.2, 0.1, 0.7), LABELS)
    assert (third.emotion, third.rival, third.leaned_on) == ("anger", "joy", "neither")


def test_agreement_even_parts_and_an_unreadable_answer_are_said():
    lean = gate_lean(gate_of(1, 1), *inputs("joy", 0.8, 0.15, 0.05), LABELS)
    assert lean.sentence.startswith("VLM and head both say joy. The gate answers joy and leaned on the VLM")
    assert replace(lean, vlm=0.5, head=0.52).leaned_on == "both"
    silent = gate_lean(gate_of(1, 1), *inputs(None, 0.8, 0.15, 0.05), LABELS)
    assert silent.vlm == 0
    assert silent.vlm_says == ""
    assert silent.sentence.startswith("The VLM's answer could not be read; the head says joy.")


def test_halves_of_a_mixing_gate_are_refused():
    with pytest.raises(EmonbError, match="method: 'halves' does not fit CrossGate; use ablation"):
        gate_lean(make_gate("cross", 3), *inputs("joy", 0.8, 0.1, 0.1), LABELS, "halves")


def test_figure_shows_the_three_numbers():
    lean = replace(gate_lean(gate_of(1, 1), *inputs("joy", 0.8, 0.15, 0.05), LABELS), rival="$x", rest=-0.5)
    figure = lean_figure(lean)
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [lean.vlm, lean.head, -0.5]
    assert [text.get_text() for text in axes.texts] == [f"{x:+.2f}" for x in (lean.vlm, lean.head, -0.5)]
    figure.savefig(io.BytesIO(), format="png")
