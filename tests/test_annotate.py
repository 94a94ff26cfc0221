"""Room 02: asking a loopback server through the SDK: faults, limits, money, kills, secrets, files."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
from annotating import KEY, Asking, asked_of, completion, read_lines
from openai_server import CONTENT, error
from typer.testing import CliRunner

from emonb.annotate.ask import connect, server_address
from emonb.annotate.log import Answers
from emonb.cli import app
from emonb.errors import EmonbError
from emonb.machine import settle
from emonb.settings import TripletSettings

FAULTS = {"rate_limit": 0.05, "server_error": 0.03, "unavailable": 0.02, "stall": 0.01, "cut": 0.03, "bad_body": 0.02,
          "malformed": 0.02, "refusal": 0.02, "refusal_text": 0.02, "wrong_schema": 0.02, "length": 0.01,
          "empty": 0.01, "names_emotion": 0.02, "duplicate": 0.01, "filter": 0.01}  # fmt: skip
USD = (245 * 2 + 90 * 8) / 1e6  # of an answer of the loopback server


@pytest.fixture
def small(tmp_path):
    return Asking(tmp_path, 24)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def text(number, words="stone door lamp field"):
    """An answer that fits the schema, another one for each number."""
    said = " ".join(random.Random(number).choices(("amber", "brass", "cedar", "delta", "ember", "flint"), k=30))
    return json.dumps({"conversation": f"{said} {words}", "reasoning": f"{said[::-1]} {words}", "key_elements": []})


def question(request):
    return request["messages"][1]["content"][1]["text"]


def test_every_image_gets_its_triplets(small, monkeypatch):
    with asked_of(monkeypatch) as server:
        assert small.ask() == ""
        small.assert_complete()
        assert all(row["media_ok"] for row in server.log)
        usage = [triplet["usage"] for triplet in read_lines(small.path) if triplet["usage"]]
        assert sum(u["prompt_tokens"] + u["completion_tokens"] for u in usage) == sum(r["tokens"] for r in server.log)
        assert {(t["model"], t["asked_of"]) for t in small.accepted} == {("gpt-4.1", "gpt-4.1")}
        assert "24 of 24 training images have triplets" in small.said[-1]
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert small.ask() == small.ask(batch=True) == ""  # nothing is missing, nothing is asked


def test_500_images_with_30_percent_faults(tmp_path, monkeypatch):
    many = Asking(tmp_path, 500)
    with asked_of(monkeypatch, faults=FAULTS, stall_s=3) as server:
        assert many.ask(concurrency=16, timeout_s=2) == ""
    counted = Counter(row["outcome"] for row in server.log)
    assert set(FAULTS) <= set(counted)
    last = {row["image"]: row["outcome"] for row in server.log}
    assert len(last) == 500
    assert [*last.values()].count("good") == counted["good"]  # none is asked again after a good answer
    accepted, rejected = many.accepted, many.rejected
    assert len(accepted) >= 495
    assert len({r["image_id"] for r in [*accepted, *rejected]}) == 500  # each has its triplets or a reason
    # Every paid answer is in one of the files, and no unpaid one.
    assert len(accepted) + sum(r["usage"] is not None for r in rejected) == server.paid
    reasons = Counter(r["reason"] for r in rejected)
    content = sum(counted[kind] for kind in CONTENT)
    assert content - 1 <= reasons.total() - reasons["no answer"] <= content
    assert reasons["near-duplicate"] >= counted["duplicate"] - 1  # the first of them is like no other


def test_kills_lose_at_most_the_requests_in_flight(tmp_path, monkeypatch):
    asking = Asking(tmp_path, 250)
    rng, before = random.Random(0), set()
    with asked_of(monkeypatch, latency_s=0.1) as server:
        for _ in range(10):
            size = asking.path.stat().st_size if asking.path.is_file() else 0
            process = os.fork()
            if not process:
                asking.ask(concurrency=8)
                os._exit(0)
            while (asking.path.stat().st_size if asking.path.is_file() else 0) <= size:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(process, signal.SIGKILL)
            assert os.waitpid(process, 0)[1] == signal.SIGKILL
            done = {triplet["image_id"] for triplet in asking.accepted}
            assert before < done  # nothing that was there is lost
            before = done
        time.sleep(0.3)  # what was in flight is in the server's log
        asked = len(server.log)
        server.latency_s = 0.0
        assert asking.ask() == ""
        asking.assert_complete(250)
        assert len(server.log) - asked == 250 - len(before)  # the last run asked for exactly what was missing
        assert server.paid - 250 <= 10 * 8


@pytest.fixture
def settled():
    """A process as the command line makes it; its signals are given back."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGHUP)]
    settle()
    yield
    for handled in before:
        signal.signal(*handled)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_what_is_paid(small, monkeypatch, settled, how):
    with asked_of(monkeypatch, latency_s=0.3) as server:
        threading.Timer(0.5, signal.raise_signal, (how,)).start()
        with pytest.raises(KeyboardInterrupt):
            small.ask(concurrency=4)
        assert any("images that are paid for" in line for line in small.said)
        assert 0 < len(small.accepted) == server.paid < 24
        server.latency_s = 0.0
        assert small.ask() == ""
    small.assert_complete()


