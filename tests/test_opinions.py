"""All opinions about a picture against the model's own numbers, as JSON; which way the gate leaned."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from assembled import LABELS, assembled, picture, results

from emonb.files import read_json, write_json
from emonb.gate import GATES, make_gate
from emonb.predictions import MODELS as KNOWN
from emonb.show.opinions import MODELS, find_teacher, gate_lean, opinions

KEYS = ["image", "emotion", "confidence", "models", "gate", "saliency", "key_elements", "reasons"]
THREE = ["joy", "anger", "sadness"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    model = assembled()
    return model, results(tmp_path_factory.mktemp("world"), model)


def test_the_same_as_the_models_own_answers(world):
    model, folder = world
    pictures = [picture(), picture((192, 96)), picture((60, 200))]
    teacher = find_teacher(folder, LABELS)
    found = opinions(model, pictures, ["a", "b", "c"], teacher=teacher)
    vit = teacher(pictures)
    assert vit.sum(-1).tolist() == pytest.approx([1, 1, 1])
    rows = model.predict(pictures).to_dict("records")
    for i, (opinion, row) in enumerate(zip(found, rows, strict=True)):
        said = opinion["models"]
        assert list(said) == list(MODELS)
        assert opinion["emotion"] == opinion["gate"]["emotion"] == said["EmoVLM-KD"]["answer"] == row["emotion"]
        for name in ("VLM", "head"):
            assert said[name]["answer"] == row[name.lower()]
            assert said[name]["confidence"] == pytest.approx(row[f"{name.lower()}_confidence"], abs=1e-6)
        ours = list(said["EmoVLM-KD"]["distribution"].values())
        np.testing.assert_allclose(ours, [row[f"p_{x}"] for x in LABELS], atol=1e-6)
        assert list(said["ViT"]["distribution"].values()) == vit[i].tolist()
        assert opinion["saliency"]["label"] == row["head"]
    assert set(MODELS.values()) <= set(KNOWN)


def test_keys_stay_and_texts_are_the_vlms_own(world):
    model, _ = world
    plain, full = (opinions(model, [picture()], ["mine"], texts=texts)[0] for texts in (False, True))
    assert list(plain) == list(full) == KEYS
    assert json.loads(json.dumps(full)) == full
    assert list(full["models"]) == ["VLM", "ViT", "head", "EmoVLM-KD"]
    assert full["models"]["ViT"] is None
    assert list(full["models"]["head"]) == ["answer", "confidence", "distribution"]
    assert {"emotion", "rival", "margin", "vlm", "head", "rest", "leaned_on", "sentence"} < set(full["gate"])
    assert [plain["key_elements"], plain["reasons"]] == [None, None]
    texts = [model.say([picture()], kind)[0] for kind in ("conversation", "reasoning")]
    assert [full["key_elements"], full["reasons"]] == texts


def test_the_teacher_is_found_beside_its_model_and_knows_the_same_emotions(world, tmp_path):
    _, folder = world
    assert find_teacher(folder, LABELS[::-1]) is None
    out = shutil.copytree(folder.parent.parent, tmp_path / "out")
    assert find_teacher(out / "models" / "mini-fi", LABELS)([picture()]).shape == (1, len(LABELS))
    assert find_teacher(tmp_path / "mini-fi", LABELS) is None
    pointer = out / "artifacts" / "teacher" / "mini-fi--vit.json"
    write_json(pointer, {**read_json(pointer), "key": "gone"})
    assert find_teacher(out / "models" / "mini-fi", LABELS) is None


# ---- the gate's lean -----------------------------------------------------------------------------------------------


def inputs(answer, *head):
    """A one-hot answer, or zeros for None, and probabilities."""
    return torch.tensor([float(label == answer) for label in THREE]), torch.tensor(head)


def gate_of(vlm, head, bias=(0, 0, 0)):
    """The paper's gate with these weights on the diagonals."""
    gate = make_gate("concat", 3)
    with torch.no_grad():
        gate.linear.weight.copy_(torch.cat([torch.eye(3) * vlm, torch.eye(3) * head], 1))
        gate.linear.bias.copy_(torch.tensor(bias))
    return gate


@pytest.mark.parametrize("seed", range(4))
def test_concat_is_an_exact_sum_in_double_precision(seed):
    torch.manual_seed(seed)
    gate, (answer, head) = make_gate("concat", 3), inputs(THREE[seed % 3], 0.5, 0.3, 0.2)
    lean = gate_lean(gate, answer, head, THREE)
    weight, bias = (x.detach().double().numpy() for x in (gate.linear.weight, gate.linear.bias))
    parts = weight[:, :3] @ answer.double().numpy(), weight[:, 3:] @ head.double().numpy(), bias
    first, second = THREE.index(lean["emotion"]), THREE.index(lean["rival"])
    expected = [part[first] - part[second] for part in parts]
    assert [lean["vlm"], lean["head"], lean["rest"]] == pytest.approx(expected, abs=1e-6)
    assert lean["margin"] == pytest.approx(sum(expected), abs=1e-6)
    assert lean["margin"] >= 0
    assert lean["method"] == "halves"


@pytest.mark.parametrize("kind", sorted(GATES.keys() - {"concat"}))
def test_other_gates_lose_what_a_silent_input_had_added(kind):
    torch.manual_seed(1)
    gate, (answer, head) = make_gate(kind, 3), inputs("anger", 0.7, 0.2, 0.1)
    lean = gate_lean(gate, answer, head, THREE)
    first, second = THREE.index(lean["emotion"]), THREE.index(lean["rival"])
    exact = gate.double()
    silent = {0: (answer, head), lean["vlm"]: (answer * 0, head), lean["head"]: (answer, torch.full((3,), 1 / 3))}
    for part, given in silent.items():
        logits = exact(*(x[None].double() for x in given))[0]
        assert lean["margin"] - part == pytest.approx((logits[first] - logits[second]).item(), abs=1e-6)
    assert lean["vlm"] + lean["head"] + lean["rest"] == pytest.approx(lean["margin"], abs=1e-9)
    assert lean["method"] == "ablation"


@pytest.mark.parametrize(
    ("gate", "given", "expected"),
    [
        (gate_of(2, 1), inputs("joy", 0.1, 0.2, 0.7), ("joy", "sadness", "VLM", 2, -0.6)),
        (gate_of(1, 3), inputs("joy", 0.1, 0.2, 0.7), ("sadness", "joy", "head", -1, 1.8)),
        (gate_of(1, 1, (0, 9, 0)), inputs("joy", 0.2, 0.1, 0.7), ("anger", "joy", "neither", -1, -0.1)),
        (gate_of(1, 1), inputs("joy", 0.8, 0.15, 0.05), ("joy", "anger", "VLM", 1, 0.65)),
        (gate_of(0.5, 1), inputs("joy", 0.7, 0.18, 0.12), ("joy", "anger", "both", 0.5, 0.52)),
        (gate_of(1, 1), inputs(None, 0.8, 0.15, 0.05), ("joy", "anger", "head", 0, 0.65)),
    ],
)
def test_a_quarrel_is_judged_between_the_two(gate, given, expected):
    lean = gate_lean(gate, *given, THREE)
    assert (lean["emotion"], lean["rival"], lean["leaned_on"]) == expected[:3]
    assert (lean["vlm"], lean["head"]) == pytest.approx(expected[3:], abs=1e-6)
    assert f"answers {lean['emotion']} and leaned on" in lean["sentence"]
    assert (
        f"the VLM adds {lean['vlm']:+.2f}, the head {lean['head']:+.2f} and the bias {lean['rest']:+.2f}"
        in lean["sentence"]
    )
