"""Two ways to ask: many images at a time, or by the Batch API (half the price, an answer within a day)."""

from __future__ import annotations

import json
import math
import re
import secrets
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import openai

from emonb.annotate.log import BATCHES, UNASSIGNED, Answers, Log, custom_id, open_batches, refuse_open_batches
from emonb.annotate.request import dig, encode_picture, given, read_batch_line, read_reply, scrub, text_lines
from emonb.errors import EmonbError, StoppedEarly, UnreadablePicture, visible
from emonb.files import write_json
from emonb.progress import progress
from emonb.settings import TripletSettings
from emonb.triplets import REJECTED, Record, json_lines

_LIMIT = "the next answer could exceed the limit of ${:g}; raise --max-cost to go on"
_MINUTE = 61.0  # seconds; requests travel for different times, and the server counts arrivals
_BACKOFF, _LONGEST = 0.5, 120.0  # seconds before the second attempt, and that a server may make us wait at a time
_IN_A_ROW = 20  # images without an answer, one after another: the server is down, not the images at fault
_KNOCKS = 3  # times that an image is asked for where nobody listens, or something else than such a server
_NOBODY = ("ConnectError", "ProxyError", "TooManyRedirects", "UnsupportedProtocol")  # of the SDK's HTTP library
_ENDPOINT = "/v1/chat/completions"
_REMEDIES = {
    401: "set a valid key in OPENAI_API_KEY",
    402: "add credit, and start again",
    403: "set a key that may do this in OPENAI_API_KEY",
    404: "set triplets.model or --model, and OPENAI_BASE_URL up to and including /v1; a batch that is gone there is "
    "to be removed from <dataset>.batches.json",
    429: "add credit, or wait, and start again",
}
_NO_CREDIT = re.compile(r"insufficient.{0,3}(?:quota|balance|credit|fund)|exceeded_current_quota|credit balance", re.I)
_BLIND = re.compile(  # as OpenAI, OpenRouter, vLLM, llama.cpp, DeepSeek and Groq say that a model sees no pictures
    r"support.{0,20}(?:image(?! format| type| size)|vision)|(?:image|vision).{0,40}(?:not|only) (?:supported|enabled)"
    r"|not a (?:multi-?modal|vision)|at most 0 image|unknown variant .image_url|content must be a string|text-only",
    re.IGNORECASE,
)
_SEES_NOTHING = "this model sees no pictures; choose another with --model"


def server_address() -> str:
    """OPENAI_BASE_URL as the SDK needs it, up to and including /v1, from what people write; "": OpenAI's own.

    Forgiven: no scheme, no /v1 after a bare host, a slash or an endpoint at the end, and what `given` forgives. Raises
    `EmonbError` for what is no address of a server.
    """
    text = said = given("OPENAI_BASE_URL")
    if not text:
        return ""
    if "://" not in text:
        host = text.split("/")[0].rsplit("@")[-1]
        near = re.match(r"(localhost|\[|[\d.]+(:|$))", host) or re.search(r":\d+$", host)
        text = f"{'http' if near else 'https'}://{text}"
    with suppress(ValueError):
        parts = urlsplit(text)
        host = parts.hostname or ""
        sound = re.fullmatch(r"[\w.\-]+|[\da-f:.]+(%\w+)?", host.encode("idna").decode()) and (parts.port or 1) > 0
        sound = sound and host not in ("http", "https", "none", "null", "undefined")
        if sound and parts.scheme in ("http", "https") and text.isprintable() and not re.search(r"[\s?#,;]", text):
            path = re.sub(r"/((chat/)?completions|responses|models|embeddings|files|batches)/*$", "", parts.path)
            return f"{parts.scheme}://{parts.netloc}{path.rstrip('/') or '/v1'}"
    raise EmonbError(
        f"OPENAI_BASE_URL: {scrub(said)[:99]!r} is no address of a server; write it up to and including /v1, such as "
        "http://localhost:8000/v1 or https://api.openai.com/v1"
    )


