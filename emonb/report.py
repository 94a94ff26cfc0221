"""The report that opens from disk: `index.html`, one page with everything inside that is needed to read it.

Tables, claims, figures and the explorer are in the page; a content security policy forbids it to ask for anything.
Whatever the results folder lacks is said at the top, and everything that is there is shown.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from html import escape
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from emonb.errors import EmonbError
from emonb.explorer import explorer_html
from emonb.paper_values import is_drawn
from emonb.report_figures import figure_html
from emonb.report_head import hero, notebooks_html
from emonb.report_read import Results, one_line, read_results
from emonb.report_site import TABLE_FILES, file_links, write_site
from emonb.report_tables import claims_html, headline_chart, plain_table, result_table
from emonb.report_words import SECTIONS, TABLES, Section, Words
from emonb.store import atomic_write
from emonb.triplet_tables import source_note

__all__ = ["DRAWN_NOTE", "write_report"]

DRAWN_NOTE = (
    "The mini-* datasets are drawn by a program and only stand for the paper's datasets: their accuracies are "
    "not comparable with the paper's. What can be compared is the mechanism: which model gains over which."
)
_PICTURES = 4000  # thumbnails of all datasets together: about 6 MB
_ALONE = ("main", "claims", "departures")  # their section is called as they are
_LONG = 24  # rows from which a table is folded


def write_report(out: Path, results: Results | None = None) -> Path:
    """Write `site/*.html` and `index.html` of a results folder; what is missing or damaged is said in the page.

    Equal results give equal bytes.

    Args:
        out: the results folder.
        results: what `read_results` has found in it; default: read here.

    Returns:
        The path of `index.html`.

    Raises:
        OSError: the folder cannot be written to. Nothing inside it is an error.
    """
    results = results or read_results(out)
    notes = _notes(results)
    results.problems += write_site(out, " ".join(notes))
    page = _Page(results)
    sections = [(section, html) for section in SECTIONS if (html := page.section(section))]
    toc = "".join(f"<li><a href='#{s.id}'>{escape(s.title)}</a></li>" for s, _ in sections)
    body = (
        "<a class=skip href='#main'>Skip to the results</a><div class=layout>"
        f"{page.safe('the head of the page', lambda: hero(results, notes))}"
        f"<nav class=toc aria-label=Contents><b>Contents</b><ul>{toc}</ul></nav><main id=main>"
        + "".join(f"<section id={s.id}><h2>{escape(s.title)}</h2>{html}</section>" for s, html in sections)
        + "</main></div>"
    )
    atomic_write(out / "index.html", _document(results, body))
    return out / "index.html"


class _Page:
    """Builds the sections; every table and figure is shown once."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.shown: set[str] = set()

    def safe(self, what: str, build: Callable[[], str]) -> str:
        """What `build` makes; if damaged contents make it fail, a problem at the top instead of no page."""
        try:
            return build()
        except Exception as error:
            self.results.problems.append(f"{what} cannot be shown: {type(error).__name__}: {one_line(error)}")
            return ""

    def section(self, section: Section) -> str:
        """The inside of a section, "" where nothing of it is there."""
        if section.id == "explorer":
            return self.safe("the explorer", self.explorer)
        if section.id == "files":
            return self.safe("the list of files", lambda: notebooks_html(self.results))
        html, figures = [], []
        for part in section.parts:
            kind, _, pattern = part.partition(":")
            known = self.results.tables if kind == "table" else self.results.figures
            ids = [i for i in known if fnmatchcase(i, pattern) and f"{kind}:{i}" not in self.shown]
            if kind == "figure" and pattern == "confusion_*":
                html += [self.figures(figures), self.matrices(ids)]
                figures = []
            elif kind == "figure":
                self.shown |= {f"figure:{i}" for i in ids}
                figures += ids
            else:
                html += [self.figures(figures), *(self.table(i) for i in ids)]
                figures = []
        html.append(self.figures(figures))
        text = f"<p class=soft>{escape(section.text)}</p>" if section.text else ""
        return text + "".join(html) if any(html) else ""

    def figures(self, ids: list[str]) -> str:
        """Figures side by side."""
        paths = self.results.figures
        html = [self.safe(f"figure {i}", lambda i=i: figure_html(paths[i], _how_many(self.results, i))) for i in ids]
        html = [figure for figure in html if figure]
        return f"<div class=figures>{''.join(html)}</div>" if html else ""

    def matrices(self, ids: list[str]) -> str:
        """Confusion matrices, folded: a group for each dataset."""
        html = []
        groups = {d: [i for i in ids if i.startswith(f"confusion_{d}_")] for d in self.results.datasets}
        rest = [i for i in ids if not any(i in group for group in groups.values())]
        for title, group in [*groups.items(), ("others", rest)]:
            self.shown |= {f"figure:{i}" for i in group}
            shown = self.figures(_by_model(group))
            if shown:
                html.append(
                    f"<details><summary>Confusion matrices: {escape(title)} ({len(group)})</summary>{shown}</details>"
                )
        return "".join(html)

    def table(self, id: str) -> str:
        """A table with title, caption and links to its files."""
        self.shown.add(f"table:{id}")
        return self.safe(f"table {id}", lambda: self._table(id))

    def _table(self, id: str) -> str:
        frame, words = self.results.tables[id], TABLES.get(id, Words(f"Table {id.replace('_', ' ')}"))
        chart = ""
        if {"row", "name", "dataset", "paper", "ours", "ci_low", "ci_high"} <= set(frame.columns):
            body = result_table(frame)
            chart = self.safe("the chart of the main result", self.chart) if id == "main" else ""
        elif id == "claims":
            body = claims_html(frame)
        else:
            body = plain_table(frame.drop(columns="model") if {"model", "name"} <= set(frame.columns) else frame)
        links = file_links(self.results.out, "tables", id, TABLE_FILES)
        caption = " ".join(filter(None, [words.text, self.results.caption(id)]))
        inside = f"<p class=caption>{escape(caption)}</p>{chart}{body}"
        told = "" if id in _ALONE else escape(words.title)
        head = f"<span>{told}</span><span class=files>{links}</span>"
        if len(frame) > _LONG and body.count("<tr") > _LONG:
            return (
                f"<details id='table-{quote(id)}'><summary>{escape(words.title)} ({len(frame)} rows)</summary>"
                f"<p class=files>{links}</p>{inside}</details>"
            )
        return f"<div class=block id='table-{quote(id)}'><h3>{head}</h3>{inside}</div>"

    def chart(self) -> str:
        """The main result as a picture, with the head, which the paper's main table does not have."""
        tables = [self.results.tables["main"]]
        if "modules" in self.results.tables and "row" in (modules := self.results.tables["modules"]).columns:
            tables.append(modules[modules["row"] == "head"])
        return headline_chart(pd.concat(tables, ignore_index=True))

    def explorer(self) -> str:
        """The clickable confusion matrices; datasets that it cannot show are left out and named."""
        predictions = self.results.predictions
        names = [d for d in self.results.datasets if predictions and any(name == d for name, _ in predictions)]
        html = None
        while names and html is None:
            limit = max(100, _PICTURES // len(names))
            try:
                html = explorer_html(predictions, names, limit=limit)
            except EmonbError as error:
                bad = [name for name in names if not _can_show(predictions, name)]
                self.results.problems += [f"{name}: not in the explorer: {one_line(error)}" for name in bad]
                names = [name for name in names if name not in bad] if bad else []
        if html is None:
            return ""
        return (
            "<p class=soft>Every cell is a button: a click lists its images, with every model's answer. "
            f"Choose the dataset, the model, and which images count.</p>{html}"
        )


def _can_show(predictions: object, dataset: str) -> bool:
    try:
        explorer_html(predictions, dataset, limit=1)
    except EmonbError:
        return False
    return True


def _by_model(ids: list[str]) -> list[str]:
    order = ("vlm_zero_shot", "vlm_tuned", "vit", "head", "emovlmkd")
    return sorted(ids, key=lambda i: ([i.endswith(f"_{m}") for m in order] + [True]).index(True))


def _notes(results: Results) -> list[str]:
    """What stands on every page: drawn data, and who wrote the triplets."""
    drawn = any(map(is_drawn, results.datasets))
    try:
        said = source_note(results.out, results.datasets)
    except (EmonbError, OSError, ValueError, KeyError, TypeError) as error:
        results.problems.append(f"triplets cannot be read: {one_line(error)}")
        said = ""
    return [note for note in (DRAWN_NOTE if drawn else "", f"{said[:1].upper()}{said[1:]}." if said else "") if note]


def _how_many(results: Results, figure: str) -> str:
    """`n = 600 test images of each dataset`, or of the one that the figure's name ends or goes on with."""
    counts = results.counts
    one = [d for d in counts if f"_{d}_" in f"_{figure}_"]
    if one:
        return f"n = {counts[one[0]]:,} test images."
    if not counts:
        return ""
    if len(set(counts.values())) == 1:
        return f"n = {next(iter(counts.values())):,} test images of each dataset."
    return f"n = {', '.join(f'{n:,} ({d})' for d, n in counts.items())} test images."


def _document(results: Results, body: str) -> str:
    """The whole page; its policy allows the scripts in it by their hashes and nothing from outside."""
    resources = files("emonb") / "resources"
    style, script = ((resources / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    body += f"<script>{script}</script>"
    scripts = re.findall(r"<script>(.*?)</script>", body, flags=re.DOTALL)
    hashes = " ".join(
        sorted({f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts})
    )
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}; "
        "base-uri 'none'; form-action 'none'"
    )
    title = f"EmoVLM-KD, reproduced: profile {results.run.get('profile', 'unknown')}"
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{style}</style><body>{body}</body></html>\n"
    )
