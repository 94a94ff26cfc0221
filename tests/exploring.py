"""Made-up predictions and pictures for the tests of the explorer, with names that bite."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from PIL import Image
from synthetic import frame_of, synthetic

from emonb.predictions import LoadedPredictions, prediction_labels
from emonb.show.reasons import AGREES, EXCHANGED, NAMED, OTHER

HOSTILE = "<img src=x onerror=alert(1)>.png"
TEXT = "</script><script>alert(2)</script><!--<script> & <b>sad</b> $x$ **no**"
SHOWN = ("vlm_zero_shot", "vlm_tuned", "vit", "head", "emovlmkd")


def pictures(folder, predictions):
    """Sample tables of drawn pictures, {dataset: frame}; the first image of each dataset is missing."""
    found = {}
    for dataset in dict.fromkeys(name for name, _ in predictions):
        ids = predictions[dataset, "vit"]["image_id"]
        paths = [folder / f"{i % 12}.png" for i in range(len(ids))]
        for i, path in enumerate(paths[:12]):
            Image.new("RGB", (40 + 10 * i, 60), (20 * i, 120, 255 - 20 * i)).save(path)
        found[dataset] = pd.DataFrame({"image_id": ids, "path": [str(folder / "gone.png"), *map(str, paths[1:])]})
    return found


def loaded(folder, predictions):
    """Predictions as `load_all` gives them, with their pictures in the store of the same results folder."""
    found = LoadedPredictions(predictions)
    found.folder, found.problems = folder / "predictions", {}
    store_samples(folder, pictures(folder, predictions))
    return found


def world(folder, datasets=("mini-fi", "mini-flickr"), n=96):
    """Predictions of the shown models."""
    predictions = synthetic(datasets, n=n, models=SHOWN)
    tuned = predictions[datasets[0], "vlm_tuned"]
    tuned.loc[:2, "raw_text"] = ["", "It looks calm.", "a" * 5000]
    rows, columns = (tuned["label"] == "fear") & (tuned.index % 16 < 8), ["prediction", *tuned.filter(like="p_")]
    sad = frame_of(["sadness"] * n, tuned["label"].tolist(), prediction_labels(tuned))
    tuned.loc[rows, columns] = sad.loc[rows, columns]  # the VLM calls them sad
    judge(folder, datasets[0])
    return loaded(folder, predictions)


def judge(out: Path, dataset: str) -> None:
    """`tables/reasons.csv` of a results folder, as notebook 03 leaves it."""
    found = {AGREES: (61.4, 64), EXCHANGED: (20.0, 64), NAMED: (41.0, 46), OTHER: (24.0, 46)}
    rows = [(dataset, measure, *value) for measure, value in found.items()]
    table = pd.DataFrame(rows, columns=["dataset", "measure", "value", "n"])
    (out / "tables").mkdir(exist_ok=True)
    table.to_csv(out / "tables" / "reasons.csv", index=False)


def hostile_world(folder):
    """One dataset in which every name and text is markup."""
    labels, name = ["<u>awe</u>", '"fear"&', "</script>"], "<i>mine"
    truth, names = [labels[i % 3] for i in range(9)], [HOSTILE, *(f"{i} é'`&quot;.png" for i in range(8))]
    frame = frame_of(truth, truth, labels).assign(image_id=names, raw_text=TEXT)
    return loaded(folder, {(name, model): frame for model in SHOWN})


def store_samples(out: Path, samples: dict[str, pd.DataFrame]) -> None:
    """Put sample tables into the store of a results folder, as notebook 01 leaves them."""
    for number, (dataset, table) in enumerate(samples.items()):
        made = out / "artifacts" / "samples" / f"of-{len(list(out.rglob('samples.parquet')))}-{number}"
        made.mkdir(parents=True)
        table.assign(split="test").to_parquet(made / "samples.parquet")
        (made / "meta.json").write_text(json.dumps({"root": "/", "labels": []}))
        sizes = {path.name: path.stat().st_size for path in made.iterdir()}
        (made / "provenance.json").write_text(json.dumps({"files": sizes}))
        (made.parent / f"{dataset}.json").write_text(json.dumps({"key": made.name}))