def test_a_limit_on_the_cost_is_kept(small, monkeypatch):
    with asked_of(monkeypatch) as server:
        assert "raise --max-cost" in small.ask(max_cost=0.02, concurrency=4)
        first = len(small.accepted)
        assert 8 <= first < 24
        assert server.paid * USD < 0.02 < (server.paid + 8) * USD
        assert small.ask(max_cost=0.02)  # the limit counts what was spent before
        assert len(server.log) == first
        assert small.ask(max_cost=5.0) == ""
        assert len(server.log) == 24


def test_attempts_without_an_answer_count_as_spent(small, monkeypatch):
    """A provider may bill what it wrote after our time-out."""
    with asked_of(monkeypatch, faults={"stall": 1.0}, max_faults_per_image=1, stall_s=0.4) as server:
        terms = {"max_cost": 0.03, "concurrency": 3, "timeout_s": 0.15}
        assert "raise --max-cost" in small.ask(**terms)
    with Answers.opened(small.samples, ["fear"], small.path, TripletSettings(**terms)) as answers:
        most, spent = answers.most_usd, answers.spent["usd"]
    stalled = sum(row["outcome"] == "stall" for row in server.log)
    assert 2 <= stalled < 6
    assert spent + stalled * most <= 0.03


def test_no_credit_left_ends_the_run_and_the_next_goes_on(small, monkeypatch):
    with asked_of(monkeypatch, quota_after=7) as server:
        with pytest.raises(EmonbError, match=r"exceeded your current quota.*add credit"):
            small.ask(concurrency=3)
        assert len(small.accepted) == 7
        assert sum(row["outcome"] == "quota" for row in server.log) <= 3  # not retried
        server.quota_after = float("inf")
        assert small.ask() == ""
        small.assert_complete()


def test_limits_per_minute_are_kept(small, monkeypatch):
    monkeypatch.setattr("emonb.annotate.ask._MINUTE", 1.0)
    with asked_of(monkeypatch) as server:
        for terms in ({"requests_per_minute": 20}, {"tokens_per_minute": 30_000}):
            server.log.clear()
            small.path.unlink(missing_ok=True)
            small.ask(**terms)
            times = sorted(row["t"] for row in server.log)
            assert 1.0 < times[-1] - times[0] < 4
            assert max(sum(t <= other < t + 0.8 for other in times) for t in times) <= 20
            small.assert_complete()


def test_retry_after_holds_for_all(small, monkeypatch):
    def answer(number, _):
        busy = error(429, "slow down", "rate_limit_exceeded", wait=0.4 if number > 12 else 600)
        return busy if number <= 4 or number == 13 else completion(text(number))

    monkeypatch.setattr("emonb.annotate.ask._LONGEST", 0.5)
    with asked_of(monkeypatch, answer=answer) as server:
        small.ask(concurrency=4, near_duplicate=1.0)
        small.assert_complete()
    times = [row["t"] for row in server.log]
    assert len(times) == 29
    assert times[4] - times[0] >= 0.5
    assert max(b - a for a, b in itertools.pairwise(times[12:18])) >= 0.35  # not one but all have waited


def test_a_server_that_goes_away_is_said_once(small, monkeypatch):
    with asked_of(monkeypatch, down_after=2) as server:
        with pytest.raises(EmonbError, match=r"127.0.0.1: Connection error.*; start again to go on"):
            small.ask(concurrency=4, transport_retries=1)
        assert len(small.accepted) == 2
        assert {r["reason"] for r in small.rejected} == {"no answer"}
        server.down_after = float("inf")
        assert small.ask() == ""
    small.assert_complete()


