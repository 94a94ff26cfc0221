"""What the gate learned: the halves of its weights, and whom it followed where VLM and head disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from emonb.figure_style import FULL, MODEL_COLORS, MODEL_MARKERS, basis, empty, panels, styled, turned

__all__ = ["gate_trust", "gate_weights", "lift"]


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
    import seaborn

    sizes = [len(labels) for labels, _ in weights.values()]
    heights = [0.85 + 0.13 * n for n in sizes]
    fig = Figure(figsize=(FULL, sum(heights) + 0.5), layout="constrained")
    grid = fig.subplots(len(weights), 3, squeeze=False, height_ratios=heights, width_ratios=[1, 1, 0.9])
    for line, (title, (labels, matrix)) in zip(grid, weights.items(), strict=True):
        limit = float(np.abs(matrix).max())
        halves = {"VLM's answer": matrix[:, : len(labels)], "head's probability": matrix[:, len(labels) :]}
        for ax, half in zip(line, halves.values(), strict=False):
            seaborn.heatmap(
                half, ax=ax, cmap="BrBG", vmin=-limit, vmax=limit, xticklabels=False, yticklabels=False,
                linewidths=0.3, cbar=ax is line[1], cbar_kws={"aspect": 12, "pad": 0.02},
            )  # fmt: skip
            turned(ax, labels, labels if ax is line[0] else [""] * len(labels))
        line[0].set_ylabel("speaks for")
        line[0].set_title(title, loc="left", fontweight="bold")
        line[0].set_xlabel("the VLM says")
        line[1].set_xlabel("the head says")
        y = np.arange(len(labels))[::-1]
        for source, half, model, shift in zip(
            halves, halves.values(), ("vlm_tuned", "head"), (0.17, -0.17), strict=True
        ):
            line[2].barh(y + shift, lift(half), height=0.32, color=MODEL_COLORS[model], label=source)
        line[2].set_yticks(y, labels)
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
        table: output of `complementarity.gate_trust_table`; one panel per dataset.
    """
    if table.empty:
        return empty()
    parts = [(title, part.iloc[::-1]) for title, part in table.groupby("dataset", sort=False)]
    fig, axes = panels(len(parts), 0.75 + 0.17 * max(len(part) for _, part in parts), sharex=True)
    for ax, (title, part) in zip(axes, parts, strict=True):
        y, start = np.arange(len(part)), np.zeros(len(part))
        colors = (MODEL_COLORS["vlm_tuned"], "#E4E4E4", MODEL_COLORS["head"])
        names = ("followed the VLM", "neither", "followed the head")
        for column, color, name in zip(
            ("followed_vlm", "followed_neither", "followed_head"), colors, names, strict=True
        ):
            ax.barh(y, part[column], left=start, color=color, height=0.8, label=name)
            start = start + part[column].to_numpy()
        marks = {"facecolor": "white", "edgecolor": "black", "linewidth": 0.7, "s": 16, "zorder": 3}
        right = (("vlm_tuned", part["vlm_right"], "VLM right (from the left)"),
                 ("head", 100 - part["head_right"], "head right (from the right)"))  # fmt: skip
        for model, x, name in right:
            ax.scatter(x, y, marker=MODEL_MARKERS[model], label=name, clip_on=False, **marks)
        ax.set_yticks(y, [f"{e} ({n})" for e, n in zip(part["emotion"], part["n"], strict=True)])
        ax.axhline(len(part) - 1.5, color="white", linewidth=1.5)  # "all" stands apart
        ax.set(xlim=(0, 100), ylim=(-0.6, len(part) - 0.4))
        ax.tick_params(labelbottom=True)
        whole = part[part["emotion"] == "all"]["n"]
        ax.set_title(f"{title}\n{basis(whole.sum(), 1)}")
    fig.supxlabel("% of the test images on which VLM and head disagree (in brackets: how many)", fontsize=7)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return fig
