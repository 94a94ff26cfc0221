"""All figures: `figures.NAME` takes tidy data, and pictures as arrays or files, and returns a matplotlib Figure.

Every figure says how many images and seeds it rests on, is drawn at the width of one or both columns of a page and
has no text below 6 points there. A model has the same colour and the same mark in every figure. No window opens.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator
from seaborn.utils import relative_luminance

from emonb import predictions as pr
from emonb.files import resource_path
from emonb.metrics import calibration_error, reliability
from emonb.predictions import CASES, GROUPS, MAIN, QUARTET, UNPARSABLE, model_color, model_name
from emonb.tables import LEVELS

if TYPE_CHECKING:
    from IPython.display import Image as Shown

COLUMN, FULL = 3.3, 7.0  # inches: one column and both of a two-column page (CVPR: 3.25 and 6.875)
NOTE = 6.0  # points: the smallest text anywhere, at these widths
GREY, PALE = "#BBBBBB", "#E4E4E4"
MARKERS = dict(zip(MAIN, "vDsP^oX", strict=True))  # the model is told by shape, too
SHARES = {group.replace(" ", "_"): group.replace("VLM", "tuned VLM") for group in GROUPS}  # column -> in a figure
LINES = {"chance": ":", "ceiling": "--"}  # of `tables.LEVELS`, in every chart of accuracy
Panels = tuple[Figure, list[tuple[Axes, Any]]]  # a figure, and axes and data of each of its panels


# ---- one look, and figures as files --------------------------------------------------------------------------------


def styled(function: Callable[..., Figure | None]) -> Callable[..., Figure]:
    """Draw in the common style, whatever the user's matplotlib is set to; without data, a sentence that says so."""

    @functools.wraps(function)
    def wrapper(data: Any, *args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(fname=resource_path("emonb.mplstyle")):
            empty = hasattr(data, "__len__") and not len(data)
            fig = None if empty else function(data, *args, **kwargs)
            if fig is None:  # a run with failed models keeps all other figures
                fig = Figure(figsize=(COLUMN, 0.6))
                fig.text(0.5, 0.5, "this run has no predictions for this figure", ha="center", va="center")
            fig.draw_without_rendering()  # all texts and places are made here, in this style
            fig.set_layout_engine(None)  # or each drawing would lay out anew, two for each format
        return fig

    return wrapper


def _saved(fig: Figure, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(fname=resource_path("emonb.mplstyle")):
        fig.savefig(buffer, format=form, bbox_inches="tight", **options)
    return buffer.getvalue()


def as_files(fig: Figure) -> dict[str, bytes]:
    """A figure as `{"png": ..., "svg": ...}`; equal figures give equal bytes."""
    unstamped = {"png": {"Software": None}, "svg": {"Date": None}}
    return {form: _saved(fig, form, metadata=metadata) for form, metadata in unstamped.items()}


def as_image(fig: Figure, alt: str, *, dpi: float | None = None, photo: bool = False) -> Shown:
    """A figure as a small output of a notebook, with words for people who cannot see it."""
    from IPython.display import Image as Shown

    data = compact(io.BytesIO(_saved(fig, "png", dpi=dpi or fig.get_dpi())), photo=photo)
    return Shown(data, metadata={"alt": alt})  # `alt=` is unknown to IPython 7, which Colab has


def compact(source: Any, *, width: int = 2000, photo: bool = False) -> bytes:
    """A small picture of a file, at most `width` px: JPEG for photos, else PNG of 256 colours, a third as large."""
    picture, buffer = PIL.Image.open(source).convert("RGB"), io.BytesIO()
    picture.thumbnail((width, picture.height), PIL.Image.Resampling.LANCZOS)
    if not photo:  # the method that leaves a rare colour, of a small mark, nearly as it is
        picture = picture.quantize(256, PIL.Image.Quantize.MAXCOVERAGE, dither=PIL.Image.Dither.NONE)
    picture.save(buffer, "JPEG" if photo else "PNG", optimize=True, quality=85)
    return buffer.getvalue()


# ---- panels, heatmaps, bars ----------------------------------------------------------------------------------------


def _first_of(frame: pd.DataFrame) -> str:
    """What a picture of a model's first seed rests on, and how far it speaks for the others."""
    alike, seeds = pr.seeds_alike(frame), frame["seed"].nunique()
    agree = f", first of {seeds} seeds; all seeds agree on {(alike == seeds).mean():.0%}" if seeds > 1 else ", 1 seed"
    return f"n = {len(alike)} images{agree}"


def _rests_on(n: object, seeds: int = 0) -> str:  # 0 seeds: the first alone, however many there are
    return f"n = {n} images, {seeds or 'first'} seed{'s' if seeds > 1 else ''}"


def _parts(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A table's rows by dataset, under the dataset's title with its images and seeds."""
    parts = table.assign(seeds=table.get("seeds", 0)).groupby("dataset", sort=False)
    return {f"{name}\n{_rests_on(part['n'].max(), part['seeds'].max())}": part for name, part in parts}


def _panels(parts: Mapping[str, Any], height: float, columns: int = 3, **ratios: Any) -> Panels:
    """A figure of titled panels, `columns` in the width of a page, each `height` inches high; None leaves a gap."""
    shown, rows = min(len(parts), columns), -(-len(parts) // columns)
    fig = Figure(figsize=(max(COLUMN, FULL * shown / columns), height * rows), layout="constrained")
    places = zip(fig.add_gridspec(rows, shown, **ratios), parts.items(), strict=False)
    filled = ((place, *named) for place, named in places if named[1] is not None)
    return fig, [(fig.add_subplot(place, title=title.rstrip(" ")), part) for place, title, part in filled]


def _legend(fig: Figure, where: str = "lower", columns: int = 5) -> None:
    """One legend for all panels."""
    marks = {text: mark for ax in fig.axes for mark, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(marks.values(), marks.keys(), loc=f"outside {where} center", ncols=columns)


def _heatmap(ax: Axes, values: pd.DataFrame, notes: Any, cmap: str, low: float, high: float, bar: str = "") -> None:
    """Cells as colours between two values, with notes in them; `bar`: label of a colour bar."""
    look = {"vmin": low, "vmax": high, "cmap": cmap, "square": True, "linewidths": 0.5, "cbar": bool(bar)}
    legend = {"label": bar, "shrink": 0.7, "aspect": 25, "pad": 0.02}
    legend |= {"ticks": [low, (low + high) / 2, high], "format": "%.3g"}
    style = {"annot": notes, "fmt": "", "annot_kws": {"fontsize": NOTE, "linespacing": 1.0, "in_layout": False}}
    sns.heatmap(values, ax=ax, cbar_kws=legend, xticklabels=True, yticklabels=True, **look, **style)
    ax.collections[0].update_scalarmappable()
    shown = ax.collections[0].get_facecolors()[values.notna().to_numpy().ravel()]
    for text, color in zip(ax.texts, shown, strict=False):  # there may be no texts
        text.set_color("white" if relative_luminance(color) < 0.18 else "black")  # seaborn: white on middle grey
    ax.set_xticks(ax.get_xticks(), values.columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.tick_params(length=0)
    ax.tick_params("y", rotation=0)  # seaborn turns the names of a few rows, which then overlap


def _emotion_bars(table: pd.DataFrame, columns: Mapping[str, str], colors: Sequence[Any], xlabel: str) -> Panels:
    """A panel for each dataset with a level bar for each emotion, of the columns {column: name} in percent."""
    fig, panels = _panels(_parts(table), 0.75 + 0.17 * table.groupby("dataset").size().max())
    for ax, part in panels:
        shares = part[list(columns)].rename(columns=columns)
        shares = 100 * shares.div(shares.sum(axis=1), axis=0)
        shares.index = part["emotion"] + " (" + part["n"].astype(str) + ")"
        shares.plot.barh(stacked=True, ax=ax, color=colors, width=0.8, legend=False, ylabel="")
        ax.set(xlim=(0, 100), ylim=(len(part) - 0.4, -0.6))
        ax.axhline(0.5, color="white", linewidth=1.5)  # "all" stands apart
    fig.supxlabel(xlabel, fontsize=7)
    return fig, panels


def _level(ax: Axes, column: str, y: float, zoom: bool = False) -> None:
    """One of `LEVELS` as a line; with `zoom` one beyond the axis is a note at its edge instead."""
    low, high = ax.get_ylim()
    if zoom and not low < y < high:
        arrow, edge, side = ("↑", 1, "top") if y > high else ("↓", 0.02, "bottom")
        place = {"transform": ax.transAxes, "ha": "right", "va": side, "fontsize": NOTE}
        ax.text(1, edge, f"{LEVELS[column].removeprefix('always the ')}: {y:.1f} {arrow}", **place)
    else:
        ax.axhline(y, color="#777777", linestyle=LINES[column], linewidth=1, label=LEVELS[column], zorder=0)


def _levels(ax: Axes, levels: pd.DataFrame, dataset: str, zoom: bool = False) -> None:
    """What needs no knowledge, and the most that label noise allows: columns of `tables.main`."""
    for column in LINES:
        for y in levels.loc[levels["dataset"] == dataset, column].dropna().head(1):
            _level(ax, column, y, zoom)


def _accuracy_against(
    table: pd.DataFrame, levels: pd.DataFrame, column: str, xlabel: str, title: str, curves: Mapping[str, str]
) -> Figure:
    """Accuracies (`curves`: column -> model) against a column; a ring: as in the paper; `alpha`, if any, beside it."""
    fig, panels = _panels(_parts(table.dropna(subset=["ours", column])), 2.1)
    for ax, part in panels:
        part = part.sort_values(column).rename(columns={"ci_low": "ours_low", "ci_high": "ours_high"})
        for i, (value, model) in enumerate(curves.items()):
            errors = (part[[f"{value}_low", f"{value}_high"]].T - part[value]).abs()
            look = {"color": model_color(model), "markersize": 3, "capsize": 2, "label": model_name(model)}
            beside = 0.03 * i * np.ptp(part[column])  # or intervals would hide each other
            ax.errorbar(part[column] + beside, part[value], yerr=errors, fmt=("o-", "o-.")[i], **look)
        ring = {"mfc": "none", "mec": "#D55E00", "markersize": 8, "label": "as in the paper", "zorder": 3}
        ax.plot(column, "ours", "o", data=part[part["row"] == curves["ours"]], **ring)
        noted = part.reindex(columns=[column, "ours_low", "ours_high", "alpha"]).dropna()
        first = noted["ours_high"].head(2).is_monotonic_decreasing  # the higher of two close ones has its note above
        for i, (x, *ends, note) in enumerate(noted.to_numpy(), first):
            look = {"fontsize": NOTE, "ha": "center", "va": ("top", "bottom")[i % 2]}
            ax.annotate(f"{note:g}", (x, ends[i % 2]), (0, (-3, 3)[i % 2]), "data", "offset points", **look)
        ax.set(xlabel=xlabel, ylabel="accuracy, %")
        ax.margins(x=0.1, y=0.5)  # room for the notes at the edges
        _levels(ax, levels, part["dataset"].iloc[0], zoom=True)
    _legend(fig)
    fig.suptitle(title)
    return fig


# ---- confusion -----------------------------------------------------------------------------------------------------


def _confusion(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Counts, and percent of their row: rows = true, columns = answered, a last one for those without a label."""
    labels, answers = pr.prediction_labels(frame), frame["prediction"].replace("", UNPARSABLE)
    columns = [*labels, *({UNPARSABLE} & set(answers))]
    counts = pd.crosstab(frame["label"], answers).reindex(index=labels, columns=columns, fill_value=0)
    return counts, 100 * counts.div(counts.sum(axis=1).clip(lower=1), axis=0)


def _matrix(title: str, *cells: Any) -> Figure:
    fig, [(ax, cells)] = _panels({title: cells}, 3.0)
    _heatmap(ax, *cells)
    ax.set(xlabel="answer", ylabel="true emotion")
    return fig


@styled
def confusion(frame: pd.DataFrame, title: str) -> Figure:
    """Confusion matrix of the first seed of a prediction frame: row percent as colour, percent and counts as text."""
    counts, percent = _confusion(pr.first_seed(frame))
    notes = (percent.round().astype(int).astype(str) + "\n" + counts.astype(str)).where(counts > 0, "")
    title = f"{title}\n{_first_of(frame)}"
    fig = _matrix(title, percent, notes, "Blues", 0, 100, "% of the true emotion")
    fig.axes[0].set_xlabel("answer (above: %; below: images)")
    return fig


@styled
def confusion_difference(a: pd.DataFrame, b: pd.DataFrame, title: str) -> Figure:
    """Confusion matrix of a minus that of b, in percentage points of the true emotion, on their common images.

    Green-blue: a answers so more often than b; brown: less often. On the diagonal more is better, elsewhere
    less. A difference that rounds to zero has no number. Of several seeds the first is taken.
    """
    shared = set(a["image_id"]) & set(b["image_id"])
    (_, first), (_, second) = (_confusion(pr.first_seed(frame[frame["image_id"].isin(shared)])) for frame in (a, b))
    points = first.sub(second, fill_value=0.0).loc[first.index, max(first.columns, second.columns, key=len)]
    limit = max(1.0, float(points.abs().to_numpy().max()))
    digits = 0 if limit >= 3 else 1
    notes = points.map(f"{{:+.{digits}f}}".format).where(points.round(digits) != 0, "")
    title = f"{title}\nn = {len(shared)} images, first seed of each"
    return _matrix(title, points, notes, "BrBG", -limit, limit, "points")


# ---- who is right where --------------------------------------------------------------------------------------------


@styled
def complementarity_venn(table: pd.DataFrame) -> Figure:
    """Images that tuned VLM and ViT get right, two circles a dataset; `table`: output of `tables.complementarity`."""
    from matplotlib_venn import venn2

    parts = {}
    for title, part in _parts(table[table["emotion"] == "all"]).items():
        counts = part[[*SHARES]].iloc[0]
        texts = [f"{group}: {n} ({n / counts.sum():.1%})" for group, n in zip(SHARES.values(), counts, strict=True)]
        parts["\n".join([title, *texts])] = counts + 1e-9 * (not counts.iloc[:3].any())  # circles need some area
    fig, panels = _panels(parts, 2.6)
    colors, look = (model_color("vlm_tuned"), model_color("vit")), {"subset_label_formatter": "{:.0f}".format}
    for ax, (both, vlm, vit, _) in panels:
        venn2((vlm, vit, both), ("tuned VLM", "ViT"), colors, alpha=0.6, ax=ax, **look)
        for text in ax.texts:
            text.set_fontsize(NOTE)  # crescents may be narrow
    return fig


@styled
def complementarity_by_emotion(table: pd.DataFrame) -> Figure:
    """Share of images by emotion that both, one or none of tuned VLM and ViT get right, of the same table."""
    colors = ("#888888", model_color("vlm_tuned"), model_color("vit"), PALE)
    fig, panels = _emotion_bars(table, SHARES, colors, "% of the test images (in brackets: how many)")
    for bars in (bars for ax, _ in panels for bars in ax.containers):  # narrow ones have no room for a number
        bars[0].axes.bar_label(bars, fmt=lambda x: f"{x:.0f}" if x >= 8 else "", label_type="center", fontsize=NOTE)
    _legend(fig, "upper")
    return fig


@styled
def complementarity_upset(tables: Mapping[str, pd.DataFrame]) -> Figure | None:
    """Which of tuned VLM, ViT, head and EmoVLM-KD are right together: a bar for each combination and dataset.

    As in UpSet (Lex et al. 2014); `tables`: {dataset's title: output of `predictions.joint`}.
    """
    counts = pr.intersections(tables)
    if counts.empty:
        return None
    right = counts.index.to_frame(index=False)  # [combinations, models]
    ours = right.get("emovlmkd", [False] * len(right))
    parts = {f"{title}: {_rests_on(n)}": counts[title] for title, n in counts.sum().items()}
    heights = [*[1.0] * len(parts), 0.2 * right.shape[1] + 0.2]
    fig, panels = _panels({**parts, "": right}, np.mean(heights), 1, height_ratios=heights)
    for ax, column in panels[:-1]:
        colors = [model_color("emovlmkd") if hit else GREY for hit in ours]
        bars = ax.bar(np.arange(len(column)) + 0.5, 100 * column / max(1, column.sum()), color=colors)
        ax.bar_label(bars, column, fontsize=NOTE)
        ax.margins(y=0.2)
        ax.set(xlim=(0, len(column)), xticks=[], ylabel="%")
    hits, ax = right.rename(columns=model_name).T, panels[-1][0]
    _heatmap(ax, hits.astype(float), hits.replace({True: "✓", False: ""}), "Blues", 0, 2)
    ax.set(aspect="auto", xticks=[], xlabel="✓: the model is right; blue bars: EmoVLM-KD is right; numbers: images")
    return fig


@styled
def agreement(matrices: Mapping[str, pd.DataFrame], n: Mapping[str, int]) -> Figure | None:
    """Cohen's kappa between the answers of all models: {dataset's title: matrix} and {title: images}."""
    parts = {f"{title}\n{_rests_on(n[title])}": matrix for title, matrix in matrices.items() if len(matrix) > 1}
    if not parts:  # a single model agrees with nobody
        return None
    fig, panels = _panels(parts, 2.25)
    for ax, matrix in panels:
        lower = matrix.rename(index=model_name, columns=model_name).where(np.tri(len(matrix), k=-1, dtype=bool))
        lower = lower.iloc[1:, :-1]
        _heatmap(ax, lower, lower.map(lambda x: f"{x:z.2f}".replace("0.", ".")), "Blues", 0, 1)
    fig.suptitle("agreement between models (Cohen's kappa; the darker, the more alike; 1 = same answers)")
    return fig


# ---- what the gate learned -----------------------------------------------------------------------------------------


def lift(half: np.ndarray) -> np.ndarray:
    """How much an opinion for an emotion lifts it above the others: (C,) from a half of W (C, C); our summary.

    Column j is what an opinion for emotion j adds to every logit; what it adds to all alike, a softmax ignores.
    """
    return half.diagonal() - (half.sum(axis=0) - half.diagonal()) / max(1, len(half) - 1)


@styled
def gate_weights(weights: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> Figure:
    """The first seed's concat & linear gate: W and lift by emotion, {dataset's title: (labels, W of shape (C, 2C))}.

    The VLM's half meets a one-hot answer, the head's half probabilities, which are below 1: compare the
    halves' patterns rather than their sizes.
    """
    parts, colors = {}, (model_color("vlm_tuned"), model_color("head"))
    for title, (labels, matrix) in weights.items():
        columns = [f"{who}: {label}" for who in ("VLM", "head") for label in labels]
        parts[f"{title}: weights, first seed"] = pd.DataFrame(matrix, labels, columns)
        halves = zip(("tuned VLM's answer", "head's probability"), np.split(matrix, 2, axis=1), strict=True)
        parts[f"{title}: lift over the others"] = pd.DataFrame({name: lift(half) for name, half in halves}, labels)
    heights = [1.0 + 0.14 * len(labels) for labels, _ in weights.values()]
    fig, panels = _panels(parts, np.mean(heights), 2, height_ratios=heights, width_ratios=(1.9, 1))
    for (field, matrix), (bars, lifts) in zip(panels[::2], panels[1::2], strict=True):
        limit = float(matrix.abs().to_numpy().max())
        _heatmap(field, matrix, None, "BrBG", -limit, limit, "weight")
        field.set(aspect="auto", ylabel="logit of")
        lifts.plot.barh(ax=bars, color=colors, width=0.64, legend=False).invert_yaxis()
        bars.axvline(0, color="black", linewidth=0.6)
        bars.set_xlabel("lift, in logits")
    _legend(fig)
    return fig


@styled
def gate_trust(table: pd.DataFrame) -> Figure:
    """Where tuned VLM and head disagree: how often the gate followed whom, against how often each was right.

    The marks are where a gate would end that followed exactly whoever is right; `table`: of `tables.gate_trust`.
    """
    whom = {"followed_vlm": "followed the VLM", "followed_neither": "neither", "followed_head": "followed the head"}
    colors = (model_color("vlm_tuned"), PALE, model_color("head"))
    about = "% of the test images on which tuned VLM and head disagree (in brackets: how many)"
    fig, panels = _emotion_bars(table, whom, colors, about)
    look = {"facecolor": "white", "edgecolor": "black", "linewidth": 0.7, "zorder": 3, "clip_on": False}
    for ax, part in panels:  # of two emotions one is right: both marks at one place, the small one in the large one
        y, vlm, head = range(len(part)), part["vlm_right"], 100 - part["head_right"]
        ax.scatter(vlm, y, s=30, marker=MARKERS["vlm_tuned"], label="tuned VLM right (from the left)", **look)
        ax.scatter(head, y, s=10, marker=MARKERS["head"], label="head right (from the right)", **look)
    _legend(fig, "upper", 3)
    return fig


# ---- models as wholes ----------------------------------------------------------------------------------------------


@styled
def calibration(frames: Mapping[tuple[str, str], pd.DataFrame]) -> Figure:
    """Reliability diagrams (Guo et al. 2017) of {(dataset's title, model): prediction frame of one seed}.

    Below the diagonal a model is too sure of itself. Areas of the points are shares of the images.
    """
    parts = {
        f"{title}\n{model_name(model)}\nn = {len(frame)}, ECE {calibration_error(frame):.1f} %": (model, frame)
        for (title, model), frame in frames.items()
    }
    fig, panels = _panels(parts, 1.6, 4)
    for ax, (model, frame) in panels:
        x, y, n = (reliability(frame)[column] for column in ("confidence", "accuracy", "n"))
        ax.plot([0, 1], [0, 1], color="#777777", linestyle=":", linewidth=0.8)
        ax.vlines(x, x, y, color=GREY, linewidth=0.8)
        ax.plot(x, y, color=model_color(model), linewidth=0.8)
        look = {"edgecolor": "black", "linewidth": 0.4, "zorder": 3, "clip_on": False}
        ax.scatter(x, y, s=6 + 140 * n / n.sum(), color=model_color(model), **look)
        ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    fig.suptitle("calibration: accuracy (upwards) against confidence (to the right), 15 bins, first seed")
    return fig


@styled
def certainty(table: pd.DataFrame) -> Figure:
    """Mean probability of each model's own answer (`tables.label_distribution`), and the raters' share of theirs.

    A bar beyond the line: a model is surer than the raters agree.
    """
    fig, panels = _panels(_parts(table[table["row"].isin(MAIN)]), 1.7)
    for ax, part in panels:
        errors = (part[["surest_low", "surest_high"]].T - part["surest"]).abs().to_numpy()  # barh takes no frame
        ax.barh(part["name"], part["surest"], xerr=errors, color=part["row"].map(model_color), error_kw={"lw": 0.8})
        ax.axvline(part["raters_surest"].iloc[0], color="black", linewidth=1)
        ax.set(xlim=(0, 1), ylim=(len(part) - 0.4, -0.6))
    fig.suptitle("how sure: mean probability of the answer; line: the raters' share of their strongest emotion")
    return fig


@styled
def accuracy_cost(table: pd.DataFrame, levels: pd.DataFrame) -> Figure:
    """Accuracy (percent, with its interval) against parameters and against milliseconds per image.

    Columns of `table`: dataset (title), model, accuracy, low, high, n, seeds, parameters, ms_median, ms_low, ms_high;
    `levels`: of `tables.main`.
    """
    parts, units = _parts(table[table["model"].isin(MARKERS)]), EngFormatter(sep=" ")
    units.ENG_PREFIXES = {0: "", 3: "k", 6: "M", 9: "B"}
    costs = {"parameters": ("parameters",) * 3, "ms per image": ("ms_low", "ms_median", "ms_high")}
    below = {f"{title} ": part for title, part in parts.items()}
    fig, panels = _panels(parts | below, 2.05, len(parts))
    look = {"markeredgecolor": "black", "markeredgewidth": 0.4, "ecolor": "#777777"}
    for (ax, part), ((name, columns), _) in zip(panels, product(costs.items(), parts), strict=True):
        ax.title.set_fontsize(NOTE)  # five panels are narrow
        for row in part.to_dict("records"):
            (left, x, right), model, y = (row[column] for column in columns), row["model"], row["accuracy"]
            errors = {"xerr": [[x - left], [right - x]], "yerr": [[y - row["low"]], [row["high"] - y]]}
            style = {"color": model_color(model), "marker": MARKERS[model], "label": model_name(model)}
            above = {"zorder": 4, "markersize": 4} if model == "emovlmkd" else {"zorder": 3, "markersize": 5.5}
            ax.errorbar(x, y, **errors, **style, **look, **above, elinewidth=0.8, linestyle="")
        _levels(ax, levels, part["dataset"].iloc[0])
        ax.set(xscale="log", xlabel=name, ylabel="accuracy, %")
        narrow = part[columns[2]].max() < 30 * part[columns[0]].min()
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
        ax.xaxis.set_major_formatter(units)
        ax.xaxis.set_minor_formatter("")
    _legend(fig)
    return fig


@styled
def evidence(table: pd.DataFrame) -> Figure:
    """Accuracy by where the emotion of drawn pictures shows, and what the head gains there by its teacher.

    `table`: of `tables.evidence`; means over datasets with intervals, in the second panel also each dataset.
    """
    places = [kind for kind in ("content", "mood", "both", "all") if kind in set(table["evidence"])]
    whole = table[table["dataset"] == "all"].set_index(["row", "evidence"])
    about = f"n = {whole['n'].max()} images of {table['dataset'].nunique() - 1} datasets, {whole['seeds'].max()} seeds"
    titles = {f"right answers: {about}": "", "gain of the head by its teacher": ""}
    fig, [(left, _), (right, _)] = _panels(titles, 2.5, 2)
    models, gain = (*QUARTET, "average_vlm_head"), ("inherited", right, "mean over datasets", 0)
    marks = [(model, left, model_name(model), 0.15 * k - 0.3) for k, model in enumerate(models)]
    for row, ax, name, beside in [*marks, gain]:
        if row in set(table["row"]):
            part = whole.loc[row].loc[places]
            errors = (part[["ci_low", "ci_high"]].T - part["value"]).abs()
            look = {"color": model_color(row) or "black", "marker": MARKERS.get(row, "*" if ax is right else "_")}
            look |= {"markersize": 4, "linestyle": "", "capsize": 2, "elinewidth": 0.8, "zorder": 3, "label": name}
            ax.errorbar(np.arange(len(places)) + beside, part["value"], yerr=errors, **look)
    left.margins(y=0.15)
    for row in LINES:
        _level(left, row, whole.loc[(row, "all"), "value"], zoom=True)
    single = table[(table["row"] == "inherited") & (table["dataset"] != "all") & table["evidence"].isin(places)]
    right.plot(single["evidence"].map(places.index) + 0.22, single["value"], ".", color="#777777", label="one dataset")
    right.axhline(0, color="black", linewidth=0.6)
    for ax, ylabel in ((left, "accuracy, %"), (right, "points")):
        ax.set(xlim=(-0.5, len(places) - 0.5), xlabel="the emotion shows in", ylabel=ylabel)
        ax.set_xticks(range(len(places)), places)
    _legend(fig, columns=4)
    return fig


@styled
def alpha_tradeoff(table: pd.DataFrame, levels: pd.DataFrame) -> Figure:
    """Accuracy against KL(teacher || head), one point per alpha with its interval; one panel per dataset."""
    title = "weight of distillation: alpha beside each point"
    return _accuracy_against(table, levels, "kl", "KL from the teacher (nats)", title, {"ours": "head"})


@styled
def depth(table: pd.DataFrame, levels: pd.DataFrame) -> Figure:
    """Accuracy by the head's hidden layers, with intervals: gated, and the head alone; one panel per dataset."""
    table = table.assign(layers=table["name"].str.count(",") + 1).dropna(subset="ours")
    title, curves = "EmoVLM-KD by depth of its head, and that head alone", {"ours": "emovlmkd", "alone": "head"}
    return _accuracy_against(table, levels, "layers", "hidden layers", title, curves)


@styled
def training_curves(
    histories: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], chance: Collection[float] = ()
) -> Figure:
    """Training histories, seeds averaged: {(what was trained, dataset's title): rows of its `history.json`}.

    `chance`: percent of the datasets' most frequent emotions, lines in the panels of accuracy; the ceilings are far
    above all curves and left out. Datasets have colours that no model has.
    """
    frames = [pd.DataFrame(rows).assign(what=what, dataset=title) for (what, title), rows in histories.items()]
    history, parts = pd.concat([pd.DataFrame({"seed": []}), *frames]).fillna({"seed": 0}), {}
    for (what, split, metric), part in history.groupby(["what", "split", "metric"], sort=False):
        if metric == "loss" and len(parts) % 2:  # loss and accuracy stay side by side
            parts[" " * len(parts)] = None
        name = "tuned VLM (LoRA)" if what == "adapter" else model_name(what)
        parts[f"{name}\n{split} {metric}; seeds: {part['seed'].nunique()}"] = metric, part
    fig, panels = _panels(parts, 1.8, 4)
    datasets = history["dataset"].unique()
    order = {"hue_order": datasets, "style_order": datasets, "palette": sns.color_palette("rocket", len(datasets))}
    for ax, (metric, part) in panels:
        sns.lineplot(part, x="epoch", y="value", hue="dataset", style="dataset", errorbar=None, ax=ax, **order)
        ax.get_legend().remove()
        ax.set_ylabel({"accuracy": "accuracy, %"}.get(metric, metric))
        for i, y in enumerate(sorted({*chance}) if metric == "accuracy" else ()):
            _level(ax, "chance", y)
            place = {"transform": ax.get_yaxis_transform(), "va": "bottom" if i else "top", "fontsize": NOTE}
            ax.text(1.01, y, f"{y:.3g}", **place)
        if metric == "loss":  # L-shaped
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            ax.yaxis.set_minor_formatter("")
    _legend(fig, columns=3)
    return fig


# ---- pictures ------------------------------------------------------------------------------------------------------


@styled
def qualitative_examples(examples: pd.DataFrame, pictures: Sequence[np.ndarray], title: str, n: int) -> Figure:
    """Pictures with what tuned VLM, ViT and EmoVLM-KD say, by case (`predictions.CASES`).

    `examples`: of `predictions.select_examples`, from `n` images, perhaps with the emotion of a drawn one before label
    noise, `drawn_as`; (✓): such an answer where the label says otherwise. `pictures`: an (H, W, 3) array for each.
    """
    rows, parts = examples.to_dict("records"), {}
    for i, row in enumerate(rows):
        label, drawn = row["label"], row.get("drawn_as", row["label"])
        true = f"true: {label}" if drawn == label else f"label noise: {label},\ndrawn as {drawn}"
        parts[f"{CASES[row['case']]}\n{true}{' ' * i}"] = row | {"drawn_as": drawn}
    fig, panels = _panels(parts, 2.6, 4)
    for (ax, said), picture in zip(panels, pictures, strict=True):
        answers = {model_name(m): said[m] for m in ("vlm_tuned", "vit", "emovlmkd") if m in said}
        marks = {said["drawn_as"]: "(✓)", said["label"]: "✓"}
        lines = [f"{marks.get(a, '✗')} {name}: {a or UNPARSABLE}" for name, a in answers.items()]
        ax.imshow(picture)
        ax.set(xticks=[], yticks=[])
        for i, line in enumerate(lines):  # as one text, lines with high characters would stand apart
            ax.annotate(line, (0, 0), (0, -9 - 8.5 * i), "axes fraction", "offset points", fontsize=NOTE + 0.5)
    missing = [name for case, name in CASES.items() if case not in set(examples["case"])]
    about = f"{title}: chosen by rule from {_rests_on(n)}" + "".join(f"; no {m}" for m in missing)
    odd = any(text.get_text().startswith("(") for ax in fig.axes for text in ax.texts)
    fig.suptitle(about + "\n(✓): as drawn, though the label says otherwise" * odd)
    return fig


@styled
def answer_bars(
    picture: PIL.Image.Image, answers: Mapping[str, Mapping[str, float]], truth: str = "", title: str = ""
) -> Figure:
    """A picture beside each model's probabilities, in the model's colour: its answer is outlined.

    `answers`: model (of `predictions.MODELS`, or any name) -> emotion -> probability. `truth`: what the label says, if
    anything; a triangle points at it, with a tick where a model says the same, else a cross.
    """
    labels, parts = list(next(iter(answers.values()))), {}
    for model, p in answers.items():
        best = max(p, key=p.get)
        mark = "" if not truth else " ✓" if best == truth else " ✗"
        parts[f"{model_name(model)}\n{best}{mark}"] = model, pd.Series(p, labels)
    about, height = {f"the label says:\n{truth} ◂" if truth else "": ""}, 0.8 + 0.16 * len(labels)
    fig, [(first, _), *panels] = _panels({**about, **parts}, height, 1 + len(parts))
    first.imshow(picture)
    first.set_axis_off()
    for ax, (model, p) in panels:
        bars = ax.barh(p.index, p, color=model_color(model) or GREY, alpha=0.5)
        bars[p.argmax()].set(alpha=1, edgecolor="black", linewidth=0.8)
        if truth in labels:
            ax.plot(1, labels.index(truth), "k<", markersize=3.5, clip_on=False)
        ax.set(xlim=(0, 1), ylim=(len(labels) - 0.5, -0.5))
        ax.set_xticks([0, 0.5, 1], ["0", "50", "100 %"])
        ax.tick_params(axis="y", length=0, labelleft=ax is panels[0][0])
    fig.suptitle(title)
    return fig
