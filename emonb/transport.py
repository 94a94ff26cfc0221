"""Room 02: requests to an OpenAI-compatible server, through the official SDK, within limits and without leaks.

The SDK would retry by itself; here each attempt passes the same pace (requests and tokens per minute), and a
Retry-After that one request is told holds for all of them.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from emonb.annotator import Reply
from emonb.errors import EmonbError
from emonb.pace import Pace
from emonb.settings import TripletSettings

__all__ = ["BadBody", "FormRefused", "RefusedRequest", "Server", "public_name", "read_completion", "scrub"]

_LOCAL_PATH = re.compile(r"(?<![\w/:.])(?:/[\w.@+\-]+){2,}/?|[A-Za-z]:\\[^\s'\"]+")


_LONG = 5.0  # seconds of a pause that people are told of
_LONGEST = 3600.0  # seconds that a server may make us wait at a time
_DEFAULT_URL = "https://api.openai.com/v1"
_UNKNOWN = r"unsupported|not supported|unknown|unrecognized|unexpected|not permitted|extra input|use '"


class FormRefused(Exception):
    """The server cannot do the asked answer format."""


class RefusedRequest(Exception):
    """This request got no answer: all attempts failed, or (`for_good`) the server refuses it.

    A provider may bill what it wrote after our time-out; `Server.timed_out` counts those attempts.
    """

    def __init__(self, text: str, *, for_good: bool = False) -> None:
        super().__init__(text)
        self.for_good = for_good


class Server:
    """The chat-completions server that OPENAI_BASE_URL and OPENAI_API_KEY name."""

    def __init__(self, settings: TripletSettings, stop: threading.Event, say: Callable[[str], None] = print) -> None:
        """Raises `EmonbError` where neither a key nor a server of one's own is named."""
        import openai

        key, base_url = os.environ.get("OPENAI_API_KEY", "").strip(), os.environ.get("OPENAI_BASE_URL", "").strip()
        if not key and not base_url:
            raise EmonbError(
                "OPENAI_API_KEY is not set: export it (and OPENAI_BASE_URL for another server than OpenAI's), "
                "or write the triplets without a key: --annotator offline"
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise EmonbError("OPENAI_API_KEY holds blanks, line breaks or other odd characters; set it again, without")
        self.settings, self.stop, self.say = settings, stop, say
        parts = urlsplit(base_url or _DEFAULT_URL)
        user, _, self.host = parts.netloc.rpartition("@")  # logs of the HTTP library would show the password
        basic = {"Authorization": f"Basic {base64.b64encode(unquote(user).encode()).decode()}"} if user else None
        self.sdk = openai.OpenAI(
            api_key=key or "none",
            base_url=parts._replace(netloc=self.host).geturl(),
            default_headers=basic,
            max_retries=0,
            timeout=settings.timeout_s,
        )
        self.timed_out = 0
        self.pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)
        self._token_limit = "max_completion_tokens" if self.host.endswith("openai.com") else "max_tokens"
        self._limit_swapped = False

    def ask(self, body: dict[str, Any], tokens: float, stop: threading.Event | None = None) -> Reply | None:
        """One chat completion, tried again after transient failures; None if `stop` was set before it was sent.

        Args:
            body: arguments of `chat.completions.create`.
            tokens: what the request may take at most, for the pace.
            stop: another event than the server's own, for a request that belongs to one that is paid for already.

        Raises:
            FormRefused: the answer format is beyond this server.
            RefusedRequest: this one request is refused for good, or all attempts failed.
            EmonbError: no request can succeed: wrong key, unknown model, no credit left.
        """
        attempt, stop = 0, stop or self.stop
        while True:
            entry = self.pace.wait(tokens, stop)
            if entry is None:
                return None
            limit = self._token_limit
            try:
                reply = read_completion(self.sdk.chat.completions.create(**self.body(body, limit)))
            except Exception as error:  # sorted out below; what nobody expected is raised again
                self.pace.settle(entry, 0)
                if self._adapts(error, limit, body):
                    continue
                stop.wait(self.delay_after(error, attempt))
                attempt += 1
                continue
            if reply.usage:
                self.pace.settle(entry, reply.usage["prompt_tokens"] + reply.usage["completion_tokens"])
            return reply

    def body(self, body: dict[str, Any], limit: str | None = None) -> dict[str, Any]:
        """A request with the token limit under the name that this server knows."""
        known = dict(body)
        known[limit or self._token_limit] = known.pop("max_completion_tokens")
        return known

    def fatal(self, error: Exception) -> EmonbError | None:
        """What to tell the user where no further request can succeed; None for any other error."""
        import openai

        text = scrub(_message(error))
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return EmonbError(f"{self.host} refuses the key in OPENAI_API_KEY ({text}); set a valid one")
        if isinstance(error, openai.NotFoundError):
            return EmonbError(
                f"{self.host} does not know model {public_name(self.settings.model)!r} or has not what is asked of it "
                f"({text}); set triplets.model or --model, and OPENAI_BASE_URL up to and including /v1"
            )
        if isinstance(error, openai.RateLimitError) and getattr(error, "code", None) == "insufficient_quota":
            return EmonbError(f"{self.host}: no credit left ({text}); add credit and start again")
        return None

    @contextmanager
    def explained(self, gone: str = "") -> Iterator[None]:
        """Turn the SDK's errors into one clear message without key or path; `gone` says what a 404 means here."""
        import openai

        try:
            yield
        except AttributeError:
            raise EmonbError(f"{self.host}: not an OpenAI-compatible API; set OPENAI_BASE_URL up to /v1") from None
        except openai.APIError as error:
            missing = EmonbError(f"{self.host}: {gone}") if gone and isinstance(error, openai.NotFoundError) else None
            raise (
                missing
                or self.fatal(error)
                or EmonbError(f"{self.host}: {type(error).__name__}: {scrub(_message(error))}; start again to go on")
            ) from None

    def delay_after(self, error: Exception, attempt: int) -> float:
        """Seconds to wait before the next attempt; raises where another attempt is of no use."""
        import openai

        fatal = self.fatal(error)
        if fatal:
            raise fatal from None
        text = scrub(_message(error))
        if isinstance(error, openai.APIStatusError) and not _is_transient(error.status_code):
            raise RefusedRequest(f"status {error.status_code}: {text}", for_good=True) from None
        if not isinstance(error, openai.APIError | ValueError | BadBody):
            raise error
        self.timed_out += isinstance(error, openai.APITimeoutError)
        busy = isinstance(error, openai.RateLimitError)  # it answers: waiting will do
        if attempt >= self.settings.transport_retries * (10 if busy else 1):
            last = f"{type(error).__name__}: {text}"
            raise RefusedRequest(f"{attempt + 1} attempts failed, the last with {last}") from None
        told = _retry_after(error)
        if told is not None:
            if self.pace.pause(told) and told >= _LONG:
                self.say(f"{self.host} asks to wait {told:,.0f} s")
            return told + random.uniform(0, min(0.1 * 2 ** min(attempt, 8), 5.0))  # some send 0, all at once
        return min(0.5 * 2**attempt, 30.0) * random.uniform(0.75, 1.0)  # so that those who failed together part

    def _adapts(self, error: Exception, limit: str, body: dict[str, Any]) -> bool:
        """Whether a 400 names an argument that we can say differently; raises where it names the form."""
        import openai

        if not isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
            return False
        text = scrub(_message(error))
        named = f"{getattr(error, 'param', None) or ''} {text}"
        if limit != self._token_limit:  # another request has found the right name meanwhile
            return True
        if not self._limit_swapped and limit in named and re.search(_UNKNOWN, named, re.IGNORECASE):
            self._token_limit = "max_tokens" if limit == "max_completion_tokens" else "max_completion_tokens"
            self._limit_swapped = True
            return True
        if "response_format" in body and re.search(r"response_format|json_schema|structured|schema", named):
            raise FormRefused(text) from None
        if "temperature" in body and "temperature" in named:
            raise EmonbError(f"{self.host}: {text}; set triplets.temperature to null") from None
        raise RefusedRequest(f"refused: {text}", for_good=True) from None


