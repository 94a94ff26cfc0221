"""All figures: `figures.NAME` takes tidy data, and pictures as arrays or files, and returns a matplotlib Figure.

Every figure says how many images and seeds it rests on, is drawn at the width of one or both columns of a page and
has no text below 6 points there. A model has the same colour and the same mark in every figure. Nothing here touches
pyplot's state.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from emonb.data import thumbnail
from emonb.files import resource_path
from emonb.metrics import calibration_error, reliability
from emonb.predictions import (
    CASES,
    GROUPS,
    MAIN,
    UNPARSABLE,
    intersections,
    model_color,
    model_name,
    prediction_labels,
)

if TYPE_CHECKING:
    from IPython.display import Image as Shown
    from matplotlib.axes import Axes
    from PIL.Image import Image

COLUMN, FULL = 3.3, 7.0  # inches: one column and both of a two-column page (CVPR: 3.25 and 6.875)
NOTE = 6.0  # points: the smallest text anywhere, at these widths
GREY, PALE = "#BBBBBB", "#E4E4E4"
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")  # Okabe and Ito (2008)
MARKERS = dict(zip(MAIN, "vDsP^oX", strict=True))  # the model is told by shape, too


# ---- one look, and figures as files --------------------------------------------------------------------------------


def styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the common style, whatever the user's matplotlib is set to; without data, a sentence that says so."""

    @functools.wraps(function)
    def wrapper(data: Any, *args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(fname=resource_path("emonb.mplstyle")):
            empty = hasattr(data, "__len__") and not len(data)
            fig = _nothing() if empty else function(data, *args, **kwargs)
            fig.draw_without_rendering()  # all texts and places are made here, in this style
            fig.set_layout_engine(None)  # or each drawing would lay out anew, two for each format
        return fig

    return wrapper


def as_files(fig: Figure) -> dict[str, bytes]:
    """A figure as `{"png": ..., "svg": ...}`; equal figures give equal bytes."""
    found = {}
    with matplotlib.rc_context(fname=resource_path("emonb.mplstyle")):
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            fig.savefig(buffer, format=ending, bbox_inches="tight", metadata=metadata)
            found[ending] = buffer.getvalue()
    return found


def as_image(fig: Figure, alt: str, *, dpi: float | None = None, photo: bool = False) -> Shown:
    """A figure as a small output of a notebook: JPEG for photos, else PNG of 128 colours.

    Args:
        alt: what it shows, for people who cannot see it.
        dpi: pixels per inch; default: the figure's own.
    """
    import PIL.Image
    from IPython.display import Image as Shown

    buffer, small = io.BytesIO(), io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi or fig.get_dpi(), bbox_inches="tight")
    picture = PIL.Image.open(buffer).convert("RGB")
    if photo:
        picture.save(small, "JPEG", quality=85)
    else:
        picture.quantize(128, dither=PIL.Image.Dither.NONE).save(small, "PNG", optimize=True)
    return Shown(small.getvalue(), alt=alt)


def _nothing() -> Figure:
    """What a figure is of which this run has nothing: a run with failed models keeps all others."""
    fig = Figure(figsize=(COLUMN, 0.6))
    fig.text(0.5, 0.5, "this run has no predictions for this figure", ha="center", va="center")
    return fig


def _rests_on(n: object, seeds: object) -> str:
    return f"n = {n} images, {seeds} seed{'' if seeds == 1 else 's'}"


