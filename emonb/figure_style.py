"""One look for all figures: colours, font sizes, widths on a printed page, and text that is never mathtext.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; a model has the same colour
and the same mark in every figure. Figures are drawn at the width at which a two-column paper prints them.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text

from emonb.complementarity import GROUPS

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

__all__ = [
    "COLUMN",
    "FULL",
    "GREY",
    "GROUP_COLORS",
    "MODEL_COLORS",
    "MODEL_MARKERS",
    "NOTE",
    "OKABE_ITO",
    "as_image",
    "basis",
    "cell_notes",
    "empty",
    "panels",
    "short_number",
    "styled",
    "tight_box",
    "turned",
]

COLUMN, FULL = 3.3, 7.0  # inches: one column and both of a two-column page (CVPR: 3.25 and 6.875)
NOTE = 6.0  # points: the smallest text anywhere, at these widths
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
GREY = "#BBBBBB"
MODEL_COLORS = {
    "vlm_zero_shot": "#F0E442",
    "vlm_tuned": "#E69F00",
    "vit": "#56B4E9",
    "resnet": "#CC79A7",
    "vgg": "#999999",
    "head": "#009E73",
    "emovlmkd": "#0072B2",
}
MODEL_MARKERS = dict(zip(MODEL_COLORS, "vDsP^oX", strict=True))  # the model is told by shape, too
GROUP_COLORS = dict(zip(GROUPS, ("#888888", MODEL_COLORS["vlm_tuned"], MODEL_COLORS["vit"], "#E4E4E4"), strict=True))
_STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "figure.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "text.parse_math": False,  # a name is no formula
    "figure.dpi": 120,  # in notebooks, which stay below 1 MB; saved figures: 150
    "savefig.dpi": 150,
}


def styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw within the common style; names of data ("$x$") are shown as they are, tick labels included."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(_STYLE):
            fig = function(*args, **kwargs)
            for text in fig.findobj(Text):  # an axis made its first ticks here; later ones are numbers
                text.set_parse_math(False)
            _lay_out(fig)
        return fig

    return wrapper


def _lay_out(fig: Figure) -> None:
    """Find the places of the axes once: an engine would do it again for each drawing, twice for each format."""
    engine = fig.get_layout_engine()
    if engine is not None:
        engine.execute(fig)
        fig.set_layout_engine(None)  # "none" would leave one that asks for a drawing before each file


def tight_box(fig: Figure) -> Bbox:
    """The part of a figure that is not empty, in inches: `bbox_inches="tight"` would draw it again for each format."""
    _lay_out(fig)
    fig.draw_without_rendering()
    return fig.get_tightbbox().padded(matplotlib.rcParams["savefig.pad_inches"])


def as_image(fig: Figure, alt: str, *, dpi: float | None = None, photo: bool = False) -> Image:
    """A figure as a small output of a notebook: JPEG for photos, else PNG of 128 colours.

    Args:
        alt: what it shows, for people who cannot see it.
        dpi: pixels per inch; default: the figure's own.
    """
    import PIL.Image
    from IPython.display import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi or fig.get_dpi(), bbox_inches=tight_box(fig))
    picture = PIL.Image.open(buffer).convert("RGB")
    if photo:
        picture.save(small, "JPEG", quality=85)
    else:
        picture.quantize(128, dither=PIL.Image.Dither.NONE).save(small, "PNG", optimize=True)
    return Image(small.getvalue(), alt=alt)


def panels(n: int, height: float, columns: int = 3, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of both columns' width with n panels, `columns` in a row, each `height` inches high."""
    rows = -(-n // columns) or 1
    shown = max(1, min(n, columns))
    fig = Figure(figsize=(max(COLUMN, FULL * shown / columns), height * rows), layout="constrained")
    axes = list(np.ravel(fig.subplots(rows, shown, squeeze=False, **options)))
    for spare in axes[n:]:
        spare.set_axis_off()
    return fig, axes[:n]


def empty() -> Figure:
    """What a figure is of which this run has nothing: a run with failed models keeps all others."""
    fig = Figure(figsize=(COLUMN, 0.6))
    fig.text(0.5, 0.5, "this run has no predictions for this figure", ha="center", va="center")
    return fig


def basis(n: object, seeds: object) -> str:
    """What a picture rests on, for its title."""
    return f"n = {n} images, {seeds} seed{'' if seeds == 1 else 's'}"


def cell_notes(ax: Axes, notes: np.ndarray, dark: np.ndarray) -> None:
    """Texts (R, C) in the cells of a heatmap; white where `dark` (R, C). One Text a cell, left out of the layout."""
    for row, column in zip(*np.nonzero(notes != ""), strict=True):
        ink = "white" if dark[row, column] else "black"
        where = {"ha": "center", "va": "center", "in_layout": False}
        ax.text(column + 0.5, row + 0.5, notes[row, column], color=ink, fontsize=NOTE, linespacing=1.0, **where)


def turned(ax: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Names beside the cells of a heatmap: columns slanted, rows level, no tick marks."""
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows, rotation=0)
    ax.tick_params(length=0)


def short_number(value: float, _position: object = None) -> str:
    """1,500,000 as "1.5 M", for axes and labels."""
    for size, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
