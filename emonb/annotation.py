"""Room 02: the state of one dataset's paid triplets: what is missing, what an answer is worth, what it cost.

Shared by the online loop (`annotate`) and the Batch API (`batch`): both bring replies here, and here alone it is
decided what is accepted, rejected or asked again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from emonb.annotator import FORMATS, Answer, Picture, Reply, annotator_sha256, paid_triplets, parse_reply, requests_for
from emonb.answer_checks import NearDuplicates, check_reply, check_texts
from emonb.answer_log import AnswerLog
from emonb.errors import EmonbError
from emonb.prices import ImageRule, image_tokens, load_prices, request_tokens
from emonb.samples import iter_samples, sample_labels
from emonb.settings import Settings
from emonb.store import Artifact
from emonb.transport import public_name, scrub
from emonb.triplets import triplets_path

__all__ = ["Annotation", "Summary"]

_FORM_FAILURES = 3  # answers in a form that the server never managed, before the next form is tried
_COLUMNS = ["image_id", "path", "label", "sha256"]


@dataclass(frozen=True)
class Summary:
    """What stands in the files after a run.

    Attributes:
        images: training images of the dataset.
        accepted: images with triplets.
        given_up: images whose answers failed the checks as often as they may.
        missing: images that the next run asks for.
        reasons: rejected answers by reason.
        answers: paid answers in all; `prompt_tokens` and `completion_tokens` are theirs.
        usd: what they cost, None where the price is unknown.
        stopped: why the run ended early, or "".
    """

    images: int
    accepted: int
    given_up: int
    missing: int
    reasons: dict[str, int]
    answers: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    stopped: str = ""

    def __str__(self) -> str:
        cost = "price unknown" if self.usd is None else f"${self.usd:,.4f}"
        lines = [
            f"{self.accepted:,} of {self.images:,} training images have triplets, "
            f"{self.given_up:,} were given up, {self.missing:,} are missing",
            f"{self.answers:,} paid answers, {self.prompt_tokens:,} tokens in, {self.completion_tokens:,} out: {cost}",
        ]
        if self.reasons:
            found = ", ".join(f"{reason} {n:,}" for reason, n in sorted(self.reasons.items(), key=lambda x: -x[1]))
            lines.append(f"rejected: {found}")
        if self.stopped:
            lines.append(f"stopped: {self.stopped}")
        return "\n".join(lines)


class Annotation:
    """The paid triplets of one dataset, open for writing."""

    def __init__(self, settings: Settings, samples: Artifact, dataset: str, *, batch: bool = False) -> None:
        """Open the files and check that what they hold goes with the settings.

        Raises:
            EmonbError: damaged files, another writer, answers of another model or prompt, a limit on the cost
                without a known price.
        """
        self.dataset, self.samples, self.batch = dataset, samples, batch
        self.settings = settings.triplets
        self.labels = sample_labels(samples)
        self.duplicates = NearDuplicates()
        self.prices = load_prices(self.settings)
        self.price = self.prices.find(public_name(self.settings.model))
        if self.settings.max_cost is not None and self.price is None:
            raise EmonbError(
                f"max_cost: the price of {public_name(self.settings.model)!r} is unknown; add it to "
                f"{self.settings.prices or 'emonb/resources/prices.yaml'} (zeros for a server that costs nothing)"
            )
        self.refused_forms: set[str] = set()
        self.log = AnswerLog(triplets_path(settings, dataset), self._remember)
        self._check_origins()
        self.images = self.todo = 0
        for row in iter_samples(samples, "train", columns=["image_id"]):
            self.images += 1
            self.todo += self._is_missing(row["image_id"])
        self.finished, self._spent_before = 0, self.usd
        self.image_rule = self.price.image if self.price else ImageRule()
        side = self.settings.max_side
        most = {"label": max(self.labels, key=len), "sha256": "0" * 8}
        bodies = requests_for(most, Picture("image/jpeg", b"", (1, 1)), self.form, self.settings)
        picture = image_tokens(side, side, self.image_rule, self.settings.detail, side)
        self._prompt_bound = 1.2 * sum(request_tokens(body, picture) for body in bodies)
        self._output_bound = self.settings.max_output_tokens * len(bodies)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.log.__exit__(kind, error, traceback)

    @property
    def form(self) -> str:
        """The form to ask in now: the chosen one, or the first that this server can do as far as is known."""
        if self.settings.answer_format != "auto":
            return self.settings.answer_format
        for form in FORMATS[:-1]:
            failed = self.log.reasons["not in the asked form", form]
            if form not in self.refused_forms and (self.log.forms[form] or failed < _FORM_FAILURES):
                return form
        return FORMATS[-1]

    @property
    def usd(self) -> float | None:
        """What all answers in the files cost; None where a price is unknown."""
        total = 0.0
        for (model, batch), count in self.log.usage.items():
            price = self.prices.find(model)
            if price is None:
                return None
            total += price.usd(count["prompt_tokens"], count["completion_tokens"], batch=bool(batch))
        return total

    def affordable(self, in_flight: int, images: int = 1) -> bool:
        """Whether so many more images stay below `max_cost`, even if all in flight take as much as they may."""
        if self.settings.max_cost is None:
            return True
        worst = self.price.usd(self._prompt_bound, self._output_bound, batch=self.batch)
        return self.usd + worst * (in_flight + images) <= self.settings.max_cost

    def missing(self) -> Iterator[dict[str, Any]]:
        """Training images that have neither triplets nor used up their tries."""
        for row in iter_samples(self.samples, "train", columns=_COLUMNS):
            if self._is_missing(row["image_id"]):
                yield row

    def requests(self, row: dict[str, Any], picture: Picture, form: str) -> list[dict[str, Any]]:
        """Bodies of the requests for one image; a rejected answer's reason is told."""
        again = self.log.last.get(row["image_id"], "")
        if again.startswith("near-duplicate"):  # the other image's name tells the model nothing
            again = "it is nearly the same as the answer for another image"
        return requests_for(row, picture, form, self.settings, again)

    def receive(self, row: dict[str, Any], replies: list[Reply], form: str, **more: Any) -> bool:
        """Judge the replies for one image and write them down; False if the image should be asked again.

        `more` is written into every record, such as the name of the batch.
        """
        usage = self._usage(replies)
        try:
            answer, failure = self._judge(row, replies, form)
        except Exception as error:  # whatever a server may write: a paid answer is kept, and the run goes on
            answer, failure = None, ("not in the asked form", f"could not be read ({type(error).__name__})")
        origin = {
            "source": "openai",
            "model": replies[-1].model or public_name(self.settings.model),
            "created": replies[-1].created,
            "prompt_sha256": annotator_sha256(),
            "asked_of": public_name(self.settings.model),
            "answer_format": form,
            **more,
        }
        if failure is None:
            triplets = paid_triplets(row, self.labels, answer, origin, usage)
            self.log.accept(triplets)
            self._remember(triplets)
            return True
        reason, detail = failure
        text = "\n\n".join(reply.text for reply in replies)
        finish = replies[-1].finish_reason
        record = {"image_id": row["image_id"], "reason": reason, "detail": detail, "text": text}
        self.log.reject({**record, "finish_reason": finish, **origin, "usage": usage})
        return not self._is_missing(row["image_id"])

    def give_up(self, row: dict[str, Any], detail: str, **more: Any) -> None:
        """Write down that an image got no answer; the next run asks for it again."""
        asked_of = public_name(self.settings.model)
        record = {"image_id": row["image_id"], "reason": "no answer", "detail": detail, "asked_of": asked_of}
        self.log.reject({**record, "source": "openai", "prompt_sha256": annotator_sha256(), "usage": None, **more})

    def note(self) -> str:
        """Spent and projected cost, for the progress bar; tokens where the price is unknown."""
        self.finished += 1
        usd = self.usd
        if usd is None or self._spent_before is None:
            tokens = sum(count["prompt_tokens"] + count["completion_tokens"] for count in self.log.usage.values())
            return f"{tokens:,} tokens"
        projected = usd + (usd - self._spent_before) / self.finished * max(0, self.todo - self.finished)
        return f"${usd:.2f} spent, ${projected:.2f} in all"

    def summary(self, stopped: str = "") -> Summary:
        """Count what stands in the files now."""
        missing = sum(1 for _ in self.missing())
        accepted = sum(
            row["image_id"] in self.log.done for row in iter_samples(self.samples, "train", columns=["image_id"])
        )
        reasons: Counter[str] = Counter()
        for (reason, _), n in self.log.reasons.items():
            reasons[reason] += n
        totals = sum(self.log.usage.values(), Counter())
        return Summary(
            images=self.images,
            accepted=accepted,
            given_up=self.images - accepted - missing,
            missing=missing,
            reasons=dict(reasons),
            answers=totals["answers"],
            prompt_tokens=totals["prompt_tokens"],
            completion_tokens=totals["completion_tokens"],
            usd=self.usd,
            stopped=stopped,
        )

    def _is_missing(self, image_id: str) -> bool:
        return image_id not in self.log.done and self.log.tries[image_id, self.form] <= self.settings.retries

    def _judge(
        self, row: dict[str, Any], replies: list[Reply], form: str
    ) -> tuple[Answer | None, tuple[str, str] | None]:
        for reply in replies:
            failure = check_reply(reply.text, reply.finish_reason, reply.refusal)
            if failure:
                return None, (failure[0], scrub(failure[1]))
        answer = parse_reply(replies, form)
        if answer is None:
            return None, ("not in the asked form", form)
        failure = check_texts(answer.conversation, answer.reasoning, row["label"], self.settings)
        if failure:
            return None, failure
        signature = self.duplicates.signature(f"{answer.conversation}\n{answer.reasoning}")
        similar = self.duplicates.find(signature, self.settings.near_duplicate)
        return answer, similar and ("near-duplicate", f"{similar[1]:.2f} like that of {similar[0]}")

    def _usage(self, replies: list[Reply]) -> dict[str, Any]:
        """Tokens of an image's replies; where the server does not count, our upper estimate, marked so."""
        usage: dict[str, Any] = {"prompt_tokens": 0, "completion_tokens": 0}
        for reply in replies:
            counted = reply.usage or {
                "prompt_tokens": round(self._prompt_bound / len(replies)),
                "completion_tokens": len(reply.text) // 3,
            }
            usage = {**usage, **{name: usage[name] + counted[name] for name in counted}}
            if reply.usage is None:
                usage["estimated"] = True
        return {**usage, "batch": True} if self.batch else usage

    def _remember(self, triplets: list[dict[str, Any]]) -> None:
        text = "\n".join(t["response"] for t in triplets if t["kind"] != "categorical")
        self.duplicates.add(triplets[0]["image_id"], self.duplicates.signature(text))

    def _check_origins(self) -> None:
        """Do not mix models or prompts unasked: the file would teach two styles, and its numbers mean neither."""
        ours = (public_name(self.settings.model), annotator_sha256())
        others = {origin for origin in self.log.origins if origin != ours}
        if others and not self.settings.mix:
            self.log.__exit__(None, None, None)
            theirs, now = (f"{model} (prompt {prompt[:8]})" for model, prompt in (min(others), ours))
            raise EmonbError(
                f"triplets/{self.log.path.name}: holds answers of {theirs}, now asked is {now}; choose another "
                "results folder with --out, go on with the old one by --model, or set triplets.mix: true to have both"
            )