@pytest.mark.parametrize(
    ("config", "form"),
    [({"schemas": False}, "sections"), ({"ignore_schemas": True}, "schema"), ({"limit_name": "max_tokens"}, "schema"),
     ({"limit_name": "max_completion_tokens"}, "schema"), ({"usage": False}, "schema")],
)  # fmt: skip
def test_what_the_server_can_do_is_found(small, monkeypatch, config, form):
    with asked_of(monkeypatch, **config) as server:
        assert small.ask(concurrency=2) == ""
        small.assert_complete()
        assert {t["answer_format"] for t in small.accepted} == {form}
        assert len(server.log) - 24 <= 2
        if config == {"usage": False}:  # the most that it can be
            assert all(t["usage"]["prompt_tokens"] > 500 for t in small.accepted)


def test_a_model_that_keeps_to_no_form_is_asked_one_question_a_request(small, monkeypatch):
    def answer(number, request):
        asked = question(request)
        return completion("nonsense" if "Write three things" in asked else f"{asked} {text(number)}")

    with asked_of(monkeypatch, answer=answer) as server:
        for _ in range(2):  # those that failed in the first forms are asked by the next run
            assert small.ask(concurrency=1, retries=0, near_duplicate=1.0) == ""
    assert {t["answer_format"] for t in small.accepted} == {"questions"}
    assert [r["answer_format"] for r in small.rejected] == ["schema"] * 3 + ["sections"] * 3
    assert len(server.log) == 6 + 2 * 24  # an unread answer is no try in another form


def test_half_an_image_that_is_paid_for_is_recorded(small, monkeypatch):
    def answer(number, request):
        first = any(words in question(request) for words in ("visual elements", "Describe", "look at first"))
        return completion("a stone and a lamp on a wide field of grass") if first else error(400, "not this", "no")

    with asked_of(monkeypatch, answer=answer):
        small.ask(answer_format="questions")
    assert len(small.rejected) == 24
    assert all(r["usage"] and "not this" in r["detail"] for r in small.rejected)


def test_rejected_answers_are_asked_again_with_the_reason_told(small, monkeypatch):
    told = Counter()

    def answer(number, request):
        told.update(["again" if "too short (reasoning" in question(request) else "first"])
        short = {"conversation": "a stone door and a lamp in the field", "reasoning": "Dark.", "key_elements": []}
        return completion(text(number) if "could not be used" in question(request) else json.dumps(short))

    with asked_of(monkeypatch, answer=answer):
        small.ask(near_duplicate=1.0)
    assert told == {"first": 24, "again": 24}
    assert {r["reason"] for r in small.rejected} == {"too short"}
    small.assert_complete()


ODD = {  # whether it is accepted, answer
    "a lone surrogate": (True, lambda n: completion(text(n).replace("stone", "\ud83d"))),
    "no choice": (False, lambda n: completion("", choices=[])),
    "odd counts": (True, lambda n: completion(text(n), usage={"prompt_tokens": "many"})),
    "negative counts": (True, lambda n: completion(text(n), usage={"prompt_tokens": -5, "completion_tokens": 1})),
    "deep": (False, lambda n: completion('{"conversation": ' + "[" * 50_000)),
    "html": (True, lambda n: completion(text(n, "<script>alert(1)</script> $x$ \x1b[2J"))),
}


@pytest.mark.parametrize(("good", "answer"), ODD.values(), ids=ODD)
def test_an_odd_answer_is_written_down_and_nothing_breaks(small, monkeypatch, good, answer):
    with asked_of(monkeypatch, answer=lambda number, _: answer(number)) as server:
        while small.ask(near_duplicate=1.0, retries=0, answer_format="schema"):
            pass  # empty ones end a run
        assert len(small.accepted) + len(small.rejected) == server.paid == 24
        assert all(r["usage"]["prompt_tokens"] > 0 for r in [*small.accepted, *small.rejected])
    for path in small.path.parent.glob("*.jsonl"):
        path.read_text(encoding="utf-8")
    assert len(small.accepted) == 24 * good


