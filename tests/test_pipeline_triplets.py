"""Room 02: the stage `triplets`: whose triplets it takes, and the plain copy for people."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from annotating import EMOTIONS, Asking, asked_of

from emonb.annotate import show_offline
from emonb.errors import EmonbError
from emonb.pipeline import triplets
from emonb.settings import TripletSettings
from emonb.store import Artifact, Store
from emonb.triplets import read_triplets, source_note


@pytest.fixture
def small(tmp_path):
    """Twelve training images; `small.stage(...)` is the stage's result as a table."""
    asking, folder = Asking(tmp_path, 12), tmp_path / "samples"
    asking.samples.assign(brightness=0.5, colorfulness=0.5).to_parquet(folder / "samples.parquet")
    (folder / "meta.json").write_text(json.dumps({"labels": EMOTIONS, "root": "."}))
    (folder / "provenance.json").write_text('{"digest": "0"}')
    samples, store = Artifact("samples", "small", "0", folder), Store(tmp_path / "artifacts")

    def stage(**terms):
        settings = SimpleNamespace(triplets=TripletSettings(**{"batch_poll_s": 0.05, **terms}))
        recipe = triplets(SimpleNamespace(out=tmp_path, settings=settings, store=store), "small", samples=samples)
        artifact = store.get("triplets", "small", recipe)
        show_offline(artifact.path / "triplets.jsonl", asking.path)
        return read_triplets(artifact.path / "triplets.jsonl")

    asking.stage = stage
    return asking


def test_offline_then_paid_then_what_is_there(tmp_path, small, monkeypatch):
    order = list(small.samples["image_id"][:12])
    assert set(small.stage()["source"]) == {"offline"}
    assert source_note(tmp_path, ["small"]) == "triplets of small: offline annotator, no paid model"
    with asked_of(monkeypatch, latency_s=0.01) as server:
        frame = small.stage(annotator="openai", concurrency=6)
        assert list(frame["image_id"]) == [image_id for image_id in order for _ in range(3)]  # whatever arrived first
        assert set(frame["source"]) == {"openai"}
        assert small.stage(annotator="openai").equals(frame)
        assert small.stage().equals(frame)
        assert len(server.log) == 12
    with pytest.raises(EmonbError, match="paid for"):
        small.stage(annotator="offline")
    lines = small.path.read_text().replace("train/", "other/", 3 * 4)  # four images are no training images any more
    small.path.write_text(lines)
    assert small.stage()["image_id"].nunique() == 8
    small.path.write_text(lines.replace("train/", "other/"))
    with pytest.raises(EmonbError, match="belongs to other pictures"):
        small.stage()


def test_nothing_that_is_under_way_is_replaced(small, monkeypatch):
    with asked_of(monkeypatch, batch_seconds=3600) as server:
        small.ask(batch=True, patient=False)
        with pytest.raises(EmonbError, match="not fetched yet"):
            small.stage()
        server.batch_seconds = 0
        assert set(small.stage(annotator="batch")["source"]) == {"openai"}
    small.path.unlink()
    with (
        asked_of(monkeypatch, answer=lambda *_: {"choices": []}),
        pytest.raises(EmonbError, match="not a chat completion"),
    ):
        small.stage(annotator="openai")