class BadBody(Exception):
    """A 200 whose body is no chat completion."""


def read_completion(completion: Any) -> Reply:
    """A `Reply` from the SDK's object or from the `body` of a Batch API line.

    Raises:
        BadBody: it holds no choice.
    """
    data = completion if isinstance(completion, dict) else getattr(completion, "model_dump", dict)()
    try:
        usage = _usage(data.get("usage"))
        choice = (data.get("choices") or [{}])[0]
        message = choice.get("message") or {}
        if not message and not usage:  # with usage it was paid for, and is judged as an empty answer
            raise TypeError
        text, refusal = _plain_text(message.get("content")), _plain_text(message.get("refusal"))
        finish_reason, model = choice.get("finish_reason"), _plain_text(data.get("model"))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise BadBody("the server's answer is not a chat completion") from None
    try:
        created = datetime.fromtimestamp(int(data.get("created") or time.time()), UTC)
    except (ValueError, TypeError, OverflowError, OSError):  # some servers count milliseconds
        created = datetime.now(UTC)
    said = created.isoformat(timespec="seconds")
    return Reply(text, finish_reason, refusal or None, public_name(model), said, usage)


def _usage(usage: Any) -> dict[str, int] | None:
    """Token counts, or None where the server gives none that can be counted with."""
    try:
        counts = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
    except (AttributeError, ValueError, TypeError, OverflowError):
        return None
    return counts if min(counts.values()) >= 0 and any(counts.values()) else None


