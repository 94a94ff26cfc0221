"""Opinions about a picture against the model's own numbers; which way the gate leaned; the head's map and its sum."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from assembled import LABELS, assembled, picture, results
from families import FAMILIES, save_family
from PIL import Image
from torch import nn

from emonb.errors import EmonbError
from emonb.files import read_json, write_json
from emonb.gate import GATES, make_gate
from emonb.predictions import MODELS as KNOWN
from emonb.show.opinions import (
    MODELS,
    explain_head,
    find_stranger,
    find_teacher,
    gate_lean,
    opinions,
    seen_before,
)
from emonb.store import Recipe, Store
from emonb.vlm import VisualTokens, load_vlm, visual_tokens

KEYS = ["image", "emotion", "confidence", "models", "gate", "saliency", "key_elements", "reasons", "unfamiliar"]
SEEN = {"train": 2000, "val": 300}
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
    assert {"emotion", "rival", "margin", "vlm", "head", "rest", "leaned_on", "sentence"} == set(full["gate"])
    assert [plain["key_elements"], plain["reasons"]] == [None, None]
    texts = [model.say([picture()], kind)[0] for kind in ("conversation", "reasoning")]
    assert [full["key_elements"], full["reasons"]] == texts


def test_the_teacher_is_found_beside_its_model_and_knows_the_same_emotions(world, tmp_path):
    _, folder = world
    assert find_teacher(folder, LABELS[::-1]) is None
    out = shutil.copytree(folder.parent.parent, tmp_path / "out")
    assert find_teacher(out / "models" / "mini-fi", LABELS)([picture()]).shape == (1, len(LABELS))
    assert find_teacher(tmp_path / "mini-fi", LABELS) is None
    pointer = out / "artifacts" / "teacher" / "mini-fi--vit--seed0.json"
    write_json(pointer, {**read_json(pointer), "key": "gone"})
    assert find_teacher(out / "models" / "mini-fi", LABELS) is None


def test_a_picture_unlike_those_of_training_is_told_by_distance_and_by_shape(world, tmp_path):
    """Distances are Mahalanobis', by numpy; at most 1 % of val is told; without features nobody is."""
    model, folder = world
    rng, width = np.random.default_rng(0), model.seeing().width
    features = {split: rng.normal(size=(n, width)) * np.linspace(1, 9, width) for split, n in SEEN.items()}
    train, other = (torch.tensor(features[split]).float() for split in ("train", "val"))
    distance, limit = seen_before(train, other)
    gaps, inverse = features["val"] - features["train"].mean(0), np.linalg.inv(np.cov(features["train"].T))
    expected = np.sqrt(np.einsum("ij,jk,ik->i", gaps, inverse, gaps))
    np.testing.assert_allclose(distance(other), expected, rtol=1e-3)
    assert (distance(other) > limit).sum() <= 0.01 * len(other)
    assert (distance(3 * other) > limit).all()

    visual = visual_tokens(model.seeing(), [picture(), picture((192, 96))])
    seen, near = visual.pooled()[0].numpy(), {"grid": visual.grid[:1].numpy()}
    pooled = {split: seen + scale * rng.normal(size=(200, width)) for split, scale in (("train", 1), ("val", 1))}

    def made(where, parts):
        for split, values in pooled.items():
            np.save(where / f"{split}.pooled.npy", values.astype(np.float16))
            np.save(where / f"{split}.grid.npy", np.repeat(near["grid"], len(values), 0))

    out = shutil.copytree(folder.parent.parent, tmp_path / "out")
    assert find_stranger(out / "models" / "mini-fi") is None
    Store(out / "artifacts").get("features", "mini-fi", Recipe(made, {}))
    ask = find_stranger(out / "models" / "mini-fi")
    same, wide = ask(visual)
    assert same == ""
    assert "not of their one shape" in wide
    far = VisualTokens([tokens + 9 for tokens in visual.tokens], visual.grid)
    assert "unlike the pictures that these models know: far from all" in ask(far)[0]


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


