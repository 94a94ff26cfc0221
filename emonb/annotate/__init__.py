"""Triplets from a paid model: GPT-4 in the paper, here any vision model behind an OpenAI-compatible server.

Whoever reads for the method, or runs without a key, may ignore this folder: `emonb.triplets` writes triplets offline.
It exists because tens of thousands of paid answers want care: each is on disk before it counts, a limit on the cost
is never exceeded, and whatever ends a run (a limit, no credit, Ctrl-C, kill -9, a power cut), the next one asks only
for what is missing. `request`: what is asked and how an answer is read; `log`: the files; `online` and `batch`: two
ways to ask; `prices`: what it costs; `others`: other people's triplets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from emonb.errors import EmonbError
from emonb.files import atomic_write
from emonb.settings import TripletSettings
from emonb.triplets import has_paid_answers


def write_triplets(
    samples: pd.DataFrame,
    labels: Sequence[str],
    path: Path,
    settings: TripletSettings,
    *,
    batch: bool = False,
    patient: bool = True,
    say: Callable[[str], None] = print,
) -> str:
    """Ask for the triplets that are missing and append them to the file.

    Args:
        samples: the sample table (image_id, path, label, split, sha256); its training images are asked for.
        labels: the taxonomy's labels in order.
        path: `OUT/triplets/<dataset>.jsonl`.
        settings: whom to ask and on what terms.
        batch: use the Batch API (half the price, within a day).
        patient: wait for batches; else submit, fetch what is ready, and return.
        say: gets the messages for people.

    Returns:
        Why it ended before everything was asked, or "".

    Raises:
        EmonbError: nothing can be asked (no key, unknown model, no credit left, server down, damaged files).
            Answers that arrived before are on disk.
    """
    from emonb.annotate.batch import Batches, open_parts, refuse_open_parts
    from emonb.annotate.log import Answers
    from emonb.annotate.online import Online

    stopped = ""
    with Answers(samples, labels, path, settings, batch=batch) as answers:
        under_way = open_parts(path)
        answers.check_fit({(part["asked_of"], part["prompt_sha256"]) for part in under_way})
        try:
            if batch and (under_way or any(answers.missing())):
                stopped = Batches(answers, say).run(patient)
            elif any(answers.missing()):
                refuse_open_parts(path)
                stopped = Online(answers, say).run()
        finally:
            say(str(answers))
    if stopped:
        say(f"stopped: {stopped}")
    return stopped


def refuse_offline(path: Path) -> None:
    """Raise `EmonbError` where the offline annotator would replace a file that was paid for, or is being asked for."""
    from emonb.annotate.batch import refuse_open_parts
    from emonb.annotate.log import lock_triplets

    with lock_triplets(path):
        refuse_open_parts(path)
        if has_paid_answers(path):
            raise EmonbError(
                f"{path.name}: holds answers that were paid for; set triplets.annotator to auto to use them "
                "(or leave out --annotator), or choose another results folder with OUT (--out)"
            )


def show_offline(made: Path, path: Path) -> None:
    """Put the offline annotator's triplets where people look for them, unless there are answers that were paid for."""
    from emonb.annotate.log import lock_triplets

    with lock_triplets(path):
        if not has_paid_answers(path):
            atomic_write(path, made.read_bytes())
