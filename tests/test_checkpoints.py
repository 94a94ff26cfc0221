"""Loading: precision, attention and placement by machine; one message for weights that are missing or wrong."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import timm
import torch
import transformers
from families import save_family, settings_of
from safetensors.torch import load_file, save_file

from emonb import checkpoints, fit, hub
from emonb.errors import EmonbError
from emonb.settings import NetworkSettings, checkpoint_of
from emonb.teacher import build_network
from emonb.vlm import load_vlm

CUDA, CPU = torch.device("cuda", 1), torch.device("cpu")
HALF = {"dtype": "bfloat16"}
PROCESS = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "RANK": "1"}
FSDP = PROCESS | {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
ZERO3 = PROCESS | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("whole"), "qwen2_vl")


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of a sound checkpoint, to be damaged."""
    return shutil.copytree(whole, tmp_path / "Qwen2-VL-2B-Instruct")


def refusal(base) -> str:
    """The message about a base that cannot be loaded, and that it comes at once."""
    start = time.monotonic()
    with pytest.raises(EmonbError) as caught:
        load_vlm(settings_of(base))
    assert time.monotonic() - start < 3
    return str(caught.value)


@pytest.mark.parametrize("name", ["Qwen/Qwen2-VL-7B-Instruct", "nobody/nothing"])
def test_a_hub_model_that_is_not_here_and_no_network(name):
    text, into = refusal(name), f"models/{name.split('/')[1]}"
    assert f"vlm.base: {name!r} is no folder here and not in the cache" in text
    assert f"`hf download {name} --local-dir {into}`" in text
    assert f"`vlm: {{base: {into}}}`" in text
    assert "copy the folder" in text


@pytest.mark.parametrize("name", ["models/my own/x", "./Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL/7B"])
def test_a_folder_that_is_not_there(name):
    assert f"there is no folder {name!r} here" in refusal(name)


def test_a_hub_that_answers_but_knows_no_such_model(monkeypatch):
    def ask(*arguments, **options):
        response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
        raise checkpoints.RepositoryNotFoundError("404 Client Error", response=response)

    monkeypatch.setattr(checkpoints, "hf_hub_download", ask)
    assert "the hub has no model of this name" in refusal("Qwen/Qwen9-VL")


def drop(name):
    return lambda folder: (folder / name).unlink()


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


def lose_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def lose_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.language_model.norm.weight", None) or weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE = {
    "holds no config.json": drop("config.json"),
    "holds no weights": drop("model.safetensors"),
    "model.safetensors is damaged or cut short": cut_short,
    "lacks 1 of 2 weight files, first model-00002-of-00002.safetensors": lose_a_shard,
    "lacks 1 tensors of the model, first model.language_model.norm.weight": lose_a_tensor,
    "cannot load": drop("tokenizer.json"),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_damaged_folder_is_named_with_its_remedy(folder, problem):
    DAMAGE[problem](folder)
    text = refusal(folder)
    assert problem in text
    assert f"`hf download Qwen/Qwen2-VL-2B-Instruct --local-dir {folder}`" in text


def text_only(folder):
    transformers.Qwen2Config().save_pretrained(folder)


def other_vlm(folder):
    transformers.LlavaConfig().save_pretrained(folder)


def no_chat(folder):
    (folder / "chat_template.jinja").unlink()


WRONG = {"a qwen2 model": text_only, "a llava model": other_vlm, "or a chat template": no_chat}


@pytest.mark.parametrize("problem", WRONG)
def test_another_kind_of_model_is_refused(folder, problem):
    WRONG[problem](folder)
    text = refusal(folder)
    assert problem in text
    assert "choose a Qwen2-VL, Qwen2.5-VL or Qwen3-VL" in text