def _panels(n: int, height: float, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of both columns' width with n panels, `columns` in a row, each `height` inches high."""
    rows, shown = -(-n // columns) or 1, max(1, min(n, columns))
    fig = Figure(figsize=(max(COLUMN, FULL * shown / columns), height * rows), layout="constrained")
    axes = list(np.ravel(fig.subplots(rows, shown, squeeze=False)))
    for spare in axes[n:]:
        spare.set_axis_off()
    return fig, axes[:n]


def _by_dataset(table: pd.DataFrame, height: float) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A panel for each dataset of a table, with its title, images and seeds; returns its axes and rows."""
    parts = list(table.groupby("dataset", sort=False))
    fig, axes = _panels(len(parts), height)
    for ax, (title, part) in zip(axes, parts, strict=True):
        seeds = part["seeds"].max() if "seeds" in part else 1
        ax.set_title(f"{title}\n{_rests_on(part['n'].max(), seeds)}")
    return fig, [(ax, part) for ax, (_, part) in zip(axes, parts, strict=True)]


def _heatmap(
    ax: Axes, values: pd.DataFrame, notes: pd.DataFrame | None, cmap: str, low: float, high: float, bar: str = ""
) -> None:
    """Cells as colours between two values, with notes in them; `bar`: label of a colour bar."""
    mesh = ax.pcolormesh(values, cmap=cmap, vmin=low, vmax=high, edgecolors="white", linewidth=0.5)
    ax.set(ylim=(len(values), 0), aspect="equal")
    ax.set_xticks(np.arange(values.shape[1]) + 0.5, values.columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(np.arange(len(values)) + 0.5, values.index)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if notes is not None:
        bright = mesh.cmap(mesh.norm(values))[..., :3] @ (0.2126, 0.7152, 0.0722)
        style = {"ha": "center", "va": "center", "fontsize": NOTE, "linespacing": 1.0, "in_layout": False}
        for (row, column), note in np.ndenumerate(notes):
            ink = "white" if bright[row, column] < 0.5 else "black"
            ax.text(column + 0.5, row + 0.5, note, color=ink, **style)
    if bar:
        ax.figure.colorbar(mesh, ax=ax, label=bar, shrink=0.7, aspect=25, pad=0.02).outline.set_visible(False)


# ---- confusion -----------------------------------------------------------------------------------------------------


def confusion_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows = true, columns = answered, in the taxonomy's order; an answer without a label is a last column."""
    labels, answers = prediction_labels(frame), frame["prediction"].replace("", UNPARSABLE)
    columns = [*labels, *({UNPARSABLE} & set(answers))]
    return pd.crosstab(frame["label"], answers).reindex(index=labels, columns=columns, fill_value=0)


def row_percent(counts: pd.DataFrame) -> pd.DataFrame:
    """Counts as percent of their row; a row without images is all zeros."""
    return 100 * counts.div(counts.sum(axis=1).clip(lower=1), axis=0)


def _matrix(values: pd.DataFrame, notes: pd.DataFrame, cmap: str, low: float, high: float, bar: str) -> Axes:
    """A figure of one confusion matrix."""
    side = min(COLUMN, 1.3 + 0.42 * values.shape[1])  # few emotions need no whole column
    ax = Figure(figsize=(max(2.4, side), max(2.0, 0.92 * side)), layout="constrained").subplots()
    _heatmap(ax, values, notes, cmap, low, high, bar)
    ax.set(xlabel="predicted", ylabel="true")
    return ax


@styled
def confusion(frame: pd.DataFrame, title: str) -> Figure:
    """Confusion matrix of a prediction frame: row percent as colour, percent and counts (over all seeds) as text.

    Unparsable answers, where there are any, are a column of their own.
    """
    counts = confusion_counts(frame)
    percent = row_percent(counts)
    notes = (percent.round().astype(int).astype(str) + " %\n" + counts.astype(str)).where(counts > 0, "")
    ax = _matrix(percent, notes, "Blues", 0, 100, "% of the true emotion")
    ax.set_title(f"{title}\n{_rests_on(frame['image_id'].nunique(), frame['seed'].nunique())}")
    return ax.figure


@styled
def confusion_difference(a: pd.DataFrame, b: pd.DataFrame, title: str) -> Figure:
    """Confusion matrix of a minus that of b, in percentage points of the true emotion, on their common images.

    Green-blue: a answers so more often than b; brown: less often. On the diagonal more is better, elsewhere
    less. A difference that rounds to zero has no number. Several seeds of one model are pooled.
    """
    shared = set(a["image_id"]) & set(b["image_id"])
    frames = [frame[frame["image_id"].isin(shared)] for frame in (a, b)]
    percents = [row_percent(confusion_counts(frame)) for frame in frames]
    columns = max((p.columns for p in percents), key=len)
    first, second = (p.reindex(columns=columns, fill_value=0.0) for p in percents)
    points = first - second
    limit = max(1.0, float(points.abs().to_numpy().max()))
    digits = 0 if limit >= 3 else 1
    rounded = points.round(digits)
    notes = rounded.map(f"{{:+.{digits}f}}".format).where(rounded != 0, "")
    ax = _matrix(points, notes, "BrBG", -limit, limit, "points")
    seeds = " and ".join(str(frame["seed"].nunique()) for frame in frames)
    ax.set_title(f"{title}\nn = {len(shared)} images, {seeds} seeds")
    return ax.figure


@styled
def confusion_overview(rows: Mapping[str, Mapping[str, pd.DataFrame]]) -> Figure:
    """Many matrices at a glance, counts in the cells: a row for each dataset (its title), a column for each model."""
    sizes = [max(4, len(prediction_labels(next(iter(frames.values()))))) for frames in rows.values()]
    heights, columns = [0.26 * size + 0.9 for size in sizes], max(map(len, rows.values()))
    fig = Figure(figsize=(columns * (0.26 * max(sizes) + 0.2) + 1.2, sum(heights)), layout="constrained")
    grid = fig.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for line, (title, frames) in zip(grid, rows.items(), strict=True):
        for ax in line[len(frames) :]:
            ax.set_axis_off()
        for ax, (model, frame) in zip(line, frames.items(), strict=False):
            counts = confusion_counts(frame)
            _heatmap(ax, row_percent(counts), counts.astype(str).where(counts > 0, ""), "Blues", 0, 100)
            ax.set_title(model_name(model))
            ax.tick_params(labelleft=ax is line[0])
        line[0].set_ylabel(f"{title}\n{_rests_on(len(frame), 1)}\ntrue")
    return fig


# ---- who is right where --------------------------------------------------------------------------------------------


@styled
def complementarity_venn(table: pd.DataFrame) -> Figure:
    """Images that the tuned VLM and the ViT get right, one pair of circles per dataset; areas are counts.

    Args:
        table: rows `emotion == "all"` of the complementarity table.
    """
    from matplotlib_venn import venn2_circles

    fig, panels = _by_dataset(table, 2.0)
    for ax, part in panels:
        counts = part[[group.replace(" ", "_") for group in GROUPS]].to_numpy().ravel()
        both, vlm, vit, neither = (f"{n}\n{100 * n / part['n'].item():.1f} %" for n in counts)
        left, right, middle, reach = -1.0, 1.0, 0.0, 1.0
        if counts[:3].any():
            circles = venn2_circles((counts[1], counts[2], counts[0]), alpha=0.6, linewidth=0.6, ax=ax)
            for circle, model in zip(circles, ("vlm_tuned", "vit"), strict=True):
                circle.set_facecolor(model_color(model))
            (x1, r1), (x2, r2) = ((circle.center[0], circle.radius) for circle in circles)
            left, right, middle, reach = x1 - r1, x2 + r2, (x1 + r1 + x2 - r2) / 2, max(r1, r2)
        ax.text(left, 1.05 * reach, f"only VLM\n{vlm}", ha="left", va="bottom")
        ax.text(right, 1.05 * reach, f"only ViT\n{vit}", ha="right", va="bottom")
        ax.text(middle, 0, f"both\n{both}", ha="center", va="center")
        outside = "neither: {} ({})".format(*neither.split("\n"))
        ax.text((left + right) / 2, -1.08 * reach, outside, ha="center", va="top")
        ax.set(xlim=(left - 0.1 * reach, right + 0.1 * reach), ylim=(-1.4 * reach, 1.9 * reach), aspect="equal")
        ax.set_axis_off()
    return fig


def _emotion_bars(ax: Axes, part: pd.DataFrame, columns: Mapping[str, str], colors: Sequence[str]) -> None:
    """A level bar for each row of a table, its first on top, of columns that make 100 percent: {name: column}."""
    names = [f"{emotion} ({n})" for emotion, n in zip(part["emotion"], part["n"], strict=True)]
    shares = pd.DataFrame({name: part[column].to_numpy(float) for name, column in columns.items()}, names)
    shares = 100 * shares.div(shares.sum(axis=1), axis=0)
    shares.plot.barh(stacked=True, ax=ax, color=colors, width=0.8, legend=False, ylabel="")
    ax.set(xlim=(0, 100), ylim=(len(part) - 0.4, -0.6))


@styled
def complementarity_by_emotion(table: pd.DataFrame) -> Figure:
    """Share of images per true emotion that both, only one or none of tuned VLM and ViT get right.

    Args:
        table: rows of single emotions of the complementarity table; one panel per dataset.
    """
    parts = list(table.groupby("dataset", sort=False))
    heights = [len(part) + 1.6 for _, part in parts]
    fig = Figure(figsize=(COLUMN, 0.17 * sum(heights) + 0.7), layout="constrained")
    axes = np.ravel(fig.subplots(len(parts), 1, sharex=True, squeeze=False, height_ratios=heights))
    colors = ("#888888", model_color("vlm_tuned"), model_color("vit"), PALE)
    for ax, (title, part) in zip(axes, parts, strict=True):
        _emotion_bars(ax, part, {group: group.replace(" ", "_") for group in GROUPS}, colors)
        for bars in ax.containers:  # narrow bars have no room for a number
            ax.bar_label(bars, fmt=lambda x: f"{x:.0f}" if x >= 7 else "", label_type="center", fontsize=NOTE)
        ax.set_title(f"{title}, {_rests_on(part['n'].sum(), 1)}", loc="left")
    axes[-1].set_xlabel("% of an emotion's test images (in brackets: n)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


@styled
def complementarity_upset(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Which of tuned VLM, ViT, head and EmoVLM-KD are right together: a bar for each combination and dataset.

    Below each bar the dots say which models are right; blue where EmoVLM-KD is among them. Combinations that
    occur nowhere are left out; the order is that of the summed shares. As in UpSet (Lex et al. 2014).

    Args:
        tables: {dataset's title: output of `predictions.joint`}.
    """
    counts = intersections(tables)
    if counts.empty:
        return _nothing()
    models = list(counts.index.names)
    height = 0.85 * len(tables) + 0.22 * len(models) + 0.6
    fig = Figure(figsize=(FULL if len(counts) > 8 else COLUMN, height), layout="constrained")
    ratios = [*[0.85] * len(tables), 0.22 * len(models) + 0.1]
    *axes, dots = fig.subplots(len(tables) + 1, 1, sharex=True, height_ratios=ratios)
    right = np.array([list(combination) for combination in counts.index], bool)
    ours = counts.index.get_level_values("emovlmkd") if "emovlmkd" in models else np.zeros(len(right), bool)
    for ax, (title, column) in zip(axes, counts.items(), strict=True):
        share = 100 * column.to_numpy() / max(1, column.sum())
        bars = ax.bar(range(len(share)), share, color=np.where(ours, model_color("emovlmkd"), GREY), width=0.75)
        ax.bar_label(bars, column, fontsize=NOTE)
        ax.set(ylim=(0, 1.25 * max(1.0, share.max())), ylabel="%")
        ax.set_title(f"{title}: {_rests_on(column.sum(), 1)}", loc="right", y=0.8)
        ax.tick_params(axis="x", length=0, labelbottom=False)
    x, y = np.meshgrid(np.arange(len(counts)), np.arange(len(models)), indexing="ij")
    inks = np.array([model_color(m) for m in models])[y]
    dots.scatter(x[~right], y[~right], s=16, facecolor="white", edgecolor=GREY, linewidth=0.6)
    for column, rows in enumerate(map(np.flatnonzero, right)):
        dots.plot([column] * len(rows), rows, color="#444444", linewidth=0.8, zorder=1)
    dots.scatter(x[right], y[right], s=22, c=inks[right], edgecolor="black", linewidth=0.4, zorder=2)
    dots.set_yticks(range(len(models)), map(model_name, models))
    dots.set(ylim=(len(models) - 0.5, -0.5), xlim=(-0.6, len(counts) - 0.4))
    dots.spines[:].set_visible(False)
    dots.tick_params(length=0, labelbottom=False)
    note = "filled dot: the model is right; numbers: images"
    dots.set_xlabel(note + ("; blue bars: EmoVLM-KD is right" if ours.any() else ""))
    return fig


@styled
def agreement(matrices: Mapping[str, pd.DataFrame], n: Mapping[str, int]) -> Figure:
    """Cohen's kappa between the answers of all models, one lower triangle per dataset.

    Args:
        matrices: {dataset's title: kappa matrix}; a single model agrees with nobody and gets no panel.
        n: {dataset's title: images}.
    """
    shown = {title: matrix.rename(index=model_name, columns=model_name) for title, matrix in matrices.items()}
    shown = {title: matrix for title, matrix in shown.items() if len(matrix) > 1}
    if not shown:
        return _nothing()
    fig, axes = _panels(len(shown), 2.25)
    for ax, (title, matrix) in zip(axes, shown.items(), strict=True):
        lower = matrix.where(np.tri(len(matrix), k=-1, dtype=bool)).iloc[1:, :-1]
        notes = lower.map(lambda x: f"{x:.2f}".replace("-0.00", "0.00").replace("0.", ".")).where(lower.notna(), "")
        _heatmap(ax, lower, notes, "cividis", 0, 1)
        ax.set_title(f"{title}\n{_rests_on(n[title], 1)}")
    fig.suptitle("agreement between models (Cohen's kappa; 1 = same answers)")
    return fig


@styled
def qualitative_examples(examples: pd.DataFrame, pictures: Sequence[np.ndarray], title: str, n: int) -> Figure:
    """Pictures with what tuned VLM, ViT and EmoVLM-KD say, one row per case (`predictions.CASES`).

    Args:
        examples: output of `predictions.select_examples`; pictures: an (H, W, 3) array for each.
        title: dataset's title; n: test images they were chosen from.
    """
    rows = {case: np.flatnonzero(examples["case"] == case) for case in CASES}
    columns = max(4, *map(len, rows.values()))
    heights = [FULL / columns + 0.5 if len(chosen) else 0.25 for chosen in rows.values()]
    fig = Figure(figsize=(FULL, sum(heights) + 0.3), layout="constrained")
    grid = fig.subplots(len(CASES), columns, squeeze=False, height_ratios=heights)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[], facecolor="none")  # a text may run on over empty places
        ax.spines[:].set_visible(False)
    for line, (case, chosen) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(CASES[case] if len(chosen) else "", fontweight="bold")
        if not len(chosen):
            nothing = f"{CASES[case]}: no such image".replace("\n", " ")
            line[0].text(0, 0.5, nothing, fontweight="bold", va="center", transform=line[0].transAxes, in_layout=False)
        for ax, i in zip(line, chosen, strict=False):
            said = examples.iloc[i]
            ax.imshow(pictures[i])
            ax.set_title(f"true: {said['label']}", fontweight="bold")
            trio = {m: said[m] for m in ("vlm_tuned", "vit", "emovlmkd") if m in said}
            marks = [
                f"{'✓' if a == said['label'] else '✗'} {model_name(m)}: {a or UNPARSABLE}" for m, a in trio.items()
            ]
            ax.set_xlabel("\n".join(marks), fontsize=NOTE + 0.5, loc="left", linespacing=1.1)
    fig.suptitle(f"{title}: chosen by rule from {_rests_on(n, 1)}")
    return fig


# ---- what the gate learned -----------------------------------------------------------------------------------------


def lift(half: np.ndarray) -> np.ndarray:
    """How much an opinion for an emotion lifts that emotion above the others: (C,) from a half of W (C, C).

    Column j of W is what an opinion for emotion j adds to every emotion's logit. A softmax ignores what it adds to
    all alike, so the lift is W[j, j] minus the mean of the column's other entries (our choice of summary).
    """
    others = (half.sum(axis=0) - half.diagonal()) / max(1, len(half) - 1)
    return half.diagonal() - others


@styled
def gate_weights(weights: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> Figure:
    """The concat & linear gate: W's halves for VLM and head, and the lift per emotion; a row per dataset.

    The VLM's half meets a one-hot answer, the head's half probabilities, which are below 1: compare the
    halves' patterns rather than their sizes.

    Args:
        weights: {dataset's title: (labels, W of shape (C, 2C))}.
    """
    heights = [0.85 + 0.13 * len(labels) for labels, _ in weights.values()]
    fig = Figure(figsize=(FULL, sum(heights) + 0.5), layout="constrained")
    grid = fig.subplots(len(weights), 3, squeeze=False, height_ratios=heights, width_ratios=[1, 1, 0.9])
    for line, (title, (labels, matrix)) in zip(grid, weights.items(), strict=True):
        limit, trust = float(np.abs(matrix).max()), {}
        for ax, half, who in zip(line, np.split(matrix, 2, axis=1), ("VLM", "head"), strict=False):
            _heatmap(ax, pd.DataFrame(half, labels, labels), None, "BrBG", -limit, limit)
            ax.set(xlabel=f"the {who} says", aspect="auto")
            trust["VLM's answer" if who == "VLM" else "head's probability"] = lift(half)
        fig.colorbar(line[1].collections[0], ax=line[1], aspect=12, pad=0.02).outline.set_visible(False)
        line[0].set_ylabel("speaks for")
        line[0].set_title(title, loc="left", fontweight="bold")
        line[1].tick_params(labelleft=False)
        colors = (model_color("vlm_tuned"), model_color("head"))
        pd.DataFrame(trust, labels).plot.barh(ax=line[2], color=colors, width=0.64, legend=False)
        line[2].invert_yaxis()
        line[2].axvline(0, color="black", linewidth=0.6)
    grid[0, 2].set_title("trust: lift over the other emotions")
    fig.legend(*grid[0, 2].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return fig


@styled
def gate_trust(table: pd.DataFrame) -> Figure:
    """Where VLM and head disagree: how often the gate followed whom, against how often each was right.

    From the left the share in which EmoVLM-KD gave the VLM's answer, from the right the head's, between them
    neither. The marks are where a gate would end that followed exactly whoever is right.

    Args:
        table: output of `tables.gate_trust`; one panel per dataset.
    """
    fig, panels = _by_dataset(table, 0.75 + 0.17 * table.groupby("dataset").size().max())
    colors = (model_color("vlm_tuned"), PALE, model_color("head"))
    style = {"facecolor": "white", "edgecolor": "black", "linewidth": 0.7, "s": 16, "zorder": 3, "clip_on": False}
    for ax, part in panels:
        whom = {"followed the VLM": "vlm", "neither": "neither", "followed the head": "head"}
        _emotion_bars(ax, part, {name: f"followed_{who}" for name, who in whom.items()}, colors)
        y, vlm, head = range(len(part)), part["vlm_right"], 100 - part["head_right"]
        ax.scatter(vlm, y, marker=MARKERS["vlm_tuned"], label="VLM right (from the left)", **style)
        ax.scatter(head, y, marker=MARKERS["head"], label="head right (from the right)", **style)
        ax.axhline(0.5, color="white", linewidth=1.5)  # "all" stands apart
    fig.supxlabel("% of the test images on which VLM and head disagree (in brackets: how many)", fontsize=7)
    fig.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return fig


# ---- models as wholes ----------------------------------------------------------------------------------------------


@styled
def calibration(frames: Mapping[tuple[str, str], pd.DataFrame]) -> Figure:
    """Reliability diagrams: accuracy against confidence by bin; a row per dataset, a column per model.

    Above the diagonal a model is better than it believes, below it is too sure of itself. Areas of the
    points are shares of the images; ECE as in Guo et al. (2017).

    Args:
        frames: {(dataset's title, model): prediction frame of one seed}.
    """
    titles = list(dict.fromkeys(title for title, _ in frames))
    models = [m for m in MAIN if m in {model for _, model in frames}]
    fig = Figure(figsize=(FULL, 1.45 * len(titles) + 0.4), layout="constrained")
    grid = fig.subplots(len(titles), len(models), squeeze=False, sharex=True, sharey=True)
    grid[0, 0].set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    for line, title in zip(grid, titles, strict=True):
        line[0].set_ylabel(f"{title}\naccuracy")
        for ax, model in zip(line, models, strict=True):
            ax.plot([0, 1], [0, 1], color="#777777", linestyle=":", linewidth=0.8)
            if (title, model) not in frames:
                ax.text(0.5, 0.5, "no predictions", ha="center", va="center")
                continue
            frame, color = frames[title, model], model_color(model)
            bins = reliability(frame)
            x, y, share = bins["confidence"], bins["accuracy"], bins["n"] / bins["n"].sum()
            ax.vlines(x, x, y, color=GREY, linewidth=0.8)
            ax.plot(x, y, color=color, linewidth=0.8)
            points = {"edgecolor": "black", "linewidth": 0.4, "zorder": 3, "clip_on": False}
            ax.scatter(x, y, s=6 + 140 * share, color=color, **points)
            ax.set_title(f"{model_name(model)}\nn = {len(frame)}, ECE {calibration_error(frame):.1f} %")
    for ax in grid[-1]:
        ax.set_xlabel("confidence")
    fig.suptitle("calibration: confidence against accuracy, 15 bins, 1 seed")
    return fig


@styled
def accuracy_cost(table: pd.DataFrame) -> Figure:
    """Accuracy against parameters (above) and milliseconds per image (below), one column per dataset.

    Args:
        table: rows dataset (title), model, accuracy, low, high (percent), n, seeds, parameters,
            ms_median, ms_low, ms_high.
    """
    parts = list(table.groupby("dataset", sort=False))
    fig = Figure(figsize=(FULL, 4.1), layout="constrained")
    grid = fig.subplots(2, len(parts), squeeze=False, sharex="row", sharey="col")
    units = EngFormatter(sep=" ")
    units.ENG_PREFIXES = {0: "", 3: "k", 6: "M", 9: "B"}
    mark = {"markeredgecolor": "black", "markeredgewidth": 0.4, "markersize": 4.5, "linestyle": ""}
    marks = {m: {"color": model_color(m), "marker": MARKERS[m], **mark} for m in MAIN if m in set(table["model"])}
    costs = {"parameters": ("parameters",) * 3, "milliseconds per image": ("ms_low", "ms_median", "ms_high")}
    for line, (name, columns) in zip(grid, costs.items(), strict=True):
        for ax, (_, part) in zip(line, parts, strict=True):
            for row in part.to_dict("records"):
                low, x, high = (row[column] for column in columns)
                accuracy, below, above = row["accuracy"], row["accuracy"] - row["low"], row["high"] - row["accuracy"]
                errors = {"xerr": [[x - low], [high - x]], "yerr": [[below], [above]], "ecolor": "#777777"}
                ax.errorbar(x, accuracy, **errors, elinewidth=0.8, **marks[row["model"]])
            ax.set_xscale("log")
            ax.margins(x=0.12)
            narrow = table[columns[2]].max() < 30 * table[columns[0]].min()
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
            ax.xaxis.set_major_formatter(units)
            ax.xaxis.set_minor_formatter("")
        line[len(line) // 2].set_xlabel(name)
        line[0].set_ylabel("accuracy, %")
    for ax, (title, part) in zip(grid[0], parts, strict=True):
        seeds = "/".join(str(int(n)) for n in sorted(set(part["seeds"])))
        ax.set_title(f"{title}\nn = {part['n'].max()}, {seeds} seeds")
    handles = [grid[0, 0].plot([], [], **style)[0] for style in marks.values()]
    fig.legend(handles, map(model_name, marks), loc="outside lower center", ncols=7, columnspacing=1)
    return fig


def _line(ax: Axes, x: pd.Series, part: pd.DataFrame, xlabel: str, **style: Any) -> None:
    """Accuracy with its interval against anything."""
    errors = np.abs(part[["ci_low", "ci_high"]].to_numpy(float).T - part["ours"].to_numpy(float))
    ax.errorbar(x, part["ours"], yerr=errors, capsize=2, **style)
    ax.set(xlabel=xlabel, ylabel="accuracy, %")


@styled
def alpha_tradeoff(table: pd.DataFrame) -> Figure:
    """Accuracy against KL(teacher || head), one point per alpha with its interval; one panel per dataset."""
    known = table.dropna(subset=["ours", "kl"]).sort_values("alpha", kind="stable")
    fig, panels = _by_dataset(known, 2.0)
    note = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": NOTE + 0.5}
    note["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.2, "alpha": 0.8}
    for ax, part in panels:
        _line(ax, part["kl"], part, "KL from the teacher (nats)", color="#999999", linewidth=0.8)
        colors = np.where(part["row"] == "head", PALETTE[3], model_color("head"))
        ax.scatter(part["kl"], part["ours"], c=colors, zorder=3, s=18)
        for alpha, *where in part[["alpha", "kl", "ours"]].itertuples(index=False):
            ax.annotate(f"{alpha:g}", where, **note)
        ax.margins(x=0.15)
    fig.suptitle("weight of distillation: alpha beside each point, the paper's in red-orange")
    return fig


@styled
def depth(table: pd.DataFrame) -> Figure:
    """Accuracy of heads by number of hidden layers, with intervals; one panel per dataset."""
    fig, panels = _by_dataset(table[table["ours"].notna()], 1.8)
    for ax, part in panels:
        layers = part["name"].str.count(",") + 1
        style = {"marker": "o", "markersize": 4, "color": model_color("head")}
        _line(ax, layers, part, "hidden layers of the head", **style)
        ax.set_xticks(sorted(set(layers)))
    fig.suptitle("depth of the distilled head (head alone)")
    return fig


@styled
def training_curves(histories: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> Figure:
    """Training histories, one panel per stage and metric; colour = dataset, dashed = val; seeds averaged.

    Args:
        histories: {(what was trained, dataset's title): rows of its `history.json`}, each with epoch, split, metric,
            value and perhaps seed.
    """
    parts = [pd.DataFrame(rows).assign(stage=s, dataset=d) for (s, d), rows in histories.items()]
    history = pd.concat(parts).reindex(columns=["stage", "dataset", "epoch", "split", "metric", "value", "seed"])
    colors = dict(zip(dict.fromkeys(history["dataset"]), cycle(PALETTE), strict=False))
    groups = list(history.groupby(["stage", "metric"], sort=False))
    fig, axes = _panels(len(groups), 1.8)
    for ax, ((stage, metric), part) in zip(axes, groups, strict=True):
        for (dataset, split), line in part.groupby(["dataset", "split"], sort=False):
            mean = line.groupby("epoch")["value"].mean()
            style = {"linestyle": "--" if split == "val" else "-", "marker": "." if len(mean) < 3 else None}
            ax.plot(mean.index, mean, color=colors[dataset], **style)
        ax.set(xlabel="epoch", ylabel=metric)
        seeds = max(1, part["seed"].nunique())
        ax.set_title(f"{stage}: {seeds} seed{'' if seeds == 1 else 's'}")
    lines = {dataset: axes[0].plot([], [], color=color)[0] for dataset, color in colors.items()}
    lines |= {
        split: axes[0].plot([], [], style, color="#777777")[0] for split, style in (("train", "-"), ("val", "--"))
    }
    fig.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)
    return fig


# ---- pictures in notebooks -----------------------------------------------------------------------------------------


def sample_sheet(frame: pd.DataFrame, labels: Sequence[str], title: str, *, each: int = 6, seed: int = 0) -> Figure:
    """One row of random pictures per emotion, `each` of them; `frame` has columns label and path."""
    groups = {label: frame[frame["label"] == label] for label in labels}
    chosen = {label: part.sample(min(each, len(part)), random_state=seed)["path"] for label, part in groups.items()}
    return picture_rows({label: [thumbnail(path, 96) for path in paths] for label, paths in chosen.items()}, title)


@styled
def picture_rows(rows: Mapping[str, Sequence[Image]], title: str) -> Figure:
    """Named rows of small pictures, each as long as it is."""
    longest = max(1, *map(len, rows.values()))
    fig = Figure(figsize=(longest * 0.95 + 1.4, len(rows) * 0.95 + 0.4), layout="constrained")
    grid = fig.subplots(len(rows), longest, squeeze=False)
    for ax in grid.flat:
        ax.set_axis_off()
    for line, (name, pictures) in zip(grid, rows.items(), strict=True):
        for ax, picture in zip(line, pictures, strict=False):
            ax.imshow(picture)
        line[0].text(-0.12, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    fig.suptitle(title, fontsize=10)
    return fig


@styled
def class_balance(counts: pd.DataFrame, title: str) -> Figure:
    """Stacked bars of images per emotion; rows of `counts` are emotions, columns train, val, test."""
    ax = Figure(figsize=(5, 2.6), layout="constrained").subplots()
    colors = (PALETTE[0], PALETTE[5], PALETTE[1])
    counts.plot.bar(stacked=True, ax=ax, color=colors, width=0.8, rot=30, xlabel="", ylabel="images", title=title)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside the bars, which fill the axes
    return ax.figure


@styled
def answer_bars(
    picture: Image, answers: Mapping[str, Mapping[str, float]], truth: str = "", title: str = ""
) -> Figure:
    """A picture beside each model's probabilities: its answer in blue, a tick where people said the same.

    Args:
        picture: as people see it, small.
        answers: model name -> emotion -> probability.
        truth: what people say, in bold; "" where nobody was asked.
        title: above the figure.
    """
    classes = len(next(iter(answers.values())))
    fig = Figure(figsize=(2 + 1.8 * len(answers), 1.0 + 0.17 * classes), layout="constrained")
    first, *axes = fig.subplots(1, 1 + len(answers), width_ratios=[1.1, *[1] * len(answers)])
    first.imshow(picture)
    first.set_axis_off()
    first.set_title(f"people say: {truth}" if truth else "", fontsize=9)
    for ax, (model, p) in zip(axes, answers.items(), strict=True):
        p = pd.Series(p)
        best = p.idxmax()
        ax.barh(range(classes), p, color=[PALETTE[0] if name == best else GREY for name in p.index])
        for tick in ax.set_yticks(range(classes), p.index, fontsize=8):
            tick.label1.set_fontweight("bold" if tick.label1.get_text() == truth else "normal")
        ax.tick_params(labelleft=ax is axes[0])
        ax.set(xlim=(0, 1), ylim=(classes - 0.4, -0.6))
        ax.set_xticks([0, 0.5, 1], ["0", "50", "100 %"])
        mark = "" if not truth else " \u2713" if best == truth else " \u2717"
        ax.set_title(f"{model}\n{best}{mark}", fontsize=9)
    fig.suptitle(title, fontsize=10)
    return fig
