"""The rehearsal: arithmetic against hand calculation, and a real rehearsal of the stand-in's architecture."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from conftest import ROOT

from emonb.errors import EmonbError
from emonb.projection import Schedule, Size, after_tuning, authors, dataset_size, disk_bytes, extrapolate, ours
from emonb.settings import load_settings

COST = {
    "decode": 1.0, "tower": 2.0, "score": 3.0, "score_tuned": 4.0, "prefill": 5.0, "token": 0.5, "lora": 6.0,
    "lora_update": 7.0, "vit_train": 8.0, "vit_predict": 9.0, "resnet_train": 1.0, "resnet_predict": 1.0,
    "head": 0.01, "gate": 0.001,
}  # fmt: skip
PLAN = {
    "kinds": 3, "lora_epochs": 2, "lora_batch": 8, "cached_tokens": True, "asked": 4, "longest": 20, "shortest": 10,
    "teacher": "vit", "networks": {"vit": 2, "resnet": 1}, "heads": 6, "head_epochs": 5, "gates": 4,
    "gate_epochs": 10, "workers": 2,
}  # fmt: skip
SIZE = Size("x", 80, 10, 10, "by hand")


def test_our_schedule_by_hand():
    kept = ours(COST, SIZE, Schedule(**PLAN))
    assert kept == pytest.approx(
        {
            "features": 100 * (1 + 2),
            "zero-shot answers": 20 * 3,
            "LoRA": 80 * 3 * 2 * 6 + 60 * 7,
            "tuned answers": 100 * 4,
            "reasons": 2 * 4 * (1 + 2 + 5 + 20 * 0.5),
            "teacher": 80 * 2 * (8 + 0.5) + (10 * 2 + 100) * (9 + 0.5),
            "heads": 6 * 5 * 80 * 0.01,
            "gates": 4 * 10 * 80 * 0.001,
            "total": 6731.2,
            "other baselines": 80 * 1.5 + 110 * 1.5,
        }
    )
    again = ours(COST, SIZE, Schedule(**PLAN | {"cached_tokens": False}))
    assert again["total"] - kept["total"] == pytest.approx(20 * 3 + 480 * 3 + 100 * 3)  # decode + tower each time


def test_the_authors_schedule_by_hand():
    found = authors(COST, SIZE, Schedule(**PLAN), 10)
    assert found == pytest.approx(
        {
            "LoRA": 80 + 480 * (6 + 2) + 60 * 7,
            "teacher": 2500,
            "distillation": 80 + 5 * 80 * (2 + 0.01),
            "gate": 80 + 10 * 80 * (2 + 5 + 10 * 0.5 + 0.001),
            "test answers": 2 * 10 * (1 + 2 + 5 + 10 * 0.5),
            "total": 17664.8,
        }
    )
    longer = authors(COST, SIZE, Schedule(**PLAN), 20)
    assert longer["total"] - found["total"] == pytest.approx((10 * 80 + 2 * 10) * 10 * 0.5)
    ratio = after_tuning(ours(COST, SIZE, Schedule(**PLAN)), found)
    assert ratio == pytest.approx((884 + 9680.8) / (300 + 400 + 24 + 3.2))


def test_a_missing_cost_makes_only_what_needs_it_unknown():
    found = ours({**COST, "score": math.nan}, SIZE, Schedule(**PLAN))
    assert math.isnan(found["total"])
    assert math.isnan(found["zero-shot answers"])
    assert found["LoRA"] == 3300


def test_extrapolation_is_linear():
    assert extrapolate({1: 3.0, 3: 5.0}, 28) == pytest.approx(2 + 28)
    assert extrapolate({4: 10.0, 2: 10.0}, 32) == 10.0
    assert extrapolate({1: 5.0, 3: 4.0}, 28) == 5.0  # noise: time does not fall with depth


def test_sizes_are_recorded_given_or_said_to_be_unknown():
    paper = load_settings("paper")
    emoset, fi = dataset_size(paper, "emoset"), dataset_size(paper, "fi", 77)
    assert emoset.total == 118_102
    assert (fi.train, fi.val, fi.test) == (18_400, 2_300, 2_300)
    assert "80/10/10" in fi.source
    assert dataset_size(paper, "emotion6").total == 1_980
    assert "not recorded" in dataset_size(paper, "flickr").source
    assert dataset_size(paper, "flickr", 500) == Size("flickr", 400, 50, 50, "size as given, split 80/10/10")
    assert dataset_size(load_settings("smoke"), "mini-emotion6").train == 72
    assert disk_bytes(fi, 3584, 999) == {"pooled": 23_000 * 3584 * 2, "tokens": 23_000 * 999 * 3584 * 2}


def test_weights_of_the_real_models():
    from emonb.random_vlm import resolve_base, weight_bytes

    assert resolve_base("7B") == "Qwen/Qwen2-VL-7B-Instruct"
    counts = {"total": 8_291_375_616, "embeddings": 2 * 152_064 * 3_584}  # tests/test_parameters.py
    assert weight_bytes(counts, "bfloat16") == 2 * 8_291_375_616
    assert 5.5e9 < weight_bytes(counts, "nf4") < 6.5e9


@pytest.fixture(scope="module")
def small_profile(tmp_path_factory):
    """The smoke profile with small batches, a drawn dataset and two of the paper's."""
    tree = yaml.safe_load((ROOT / "emonb/profiles/smoke.yaml").read_text())
    tree["datasets"] = ["mini-fi", "fi", "flickr"]
    tree["vlm"] |= {"batch_size": 2, "train_batch_size": 2, "gradient_accumulation": 2, "gradient_checkpointing": True}
    tree["teacher"]["networks"] = {"vit": {**tree["teacher"]["networks"]["vit"], "batch_size": 4}}
    path = tmp_path_factory.mktemp("profile") / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.fixture
