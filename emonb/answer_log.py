"""Room 02: the two files that hold every paid answer, written so that a killed run loses none.

`OUT/triplets/<dataset>.jsonl` holds the triplets of accepted answers, `<dataset>.rejected.jsonl` the answers that
failed a check and the images that got none, each with its reason. Both only grow; each answer is one write,
flushed to the disk before it counts. Together they say what was asked, what came back and what it cost, so that
nothing else has to be kept: a run that starts again reads them and asks only for what is missing.
"""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from emonb.errors import EmonbError
from emonb.triplet_files import locked_triplets
from emonb.triplets import KINDS, has_paid_answers, triplet_line, validate_triplet

__all__ = ["AnswerLog", "rejected_path"]


def rejected_path(path: Path) -> Path:
    """`<dataset>.rejected.jsonl` beside `<dataset>.jsonl`."""
    return path.with_name(f"{path.stem}.rejected.jsonl")


class AnswerLog:
    """Accepted and rejected answers of one dataset; open for one process at a time.

    Attributes:
        done: images that have their triplets.
        origins: (model, prompt_sha256) of the paid ones.
        forms: how many images were answered in which form (here and below: of the model and prompt of `origin`).
        form_failures: how many answers were not in the form asked for, by form.
        tries: how many answers of an image failed a check; under (image, form) those that were not in that form.
        last: why the last answer of an image without triplets was rejected.
        reasons: how many rejected records have which reason, of whatever model.
        usage: tokens so far, summed by (model, "batch" or "").
        repairs: what was mended when the files were opened, in words.
    """

    def __init__(
        self,
        path: Path,
        origin: tuple[str, str] = ("", ""),
        on_accepted: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    ) -> None:
        """Open, lock, repair and read.

        Args:
            path: `OUT/triplets/<dataset>.jsonl`; need not exist.
            origin: (model, prompt_sha256) that is asked now: what another failed at does not count against it.
            on_accepted: is told the triplets of each image that the file holds already.

        Raises:
            EmonbError: another process writes here, or a line other than the last is damaged.
        """
        self.path, self.rejected, self.origin = path, rejected_path(path), origin
        self._lock = ExitStack()
        self._lock.enter_context(locked_triplets(path))
        self.done: set[str] = set()
        self.origins: set[tuple[str, str]] = set()
        self.forms: Counter[str] = Counter()
        self.form_failures: Counter[str] = Counter()
        self.tries: Counter[str | tuple[str, str]] = Counter()
        self.last: dict[str, str] = {}
        self.reasons: Counter[str] = Counter()
        self.usage: dict[tuple[str, str], Counter[str]] = {}
        self.repairs: list[str] = []
        try:
            if path.is_file() and not has_paid_answers(path, thorough=True):
                path.unlink()  # the offline annotator's: its artefact is in the store
            for file in (self.path, self.rejected):
                self._repair_last_line(file)
            self._read_accepted(on_accepted)
            for record in self.rejections():
                self._note_rejection(record)
            self._files = [file.open("ab", buffering=0) for file in (self.path, self.rejected)]
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            for file in self._files:
                file.close()
        finally:
            self._lock.close()

    def rejections(self) -> Iterator[dict[str, Any]]:
        """Records of the rejected file, one by one."""
        for number, _, record in _records(self.rejected):
            if not isinstance(record, dict) or not {"image_id", "reason"} <= record.keys():
                where = f"triplets/{self.rejected.name}, line {number}"
                raise EmonbError(f"{where}: field 'image_id' or 'reason' missing; delete the line")
            yield record

    def accept(self, triplets: list[dict[str, Any]]) -> None:
        """Append the triplets of one image; returns when they are on disk."""
        _append(self._files[0], "".join(map(triplet_line, triplets)))
        self._note_accepted(triplets)

    def reject(self, record: dict[str, Any]) -> None:
        """Append an answer that failed a check, or an image without an answer; returns when it is on disk."""
        _append(self._files[1], json.dumps(record, ensure_ascii=False) + "\n")
        self._note_rejection(record)

    def _note_rejection(self, record: dict[str, Any]) -> None:
        image_id, reason, form = record["image_id"], record["reason"], record.get("answer_format", "")
        self.reasons[reason] += 1
        self._note_usage(record)
        if reason == "no answer" or _origin(record) != self.origin:
            return
        self.last[image_id] = f"{reason} ({record.get('detail') or ''})".replace(" ()", "")
        if reason == "not in the asked form":
            self.form_failures[form] += 1
            self.tries[image_id, form] += 1
        else:
            self.tries[image_id] += 1

    def _note_usage(self, record: dict[str, Any]) -> None:
        usage = record.get("usage")
        if isinstance(usage, dict):
            key = (str(record.get("asked_of") or record.get("model")), "batch" if usage.get("batch") else "")
            count = self.usage.setdefault(key, Counter())
            count["answers"] += 1
            for field in ("prompt_tokens", "completion_tokens"):
                count[field] += usage.get(field) or 0

    def _repair_last_line(self, path: Path) -> None:
        """A last line that was cut by a crash is cut off; one that only lacks its newline gets it."""
        if not path.is_file() or not path.stat().st_size:
            return
        with path.open("rb+") as file:
            last, start = _last_line(file)
            if last.endswith(b"\n"):
                return
            try:
                json.loads(last)
            except ValueError:
                file.truncate(start)
                self.repairs.append(f"{path.name}: a torn last line of {len(last)} bytes was cut off")
            else:
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
                self.repairs.append(f"{path.name}: the last line's end was missing and was added")
            file.flush()
            os.fsync(file.fileno())

    def _read_accepted(self, on_accepted: Callable[[list[dict[str, Any]]], None]) -> None:
        """The lines of one answer stand together; a last group that is not whole is cut off."""
        start = 0
        group: list[dict[str, Any]] = []
        for number, offset, record in _records(self.path):
            validate_triplet(record, f"triplets/{self.path.name}, line {number}")
            if group and group[0]["image_id"] != record["image_id"]:
                self._note_accepted(group)
                on_accepted(group)
                start, group = offset, []
            group.append(record)
        if group and group[-1]["source"] == "openai" and group[-1]["kind"] != KINDS[-1]:
            with self.path.open("rb+") as file:
                file.truncate(start)
                os.fsync(file.fileno())
            self.repairs.append(f"{self.path.name}: the last answer had {len(group)} of 3 lines and was cut off")
        elif group:
            self._note_accepted(group)
            on_accepted(group)

    def _note_accepted(self, triplets: list[dict[str, Any]]) -> None:
        self.done.add(triplets[0]["image_id"])
        self.last.pop(triplets[0]["image_id"], None)
        if _origin(triplets[-1]) == self.origin:
            self.forms[triplets[-1].get("answer_format", "")] += 1
        for triplet in triplets:
            self._note_usage(triplet)
            if triplet["source"] == "openai":
                self.origins.add(_origin(triplet))


