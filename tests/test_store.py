"""The cache: keys, atomic results, writers that meet or are killed, disks without locks; memory."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import multiprocessing
import os
import platform
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from emonb.errors import EmonbError
from emonb.files import atomic_write, locked, read_json, visible, write_json
from emonb.machine import keep_freed_memory
from emonb.store import Artifact, Recipe, Store, folder_digest

NOT_MADE = "result for 'mini-fi'.*; run notebook .* first"
SPAWN = multiprocessing.get_context("spawn")


def put(store: Store, text: str = "x", *, stage: str = "teacher", code: dict | None = None, **recipe) -> Artifact:
    """A small result."""
    made = Recipe(lambda folder, parts: write_json(folder / "a.json", text), recipe.pop("params", {}), **recipe)
    return store.get(stage, "mini-fi", made, code or {})


def must_not_build(folder: Path, parts: Path) -> None:
    raise AssertionError("built again")


def test_a_hit_is_not_built_again(tmp_path):
    store = Store(tmp_path)
    first = put(store, params={"lr": 0.1, "depths": (1, 2)})
    again = Recipe(must_not_build, {"depths": [1, 2], "lr": 0.1})
    assert Store(tmp_path).has("teacher", "mini-fi", again, {})
    assert Store(tmp_path).get("teacher", "mini-fi", again, {}) == first == store.find("teacher", "mini-fi")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["hit"] for event in events] == [False, True]


def test_the_key_depends_on_everything(tmp_path):
    store = Store(tmp_path)
    one, two = (put(store, text, stage="samples", params={"text": text}) for text in "ab")
    artifacts = [
        put(store),
        put(store, params={"seed": 1}),
        put(store, inputs=[one]),
        put(store, inputs=[two]),
        put(store, code={"emonb.teacher:train": "0"}),
        put(store, code={"emonb.teacher:train": "1"}),
        put(store, stage="head"),
        store.get("teacher", "mini-emoset", Recipe(lambda *folders: None, {}), {}),
    ]
    assert len({artifact.key for artifact in artifacts}) == len(artifacts)


def test_an_input_made_anew_with_the_same_content_changes_no_key(tmp_path):
    inputs = [put(Store(tmp_path, force=force), stage="samples") for force in ((), ["samples"])]
    stamps = [inputs[1].provenance["created"], put(Store(tmp_path), stage="samples").provenance["created"]]
    assert stamps[0] == stamps[1]
    assert len({put(Store(tmp_path), inputs=[made]).key for made in inputs}) == 1


def test_provenance_says_how_it_was_made(tmp_path):
    samples = put(Store(tmp_path), stage="samples")
    made = put(Store(tmp_path), params={"seed": 3}, inputs=[samples], code={"emonb.x:f": "ab"}).provenance
    assert (made["seed"], made["inputs"][0]["digest"], made["code"]) == (3, samples.digest, {"emonb.x:f": "ab"})
    assert {"torch", "python"} <= set(made["versions"])
    assert made["seconds"] >= 0
    assert made["peak_memory_mb"] > 1
    assert made["processes"] == 1


def test_a_digest_sees_names_and_contents(tmp_path):
    for name, content in (("a", "x"), ("b", "x"), ("a", "y")):
        (tmp_path / f"{name}{content}").mkdir()
        (tmp_path / f"{name}{content}" / name).write_text(content)
    assert len({folder_digest(folder) for folder in tmp_path.iterdir()}) == 3


def test_a_failed_build_leaves_nothing_but_its_parts(tmp_path):
    def build(folder: Path, parts: Path) -> None:
        (folder / "half").write_text("x")
        tries.append((parts / "done").is_file())
        (parts / "done").write_text("x")
        if len(tries) == 1:
            raise RuntimeError("no")

    tries = []
    with pytest.raises(RuntimeError):
        Store(tmp_path).get("head", "mini-fi", Recipe(build, {}), {})
    assert [p.suffix for p in (tmp_path / "head").iterdir() if p.is_dir()] == [".parts"]
    with pytest.raises(EmonbError, match=NOT_MADE):
        Store(tmp_path).find("head", "mini-fi")
    made = Store(tmp_path).get("head", "mini-fi", Recipe(build, {}), {})
    assert tries == [False, True]
    assert [p.name for p in (tmp_path / "head").iterdir() if p.is_dir()] == [made.key]


def test_force_makes_it_anew_once_per_store(tmp_path):
    built, stamps = [], set()
    for _ in range(2):
        store = Store(tmp_path, force=["teacher"])
        for _ in range(2):
            store.get("teacher", "mini-fi", Recipe(lambda *folders: built.append(1), {}), {})
        stamps.add(put(store, stage="head").provenance["created"])
    assert len(built) == 2
    assert len(stamps) == 1, "another stage was made anew, too"


def test_keep_takes_an_older_result_in_spite_of_changed_code_and_says_so(tmp_path):
    old = put(Store(tmp_path), "old", params={"seed": 0}, code={"f": "1", "g": "1"})
    put(Store(tmp_path), "other seed", params={"seed": 1}, code={"f": "1", "g": "1"})
    kept = put(Store(tmp_path, keep=["teacher"]), "new", params={"seed": 0}, code={"f": "2", "g": "1"})
    assert kept.key != old.key
    assert read_json(kept.path / "a.json") == "old"
    assert kept.provenance["kept"] == {
        "from": old.key, "made": old.provenance["created"], "changed_code": ["f"],
    }  # fmt: skip
    without = put(Store(tmp_path), "new", params={"seed": 0}, code={"f": "2", "g": "1"})
    assert without == kept, "kept: it is the result of this code from now on"
    new = put(Store(tmp_path, keep=["teacher"]), "new", params={"seed": 2}, code={"f": "2", "g": "1"})
    assert read_json(new.path / "a.json") == "new"
    assert "kept" not in new.provenance


@pytest.mark.parametrize("damage", ["cut", "gone", "more", "no provenance", "half a provenance"])
def test_a_damaged_result_is_built_again(tmp_path, damage):
    artifact = put(Store(tmp_path), "some text")
    file, provenance = artifact.path / "a.json", artifact.path / "provenance.json"
    {
        "cut": lambda: file.write_text(""),
        "gone": file.unlink,
        "more": lambda: (artifact.path / "b").touch(),
        "no provenance": provenance.unlink,
        "half a provenance": lambda: provenance.write_text(provenance.read_text()[:50]),
    }[damage]()
    with pytest.raises(EmonbError, match=r"gone or damaged; run notebook .* first"):
        Store(tmp_path).find("teacher", "mini-fi")
    assert put(Store(tmp_path), "some text") == artifact
    assert sorted(p.name for p in artifact.path.iterdir()) == ["a.json", "provenance.json"]
    assert read_json(file) == "some text"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": "0000000000000000"}', "no json"])
def test_a_damaged_pointer_is_mended(tmp_path, content):
    artifact = put(Store(tmp_path))
    (tmp_path / "teacher" / "mini-fi.json").write_text(content)
    with pytest.raises(EmonbError, match=NOT_MADE):
        Store(tmp_path).find("teacher", "mini-fi")
    put(Store(tmp_path))
    assert Store(tmp_path).find("teacher", "mini-fi") == artifact


def test_what_cannot_be_written_or_be_part_of_a_key_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EmonbError, match=r"cannot write.*OUT"):
        Store(tmp_path / "file" / "artifacts")
    with pytest.raises(TypeError, match="cannot be part of a key"):
        put(Store(tmp_path), params={"x": object()})


def slow_writer(root: Path) -> None:
    """Another process: builds slowly and notes that it did."""

    def build(folder: Path, parts: Path) -> None:
        (folder / "begun").write_text("x")
        with (root / "builds.txt").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1.0)

    Store(root / "artifacts").get("gate", "mini-fi", Recipe(build, {}), {})


def no_flock(root: Path) -> None:
    """The same on a file system that has no locks."""

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = refuse
    slow_writer(root)


@pytest.mark.parametrize("writer", [slow_writer, no_flock])
def test_two_processes_build_once(tmp_path, writer):
    writers = [SPAWN.Process(target=writer, args=(tmp_path,)) for _ in range(2)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
    assert [process.exitcode for process in writers] == [0, 0]
    assert len((tmp_path / "builds.txt").read_text().split()) == 1


@pytest.mark.parametrize("writer", [slow_writer, no_flock])
def test_a_killed_writer_leaves_nothing_half_and_no_lock(tmp_path, writer):
    process = SPAWN.Process(target=writer, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "builds.txt").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    with pytest.raises(EmonbError, match=NOT_MADE):
        Store(tmp_path / "artifacts").find("gate", "mini-fi")
    again = SPAWN.Process(target=writer, args=(tmp_path,))
    again.start()
    again.join(30)
    assert again.exitcode == 0, "the dead one still holds the lock"
    artifact = Store(tmp_path / "artifacts").find("gate", "mini-fi")
    assert sorted(p.name for p in artifact.path.iterdir()) == ["begun", "provenance.json"]
    assert not list(tmp_path.glob("artifacts/gate/.*.tmp"))


def test_a_lock_that_is_held_is_said_or_waited_for(tmp_path):
    with locked(tmp_path / "lock", "busy"), pytest.raises(EmonbError, match="busy"), locked(tmp_path / "lock", "busy"):
        pass
    with locked(tmp_path / "lock", "busy"):
        pass


def test_a_file_is_replaced_whole(tmp_path):
    for text in ("one", "two"):
        atomic_write(tmp_path / "file", text)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "two")]


def test_a_name_cannot_steer_a_terminal():
    assert visible("a\x1b[2Jb\u202ec é") == r"a\x1b[2Jb\u202ec é"


def test_peak_memory_is_the_stage_s_own(tmp_path):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system cannot reset the peak of a process")

    def build(folder: Path, parts: Path) -> None:
        with mmap.mmap(-1, 200 << 20) as fresh:  # from the system: a heap may have as much lying free already
            fresh.write(bytes(200 << 20))

    large = Store(tmp_path).get("head", "large", Recipe(build, {}), {})
    small = Store(tmp_path).get("head", "small", Recipe(lambda *folders: None, {}), {})
    assert large.provenance["peak_memory_mb"] - small.provenance["peak_memory_mb"] > 150


def faults(keep: bool, told: multiprocessing.SimpleQueue) -> None:
    """Page faults in ten steps of 190 MB each, in a process of its own."""
    if keep:
        keep_freed_memory()
    before = 0
    for step in range(12):
        if step == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        sum(block.sum() for block in [np.ones(2_000_000) for _ in range(12)])
    told.put(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_memory_of_one_step_is_kept_for_the_next():
    told = SPAWN.SimpleQueue()
    counts = []
    for keep in (False, True):
        process = SPAWN.Process(target=faults, args=(keep, told))
        process.start()
        process.join(60)
        counts.append(told.get())
    assert counts[1] < counts[0] / 20