def rehearsed(small_profile, tmp_path):
    """A rehearsal of the stand-in's architecture: (report.json, report.md, messages)."""
    import torch

    from emonb.rehearsal import rehearse

    def run(**options):
        said = []
        options = {"image_side": 112, "device": "cpu", "out": tmp_path, "say": said.append, **options}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tiny steps: two threads on a busy machine only wait for each other
        try:
            rehearse(small_profile, **options)
        finally:
            torch.set_num_threads(threads)
        return json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.md").read_text(), said

    return run


def test_two_depths_give_a_whole_report(rehearsed):
    report, page, said = rehearsed(layers="1,3", dataset_size=500)
    part = report["precisions"][report["precision"]]
    assert report["complete"]
    assert report["plan"]["layers"] == [1, 3]
    assert {s["status"] for name, s in part["stages"].items() if "answers" in name} == {"extrapolated"}
    assert {part["stages"][name]["status"] for name in ("vit", "heads", "gates")} == {"measured"}
    assert all(seconds > 0 for seconds in part["costs"].values())
    for name, stage in part["stages"].items():
        for cost, points in stage.get("points", {}).get("seconds", {}).items():
            whole = extrapolate({int(k): v for k, v in points.items()}, 4)
            assert part["costs"][cost] == pytest.approx(whole), name
    assert report["model"]["parameters"]["total"] == 1_463_104
    assert {k: v["total"] for k, v in report["sizes"].items()} == {"mini-fi": 192, "fi": 23_000, "flickr": 500}

    fields = {k: v for k, v in report["schedule"].items() if k != "cached_tokens"}
    size = Size("fi", 18_400, 2_300, 2_300, "")
    mine = ours(part["costs"], size, Schedule(**fields, cached_tokens=True))
    theirs = authors(part["costs"], size, Schedule(**fields, cached_tokens=True), 32)
    found = part["datasets"]["fi"]
    assert found["cached"]["hours"] == pytest.approx(mine["total"] / 3600)
    assert found["cached"]["ratio"]["longest"] == pytest.approx(theirs["total"] / mine["total"])
    assert found["recomputed"]["hours"] > found["cached"]["hours"]

    for words in (
        "for this CPU",
        "1 and 3 layers",
        "FI (size from the paper",
        "flickr",
        "as asked for",
        "size as given",
    ):
        assert words.lower() in page.lower(), words
    assert report["triplets"]["fi"]["low"] > 10  # dollars
    assert any(line.startswith("FI, 23,000 images: ours") for line in said)


