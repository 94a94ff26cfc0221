"""Room 01: the integrity report as one page that opens from disk; nothing in it is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from emonb.files import visible
from emonb.integrity import KINDS, open_safely
from emonb.samples import table_folder
from emonb.settings import SPLITS
from emonb.store import Artifact, read_json
from emonb.trees import file_problem

__all__ = ["dataset_page", "examples", "integrity_page"]

_THUMBNAILS, _SIDE = 8, 96  # pictures a kind, px
_NAMES = 200  # ids a kind on the page; all of them are in integrity.json
_OPEN = 20  # so many names are shown at once where there is no picture
_CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_CSS = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--mark:#3b6fd4}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:70rem;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;margin:.2rem 0}h2{font-size:1.2rem;margin:2rem 0 .4rem}h3{font-size:1rem;margin:1.4rem 0 .2rem}
table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{background:var(--soft)}
td.bar{min-width:10rem}.bar span{display:block;height:.8rem;background:var(--mark)}
.thumbs{display:flex;flex-wrap:wrap;gap:.6rem;margin:.4rem 0}figure{margin:0;width:8rem}
img{max-width:6rem;max-height:6rem}h3+p{margin:.2rem 0}ul{margin:.2rem 0}
p,figcaption,li{overflow-wrap:anywhere}figcaption,li,summary{font-size:.8rem}.soft{opacity:.75}
@media(max-width:40rem){.bar{display:none}th,td{padding:.3rem .4rem}figure{width:6.5rem}}
"""