def _records(path: Path) -> Iterator[tuple[int, int, Any]]:
    """Line number, byte offset and content of each line that is not blank."""
    offset = 0
    if path.is_file():
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, offset, _parse(line, f"triplets/{path.name}, line {number}")
                offset += len(line)


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise EmonbError(f"{where}: not JSON; delete the line and run again: only its image is asked again") from None


def _origin(record: dict[str, Any]) -> tuple[str, str]:
    return str(record.get("asked_of") or record.get("model")), str(record.get("prompt_sha256"))


def _append(file: Any, text: str) -> None:
    """One write, on disk when this returns; a disk that is full leaves no half line."""
    data, start = text.encode("utf-8", "backslashreplace"), file.seek(0, os.SEEK_END)
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            file.truncate(start)
        name = Path(file.name).name
        raise EmonbError(f"triplets/{name}: cannot write ({error.strerror}); make room and start again") from None


def _last_line(file: Any) -> tuple[bytes, int]:
    """The bytes after the last but one newline, and where they start; read from the end in blocks."""
    end = position = file.seek(0, os.SEEK_END)
    tail = b""
    while position > 0:
        step = min(65536, position)
        position -= step
        file.seek(position)
        tail = file.read(step) + tail
        cut = tail.rfind(b"\n", 0, len(tail) - 1)
        if cut >= 0:
            return tail[cut + 1 :], position + cut + 1
    return tail, end - len(tail)
