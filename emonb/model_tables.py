"""Tables behind three figures: whom the gate followed, calibration, accuracy against cost. Predictions only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from emonb.complementarity import QUARTET, first_seed, joint
from emonb.metrics import accuracy_interval, calibration_error, reliability
from emonb.paper_values import dataset_title
from emonb.predictions import Predictions, model_name, prediction_labels
from emonb.settings import Settings
from emonb.tables import test_rows

__all__ = ["accuracy_cost_table", "calibration_table", "gate_trust_table"]


def gate_trust_table(predictions: Predictions, datasets: Sequence[str]) -> pd.DataFrame:
    """Whom the gate followed where VLM and head disagree, per true emotion; "all" first. Holds for any gate.

    Columns: dataset (title), emotion, n (images of disagreement, first seed), then in percent of n:
    `followed_vlm, followed_head, followed_neither` and `vlm_right, head_right, gate_right`.
    """
    rows = []
    for dataset in datasets:
        table = joint(predictions, dataset, ("vlm_tuned", "head", "emovlmkd"))
        if not {"vlm_tuned", "head", "emovlmkd"} <= set(table.columns):
            continue
        table = table[table["vlm_tuned"] != table["head"]]
        labels = prediction_labels(predictions[dataset, "emovlmkd"])
        for emotion in ("all", *labels):
            part = table if emotion == "all" else table[table["label"] == emotion]
            if len(part):
                vlm, head = (part["emovlmkd"] == part[m] for m in ("vlm_tuned", "head"))
                right = [part[m] == part["label"] for m in ("vlm_tuned", "head", "emovlmkd")]
                shares = [100 * hit.mean() for hit in (vlm, head, ~vlm & ~head, *right)]
                rows.append((dataset_title(dataset), emotion, len(part), *shares))
    names = ["followed_vlm", "followed_head", "followed_neither", "vlm_right", "head_right", "gate_right"]
    frame = pd.DataFrame(rows, columns=["dataset", "emotion", "n", *names])
    frame.attrs["caption"] = (
        "Table gate_trust: test images on which tuned VLM and head name different emotions; whose answer EmoVLM-KD "
        "gives, and who is right there, in percent of them; one seed."
    )
    return frame


def calibration_table(
    predictions: Predictions, datasets: Sequence[str], models: Sequence[str] = QUARTET
) -> pd.DataFrame:
    """How far confidence is from accuracy: first seed of each model on test images; lacking models are left out.

    Columns: dataset (title), model, name, n, `ece, confidence, accuracy` in percent (`metrics.calibration_error`).
    """
    rows = []
    for dataset in datasets:
        for model in models:
            if (dataset, model) in predictions:
                frame = first_seed(predictions[dataset, model])
                bins = reliability(frame)
                means = [100 * np.average(bins[c], weights=bins["n"]) for c in ("confidence", "accuracy")]
                names = (dataset_title(dataset), model, model_name(model))
                rows.append((*names, len(frame), calibration_error(frame), *means))
    frame = pd.DataFrame(rows, columns=["dataset", "model", "name", "n", "ece", "confidence", "accuracy"])
    frame.attrs["caption"] = (
        "Table calibration: expected calibration error over 15 bins of equal width (Guo et al. 2017), mean "
        "confidence and accuracy, in percent, on test images; first seed of each model."
    )
    return frame


def accuracy_cost_table(cost: pd.DataFrame, predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """The `cost` table with test accuracies: rows without predictions are left out.

    Added columns: `accuracy, low, high` in percent (interval over images, all seeds), `seeds`; `n` becomes the
    number of test images.
    """
    titles = {dataset_title(d): d for d in settings.datasets}
    options, rows = (settings.report.bootstrap, settings.report.confidence), []
    for row in cost.to_dict("records"):
        frame = test_rows(predictions, titles.get(row["dataset"], ""), row["model"])
        if frame is not None:
            measured = dict(zip(("accuracy", "low", "high"), accuracy_interval(frame, *options), strict=True))
            counts = {"n": frame["image_id"].nunique(), "seeds": frame["seed"].nunique()}
            rows.append({**row, **measured, **counts})
    return pd.DataFrame(rows, columns=[*cost.columns, "accuracy", "low", "high", "seeds"])
