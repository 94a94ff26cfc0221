"""The cache: keys, atomic results, writers that meet or are killed, disks without locks; memory."""

import errno
import fcntl
import json
import mmap
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from emonb.errors import EmonbError
from emonb.files import read_json, write_json
from emonb.store import Artifact, Recipe, Store

SPAWN = multiprocessing.get_context("spawn")
NOT_MADE = "result for 'mini-fi'.*; run notebook .* first"


def put(store: Store, text: str = "x", *, stage: str = "teacher", params: dict = {}, **recipe) -> Artifact:  # noqa: B006
    """A small result."""
    made = Recipe(lambda folder, parts: write_json(folder / "a.json", text), params, **recipe)
    return store.get(stage, "mini-fi", made)


def test_a_hit_is_not_built_again(tmp_path, monkeypatch):
    def must_not_build(folder: Path, parts: Path) -> None:
        raise AssertionError("built again")

    monkeypatch.setenv("EMONB_EVENTS", str(tmp_path / "events"))
    first = put(Store(tmp_path), params={"lr": 0.1, "depths": (1, 2)})
    again, store = Recipe(must_not_build, {"depths": [1, 2], "lr": 0.1}), Store(tmp_path)
    assert store.has("teacher", "mini-fi", again)
    assert store.get("teacher", "mini-fi", again) == first == store.find("teacher", "mini-fi")
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [event["hit"] for event in events] == [False, True, True]


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
        store.get("teacher", "mini-emoset", Recipe(lambda *folders: None, {})),
    ]
    assert len({artifact.key for artifact in artifacts}) == len(artifacts)
    again = put(Store(tmp_path, force=["samples"]), "a", stage="samples", params={"text": "a"})
    assert put(store, inputs=[again]) == artifacts[2], "made anew with the same content: an equal input"


def test_provenance_says_how_it_was_made(tmp_path):
    samples = put(Store(tmp_path), stage="samples")
    made = put(Store(tmp_path), params={"seed": 3}, inputs=[samples], code={"emonb.x:f": "ab"}).provenance
    assert (made["seed"], made["inputs"][0]["digest"], made["code"]) == (3, samples.digest, {"emonb.x:f": "ab"})
    assert {"torch", "python"} <= set(made["versions"])
    assert (made["seconds"] >= 0, made["peak_memory_mb"] > 1, made["processes"]) == (True, True, 1)


def test_a_failed_build_leaves_nothing_but_its_parts(tmp_path):
    def build(folder: Path, parts: Path) -> None:
        (folder / "half").write_text("x")
        tries.append((parts / "done").is_file())
        (parts / "done").write_text("x")
        if len(tries) == 1:
            raise RuntimeError("no")

    tries, store = [], Store(tmp_path)
    with pytest.raises(RuntimeError):
        store.get("head", "mini-fi", Recipe(build, {}))
    assert [p.suffix for p in (tmp_path / "head").iterdir() if p.is_dir()] == [".parts"]
    with pytest.raises(EmonbError, match=NOT_MADE):
        store.find("head", "mini-fi")
    made = store.get("head", "mini-fi", Recipe(build, {}))
    assert tries == [False, True]
    assert [p.name for p in (tmp_path / "head").iterdir() if p.is_dir()] == [made.key]


def test_force_makes_anew_what_is_older_than_the_store(tmp_path):
    built, others = [], set()
    for _ in range(2):
        store = Store(tmp_path, force=["teacher"])
        for _ in range(2):
            store.get("teacher", "mini-fi", Recipe(lambda *folders: built.append(1), {}))
        others.add(put(store, stage="head").provenance["created"])
    assert (len(built), len(others)) == (2, 1)


