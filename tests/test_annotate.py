"""Room 02: asking a real (loopback) server through the SDK: faults, limits, money, kills, secrets."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from annotating import KEY, make_pictures, opened, read_lines, write_profile
from openai_server import CONTENT, serve

from emonb import annotate as module
from emonb.annotate import annotate
from emonb.annotation import Annotation
from emonb.answer_log import rejected_path
from emonb.errors import EmonbError
from emonb.settings import TripletSettings
from emonb.store import Store
from emonb.transport import Server, read_completion
from emonb.triplet_tables import source_note
from emonb.triplets import KINDS, read_triplets, triplets_stage

FAULTS = {"rate_limit": 0.05, "server_error": 0.03, "unavailable": 0.02, "stall": 0.01, "cut": 0.03, "bad_body": 0.02,
          "malformed": 0.02, "refusal": 0.02, "refusal_text": 0.02, "wrong_schema": 0.02, "length": 0.01,
          "empty": 0.01, "names_emotion": 0.02, "duplicate": 0.01, "filter": 0.01}  # fmt: skip
assert round(sum(FAULTS.values()), 2) == 0.30


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders of 24 and of 500 training pictures."""
    root = tmp_path_factory.mktemp("images")
    make_pictures(root, 24)
    return make_pictures(root, 500, "large")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Starts a server; the environment points at it."""
    started = []

    def start(**config):
        folder = tmp_path / f"server{len(started)}"
        folder.mkdir()
        context = serve(folder, **config)
        started.append(context)
        running = context.__enter__()
        monkeypatch.setenv("OPENAI_BASE_URL", running.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        return running

    yield start
    for context in started:
        context.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def ask(settings, samples, dataset="small", **options):
    said = []
    return annotate(settings, samples, dataset, say=said.append, **options), said


def by_image(log, path="/v1/chat/completions"):
    outcomes = defaultdict(list)
    for row in log:
        if row["path"].startswith(path) and row.get("image"):
            outcomes[row["image"]].append(row["outcome"])
    return outcomes


def assert_complete(path: Path, images: int) -> None:
    kinds = defaultdict(list)
    for triplet in read_lines(path):
        kinds[triplet["image_id"]].append(triplet["kind"])
    assert len(kinds) == images
    assert all(tuple(found) == KINDS for found in kinds.values())


def test_every_image_gets_its_triplets(tmp_path, images, server):
    running = server()
    settings, samples, path = opened(tmp_path, images)
    summary, _ = ask(settings, samples)
    assert (summary.accepted, summary.missing, summary.answers, summary.stopped) == (24, 0, 24, "")
    assert_complete(path, 24)
    log = running.log()
    assert all(row["media_ok"] and row["authorization_ok"] for row in log)
    usage = [t["usage"] for t in read_lines(path) if t["usage"]]
    billed = sum(u["prompt_tokens"] + u["completion_tokens"] for u in usage)
    assert billed == sum(row["tokens"] for row in log)
    assert {t["model"] for t in read_lines(path)} == {"gpt-4.1-2025-04-14"}
    estimate = module.estimate(settings, samples).set_index("part").loc["total"]
    # The server bills a picture as 85 tokens, the provider's rule says 255: of the same order, not equal.
    assert estimate["usd_low"] / 2 <= summary.usd <= estimate["usd_high"]
    ask(settings, samples)
    assert len(running.log()) == 24  # nothing is missing, nothing is asked


def test_the_artefact_is_in_the_samples_order_whatever_arrived_first(tmp_path, images, server):
    server(latency_s=0.02)
    settings, samples, path = opened(tmp_path, images, annotator="openai", concurrency=6)
    store = Store(settings.out_path / "artifacts")
    artifact = triplets_stage(settings, store, "small")
    frame = read_triplets(artifact.path / "triplets.jsonl")
    order = [row["image_id"] for row in module.iter_samples(samples, "train")]
    assert list(dict.fromkeys(frame["image_id"])) == order
    lines = path.read_text().splitlines(keepends=True)
    groups = [lines[i : i + 3] for i in range(0, len(lines), 3)]
    path.write_text("".join("".join(group) for group in reversed(groups)))
    again = triplets_stage(settings, store, "small")
    assert again.digest == artifact.digest


def test_500_images_with_30_percent_faults(tmp_path, images, server):
    running = server(faults=FAULTS, stall_s=5, seed=3)
    settings, samples, path = opened(tmp_path, images, "large", concurrency=16, timeout_s=1)
    summary, _ = ask(settings, samples, "large")
    assert summary.accepted + summary.given_up + summary.missing == 500
    rejected = read_lines(rejected_path(path))
    done = {t["image_id"] for t in read_lines(path)}
    left = {r["image_id"] for r in rejected} - done
    assert len(done) + len(left) == 500  # each has its triplets or a reason
    assert summary.accepted == len(done) >= 495
    log = running.log()
    outcomes = by_image(log)
    assert len(outcomes) == 500
    faults = Counter(outcome for found in outcomes.values() for outcome in found)
    assert set(FAULTS) <= set(faults)
    for found in outcomes.values():
        assert found.count("good") <= 1
        assert "good" not in found[:-1]  # none is asked again after a good answer
    # Every paid answer is in one of the files, and no unpaid one.
    paid = sum(row["paid"] for row in log if row.get("image"))
    recorded = [r for r in rejected if r["usage"]] + [t for t in read_lines(path) if t["usage"]]
    assert summary.answers == len(recorded) == paid
    content = sum(faults[kind] for kind in CONTENT)
    assert content - 1 <= sum(summary.reasons.values()) - summary.reasons.get("no answer", 0) <= content
    assert summary.reasons["near-duplicate"] >= faults["duplicate"] - 1  # the first of them is like no other


def test_20_kills_lose_at_most_the_requests_in_flight(tmp_path, images, server):
    running = server(latency_s=0.25, seed=5)
    profile = write_profile(tmp_path, timeout_s=5)
    _, _, path = opened(tmp_path, images, "large", timeout_s=5)
    command = [sys.executable, "-m", "emonb", "triplets", "--dataset", "large", "--profile", profile, "--annotator",
               "openai", "--concurrency", "8", "--images", str(images), "--out", str(tmp_path / "out")]  # fmt: skip
    rng = random.Random(0)
    before, kills = set(), 0
    while kills < 20:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        size = path.stat().st_size if path.is_file() else 0
        while process.poll() is None and (path.stat().st_size if path.is_file() else 0) <= size:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said.decode()
        kills += 1
        whole = path.read_bytes()
        done = {line["image_id"] for line in read_lines(path)} if whole.endswith(b"\n") else before
        assert before <= done  # nothing that was there is lost
        before = done
    time.sleep(0.5)  # what was in flight at the last kill is in the server's log
    asked_before = len(running.log())
    assert len(before) < 500
    running.configure(latency_s=0)
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert_complete(path, 500)
    log = [row for row in running.log() if row.get("image")]
    assert len(log) - asked_before == 500 - len(before)  # the last run asked for exactly what was missing
    lost = sum(row["paid"] for row in log) - 500
    assert lost <= 20 * 8  # at most the requests in flight, at each kill


def test_a_limit_on_the_cost_is_kept(tmp_path, images, server):
    running = server()
    settings, samples, path = opened(tmp_path, images, max_cost=0.03, concurrency=4)
    summary, _ = ask(settings, samples)
    assert 0 < summary.accepted < 24
    assert summary.usd <= 0.03
    assert "raise --max-cost" in summary.stopped
    asked = len(running.log())
    again, _ = ask(settings, samples)  # the limit counts what was spent before
    assert (again.accepted, len(running.log())) == (summary.accepted, asked)
    frame = read_triplets(
        triplets_stage(settings, Store(settings.out_path / "artifacts"), "small").path / "triplets.jsonl"
    )
    assert frame["image_id"].nunique() == summary.accepted  # what was paid for can be used
    more, samples, _ = opened(tmp_path, images, max_cost=5.0)
    assert ask(more, samples)[0].accepted == 24
    assert len(running.log()) == 24
    assert_complete(path, 24)


def test_a_limit_needs_a_price(tmp_path, images, server):
    server()
    settings, samples, _ = opened(tmp_path, images, max_cost=1.0, model="nobody-knows")
    with pytest.raises(EmonbError, match=r"price of 'nobody-knows' is unknown; add it to emonb/resources/prices.yaml"):
        ask(settings, samples)


def test_no_credit_left_ends_the_run_and_the_next_goes_on(tmp_path, images, server):
    running = server(quota_after=7)
    settings, samples, path = opened(tmp_path, images, concurrency=3)
    with pytest.raises(EmonbError, match="no credit left"):
        ask(settings, samples)
    assert len({t["image_id"] for t in read_lines(path)}) == 7
    assert sum(row["outcome"] == "quota" for row in running.log()) <= 3  # not retried
    running.configure(quota_after=None)
    assert ask(settings, samples)[0].accepted == 24


def test_limits_per_minute_are_the_server_s_own(tmp_path, images, server, monkeypatch):
    monkeypatch.setattr("emonb.pace.Pace.__init__.__defaults__", (0.6,))
    running = server(rpm=8, window_s=0.5)
    settings, samples, _ = opened(tmp_path, images, requests_per_minute=8, concurrency=8)
    assert ask(settings, samples)[0].accepted == 24
    assert Counter(row["outcome"] for row in running.log())["limited"] <= 2  # requests travel for different times
    times = sorted(row["t"] for row in running.log())
    assert times[-1] - times[0] >= 1.1  # 24 requests: three windows


def test_retry_after_is_honoured_by_all(tmp_path, images, server):
    running = server(rpm=10, window_s=1.0)
    settings, samples, _ = opened(tmp_path, images, concurrency=8)
    assert ask(settings, samples)[0].accepted == 24
    outcomes = Counter(row["outcome"] for row in running.log())
    assert outcomes["good"] == 24
    assert outcomes["limited"] <= 8 * 4  # told to wait, all wait: no hammering


def test_a_server_that_goes_away_is_said_once(tmp_path, images, server):
    running = server(down_after=5)
    settings, samples, path = opened(tmp_path, images, concurrency=4, transport_retries=1)
    with pytest.raises(EmonbError, match=r"10 images in a row got no answer.*start again"):
        ask(settings, samples)
    assert len({t["image_id"] for t in read_lines(path)}) == 5
    assert {r["reason"] for r in read_lines(rejected_path(path))} == {"no answer"}
    running.configure(down_after=None)
    assert ask(settings, samples)[0].accepted == 24


@pytest.mark.parametrize(
    ("config", "form"),
    [({"schemas": False}, "sections"), ({"ignore_schemas": True}, "sections"), ({}, "schema")],
    ids=["refused", "ignored", "done"],
)
def test_the_form_that_the_server_can_do_is_found(tmp_path, images, server, config, form):
    running = server(**config)
    settings, samples, path = opened(tmp_path, images, concurrency=2)
    assert ask(settings, samples)[0].accepted == 24
    assert {t["answer_format"] for t in read_lines(path)} == {form}
    wasted = len(running.log()) - 24
    assert wasted <= 4
    ask(settings, samples)
    assert len(running.log()) == 24 + wasted


@pytest.mark.parametrize("known", ["max_tokens", "max_completion_tokens"])
def test_either_name_of_the_token_limit_will_do(tmp_path, images, server, known):
    running = server(completion_tokens_param=known)
    settings, samples, _ = opened(tmp_path, images, concurrency=6)
    assert ask(settings, samples)[0].accepted == 24
    assert len(running.log()) - 24 <= 6


def test_a_server_that_does_not_count_tokens(tmp_path, images, server):
    server(usage=False)
    settings, samples, path = opened(tmp_path, images)
    summary, _ = ask(settings, samples)
    assert summary.usd > 0
    assert all(t["usage"]["estimated"] for t in read_lines(path) if t["kind"] == "conversation")


def test_one_question_a_request(tmp_path, images, server):
    running = server(ignore_schemas=True)
    settings, samples, path = opened(tmp_path, images, answer_format="questions", max_words=400)
    summary, _ = ask(settings, samples)
    assert summary.accepted + summary.given_up == 24
    assert len(running.log()) >= 48
    assert {t["answer_format"] for t in read_lines(path)} <= {"questions"}


def test_answers_of_another_model_are_not_mixed_in(tmp_path, images, server):
    server()
    settings, samples, path = opened(tmp_path, images)
    ask(settings, samples)
    os.truncate(path, len(b"".join(path.read_bytes().splitlines(keepends=True)[:30])))
    other, samples, _ = opened(tmp_path, images, model="gpt-4o")
    with pytest.raises(EmonbError, match=r"holds answers of gpt-4.1 .*now asked is gpt-4o.*triplets.mix"):
        ask(other, samples)
    both, samples, _ = opened(tmp_path, images, model="gpt-4o", mix=True)
    assert ask(both, samples)[0].accepted == 24
    assert {t["asked_of"] for t in read_lines(path)} == {"gpt-4.1", "gpt-4o"}


def test_an_unreadable_picture_is_left_out_with_its_reason(tmp_path, server):
    server()
    images = make_pictures(tmp_path / "images", 12)
    settings, samples, path = opened(tmp_path, images)
    broken = sorted((images / "small/train/joy").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:60])
    summary, _ = ask(settings, samples)
    assert summary.accepted == 11
    assert read_lines(rejected_path(path))[0]["detail"] == "not a readable picture"


def test_without_a_key_the_message_says_what_to_do(tmp_path, images):
    settings, samples, _ = opened(tmp_path, images)
    with pytest.raises(EmonbError, match=r"OPENAI_API_KEY is not set: .*--annotator offline"):
        ask(settings, samples)


def test_neither_key_nor_path_gets_out(tmp_path, images, server, monkeypatch):
    running = server(api_key="another")
    settings, samples, _ = opened(tmp_path, images)
    with pytest.raises(EmonbError, match="refuses the key") as caught:  # the server's message repeats the key
        ask(settings, samples)
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None
    monkeypatch.setenv("OPENAI_BASE_URL", running.base_url.replace("//", "//me:pass-word@"))
    with pytest.raises(EmonbError, match="refuses the key") as caught:
        ask(settings, samples)
    assert "bWU6cGFzcy13b3Jk" not in str(caught.value)  # me:pass-word, as sent
    running.configure(api_key=None)
    summary, said = ask(settings, samples)
    triplets_stage(settings, Store(settings.out_path / "artifacts"), "small")
    assert summary.accepted == 24
    folders = (settings.out_path / "triplets", settings.out_path / "artifacts" / "triplets")
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    assert {"triplets.jsonl", "provenance.json", "small.jsonl"} <= {p.name for p in files}
    written = b"".join(p.read_bytes() for p in files)
    for secret in (KEY, "pass-word", str(images), str(Path.home()) + "/"):
        assert secret not in "\n".join(said)
        assert secret.encode() not in written, secret


def test_a_model_named_by_a_local_folder_is_recorded_by_its_name(tmp_path, images, server):
    server()
    settings, samples, path = opened(tmp_path, images, model="/home/somebody/models/qwen")
    ask(settings, samples)
    assert {t["asked_of"] for t in read_lines(path)} == {"qwen"}
    assert b"somebody" not in path.read_bytes()


def test_an_interrupt_waits_for_what_is_paid(tmp_path, images, server):
    running = server(latency_s=0.4)
    settings, samples, path = opened(tmp_path, images, concurrency=4)
    timer = threading.Timer(0.6, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    summary, said = ask(settings, samples)
    assert summary.stopped == "interrupted"
    assert any("requests in flight" in line for line in said)
    paid = sum(row["paid"] for row in running.log())
    assert 0 < summary.accepted == paid < 24
    assert ask(settings, samples)[0].accepted == 24
    assert_complete(path, 24)


def test_32_at_a_time_are_near_the_ideal(tmp_path, server):
    running = server(latency_s=0.2)
    images = make_pictures(tmp_path / "images", 1000)
    settings, samples, path = opened(tmp_path, images, concurrency=32)
    ask(settings, samples)
    log = running.log()
    seconds = max(row["done"] for row in log) - min(row["t"] for row in log)
    assert_complete(path, 1000)
    assert seconds < 1.5 * 1000 / 32 * 0.2, seconds


def test_batches_under_way_are_not_paid_a_second_time(tmp_path, images, server):
    running = server(batch_seconds=0.5)
    settings, samples, _ = opened(tmp_path, images, batch_poll_s=0.1)
    ask(settings, samples, batch=True, patient=False)
    with pytest.raises(EmonbError, match=r"1 batches with 24 images are not fetched yet.*--annotator batch"):
        ask(settings, samples)
    assert ask(settings, samples, batch=True)[0].accepted == 24
    assert sum(row["paid"] for row in running.log()) == 24


def stub(monkeypatch, answer):
    """Replace the SDK's call: `answer(number, arguments)` gives a chat completion as a dict, or raises."""
    count, lock = Counter(), threading.Lock()

    def create(self, **arguments):
        with lock:
            count["asked"] += 1
            number = count["asked"]
        return answer(number, arguments)

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai.resources.chat.completions.Completions.create", create)
    return count


