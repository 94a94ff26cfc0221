"""The loopback server is what the annotator is tested against: its answers, faults and bills are tested here."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import count

import openai
import pytest
from openai_server import CHAT, CONTENT, LABELS, Config, paragraph, serve

from emonb.emotions import TAXONOMIES, WORD_FORMS

KEY = "sk-test-5fd924625f6ab16a"
PROPERTIES = {
    "conversation": {"type": "string"},
    "reasoning": {"type": "string"},
    "key_elements": {"type": "array", "items": {"type": "string"}},
}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": [*PROPERTIES], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
numbers = count()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """One server for all tests: starting one takes longer than most tests."""
    with serve(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def client(running):
    """The official SDK without its own retries."""
    with openai.OpenAI(base_url=running.base_url, api_key=KEY, max_retries=0, timeout=10) as client:
        yield client


@pytest.fixture
def server(running):
    """The server with its settings as at the start."""
    running.configure(**asdict(Config()))
    return running


def picture() -> bytes:
    """The beginning of a PNG that no other test has sent."""
    return b"\x89PNG\r\n\x1a\n" + str(next(numbers)).encode()


def request(image: bytes | None = None, *, media: str = "png", schema: bool = True, **more) -> dict:
    """Arguments of a chat completion about an image that evokes fear."""
    url = f"data:image/{media};base64,{base64.b64encode(image or picture()).decode()}"
    text = {"type": "text", "text": "Explain why the image evokes fear, not joy."}
    content = [text, {"type": "image_url", "image_url": {"url": url}}]
    wanted = {"response_format": FORMAT} if schema else {}
    return {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": content}], **wanted, **more}


def ask(client, *arguments, **more):
    """A chat completion."""
    return client.chat.completions.create(**request(*arguments, **more))


def batch_file(images: list[bytes], ids: list[str] | None = None) -> bytes:
    """An input file with one request per image."""
    lines = [
        {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": request(image)}
        for custom_id, image in zip(ids or [f"item-{i}" for i in range(len(images))], images, strict=True)
    ]
    return "\n".join(json.dumps(line) for line in lines).encode()


def start_batch(client, data: bytes):
    """Upload a file and start a batch of it."""
    file = client.files.create(file=("input.jsonl", io.BytesIO(data)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"part": "1"})


def ended(client, batch):
    """The batch once it has ended, and the lines of its two files by custom id."""
    deadline = time.monotonic() + 10
    while batch.status in ("validating", "in_progress", "cancelling"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    found = []
    for file_id in (batch.output_file_id, batch.error_file_id):
        lines = client.files.content(file_id).text.splitlines() if file_id else []
        found.append({line["custom_id"]: line for line in map(json.loads, lines)})
    return batch, *found


def last(server, outcome: str) -> dict:
    """The last row; one of a client that left is written when the server sees it."""
    deadline = time.monotonic() + 3
    while (row := server.log()[-1])["outcome"] != outcome and time.monotonic() < deadline:
        time.sleep(0.02)
    return row


def test_answer_fits_the_schema(server, client):
    answer = ask(client)
    parts = json.loads(answer.choices[0].message.content)
    assert list(parts) == list(PROPERTIES)
    assert all(25 <= len(parts[name].split()) <= 60 for name in ("conversation", "reasoning"))
    assert parts["conversation"] != parts["reasoning"]
    assert len(parts["key_elements"]) == 3
    assert answer.model == "gpt-4.1-mini-2025-04-14"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 85 + 43 // 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    row = server.log()[-1]
    assert row["paid"] is row["media_ok"] is row["authorization_ok"] is True
    assert (row["path"], row["outcome"], row["status"]) == (CHAT, "good", 200)
    assert (row["tokens"], row["prompt"][:11]) == (answer.usage.total_tokens, "Explain why")
    assert row["t"] <= row["done"] <= time.monotonic()


def test_answer_is_text_without_a_schema_or_where_it_is_ignored(server, client):
    image = picture()
    text = ask(client, image, schema=False).choices[0].message.content
    assert re.fullmatch(r"Conversation: .+\n\nReasoning: .+\n\nKey elements: .+, .+, .+", text)
    assert isinstance(
        json.loads(ask(client, image, response_format={"type": "json_object"}).choices[0].message.content), dict
    )
    server.configure(ignore_schemas=True, usage=False)
    answer = ask(client, image)
    assert answer.choices[0].message.content == text
    assert answer.usage is None
    assert server.log()[-1]["paid"]


def test_good_answers_differ_and_name_no_emotion():
    texts = [paragraph(str(i), "reasoning").lower() for i in range(200)]
    assert {*LABELS} == {label for taxonomy in TAXONOMIES.values() for label in taxonomy.labels}
    named = {*LABELS, *(form for forms in WORD_FORMS.values() for form in forms)}
    assert not named & set(re.findall(r"\w+", " ".join(texts)))
    triples = Counter(
        triple for text in texts for triple in {*zip(*(text.split()[i:] for i in range(3)), strict=False)}
    )
    assert sum(n for n in triples.values() if n > 1) < 0.15 * triples.total()


@pytest.mark.parametrize(
    ("kind", "expected", "status"),
    [
        ("rate_limit", openai.RateLimitError, 429),
        ("server_error", openai.InternalServerError, 500),
        ("unavailable", openai.InternalServerError, 503),
        ("stall", openai.APITimeoutError, None),
        ("cut", openai.APIConnectionError, 200),
    ],
)
def test_fault_of_transport(server, client, kind, expected, status):
    server.configure(faults={kind: 1}, retry_ms=True)
    with pytest.raises(expected) as caught:
        ask(client.with_options(timeout=0.2))
    if kind == "rate_limit":
        headers = caught.value.response.headers
        assert (headers["retry-after"], headers["retry-after-ms"]) == ("0.2", "200")
    row = last(server, kind)
    assert (row["outcome"], row["status"], row["paid"], row["tokens"]) == (kind, status, False, 0)


def test_stall_ends_with_a_closed_connection(server, client):
    server.configure(faults={"stall": 1}, stall_s=0.1)
    with pytest.raises(openai.APIConnectionError, match="Connection error"):
        ask(client)


def test_body_that_is_not_json(server, client):
    server.configure(faults={"bad_body": 1}, max_faults_per_image=None)
    assert isinstance(ask(client), str)  # the SDK hands over what claims to be a page
    server.configure(bad_body_type="application/json")
    with pytest.raises(json.JSONDecodeError):
        ask(client)
    assert [(row["status"], row["paid"]) for row in server.log()[-2:]] == [(200, False)] * 2


def test_faults_of_content(server, client):
    said = {}
    for kind in CONTENT:
        server.configure(faults={kind: 1})
        said[kind] = ask(client).choices[0]
        row = server.log()[-1]
        assert (row["outcome"], row["status"], row["paid"]) == (kind, 200, True)
    content = {kind: choice.message.content for kind, choice in said.items()}
    for kind in ("malformed", "length"):
        with pytest.raises(json.JSONDecodeError):
            json.loads(content[kind])
    reasons = {"length": "length", "filter": "content_filter"}
    assert {kind: choice.finish_reason for kind, choice in said.items()} == {
        k: reasons.get(k, "stop") for k in CONTENT
    }
    assert content["refusal"] is content["filter"] is None
    assert said["refusal"].message.refusal == content["refusal_text"] == "I'm sorry, but I can't help with that."
    assert content["empty"] == ""
    assert not {*json.loads(content["wrong_schema"])} & {*PROPERTIES}
    assert json.loads(content["names_emotion"])["reasoning"].endswith("evokes fear.")
    server.configure(faults={"duplicate": 1})
    assert ask(client).choices[0].message.content == content["duplicate"]


def test_an_image_has_so_many_faults_and_no_more(server, client):
    server.configure(faults={"empty": 0.5, "refusal": 0.5}, seed=3)
    image = picture()
    for _ in range(4):
        ask(client, image)
    outcomes = [row["outcome"] for row in server.log()[-4:]]
    assert "good" not in outcomes[:2]
    assert outcomes[2:] == ["good", "good"]


def test_unauthorized_echoes_the_key_and_logs_none(server, client):
    server.configure(api_key="another")
    with pytest.raises(openai.AuthenticationError, match=KEY):
        ask(client)
    row = server.log()[-1]
    assert (row["outcome"], row["authorization_ok"], row["paid"]) == ("unauthorized", False, False)
    assert not [path for path in server.folder.rglob("*") if KEY.encode() in path.read_bytes()]
    server.configure(api_key=KEY)
    assert ask(client).choices


def test_unsupported_parameters(server, client):
    server.configure(schemas=False, completion_tokens_param="max_completion_tokens")
    for arguments, param in (({}, "response_format"), ({"schema": False, "max_tokens": 9}, "max_tokens")):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, **arguments)
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)
    assert ask(client, schema=False, max_completion_tokens=9).choices
    server.configure(completion_tokens_param="max_tokens")
    with pytest.raises(openai.BadRequestError):
        ask(client, schema=False, max_completion_tokens=9)


@pytest.mark.parametrize("limit", [{"rpm": 2}, {"tpm": 540}])
def test_limits_of_a_sliding_window(server, client, limit):
    server.configure(window_s=0.4)
    time.sleep(0.4)
    server.configure(**limit)
    ask(client)
    ask(client)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client)
    assert caught.value.code == "rate_limit_exceeded"
    time.sleep(float(caught.value.response.headers["retry-after"]))
    ask(client)
    assert [row["outcome"] for row in server.log()[-4:]] == ["good", "good", "limited", "good"]


def test_quota_is_kept_to_the_answer(server, client):
    def attempt(_) -> str | None:
        try:
            return ask(client).object
        except openai.RateLimitError as problem:
            return problem.code

    server.configure(quota_after=5, latency_s=0.05)
    with ThreadPoolExecutor(8) as pool:
        assert Counter(pool.map(attempt, range(16))) == {"chat.completion": 5, "insufficient_quota": 11}


def test_server_that_goes_down(server, client):
    server.configure(down_after=1)
    ask(client)
    for call in (lambda: ask(client), client.models.list):
        with pytest.raises(openai.APIConnectionError):
            call()
    server.configure(down_after=None)
    ask(client)
    assert [row["outcome"] for row in server.log()[-4:]] == ["good", "down", "down", "good"]


def test_latency_and_a_client_that_leaves(server, client):
    server.configure(latency_s=0.2)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(client), range(8)))
    assert all(0.2 <= row["done"] - row["t"] < 0.5 for row in server.log()[-8:])
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.05))
    row = last(server, "gone")
    assert (row["outcome"], row["status"], row["paid"]) == ("gone", None, False)


def test_media_type_that_is_not_true(server, client):
    ask(client, media="jpeg")
    ask(client, b"\xff\xd8\xff" + picture(), media="jpeg")
    ask(client, b"RIFF\x00\x00\x00\x00WEBP", media="webp")
    assert [row["media_ok"] for row in server.log()[-3:]] == [False, True, True]


def test_mistakes_are_told(server, client):
    assert len(client.models.list().data) == 1
    with pytest.raises(openai.NotFoundError, match="Invalid URL"):
        client.embeddings.create(model="m", input="x")
    with pytest.raises(openai.BadRequestError, match="Invalid request"):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": [{"type": "text"}]}])
    with pytest.raises(ValueError, match="colour"):
        server.configure(faults={"colour": 1})


def test_batch_round_trip(server, client):
    images = [picture() for _ in range(4)]
    server.configure(faults={"refusal": 0.5, "server_error": 0.5}, seed=1, batch_seconds=0.5)
    rows = len(server.log())
    batch = start_batch(client, batch_file(images))
    assert (batch.status, batch.metadata) == ("validating", {"part": "1"})
    time.sleep(0.1)
    assert client.batches.retrieve(batch.id).status == "in_progress"
    batch, output, errors = ended(client, batch)
    assert (batch.status, batch.request_counts.completed, errors) == ("completed", 4, {})
    assert batch.error_file_id is None
    assert [*output] == ["item-0", "item-1", "item-2", "item-3"]
    assert all(line["error"] is None and line["response"]["status_code"] == 200 for line in output.values())
    items = [row for row in server.log()[rows:] if row["path"] == "/v1/batches#item"]
    assert all(row["paid"] and row["tokens"] for row in items)
    assert {row["outcome"] for row in items} <= {"good", "refusal"}
    body = output["item-3"]["response"]["body"]
    assert body["usage"]["total_tokens"] == items[3]["tokens"]
    assert (body["choices"][0]["message"]["refusal"] is not None) == (items[3]["outcome"] == "refusal")


def test_batch_with_errors_and_expired_items(server, client):
    server.configure(batch_error_share=0.4, batch_expire_share=0.4, batch_seconds=0, seed=2)
    images = [picture() for _ in range(20)]
    batch, output, errors = ended(client, start_batch(client, batch_file(images)))
    kinds = Counter((line["error"] or {}).get("code") or line["response"]["status_code"] for line in errors.values())
    assert batch.status == "expired"
    assert {*kinds} == {"batch_expired", 500}
    assert len(output) == batch.request_counts.completed == 20 - batch.request_counts.failed == 20 - kinds.total()
    items = server.log()
    paid = [row["paid"] for row in items if row["path"] == "/v1/batches#item"][-20:]
    assert sum(paid) == len(output)


def test_batch_that_fails_or_is_cancelled(server, client):
    server.configure(batch_seconds=2)
    images = [picture() for _ in range(10)]
    failed, *_ = ended(client, start_batch(client, batch_file(images[:2], ["same", "same"])))
    assert failed.status == "failed"
    assert [(error.code, error.line) for error in failed.errors.data] == [("duplicate_custom_id", 2)]
    batch = start_batch(client, batch_file(images))
    time.sleep(0.5)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch, output, errors = ended(client, batch)
    assert batch.status == "cancelled"
    assert 0 < len(output) < 10 == len(output) + len(errors)
    newest = client.batches.list(limit=1)
    assert newest.has_more
    assert [b.id for b in newest.data] == [batch.id]
    assert [b.id for b in client.batches.list(limit=1, after=batch.id).data] == [failed.id]
    assert [b.id for b in client.batches.list(limit=1)][:2] == [batch.id, failed.id]
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_files_and_batches_outlive_the_server(tmp_path):
    data = batch_file([picture()])
    with serve(tmp_path, batch_seconds=60, file_limit_bytes=1000) as server:
        client = openai.OpenAI(base_url=server.base_url, api_key=KEY, max_retries=0)
        batch = start_batch(client, data)
        with pytest.raises(openai.BadRequestError, match="File is too large"):
            client.files.create(file=("large.jsonl", b"x" * 1001), purpose="batch")
        port = int(re.search(r":(\d+)/", server.base_url)[1])
    with serve(tmp_path, port=port, batch_seconds=0) as server:
        (about,) = [file for file in client.files.list() if file.filename == "input.jsonl"]
        assert (about.bytes, about.purpose) == (len(data), "batch")
        assert client.files.content(about.id).read() == data
        batch, output, _ = ended(client, batch)
        assert (batch.status, len(output)) == ("completed", 1)
        assert client.files.delete(about.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(about.id)
        assert [row["path"] for row in server.log()].count("/v1/batches") == 1
