"""Tables, claims and the headline chart of the report as HTML; every name in them is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd

from emonb.table_text import numeric_columns, text_rows

__all__ = ["VERDICTS", "boxed", "claims_html", "headline_chart", "plain_table", "result_table", "verdict_counts"]

VERDICTS = {"holds": ("holds", "\u2713"), "does not hold": ("fails", "\u2715"), "undecided": ("open", "?")}
_OWN = "emovlmkd"
_DOTS = (("vlm_tuned", "VLM, tuned"), ("vit", "ViT"), ("head", "distilled head"), (_OWN, "EmoVLM-KD"))


def plain_table(frame: pd.DataFrame) -> str:
    """Any frame: numbers to the right, texts to the left, the first column stays when the box scrolls."""
    rows = text_rows(frame)
    columns = [str(column) for column in frame.columns]
    right = numeric_columns(rows, len(columns))
    head = "".join(
        f"<th scope=col{' class=n' if r else ''}>{escape(c.replace('_', ' '))}</th>"
        for c, r in zip(columns, right, strict=True)
    )
    lines = []
    for row in rows:
        cells = [
            f"<th scope=row>{escape(text)}</th>" if i == 0 else f"<td{_kind(text, right[i])}>{escape(text)}</td>"
            for i, text in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return boxed(f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>", many=len(columns) > 12)


def result_table(frame: pd.DataFrame) -> str:
    """A result table (rows: model x dataset): per dataset the paper's value, ours with its interval, gain or kl."""
    datasets = list(dict.fromkeys(frame["dataset"].astype(str)))
    extras = [c for c in ("gain", "kl") if c in frame and frame[c].notna().any()]
    groups: list[tuple[str, list[str]]] = []
    for dataset in datasets:
        part = frame[frame["dataset"].astype(str) == dataset]
        shown = ["paper"] if part["paper"].notna().any() else []
        groups.append((dataset, [*shown, "ours", *extras]))
    titles = {
        str(row["dataset"]): row["paper_dataset"]
        for row in frame.to_dict("records")
        if isinstance(row.get("paper_dataset"), str)
    }
    first = "".join(f"<th scope=colgroup colspan={len(c)} class=g>{escape(d)}</th>" for d, c in groups)
    second = "".join(
        f"<th scope=col class='n{' g' if i == 0 else ''}'>{_paper_head(titles.get(d, '')) if c == 'paper' else c}</th>"
        for d, columns in groups
        for i, c in enumerate(columns)
    )
    head = f"<thead><tr><th rowspan=2 scope=col>model</th>{first}</tr><tr>{second}</tr></thead>"
    rivals = frame[frame["row"] != "oracle"]
    best = {d: part["ours"].max() for d, part in rivals.groupby(rivals["dataset"].astype(str))}
    cells = {(str(r["name"]), str(r["dataset"])): r for r in frame.to_dict("records")}
    lines = []
    for name in dict.fromkeys(frame["name"].astype(str)):
        records = {d: cells.get((name, d), {}) for d in datasets}
        own = any(r.get("row") == _OWN for r in records.values())
        line = "".join(
            _result_cell(records[d], c, best.get(d), first=i == 0) for d, shown in groups for i, c in enumerate(shown)
        )
        lines.append(f"<tr{' class=own' if own else ''}><th scope=row>{escape(name)}</th>{line}</tr>")
    return boxed(f"{head}<tbody>{''.join(lines)}</tbody>")


def _paper_head(dataset: str) -> str:
    return "paper" + (f" <span class=ci>({escape(dataset)})</span>" if dataset else "")


def _result_cell(record: Mapping[str, Any], column: str, best: float | None, *, first: bool) -> str:
    group = " g" if first else ""
    value = _number(record.get(column))
    if value is None:
        return f"<td class='n{group}'></td>"
    if column == "paper":
        return f"<td class='n paper{group}'>{value:.2f}</td>"
    digits, ends = {"ours": (".1f", ("ci_low", "ci_high")), "gain": ("+.1f", ("gain_low", "gain_high"))}.get(
        column, (".3g", (f"{column}_low", f"{column}_high"))
    )
    low, high = (_number(record.get(end)) for end in ends)
    text = f"{value:{digits}}"
    if column == "ours" and best is not None and value == best and record.get("row") != "oracle":
        text = f"<b>{text}</b>"
    interval = "" if low is None or high is None else f" <span class=ci>[{low:{digits}}, {high:{digits}}]</span>"
    return f"<td class='n{group}'>{text}{interval}</td>"


def claims_html(frame: pd.DataFrame) -> str:
    """A card for each claim: the verdict over all datasets, what decided it, and the verdict on each dataset."""
    cards = []
    for claim, part in frame.groupby("claim", sort=False):
        whole = part[part["dataset"] == "all"]
        row = (whole if len(whole) else part).iloc[0].to_dict()
        single = part[part["dataset"] != "all"]
        kind, _ = _verdict(row["verdict"])
        numbers = _judged(row)
        decided = str(row.get("decided_by") or "")
        cards.append(
            f"<article class='card claim {kind}'><header><span class=id>{escape(str(claim))}</span>"
            f"{_pill(row['verdict'])}</header><h3>{escape(str(row['statement']))}</h3>"
            f"<p class=decided><b>{escape(numbers)}</b> {escape(decided)}</p>{_by_dataset(single)}"
            f"{_rule(row, single)}</article>"
        )
    return f"<div class=cards>{''.join(cards)}</div>"


