"""The files of the paid answers, and what follows from them: what is missing, what was spent, what is fit to teach.

`OUT/triplets/<dataset>.jsonl` holds the triplets of accepted answers, `<dataset>.rejected.jsonl` the answers that
failed a check and the images that got none, each with its reason. Both only grow; each answer is one write, flushed
to the disk before it counts. A run that starts again reads them, and nothing else has to be kept.
"""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from emonb import triplets as room
from emonb.annotate.prices import Price, PriceList, most_tokens, unknown_price
from emonb.annotate.request import FORMS, Answer, Reply, parse_reply, public_name, requests_for, scrub
from emonb.errors import EmonbError
from emonb.files import locked, make_folder
from emonb.settings import TripletSettings

_UNREAD = "not in the asked form"
_FORM_FAILURES = 3  # unread answers in a form that the server never managed, before the next form is tried


@contextmanager
def lock_triplets(path: Path) -> Iterator[None]:
    """Hold a triplets file for one writer; raises `EmonbError` while another process has it."""
    make_folder(path.parent)
    busy = f"triplets/{path.name}: another process is asking for these answers; wait until it has ended"
    with locked(path.with_name(f".{path.stem}.lock"), f"{busy}: nothing shall be paid twice"):
        yield


class Answers(ExitStack):
    """Accepted and rejected answers of one dataset, open for writing for one process at a time.

    Attributes:
        rows: the training images.
        asked: model and hash of the prompt that are asked now.
        done: images that have their triplets.
        refused_forms: forms that the server said it cannot do.
        received: (image, batch) of rejected answers.
        most: by form: tokens, and USD (0 where the price is unknown), that one image takes at most.
        reasons: how many rejected records have which reason, of whatever model.
        spent: tokens of all paid `answers`, and `usd`, as far as prices are known.
    """

    def __init__(
        self,
        samples: pd.DataFrame,
        labels: Sequence[str],
        path: Path,
        settings: TripletSettings,
        *,
        batch: bool = False,
    ) -> None:
        """Lock, mend and read the files; raises `EmonbError` if another process writes here, or for a damaged line."""
        super().__init__()
        self.labels, self.path, self.settings, self.batch = labels, path, settings, batch
        train = samples[samples["split"] == "train"]
        self.rows = train[train.columns.intersection(["image_id", "path", "label", "sha256"])].to_dict("records")
        self.asked = (public_name(settings.model), room.prompts_sha256("annotator.yaml"))
        self.prices = PriceList.load(settings)
        price = self.prices.find(self.asked[0]) or Price(input=0, output=0)
        tokens = {form: most_tokens(settings, labels, form, price.image) for form in FORMS}
        self.most = {form: (sum(n), price.usd(*n, batch=batch)) for form, n in tokens.items()}
        self.done, self.refused_forms, self.received = set[str](), set[str](), set[tuple[str, str]]()
        self.reasons, self.spent = Counter[str](), Counter[str]()
        self._others, self._unpriced = set[tuple[str, str]](), set[str]()
        self._read, self._failed = Counter[str](), Counter[Any]()  # by form; by image, (image, form) and form
        self._last: dict[str, str] = {}  # why the last answer for an image was rejected
        self._seen = room.NearDuplicates()
        with ExitStack() as stack:
            stack.enter_context(lock_triplets(path))
            if path.is_file() and not room.has_paid_answers(path):
                path.unlink()  # the offline annotator's: its artefact is in the store
            both = (path, room.rejected_path(path))
            self._files = [stack.enter_context(file.open("ab+", buffering=0)) for file in both]
            self._load(*both)
            self.push(stack.pop_all())

    def _load(self, accepted: Path, rejected: Path) -> None:
        for file in self._files:
            _mend(file)
        for _, group in groupby(room.triplet_lines(accepted), lambda triplet: triplet["image_id"]):
            self._note_accepted([*group])
        for where, record in room.json_lines(rejected):
            if not isinstance(record, dict) or not {"image_id", "reason"} <= record.keys():
                raise EmonbError(f"{where}: field 'image_id' or 'reason' missing; delete the line")
            self._note(record)

    def check_fit(self, under_way: Collection[tuple[str, str]] = ()) -> None:
        """Before anything is asked: do files and settings belong together?

        Raises:
            EmonbError: answers of another model or prompt (or `under_way`), answers for other pictures, a limit on
                the cost without a known price.
        """
        name, others = f"triplets/{self.path.name}", {*self._others, *under_way} - {self.asked}
        if others and not self.settings.mix:
            theirs, now = (f"{model} (prompt {prompt[:8]})" for model, prompt in (min(others), self.asked))
            raise EmonbError(
                f"{name}: holds answers of {theirs}, now asked is {now}; choose another results folder with --out, go "
                "on with the old one by --model, or set triplets.mix: true to have both"
            )
        strangers = len(self.done - {row["image_id"] for row in self.rows})
        if 2 * strangers > len(self.done):
            raise EmonbError(
                f"{name}: {strangers:,} of its {len(self.done):,} images are no training images of {self.path.stem}: "
                "it belongs to other pictures; move it or choose another --out"
            )
        unpriced = self._unpriced | ({self.asked[0]} if self.prices.find(self.asked[0]) is None else set())
        if self.settings.max_cost is not None and unpriced:
            raise EmonbError(f"max_cost: {unknown_price(min(unpriced), self.settings)}")

    def is_missing(self, image_id: str) -> bool:
        """Whether an image has neither triplets nor used up its tries (of this model and prompt)."""
        tries = self._failed[image_id] + self._failed[image_id, self.form]
        return image_id not in self.done and tries <= self.settings.retries

    def missing(self) -> Iterator[dict[str, Any]]:
        """Training images that are missing when their turn comes."""
        return (row for row in self.rows if self.is_missing(row["image_id"]))

    @property
    def form(self) -> str:
        """The form to ask in now: the chosen one, or the first that this server can do as far as is known."""
        if self.settings.answer_format != "auto":
            return self.settings.answer_format
        able = (f for f in FORMS[:-1] if self._read[f] or self._failed[f] < _FORM_FAILURES)
        return next((form for form in able if form not in self.refused_forms), FORMS[-1])

    def requests(self, row: dict[str, Any], picture: str, form: str) -> list[dict[str, Any]]:
        """Bodies of the requests for one image; why its last answer could not be used is told."""
        why = self._last.get(row["image_id"], "")
        if why.startswith("near-duplicate"):  # the other image's name tells the model nothing
            why = "it is nearly the same as the answer for another image"
        return requests_for(row, picture, form, self.settings, why)

    @property
    def usd(self) -> float | None:
        """What all answers in the files cost; None where a price is unknown."""
        return None if self._unpriced else float(self.spent["usd"])

    def receive(self, row: dict[str, Any], replies: list[Reply], form: str, **more: Any) -> None:
        """Judge the replies for one image and write them down; `more` is written into every record."""
        try:
            verdict = self._judge(row, replies, form)
        except Exception as error:  # whatever a server may write: a paid answer is kept, and the run goes on
            verdict = (_UNREAD, f"could not be read ({type(error).__name__})")
        origin = {
            "source": "openai",
            "model": public_name(replies[-1].model) or self.asked[0],
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "prompt_sha256": self.asked[1],
            "asked_of": self.asked[0],
            "answer_format": form,
            **more,
        }
        if not isinstance(verdict, Answer):
            return self._reject(row, *verdict, replies, {**origin, "finish_reason": replies[-1].finish_reason})
        triplets = room.three_triplets(row, self.labels, origin, verdict.conversation, verdict.reasoning)
        # tokens stand there alone: a sum counts them once
        triplets[1] |= {"usage": self._usage(replies, form), "key_elements": verdict.key_elements}
        return self.accept(triplets)

    def accept(self, *groups: list[dict[str, Any]]) -> None:
        """Append the triplets of an image, or of several; returns when they are on disk."""
        _append(self._files[0], "".join(room.triplet_line(triplet) for group in groups for triplet in group))
        for group in groups:
            self._note_accepted(group)

    def give_up(self, row: dict[str, Any], detail: str, replies: Sequence[Reply] = (), **more: Any) -> None:
        """Write down that an image got no (whole) answer; the next run asks for it again."""
        asked = {"source": "openai", "asked_of": self.asked[0], "prompt_sha256": self.asked[1]}
        self._reject(row, "no answer", detail, replies, {**asked, **more})

    def _reject(
        self, row: dict[str, Any], reason: str, detail: str, replies: Sequence[Reply], more: dict[str, Any]
    ) -> None:
        text = "\n\n".join(reply.text for reply in replies)
        record = {"image_id": row["image_id"], "reason": reason, "detail": scrub(detail), "text": text, **more}
        record["usage"] = self._usage(replies, more.get("answer_format", "")) if replies else None
        _append(self._files[1], json.dumps(record, ensure_ascii=False) + "\n")
        self._note(record)

    def _judge(self, row: dict[str, Any], replies: list[Reply], form: str) -> Answer | tuple[str, str]:
        """The answer, or (reason, detail) why it cannot be used."""
        for reply in replies:
            if failure := room.check_reply(reply.text, reply.finish_reason, reply.refusal):
                return failure
        answer = parse_reply([reply.text for reply in replies], form)
        if answer is None:
            return _UNREAD, form
        bounds = {"min_words": self.settings.min_words, "max_words": self.settings.max_words}
        if failure := room.check_texts(answer.conversation, answer.reasoning, row["label"], **bounds):
            return failure
        similar = self._seen.find(f"{answer.conversation}\n{answer.reasoning}", self.settings.near_duplicate)
        return ("near-duplicate", f"{similar[1]:.2f} like that of {similar[0]}") if similar else answer

    def _usage(self, replies: Sequence[Reply], form: str) -> dict[str, Any]:
        """Tokens of an image's replies; where the server does not count, our upper estimate, marked so."""
        usage, estimated = Counter[str](), any(reply.usage is None for reply in replies)
        most = self.most[form][0] / len(replies) - self.settings.max_output_tokens
        for reply in replies:
            guess = {"prompt_tokens": round(most), "completion_tokens": len(reply.text) // 3}
            usage.update(reply.usage or guess)
        return {**usage} | ({"estimated": True} if estimated else {}) | ({"batch": True} if self.batch else {})

    def _note_accepted(self, triplets: list[dict[str, Any]]) -> None:
        image_id = triplets[0]["image_id"]
        self.done.add(image_id)
        texts = [triplet["response"] for triplet in triplets if triplet["kind"] != room.KINDS[0]]
        self._seen.add(image_id, "\n".join(texts))
        self._note(next((triplet for triplet in triplets if triplet["usage"]), triplets[-1]))

    def _note(self, record: dict[str, Any]) -> None:
        """What a rejected record, or an accepted answer's triplet with the tokens, says."""
        image_id, reason, form = record["image_id"], record.get("reason"), record.get("answer_format", "")
        asked = str(record.get("asked_of") or record.get("model")), str(record.get("prompt_sha256"))
        if isinstance(usage := record.get("usage"), dict):
            tokens = {name: usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")}
            price = self.prices.find(asked[0])
            usd = price.usd(*tokens.values(), batch=bool(usage.get("batch"))) if price else 0.0
            self.spent.update(answers=1, usd=usd, **tokens)
            self._unpriced.update(() if price else (asked[0],))
        if reason:
            self.reasons[reason] += 1
            self.received.add((image_id, record.get("batch", "")))
        elif record["source"] == "openai":
            self._others.add(asked)
        if asked != self.asked:  # what another model failed at does not count against an image
            return
        if not reason:
            self._read[form] += 1
        elif reason != "no answer":
            self._last[image_id] = f"{reason} ({record.get('detail') or ''})".replace(" ()", "")
            self._failed[(image_id, form) if reason == _UNREAD else image_id] += 1
            self._failed[form] += reason == _UNREAD

    def __str__(self) -> str:
        accepted, missing = sum(row["image_id"] in self.done for row in self.rows), sum(1 for _ in self.missing())
        rejected = ", ".join(f"{reason} {n:,}" for reason, n in self.reasons.most_common())
        return (
            f"{accepted:,} of {len(self.rows):,} training images have triplets, "
            f"{len(self.rows) - accepted - missing:,} were given up, {missing:,} are missing\n"
            f"{self.spent['answers']:,} paid answers, {self.spent['prompt_tokens']:,} tokens in, "
            f"{self.spent['completion_tokens']:,} out: "
            f"{'price unknown' if self.usd is None else f'${self.usd:,.4f}'}; rejected: {rejected or 'none'}"
        )


def _append(file: BinaryIO, text: str) -> None:
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


def _mend(file: BinaryIO) -> None:
    """Cut off what a killed run left half written: a line, or one or two of an answer's three."""
    start = file.seek(max(0, file.seek(0, os.SEEK_END) - 2**20))  # more than the lines of any answer
    *lines, torn = file.read().split(b"\n")
    with suppress(ValueError):
        if torn and json.loads(torn):  # only its end is missing
            file.write(b"\n")
            lines.append(torn)
    with suppress(ValueError, AttributeError):  # damage that is no torn end is named when the file is read
        while lines and lines[-1]:
            last = json.loads(lines[-1])
            if last.get("source") != "openai" or last.get("kind", room.KINDS[-1]) == room.KINDS[-1]:
                break
            lines.pop()
    file.truncate(start + sum(len(line) + 1 for line in lines))
    os.fsync(file.fileno())
