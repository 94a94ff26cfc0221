"""Opinions about a picture against the model's own numbers; strangers; the gate's lean; the head's map and its sum."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from assembled import LABELS, assembled, picture, results
from conftest import ROOT
from families import FAMILIES, save_family
from PIL import Image, ImageOps
from pipeline import DATASET
from safetensors.torch import load_file, save_file
from torch import nn

from emonb.data import open_picture
from emonb.errors import EmonbError
from emonb.files import read_json, write_json
from emonb.gate import GATES, make_gate
from emonb.model import EmoVLMKD
from emonb.predictions import MODELS as KNOWN
from emonb.show.opinions import (
    MODELS,
    SEEN,
    distance_to,
    explain_head,
    familiar_limit,
    find_stranger,
    find_teacher,
    gate_lean,
    opinions,
    traits,
)
from emonb.vlm import VisualTokens, load_vlm, visual_tokens
from emonb.world import draw_dataset

KEYS = ["image", "emotion", "confidence", "models", "gate", "saliency", "key_elements", "reasons", "unfamiliar"]
SIZES = {"known": 2000, "new": 300}
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "oasis" / "images"
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


# ---- pictures that the models have not seen ------------------------------------------------------------------------


def test_distances_are_to_the_nearest_in_units_of_the_spread():
    """By numpy's inverse square root of the covariance; of new pictures of their kind about 1 % lie beyond."""
    rng, scale = np.random.default_rng(0), np.linspace(1, 9, 20)
    features = {split: rng.normal(size=(n, 20)) * scale for split, n in SIZES.items()}
    known, new = (torch.tensor(features[split]) for split in ("known", "new"))
    size, directions = np.linalg.eigh(np.cov(features["known"].T))
    white = {split: x @ directions / np.sqrt(size) for split, x in features.items()}
    expected = np.linalg.norm(white["new"][:, None] - white["known"][None], axis=-1).min(1)
    distance, limit = distance_to(known), familiar_limit(known)
    np.testing.assert_allclose(distance(new), expected, rtol=0.02)
    assert 0 < (distance(new) > limit).sum() <= 0.02 * len(new)
    assert (distance(9 * new) > limit).sum() > 0.9 * len(new)
    flat = torch.nn.functional.pad(known, (0, 1))  # a number in which all are the same, and a picture that differs
    assert distance_to(flat)(torch.nn.functional.pad(known[:1], (0, 1), value=2)) > familiar_limit(flat)


@pytest.fixture(scope="module")
def drawn(world, tmp_path_factory):
    """Who tells strangers for a model of 300 drawn pictures, and 120 new drawn ones."""
    folder = tmp_path_factory.mktemp("drawn")
    table = draw_dataset("mini-fi", folder, {"train": 300, "val": 8, "test": 120})
    paths = {split: [folder / path for path in rows["path"]] for split, rows in table.groupby("split")}
    visual = visual_tokens(world[0].seeing(), paths["train"])
    known = traits(paths["train"], visual)
    seen = {"known": known, "limit": torch.tensor(familiar_limit(known)), "shapes": visual.grid.unique(dim=0)}
    save_file(seen, folder / SEEN)
    ask = find_stranger(folder)
    return lambda pictures: ask(pictures, visual_tokens(world[0].seeing(), pictures)), paths["test"]


def like_a_photograph(seed, side=96):
    """Light from one side, on clouds of noise with the spectrum of nature: amplitudes fall with the frequency."""
    rng, along = np.random.default_rng(seed), np.fft.fftfreq(side)
    frequency = np.hypot(along[:, None], along[None]) + 1 / side
    noise = np.fft.fft2(rng.normal(size=(3, side, side))) / frequency ** rng.uniform(0.9, 1.4)
    clouds = np.fft.ifft2(noise).real.transpose(1, 2, 0) @ (np.eye(3) * 0.4 + 0.6 * rng.random((3, 3)))
    light = np.linspace(-1, 1, side)[:, None, None] * rng.normal(size=3) * 40
    pixels = rng.uniform(60, 200, 3) + light + clouds / clouds.std() * rng.uniform(15, 50)
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


def share(said):
    """Of the pictures that are warned of."""
    return sum(map(bool, said)) / len(said)


def test_drawn_pictures_are_known_and_what_looks_like_a_photograph_is_not(drawn):
    ask, new = drawn
    assert share(ask(new)) <= 0.03
    strange = ask([like_a_photograph(seed) for seed in range(60)])
    assert share(strange) >= 0.95
    assert all(
        x.startswith("unlike the pictures that these models know: far from all of them (") for x in strange if x
    )
    assert "not of their one shape" in ask([Image.open(new[0]).resize((192, 96))])[0]


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs are not beside the checkout")
def test_photographs_and_their_squares_are_warned_of(drawn):
    files = sorted(PHOTOGRAPHS.glob("*.jpg"))
    whole = [open_picture(file) for file in files[:: len(files) // 60][:60]]
    squares = [ImageOps.fit(one, (96, 96), Image.Resampling.BICUBIC) for one in whole]
    cut = [ImageOps.fit(one, (min(one.size),) * 2).crop((80, 80, 176, 176)) for one in whole]
    assert share(drawn[0](whole)) == 1
    assert share(drawn[0](squares)) >= 0.95
    assert share(drawn[0](cut)) >= 0.95


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (300, 2)])
def test_the_smallest_pictures_have_traits(size):
    visual = VisualTokens([torch.ones(1, 8)], torch.ones(1, 1))
    assert traits([picture(size)], visual).isfinite().all()


def test_a_model_keeps_what_it_has_seen_and_one_of_earlier_knows_nothing(world, tiny, tmp_path):
    folder = tiny.run.out / "models" / DATASET
    table = tiny.run.samples(DATASET, "test")
    model, paths = EmoVLMKD.from_pretrained(folder), table["path"].tolist()
    found = opinions(model, [open_picture(path) for path in paths], paths, stranger=find_stranger(folder))
    assert share([opinion["unfamiliar"] for opinion in found]) < 0.5
    assert len(load_file(folder / SEEN)["known"]) == sum(len(tiny.run.samples(DATASET, s)) for s in ("train", "val"))
    copy = shutil.copytree(folder, tmp_path / "damaged")
    (copy / SEEN).write_bytes((copy / SEEN).read_bytes()[:-1] + b"?")
    with pytest.raises(EmonbError, match=rf"{SEEN}: damaged"):
        EmoVLMKD.from_pretrained(copy)
    assert find_stranger(world[1]) is None


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
