"""The files of the paid answers, and what follows from them: what is missing, what was spent, what is fit to teach.

`OUT/triplets/<dataset>.jsonl` holds the triplets of accepted answers, `<dataset>.rejected.jsonl` the answers that
failed a check and the images that got none, each with its reason; `OUT/asked/<dataset>__<model>.jsonl` the emotions
that a served model named. All only grow; each answer is one write, flushed to the disk before it counts.
`<dataset>.batches.json` names the batches under way. A run that starts again reads them, and nothing else has to be
kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import pandas as pd

from emonb import triplets as room
from emonb.annotate import request as asking
from emonb.annotate.request import FORMS, TOKENS, Answer
from emonb.data import parse_emotion
from emonb.errors import EmonbError
from emonb.files import locked, make_folder
from emonb.settings import TripletSettings
from emonb.triplets import Record

BATCHES, UNASSIGNED = ".batches.json", ".unassigned.txt"  # beside `<dataset>.jsonl`; lines that belong to no image
_NO_ANSWER, _UNREAD, _UNPARSABLE = "no answer", "not in the asked form", "unparsable"
_USELESS = ("refused", "cut off", "empty")  # a next answer is likely to be the same, whatever is asked
REMEDY = "choose another model, or other settings of triplets, and start again (what was paid is kept)"
_USELESS_IN_A_ROW = 8  # of one kind, in the order of arrival; ours: few enough to cost cents, with eight at a time
_FORM_FAILURES = 3  # unread answers in a form that the server never managed, before the next form is tried


def lock_answers(path: Path) -> AbstractContextManager[None]:
    """Hold a file of answers for one writer; raises `EmonbError` while another process has it."""
    make_folder(path.parent)
    busy = f"{path.parent.name}/{path.name}: another process is asking for these answers; wait until it has ended"
    return locked(path.with_name(f".{path.stem}.lock"), f"{busy}: nothing shall be paid twice")


class Log:
    """What a paid model is asked about images, what it said and what that cost; `Answers` and `Emotions` are such.

    These say what is asked (`requests`: the bodies for one image), judge what came (`_judge`: the answer, or (reason,
    detail) why it cannot be used), and put it on disk (`_write`: the answer, or None and the record of why).

    Attributes:
        rows: the images that may be asked for; `done`: those with an answer -> what is known of it.
        asked: model and hash of the prompt that are asked now; `limit`: what the server calls the token limit.
        unread: form -> answers that were not in it; minus infinity once one was, infinity if the server refuses it.
        most, most_usd: tokens in and out that one request takes at most, and what these cost.
        spent: tokens of all paid `answers`, and their `usd` (NaN: a price is unknown).
        max_cost: USD that these may reach, infinity where the user said that there is no price.
        useless: why asking on is of no use: the last answers of this run failed all in the same way; or "".
    """

    form: str  # to ask in now

    @classmethod
    @contextmanager
    def opened(cls, samples: pd.DataFrame, labels: Sequence[str], path: Path, *terms: Any) -> Iterator[Self]:
        """The log of a dataset, locked and mended; raises `EmonbError` for a second writer or a damaged file."""
        with lock_answers(path):
            files = [path, *map(path.with_suffix, (room.REJECTED, BATCHES, UNASSIGNED))]
            for file in files:
                _check_writable(file)
            for file in files[:2]:
                _mend(file)
            yield cls(samples, labels, path, *terms)

    def __init__(self, path: Path, settings: TripletSettings, prompt: str, bodies: list[Record], batch: bool) -> None:
        """`bodies`: the requests for an image, in each form that may be asked."""
        self.path, self.settings, self.batch, self.limit = path, settings, batch, "max_tokens"
        self.asked = (asking.public_name(settings.model), prompt)
        self.prices = asking.load_prices(settings)
        self.price = asking.find_price(self.prices, self.asked[0])
        self.most = asking.most_tokens(settings, bodies, self.price["image"])
        self.most_usd = asking.cost(self.price, *self.most, batch=batch)
        self.unread, self.spent, self.done = Counter[str](), Counter[str](), dict[str, Any]()
        self.max_cost = math.inf if settings.price == "none" else settings.max_cost
        self.useless, self._alike = "", (("", ""), 0)

    def is_missing(self, image_id: str) -> bool:
        """Whether an image is to be asked for."""
        return image_id not in self.done

    def check_fit(self) -> None:
        """Before anything is asked: raise `EmonbError` for a limit on the cost without a price."""
        if self.settings.price == "none":
            if "max_cost" in self.settings.model_fields_set:
                raise EmonbError("max_cost: is not kept without a price; leave out --max-cost or --no-price")
        elif self.missing() and math.isnan(self.spent["usd"] + self.most_usd):
            models = f"{self.asked[0]}, or of a model that answered before,"
            raise EmonbError(asking.unknown_price(models, self.settings))

    def can_afford(self, usd: float) -> bool:
        """Whether so much more keeps the limit."""
        return math.isinf(self.max_cost) or self.spent["usd"] + usd <= self.max_cost

    def missing(self) -> list[Record]:
        """Images that are to be asked for."""
        return [row for row in self.rows if self.is_missing(row["image_id"])]

    def receive(
        self, row: Record, replies: Sequence[Record], form: str, problem: str = "", filtered: bool = False, **more: Any
    ) -> None:
        """Judge what the server said to a form of the question about one image, and write it down.

        `problem`: why there was no (whole) answer; such an image is asked for again by the next run, unless it was
        `filtered`. `more` is to stand in every record, too.
        """
        verdict = ("refused" if filtered else _NO_ANSWER, problem) if problem else self._judge(row, replies, form)
        reason, detail = verdict if isinstance(verdict, tuple) else ("", "")
        if reason == "empty" and any(reply["thought"] for reply in replies):
            detail = "only thoughts came; raise triplets.max_output_tokens or switch thinking off"
        model = asking.public_name(replies[-1]["model"] if replies else "") or self.asked[0]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        origin = {"source": "openai", "model": model, "created": now, "prompt_sha256": self.asked[1]}
        origin |= {"asked_of": self.asked[0], "answer_format": form, **more}
        usage = None
        if replies:
            usage = {name: sum((reply["usage"] or self._most_usage)[name] for reply in replies) for name in TOKENS}
            usage |= {"batch": True} if self.batch else {}
        record = {"image_id": row["image_id"], "reason": reason, "detail": asking.scrub(detail)}
        record |= {"text": "\n\n".join(reply["text"] for reply in replies), **origin, "usage": usage}
        if reason != _NO_ANSWER:
            alike = self._alike[1] if self._alike[0] == (reason, form) else 0
            self._alike = (reason, form), alike + self._is_useless(row, reason, form)
        self._write(row, None if reason else verdict, record)
        if self._alike[1] >= _USELESS_IN_A_ROW:
            said = f"{reason} ({asking.scrub(detail)})" if detail else reason
            self.useless = f"{_USELESS_IN_A_ROW} answers in a row were {said}; {REMEDY}"

    def _is_useless(self, row: Record, reason: str, form: str) -> bool:
        """Whether an answer rejected for this reason says that the next one will be, too."""
        return reason in _USELESS

    @property
    def _most_usage(self) -> dict[str, int]:
        """Where the server does not count, the most that it can be."""
        return dict(zip(TOKENS, self.most, strict=True))

    def _note_cost(self, record: Record) -> None:
        if usage := record.get("usage"):
            tokens = asking.token_counts(usage) or self._most_usage
            price = asking.find_price(self.prices, _asked(record)[0])
            usd = asking.cost(price, *(tokens[name] for name in TOKENS), batch=bool(asking.dig(usage, "batch")))
            self.spent.update(answers=1, usd=usd, **tokens)

    @property
    def bill(self) -> str:
        """What all answers in the files cost, as people read it."""
        return "price unknown" if math.isnan(self.spent["usd"]) else f"${self.spent['usd']:,.4f}"

    def __str__(self) -> str:
        paid, sent, came = (self.spent[name] for name in ("answers", *TOKENS))
        return f"{paid:,} paid answers, {sent:,} tokens in, {came:,} out: {self.bill}"


class Answers(Log):
    """Accepted and rejected answers about the training images of one dataset; use `opened`.

    Attributes:
        done: image with triplets -> model and prompt that these answer.
        tries: image -> why its answers were rejected, and the form of those that could not be read.
    """

    def __init__(
        self, samples: pd.DataFrame, labels: Sequence[str], path: Path, settings: TripletSettings, batch: bool = False
    ) -> None:
        if path.is_file() and not room.has_paid_answers(path):
            path.unlink()  # the offline annotator's: its artefact is in the store
        bodies = [body for form in FORMS for body in asking.sample_requests(settings, labels, form, "x" * 300)]
        super().__init__(path, settings, room.prompts_sha256("annotator.yaml"), bodies, batch)
        self.rows, self.labels = samples[samples["split"] == "train"].to_dict("records"), labels
        self.tries = defaultdict[str, list[tuple[str, str]]](list)
        self._seen = room.NearDuplicates(settings.near_duplicate)
        for _, group in groupby(room.triplet_lines(path), lambda triplet: triplet["image_id"]):
            self._note_accepted([*group])
        for record in _records(path.with_suffix(room.REJECTED), "image_id", "reason"):
            self._note_rejected(record)
        self._kept = set[str]()  # lines that belong to no image
        if path.with_suffix(UNASSIGNED).is_file():
            self._note_kept(asking.text_lines(path.with_suffix(UNASSIGNED).read_bytes(), "replace"))

    def check_fit(self) -> None:
        """Also for answers, or batches under way, of another model or prompt."""
        others = {*self.done.values(), *map(_asked, open_batches(self.path))} - {self.asked}
        if others and not self.settings.mix:
            theirs, now = (f"{model} (prompt {prompt[:8]})" for model, prompt in (min(others), self.asked))
            raise EmonbError(
                f"triplets/{self.path.name}: holds answers of {theirs}, now asked is {now}; choose another results "
                "folder with --out, go on with the old one by --model, or set triplets.mix: true to have both"
            )
        super().check_fit()

    @property
    def form(self) -> str:
        """The form to ask in now: the chosen one, or the first that this server can do as far as is known."""
        if self.settings.answer_format != "auto":
            return self.settings.answer_format
        return next((form for form in FORMS if self.unread[form] < _FORM_FAILURES), FORMS[-1])

    def is_missing(self, image_id: str) -> bool:
        """Also not where the tries are used up; an unread answer is no try in another form."""
        tries = [form for _, form in self.tries[image_id] if form in ("", self.form)]
        return super().is_missing(image_id) and len(tries) <= self.settings.retries

    def requests(self, row: Record, picture: str, form: str) -> list[Record]:
        """Bodies of the requests for one image; why its last answer could not be used is told."""
        why, _ = (self.tries[row["image_id"]] or [("", "")])[-1]
        return asking.requests_for(row, picture, form, self.settings, why, self.limit)

    def _write(self, row: Record, verdict: Answer | None, record: Record) -> None:
        if verdict is None:
            _append(self.path.with_suffix(room.REJECTED), room.triplet_line(record))
            self._note_rejected(record)
            return
        answer = verdict.model_dump()
        elements = answer.pop("key_elements")
        origin = {k: v for k, v in record.items() if k not in ("image_id", "reason", "detail", "text", "usage")}
        triplets = room.make_triplets(row, self.labels, origin, answer)
        triplets[1] |= {"usage": record["usage"], "key_elements": elements}  # there alone: a sum counts tokens once
        self.accept(triplets)

    def keep(self, lines: Sequence[str]) -> None:
        """Put what was paid for and belongs to no image on disk, once."""
        if new := [line for line in dict.fromkeys(lines) if line not in self._kept]:
            _append(self.path.with_suffix(UNASSIGNED), "".join(f"{line}\n" for line in new))
            self._note_kept(new)

    def _note_kept(self, lines: Sequence[str]) -> None:
        """What they cost; a second answer about an image of ours was not asked for."""
        ours = {custom_id(row) for row in self.rows}
        for line in lines:
            name, reply, _ = asking.read_batch_line(line)
            if reply and name not in ours:
                usage = {**(reply["usage"] or self._most_usage), "batch": True}
                self._note_cost({"asked_of": self.asked[0], "usage": usage})
        self._kept.update(lines)

    def accept(self, *groups: list[Record]) -> None:
        """Append the triplets of an image, or of several; returns when they are on disk."""
        _append(self.path, "".join(room.triplet_line(triplet) for group in groups for triplet in group))
        for group in groups:
            self._note_accepted(group)

    def _judge(self, row: Record, replies: Sequence[Record], form: str) -> Answer | tuple[str, str]:
        for reply in replies:
            if failure := room.check_reply(reply["text"], reply["finish"], reply["refusal"]):
                return failure
        answer = asking.parse_reply([reply["text"] for reply in replies], form)
        if answer is None:
            return _UNREAD, form
        bounds = {"min_words": self.settings.min_words, "max_words": self.settings.max_words}
        if failure := room.check_texts(answer.conversation, answer.reasoning, row["label"], **bounds):
            return failure
        similar = self._seen.find(f"{answer.conversation}\n{answer.reasoning}")
        return ("near-duplicate", f"{similar[1]:.2f} like that of {similar[0]}") if similar else answer

    def _is_useless(self, row: Record, reason: str, form: str) -> bool:
        """Also one that fails a check although the model was told why its last one did: first tries say nothing yet.

        Nor do unread ones while there is another form to be tried.
        """
        goes_on = reason == _UNREAD and self.settings.answer_format == "auto"
        told = bool(self.tries[row["image_id"]]) or not self.settings.retries
        return super()._is_useless(row, reason, form) or (bool(reason) and told and not goes_on)

    def _note_accepted(self, triplets: list[Record]) -> None:
        image_id, record = triplets[0]["image_id"], next((t for t in triplets if t["usage"]), triplets[-1])
        self.done[image_id] = _asked(record) if record["source"] == "openai" else self.asked  # imported: fits any
        self._seen.add(image_id, "\n".join(t["response"] for t in triplets if t["kind"] != room.KINDS[0]))
        self._note_cost(record)
        if _asked(record) == self.asked:
            self.unread[record.get("answer_format", "")] = -math.inf

    def _note_rejected(self, record: Record) -> None:
        image_id, reason, form = record["image_id"], record["reason"], record.get("answer_format", "")
        self._note_cost(record)
        if reason != _NO_ANSWER and _asked(record) == self.asked:  # what another model failed at does not count
            why = f"{reason} ({record.get('detail') or ''})".replace(" ()", "")
            if reason == "near-duplicate":  # the other image's name tells the model nothing
                why = "it is nearly the same as the answer for another image"
            self.tries[image_id].append((why, form if reason == _UNREAD else ""))
            self.unread[form] += reason == _UNREAD

    def __str__(self) -> str:
        done, missing = sum(row["image_id"] in self.done for row in self.rows), len(self.missing())
        reasons = room.rejected_answers(self.path)["reason"].value_counts()
        rejected = ", ".join(f"{reason} {n:,}" for reason, n in reasons.items())
        return (
            f"{done:,} of {len(self.rows):,} training images have triplets, "
            f"{len(self.rows) - done - missing:,} were given up, {missing:,} are missing\n"
            f"{super().__str__()}; rejected: {rejected or 'none'}"
        )


class Emotions(Log):
    """The emotion that a served model names for each image; each is asked for once.

    Attributes:
        done: image -> its record: the `emotion`, "" where none can be read in the text, and why (`reason`).
        rows: of the images `images`, 0: all. The hash of the image_id decides: a fair sample, part of any larger one.
    """

    form = "emotion"

    def __init__(
        self, samples: pd.DataFrame, labels: Sequence[str], path: Path, settings: TripletSettings, images: int = 0
    ) -> None:
        bodies, rows = [asking.emotion_request(labels, "", settings, "max_tokens")], samples.to_dict("records")
        prompt = hashlib.sha256(json.dumps(bodies[0]["messages"]).encode()).hexdigest()
        super().__init__(path, settings, prompt, bodies, batch=False)
        chosen = sorted(rows, key=lambda row: hashlib.sha256(row["image_id"].encode()).digest())
        self.rows, self.labels = chosen[: images or None], labels
        self._pictures = {row["image_id"]: row["sha256"] for row in rows}  # another picture is another question
        for record in emotion_records(path):
            self._note(record)

    def requests(self, row: Record, picture: str, form: str) -> list[Record]:
        """The body of the one request for an image."""
        return [asking.emotion_request(self.labels, picture, self.settings, self.limit)]

    def _judge(self, row: Record, replies: Sequence[Record], form: str) -> str | tuple[str, str]:
        """The emotion, which counts in an answer that is cut off behind it, too."""
        failure = room.check_reply(replies[0]["text"], replies[0]["finish"], replies[0]["refusal"])
        named = parse_emotion(replies[0]["text"], self.labels) if not failure or failure[0] == "cut off" else None
        return named or failure or (_UNPARSABLE, "")

    def _write(self, row: Record, verdict: str | None, record: Record) -> None:
        usd = asking.cost(self.price, *record["usage"].values()) if record["usage"] else 0.0
        record |= {"emotion": verdict or "", "sha256": row["sha256"], "usd": None if math.isnan(usd) else usd}
        _append(self.path, room.triplet_line(record))
        self._note(record)

    def _note(self, record: Record) -> None:
        self._note_cost(record)
        same = _asked(record) == self.asked and record.get("sha256") == self._pictures.get(record["image_id"])
        if same and record["reason"] != _NO_ANSWER:
            self.done[record["image_id"]] = record

    def _is_useless(self, row: Record, reason: str, form: str) -> bool:
        """Also of a model that has named no emotion yet; how often one cannot be parsed is a result."""
        never = not any(record["emotion"] for record in self.done.values())
        return (reason == _UNPARSABLE and never) or super()._is_useless(row, reason, form)

    def __str__(self) -> str:
        odd = sum(not record["emotion"] for record in self.done.values())
        return (
            f"{len(self.done):,} test images are answered, {odd:,} of them unparsably, "
            f"{len(self.missing()):,} missing\n{super().__str__()}"
        )


def emotion_records(path: Path) -> Iterator[Record]:
    """The lines of a file of `Emotions`; raises `EmonbError` for a damaged one."""
    return _records(path, "image_id", "reason", "emotion", "usd")


_TYPES = {**dict.fromkeys(("image_id", "reason", "emotion", "answer_format"), str), "usd": float | int | None}
_TYPES["seconds"] = float | int


def _records(path: Path, *fields: str) -> Iterator[Record]:
    for where, record in room.json_lines(path):
        if not {*fields} <= record.keys():
            raise EmonbError(f"{where}: field {' or '.join(fields)} missing; delete the line")
        for name in _TYPES.keys() & record.keys():
            if not isinstance(record[name], _TYPES[name]):
                raise EmonbError(f"{where}: field {name} is {str(record[name])[:40]!r}; delete the line")
        yield record


def custom_id(row: Record) -> str:
    """What an image is called in a batch: short and free of odd characters; the same in every run."""
    return hashlib.sha256(row["image_id"].encode()).hexdigest()[:40]


def _asked(record: Record) -> tuple[str, str]:
    """Model and prompt that a record answers."""
    return str(record.get("asked_of") or record.get("model")), str(record.get("prompt_sha256"))


def _append(path: Path, text: str) -> None:
    """One write, on disk when this returns; a disk that is full leaves no half line."""
    data = text.encode("utf-8", "backslashreplace")
    with suppress(OSError), path.open("ab", buffering=0) as file:
        start = file.tell()
        with suppress(OSError):
            if file.write(data) == len(data):
                os.fsync(file.fileno())
                return
        file.truncate(start)
    raise EmonbError(f"{path.parent.name}/{path.name}: cannot write; make room on the disk and start again")


def _check_writable(path: Path) -> None:
    """Before anything is paid: raise `EmonbError` for what is in the place of a file of ours, or is only read."""
    why = "it is no file" if os.path.lexists(path) and not path.is_file() else ""
    try:
        if path.is_file():
            path.open("ab").close()
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        raise EmonbError(f"{path.parent.name}/{path.name}: cannot be written ({why}); move it away")


# Of a paid answer, a line after which others are to come.
_PART = re.compile(rb'(\{"image_id": "(?:[^"\\]|\\.)*", "kind": )"(?!reasoning").*"source": "openai"')


def _mend(path: Path) -> None:
    """Cut off what a killed run left half written at the end: a line, or one or two of an answer's three.

    A last line that lacks its end alone gets it. Raises `EmonbError` for a file in another form and leaves it alone:
    an editor or a converter saved it so, and its answers are paid.
    """
    data = path.read_bytes().rstrip(b"\0") if path.is_file() else b""  # zeros: after a power cut
    *lines, last = data.split(b"\n")
    whole = _is_whole(last)
    if whole is None or data.startswith(b"[") or not json.detect_encoding(data[:4]).startswith("utf-8"):
        raise EmonbError(
            f"{path.parent.name}/{path.name}: is not one JSON object a line in UTF-8, as emonb wrote it; save it so "
            "or restore a copy (nothing was changed or paid)"
        )
    lines += [last] * whole
    part = _PART.match(lines[-1]) if lines else None
    if part and not any(line.startswith(part[1] + b'"reasoning"') for line in lines):  # else only sorted
        while lines and lines[-1].startswith(part[1]):
            lines.pop()
    size = sum(len(line) + 1 for line in lines)
    if path.is_file():
        os.truncate(path, min(size, len(data)))
    if size > len(data):
        _append(path, "\n")


def _is_whole(line: bytes) -> bool | None:
    """Whether a line without an end is a record, or the beginning of one, or none; None: it is something else."""
    text = line.decode("utf-8-sig", "ignore").strip()
    try:
        record, end = json.JSONDecoder().raw_decode(text)
        return True if isinstance(record, dict) and end == len(text) else None
    except (ValueError, RecursionError):
        return False if text[:1] in ("", "{") else None


# ---- batches under way: `emonb.annotate.ask` -----------------------------------------------------------------------


def open_batches(path: Path) -> list[Record]:
    """The batches whose answers are not in the log yet; raises `EmonbError` for a damaged note of them."""
    file, fields = path.with_suffix(BATCHES), {"name", "images", "form", "asked_of", "prompt_sha256"}
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        parts = json.loads(file.read_text(encoding="utf-8"))["parts"] if file.is_file() else []
        if all(fields <= part.keys() for part in parts):
            return [part for part in parts if part.get("status") != "merged"]  # as earlier versions wrote
    raise EmonbError(
        f"triplets/{file.name}: damaged; restore a copy. Without it, batches under way are paid a second time: "
        f"cancel them at the server first (their metadata `emonb` begins with {path.stem!r}), then delete it"
    )


def refuse_open_batches(path: Path) -> None:
    """Raise `EmonbError` while batches are under way: their images would be paid twice, or their answers replaced."""
    if batches := open_batches(path):
        raise EmonbError(
            f"{len(batches)} batches with {sum(batch['images'] for batch in batches):,} images are not fetched yet; "
            f"fetch them with --annotator batch (or delete triplets/{path.with_suffix(BATCHES).name}: what was "
            "submitted is paid all the same)"
        )
