"""The rehearsal: operations against known sizes, hours against hand calculation, a report of the stand-in."""

from __future__ import annotations

import json

import pytest
import torch

from emonb.data import TAXONOMIES, question
from emonb.errors import EmonbError
from emonb.files import resource
from emonb.rehearse import QUESTION, REASONS, hours, operations, rehearse
from emonb.settings import load_settings
from emonb.vlm import VLM, answer_ids, load_processor, prompt_ids


def asked(*_):
    return {"low": 1.0, "high": 12345.0, "worst": float("nan")}


def test_hours_of_both_schedules_by_hand():
    """The paper's profile: three kinds of triplets, 5 epochs of LoRA, 5 of the head, 10 of the gate."""
    steps = {"tower": {"seconds": 2.0}, "answer": {"seconds": 3.0}, "LoRA step": {"seconds": 6.0}}
    ours, theirs = (3600 * x for x in hours(steps, 100, load_settings("paper")).values())
    assert ours == pytest.approx(100 * 2 + (20 + 100) * (3 + 2) + 80 * 3 * 5 * (6 + 2))
    assert theirs == pytest.approx(80 * 3 * 5 * (6 + 2) + 5 * 80 * 2 + 10 * 80 * (2 + 3) + 2 * 10 * (2 + 3))
    kept = load_settings("paper", vlm={"cache_visual_tokens": True})
    assert 3600 * next(iter(hours(steps, 100, kept).values())) == pytest.approx(100 * 2 + 120 * 3 + 1200 * 6)


def test_operations_on_the_meta_device_are_those_of_the_products():
    with torch.device("meta"):
        layer, x = torch.nn.Linear(30, 50), torch.zeros(7, 30)
    assert operations(lambda: layer(x)) == 2 * 7 * 30 * 50
    assert operations(lambda: layer(x).sum().backward()) == 2 * 2 * 7 * 30 * 50  # and the weights' gradient


def test_words_are_counted_as_the_stand_in_cuts_them():
    vlm, closing = VLM(None, load_processor("stand-in"), 0), resource("prompts.yaml", "reasoning", "closing")
    assert len(prompt_ids(vlm, question(TAXONOMIES["mikels8"].labels))) - 1 == QUESTION  # without the picture's mark
    assert len(answer_ids(vlm, " ".join(list(closing.values())[:4]))) == REASONS


def test_report_of_the_stand_in(tmp_path, one_thread):
    options = {"model": "stand-in", "dataset_size": 500, "image_side": 96, "device": "cpu"}
    page = rehearse("smoke", **options, out=tmp_path, price=asked).read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parameters"] == 1_463_104
    assert report["weights, GB"] == pytest.approx(4 * 1_463_104e-9)
    assert report["visual tokens"] == 4 * 3  # 96 x 72 px in 24 px steps
    answer, lora = (report["steps"][name] for name in ("answer", "LoRA step"))
    layers = 2 * 1e-6 * (12 + QUESTION)  # TFLOP of some 0.7 M weights of the language model's layers
    assert 0.5 * layers < answer["TFLOP"] < 1.5 * layers
    assert 2 < lora["TFLOP"] / answer["TFLOP"] * (12 + QUESTION) / (12 + QUESTION + REASONS) < 4
    assert lora["seconds"] == pytest.approx(lora["TFLOP"] / report["TFLOP/s"])
    assert lora["measured / estimated"] == pytest.approx(lora["measured"] / lora["one layer, estimated"])
    found = report["datasets"]["mini-fi (drawn)"]
    assert found["features, GB"] == pytest.approx(2e-9 * 128 * 500)
    assert "triplets, worst USD" not in found, "unknown prices are left out"
    assert "| 12,000 |" in page, "two digits"


def test_a_mistake_is_one_clear_message(tmp_path):
    options = {"dataset_size": 50, "image_side": 96, "out": tmp_path, "price": asked}
    with pytest.raises(EmonbError, match=r"model '13b': no Qwen2-VL architecture \(.*\); use 7b, 2b, stand-in"):
        rehearse("smoke", model="13b", device="cpu", **options)
    with pytest.raises(EmonbError, match="no device 'tpu'"):
        rehearse("smoke", model="stand-in", device="tpu", **options)
