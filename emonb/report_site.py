"""What lies beside the report: links to files, and executed notebooks as pages that ask for nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from emonb.store import atomic_write, make_folder

__all__ = ["TABLE_FILES", "file_links", "write_site"]

TABLE_FILES = ("csv", "md", "tex")
_BANNER = "margin:0;padding:.6rem 1rem;background:#fff3cd;color:#222;border-bottom:1px solid #d9c26a;font:14px Arial"


def file_links(out: Path, folder: str, id: str, endings: Sequence[str]) -> str:
    """Links to those of a result's files that are there."""
    there = [ending for ending in endings if (out / folder / f"{id}.{ending}").is_file()]
    return " ".join(f"<a href='{folder}/{quote(id)}.{ending}'>{ending}</a>" for ending in there)


def write_site(out: Path, notes: str) -> list[str]:
    """Write `site/<notebook>.html` for what changed, with the notes on top; returns a sentence for each failure."""
    sources = sorted((out / "notebooks").glob("*.ipynb"))
    site = make_folder(out / "site")
    banner = f"<p role=note style='{_BANNER}'>{escape(notes)}</p>" if notes else ""
    stale = [s for s in sources if not _is_current(site / f"{s.stem}.html", s, banner)]
    if not stale:
        return []
    from nbconvert import HTMLExporter

    exporter, failed = HTMLExporter(require_js_url="", mathjax_url="", mermaid_js_url="", jquery_url=""), []
    for source in stale:
        try:
            html, _ = exporter.from_filename(str(source))
        except Exception as error:  # whatever a damaged notebook makes nbconvert raise: the report goes on
            (site / f"{source.stem}.html").unlink(missing_ok=True)  # of an earlier state
            failed.append(f"notebooks/{source.name} cannot be shown as a page: {type(error).__name__}")
            continue
        html = re.sub(r"<body[^>]*>", lambda found: f"{found.group(0)}{banner}", html, count=1)
        atomic_write(site / f"{source.stem}.html", html)
    return failed


def _is_current(page: Path, source: Path, banner: str) -> bool:
    newer = page.is_file() and page.stat().st_mtime_ns >= source.stat().st_mtime_ns
    return newer and banner in page.read_text(encoding="utf-8")