def test_images_that_a_server_refuses_do_not_block_the_others(small, monkeypatch):
    refused = Counter()

    def answer(number, request):
        picture = str(request["messages"][1]["content"][0])
        if "anger" in question(request) or len(refused) < 12:
            refused[picture] += 1
            return error(400, "content policy", "policy")
        return completion(text(number))

    with asked_of(monkeypatch, answer=answer):
        small.ask(near_duplicate=1.0, concurrency=2)
    assert len(small.accepted) == 24 - len(refused)
    assert set(refused.values()) == {1}


def test_answers_of_another_model_are_not_mixed_in(small, monkeypatch):
    with asked_of(monkeypatch, answer=lambda number, _: completion("nonsense")) as server:
        with pytest.raises(EmonbError, match=r"price of tiny-local, .* unknown.*--price IN,OUT .*--no-price .*or add"):
            small.ask(model="tiny-local")
        with pytest.raises(EmonbError, match="max_cost: is not kept without a price"):
            small.ask(model="tiny-local", price="none", max_cost=5.0)
        assert not server.log
        assert "raise --max-cost" in small.ask(model="tiny-local", price="1000,9000", retries=0, max_cost=5.0)
        small.ask(model="tiny-local", price="none", retries=0, answer_format="schema")
        assert "price unknown" in small.said[-1]
    with asked_of(monkeypatch):  # what another model failed at does not count
        with pytest.raises(EmonbError, match=r"price of gpt-4.1, or of a model that answered before, is unknown"):
            small.ask(retries=0)
        small.ask(retries=0, price="none")
        small.assert_complete()
        assert {t["answer_format"] for t in small.accepted} == {"schema"}
        with pytest.raises(EmonbError, match=r"holds answers of gpt-4.1 .*now asked is gpt-4o.*triplets.mix"):
            small.ask(model="gpt-4o", price="none")
        lines = small.path.read_text().splitlines(keepends=True)
        small.path.write_text("".join(lines[:30]))
        small.ask(model="gpt-4o", mix=True, price="none")
        assert {t["asked_of"] for t in small.accepted} == {"gpt-4.1", "gpt-4o"}


def ended(finish_reason, **message):
    return completion("", choices=[{"finish_reason": finish_reason, "message": message}])


SHORT = json.dumps({"conversation": "A dog.", "reasoning": "It barks.", "key_elements": []})
USELESS = {  # body of an answer, and the reason told
    "empty": (completion(""), "8 answers in a row were empty"),
    "only thoughts": (completion("<think>hm"), r"empty \(only thoughts came; raise triplets.max_output_tokens"),
    "refused": (ended("stop", refusal="I can't."), r"were refused \(I can't"),
    "filtered": (ended("content_filter"), "server's content filter"),
    "filtered, as an error": (error(400, "triggered a policy", "content_filter"), r"refused \(triggered"),
    "cut": (ended("length", content="A"), "were cut off"),
}


@pytest.mark.parametrize(("body", "reason"), USELESS.values(), ids=USELESS)
def test_eight_useless_answers_in_a_row_end_the_run(small, monkeypatch, body, reason):
    good = iter([True] * 3)  # of an earlier run: a server that answers others may refuse some images
    with asked_of(monkeypatch, answer=lambda n, _: completion(text(n)) if next(good, False) else body) as server:
        for asked in (11, 8):
            before = len(server.log)
            assert re.search(reason, small.ask(concurrency=1, near_duplicate=1.0))
            assert len(server.log) - before == asked
        assert len(small.accepted) == 3
        assert len(small.rejected) == 16
        assert "stopped: 8 answers in a row" in small.said[-1]
        before = len(server.log)
        assert small.ask(concurrency=4)
        assert len(server.log) - before <= 8 + 3  # and what was under way


@pytest.mark.parametrize(("concurrency", "retries", "most"), [(1, 2, 12), (8, 2, 16 + 7), (1, 0, 8), (8, 0, 8 + 7)])
@pytest.mark.parametrize("said", [SHORT, text(1), "nonsense"], ids=["too short", "near-duplicate", "unread"])
def test_a_check_that_answers_fail_again_and_again_ends_the_run(small, monkeypatch, said, concurrency, retries, most):
    with asked_of(monkeypatch, answer=lambda *_: completion(said)) as server:
        stopped = small.ask(concurrency=concurrency, retries=retries, answer_format="schema")
        assert re.match("8 answers in a row were (too short|near-duplicate|not in the asked form) .*", stopped)
        assert server.paid <= most + 1