def completion(content, **more):
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": 100, "completion_tokens": 50}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    return {"id": "x", "created": 1_800_000_000, "model": "m", "choices": choices, "usage": usage, **more}


NOUNS = ("amber", "brass", "cedar", "delta", "ember", "flint", "grove", "heron", "iris", "jade", "kelp", "lotus")


def text(number, words="stone door lamp field"):
    """An answer that fits the schema, another one for each number."""
    rng = random.Random(number)
    said = " ".join(rng.choice(NOUNS) for _ in range(30))
    return f'{{"conversation": "{said} {words}", "reasoning": "{said[::-1]} {words}", "key_elements": []}}'


def bad_request(message):
    import httpx2
    import openai

    response = httpx2.Response(400, request=httpx2.Request("POST", "http://x"))
    return openai.BadRequestError(message, response=response, body={"message": message})


ODD = {
    "a lone surrogate": lambda n: completion(text(n, "\ud83d")),
    "milliseconds": lambda n: completion(text(n), created=1_800_000_000_000),
    "a list of parts": lambda n: completion([{"type": "text", "text": text(n)}]),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=list(ODD))
def test_an_odd_answer_is_kept_not_asked_again(tmp_path, images, monkeypatch, odd):
    asked = stub(monkeypatch, lambda number, _: odd(number))
    settings, samples, path = opened(tmp_path, images, near_duplicate=1.0)
    summary, _ = ask(settings, samples)
    assert summary.accepted == asked["asked"] == 24
    assert_complete(path, 24)


