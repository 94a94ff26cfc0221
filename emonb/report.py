"""The report that opens from disk: `index.html`, and the executed notebooks as pages in `site/`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from emonb.errors import EmonbError
from emonb.paper_values import is_drawn
from emonb.store import atomic_write, make_folder, read_json
from emonb.triplet_tables import source_note
from emonb.workspace import format_value, readable

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DRAWN_NOTE", "write_report"]

DRAWN_NOTE = (
    "The mini-* datasets are drawn by a program and only stand for the paper's datasets: their accuracies are "
    "not comparable with the paper's. What can be compared is the mechanism: which model gains over which."
)
TABLES = {
    "main": "Main result",
    "claims": "The paper's claims, judged by intervals",
    "modules": "What each module adds",
    "instruction_tuning": "Instruction tuning",
    "depth": "Depth of the student head",
    "alpha": "Weight of the distillation loss",
    "gates": "Five gates",
    "complementarity": "Complementarity of VLM and ViT",
    "parameters": "Trainable parameters",
}
FIGURES = {
    "complementarity_venn": "What each model gets right",
    "complementarity_by_emotion": "Complementarity by emotion",
    "agreement": "Agreement between models",
    "alpha_tradeoff": "Accuracy against closeness to the teacher",
    "depth": "Depth of the student head",
    "training_curves": "Training curves",
    "qualitative_examples": "Pictures where only one model is right",
}
_CSS = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--mark:#3b6fd4;--good:#2a8a4a;--bad:#c0392b}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;margin:0 auto;max-width:80rem;padding:1.5rem 1rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:.2rem 0}h2{font-size:1.25rem;margin:2.5rem 0 .4rem}
a{color:var(--mark)}nav a{margin-right:1rem;white-space:nowrap}small,.soft{opacity:.75}
.note{border-left:.25rem solid var(--mark);background:var(--soft);padding:.6rem .9rem;margin:1rem 0}
.missing{border-left-color:var(--bad)}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:.4rem;margin:.5rem 0}
table{border-collapse:collapse;font-size:.86rem;width:100%}
th,td{padding:.35rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{background:var(--soft)}td.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr:last-child td{border-bottom:0}td:first-child{min-width:6rem}
:is(th,td):first-child{position:sticky;left:0;background:Canvas}
.holds{color:var(--good);font-weight:600}.fails{color:var(--bad);font-weight:600}
.facts{display:flex;flex-wrap:wrap;gap:.5rem 2rem;padding:0;list-style:none}.facts b{display:block;font-size:1.15rem}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:1rem}
figure{margin:0;border:1px solid var(--line);border-radius:.4rem;padding:.6rem;background:#fff;color:#222}
figure img{width:100%;height:auto;display:block}figcaption{font-size:.85rem;margin-top:.4rem}
@media print{.wide{overflow:visible}}
"""


_BANNER = "margin:0;padding:.6rem 1rem;background:#fff3cd;color:#222;border-bottom:1px solid #d9c26a;font:14px Arial"


def write_report(out: Path) -> Path:
    """Write `site/*.html` and `index.html` of a results folder; what is missing is said in the page.

    Returns:
        The path of `index.html`.
    """
    run: dict[str, Any] = {}
    with suppress(EmonbError):
        run = read_json(out / "run.json")
    datasets = run.get("settings", {}).get("datasets", [])
    _write_site(out, datasets)
    tables, figures = _ids(out, run, "tables", "csv"), _ids(out, run, "figures", "png")
    missing = [f"table {i}" for i in TABLES if i not in tables] + [f"figure {i}" for i in FIGURES if i not in figures]
    title = f"EmoVLM-KD, reproduced: profile {run.get('profile', 'unknown')}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=soft>Datasets: {escape(', '.join(datasets) or 'unknown')}</p>",
        *(f"<p class=note>{escape(note)}</p>" for note in _notes(out, datasets)),
        _facts(run),
        "<nav><a href=#tables>Tables</a><a href=#figures>Figures</a><a href=#notebooks>Notebooks</a></nav>",
        f"<p class='note missing'>Not made in this run: {escape(', '.join(missing))}.</p>" if missing else "",
        "<div id=tables>",
        *(_table(out, i) for i in sorted(tables, key=_order(TABLES))),
        "</div><h2 id=figures>Figures</h2><div class=figures>",
        *(_figure(i) for i in sorted(figures, key=_order(FIGURES))),
        "</div><h2 id=notebooks>Notebooks</h2>",
        _notebooks(out, run),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_CSS}</style><body>{''.join(body)}</body></html>\n"
    )
    atomic_write(out / "index.html", page)
    return out / "index.html"


def _notes(out: Path, datasets: Sequence[str]) -> list[str]:
    """What stands on every page: drawn data, and who wrote the triplets."""
    drawn, said = any(map(is_drawn, datasets)), source_note(out, datasets)
    return [note for note in (DRAWN_NOTE if drawn else "", f"{said[:1].upper()}{said[1:]}." if said else "") if note]


def _write_site(out: Path, datasets: Sequence[str]) -> None:
    """Executed notebooks as pages that ask for nothing from the network, each with the notes on top."""
    sources = sorted((out / "notebooks").glob("*.ipynb"))
    site = make_folder(out / "site")
    notes = " ".join(_notes(out, datasets))
    banner = f"<p role=note style='{_BANNER}'>{escape(notes)}</p>" if notes else ""
    stale = [s for s in sources if not _is_current(site / f"{s.stem}.html", s, banner)]
    if not stale:
        return
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(require_js_url="", mathjax_url="", mermaid_js_url="", jquery_url="")
    for source in stale:
        html, _ = exporter.from_filename(str(source))
        html = re.sub(r"<body[^>]*>", lambda found: f"{found.group(0)}{banner}", html, count=1)
        atomic_write(site / f"{source.stem}.html", html)


