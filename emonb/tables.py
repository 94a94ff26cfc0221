"""The result tables: pure functions of the prediction files, one row per model and dataset.

Columns of every table: `row, name, dataset, paper_dataset, paper, paper_source, ours, difference,
ci_low, ci_high, n, seeds`, then `gain, gain_low, gain_high` where rows are compared with a reference
row (in points, on the same images). Accuracies in percent on split `test`; an empty `paper` = not
reported here. The mini-* sets are drawn and only stand for the set in `paper_dataset`: their
accuracies and the difference from the paper are no comparison of quality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from emonb.metrics import (
    accuracy_interval,
    bootstrap_means,
    either_right,
    interval,
    kl_by_image,
    mcnemar_p,
    paired_correctness,
    paired_interval,
)
from emonb.paper_values import dataset_title, is_drawn, paper_dataset, paper_rows, paper_value
from emonb.predictions import MODEL_NAMES, Predictions, model_name, prediction_labels
from emonb.settings import Settings

__all__ = [
    "alpha",
    "alpha_model",
    "depth",
    "depth_model",
    "display",
    "gates",
    "instruction_tuning",
    "main",
    "modules",
    "test_rows",
]


class Row(NamedTuple):
    """One row of a result table: our model, its name, and the paper's row of the same thing."""

    model: str
    name: str
    paper_row: str = ""


def test_rows(predictions: Predictions, dataset: str, model: str) -> pd.DataFrame | None:
    """Test rows of a model, or None where this run has no such predictions, or none of test images."""
    frame = predictions.get((dataset, model))
    rows = None if frame is None else frame[frame["split"] == "test"]
    return None if rows is None or rows.empty else rows


def depth_model(hidden: Sequence[int], settings: Settings) -> str:
    """Prediction file of a head with these hidden layers: the default head is `head`."""
    return "head" if tuple(hidden) == settings.distill.hidden else f"head_depth{len(hidden)}"


def alpha_model(value: float, settings: Settings) -> str:
    """Prediction file of a head distilled with this alpha: the default head is `head`."""
    return "head" if value == settings.distill.alpha else f"head_alpha{value:g}"


