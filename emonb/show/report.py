"""The report that opens from disk: `index.html`, one page with everything inside that is needed to read it.

Tables, claims, figures and the explorer are in the page; a content security policy forbids it to ask for anything.
Whatever the results folder lacks is said at the top, and everything that is there is shown. Names are data: the
template, `resources/report.html.jinja`, escapes all that is not marked safe here.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd
from markupsafe import Markup

from emonb import predictions as pr
from emonb.claims import RESAMPLINGS
from emonb.errors import visible
from emonb.files import atomic_write, claim_folder, read_json, resource, resource_path
from emonb.settings import Settings
from emonb.show.explorer import explorer_html
from emonb.show.notebooks import write_site
from emonb.tables import LEVELS, ahead, by_evidence, display, format_value, numeric_columns, plain_caption
from emonb.triplets import source_note

# simpler than the method: shown beside it, whoever wins
_RIVALS = ("resnet", "vgg", "probe", "average_vlm_head", "average_vlm_vit")
_PICTURES = 4000  # thumbnails of all datasets together: about 6 MB


class _Results:
    """A results folder; `problems` says in sentences what is missing or damaged."""

    def __init__(self, out: Path) -> None:
        self.out, self.problems = out, []

    def safe(self, what: str, build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `build` makes; if what is in the folder makes it fail, None, and a problem instead of no page."""
        try:
            return build(*args, **kwargs)
        except Exception as error:
            why = " ".join(str(error).replace(f"{self.out}/", "").split())[:300]
            self.problems.append(f"{what} cannot be shown: {type(error).__name__}: {why}")

    def links(self, folder: str, id: str, *endings: str) -> list[tuple[str, str]]:
        """Address and ending of those of a result's files that are there."""
        there = [end for end in endings if (self.out / folder / f"{id}.{end}").is_file()]
        return [(f"{folder}/{quote(id)}.{end}", end) for end in there]


def write_report(out: Path) -> list[str]:
    """Write `site/*.html` and `index.html` of a results folder; equal results give equal bytes.

    Returns:
        What is missing or damaged, in sentences; the page says it, too.

    Raises:
        EmonbError: the folder cannot be written to, or is somebody else's. Nothing inside it is an error.
    """
    from emonb.figures import MARKERS

    results = _Results(claim_folder(out, "--out"))
    run = results.safe("run.json", lambda: {**read_json(out / "run.json")}) or {}
    settings = run and results.safe("settings of run.json", Settings.model_validate, run.get("settings"))
    found = sorted({path.stem.split("__", 1)[0] for path in (out / "predictions").glob("*__*.parquet")})
    datasets = list(settings.datasets) if settings else found
    records = results.safe("notebooks of run.json", _records, results, run.get("notebooks", {})) or {}
    said = results.safe("who wrote the triplets", source_note, out, datasets) or ""
    drawn = [pr.is_drawn(name) for name in datasets]
    notes = [resource("report.yaml", "drawn")] * any(drawn) + [f"{said[:1].upper()}{said[1:]}."] * bool(said)
    notes += settings.caveats if settings else []
    others = [f"{name} {', '.join(both)}" for name, both in run.get("differs_from_notebooks", {}).items()]
    notes += [f"{resource('report.yaml', 'elsewhere')} {'; '.join(others)}."] * bool(others)
    results.problems += write_site(out, " ".join(notes))
    blocks = _blocks(results, records, datasets, settings)
    notes += [block["note"] for block in [blocks.get("table:evidence")] if block]
    chart = (blocks.get("table:main") or {}).get("chart", {}).values()
    shown = [model for model in (*pr.QUARTET, *_RIVALS) if any(model in rows for rows in chart)]
    averages = [rows["average_vlm_head"] for rows in chart if "average_vlm_head" in rows]
    leading = (blocks.get("table:main") or {}).get("ahead", "none")
    marks = {**MARKERS, "probe": "|", "average_vlm_head": "_", "average_vlm_vit": "="}
    judged, sections = (blocks.get("table:claims") or {}).get("claims", []), []
    for section in resource("report.yaml", "sections"):
        keys = dict.fromkeys(key for part in section["parts"] for key in fnmatch.filter(blocks, part))
        found = [block for block in map(blocks.pop, keys) if block]
        groups = [(group, list(part)) for group, part in groupby(found, lambda block: block["group"])]
        sections += [{**section, "groups": groups}] if groups else []
    names = ("report.css", "report.js", "explorer.js")
    style, *scripts = (resource_path(name).read_text(encoding="utf-8") for name in names)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
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
        profile=str(run.get("profile", "unknown")),
        kind=" and ".join(["drawn"] * any(drawn) + ["real"] * (not all(drawn))) or "no",
        datasets=datasets,
        notes=notes,
        where="drawn pictures" if all(drawn) else " and ".join(datasets),
        wholes={row["claim"]: row for rows in judged for row in rows if row["dataset"] == "all"},
        averages=[row for row in averages if pd.notna(row.get("gain"))],
        ahead=leading,
        resamplings=RESAMPLINGS,
        facts=run and results.safe("the facts of the run", _facts, run),
        sections=sections,
        chart={model: (pr.model_name(model), pr.model_color(model) or "#777777", marks[model]) for model in shown},
        lines=LEVELS,
        problems=results.problems,
    )
    atomic_write(out / "index.html", html + "\n")
    return results.problems


