"""A results folder as the report sees it: what is there, and a sentence for everything that is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from emonb.errors import EmonbError
from emonb.gaps import gaps, list_gaps
from emonb.predictions import LoadedPredictions, load_all
from emonb.report_words import FIGURES, TABLES
from emonb.settings import Settings
from emonb.store import read_json
from emonb.table_text import plain_caption

__all__ = ["Results", "one_line", "read_results"]

_NEEDED = {
    "main": {"row", "name", "dataset", "paper", "ours", "ci_low", "ci_high"},
    "claims": {"claim", "statement", "dataset", "verdict", "value", "ci_low", "ci_high"},
}  # columns without which a table is not what its name says


@dataclass
class Results:
    """What a results folder holds; `problems` says in sentences what is missing or damaged."""

    out: Path
    run: dict[str, Any] = field(default_factory=dict)
    settings: Settings | None = None
    predictions: LoadedPredictions | None = None
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def datasets(self) -> list[str]:
        """Names of the run's datasets: by its settings, else by its prediction files."""
        if self.settings:
            return list(self.settings.datasets)
        told = self.run.get("settings")
        told = told.get("datasets") if isinstance(told, Mapping) else None
        if isinstance(told, list) and told:
            return [str(name) for name in told]
        return sorted({path.stem.split("__", 1)[0] for path in (self.out / "predictions").glob("*__*.parquet")})

    @cached_property
    def counts(self) -> dict[str, int]:
        """Test images of each dataset, by the prediction files."""
        found: dict[str, int] = {}
        for (dataset, model), frame in (self.predictions or {}).items():
            if model != "vlm_generated":  # answers to some test images only
                found[dataset] = max(found.get(dataset, 0), frame["image_id"].nunique())
        return found

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """What run.json says of each notebook."""
        told = self.run.get("notebooks")
        return {str(k): v for k, v in told.items() if isinstance(v, dict)} if isinstance(told, dict) else {}

    def caption(self, table: str) -> str:
        """The caption that was saved with a table."""
        try:
            return plain_caption((self.out / "tables" / f"{table}.md").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""


def read_results(out: Path) -> Results:
    """Read everything that the report needs of a results folder; never fails over its contents."""
    results = Results(out)
    _read_run(results)
    _read_notebooks(results)
    _read_predictions(results)
    _read_tables(results)
    _read_figures(results)
    lost = [f"table {i}" for i in TABLES if i not in results.tables]
    lost += [f"figure {i}" for i in FIGURES if i not in results.figures]
    if lost:
        results.problems.append(f"Not made in this run: {', '.join(lost)}.")
    return results


def one_line(error: object, longest: int = 300) -> str:
    """An error or text in one line."""
    return " ".join(str(error).split())[:longest]


def _read_run(results: Results) -> None:
    path = results.out / "run.json"
    try:
        told = read_json(path) if path.is_file() else None
    except (EmonbError, OSError, ValueError) as error:
        results.problems.append(f"run.json is damaged: {one_line(error)}; when and where this ran is not known")
        return
    if not isinstance(told, dict):
        why = (
            "is missing: the run was stopped early, or this folder is a part of one" if told is None else "is damaged"
        )
        results.problems.append(f"run.json {why}; when and where this ran is not known")
        return
    results.run = told
    try:
        results.settings = Settings.model_validate(told.get("settings"))
    except ValueError:
        results.problems.append("run.json: its settings cannot be read; datasets are taken from the files")


def _read_notebooks(results: Results) -> None:
    """Why a notebook is not what it should be: by run.json, else by the executed copy."""
    say = results.problems.append
    copies = {path.stem: path for path in sorted((results.out / "notebooks").glob("*.ipynb"))}
    for name in sorted({*results.records, *copies}):
        record = results.records.get(name, {})
        status, why = record.get("status"), one_line(record.get("error", ""))
        if name in copies:
            try:
                why = why or _error_of(copies[name])
            except (OSError, ValueError, AttributeError, TypeError) as error:
                say(f"notebooks/{name}.ipynb is damaged: {one_line(error)}")
                continue
        if status == "failed" or (why and status not in ("stopped", "partial")):
            say(f"notebook {name} failed: {why or 'the reason was not recorded'}")
        elif status == "stopped":
            say(f"notebook {name} was stopped before its end")
        elif status == "partial":
            say(f"notebook {name} ran over incomplete results")
        elif status == "earlier run":
            say(f"notebook {name} was not run again: what it wrote is of an earlier run")
        elif name in results.records and name not in copies:
            say(f"notebook {name} was not run" if not status else f"notebooks/{name}.ipynb is missing")


def _error_of(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for output in (o for cell in cells for o in cell.get("outputs", [])):
        if output.get("output_type") == "error":
            return one_line(f"{output.get('ename', '')}: {output.get('evalue', '')}")
    return ""


def _read_predictions(results: Results) -> None:
    folder = results.out / "predictions"
    try:
        found = load_all(folder, results.datasets or None, split="test", partial=True)
    except EmonbError:
        damaged = [path.name for path in sorted(folder.glob("*__*.parquet"))]
        results.problems.append("no predictions" + (f": all are damaged ({', '.join(damaged)})" if damaged else ""))
        return
    results.predictions = found
    if results.settings:
        results.problems += gaps(found, results.settings)
    else:  # the best guess: what one dataset has, all should have
        models = dict.fromkeys(model for _, model in found)
        results.problems += [*found.problems.values(), *list_gaps(found, results.datasets, models)]


def _own(results: Results, folder: str, ending: str) -> list[Path]:
    """Outputs of this run; those of an earlier one with other datasets are left out."""
    told = [record.get("outputs") for record in results.records.values()]
    written = {path for outputs in told if isinstance(outputs, dict) for path in outputs}
    there = sorted((results.out / folder).glob(f"*.{ending}"))
    return [p for p in there if not written or f"{folder}/{p.name}" in written]


def _read_tables(results: Results) -> None:
    for path in _own(results, "tables", "csv"):
        try:
            frame = pd.read_csv(path)
            lacking = _NEEDED.get(path.stem, set()) - set(frame.columns)
            if lacking:
                raise ValueError(f"no column {sorted(lacking)[0]!r}")
        except (OSError, ValueError) as error:
            results.problems.append(f"tables/{path.name} is damaged: {one_line(error)}")
            continue
        results.tables[path.stem] = frame


def _read_figures(results: Results) -> None:
    import PIL.Image

    for path in _own(results, "figures", "png"):
        try:
            with PIL.Image.open(path) as picture:
                picture.load()
        except (OSError, ValueError, SyntaxError) as error:
            why = "0 bytes" if not path.stat().st_size else one_line(error).replace(str(path), path.name)
            results.problems.append(f"figures/{path.name} is damaged: {why}")
            continue
        results.figures[path.stem] = path