@pytest.mark.parametrize("kind", sorted(GATES))
def test_the_lead_loses_what_a_silent_input_had_added(kind):
    torch.manual_seed(1)
    gate, (answer, head) = make_gate(kind, 3), inputs("anger", 0.7, 0.2, 0.1)
    lean = gate_lean(gate, answer, head, THREE)
    first, second = THREE.index(lean["emotion"]), THREE.index(lean["rival"])
    exact = gate.double()
    silent = {0: (answer, head), lean["vlm"]: (answer * 0, head), lean["head"]: (answer, head * 0)}
    for part, given in silent.items():
        logits = exact(*(x[None].double() for x in given))[0]
        assert lean["margin"] - part == pytest.approx((logits[first] - logits[second]).item(), abs=1e-6)
    assert lean["vlm"] + lean["head"] + lean["rest"] == pytest.approx(lean["margin"], abs=1e-9)
    assert lean["margin"] >= 0


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
    assert (lean["vlm"], lean["head"]) == pytest.approx(expected[3:], abs=1e-6)  # W_vlm answer and W_head head
    assert f"answers {lean['emotion']} and leaned on" in lean["sentence"]
    parts = f"the VLM adds {lean['vlm']:+.2f}, the head {lean['head']:+.2f} and the rest is {lean['rest']:+.2f}"
    assert parts in lean["sentence"]


# ---- the head's map ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def visual(world):
    return visual_tokens(world[0].seeing(), [picture(), picture((192, 96))])


@pytest.mark.parametrize("steps", [1, 8])
def test_shares_are_gradient_times_input_in_double_precision(world, visual, steps):
    model, _ = world
    head = copy.deepcopy(model.head).double()
    tokens = visual.tokens[1].double()  # [N, D]
    x, base = visual.pooled()[1].half().double(), head.mean
    way = [1.0] if steps == 1 else [(i + 0.5) / steps for i in range(steps)]
    gradients = [torch.autograd.functional.jacobian(lambda z: head(z)[2], base + a * (x - base)) for a in way]
    expected = (tokens - base) @ torch.stack(gradients).mean(0) / len(tokens)
    found = explain_head(model, visual, LABELS[2], row=1, steps=steps)
    rows, columns = (n // model.seeing().merge_size for n in visual.grid[1].tolist()[1:])
    assert (found["rows"], found["columns"], len(found["tokens"])) == (rows, columns, rows)
    np.testing.assert_allclose(np.ravel(found["tokens"]), expected.detach().numpy(), rtol=1e-4, atol=1e-7)
    assert found["logit"] == pytest.approx(head(x)[2].item(), abs=1e-5)
    assert found["start"] == pytest.approx(head(base)[2].item(), abs=1e-5)
    assert found["missed"] == pytest.approx(found["logit"] - found["start"] - expected.sum().item(), abs=1e-5)


def test_default_is_the_heads_answer_and_gradients_may_be_off(world, visual):
    model, _ = world
    with torch.inference_mode():
        parts = model.parts([picture()])
        found = explain_head(model, parts["visual"])
    assert found["label"] == LABELS[int(parts["head"].argmax())]
    np.testing.assert_allclose(found["tokens"], explain_head(model, visual, found["label"])["tokens"], atol=1e-3)
    with pytest.raises(EmonbError, match="label: 'hope' is none of"):
        explain_head(model, visual, "hope")


class _Passes(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.startswith("qwen")])
def test_tokens_lie_where_their_part_of_the_picture_lies(family, tmp_path):
    """Without attention a token sees its own patches: painting one field changes one token, in the same place."""
    tuned = load_vlm(str(save_family(tmp_path, family)))
    for i in range(len(tuned.core.visual.blocks)):
        tuned.core.visual.blocks[i] = _Passes()
    side, rows, columns = tuned.core.config.vision_config.patch_size * 2, 2, 4
    plain = Image.new("RGB", (columns * side, rows * side), "grey")

    def tokens(image):
        visual = visual_tokens(tuned, [image])
        assert visual.grid[0].tolist() == [1, rows * 2, columns * 2]
        return visual.tokens[0][:, : visual.width].float().reshape(rows, columns, -1)

    before = tokens(plain)
    for row, column in ((0, 0), (0, 3), (1, 0), (1, 2)):
        painted = plain.copy()
        painted.paste("orange", (column * side, row * side, (column + 1) * side, (row + 1) * side))
        changed = (tokens(painted) - before).abs().amax(-1) > 1e-3
        assert changed.nonzero().tolist() == [[row, column]]
