"""A loopback server that speaks the OpenAI HTTP API: chat completions, files, batches, models.

It injects faults on demand and logs every request with what it billed. Clients are measured for speed, so it is
a process of its own: `python tests/openai_server.py --folder F --config config.json --port 0` prints its address
as its first line. It imports nothing of emonb, so that both cannot share a mistake.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import http.client
import json
import os
import random
import re
import subprocess
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

Json = dict[str, Any]

TRANSPORT = ("rate_limit", "server_error", "unavailable", "stall", "cut", "bad_body")  # not in batches
CONTENT = ("malformed", "refusal", "refusal_text", "wrong_schema", "length", "empty", "names_emotion", "duplicate",
           "filter")  # fmt: skip
LABELS = ("amusement", "anger", "awe", "contentment", "disgust", "excitement", "fear", "sadness", "joy", "surprise",
          "positive", "negative")  # fmt: skip
ERRORS = {
    "rate_limit": (429, "Rate limit reached for requests", "rate_limit_exceeded", {"retry-after": "0.2"}),
    "server_error": (500, "The server had an error", None, {}),
    "unavailable": (503, "The server is overloaded or not ready yet", None, {}),
}
MODEL = {"id": "gpt-4.1-mini", "object": "model", "created": 1744300800, "owned_by": "emonb-tests"}
FREE = {"type": "object", "properties": {"conversation": {}, "reasoning": {}, "key_elements": {"type": "array"}}}
CHAT, SETTINGS = "/v1/chat/completions", "/_config"
MISTAKES = (ValueError, KeyError, TypeError, AttributeError, IndexError)  # what malformed requests raise here
CHAT_BYTES, FILE_BYTES = 20_000_000, 300_000_000
OPEN_BATCH = ("validating", "in_progress", "cancelling")
MAGIC = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF87a", "gif"), (b"GIF89a", "gif"))

# Things seen, never felt; many, so that two answers share hardly any three words in a row.
WORDS = """
amber angular arched ashen banded beige bent blurred bordered bronze brown chalky checked chipped circular clouded
coarse copper cracked cream crimson crooked curved dappled dented distant dotted dusty earthen elongated faded faint
flat folded frosted glazed glossy golden grained granite green grey hollow indigo ivory jagged knotted lacquered
layered leaning linen lopsided marbled matte mossy mottled narrow notched oblong ochre olive opaque oval painted pale
patterned pebbled pitted plaid polished powdery purple ragged ribbed rounded rusted sandy scattered scuffed shaded
silver slanted slender speckled stacked striped tangled tapered tilted translucent umber upright veined violet
weathered woven wrinkled

alley anchor apron archway awning balcony banner barrel basin basket beam bench blanket boat bollard bottle bowl
bracket branch brick bridge bucket buoy cabinet cable candle canopy canvas carpet cart chair chimney clock coat column
cornice counter crate cup curtain dock door drawer drum easel fence ferry field flagpole fountain frame garden gate
glove gravel gutter hallway harbour hat hedge hillside horizon jar kettle ladder lamp lantern lawn leaf ledge
lighthouse mailbox meadow mirror mug orchard oven paddle panel parasol path pavement pebble pillar pipe platform plaza
pond porch pot puddle quilt railing ramp ribbon river roof rope rug saddle sail scarf shelf shore shutter sign sink
skylight sleeve spoon staircase stove street table tent terrace tile tower tray tunnel umbrella vase veranda wagon wall
wharf window

adjoins backs borders brackets brushes conceals covers crosses divides doubles echoes edges encloses faces flanks
follows frames grazes guides holds hugs joins lines masks meets mirrors obscures outlines overlaps parallels passes
rims screens shades shadows shields skirts spans splits supports touches traces trims

