"""The rehearsal: operations against known sizes, hours against hand calculation, a report of the stand-in."""

from __future__ import annotations

import json

import pytest
import torch

from emonb.errors import EmonbError
from emonb.rehearse import _bytes, _images, operations, rehearse, schedules
from emonb.settings import load_settings

COST = {"tower": 2.0, "answer": 3.0, "lora": 6.0, "token": 0.5}


def test_both_schedules_by_hand():
    settings = load_settings("paper")  # three kinds of triplets, 5 epochs of LoRA, 5 of the head, 10 of the gate
    images = {"train": 80, "val": 10, "test": 10}
    again, kept, short, long = schedules(COST, images, settings, 10).values()
    assert kept == {"features": 200, "zero-shot answers": 60, "LoRA": 80 * 15 * 6, "tuned answers": 300}
    assert again == {"features": 200, "zero-shot answers": 100, "LoRA": 80 * 15 * 8, "tuned answers": 500}
    written = 2 + 3 + 10 * 0.5
    assert short == {
        "LoRA": 80 * 15 * 8,
        "distillation": 5 * 80 * 2,
        "gate": 10 * 80 * written,
        "test answers": 2 * 10 * written,
    }
    assert long["gate"] - short["gate"] == 10 * 80 * 246 * 0.5  # the paper's profile: 256 tokens at most


def test_sizes_are_recorded_given_or_ten_thousand():
    paper = load_settings("paper")
    assert sum(_images("emoset", paper, 77).values()) == 118_102
    assert _images("fi", paper, None) == {"train": 18_400, "val": 2_300, "test": 2_300}
    assert sum(_images("emotion6", paper, None).values()) == 1_980
    assert _images("flickr", paper, 500) == {"train": 400, "val": 50, "test": 50}
    assert sum(_images("flickr", paper, None).values()) == 10_000
    assert _images("mini-emotion6", load_settings("smoke"), None)["train"] == 72


def test_operations_on_the_meta_device_are_those_of_the_products():
    with torch.device("meta"):
        layer, x = torch.nn.Linear(30, 50), torch.zeros(7, 30)
    assert operations(lambda: layer(x)) == 2 * 7 * 30 * 50
    assert operations(lambda: layer(x).sum().backward()) == 2 * 2 * 7 * 30 * 50  # and the weights' gradient


def test_weights_of_the_paper_s_model_in_both_precisions():
    from emonb.cost import vlm_config

    counts = {"total": 8_291_375_616, "embeddings": 2 * 152_064 * 3_584, "lora": 5_046_272}
    text, vlm = vlm_config("Qwen/Qwen2-VL-7B-Instruct").text_config, load_settings("paper").vlm
    found = _bytes(text, vlm, counts, 1082, packed=False)
    assert found["weights"] == 2 * counts["total"]
    assert 5.5e9 < _bytes(text, vlm, counts, 1082, packed=True)["weights"] < 6.5e9
    whole = _bytes(text, vlm.model_copy(update={"gradient_checkpointing": False}), counts, 1082, packed=False)
    assert 1e9 < found["LoRA step"] < whole["LoRA step"] / 5


def test_report_of_the_stand_in(tmp_path, one_thread):
    said, asked = [], []

    def price(settings, picture, images, labels):
        asked.append((picture, images, len(labels)))
        return {"low": 1.0, "high": 2.0, "worst": 12345.0}

    options = {"model": "stand-in", "image_side": 96, "device": "cpu", "out": tmp_path, "dataset_size": 500}
    rehearse("smoke", **options, price=price, say=said.append)
    report = json.loads((tmp_path / "report.json").read_text())
    page = (tmp_path / "report.md").read_text()
    assert report["parameters"]["total"] == 1_463_104
    assert report["tokens"]["visual"] == 4 * 3  # 96 x 72 px in 24 px steps
    work, seconds = report["operations"], report["seconds"]
    layers = 2 * 1_000_000 * report["tokens"]["prompt"]  # some 0.7 M weights of the language model's layers
    assert 0.5 * layers < work["answer"] < 1.5 * layers
    tokens = report["tokens"]["sequence"] / report["tokens"]["prompt"]
    assert 2 < work["lora"] / work["answer"] / tokens < 4
    assert seconds["lora"] == pytest.approx(work["lora"] / report["rates"]["matmul"])
    assert {row["step"] for row in report["check"]} == {"tower", "answer", "lora"}
    assert all(row["ratio"] == pytest.approx(row["measured"] / row["estimated"]) for row in report["check"])
    name = load_settings("smoke").datasets[0]
    images = report["datasets"][name]["images"]
    assert asked[0] == ((96, 72), images["train"], 8)
    assert report["datasets"][name]["disk"]["pooled"] == 2 * 128 * sum(images.values())
    assert "one layer of the model" in page
    assert "12,000" in page, "two digits"
    assert said == [str(tmp_path / "report.md")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "13b"}, r"model '13b': no Qwen2-VL architecture \(.*\); use 7b, 2b, stand-in"),
        ({"model": "bert"}, "its model_type is bert"),
        ({"device": "tpu"}, "no device 'tpu'"),
        ({"dataset_size": 3}, "--dataset-size at least 10"),
        ({"image_side": 20}, "--image-side must be at least 56"),
    ],
)
def test_a_mistake_is_one_clear_message(tmp_path, monkeypatch, options, message):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EmonbError, match=message):
        rehearse("smoke", out=tmp_path, **options)
