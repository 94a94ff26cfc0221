"""A table as text for people: cells, Markdown for pages, LaTeX for papers.

Names and texts are data: nothing in a cell becomes markup, a formula or a link in either form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "flat",
    "format_value",
    "is_number",
    "latex",
    "markdown",
    "numeric_columns",
    "plain_caption",
    "readable",
    "text_rows",
]

_NUMBER = re.compile(r"[-+\u2212]?[\d,]*\.?\d+(e[-+]?\d+)?( ?%)?([\s\u00a0]*\[[^\[\]]*\])?")  # 58.3 [54.5, 62.1]
_LONG = 36  # characters from which a column of LaTeX is a paragraph
_LINE = 95  # characters that a page of LaTeX holds in a line; a wider table is scaled


def format_value(value: Any) -> str:
    """A table cell for people: four significant digits, nothing for a missing value."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, float) or type(value).__name__.startswith("float"):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1e4:
        return f"{value:,}"
    return str(value)


def is_number(text: str) -> bool:
    """Whether a cell reads as a number, with or without its interval."""
    return _NUMBER.fullmatch(text.strip()) is not None


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """A table as people read it: a result table (rows: model x dataset) gets one row per model."""
    from pandas.api.types import is_numeric_dtype

    if {"name", "dataset", "paper", "ours", "ci_low"} <= set(frame.columns):
        from emonb.tables import display

        texts = {c: frame[c].fillna("") for c in frame.columns if not is_numeric_dtype(frame[c])}
        measured = {c: frame[c].astype(float) for c in ("paper", "ours", "ci_low", "ci_high")}
        # beside the accuracy only what the table is about: a page of paper is narrow, the CSV has all
        more = ["kl"] if "kl" in frame else ["gain"] if "agreement" in frame else []
        frame = display(frame.assign(**{**texts, **measured}), columns=more).rename_axis(index="model")
        frame = frame.loc[:, (frame != "").any()]  # datasets of which the paper reports nothing
    elif {"claim", "statement", "dataset", "verdict", "value", "ci_low"} <= set(frame.columns):
        cells = [_judged(row) for row in frame.to_dict("records")]
        wide = frame.assign(cell=cells).pivot(index=["claim", "statement"], columns="dataset", values="cell")
        frame = wide[list(dict.fromkeys(frame["dataset"]))].fillna("")
    return flat(frame)


