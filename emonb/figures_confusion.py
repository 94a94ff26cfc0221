"""Confusion matrices: of one model, and the difference of two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from emonb.complementarity import UNPARSABLE
from emonb.figure_style import COLUMN, basis, cell_notes, styled, turned
from emonb.predictions import prediction_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["confusion", "confusion_counts", "confusion_difference", "row_percent"]


def confusion_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows = true, columns = answered, in the taxonomy's order; an answer without a label is a last column."""
    labels, answers = prediction_labels(frame), frame["prediction"].replace("", UNPARSABLE)
    columns = [*labels, *({UNPARSABLE} & set(answers))]
    return pd.crosstab(frame["label"], answers).reindex(index=labels, columns=columns, fill_value=0)


def row_percent(counts: pd.DataFrame) -> pd.DataFrame:
    """Counts as percent of their row; a row without images is all zeros."""
    return 100 * counts.div(counts.sum(axis=1).clip(lower=1), axis=0)


def _axes(columns: int, ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    side = min(COLUMN, 1.3 + 0.42 * columns)  # few emotions need no whole column
    return Figure(figsize=(max(2.4, side), max(2.0, 0.92 * side)), layout="constrained").subplots()


@styled
def confusion(frame: pd.DataFrame, title: str, ax: Axes | None = None) -> Figure:
    """Confusion matrix of a prediction frame: row percent as colour, percent and counts (over all seeds) as text.

    Unparsable answers, where there are any, are a column of their own.
    """
    import seaborn

    counts = confusion_counts(frame)
    percent = row_percent(counts)
    ax = _axes(counts.shape[1], ax)
    seaborn.heatmap(
        percent, ax=ax, cmap="Blues", vmin=0, vmax=100, square=True, linewidths=0.5, xticklabels=False,
        yticklabels=False, cbar_kws={"label": "% of the true emotion", "shrink": 0.7, "aspect": 25, "pad": 0.02},
    )  # fmt: skip
    notes = (percent.round().astype(int).astype(str) + " %\n" + counts.astype(str)).where(counts > 0, "")
    cell_notes(ax, notes.to_numpy(str), percent.to_numpy() > 60)
    turned(ax, list(counts.columns), list(counts.index))
    ax.set(xlabel="predicted", ylabel="true")
    ax.set_title(f"{title}\n{basis(frame['image_id'].nunique(), frame['seed'].nunique())}")
    return ax.figure


@styled
def confusion_difference(a: pd.DataFrame, b: pd.DataFrame, title: str, ax: Axes | None = None) -> Figure:
    """Confusion matrix of a minus that of b, in percentage points of the true emotion, on their common images.

    Green-blue: a answers so more often than b; brown: less often. On the diagonal more is better, elsewhere
    less. A difference that rounds to zero has no number. Several seeds of one model are pooled.
    """
    import seaborn

    shared = set(a["image_id"]) & set(b["image_id"])
    frames = [frame[frame["image_id"].isin(shared)] for frame in (a, b)]
    percents = [row_percent(confusion_counts(frame)) for frame in frames]
    columns = max((p.columns for p in percents), key=len)
    first, second = (p.reindex(columns=columns, fill_value=0.0) for p in percents)
    points = first - second
    limit = max(1.0, float(np.abs(points.to_numpy()).max()))
    ax = _axes(len(columns), ax)
    bar = {"label": "points", "shrink": 0.7, "aspect": 25, "pad": 0.02}
    seaborn.heatmap(
        points, ax=ax, cmap="BrBG", vmin=-limit, vmax=limit, square=True, linewidths=0.5, xticklabels=False,
        yticklabels=False, cbar_kws=bar,
    )  # fmt: skip
    digits = 0 if limit >= 3 else 1
    rounded = points.round(digits)
    notes = rounded.map(f"{{:+.{digits}f}}".format).where(rounded != 0, "")
    cell_notes(ax, notes.to_numpy(str), np.abs(points.to_numpy()) > 0.7 * limit)
    turned(ax, list(columns), list(points.index))
    ax.set(xlabel="predicted", ylabel="true")
    seeds = " and ".join(str(frame["seed"].nunique()) for frame in frames)
    ax.set_title(f"{title}\nn = {len(shared)} images, {seeds} seeds")
    return ax.figure
