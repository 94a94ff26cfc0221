"""Measures of one model and of pairs of models, with bootstrap intervals over test images.

Correctness is a value per image in 0..1: several seeds of one image are averaged first, so a bootstrap interval speaks
of the sampling of test images, not of seeds; `crossed_estimates` has both. Accuracies are in percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from emonb.predictions import Predictions, first_seed, prediction_labels, probabilities, test_rows

Interval = tuple[float, float, float]  # a value and the ends of its interval
CHUNK = 4_000_000  # resampling weights held at once: bounds memory for EmoSet's 17,716 test images


def accuracy(frame: pd.DataFrame) -> float:
    """Percent of rows whose prediction is the label; an unparsable answer ("") is wrong."""
    return float(100 * (frame["prediction"] == frame["label"]).mean())


def correctness(predictions: Predictions, dataset: str, models: Iterable[str]) -> pd.DataFrame:
    """Share of seeds that are right, 0..1: a row per test image (by image_id), a column per model; NaN = no answer."""
    return pd.DataFrame({m: hits_by_seed(test_rows(predictions, dataset, m)).mean(axis=1) for m in models})


def hits_by_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """Share of a seed's repeats that are right, 0..1: a row per image_id (sorted), a column per seed."""
    right = frame.assign(right=(frame["prediction"] == frame["label"]).astype(float))
    return right.pivot_table("right", "image_id", "seed")


def difference(a: pd.DataFrame, b: pd.DataFrame) -> np.ndarray:
    """[images, seeds] a - b, of tables [images, seeds]: image by image, and seed by seed where both have the same.

    Else every seed of the one with more seeds (of `a`, if they have as many) is compared with the other's mean.
    """
    images = a.index.intersection(b.index)
    a, b = a.loc[images], b.loc[images]
    if list(a.columns) != list(b.columns):
        if a.shape[1] >= b.shape[1]:
            b = b.mean(axis=1).to_frame()
        else:
            a = a.mean(axis=1).to_frame()
    return a.to_numpy() - b.to_numpy()