def test_an_answer_without_a_choice_was_paid_for(tmp_path, images, monkeypatch):
    asked = stub(monkeypatch, lambda number, _: completion("", choices=[]))
    settings, samples, _ = opened(tmp_path, images, retries=0)
    summary, _ = ask(settings, samples)
    assert summary.reasons == {"empty": 24}
    assert summary.answers == asked["asked"] == 24


def test_an_unexpected_error_loses_no_other_answer(tmp_path, images, monkeypatch):
    def answer(number, _):
        if number == 5:
            raise RuntimeError("what nobody thought of")
        time.sleep(0.02)
        return completion(text(number))

    asked = stub(monkeypatch, answer)
    settings, samples, _ = opened(tmp_path, images, near_duplicate=1.0)
    summary, _ = ask(settings, samples)
    assert summary.accepted == 23
    assert summary.reasons == {"no answer": 1}
    assert ask(settings, samples)[0].accepted == 24
    assert asked["asked"] == 25


def test_half_an_image_that_is_paid_for_is_recorded(tmp_path, images, monkeypatch):
    def answer(number, arguments):
        if "Why" in str(arguments["messages"]) or "Explain" in str(arguments["messages"]):
            raise bad_request("no explanations here")
        return completion("a stone and a lamp on a wide field of grass")

    stub(monkeypatch, answer)
    settings, samples, path = opened(tmp_path, images, answer_format="questions")
    summary, _ = ask(settings, samples)
    assert summary.accepted == 0
    assert summary.answers == 24  # the first question of each
    assert all(r["usage"] and "no explanations" in r["detail"] for r in read_lines(rejected_path(path)))


