"""Cost: sizes of the real architectures without weights, models that take turns. No absolute times."""

import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from emonb import cost
from emonb.settings import load_settings

CPU = torch.device("cpu")
BASE_7B, BASE_2B = (f"Qwen/Qwen2-VL-{size}-Instruct" for size in ("7B", "2B"))


def test_qwen2_vl_7b_is_the_published_size():
    found = cost.count_vlm(BASE_7B)
    assert found["total"] == 8_291_375_616  # size of the public checkpoint
    assert found["vision tower"] + found["merger"] + found["language model"] == found["total"]
    rows, kv = 3584, 4 * 128
    assert (found["embeddings"], found["features"]) == (2 * 152064 * rows, rows)
    assert found["lora"] == 28 * 8 * (2 * (rows + rows) + 2 * (rows + kv))
    assert cost.count_vlm(BASE_7B, targets=("o_proj",))["lora"] == 28 * 8 * 2 * rows


def test_tied_matrices_count_once_and_lora_as_peft_counts():
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLForConditionalGeneration

    found = cost.count_vlm(BASE_2B)
    assert found["total"] == 2_208_985_600  # size of the public checkpoint
    assert found["embeddings"] == 151936 * 1536
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(cost.vlm_config(BASE_2B))
    tuned = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == found["lora"]


def test_tables_set_printed_beside_computed():
    table = cost.parameter_table(load_settings("mini"))
    paper = table[table["system"] == table["system"].iloc[0]].set_index("part")
    assert paper["paper"].dropna().tolist() == [1.09e9, 3.7e6, 1.095e9, 85e6]
    assert paper["parameters"].tail(3).tolist() == [86_096_648, 23_524_424, 134_293_320], "ViT-B, ResNet-50, VGG-16"
    own = table[table["system"] == "this run: stand-in"].set_index("part")
    assert 5e5 < own.loc["VLM: all", "parameters"] < 5e6
    assert {"ViT", "ResNet", "VGG"} <= set(own.index)
    assert own["paper"].isna().all()
    published = cost.parameter_table(load_settings("paper")).set_index("part")
    assert len(published) == 12 + 9, "the paper's own model is no other"
    head = published.iloc[:12].loc["head (distillation module)"]
    assert (head["parameters"], head["percent_of_vlm"]) == (3_679_240, pytest.approx(0.0444, abs=1e-4))  # paper: 3.7 M
    assert published["parameters"].iloc[8] == 8_291_375_616 + 5_046_272 + 3_679_240 + 136
    found = cost.system_counts(load_settings("paper"), 2)
    assert found["head"] == 3_679_240 - 6 * 1025
    assert found["vit"] == 86_096_648 - 6 * 769
    assert found["emovlmkd"] == found["vlm_tuned"] + found["head"] + found["gate"]


class Packed(nn.Parameter):
    """A weight as bitsandbytes keeps it: two to a byte, the true shape beside it."""

    quant_state = SimpleNamespace(shape=(6, 4))


def test_count_takes_shared_weights_once_and_unpacks_four_bits():
    layer = nn.Linear(3, 5)
    assert cost.count(layer, nn.Sequential(layer)) == 20
    layer.weight = Packed(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    assert cost.count(layer) == 24 + 5


def test_models_take_turns_and_the_warm_up_is_not_timed():
    seen = []

    def slow(path):
        seen.append(("slow", path))
        time.sleep(0.005 if len(seen) > 1 else 0.1)

    models = {"vit": (slow, 9, 9), "head": (lambda path: seen.append(("fast", path)), 7, 3)}
    rows = cost.measure(models, ["a", "b", "c"], CPU)
    assert seen == [(name, path) for path in "ababc" for name in ("slow", "fast")]
    assert 5 <= rows[0]["ms_low"] <= rows[0]["ms_median"] <= rows[0]["ms_high"] < 100
    assert [rows[1][key] for key in ("model", "parameters", "trainable", "n", "device")] == ["head", 7, 3, 3, "cpu"]


def test_parts_of_the_assembled_model_need_what_they_are_made_of(monkeypatch):
    asked = []
    pooled = SimpleNamespace(pooled=lambda: torch.zeros(1, 4))
    rooms = {"answer_distribution": lambda *_: asked.append("vlm"), "visual_tokens": lambda tuned, paths: pooled}
    monkeypatch.setitem(sys.modules, "emonb.vlm", SimpleNamespace(**rooms))
    language = nn.ModuleDict({"lora_A": nn.Linear(2, 2, bias=False), "mlp": nn.Linear(4, 10)})
    vlm = nn.ModuleDict({"visual": nn.Linear(4, 4), "language": language})
    vlm.disable_adapter = lambda: nullcontext(asked.append("no adapter"))

    class Whole(nn.Module):
        labels, head, gate = ["joy", "fear"], nn.Linear(4, 2), nn.Linear(4, 2)
        seeing = staticmethod(lambda: SimpleNamespace(model=vlm, core=vlm, language=language, device=CPU))
        forward = staticmethod(asked.append)

    parts = cost.parts_of(Whole())
    assert [sizes for _, *sizes in parts.values()] == [[70, 0], [74, 4], [20 + 10, 10], [74 + 20, 24]]
    for answer, *_ in parts.values():
        answer("x.png")
    assert asked == ["no adapter", "vlm", "vlm", ["x.png"]]


@pytest.mark.parametrize("family", ["llava_next", "gemma3", "qwen3_5"])
def test_other_classes_are_counted_by_their_own_parts(family, tmp_path):
    from families import config_of, toy_tokenizer
    from transformers import AutoModelForImageTextToText

    config = config_of(family, toy_tokenizer(family))
    config.save_pretrained(tmp_path)
    found, model = cost.count_vlm(str(tmp_path)), AutoModelForImageTextToText.from_config(config)
    assert found["vision tower"] + found["merger"] + found["language model"] == found["total"]
    assert found["total"] == sum(p.numel() for p in model.parameters())
    assert 0 < found["merger"] < found["vision tower"]
    assert found["features"] == 32
