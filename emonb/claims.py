"""Claims C1-C8 of the paper, judged by intervals; the rules were written before any result was seen.

One rule for all: a comparison is a quantity that the claim says is above a threshold (0 points unless
stated). Its bootstrap interval over test images wholly above: "holds"; wholly at or below: "does not
hold"; else "undecided". A claim of several comparisons (best of several) holds if all hold, does not
hold if one does not, else it is undecided; no correction is made for several rivals. Over all
datasets the quantity is the mean over datasets, images resampled within each; only C6, which says
"on all five datasets", holds in all only if it holds on each, and does not if it fails on one.
Seeds of one image are averaged first. McNemar's p stands beside pairs of single-seed models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from emonb.metrics import bootstrap_means, correct_by_image, interval, kl_by_image, mcnemar_p, paired_correctness
from emonb.paper_values import claim_statements, dataset_title, is_drawn
from emonb.predictions import Predictions, model_name
from emonb.settings import Settings
from emonb.tables import alpha_model, depth_model, test_rows

__all__ = ["RULES", "claims", "combine", "comparisons", "trade_off", "verdict"]

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
_SHARE = 5.0  # percent of test images that counts as substantial; our choice
_TINY = 1.0  # percent of all parameters that counts as tiny; our choice

RULES = {
    "C1": f"share of test images where only the VLM is right, and where only the ViT is: both above {_SHARE:g} %",
    "C2": "accuracy of the head minus its teacher's: above 0",
    "C3": "accuracy of the head of one hidden layer minus that of each deeper head: all above 0",
    "C4": "accuracy with the concat & linear gate minus that with each other gate: all above 0",
    "C5": "accuracy of the tuned VLM minus zero-shot: above 0",
    "C6": "accuracy of EmoVLM-KD minus tuned VLM, ViT, head: all above 0; in all: on each dataset",
    "C7": "score = mean of accuracy and of -KL, each scaled to 0..1 over the alphas tried; "
    "the paper's alpha minus each other alpha: all above 0",
    "C8": f"head, gate and LoRA below {_TINY:g} % of all parameters of Qwen2-VL-7B (computed, no interval)",
}


class Sample(NamedTuple):
    """One comparison on one dataset: value, resampled values (B,), images, seeds, McNemar's p."""

    value: float
    resampled: np.ndarray
    n: int
    seeds: int
    p: float = float("nan")


def verdict(low: float, high: float, threshold: float = 0.0) -> str:
    """ "holds", "does not hold" or "undecided" of an interval and a threshold."""
    return HOLDS if low > threshold else FAILS if high <= threshold else UNDECIDED


def combine(verdicts: Sequence[str]) -> str:
    """Verdict of a claim from its comparisons: the weakest link."""
    return FAILS if FAILS in verdicts else HOLDS if set(verdicts) == {HOLDS} else UNDECIDED


def trade_off(accuracy: np.ndarray, kl: np.ndarray) -> np.ndarray:
    """C7's score (..., K) of K alphas: accuracy and -KL scaled to 0..1 over the K, averaged."""

    def scale(x: np.ndarray) -> np.ndarray:
        low, span = x.min(-1, keepdims=True), np.ptp(x, axis=-1, keepdims=True)
        return np.divide(x - low, span, out=np.zeros_like(x), where=span > 0)

    return (scale(np.asarray(accuracy, float)) + scale(-np.asarray(kl, float))) / 2