def test_images_that_a_server_refuses_do_not_block_the_others(tmp_path, images, monkeypatch):
    refused = Counter()

    def answer(number, arguments):
        content = str(arguments["messages"][1]["content"][0])
        if "anger" in arguments["messages"][1]["content"][1]["text"] or len(refused) < 12:
            refused[content] += 1
            raise bad_request("content policy")
        return completion(text(number))

    stub(monkeypatch, answer)
    settings, samples, _ = opened(tmp_path, images, near_duplicate=1.0, concurrency=2)
    summary, _ = ask(settings, samples)
    assert summary.accepted == 24 - len(refused)
    assert summary.missing == len(refused) >= 12
    assert set(refused.values()) == {1}


def test_what_another_model_failed_at_does_not_count(tmp_path, images, monkeypatch):
    stub(monkeypatch, lambda number, _: completion("nonsense"))
    weak, samples, _ = opened(tmp_path, images, model="tiny-local", retries=0, answer_format="schema")
    assert ask(weak, samples)[0].given_up == 24
    stub(monkeypatch, lambda number, _: completion(text(number)))
    settings, samples, _ = opened(tmp_path, images, retries=0, near_duplicate=1.0)
    assert ask(settings, samples)[0].accepted == 24
    limited, samples, _ = opened(tmp_path, images, max_cost=5.0)
    with pytest.raises(EmonbError, match=r"max_cost: the files hold answers of tiny-local, whose price is unknown"):
        ask(limited, samples)


