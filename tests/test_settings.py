"""Settings: the profiles are valid, and a mistake is named."""

import re
import shutil
from contextlib import nullcontext

import pytest
import torch
import yaml
from conftest import ROOT

from emonb.annotate.request import load_prices
from emonb.errors import EmonbError
from emonb.files import make_folder
from emonb.pipeline import dataset_folder
from emonb.predictions import dataset_title, paper_dataset
from emonb.settings import NetworkSettings, TripletSettings, checkpoint_of, load_settings


def test_shipped_profiles_are_valid_and_mini_keeps_the_promised_sizes():
    for path in (ROOT / "emonb" / "profiles").glob("*.yaml"):
        settings = load_settings(path.stem)
        assert (settings.profile, settings.out) == (path.stem, f"build/{path.stem}")
    mini = load_settings("mini")
    assert all(sizes[2] >= 600 for sizes in (mini.world.mikels8, mini.world.ekman6, mini.world.sentiment2))
    assert (len(mini.datasets), mini.world.mikels8[0] >= 1000) == (5, True)


def test_emotion6_by_its_raters_has_another_name(tmp_path):
    """So that every file and table says which labels it rests on; one release serves both."""
    options = {"datasets": "fi,emotion6", "images": tmp_path}
    assert load_settings("smoke", **options).datasets == ("fi", "emotion6")
    settings = load_settings("smoke", **options, emotion6_labels="majority")
    assert settings.datasets == ("fi", "emotion6-majority")
    assert dataset_title("emotion6") != dataset_title("emotion6-majority")
    assert paper_dataset("emotion6-majority") == "", "the paper's numbers are of the folders"
    (tmp_path / "emotion6").mkdir()
    assert dataset_folder(settings, "emotion6-majority") == tmp_path / "emotion6"


def test_paper_has_the_papers_values_and_they_are_the_defaults():
    paper = load_settings("paper")
    for section in ("vlm", "distill", "gate"):
        assert getattr(paper, section) == type(getattr(paper, section))()
    assert paper.teacher.networks["vit"] == NetworkSettings(name="vit_base_patch16_384", pretrained=True)
    small = load_settings("paper-2b", vlm={"base": paper.vlm.base})
    assert small.model_copy(update={"profile": "paper", "out": paper.out}) == paper


PAPER = {  # what the authors' code trains with (its second reading included)
    "vlm": {
        "base": "Qwen/Qwen2-VL-7B-Instruct", "dtype": "bfloat16", "quantize_4bit": True, "max_side": 1024,
        "lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.05, "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "epochs": 5, "lr": 1e-4, "lr_schedule": "constant", "train_batch_size": 1, "gradient_accumulation": 1,
        "max_grad_norm": 0.3, "gradient_checkpointing": True, "max_new_tokens": 256,
        "triplet_kinds": ["categorical", "conversation", "reasoning"],
        "loss": "response",  # ours: here the profile departs on purpose
    },
    "distill": {
        "hidden": [1024], "alpha": 0.5, "tau": 2.0, "target": "label", "dropout": 0.1, "epochs": 5, "lr": 1e-5,
        "weight_decay": 1e-4, "batch_size": 1,
    },
    "gate": {"kind": "concat", "epochs": 10, "lr": 1e-4, "weight_decay": 1e-4, "batch_size": 1},
    "vit": {
        "name": "vit_base_patch16_384", "pretrained": True, "image_size": 384, "epochs": 10, "lr": 3e-5,
        "weight_decay": 1e-5, "batch_size": 10, "optimizer": "adam",
    },
}  # fmt: skip


def test_the_paper_profile_says_what_the_authors_train_with_and_nothing_else():
    tree = yaml.safe_load((ROOT / "emonb" / "profiles" / "paper.yaml").read_text())
    said = {name: tree[name] for name in ("vlm", "distill", "gate")} | {"vit": tree["teacher"]["networks"]["vit"]}
    assert said == PAPER


def test_overrides():
    settings = load_settings("smoke", datasets=" mini-flickr , mini-fi", seeds="4,5", out="", images=None)
    assert settings.datasets == ("mini-flickr", "mini-fi")
    assert (settings.seeds, settings.seed, settings.out) == ((4, 5), 4, "build/smoke")
    assert load_settings("smoke", triplets={"max_cost": 3}).triplets.max_cost == 3


