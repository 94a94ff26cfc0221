"""Cost: sizes of the real architectures without weights, models that take turns. No absolute times."""

import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from emonb import cost
from emonb.settings import load_settings

BASE_2B = "Qwen/Qwen2-VL-2B-Instruct"


def test_qwen2_vl_7b_and_the_head_are_the_published_size():
    assert cost.count_head(3584, (1024,), 8) == 3_679_240  # paper: 3.7 M
    assert cost.count_head(10, (4, 3), 2) == 10 * 4 + 4 + 4 * 3 + 3 + 3 * 2 + 2
    found = cost.count_vlm()
    assert found["total"] == 8_291_375_616  # size of the public checkpoint
    assert found["vision tower"] + found["merger"] + found["language model"] == found["total"]
    assert found["embeddings"] == 2 * 152064 * 3584
    assert found["features"] == 3584
    rows, kv = 3584, 4 * 128
    assert found["lora"] == 28 * 8 * (2 * (rows + rows) + 2 * (rows + kv))
    fewer = cost.count_vlm(targets=("q_proj", "k_proj", "v_proj"))["lora"]
    assert found["lora"] - fewer == 28 * 8 * 2 * rows


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
    assert {"vit", "resnet", "vgg"} <= set(own.index)
    assert own["paper"].isna().all()
    alone = cost.parameter_table().set_index("part").iloc[:12]
    assert alone.loc["head (distillation module)", "percent_of_vlm"] == pytest.approx(0.0444, abs=1e-4)
    assert alone.loc["EmoVLM-KD: all", "parameters"] == 8_291_375_616 + 5_046_272 + 3_679_240 + 136
    shares = cost.share_table().set_index("reading")["value"]
    assert shares["printed in the article"] == 0.003
    assert shares["head / 1.09 B, the size printed for the VLM"] == pytest.approx(0.3375, abs=1e-4)
    assert shares["the same as a fraction"] == pytest.approx(0.0034, abs=1e-4)
    found = cost.system_counts(load_settings("paper"), 2)
    assert found["head"] == 3_679_240 - 6 * 1025
    assert found["vit"] == 86_096_648 - 6 * 769
    assert found["emovlmkd"] == found["vlm_tuned"] + found["head"] + cost.count_gate(2)


class Packed(nn.Parameter):
    """A weight as bitsandbytes keeps it: two to a byte, the true shape beside it."""

    quant_state = SimpleNamespace(shape=(6, 4))


def test_count_takes_shared_weights_once_and_unpacks_four_bits():
    layer = nn.Linear(3, 5)
    assert cost.count(layer, nn.Sequential(layer)) == 20
    layer.weight = Packed(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    assert cost.count(layer) == 24 + 5


def test_models_take_turns_and_the_warm_up_is_not_timed():
    seen, entered = [], []

    @contextmanager
    def within():
        entered.append(len(seen))
        yield

    def slow(path):
        seen.append(("slow", path))
        time.sleep(0.005 if len(seen) > 1 else 0.1)

    fast = cost.Measured(lambda p: seen.append(("fast", p)), 7, 3, within)
    rows = cost.measure({"vit": cost.Measured(slow), "head": fast}, ["a", "b", "c"], torch.device("cpu"), warm_up=1)
    assert seen == [(name, path) for path in "aabc" for name in ("slow", "fast")]
    assert len(entered) == 4
    assert 5 <= rows[0]["ms_low"] <= rows[0]["ms_median"] <= rows[0]["ms_high"] < 100
    table = cost.cost_table({"mini-fi": rows, "fi": rows[:1]})
    assert table["dataset"].tolist() == ["mini-fi (drawn)", "mini-fi (drawn)", "FI"]
    shown = ["name", "parameters", "trainable", "n", "device"]
    assert table.loc[1, shown].tolist() == ["distilled head", 7, 3, 3, "cpu"]


def test_parts_of_the_assembled_model_need_what_they_are_made_of(monkeypatch):
    asked = []
    pooled = SimpleNamespace(pooled=lambda: torch.zeros(1, 4))
    rooms = {"answer_distribution": lambda *_: asked.append("vlm"), "visual_tokens": lambda tuned, paths: pooled}
    monkeypatch.setitem(sys.modules, "emonb.vlm", SimpleNamespace(**rooms))
    adapter = nn.Linear(2, 2, bias=False)
    vlm = nn.ModuleDict({"visual": nn.Linear(4, 4), "lora_A": adapter, "language": nn.Linear(4, 10)})
    vlm.disable_adapter = lambda: pytest.fail("entered around an answer only")

    class Whole(nn.Module):
        labels, head, gate = ["joy", "fear"], nn.Linear(4, 2), nn.Linear(4, 2)
        seeing = staticmethod(lambda: SimpleNamespace(model=vlm, core=vlm, device=torch.device("cpu")))
        forward = staticmethod(asked.append)

    parts = cost.parts_of(Whole())
    assert [p.parameters for p in parts.values()] == [70, 74, 20 + 10, 74 + 20]
    assert [p.trainable for p in parts.values()] == [0, 4, 10, 24]
    for name in ("vlm_tuned", "head", "emovlmkd"):
        parts[name].answer("x.png")
    assert asked == ["vlm", ["x.png"]]
