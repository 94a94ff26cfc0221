"""Models as wholes: calibration, accuracy against cost, ablations, training curves."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from emonb.figure_style import (
    FULL,
    GREY,
    MODEL_COLORS,
    MODEL_MARKERS,
    NOTE,
    OKABE_ITO,
    basis,
    empty,
    panels,
    short_number,
    styled,
)
from emonb.metrics import calibration_error, reliability
from emonb.predictions import model_name

__all__ = ["accuracy_cost", "alpha_tradeoff", "calibration", "depth", "training_curves"]


_COSTS = (["parameters"], ["ms_low", "ms_high"])


@styled
def calibration(frames: Mapping[tuple[str, str], pd.DataFrame]) -> Figure:
    """Reliability diagrams: accuracy against confidence by bin; a row per dataset, a column per model.

    Above the diagonal a model is better than it believes, below it is too sure of itself. Areas of the
    points are shares of the images; ECE as in Guo et al. (2017).

    Args:
        frames: {(dataset's title, model): prediction frame of one seed}.
    """
    if not frames:
        return empty()
    titles = list(dict.fromkeys(title for title, _ in frames))
    models = [m for m in MODEL_COLORS if m in {model for _, model in frames}]
    fig = Figure(figsize=(FULL, 1.45 * len(titles) + 0.4), layout="constrained")
    options = {"squeeze": False, "sharex": True, "sharey": True}
    grid = fig.subplots(len(titles), len(models), **options)
    for line, title in zip(grid, titles, strict=True):
        for ax, model in zip(line, models, strict=True):
            ax.plot([0, 1], [0, 1], color="#777777", linestyle=":", linewidth=0.8)
            ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
            if (title, model) not in frames:
                ax.text(0.5, 0.5, "no predictions", ha="center", va="center")
                continue
            frame, color = frames[title, model], MODEL_COLORS[model]
            bins = reliability(frame)
            ax.vlines(bins["confidence"], bins["confidence"], bins["accuracy"], color=GREY, linewidth=0.8)
            ax.plot(bins["confidence"], bins["accuracy"], color=color, linewidth=0.8)
            sizes = 6 + 140 * bins["n"] / bins["n"].sum()
            ax.scatter(
                bins["confidence"],
                bins["accuracy"],
                s=sizes,
                color=color,
                edgecolor="black",
                linewidth=0.4,
                zorder=3,
                clip_on=False,
            )
            ax.set_title(f"{model_name(model)}\nn = {len(frame)}, ECE {calibration_error(frame):.1f} %")
        line[0].set_ylabel(f"{title}\naccuracy")
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
    if table.empty:
        return empty()
    parts = list(table.groupby("dataset", sort=False))
    fig = Figure(figsize=(FULL, 4.1), layout="constrained")
    grid = fig.subplots(2, len(parts), squeeze=False, sharex="row", sharey="col")
    models = [m for m in MODEL_COLORS if m in set(table["model"])]
    for column, (title, part) in zip(grid.T, parts, strict=True):
        for row in part.to_dict("records"):
            model = row["model"]
            style = {"color": MODEL_COLORS[model], "marker": MODEL_MARKERS[model], "markeredgecolor": "black"}
            style |= {"markeredgewidth": 0.4, "markersize": 4.5, "ecolor": "#777777", "elinewidth": 0.8}
            high = [[row["accuracy"] - row["low"]], [row["high"] - row["accuracy"]]]
            wide = [[row["ms_median"] - row["ms_low"]], [row["ms_high"] - row["ms_median"]]]
            column[0].errorbar(row["parameters"], row["accuracy"], yerr=high, linestyle="", **style)
            column[1].errorbar(row["ms_median"], row["accuracy"], yerr=high, xerr=wide, linestyle="", **style)
        seeds = sorted({int(s) for s in part["seeds"]})
        column[0].set_title(f"{title}\nn = {part['n'].max()}, {'/'.join(map(str, seeds))} seeds")
    for ax, name, columns in zip(grid, ("parameters", "milliseconds per image"), _COSTS, strict=True):
        values = table[columns].to_numpy(float)
        narrow = values.size and values.max() < 30 * values.min()
        for panel in ax:
            panel.set_xscale("log")
            panel.margins(x=0.12)
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
            panel.xaxis.set_major_formatter(lambda value, _: short_number(value))
            panel.xaxis.set_minor_formatter("")
        ax[len(ax) // 2].set_xlabel(name)
        ax[0].set_ylabel("accuracy, %")
    marks = [
        grid[0, 0].plot([], [], linestyle="", marker=MODEL_MARKERS[m], color=MODEL_COLORS[m], markeredgecolor="black",
                        markeredgewidth=0.4, markersize=4.5)[0]
        for m in models
    ]  # fmt: skip
    fig.legend(marks, [model_name(m) for m in models], loc="outside lower center", ncols=7, columnspacing=1)
    return fig


def _error(part: pd.DataFrame) -> np.ndarray:
    return np.abs(part[["ci_low", "ci_high"]].to_numpy(float).T - part["ours"].to_numpy(float))


@styled
def alpha_tradeoff(table: pd.DataFrame) -> Figure:
    """Accuracy against KL(teacher || head), one point per alpha with its interval; one panel per dataset."""
    parts = list(
        table.dropna(subset=["ours", "kl"]).sort_values("alpha", kind="stable").groupby("dataset", sort=False)
    )
    fig, axes = panels(len(parts), 2.0)
    for ax, (title, part) in zip(axes, parts, strict=True):
        ax.errorbar(part["kl"], part["ours"], yerr=_error(part), color="#999999", capsize=2, linewidth=0.8)
        chosen = part["row"] == "head"
        ax.scatter(part["kl"], part["ours"], c=np.where(chosen, OKABE_ITO[3], MODEL_COLORS["head"]), zorder=3, s=18)
        for alpha, *where in part[["alpha", "kl", "ours"]].itertuples(index=False):
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.2, "alpha": 0.8}
            ax.annotate(
                f"{alpha:g}", where, xytext=(5, 4), textcoords="offset points", fontsize=NOTE + 0.5, bbox=paper
            )
        ax.set(xlabel="KL from the teacher (nats)", ylabel="accuracy, %")
        ax.margins(x=0.15)
        ax.set_title(f"{title}\n{basis(part['n'].max(), part['seeds'].max())}")
    fig.suptitle("weight of distillation: alpha beside each point, the paper's in red-orange")
    return fig


@styled
def depth(table: pd.DataFrame) -> Figure:
    """Accuracy of heads by number of hidden layers, with intervals; one panel per dataset."""
    parts = list(table[table["ours"].notna()].groupby("dataset", sort=False))
    fig, axes = panels(len(parts), 1.8)
    for ax, (title, part) in zip(axes, parts, strict=True):
        layers = part["name"].str.count(",") + 1
        style = {"marker": "o", "markersize": 4, "color": MODEL_COLORS["head"], "capsize": 2}
        ax.errorbar(layers, part["ours"], yerr=_error(part), **style)
        ax.set(xlabel="hidden layers of the head", ylabel="accuracy, %", xticks=sorted(set(layers)))
        ax.set_title(f"{title}\n{basis(part['n'].max(), part['seeds'].max())}")
    fig.suptitle("depth of the distilled head (head alone)")
    return fig


@styled
def training_curves(history: pd.DataFrame) -> Figure:
    """Training histories, one panel per stage and metric; colour = dataset, dashed = val; seeds averaged.

    Args:
        history: stage, dataset (its title), epoch, split, metric, value, seed (empty = one seed).
    """
    if history.empty:
        return empty()
    parts = list(history.groupby(["stage", "metric"], sort=False))
    colors = dict(zip(dict.fromkeys(history["dataset"]), cycle(OKABE_ITO), strict=False))
    fig, axes = panels(len(parts), 1.8)
    for ax, ((stage, metric), part) in zip(axes, parts, strict=True):
        for (dataset, split), line in part.groupby(["dataset", "split"], sort=False):
            mean = line.groupby("epoch")["value"].mean()
            style = {"linestyle": "--" if split == "val" else "-", "marker": "." if len(mean) < 3 else None}
            ax.plot(mean.index, mean, color=colors[dataset], **style)
        ax.set(xlabel="epoch", ylabel=metric)
        seeds = max(1, part["seed"].nunique())
        ax.set_title(f"{stage}: {seeds} seed{'' if seeds == 1 else 's'}")
    for dataset, color in colors.items():
        axes[0].plot([], [], color=color, label=dataset)
    for split, style in (("train", "-"), ("val", "--")):
        axes[0].plot([], [], color="#777777", linestyle=style, label=split)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig
