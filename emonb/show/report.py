"""The report that opens from disk: `index.html`, one page with everything inside that is needed to read it.

Tables, claims, figures and the explorer are in the page; a content security policy forbids it to ask for anything.
Whatever the results folder lacks is said at the top, and everything that is there is shown. Names are data: the
template, `resources/report.html.jinja`, escapes all that is not marked safe here.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from emonb.errors import EmonbError
from emonb.files import atomic_write, read_json, resource, resource_path, visible
from emonb.predictions import (
    MODELS,
    LoadedPredictions,
    dataset_title,
    expected_models,
    gaps,
    is_drawn,
    load_all,
    model_name,
)
from emonb.settings import Settings
from emonb.show.explorer import explorer_html
from emonb.show.notebooks import write_site
from emonb.tables import numeric_columns, plain_caption, text_rows
from emonb.triplets import source_note

DRAWN_NOTE = (
    "The mini-* datasets are drawn by a program and only stand for the paper's datasets: their accuracies are "
    "not comparable with the paper's. What can be compared is the mechanism: which model gains over which."
)
_PICTURES = 4000  # thumbnails of all datasets together: about 6 MB
_CHART = {"vlm_tuned": "VLM, tuned", "vit": "ViT", "head": "distilled head", "emovlmkd": "EmoVLM-KD"}
_RESULT = {"row", "name", "dataset", "paper", "ours", "ci_low", "ci_high"}  # columns of a table of models
_NEEDED = {"main": _RESULT, "claims": {"claim", "statement", "dataset", "verdict", "value", "ci_low", "ci_high"}}


# ---- what a results folder holds -----------------------------------------------------------------------------------


@dataclass
class Results:
    """What a results folder holds; `problems` says in sentences what is missing or damaged."""

    out: Path
    run: dict[str, Any] = field(default_factory=dict)
    settings: Settings | None = None
    datasets: list[str] = field(default_factory=list)
    predictions: LoadedPredictions | None = None
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """What run.json says of each notebook."""
        return {name: record for name, record in _mapping(self.run, "notebooks").items() if isinstance(record, dict)}

    def links(self, folder: str, id: str, *endings: str) -> list[tuple[str, str]]:
        """Address and ending of those of a result's files that are there."""
        there = [end for end in endings if (self.out / folder / f"{id}.{end}").is_file()]
        return [(f"{folder}/{quote(id)}.{end}", end) for end in there]

    def safe(self, what: str, build: Callable[[], Any]) -> Any:
        """What `build` makes; if damaged contents make it fail, None, and a problem at the top instead of no page."""
        try:
            return build()
        except Exception as error:
            self.problems.append(f"{what} cannot be shown: {type(error).__name__}: {one_line(error)}")
            return None


def read_results(out: Path) -> Results:
    """Read everything that the report needs of a results folder; never fails over its contents."""
    results = Results(out)
    _read_run(results)
    _read_notebooks(results)
    _read_predictions(results)
    results.figures = {path.stem: path for path in _outputs(results, "figures/*.png")}
    for path in _outputs(results, "tables/*.csv"):
        try:
            frame = pd.read_csv(path)
            lacking = _NEEDED.get(path.stem, set()) - set(frame.columns)
            if lacking:
                raise ValueError(f"no column {sorted(lacking)[0]!r}")
            results.tables[path.stem] = frame
        except (OSError, ValueError) as error:
            results.problems.append(f"tables/{path.name} is damaged: {one_line(error)}")
    lost = [f"table {i}" for i in resource("report.yaml", "tables") if i not in results.tables]
    lost += [f"figure {i}" for i in resource("report.yaml", "figures") if i not in results.figures]
    results.problems += [f"Not made in this run: {', '.join(lost)}."] if lost else []
    return results


def one_line(error: object, longest: int = 300) -> str:
    """An error or text in one line."""
    return " ".join(str(error).split())[:longest]


