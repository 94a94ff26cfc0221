"""Settings: the profiles are valid, and a mistake is named."""

from __future__ import annotations

import pytest

from emonb.errors import EmonbError
from emonb.settings import NetworkSettings, load_settings, profile_names


@pytest.mark.parametrize("profile", profile_names())
def test_shipped_profiles_are_valid(profile):
    settings = load_settings(profile)
    assert settings.profile == profile
    assert settings.out == f"build/{profile}"


def test_mini_keeps_the_promised_sizes():
    world = load_settings("mini").world
    for sizes in (world.mikels8, world.ekman6, world.sentiment2):
        assert sizes[2] >= 600
    assert world.mikels8[0] >= 1000
    assert len(load_settings("mini").datasets) == 5


def test_paper_has_the_papers_values():
    settings = load_settings("paper")
    assert settings.vlm.base == "Qwen/Qwen2-VL-7B-Instruct"
    assert (settings.vlm.lora_r, settings.vlm.lora_alpha) == (8, 8)
    assert settings.teacher.networks["vit"].name == "vit_base_patch16_384"
    assert (settings.distill.hidden, settings.distill.alpha, settings.distill.tau) == ((1024,), 0.5, 2.0)


def test_the_smaller_sister_differs_in_the_base_only():
    paper, small = (load_settings(name).model_dump(exclude={"profile", "out"}) for name in ("paper", "paper-2b"))
    assert small["vlm"].pop("base") == "Qwen/Qwen2-VL-2B-Instruct"
    paper["vlm"].pop("base")
    assert small == paper


def test_what_the_paper_profile_writes_out_are_the_defaults():
    """The same value twice must not drift apart; the teachers have no default."""
    paper = load_settings("paper")
    for section in ("vlm", "distill", "gate"):
        assert getattr(paper, section) == type(getattr(paper, section))()
    vit = paper.teacher.networks["vit"]
    assert vit == NetworkSettings(name="vit_base_patch16_384", pretrained=True)


def test_overrides():
    settings = load_settings("smoke", datasets=" mini-flickr , mini-fi", seeds="4,5", out="", images=None)
    assert settings.datasets == ("mini-flickr", "mini-fi")
    assert settings.seeds == (4, 5)
    assert settings.seed == 4
    assert settings.out == "build/smoke"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("vlm: {lora_rank: 8}", "vlm.lora_rank"),
        ("vlm: {lora_r: many}", "vlm.lora_r"),
        ("vlm: {dtype: int8}", "vlm.dtype"),
        ("vlm: {attention: quick}", "vlm.attention"),
        ("teacher: {networks: {vit: {name: resnet18, weights: w.pth}}}", "teacher.networks.vit.weights"),
        ("distill: {alpha: 1.5}", "distill.alpha"),
        ("distill: {tau: 0}", "distill.tau"),
        ("gate: {kind: magic}", "gate.kind"),
        ("seeds: [0, 0]", "seeds"),
        ("datasets: []", "datasets"),
        ("teacher: {networks: {resnet: {name: resnet18}}}", "teacher.networks"),
        ("colour: red", "colour"),
    ],
)
def test_a_wrong_key_is_named(tmp_path, text, key):
    profile = tmp_path / "mine.yaml"
    base = "datasets: [mini-fi]\n" if not text.startswith("datasets") else ""
    teacher = "teacher: {networks: {vit: {name: vit_tiny_patch16_224}}}\n" if "teacher" not in text else ""
    profile.write_text(f"{base}{teacher}{text}\n")
    with pytest.raises(EmonbError) as caught:
        load_settings(str(profile))
    assert f"  {key}" in str(caught.value)


@pytest.mark.parametrize("profile", ["huge", "missing.yaml"])
def test_unknown_profile(profile):
    with pytest.raises(EmonbError, match=r"unknown profile .*mini, paper, paper-2b, smoke"):
        load_settings(profile)


@pytest.mark.parametrize("text", ["a: [", "- a\n- b"])
def test_profile_that_is_no_mapping(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(EmonbError, match=r"bad\.yaml"):
        load_settings(str(tmp_path / "bad.yaml"))