def bootstrap_means(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of resampled images: (resamples,) for values (N,), (resamples, K) for values (N, K).

    Equal rows are drawn together: how often each distinct row occurs in a resample of N images is
    multinomial, which is the same distribution at a fraction of the cost.
    """
    values = np.asarray(values, float)
    alike = np.round(values.reshape(len(values), -1), 9)  # thirds added in another order are the same thirds
    rows, counts = np.unique(alike, axis=0, return_counts=True)
    n, rng, step = counts.sum(), np.random.default_rng(seed), max(1, CHUNK // len(rows))
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    means = np.concatenate([rng.multinomial(n, counts / n, size=size) @ rows / n for size in sizes])
    return means if values.ndim > 1 else means[:, 0]


def interval(value: float, resampled: np.ndarray, confidence: float = 0.95) -> Interval:
    """A value with the percentile interval of its resampled values."""
    tail = 50 * (1 - confidence)
    return float(value), *np.percentile(resampled, [tail, 100 - tail]).tolist()


def mean_interval(values: pd.Series, resamples: int = 2000, confidence: float = 0.95) -> Interval:
    """Mean of values (N,), one per image, with its interval over images; those that are NaN do not count."""
    values = values.dropna().to_numpy(float)
    if not len(values):
        return (np.nan,) * 3
    return interval(np.mean(values), bootstrap_means(values, resamples), confidence)


class Estimate(NamedTuple):
    """A mean over images (and seeds) with its uncertainty: value, standard error, degrees of freedom; and its n."""

    value: float
    error: float
    freedom: float
    images: int
    seeds: int

    def interval(self, tail: float = 0.025) -> tuple[float, float]:
        """Ends of Student's interval that leaves `tail` outside on either side."""
        reach = self.error * student_t.ppf(1 - tail, self.freedom) if self.error else 0.0
        return self.value - reach, self.value + reach

    def detectable(self, tail: float = 0.025, power: float = 0.8) -> float:
        """How far a true value must lie above a threshold to be found above it with this probability (2.8 errors)."""
        return self.error * sum(student_t.ppf([1 - tail, power], self.freedom)) if self.error else 0.0


def crossed_estimates(samples: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """Means of values [images, seeds] of each sample, and of all samples together (`all`), seeds in the intervals.

    Every seed has seen every image, the two are crossed: SE^2 = s_image^2 / n + s_seed^2 / S, where s_image^2 is the
    variance over images of the mean over seeds, and s_seed^2 that over seeds of the mean over images, pooled over the
    samples, since two or three seeds say little about a variance (0 where all have one: their luck is not in the
    interval). Degrees of freedom by Satterthwaite (1946). `all` is the mean over samples, which are independent.
    """
    if not samples:
        return {}
    images = {name: (x.mean(axis=1).var(ddof=1) / len(x), len(x) - 1) for name, x in samples.items()}
    luck = sum(x.shape[1] - 1 for x in samples.values())
    pooled = sum(((x.mean(axis=0) - x.mean()) ** 2).sum() for x in samples.values()) / max(1, luck)
    seeds = {name: (pooled / x.shape[1] if luck else 0.0, luck or math.inf) for name, x in samples.items()}
    whole = len(samples) ** 2
    found = {name: _estimate(x.mean(), [images[name], seeds[name]], len(x), x.shape[1]) for name, x in samples.items()}
    parts = [(variance / whole, freedom) for variance, freedom in images.values()]
    parts.append((sum(variance for variance, _ in seeds.values()) / whole, luck or math.inf))
    value, count = np.mean([one.value for one in found.values()]), sum(one.images for one in found.values())
    return {**found, "all": _estimate(value, parts, count, max(one.seeds for one in found.values()))}


def _estimate(value: float, parts: Sequence[tuple[float, float]], images: int, seeds: int) -> Estimate:
    """From independent parts of the variance, each with its degrees of freedom."""
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / freedom for part, freedom in parts)
    return Estimate(float(value), math.sqrt(variance), variance**2 / spread if spread else math.inf, images, seeds)


def excess_hits(a: pd.DataFrame, b: pd.DataFrame) -> np.ndarray:
    """How much more often b is right where a is wrong than if its answers there did not belong to these images.

    Hits of b among a's errors, minus their mean over all permutations of b's answers among these images: the sum over
    classes of (share of the class) x (share of b's answers). Not in the paper.

    Args:
        a, b: prediction frames of the same images, paired by seed; where a lacks b's seed, a's first.

    Returns:
        [images, seeds of b] in points: the mean over images is the excess in percent of all images, and their variance
        is that of this mean, since both shares vary with the images, too (the infinitesimal jackknife, Efron 1982).
    """
    ours, theirs = (f[f["repeat"] == 0].pivot(index="image_id", columns="seed", values="prediction") for f in (a, b))
    theirs = theirs.loc[theirs.index.intersection(ours.index)]
    gold = first_seed(a).set_index("image_id")["label"].loc[theirs.index].to_numpy()[:, None]
    labels, columns = np.array(prediction_labels(b)), []
    for seed in theirs:
        wrong = ours[seed if seed in ours else ours.columns[0]].loc[theirs.index].to_numpy()[:, None] != gold
        is_class, is_answer = wrong * (gold == labels), wrong * (theirs[[seed]].to_numpy() == labels)  # [N, C]
        truth, given = (x.sum(axis=0) / max(1, wrong.sum()) for x in (is_class, is_answer))
        by_chance = is_class @ given + is_answer @ truth - wrong[:, 0] * (truth @ given)
        columns.append((is_class * is_answer).sum(axis=1) - by_chance)
    return 100 * np.column_stack(columns)


def permutation_p(a: pd.DataFrame, b: pd.DataFrame, permutations: int = 10_000, seed: int = 0) -> float:
    """p of "b's answers have nothing to do with the images where a errs", one-sided, by permutation of these answers.

    The same permutation for all seeds of b, among the errors of a's first seed; the statistic is b's hits.
    """
    first = first_seed(a).set_index("image_id")
    answers = b.pivot(index="image_id", columns=["seed", "repeat"], values="prediction")
    gold, said = (first[name].reindex(answers.index) for name in ("label", "prediction"))
    wrong, values = (gold.notna() & (gold != said)).to_numpy(), pd.Index(gold.unique())
    code, theirs = values.get_indexer(gold[wrong]), answers[wrong].apply(values.get_indexer).to_numpy()
    rng, hits = np.random.default_rng(seed), (theirs == code[:, None]).sum()
    order = (rng.permutation(len(code)) for _ in range(permutations))
    as_many = sum(int((theirs[rows] == code[:, None]).sum() >= hits) for rows in order)
    return (1 + as_many) / (1 + permutations)


def two_by_two(a: Sequence[bool], b: Sequence[bool]) -> np.ndarray:
    """[[both right, only a], [only b, neither]] from two sequences of hits."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    return np.array([[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]])


def mcnemar_p(gaps: np.ndarray) -> float:
    """McNemar's p for "both err equally often", by a's lead on each image (N,): exact below 25, else corrected."""
    from statsmodels.stats.contingency_tables import mcnemar

    a, b = (gaps > 0).sum(), (gaps < 0).sum()
    return float(mcnemar([[0, a], [b, 0]], exact=bool(a + b < 25)).pvalue) if len(gaps) else float("nan")


def q_statistic(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Yule's Q of two models' hits: 1 = right on the same images, 0 = independent, -1 = on opposite ones."""
    (both, only_a), (only_b, neither) = two_by_two(a, b).astype(float)
    total = both * neither + only_a * only_b
    return float((both * neither - only_a * only_b) / total) if total else float("nan")


def kappa(a: Sequence[str], b: Sequence[str]) -> float:
    """Cohen's kappa of two models' predictions (scikit-learn); 1 where both always say the same one thing."""
    from sklearn.metrics import cohen_kappa_score

    return 1.0 if list(a) == list(b) else float(cohen_kappa_score(list(a), list(b)))


def error_consistency(a: np.ndarray, b: np.ndarray, resamples: int = 2000, confidence: float = 0.95) -> Interval:
    """Whether two models err on the same images more often than their accuracies bring about; 0: independent errors.

    kappa = (c_obs - c_exp) / (1 - c_exp), c_obs the share of images on which both are right or both wrong, c_exp =
    p_a p_b + (1 - p_a)(1 - p_b) (Geirhos, Meding, Wichmann 2020, Beyond Accuracy); its interval is over images.

    Args:
        a, b: hits (N,), 0 or 1; NaN among them, or c_exp = 1, gives NaN.
    """
    if not len(a) or np.isnan([a, b]).any():
        return (np.nan,) * 3
    hits = np.column_stack([a, b, np.equal(a, b)]).astype(float)
    p, q, observed = np.vstack([hits.mean(axis=0), bootstrap_means(hits, resamples)]).T
    expected = p * q + (1 - p) * (1 - q)
    kappas = (observed - expected) / np.where(expected < 1, 1 - expected, np.nan)
    return interval(kappas[0], kappas[1:], confidence)


def kl_divergence(p: np.ndarray, q: np.ndarray, tau: float = 1.0) -> np.ndarray:
    """KL(p^tau || q^tau) per row (N,), in nats, of softmax probabilities (N, C) at temperature tau (paper: 2).

    softmax(z / tau) is proportional to softmax(z) ** (1 / tau), so logits are not needed.
    """
    p, q = (np.asarray(x, float) ** (1 / tau) for x in (p, q))
    p, q = (np.maximum(x / x.sum(axis=1, keepdims=True), np.finfo(float).tiny) for x in (p, q))  # 0: an underflow
    return (p * (np.log(p) - np.log(q))).sum(axis=1)


def kl_by_seed(teacher: pd.DataFrame, student: pd.DataFrame, tau: float) -> pd.DataFrame:
    """KL(teacher^tau || student^tau): a row per image_id (sorted), a column per seed of the student.

    The teacher is that of the same seed, or its first seed where there is none; repeats are averaged. Without answers
    of one of the two: no rows.
    """
    if teacher.empty or student.empty:
        return pd.DataFrame()
    columns, seeds = [f"p_{name}" for name in prediction_labels(student)], set(teacher["seed"])
    taught = student["seed"].where(student["seed"].isin(seeds), teacher["seed"].min())
    keys = pd.MultiIndex.from_arrays([student["image_id"], taught])
    known = teacher[teacher["repeat"] == 0].set_index(["image_id", "seed"])[columns].reindex(keys)
    there = known.notna().all(axis=1).to_numpy()
    kl = kl_divergence(known[there], probabilities(student[there]), tau)
    return student[there].assign(kl=kl).pivot_table("kl", "image_id", "seed")


def label_distribution(raters: np.ndarray, model: np.ndarray) -> pd.DataFrame:
    """Measures of label-distribution learning, a row per image (Geng 2016, "Label Distribution Learning", section 4).

    Args:
        raters, model: (N, C) shares of the raters who named each emotion, and a model's probabilities.

    Returns:
        `kl`: KL(raters || model) in nats; `js`: Jensen-Shannon divergence in nats; `chebyshev`: the largest gap;
        `cosine`: similarity; `top2`: 100 where the model's answer is among the raters' two strongest (ties count) and
        somebody gave it.
    """
    raters, model = (np.asarray(x, float) / np.sum(x, axis=1, keepdims=True) for x in (raters, model))
    middle, lengths = (raters + model) / 2, np.linalg.norm(raters, axis=1) * np.linalg.norm(model, axis=1)
    chosen, second = raters[np.arange(len(raters)), model.argmax(axis=1)], np.sort(raters, axis=1)[:, -2]
    found = {
        "kl": kl_divergence(raters, model),
        "js": (kl_divergence(raters, middle) + kl_divergence(model, middle)) / 2,
        "chebyshev": np.abs(raters - model).max(axis=1),
        "cosine": (raters * model).sum(axis=1) / lengths,
        "top2": 100.0 * ((chosen >= second - 1e-9) & (chosen > 0)),
    }
    return pd.DataFrame(found)


def reliability(frame: pd.DataFrame, bins: int = 15) -> pd.DataFrame:
    """Confidence against accuracy by bins of equal width over 0..1 (Guo et al. 2017, section 2; 15 bins as there).

    A row per bin that has images: low, high, n, and `confidence, accuracy`, their means in 0..1. Confidence is the
    probability of the most probable class; an unparsable answer is wrong at that confidence.
    """
    sure, edges = probabilities(frame).max(axis=1), np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)  # (low, high], as there
    groups = pd.DataFrame({"confidence": sure, "accuracy": frame["prediction"].eq(frame["label"]).to_numpy()})
    table = groups.groupby(place).mean()
    table = table.assign(low=edges[table.index], high=edges[table.index + 1], n=groups.groupby(place).size())
    return table[["low", "high", "n", "confidence", "accuracy"]].reset_index(drop=True)


