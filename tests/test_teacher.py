"""Room 04: the conventional networks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from pipeline import COLORS, make_tree

from emonb import teacher_training
from emonb.errors import EmonbError
from emonb.fit import set_seed
from emonb.settings import NetworkSettings, load_settings
from emonb.teacher import Pictures, build_network, predict_network, train_network

SMALL = NetworkSettings(
    name="vit_tiny_patch16_224",
    image_size=32,
    kwargs={"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    epochs=3,
    lr=3e-3,
    batch_size=8,
)


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    root = make_tree(tmp_path_factory.mktemp("tree"), {"train": 8})
    paths = sorted(root.rglob("*.png"))
    return pd.DataFrame({"path": [str(p) for p in paths], "label": [p.parent.name for p in paths]})


def test_label_indices_follow_the_given_order(frame):
    order = ["sadness", "joy", "anger"]
    pictures = Pictures(frame, order, SMALL)
    assert [order[t] for t in pictures.targets] == frame["label"].tolist()


def test_two_trainings_with_one_seed_are_equal_and_another_seed_differs(frame):
    labels, logits = list(COLORS), []
    for seed in (0, 0, 1):
        set_seed(seed)
        net = build_network(SMALL, 3)
        val = Pictures(frame, labels, SMALL)
        rows = train_network(net, val.augmented(0), val, SMALL, seed=seed, what="test")
        logits.append(predict_network(net, val))
    assert np.array_equal(logits[0], logits[1])
    assert not np.allclose(logits[0], logits[2])
    accuracy = 100 * (logits[2].argmax(1) == np.array(val.targets)).mean()
    assert accuracy == pytest.approx(max(r["value"] for r in rows if r["split"] == "val"))


def test_streamed_pictures_equal_cached_ones(frame, monkeypatch):
    cached = Pictures(frame, list(COLORS), SMALL)
    monkeypatch.setattr("emonb.teacher_training.CACHE_BYTES", 0)
    streamed = Pictures(frame, list(COLORS), SMALL)
    assert streamed.cache is None
    assert torch.equal(cached[5][0], streamed[5][0])


@pytest.mark.parametrize("network", ["vit", "resnet", "vgg"])
def test_networks_of_the_laptop_profile(network):
    settings = load_settings("mini").teacher.networks[network]
    net = build_network(settings, 6)
    assert net(torch.zeros(2, 3, settings.image_size, settings.image_size)).shape == (2, 6)


def test_unknown_network_is_named():
    with pytest.raises(EmonbError, match="no model 'vit_huge_of_mine'"):
        build_network(SMALL.model_copy(update={"name": "vit_huge_of_mine", "kwargs": {}}), 2)


def test_a_crop_belongs_to_seed_epoch_and_picture(frame):
    """Not to the order in which pictures are asked for, nor to other random numbers drawn meanwhile."""
    one, two, other = (Pictures(frame, list(COLORS), SMALL).augmented(s) for s in (5, 5, 6))
    first = one[3][0]
    torch.rand(7)
    two[0], two[1]
    assert torch.equal(two[3][0], first)
    assert not torch.equal(other[3][0], first)
    one.epoch = 1
    assert not torch.equal(one[3][0], first)
    state = torch.get_rng_state()
    one[4]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_killed_training_goes_on_from_its_last_epoch(frame, tmp_path, monkeypatch):
    def trained(parts, stop_after=None):
        set_seed(0)
        net = build_network(SMALL, 3)
        val = Pictures(frame, list(COLORS), SMALL)
        started = []

        def batches(*arguments):
            started.append(arguments[-1])
            if stop_after is not None and len(started) > stop_after:
                raise KeyboardInterrupt
            return plain(*arguments)

        monkeypatch.setattr(teacher_training, "_batches", batches)
        try:
            rows = train_network(net, val.augmented(0), val, SMALL, seed=0, what="test", parts=parts)
        except KeyboardInterrupt:
            return started
        return started, rows, net.state_dict()

    plain = teacher_training._batches
    _, rows, whole = trained(None)
    assert trained(tmp_path, stop_after=2) == [1, 2, 3]
    started, again, resumed = trained(tmp_path)
    assert started == [3]
    assert again == rows
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_pretrained_weights_bring_their_own_colours(frame):
    plain = Pictures(frame, list(COLORS), SMALL)[0][0]
    settings = SMALL.model_copy(update={"name": "resnet50", "pretrained": True})
    theirs = Pictures(frame, list(COLORS), settings)[0][0]
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(theirs * std + mean, plain * 0.5 + 0.5, atol=1e-6)