def connect(settings: TripletSettings) -> openai.OpenAI:
    """The official SDK's client of the server that OPENAI_BASE_URL and OPENAI_API_KEY name.

    A server on this machine is asked past any proxy. Raises `EmonbError` for no server, an odd key, certificates that
    are not there, or a proxy that cannot be used.
    """
    key, base_url = given("OPENAI_API_KEY"), server_address()
    if not key and not base_url:
        raise EmonbError(
            "OPENAI_API_KEY is not set: export it (and OPENAI_BASE_URL for another server than OpenAI's), "
            "or write the triplets without a key: --annotator offline"
        )
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        if not re.fullmatch("[!-~]*", given(name)):
            raise EmonbError(f"{name} holds blanks, line breaks or other odd characters; set it again, without")
    where = {"api_key": key or "none", "base_url": base_url or "https://api.openai.com/v1"}
    proxies = _proxies(where["base_url"])
    try:
        client = openai.DefaultHttpxClient(trust_env=proxies is not None)
    except Exception as error:  # what the SDK's HTTP library, which differs by version, makes of the environment
        if isinstance(error, OSError):
            what = "SSL_CERT_FILE (or SSL_CERT_DIR): no certificates there"
            raise EmonbError(f"{what} ({scrub(str(error))}); correct or unset it") from None
        remedy = "pip install 'httpx[socks]'" if isinstance(error, ImportError) else "correct it"
        remedy += ", unset it, or name the server in NO_PROXY"
        names = ", ".join(f"{name}_proxy" for name in proxies or ()) or "proxy"
        raise EmonbError(f"{names}: this proxy cannot be used ({scrub(str(error))}); {remedy}") from None
    patience = {"max_retries": settings.transport_retries, "timeout": settings.timeout_s}
    return openai.OpenAI(**where, **patience, http_client=client)


def _proxies(base_url: str) -> dict[str, str] | None:
    """The environment's proxies, scheme -> address; None for a server that is asked past them."""
    host = urlsplit(base_url).hostname
    if host in ("localhost", "127.0.0.1", "::1", "0.0.0.0") or proxy_bypass(host):
        return None
    return {scheme: address for scheme, address in getproxies().items() if scheme != "no"}


def _token_limits(sdk: openai.OpenAI) -> tuple[str, str]:
    """What a server is likely to call the limit of output tokens, and the other name."""
    names = ("max_completion_tokens", "max_tokens")
    return names if sdk.base_url.host.endswith("openai.com") else names[::-1]


def _explained(error: Exception, sdk: openai.OpenAI, remedy: str = "") -> EmonbError:
    """What to tell the user of an error that ends the run, without key or path."""
    status, said = getattr(error, "status_code", 0), _said_by(error)
    remedy = remedy or _REMEDIES.get(402 if _is_no_credit(error) else status, "start again to go on")
    proxies = (_proxies(str(sdk.base_url)) or {}) if isinstance(error, openai.APIConnectionError) else {}
    for scheme in proxies.keys() & {sdk.base_url.scheme, "all"}:
        said += f", asked through {scheme.upper()}_PROXY {scrub(proxies[scheme])}"
        remedy = "correct or unset it, or name the server in NO_PROXY"
    return EmonbError(f"{sdk.base_url.host[:60]}: {said}; {remedy} (what was answered is saved)")


def _said_by(error: Exception) -> str:
    """The server's own words where there are any; else the SDK's and the connection's, or ours."""
    words, cause = dig(getattr(error, "body", None), "message"), error.__cause__
    return scrub(str(words or (f"{error} ({type(cause).__name__} {cause})" if cause else error)))


def _is_no_credit(error: Exception) -> bool:
    """Whether only money helps, not another try; some say so in the code, some in the type, some in words."""
    said = " ".join(str(getattr(error, name, "")) for name in ("code", "type", "message"))
    status = getattr(error, "status_code", 0)
    return status == 402 or (400 <= status < 500 and bool(_NO_CREDIT.search(said)))


# ---- one by one ----------------------------------------------------------------------------------------------------


