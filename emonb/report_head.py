"""The top of the report and its end: what ran, where and when, what is missing; notebooks and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from emonb.paper_values import is_drawn
from emonb.report_read import Results
from emonb.report_site import TABLE_FILES, file_links
from emonb.report_tables import boxed, verdict_counts

__all__ = ["hero", "notebooks_html"]


def hero(results: Results, notes: Sequence[str]) -> str:
    """Title, what ran, problems, notes, and the facts of the run."""
    run, datasets = results.run, results.datasets
    drawn = sum(map(is_drawn, datasets))
    kind = "drawn data" if datasets and drawn == len(datasets) else "drawn and real data" if drawn else "real data"
    profile = str(run.get("profile", "unknown"))
    eyebrow = f"Reproduction report \u00b7 profile {profile} \u00b7 {kind if datasets else 'no data'}"
    problems = "".join(f"<li>{escape(line)}</li>" for line in results.problems)
    missing = (
        f"<div class=problems role=note><b>This report is not complete.</b><ul>{problems}</ul></div>"
        if problems
        else ""
    )
    claims = results.tables.get("claims")
    score = "" if claims is None else f"<p class=score><b>Claims of the paper:</b> {verdict_counts(claims)}</p>"
    named = ", ".join(datasets) or "unknown"
    return (
        f"<header class=hero><p class=eyebrow>{escape(eyebrow)}</p><h1>EmoVLM-KD, reproduced</h1>"
        "<p class=lead>A vision-language model and a distilled vision transformer, joined by a gate, name the emotion "
        f"that a picture evokes. Datasets: {escape(named)}.</p>{missing}"
        + (f"<div class=note>{''.join(f'<p>{escape(note)}</p>' for note in notes)}</div>" if notes else "")
        + score
        + _facts(run)
        + "</header>"
    )


def _facts(run: Mapping[str, Any]) -> str:
    """What run.json says of time and machine; a value that is not there is left out."""
    totals, machine, git = (_mapping(run.get(key)) for key in ("totals", "machine", "git"))
    versions, seeds = _mapping(run.get("versions")), run.get("seeds")
    cores = f", {machine['cores']} cores" if machine.get("cores") else ""
    commit = str(git.get("commit", ""))[:10] + (" + changes" if git.get("dirty") else "")
    facts = {
        "when": str(run.get("written", "")).replace("T", " ")[:16] + " UTC" if run.get("written") else "",
        "from nothing": _scaled(totals.get("seconds_compute"), 60, "min"),
        "this run": _scaled(totals.get("seconds_wall_this_run"), 60, "min"),
        "peak memory": _scaled(totals.get("peak_memory_mb"), 1024, "GB"),
        "machine": f"{machine['cpu']}{cores}, {machine.get('gpu') or 'no GPU'}" if machine.get("cpu") else "",
        "seeds of head and gates": ", ".join(map(str, seeds)) if isinstance(seeds, list) else "",
        "code": commit,
        "versions": ", ".join(f"{n} {versions[n]}" for n in ("python", "torch", "transformers") if n in versions),
    }
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items() if v)
    return f"<dl class=facts>{items}</dl>" if items else ""


def notebooks_html(results: Results) -> str:
    """The executed notebooks as pages, and a list of every file of tables, figures and data."""
    rows = []
    copies = {path.stem for path in (results.out / "notebooks").glob("*.ipynb")}
    for name in sorted(copies | set(results.records)):
        record = results.records.get(name, {})
        page = (results.out / "site" / f"{name}.html").is_file()
        title = f"<a href='site/{quote(name)}.html'>{escape(name)}</a>" if page else escape(name)
        status = str(record.get("status") or ("not in this run" if name in copies else "not run"))
        source = f"<a href='notebooks/{quote(name)}.ipynb'>ipynb</a>" if name in copies else ""
        rows.append(
            f"<tr><th scope=row>{title}</th><td>{escape(status)}</td>"
            f"<td class=n>{_scaled(record.get('seconds'), 1, 's', 0)}</td>"
            f"<td class=n>{_scaled(record.get('peak_memory_mb'), 1, 'MB', 0)}</td><td>{source}</td></tr>"
        )
    head = "<th scope=col>notebook</th><th scope=col>status</th><th scope=col class=n>time</th>"
    head += "<th scope=col class=n>peak memory</th><th scope=col>source</th>"
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    table = boxed(body) if rows else "<p>No notebook was executed.</p>"
    return (
        f"<div class=block><h3>Notebooks as they ran</h3>{table}</div>"
        f"<div class=block><h3>Files</h3>{_files(results.out, results.tables)}</div>"
    )


def _files(out: Path, tables: Mapping[str, Any]) -> str:
    """Every table in three forms, the integrity pages, and the run's record."""
    rows = []
    for id in sorted(tables):
        rows.append(f"<tr><th scope=row>{escape(id)}</th><td>{file_links(out, 'tables', id, TABLE_FILES)}</td></tr>")
    pages = [
        f"<a href='integrity/{quote(path.stem)}.html'>{escape(path.stem)}</a>"
        for path in sorted((out / "integrity").glob("*.html"))
    ]
    if pages:
        rows.append(f"<tr><th scope=row>integrity of the data</th><td>{' '.join(pages)}</td></tr>")
    if (out / "run.json").is_file():
        rows.append("<tr><th scope=row>settings, versions, times</th><td><a href='run.json'>run.json</a></td></tr>")
    if not rows:
        return "<p>None.</p>"
    return boxed(f"<tbody>{''.join(rows)}</tbody>")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _scaled(value: Any, unit: float, name: str, digits: int = 1) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value / unit:.{digits}f} {name}" if number else ""
