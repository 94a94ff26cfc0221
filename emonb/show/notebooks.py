"""Executed notebooks: as pages of a results folder, trusted on this machine, and made fit for the repository."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from html import escape, unescape
from pathlib import Path
from urllib.parse import quote, unquote

import nbformat
import pandas as pd

from emonb.errors import EmonbError
from emonb.files import atomic_write, make_folder, read_json, refuse_foreign, resource_path
from emonb.settings import project_root
from emonb.tables import ahead, display, markdown_text

_LINK = re.compile(r'<script.*?</script>|(<a\b[^>]*?) href="([^"]*)"', re.DOTALL)  # texts in scripts are no links
_ENTRY = re.compile(r"^### ([^\n]+)\n+(.+?)(?=\n##|\Z)", re.MULTILINE | re.DOTALL)  # of the glossary
_SHAKY = 80  # percent: a verdict that fewer of its own resamplings share is said to be so; ours
_START, _END = "<!-- results: make notebooks writes them -->", "<!-- end of results -->"  # in the README


# ---- pages ---------------------------------------------------------------------------------------------------------


def write_site(out: Path, notes: str) -> list[str]:
    """Write `site/<notebook>.html` for every executed notebook that changed; returns a sentence for each failure.

    Each page begins with links to the report, the page before and the page after, then the notes; badges stay away,
    they are pictures from elsewhere. Links between notebooks lead to pages, links to the glossary to its entries below
    the page, links to results and files of the project to them; what is not there is no link.
    """
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import TagRemovePreprocessor

    exporter = HTMLExporter(require_js_url="", mathjax_url="", mermaid_js_url="", jquery_url="")
    exporter.register_preprocessor(TagRemovePreprocessor(remove_cell_tags={"badges", "install"}), enabled=True)
    sources, site, failed = sorted((out / "notebooks").glob("*.ipynb")), make_folder(out / "site"), []
    pages = {source.stem: site / f"{source.stem}.html" for source in sources}
    for page in {*site.glob("*.html")} - {*pages.values()}:  # of an earlier state
        page.unlink()
    note, words = f'<p role="note" class="notes">{escape(notes)}</p>' if notes else "", _glossary()
    style = f"<style>{resource_path('notebook.css').read_text(encoding='utf-8')}</style>"
    for source, before, after in zip(sources, [None, *sources], [*sources[1:], None], strict=False):
        page, links = pages[source.stem], {"../index.html": "Report"}
        links |= {f"{quote(before.stem)}.html": f"\u2190 {before.stem}"} if before else {}
        links |= {f"{quote(after.stem)}.html": f"{after.stem} \u2192"} if after else {}
        links |= {"#the-explorer": "Skip to the explorer"} if b' id=\\"the-explorer\\"' in source.read_bytes() else {}
        bar = " \u00b7 ".join(f'<a href="{address}">{escape(name)}</a>' for address, name in links.items())
        head = f'<nav aria-label="Pages" class="pages">{bar}</nav>{note}'
        mark = f"<!-- of {hashlib.sha256(source.read_bytes() + f'{style}{words}'.encode()).hexdigest()} -->"
        if page.is_file() and mark + head in page.read_text(encoding="utf-8"):
            continue
        try:
            html = exporter.from_filename(str(source))[0]
        except Exception as error:  # whatever a damaged notebook makes nbconvert raise: the report goes on
            failed.append(f"notebooks/{source.name} cannot be shown as a page: {type(error).__name__}")
            html, mark = f"<!doctype html><meta charset=utf-8><body><p>{escape(failed[-1])}</p></body>", ""
        html = _LINK.sub(lambda found: _link(found, out, pages, words), html)
        asked = "".join(entry for word, entry in words.items() if f'href="#word-{word}"' in html)
        told = f'<section class="words"><h2>Words</h2><dl>{asked}</dl></section>' if asked else ""
        start, body = html.rsplit("</body>", 1)[0].split("<body", 1)
        body = body.partition(">")[2] + told
        atomic_write(page, f'{start}{style}<body class="jp-Notebook">{mark}{head}{body}</body></html>\n')
    return failed


def _glossary() -> dict[str, str]:
    """The glossary's entries as HTML, by anchor; none where emonb stands without its docs."""
    from nbconvert.filters import markdown2html

    files, entries = [f for folder in resource_path().parents[:2] for f in folder.glob("docs/glossary.md")], {}
    for name, text in _ENTRY.findall("".join(file.read_text(encoding="utf-8") for file in files)):
        anchor = re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-")
        entries[anchor] = f'<dt id="word-{anchor}">{escape(name)}</dt><dd>{markdown2html(text)}</dd>'
    return entries


