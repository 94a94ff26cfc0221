"""Room 02: ask a paid model for the triplets of one dataset: many requests at a time, within limits, resumable.

The authors' script asks for one image after another and writes all answers at the very end. Here each answer is on
disk before it counts, and whatever ends the run (a limit on the cost, no credit, Ctrl-C, kill -9, a power cut), the
next one asks only for what is missing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import pandas as pd

from emonb.annotation import Annotation, Summary
from emonb.annotator import Reply, encode_picture
from emonb.errors import EmonbError
from emonb.prices import estimate_table, image_tokens, request_tokens, sample_sizes
from emonb.progress import progress
from emonb.samples import count_samples, iter_samples, sample_labels
from emonb.settings import Settings
from emonb.store import Artifact
from emonb.transport import FormRefused, RefusedRequest, Server, public_name

__all__ = ["annotate", "estimate"]

_IN_A_ROW = 10  # images without an answer, one after another: the server is down, not the images at fault


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
        stopped = ""
        try:
            if batch:
                from emonb.batch import run_batches

                stopped = run_batches(work, patient=patient, say=say)
            elif work.todo:
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
        self.flight: dict[Future[list[Reply]], tuple[dict[str, Any], str]] = {}
        self.stopped = ""
        self.error: EmonbError | None = None
        self.unanswered = 0

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
            while True:
                try:
                    self._submit(pool)
                    if not self.flight:
                        return
                    done, _ = wait(self.flight, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt:
                    if self.stop.is_set():
                        raise
                    self._end("interrupted")
                    self.say(
                        f"\ninterrupted: waiting for {len(self.flight)} requests in flight, which are paid for "
                        "(interrupt again to drop them)"
                    )
                    continue
                for future in done:
                    row, form = self.flight.pop(future)
                    if self._settle(future, row, form):
                        yield row["image_id"]
        finally:
            self.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self.server.sdk.close()

    def _submit(self, pool: ThreadPoolExecutor) -> None:
        while len(self.flight) < self.work.settings.concurrency and not self.stop.is_set() and not self.stopped:
            if not self.work.affordable(len(self.flight)):
                if not self.flight:
                    limit = self.work.settings.max_cost
                    self.stopped = f"the next answer could exceed the limit of ${limit:g}; raise --max-cost to go on"
                return
            row = self.again.popleft() if self.again else next(self.rows, None)
            if row is None:
                return
            form = self.work.form
            self.flight[pool.submit(self._ask, row, form)] = (row, form)

    def _ask(self, row: dict[str, Any], form: str) -> list[Reply]:
        """In a thread of the pool: the replies for one image; [] if the run was stopped before."""
        settings = self.work.settings
        picture = encode_picture(row["path"], settings.max_side)
        rule = self.work.image_rule
        tokens = image_tokens(*picture.size, rule, settings.detail, settings.max_side)
        replies = []
        for body in self.work.requests(row, picture, form):
            reply = self.server.ask(body, request_tokens(body, tokens) + settings.max_output_tokens)
            if reply is None:
                return []
            replies.append(reply)
        return replies

    def _settle(self, future: Future[list[Reply]], row: dict[str, Any], form: str) -> bool:
        """Write down what came of a request; True if the image is done with."""
        try:
            replies = future.result()
        except FormRefused as error:
            if self.work.settings.answer_format != "auto":
                self._end(error=EmonbError(f"{self.server.host} cannot do triplets.answer_format {form!r}: {error}"))
                return False
            self.work.refused_forms.add(form)
            self.again.append(row)
            return False
        except RefusedRequest as error:
            self.work.give_up(row, str(error))
            self.unanswered += 1
            if self.unanswered >= _IN_A_ROW:
                self._end(
                    error=EmonbError(
                        f"{self.server.host}: {self.unanswered} images in a row got no answer, the last: {error}; "
                        "what was answered is saved: start again when this is mended"
                    )
                )
            return True
        except EmonbError as error:
            if "not a readable picture" in str(error):
                self.work.give_up(row, "not a readable picture")
                return True
            self._end(error=error)
            return False
        if not replies:
            return False
        self.unanswered = 0
        finished = self.work.receive(row, replies, form)
        if not finished:
            self.again.append(row)
        return finished

    def _end(self, stopped: str = "", error: EmonbError | None = None) -> None:
        """Send nothing more; what is in flight is waited for."""
        self.stop.set()
        self.stopped = self.stopped or stopped or str(error)
        self.error = self.error or error