above across against alongside along amid around atop behind below beneath beside beyond by inside near outside over
past through toward under underneath within
"""
ADJECTIVES, NOUNS, VERBS, PLACES = (group.split() for group in WORDS.split("\n\n"))


@dataclass
class Config:
    """What the server does; every field may be changed while it runs."""

    latency_s: float = 0.0  # before a 200, a 500 and a cut; refusals (400, 401, 429, 503) come at once
    faults: dict[str, float] = field(default_factory=dict)  # kind: share of the requests
    seed: int = 0
    api_key: str | None = None
    schemas: bool = True
    ignore_schemas: bool = False
    completion_tokens_param: str = "both"
    rpm: int | None = None
    tpm: int | None = None
    window_s: float = 60.0
    quota_after: int | None = None  # paid answers, counted from when this was set
    usage: bool = True
    max_faults_per_image: int | None = 2
    down_after: int | None = None  # answers under /v1, counted from when this was set
    stall_s: float = 30.0
    retry_ms: bool = False
    bad_body_type: str = "text/html"
    batch_seconds: float = 0.5
    batch_expire_share: float = 0.0
    batch_error_share: float = 0.0
    file_limit_bytes: int | None = None

    def change(self, changes: Json) -> None:
        """Take over new values; ValueError for a field or fault that does not exist."""
        unknown = [*(set(changes) - set(asdict(self))), *(set(changes.get("faults", {})) - {*TRANSPORT, *CONTENT})]
        if unknown:
            raise ValueError(f"no such setting or fault: {', '.join(sorted(unknown))}")
        for name, value in changes.items():
            setattr(self, name, value)


@dataclass
class Ask:
    """What a chat request is about."""

    text: str
    image: str | None = None  # sha256 of the first image's bytes
    media_ok: bool | None = None

    @property
    def identity(self) -> str:
        return self.image or hashlib.sha256(self.text.encode()).hexdigest()

    @classmethod
    def read(cls, request: Json) -> Ask:
        """The user's text and the first image sent as data; raises one of `MISTAKES` for a malformed request."""
        texts, urls = [], []
        for message in request["messages"]:
            parts = message.get("content") or []
            for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
                if part["type"] == "text" and message["role"] == "user":
                    texts.append(part["text"])
                elif part["type"] == "image_url" and part["image_url"]["url"].startswith("data:"):
                    urls.append(part["image_url"]["url"])
        if not urls:
            return cls("\n".join(texts))
        declared, _, encoded = urls[0].partition(";base64,")
        data = base64.b64decode(encoded, validate=True)
        webp = "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None
        true = next((name for magic, name in MAGIC if data.startswith(magic)), webp)
        return cls("\n".join(texts), hashlib.sha256(data).hexdigest(), declared == f"data:image/{true}")


@dataclass
class Reply:
    """An answer to be sent; one with tokens is paid for once it is sent."""

    body: Any
    status: int = 200
    outcome: str = "good"
    headers: dict[str, str] = field(default_factory=dict)
    tokens: int = 0


def error(status: int, outcome: str, message: str, code: str | None = None, **more: Any) -> Reply:
    """An error in OpenAI's format."""
    kind = "server_error" if status >= 500 else "requests" if status == 429 else "invalid_request_error"
    kind = "insufficient_quota" if code == "insufficient_quota" else kind
    body = {"message": message, "type": kind, "param": more.get("param"), "code": code}
    return Reply({"error": body}, status, outcome, more.get("headers", {}))


def paragraph(image: str, name: str) -> str:
    """30 to 60 words that depend on the image and the property only."""
    rng = random.Random(f"{image} {name}")
    sentences = []
    for _ in range(rng.randint(5, 10)):
        (a, b), (n, m) = rng.sample(ADJECTIVES, 2), rng.sample(NOUNS, 2)
        sentences.append(f"{a.capitalize()} {n} {rng.choice(VERBS)} {rng.choice(PLACES)} {b} {m}.")
    return " ".join(sentences)


def fill(schema: Json, image: str, name: str = "answer") -> Any:
    """A value that fits a plain JSON schema: text for strings, three short items for lists of strings."""
    kind = schema.get("type", "string")
    if kind == "object":
        parts = schema.get("properties", {})
        return {key: fill(parts[key], image, key) for key in schema.get("required", parts)}
    if kind == "array":
        rng = random.Random(f"{image} {name}")
        return [f"{rng.choice(ADJECTIVES)} {noun}" for noun in rng.sample(NOUNS, 3)]
    default = {"integer": 3, "number": 0.5, "boolean": True}.get(kind)
    return schema.get("enum", [default])[0] or paragraph(image, name)