def test_checks_that_fail_now_and_then_end_nothing(small, monkeypatch):
    told = "could not be used"
    for answer in (lambda n, r: told in question(r) or n % 9 == 0, lambda n, _: random.Random(n).random() < 0.5):
        good = lambda n, r, answer=answer: completion(text(n) if answer(n, r) else SHORT)  # noqa: E731
        with asked_of(monkeypatch, answer=good):
            small.path.unlink(missing_ok=True)
            small.path.with_name("small.rejected.jsonl").unlink(missing_ok=True)
            assert small.ask(near_duplicate=1.0, retries=5) == ""
            small.assert_complete()


@pytest.mark.parametrize("batch", [False, True])
def test_a_run_without_one_usable_answer_is_no_success(small, monkeypatch, batch):
    bodies = [completion(SHORT), completion(text(1).replace("stone", "fear sad joy anger surprise disgust"))]
    with asked_of(monkeypatch, answer=lambda n, _: bodies[n % 2]):
        stopped = small.ask(batch=batch, retries=1, concurrency=1)
    assert re.match(r"not one answer could be used, see triplets/; choose another|8 answers in a row", stopped)
    assert not small.path.exists()


def test_useless_answers_of_several_kinds_or_with_others_between_end_nothing(small, monkeypatch):
    useless = ("I'm sorry, I can't help with it.", "")
    with asked_of(monkeypatch, answer=lambda n, _: completion(useless[n % 2] if n % 8 else text(n))):
        assert small.ask(concurrency=1, near_duplicate=1.0, retries=0) == ""


ADDRESSES = """
http://localhost:8000/v1 < localhost:8000 | localhost:8000/v1 | http://localhost:8000 | http://localhost:8000/v1//
http://127.0.0.1:9/v1 < 127.0.0.1:9
http://[::1]:8000/v1 < [::1]:8000
https://h/v1 < h/v1 | https://h | "https://h/v1" | 'h' | <https://h/v1> | \u201chttps://h/v1\u201d | https://h/v1/models/
https://h/api/v1 < https://h/api/v1 | h/api/v1/chat/completions
http://me:pw@host:8/v1 < me:pw@host:8/v1
 < ws://h | http:/h | http//h | http:// | /v1 | http://a b/v1 | http://h:99999 | http://h:port | file:///x | http://h?x=1
 < None | null | $MY_URL | ${MY_URL}/v1 | https://<host>/v1 | http://h..i/v1 | http://h/v1,http://i/v1 | http://h/\x01
"""


ENDS = {  # what a server says: requests until the end, status, error
    "add credit, and start again": (
        *((402, {"message": "Insufficient Balance"}), (429, {"message": "no", "type": "insufficient_quota"})),
        *(
            (429, {"message": "no", "code": "insufficient_quota"}),
            (400, {"message": "Your credit balance is too low"}),
        ),
    ),
    "sees no pictures; choose another with --model": (
        *((400, {"message": "this model does not support image input"}), (400, {"message": "text-only model"})),
        *((404, {"message": "No endpoints found that support image input"}), (400, {"message": "At most 0 image(s)"})),
        *((500, {"message": "image input is not supported"}), (422, {"message": "content must be a string"})),
    ),
}


@pytest.mark.parametrize(("remedy", "said"), [(remedy, said) for remedy, some in ENDS.items() for said in some])
def test_what_no_other_try_mends_is_said_at_once(small, monkeypatch, remedy, said):
    with asked_of(monkeypatch, answer=lambda *_: (said[0], {"error": said[1]})) as server:
        with pytest.raises(EmonbError, match=rf"{re.escape(said[1]['message'])}; .*{remedy}"):
            small.ask(concurrency=1)
        assert len(server.log) == 1


def test_an_error_that_comes_as_an_answer_is_shown_in_the_servers_words(small, monkeypatch):
    error = pytest.raises(EmonbError, match=r"127.0.0.1: the server says: model is loading; start again")
    with asked_of(monkeypatch, answer=lambda *_: (200, {"error": {"message": "model is loading"}})), error:
        small.ask()