def test_the_projected_cost_is_of_the_right_size(tmp_path, images, monkeypatch):
    stub(monkeypatch, lambda number, _: completion(text(number)))
    settings, samples, _ = opened(tmp_path, images, near_duplicate=1.0, concurrency=1)
    with Annotation(settings, samples, "small") as work:
        said = []
        for row in list(work.missing())[:6]:
            work.receive(row, [read_completion(completion(text(len(said))))], "schema")
            said = [work.note(), work.note(), work.note()]  # looked at more often than images are done
    assert len(set(said)) == 1
    one = (100 * 2 + 50 * 8) / 1e6
    assert said[0] == f"${6 * one:.2f} spent, ${24 * one:.2f} in all"


def test_a_full_disk_is_said_and_frees_the_file(tmp_path, images, server, monkeypatch):
    server()
    settings, samples, path = opened(tmp_path, images)
    synced = Counter()

    def fsync(handle):
        synced["times"] += 1
        if synced["times"] == 5:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("emonb.answer_log.os.fsync", fsync)
        with pytest.raises(EmonbError, match=r"cannot write \(No space left on device\); make room and start again"):
            ask(settings, samples)
    assert path.read_bytes().endswith(b"\n")
    assert synced["times"] >= 5  # each answer is put on disk by itself
    assert ask(settings, samples)[0].accepted == 24