def _link(found: re.Match[str], out: Path, pages: Mapping[str, Path], words: Mapping[str, str]) -> str:
    """A link of a notebook as its page has it."""
    address, mark, fragment = unescape(found[2] or "").partition("#")
    if not address or re.match(r"[\w+.-]+:|//", address):  # in a script, inside the page, or elsewhere
        return found[0]
    target = Path(unquote(address))
    if target.name == "glossary.md" and fragment in words:
        address, mark, fragment = f"#word-{fragment}", "", ""
    elif target.suffix == ".ipynb":
        address = f"{quote(target.stem)}.html" if target.stem in pages else ""
    elif not (out / "site" / target).exists():
        beside = project_root() / "notebooks" / target
        address = quote(os.path.relpath(beside, (out / "site").resolve())) if beside.exists() else ""
    where = f' href="{escape(address + mark + fragment)}"' if address else ' title="not in this run"'
    return found[1] + where


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

    Of an explorer only its sentence stays: a notebook of the repository stays below 1 MB. `EmonbError`: the run is of
    another profile, or not every notebook is executed.
    """
    from nbconvert.preprocessors import ClearMetadataPreprocessor, CoalesceStreamsPreprocessor

    run, written, target = read_json(out / "run.json"), [], project_root() / "notebooks"
    about = "".join(path.read_text(encoding="utf-8") for path in target.parent.glob("pyproject.toml"))
    refuse_foreign(target, "cd: a checkout of emonb", 'name = "emonb"' in about)
    left = [n for n, record in run["notebooks"].items() if record.get("status") not in ("executed", "up to date")]
    if run["profile"] != "mini" or left:
        raise EmonbError(f"{out}: needs a finished run of the profile mini (unfinished: {left or 'none'})")
    marks = {("language_info", "name"), "kernelspec", ("emonb", "versions")}  # a run says if it has other versions
    kept = {"tags", "jupyter", "emonb"}
    clean = ClearMetadataPreprocessor(preserve_nb_metadata_mask=marks, preserve_cell_metadata_mask=kept)
    for source in sorted((out / "notebooks").glob("*.ipynb")):
        nb, _ = clean.preprocess(nbformat.read(source, as_version=4), {})
        nb, _ = CoalesceStreamsPreprocessor().preprocess(nb, {})  # how prints were cut up is chance
        if any("injected-parameters" in cell.metadata.get("tags", []) for cell in nb.cells):
            raise EmonbError(f"{source}: was run with options; make it again with: make notebooks")
        for cell in nb.cells:
            cell.metadata.pop("papermill", None)  # nbconvert clears code cells alone
        for data in (output.get("data", {}) for cell in nb.cells for output in cell.get("outputs", [])):
            if data.get("text/html", "").startswith('<div class="emonb-explorer"'):
                data["text/html"] = data["text/html"].split("<script", 1)[0]  # the sentence how to switch it on
        written.append(target / source.name)
        atomic_write(written[-1], nbformat.writes(nb))
    return written


def refresh_readme(out: Path, readme: Path) -> None:
    """Write a run's headline figures between the README's markers, and its picture into `docs/pictures/`."""
    main, modules, claims = (pd.read_csv(out / "tables" / f"{name}.csv") for name in ("main", "modules", "claims"))
    honest = ["head", "probe", "average_vlm_head", "average_vlm_vit"]  # they belong in the headline
    rivals = modules["row"].isin(honest)
    rows = pd.concat([main.dropna(subset="ours"), modules[rivals]])
    wide = display(rows).xs("ours", axis="columns", level=1)
    wide["paper, FI"] = rows[rows["paper_dataset"] == "FI"].set_index("name")["paper"].map("{:.2f}".format, "ignore")
    judged, seeds = claims[claims["dataset"] == "all"], ", ".join(map(str, read_json(out / "run.json")["seeds"]))
    share = judged["share"].map(" (in {:.0f} % of its resamplings)".format).where(judged["share"] < _SHAKY, "")
    text = (
        f"{_START}\n{markdown_text(wide.rename_axis('accuracy on test, %'))}\n"
        f"95 % intervals over {rows['n'].max():.0f} test images in each and the pipelines of seeds {seeds}. Ahead of "
        f"EmoVLM-KD, the interval of the difference wholly above 0: {ahead(main, modules)}.\n"
        "The [claims](notebooks/08_complementarity.ipynb) over all datasets: "
        f"{'; '.join(judged['claim'] + ' ' + judged['verdict'] + share)}.\n{_END}"
    )
    new, found = re.subn(f"{_START}.*{_END}", lambda _: text, readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    if not found:
        raise EmonbError(f"{readme}: the markers {_START!r} and {_END!r} are missing; put them back")
    picture = make_folder(readme.parent / "docs" / "pictures") / "complementarity.png"
    atomic_write(picture, (out / "figures" / "complementarity_venn.png").read_bytes())
    atomic_write(readme, new)