def test_what_stands_between_us_and_the_server_is_named(small, monkeypatch, tmp_path):
    monkeypatch.setattr("emonb.annotate.ask._BACKOFF", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "https://no-such-host.invalid/v1")
    with pytest.raises(EmonbError, match=r"no-such-host.invalid: Connection error. .*ConnectError .*; start again"):
        small.ask()
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(
        EmonbError, match=r"asked through HTTPS_PROXY http://127.0.0.1:9; correct or unset it, or .* NO_PROXY"
    ):
        small.ask()
    monkeypatch.delenv("HTTPS_PROXY")
    (tmp_path / "empty.pem").touch()
    for file in (tmp_path / "empty.pem", "/nope.pem"):
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        with pytest.raises(EmonbError, match=r"SSL_CERT_FILE .*: no certificates there .*; correct or unset it"):
            small.ask()


@pytest.mark.parametrize(
    "around", ['"{}"', "OPENAI_API_KEY={}", "export OPENAI_API_KEY='{}'", " Bearer {}\n", "\ufeff{}"]
)
def test_a_key_is_taken_as_it_was_meant_and_never_shown(small, monkeypatch, around):
    key = "abcd-0123456789"  # without the prefix that tells a key
    with asked_of(monkeypatch, api_key=key) as server:
        monkeypatch.setenv("OPENAI_API_KEY", around.format(key))
        assert small.ask() == ""
        server.api_key, server.answer = None, lambda *_: error(400, f"bad key {key}", "no")
        small.path.unlink()
        with pytest.raises(EmonbError, match=r"bad key \[key\]"):
            small.ask()


CONTRADICTIONS = {
    "leave out one of them": ("--price", "1,2", "--no-price"),
    "is blank; name a vision model": ("--model", " "),
    "is blank; name a vision": ("--model", ""),
    "--estimate, --import": ("--estimate", "--import", "a.json"),
}


def test_the_command_line_refuses_contradictions_and_calls_nothing_no_success(tmp_path, monkeypatch):
    def call(*options):
        (tmp_path / "p.yaml").write_text("from: smoke\nworld: {mikels8: [16, 8, 8]}\n")
        given = (
            "triplets",
            "--dataset",
            "mini-fi",
            "--profile",
            str(tmp_path / "p.yaml"),
            "--out",
            str(tmp_path / "o"),
        )
        return CliRunner().invoke(app, [*given, "--annotator", "openai", *options])

    with asked_of(monkeypatch, answer=lambda n, _: completion(SHORT)) as server:
        for said, options in CONTRADICTIONS.items():
            assert said in str(call(*options).exception)
        assert not server.log
        for _ in range(3):
            ended = call("--concurrency", "1")
            assert (ended.exit_code, "no triplets yet" in ended.stdout) == (3, True)


def test_what_a_command_was_stopped_at_its_own_end_does_not_go_past(tmp_path, monkeypatch):
    profile = "from: smoke\nworld: {mikels8: [16, 8, 8]}\ntriplets: {annotator: openai, concurrency: 1}\n"
    (tmp_path / "p.yaml").write_text(profile)
    where = ("--dataset", "mini-fi", "--profile", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "o"))
    with asked_of(monkeypatch) as server:
        ended = CliRunner().invoke(app, ["triplets", *where, "--max-cost", "0.02"])
        assert (ended.exit_code, "limit of $0.02" in ended.stdout) == (3, True), ended.stdout
        assert 0 < len(server.log) < 16, "the profile, whose limit is higher, is not asked on"


def test_addresses_of_servers_as_people_write_them(small, monkeypatch):
    lines = [line.split(" < ") for line in ADDRESSES.splitlines() if line]
    for meant, given in ((meant, given) for meant, written in lines for given in written.split(" | ")):
        monkeypatch.setenv("OPENAI_BASE_URL", f" {given} ")
        if meant:
            assert server_address() == meant, given
            continue
        with pytest.raises(EmonbError, match=r"OPENAI_BASE_URL: .* is no address of a server; write it up to"):
            small.ask()


@pytest.mark.parametrize("proxy", ["socks5://me:secret@[::1]:9", "socks://[::1]:9", "ht!tp://x", "http://x:abc"])
def test_proxies_that_cannot_be_used_are_one_line_at_once(small, monkeypatch, proxy):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(EmonbError, match=r"all_proxy: this proxy cannot be used .*unset") as caught:
        small.ask()
    assert "secret" not in str(caught.value)
    assert ("httpx[socks]" in str(caught.value)) == ("socks5" in proxy)
    with asked_of(monkeypatch):  # a server of this machine is asked past it
        assert small.ask() == ""
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.setenv("NO_PROXY", "api.openai.com")
    connect(TripletSettings()).close()


