"""Room 04: the conventional networks, the crops they see, and their pretrained weights."""

import time
import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pipeline import make_tree
from safetensors.torch import load_file, save_file

from emonb import teacher
from emonb.errors import EmonbError
from emonb.settings import load_settings
from emonb.teacher import Pictures, build_network, colours_of, predict_network, train_network
from emonb.training import warn_if_short

TINY = {
    "vit_tiny_patch16_224": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "resnet10t": {"channels": [8, 8, 8, 8], "stem_width": 8},
}
VIT = "vit_tiny_patch16_224"
pytestmark = pytest.mark.usefixtures("one_thread")


def network(name=VIT, classes=2, **changes):
    torch.manual_seed(0)
    return build_network(name, classes, **{"image_size": 32, **TINY.get(name, {}), **changes})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    paths = sorted(make_tree(tmp_path_factory.mktemp("tree"), {"train": 12}).rglob("*.png"))
    return Pictures([str(p) for p in paths], [p.parent.name == "negative" for p in paths], 32)


def test_a_training_repeats_with_its_seed_and_keeps_its_best_epoch(pictures):
    found = []
    for seed in (0, 0, 1):
        net = network()
        rows = train_network(net, pictures.augmented(seed), pictures, epochs=3, lr=3e-3, batch_size=8, seed=seed)
        found.append(predict_network(net, pictures))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    accuracy = 100 * (found[2].argmax(1).numpy() == pictures.targets).mean()
    assert accuracy == pytest.approx(max(row["value"] for row in rows if row["split"] == "val"))


def test_a_crop_belongs_to_seed_epoch_and_picture(pictures):
    """Not to the order in which pictures are asked for, nor to other random numbers drawn meanwhile."""
    one, two, other = (pictures.augmented(seed) for seed in (5, 5, 6))
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


def test_a_lone_last_picture_is_left_out_of_an_epoch_since_a_batch_norm_cannot_learn_of_it(pictures):
    few = Pictures(pictures.paths[:5], pictures.targets[:5], 32)
    rows = train_network(network("resnet10t"), few.augmented(0), few, epochs=1, lr=1e-3, batch_size=4)
    assert np.isfinite(rows[0]["value"])


def test_training_crops_the_original_and_nothing_is_squashed(tmp_path):
    pixels = np.indices((64, 192)).sum(0) % 2 * np.full((3, 1, 1), 255)  # black and white in turn
    board = pixels.transpose(1, 2, 0).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    crop, _ = Pictures([tmp_path / "board.png"], [0], 32, crop_scale=(0.02, 0.03)).augmented(0)[0]
    board[:, :64], board[:, 128:] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(board).save(tmp_path / "ends.png")
    centre, _ = Pictures([tmp_path / "ends.png"], [0], 32)[0]
    assert centre[:, :, 2:-2].std() < 0.1, "the centre of a smaller picture: grey, and neither red nor blue"
    assert crop.max() - crop.min() > 1.5, "a small crop still shows the pixels of the original"


def test_a_part_that_hardly_moves_from_its_random_start_is_warned_of():
    with pytest.warns(UserWarning, match="gate: 225 steps at a learning rate of 0.0001 move a weight by 0.02"):
        warn_if_short(torch.nn.Linear(12, 6), 1e-4, 225, "gate")
    with warnings.catch_warnings(action="error"):
        warn_if_short(torch.nn.Linear(12, 6), 1e-4, 14_400, "gate")


@pytest.mark.parametrize(("name", "lr"), [(VIT, 1e-7), ("resnet10t", 2e-7)])  # each warning comes once
def test_a_training_that_leaves_the_classifier_near_its_start_is_warned_of(pictures, name, lr):
    with pytest.warns(UserWarning, match=f"classifier: 1 steps at a learning rate of {lr:g}"):
        train_network(network(name), pictures.augmented(0), pictures, epochs=1, lr=lr, batch_size=24)


