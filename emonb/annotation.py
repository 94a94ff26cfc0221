"""Room 02: the state of one dataset's paid triplets: what is missing, what an answer is worth, what it cost.

Shared by the online loop (`annotate`) and the Batch API (`batch`): both bring replies here, and here alone it is
decided what is accepted, rejected or asked again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from emonb.triplet_tables import Summary
from emonb.triplets import triplets_path

__all__ = ["Annotation"]

_FORM_FAILURES = 3  # answers in a form that the server never managed, before the next form is tried
_COLUMNS = ["image_id", "path", "label", "sha256"]


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
        self.origin = (public_name(self.settings.model), annotator_sha256())
        self.log = AnswerLog(triplets_path(settings, dataset), self.origin, self._remember)
        try:
            self._prepare()
        except BaseException:
            self.log.__exit__(None, None, None)
            raise

    def _prepare(self) -> None:
        self.check_origins(self.log.origins)
        if self.settings.max_cost is not None and self.usd is None:
            models = sorted({model for model, _ in self.log.usage if self.prices.find(model) is None})
            raise EmonbError(
                f"max_cost: the files hold answers of {', '.join(models)}, whose price is unknown; add it to "
                f"{self.settings.prices or 'emonb/resources/prices.yaml'}"
            )
        self.images = self.todo = known = 0
        for row in iter_samples(self.samples, "train", columns=["image_id"]):
            self.images += 1
            known += row["image_id"] in self.log.done
            self.todo += self.is_missing(row["image_id"])
        self.strangers = len(self.log.done) - known
        if self.strangers > known:
            raise EmonbError(
                f"triplets/{self.log.path.name}: {self.strangers:,} of its {len(self.log.done):,} images are no "
                f"training images of {self.dataset}: it belongs to other pictures; move it or choose another --out"
            )
        self._touched, self._spent_before = set(), self.usd
        self.image_rule = self.price.image if self.price else ImageRule()
        self.bounds = {form: self._bound(form) for form in FORMATS}

    def _bound(self, form: str) -> tuple[float, float]:
        """Input and output tokens that the requests for one image take at most."""
        most, side = {"label": max(self.labels, key=len), "sha256": "0" * 8}, self.settings.max_side
        bodies = requests_for(most, Picture("image/jpeg", b"", (1, 1)), form, self.settings, again="x" * 300)
        shapes = ((side, side), (side, min(side, 768)))  # of the tiles rule, a square is not always the dearest
        picture = max(image_tokens(*size, self.image_rule, self.settings.detail, side) for size in shapes)
        prompt = 1.2 * sum(request_tokens(body, picture) for body in bodies)
        return prompt, float(self.settings.max_output_tokens * len(bodies))

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
            failed = self.log.form_failures[form]
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

    def affordable(self, in_flight: Mapping[str, int], lost: int = 0) -> bool:
        """Whether one more image stays below `max_cost`, even if all in flight take as much as they may.

        Args:
            in_flight: how many images are asked for now, by form.
            lost: attempts that timed out in this run, which a provider may bill though no answer came.
        """
        if self.settings.max_cost is None:
            return True
        images = Counter(in_flight) + Counter({self.form: 1 + lost})
        worst = sum(n * self.price.usd(*self.bounds[form], batch=self.batch) for form, n in images.items())
        return self.usd + worst <= self.settings.max_cost

    def missing(self) -> Iterator[dict[str, Any]]:
        """Training images that have neither triplets nor used up their tries."""
        for row in iter_samples(self.samples, "train", columns=_COLUMNS):
            if self.is_missing(row["image_id"]):
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
        usage = self._usage(replies, form)
        self._count(row)
        try:
            answer, failure = self._judge(row, replies, form)
        except Exception as error:  # whatever a server may write: a paid answer is kept, and the run goes on
            answer, failure = None, ("not in the asked form", f"could not be read ({type(error).__name__})")
        origin = {
            "source": "openai",
            "model": replies[-1].model or public_name(self.settings.model),
            "created": replies[-1].created,
            "prompt_sha256": self.origin[1],
            "asked_of": self.origin[0],
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
        return not self.is_missing(row["image_id"])

    def give_up(
        self, row: dict[str, Any], detail: str, replies: Sequence[Reply] = (), form: str = "", **more: Any
    ) -> None:
        """Write down that an image got no (whole) answer; the next run asks for it again."""
        self._count(row)
        usage = self._usage(replies, form) if replies else None
        text = "\n\n".join(reply.text for reply in replies)
        record = {"image_id": row["image_id"], "reason": "no answer", "detail": detail, "text": text}
        asked_of, prompt = self.origin
        record = {**record, "source": "openai", "asked_of": asked_of, "prompt_sha256": prompt, "usage": usage}
        self.log.reject({**record, **more})

    def note(self) -> str:
        """Spent and projected cost, for the progress bar; tokens where the price is unknown."""
        usd = self.usd
        if usd is None or self._spent_before is None:
            tokens = sum(count["prompt_tokens"] + count["completion_tokens"] for count in self.log.usage.values())
            return f"{tokens:,} tokens"
        finished = max(1, len(self._touched))
        projected = usd + (usd - self._spent_before) / finished * max(0, self.todo - finished)
        return f"${usd:.2f} spent, ${projected:.2f} in all"

    def summary(self, stopped: str = "") -> Summary:
        """Count what stands in the files now."""
        missing = sum(1 for _ in self.missing())
        accepted = sum(
            row["image_id"] in self.log.done for row in iter_samples(self.samples, "train", columns=["image_id"])
        )
        totals = sum(self.log.usage.values(), Counter())
        return Summary(
            images=self.images,
            accepted=accepted,
            given_up=self.images - accepted - missing,
            missing=missing,
            reasons=dict(self.log.reasons),
            answers=totals["answers"],
            prompt_tokens=totals["prompt_tokens"],
            completion_tokens=totals["completion_tokens"],
            usd=self.usd,
            stopped=stopped,
        )

    def is_missing(self, image_id: str) -> bool:
        """Whether an image has neither triplets nor used up its tries (of this model and prompt)."""
        tries = self.log.tries[image_id] + self.log.tries[image_id, self.form]
        return image_id not in self.log.done and tries <= self.settings.retries

    def _count(self, row: dict[str, Any]) -> None:
        self._touched.add(hash(row["image_id"]))

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

    def _usage(self, replies: Sequence[Reply], form: str) -> dict[str, Any]:
        """Tokens of an image's replies; where the server does not count, our upper estimate, marked so."""
        usage: dict[str, Any] = {"prompt_tokens": 0, "completion_tokens": 0}
        for reply in replies:
            counted = reply.usage or {
                "prompt_tokens": round(self.bounds[form or self.form][0] / len(replies)),
                "completion_tokens": len(reply.text) // 3,
            }
            usage = {**usage, **{name: usage[name] + counted[name] for name in counted}}
            if reply.usage is None:
                usage["estimated"] = True
        return {**usage, "batch": True} if self.batch else usage

    def _remember(self, triplets: list[dict[str, Any]]) -> None:
        text = "\n".join(t["response"] for t in triplets if t["kind"] != "categorical")
        self.duplicates.add(triplets[0]["image_id"], self.duplicates.signature(text))

    def check_origins(self, origins: Collection[tuple[str, str]]) -> None:
        """Do not mix models or prompts unasked: the file would teach two styles, and its numbers mean neither."""
        ours = self.origin
        others = {origin for origin in origins if origin != ours}
        if others and not self.settings.mix:
            theirs, now = (f"{model} (prompt {prompt[:8]})" for model, prompt in (min(others), ours))
            raise EmonbError(
                f"triplets/{self.log.path.name}: holds answers of {theirs}, now asked is {now}; choose another "
                "results folder with --out, go on with the old one by --model, or set triplets.mix: true to have both"
            )
