"""Settings: the profiles are valid, and a mistake is named."""

from __future__ import annotations

import pytest
from conftest import ROOT

from emonb.errors import EmonbError
from emonb.settings import NetworkSettings, checkpoint_of, load_settings

PROFILES = ("smoke", "mini", "paper", "paper-2b")


@pytest.mark.parametrize("profile", PROFILES)
def test_shipped_profiles_are_valid(profile):
    assert {path.stem for path in (ROOT / "emonb" / "profiles").glob("*.yaml")} == set(PROFILES)
    settings = load_settings(profile)
    assert (settings.profile, settings.out) == (profile, f"build/{profile}")


def test_mini_keeps_the_promised_sizes():
    settings = load_settings("mini")
    sizes = [settings.world.mikels8, settings.world.ekman6, settings.world.sentiment2]
    assert all(test >= 600 for _, _, test in sizes)
    assert sizes[0][0] >= 1000
    assert len(settings.datasets) == 5


def test_paper_has_the_papers_values_and_they_are_the_defaults():
    paper = load_settings("paper")
    for section in ("vlm", "distill", "gate"):
        assert getattr(paper, section) == type(getattr(paper, section))()
    assert paper.teacher.networks["vit"] == NetworkSettings(name="vit_base_patch16_384", pretrained=True)
    assert paper.vlm.base == "Qwen/Qwen2-VL-7B-Instruct"
    assert paper.vlm.lora == {
        "r": 8, "alpha": 8, "dropout": 0.05, "targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
    }  # fmt: skip
    assert (paper.distill.hidden, paper.distill.alpha, paper.distill.tau) == ((1024,), 0.5, 2.0)
    small = load_settings("paper-2b", vlm={"base": paper.vlm.base})
    assert small.model_copy(update={"profile": "paper", "out": paper.out}) == paper


def test_overrides():
    settings = load_settings("smoke", datasets=" mini-flickr , mini-fi", seeds="4,5", out="", images=None)
    assert settings.datasets == ("mini-flickr", "mini-fi")
    assert (settings.seeds, settings.seed, settings.out) == ((4, 5), 4, "build/smoke")
    assert load_settings("smoke", triplets={"max_cost": 3}).triplets.max_cost == 3


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("vlm: {lora_rank: 8}", "vlm.lora_rank"),
        ("vlm: {lora_r: many}", "vlm.lora_r"),
        ("vlm: {dtype: int8}", "vlm.dtype"),
        ("vlm: {attention: quick}", "vlm.attention"),
        ("teacher: {networks: {vit: {name: resnet18, weights: w.pth}}}", "teacher.networks.vit.weights"),
        ("teacher: {networks: {resnet: {name: resnet18}}}", "teacher.networks"),
        ("distill: {alpha: 1.5}", "distill.alpha"),
        ("distill: {tau: 0}", "distill.tau"),
        ("gate: {kind: magic}", "gate.kind"),
        ("triplets: {min_words: 9, max_words: 8}", "triplets.max_words"),
        ("seeds: [0, 0]", "seeds"),
        ("datasets: []", "datasets"),
        ("colour: red", "colour"),
    ],
)
def test_a_wrong_key_is_named(tmp_path, text, key):
    lines = {"datasets": "[mini-fi]", "teacher": "{networks: {vit: {name: vit_tiny_patch16_224}}}"}
    lines |= dict([text.split(": ", 1)])
    (tmp_path / "mine.yaml").write_text("\n".join(f"{name}: {value}" for name, value in lines.items()))
    with pytest.raises(EmonbError) as caught:
        load_settings(str(tmp_path / "mine.yaml"))
    assert f"  {key}: " in str(caught.value)


@pytest.mark.parametrize("profile", ["huge", "missing.yaml"])
def test_an_unknown_profile_is_named(profile):
    with pytest.raises(EmonbError, match=r"unknown profile .*mini, paper, paper-2b, smoke"):
        load_settings(profile)


@pytest.mark.parametrize("text", ["a: [", "- a\n- b"])
def test_a_profile_that_is_no_mapping_is_named(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(EmonbError, match=r"bad\.yaml"):
        load_settings(str(tmp_path / "bad.yaml"))


def test_a_relative_folder_is_relative_to_the_project(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('name = "emonb"')
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert checkpoint_of("models/mine") == str(tmp_path / "models" / "mine")
    assert checkpoint_of("Qwen/Qwen2-VL-7B-Instruct") == "Qwen/Qwen2-VL-7B-Instruct"
    assert load_settings("smoke").out_path == tmp_path / "build" / "smoke"
