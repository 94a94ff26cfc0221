"""A small results folder for the tests of the report: predictions, tables, figures, notebooks and run.json."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pandas as pd
from exploring import pictures, store_samples
from PIL import Image
from synthetic import drawn_of, synthetic

from emonb import claims, tables
from emonb.files import resource
from emonb.predictions import expected_models, write_predictions
from emonb.settings import load_settings

DATASETS = ("mini-fi", "mini-flickr")
NAMES = ("01_data", "04_teacher", "07_tables", "08_complementarity")


def make_results(out: Path) -> Path:
    """A folder as a finished run leaves it, without models."""
    for folder in ("predictions", "tables", "figures", "notebooks", "pictures"):
        (out / folder).mkdir(parents=True)
    settings = load_settings("smoke", datasets=",".join(DATASETS), out=str(out), report={"bootstrap": 100})
    models = expected_models(settings)
    predictions = {key: f for key, f in synthetic(DATASETS, n=24).items() if key[1] in models}
    for (dataset, model), frame in predictions.items():
        write_predictions(out / "predictions" / f"{dataset}__{model}.parquet", frame)
    apart = pd.DataFrame(resource("paper_values.yaml", "departures"))
    drawn = drawn_of(predictions, DATASETS)
    evidence = {dataset: table["evidence"] for dataset, table in drawn.items()}
    made = {
        "claims": claims.claims(claims.comparisons(claims.collect(predictions, settings, evidence), settings), None),
        "evidence": tables.evidence(predictions, settings, drawn),
        "departures": apart.drop(columns="when"),
    }
    for name in ("main", "modules", "gates", "alpha", "depth", "depth_schedule", "instruction_tuning"):
        made[name] = getattr(tables, name)(predictions, settings, *[drawn] * (name == "main"))
    numbers = pd.DataFrame({"model": ["ViT", "head"], "value": [0.1, 0.25]})
    always = [name for name, words in resource("report.yaml", "tables").items() if not words.get("optional")]
    for name, frame in (dict.fromkeys(always, numbers) | made).items():
        (out / "tables" / f"{name}.csv").write_text(tables.csv_text(frame))
        (out / "tables" / f"{name}.md").write_text(tables.markdown_text(frame, f"Table {name}"))
        (out / "tables" / f"{name}.tex").write_text("")
    more = [f"confusion_{d}_{m}" for d in DATASETS for m in ("vit", "emovlmkd")]
    more += ["confusion_difference_mini-fi", "samples_mini-fi"]
    for i, name in enumerate([*resource("report.yaml", "figures"), *more]):
        Image.new("RGB", (60, 40), (i, 90, 200 - i)).save(out / "figures" / f"{name}.png")
        (out / "figures" / f"{name}.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    store_samples(out, pictures(out / "pictures", predictions))
    for name, after in zip(NAMES, (*NAMES[1:], "09_try_your_image"), strict=True):
        write_notebook(out, name, f"[numbers](../tables/main.csv), next: [that]({after}.ipynb#End)")
    record = {"status": "executed", "seconds": 12.0, "peak_memory_mb": 300.0}
    run = {
        "written": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "some CPU", "cores": 2, "gpu": None},
        "versions": {"python": "3.11", "torch": "2.15", "transformers": "5"},
        "lock": {"locked": True, "differs": {}},
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "profile": "smoke",
        "seeds": [0, 1, 2],
        "totals": {"seconds_wall_this_run": 60.0, "seconds_compute": 90.0, "peak_memory_mb": 900.0},
        "settings": settings.model_dump(mode="json"),
        "notebooks": dict.fromkeys(NAMES, record),
    }
    (out / "run.json").write_text(json.dumps(run))
    return out


def write_notebook(out: Path, name: str, text: str = "") -> None:
    """An executed notebook of a text and one cell."""
    printed = nbformat.v4.new_output("stream", text="done")
    cells = [nbformat.v4.new_markdown_cell(f"# End\n{text}", id="text")]
    cells.append(nbformat.v4.new_code_cell("1", execution_count=1, outputs=[printed], id="only"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), out / "notebooks" / f"{name}.ipynb")


def edit_run(out: Path, change) -> None:
    """Change run.json."""
    run = json.loads((out / "run.json").read_text())
    change(run)
    (out / "run.json").write_text(json.dumps(run))
