"""Who is right where: joint answers of several models on the same test images.

Counts, statistics and pictures need one answer per image: of a model trained with several seeds the
first seed is taken (a majority would be a model that nobody trained; the tables average the seeds).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from emonb.metrics import (
    bootstrap_means,
    disagreement,
    interval,
    kappa,
    mcnemar_p,
    oracle,
    q_statistic,
    two_by_two,
)
from emonb.paper_values import dataset_title, is_drawn
from emonb.predictions import Predictions, model_name, prediction_labels, probabilities
from emonb.settings import Settings

__all__ = [
    "CASES",
    "GROUPS",
    "MODELS",
    "QUARTET",
    "UNPARSABLE",
    "agreement_matrix",
    "answers",
    "circle_distance",
    "complementarity_table",
    "first_seed",
    "intersections",
    "joint",
    "select_examples",
    "with_groups",
]

GROUPS = ("both right", "only VLM right", "only ViT right", "neither right")
MODELS = ("vlm_zero_shot", "vlm_tuned", "vit", "resnet", "vgg", "head", "emovlmkd")
UNPARSABLE = "(unparsable)"  # what people read where a model gave no answer
QUARTET = ("vlm_tuned", "vit", "head", "emovlmkd")  # the system, its parts and the teacher
CASES = {
    "vlm": "only the VLM right,\nthe ViT wrong",
    "vit": "only the ViT right,\nthe VLM wrong",
    "gate": "only EmoVLM-KD\nright, both wrong",
    "lost": "gate lost: one right,\nEmoVLM-KD wrong",
}  # rows of the picture figure; in the first two EmoVLM-KD is right as well (paper, last figure)


def joint(predictions: Predictions, dataset: str, models: Sequence[str] = MODELS, split: str = "test") -> pd.DataFrame:
    """One row per image: `label` and one column of answers per model that this run has.

    Indexed by image_id (sorted); images that some model has not seen are left out.
    """
    columns: dict[str, pd.Series] = {}
    for model in models:
        frame = predictions.get((dataset, model))
        if frame is None:
            continue
        frame = first_seed(frame, split).set_index("image_id")
        columns.setdefault("label", frame["label"])
        columns[model] = frame["prediction"]
    table = pd.concat(columns, axis=1, join="inner").sort_index() if columns else pd.DataFrame({"label": []})
    return table.rename_axis("image_id")


def first_seed(frame: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """One answer per image: the rows of a split that belong to the first seed."""
    return frame[(frame["split"] == split) & (frame["seed"] == frame["seed"].min())]


def with_groups(table: pd.DataFrame, vlm: str = "vlm_tuned", vit: str = "vit") -> pd.DataFrame:
    """The joint table with a column `group` (one of `GROUPS`)."""
    a, b = (table[m] == table["label"] for m in (vlm, vit))
    names = np.select([a & b, a & ~b, ~a & b], GROUPS[:3], GROUPS[3])
    return table.assign(group=pd.Categorical(names, categories=GROUPS))


def agreement_matrix(table: pd.DataFrame) -> pd.DataFrame:
    """Cohen's kappa between the answers of all models of a joint table (symmetric, 1 on the diagonal)."""
    models = [c for c in table.columns if c not in ("label", "group")]
    values = [[kappa(table[a], table[b]) for b in models] for a in models]
    return pd.DataFrame(values, index=models, columns=models)


