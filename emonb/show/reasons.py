"""Are the VLM's reasons those of its answer? Judged by the lexicon and by pictures drawn again; not in the paper.

Reason and answer come from separate questions: nothing makes them agree. Of photographs nothing is judged, for which
emotions their things go with is known of the drawn world alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from emonb.metrics import mean_interval
from emonb.triplets import suggested

if TYPE_CHECKING:
    from emonb.vlm import VLM

Redraw = Callable[..., pd.DataFrame]  # folder, pictures of each split, {image_id: objects to leave out}
AGREES, EXCHANGED = "reason suggests the VLM's own answer, %", "another picture's reason does, %"
NAMED, OTHER = "answer changes without objects that the reason names, %", "without as many that it does not name, %"


def judge_reasons(
    vlm: VLM,
    dataset: str,
    said: pd.DataFrame,
    samples: pd.DataFrame,
    labels: Sequence[str],
    redraw: Redraw | None,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """The four measures with intervals over texts: dataset, measure, value, ci_low, ci_high, n; NaN for photographs.

    `said`: the tuned VLM's predictions that have a `raw_text`, image_id unique; `samples`: the sample table; `redraw`:
    `world.draw_dataset` of a drawn dataset, None for photographs.
    """
    found = {AGREES: pd.Series(np.nan, said.index)}
    if redraw:
        found = {**agreement(said, labels), **left_out(vlm, said, samples, labels, redraw)}
    rows = [(dataset, name, *mean_interval(100 * x, resamples, confidence), len(x)) for name, x in found.items()]
    return pd.DataFrame(rows, columns=["dataset", "measure", "value", "ci_low", "ci_high", "n"])


def agreement(said: pd.DataFrame, labels: Sequence[str]) -> dict[str, pd.Series]:
    """Per text 0..1: whether its words suggest the VLM's answer (`triplets.suggested`), and how many others' would."""
    each = [suggested(text, labels) for text in said["raw_text"]]
    hits = np.array([[answer in words for words in each] for answer in said["prediction"]], float)
    hits = hits.reshape(len(each), len(each))  # [answers, texts]
    others = (hits.sum(axis=1) - hits.diagonal()) / max(1, len(each) - 1)
    return {AGREES: pd.Series(hits.diagonal()), EXCHANGED: pd.Series(others)}


def left_out(
    vlm: VLM, said: pd.DataFrame, samples: pd.DataFrame, labels: Sequence[str], redraw: Redraw
) -> dict[str, pd.Series]:
    """Per picture 0 or 1: is the answer another one when it is drawn without objects, those named or as many others?

    Pictures of which the reason names no object, or every one, do not count.
    """
    from emonb.vlm import answer_distribution, visual_tokens

    objects, gone = samples.set_index("image_id")["objects"], {NAMED: {}, OTHER: {}}
    for image_id, text in zip(said["image_id"], said["raw_text"], strict=True):
        named = [name for name in objects[image_id] if re.search(rf"\b{name}\b", text)]
        other = [name for name in objects[image_id] if name not in named]
        if few := min(len(named), len(other)):
            gone[NAMED][image_id], gone[OTHER][image_id] = named[:few], other[:few]
    sizes, before = samples["split"].value_counts(), said.set_index("image_id")["prediction"]
    changed = {name: pd.Series(dtype=float) for name in gone}
    for name, without in ((name, without) for name, without in gone.items() if without):
        with TemporaryDirectory() as folder:
            again = redraw(Path(folder), sizes, without=without).set_index("image_id")["path"]
            scores = answer_distribution(vlm, visual_tokens(vlm, [Path(folder) / path for path in again]), labels)
        answers = pd.Series([labels[k] for k in scores.argmax(1).tolist()], again.index)
        changed[name] = (answers != before[again.index]).astype(float)
    return changed


def reasons_note(out: Path, dataset: str) -> str:
    """What stands beside reasons that are shown, from a results folder's `tables/reasons.csv`; "": no table."""
    with suppress(OSError, ValueError, KeyError):  # the report names a damaged table
        rows = pd.read_csv(out / "tables" / "reasons.csv").set_index(["dataset", "measure"]).loc[dataset]
        n, agrees = rows.at[AGREES, "n"], rows.at[AGREES, "value"]
        if n and pd.isna(agrees):
            return "Whether a reason fits the VLM's answer is judged for drawn pictures only."
        if n:
            others, drawn = rows.at[EXCHANGED, "value"], rows.at[NAMED, "n"]
            line = f"The VLM's reasons suggest its own answer in {agrees:.0f} % of {n} texts, "
            line += f"reasons of other pictures in {others:.0f} %. "
            if not drawn:
                return line + "What it answers without the objects that they name could not be tried."
            named, other = rows.at[NAMED, "value"], rows.at[OTHER, "value"]
            line += f"Without objects that they name it answers otherwise in {named:.0f} % of {drawn} pictures, "
            return line + f"without as many others in {other:.0f} %."
    return ""