def main(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """The paper's main table: EmoVLM-KD, its parts and baselines, and models only the paper has."""
    rows = [Row(row, known["name"], row) for row, known in paper_rows("main").items()]
    note = "Rows without a value of ours are models that only the paper reports."
    return _table("main", predictions, settings, rows, note=note)


def modules(
    predictions: Predictions,
    settings: Settings,
    counts: Callable[[int], Mapping[str, int]] | None = None,
) -> pd.DataFrame:
    """The paper's module table with parameter counts, and the rivals that could embarrass the method.

    Args:
        counts: our parameters by model for a number of classes (`parameters.system_counts`).
    """
    rows = [Row(row, known["name"], row) for row, known in paper_rows("modules").items()]
    rows += [
        Row("average_vlm_head", model_name("average_vlm_head")),
        Row("average_vlm_vit", model_name("average_vlm_vit")),
        Row(alpha_model(0.0, settings), "head without distillation (alpha = 0)"),
        Row("oracle", "oracle: VLM or ViT is right"),
    ]
    table = _table("modules", predictions, settings, rows, reference="emovlmkd")
    printed = {row: known["parameters"] for row, known in paper_rows("modules").items()}
    table["parameters_paper"] = table["row"].map(printed).astype(float)
    ours = {}
    for dataset in settings.datasets if counts else ():
        frames = [f for (d, _), f in predictions.items() if d == dataset]
        if frames:
            title = dataset_title(dataset)
            found = counts(len(prediction_labels(frames[0])))
            ours |= {(title, model): count for model, count in found.items()}
    keys = zip(table["dataset"], table["row"], strict=True)
    table["parameters_ours"] = [float(ours.get(key, np.nan)) for key in keys]
    return table


def depth(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Heads of one to five hidden layers. Ours: the head alone; the paper's column: the gated model."""
    printed = {known["name"]: row for row, known in paper_rows("depth").items()}
    names = [(hidden, str(list(hidden))) for hidden in settings.distill.depths]
    rows = [Row(depth_model(hidden, settings), name, printed.get(name, "")) for hidden, name in names]
    note = "Ours is the head alone, the paper's column the gated model with such a head."
    return _table("depth", predictions, settings, rows, reference="head", note=note)


def gates(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """The five gates, two other inputs of the best-known one, and no gate at all."""
    rows = [Row(row, known["name"], row) for row, known in paper_rows("gates").items()]
    rest = ("gate_concat_logits", "gate_concat_soft", "average_vlm_head")
    rows += [Row(model, model_name(model)) for model in rest]
    return _table("gates", predictions, settings, rows, reference="emovlmkd")


def alpha(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Heads by weight of distillation: accuracy and KL(teacher || head) at the paper's temperature.

    Extra columns: `alpha`, and `kl, kl_low, kl_high` in nats, from the stored probabilities.
    """
    values = {alpha_model(a, settings): a for a in settings.distill.alphas}
    rows = [Row(model, f"alpha = {a:g}", f"{a:g}") for model, a in values.items()]
    table = _table("alpha", predictions, settings, rows, reference="head")
    table["alpha"] = table["row"].map(values)
    titles = {dataset_title(d): d for d in settings.datasets}
    kl = []
    for title, model in zip(table["dataset"], table["row"], strict=True):
        student = test_rows(predictions, titles[title], model)
        teacher = test_rows(predictions, titles[title], settings.teacher.teacher)
        if student is None or teacher is None or not set(student["image_id"]) & set(teacher["image_id"]):
            kl.append((np.nan,) * 3)
            continue
        values_ = kl_by_image(teacher, student, settings.distill.tau).to_numpy()
        resampled = bootstrap_means(values_, settings.report.bootstrap)
        kl.append(interval(values_.mean(), resampled, settings.report.confidence))
    table[["kl", "kl_low", "kl_high"]] = np.array(kl, float).reshape(-1, 3)
    return table


def instruction_tuning(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Zero-shot against tuned, and free generation against scoring.

    Extra columns: `mcnemar_p` (against zero-shot); `parse_rate`, percent of answers with a label; and
    `agreement`, percent of images on which the answer equals the tuned VLM's scored one.
    """
    rows = [Row(model, model_name(model), model) for model in ("vlm_zero_shot", "vlm_tuned", "vlm_generated")]
    compared = {"reference": "vlm_zero_shot", "title": "instruction_tuning"}
    table = _table("main", predictions, settings, rows, **compared)
    extra = []
    titles = {dataset_title(d): d for d in settings.datasets}
    for title, model in zip(table["dataset"], table["row"], strict=True):
        frame = test_rows(predictions, titles[title], model)
        zero, tuned = (test_rows(predictions, titles[title], m) for m in ("vlm_zero_shot", "vlm_tuned"))
        p = same = np.nan
        if frame is not None and zero is not None and model != "vlm_zero_shot":
            pair = paired_correctness(frame, zero)
            p = mcnemar_p(pair["a"] == 1, pair["b"] == 1) if len(pair) else np.nan
        if frame is not None and tuned is not None:
            both = frame.merge(tuned, on="image_id", suffixes=("", "_tuned"))
            same = 100 * (both["prediction"] == both["prediction_tuned"]).mean()
        extra.append((p, np.nan if frame is None else 100 * frame["parsed"].mean(), same))
    table[["mcnemar_p", "parse_rate", "agreement"]] = np.array(extra, float).reshape(-1, 3)
    return table


def display(table: pd.DataFrame, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A result table as people read it: one row per model; per dataset the paper's value and ours.

    Args:
        columns: further columns of the table to show, e.g. `("gain",)`.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in table.to_dict("records"):
        title, paper = row["dataset"], row["paper_dataset"]
        if paper:
            shown = "" if np.isnan(row["paper"]) else f"{row['paper']:.2f}"
            cells.setdefault((title, f"paper ({paper})"), {})[row["name"]] = shown
        if not np.isnan(row["ours"]):
            shown = f"{row['ours']:.1f}\u00a0[{row['ci_low']:.1f},\u00a0{row['ci_high']:.1f}]"
            cells.setdefault((title, "ours"), {})[row["name"]] = shown
        for column in columns:
            value = row[column]
            cells.setdefault((title, column), {})[row["name"]] = "" if np.isnan(value) else f"{value:.3g}"
    wide = pd.DataFrame(cells).reindex(dict.fromkeys(table["name"])).fillna("")
    wide.columns = pd.MultiIndex.from_tuples(wide.columns) if len(wide.columns) else wide.columns
    return wide.rename_axis(index=None)


def _table(
    paper_table: str,
    predictions: Predictions,
    settings: Settings,
    rows: Sequence[Row],
    *,
    reference: str = "",
    note: str = "",
    title: str = "",
) -> pd.DataFrame:
    """Rows x datasets in long form; rows known neither to us nor to the paper are left out.

    `attrs["caption"]` describes the table, `attrs["missing"]` names prediction files that are not there.
    """
    records, missing = [], []
    for dataset in settings.datasets:
        for row in rows:
            frame = _frame(predictions, dataset, row.model)
            paper = paper_value(paper_table, row.paper_row, dataset)
            if frame is None and (row.model in MODEL_NAMES or row.model.startswith("head_")):
                missing.append(f"{dataset}__{row.model}")
            if frame is None and np.isnan(paper):
                continue
            base = _frame(predictions, dataset, reference) if reference else None
            record = {"row": row.model, "name": row.name, **_paper_cells(paper_table, row, dataset, paper)}
            record |= _our_cells(frame, base if row.model != reference else None, settings, bool(reference))
            record["difference"] = record["ours"] - paper
            record["dataset"] = dataset_title(dataset)
            records.append(record)
    columns = ["row", "name", "dataset", "paper_dataset", "paper", "paper_source"]
    columns += ["ours", "difference", "ci_low", "ci_high", "n", "seeds"]
    columns += ["gain", "gain_low", "gain_high"] if reference else []
    table = pd.DataFrame(records, columns=columns)
    for column in ("n", "seeds"):  # whole numbers or nothing, also in the CSV
        table[column] = pd.Series([record[column] for record in records], dtype=object)
    table.attrs |= {"caption": _caption(title or paper_table, settings, reference, note), "missing": missing}
    return table


def _frame(predictions: Predictions, dataset: str, model: str) -> pd.DataFrame | None:
    if model != "oracle":
        return test_rows(predictions, dataset, model)
    vlm, vit = (test_rows(predictions, dataset, m) for m in ("vlm_tuned", "vit"))
    both = None if vlm is None or vit is None else either_right(vlm, vit)
    return None if both is None or both.empty else both


def _paper_cells(paper_table: str, row: Row, dataset: str, paper: float) -> dict[str, object]:
    source = paper_rows(paper_table).get(row.paper_row, {}).get("source", "")
    return {
        "paper_dataset": paper_dataset(dataset),
        "paper": paper,
        "paper_source": "" if np.isnan(paper) else source,
    }


def _our_cells(
    frame: pd.DataFrame | None, base: pd.DataFrame | None, settings: Settings, gain: bool
) -> dict[str, object]:
    measured, gained = ("ours", "ci_low", "ci_high"), ("gain", "gain_low", "gain_high") if gain else ()
    cells: dict[str, object] = dict.fromkeys((*measured, *gained), np.nan) | {"n": None, "seeds": None}
    if frame is not None:
        options = (settings.report.bootstrap, settings.report.confidence)
        cells |= zip(measured, accuracy_interval(frame, *options), strict=True)
        cells |= {"n": frame["image_id"].nunique(), "seeds": frame["seed"].nunique()}
        if gain and base is not None and set(frame["image_id"]) & set(base["image_id"]):
            cells |= zip(gained, paired_interval(frame, base, *options), strict=True)
    return cells


def _caption(title: str, settings: Settings, reference: str, note: str) -> str:
    level = f"{100 * settings.report.confidence:g} %"
    parts = [f"Table {title}: accuracy in percent on test images, {level} bootstrap intervals over images."]
    if reference:
        parts.append(f"gain: points over {model_name(reference)} on the same images.")
    if any(map(is_drawn, settings.datasets)):
        parts.append("Ours: drawn datasets that stand for the paper's; NOT comparable with its accuracies.")
    return " ".join([*parts, *([note] if note else [])])