def complementarity_table(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """VLM (tuned) x ViT on test images, per dataset: emotion "all" first, then each emotion.

    Columns: dataset, emotion, n, counts by group, `only_vlm, only_vit` in percent with intervals,
    `oracle` in percent, `q_statistic`, `disagreement` in percent, `kappa` (of the answers), `mcnemar_p`.
    The paper prints no numbers for these.
    """
    rows = []
    for dataset in settings.datasets:
        table = joint(predictions, dataset, ("vlm_tuned", "vit"))
        if not {"vlm_tuned", "vit"} <= set(table.columns):
            continue
        labels = prediction_labels(predictions[dataset, "vit"])
        parts = {"all": table} | {label: table[table["label"] == label] for label in labels}
        title = dataset_title(dataset)
        rows += [
            {"dataset": title, "emotion": emotion, **_pair(part, settings)}
            for emotion, part in parts.items()
            if len(part)
        ]
    counts = [group.replace(" ", "_") for group in GROUPS]
    shares = [f"{name}{end}" for name in ("only_vlm", "only_vit") for end in ("", "_low", "_high")]
    rest = ["oracle", "q_statistic", "disagreement", "kappa", "mcnemar_p"]
    frame = pd.DataFrame(rows, columns=["dataset", "emotion", "n", *counts, *shares, *rest])
    frame.attrs["caption"] = (
        "Table complementarity: tuned VLM and ViT on the same test images. "
        + ("Drawn datasets: not comparable with the paper's. " if any(map(is_drawn, settings.datasets)) else "")
        + "Shares in percent; one seed."
    )
    return frame


def _pair(table: pd.DataFrame, settings: Settings) -> dict[str, float]:
    a, b = ((table[m] == table["label"]).to_numpy() for m in ("vlm_tuned", "vit"))
    counts = dict(zip(GROUPS, two_by_two(a, b).ravel().tolist(), strict=True))
    row: dict[str, float] = {"n": len(table), **{k.replace(" ", "_"): v for k, v in counts.items()}}
    for name, hit in (("only_vlm", a & ~b), ("only_vit", ~a & b)):
        resampled = bootstrap_means(100.0 * hit, settings.report.bootstrap)
        share = interval(100 * hit.mean(), resampled, settings.report.confidence)
        row |= {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}
    return row | {
        "oracle": 100 * oracle(a, b),
        "q_statistic": q_statistic(a, b),
        "disagreement": 100 * disagreement(a, b),
        "kappa": kappa(table["vlm_tuned"], table["vit"]),
        "mcnemar_p": mcnemar_p(a, b),
    }


def intersections(tables: Mapping[str, pd.DataFrame], models: Sequence[str] = QUARTET) -> pd.DataFrame:
    """Images by which models are right: one row for each combination that occurs, the commonest first.

    Args:
        tables: {title: joint table}; a model that one of them lacks is left out of all.

    Returns:
        Counts with a column per title; the index has a level per model (True = right). Empty without tables or
        models.
    """
    models = [m for m in models if all(m in table.columns for table in tables.values())]
    if not tables or not models:
        return pd.DataFrame()
    hits = {title: table[models].eq(table["label"], axis=0) for title, table in tables.items()}
    counts = pd.DataFrame({title: hit.value_counts() for title, hit in hits.items()}).fillna(0).astype(int)
    counts.index = pd.MultiIndex.from_tuples([tuple(map(bool, key)) for key in counts.index], names=models)
    order = counts.div(counts.sum().clip(lower=1)).sum(axis=1)
    return counts.loc[order.sort_index(ascending=False).sort_values(ascending=False, kind="stable").index]


def select_examples(table: pd.DataFrame, per_case: int = 4) -> pd.DataFrame:
    """Images of a joint table for each of `CASES`; column `case` names it. Without VLM or ViT there are none.

    `vlm`, `vit`: exactly that one of tuned VLM and ViT is right, and EmoVLM-KD with it; `gate`: EmoVLM-KD is
    right where both are wrong; `lost`: EmoVLM-KD is wrong where exactly one of the two is right. Without
    EmoVLM-KD only the first two, by VLM and ViT alone.

    No picking by hand: within each case the images go by emotion in turn, then by image_id.
    """
    if not {"vlm_tuned", "vit"} <= set(table.columns):
        return table.assign(case="").iloc[:0]
    table = table.sort_index()
    vlm, vit = (table[m] == table["label"] for m in ("vlm_tuned", "vit"))
    cases = {"vlm": vlm & ~vit, "vit": vit & ~vlm}
    if "emovlmkd" in table.columns:
        right = table["emovlmkd"] == table["label"]
        cases = {case: hit & right for case, hit in cases.items()}
        cases |= {"gate": right & ~vlm & ~vit, "lost": ~right & (vlm ^ vit)}
    parts = []
    for case, hit in cases.items():
        part = table[hit]
        turn = part.groupby("label").cumcount()
        order = pd.DataFrame({"turn": turn, "label": part["label"]}).sort_values(["turn", "label"], kind="stable")
        parts.append(part.loc[order.index[:per_case]].assign(case=case))
    return pd.concat(parts)


def answers(predictions: Predictions, dataset: str, image_id: str) -> pd.DataFrame:
    """Every model's answer for one test image: model, answer, confidence in percent, right, the VLM's text."""
    rows = []
    for (name, model), frame in predictions.items():
        row = frame[(frame["image_id"] == image_id) & (frame["split"] == "test")].sort_values("seed").head(1)
        if name == dataset and model in (*MODELS, "vlm_generated") and len(row):
            answer, truth = row["prediction"].iloc[0], row["label"].iloc[0]
            text = row["raw_text"].iloc[0]
            sure = 100 * probabilities(row).max() if answer else np.nan
            shown = (answer or UNPARSABLE, sure, answer == truth)
            rows.append((model, model_name(model), *shown, "" if pd.isna(text) else text))
    table = pd.DataFrame(rows, columns=["row", "model", "answer", "confidence", "right", "text"])
    order = {m: i for i, m in enumerate((*MODELS[:2], "vlm_generated", *MODELS[2:]))}
    table = table.sort_values("row", key=lambda s: s.map(order)).reset_index(drop=True)
    return table.drop(columns="row")


def _lens(r1: float, r2: float, d: float) -> float:
    """Area that two circles of radius r1 and r2 at distance d have in common."""
    if d >= r1 + r2:
        return 0.0
    if d <= abs(r1 - r2):
        return np.pi * min(r1, r2) ** 2
    a, b = ((d * d + r * r - s * s) / (2 * d * r) for r, s in ((r1, r2), (r2, r1)))
    kite = (-d + r1 + r2) * (d + r1 - r2) * (d - r1 + r2) * (d + r1 + r2)
    return r1**2 * np.arccos(a) + r2**2 * np.arccos(b) - np.sqrt(max(kite, 0)) / 2


def circle_distance(r1: float, r2: float, overlap: float) -> float:
    """Distance of the centres at which two circles share this area (solved numerically)."""
    from scipy.optimize import brentq

    low, high = abs(r1 - r2), r1 + r2
    if overlap <= 0 or overlap >= np.pi * min(r1, r2) ** 2:
        return high if overlap <= 0 else low
    return float(brentq(lambda d: _lens(r1, r2, d) - overlap, low, high))
