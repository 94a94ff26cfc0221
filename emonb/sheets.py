"""Pictures in notebooks: sheets of samples, one picture with its answer. PIL and matplotlib, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from emonb.samples import open_picture
from emonb.store import Artifact, read_json

__all__ = ["answer_bars", "class_balance", "histories", "picture_rows", "sample_sheet", "thumbnail"]

INK = "#333333"
HISTORY = ["stage", "dataset", "epoch", "split", "metric", "value"]


def thumbnail(path: str | Path, side: int = 192) -> Image.Image:
    """A picture at a fixed longest side, small ones enlarged: what a cell shows."""
    picture = open_picture(path)
    scale = side / max(picture.size)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)


def sample_sheet(frame: pd.DataFrame, labels: Sequence[str], title: str, *, each: int = 6, seed: int = 0) -> Figure:
    """One row of random pictures per emotion, `each` of them."""
    fig = Figure(figsize=(each * 0.95 + 1.2, len(labels) * 0.95 + 0.4), layout="constrained")
    axes = fig.subplots(len(labels), each, squeeze=False)
    for row, label in zip(axes, labels, strict=True):
        of_label = frame[frame["label"] == label]
        paths = of_label.sample(min(each, len(of_label)), random_state=seed)["path"].tolist()
        for ax, path in zip(row, [*paths, *[None] * (each - len(paths))], strict=True):
            ax.set_axis_off()
            if path:
                ax.imshow(thumbnail(path, 96))
        row[0].text(-0.12, 0.5, label, transform=row[0].transAxes, ha="right", va="center", color=INK)
    fig.suptitle(title, fontsize=10, color=INK)
    return fig


def picture_rows(rows: Mapping[str, Sequence[Image.Image]], title: str) -> Figure:
    """Named rows of small pictures, each as long as it is."""
    longest = max(map(len, rows.values()))
    fig = Figure(figsize=(longest * 0.95 + 2.2, len(rows) * 0.95 + 0.4), layout="constrained")
    axes = fig.subplots(len(rows), longest, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        for ax, picture in zip(row, pictures, strict=False):
            ax.imshow(picture)
        row[0].text(-0.12, 0.5, name, transform=row[0].transAxes, ha="right", va="center", color=INK, fontsize=8)
    fig.suptitle(title, fontsize=10, color=INK)
    return fig


def class_balance(counts: pd.DataFrame, title: str) -> Figure:
    """Stacked bars of images per emotion; rows of `counts` are emotions, columns train, val, test."""
    fig = Figure(figsize=(5, 2.6), layout="constrained")
    ax = fig.subplots()
    counts.plot.bar(stacked=True, ax=ax, color=["#0072B2", "#56B4E9", "#E69F00"], width=0.8)  # Okabe-Ito
    ax.set(xlabel="", ylabel="images", title=title)
    ax.tick_params(axis="x", rotation=30)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)  # beside the bars, which fill the axes
    return fig


def answer_bars(path: str | Path, answers: Mapping[str, pd.Series], label: str, title: str) -> Figure:
    """One picture beside each model's probabilities; the true label's bar is dark.

    Args:
        path: the picture.
        answers: model name -> probabilities indexed by label.
        label: the true label.
        title: above the figure.
    """
    fig = Figure(figsize=(2 + 2 * len(answers), 2.4), layout="constrained")
    axes = fig.subplots(1, 1 + len(answers), width_ratios=[1.1, *[1] * len(answers)], squeeze=False)[0]
    axes[0].imshow(thumbnail(path))
    axes[0].set_axis_off()
    for i, (ax, (model, p)) in enumerate(zip(axes[1:], answers.items(), strict=True)):
        colors = ["#0072B2" if name == label else "#BBBBBB" for name in p.index]
        ax.barh(range(len(p)), p.to_numpy(), color=colors)
        ax.set_yticks(range(len(p)), p.index if i == 0 else [""] * len(p), fontsize=8)
        ax.invert_yaxis()
        ax.set(xlim=(0, 1))
        ax.set_title(model, fontsize=9)
    fig.suptitle(title, fontsize=10, color=INK)
    return fig


def histories(artifacts: Mapping[str, Artifact], stage: str) -> pd.DataFrame:
    """Training histories of several datasets as one table for `figures.training_curves`.

    Args:
        artifacts: title of the dataset -> artefact with a `history.json`.
        stage: title of what was trained.
    """
    rows = [pd.DataFrame(read_json(a.path / "history.json")).assign(dataset=d) for d, a in artifacts.items()]
    return pd.concat(rows).assign(stage=stage).reindex(columns=[*HISTORY, "seed"])
