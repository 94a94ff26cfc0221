"""Asking a server for many images at a time, within limits on the cost and per minute."""

from __future__ import annotations

import json
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from emonb.annotate.log import Answers
from emonb.annotate.request import encode_picture, read_reply, scrub
from emonb.errors import EmonbError, UnreadablePicture
from emonb.progress import progress
from emonb.settings import TripletSettings

INTERRUPTED = "interrupted"
LIMIT = "the next answer could exceed the limit of ${:g}; raise --max-cost to go on"
_MINUTE = 61.0  # seconds; requests travel for different times, and the server counts arrivals
_LONGEST = 3600.0  # seconds that a server may make us wait at a time
_IN_A_ROW = 20  # images without an answer, one after another: the server is down, not the images at fault


def connect(settings: TripletSettings, **hooks: list[Callable[[Any], None]]) -> Any:
    """The official SDK's client of the server that OPENAI_BASE_URL and OPENAI_API_KEY name.

    It tries again after 408, 409, 429, 5xx, time-outs and cut connections. `hooks` of the HTTP library (`request`,
    `response`) see each attempt. Raises `EmonbError` where neither a key nor a server of one's own is named.
    """
    import openai

    key, base_url = (os.environ.get(f"OPENAI_{name}", "").strip() for name in ("API_KEY", "BASE_URL"))
    if not key and not base_url:
        raise EmonbError(
            "OPENAI_API_KEY is not set: export it (and OPENAI_BASE_URL for another server than OpenAI's), "
            "or write the triplets without a key: --annotator offline"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise EmonbError("OPENAI_API_KEY holds blanks, line breaks or other odd characters; set it again, without")
    return openai.OpenAI(
        api_key=key or "none",
        base_url=base_url or "https://api.openai.com/v1",
        max_retries=settings.transport_retries,
        timeout=settings.timeout_s,
        http_client=openai.DefaultHttpxClient(event_hooks=hooks),
    )


def token_limit(sdk: Any) -> str:
    """The name that a server is likely to know the limit of output tokens by."""
    return "max_completion_tokens" if sdk.base_url.host.endswith("openai.com") else "max_tokens"


def renamed(body: dict[str, Any], limit: str) -> dict[str, Any]:
    """A request with the limit of output tokens under another name."""
    return {limit if name == "max_completion_tokens" else name: value for name, value in body.items()}


def explain(error: Exception, sdk: Any) -> EmonbError:
    """What to tell the user of an error that ends the run, without key or path."""
    remedies = {
        401: "set a valid key in OPENAI_API_KEY",
        403: "set a key that may do this in OPENAI_API_KEY",
        404: "set triplets.model or --model, and OPENAI_BASE_URL up to and including /v1",
        429: "add credit, or wait, and start again",
    }
    remedy = remedies.get(getattr(error, "status_code", None), "start again to go on")
    return EmonbError(f"{sdk.base_url.host}: {said_by(error)}; {remedy}")


def said_by(error: BaseException) -> str:
    """The server's own words where there are any; else the SDK's or the connection's."""
    body = getattr(error, "body", None)
    words = body.get("message") if isinstance(body, dict) else None
    return scrub(str(words or f"{error} ({type(error.__cause__ or error).__name__})"))


class _Stopped(BaseException):
    """This attempt is not sent; no `Exception`, after which the SDK would try again."""


class Online:
    """Threads that take one image after another. What the SDK hides, its retries, passes through two hooks.

    An attempt that got no answer (a time-out, a cut connection) may be billed all the same: what it may cost at most
    stays reserved to the end of the run (`lost`), as that of images under way does until their answer is written down
    (`out`). Nothing is sent that could make these and what was spent exceed the limit.
    """

    def __init__(self, answers: Answers, say: Callable[[str], None]) -> None:
        self.answers, self.settings, self.say = answers, answers.settings, say
        self.sdk = connect(self.settings, request=[self._leaves], response=[self._came])
        self.limit, self.swapped = token_limit(self.sdk), False
        # seconds between two requests, and for each token; evenly, so that no minute has more than its share
        self.spacing = _MINUTE / (self.settings.requests_per_minute or math.inf)
        self.spacing_of_token = _MINUTE / (self.settings.tokens_per_minute or math.inf)
        self.next_at = 0.0
        self.rows, self.done = answers.missing(), queue.SimpleQueue[str | None]()
        self.turn = threading.Condition()  # for all that follows, and for the answers
        self.out: dict[int, float] = {}  # thread -> USD at most
        self.lost = 0.0
        self.mine = (
            threading.local()
        )  # of an image: `most` tokens and USD; of its last attempt: whether it is `flying`
        self.stopped, self.error = "", None
        self.in_a_row, self.answered = 0, False

    def run(self) -> str:
        """Ask until nothing is missing; returns why it ended early, or "".

        Raises:
            EmonbError: nothing can be asked (no key, unknown model, no credit left, server down, disk full).
        """
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.settings.concurrency)]
        for thread in threads:
            thread.start()
        what, total = f"{self.answers.asked[0]} on {self.answers.path.stem}", sum(1 for _ in self.answers.missing())
        finished = (image_id for _ in threads for image_id in iter(self.done.get, None))
        try:
            for _ in progress(finished, what, total=total, unit="image", note=self._note):
                pass
        except KeyboardInterrupt:
            self._end(INTERRUPTED)
            self.say(f"\ninterrupted: waiting for {len(self.out)} images that are paid for (again: drop them)")
            for thread in threads:
                thread.join()
        finally:
            self.sdk.close()
        if self.error:
            raise self.error
        return self.stopped

    def _note(self) -> str:
        usd = self.answers.usd
        return f"{self.answers.spent['prompt_tokens']:,} tokens in" if usd is None else f"${usd:.2f} spent"

    def _end(self, stopped: str = "", error: EmonbError | None = None) -> None:
        """Send nothing more; what is in flight is waited for."""
        with self.turn:
            self.stopped, self.error = self.stopped or stopped or str(error), self.error or error
            self.turn.notify_all()

    # ---- in a thread ----

    def _work(self) -> None:
        try:
            while not self.stopped:
                with self.turn:
                    row = next(self.rows, None)
                if row is None:
                    break
                while self._ask(row):
                    pass
                self.done.put(row["image_id"])
        except Exception as error:
            self._end(error=error if isinstance(error, EmonbError) else EmonbError(scrub(repr(error))))
        finally:
            self.done.put(None)

    def _ask(self, row: dict[str, Any]) -> bool:
        """Ask for an image once and write down what came; returns whether it is to be asked for again."""
        answers, form, limit, replies, problem = self.answers, self.answers.form, self.limit, [], None
        self.mine.most, self.mine.flying = answers.most[form], False
        try:
            picture = encode_picture(row["path"], self.settings.max_side)
            for body in answers.requests(row, picture, form):
                raw = self.sdk.chat.completions.with_raw_response.create(**renamed(body, limit))
                replies.append(read_reply(raw.http_response.json()))
        except (Exception, _Stopped) as error:
            problem = error
        with self.turn:
            try:
                if replies:
                    self.in_a_row, self.answered = 0, True
                if problem is None:
                    answers.receive(row, replies, form)
                elif not self._adapts(problem, form, limit):
                    self._give_up(row, problem, replies, form)
                    return False
            finally:
                self._lose()
                self.out.pop(threading.get_ident(), None)
                self.turn.notify_all()
            return answers.is_missing(row["image_id"])

    def _lose(self) -> None:
        """The last attempt got no answer, but may be billed."""
        if self.mine.flying:
            self.mine.flying = False
            self.lost += self.mine.most[1]

    def _leaves(self, request: Any) -> None:
        """Before each attempt: wait until pace and money allow it."""
        me, (tokens, usd) = threading.get_ident(), self.mine.most
        with self.turn:
            self._lose()
            while not self.stopped:
                now = time.monotonic()
                delay = self.next_at - now
                reserved = self.lost + sum(self.out.values()) + (0.0 if me in self.out else usd)
                affordable = (self.answers.usd or 0.0) + reserved <= (self.settings.max_cost or math.inf)
                if affordable and delay <= 0:
                    self.out[me], self.mine.flying = usd, True
                    self.next_at = now + max(self.spacing, self.spacing_of_token * tokens)
                    return
                if not affordable and (me in self.out or not self.out):
                    self._end(LIMIT.format(self.settings.max_cost))
                self.turn.wait(min(max(delay, 0.01), 1.0))
        raise _Stopped

    def _came(self, response: Any) -> None:
        """After each attempt: what the SDK would not see as we do."""
        content, told = response.read(), response.headers.get("retry-after", "")
        try:
            json.loads(content)
        except ValueError:
            if response.status_code == 200:  # a page instead of an answer: try again
                response.status_code = 502
                return
        if b"insufficient_quota" in content:
            response.headers["x-should-retry"] = "false"
        with self.turn:
            self.mine.flying = False
            if re.fullmatch(r"[\d.]{1,9}", told):  # it holds for all threads; the SDK gives up above two minutes
                del response.headers["retry-after"]
                until = time.monotonic() + min(float(told), _LONGEST)
                if until > max(self.next_at, time.monotonic() + 5) + 1:
                    self.say(f"{self.sdk.base_url.host} asks to wait {told} s")
                self.next_at = max(self.next_at, until)

    def _adapts(self, error: BaseException, form: str, limit: str) -> bool:
        """Whether the server may understand other words: the token limit's other name, or another form."""
        if getattr(error, "status_code", None) not in (400, 422):
            return False
        said = f"{error.param} {said_by(error)}"
        if limit in said and (limit != self.limit or not self.swapped):
            self.limit = "max_tokens" if limit == "max_completion_tokens" else "max_completion_tokens"
            self.swapped = True
            return True
        if form != "schema" or not re.search("response_format|schema", said):
            return False
        self.answers.refused_forms.add(form)
        return self.settings.answer_format == "auto"

    def _give_up(self, row: dict[str, Any], error: BaseException, replies: list[Any], form: str) -> None:
        """Write down why an image got no (whole) answer, and end the run where it is not the image's fault."""
        import openai

        stopped, unreadable = isinstance(error, _Stopped), isinstance(error, UnreadablePicture)
        fatal = isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError | openai.NotFoundError)
        fatal |= getattr(error, "code", None) == "insufficient_quota"
        detail = "not a readable picture" if unreadable else said_by(error)
        if replies or not (stopped or fatal):
            self.answers.give_up(row, detail, replies, answer_format=form)
        if fatal:
            raise explain(error, self.sdk)
        refused = isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError)
        if stopped or unreadable or (refused and self.answered):  # refused for good: these images alone
            return
        self.in_a_row += 1
        if self.in_a_row >= _IN_A_ROW:
            raise EmonbError(
                f"{self.sdk.base_url.host}: {_IN_A_ROW} images in a row got no answer, the last: {detail}; what was "
                "answered is saved: start again when this is mended"
            )
