"""Triplets by the Batch API: half the price, an answer within a day.

A part is one request file and its batch. Each step (written, uploaded, submitted, merged) is noted in
`OUT/triplets/<dataset>.batches.json` before the next; what the note may have missed is looked up at the server, so
that an interrupted run neither pays twice nor loses an answer.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from emonb.annotate.log import Answers
from emonb.annotate.online import INTERRUPTED, LIMIT, connect, explain, renamed, token_limit
from emonb.annotate.request import encode_picture, read_reply, scrub
from emonb.errors import EmonbError, UnreadablePicture
from emonb.files import make_folder, read_json, write_json

_ENDPOINT = "/v1/chat/completions"
_OVER = ("completed", "expired", "cancelled")  # with what was answered until then
_NOT_ANSWERED = ("batch_expired", "batch_cancelled")  # not paid, and no fault of the image
_CANCELLED = "a batch was cancelled at the server; start again to ask for the rest"


class Batches:
    """The parts of one dataset: each has name, status, images, form, asked_of, prompt_sha256, file_id, batch_id."""

    def __init__(self, answers: Answers, say: Callable[[str], None]) -> None:
        self.answers, self.settings, self.say = answers, answers.settings, say
        self.sdk = connect(self.settings)
        self.file = _note(answers.path)
        self.folder = make_folder(answers.path.with_name(f".{answers.path.stem}.batches"))
        self.parts = read_parts(answers.path)
        self.new: set[str] = set()  # parts of this run: the server cannot know them yet
        self.answered: dict[str, int] = {}  # images that the server is done with, by part
        self.stopped = ""
        noted = tuple(f"{part['name']}." for part in self.open)
        for path in self.folder.iterdir():  # of a part that was not noted (nothing was sent), or is merged
            if not path.name.startswith(noted):
                path.unlink()

    @property
    def open(self) -> list[dict[str, Any]]:
        """Parts whose answers are not merged yet."""
        return [part for part in self.parts if part["status"] != "merged"]

    def run(self, patient: bool) -> str:
        """Submit what is missing, wait, merge; as many rounds as an image may be asked. Returns why it ended early.

        Raises:
            EmonbError: the server refuses the key, the model or a batch; a form that batches cannot have.
        """
        import openai

        try:
            idle = 0
            while idle <= self.settings.retries + 2 and self.stopped != _CANCELLED:  # two more for the forms
                done = len(self.answers.done)
                self._submit_all()
                submitted = bool(self.open)
                self._merge_all(patient)
                if self.open or not submitted:
                    break
                idle = 0 if len(self.answers.done) > done else idle + 1
        except KeyboardInterrupt:
            self.stopped = INTERRUPTED
        except (openai.APIError, AttributeError) as error:  # a page instead of an answer has no attributes
            raise explain(error, self.sdk) from None
        finally:
            self.sdk.close()
        to_come = f"{len(self.open)} batches are under way at the server; the same command fetches them"
        return "; ".join(filter(None, (self.stopped, to_come if self.open else "")))

    def _submit_all(self) -> None:
        """Finish parts that were interrupted, then make parts of everything that is missing."""
        for part in self.open:
            if part["status"] != "submitted":
                self._submit(part)
        taken = {image_id for part in self.open for image_id in self._ids(part)}
        rows = (row for row in self.answers.missing() if row["image_id"] not in taken)
        while part := self._write_part(rows):
            self._submit(part)

    def _merge_all(self, patient: bool) -> None:
        """Fetch and merge what is ready; with patience, everything."""
        said = ""
        while self.open:
            for part in self.open:
                if part["status"] == "submitted":
                    self._look(part)
            if not patient or not self.open:
                return
            now = f"{len(self.open)} batches open, {sum(self.answered.values()):,} images answered"
            if now != said:
                said = now
                self.say(said)
            time.sleep(self.settings.batch_poll_s)

    def _save(self, part: dict[str, Any], **changes: Any) -> None:
        part.update(changes)
        write_json(self.file, {"parts": self.parts})

    def _write_part(self, rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        """The next request file, as large as the API and the money allow; None if nothing is to be asked."""
        settings, form, ids, size = self.settings, self.answers.form, [], 0
        if form == "questions":
            raise EmonbError("triplets.answer_format: the Batch API needs a model that can do schema or sections")
        most = settings.batch_requests
        if settings.max_cost is not None:
            reserved = sum(part["images"] * self.answers.most[part["form"]][1] for part in self.open)
            room = settings.max_cost - self.answers.usd - reserved
            most = min(most, int(room / (self.answers.most[form][1] or 1e-9)))
        name = f"{self.answers.path.stem}-{len(self.parts):04}-{secrets.token_hex(4)}"  # its own at the server
        with (self.folder / f"{name}.jsonl").open("wb") as file:
            while len(ids) < most and size < settings.batch_mb * 1e6 * 0.95 - 1e6 and (row := next(rows, None)):
                try:
                    picture = encode_picture(row["path"], settings.max_side)
                except UnreadablePicture:
                    self.answers.give_up(row, "not a readable picture")
                    continue
                body = renamed(self.answers.requests(row, picture, form)[0], token_limit(self.sdk))
                line = {"custom_id": _custom_id(row["image_id"]), "method": "POST", "url": _ENDPOINT, "body": body}
                size += file.write(json.dumps(line).encode() + b"\n")
                ids.append(row["image_id"])
        if not ids:
            (self.folder / f"{name}.jsonl").unlink()
            self.stopped = LIMIT.format(settings.max_cost) if next(rows, None) else ""
            return None
        write_json(self.folder / f"{name}.ids.json", ids)
        part = {"name": name, "status": "written", "images": len(ids), "form": form}
        self.new.add(name)
        self.parts.append(part)
        self._save(part, asked_of=self.answers.asked[0], prompt_sha256=self.answers.asked[1])
        return part

    def _submit(self, part: dict[str, Any]) -> None:
        """Upload a part and make its batch, as far as that was not done before: twice would be paid twice."""
        files, batches, path = (), (), self.folder / f"{part['name']}.jsonl"
        if part["name"] not in self.new:  # an interrupted run made it: the server may have its file or batch
            files, batches = self.sdk.files.list(purpose="batch"), self.sdk.batches.list(limit=100)
        known = part.get("file_id") or next((file.id for file in files if file.filename == path.name), None)
        file_id = known or self.sdk.files.create(file=path, purpose="batch").id
        known = next((b.id for b in batches if b.input_file_id == file_id and b.status != "failed"), None)
        if known is None:
            self._save(part, file_id=file_id, status="uploaded")
            once = self.sdk.with_options(max_retries=0)  # a second try could make a second batch; the next run looks
            more = {"completion_window": "24h", "metadata": {"emonb": part["name"]}}
            known = once.batches.create(input_file_id=file_id, endpoint=_ENDPOINT, **more).id
        self._save(part, file_id=file_id, batch_id=known, status="submitted")
        self.new.discard(part["name"])
        path.unlink(missing_ok=True)
        self.say(f"submitted {part['name']}: {part['images']:,} images")

    def _ids(self, part: dict[str, Any]) -> list[str]:
        path = self.folder / f"{part['name']}.ids.json"
        if not path.is_file():
            raise EmonbError(
                f"triplets/{self.folder.name}/{path.name}: gone; restore it, or cancel {part['name']} at the server "
                f"and remove it from {self.file.name}: it would be paid a second time"
            )
        return read_json(path)

    def _look(self, part: dict[str, Any]) -> None:
        """How a batch is; merge its answers if it is over."""
        import openai

        try:
            batch = self.sdk.batches.retrieve(part["batch_id"])
            files = filter(None, (batch.output_file_id, batch.error_file_id)) if batch.status in _OVER else ()
            lines = [line for file_id in files for line in self.sdk.files.content(file_id).iter_lines()]
        except openai.NotFoundError:
            raise EmonbError(
                f"{self.sdk.base_url.host}: the batch {part['name']} or its answers are not there (another account? "
                f"deleted?); to ask again, remove it from triplets/{self.file.name}"
            ) from None
        counts = batch.request_counts
        self.answered[part["name"]] = expected = counts.completed + counts.failed if counts else 0
        if batch.status in _OVER:
            if len(lines) < expected and batch.status != "cancelled":
                raise EmonbError(f"{part['name']}: {len(lines):,} of {expected:,} answers came; start again for all")
            self._merge(part, lines)
            if batch.status == "cancelled":
                self.stopped = _CANCELLED
            for other in self.open:  # there is room in the queue again
                if other["status"] != "submitted":
                    self._submit(other)
        elif batch.status == "failed":
            self._failed(part, (batch.errors.data if batch.errors else None) or [])

    def _failed(self, part: dict[str, Any], errors: list[Any]) -> None:
        """The whole batch was refused. Too much queued: submitted again later; anything else ends the run."""
        said = scrub("; ".join(f"{e.code}: {e.message}" for e in errors) or "no reason given")
        if any(e.code == "token_limit_exceeded" for e in errors) and len(self.open) > 1:
            self._save(part, status="uploaded")
            self.say(f"{part['name']}: {said}; it will be submitted again when another batch has ended")
            return
        self.parts.remove(part)
        self._save(part)
        where = f"{self.sdk.base_url.host} refused {part['name']} ({said})"
        raise EmonbError(f"{where}; nothing was paid: correct it, start again")

    def _merge(self, part: dict[str, Any], lines: list[str]) -> None:
        """Judge the answers of a part; a merge that was interrupted goes on where it was."""
        found = {}
        for text in lines:
            with suppress(ValueError, KeyError, TypeError):  # a line that cannot be read: its image is asked again
                line = json.loads(text)
                found[line["custom_id"]] = line
        rows = {row["image_id"]: row for row in self.answers.rows if row["image_id"] not in self.answers.done}
        for image_id in self._ids(part):
            line = found.get(_custom_id(image_id))
            if line and image_id in rows and (image_id, part["name"]) not in self.answers.received:
                self._receive(rows[image_id], line, part)
        self._save(part, status="merged")
        for path in self.folder.glob(f"{part['name']}.*"):
            path.unlink()

    def _receive(self, row: dict[str, Any], line: dict[str, Any], part: dict[str, Any]) -> None:
        more = {"batch": part["name"], "asked_of": part["asked_of"], "prompt_sha256": part["prompt_sha256"]}
        response, error = (
            line.get(name) if isinstance(line.get(name), dict) else {} for name in ("response", "error")
        )
        status, body = response.get("status_code"), response.get("body")
        if status == 200:
            with suppress(ValueError):
                return self.answers.receive(row, [read_reply(body)], part["form"], **more)
        if error.get("code") not in _NOT_ANSWERED:
            said = json.dumps(body or error)
            if status in (400, 422) and "response_format" in said:
                self.answers.refused_forms.add(part["form"])
            self.answers.give_up(row, f"status {status}: {said}", **more)
        return None


def read_parts(path: Path) -> list[dict[str, Any]]:
    """The parts that were made for a triplets file; raises `EmonbError` for a damaged note of them."""
    file, fields = _note(path), {"name", "status", "images", "form", "asked_of", "prompt_sha256"}
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        parts = json.loads(file.read_text(encoding="utf-8"))["parts"] if file.is_file() else []
        if all(fields <= part.keys() for part in parts):
            return parts
    raise EmonbError(
        f"triplets/{file.name}: damaged; restore a copy. Without it, batches under way are paid a second time: "
        f"cancel them at the server first (their metadata `emonb` begins with {path.stem!r}), then delete it"
    )


def open_parts(path: Path) -> list[dict[str, Any]]:
    """Those whose answers are not merged yet."""
    return [part for part in read_parts(path) if part["status"] != "merged"]


def refuse_open_parts(path: Path) -> None:
    """Raise `EmonbError` while batches are under way: their images would be paid twice, or their answers replaced."""
    if parts := open_parts(path):
        images = sum(part["images"] for part in parts)
        raise EmonbError(
            f"{len(parts)} batches with {images:,} images are not fetched yet; fetch them with --annotator batch "
            f"(or delete triplets/{_note(path).name}: what was submitted is paid all the same)"
        )


def _note(path: Path) -> Path:
    """`<dataset>.batches.json` beside `<dataset>.jsonl`: the parts and how far each is."""
    return path.with_name(f"{path.stem}.batches.json")


def _custom_id(image_id: str) -> str:
    """Short and free of odd characters; the same in every run."""
    return hashlib.sha256(image_id.encode()).hexdigest()[:40]
