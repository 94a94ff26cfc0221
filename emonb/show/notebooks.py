"""Executed notebooks: as pages of a results folder, trusted on this machine, and made fit for the repository."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from html import escape, unescape
from pathlib import Path
from urllib.parse import quote, unquote

import nbformat
import pandas as pd

from emonb.errors import EmonbError
from emonb.files import atomic_write, make_folder, read_json
from emonb.settings import project_root
from emonb.show.explorer import sentence_only

_BAR = "margin:0;padding:.6rem 1rem;font:14px Arial;color:#222;border-bottom:1px solid "
_BLUE = 'style="color:#005f96;text-decoration:underline"'
_LINK = re.compile(r'<script.*?</script>|(<a\b[^>]*?) href="([^"]*)"', re.DOTALL)  # texts in scripts are no links


# ---- pages ---------------------------------------------------------------------------------------------------------


def write_site(out: Path, notes: str) -> list[str]:
    """Write `site/<notebook>.html` for every executed notebook that changed; returns a sentence for each failure.

    Each page begins with links to the report and to the pages before and after it, then the notes. Links between
    notebooks lead to pages, links to results and files of the project to them; what is not there is no link.
    """
    sources = sorted((out / "notebooks").glob("*.ipynb"))
    site, names, failed = make_folder(out / "site"), [source.stem for source in sources], []
    for page in site.glob("*.html"):
        if page.stem not in names:  # of an earlier state
            page.unlink()
    for source in sources:
        page, head = site / f"{source.stem}.html", _head(names, source.stem, notes)
        mark = f"<!-- of {hashlib.sha256(source.read_bytes()).hexdigest()} -->"
        if page.is_file() and mark + head in page.read_text(encoding="utf-8"):
            continue
        try:
            html = _LINK.sub(lambda found: _link(found, out, names), _converted(source))
        except Exception as error:  # whatever a damaged notebook makes nbconvert raise: the report goes on
            failed.append(f"notebooks/{source.name} cannot be shown as a page: {type(error).__name__}")
            html, mark = f"<!doctype html><meta charset=utf-8><body><p>{escape(failed[-1])}</p></body>", ""
        start = html.index(">", html.index("<body")) + 1
        atomic_write(page, html[:start] + mark + head + html[start:])
    return failed


def _converted(source: Path) -> str:
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(require_js_url="", mathjax_url="", mermaid_js_url="", jquery_url="")
    return exporter.from_filename(str(source))[0]


def _head(names: Sequence[str], name: str, notes: str) -> str:
    """What stands above a notebook's page."""
    at = names.index(name)
    beside = [("\u2190", n) for n in names[:at][-1:]] + [("\u2192", n) for n in names[at + 1 : at + 2]]
    there = [f'<a href="{quote(n)}.html" {_BLUE}>{arrow} {escape(n)}</a>' for arrow, n in beside]
    bar = " \u00b7 ".join([f'<a href="../index.html" {_BLUE}>Report</a>', *there])
    note = f'<p role="note" style="{_BAR}#d9c26a;background:#fff3cd">{escape(notes)}</p>' if notes else ""
    return f'<nav aria-label="Pages" style="{_BAR}#ddd">{bar}</nav>{note}'


def _link(found: re.Match[str], out: Path, names: Sequence[str]) -> str:
    """A link of a notebook as its page has it."""
    if found[1] is None:
        return found[0]
    address, _, fragment = unescape(found[2]).partition("#")
    if not address or re.match(r"[\w+.-]+:|//", address):  # inside the page, or elsewhere
        return found[0]
    target = Path(unquote(address))
    if target.suffix == ".ipynb":
        address = f"{quote(target.stem)}.html" if target.stem in names else ""
    elif not (out / "site" / target).exists():
        beside = project_root() / "notebooks" / target
        address = quote(os.path.relpath(beside, (out / "site").resolve())) if beside.exists() else ""
    if not address:
        return f'{found[1]} title="not in this run"'
    return f'{found[1]} href="{escape(address)}{escape("#" + fragment) if fragment else ""}"'


def sign(folder: Path) -> None:
    """Mark executed notebooks as trusted by this user, so that Jupyter shows their HTML outputs."""
    from nbformat.sign import NotebookNotary

    with suppress(Exception):  # a convenience: no home folder, no sqlite
        notary = NotebookNotary()
        Path(notary.data_dir).mkdir(parents=True, exist_ok=True)  # not there before Jupyter's first start
        for path in sorted(folder.glob("*.ipynb")):
            notary.sign(nbformat.read(path, as_version=4))


