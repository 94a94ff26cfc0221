"""The store: keys, atomic results, concurrent and killed writers."""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from emonb import store as store_module
from emonb.errors import EmonbError
from emonb.store import Artifact, Store, atomic_write, code_hash, folder_digest, write_json

SPAWN = multiprocessing.get_context("spawn")


def put(store: Store, text: str = "x", **kwargs) -> Artifact:
    """A small result of stage `teacher`."""
    return store.get("teacher", "mini-fi", lambda folder: write_json(folder / "a.json", text), **kwargs)


def must_not_build(folder: Path) -> None:
    """A build that a hit must not call."""
    raise AssertionError("built again")


def test_hit_is_not_built_again(tmp_path):
    store = Store(tmp_path)
    first = put(store, params={"lr": 0.1, "depths": (1, 2)})
    again = Store(tmp_path).get("teacher", "mini-fi", must_not_build, params={"depths": [1, 2], "lr": 0.1})
    assert again == first == store.find("teacher", "mini-fi")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["hit"] for event in events] == [False, True]


def test_key_depends_on_everything(tmp_path, monkeypatch):
    store = Store(tmp_path)
    other = store.get("samples", "mini-fi", lambda folder: write_json(folder / "b.json", 1))
    another = store.get("samples", "mini-fi", lambda folder: write_json(folder / "b.json", 2), params={"seed": 1})
    artifacts = [
        put(store),
        put(store, params={"seed": 1}),
        put(store, inputs=[other]),
        put(store, inputs=[another]),
        put(store, code=["emonb.emotions"]),
        store.get("teacher", "mini-emoset", lambda folder: write_json(folder / "a.json", "x")),
    ]
    monkeypatch.setattr(store_module, "code_hash", lambda *modules: "changed")
    artifacts.append(put(store, code=["emonb.emotions"]))
    assert len({artifact.key for artifact in artifacts}) == len(artifacts)


def test_code_hash_ignores_comments_and_docstrings(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    sources = [
        "def f(x):\n    return x + 1\n",
        '"""Module."""\n\n# why\ndef f(x):\n    """Add one."""\n    return x + 1\n',
        "def f(x):\n    return x + 2\n",
    ]
    hashes = []
    for text in sources:
        (tmp_path / "versioned.py").write_text(text)
        code_hash.cache_clear()
        hashes.append(code_hash("versioned"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_provenance_says_how_it_was_made(tmp_path):
    samples = Store(tmp_path).get("samples", "mini-fi", lambda folder: write_json(folder / "b.json", 1))
    made = put(Store(tmp_path), params={"seed": 3}, inputs=[samples]).provenance
    assert made["seed"] == 3
    assert made["inputs"][0]["digest"] == samples.digest
    assert {"torch", "python"} <= set(made["versions"])
    assert made["seconds"] >= 0
    assert made["peak_memory_mb"] > 1


def test_peak_memory_is_the_stage_s_own(tmp_path):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system cannot reset the peak of a process")
    store = Store(tmp_path)

    def build(folder):
        with mmap.mmap(-1, 200 << 20) as fresh:  # from the system: a heap may have as much lying free already
            fresh.write(bytes(200 << 20))
        write_json(folder / "n", 1)

    large = store.get("head", "large", build)
    small = store.get("head", "small", lambda folder: None)
    assert large.provenance["peak_memory_mb"] - small.provenance["peak_memory_mb"] > 150


def test_digest_sees_names_and_contents(tmp_path):
    for name, content in (("a", "x"), ("b", "x"), ("a", "y")):
        folder = tmp_path / f"{name}{content}"
        folder.mkdir()
        (folder / name).write_text(content)
    digests = {folder_digest(folder) for folder in tmp_path.iterdir()}
    assert len(digests) == 3


def test_failed_build_leaves_nothing(tmp_path):
    store = Store(tmp_path)

    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.get("head", "mini-fi", build)
    assert [p.name for p in (tmp_path / "head").iterdir() if not p.name.endswith(".lock")] == []
    with pytest.raises(EmonbError, match="05_distillation"):
        store.find("head", "mini-fi")


def test_force_rebuilds_once_per_store(tmp_path):
    built = []
    for _ in range(2):
        store = Store(tmp_path, force=["teacher"])
        for _ in range(2):
            artifact = store.get("teacher", "mini-fi", lambda folder: built.append(1))
    assert len(built) == 2
    assert sorted(p.name for p in artifact.path.iterdir()) == ["provenance.json"]


def test_truncated_file_is_built_again(tmp_path):
    artifact = put(Store(tmp_path), "some text")
    (artifact.path / "a.json").write_text("")
    with pytest.raises(EmonbError, match="gone or damaged"):
        Store(tmp_path).find("teacher", "mini-fi")
    assert json.loads((put(Store(tmp_path), "some text").path / "a.json").read_text()) == "some text"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": "0000000000000000"}', "no json"])
def test_damaged_pointer(tmp_path, content):
    artifact = put(Store(tmp_path))
    pointer = tmp_path / "teacher" / "mini-fi.json"
    pointer.write_text(content)
    with pytest.raises(EmonbError, match="04_teacher"):
        Store(tmp_path).find("teacher", "mini-fi")
    put(Store(tmp_path))
    assert Store(tmp_path).find("teacher", "mini-fi") == artifact


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(EmonbError, match=r"cannot write.*OUT"):
        Store(tmp_path / "file" / "artifacts")


def test_params_must_be_plain(tmp_path):
    with pytest.raises(TypeError, match="cannot be part of a key"):
        put(Store(tmp_path), params={"x": object()})


def test_atomic_write_replaces(tmp_path):
    for text in ("one", "two"):
        atomic_write(tmp_path / "file", text)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "two")]


def slow_writer(root: Path) -> None:
    """Another process: builds slowly and notes that it did."""

    def build(folder: Path) -> None:
        (folder / "begun").write_text("x")
        with (root / "builds.txt").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1.0)
        (folder / "finished").write_text("x")

    Store(root / "artifacts").get("gate", "mini-fi", build)


def test_two_processes_build_once(tmp_path):
    writers = [SPAWN.Process(target=slow_writer, args=(tmp_path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len((tmp_path / "builds.txt").read_text().split()) == 1


def test_killed_writer_leaves_nothing_half(tmp_path):
    writer = SPAWN.Process(target=slow_writer, args=(tmp_path,))
    writer.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("artifacts/gate/.*.tmp/begun")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(60)
    assert writer.exitcode == -signal.SIGKILL
    with pytest.raises(EmonbError, match="06_gate"):
        Store(tmp_path / "artifacts").find("gate", "mini-fi")
    slow_writer(tmp_path)
    artifact = Store(tmp_path / "artifacts").find("gate", "mini-fi")
    assert sorted(p.name for p in artifact.path.iterdir()) == ["begun", "finished", "provenance.json"]
    assert not list(tmp_path.glob("artifacts/gate/.*.tmp"))