def comparisons(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Every comparison behind C1-C7: one row per claim, comparison and dataset, and the mean of all.

    Columns: claim, dataset, comparison, value, ci_low, ci_high, threshold, verdict, mcnemar_p, n, seeds.
    A comparison without prediction files has empty numbers and is undecided.
    """
    rows = []
    for claim in ("C1", "C2", "C3", "C4", "C5", "C6", "C7"):
        per_dataset = {d: _samples(claim, predictions, d, settings, i) for i, d in enumerate(settings.datasets)}
        for name in next(iter(per_dataset.values())):
            samples = {d: found[name] for d, found in per_dataset.items()}
            for dataset, sample in samples.items():
                rows.append((claim, dataset_title(dataset), name, *_judge(claim, sample, settings)))
            rows.append((claim, "all", name, *_judge(claim, _mean(list(samples.values())), settings)))
    columns = ["claim", "dataset", "comparison", "value", "ci_low", "ci_high"]
    table = pd.DataFrame(rows, columns=[*columns, "threshold", "verdict", "mcnemar_p", "n", "seeds"])
    table.attrs["caption"] = "Every comparison behind the claims, in points unless it says score or share."
    return table


def claims(predictions: Predictions, settings: Settings, parameters: pd.DataFrame | None) -> pd.DataFrame:
    """The verdict on each claim per dataset and in all, with the comparison that decided it.

    Args:
        parameters: the table of `parameters.parameter_table` (for C8); None where there is none.

    A claim that lacks predictions is undecided, and `decided_by` says of which models and datasets.
    Columns: claim, statement, dataset, verdict, decided_by, value, ci_low, ci_high, mcnemar_p, n,
    seeds, rule. `decided_by` is the comparison with the lowest value among those of that verdict.
    """
    statements, rows = claim_statements(), []
    detail = comparisons(predictions, settings)
    for (claim, dataset), part in detail.groupby(["claim", "dataset"], sort=False):
        found = combine(list(part["verdict"]))
        if claim == "C6" and dataset == "all":
            part = detail[(detail["claim"] == claim) & (detail["dataset"] != "all")]
            found = combine(list(part["verdict"]))
        weakest = part[part["verdict"] == found].sort_values("value", na_position="first").iloc[0].to_dict()
        where = f"{weakest['dataset']}: " if weakest["dataset"] != dataset else ""
        note = f"not tested, {_lacks(claim, dataset, predictions, settings)}: " if np.isnan(weakest["value"]) else ""
        decided = note + where + weakest.pop("comparison")
        rows.append(weakest | {"dataset": dataset, "verdict": found, "decided_by": decided})
    rows.append(_c8(parameters))
    table = pd.DataFrame(rows)
    table["statement"], table["rule"] = table["claim"].map(statements), table["claim"].map(RULES)
    order = ["claim", "statement", "dataset", "verdict", "decided_by", "value", "ci_low", "ci_high"]
    table = table[[*order, "mcnemar_p", "n", "seeds", "rule"]]
    table[["n", "seeds"]] = table[["n", "seeds"]].astype("Int64").astype(object).where(lambda x: x.notna(), None)
    drawn = any(map(is_drawn, settings.datasets))
    world = "Drawn datasets: the mechanism is tested, not the paper's data." if drawn else ""
    table.attrs["caption"] = f"Claims of the paper, judged by {100 * settings.report.confidence:g} % " + (
        f"intervals over test images. {world}".strip()
    )
    return table


def _c8(parameters: pd.DataFrame | None) -> dict[str, object]:
    share, decided = np.nan, "not tested, no table of parameters"
    if parameters is not None and {"system", "part", "parameters"} <= set(parameters.columns) and len(parameters):
        paper = parameters[parameters["system"] == parameters["system"].iloc[0]].set_index("part")["parameters"]
        if "VLM: all" in paper.index:
            added = paper.filter(regex="^(LoRA|head|gate)").sum()
            share, decided = 100 * added / paper["VLM: all"], "percent of parameters"
    numbers = {"value": share, "ci_low": np.nan, "ci_high": np.nan, "mcnemar_p": np.nan, "n": None, "seeds": None}
    found = verdict(-share, -share, -_TINY)
    return {"claim": "C8", "dataset": "all", "verdict": found, "decided_by": decided, **numbers}


def _lacks(claim: str, dataset: str, predictions: Predictions, settings: Settings) -> str:
    """Why a claim could not be tested on a dataset (by its title, or "all")."""
    parts = []
    for name in settings.datasets:
        needed = dict.fromkeys(model for pair in _compared(claim, settings) for model in pair)
        missing = [model_name(m) for m in needed if test_rows(predictions, name, m) is None]
        if missing and dataset in (dataset_title(name), "all"):
            parts.append(f"no predictions of {', '.join(missing)} on {dataset_title(name)}")
    return "; ".join(parts) or "no image that both models have answered"


def _compared(claim: str, settings: Settings) -> list[tuple[str, str]]:
    """The pairs of models of a claim."""
    teacher, kinds = settings.teacher.teacher, [k for k in settings.gate.kinds if k != settings.gate.kind]
    deeper = [h for h in settings.distill.depths if len(h) > 1]
    return {
        "C1": [("vlm_tuned", "vit")],
        "C2": [("head", teacher)],
        "C3": [("head", depth_model(hidden, settings)) for hidden in deeper],
        "C4": [("emovlmkd", f"gate_{kind}") for kind in kinds],
        "C5": [("vlm_tuned", "vlm_zero_shot")],
        "C6": [("emovlmkd", rival) for rival in ("vlm_tuned", "vit", "head")],
        "C7": [(alpha_model(a, settings), teacher) for a in settings.distill.alphas],
    }[claim]


def _judge(claim: str, sample: Sample | None, settings: Settings) -> tuple:
    threshold = _SHARE if claim == "C1" else 0.0
    if sample is None:
        return (np.nan, np.nan, np.nan, threshold, UNDECIDED, np.nan, None, None)
    value, low, high = interval(sample.value, sample.resampled, settings.report.confidence)
    found = verdict(low, high, threshold)
    return (value, low, high, threshold, found, sample.p, sample.n, sample.seeds)


def _mean(samples: Sequence[Sample | None]) -> Sample | None:
    """Mean over datasets, each resampled within itself; None if a dataset could not be tested."""
    if any(sample is None for sample in samples):
        return None
    value, resampled = (np.mean([s[i] for s in samples], axis=0) for i in (0, 1))
    p = samples[0].p if len(samples) == 1 else float("nan")
    return Sample(float(value), resampled, sum(s.n for s in samples), max(s.seeds for s in samples), p)


def _samples(
    claim: str, predictions: Predictions, dataset: str, settings: Settings, stream: int
) -> dict[str, Sample | None]:
    """The comparisons of a claim on one dataset; `stream` keeps the datasets' resamples independent."""
    frames = {m: test_rows(predictions, dataset, m) for d, m in predictions if d == dataset}
    if claim == "C1":
        return _only_right(frames, settings, stream)
    if claim == "C7":
        return _trade_offs(frames, settings, stream)
    pairs = _compared(claim, settings)
    return {f"{model_name(a)} - {model_name(b)}": _pair(frames, a, b, settings, stream) for a, b in pairs}


def _pair(frames: dict, a: str, b: str, settings: Settings, stream: int) -> Sample | None:
    if frames.get(a) is None or frames.get(b) is None:
        return None
    pair = paired_correctness(frames[a], frames[b])
    if pair.empty:
        return None
    gap = 100 * (pair["a"] - pair["b"]).to_numpy()
    seeds = [frames[m]["seed"].nunique() for m in (a, b)]
    p = mcnemar_p(pair["a"] == 1, pair["b"] == 1) if seeds == [1, 1] else float("nan")
    return Sample(gap.mean(), bootstrap_means(gap, settings.report.bootstrap, stream), len(gap), max(seeds), p)


def _only_right(frames: dict, settings: Settings, stream: int) -> dict[str, Sample | None]:
    names = ("share only VLM right", "share only ViT right")
    if frames.get("vlm_tuned") is None or frames.get("vit") is None:
        return dict.fromkeys(names)
    pair = paired_correctness(frames["vlm_tuned"], frames["vit"])
    if pair.empty:
        return dict.fromkeys(names)
    shares = (100 * pair["a"] * (1 - pair["b"]), 100 * pair["b"] * (1 - pair["a"]))
    return {
        name: Sample(x.mean(), bootstrap_means(x.to_numpy(), settings.report.bootstrap, stream), len(x), 1)
        for name, x in zip(names, shares, strict=True)
    }


def _trade_offs(frames: dict, settings: Settings, stream: int) -> dict[str, Sample | None]:
    alphas, ours = settings.distill.alphas, settings.distill.alpha
    names = {a: f"score of alpha {ours:g} - alpha {a:g}" for a in alphas if a != ours}
    students = [frames.get(alpha_model(a, settings)) for a in alphas]
    teacher = frames.get(settings.teacher.teacher)
    if teacher is None or ours not in alphas or any(s is None for s in students):
        return dict.fromkeys(names.values())
    hits = [correct_by_image(s) for s in students]
    kls = [kl_by_image(teacher, s, settings.distill.tau) for s in students]
    both = pd.concat([*hits, *kls], axis=1, join="inner").to_numpy(float)
    if not len(both):
        return dict.fromkeys(names.values())
    resampled = bootstrap_means(both, settings.report.bootstrap, stream)
    k, seeds = len(alphas), max(s["seed"].nunique() for s in students)
    score, scores = (trade_off(x[..., :k], x[..., k:]) for x in (both.mean(axis=0), resampled))
    at = alphas.index(ours)
    return {
        name: Sample(score[at] - score[i], scores[:, at] - scores[:, i], len(both), seeds)
        for name, i in ((name, alphas.index(a)) for a, name in names.items())
    }