def _mapping(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    return found if isinstance(found := tree.get(key), dict) else {}


def _read_run(results: Results) -> None:
    """run.json, and the datasets: from it, or from the prediction files."""
    path = results.out / "run.json"
    try:
        told = read_json(path)
        if not isinstance(told, dict):
            raise EmonbError("no JSON object")
        results.run = told
        results.settings = Settings.model_validate(told.get("settings"))
    except EmonbError as error:
        missing = "is missing: the run was stopped early, or this folder is a part of one"
        why = f"is damaged: {one_line(error)}" if path.is_file() else missing
        results.problems.append(f"run.json {why}; when and where this ran is not known")
    except ValueError:
        results.problems.append("run.json: its settings cannot be read; datasets are taken from the files")
    named = _mapping(results.run, "settings").get("datasets")
    files = {path.stem.split("__", 1)[0] for path in (results.out / "predictions").glob("*__*.parquet")}
    results.datasets = [str(name) for name in named] if isinstance(named, list) and named else sorted(files)


def _read_notebooks(results: Results) -> None:
    """Which notebooks are not what they should be, and why."""
    told = {
        "failed": "failed",
        "stopped": "was stopped before its end",
        "partial": "ran over incomplete results",
        "earlier run": "was not run again: what it wrote is of an earlier run",
    }
    for name, record in results.records.items():
        status, why = record.get("status"), one_line(record.get("error", ""))
        if status in told:
            why = f": {why or 'the reason was not recorded'}" if status == "failed" else ""
            results.problems.append(f"notebook {name} {told[status]}{why}")
        elif not (results.out / "notebooks" / f"{name}.ipynb").is_file():
            results.problems.append(f"notebooks/{name}.ipynb is missing" if status else f"notebook {name} was not run")


def _read_predictions(results: Results) -> None:
    folder = results.out / "predictions"
    try:
        found = load_all(folder, results.datasets or None, split="test", partial=True)
    except EmonbError:
        damaged = [path.name for path in sorted(folder.glob("*__*.parquet"))]
        results.problems.append("no predictions" + (f": all are damaged ({', '.join(damaged)})" if damaged else ""))
        return
    results.predictions = found  # without settings the best guess: what one dataset has, all should have
    models = expected_models(results.settings) if results.settings else dict.fromkeys(model for _, model in found)
    results.problems += gaps(found, results.datasets, models)


def _outputs(results: Results, pattern: str) -> list[Path]:
    """Tables or figures of this run; those of an earlier one with other datasets are left out."""
    told = [record.get("files") for record in results.records.values()]
    written = {path for files in told if isinstance(files, list) for path in files}
    there = sorted(results.out.glob(pattern))
    return [path for path in there if not written or f"{path.parent.name}/{path.name}" in written]


# ---- the page ------------------------------------------------------------------------------------------------------


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
    import jinja2
    from markupsafe import Markup

    results = results or read_results(out)
    notes, shown = _notes(results), set()
    results.problems += write_site(out, " ".join(notes))
    sections = [{**s, "blocks": _blocks(results, s["parts"], shown)} for s in resource("report.yaml", "sections")]
    files = ("report.css", "report.js", "explorer.js")
    style, *scripts = (resource_path(name).read_text(encoding="utf-8") for name in files)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    drawn = {is_drawn(name) for name in results.datasets}
    claims = results.tables.get("claims", pd.DataFrame({"dataset": [], "verdict": []}))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resource_path()),
        autoescape=True,
        trim_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    html = environment.get_template("report.html.jinja").render(
        style=Markup(style),
        script=Markup(scripts[0]),
        hashes=Markup(" ".join(f"'sha256-{digest}'" for digest in digests)),
        results=results,
        profile=str(results.run.get("profile", "unknown")),
        kind=" and ".join({True: "drawn", False: "real"}[one] for one in sorted(drawn, reverse=True)) or "no",
        notes=notes,
        score=claims.loc[claims["dataset"] == "all", "verdict"].astype(str).value_counts().to_dict(),
        facts=results.safe("the facts of the run", lambda: _facts(results.run)),
        sections=[section for section in sections if section["blocks"]],
        chart=_CHART,
        number=_number,
    )
    atomic_write(out / "index.html", html + "\n")
    return out / "index.html"


def _notes(results: Results) -> list[str]:
    """What stands on every page: drawn data, and who wrote the triplets."""
    try:
        said = source_note(results.out, results.datasets)
    except (EmonbError, OSError, ValueError, KeyError, TypeError) as error:
        results.problems.append(f"triplets cannot be read: {one_line(error)}")
        said = ""
    drawn = DRAWN_NOTE if any(map(is_drawn, results.datasets)) else ""
    return [note for note in (drawn, f"{said[:1].upper()}{said[1:]}." if said else "") if note]


