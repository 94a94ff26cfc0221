"""Who is right where: circles, bars by emotion, intersections of several models, agreement, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from emonb.complementarity import CASES, GROUPS, UNPARSABLE, circle_distance, intersections
from emonb.figure_style import (
    COLUMN,
    FULL,
    GREY,
    GROUP_COLORS,
    MODEL_COLORS,
    NOTE,
    basis,
    cell_notes,
    empty,
    panels,
    styled,
    turned,
)
from emonb.predictions import model_name

__all__ = [
    "agreement",
    "complementarity_by_emotion",
    "complementarity_upset",
    "complementarity_venn",
    "qualitative_examples",
]


@styled
def complementarity_venn(table: pd.DataFrame) -> Figure:
    """Images that the tuned VLM and the ViT get right, one pair of circles per dataset; areas are counts.

    Args:
        table: rows `emotion == "all"` of the complementarity table.
    """
    if table.empty:
        return empty()
    fig, axes = panels(len(table), 2.0)
    for ax, row in zip(axes, table.to_dict("records"), strict=True):
        both, vlm, vit, neither = (row[g.replace(" ", "_")] for g in GROUPS)
        r1, r2 = np.sqrt((both + vlm) / np.pi), np.sqrt((both + vit) / np.pi)
        d = circle_distance(r1, r2, both)
        for x, r, model in ((0.0, r1, "vlm_tuned"), (d, r2, "vit")):
            ax.add_patch(Circle((x, 0), r, facecolor=MODEL_COLORS[model], edgecolor="black", alpha=0.6, linewidth=0.6))
        left, right, reach = -r1, d + r2, max(r1, r2, 1e-9)
        for x, y, text, ha, va in (
            (left, 1.05, f"only VLM\n{vlm}\n{100 * vlm / row['n']:.1f} %", "left", "bottom"),
            (right, 1.05, f"only ViT\n{vit}\n{100 * vit / row['n']:.1f} %", "right", "bottom"),
            ((d - r2 + r1) / 2, 0, f"both\n{both}\n{100 * both / row['n']:.1f} %", "center", "center"),
            ((left + right) / 2, -1.08, f"neither: {neither} ({100 * neither / row['n']:.1f} %)", "center", "top"),
        ):
            ax.text(x, y * reach, text, ha=ha, va=va)
        ax.set(xlim=(1.1 * left, right - 0.1 * left), ylim=(-1.4 * reach, 1.9 * reach), aspect="equal")
        ax.set_axis_off()
        ax.set_title(f"{row['dataset']}\n{basis(row['n'], 1)}")
    return fig


@styled
def complementarity_by_emotion(table: pd.DataFrame) -> Figure:
    """Share of images per true emotion that both, only one or none of tuned VLM and ViT get right.

    Args:
        table: rows of single emotions of the complementarity table; one panel per dataset.
    """
    if table.empty:
        return empty()
    parts = [(title, part.iloc[::-1]) for title, part in table.groupby("dataset", sort=False)]
    heights = [len(part) + 1.6 for _, part in parts]
    fig = Figure(figsize=(COLUMN, 0.17 * sum(heights) + 0.7), layout="constrained")
    axes = np.ravel(fig.subplots(len(parts), 1, sharex=True, squeeze=False, height_ratios=heights))
    for ax, (title, part) in zip(axes, parts, strict=True):
        start = np.zeros(len(part))
        names = [f"{e} ({n})" for e, n in zip(part["emotion"], part["n"], strict=True)]
        for group in GROUPS:
            share = 100 * part[group.replace(" ", "_")].to_numpy(float) / part["n"].to_numpy(float)
            ax.barh(names, share, left=start, color=GROUP_COLORS[group], label=group, height=0.8)
            for y, (x, width) in enumerate(zip(start, share, strict=True)):
                if width >= 7:  # narrower bars have no room for a number
                    ax.text(x + width / 2, y, f"{width:.0f}", ha="center", va="center_baseline", fontsize=NOTE)
            start = start + share
        ax.set(xlim=(0, 100), ylim=(-0.6, len(part) - 0.4))
        ax.set_title(f"{title}, {basis(part['n'].sum(), 1)}", loc="left")
    axes[-1].set_xlabel("% of an emotion's test images (in brackets: n)")
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside upper center", ncols=2)
    return fig


@styled
def complementarity_upset(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Which of tuned VLM, ViT, head and EmoVLM-KD are right together: a bar for each combination and dataset.

    Below each bar the dots say which models are right; blue where EmoVLM-KD is among them. Combinations that
    occur nowhere are left out; the order is that of the summed shares. As in UpSet (Lex et al. 2014).

    Args:
        tables: {dataset's title: output of `complementarity.joint`}.
    """
    counts = intersections(tables)
    if counts.empty:
        return empty()
    models = list(counts.index.names)
    totals = counts.sum()
    height = 0.85 * len(tables) + 0.22 * len(models) + 0.3
    fig = Figure(figsize=(FULL if len(counts) > 8 else COLUMN, height + 0.3), layout="constrained")
    ratios = [*[0.85] * len(tables), 0.22 * len(models) + 0.1]
    *axes, dots = fig.subplots(len(tables) + 1, 1, sharex=True, height_ratios=ratios)
    right = np.array([list(combination) for combination in counts.index], bool)
    gated = right[:, models.index("emovlmkd")] if "emovlmkd" in models else np.zeros(len(right), bool)
    colors = np.where(gated, MODEL_COLORS["emovlmkd"], GREY)
    for ax, title in zip(axes, counts.columns, strict=True):
        share = 100 * counts[title] / max(1, totals[title])
        ax.bar(range(len(counts)), share, color=colors, width=0.75)
        for x, (y, n) in enumerate(zip(share, counts[title], strict=True)):
            ax.text(x, y, str(n), ha="center", va="bottom", fontsize=NOTE)
        ax.set_ylim(0, 1.25 * max(1.0, share.max()))
        ax.set_ylabel("%")
        ax.set_title(f"{title}: {basis(totals[title], 1)}", loc="right", y=0.8)
        ax.tick_params(axis="x", length=0, labelbottom=False)
    x, y = np.meshgrid(np.arange(len(counts)), np.arange(len(models)), indexing="ij")
    inks = np.array([MODEL_COLORS[m] for m in models])[y]
    dots.scatter(x[~right], y[~right], s=16, facecolor="white", edgecolor=GREY, linewidth=0.6)
    for column in np.flatnonzero(right.sum(axis=1) > 1):
        rows = np.flatnonzero(right[column])
        dots.plot([column] * 2, rows[[0, -1]], color="#444444", linewidth=0.8, zorder=1)
    dots.scatter(x[right], y[right], s=22, c=inks[right], edgecolor="black", linewidth=0.4, zorder=2)
    dots.set_yticks(range(len(models)), [model_name(m) for m in models])
    dots.set(ylim=(len(models) - 0.5, -0.5), xlim=(-0.6, len(counts) - 0.4))
    dots.spines[:].set_visible(False)
    dots.tick_params(length=0, labelbottom=False)
    note = "filled dot: the model is right; numbers: images"
    dots.set_xlabel(note + ("; blue bars: EmoVLM-KD is right" if gated.any() else ""))
    return fig


