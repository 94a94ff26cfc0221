"""A small results folder for the tests of the report: predictions, tables, figures, notebooks and run.json."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pandas as pd
from exploring import pictures
from PIL import Image
from synthetic import synthetic

from emonb import claims, tables
from emonb.gaps import expected_models
from emonb.paper_values import departures
from emonb.predictions import prediction_labels, write_predictions
from emonb.report_words import FIGURES
from emonb.settings import Settings, load_settings
from emonb.store import Store
from emonb.workspace import Workspace

DATASETS = ("mini-fi", "mini-flickr")
NAMES = ("01_data", "04_teacher", "07_tables", "08_complementarity")


def small_settings(out: Path) -> Settings:
    """Smoke settings of two datasets with few resamples."""
    settings = load_settings("smoke", datasets=",".join(DATASETS), out=str(out))
    return settings.model_copy(update={"report": settings.report.model_copy(update={"bootstrap": 100})})


def make_results(out: Path) -> Path:
    """A folder as a finished run leaves it, without models."""
    settings = small_settings(out)
    ws = Workspace(settings, Store(out / "artifacts"), out)
    models = expected_models(settings)
    predictions = {key: f for key, f in synthetic(DATASETS, n=24).items() if key[1] in models}
    for (dataset, model), frame in predictions.items():
        write_predictions(out / "predictions" / f"{dataset}__{model}.parquet", frame, prediction_labels(frame))
    for model in ("main", "modules", "gates", "alpha", "depth", "instruction_tuning"):
        table = getattr(tables, model)(predictions, settings)
        ws.save_table(table, model)
    ws.save_table(claims.claims(predictions, settings, None), "claims")
    ws.save_table(departures(drawn=True, stand_in=True), "departures", "What the paper has and what we have")
    numbers = pd.DataFrame({"model": ["ViT", "head"], "value": [0.1, 0.25]})
    for name in ("calibration", "gate_trust", "cost", "parameters", "complementarity", "datasets", "triplets"):
        ws.save_table(numbers, name, f"Table {name}")
    matrices = [f"confusion_{d}_{m}" for d in DATASETS for m in ("vit", "emovlmkd")]
    for i, name in enumerate([*FIGURES, *matrices, "confusion_difference_mini-fi", "samples_mini-fi"]):
        (out / "figures").mkdir(exist_ok=True)
        Image.new("RGB", (60, 40), (i, 90, 200 - i)).save(out / "figures" / f"{name}.png")
        (out / "figures" / f"{name}.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    add_samples(out, predictions)
    records = {}
    for name in NAMES:
        write_notebook(out, name)
        records[name] = {"status": "executed", "seconds": 12.0, "peak_memory_mb": 300.0, "fingerprint": "x"}
    run = {
        "written": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "some CPU", "cores": 2, "gpu": None},
        "versions": {"python": "3.11", "torch": "2.15"},
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "profile": "smoke",
        "seeds": [0, 1, 2],
        "totals": {"seconds_wall_this_run": 60.0, "seconds_compute": 90.0, "peak_memory_mb": 900.0},
        "settings": settings.model_dump(mode="json"),
        "notebooks": records,
    }
    (out / "run.json").write_text(json.dumps(run))
    return out


def write_notebook(out: Path, name: str, error: tuple[str, str] | None = None) -> None:
    """An executed notebook of one cell, which may have failed."""
    printed = nbformat.v4.new_output("stream", text="done")
    if error:
        printed = nbformat.v4.new_output("error", ename=error[0], evalue=error[1], traceback=[])
    cell = nbformat.v4.new_code_cell("1", execution_count=1, outputs=[printed], id="only")
    (out / "notebooks").mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), out / "notebooks" / f"{name}.ipynb")


def add_samples(out: Path, predictions: dict) -> None:
    """Sample tables with pictures, as notebook 01 leaves them in the store."""
    folder = out / "pictures"
    folder.mkdir(exist_ok=True)
    for dataset, frame in pictures(folder, predictions).items():
        made = out / "artifacts" / "samples" / f"of-{DATASETS.index(dataset) if dataset in DATASETS else 9}"
        made.mkdir(parents=True)
        frame["path"] = [str(Path(p).relative_to(folder)) for p in frame["path"]]
        frame.assign(split="test").to_parquet(made / "samples.parquet")
        (made / "meta.json").write_text(json.dumps({"root": str(folder), "labels": []}))
        sizes = {p.name: p.stat().st_size for p in made.iterdir()}
        (made / "provenance.json").write_text(json.dumps({"files": sizes}))
        (made.parent / f"{dataset}.json").write_text(json.dumps({"key": made.name}))


def edit_run(out: Path, change) -> None:
    """Change run.json."""
    run = json.loads((out / "run.json").read_text())
    change(run)
    (out / "run.json").write_text(json.dumps(run))
