"""Room 02: the Batch API against a loopback server, killed at every step; an OUT folder of an earlier version."""

from __future__ import annotations

import json
import pkgutil
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from annotating import Asking, asked_of

from emonb.errors import EmonbError, StoppedEarly

KEPT = Path(__file__).parent / "kept" / "triplets"


@pytest.fixture
def small(tmp_path):
    return Asking(tmp_path, 30)


@pytest.fixture
def server(monkeypatch):
    with asked_of(monkeypatch) as running:
        yield running


def ask(asking, **more):
    return asking.ask(batch=True, **{"batch_requests": 12, **more})


def items(server):
    return [row for row in server.log if row["path"] == "item"]


def noted(asking):
    return json.loads(asking.path.with_name("small.batches.json").read_text())["parts"]


def assert_complete(asking, server, images=30):
    asking.assert_complete(images)
    assert noted(asking) == []
    assert all(t["usage"]["batch"] for t in asking.accepted)
    good = Counter(row["image"] for row in items(server) if row["outcome"] == "good")
    assert (len(good), set(good.values())) == (images, {1})  # none is paid twice
    assert sum(r["usage"] is not None for r in [*asking.accepted, *asking.rejected]) == server.paid


def test_submit_wait_merge(small, server):
    assert ask(small) == ""
    assert_complete(small, server)
    assert len(server.batches) == 3
    tokens = sum(row["tokens"] for row in items(server)) - 30 * 90
    usd = (tokens * 2 + 30 * 90 * 8) / 1e6 / 2  # half the price
    assert f"{tokens:,} tokens in, 2,700 out: ${usd:,.4f}" in small.said[-1]
    assert small.ask() == ""
    assert len(items(server)) == 30


def test_come_back_later(small, server):
    server.batch_seconds = 3600
    assert ask(small, patient=False) == ""
    assert "3 batches are under way at the server; the same command fetches them" in small.said
    with pytest.raises(EmonbError, match=r"3 batches with 30 images are not fetched yet.*--annotator batch"):
        small.ask()
    with pytest.raises(EmonbError, match=r"holds answers of gpt-4.1 .*now asked is gpt-4o"):
        ask(small, model="gpt-4o")
    assert ask(small, patient=False) == ""
    server.batch_seconds = 0
    assert ask(small) == ""
    assert_complete(small, server)
    assert len(items(server)) == 30
    note = small.path.with_name("small.batches.json")
    for text in ("{", '{"parts": [{"name": "x"}]}'):
        note.write_text(text)
        with pytest.raises(EmonbError, match=r"small.batches.json: damaged.*paid a second time"):
            ask(small)


def test_faults_expiry_and_errors_are_asked_again(small, server):
    server.faults = {"refusal": 0.1, "malformed": 0.1, "names_emotion": 0.1}
    server.batch_shares = {"batch_expired": 0.1, "batch_error": 0.1}
    server.max_faults_per_image = 1
    ask(small)
    assert_complete(small, server)
    outcomes = Counter(row["outcome"] for row in items(server))
    assert {"refusal", "malformed", "names_emotion", "batch_error", "batch_expired"} <= set(outcomes)
    reasons = Counter(r["reason"] for r in small.rejected)
    assert reasons["no answer"] == outcomes["batch_error"] + outcomes["batch_expired"]
    assert reasons["names the emotion"] == outcomes["names_emotion"]


class Killed(BaseException):
    """Stands for kill -9: nothing of ours runs after it."""


STEPS = [  # function, at which call, whether before it
    ("emonb.annotate.ask.Batches.note", 2, False),  # noted, nothing sent
    ("openai.resources.files.Files.create", 2, False),  # a file is uploaded
    ("openai.resources.batches.Batches.create", 2, True),
    ("openai.resources.batches.Batches.create", 2, False),  # a batch is made, not yet noted
    ("emonb.annotate.ask.Batches.submit", 3, False),
    ("emonb.annotate.log.Answers.receive", 5, False),  # some answers are merged
    ("emonb.annotate.ask.Batches.merge", 2, True),
    ("emonb.annotate.ask.Batches.merge", 2, False),
]


@pytest.mark.parametrize(("function", "call", "before"), STEPS)
def test_killed_at_any_step_it_goes_on(small, server, monkeypatch, function, call, before):
    server.faults, server.max_faults_per_image = {"names_emotion": 1.0}, 1  # two rounds
    original, count = pkgutil.resolve_name(function), Counter()

    def killed(*args, **kwargs):
        count["calls"] += 1
        if before and count["calls"] == call:
            raise Killed
        result = original(*args, **kwargs)
        if count["calls"] == call:
            raise Killed
        return result

    with monkeypatch.context() as patched:
        patched.setattr(function, killed)
        with pytest.raises(Killed):
            ask(small)
    ask(small)
    assert_complete(small, server)
    assert len(items(server)) == 60


def test_a_limit_on_the_cost_holds_for_what_is_submitted(small, server):
    assert "raise --max-cost" in ask(small, max_cost=0.02)
    usd = sum((row["tokens"] - 90) * 2 + 90 * 8 for row in items(server)) / 1e6 / 2
    assert 0.016 < usd < 0.02
    assert len(small.accepted) == server.paid < 30


def test_a_refused_batch_is_told_and_costs_nothing(small, server):
    server.batch_fails = lambda number: {1: "token_limit_exceeded"}.get(number, "")
    with pytest.raises(EmonbError, match=r"small-\w+ failed \(token_limit_exceeded: no\); start again"):
        ask(small)
    ask(small)
    assert_complete(small, server)


def test_large_files_are_split_and_other_forms_found(small, server):
    with pytest.raises(EmonbError, match=r"triplets.answer_format.*schema or sections"):
        ask(small, answer_format="questions")
    server.schemas = False
    ask(small, batch_requests=50, batch_mb=0.05)
    assert_complete(small, server)
    assert len(server.batches) > 3
    assert {t["answer_format"] for t in small.accepted} == {"sections"}


def fetched(server, asking, change):
    """A batch that is over, whose lines `change` changes before they are fetched."""
    server.batch_seconds = 3600
    ask(asking, batch_requests=50, patient=False)
    server.batch_seconds = 0
    batch = server.look(next(iter(server.batches.values())))
    file = server.files[batch["output_file_id"]]
    file["data"] = b"\n".join(change(file["data"].splitlines(), batch))
    return ask(asking)


def test_odd_results_cost_their_images_alone(small, server):
    def odd(lines, _):
        broken = [json.loads(line) for line in lines[:3]]
        broken[0]["response"], broken[1]["response"]["body"] = "<b>", [1]
        broken[2]["response"]["body"]["choices"] = {"x": 1}
        return [b"[1]", b'{"custom_id": {}}', *(json.dumps(line).encode() for line in broken), *lines[3:], b"{"]

    assert fetched(server, small, odd) == ""
    small.assert_complete(30)
    assert server.paid == 33
    assert any("2 answers are of no image of ours" in line for line in small.said)
    assert sorted(r["reason"] for r in small.rejected) == ["empty", "no answer", "no answer"]


def test_custom_ids_that_are_there_twice_are_told_and_kept(small, server):
    assert fetched(server, small, lambda lines, _: [*lines, lines[0], lines[4].replace(b"ka", b"lo"), lines[4]]) == ""
    small.assert_complete(30)
    assert len(server.batches) == 1
    assert any("3 answers repeat a custom id; they are kept in small.unassigned.txt" in line for line in small.said)
    assert len(small.path.with_name("small.unassigned.txt").read_text().splitlines()) == 3


def test_an_empty_batch_is_told_and_not_submitted_again(small, server):
    def empty(lines, batch):
        batch["request_counts"] = {"completed": 0, "failed": 0, "total": 30}
        return []

    assert re.fullmatch(r"small-\w+ came back completed without one answer; .*", fetched(server, small, empty))
    assert len(server.batches) == 1
    assert noted(small) == []
    assert ask(small) == ""
    small.assert_complete(30)


@pytest.mark.parametrize(("lines", "came"), [(0, "its files are empty"), (20, "20 answers came, and not all")])
def test_answers_that_were_paid_and_did_not_come_are_fetched_again(small, server, lines, came):
    whole = []
    with pytest.raises(EmonbError, match=f"{came} of 30; start again to fetch them"):
        fetched(server, small, lambda there, _: whole.extend(there) or there[:lines])
    server.files[server.batches["batch_0"]["output_file_id"]]["data"] = b"\n".join(whole)
    assert ask(small) == ""
    assert_complete(small, server)
    assert len(server.batches) == 1


def changed(name, change):
    """Lines whose field `name` has become what `change` makes of it."""

    def run(lines, _):
        return [json.dumps({**(line := json.loads(text)), name: change(line[name])}).encode() for text in lines]

    return run


FIT = {  # an odd result whose answers are found
    "UTF-16": lambda lines, _: [b"\n".join(lines).decode().encode("utf-16")],
    "a list": lambda lines, _: [b"[" + b",".join(lines) + b"]"],
    "CR": lambda lines, _: [b"\r".join(lines)],
    "ids in capitals": changed("custom_id", lambda name: f"request-{name.upper()}"),
    "a body as text": changed("response", lambda said: {"status_code": 200, "body": json.dumps(said["body"])}),
}
FIT_NOT = {  # whether its answers count as paid
    "other ids": (True, changed("custom_id", lambda name: name[:20])),
    "no response": (False, changed("response", lambda said: None)),
    "a page": (False, lambda lines, _: [b"<html>"] * len(lines)),
    "a third": (True, lambda lines, _: [line.replace(b'"custom_id": "', b'"custom_id": "x') for line in lines[:10]]),
}


@pytest.mark.parametrize("change", FIT.values(), ids=FIT)
def test_odd_results_are_read(small, server, change):
    assert fetched(server, small, lambda lines, batch: batch.pop("request_counts") and change(lines, batch)) == ""
    assert_complete(small, server)


@pytest.mark.parametrize(("paid", "change"), FIT_NOT.values(), ids=FIT_NOT)
def test_a_batch_that_fits_no_image_is_told_and_not_paid_again(small, server, paid, change):
    with pytest.raises(StoppedEarly, match=r"of its 30 images got no answer that can be read; start again"):
        fetched(server, small, lambda lines, batch: batch.pop("request_counts") and change(lines, batch))
    spent = small.said[-1].partition(" paid answers")[0].split()[-1]
    for _ in range(2):
        with pytest.raises(StoppedEarly, match=r"to pay for these images again, remove it from small.batches.json"):
            ask(small)
        with pytest.raises(EmonbError, match=r"30 images are not fetched yet"):
            small.ask()
        assert (server.paid, len(server.batches), len(noted(small))) == (30, 1, 1)
        assert f"{spent} paid answers" in small.said[-1]
    assert (spent != "0") == paid
    small.path.with_name("small.batches.json").unlink()
    assert ask(small) == ""
    small.assert_complete(30)


def test_a_batch_of_useless_answers_is_not_submitted_again(small, server):
    server.faults = {"empty": 1.0}
    assert "8 answers in a row were empty" in ask(small, batch_requests=50)
    assert len(server.batches) == 1
    assert len(small.rejected) == server.paid == 30


def test_what_is_gone_at_the_server_is_said(small, server):
    server.batch_seconds = 3600
    ask(small, patient=False)
    server.batches.clear()
    with pytest.raises(EmonbError, match=r"no such object.* is to be removed from <dataset>.batches.json"):
        ask(small)


def test_what_the_server_says_of_a_batch_is_told_also_a_state_that_is_new(small, server):
    server.batch_seconds = 3600
    ask(small, patient=False)
    assert "in_progress" in small.said[-3]
    counts = dict.fromkeys(("completed", "failed", "total"), 2)
    server.batches["batch_0"] |= {"status": "stalled", "request_counts": counts}
    ask(small, patient=False)
    assert [line.split(": ")[-1] for line in small.said if "stalled" in line] == ["stalled, 2 answers"]
    assert len(noted(small)) == 3


# ---- what an earlier version of emonb left: 11 paid answers, the last torn; 9 rejected; two batches under way ----


@pytest.fixture
def kept(tmp_path, server):
    """That folder, and the server that has its batches."""
    asking = Asking(tmp_path, 18)
    shutil.copytree(KEPT, asking.path.parent)
    state = json.loads((KEPT / "server.json").read_text())
    server.files |= {name: {**file, "data": file["data"].encode()} for name, file in state["files"].items()}
    server.batches |= {name: {**batch, "status": "in_progress"} for name, batch in state["batches"].items()}
    return asking


def test_a_folder_of_an_earlier_version_goes_on_without_a_new_request(kept, server):
    before, submitted = kept.path.read_bytes(), set(server.batches)
    whole = before[: before.rindex(b'{"image_id": "train/joy/00009.png", "kind": "categorical"')]
    server.batch_seconds = 10**9
    with pytest.raises(EmonbError, match="2 batches with 7 images are not fetched yet"):
        kept.ask()
    assert ask(kept, patient=False) == ""
    assert "2 batches are under way at the server; the same command fetches them" in kept.said
    assert set(server.batches) == submitted
    server.batch_seconds = 0
    assert ask(kept) == ""
    assert kept.path.read_bytes().startswith(whole)
    kept.assert_complete(18)
    asked = Counter(row["image"] for row in items(server))
    assert (len(asked), set(asked.values())) == (8, {1})  # seven under way, one torn
    assert len(set(server.batches) - submitted) == 1
    assert not [row for row in server.log if row["path"].endswith("completions")]
    assert [t["asked_of"] for t in kept.accepted] == ["gpt-4.1"] * 18
    assert sum(r["usage"] is not None for r in kept.rejected) == 9


def test_an_unfinished_log_of_an_earlier_version_goes_on(kept, server):
    kept.path.with_name("small.batches.json").unlink()
    assert kept.ask() == ""
    kept.assert_complete(18)
    assert server.paid == len(server.log) == 8
    told = [row for row in server.log if "could not be used" in row.get("text", "")]
    assert len(told) == 1  # of joy/00009 it is known why its answer before the torn one was rejected
    assert kept.ask(max_cost=0.05) == ""  # what was spent then is known