class Online:
    """One thread says when the next image may be asked for; others ask, and write down at once what came.

    What the answers under way may cost at most is reserved; a request that got none (a time-out, a cut connection, an
    error of the server) may be billed all the same, and stays reserved to the end of the run (`lost`). Nothing is sent
    that could make these and what was spent exceed the limit.
    """

    def __init__(self, answers: Log, say: Callable[[str], None]) -> None:
        refuse_open_batches(answers.path)
        self.answers, self.settings, self.say, self.lock = answers, answers.settings, say, threading.Lock()
        self.sdk = connect(self.settings).with_options(max_retries=0)  # retries keep the limits, too
        answers.limit, self.other_limit = _token_limits(self.sdk)
        self.waiting, self.attempts = deque(answers.missing()), Counter[str]()
        self.under_way = set[Future[Record | None]]()
        self.next_at, self.lost, self.in_a_row = 0.0, 0.0, 0

    def run(self) -> str:
        """Ask until nothing is missing; returns why it ended early, or "".

        Raises `EmonbError` where nothing can be asked: no key, unknown model, no credit left, server down, disk full.
        """
        dataset, total = self.answers.path.stem.split("__")[0], len(self.waiting)
        what = f"{self.answers.asked[0]} on {dataset}"
        with self.sdk, ThreadPoolExecutor(self.settings.concurrency) as pool:
            try:
                for _ in progress(self._finished(pool), what, total, "image", note=lambda: self.answers.bill):
                    pass
            except KeyboardInterrupt:
                self.say(f"\ninterrupted: waiting for {len(self.under_way)} images that are paid for")
                raise
        return self.answers.useless or (_LIMIT.format(self.answers.max_cost) if self.waiting else "")

    def _finished(self, pool: ThreadPoolExecutor) -> Iterator[None]:
        """Send whenever pace and money allow it, until nothing is left; yields for each image that is done with."""
        terms, most = self.settings, sum(self.answers.most)
        pace = max(1 / (terms.requests_per_minute or math.inf), most / (terms.tokens_per_minute or math.inf)) * _MINUTE
        while self.waiting or self.under_way:
            form, delay = self.answers.form, self.next_at - time.monotonic()
            requests = 2 if form == "questions" else 1
            reserved = self.lost + (len(self.under_way) + 1) * requests * self.answers.most_usd
            affordable = self.answers.can_afford(reserved) and not self.answers.useless
            sendable = self.waiting and affordable and len(self.under_way) < terms.concurrency
            if sendable and delay <= 0:
                self.next_at = time.monotonic() + pace * requests  # before: a quick failure may put it off
                self.under_way.add(pool.submit(self._ask, self.waiting.popleft(), form))
            elif self.under_way:
                pause = min(max(delay, 0.01), 1.0) if sendable else 1.0
                done, self.under_way = wait(self.under_way, pause, FIRST_COMPLETED)
                for again in (future.result() for future in done):
                    if again:
                        self.waiting.appendleft(again)
                    else:
                        yield
            elif affordable:
                time.sleep(min(delay, 1.0))
            else:
                return

    def _ask(self, row: Record, form: str) -> Record | None:
        """In a thread: ask for an image and write down what came; returns the image if it is to be asked for again."""
        replies, error, start = list[Record](), None, time.monotonic()
        try:
            picture = encode_picture(row["path"], self.settings.max_side)
            for body in self.answers.requests(row, picture, form):
                raw = self.sdk.chat.completions.with_raw_response.create(**body)
                completion = None
                with suppress(ValueError):  # a page instead of an answer
                    completion = raw.http_response.json()
                replies.append(read_reply(completion))
        except (openai.APIError, UnreadablePicture, ValueError, RecursionError) as caught:
            error = caught
        with self.lock:
            if error:
                return row if self._failed(row, form, replies, error) else None
            self.answers.receive(row, replies, form, seconds=round(time.monotonic() - start, 2))
            self.in_a_row = self.attempts[row["image_id"]] = 0
            return row if self.answers.is_missing(row["image_id"]) else None

    def _failed(self, row: Record, form: str, replies: list[Record], error: Exception) -> bool:
        """Whether an image that got no (whole) answer is to be asked for again; if not, that is written down.

        Raises `EmonbError` where it is not the image's fault: the key, the model, no credit, the server is down.
        """
        image_id, status = row["image_id"], getattr(error, "status_code", 0)
        self.attempts[image_id] += 1
        no_credit = _is_no_credit(error)
        blind = status >= 400 and not self.answers.spent["answers"] and bool(_BLIND.search(_said_by(error)))
        refused = 400 <= status < 500 or isinstance(error, UnreadablePicture)  # nobody worked on it: not billed
        passing = not refused or status in (408, 409, 429)
        if passing and not (no_credit or blind):
            self.lost += 0.0 if refused else self.answers.most_usd
            told = re.fullmatch(r"\d{1,6}(\.\d*)?", error.response.headers.get("retry-after", "")) if status else None
            pause = float(told[0]) if told else _BACKOFF * 2 ** min(self.attempts[image_id] - 1, 4)
            self.next_at = max(self.next_at, time.monotonic() + min(pause, _LONGEST))
            again = self.attempts[image_id] <= self.settings.transport_retries
        else:
            again, said = False, f"{getattr(error, 'param', '')} {_said_by(error)}"
            if re.search("max_(completion_)?tokens", said):  # it may understand the limit's other name
                self.answers.limit, again = self.other_limit, self.attempts[image_id] == 1
            elif form == "schema" and re.search("response_format|schema", said):  # or another form
                self.answers.unread[form], again = math.inf, self.settings.answer_format == "auto"
        if replies or not again:  # some providers tell of their content filter by an error instead of an answer
            filtered = getattr(error, "code", None) in ("content_filter", "content_policy_violation")
            self.answers.receive(row, replies, form, _said_by(error), filtered)
        # a server that answers others may refuse some images for good
        self.in_a_row += not again and (status not in (400, 413, 422) or not self.answers.spent["answers"])
        nobody = type(error.__cause__).__name__ in _NOBODY or isinstance(error, ValueError)
        nobody = nobody and not self.answers.spent["answers"] and self.attempts[image_id] >= _KNOCKS
        hopeless = no_credit or blind or status in (401, 403, 404) or self.in_a_row >= _IN_A_ROW
        if nobody or (hopeless and not again):
            raise _explained(error, self.sdk, _SEES_NOTHING if blind else "")
        return again


