"""Measures of one model and of pairs of models, with bootstrap intervals over test images.

Correctness is a value per image in 0..1: several seeds of one image are averaged first, so an
interval speaks of the sampling of test images, not of seeds. Accuracies are in percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from emonb.predictions import prediction_labels, probabilities

_CHUNK = 4_000_000  # resampling weights held at once: bounds memory for EmoSet's 17,716 test images
_TINY = np.finfo(float).tiny  # floor of a probability inside a logarithm: a zero is an underflow of a softmax


class Interval(NamedTuple):
    """A value with its bootstrap interval."""

    value: float
    low: float
    high: float


def accuracy(frame: pd.DataFrame) -> float:
    """Percent of rows whose prediction is the label; an unparsable answer ("") is wrong."""
    return float(100 * (frame["prediction"] == frame["label"]).mean())


def correct_by_image(frame: pd.DataFrame) -> pd.Series:
    """Share of seeds that are right, per image_id (sorted), in 0..1."""
    right = (frame["prediction"] == frame["label"]).astype(float)
    return right.groupby(frame["image_id"].to_numpy()).mean().rename("correct")


def paired_correctness(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Columns `a`, `b`: correctness of two models on the images that both have seen."""
    return pd.concat({"a": correct_by_image(a), "b": correct_by_image(b)}, axis=1, join="inner").sort_index()