def integrity_page(name: str, form: str, source: Path | str, pictures: Path, report: Mapping[str, Any]) -> str:
    """The page of one dataset as HTML; every name that comes from a file is escaped.

    Args:
        name: the dataset's name.
        form: the release's format.
        source: where it came from.
        pictures: the folder that image ids are relative to.
        report: the content of `integrity.json`.
    """
    kinds = [kind for kind in KINDS if kind in report["problems"]]
    sections = [part for kind in kinds for part in _section(kind, report["problems"][kind], pictures)]
    body = "\n".join(
        [
            f"<h1>{escape(name)}: integrity of the pictures</h1>",
            f"<p class=soft>format {escape(form)}, from {_shown(str(source))}</p>",
            "<h2>Pictures that can be used</h2>",
            *_balance(report["counts"]),
            *(_sizes(report["found"], report["expected"]) if report["found"] else ()),
            "<h2>What was found</h2>",
            *(_overview(kinds, report["problems"]) if kinds else ["<p>Nothing to report.</p>"]),
            *sections,
        ]
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
        f'content="{_CSP}">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(name)}: integrity</title><style>{_CSS}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def dataset_page(name: str, artifact: Artifact) -> str:
    """The page of one sample table of a run, imported, read directly, or drawn."""
    meta, report = read_json(artifact.path / "meta.json"), read_json(artifact.path / "integrity.json")
    pictures = table_folder(artifact, "pictures")
    return integrity_page(name, meta["format"], "this run" if meta["drawn"] else pictures, pictures, report)


def examples(artifact: Artifact, each: int = 6) -> dict[str, list[Image.Image]]:
    """Small pictures of each kind of problem that can be shown, `each` at most; kinds in the order of `KINDS`."""
    problems = read_json(artifact.path / "integrity.json")["problems"]
    pictures = table_folder(artifact, "pictures")
    shown = [kind for kind in KINDS if KINDS[kind].shown and kind in problems]
    found = {kind: [_thumbnail(pictures, i) for i in problems[kind][:each]] for kind in shown}
    return {kind: kept for kind, some in found.items() if (kept := [p for p in some if p is not None])}


def _balance(counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Class balance: one row an emotion, its share of all pictures as a bar."""
    emotions = list(next(iter(counts.values())))
    totals = {e: sum(counts[s][e] for s in counts) for e in emotions}
    everything = sum(totals.values())
    head = "".join(f"<th>{escape(s)}</th>" for s in counts)
    yield f"<table><tr><th>emotion</th>{head}<th>all</th><th>share</th><th class=bar></th></tr>"
    for emotion in emotions:
        cells = "".join(f"<td>{counts[s][emotion]:,}</td>" for s in counts)
        share = 100 * totals[emotion] / everything
        bar = f'<td class=bar><span style="width:{100 * totals[emotion] / max(totals.values()):.0f}%"></span></td>'
        yield f"<tr><td>{escape(emotion)}</td>{cells}<td>{totals[emotion]:,}</td><td>{share:.1f} %</td>{bar}</tr>"
    sums = "".join(f"<td>{sum(counts[s].values()):,}</td>" for s in counts)
    yield f"<tr><td>all</td>{sums}<td>{everything:,}</td><td></td><td class=bar></td></tr></table>"


def _sizes(found: Mapping[str, int], expected: Mapping[str, Any]) -> Iterator[str]:
    """The release's size before anything was left out, beside the official one."""
    yield "<h2>Size of the release</h2><table><tr><th></th><th>found</th><th>official</th></tr>"
    about = "about " if expected.get("about") else ""
    for part in [key for key in ("total", *SPLITS) if key in found or key in expected]:
        official = f"{about}{expected[part]:,}" if part in expected else "not known here"
        yield f"<tr><td>{escape(part)}</td><td>{found.get(part, 0):,}</td><td>{official}</td></tr>"
    yield "</table>"


def _overview(kinds: Sequence[str], problems: Mapping[str, Sequence[str]]) -> Iterator[str]:
    yield "<table><tr><th>kind</th><th>pictures</th><th>consequence</th></tr>"
    for kind in kinds:
        fate = "left out" if KINDS[kind].left_out else "kept"
        yield f'<tr><td><a href="#{kind}">{kind}</a></td><td>{len(problems[kind]):,}</td><td>{fate}</td></tr>'
    yield "</table>"


def _section(kind: str, image_ids: Sequence[str], pictures: Path) -> Iterator[str]:
    yield f'<h3 id="{kind}">{kind}: {len(image_ids):,}</h3><p>{escape(KINDS[kind].meaning)}</p>'
    if KINDS[kind].shown:
        found = (_figure(pictures, i) for i in image_ids[:_THUMBNAILS])
        yield f"<div class=thumbs>{''.join(found)}</div>"
    more = f"<p>... and {len(image_ids) - _NAMES:,} more in integrity.json</p>" if len(image_ids) > _NAMES else ""
    names = "".join(f"<li>{_shown(i)}</li>" for i in image_ids[:_NAMES])
    few = " open" if not KINDS[kind].shown and len(image_ids) <= _OPEN else ""
    yield f"<details{few}><summary>names</summary><ul>{names}</ul>{more}</details>"


def _figure(pictures: Path, image_id: str) -> str:
    """A small JPEG inside the page, or only the name of a picture that cannot be opened."""
    caption = f"<figcaption>{_shown(image_id, '<wbr>')}</figcaption>"
    picture = _thumbnail(pictures, image_id)
    if picture is None:
        return f"<figure>{caption}</figure>"
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=70)
    uri = base64.b64encode(data.getvalue()).decode("ascii")
    return f'<figure><img src="data:image/jpeg;base64,{uri}" alt="">{caption}</figure>'


def _thumbnail(pictures: Path, image_id: str) -> Image.Image | None:
    """A picture of the release in small; the report may name files that are absent, or no pictures."""
    picture = None if file_problem(pictures, image_id) else open_safely(pictures / image_id)
    if picture is not None:
        picture.thumbnail((_SIDE, _SIDE))
    return picture


def _shown(text: str, after_slash: str = "") -> str:
    """A file's name as HTML: escaped, control characters visible, its writing direction kept to itself."""
    return f"<bdi>{escape(visible(text)).replace('/', '/' + after_slash)}</bdi>"
