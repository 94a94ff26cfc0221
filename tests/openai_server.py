"""A loopback server that speaks the OpenAI HTTP API: chat completions, files, batches; with faults on demand.

It runs in a thread of the test, logs every request with what it billed, and imports nothing of emonb, so that both
cannot share a mistake.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]
TRANSPORT = ("rate_limit", "server_error", "unavailable", "stall", "cut", "bad_body")  # not in batches, never billed
CONTENT = ("malformed", "refusal", "refusal_text", "wrong_schema", "length", "empty", "names_emotion", "duplicate",
           "filter")  # fmt: skip
STATUS = {"rate_limit": 429, "server_error": 500, "unavailable": 503}
SYLLABLES = ("ka", "lo", "mi", "tu", "ne", "po", "ri", "va", "be", "su")  # no emotion is made of these


@dataclass
class Server:
    """What the server does; every field may be changed while it runs."""

    latency_s: float = 0.0
    faults: dict[str, float] = field(default_factory=dict)  # kind: share of the requests
    max_faults_per_image: int = 2
    api_key: str | None = None
    schemas: bool = True
    ignore_schemas: bool = False
    limit_name: str = ""  # the only name of the token limit that it knows
    quota_after: float = float("inf")  # paid answers
    down_after: float = float("inf")  # answers
    stall_s: float = 5.0
    usage: bool = True
    answer: Callable[[int, Json], Any] | None = None  # body of the n-th completion instead of ours, or (status, body)
    batch_seconds: float = 0.0
    batch_shares: dict[str, float] = field(default_factory=dict)  # batch_expired, batch_error
    batch_fails: Callable[[int], str] = lambda _: ""  # error code of the n-th batch

    def __post_init__(self) -> None:
        self.log: list[Json] = []
        self.files: dict[str, Json] = {}
        self.batches: dict[str, Json] = {}
        self.asked, self.faulted = Counter[str](), Counter[str]()
        self.lock, self.base_url = threading.Lock(), ""

    @property
    def paid(self) -> int:
        """Answers that were billed."""
        return sum(row["paid"] for row in self.log)

    def chat(self, request: Json, shares: dict[str, float], row: Json) -> tuple[int, Any]:
        """Status and body of a completion; called under the lock."""
        image, question = request["messages"][1]["content"]
        declared, _, encoded = image["image_url"]["url"].partition(";base64,")
        data = base64.b64decode(encoded, validate=True)
        media_ok = declared == "data:image/jpeg" and data.startswith(b"\xff\xd8\xff")
        row |= {"image": hashlib.sha256(data).hexdigest(), "media_ok": media_ok}
        row["text"], form = question["text"], request.get("response_format")
        limits = {"max_tokens", "max_completion_tokens"} & request.keys()
        if form and not self.schemas:
            return error(400, "response_format json_schema is not supported", "unsupported_parameter")
        if self.limit_name and limits != {self.limit_name}:
            return error(400, f"Unsupported: {min(limits)!r}. Use {self.limit_name!r}", "unsupported_parameter")
        if self.paid >= self.quota_after:
            row["outcome"] = "quota"
            return error(429, "You exceeded your current quota.", "insufficient_quota")
        self.asked[row["image"]] += 1
        if self.answer:
            body = self.answer(self.asked.total(), request)
            status, body = body if isinstance(body, tuple) else (200, body)
            row["paid"] = status == 200
            return status, body
        fault = row["outcome"] = self.draw(row["image"], shares) or "good"
        if fault in STATUS:
            return error(STATUS[fault], f"The server says {fault}", fault, 0.05 if fault == "rate_limit" else None)
        if fault == "bad_body":
            return 200, b"<html>Welcome</html>"
        row["paid"] = fault not in TRANSPORT and not fault.startswith("batch")
        return completion(request, row, None if self.ignore_schemas else form, fault, self.usage)

    def draw(self, image: str, shares: dict[str, float]) -> str | None:
        """The fault that hits this request; depends on image and attempt, not on the order of arrival."""
        left = random.Random(f"{image} {self.asked[image]}").random()
        for kind, share in shares.items():
            left -= share
            if left < 0 and self.faulted[image] < self.max_faults_per_image:
                self.faulted[image] += 1
                return kind
        return None

    def add_file(self, data: bytes) -> str:
        """Keep a file; returns its id."""
        file_id = f"file-{len(self.files)}"
        self.files[file_id] = {"data": data}
        return file_id

    def add_batch(self, asked: Json) -> Json:
        """Begin a batch, or let it fail."""
        batch = {"id": f"batch_{len(self.batches)}", "status": "in_progress", "created_at": time.time(), **asked}
        if code := self.batch_fails(len(self.batches)):
            batch |= {"status": "failed", "errors": {"data": [{"code": code, "message": "no"}]}}
        self.batches[batch["id"]] = batch
        return batch

    def look(self, batch: Json) -> Json:
        """A batch as it is now: it is worked through when its time is over."""
        if batch["status"] == "in_progress" and time.time() >= batch["created_at"] + self.batch_seconds:
            lines: dict[bool, list[str]] = {True: [], False: []}
            shares = {**self.batch_shares, **{k: share for k, share in self.faults.items() if k in CONTENT}}
            for item in map(json.loads, self.files[batch["input_file_id"]]["data"].splitlines()):
                row = {"path": "item", "outcome": "", "paid": False, "tokens": 0, "t": 0.0}
                status, body = self.chat(item["body"], shares, row)
                status, body = error(500, "no", "no") if row["outcome"] == "batch_error" else (status, body)
                said = {"response": {"status_code": status, "body": body}, "error": None}
                if row["outcome"] == "batch_expired":
                    said = {"response": None, "error": {"code": "batch_expired", "message": "late"}}
                lines[row["paid"]].append(json.dumps({"custom_id": item["custom_id"], **said}))
                self.log.append(row)
            counts = {"completed": len(lines[True]), "failed": len(lines[False])}
            batch |= {"status": "completed", "request_counts": {**counts, "total": sum(counts.values())}}
            for name, kind in (("output_file_id", True), ("error_file_id", False)):
                batch[name] = self.add_file("\n".join(lines[kind]).encode()) if lines[kind] else None
        return batch


def error(status: int, message: str, code: str, wait: float | None = None) -> tuple[int, Json]:
    """An error in OpenAI's format; `wait` becomes a Retry-After."""
    return status, {"error": {"message": message, "type": "error", "param": None, "code": code}, "wait": wait}