def flat(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame whose index, if it means something, is columns."""
    import pandas as pd

    return frame if isinstance(frame.index, pd.RangeIndex) else frame.reset_index()


def markdown(frame: pd.DataFrame, caption: str) -> str:
    """A GitHub table in columns of equal width: numbers to the right, texts to the left; the caption in bold above."""
    head = [" ".join(filter(None, c)) if isinstance(c, tuple) else str(c) for c in frame.columns]
    rows = text_rows(frame)
    right = numeric_columns(rows, len(head))
    cells = [[_quoted(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    lines = [f"**{_quoted(caption)}**\n"] if caption else []
    for row in (cells[0], rule, *cells[1:]):
        texts = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True)]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def plain_caption(text: str) -> str:
    """The caption of a table written by `markdown`, as it was given; "" where there is none."""
    first = text.split("\n", 1)[0]
    bold = first.startswith("**") and first.endswith("**") and len(first) > 4
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", first[2:-2]) if bold else ""


def latex(frame: pd.DataFrame, id: str, caption: str) -> str:
    r"""A booktabs table for pdflatex: numbers to the right, a rule under each group of columns.

    Long texts are paragraphs; a table wider than a page is scaled to it (graphicx).
    """
    columns = [column if isinstance(column, tuple) else (str(column),) for column in frame.columns]
    rows = text_rows(frame)
    right = numeric_columns(rows, len(columns))
    heads = [column[-1] or column[0] for column in columns]
    widest = [max(len(h), *(len(row[i]) for row in rows)) if rows else len(h) for i, h in enumerate(heads)]
    kinds = ["r" if r else f"p{{{_paragraph(w)}em}}" if w > _LONG else "l" for r, w in zip(right, widest, strict=True)]
    wide = sum(min(w, 30) for w in widest) + 2 * len(widest) > _LINE
    body = [_line(row) for row in rows]
    table = [
        rf"\begin{{tabular}}{{{''.join(kinds)}}}",
        r"\toprule",
        *_groups(columns),
        _line([*heads], [r"\multicolumn{1}{c}{%s}" if r else "%s" for r in right]),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(
        [
            r"% \usepackage{booktabs}" + (r", \usepackage{graphicx}" if wide else ""),
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(caption)}}}\label{{tab:{re.sub('[^A-Za-z0-9:-]', '-', id)}}}",
            *([r"\resizebox{\linewidth}{!}{%", *table[:-1], r"\end{tabular}}"] if wide else table),
            r"\end{table}",
            "",
        ]
    )


def _judged(row: dict[str, Any]) -> str:
    value, low, high = (format_value(row[key]) for key in ("value", "ci_low", "ci_high"))
    return str(row["verdict"]) + (f": {value}" if value else "") + (f" [{low}, {high}]" if low else "")


def text_rows(frame: pd.DataFrame) -> list[list[str]]:
    """The cells as people read them."""
    return [[format_value(value) for value in row] for row in frame.itertuples(index=False, name=None)]


def numeric_columns(rows: Sequence[Sequence[str]], columns: int) -> list[bool]:
    """Which columns hold numbers only; an empty column is none, nor are names like [1024]."""
    parts = [[row[i] for row in rows if row[i]] for i in range(columns)]
    return [bool(cells) and all(map(is_number, cells)) for cells in parts]


def _quoted(text: str) -> str:
    """A cell of Markdown: no markup, no formula, no link, one line."""
    text = _one_line(text)
    text = re.sub(r"[\\|`*<$]", r"\\\g<0>", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])|\](?=\()|!(?=\[)", r"\\\g<0>", text)


_SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "\u00a0": "~", "\u2026": r"\ldots{}",
    "\u2212": "$-$", "\u00d7": r"$\times$", "\u2264": r"$\leq$", "\u2265": r"$\geq$", "\u03b1": r"$\alpha$",
    "\u03c4": r"$\tau$", "\u2713": r"$\surd$",
}  # fmt: skip
_TEX = str.maketrans(_SPECIAL)


def _tex(text: str) -> str:
    return _one_line(text).translate(_TEX)


def _one_line(text: str) -> str:
    return re.sub(r"[^\S\u00a0]+|[\x00-\x1f\x7f]+", " ", text)


def _line(cells: Sequence[str], frames: Sequence[str] | None = None) -> str:
    texts = [_tex(cell) for cell in cells]
    if frames is None:
        texts = [f"$-${t[1:]}" if t.startswith("-") and is_number(c) else t for t, c in zip(texts, cells, strict=True)]
    else:
        texts = [frame.replace("%s", text) for frame, text in zip(frames, texts, strict=True)]
    if texts and texts[0][:1] in ("[", "*"):  # behind \\ or \midrule it would be read as their argument
        texts[0] = f"{{{texts[0][0]}}}{texts[0][1:]}"
    return " & ".join(texts) + r" \\"


def _paragraph(width: int) -> int:
    """Width in em of a column of long texts."""
    return 10 if width < 60 else 15


def _groups(columns: Sequence[tuple[str, ...]]) -> list[str]:
    """The line above the heads and its rules, where columns come in groups."""
    if max(map(len, columns), default=1) < 2:
        return []
    cells, rules, at = [], [], 1
    for group, members in groupby(columns, key=lambda column: (column[0], column[-1] == "")):
        width = len(list(members))
        cells.append("" if group[1] else rf"\multicolumn{{{width}}}{{c}}{{{_tex(group[0])}}}")
        rules += [] if group[1] else [rf"\cmidrule(lr){{{at}-{at + width - 1}}}"]
        at += width
    return [" & ".join(cells) + r" \\", " ".join(rules)]