def test_a_model_without_a_way_in_for_visual_tokens_is_refused(whole, monkeypatch):
    class Blind(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(1, 1)

    monkeypatch.setattr(checkpoints, "_from_pretrained", lambda *a, **k: (Blind(), {"missing_keys": []}))
    with pytest.raises(EmonbError, match="Blind does not take visual tokens"):
        checkpoints.load_model(settings_of(whole))


def test_a_relative_folder_is_relative_to_the_project(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('name = "emonb"')
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert checkpoint_of("models/mine") == str(tmp_path / "models" / "mine")
    assert checkpoint_of("Qwen/Qwen2-VL-7B-Instruct") == "Qwen/Qwen2-VL-7B-Instruct"


def test_the_hub_is_looked_at_once_and_not_for_long(monkeypatch):
    asked = []

    class Silent:
        def head(self, url, timeout):
            asked.append(timeout)
            raise TimeoutError

    import huggingface_hub

    hub.hub_offline.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Silent)
    try:
        assert [hub.hub_offline(), hub.hub_offline()] == [True, True]
    finally:
        hub.hub_offline.cache_clear()
    assert asked == [hub.PATIENCE_S]


@pytest.mark.parametrize(
    ("changes", "device", "installed", "wanted"),
    [
        (HALF, CUDA, True, "flash_attention_2"),
        (HALF, CUDA, False, "sdpa"),
        ({}, CUDA, True, "sdpa"),  # float32
        (HALF, CPU, True, "sdpa"),
        ({"attention": "eager", **HALF}, CUDA, True, "eager"),
        ({"attention": "sdpa", **HALF}, CUDA, True, "sdpa"),
        ({"attention": "flash_attention_2", **HALF}, CUDA, True, "flash_attention_2"),
    ],
)
def test_attention_by_availability(monkeypatch, changes, device, installed, wanted):
    monkeypatch.setattr(checkpoints, "is_flash_attn_2_available", lambda: installed)
    assert checkpoints.attention_of(settings_of("x", **changes), device) == wanted


@pytest.mark.parametrize(
    ("changes", "device", "lacking"),
    [(HALF, CPU, "a CUDA device"), (HALF, CUDA, "flash-attn"), ({}, CUDA, "bfloat16 or float16")],
)
def test_flash_attention_that_cannot_run_is_refused(monkeypatch, changes, device, lacking):
    monkeypatch.setattr(checkpoints, "is_flash_attn_2_available", lambda: lacking != "flash-attn")
    with pytest.raises(EmonbError, match=f"setting vlm.attention: .*needs .*{lacking}"):
        checkpoints.attention_of(settings_of("x", attention="flash_attention_2", **changes), device)


def test_the_chosen_attention_reaches_the_model(whole):
    assert load_vlm(settings_of(whole)).model.config._attn_implementation == "sdpa"
    assert load_vlm(settings_of(whole, attention="eager")).model.config._attn_implementation == "eager"


def test_4_bit_is_for_cuda_and_asks_for_its_package(monkeypatch):
    settings = settings_of("x", quantize_4bit=True, **HALF)
    assert checkpoints.quantization_of(settings, CPU) is None
    assert checkpoints.quantization_of(settings_of("x", **HALF), CUDA) is None
    monkeypatch.setattr(checkpoints, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(EmonbError, match=r"setting vlm.quantize_4bit: .*pip install -e '\.\[gpu\]'"):
        checkpoints.quantization_of(settings, CUDA)


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["one process", "fsdp"])
def test_4_bit_as_the_authors_and_sharded_in_one_dtype(monkeypatch, environment):
    monkeypatch.setattr(checkpoints, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(transformers.BitsAndBytesConfig, "post_init", lambda self: None)  # asks for the package
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = checkpoints.quantization_of(settings_of("x", quantize_4bit=True, **HALF), CUDA)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert config.bnb_4bit_quant_storage == (torch.bfloat16 if environment else torch.uint8)


def test_a_quantised_model_is_loaded_onto_the_process_own_device(whole, monkeypatch):
    given = {}

    def stop(kind, settings, **options):
        given.update(options)
        raise EmonbError("far enough")

    monkeypatch.setattr(checkpoints, "get_device", lambda: CUDA)
    monkeypatch.setattr(checkpoints, "quantization_of", lambda *a: "4 bit")
    monkeypatch.setattr(checkpoints, "_from_pretrained", stop)
    for environment, wanted in (({}, {"": 1}), (FSDP, None)):
        given.clear()
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(EmonbError, match="far enough"):
            checkpoints.load_model(settings_of(whole, quantize_4bit=True, **HALF))
        assert given.get("device_map") == wanted
        assert given["dtype"] == torch.bfloat16


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        (FSDP, True),
        (PROCESS, False),
        ({**PROCESS, "ACCELERATE_USE_FSDP": "true"}, False),
        (ZERO3, True),
        ({**ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, False),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, False),  # one process
    ],
)
def test_who_places_the_weights(whole, monkeypatch, environment, wanted):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert checkpoints.placed_by_launcher() is wanted
    monkeypatch.setattr(checkpoints, "get_device", lambda: torch.device("meta"))
    parameter = next(checkpoints.load_model(settings_of(whole)).parameters())
    assert parameter.device.type == ("cpu" if wanted else "meta")