def test_a_page_instead_of_answers_or_nobody_there_is_said_after_few_requests(small, monkeypatch):
    with asked_of(monkeypatch, answer=lambda *_: (200, b"<html>Sign in to the campus network</html>")) as server:
        with pytest.raises(EmonbError, match=r"127.0.0.1: .* not a chat completion; set OPENAI_BASE_URL up to"):
            small.ask(concurrency=2)
        assert len(server.log) <= 6
    start = time.monotonic()
    with pytest.raises(EmonbError, match=r"127.0.0.1: Connection error"):
        small.ask()
    assert time.monotonic() - start < 3
    assert not small.accepted


def test_an_unreadable_picture_is_left_out_with_its_reason(tmp_path, monkeypatch):
    asking = Asking(tmp_path, 12)
    os.truncate(asking.samples["path"][3], 60)
    with asked_of(monkeypatch):
        assert asking.ask() == ""
    assert len(asking.accepted) == 11
    assert asking.rejected[0]["detail"].startswith("[path]: not a readable picture")


MODEL = "/home/somebody/models/qwen"


def test_neither_key_nor_path_gets_out(small, monkeypatch):
    with pytest.raises(EmonbError, match=r"OPENAI_API_KEY is not set: .*--annotator offline"):
        small.ask()
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    for key in ("sk-abc def", "sk-abc\ndef", "sk-äöü"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(EmonbError, match="odd characters") as caught:
            small.ask()
        assert "abc" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert connect(TripletSettings()).base_url.host == "api.openai.com"  # an empty address means the default
    with asked_of(monkeypatch, api_key="another") as server:  # its message repeats the key
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url.replace("//", "//me:pass-word@"))
        with pytest.raises(EmonbError, match="set a valid key") as caught:
            small.ask(model=MODEL, price="none")
        shown = "".join(traceback.format_exception(caught.value))
        server.api_key = None
        said = "temperature must be 1; key {} in /srv/private/models, {}".format(KEY, Path.home() / "x")
        server.answer = lambda *_: error(400, said, "no")
        with pytest.raises(EmonbError, match=r"temperature must be 1; key .key. in .path.") as caught:
            small.ask(model=MODEL, price="none")
        shown += "".join(traceback.format_exception(caught.value))
        server.answer = None
        small.ask(model=MODEL, price="none")
    written = "".join(path.read_text() for path in small.path.parent.glob("*.jsonl"))
    assert {t["asked_of"] for t in small.accepted} == {"qwen"}
    folder = str(Path(small.samples["path"][0]).parent)
    for secret in (KEY, "pass-word", "bWU6cGFzcy13b3Jk", "/srv/private", "somebody", folder):
        assert secret not in "\n".join([shown, written, *small.said]), secret