# ---- the Batch API -------------------------------------------------------------------------------------------------


class Batches:
    """The batches of one dataset that are under way, and the steps of each: submit, look, merge.

    Each is noted in `<dataset>.batches.json` before anything is sent and until its answers are in the log. A kill in
    between costs nothing: whether the last one was submitted, the server knows.
    """

    def __init__(self, answers: Answers, say: Callable[[str], None]) -> None:
        self.answers, self.settings, self.say = answers, answers.settings, say
        self.sdk = connect(self.settings)
        answers.limit, _ = _token_limits(self.sdk)
        self.open, self.empty = open_batches(answers.path), ""
        self.states = dict[str, str]()  # as last told

    def run(self, patient: bool) -> str:
        """Submit what is missing, wait, merge, until a round brings nothing more; returns why it ended early, or "".

        Raises `EmonbError` where the server refuses the key, the model or a batch.
        """
        stopped, limit, rounds = "", "", list[tuple[int, str]]()
        try:
            if unsure := [batch for batch in self.open if not batch.get("batch_id")]:
                # what a killed run did not see submitted: the server has it, or nothing was asked
                there = {(b.metadata or {}).get("emonb"): b.id for b in self.sdk.batches.list(limit=100)}
                for batch in unsure:
                    batch["batch_id"] = there.get(batch["name"])
                self.note([batch for batch in self.open if batch["batch_id"]])
            while self._fetched(patient) and not (stopped := self.answers.useless or self.empty):
                if (now := (self.answers.spent["answers"], self.answers.form)) in rounds:
                    break
                rounds.append(now)
                limit = self._submit_missing()
        except (openai.APIError, AttributeError) as error:  # a page instead of an answer has no attributes
            raise _explained(error, self.sdk) from None
        if self.open:
            self.say(f"{len(self.open)} batches are under way at the server; the same command fetches them")
        return stopped or limit

    def note(self, batches: list[Record]) -> None:
        """Write down which batches are under way."""
        self.open = batches
        write_json(self.answers.path.with_suffix(BATCHES), {"parts": batches})

    def _submit_missing(self) -> str:
        """Batches of all that is missing, as large as the API and the money allow; returns why not of all."""
        lines, size, form, limit = list[bytes](), 0, self.answers.form, ""
        if form == "questions":
            raise EmonbError("triplets.answer_format: the Batch API needs a model that can do schema or sections")
        reserved = 0.0
        for row in self.answers.missing():
            try:
                picture = encode_picture(row["path"], self.settings.max_side)
            except UnreadablePicture as error:
                self.answers.receive(row, [], form, _said_by(error))
                continue
            reserved += self.answers.most_usd
            if not self.answers.can_afford(reserved):
                limit = _LIMIT.format(self.answers.max_cost)
                break
            asked = {"custom_id": custom_id(row), "method": "POST", "url": _ENDPOINT}
            line = json.dumps({**asked, "body": self.answers.requests(row, picture, form)[0]}).encode() + b"\n"
            if len(lines) == self.settings.batch_requests or size + len(line) > self.settings.batch_mb * 1e6:
                self.submit(lines)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
        self.submit(lines)
        return limit

    def submit(self, lines: list[bytes]) -> None:
        """Send the requests of one batch, noted before and after."""
        if not lines:
            return
        name = f"{self.answers.path.stem}-{secrets.token_hex(6)}"  # its own at the server
        batch = {"name": name, "images": len(lines), "form": self.answers.form, "asked_of": self.answers.asked[0]}
        batch["prompt_sha256"] = self.answers.asked[1]
        self.note([*self.open, batch])
        file = self.sdk.files.create(file=(f"{name}.jsonl", b"".join(lines)), purpose="batch")
        once = self.sdk.with_options(max_retries=0).batches  # a second try could make a second batch
        more = {"completion_window": "24h", "metadata": {"emonb": name}}
        batch["batch_id"] = once.create(input_file_id=file.id, endpoint=_ENDPOINT, **more).id
        self.note(self.open)
        self.say(f"submitted {name}: {len(lines):,} images")

    def _fetched(self, patient: bool) -> bool:
        """Merge what is ready; with patience, wait for everything. Whether nothing is under way any more."""
        while self.open:
            problems = list[EmonbError]()
            for batch in self.open:
                try:
                    self._look(batch)
                except EmonbError as problem:  # what came of the others is merged first
                    problems.append(problem)
            if problems:
                raise problems[0]
            if not patient:
                break
            time.sleep(self.settings.batch_poll_s if self.open else 0)
        return not self.open

    def _look(self, batch: Record) -> None:
        """If a batch is over, merge its answers; raises `EmonbError` if it was refused or cannot be read."""
        found = self.sdk.batches.retrieve(batch["batch_id"])
        counts = found.request_counts
        if found.status not in ("completed", "expired", "cancelled", "failed"):
            state = f"{batch['name']}: {found.status}" + (f", {counts.completed:,} answers" if counts else "")
            if self.states.get(batch["name"]) != state:  # also one that the API gets later: nobody waits unawares
                self.say(visible(state))
            self.states[batch["name"]] = state
            return
        files = [file_id for file_id in (found.output_file_id, found.error_file_id) if file_id]
        lines = [line for file_id in files for line in text_lines(self.sdk.files.content(file_id).content, "replace")]
        refused = found.status in ("cancelled", "failed")
        due = counts.completed + counts.failed if counts and not refused else 0
        if len(lines) < due:
            came = f"{len(lines):,} answers came, and not all" if lines else "its files are empty"
            raise StoppedEarly(f"{batch['name']}: {came} of {due:,}; start again to fetch them")
        self.merge(batch, lines, whole=found.status == "completed" and bool(lines))
        if not lines and not refused:
            self.empty = f"{batch['name']} came back {found.status} without one answer; start again to ask anew"
        if refused:
            why = "; ".join(f"{error.code}: {error.message}" for error in (found.errors and found.errors.data) or [])
            raise EmonbError(f"{self.sdk.base_url.host}: {batch['name']} {found.status} ({scrub(why)}); start again")

    def merge(self, batch: Record, lines: list[str], whole: bool) -> None:
        """Judge the answers of a batch; a merge that was interrupted goes on where it was.

        `whole`: each image has to be there. Raises `StoppedEarly` where many images got neither an answer that can be
        read nor an error: they are paid. The batch stays open, so that none of them is asked for again unasked.
        """
        rejected = [record for _, record in json_lines(self.answers.path.with_suffix(REJECTED))]
        over = self.answers.done.keys() | {r["image_id"] for r in rejected if r.get("batch") == batch["name"]}
        rows = {custom_id(row): row for row in self.answers.rows}
        more = {"batch": batch["name"], "asked_of": batch["asked_of"], "prompt_sha256": batch["prompt_sha256"]}
        found, odd, once = dict[str, tuple[Record | None, str]](), defaultdict[str, list[str]](list), set[str]()
        for line in lines:
            name, reply, error = read_batch_line(line)
            if name in rows and name not in once:
                found[name] = reply, error
            else:
                odd["repeat a custom id" if name in once else "are of no image of ours"].append(line)
            once.add(name)
        kept, note = (self.answers.path.with_suffix(suffix).name for suffix in (UNASSIGNED, BATCHES))
        for what, some in odd.items():
            self.answers.keep(some)
            self.say(f"{batch['name']}: {len(some):,} answers {what}; they are kept in {kept}")
        absent = batch["images"] - len(found)
        absent = absent if whole else min(absent, sum(map(len, odd.values())))
        lost = absent + sum(not reply and not error for reply, error in found.values())
        many = lost > max(2, batch["images"] / 10) or 2 * lost > batch["images"]
        for name, (reply, error) in found.items():
            row = rows[name]
            if row["image_id"] in over or (many and not reply and not error):
                continue
            if not reply and "response_format" in error:
                self.answers.unread[batch["form"]] = math.inf
            problem = "" if reply else error or "its line cannot be read"
            self.answers.receive(row, [reply] if reply else [], batch["form"], problem, **more)
        if many:
            raise StoppedEarly(
                f"{batch['name']}: {lost:,} of its {batch['images']:,} images got no answer that can be read; start "
                f"again to fetch it once more, or, to pay for these images again, remove it from {note}"
            )
        self.note([other for other in self.open if other is not batch])
