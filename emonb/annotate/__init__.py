"""A paid model (GPT-4 in the paper), or any that an OpenAI-compatible server has: it writes triplets, or is a rival.

Whoever reads for the method, or runs without a key, may ignore this folder: `emonb.triplets` writes triplets offline.
It exists because tens of thousands of paid answers want care: each is on disk before it counts, a limit on the cost
is never exceeded, and whatever ends a run (a limit, no credit, Ctrl-C, kill -9, a power cut), the next one asks only
for what is missing. That holds as well where a served model is asked what our VLM is asked (`ask_emotions`).
`request`: what is asked, how it is read, what it costs; `log`: the files; `ask`: one by one, or by the Batch API;
`others`: other people's triplets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from emonb.annotate.log import (
    REMEDY,
    Answers,
    Emotions,
    Log,
    emotion_records,
    lock_answers,
    open_batches,
    refuse_open_batches,
)
from emonb.annotate.request import given
from emonb.errors import EmonbError
from emonb.files import atomic_write
from emonb.predictions import one_word_predictions
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
    """Ask for the triplets that are missing and append them to the file; returns why it ended early, or "".

    Args:
        samples: the sample table (image_id, path, label, split, sha256); its training images are asked for.
        labels, path: the taxonomy's labels in order; `OUT/triplets/<dataset>.jsonl`.
        batch, patient: by the Batch API (half the price, within a day); wait for it, or fetch what is ready.
        say: gets the messages for people.

    Raises:
        EmonbError: nothing can be asked (no key, unknown model, no credit left, server down, damaged files).
            Answers that arrived before are on disk.
    """
    with Answers.opened(samples, labels, path, settings, batch) as answers:
        return _ask(answers, say, batch, patient)


def _ask(answers: Log, say: Callable[[str], None], batch: bool = False, patient: bool = True) -> str:
    stopped = ""
    answers.check_fit()
    try:
        if answers.missing() or open_batches(answers.path):
            from emonb.annotate.ask import Batches, Online  # with the SDK, which takes a second

            stopped = Batches(answers, say).run(patient) if batch else Online(answers, say).run()
            if not (stopped or answers.done or open_batches(answers.path)):
                stopped = f"not one answer could be used, see {answers.path.parent.name}/; {REMEDY}"
    finally:
        say(f"{answers}\nstopped: {stopped}" if stopped else str(answers))
    return stopped


def ask_emotions(
    samples: pd.DataFrame,
    labels: Sequence[str],
    path: Path,
    settings: TripletSettings,
    *,
    images: int = 0,
    say: Callable[[str], None] = print,
) -> tuple[pd.DataFrame, str]:
    """Ask a served model about test images what our VLM is asked; its predictions, and why it ended early, or "".

    Args:
        samples: the test images (image_id, path, label, sha256).
        path: `OUT/asked/<dataset>__<model>.jsonl`, the answers; those in it are not asked for again.
        images: about how many to ask, 0: all (`log.Emotions.rows`); answers that were there before count as well.

    Raises:
        EmonbError: as in `write_triplets`.
    """
    with Emotions.opened(samples, labels, path, settings, images) as answers:
        stopped, said = _ask(answers, say), answers.done
    seen = samples[samples["image_id"].isin([*said])]
    named, texts = ([said[image_id][field] for image_id in seen["image_id"]] for field in ("emotion", "text"))
    about = (seen["image_id"], ["test"] * len(seen), seen["label"])
    return one_word_predictions(*about, named, labels, raw_text=texts), stopped


def price_of_asking(path: Path) -> dict[str, float]:
    """What all answers in a file of `ask_emotions` cost: `usd` (NaN: a price is unknown); mean `seconds` of one."""
    records = [*emotion_records(path)]
    seconds = [record["seconds"] for record in records if "seconds" in record]
    usd = sum(np.nan if record["usd"] is None else record["usd"] for record in records)
    return {"usd": usd, "seconds": float(np.mean(seconds)) if seconds else np.nan}


def check_server(settings: TripletSettings) -> None:
    """Raise `EmonbError` at once for an address, a key or a proxy that cannot work; without a key all may be there."""
    from emonb.annotate.ask import connect

    if any(map(given, ("OPENAI_API_KEY", "OPENAI_BASE_URL"))):
        connect(settings).close()


def refuse_offline(path: Path) -> None:
    """Raise `EmonbError` where the offline annotator would replace a file that was paid for, or is being asked for."""
    with lock_answers(path):
        refuse_open_batches(path)
        if has_paid_answers(path):
            raise EmonbError(
                f"{path.name}: holds answers that were paid for; set triplets.annotator to auto to use them "
                "(or leave out --annotator), or choose another results folder with OUT (--out)"
            )


def show_offline(made: Path, path: Path) -> None:
    """Put the offline annotator's triplets where people look for them, unless there are answers that were paid for."""
    with lock_answers(path):
        if not has_paid_answers(path):
            atomic_write(path, made.read_bytes())