def test_a_profile_may_start_from_another_one(tmp_path):
    (tmp_path / "mine.yaml").write_text("from: smoke\nvlm: {epochs: 3}\nteacher: {networks: {vit: {lr: 0.5}}}\n")
    mine, smoke = load_settings(str(tmp_path / "mine.yaml")), load_settings("smoke")
    assert (mine.vlm.epochs, mine.teacher.networks["vit"].lr, mine.profile) == (3, 0.5, "mine")
    assert mine.vlm.lr == smoke.vlm.lr
    assert mine.teacher.networks["resnet"] == smoke.teacher.networks["resnet"]
    for start in ("nowhere", "[smoke]", "{smoke: 1}", "3"):
        (tmp_path / "mine.yaml").write_text(f"from: {start}\n")
        with pytest.raises(EmonbError, match=r"from: .* is none of mini, paper"):
            load_settings(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("known", "dtype"), [({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32"), ({}, "float32")]
)
def test_the_dtype_that_a_processor_is_fast_in_is_what_a_run_says(known, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert load_settings("photos").vlm.dtype == dtype
    assert load_settings("smoke").vlm.dtype == "float32"


WRONG = {
    "vlm.lora_rank": "vlm: {lora_rank: 8}",
    "vlm.lora_r": "vlm: {lora_r: many}",
    "vlm.dtype": "vlm: {dtype: int8}",
    "teacher.networks.vit.weights": "teacher: {networks: {vit: {name: resnet18, weights: w.pth}}}",
    "teacher.networks": "teacher: {networks: {resnet: {name: resnet18}}}",
    "teacher.networks: Field required": "teacher: {}",
    "distill.alpha": "distill: {alpha: 1.5}",
    "distill.tau": "distill: {tau: 0}",
    "gate.kind": "gate: {kind: moe}",
    "distill.depths": "distill: {depths: [[8], [8, 4], [4, 2]]}",
    "distill.alphas": "distill: {alphas: [0.5, 0.50000001]}",
    "distill.lengths": "distill: {lengths: [8, 8.0]}",
    "distill.alphas.0": "distill: {alphas: [7]}",
    "distill.lengths.0": "distill: {lengths: [-1]}",
    "distill.lengths.1": "distill: {lengths: [8, .nan]}",
    "distill.depths.0.0": "distill: {depths: [[-5]]}",
    "distill.depths: Tuple should have": "distill: {depths: []}",
    "distill.hidden.0": "distill: {hidden: [0]}",
    "distill.hidden": "distill: {hidden: []}",
    "distill.lr": "distill: {lr: .inf}",
    "vlm.epochs": "vlm: {epochs: 1e999}",
    "vlm.lora_targets": "vlm: {lora_targets: []}",
    "vlm.lora_targets.0": "vlm: {lora_targets: ['']}",
    "vlm.triplet_kinds": "vlm: {triplet_kinds: [reasoning, reasoning]}",
    "vlm.processor.a.dict.b": "vlm: {processor: {a: &a {b: *a}}}",
    "vlm.base": "vlm: {base: ' '}",
    "gate.kinds": "gate: {kinds: []}",
    "teacher.networks: must contain 'nosuch',": "teacher: {teacher: nosuch, networks: {vit: {name: resnet18}}}",
    "teacher.networks: 'a/b'": "teacher: {networks: {vit: {name: resnet18}, a/b: {name: resnet18}}}",
    "teacher.networks: 'head_x'": "teacher: {networks: {vit: {name: resnet18}, head_x: {name: resnet18}}}",
    "teacher.networks.vit.crop_scale": "teacher: {networks: {vit: {name: resnet18, crop_scale: [1, 0.5]}}}",
    "teacher.networks.vit.kwargs.day": "teacher: {networks: {vit: {name: resnet18, kwargs: {day: 2024-01-01}}}}",
    "out": 'out: "a\\0b"',
    "images": "images: ' '",
    "large": "large: [&a [x, y, z, x, y, z], &b [*a, *a, *a, *a, *a, *a], [*b, *b, *b, *b, *b, *b]]",
    "red\\x1b[31m": '"red\\e[31m": 1',
    "triplets.max_words": "triplets: {min_words: 9, max_words: 8}",
    "triplets.max_cost": "triplets: {max_cost: 0}",
    "datasets": "datasets: []",
    "colour": "colour: red",
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_key_is_named_in_one_line(tmp_path, key):
    lines = {"datasets": "[mini-fi]", "teacher": "{networks: {vit: {name: vit_tiny_patch16_224}}}"}
    lines |= dict([WRONG[key].split(": ", 1)])
    (tmp_path / "mine.yaml").write_text("\n".join(f"{name}: {value}" for name, value in lines.items()))
    with pytest.raises(EmonbError, match=f"invalid settings: {re.escape(key)}[: ]") as caught:
        load_settings(str(tmp_path / "mine.yaml"))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


NO_YAML = {  # text -> the line that is named, and why
    "seeds: [0]\nseeds: [1]": (2, "key 'seeds' is there twice"),
    "vlm: {lr: 1}\n\n'vlm': {epochs: 1}": (3, "key 'vlm' is there twice"),
    "vlm:\n  lr: 1\n  lr: 2": (3, "key 'lr' is there twice"),
    "vlm:\n\tlr: 1": (2, "cannot start any token"),
    "a: [": (1, "expected the node content"),
    "a: 1\n---\nb: 2": (2, "another document"),
    "a: !!python/object:os.system []": (1, "could not determine a constructor"),
    "a: \0": (0, "unacceptable character"),
    "a: 2024-13-01": (0, "month must be in 1..12"),
    "a: !!int x": (0, "invalid literal"),
    f"a: {500 * '['}": (0, "recursion"),
}


@pytest.mark.parametrize("text", NO_YAML, ids=range(len(NO_YAML)))
def test_what_is_wrong_with_yaml_is_one_line_with_its_number(tmp_path, text):
    file, (line, why) = tmp_path / "mine.yaml", NO_YAML[text]
    file.write_text(text)
    for read, what in (load_settings, str(file)), (load_prices, TripletSettings(prices=str(file))):
        with pytest.raises(EmonbError, match=why) as caught:
            read(what)
        assert str(caught.value).startswith(f"{file}: {f'line {line}: ' * bool(line)}not valid YAML (")
        assert len(str(caught.value).splitlines()) == 1


def test_what_comes_by_an_anchor_may_be_said_otherwise(tmp_path):
    networks = "{vit: &v {name: x, lr: 0.1}, b: &b {<<: *v, lr: 0.2}, c: {<<: [*b, *v], name: y}}"
    (tmp_path / "mine.yaml").write_text(f"datasets: [mini-fi]\nteacher:\n  networks: {networks}\n")
    found = load_settings(str(tmp_path / "mine.yaml")).teacher.networks
    assert [(network.name, network.lr) for network in found.values()] == [("x", 0.1), ("x", 0.2), ("y", 0.2)]


@pytest.mark.parametrize(
    "seeds", ["-1", "1.5", "0-4", "4294967296", "1,1", "01,1", "one", "1e3", "\u0663", [True], [[1]]]
)
def test_seeds_that_torch_does_not_tell_apart_are_refused_in_one_line(seeds):
    with pytest.raises(EmonbError, match=r"\Aseeds: .+; give whole numbers from 0 to 4294967295, each once, .*\Z"):
        load_settings("smoke", seeds=seeds)
    assert load_settings("smoke", seeds=" 7 ,4294967295").seeds == (7, 2**32 - 1)


@pytest.mark.parametrize("name", ["a__b", "a--b", "../x", "a/b", "x_", "-x", ".hidden", "a\nb", "a{b}", "All"])
def test_a_dataset_s_name_that_would_break_names_of_files_is_refused_at_once(name):
    with pytest.raises(EmonbError, match="would break names of files"):
        load_settings("smoke", datasets=[name], images="x")
    assert load_settings("smoke", datasets=["Fête 2024 (b)"], images="x").datasets == ("Fête 2024 (b)",)


@pytest.mark.parametrize(
    ("encoding", "fine"), [("utf-8-sig", True), ("utf-16", True), ("utf-16-le", True), ("latin-1", False)]
)
def test_profiles_and_prices_in_other_encodings_are_read_or_named(tmp_path, encoding, fine):
    file = tmp_path / "mine.yaml"
    smoke = (ROOT / "emonb/profiles/smoke.yaml").read_text()
    for text, read, what in (
        (smoke, load_settings, str(file)),
        ("as_of: x\nmodels: {}", load_prices, TripletSettings(prices=str(file))),
    ):
        file.write_text(f"# für\n{text}", encoding=encoding)
        wrong = r"\.yaml: byte 0xfc at 3 is no UTF-8, perhaps Latin-1; save the file as"
        with nullcontext() if fine else pytest.raises(EmonbError, match=wrong):
            assert read(what)


def test_what_is_no_profile_is_named(tmp_path):
    for profile in ("huge", "missing.yaml"):
        with pytest.raises(EmonbError, match=r"unknown profile .*mini, paper, paper-2b, photos, smoke"):
            load_settings(profile)
    (tmp_path / "bad.yaml").write_text("- a\n- b")
    with pytest.raises(EmonbError, match=r"bad\.yaml: must be a mapping"):
        load_settings(str(tmp_path / "bad.yaml"))


def test_a_relative_folder_is_relative_to_the_project(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('name = "emonb"')
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert checkpoint_of("models/mine") == str(tmp_path / "models" / "mine")
    assert checkpoint_of("Qwen/Qwen2-VL-7B-Instruct") == "Qwen/Qwen2-VL-7B-Instruct"
    assert load_settings("smoke").out_path == tmp_path / "build" / "smoke"
    shutil.copy(ROOT / "emonb/profiles/smoke.yaml", tmp_path / "models" / "own.yaml")
    assert load_settings("models/own.yaml").out_path == tmp_path / "build" / "own"


def test_a_tilde_is_the_home_and_a_ring_of_links_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ring").symlink_to("ring")
    settings = load_settings("smoke", out="~/out", images="~")
    assert (settings.out_path, settings.images_path) == (tmp_path / "out", tmp_path)
    assert checkpoint_of("~") == str(tmp_path)
    for user in ("~nobody-of-this-name/x", "ring", "ring/x"):
        assert load_settings("smoke", out=user).out_path.name == user.split("/")[-1]
    with pytest.raises(EmonbError, match=r"images: .*ring is no folder"):
        dataset_folder(load_settings("smoke", images=str(tmp_path / "ring")), "fi")
    with pytest.raises(EmonbError, match="ring: cannot write"):
        make_folder(load_settings("smoke", out=str(tmp_path / "ring")).out_path)
