"""Room 02: triplets by the Batch API: half the price, an answer within a day.

A part is one request file and its batch. Each step (written, uploaded, submitted, fetched, merged) is noted in
`OUT/triplets/<dataset>.batches.json` before the next; what the note may have missed is looked up at the server, so
that an interrupted run neither pays twice nor loses an answer.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from emonb.annotation import Annotation
from emonb.annotator import encode_picture
from emonb.errors import EmonbError
from emonb.files import make_folder, read_json, write_json
from emonb.progress import progress
from emonb.samples import iter_samples
from emonb.transport import BadBody, RefusedRequest, Server, public_name, read_completion, scrub

__all__ = ["run_batches"]

_ENDPOINT = "/v1/chat/completions"
_OVER = ("completed", "expired", "cancelled")  # with what was answered until then
_COLUMNS = ["image_id", "path", "label", "sha256"]


def run_batches(work: Annotation, *, patient: bool = True, say: Callable[[str], None] = print) -> str:
    """Submit what is missing, wait, merge; as many rounds as an image may be asked. Returns why it ended early.

    Raises:
        EmonbError: the server refuses the key, the model or a batch; a form that batches cannot have.
    """
    if work.form == "questions":
        raise EmonbError("triplets.answer_format: the Batch API needs schema or sections; set one of them")
    return _Batches(work, say).run(patient)


class _Batches:
    """The parts of one dataset; `state["parts"]` has name, status, images, form, file_id, batch_id of each."""

    def __init__(self, work: Annotation, say: Callable[[str], None]) -> None:
        self.work, self.say = work, say
        self.folder = make_folder(work.log.path.with_name(f".{work.dataset}.batches"))
        self.file = work.log.path.with_name(f"{work.dataset}.batches.json")
        self.state: dict[str, Any] = read_json(self.file) if self.file.is_file() else {"parts": []}
        noted = tuple(f"{part['name']}." for part in self.open)
        for path in self.folder.iterdir():  # of a part that was not noted: nothing of it was sent
            if not path.name.startswith(noted):
                path.unlink()
        self.server = Server(work.settings, threading.Event(), say)
        self.sdk = self.server.sdk.with_options(max_retries=work.settings.transport_retries)
        self.stopped = ""

    @property
    def open(self) -> list[dict[str, Any]]:
        """Parts whose answers are not merged yet."""
        return [part for part in self.state["parts"] if part["status"] != "merged"]

    def run(self, patient: bool) -> str:
        for _ in range(1 + self.work.settings.retries):
            self._submit_all()
            if not self.open:
                break
            total = sum(part["images"] for part in self.open)
            what = f"batches of {public_name(self.work.settings.model)} on {self.work.dataset}"
            try:
                for _ in progress(self._answered(patient), what, total=total, unit="image", note=self._note):
                    pass
            except KeyboardInterrupt:
                return f"interrupted: {len(self.open)} batches go on at the server; the same command fetches them"
            if self.open:
                return f"{len(self.open)} batches are not ready; the same command fetches them"
            if self.stopped:
                break
        return self.stopped

    def _note(self) -> str:
        usd = self.work.usd
        return f"{len(self.open)} batches open" + ("" if usd is None else f", ${usd:.2f} spent")

    def _save(self, part: dict[str, Any] | None = None, **changes: Any) -> None:
        if part is not None:
            part.update(changes)
        write_json(self.file, self.state)

    def _submit_all(self) -> None:
        """Finish parts that were interrupted, then make parts of everything that is missing."""
        for part in self.open:
            self._advance(part)
        taken = {image_id for part in self.open for image_id in self._ids(part)}
        rows = (row for row in self.work.missing() if row["image_id"] not in taken)
        while part := self._write_part(rows):
            self._advance(part)

    def _advance(self, part: dict[str, Any]) -> None:
        """Upload and submit a part, as far as that was not done before."""
        if part["status"] == "written":
            path = self.folder / f"{part['name']}.jsonl"
            with self.server.explained():
                known = next((f.id for f in self.sdk.files.list(purpose="batch") if f.filename == path.name), None)
                self._save(part, file_id=known or self.sdk.files.create(file=path, purpose="batch").id)
            self._save(part, status="uploaded")
            path.unlink(missing_ok=True)
        if part["status"] == "uploaded":
            self._save(part, batch_id=self._submit(part), status="submitted")
            self.say(f"submitted {part['name']}: {part['images']:,} images")

    def _submit(self, part: dict[str, Any]) -> str:
        """Create the batch, unless the server has it: a repeated request would be paid twice."""
        for attempt in range(1 + self.work.settings.transport_retries):
            with self.server.explained():
                batches = self.sdk.batches.list(limit=100)
                known = [b for b in batches if b.input_file_id == part["file_id"] and b.status != "failed"]
                if known:
                    return known[0].id
                try:
                    return self.server.sdk.batches.create(
                        input_file_id=part["file_id"],
                        endpoint=_ENDPOINT,
                        completion_window="24h",
                        metadata={"emonb": part["name"]},
                    ).id
                except Exception as error:
                    try:
                        delay = self.server.delay_after(error, attempt)
                    except RefusedRequest as refused:
                        raise EmonbError(f"{self.server.host}: {part['name']} was not taken: {refused}") from None
            time.sleep(delay)
        raise EmonbError(f"{self.server.host}: {part['name']} could not be submitted; start again to go on")

    def _write_part(self, rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        """The next request file, as large as the API and the money allow; None if nothing is to be asked."""
        settings, form = self.work.settings, self.work.form
        in_flight = sum(part["images"] for part in self.open)
        name = f"{self.work.dataset}-{len(self.state['parts']):04}-{secrets.token_hex(4)}"  # its own at the server
        path, ids, size = self.folder / f"{name}.jsonl", [], 0
        with path.open("wb") as file:
            while len(ids) < settings.batch_requests and size < settings.batch_mb * 1e6 * 0.95 - 1e6:
                if not self.work.affordable(in_flight + len(ids)):
                    self.stopped = (
                        f"the next answer could exceed the limit of ${settings.max_cost:g}; raise --max-cost"
                    )
                    break
                row = next(rows, None)
                if row is None:
                    break
                try:
                    picture = encode_picture(row["path"], settings.max_side)
                except EmonbError:
                    self.work.give_up(row, "not a readable picture")
                    continue
                body = self.server.body(self.work.requests(row, picture, form)[0])
                line = {"custom_id": _custom_id(row["image_id"]), "method": "POST", "url": _ENDPOINT, "body": body}
                size += file.write(json.dumps(line).encode() + b"\n")
                ids.append(row["image_id"])
        if not ids:
            path.unlink()
            return None
        write_json(self.folder / f"{name}.ids.json", ids)
        part = {"name": name, "status": "written", "images": len(ids), "form": form}
        self.state["parts"].append(part)
        self._save()
        return part

    def _ids(self, part: dict[str, Any]) -> list[str]:
        return read_json(self.folder / f"{part['name']}.ids.json")

    def _answered(self, patient: bool) -> Iterator[int]:
        """Poll, fetch and merge; yields once per image that the server is done with."""
        seen: dict[str, int] = {}
        while True:
            waiting = []
            for part in self.open:
                with self.server.explained():
                    batch = self.sdk.batches.retrieve(part["batch_id"])
                counts = batch.request_counts
                finished = (counts.completed + counts.failed) if counts else 0
                if batch.status in _OVER:
                    self._merge(part, batch)
                    finished = part["images"]
                elif batch.status == "failed":
                    self._failed(part, batch)
                else:
                    waiting.append(part)
                yield from range(seen.get(part["name"], 0), finished)
                seen[part["name"]] = max(finished, seen.get(part["name"], 0))
            if not waiting or not patient:
                return
            time.sleep(self.work.settings.batch_poll_s)

    def _failed(self, part: dict[str, Any], batch: Any) -> None:
        """The whole batch was refused. Too much queued: submitted again later; anything else ends the run."""
        errors = (batch.errors.data if batch.errors else None) or []
        said = scrub("; ".join(f"{e.code}: {e.message}" for e in errors) or "no reason given")
        if any(e.code == "token_limit_exceeded" for e in errors) and len(self.open) > 1:
            self._save(part, status="uploaded")
            self.say(f"{part['name']}: {said}; it will be submitted again")
            return
        self.state["parts"].remove(part)
        self._save()
        raise EmonbError(
            f"{self.server.host} refused {part['name']} ({said}); nothing was paid: correct it, start again"
        )

    def _merge(self, part: dict[str, Any], batch: Any) -> None:
        """Fetch the answers and judge them; a merge that was interrupted goes on where it was."""
        known = {r["image_id"] for r in self.work.log.rejections() if r.get("batch") == part["name"]}
        lines: dict[str, tuple[Path, int]] = {}
        for kind in ("output", "error"):
            file_id = getattr(batch, f"{kind}_file_id")
            if file_id:
                lines |= self._fetch(part, kind, file_id)
        for row in iter_samples(self.work.samples, "train", columns=_COLUMNS):
            place = lines.get(_custom_id(row["image_id"]))
            if place and row["image_id"] not in self.work.log.done and row["image_id"] not in known:
                with place[0].open("rb") as file:
                    file.seek(place[1])
                    self._receive(row, json.loads(file.readline()), part)
        self._save(part, status="merged")
        for path in self.folder.glob(f"{part['name']}.*"):
            path.unlink()

    def _fetch(self, part: dict[str, Any], kind: str, file_id: str) -> dict[str, tuple[Path, int]]:
        """Download a result file and index its lines: custom_id -> file, byte offset."""
        path = self.folder / f"{part['name']}.{kind}.jsonl"
        if not path.is_file():
            partial = path.with_suffix(".partial")
            with self.server.explained(), self.sdk.files.with_streaming_response.content(file_id) as response:
                response.stream_to_file(partial)
            partial.replace(path)
        found, offset = {}, 0
        with path.open("rb") as file:
            for line in file:
                with suppress(ValueError, KeyError, TypeError):  # a line that cannot be read: its image is asked again
                    found[json.loads(line)["custom_id"]] = (path, offset)
                offset += len(line)
        return found

    def _receive(self, row: dict[str, Any], line: dict[str, Any], part: dict[str, Any]) -> None:
        response, error = line.get("response") or {}, line.get("error") or {}
        if response.get("status_code") == 200:
            try:
                self.work.receive(row, [read_completion(response.get("body"))], part["form"], batch=part["name"])
            except BadBody as problem:
                self.work.give_up(row, str(problem), batch=part["name"])
            return
        if error.get("code") == "batch_expired":  # not answered in time, not paid: the next round asks again
            return
        said = (response.get("body") or {}).get("error") or error
        text = scrub(str(said.get("message") or said) if isinstance(said, dict) else str(said))
        if response.get("status_code") in (400, 422) and "response_format" in f"{said}":
            self.work.refused_forms.add(part["form"])
        self.work.give_up(row, f"status {response.get('status_code')}: {text}", batch=part["name"])


def _custom_id(image_id: str) -> str:
    """Short and free of odd characters; the same in every run."""
    return hashlib.sha256(image_id.encode()).hexdigest()[:40]
