"""Room 02: ask a paid model for the triplets of one dataset: many requests at a time, within limits, resumable.

The authors' script asks for one image after another and writes all answers at the very end. Here each answer is on
disk before it counts, and whatever ends the run (a limit on the cost, no credit, Ctrl-C, kill -9, a power cut), the
next one asks only for what is missing.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import pandas as pd

from emonb.annotation import Annotation
from emonb.annotator import Reply, encode_picture
from emonb.batch import INTERRUPTED, run_batches
from emonb.errors import EmonbError, UnreadablePicture
from emonb.prices import estimate_table, image_tokens, request_tokens, sample_sizes
from emonb.progress import progress
from emonb.samples import count_samples, iter_samples, sample_labels
from emonb.settings import Settings
from emonb.store import Artifact
from emonb.transport import FormRefused, Server, public_name, scrub
from emonb.triplet_files import refuse_open_batches
from emonb.triplet_tables import Summary

__all__ = ["INTERRUPTED", "annotate", "estimate"]

_IN_A_ROW = 10  # images without an answer, one after another: the server is down, not the images at fault
_REFUSED_IN_A_ROW = 50  # images that a server refuses which has answered nothing yet: the request is at fault


def annotate(
    settings: Settings,
    samples: Artifact,
    dataset: str,
    *,
    batch: bool = False,
    patient: bool = True,
    say: Callable[[str], None] = print,
) -> Summary:
    """Ask for the triplets that are missing and append them to `OUT/triplets/<dataset>.jsonl`.

    Args:
        settings: `settings.triplets` says whom to ask and on what terms.
        samples: the sample table; its training images are asked for.
        dataset: name of the dataset.
        batch: use the Batch API (half the price, within a day).
        patient: wait for batches; else submit, fetch what is ready, and return.
        say: gets the messages for people.

    Returns:
        What stands in the files afterwards.

    Raises:
        EmonbError: nothing can be asked (no key, unknown model, no credit left, server down, damaged files).
            Answers that arrived before are on disk.
    """
    with Annotation(settings, samples, dataset, batch=batch) as work:
        for repair in work.log.repairs:
            say(f"repaired: {repair}")
        if work.strangers:
            say(f"{work.strangers:,} images in the file are not training images of {dataset} (any more): left out")
        stopped = ""
        try:
            if batch:
                stopped = run_batches(work, patient=patient, say=say)
            elif work.todo:
                refuse_open_batches(work.log.path)
                stopped = _Online(work, say).run()
        except EmonbError:
            if work.log.usage:
                say(str(work.summary()))
            raise
        summary = work.summary(stopped)
    say(str(summary))
    return summary


def estimate(
    settings: Settings, samples: Artifact, *, batch: bool = False, without: Collection[str] = ()
) -> pd.DataFrame:
    """What the triplets of the training images will cost, before anything is sent: see `estimate_table`.

    Images whose ids are in `without` are not counted.
    """
    images = sum(row["image_id"] not in without for row in iter_samples(samples, "train", columns=["image_id"]))
    sizes = sample_sizes(iter_samples(samples, "train", columns=["path"]), count_samples(samples, "train"))
    return estimate_table(settings.triplets, sizes, images, sample_labels(samples), batch=batch)


class _Online:
    """The loop around a pool of threads; judging and writing are done in one thread, in order of arrival."""

    def __init__(self, work: Annotation, say: Callable[[str], None]) -> None:
        self.work, self.say = work, say
        self.stop = threading.Event()
        self.server = Server(work.settings, self.stop, say)
        self.rows = work.missing()
        self.again: deque[dict[str, Any]] = deque()
        self.flight: dict[Future[tuple[list[Reply], Exception | None]], tuple[dict[str, Any], str]] = {}
        self.stopped = ""
        self.error: EmonbError | None = None
        self.unanswered = self.interrupts = 0
        self.answered = bool(work.log.forms)
        self.never = threading.Event()  # never set: stops no second question of an image that is half paid

    def run(self) -> str:
        """Ask until nothing is missing; returns why it ended early, or ""."""
        work = self.work
        what = f"{public_name(work.settings.model)} on {work.dataset}"
        for _ in progress(self._finished(), what, total=work.todo, unit="image", note=work.note):
            pass
        if self.error:
            raise self.error
        return self.stopped

    def _finished(self) -> Iterator[str]:
        """Ids of images as they are done with."""
        pool = ThreadPoolExecutor(self.work.settings.concurrency, thread_name_prefix="ask")
        try:
            with self._interrupts_noted():
                while True:
                    self._submit(pool)
                    if not self.flight:
                        return
                    done, _ = wait(self.flight, timeout=0.5, return_when=FIRST_COMPLETED)
                    if self.interrupts and not self.stop.is_set():
                        self._end(INTERRUPTED)
                        self.say(
                            f"\ninterrupted: waiting for {len(self.flight)} requests in flight, which are paid for "
                            "(interrupt again to drop them)"
                        )
                    for future in done:
                        row, form = self.flight.pop(future)
                        if self._settle(future.result(), row, form):
                            yield row["image_id"]
        finally:
            self.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self.server.sdk.close()

    @contextmanager
    def _interrupts_noted(self) -> Iterator[None]:
        """A first Ctrl-C is noted between two answers, so that it interrupts no writing; a second counts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def noted(number: int, frame: Any) -> None:
            self.interrupts += 1
            if self.interrupts > 1:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, noted)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _submit(self, pool: ThreadPoolExecutor) -> None:
        while len(self.flight) < self.work.settings.concurrency and not self.stop.is_set() and not self.stopped:
            row = self.again.popleft() if self.again else next(self.rows, None)
            if row is None:
                return
            if not self.work.is_missing(row["image_id"]):  # given up in another form meanwhile
                continue
            if not self.work.affordable(Counter(form for _, form in self.flight.values()), self.server.timed_out):
                self.again.appendleft(row)
                if not self.flight:
                    limit = self.work.settings.max_cost
                    self.stopped = f"the next answer could exceed the limit of ${limit:g}; raise --max-cost to go on"
                return
            form = self.work.form
            self.flight[pool.submit(self._ask, row, form)] = (row, form)

    def _ask(self, row: dict[str, Any], form: str) -> tuple[list[Reply], Exception | None]:
        """In a thread of the pool: the replies for one image, and what ended the asking, if anything did."""
        settings, replies = self.work.settings, []
        try:
            picture = encode_picture(row["path"], settings.max_side)
            tokens = image_tokens(*picture.size, self.work.image_rule, settings.detail, settings.max_side)
            for body in self.work.requests(row, picture, form):
                most = request_tokens(body, tokens) + settings.max_output_tokens
                reply = self.server.ask(body, most, self.never if replies else None)
                if reply is None:
                    break
                replies.append(reply)
        except Exception as error:  # sorted out by `_settle`: no answer of another request is lost by it
            return replies, error
        return replies, None

    def _settle(self, came: tuple[list[Reply], Exception | None], row: dict[str, Any], form: str) -> bool:
        """Write down what came of a request; True if the image is done with."""
        replies, error = came
        if error is None and not replies:  # stopped before it was sent
            return False
        if error is None:
            self.unanswered, self.answered = 0, True
            finished = self.work.receive(row, replies, form)
            if not finished:
                self.again.append(row)
            return finished
        if isinstance(error, FormRefused) and self.work.settings.answer_format == "auto":
            self.work.refused_forms.add(form)
            self.again.append(row)
            return False
        if isinstance(error, FormRefused):
            error = EmonbError(f"{self.server.host} cannot do triplets.answer_format {form!r}: {error}")
        if isinstance(error, EmonbError) and not isinstance(error, UnreadablePicture):
            if replies:
                self.work.give_up(row, str(error), replies, form)
            self._end(error=error)
            return False
        unreadable = isinstance(error, UnreadablePicture)
        detail = "not a readable picture" if unreadable else scrub(str(error) or type(error).__name__)
        self.work.give_up(row, detail, replies, form)
        if not unreadable:
            self._count_unanswered(error, detail)
        return True

    def _count_unanswered(self, error: Exception, detail: str) -> None:
        """End the run when it is the server that fails, and not single images."""
        self.unanswered += 1
        # Refused for good: perhaps these images alone, unless the server has never answered anything.
        most = _REFUSED_IN_A_ROW if getattr(error, "for_good", False) else _IN_A_ROW
        if self.unanswered >= most and not (self.answered and most == _REFUSED_IN_A_ROW):
            said = f"{self.server.host}: {self.unanswered} images in a row got no answer, the last: {detail}"
            self._end(error=EmonbError(f"{said}; what was answered is saved: start again when this is mended"))

    def _end(self, stopped: str = "", error: EmonbError | None = None) -> None:
        """Send nothing more; what is in flight is waited for."""
        self.stop.set()
        self.stopped = self.stopped or stopped or str(error)
        self.error = self.error or error
