"""Kill -9 in every stage: no half result, nothing made twice, the same bytes in the end."""

import multiprocessing
import signal

import pytest
import torch
from pipeline import make_and_die

from emonb.errors import EmonbError
from emonb.store import STAGES

STEPS = {"adapter": (6, 5, 4), "teacher": (16, 10, 8)}  # optimiser steps in all, killed in, done at the checkpoint


@pytest.fixture(scope="module")
def fresh():
    """Processes that have what a stage imports, and no thread of ours."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline", "peft", "transformers"])
    return context


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_is_made_again_with_the_same_bytes(tiny, fresh, tmp_path, monkeypatch, one_thread, stage):
    later = [name for name, s in STAGES.items() if stage in s.needs or name == stage]
    run, folder = tiny.again(tmp_path, without=later), tmp_path / "artifacts" / stage
    steps, step, kept = STEPS.get(stage, (0, 0, 0))
    victim = fresh.Process(target=make_and_die, args=(*map(str, (tiny.profile, tiny.images, tmp_path)), stage, step))
    victim.start()
    victim.join(120)
    assert victim.exitcode == -signal.SIGKILL
    with pytest.raises(EmonbError, match=f"run notebook {STAGES[stage].notebook} first"):
        tiny.artifact(stage, run)
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]

    plain, taken = torch.optim.AdamW.step, []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: (taken.append(1), plain(*a, **k))[1])
    run.make(stage)
    again = tiny.artifact(stage, run)
    assert len(taken) == steps - kept, "it did not go on from its checkpoint"
    assert again.key == tiny.artifact(stage).key
    assert stage == "cost" or again.digest == tiny.artifact(stage).digest  # a cost is measured each time
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name[0] == "."]
