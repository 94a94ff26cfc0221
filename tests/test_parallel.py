"""Several processes give what one gives; a process that dies loses only the shard that it was making."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from pipeline import make_tree, tiny_workspace
from safetensors.torch import load_file

from emonb import parallel, shards, stages
from emonb.errors import EmonbError
from emonb.predictions import read_predictions
from emonb.settings import load_settings
from emonb.shards import SHARD, make_shards, shards_of
from emonb.tuning import _shared_batch
from emonb.workspace import open_workspace

MOODS = {"positive": (220, 60, 40), "negative": (40, 60, 220)}
SHORT = {"lora_dropout": 0, "epochs": 0.3, "lr": 1e-3}  # random masks differ; Adam magnifies rounding with every step
ROOT = Path(__file__).resolve().parent.parent


def launch(name: str, profile: Path, images: Path, out: Path, port: int) -> subprocess.Popen:
    """Two processes of `python -m emonb stage` without a GPU, as the README starts them."""
    config = ROOT / "docs" / "accelerate" / "cpu.yaml"
    starter = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command = ["--main_process_port", str(port), "-m", "emonb", "stage", name]
    options = ["--profile", str(profile), "--images", str(images), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*starter, *command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def finished(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def results(out: Path, stage: str, pattern: str) -> list[Path]:
    return sorted((out / "artifacts" / stage).glob(f"[0-9a-f]*/{pattern}"))


def test_two_processes_give_what_one_gives(tmp_path, untrained_base, free_port):
    images = tmp_path / "images"
    make_tree(images / "pets", {"train": 40, "val": 10, "test": 12}, MOODS)
    one = tiny_workspace(tmp_path / "one", untrained_base, images, "pets", **SHORT)
    stages.run_stage("all", one)
    tiny_workspace(tmp_path / "two", untrained_base, images, "pets", **SHORT)
    two = tmp_path / "two" / "out"
    said = finished(launch("all", tmp_path / "two" / "tiny.yaml", images, two, free_port))
    assert "adapter of pets" in said
    assert "processes: 2" in said

    for stage, tolerance in (("features", 0), ("base_predictions", 0), ("adapter", 1e-4), ("teacher", 1e-3)):
        pairs = zip(*(results(out, stage, "*.safetensors") for out in (one.out, two)), strict=True)
        for mine, theirs in pairs:
            assert mine.parent.name == theirs.parent.name, f"{stage}: another key"
            a, b = load_file(mine), load_file(theirs)
            assert all(torch.allclose(a[k].float(), b[k].float(), atol=tolerance, rtol=0) for k in a), mine.name
    for stage, file in (
        ("base_predictions", "predictions"),
        ("vlm_predictions", "predictions"),
        ("teacher", "predictions"),
        ("head", "head"),
        ("gate", "emovlmkd"),
    ):
        (mine,), (theirs,) = (results(out, stage, f"{file}.parquet") for out in (one.out, two))
        a, b = read_predictions(mine), read_predictions(theirs)
        p = [c for c in a if c.startswith("p_")]
        assert a["image_id"].tolist() == b["image_id"].tolist()
        assert np.allclose(a[p], b[p], atol=1e-3), stage
        assert (a["prediction"] == b["prediction"]).mean() > 0.99, stage


def test_a_process_that_dies_loses_only_its_shard(tmp_path, untrained_base, free_port):
    images = tmp_path / "images"
    make_tree(images / "pets", {"train": 3 * SHARD // 2, "val": 10, "test": 12}, MOODS)
    tiny_workspace(tmp_path / "run", untrained_base, images, "pets")
    profile, out = tmp_path / "run" / "tiny.yaml", tmp_path / "out"
    process = launch("features", profile, images, out, free_port)
    deadline = time.monotonic() + 120
    while not (kept := list(out.glob("artifacts/features/.*.parts/train-*.safetensors"))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no shard in two minutes"
        time.sleep(0.01)
    victim = next(p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1")
    victim.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not results(out, "features", "*")
    kept = list(out.glob("artifacts/features/.*.parts/*.safetensors"))
    made = {file.name: file.stat().st_mtime_ns for file in kept}
    assert made
    finished(launch("features", profile, images, out, free_port + 1))
    files = {file.name: file.stat().st_mtime_ns for file in results(out, "features", "*.safetensors")}
    assert len(files) == 5, "train has three shards"
    assert {name: files[name] for name in made} == made, "a finished shard was made again"
    assert not list(out.glob("artifacts/features/.*.parts"))


def test_shards_are_made_once_and_in_order(tmp_path):
    plan = shards_of({"train": 2 * SHARD + 1, "test": 3})
    assert [(s.name, s.stop - s.start) for s in plan] == [
        ("train-00000", SHARD), ("train-00001", SHARD), ("train-00002", 1), ("test-00000", 3),
    ]  # fmt: skip
    assert [(b.start, b.stop) for b in plan[1].batches(500)] == [(512, 1012), (1012, 1024)]
    calls = []

    def make(shard, file):
        calls.append(shard.name)
        if calls.count("train-00002") == 1 and shard.name == "train-00002":
            file.write_text("half")
            raise KeyboardInterrupt
        file.write_text(shard.name)

    with pytest.raises(KeyboardInterrupt):
        make_shards(plan, tmp_path, ".txt", make, "test")
    files = make_shards(plan, tmp_path, ".txt", make, "test")
    assert calls == ["train-00000", "train-00001", "train-00002", "train-00002", "test-00000"]
    assert [file.read_text() for file in files] == [shard.name for shard in plan]


def test_processes_take_every_second_shard(tmp_path, monkeypatch):
    plan = shards_of({"train": 5 * SHARD})
    monkeypatch.setattr(shards, "process_count", lambda: 2)
    monkeypatch.setattr(shards, "process_index", lambda: 1)
    made = []
    make_shards(plan, tmp_path, ".txt", lambda shard, file: (made.append(shard.start // SHARD), file.touch()), "test")
    assert made == [1, 3]


def test_pictures_are_prepared_ahead_in_order_and_not_all_at_once():
    held, most = [], []

    def prepare(item):
        held.append(item)
        return item

    for item in shards.ahead(prepare, range(50), threads=3):
        most.append(len(held) - item)
    assert len(most) == 50
    assert max(most) <= 5
    assert list(shards.ahead(str, range(3), threads=0)) == ["0", "1", "2"]
    with pytest.raises(ZeroDivisionError):
        list(shards.ahead(lambda x: 1 / x, [1, 0, 2], threads=2))


@pytest.mark.parametrize(("n", "expected"), [(1, (2, 8)), (2, (2, 4)), (8, (2, 1)), (16, None), (3, None)])
def test_a_step_sees_the_same_examples_however_many_processes(monkeypatch, n, expected):
    settings = load_settings("paper").vlm.model_copy(update={"train_batch_size": 2, "gradient_accumulation": 8})
    monkeypatch.setattr("emonb.tuning.process_count", lambda: n)
    if expected:
        assert _shared_batch(settings) == expected
    else:
        with pytest.raises(EmonbError, match=f"vlm.train_batch_size .* shared by {n} processes"):
            _shared_batch(settings)


def test_a_model_spread_over_processes_can_only_be_tuned(monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "sharded", lambda: True)
    ws = open_workspace("mini", out=str(tmp_path))
    with pytest.raises(EmonbError, match="only `adapter` can"):
        stages.run_stage("features", ws)
    with pytest.raises(EmonbError, match="no samples result for 'mini-fi'"):
        stages.run_stage("adapter", ws)


def test_sharded_is_read_from_the_launcher(monkeypatch):
    assert not parallel.sharded()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert parallel.sharded()
    with parallel.alone():
        assert not parallel.sharded()
        assert parallel.process_count() == 1


def test_unknown_stage_is_named(tmp_path):
    with pytest.raises(EmonbError, match="stage 'feature': unknown; use one of samples, triplets, features"):
        stages.run_stage("feature", open_workspace("smoke", out=str(tmp_path)))


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "accelerate").glob("*.yaml")), ids=lambda f: f.stem)
def test_accelerate_reads_the_configurations(file):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    config = load_config_from_file(str(file))
    kind = {"fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}.get(file.stem, "MULTI_GPU")
    assert config.distributed_type.value == kind
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "-m", "emonb", "stage", "adapter"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == config.num_processes
    assert arguments.module
    if kind == "DEEPSPEED":
        assert arguments.zero_stage == int(file.stem[-1])
    if kind == "FSDP":
        assert arguments.fsdp_transformer_layer_cls_to_wrap == "Qwen2VLDecoderLayer"


def test_a_stage_is_made_once(tmp_path, untrained_base):
    """`stage` without a launcher is the notebooks' own store: asked again, nothing is made."""
    images = tmp_path / "images"
    make_tree(images / "pets", {"train": 12, "val": 10, "test": 10}, MOODS)
    ws, said = tiny_workspace(tmp_path / "run", untrained_base, images, "pets"), []
    for _ in range(2):
        stages.run_stage("base_predictions", ws, say=said.append)
    events = pd.read_json(ws.store.root / "events.jsonl", lines=True)
    assert events.groupby("stage")["hit"].apply(list).to_dict() == {
        "samples": [False, True], "features": [False, True], "base_predictions": [False, True],
    }  # fmt: skip
    assert [line.split(" of ")[0] for line in said] == ["samples", "features", "base_predictions"] * 2