def _records(results: _Results, notebooks: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    """What run.json says of each notebook; those that are not what they should be become problems."""
    words = resource("report.yaml", "statuses")
    for name, record in notebooks.items():
        status, why = record.get("status", "not run"), record.get("error", "")
        if status in words:
            results.problems.append(f"notebook {name} {words[status]}" + (f": {' '.join(why.split())}" if why else ""))
        elif not (results.out / "notebooks" / f"{name}.ipynb").is_file():
            results.problems.append(f"notebooks/{name}.ipynb is missing")
    return notebooks


def _blocks(
    results: _Results, records: Mapping[str, Any], datasets: list[str], settings: Settings | None
) -> dict[str, dict[str, Any] | None]:
    """Everything that the page can show under `table:ID`, `figure:ID`, `explorer:` and `files:`."""
    out, safe, blocks = results.out, results.safe, {}
    predictions = safe("predictions", pr.load_all, out / "predictions", datasets, split="test", partial=True) or {}
    known = dict.fromkeys(model for _, model in predictions)
    results.problems += pr.gaps(predictions, datasets, pr.expected_models(settings) if settings else known)
    written = [out / file for record in records.values() for file in record.get("files", [])]  # else of an earlier run
    order = {f"confusion_{dataset}_{model}": i for i, (dataset, model) in enumerate(product(datasets, pr.MODELS))}
    written += out.glob("tables/review.csv") if written else (*out.glob("tables/*.csv"), *out.glob("figures/*.png"))
    builders = {".csv": ("table", _table), ".png": ("figure", partial(_figure, datasets))}
    for path in sorted(sorted(set(written)), key=lambda path: order.get(path.stem, -1)):
        kind, build = builders.get(path.suffix, ("", None))
        if build and path.is_file():
            blocks[f"{kind}:{path.stem}"] = safe(f"{kind} {path.stem}", build, results, path)
    for kind, named in (("table", resource("report.yaml", "tables")), ("figure", resource("report.yaml", "figures"))):
        lost = [id for id, said in named.items() if f"{kind}:{id}" not in blocks and not said.get("optional")]
        lost = [id for id in lost if id != "evidence" or any(map(pr.is_drawn, datasets))]
        results.problems += [f"Not made in this run: {kind}s {', '.join(lost)}."] if lost else []
    there = [dataset for dataset in datasets if dataset in {name for name, _ in predictions}]
    shown = [d for d in there if safe(f"{d} in the explorer", explorer_html, predictions, [d], limit=1)]
    if shown:
        html = explorer_html(predictions, shown, limit=max(100, _PICTURES // len(shown)))
        blocks["explorer:"] = {"group": "explorer", "html": Markup(html)}
    return blocks | {"files:": safe("the files", _files, results, records)}


def _facts(run: Mapping[str, Any]) -> dict[str, str]:
    """What run.json says of time, machine and packages; what is empty is left out."""
    totals, machine, git, lock = (run.get(key, {}) for key in ("totals", "machine", "git", "lock"))
    differs = ", ".join(f"{name} {both}" for name, both in lock.get("differs", {}).items())
    facts = {
        "when": f"{run['written'][:10]} {run['written'][11:16]} UTC",
        "computing time of all stages, summed": f"{totals['seconds_compute'] / 60:.1f} min",
        "this run, start to end": f"{totals['seconds_wall_this_run'] / 60:.1f} min",
        "peak memory": f"{totals['peak_memory_mb'] / 1024:.1f} GB",
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine.get('gpu') or 'no GPU'}",
        "pipelines (seeds)": ", ".join(map(str, run["seeds"])),
        "code": str(git.get("commit", ""))[:10] + (" + changes" if git.get("dirty") else ""),
        "versions": ", ".join(f"{name} {run['versions'][name]}" for name in ("python", "torch", "transformers")),
        "packages": f"not as locked (here, locked): {differs}" if differs else "as locked" * bool(lock.get("locked")),
    }
    return {what: value for what, value in facts.items() if value}


def _table(results: _Results, path: Path) -> dict[str, Any]:
    """A table with title, caption and links to its files."""
    frame, id, words = pd.read_csv(path), path.stem, resource("report.yaml", "tables").get(path.stem, {})
    block = {"group": "table", "id": id, "title": f"Table {id.replace('_', ' ')}", **words}
    block["links"] = results.links("tables", id, "csv", "md", "tex")
    text = path.with_suffix(".md")
    saved = plain_caption(text.read_text(encoding="utf-8")) if text.is_file() else ""
    saved = saved if id == "main" else saved.replace(" (in the CSV at least)", "")  # here other gains are shown
    block["caption"] = [words.get("more", ""), saved and f"{saved.removesuffix('.')}."]
    if id == "claims":
        frame = frame.astype(dict.fromkeys(("value", "ci_low", "ci_high", "detectable", "share"), float))
        again = frame["share"].notna().any() & frame["n"].notna()  # then NaN: the verdict of no resampling
        frame["share"] = frame["share"].fillna(0).where(again)
        cards = frame.astype(object).where(frame.notna(), None).groupby("claim", sort=False)
        return block | {"claims": [part.to_dict("records") for _, part in cards]}
    if {"row", "paper", "ours"} <= set(frame):
        block["own"] = frame.loc[frame["row"] == "emovlmkd", "name"].tolist()
        if id == "main":  # as a picture, with the head, which the paper's main table lacks
            there = [file for file in (path, path.with_stem("modules")) if file.is_file()]
            rows = pd.concat(map(pd.read_csv, there)).dropna(subset="ours").drop_duplicates(["dataset", "row"])
            numbers = {"ours", "ci_low", "ci_high", "gain", "gain_low", "gain_high"} & {*rows}
            rows = rows.astype(dict.fromkeys(numbers, float))
            parts = rows.groupby("dataset", sort=False)
            block["chart"] = {dataset: part.set_index("row").to_dict("index") for dataset, part in parts}
            known = [part[[*LEVELS]].max().dropna() for _, part in parts] if {*LEVELS} <= {*rows} else []
            block["ahead"] = ahead(rows[rows["row"] != "average_vlm_head"])
            block["levels"] = {name: one.to_dict() for (name, _), one in zip(parts, known, strict=False)}
        shown = ("kl", "alone") if id == "main" else ("gain", "kl", "alone")
        texts = display(frame, [column for column in shown if column in frame]).reset_index()
    elif "evidence" in frame:
        whole = frame[frame["dataset"] == "all"]
        value, n = whole.pivot(index="row", columns="evidence", values="value"), whole.groupby("evidence")["n"].max()
        off, said = 100 * (n["all"] - n["no false mood"]) / n["content"], resource("report.yaml", "evidence")
        block["note"] = said.format(n=100 * n / n["all"], off=off, all=value["all"], rest=value["no false mood"])
        texts = by_evidence(whole).droplevel("dataset").reset_index()
    else:
        texts = _texts(frame.drop(columns="model") if {"model", "name"} <= set(frame) else frame)
    texts = texts.rename(columns=resource("report.yaml", "heads"))
    texts = texts.replace("\u00a0", " ", regex=True)  # here cells may break before an interval
    right = numeric_columns(texts.replace("^< ", "", regex=True))
    head = [("", c) if isinstance(c, str) else c if c[1] else c[::-1] for c in texts.columns]
    tops = [(top, len(list(part))) for top, part in groupby(top for top, _ in head)]
    return block | {"head": head, "tops": tops, "rows": texts.to_numpy().tolist(), "right": right}


def _texts(frame: pd.DataFrame) -> pd.DataFrame:
    """Any table for people: a column's numbers with as many decimals, an interval in the cell of its value."""
    frame = frame.rename(columns={"ci_low": "value_low", "ci_high": "value_high", "ms_median": "ms"})
    texts = frame.map(format_value).replace({"True": "yes", "False": "no"})
    for column in frame.filter(regex="(?<!_low)(?<!_high)$").select_dtypes("float"):
        parts = [part for part in (column, f"{column}_low", f"{column}_high") if part in texts]
        numbers = frame[parts].astype(float)
        top, whole = numbers.abs().max(axis=None), (numbers.fillna(0) % 1 == 0).all(axis=None)
        cells = numbers.map(_number, digits=0 if whole else 1 if top >= 10 else 2 if top >= 1 else 3)
        if len(parts) == 3:
            value, low, high = (cells[part] for part in parts)
            cells[column] = value + (" [" + low + ", " + high + "]").where(low != high, "")
        texts[parts] = cells
        texts = texts.drop(columns=parts[1:])
    return texts.loc[:, (texts != "").any()]


def _number(value: float, digits: int) -> str:
    """A number with so many decimals; one that they would make nothing of has a digit of its own."""
    if 1e-12 < abs(value) < 0.1**digits:
        return f"{value:.1g}" if abs(value) >= 1e-4 else "< 0.0001"
    return "" if pd.isna(value) else f"{value:z,.{digits}f}"


def _figure(datasets: Sequence[str], results: _Results, path: Path) -> dict[str, Any]:
    """A figure as data of a few ten kB with words and links, also one of a dataset and one that nobody named."""
    from emonb.figures import compact

    id, words = path.stem, {"group": "figures", "title": path.stem.replace("_", " ")}
    start = next((start for start in resource("report.yaml", "families") if id.startswith(start)), "")
    if start:
        rest = id.removeprefix(start)
        dataset = max((d for d in datasets if f"{rest}_".startswith(f"{d}_")), key=len, default=rest)
        model, title = rest[len(dataset) + 1 :], pr.dataset_title(dataset)
        names = {"which": f"{pr.model_name(model)} on {title}" if model else title, "dataset": title}
        words |= {key: text.format(**names) for key, text in resource("report.yaml", "families")[start].items()}
    photo, links = id.startswith(("qualitative", "samples")), results.links("figures", id, "svg", "png")
    data = base64.b64encode(compact(path, width=1000 if photo else 1500, photo=photo)).decode()
    address = f"data:image/{'jpeg' if photo else 'png'};base64,{data}"
    return {"id": id, **words, **resource("report.yaml", "figures").get(id, {}), "address": address, "links": links}


def _files(results: _Results, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The executed notebooks with their pages, and the files beside the page."""
    link, names = results.links, {path.stem for path in (results.out / "notebooks").glob("*.ipynb")} | set(records)
    rows = [(n, link("site", n, "html"), records.get(n, {}), link("notebooks", n, "ipynb")) for n in sorted(names)]
    return {"group": "files", "notebooks": rows, "run": link(".", "run", "json")}