def completion(request: Json, ask: Ask, fault: str | None, config: Config) -> Reply:
    """The chat completion, good or with a fault of content."""
    wanted = {} if config.ignore_schemas else request.get("response_format") or {}
    schema = wanted["json_schema"]["schema"] if wanted.get("type") == "json_schema" else FREE
    parts = fill(schema, "the same for all" if fault == "duplicate" else ask.identity)
    if fault == "names_emotion":
        gold = re.search(rf"\b({'|'.join(LABELS)})\b", ask.text.lower())
        texts = [key for key, value in parts.items() if isinstance(value, str)]
        parts["reasoning" if "reasoning" in texts else texts[-1]] += f" All this evokes {gold[1] if gold else 'awe'}."
    if fault == "wrong_schema":
        content = json.dumps({"summary": paragraph(ask.identity, "summary"), "score": 7})
    elif wanted.get("type", "text") != "text":
        content = json.dumps(parts)
    else:
        content = f"Conversation: {parts['conversation']}\n\nReasoning: {parts['reasoning']}\n\n"
        content += f"Key elements: {', '.join(parts['key_elements'])}"
    half, sorry = content[: len(content) // 2], "I'm sorry, but I can't help with that."
    broken = {"malformed": half, "length": half, "refusal": None, "refusal_text": sorry, "empty": "", "filter": None}
    content, refusal = broken.get(fault, content), sorry if fault == "refusal" else None
    reads, writes = 85 + len(ask.text) // 4, int(len((content or refusal or "").split()) * 1.3)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content, "refusal": refusal},
        "finish_reason": {"length": "length", "filter": "content_filter"}.get(fault, "stop"),
    }
    body = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time())}
    body |= {"model": f"{request['model']}-2025-04-14", "choices": [choice]}
    if config.usage:
        body["usage"] = {"prompt_tokens": reads, "completion_tokens": writes, "total_tokens": reads + writes}
    return Reply(body, outcome=fault or "good", tokens=reads + writes)


def multipart(content_type: str, body: bytes) -> dict[str, tuple[str, bytes]]:
    """{field: (filename, value)} of a form upload."""
    mark = b"--" + re.search(r'boundary="?([^";]+)', content_type)[1].encode()
    fields, at = {}, body.index(mark) + len(mark)
    while body[at : at + 2] != b"--":
        start = body.index(b"\r\n\r\n", at)
        end = body.index(b"\r\n" + mark, start)
        found = dict(re.findall(r'\b(name|filename)="([^"]*)"', body[at:start].decode()))
        fields[found["name"]] = (found.get("filename", ""), body[start + 4 : end])
        at = end + 2 + len(mark)
    return fields


def new_row(path: str) -> Json:
    """A row of the log before anything is known of the answer."""
    empty = {"image": None, "media_ok": None, "prompt": "", "outcome": "good", "status": None, "paid": False}
    return {"t": time.monotonic(), "done": 0.0, "path": path, **empty, "tokens": 0, "authorization_ok": True}