def verdict_counts(frame: pd.DataFrame) -> str:
    """How many claims hold, do not, or are undecided over all datasets, as pills."""
    found = frame.loc[frame["dataset"] == "all", "verdict"].astype(str)
    counts = [(verdict, int((found == verdict).sum())) for verdict in VERDICTS]
    return " ".join(_pill(verdict, n) for verdict, n in counts if n)


def headline_chart(frame: pd.DataFrame) -> str:
    """Accuracy of VLM, ViT, head and EmoVLM-KD with intervals, a band for each dataset; "" without numbers."""
    frame = frame[frame["ours"].notna() & frame["row"].isin([row for row, _ in _DOTS])]
    datasets = list(dict.fromkeys(frame["dataset"].astype(str)))
    if frame.empty:
        return ""
    low = 10 * math.floor(frame[["ci_low", "ours"]].min().min() / 10)
    high = max(low + 10, 10 * math.ceil(frame[["ci_high", "ours"]].max().max() / 10))

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    grid = "".join(f"<i style='left:{at(tick)}'></i>" for tick in range(low, high + 1, 10))
    bands = []
    for dataset in datasets:
        lines = []
        for k, (model, name) in enumerate(_DOTS):
            rows = frame[(frame["dataset"].astype(str) == dataset) & (frame["row"] == model)]
            for row in rows.head(1).to_dict("records"):
                said = f"{name}: {row['ours']:.1f} % [{row['ci_low']:.1f}, {row['ci_high']:.1f}]"
                bar = f"left:{at(row['ci_low'])};right:calc(100% - {at(row['ci_high'])})"
                lines.append(
                    f"<div class='line m{k}' title='{escape(said, quote=True)}'><s style='{bar}'></s>"
                    f"<span style='left:{at(row['ours'])}'>{_MARKS[k]}</span></div>"
                )
        bands.append(f"<div class=band><b>{escape(dataset)}</b><div class=track>{grid}{''.join(lines)}</div></div>")
    ticks = "".join(f"<span style='left:{at(tick)}'>{tick}</span>" for tick in range(low, high + 1, 10))
    legend = "".join(
        f"<span class=m{k}>{_MARKS[k]}<em>{escape(name)}</em></span>" for k, (_, name) in enumerate(_DOTS)
    )
    models = ", ".join(name for _, name in _DOTS)
    said = f"Accuracy with intervals of {models} on {', '.join(datasets)}; the table below has the numbers"
    return (
        f"<figure class=chart><div class=legend>{legend}</div><div role=img aria-label='{escape(said, quote=True)}'>"
        f"{''.join(bands)}<div class='band axis'><b></b><div class=track>{ticks}</div></div></div>"
        "<figcaption>Ours: accuracy on test images in percent; bars are intervals over images.</figcaption></figure>"
    )


_MARKS = [
    f"<svg viewBox='-7 -7 14 14' aria-hidden=true>{shape}</svg>"
    for shape in (
        "<rect x=-4.5 y=-4.5 width=9 height=9 />",
        "<polygon points='0,-5.5 5.5,4.5 -5.5,4.5' />",
        "<polygon points='0,-6 6,0 0,6 -6,0' />",
        "<circle r=5.5 />",
    )
]  # a shape for each model, so that colour is not the only difference


def boxed(rows: str, *, many: bool = False) -> str:
    """A table in its own scrolling box; one of many columns is printed smaller."""
    return f"<div class='wide{' many' if many else ''}' tabindex=0><table>{rows}</table></div>"


def _kind(text: str, right: bool) -> str:
    verdict = VERDICTS.get(text)
    return f" class='v {verdict[0]}'" if verdict else " class=n" if right else ""


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _verdict(value: Any) -> tuple[str, str]:
    return VERDICTS.get(str(value), ("open", "?"))


def _pill(value: Any, count: int | None = None) -> str:
    kind, mark = _verdict(value)
    number = "" if count is None else f": {count}"
    return f"<span class='pill {kind}'><span aria-hidden=true>{mark}</span> {escape(str(value))}{number}</span>"


def _judged(row: Mapping[str, Any]) -> str:
    value, low, high = (_number(row.get(key)) for key in ("value", "ci_low", "ci_high"))
    if value is None:
        return ""
    largest = max(abs(number) for number in (value, low or 0.0, high or 0.0))
    digits = ".1f" if largest >= 1 else ".3f"
    return f"{value:{digits}}" + ("" if low is None or high is None else f" [{low:{digits}}, {high:{digits}}]")


def _by_dataset(part: pd.DataFrame) -> str:
    lines = []
    for row in part.to_dict("records"):
        kind, mark = _verdict(row["verdict"])
        lines.append(
            f"<li class={kind}><span aria-hidden=true>{mark}</span> {escape(str(row['dataset']))} "
            f"<span class=word>{escape(str(row['verdict']))}</span> <span class=ci>{escape(_judged(row))}</span></li>"
        )
    return f"<ul class=sets>{''.join(lines)}</ul>" if lines else ""


def _rule(row: Mapping[str, Any], part: pd.DataFrame) -> str:
    facts: Sequence[str] = [
        f"n = {int(n)}" if (n := _number(row.get("n"))) is not None else "",
        f"seeds: {int(s)}" if (s := _number(row.get("seeds"))) is not None else "",
    ]
    rule, told = row.get("rule"), ", ".join(filter(None, facts))
    if not isinstance(rule, str) and not told:
        return ""
    text = f"Rule: {rule}. " if isinstance(rule, str) else ""
    return f"<p class=rule>{escape(text)}{escape(told)}</p>"