def completion(request: Json, row: Json, form: Json | None, fault: str, usage: bool) -> tuple[int, Json]:
    """A chat completion about an image, good or with a fault of content."""
    rng = random.Random("the same for all" if fault == "duplicate" else row["image"])
    words = ["".join(rng.choices(SYLLABLES, k=3)) for _ in range(70)]
    conversation, reasoning = " ".join(words[:30]), " ".join(words[30:60])
    if fault == "names_emotion":
        reasoning += " All this evokes " + re.search(r"feel (\w+)", row["text"])[1]
    parts = {"conversation": conversation, "reasoning": reasoning, "key_elements": words[60:63]}
    content = f"Conversation: {conversation}\n\nReasoning: {reasoning}\n\nKey elements: {', '.join(words[60:63])}"
    content = json.dumps({"summary": "x"} if fault == "wrong_schema" else parts) if form else content
    sorry = "I'm sorry, but I can't help with that."
    broken = {"malformed": content[:90], "length": content[:90], "refusal": None, "refusal_text": sorry, "empty": ""}
    finish = {"length": "length", "filter": "content_filter"}.get(fault, "stop")
    message = {"role": "assistant", "content": broken.get(fault, content)}
    message["refusal"] = sorry if fault == "refusal" else None
    counts = {"prompt_tokens": 85 + len(row["text"]) // 4, "completion_tokens": 90}
    row["tokens"] = sum(counts.values()) * row["paid"]
    body = {"object": "chat.completion", "model": request["model"], "usage": counts if usage else None}
    return 200, {**body, "choices": [{"index": 0, "message": message, "finish_reason": finish}]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def do_GET(self) -> None:
        self.exchange(b"")

    def do_POST(self) -> None:
        self.exchange(self.rfile.read(int(self.headers["content-length"])))

    def exchange(self, data: bytes) -> None:
        """Answer, or half of it; it is in the log before the client sees it."""
        state: Server = self.server.state
        path = self.path.partition("?")[0]
        row = {"path": path, "outcome": "", "paid": False, "tokens": 0, "t": time.monotonic()}
        key = self.headers.get("authorization", "").removeprefix("Bearer ")
        with state.lock:
            self.close_connection = down = state.paid >= state.down_after
            if state.api_key not in (None, key):  # the key is told to its sender, as some servers do
                status, body = error(401, f"Incorrect API key provided: {key}.", "invalid_api_key")
            elif not down:
                status, body = self.route(state, path.split("/")[2:], data, row)
            state.log.append(row)
        time.sleep(state.stall_s if row["outcome"] == "stall" else state.latency_s)
        if down:
            return
        wait = body.pop("wait", None) if isinstance(body, dict) else None
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.close_connection = cut = row["outcome"] == "cut"
        with suppress(ConnectionError):
            self.send_response(status)
            if wait is not None:
                self.send_header("retry-after", f"{wait:.3f}")
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)

    def route(self, state: Server, parts: list[str], data: bytes, row: Json) -> tuple[int, Any]:
        """Status and body of a request."""
        match self.command, *parts:
            case "POST", "chat", "completions":
                return state.chat(json.loads(data), state.faults, row)
            case "POST", "files":
                content = re.search(rb'filename="[^"]+".*?\r\n\r\n(.*?)\r\n--', data, re.DOTALL)[1]
                return 200, {"id": state.add_file(content)}
            case "GET", "files", file_id, "content" if file_id in state.files:
                return 200, state.files[file_id]["data"]
            case "POST", "batches":
                return 200, state.add_batch(json.loads(data))
            case "GET", "batches":
                return 200, {"object": "list", "data": [*state.batches.values()][::-1], "has_more": False}
            case "GET", "batches", batch_id if batch_id in state.batches:
                return 200, state.look(state.batches[batch_id])
        return error(404, f"no such object: {self.path}", "not_found")


class _Listener(ThreadingHTTPServer):
    request_queue_size, daemon_threads = 256, True


@contextmanager
def serve(**config: Any) -> Iterator[Server]:
    """A running server."""
    with _Listener(("127.0.0.1", 0), _Handler) as listener:
        listener.state = Server(**config)
        listener.state.base_url = f"http://127.0.0.1:{listener.server_port}/v1"
        threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        yield listener.state
        listener.shutdown()
