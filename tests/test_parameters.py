"""Parameter counts of the real architectures: known sizes, built without weights."""

import pytest

from emonb import parameters
from emonb.settings import NetworkSettings, load_settings


def test_head_is_the_papers_number():
    assert parameters.count_head(3584, (1024,), 8) == 3_679_240
    assert parameters.count_head(10, (4, 3), 2) == 10 * 4 + 4 + 4 * 3 + 3 + 3 * 2 + 2
    assert parameters.count_gate(8) == 136


def test_qwen2_vl_7b_is_the_published_size():
    found = parameters.count_vlm()
    assert found["total"] == 8_291_375_616  # size of the public checkpoint
    assert found["vision tower"] + found["merger"] + found["language model"] == found["total"]
    assert found["embeddings"] == 2 * 152064 * 3584
    assert found["features"] == 3584
    rows, kv = 3584, 4 * 128
    assert found["lora"] == 28 * 8 * (2 * (rows + rows) + 2 * (rows + kv))
    fewer = parameters.count_vlm(targets=("q_proj", "k_proj", "v_proj"))["lora"]
    assert found["lora"] - fewer == 28 * 8 * 2 * rows


def test_tied_matrices_count_once():
    found = parameters.count_vlm("Qwen/Qwen2-VL-2B-Instruct")
    assert found["total"] == 2_208_985_600  # size of the public checkpoint
    assert found["embeddings"] == 151936 * 1536


def test_lora_count_equals_peft():
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(parameters.vlm_config("Qwen/Qwen2-VL-2B-Instruct"))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    tuned = get_peft_model(model, LoraConfig(r=8, target_modules=targets))
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert trainable == parameters.count_vlm("Qwen/Qwen2-VL-2B-Instruct")["lora"]


@pytest.mark.parametrize(("name", "size"), [
    ("vit_base_patch16_384", 86_096_648), ("resnet50", 23_524_424), ("vgg16", 134_293_320),
])  # fmt: skip
def test_networks_for_eight_emotions(name, size):
    assert parameters.count_network(NetworkSettings(name=name, pretrained=True), 8) == size


def test_table_sets_printed_beside_computed():
    table = parameters.parameter_table()
    paper = table[table["system"] == table["system"].iloc[0]].set_index("part")
    assert paper.loc["VLM: all", "paper"] == 1.09e9
    assert paper.loc["EmoVLM-KD: all", "parameters"] == 8_291_375_616 + 5_046_272 + 3_679_240 + 136
    assert paper.loc["head (distillation module)", "percent_of_vlm"] == pytest.approx(0.0444, abs=1e-4)
    shares = parameters.share_table().set_index("reading")["value"]
    assert shares["printed in the article"] == 0.003
    assert shares["head / 1.09 B, the size printed for the VLM"] == pytest.approx(0.3375, abs=1e-4)
    assert shares["the same as a fraction"] == pytest.approx(0.0034, abs=1e-4)


def test_paper_profile_counts_its_own_models():
    found = parameters.system_counts(load_settings("paper"), 2)
    assert found["head"] == 3_679_240 - 6 * 1025
    assert found["vit"] == 86_096_648 - 6 * 769
    assert found["emovlmkd"] == found["vlm_tuned"] + found["head"] + parameters.count_gate(2)


def test_stand_in_is_counted_from_its_own_config():
    from importlib import resources

    if not resources.files("emonb").joinpath("resources", "base", "config.json").is_file():
        pytest.skip("the stand-in has not been built")
    table = parameters.parameter_table(load_settings("mini"))
    own = table[table["system"] == "this run: stand-in"].set_index("part")["parameters"]
    assert 5e5 < own["VLM: all"] < 5e6
    assert {"vit", "resnet", "vgg"} <= set(own.index)