class Api:
    """The server's state and answers."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self.rows = (folder / "requests.jsonl").open("ab", buffering=0)  # one write a row
        stored = folder / "state.json"
        self.state: dict[str, dict[str, Json]] = json.loads(stored.read_text()) if stored.exists() else {}
        self.files, self.batches = self.state.setdefault("files", {}), self.state.setdefault("batches", {})
        self.asked, self.faulted = Counter[str](), Counter[str]()
        self.recent: deque[tuple[float, int]] = deque()  # time and tokens of the requests let in
        self.answers = self.paid = 0
        unfinished = [batch for batch in self.batches.values() if batch["status"] in OPEN_BATCH]
        self.tasks = {asyncio.create_task(self.run_batch(batch)) for batch in unfinished}

    def save(self) -> None:
        """Put the list of files and batches where a restarted server finds it."""
        (self.folder / "state.tmp").write_text(json.dumps(self.state))
        (self.folder / "state.tmp").replace(self.folder / "state.json")

    def write_row(self, row: Json) -> None:
        self.rows.write(json.dumps({**row, "done": time.monotonic()}).encode() + b"\n")

    def configure(self, changes: Json) -> Reply:
        """Change settings; setting a count starts its counting anew."""
        self.config.change(changes)
        self.answers *= "down_after" not in changes
        self.paid *= "quota_after" not in changes
        return Reply({})

    @property
    def down(self) -> bool:
        return self.config.down_after is not None and self.answers >= self.config.down_after

    def draw(self, ask: Ask, shares: dict[str, float]) -> str | None:
        """The fault that hits this request; depends on seed, image and attempt, not on the order of arrival."""
        attempt, limit = self.asked[ask.identity], self.config.max_faults_per_image
        self.asked[ask.identity] += 1
        left = random.Random(f"{self.config.seed} {ask.identity} {attempt}").random()
        for kind, share in shares.items():
            left -= share
            if left < 0 and (limit is None or self.faulted[ask.identity] < limit):
                self.faulted[ask.identity] += 1
                return kind
        return None

    def unsupported(self, request: Json) -> Reply | None:
        """400 for a parameter that this server was told not to know."""
        only = self.config.completion_tokens_param
        other = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}.get(only)
        if not self.config.schemas and (request.get("response_format") or {}).get("type") == "json_schema":
            param, message = "response_format", "response_format json_schema is not supported"
        elif other in request:
            param, message = other, f"Unsupported parameter: '{other}' is not supported. Use '{only}' instead."
        else:
            return None
        return error(400, "unsupported", message, "unsupported_parameter", param=param)

    def over_limit(self, tokens: int) -> Reply | None:
        """429 when the sliding window is full; else the request is let in and counted."""
        now, config, recent = time.monotonic(), self.config, self.recent
        while recent and recent[0][0] <= now - config.window_s:
            recent.popleft()
        full = config.rpm is not None and len(recent) >= config.rpm
        if not full and (config.tpm is None or sum(n for _, n in recent) + tokens <= config.tpm):
            recent.append((now, tokens))
            return None
        wait = recent[0][0] + config.window_s - now if recent else config.window_s
        message = f"Rate limit reached. Please try again in {wait:.3f}s."
        return error(429, "limited", message, "rate_limit_exceeded", headers={"retry-after": f"{wait:.3f}"})

    def chat(self, body: bytes, row: Json) -> Reply:
        """POST /v1/chat/completions."""
        request, config = json.loads(body), self.config
        ask = Ask.read(request)
        row.update(image=ask.image, media_ok=ask.media_ok, prompt=ask.text[:200])
        if refused := self.unsupported(request):
            return refused
        if config.quota_after is not None and self.paid >= config.quota_after:
            return error(429, "quota", "You exceeded your current quota.", "insufficient_quota")
        if refused := self.over_limit(completion(request, ask, None, config).tokens if config.tpm else 0):
            return refused
        fault = self.draw(ask, config.faults)
        if fault in ERRORS:
            status, message, code, headers = ERRORS[fault]
            extra = {"retry-after-ms": "200"} if fault == "rate_limit" and config.retry_ms else {}
            return error(status, fault, message, code, headers={**headers, **extra})
        if fault == "bad_body":
            return Reply(b"<html>Welcome</html>", outcome=fault, headers={"content-type": config.bad_body_type})
        reply = completion(request, ask, fault, config)
        reply.tokens *= fault not in TRANSPORT  # stalled and cut answers hold none of the quota
        return reply

    def add_file(self, filename: str, purpose: str, data: bytes) -> Json:
        """Keep a file."""
        file_id = f"file-{uuid.uuid4().hex[:24]}"
        (self.folder / file_id).write_bytes(data)
        about = {"id": file_id, "object": "file", "bytes": len(data), "created_at": int(time.time())}
        self.files[file_id] = {**about, "filename": filename, "purpose": purpose, "status": "processed"}
        self.save()
        return self.files[file_id]

    def upload(self, headers: dict[str, str], body: bytes) -> Reply:
        """POST /v1/files."""
        fields, limit = multipart(headers["content-type"], body), self.config.file_limit_bytes
        filename, data = fields["file"]
        if limit is not None and len(data) > limit:
            return error(400, "too_large", "File is too large.")  # as OpenAI says it
        return Reply(self.add_file(filename, fields["purpose"][1].decode(), data))

    def create_batch(self, body: bytes) -> Reply:
        """POST /v1/batches."""
        asked, now = json.loads(body), time.time()
        if asked["input_file_id"] not in self.files:
            return error(400, "bad_request", "No such File object", param="input_file_id")
        if asked["endpoint"] != CHAT or asked["completion_window"] != "24h":
            return error(400, "bad_request", "Invalid endpoint or completion_window", param="endpoint")
        batch = {"id": f"batch_{uuid.uuid4().hex[:24]}", "object": "batch", "status": "validating", "_created": now}
        batch |= {name: asked.get(name) for name in ("endpoint", "input_file_id", "completion_window", "metadata")}
        batch |= {"created_at": int(now), "request_counts": {"total": 0, "completed": 0, "failed": 0}}
        batch |= dict.fromkeys(("output_file_id", "error_file_id", "errors"))
        self.batches[batch["id"]] = batch
        self.save()
        self.tasks.add(asyncio.create_task(self.run_batch(batch)))
        return Reply(self.shown(batch))

    def progress(self, batch: Json) -> float:
        return min(1.0, (time.time() - batch["_created"]) / max(self.config.batch_seconds, 1e-9))

    def shown(self, batch: Json) -> Json:
        """A batch as clients see it."""
        shown = {key: value for key, value in batch.items() if not key.startswith("_")}
        if batch["status"] == "in_progress":
            counts = batch["request_counts"]
            shown["request_counts"] = {**counts, "completed": int(counts["total"] * self.progress(batch))}
        return shown

    def cancel(self, batch: Json) -> Reply:
        """POST /v1/batches/{id}/cancel: what is done by then is paid for and kept."""
        if batch["status"] not in OPEN_BATCH:
            return error(409, "conflict", f"Cannot cancel a batch with status '{batch['status']}'.")
        self.enter(batch, "cancelling", _done=self.progress(batch))
        return Reply(self.shown(batch))

    def enter(self, batch: Json, status: str, **more: Any) -> None:
        """Bring a batch to its next status."""
        batch |= {"status": status, f"{status}_at": int(time.time()), **more}
        self.save()

    async def run_batch(self, batch: Json) -> None:
        """From validation to the output files."""
        lines = (self.folder / batch["input_file_id"]).read_bytes().splitlines()
        seen, errors = set[str](), []
        for number, line in enumerate(lines, 1):
            await asyncio.sleep(0)  # other requests have their turn
            try:
                item = json.loads(line)
                code = "invalid_url" if item["url"] != CHAT else None
                code = "duplicate_custom_id" if item["custom_id"] in seen else code
                seen.add(item["custom_id"])
            except MISTAKES:
                code = "invalid_json_line"
            if code:
                errors.append({"code": code, "line": number, "message": f"Line {number}: {code}", "param": None})
        if errors or not lines:
            errors = errors or [{"code": "empty_file", "line": None, "message": "No requests", "param": None}]
            return self.enter(batch, "failed", errors={"object": "list", "data": errors})
        batch["request_counts"]["total"] = len(lines)
        if batch["status"] == "validating":
            self.enter(batch, "in_progress")
        while batch["status"] == "in_progress" and self.progress(batch) < 1:
            await asyncio.sleep(0.02)
        done = len(lines) if batch["status"] == "in_progress" else int(len(lines) * batch["_done"])
        rows, outputs = [], {"output": [], "error": []}
        for number, line in enumerate(lines):
            await asyncio.sleep(0)
            rows.append(new_row("/v1/batches#item"))
            output = self.item(json.loads(line), rows[-1], number < done)
            outputs["output" if rows[-1]["paid"] else "error"].append(json.dumps(output) + "\n")
        self.finish(batch, rows, outputs)

    def finish(self, batch: Json, rows: list[Json], outputs: dict[str, list[str]]) -> None:
        """Output files, state and log in one go: a server killed before it has billed nothing."""
        for kind in filter(outputs.get, outputs):
            data = "".join(outputs[kind]).encode()
            batch[f"{kind}_file_id"] = self.add_file(f"{batch['id']}_{kind}.jsonl", "batch_output", data)["id"]
        batch["request_counts"] |= {"completed": len(outputs["output"]), "failed": len(outputs["error"])}
        expired = any(row["outcome"] == "batch_expired" for row in rows)
        self.enter(batch, "cancelled" if "_done" in batch else "expired" if expired else "completed")
        for row in rows:
            self.write_row(row)
            self.paid += row["paid"]

    def item(self, item: Json, row: Json, done: bool) -> Json:
        """One line of a batch's output or error file."""
        output = {"id": f"batch_req_{uuid.uuid4().hex[:24]}", "custom_id": item["custom_id"]}
        config = self.config
        shares = {"batch_expired": config.batch_expire_share, "batch_error": config.batch_error_share}
        shares |= {kind: share for kind, share in config.faults.items() if kind in CONTENT}
        try:
            ask = Ask.read(item["body"])
            row.update(image=ask.image, media_ok=ask.media_ok, prompt=ask.text[:200])
            kind = self.draw(ask, shares) if done else "batch_cancelled"
            if kind in ("batch_expired", "batch_cancelled"):
                row["outcome"] = kind
                return {**output, "response": None, "error": {"code": kind, "message": "Not executed in time."}}
            failed = error(500, kind, "The server had an error.") if kind == "batch_error" else None
            reply = self.unsupported(item["body"]) or failed or completion(item["body"], ask, kind, config)
        except MISTAKES as problem:
            reply = error(400, "bad_request", f"Invalid request: {problem!r}")
        row.update(outcome=reply.outcome, status=reply.status, paid=reply.tokens > 0, tokens=reply.tokens)
        response = {"status_code": reply.status, "request_id": uuid.uuid4().hex, "body": reply.body}
        return {**output, "response": response, "error": None}

    def page(self, entries: list[Json], query: dict[str, str], limit: int) -> Reply:
        """A list, newest first."""
        entries = entries[::-1]
        start = [entry["id"] for entry in entries].index(query["after"]) + 1 if "after" in query else 0
        end = start + int(query.get("limit", limit))
        return Reply({"object": "list", "data": entries[start:end], "has_more": end < len(entries)})

    def route(self, method: str, target: str, headers: dict[str, str], body: bytes, row: Json) -> Reply:
        """The answer to a request."""
        query, key = dict(parse_qsl(urlsplit(target).query)), headers.get("authorization", "").removeprefix("Bearer ")
        row["authorization_ok"] = self.config.api_key in (None, key)
        if not row["authorization_ok"]:  # the key is told to its sender, as some servers do, and to no one else
            return error(401, "unauthorized", f"Incorrect API key provided: {key}.", "invalid_api_key")
        match method, *row["path"].strip("/").split("/")[1:]:
            case "POST", "chat", "completions":
                return self.chat(body, row)
            case "GET", "models":
                return Reply({"object": "list", "data": [MODEL]})
            case "POST", "files":
                return self.upload(headers, body)
            case "GET", "files":
                purpose = query.get("purpose")
                found = [about for about in self.files.values() if purpose in (None, about["purpose"])]
                return self.page(found, query, 10_000)
            case "GET", "files", file_id if file_id in self.files:
                return Reply(self.files[file_id])
            case "GET", "files", file_id, "content" if file_id in self.files:
                return Reply((self.folder / file_id).read_bytes(), headers={"content-type": "application/binary"})
            case "DELETE", "files", file_id if file_id in self.files:
                del self.files[file_id]  # the bytes stay, for a batch that reads them
                self.save()
                return Reply({"id": file_id, "object": "file", "deleted": True})
            case "POST", "batches":
                return self.create_batch(body)
            case "GET", "batches":
                return self.page([self.shown(batch) for batch in self.batches.values()], query, 20)
            case "GET", "batches", batch_id if batch_id in self.batches:
                return Reply(self.shown(self.batches[batch_id]))
            case "POST", "batches", batch_id, "cancel" if batch_id in self.batches:
                return self.cancel(self.batches[batch_id])
        return error(404, "not_found", f"Invalid URL or no such object ({method} {row['path']})")

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Requests of one connection, until either side closes it."""
        writer.transport.set_write_buffer_limits(high=0)  # so that drain waits for the last byte
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self.exchange(reader, writer):
                pass
        writer.close()

    async def exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False to close the connection."""
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip().split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        row, size = new_row(urlsplit(target).path), int(headers.get("content-length", 0))
        if self.down and row["path"] != SETTINGS:
            return await self.send(Reply(None), reader, writer, row)
        limit = FILE_BYTES if row["path"] == "/v1/files" else CHAT_BYTES
        if size > limit or "transfer-encoding" in headers:
            while size > 0:  # a client that is still sending would not read the answer
                size -= len(await reader.read(2**20)) or size
            reply = error(413, "too_large", f"Body of unknown length, or larger than {limit} bytes")
            await self.send(reply, reader, writer, row)
            return False
        body = await reader.readexactly(size)
        row["t"] = time.monotonic()
        try:
            ours = row["path"] == SETTINGS
            reply = self.configure(json.loads(body)) if ours else self.route(method, target, headers, body, row)
        except MISTAKES as problem:
            reply = error(400, "bad_request", f"Invalid request: {problem!r}")
        return await self.send(reply, reader, writer, row) and headers.get("connection", "").lower() != "close"

    async def send(self, reply: Reply, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, row: Json) -> bool:
        """Send an answer, or what its fault makes of it, and log it; False if the connection is to be closed."""
        ours, payable = row["path"] == SETTINGS, reply.tokens > 0
        self.paid += payable  # already now, so that no more than the quota can be under way
        if reply.outcome == "stall":
            with suppress(TimeoutError):  # read returns when the client gives up
                await asyncio.wait_for(reader.read(1), self.config.stall_s)
        elif row["path"] == CHAT and reply.status in (200, 500) and not self.down:
            await asyncio.sleep(max(0, row["t"] + self.config.latency_s - time.monotonic()))
        silent = "stall" if reply.outcome == "stall" else "gone" if reader.at_eof() else None
        silent = "down" if self.down and not ours else silent
        if not silent:
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            headers = {"content-type": "application/json", "x-request-id": f"req_{uuid.uuid4().hex}", **reply.headers}
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            first = f"HTTP/1.1 {reply.status} {http.client.responses[reply.status]}"
            head = f"{first}\r\n{lines}content-length: {len(body)}\r\n\r\n".encode()
            writer.write(head + (body[: len(body) // 2] if reply.outcome == "cut" else body))
            self.answers += not ours
            try:
                await writer.drain()
            except ConnectionError:
                silent = "gone"
        sent = not silent and reply.outcome != "cut"
        self.paid -= payable and not sent
        row.update(outcome=silent or reply.outcome, status=None if silent else reply.status)
        row.update(paid=payable and sent, tokens=reply.tokens * sent)
        if not ours:
            self.write_row(row)
        return sent


async def main() -> None:
    """Listen until killed, or until the parent that was named is gone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="log, files and state")
    parser.add_argument("--config", type=Path, help="JSON file with fields of Config")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--parent", type=int, help="process to end with")
    arguments = parser.parse_args()
    config = Config()
    config.change(json.loads(arguments.config.read_text()) if arguments.config else {})
    arguments.folder.mkdir(parents=True, exist_ok=True)
    api = Api(arguments.folder, config)
    server = await asyncio.start_server(api.connection, "127.0.0.1", arguments.port, limit=2**20, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    while arguments.parent in (None, os.getppid()):
        await asyncio.sleep(1)


@dataclass
class Server:
    """A running server, as tests see it."""

    base_url: str
    folder: Path

    def log(self) -> list[Json]:
        """All rows so far, those of earlier servers in this folder included."""
        with suppress(OSError):
            self.configure()  # an answer that a client has seen is in the log when this returns
        path = self.folder / "requests.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def configure(self, **changes: Any) -> None:
        """Change settings of the running server; ValueError for one that does not exist."""
        connection = http.client.HTTPConnection(urlsplit(self.base_url).netloc, timeout=10)
        connection.request("POST", "/_config", json.dumps(changes), {"connection": "close"})
        answer = connection.getresponse()
        problem = answer.read().decode()
        connection.close()
        if answer.status != 200:
            raise ValueError(problem)


@contextmanager
def serve(folder: Path, *, port: int = 0, **config: Any) -> Iterator[Server]:
    """A server in its own process, killed at the end; same folder and port: the same server restarted."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "config.json"
    settings.write_text(json.dumps(config))
    command = [sys.executable, __file__, "--folder", str(folder), "--config", str(settings), "--port", str(port)]
    process = subprocess.Popen([*command, "--parent", str(os.getpid())], stdout=subprocess.PIPE, text=True)
    try:
        base_url = process.stdout.readline().strip()
        settings.unlink()  # it may hold a key
        if not base_url:
            raise RuntimeError(f"the server ended with {process.wait()}")
        yield Server(base_url, folder)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