def _without_zero(value: float) -> str:
    """0.24 as ".24": all of them fit into a cell."""
    return f"{value:.2f}".replace("-0.00", "0.00").replace("0.", ".")


@styled
def agreement(matrices: Mapping[str, pd.DataFrame], n: Mapping[str, int]) -> Figure:
    """Cohen's kappa between the answers of all models, one lower triangle per dataset.

    Args:
        matrices: {dataset's title: kappa matrix}, n: {dataset's title: images}. A single model agrees with nobody
            and gets no panel.
    """
    import seaborn

    shown = {title: matrix for title, matrix in matrices.items() if len(matrix) > 1}
    if not shown:
        return empty()
    fig, axes = panels(len(shown), 2.25)
    for ax, (title, matrix) in zip(axes, shown.items(), strict=True):
        names = [model_name(m) for m in matrix.columns]
        values = matrix.to_numpy(float)[1:, :-1]
        hidden = np.triu(np.ones(values.shape, bool), 1)
        seaborn.heatmap(
            values, ax=ax, mask=hidden, cmap="cividis", vmin=0, vmax=1, square=True, cbar=False, linewidths=0.5,
            xticklabels=False, yticklabels=False,
        )  # fmt: skip
        notes = np.where(hidden, "", np.vectorize(_without_zero)(values))
        cell_notes(ax, notes, values < 0.5)
        turned(ax, names[:-1], names[1:])
        ax.set_title(f"{title}\n{basis(n[title], 1)}")
    fig.suptitle("agreement between models (Cohen's kappa; 1 = same answers)")
    return fig


@styled
def qualitative_examples(examples: pd.DataFrame, pictures: Sequence[np.ndarray], title: str, n: int) -> Figure:
    """Pictures with what tuned VLM, ViT and EmoVLM-KD say, one row per case (`complementarity.CASES`).

    Args:
        examples: output of `complementarity.select_examples`; pictures: an (H, W, 3) array for each.
        title: dataset's title; n: test images they were chosen from.
    """
    trio = [m for m in ("vlm_tuned", "vit", "emovlmkd") if m in examples.columns]
    columns = max(4, int(examples.groupby("case").size().max() if len(examples) else 1))
    rows = {case: [i for i, found in enumerate(examples["case"]) if found == case] for case in CASES}
    heights = [FULL / columns + 0.5 if chosen else 0.25 for chosen in rows.values()]
    fig = Figure(figsize=(FULL, sum(heights) + 0.3), layout="constrained")
    grid = fig.subplots(len(CASES), columns, squeeze=False, height_ratios=heights)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for line, (case, chosen) in zip(grid, rows.items(), strict=True):
        if chosen:
            line[0].set_ylabel(CASES[case], fontweight="bold")
        else:
            nothing = f"{CASES[case]}: no such image".replace("\n", " ")
            for ax in line:
                ax.patch.set_visible(False)  # the text runs on over the empty places
            line[0].text(0, 0.5, nothing, fontweight="bold", va="center", transform=line[0].transAxes, in_layout=False)
        for ax, i in zip(line, chosen, strict=False):
            ax.imshow(pictures[i])
            truth = examples["label"].iloc[i]
            ax.set_title(f"true: {truth}", fontweight="bold")
            said = [(m, examples[m].iloc[i]) for m in trio]
            marks = [f"{'✓' if a == truth else '✗'} {model_name(m)}: {a or UNPARSABLE}" for m, a in said]
            ax.set_xlabel("\n".join(marks), fontsize=NOTE + 0.5, loc="left", linespacing=1.1)
    fig.suptitle(f"{title}: chosen by rule from {basis(n, 1)}")
    return fig