def test_a_full_disk_is_said_and_leaves_whole_lines(small, monkeypatch):
    synced = Counter()

    def fsync(handle):
        synced["times"] += 1
        if synced["times"] == 7:
            raise OSError(28, "No space left on device")

    with asked_of(monkeypatch):
        with monkeypatch.context() as patched:
            patched.setattr("emonb.annotate.log.os.fsync", fsync)
            with pytest.raises(EmonbError, match=r"cannot write; make room"):
                small.ask()
        assert small.path.read_bytes().endswith(b"\n")
        assert synced["times"] >= 7  # each answer is put on disk by itself
        assert small.ask() == ""
    small.assert_complete()


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Three images with triplets."""
    asking = Asking(tmp_path, 3)
    with asked_of(monkeypatch):
        asking.ask()
    return asking


def reopened(asking):
    with Answers.opened(asking.samples, ["fear"], asking.path, TripletSettings()) as answers:
        return answers


def test_every_cut_of_the_file_costs_its_last_answer_alone(written):
    whole = written.path.read_bytes()
    ends = [whole.index(b"\n", whole.index(b'"reasoning"', i)) for i in (0, len(whole) // 3, 2 * len(whole) // 3)]
    for cut in (*range(0, len(whole), 311), len(whole)):
        written.path.write_bytes(whole[:cut])
        assert len(reopened(written).done) == sum(cut >= end for end in ends), cut
    written.path.write_bytes(whole + b"\0" * 4096)  # after a power cut
    assert len(reopened(written).done) == 3
    assert written.path.read_bytes() == whole
    rejected = written.path.with_name("small.rejected.jsonl")
    rejected.write_bytes(b'{"image_id": "a", "reason": "empty"}\n{"image_')
    assert "rejected: empty 1" in str(reopened(written))


OTHER_FORMS = {
    "a list in one line": lambda data: b"[" + b",".join(data.splitlines()) + b"]",
    "a list": lambda data: b"[\n" + b",\n".join(data.splitlines()) + b"\n]",
    "CR": lambda data: data.replace(b"\n", b"\r"),
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "blanks for line ends": lambda data: data.replace(b"\n", b" "),
    "indented": lambda data: json.dumps(json.loads(data.splitlines()[0]), indent=2).encode(),
}


@pytest.mark.parametrize("change", OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_paid_answers_in_another_form_are_left_alone(written, monkeypatch, change):
    data = change(written.path.read_bytes())
    written.path.write_bytes(data)
    with asked_of(monkeypatch) as server:
        with pytest.raises(EmonbError, match=r"triplets/small.jsonl: is not one JSON object a line .*; save it so"):
            written.ask()
        assert (server.log, written.path.read_bytes()) == ([], data)


@pytest.mark.parametrize("change", [bytes.strip, lambda data: b"\xef\xbb\xbf" + data.strip().replace(b"\n", b"\r\n")])
def test_a_last_line_that_lacks_its_end_alone_is_kept(written, monkeypatch, change):
    lines = written.path.read_bytes().splitlines(keepends=True)
    for order in (lines, lines[::-1], sorted(lines, key=lambda line: json.loads(line)["kind"])):
        written.path.write_bytes(change(b"".join(order)))
        with asked_of(monkeypatch) as server:
            assert written.ask() == ""
            assert server.log == []
    written.path.write_bytes(lines[0].strip())  # the first of three that a killed run was to write
    assert not reopened(written).done


@pytest.mark.parametrize("name", ["small.jsonl", "small.rejected.jsonl", "small.batches.json", "small.unassigned.txt"])
def test_a_folder_in_the_place_of_a_file_is_said_before_anything_is_paid(small, monkeypatch, name):
    (small.path.parent / name).mkdir(parents=True)
    with asked_of(monkeypatch) as server:
        with pytest.raises(EmonbError, match=rf"triplets/{name}: cannot be written \(it is no file\); move it away"):
            small.ask()
        assert not server.log


@pytest.mark.parametrize("usage", ["y", [1], {"prompt_tokens": "z"}, {"prompt_tokens": -1, "completion_tokens": 2}, 7])
def test_a_usage_that_cannot_be_is_counted_as_the_most(written, usage):
    for path in (written.path, written.path.with_name("small.rejected.jsonl")):
        lines = read_lines(path) or [{"image_id": "a", "reason": "empty", "asked_of": "gpt-4.1", "usage": {}}]
        lines = [{**line, "usage": usage} if "usage" in line and line["usage"] is not None else line for line in lines]
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    answers = reopened(written)
    assert answers.spent["usd"] == pytest.approx(4 * answers.most_usd, rel=0.2)
    path.write_text('{"image_id": ["a"], "reason": "empty"}\n')
    with pytest.raises(EmonbError, match=r"small.rejected.jsonl, line 1: field image_id is .*; delete the line"):
        reopened(written)


def test_damage_in_the_middle_is_named_not_guessed(written):
    lines = written.path.read_bytes().split(b"\n")
    lines[4] = lines[4][:20]
    written.path.write_bytes(b"\n".join(lines))
    for _ in range(2):  # and the lock is free again
        with pytest.raises(EmonbError, match=r"triplets/small.jsonl, line 5: not JSON .*delete the line"):
            reopened(written)
    written.path.with_name("small.rejected.jsonl").write_text('{"image_id": "a"}\n')
    written.path.unlink()
    with pytest.raises(EmonbError, match=r"small.rejected.jsonl, line 1: field"):
        reopened(written)


def test_two_writers_would_pay_twice_and_offline_triplets_give_way(written):
    held = Answers.opened(written.samples, ["fear"], written.path, TripletSettings())
    with held, pytest.raises(EmonbError, match="another process is asking"):
        reopened(written)
    written.path.write_text(written.path.read_text().replace('"openai"', '"offline"'))
    assert not reopened(written).done
    assert not written.path.exists()