def test_keep_takes_an_older_result_in_spite_of_changed_code_and_says_so(tmp_path):
    old, keeps = put(Store(tmp_path), "old", code={"f": "1", "g": "1"}), Store(tmp_path, keep=["teacher"])
    put(Store(tmp_path), "other seed", params={"seed": 1}, code={"f": "1", "g": "1"})
    kept = put(keeps, "new", code={"f": "2", "g": "1"})
    assert kept.key != old.key
    assert read_json(kept.path / "a.json") == "old"
    said = {"from": old.key, "made": old.provenance["created"], "changed_code": ["f"]}
    assert kept.provenance["kept"] == said
    assert put(Store(tmp_path), "new", code={"f": "2", "g": "1"}) == kept, "it is the result of this code from now on"
    new = put(keeps, "new", params={"seed": 2}, code={"f": "2", "g": "1"})
    assert read_json(new.path / "a.json") == "new"
    assert "kept" not in new.provenance


DAMAGE = {
    "cut": lambda made: (made / "a.json").write_text(""),
    "gone": lambda made: (made / "a.json").unlink(),
    "more": lambda made: (made / "b").touch(),
    "no provenance": lambda made: (made / "provenance.json").unlink(),
    "half a provenance": lambda made: (made / "provenance.json").write_text('{"files": {'),
    "no pointer": lambda made: (made.parent / "mini-fi.json").unlink(),
    "half a pointer": lambda made: (made.parent / "mini-fi.json").write_text('{"key'),
    "another pointer": lambda made: (made.parent / "mini-fi.json").write_text("[]"),
    "pointer to nothing": lambda made: (made.parent / "mini-fi.json").write_text('{"key": "0000000000000000"}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_said_and_built_again(tmp_path, damage):
    artifact = put(Store(tmp_path), "some text")
    DAMAGE[damage](artifact.path)
    with pytest.raises(EmonbError, match=NOT_MADE):
        Store(tmp_path).find("teacher", "mini-fi")
    assert put(Store(tmp_path), "some text") == artifact == Store(tmp_path).find("teacher", "mini-fi")
    assert sorted(p.name for p in artifact.path.iterdir()) == ["a.json", "provenance.json"]
    assert read_json(artifact.path / "a.json") == "some text"


def test_what_cannot_be_part_of_a_key_is_said(tmp_path):
    with pytest.raises(TypeError, match="object is not JSON serializable"):
        put(Store(tmp_path), params={"x": object()})


def slow_writer(root: Path) -> None:
    """Another process: builds slowly and notes that it did."""

    def build(folder: Path, parts: Path) -> None:
        (folder / "begun").write_text("x")
        with (root / "builds.txt").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1.0)

    Store(root / "artifacts").get("gate", "mini-fi", Recipe(build, {}))


def no_flock(root: Path) -> None:
    """The same on a file system that has no locks."""

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = refuse
    slow_writer(root)


@pytest.mark.parametrize("writer", [slow_writer, no_flock])
def test_two_processes_build_once_also_after_one_was_killed(tmp_path, writer):
    victim = SPAWN.Process(target=writer, args=(tmp_path,))
    victim.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "builds.txt").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim.kill()
    victim.join()
    with pytest.raises(EmonbError, match=NOT_MADE):
        Store(tmp_path / "artifacts").find("gate", "mini-fi")
    writers = [SPAWN.Process(target=writer, args=(tmp_path,)) for _ in range(2)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
    assert [process.exitcode for process in writers] == [0, 0], "the dead one still holds the lock"
    assert len((tmp_path / "builds.txt").read_text().split()) == 2
    artifact = Store(tmp_path / "artifacts").find("gate", "mini-fi")
    assert sorted(p.name for p in artifact.path.iterdir()) == ["begun", "provenance.json"]
    assert not list(tmp_path.glob("artifacts/gate/.*.tmp"))


def test_peak_memory_is_the_stage_s_own(tmp_path):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system cannot reset the peak of a process")

    def build(folder: Path, parts: Path) -> None:
        with mmap.mmap(-1, 200 << 20) as fresh:  # from the system: a heap may have as much lying free already
            fresh.write(bytes(200 << 20))

    large = Store(tmp_path).get("head", "large", Recipe(build, {}))
    small = Store(tmp_path).get("head", "small", Recipe(lambda *folders: None, {}))
    assert large.provenance["peak_memory_mb"] - small.provenance["peak_memory_mb"] > 150