def _plain_text(content: Any) -> str:
    """Text, or the text parts of a list, that can be written as UTF-8; "" for anything else."""
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content.encode("utf-8", "replace").decode() if isinstance(content, str) else ""


def public_name(model: str) -> str:
    """A model's name without the folder that a local server may put before it."""
    return (
        model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
        if model.startswith(("/", "~", ".")) or re.match(r"[A-Za-z]:\\", model)
        else model
    )


def scrub(text: str) -> str:
    """A server's message without the key, without local paths, on one line of at most 300 characters."""
    for secret in (os.environ.get("OPENAI_API_KEY", "").strip(), os.environ.get("OPENAI_ADMIN_KEY", "").strip()):
        if len(secret) >= 4:
            text = text.replace(secret, "[key]")
    text = re.sub(r"\bsk-[\w*\-]{4,}", "[key]", text)  # also a masked or a foreign one
    text = re.sub(r"\b(Basic|Bearer)\s+[\w+/=\-.]+", "[key]", text)
    text = re.sub(r"//[^/\s@]+@", "//", text)  # user:password@ in a URL
    text = text.replace(str(Path.home()), "[home]") if str(Path.home()) != "/" else text
    return " ".join(_LOCAL_PATH.sub("[path]", text).split())[:300]


def _message(error: Exception) -> str:
    """The server's own words where there are any; else the SDK's or the connection's."""
    body = getattr(error, "body", None)
    if isinstance(body, dict):
        inner = body.get("error", body)
        return str(inner.get("message") or inner) if isinstance(inner, dict) else str(inner)
    if isinstance(error, json.JSONDecodeError):
        return "the body is not JSON"
    cause = error.__cause__
    return f"{error} ({type(cause).__name__})" if cause else f"{error}"


def _is_transient(status: int) -> bool:
    return status in (408, 409, 425, 429) or status >= 500


def _retry_after(error: Exception) -> float | None:
    """Seconds of a `retry-after-ms` or `retry-after` header (a number or a date)."""
    from email.utils import parsedate_to_datetime

    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        if "retry-after-ms" in headers:
            return min(max(0.0, float(headers["retry-after-ms"]) / 1000), _LONGEST)
        value = headers.get("retry-after")
        if value is None:
            return None
        if re.fullmatch(r"\s*[\d.]+\s*", value):
            return min(float(value), _LONGEST)
        return min(_LONGEST, max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()))
    except (ValueError, TypeError):
        return None
