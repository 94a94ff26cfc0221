"""Room 02: triplets by the Batch API: half the price, an answer within a day.

A part is one request file and its batch. Each step (written, uploaded, submitted, fetched, merged) is noted in
`OUT/triplets/<dataset>.batches.json` before the next; what the note may have missed is looked up at the server, so
that an interrupted run neither pays twice nor loses an answer.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emonb.annotation import Annotation
from emonb.annotator import encode_picture
from emonb.batch_files import GONE, custom_id, download, index_lines
from emonb.errors import EmonbError
from emonb.files import make_folder, read_json, write_json
from emonb.progress import progress
from emonb.samples import iter_samples
from emonb.transport import BadBody, RefusedRequest, Server, public_name, read_completion, scrub
from emonb.triplet_files import batches_path, read_batches

__all__ = ["run_batches"]

_ENDPOINT = "/v1/chat/completions"
_OVER = ("completed", "expired", "cancelled")  # with what was answered until then
_NOT_ANSWERED = ("batch_expired", "batch_cancelled")  # not paid, and no fault of the image
INTERRUPTED = "interrupted"
_COLUMNS = ["image_id", "path", "label", "sha256"]


def run_batches(work: Annotation, *, patient: bool = True, say: Callable[[str], None] = print) -> str:
    """Submit what is missing, wait, merge; as many rounds as an image may be asked. Returns why it ended early.

    Raises:
        EmonbError: the server refuses the key, the model or a batch; a form that batches cannot have.
    """
    batches = _Batches(work, say)
    try:
        return batches.run(patient)
    finally:
        batches.server.sdk.close()


class _Batches:
    """The parts of one dataset; `state["parts"]` has name, status, images, form, file_id, batch_id of each."""

    def __init__(self, work: Annotation, say: Callable[[str], None]) -> None:
        self.work, self.say = work, say
        self.folder = make_folder(work.log.path.with_name(f".{work.dataset}.batches"))
        self.file = batches_path(work.log.path)
        self.new: set[str] = set()  # parts of this run: the server cannot know them yet
        self.state: dict[str, Any] = {"parts": read_batches(work.log.path)}
        work.check_origins({(part["asked_of"], part["prompt_sha256"]) for part in self.open})
        noted = tuple(f"{part['name']}." for part in self.open)
        for path in self.folder.iterdir():  # of a part that was not noted: nothing of it was sent
            if not path.name.startswith(noted):
                path.unlink()
        self.server = Server(work.settings, threading.Event(), say)
        self.sdk = self.server.sdk.with_options(max_retries=work.settings.transport_retries)
        self.stopped, self.cancelled = "", False

    @property
    def open(self) -> list[dict[str, Any]]:
        """Parts whose answers are not merged yet."""
        return [part for part in self.state["parts"] if part["status"] != "merged"]

    def run(self, patient: bool) -> str:
        """Rounds of submitting and merging, until nothing is missing or a round brought nothing new."""
        idle = 0
        while idle <= self.work.settings.retries and not self.cancelled:
            before, self.stopped = len(self.work.log.done), ""
            self._submit_all()
            if not self.open:
                break
            total = sum(part["images"] for part in self.open)
            what = f"batches of {public_name(self.work.settings.model)} on {self.work.dataset}"
            try:
                for _ in progress(self._answered(patient), what, total=total, unit="image", note=self._note):
                    pass
            except KeyboardInterrupt:
                return INTERRUPTED if not self.open else f"{INTERRUPTED}; {self._to_come()}"
            if self.open:
                return self._to_come()
            idle = 0 if len(self.work.log.done) > before else idle + 1
        if self.cancelled:
            return "a batch was cancelled at the server; start again to ask for the rest"
        return self.stopped

    def _to_come(self) -> str:
        return f"{len(self.open)} batches are under way at the server; the same command fetches them"

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
                known = None
                if part["name"] not in self.new:  # written by a run that was interrupted: perhaps it is there
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
                if attempt or part["name"] not in self.new:
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
        if form == "questions":
            raise EmonbError("triplets.answer_format: the Batch API needs a model that can do schema or sections")
        in_flight = Counter()
        for part in self.open:
            in_flight[part["form"]] += part["images"]
        name = f"{self.work.dataset}-{len(self.state['parts']):04}-{secrets.token_hex(4)}"  # its own at the server
        path, ids, size = self.folder / f"{name}.jsonl", [], 0
        with path.open("wb") as file:
            while len(ids) < settings.batch_requests and size < settings.batch_mb * 1e6 * 0.95 - 1e6:
                row = next(rows, None)
                if row is None:
                    break
                if not self.work.affordable(in_flight + Counter({form: len(ids)})):
                    self.stopped = (
                        f"the next answer could exceed the limit of ${settings.max_cost:g}; raise --max-cost"
                    )
                    break
                try:
                    picture = encode_picture(row["path"], settings.max_side)
                except EmonbError:
                    self.work.give_up(row, "not a readable picture")
                    continue
                body = self.server.body(self.work.requests(row, picture, form)[0])
                line = {"custom_id": custom_id(row["image_id"]), "method": "POST", "url": _ENDPOINT, "body": body}
                size += file.write(json.dumps(line).encode() + b"\n")
                ids.append(row["image_id"])
        if not ids:
            path.unlink()
            return None
        write_json(self.folder / f"{name}.ids.json", ids)
        asked_of, prompt = self.work.origin
        part = {"name": name, "status": "written", "images": len(ids), "form": form}
        part |= {"asked_of": asked_of, "prompt_sha256": prompt}
        self.new.add(name)
        self.state["parts"].append(part)
        self._save()
        return part

    def _ids(self, part: dict[str, Any]) -> list[str]:
        path = self.folder / f"{part['name']}.ids.json"
        if not path.is_file():
            todo = f"restore it, or cancel {part['name']} at the server and remove it from {self.file.name}"
            raise EmonbError(f"triplets/{self.folder.name}/{path.name}: gone; {todo}: it would be paid a second time")
        return read_json(path)

    def _answered(self, patient: bool) -> Iterator[int]:
        """Poll, fetch and merge; yields once per image that the server is done with."""
        seen: dict[str, int] = {}
        while True:
            waiting = False
            for part in self.open:
                if part["status"] == "uploaded":  # put off: the queue was full
                    waiting = True
                    continue
                with self.server.explained(GONE.format(part=part["name"], file=self.file.name)):
                    batch = self.sdk.batches.retrieve(part["batch_id"])
                counts = batch.request_counts
                finished = (counts.completed + counts.failed) if counts else 0
                if batch.status in _OVER:
                    self._merge(part, batch)
                    finished = part["images"]
                    self.cancelled |= batch.status == "cancelled"
                    for other in self.open:  # there is room in the queue again
                        self._advance(other)
                elif batch.status == "failed":
                    self._failed(part, batch)
                    waiting = True
                else:
                    waiting = True
                yield from range(seen.get(part["name"], 0), finished)
                seen[part["name"]] = max(finished, seen.get(part["name"], 0))
            if not self.open or not (waiting and patient):
                return
            time.sleep(self.work.settings.batch_poll_s)

    def _failed(self, part: dict[str, Any], batch: Any) -> None:
        """The whole batch was refused. Too much queued: submitted again later; anything else ends the run."""
        errors = (batch.errors.data if batch.errors else None) or []
        said = scrub("; ".join(f"{e.code}: {e.message}" for e in errors) or "no reason given")
        if any(e.code == "token_limit_exceeded" for e in errors) and len(self.open) > 1:
            self.new.discard(part["name"])
            self._save(part, status="uploaded")
            self.say(f"{part['name']}: {said}; it will be submitted again when another batch has ended")
            return
        self.state["parts"].remove(part)
        self._save()
        raise EmonbError(
            f"{self.server.host} refused {part['name']} ({said}); nothing was paid: correct it, start again"
        )

    def _merge(self, part: dict[str, Any], batch: Any) -> None:
        """Fetch the answers and judge them; a merge that was interrupted goes on where it was."""
        known = {r["image_id"] for r in self.work.log.rejections() if r.get("batch") == part["name"]}
        counts, lines = batch.request_counts, {}
        for kind in ("output", "error"):
            file_id = getattr(batch, f"{kind}_file_id")
            if file_id:
                lines |= self._fetch(part, kind, file_id)
        expected = counts.completed + counts.failed if counts else 0
        if len(lines) < expected and batch.status != "cancelled":
            for path in self.folder.glob(f"{part['name']}.*.jsonl"):
                path.unlink()
            raise EmonbError(f"{part['name']}: {len(lines):,} of {expected:,} answers came; start again to fetch them")
        for row in iter_samples(self.work.samples, "train", columns=_COLUMNS):
            place = lines.get(custom_id(row["image_id"]))
            if place and row["image_id"] not in self.work.log.done and row["image_id"] not in known:
                with place[0].open("rb") as file:
                    file.seek(place[1])
                    self._receive(row, json.loads(file.readline()), part)
        self._save(part, status="merged")
        for path in self.folder.glob(f"{part['name']}.*"):
            path.unlink()

    def _fetch(self, part: dict[str, Any], kind: str, file_id: str) -> dict[str, tuple[Path, int]]:
        """Download a result file, unless it is there, and index its lines."""
        path = self.folder / f"{part['name']}.{kind}.jsonl"
        if not path.is_file():
            with self.server.explained(GONE.format(part=part["name"], file=self.file.name)):
                download(self.sdk, file_id, path)
        return index_lines(path)

    def _receive(self, row: dict[str, Any], line: dict[str, Any], part: dict[str, Any]) -> None:
        response, error = line.get("response") or {}, line.get("error") or {}
        if response.get("status_code") == 200:
            try:
                self.work.receive(row, [read_completion(response.get("body"))], part["form"], **self._origin(part))
            except BadBody as problem:
                self.work.give_up(row, str(problem), **self._origin(part))
            return
        if error.get("code") in _NOT_ANSWERED:
            return
        said = (response.get("body") or {}).get("error") or error
        text = scrub(str(said.get("message") or said) if isinstance(said, dict) else str(said))
        if response.get("status_code") in (400, 422) and "response_format" in f"{said}":
            self.work.refused_forms.add(part["form"])
        self.work.give_up(row, f"status {response.get('status_code')}: {text}", **self._origin(part))

    @staticmethod
    def _origin(part: dict[str, Any]) -> dict[str, str]:
        """What every record of a part says: the batch, and what was asked when it was submitted."""
        return {"batch": part["name"], "asked_of": part["asked_of"], "prompt_sha256": part["prompt_sha256"]}
