"""The figures: each function takes tidy data (and pictures as arrays), returns a matplotlib Figure.

Nothing here reads a file or touches pyplot's state. Colours are those of Okabe and Ito (2008), which
colour-blind readers can tell apart. Every figure says how many images and seeds it rests on.
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
from matplotlib.patches import Circle

from emonb.complementarity import GROUPS, circle_distance
from emonb.predictions import model_name, prediction_labels

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.axes import Axes

__all__ = [
    "agreement",
    "alpha_tradeoff",
    "as_image",
    "complementarity_by_emotion",
    "complementarity_venn",
    "confusion",
    "depth",
    "qualitative_examples",
    "training_curves",
]

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_GROUP_COLORS = dict(zip(GROUPS, ("#009E73", "#E69F00", "#56B4E9", "#BBBBBB"), strict=True))
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 10,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def _styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return function(*args, **kwargs)

    return wrapper


def as_image(fig: Figure, alt: str, *, dpi: int = 100, photo: bool = False) -> Image:
    """A figure as a small output of a notebook: JPEG for photos, else PNG of 128 colours.

    Args:
        alt: what it shows, for people who cannot see it.
    """
    import PIL.Image
    from IPython.display import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
    picture = PIL.Image.open(buffer).convert("RGB")
    if photo:
        picture.save(small, "JPEG", quality=85)
    else:
        picture.quantize(128, dither=PIL.Image.Dither.NONE).save(small, "PNG", optimize=True)
    return Image(small.getvalue(), alt=alt)


def _panels(n: int, width: float, height: float, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of n panels of this size in inches, at most `columns` in a row."""
    columns = max(1, min(n, columns))
    rows = -(-n // columns) or 1
    fig = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(np.ravel(fig.subplots(rows, columns, squeeze=False)))
    for spare in axes[n:]:
        spare.set_axis_off()
    return fig, axes[:n]


def _basis(n: object, seeds: object) -> str:
    return f"n = {n} images, {seeds} seed{'' if seeds == 1 else 's'}"


@_styled
def confusion(frame: pd.DataFrame, title: str, ax: Axes | None = None) -> Figure:
    """Confusion matrix of a prediction frame: row percent as colour, counts (over all seeds) as text.

    Unparsable answers, where there are any, are a column of their own.
    """
    import seaborn

    labels = prediction_labels(frame)
    answers = frame["prediction"].replace("", "(unparsable)")
    columns = [*labels, *({"(unparsable)"} & set(answers))]
    counts = pd.crosstab(frame["label"], answers).reindex(index=labels, columns=columns, fill_value=0)
    percent = 100 * counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
    if ax is None:
        side = 1.6 + 0.42 * len(columns)
        ax = Figure(figsize=(max(3.4, side + 0.6), max(2.9, side))).subplots()
    notes = (percent.round().astype(int).astype(str) + " %\n" + counts.astype(str)).where(counts > 0, "")
    seaborn.heatmap(
        percent, ax=ax, annot=notes, fmt="", cmap="Blues", vmin=0, vmax=100, square=True, linewidths=0.5,
        annot_kws={"fontsize": 6.5}, cbar_kws={"label": "% of the true emotion", "shrink": 0.8},
    )  # fmt: skip
    ax.set(xlabel="predicted", ylabel="true")
    ax.set_xticklabels(columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticklabels(labels, rotation=0)
    ax.set_title(f"{title}\n{_basis(frame['image_id'].nunique(), frame['seed'].nunique())}")
    return ax.figure


@_styled
def complementarity_venn(table: pd.DataFrame) -> Figure:
    """Images that the tuned VLM and the ViT get right, one pair of circles per dataset; areas are counts.

    Args:
        table: rows `emotion == "all"` of the complementarity table.
    """
    fig, axes = _panels(len(table), 2.5, 2.3)
    for ax, row in zip(axes, table.to_dict("records"), strict=True):
        both, vlm, vit, neither = (row[g.replace(" ", "_")] for g in GROUPS)
        r1, r2 = np.sqrt((both + vlm) / np.pi), np.sqrt((both + vit) / np.pi)
        d = circle_distance(r1, r2, both)
        for x, r, color in ((0.0, r1, _GROUP_COLORS[GROUPS[1]]), (d, r2, _GROUP_COLORS[GROUPS[2]])):
            ax.add_patch(Circle((x, 0), r, facecolor=color, edgecolor="black", alpha=0.6, linewidth=0.8))
        left, right, reach = -r1, d + r2, max(r1, r2)
        for x, y, text, ha, va in (
            (left, 1.05, f"only VLM\n{vlm}\n{100 * vlm / row['n']:.1f} %", "left", "bottom"),
            (right, 1.05, f"only ViT\n{vit}\n{100 * vit / row['n']:.1f} %", "right", "bottom"),
            ((d - r2 + r1) / 2, 0, f"both\n{both}\n{100 * both / row['n']:.1f} %", "center", "center"),
            ((left + right) / 2, -1.08, f"neither: {neither} ({100 * neither / row['n']:.1f} %)", "center", "top"),
        ):
            ax.text(x, y * reach, text, ha=ha, va=va)
        ax.set(xlim=(1.1 * left, right - 0.1 * left), ylim=(-1.4 * reach, 1.9 * reach), aspect="equal")
        ax.set_axis_off()
        ax.set_title(f"{row['dataset']}\n{_basis(row['n'], 1)}")
    return fig


@_styled
def complementarity_by_emotion(table: pd.DataFrame) -> Figure:
    """Share of images per true emotion that both, only one or none of tuned VLM and ViT get right.

    Args:
        table: rows of single emotions of the complementarity table; one panel per dataset.
    """
    parts = [(title, part.iloc[::-1]) for title, part in table.groupby("dataset", sort=False)]
    heights = [len(part) + 1.6 for _, part in parts]
    fig = Figure(figsize=(5.2, 0.24 * sum(heights) + 0.7), layout="constrained")
    axes = np.ravel(fig.subplots(len(parts), 1, sharex=True, squeeze=False, height_ratios=heights))
    for ax, (title, part) in zip(axes, parts, strict=True):
        start = np.zeros(len(part))
        names = [f"{e} ({n})" for e, n in zip(part["emotion"], part["n"], strict=True)]
        for group in GROUPS:
            share = 100 * part[group.replace(" ", "_")].to_numpy(float) / part["n"].to_numpy(float)
            ax.barh(names, share, left=start, color=_GROUP_COLORS[group], label=group, height=0.8)
            for y, (x, width) in enumerate(zip(start, share, strict=True)):
                if width >= 7:  # narrower bars have no room for a number
                    ax.text(x + width / 2, y, f"{width:.0f}", ha="center", va="center", fontsize=6.5)
            start = start + share
        ax.set(xlim=(0, 100), ylim=(-0.6, len(part) - 0.4))
        ax.set_title(f"{title}, {_basis(part['n'].sum(), 1)}", loc="left")
    axes[-1].set_xlabel("% of the test images of that emotion (number of images in brackets)")
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside upper center", ncols=4)
    return fig


@_styled
def agreement(matrices: Mapping[str, pd.DataFrame], n: Mapping[str, int]) -> Figure:
    """Cohen's kappa between the answers of all models, one lower triangle per dataset.

    Args:
        matrices: {dataset's title: kappa matrix}, n: {dataset's title: images}.
    """
    import seaborn

    fig, axes = _panels(len(matrices), 3.3, 3.0, columns=2 if len(matrices) == 4 else 3)
    for ax, (title, matrix) in zip(axes, matrices.items(), strict=True):
        names = [model_name(m) for m in matrix.columns]
        shown = matrix.set_axis(names, axis=0).set_axis(names, axis=1)
        seaborn.heatmap(
            shown.iloc[1:, :-1], ax=ax, mask=np.triu(np.ones(shown.shape, bool), 1)[1:, 1:], annot=True, fmt=".2f",
            cmap="cividis", vmin=0, vmax=1, square=True, cbar=False, annot_kws={"fontsize": 6.5}, linewidths=0.5,
        )  # fmt: skip
        ax.set_xticklabels(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
        ax.set_title(f"{title}\n{_basis(n[title], 1)}")
    fig.suptitle("agreement between models (Cohen's kappa; 1 = same answers)")
    return fig


def _error(part: pd.DataFrame) -> np.ndarray:
    return np.abs(part[["ci_low", "ci_high"]].to_numpy(float).T - part["ours"].to_numpy(float))


@_styled
def alpha_tradeoff(table: pd.DataFrame) -> Figure:
    """Accuracy against KL(teacher || head), one point per alpha with its interval; one panel per dataset."""
    parts = list(
        table.dropna(subset=["ours", "kl"]).sort_values("alpha", kind="stable").groupby("dataset", sort=False)
    )
    fig, axes = _panels(len(parts), 2.5, 2.3)
    for ax, (title, part) in zip(axes, parts, strict=True):
        ax.errorbar(part["kl"], part["ours"], yerr=_error(part), color="#999999", capsize=2, linewidth=0.8)
        chosen = part["row"] == "head"
        ax.scatter(part["kl"], part["ours"], c=np.where(chosen, OKABE_ITO[3], OKABE_ITO[0]), zorder=3, s=22)
        for alpha, *where in part[["alpha", "kl", "ours"]].itertuples(index=False):
            ax.annotate(f"{alpha:g}", where, xytext=(4, 4), textcoords="offset points")
        ax.set(xlabel="KL from the teacher (nats)", ylabel="accuracy, %")
        ax.margins(x=0.15)
        ax.set_title(f"{title}\n{_basis(part['n'].max(), part['seeds'].max())}")
    fig.suptitle("weight of distillation: alpha beside each point, the paper's in red-orange")
    return fig


@_styled
def depth(table: pd.DataFrame) -> Figure:
    """Accuracy of heads by number of hidden layers, with intervals; one panel per dataset."""
    parts = list(table[table["ours"].notna()].groupby("dataset", sort=False))
    fig, axes = _panels(len(parts), 2.5, 2.2)
    for ax, (title, part) in zip(axes, parts, strict=True):
        layers = part["name"].str.count(",") + 1
        ax.errorbar(layers, part["ours"], yerr=_error(part), marker="o", color=OKABE_ITO[0], capsize=2)
        ax.set(xlabel="hidden layers of the head", ylabel="accuracy, %", xticks=sorted(set(layers)))
        ax.set_title(f"{title}\n{_basis(part['n'].max(), part['seeds'].max())}")
    fig.suptitle("depth of the distilled head (head alone)")
    return fig


@_styled
def qualitative_examples(examples: pd.DataFrame, pictures: Sequence[np.ndarray], title: str, n: int) -> Figure:
    """Pictures of which exactly one of tuned VLM, ViT and EmoVLM-KD is right, one row per model.

    Args:
        examples: output of `complementarity.select_examples`; pictures: an (H, W, 3) array for each.
        title: dataset's title; n: test images they were chosen from.
    """
    trio = [m for m in ("vlm_tuned", "vit", "emovlmkd") if m in examples.columns]
    columns = max(1, int(examples.groupby("right").size().max() if len(examples) else 1))
    fig = Figure(figsize=(1.75 * columns + 0.4, 2.35 * len(trio) + 0.6), layout="constrained")
    grid = fig.subplots(len(trio), columns, squeeze=False)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for line, model in zip(grid, trio, strict=True):
        line[0].set_ylabel(f"only {model_name(model)}\nis right", fontweight="bold")
        chosen = [i for i, right in enumerate(examples["right"]) if right == model]
        if not chosen:
            line[0].text(0.5, 0.5, "no such image", ha="center", va="center", transform=line[0].transAxes)
        for ax, i in zip(line, chosen, strict=False):
            ax.imshow(pictures[i])
            ax.set_title(f"true: {examples['label'].iloc[i]}", fontweight="bold", fontsize=8)
            said = [(m, examples[m].iloc[i]) for m in trio]
            marks = [f"{'✓' if m == model else '✗'} {model_name(m)}: {a or '(unparsable)'}" for m, a in said]
            ax.set_xlabel("\n".join(marks), fontsize=6.5, loc="left")
    fig.suptitle(f"{title}: chosen by rule from {_basis(n, 1)}")
    return fig


@_styled
def training_curves(history: pd.DataFrame) -> Figure:
    """Training histories, one panel per stage and metric; colour = dataset, dashed = val; seeds averaged.

    Args:
        history: stage, dataset (its title), epoch, split, metric, value, seed (empty = one seed).
    """
    parts = list(history.groupby(["stage", "metric"], sort=False))
    colors = dict(zip(dict.fromkeys(history["dataset"]), cycle(OKABE_ITO), strict=False))
    fig, axes = _panels(len(parts), 2.5, 2.1)
    for ax, ((stage, metric), part) in zip(axes, parts, strict=True):
        for (dataset, split), line in part.groupby(["dataset", "split"], sort=False):
            mean = line.groupby("epoch")["value"].mean()
            style = {"linestyle": "--" if split == "val" else "-", "marker": "." if len(mean) < 3 else None}
            ax.plot(mean.index, mean, color=colors[dataset], linewidth=1.2, **style)
        ax.set(xlabel="epoch", ylabel=metric)
        seeds = max(1, part["seed"].nunique())
        ax.set_title(f"{stage}: {seeds} seed{'' if seeds == 1 else 's'}")
    for dataset, color in colors.items():
        axes[0].plot([], [], color=color, label=dataset)
    for split, style in (("train", "-"), ("val", "--")):
        axes[0].plot([], [], color="#777777", linestyle=style, label=split)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig
