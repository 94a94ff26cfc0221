"""Several processes: two that share each result under a launcher, and some that make a result each."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, killed, wait_for
from jobs import job
from pipeline import DATASET, tiny_profile
from safetensors.torch import load_file

from emonb.errors import EmonbError
from emonb.machine import side_by_side
from emonb.predictions import probabilities, read_predictions

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}


def launch(tiny, stage: str, out: Path, profile: Path) -> subprocess.Popen:
    """Two processes of `python -m emonb stage` on this CPU, started as docs/accelerate says."""
    config = ["--config_file", str(ROOT / "docs" / "accelerate" / "multi_gpu.yaml"), "--num_processes", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, "--main_process_port", "0"]
    command += ["-m", "emonb", "stage", stage, "--profile", str(profile), "--images", str(tiny.images)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*command, "--out", str(out)], env=environment, **PIPES)


def test_two_processes_give_what_one_gives(tiny, tmp_path):
    process = launch(tiny, "all", tmp_path, tiny.profile)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    two = tiny.open(tmp_path)
    for stage, tolerance in {"features": 0, "base_predictions": 0, "adapter": 1e-4, "teacher": 1e-3}.items():
        one, other = (tiny.artifact(stage, run) for run in (tiny.run, two))
        assert one.key == other.key
        assert other.provenance["processes"] == 2
        assert tolerance or one.digest == other.digest, stage
        for file in one.path.glob("*model.safetensors"):
            a, b = load_file(file), load_file(other.path / file.name)
            assert max((a[k] - b[k]).abs().max() for k in a) <= tolerance, stage
    for stage, file in {"vlm_predictions": "predictions", "teacher": "predictions", "gate": "emovlmkd"}.items():
        frames = [read_predictions(tiny.artifact(stage, run).path / f"{file}.parquet") for run in (tiny.run, two)]
        np.testing.assert_allclose(*map(probabilities, frames), atol=2e-3, err_msg=stage)
    assert (tmp_path / "triplets" / f"{DATASET}.jsonl").is_file()


def test_no_process_lives_five_seconds_longer_than_its_launcher(tiny, tmp_path):
    profile = tiny_profile(tmp_path / "long.yaml", tiny.run.settings.vlm.base, epochs=1000)
    process = launch(tiny, "adapter", tmp_path / "out", profile)
    wait_for(lambda: list(tmp_path.glob("out/artifacts/adapter/.*.tmp")), process)
    assert killed(process) == []


def test_jobs_have_a_process_each_with_one_thread(tmp_path):
    done = list(side_by_side(job, [(tmp_path, name) for name in "abc"], "test"))
    assert sorted(done) == [(name, os.getpid(), "1") for name in "abc"]


def test_a_failure_is_raised_here_and_the_others_are_kept(tmp_path):
    with pytest.raises(EmonbError, match=r"^b: no good$"):
        list(side_by_side(job, [(tmp_path, name, "b:fail") for name in "ab"], "test"))
    assert (tmp_path / "a").is_file()


def test_a_dead_process_is_said_with_a_remedy_and_the_next_try_works(tmp_path):
    with pytest.raises(EmonbError, match=r"teacher: one of \d+ processes died.*memory.*side_by_side: false"):
        list(side_by_side(job, [(tmp_path, "a", "a:die")], "teacher"))
    assert len(list(side_by_side(job, [(tmp_path, "a")], "teacher"))) == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed_it_leaves_no_process(tmp_path, how):
    script = f"""import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from jobs import Path, job
from emonb.machine import side_by_side
list(side_by_side(job, [(Path({str(tmp_path)!r}), name, "a:sleep", "b:sleep") for name in "ab"], "test"))"""
    process = subprocess.Popen([sys.executable, "-c", script], **PIPES)
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2, process)
    assert killed(process, lambda: os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()) == []
    if how == signal.SIGINT:  # the notebook's user sees where it stopped, once
        assert process.stdout.read().count("KeyboardInterrupt") == 1


def test_results_made_side_by_side_are_those_made_here(tiny, tmp_path):
    """Made elsewhere, looked up here; FORCE asks for them once."""
    run, stamps = tiny.again(tmp_path, without=["teacher"]), []
    run.settings = run.settings.model_copy(update={"side_by_side": True})
    stamps.append(next(iter(run.make("teacher").values())).provenance["created"])
    again = tiny.open(tmp_path, force="teacher")
    again.settings = run.settings
    stamps += [next(iter(r.make("teacher").values())).provenance["created"] for r in (again, again, run)]
    assert stamps[0] < stamps[1] == stamps[2] == stamps[3]
    assert tiny.artifact("teacher", run).digest == tiny.artifact("teacher").digest
