"""Results made at once in several processes: the same as made here, and nothing lost when one of them ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from loky import get_reusable_executor

from emonb.errors import EmonbError
from emonb.settings import Settings
from emonb.side_by_side import side_by_side
from emonb.store import Artifact, Store
from emonb.workspace import Workspace, open_workspace

DATASETS = ("mini-fi", "mini-emotion6", "mini-flickr")


def noted_stage(settings: Settings, store: Store, dataset: str, *deeds: str) -> Artifact:
    """Notes who made it, after the deed that is named for its dataset."""

    def build(folder: Path) -> None:
        for deed in deeds:
            which, what = deed.split(":")
            if which == dataset:
                if what == "fail":
                    raise EmonbError(f"{dataset}: no good")
                if what == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(float(what))
        who = {"process": os.getpid(), "parent": os.getppid(), "threads": os.environ.get("OMP_NUM_THREADS")}
        (folder / "who.json").write_text(json.dumps(who))

    return store.get("samples", dataset, build)


def who(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.path / "who.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def _no_process_left():
    yield
    get_reusable_executor().shutdown(kill_workers=True)


@pytest.fixture
def ws(tmp_path) -> Workspace:
    opened = open_workspace("smoke", out=str(tmp_path))
    opened.settings = opened.settings.model_copy(update={"side_by_side": True})
    return opened


def test_every_result_is_made_in_a_process_of_its_own_with_one_thread(ws):
    made = side_by_side(noted_stage, ws)
    assert list(made) == list(DATASETS)
    assert {who(a)["parent"] for a in made.values()} == {os.getpid()}
    assert {who(a)["threads"] for a in made.values()} == {"1"}
    assert [a.name for a in made.values()] == list(DATASETS)


def test_what_is_there_is_only_looked_up(ws, monkeypatch):
    before = side_by_side(noted_stage, ws)
    monkeypatch.setattr("emonb.side_by_side._elsewhere", pytest.fail)
    assert side_by_side(noted_stage, ws) == before
    events = [json.loads(line) for line in (ws.store.root / "events.jsonl").read_text().splitlines()]
    assert [e["hit"] for e in events[-3:]] == [True] * 3


def test_without_the_setting_it_is_made_here(ws):
    ws.settings = ws.settings.model_copy(update={"side_by_side": False})
    assert who(side_by_side(noted_stage, ws)["mini-fi"])["process"] == os.getpid()


def test_force_makes_it_anew_once(ws):
    first = side_by_side(noted_stage, ws)
    again = open_workspace("smoke", out=str(ws.out), force="samples")
    again.settings = ws.settings
    stamps = [a.provenance["created"] for a in first.values()]
    second = [a.provenance["created"] for a in side_by_side(noted_stage, again).values()]
    assert all(new > old for new, old in zip(second, stamps, strict=True))
    assert [a.provenance["created"] for a in side_by_side(noted_stage, again).values()] == second


def test_a_failure_is_raised_here_and_the_others_are_kept(ws):
    with pytest.raises(EmonbError, match=r"^mini-fi: no good$"):
        side_by_side(noted_stage, ws, [("mini-fi", "mini-fi:fail"), ("mini-emotion6", "mini-emotion6:0.5")])
    assert ws.store.find("samples", "mini-emotion6")


def test_after_a_failure_nothing_more_is_begun(ws, monkeypatch):
    monkeypatch.setattr("emonb.side_by_side._processes", lambda: 1)
    with pytest.raises(EmonbError, match="mini-fi: no good"):
        side_by_side(noted_stage, ws, [(dataset, "mini-fi:fail") for dataset in DATASETS])
    with pytest.raises(EmonbError, match="no samples result for 'mini-flickr'"):
        ws.store.find("samples", "mini-flickr")


def test_a_dead_process_is_named_with_a_remedy_and_the_next_try_works(ws):
    with pytest.raises(EmonbError, match=r"noted: one of \d+ processes died.*memory.*side_by_side: false"):
        side_by_side(noted_stage, ws, [("mini-fi", "mini-fi:die")])
    assert side_by_side(noted_stage, ws)["mini-fi"].path.is_dir()


def test_jobs_and_numbers_are_those_made_here_with_one_thread(ws, tmp_path):
    """A small ViT trained there and here: the same bytes."""
    import torch

    from emonb.data import samples_stage
    from emonb.teacher import teacher_stage

    jobs = [("mini-flickr", "vit")]
    side_by_side(samples_stage, ws, ["mini-flickr"])
    there = side_by_side(teacher_stage, ws, jobs)[jobs[0]]
    alone = open_workspace("smoke", out=str(tmp_path / "alone"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        side_by_side(samples_stage, alone, ["mini-flickr"])
        here = side_by_side(teacher_stage, alone, jobs)[jobs[0]]
    finally:
        torch.set_num_threads(threads)
    for name in ("model.safetensors", "logits.safetensors", "history.json"):
        assert (here.path / name).read_bytes() == (there.path / name).read_bytes(), name


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from emonb.side_by_side import side_by_side
from emonb.workspace import open_workspace
from test_side_by_side import noted_stage
ws = open_workspace("smoke", out={out!r})
ws.settings = ws.settings.model_copy(update={{"side_by_side": True}})
side_by_side(noted_stage, ws, [(d, "mini-fi:60", "mini-emotion6:60") for d in ws.settings.datasets])
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed_it_leaves_no_process(tmp_path, how):
    import psutil

    script = SCRIPT.format(tests=str(Path(__file__).parent), out=str(tmp_path))
    main = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, start_new_session=True)
    building = tmp_path / "artifacts" / "samples"
    deadline = time.monotonic() + 60
    while not list(building.glob(".*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = psutil.Process(main.pid).children(recursive=True)
    assert list(building.glob(".*.tmp"))
    assert children
    os.killpg(main.pid, how) if how == signal.SIGINT else main.kill()
    assert main.wait(15) != 0
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive
    if how == signal.SIGINT:  # the notebook's user sees where it stopped, once
        assert main.stderr.read().decode().count("KeyboardInterrupt") == 1