def _facts(run: Mapping[str, Any]) -> dict[str, str]:
    """What run.json says of time, machine and packages; a value that is not there is left out."""
    totals, machine, git, lock = (_mapping(run, key) for key in ("totals", "machine", "git", "lock"))
    versions, theirs, seeds = _mapping(run, "versions"), _mapping(run, "differs_from_notebooks"), run.get("seeds")
    cores = f", {machine['cores']} cores" if machine.get("cores") else ""
    differs = ", ".join(f"{name} {found}" for name, found in list(_mapping(lock, "differs").items())[:3])
    locked = {True: "as locked", False: f"not as locked (here, locked): {differs}"}.get(lock.get("locked"), "")
    other = ", ".join(f"{name} {found[0]}, {found[1]}" for name, found in theirs.items())
    other = f"the committed notebooks had others (here, theirs): {other}" if other else ""
    facts = {
        "when": str(run.get("written", "")).replace("T", " ")[:16] + " UTC" if run.get("written") else "",
        "from nothing": _scaled(totals.get("seconds_compute"), 60, "min"),
        "this run": _scaled(totals.get("seconds_wall_this_run"), 60, "min"),
        "peak memory": _scaled(totals.get("peak_memory_mb"), 1024, "GB"),
        "machine": f"{machine['cpu']}{cores}, {machine.get('gpu') or 'no GPU'}" if machine.get("cpu") else "",
        "seeds of head and gates": ", ".join(map(str, seeds)) if isinstance(seeds, list) else "",
        "code": str(git.get("commit", ""))[:10] + (" + changes" if git.get("dirty") else ""),
        "versions": ", ".join(f"{n} {versions[n]}" for n in ("python", "torch", "transformers") if n in versions),
        "packages": "; ".join(filter(None, [locked, other])),
    }
    return {what: value for what, value in facts.items() if value}


def _scaled(value: Any, unit: float, name: str, digits: int = 1) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value / unit:.{digits}f} {name}" if number else ""


def _blocks(results: Results, parts: Sequence[str], shown: set[str]) -> list[dict[str, Any]]:
    """What a section shows: tables, groups of figures, the explorer, lists of files; each result once."""
    blocks: list[dict[str, Any]] = []
    for part in parts:
        kind, _, pattern = part.partition(":")
        known = {"table": results.tables, "figure": results.figures, "matrices": results.figures}.get(kind, ())
        ids = [i for i in known if fnmatchcase(i, pattern) and f"{kind[0]}:{i}" not in shown]
        shown |= {f"{k}:{i}" for i in ids for k in ("t" if kind == "table" else "fm")}
        if kind == "table":
            blocks += [results.safe(f"table {i}", lambda i=i: _table(results, i)) for i in ids]
        elif kind == "figure":
            blocks.append(_figures(results, ids))
        elif kind == "matrices":  # folded: a group for each dataset, its models in their order
            groups = {d: [i for m in MODELS if (i := f"confusion_{d}_{m}") in ids] for d in results.datasets}
            groups["others"] = [i for i in ids if not any(i in group for group in groups.values())]
            blocks += [_figures(results, group, f"Confusion matrices: {name}") for name, group in groups.items()]
        else:
            build = {"explorer": _explorer, "files": _files}[kind]
            blocks.append(results.safe(f"the {kind}", lambda build=build: build(results)))
    return [block for block in blocks if block]


def _figures(results: Results, ids: Sequence[str], folded: str = "") -> dict[str, Any] | None:
    made = [results.safe(f"figure {i}", lambda i=i: _figure(results, i)) for i in ids]
    figures = [figure for figure in made if figure]
    return {"figures": figures, "folded": folded} if figures else None