# ---- for the repository --------------------------------------------------------------------------------------------


def copy_back(out: Path) -> list[Path]:
    """Copy the executed notebooks of a mini run over their sources; returns the paths written.

    Of an explorer the picture stays and the data goes: a notebook of the repository stays below 1 MB.

    Raises:
        EmonbError: the run is of another profile, or not every notebook is executed.
    """
    run = read_json(out / "run.json")
    done = ("executed", "up to date")
    unfinished = [name for name, record in run["notebooks"].items() if record.get("status") not in done]
    if run["profile"] != "mini" or unfinished:
        raise EmonbError(f"{out}: needs a finished run of the profile mini (unfinished: {unfinished or 'none'})")
    written = []
    for source in sorted((out / "notebooks").glob("*.ipynb")):
        nb = nbformat.read(source, as_version=4)
        tags = [cell.metadata.get("tags", []) for cell in nb.cells]
        if any("injected-parameters" in t for t in tags):
            raise EmonbError(f"{source}: was run with options; make it again with: make notebooks")
        for cell in nb.cells:
            own = {key: cell.metadata.get(key) for key in ("tags", "emonb", "jupyter")}
            cell.metadata = nbformat.from_dict({key: value for key, value in own.items() if value})
            for output in cell.get("outputs", []):
                if "text/html" in output.get("data", {}):
                    output.data["text/html"] = sentence_only(output.data["text/html"])
        kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
        versions = {"versions": nb.metadata.get("emonb", {}).get("versions", {})}  # a run says if it has others
        notes = {"kernelspec": kernel, "language_info": {"name": "python"}, "emonb": versions}
        nb.metadata = nbformat.from_dict(notes)
        nbformat.validate(nb)
        target = project_root() / "notebooks" / source.name
        atomic_write(target, nbformat.writes(nb))
        written.append(target)
    return written


def refresh_readme(out: Path, readme: Path) -> None:
    """Write a run's headline figures between the README's markers, and its picture into `docs/pictures/`."""
    main, modules = (pd.read_csv(out / "tables" / f"{table}.csv") for table in ("main", "modules"))
    rivals = modules[modules["row"].isin(["head", "average_vlm_head"])]  # the honest ones belong in the headline
    main = pd.concat([main[main["ours"].notna()], rivals])
    datasets = list(dict.fromkeys(main["dataset"]))
    lines = ["| accuracy on test, % | " + " | ".join(datasets) + " | paper, FI |", "|---" * (len(datasets) + 2) + "|"]
    for name, rows in main.groupby("name", sort=False):
        cells = rows.set_index("dataset")
        ours = [
            f"{cells.at[d, 'ours']:.1f} [{cells.at[d, 'ci_low']:.1f}, {cells.at[d, 'ci_high']:.1f}]" for d in datasets
        ]
        printed = rows.loc[rows["paper_dataset"] == "FI", "paper"].dropna()
        lines.append(f"| {name} | {' | '.join(ours)} | {f'{printed.iloc[0]:.2f}' if len(printed) else ''} |")
    claims = pd.read_csv(out / "tables" / "claims.csv").query("dataset == 'all'")
    verdicts = [f"{row.claim} {row.verdict}" for row in claims.itertuples()]
    run = read_json(out / "run.json")
    totals, seeds = run["totals"], ", ".join(map(str, run["seeds"]))
    n = " to ".join(dict.fromkeys(f"{x:.0f}" for x in (main["n"].min(), main["n"].max())))
    lines += [
        "",
        f"95 % bootstrap intervals over {n} test images in each; head and gate: "
        f"mean of seeds {seeds}. Claims over all datasets: {'; '.join(verdicts)}.",
        f"This run: {totals['seconds_compute'] / 60:.1f} minutes of computing on {run['machine']['cores']} cores, "
        f"peak memory {totals['peak_memory_mb'] / 1024:.1f} GB.",
    ]
    start, end = "<!-- results: make notebooks writes them -->", "<!-- end of results -->"
    text = readme.read_text(encoding="utf-8")
    if start not in text or end not in text:
        raise EmonbError(f"{readme}: the markers {start!r} and {end!r} are missing; put them back")
    picture = readme.parent / "docs" / "pictures" / "complementarity.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(picture, (out / "figures" / "complementarity_venn.png").read_bytes())
    head, tail = text.split(start)[0], text.split(end)[1]
    atomic_write(readme, head + start + "\n" + "\n".join(lines) + "\n" + end + tail)
