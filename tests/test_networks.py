"""The networks that have seen drawn scenes: what they were taught, and that it can be done again."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from test_standin import LABELS

from emonb.errors import EmonbError
from emonb.teacher import LAYOUT, build_network
from tools.pretrain import networks
from tools.pretrain.networks import NETWORKS, STEPS, architecture, draw_pool, network_health, visible_names

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = {"log": lambda _: None}


def test_no_name_that_is_taught_is_an_emotion():
    words = set(re.findall(r"\w+", str(visible_names())))
    assert len(visible_names()["object"]) == 92
    assert not words & {*LABELS, "emotion", "feeling", "mood"}


@pytest.mark.parametrize("name", STEPS)
def test_card_and_provenance_tell_of_the_network_that_is_here(name):
    card, made = (NETWORKS / "README.md").read_text("utf-8"), json.loads((NETWORKS / "provenance.json").read_text())
    assert made[name]["lessons"] == networks.digest(), f"other lessons: python -m tools.pretrain {name}"
    assert (made[name]["steps_a"], made[name]["steps_b"]) == STEPS[name]
    assert not re.search(r"/(home|root|tmp|work)\b", card + str(made))
    net = build_network(**architecture(name)).to(**LAYOUT)
    net.load_state_dict(load_file(NETWORKS / f"{name}.safetensors"))
    found = network_health(net, draw_pool(100, 11), architecture(name)["image_size"])
    for group in visible_names():
        told = made[name]["health"][group]
        assert f" {told:.3f} |" in next(line for line in card.splitlines() if line.startswith(f"| {group} "))
        assert found[group] == pytest.approx(told, abs=0.15)
    least = {"object": 0.4, "hue": 0.7, "brightness": 0.6, "colourfulness": 0.6}  # chance: .03, .1, .2, .25
    assert all(found[group] > least[group] for group in least), "it does not see what it was taught"


def test_a_stopped_pretraining_goes_on_as_if_it_had_not_been_stopped(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('name = "emonb"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(networks, "EVERY", 2)
    monkeypatch.setattr(networks, "HELD_OUT", 8)
    small = {"pool": 12, "steps_a": 2, "steps_b": 4}
    whole = networks.rebuild_network("vit", tmp_path / "whole", **small, **QUIET)
    with pytest.raises(ZeroDivisionError):
        networks.rebuild_network("vit", tmp_path / "stopped", **small, log=lambda _: 1 / 0)
    with pytest.raises(EmonbError, match=r"vit-7-12\.pt: its 2 steps are not the first of these"):
        networks.rebuild_network("vit", tmp_path / "stopped", pool=12, steps_a=1, steps_b=4, **QUIET)
    stopped = networks.rebuild_network("vit", tmp_path / "stopped", **small, **QUIET)
    found, wanted = load_file(stopped), load_file(whole)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