def calibration_error(frame: pd.DataFrame, bins: int = 15) -> float:
    """Expected calibration error in percent: mean |accuracy - confidence| of the bins, weighted by their images.

    Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, ICML 2017, equation 3.
    """
    table = reliability(frame, bins)
    return float(100 * np.average((table["accuracy"] - table["confidence"]).abs(), weights=table["n"]))


def probability_scores(
    frame: pd.DataFrame, resamples: int = 2000, confidence: float = 0.95, bins: int = 15
) -> dict[str, Interval]:
    """Of a prediction frame of one seed, with bootstrap intervals over images: {name: (value, low, high)}.

    `debiased`: calibration error in percent, root mean square over bins of as many images each, less what chance adds
    to each bin (Kumar, Liang, Ma: Verified Uncertainty Calibration, NeurIPS 2019); in a resample chance has added
    twice. `brier`: squared distance from the label, summed over classes, 0..2 (Brier 1950). `nll`: negative log of the
    label's probability in nats, this clipped at float32's epsilon (ours).
    """
    p, labels = probabilities(frame), prediction_labels(frame)
    gold = frame["label"].to_numpy()[:, None] == np.array(labels)  # [N, C]
    sure, right = p.max(axis=1, keepdims=True), frame[["prediction"]].eq(frame["label"], axis=0).to_numpy(float)
    brier, nll = ((p - gold) ** 2).sum(axis=1), -np.log(np.maximum(p[gold], np.finfo(np.float32).eps))
    bins = np.array_split(np.argsort(sure[:, 0], kind="stable"), min(bins, len(p)))
    member = np.stack([np.isin(np.arange(len(p)), rows) for rows in bins], axis=1)  # [N, bins]
    columns = np.hstack([member, member * sure, member * right, brier[:, None], nll[:, None]])

    def measures(means: np.ndarray, times: int) -> np.ndarray:
        weight, sure, hit = np.split(means[..., :-2], 3, axis=-1)
        images = np.maximum(weight * len(p), 1)  # none: its weight is 0
        sure, hit = (len(p) * x / images for x in (sure, hit))
        chance = hit * (1 - hit) / np.maximum(images - 1, 1)
        square = (weight * ((sure - hit) ** 2 - times * chance)).sum(axis=-1, keepdims=True)
        return np.concatenate([100 * np.sqrt(np.maximum(square, 0)), means[..., -2:]], axis=-1)

    values, again = measures(columns.mean(axis=0), 1), measures(bootstrap_means(columns, resamples), 2)
    names = ("debiased", "brier", "nll")
    return {name: interval(values[i], again[:, i], confidence) for i, name in enumerate(names)}
