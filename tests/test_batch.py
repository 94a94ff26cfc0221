"""Room 02: the Batch API against a loopback server, interrupted at every step."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from annotating import KEY, make_pictures, opened, read_lines
from openai_server import serve

from emonb import batch as module
from emonb.annotate import annotate
from emonb.answer_log import rejected_path
from emonb.errors import EmonbError
from emonb.triplets import KINDS


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("images"), 30)


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / "server"
    folder.mkdir()
    with serve(folder, batch_seconds=0.1) as running:
        monkeypatch.setenv("OPENAI_BASE_URL", running.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield running


def opened_batch(folder, images, **more):
    return opened(folder, images, **{"batch_poll_s": 0.1, "batch_requests": 12, "transport_retries": 2, **more})


def ask(settings, samples, **options):
    return annotate(settings, samples, "small", batch=True, say=lambda _: None, **options)


def counted(server, path):
    return sum(row["path"].startswith(path) and row["status"] == 200 for row in server.log())


def items(server):
    return [row for row in server.log() if row["path"] == "/v1/batches#item"]


def assert_complete(path, server):
    lines = read_lines(path)
    assert len({t["image_id"] for t in lines}) == 30
    assert [t["kind"] for t in lines] == list(KINDS) * 30
    assert all(t["usage"]["batch"] for t in lines if t["usage"])
    good = Counter(row["image"] for row in items(server) if row["outcome"] == "good")
    assert len(good) == 30
    assert set(good.values()) == {1}  # none is paid twice


def test_write_submit_poll_fetch_merge(tmp_path, images, server):
    settings, samples, path = opened_batch(tmp_path, images)
    summary = ask(settings, samples)
    assert (summary.accepted, summary.answers, summary.stopped) == (30, 30, "")
    assert_complete(path, server)
    assert list(path.with_name(".small.batches").iterdir()) == []  # request and result files are gone
    parts = json.loads(path.with_name("small.batches.json").read_text())["parts"]
    assert [part["images"] for part in parts] == [12, 12, 6]
    online, samples, _ = opened(tmp_path / "online", images)
    assert annotate(online, samples, "small", say=lambda _: None).usd == pytest.approx(2 * summary.usd)


def test_come_back_later(tmp_path, images, server):
    server.configure(batch_seconds=0.6)
    settings, samples, path = opened_batch(tmp_path, images)
    first = ask(settings, samples, patient=False)
    assert "3 batches are under way at the server; the same command fetches them" in first.stopped
    assert first.accepted == 0
    assert ask(settings, samples).accepted == 30
    assert_complete(path, server)
    assert len(items(server)) == 30


def test_faults_expiry_and_errors_are_asked_again(tmp_path, images, server):
    server.configure(
        faults={"refusal": 0.1, "malformed": 0.1, "names_emotion": 0.1},
        batch_expire_share=0.1,
        batch_error_share=0.1,
        max_faults_per_image=1,
    )
    settings, samples, path = opened_batch(tmp_path, images)
    summary = ask(settings, samples)
    assert summary.accepted == 30
    assert_complete(path, server)
    outcomes = Counter(row["outcome"] for row in items(server))
    assert {"refusal", "malformed", "names_emotion", "batch_error", "batch_expired"} <= set(outcomes)
    reasons = Counter(r["reason"] for r in read_lines(rejected_path(path)))
    assert reasons["no answer"] == outcomes["batch_error"]
    assert reasons["names the emotion"] == outcomes["names_emotion"]
    assert summary.answers == sum(row["paid"] for row in items(server))


class Killed(BaseException):
    """Stands for kill -9: nothing of ours runs after it."""


def break_after(monkeypatch, owner, name, calls):
    """Let a method be called so often, then end the process after its effect."""
    original, count = getattr(owner, name), Counter()

    def broken(*args, **kwargs):
        result = original(*args, **kwargs)
        count[name] += 1
        if count[name] == calls:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, broken)


STEPS = {
    "a part is written": ("_write_part", 2),
    "a batch is created, not yet noted": ("_submit", 2),
    "its answers are fetched": ("_fetch", 1),
    "some are merged": ("_receive", 5),
    "a note is written": ("_save", 4),
    "all parts are submitted": ("_submit_all", 1),
    "a part is merged": ("_merge", 2),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
def test_interrupted_at_any_step_it_goes_on(tmp_path, images, server, monkeypatch, step):
    settings, samples, path = opened_batch(tmp_path, images)
    with monkeypatch.context() as patched:
        break_after(patched, module._Batches, *step)
        with pytest.raises(Killed):
            ask(settings, samples)
    summary = ask(settings, samples)
    assert summary.accepted == 30
    assert_complete(path, server)
    assert len(items(server)) == 30
    assert summary.answers == 30


def test_interrupted_after_the_upload_the_file_is_found_again(tmp_path, images, server, monkeypatch):
    settings, samples, path = opened_batch(tmp_path, images)
    saved = module._Batches._save

    def broken(self, part=None, **changes):
        if "file_id" in changes:
            raise Killed
        saved(self, part, **changes)

    with monkeypatch.context() as patched:
        patched.setattr(module._Batches, "_save", broken)
        with pytest.raises(Killed):
            ask(settings, samples)
    assert ask(settings, samples).accepted == 30
    uploads = json.loads(path.with_name("small.batches.json").read_text())["parts"]
    assert len(uploads) == len({part["file_id"] for part in uploads}) == 3
    assert_complete(path, server)


def test_a_rejected_answer_counts_once_when_its_merge_was_interrupted(tmp_path, images, server, monkeypatch):
    server.configure(faults={"refusal": 1.0}, max_faults_per_image=1)
    settings, samples, path = opened_batch(tmp_path, images)
    with monkeypatch.context() as patched:
        break_after(patched, module._Batches, "_receive", 5)
        with pytest.raises(Killed):
            ask(settings, samples)
    summary = ask(settings, samples)
    assert summary.accepted == 30
    rejected = Counter(r["image_id"] for r in read_lines(rejected_path(path)))
    assert set(rejected.values()) == {1}
    assert summary.answers == sum(row["paid"] for row in items(server)) == 60


def test_a_limit_on_the_cost_holds_for_what_is_submitted(tmp_path, images, server):
    settings, samples, _ = opened_batch(tmp_path, images, max_cost=0.012)
    summary = ask(settings, samples)
    assert 0 < summary.accepted < 30
    assert summary.usd <= 0.012
    assert "raise --max-cost" in summary.stopped


def test_a_refused_batch_costs_nothing_and_is_said(tmp_path, images, server):
    server.configure(file_limit_bytes=100)
    settings, samples, path = opened_batch(tmp_path, images)
    with pytest.raises(EmonbError, match="too large"):
        ask(settings, samples)
    server.configure(file_limit_bytes=None)
    assert ask(settings, samples).accepted == 30
    assert_complete(path, server)


def test_large_files_are_split_by_size(tmp_path, images, server):
    settings, samples, path = opened_batch(tmp_path, images, batch_requests=50, batch_mb=1.08)
    assert ask(settings, samples).accepted == 30
    parts = json.loads(path.with_name("small.batches.json").read_text())["parts"]
    assert len(parts) > 1


def test_one_question_a_request_is_no_batch(tmp_path, images, server):
    settings, samples, _ = opened_batch(tmp_path, images, answer_format="questions")
    with pytest.raises(EmonbError, match=r"triplets.answer_format.*schema or sections"):
        ask(settings, samples)


def test_a_server_without_schemas(tmp_path, images, server):
    server.configure(schemas=False)
    settings, samples, path = opened_batch(tmp_path, images)
    assert ask(settings, samples).accepted == 30
    assert {t["answer_format"] for t in read_lines(path)} == {"sections"}