def _figure(results: Results, id: str) -> dict[str, Any]:
    """A figure as data of a few ten kB, with words and links to its files.

    Measured on the mini profile: PNG of 128 colours is a third of the saved PNG and of the SVG, and sharp;
    thumbnails are smaller as WebP.
    """
    import PIL.Image

    with PIL.Image.open(results.figures[id]) as file:
        picture = file.convert("RGB")
    photo = id.startswith(("qualitative_examples", "samples_"))
    picture.thumbnail((1000 if photo else 1500, picture.height), PIL.Image.Resampling.LANCZOS)
    buffer, form = io.BytesIO(), "webp" if photo else "png"
    if photo:
        picture.save(buffer, "WEBP", quality=80, method=4)
    else:
        picture.quantize(128, dither=PIL.Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    address = f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    links = results.links("figures", id, "svg", "png")
    return {"id": id, **figure_words(id), "links": links, "address": address, "size": picture.size}


def figure_words(id: str) -> dict[str, str]:
    """Title and text of any figure, also of one of each dataset and of one that nobody named."""
    known = resource("report.yaml", "figures")
    if id in known:
        return known[id]
    for start, words in resource("report.yaml", "families").items():
        if id.startswith(start):
            rest = id.removeprefix(start)
            model = next((m for m in MODELS if rest.endswith(f"_{m}")), "")
            name = dataset_title(rest.removesuffix(f"_{model}"))
            return {**words, "title": words["title"].format(f"{model_name(model)} on {name}" if model else name)}
    return {"title": id.replace("_", " ")}


def _table(results: Results, id: str) -> dict[str, Any]:
    """A table with title, caption and links to its files."""
    frame, words, saved = results.tables[id], resource("report.yaml", "tables").get(id, {}), ""
    with suppress(OSError, ValueError):
        saved = plain_caption((results.out / "tables" / f"{id}.md").read_text(encoding="utf-8"))
    caption = " ".join(filter(None, [words.get("text"), saved]))
    block = {"id": id, "title": f"Table {id.replace('_', ' ')}", **words, "caption": caption}
    block["links"] = results.links("tables", id, "csv", "md", "tex")
    if id == "claims":
        rows = frame.astype(object).where(frame.notna(), None)
        return block | {"claims": [part.to_dict("records") for _, part in rows.groupby("claim", sort=False)]}
    if set(frame.columns) >= _RESULT:
        chart = results.safe("the chart of the main result", lambda: _chart(results)) if id == "main" else None
        return block | {"models": _by_model(frame), "chart": chart}
    frame = frame.drop(columns="model") if {"model", "name"} <= set(frame.columns) else frame
    rows = text_rows(frame)
    return block | {"head": [*map(str, frame.columns)], "rows": rows, "right": numeric_columns(rows, frame.shape[1])}


def _by_model(frame: pd.DataFrame) -> dict[str, Any]:
    """A table of models: its names, and per dataset the columns to show, the best value and the rows by name."""
    frame = frame.assign(name=frame["name"].astype(str), dataset=frame["dataset"].astype(str))
    more = [column for column in ("gain", "kl") if column in frame and frame[column].notna().any()]
    own, parts = frame.loc[frame["row"] == "emovlmkd", "name"], {}
    for dataset, part in frame.groupby("dataset", sort=False):
        printed = [name for name in part.get("paper_dataset", []) if isinstance(name, str)]
        parts[dataset] = {
            "columns": [*(["paper"] if part["paper"].notna().any() else []), "ours", *more],
            "printed": printed[0] if printed else "",
            "best": part.loc[part["row"] != "oracle", "ours"].max(),
            "rows": {row["name"]: row for row in part.to_dict("records")},
        }
    return {"names": list(dict.fromkeys(frame["name"])), "own": "".join(own.head(1)), "parts": parts}


def _chart(results: Results) -> dict[str, dict[str, Any]]:
    """The main result as a picture: {dataset: {model: row}}, with the head, which the paper's main table lacks."""
    modules = results.tables.get("modules", pd.DataFrame({"row": []}))
    frame = pd.concat([results.tables["main"], modules[modules["row"] == "head"]], ignore_index=True)
    numbers = frame[["ours", "ci_low", "ci_high"]].astype(float)
    frame = frame.assign(**numbers)[numbers.notna().all(axis=1)].drop_duplicates(["dataset", "row"])
    parts = frame.groupby(frame["dataset"].astype(str), sort=False)
    return {dataset: part.set_index("row").to_dict("index") for dataset, part in parts}


def _number(row: Mapping[str, Any], column: str, low: str, high: str, digits: str = "") -> tuple[str, str]:
    """A value and its interval as texts; "" for what is not there."""
    found = pd.to_numeric(pd.Series([row.get(key) for key in (column, low, high)]), errors="coerce").astype(float)
    if not math.isfinite(found[0]):
        return "", ""
    digits = digits or (".1f" if max(map(abs, found)) >= 1 else ".3f")
    value, *ends = (f"{number:{digits}}" for number in found)
    return value, f"[{', '.join(ends)}]" if all(map(math.isfinite, found)) else ""


def _explorer(results: Results) -> dict[str, Any] | None:
    """The clickable confusion matrices; datasets that it cannot show are left out and named."""
    from markupsafe import Markup

    predictions, names = results.predictions or {}, []
    for name in [d for d in results.datasets if any(d == name for name, _ in predictions)]:
        try:
            explorer_html(predictions, name, limit=1)
            names.append(name)
        except EmonbError as error:
            results.problems.append(f"{name}: not in the explorer: {one_line(error)}")
    limit = max(100, _PICTURES // max(1, len(names)))
    return {"html": Markup(explorer_html(predictions, names, limit=limit))} if names else None


def _files(results: Results) -> dict[str, Any]:
    """The executed notebooks with their pages, and the files beside the page."""
    rows = []
    for name in sorted({path.stem for path in (results.out / "notebooks").glob("*.ipynb")} | set(results.records)):
        record, source = results.records.get(name, {}), results.links("notebooks", name, "ipynb")
        status = str(record.get("status") or ("not in this run" if source else "not run"))
        numbers = (_scaled(record.get("seconds"), 1, "s", 0), _scaled(record.get("peak_memory_mb"), 1, "MB", 0))
        rows.append((name, results.links("site", name, "html"), status, *numbers, source))
    files = {id: results.links("tables", id, "csv", "md", "tex") for id in sorted(results.tables)}
    pages = sorted((results.out / "integrity").glob("*.html"))
    files["integrity of the data"] = [(f"integrity/{quote(page.name)}", page.stem) for page in pages]
    files["settings, versions, times"] = [("run.json", "run.json")] if (results.out / "run.json").is_file() else []
    return {"notebooks": rows, "files": {what: links for what, links in files.items() if links}}