def bootstrap_means(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of resampled images: (resamples,) for values (N,), (resamples, K) for values (N, K).

    Equal rows are drawn together: how often each distinct row occurs in a resample of N images is
    multinomial, which is the same distribution at a fraction of the cost.
    """
    values = np.asarray(values, float)
    rows, counts = np.unique(values.reshape(len(values), -1), axis=0, return_counts=True)
    n, rng = counts.sum(), np.random.default_rng(seed)
    step = max(1, _CHUNK // len(rows))
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    means = np.concatenate([rng.multinomial(n, counts / n, size=size) @ rows / n for size in sizes])
    return means if values.ndim > 1 else means[:, 0]


def interval(value: float, resampled: np.ndarray, confidence: float = 0.95) -> Interval:
    """Percentile interval of resampled values around the value itself."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(float(value), float(low), float(high))


def mean_interval(values: np.ndarray, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean of values (N,), one per image, with its interval over images."""
    return interval(np.mean(values), bootstrap_means(values, resamples, seed), confidence)


def accuracy_interval(frame: pd.DataFrame, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Accuracy in percent with its interval over test images."""
    return mean_interval(100 * correct_by_image(frame).to_numpy(), resamples, confidence, seed)


def paired_interval(
    a: pd.DataFrame, b: pd.DataFrame, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Accuracy of a minus accuracy of b, in points, on their common images (resampled in pairs)."""
    pair = paired_correctness(a, b)
    return mean_interval(100 * (pair["a"] - pair["b"]).to_numpy(), resamples, confidence, seed)


def two_by_two(a: Sequence[bool], b: Sequence[bool]) -> np.ndarray:
    """[[both right, only a], [only b, neither]] from two sequences of hits."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    return np.array([[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]])


def mcnemar_p(a: Sequence[bool], b: Sequence[bool]) -> float:
    """McNemar's p for "both models err equally often": exact below 25 discordant images, else corrected."""
    from statsmodels.stats.contingency_tables import mcnemar

    table = two_by_two(a, b)
    discordant = table[0, 1] + table[1, 0]
    return float(mcnemar(table, exact=bool(discordant < 25), correction=True).pvalue)


def q_statistic(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Yule's Q of two models' hits: 1 = right on the same images, 0 = independent, -1 = on opposite ones."""
    (both, only_a), (only_b, neither) = two_by_two(a, b).astype(float)
    total = both * neither + only_a * only_b
    return float((both * neither - only_a * only_b) / total) if total else float("nan")


def disagreement(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Share of images on which exactly one of the two is right."""
    return float((np.asarray(a, bool) != np.asarray(b, bool)).mean())


def oracle(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Share of images on which at least one of the two is right."""
    return float(1 - (~np.asarray(a, bool) & ~np.asarray(b, bool)).mean())


def kappa(a: Sequence[str], b: Sequence[str]) -> float:
    """Cohen's kappa of two models' predictions (scikit-learn); 1 where both always say the same one thing."""
    from sklearn.metrics import cohen_kappa_score

    return 1.0 if list(a) == list(b) else float(cohen_kappa_score(list(a), list(b)))


def agreement_matrix(table: pd.DataFrame) -> pd.DataFrame:
    """Cohen's kappa between the answers of all models of a joint table (symmetric, 1 on the diagonal)."""
    models = [c for c in table.columns if c not in ("label", "group")]
    values = [[kappa(table[a], table[b]) for b in models] for a in models]
    return pd.DataFrame(values, index=models, columns=models)


def temper(p: np.ndarray, tau: float) -> np.ndarray:
    """Softmax probabilities (N, C) at temperature tau.

    `softmax(z / tau)` is proportional to `softmax(z) ** (1 / tau)`, so logits are not needed.
    """
    powered = np.asarray(p, float) ** (1 / tau)
    return powered / powered.sum(axis=1, keepdims=True)


def kl_divergence(p: np.ndarray, q: np.ndarray, tau: float = 1.0) -> np.ndarray:
    """KL(p || q) per row (N,), in nats, after tempering both (N, C) with tau (paper: tau = 2)."""
    p, q = (np.maximum(temper(x, tau), _TINY) for x in (p, q))
    return (p * (np.log(p) - np.log(q))).sum(axis=1)


def kl_by_image(teacher: pd.DataFrame, student: pd.DataFrame, tau: float) -> pd.Series:
    """KL(teacher^tau || student^tau) per image_id (sorted), averaged over the student's seeds."""
    columns = [f"p_{name}" for name in prediction_labels(teacher)]
    first = teacher.drop_duplicates("image_id").set_index("image_id")[columns]
    student = student[student["image_id"].isin(first.index)]
    kl = kl_divergence(first.loc[student["image_id"]].to_numpy(float), probabilities(student), tau)
    return pd.Series(kl, name="kl").groupby(student["image_id"].to_numpy()).mean()


def either_right(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """The oracle as predictions: a's answer, but b's where a is wrong and b (its first seed) is right."""
    other = b.drop_duplicates("image_id").set_index("image_id")["prediction"]
    a = a[a["image_id"].isin(other.index)].copy()
    other = other.loc[a["image_id"]].to_numpy()
    a["prediction"] = np.where(other == a["label"].to_numpy(), other, a["prediction"].to_numpy())
    return a


def reliability(frame: pd.DataFrame, bins: int = 15) -> pd.DataFrame:
    """Confidence against accuracy by bins of equal width over 0..1 (Guo et al. 2017, section 2; 15 bins as there).

    Confidence is the probability of the most probable class; an unparsable answer is wrong at that confidence.

    Returns:
        A row per bin that has images: low, high, n, and `confidence, accuracy`, their means in 0..1.
    """
    sure, edges = probabilities(frame).max(axis=1), np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)  # (low, high], as there
    rows = pd.DataFrame({"confidence": sure, "accuracy": (frame["prediction"] == frame["label"]).to_numpy()})
    groups = rows.groupby(place)
    table = groups.mean()
    ends = {"low": edges[table.index], "high": edges[table.index + 1]}
    table = table.assign(**ends, n=groups.size())
    return table[["low", "high", "n", "confidence", "accuracy"]].reset_index(drop=True)


def calibration_error(frame: pd.DataFrame, bins: int = 15) -> float:
    """Expected calibration error in percent: mean |accuracy - confidence| of the bins, weighted by their images.

    Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, ICML 2017, equation 3. It depends on
    the bins and is biased upwards for few images.
    """
    table = reliability(frame, bins)
    return float(100 * np.average((table["accuracy"] - table["confidence"]).abs(), weights=table["n"]))