def _is_current(page: Path, source: Path, banner: str) -> bool:
    newer = page.is_file() and page.stat().st_mtime_ns >= source.stat().st_mtime_ns
    return newer and banner in page.read_text(encoding="utf-8")


def _ids(out: Path, run: dict[str, Any], folder: str, ending: str) -> list[str]:
    """Outputs of this run; those of an earlier one with other datasets are left out."""
    written = {path for record in run.get("notebooks", {}).values() for path in record.get("outputs", {})}
    there = sorted((out / folder).glob(f"*.{ending}"))
    return [p.stem for p in there if not written or f"{folder}/{p.name}" in written]


def _order(known: dict[str, str]) -> Any:
    return lambda i: (list(known).index(i) if i in known else len(known), i)


def _facts(run: dict[str, Any]) -> str:
    if not run:
        return "<p class='note missing'>run.json is missing: the run was stopped early.</p>"
    totals, machine = run["totals"], run["machine"]
    facts = {
        "this run": f"{totals['seconds_wall_this_run'] / 60:.1f} min",
        "from nothing": f"{totals['seconds_compute'] / 60:.1f} min",
        "peak memory": f"{totals['peak_memory_mb'] / 1024:.1f} GB",
        "seeds of head and gates": ", ".join(map(str, run["seeds"])),
        "commit": run["git"].get("commit", "none")[:10] + (" + changes" if run["git"].get("dirty") else ""),
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}",
    }
    items = "".join(f"<li><small>{escape(k)}</small><b>{escape(v)}</b></li>" for k, v in facts.items())
    return f"<ul class=facts>{items}</ul>"


def _table(out: Path, id: str) -> str:
    import pandas as pd

    files = " ".join(f"<a href='tables/{quote(id)}.{e}'>{e}</a>" for e in ("csv", "md", "tex"))
    head = f"<h2 id='table-{escape(id)}'>{escape(TABLES.get(id, id.replace('_', ' ')))}</h2>"
    caption = ""
    with suppress(OSError):
        first = (out / "tables" / f"{id}.md").read_text(encoding="utf-8").split("\n", 1)[0]
        caption = first.strip("*") if first.startswith("**") else ""
    try:
        frame = readable(pd.read_csv(out / "tables" / f"{id}.csv"))
    except (OSError, ValueError) as error:
        return f"{head}<p class='note missing'>tables/{escape(id)}.csv cannot be read: {escape(str(error))}</p>"
    body = f"<p class=soft>{escape(caption)} {files}</p><div class=wide>{_html(frame)}</div>"
    if id in TABLES:
        return head + body
    return f"<details><summary>More: table {escape(id.replace('_', ' '))}</summary>{body}</details>"


def _html(frame: pd.DataFrame) -> str:
    """A frame as a table; everything escaped, verdicts coloured, two header rows for a column pair."""
    columns = [column if isinstance(column, tuple) else (column,) for column in frame.columns]
    lines = []
    for level in range(max(map(len, columns), default=1)):
        cells, i = "", 0
        while i < len(columns):
            span = 1
            while level == 0 and len(columns[i]) > 1 and columns[i : i + span + 1][-1][0] == columns[i][0]:
                if i + span >= len(columns):
                    break
                span += 1
            cells += f"<th colspan={span}>{escape(str(columns[i][level]))}</th>"
            i += span
        lines.append(f"<tr>{cells}</tr>")
    for row in frame.itertuples(index=False, name=None):
        lines.append("<tr>" + "".join(_cell(value) for value in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _cell(value: Any) -> str:
    text = format_value(value)
    kind = {"holds": "holds", "does not hold": "fails"}.get(text.partition(":")[0], "")
    kind = kind or ("number" if text[:1].isdigit() or (text[:1] in "-+" and text[1:2].isdigit()) else "")
    return f"<td{f' class={kind}' if kind else ''}>{escape(text)}</td>"


def _figure(id: str) -> str:
    name = FIGURES.get(id) or id.removeprefix("confusion_").replace("_", " ").replace("  ", ": ").strip()
    name = f"Confusion, {name}" if id.startswith("confusion_") else name
    path = f"figures/{quote(id)}"
    return (
        f"<figure><a href='{path}.png'><img loading=lazy src='{path}.png' alt='{escape(name)}'></a>"
        f"<figcaption>{escape(name)} <a href='{path}.svg'>svg</a></figcaption></figure>"
    )


def _notebooks(out: Path, run: dict[str, Any]) -> str:
    rows = []
    for path in sorted((out / "notebooks").glob("*.ipynb")):
        record = run.get("notebooks", {}).get(path.stem, {})
        rows.append(
            f"<tr><td><a href='site/{quote(path.stem)}.html'>{escape(path.stem)}</a></td>"
            f"<td>{escape(record.get('status', 'not in this run'))}</td>"
            f"<td class=number>{record.get('seconds', 0):.0f} s</td>"
            f"<td class=number>{record.get('peak_memory_mb', 0):.0f} MB</td>"
            f"<td><a href='notebooks/{quote(path.name)}'>ipynb</a></td></tr>"
        )
    head = "<tr><th>notebook</th><th>status</th><th>time</th><th>peak memory</th><th></th></tr>"
    body = f"<div class=wide><table>{head}{''.join(rows)}</table></div>" if rows else "<p>None was executed.</p>"
    return body + "<p class=soft>Settings, versions, times: <a href='run.json'>run.json</a></p>"