def test_what_does_not_fit_into_memory_is_streamed(pictures, monkeypatch):
    monkeypatch.setattr(teacher, "CACHE_BYTES", 0)
    streamed = Pictures(pictures.paths, pictures.targets, 32)
    kept = Pictures(pictures.paths, pictures.targets, 32, colours_of("resnet50", True))
    assert torch.equal(pictures[5][0], streamed[5][0])
    assert streamed.workers > 0 == pictures.workers
    mean, deviation = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(kept[0][0] * deviation + mean, pictures[0][0] * 0.5 + 0.5, atol=1e-6)  # ImageNet's colours


def weights_of(name, file, **changes):
    """Weights of a network for 10 classes in a file like those of the hub or of torch."""
    state = network(name, 10, **changes).state_dict()
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    return state


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", TINY)
def test_all_but_the_classifier_comes_from_the_file(tmp_path, name, suffix):
    file = tmp_path / f"w{suffix}"
    state = weights_of(name, file)
    for side in (32, 48):  # of another size the places are interpolated
        net = network(name, 3, pretrained=True, weights=str(file), image_size=side)
        for key, value in net.state_dict().items():
            if key.startswith(("head.", "fc.")):
                assert len(value) == 3
            elif side == 32 or key != "pos_embed":
                assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", ["vit_base_patch16_384", "resnet50", "vgg16"])
def test_the_papers_networks_say_how_to_get_their_weights(name):
    start = time.monotonic()
    with pytest.raises(EmonbError) as caught:
        build_network(name, 8, pretrained=True)
    assert time.monotonic() - start < 5, "it waits for a network, or builds one first"
    text, hub_name = str(caught.value), timm.get_pretrained_cfg(name).hf_hub_id
    assert hub_name.startswith(f"timm/{name}.")
    assert f"`hf download {hub_name} model.safetensors --local-dir models/{name}`" in text
    assert f"`weights: models/{name}/model.safetensors`" in text


WRONG = {
    "another architecture": lambda file: weights_of(VIT, file),
    "other layers": lambda file: weights_of("resnet10t", file, channels=[8, 8, 8, 16]),
    "a layer less": lambda file: save_file(dict(list(weights_of("resnet10t", file).items())[5:]), file),
    "cut short": lambda file: (weights_of("resnet10t", file), file.write_bytes(file.read_bytes()[:-100])),
    "not there": lambda file: None,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_does_not_fit_is_refused_with_the_command_that_fetches_it(tmp_path, wrong):
    file = tmp_path / "w.safetensors"
    WRONG[wrong](file)
    with pytest.raises(EmonbError, match=r"resnet10t.*w\.safetensors.*hf download timm/resnet10t\.") as caught:
        network("resnet10t", 3, pretrained=True, weights=str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("network", ["vit", "resnet", "vgg"])
def test_the_mini_profile_starts_from_networks_that_have_seen_drawn_scenes(network):
    config = load_settings("mini").teacher.networks[network]
    net = build_network(classes=3, **config.building)
    state = load_file(teacher.weights_of(config.weights, config.name))
    fresh = [key for key, value in net.state_dict().items() if not torch.equal(value, state[key].to(value.dtype))]
    assert [key.split(".")[0] in ("head", "fc") for key in fresh] == [True, True], "all but the classifier"
    assert all(value.dtype != torch.float16 for value in net.state_dict().values())
    assert colours_of(config.name, True, config.weights) == ((0.5,) * 3, (0.5,) * 3)
    for wrong in ({"image_size": 32}, {"depth": 1}, {"name": "convnext_pico"}):
        with pytest.raises(EmonbError, match=r"setting teacher.networks \(.*\): weights drawn-scenes are for "):
            build_network(classes=3, **{**config.building, **wrong})


@pytest.mark.parametrize(
    ("what", "name"),
    [("weights", "vgg_small"), ("weights", "resnet50.of_mine"), ("model", "vit_huge"), ("model", "resnet50.no_one")],
)
def test_an_unknown_network_is_named(what, name):
    with pytest.raises(EmonbError, match=f"setting teacher.networks: timm has no {what} of '{name}'"):
        build_network(name, 3, pretrained=what == "weights")


def test_options_that_a_network_does_not_have_are_named():
    with pytest.raises(EmonbError, match=r"setting teacher.networks \(resnet10t\): timm cannot build it so: .*nosuch"):
        teacher.build_network("resnet10t", 6, nosuch=1)