def test_a_failing_stage_still_gives_a_report_of_the_others(rehearsed, monkeypatch):
    from emonb import rehearsal

    def fail(bench):
        raise MemoryError("no room for the answers")

    broken = rehearsal.VLM_STEPS["zero-shot answers"]._replace(run=fail)
    monkeypatch.setitem(rehearsal.VLM_STEPS, "zero-shot answers", broken)
    report, page, said = rehearsed(layers="whole")
    part = report["precisions"][report["precision"]]
    assert report["plan"]["layers"] is None
    assert part["stages"]["zero-shot answers"]["message"] == "MemoryError: no room for the answers"
    assert {s["status"] for name, s in part["stages"].items() if name != "zero-shot answers"} == {"measured"}
    assert part["costs"]["score"] is None
    assert part["datasets"]["fi"]["cached"]["hours"] is None
    assert part["datasets"]["fi"]["authors_hours"]["longest"] > 0  # which need no scored answer
    assert "zero-shot answers failed: MemoryError: no room for the answers" in page
    assert "zero-shot answers failed: MemoryError: no room for the answers" in said


def test_an_interrupt_leaves_what_was_measured(rehearsed, monkeypatch, tmp_path):
    from emonb import rehearsal

    def stop(bench):
        raise KeyboardInterrupt

    broken = rehearsal.VLM_STEPS["zero-shot answers"]._replace(run=stop)
    monkeypatch.setitem(rehearsal.VLM_STEPS, "zero-shot answers", broken)
    with pytest.raises(KeyboardInterrupt):
        rehearsed(layers="1,3")
    report = json.loads((tmp_path / "report.json").read_text())
    stages = report["precisions"][report["precision"]]["stages"]
    assert not report["complete"]
    assert stages["decoding"]["status"] == "measured"
    assert stages["features"]["status"] == "not measured"  # one depth of two
    assert [row["stage"] for row in report["measurements"]] == ["decoding", "features"]
    assert "Not complete" in (tmp_path / "report.md").read_text()


def test_a_batch_is_halved_until_it_fits(small_profile, tmp_path):
    import torch

    from emonb.rehearsal_bench import Bench, noise_picture

    bench = Bench(load_settings(small_profile), torch.device("cpu"), noise_picture(64, 48), tmp_path, [], 1, 8, 1)

    def measure(batch):
        if batch > 2:
            raise torch.OutOfMemoryError("8 GB wanted")
        return float(batch)

    assert bench.halved(measure, 8) == (2.0, 2)
    with pytest.raises(ValueError, match="not memory"):
        bench.halved(lambda batch: (_ for _ in ()).throw(ValueError("not memory")), 8)


def test_an_architecture_without_processor_runs_with_random_weights(tmp_path):
    import torch

    from emonb.parameters import vlm_config
    from emonb.random_vlm import build_vlm, own_processor, resolve_base
    from emonb.rehearsal_bench import noise_picture
    from emonb.vlm import answer_distribution, visual_tokens

    config = vlm_config("stand-in")
    config.vision_config.patch_size = 14
    config.text_config.vocab_size = 5000
    config.image_token_id = 4999
    config.save_pretrained(tmp_path)
    base = resolve_base(str(tmp_path))
    assert not own_processor(base)
    vlm = build_vlm(base, "bfloat16", torch.device("cpu"), 112, layers=2)
    assert {p.dtype for p in vlm.model.parameters()} == {torch.bfloat16}
    assert len(vlm.core.visual.blocks) == len(vlm.core.language_model.layers) == 2
    visual = visual_tokens(vlm, [noise_picture(224, 168)])
    assert visual.tokens[0].shape == (4 * 3, 128)  # 112 x 84 px in 28 px steps
    scores = answer_distribution(vlm, visual, ["awe awe", "fear awe"])
    assert scores.shape == (1, 2)
    assert scores.isfinite().all()


def test_a_bad_model_or_depth_is_one_clear_message(tmp_path):
    from emonb.rehearsal import rehearse

    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for options, message in (
        ({"model": "13b"}, "model '13b': unknown; use 7b, 2b"),
        ({"model": str(tmp_path)}, "no Qwen2-VL architecture"),
        ({"model": str(tmp_path / "broken")}, "no Qwen2-VL architecture"),
        ({"layers": "3"}, "use two different depths"),
        ({"layers": "1,9"}, "use smaller depths"),
        ({"device": "tpu"}, "no device 'tpu'"),
        ({"dataset_size": 3}, "--dataset-size at least 10"),
    ):
        with pytest.raises(EmonbError, match=message):
            rehearse("smoke", out=tmp_path / "out", **options)


def test_command_line_says_it_in_one_line(monkeypatch, capsys):
    from emonb import cli

    monkeypatch.setattr("sys.argv", ["emonb", "rehearse", "--model", "13b"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("emonb: model '13b': unknown; use 7b, 2b, stand-in")