def test_each_process_has_its_own_device(monkeypatch):
    monkeypatch.setattr(fit, "group", lambda: type("State", (), {"device": CUDA}))
    assert fit.get_device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in PROCESS.items():
        monkeypatch.setenv(name, value)
    assert fit.get_device() == CUDA


TINY = {
    "vit_tiny_patch16_224": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "resnet10t": {"channels": [8, 8, 8, 8], "stem_width": 8},
}


def network(name, **changes) -> NetworkSettings:
    return NetworkSettings(name=name, image_size=32, kwargs=TINY.get(name, {}), **changes)


def weights_of(name, file):
    """Weights of a network for 10 classes, saved as a file from the hub or from torch is."""
    options = {"img_size": 32} if name.startswith("vit") else {}
    state = timm.create_model(name, num_classes=10, **options, **TINY[name]).state_dict()
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    return state


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", TINY)
def test_a_network_takes_all_but_the_classifier_from_a_file(tmp_path, name, suffix):
    torch.manual_seed(1)
    state, file = weights_of(name, tmp_path / f"w{suffix}"), str(tmp_path / f"w{suffix}")
    nets, drawn = [], []
    for changes in ({}, {"pretrained": True, "weights": file}):
        torch.manual_seed(0)
        nets.append(build_network(network(name, **changes), 3).state_dict())
        drawn.append(torch.rand(1))
    for key, value in nets[1].items():
        fresh = key.startswith(("head.", "fc."))
        assert torch.equal(value, nets[0][key] if fresh else state[key]), key
    assert drawn[0] == drawn[1], "what is drawn after building depends on the weights"


def test_another_image_size_keeps_the_pretrained_weights(tmp_path):
    state = weights_of("vit_tiny_patch16_224", tmp_path / "w.safetensors")
    settings = network("vit_tiny_patch16_224", pretrained=True, weights=str(tmp_path / "w.safetensors"))
    net = build_network(settings.model_copy(update={"image_size": 48}), 3).state_dict()
    assert net["pos_embed"].shape[1] > state["pos_embed"].shape[1]
    assert torch.equal(net["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("name", ["vit_base_patch16_384", "resnet50", "vgg16"])
def test_the_papers_networks_say_how_to_get_their_weights(name):
    start = time.monotonic()
    with pytest.raises(EmonbError) as caught:
        build_network(NetworkSettings(name=name, pretrained=True), 8)
    assert time.monotonic() - start < 3, "it waits for a network, or builds one first"
    hub_name = timm.get_pretrained_cfg(name).hf_hub_id
    text = str(caught.value)
    assert hub_name.startswith(f"timm/{name}.")
    assert f"`hf download {hub_name} model.safetensors --local-dir models/{name}`" in text
    assert f"`weights: models/{name}/model.safetensors`" in text


def other_architecture(file):
    weights_of("vit_tiny_patch16_224", file)


def fewer_layers(file):
    options = {**TINY["resnet10t"], "num_classes": 10}
    save_file(timm.create_model("resnet10t", **options).state_dict(), file)


def damaged(file):
    weights_of("resnet10t", file)
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("make", "name"),
    [(other_architecture, "resnet10t"), (fewer_layers, "resnet14t"), (damaged, "resnet10t"), (None, "resnet10t")],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, make, name):
    file = tmp_path / "w.safetensors"
    if make:
        make(file)
    settings = NetworkSettings(name=name, pretrained=True, weights=str(file), kwargs=TINY["resnet10t"])
    with pytest.raises(EmonbError, match=rf"{name}.*w\.safetensors.*hf download timm/{name}\."):
        build_network(settings, 3)


def test_a_network_without_pretrained_weights_says_so():
    with pytest.raises(EmonbError, match="'vgg_small' cannot take pretrained weights"):
        build_network(NetworkSettings(name="vgg_small", pretrained=True), 3)


@pytest.mark.parametrize("pretrained", [True, False])
def test_an_unknown_tag_of_weights_is_named(pretrained):
    with pytest.raises(EmonbError, match=r"timm has no model 'resnet50\.of_mine'"):
        build_network(NetworkSettings(name="resnet50.of_mine", pretrained=pretrained), 3)