def test_no_secret_in_a_traceback(tmp_path, images, monkeypatch):
    def answer(number, _):
        raise bad_request(f"temperature must be 1; key {KEY} in /srv/private/models")

    stub(monkeypatch, answer)
    settings, samples, _ = opened(tmp_path, images, temperature=0.5)
    with pytest.raises(EmonbError) as caught:
        ask(settings, samples)
    shown = "".join(traceback.format_exception(caught.value))
    assert "set triplets.temperature to null" in shown
    assert KEY not in shown
    assert "/srv/private" not in shown


@pytest.mark.parametrize("key", ["sk-abc def", "sk-abc\ndef", "sk-äöü"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(tmp_path, images, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    settings, samples, _ = opened(tmp_path, images)
    with pytest.raises(EmonbError, match="odd characters") as caught:
        ask(settings, samples)
    assert "abc" not in str(caught.value)


def test_an_empty_base_url_means_the_default_server(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert Server(TripletSettings(), threading.Event()).host == "api.openai.com"


def offline(folder, images):
    settings, _, _ = opened(folder, images, annotator="offline")
    return triplets_stage(settings, Store(settings.out_path / "artifacts"), "small")


def test_an_offline_run_beside_a_paid_one_replaces_nothing(tmp_path, images, server):
    server(latency_s=0.5)
    settings, samples, path = opened(tmp_path, images, concurrency=24)
    paid = threading.Thread(target=ask, args=(settings, samples))
    paid.start()
    time.sleep(0.25)  # asked, and nothing answered yet
    with pytest.raises(EmonbError, match="another process is asking"):
        offline(tmp_path, images)
    paid.join()
    assert_complete(path, 24)
    with pytest.raises(EmonbError, match="paid for"):
        offline(tmp_path, images)


def test_an_offline_run_while_a_batch_is_open_replaces_nothing(tmp_path, images, server):
    server(batch_seconds=0.3)
    settings, samples, path = opened(tmp_path, images, batch_poll_s=0.1)
    ask(settings, samples, batch=True, patient=False)
    with pytest.raises(EmonbError, match="not fetched yet"):
        offline(tmp_path, images)
    assert ask(settings, samples, batch=True)[0].accepted == 24
    assert_complete(path, 24)
    note = path.with_name("small.batches.json")
    for text in ("{", '{"parts": [{"name": "x"}]}'):
        note.write_text(text)
        with pytest.raises(EmonbError, match=r"small.batches.json: damaged.*paid a second time"):
            ask(settings, samples, batch=True)


def test_a_file_of_other_pictures_is_noticed_before_anything_is_paid(tmp_path, images, server):
    running = server()
    settings, samples, path = opened(tmp_path, images, retries=0)
    ask(settings, samples)
    renamed = path.read_text().replace("train/", "other/")
    path.write_text(renamed)
    with pytest.raises(EmonbError, match="it belongs to other pictures"):
        ask(settings, samples)
    assert len(running.log()) == 24
    path.write_text(renamed.replace("other/", "train/", 3 * 20))  # four images are no training images any more
    summary, said = ask(settings, samples)
    assert (summary.accepted, len(running.log())) == (20, 28)  # their answers are near those of the four
    assert any("4 images in the file are not training images" in line for line in said)
    artifact = triplets_stage(settings, Store(settings.out_path / "artifacts"), "small")
    assert read_triplets(artifact.path / "triplets.jsonl")["image_id"].nunique() == 20


@pytest.mark.parametrize("usage", [{"prompt_tokens": "many"}, [1], {"prompt_tokens": -5}])
def test_odd_usage_is_estimated(tmp_path, images, monkeypatch, usage):
    asked = stub(monkeypatch, lambda number, _: completion(text(number), usage=usage))
    settings, samples, _ = opened(tmp_path, images, near_duplicate=1.0)
    summary, _ = ask(settings, samples)
    assert summary.accepted == asked["asked"] == 24
    assert summary.usd > 0


def test_all_sources_of_a_file_are_named(tmp_path, images, monkeypatch):
    stub(monkeypatch, lambda number, _: completion(text(number)))
    settings, samples, path = opened(tmp_path, images, near_duplicate=1.0)
    ask(settings, samples)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]).replace('"source": "openai"', '"source": "imported"') + "".join(lines[3:]))
    said = source_note(settings.out_path, ["small"])
    assert "somebody else's file: 1 images" in said
    assert "a paid model (m): 23 images" in said
