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

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from emonb.files import resource
from emonb.metrics import bootstrap_means, correct_by_image, interval, kl_by_image, mcnemar_p, paired_correctness
from emonb.predictions import Predictions, dataset_title, head_model, is_drawn, model_name, test_rows
from emonb.settings import Settings

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
_SHARE = 5.0  # percent of test images that counts as substantial; our choice
_TINY = 1.0  # percent of all parameters that counts as tiny; our choice

Pairs = Sequence[tuple[str, str]]
Frames = Mapping[str, pd.DataFrame | None]  # model -> test rows of one dataset


class Sample(NamedTuple):
    """One comparison on one dataset: value, resampled values (B,), images, seeds, McNemar's p."""

    value: float
    resampled: np.ndarray
    n: int
    seeds: int
    p: float = float("nan")


# ---- what is measured: comparison -> sample, None where predictions are missing or share no image ------------------


def _gaps(frames: Frames, pairs: Pairs, settings: Settings, stream: int) -> dict[str, Sample | None]:
    """Accuracy of the first of each pair minus that of the second, in points."""
    found = {}
    for a, b in pairs:
        sample, pair = None, _correct(frames, a, b)
        if pair is not None:
            gap = 100 * (pair["a"] - pair["b"]).to_numpy()
            seeds = [frames[m]["seed"].nunique() for m in (a, b)]
            p = mcnemar_p(pair["a"] == 1, pair["b"] == 1) if seeds == [1, 1] else float("nan")
            resampled = bootstrap_means(gap, settings.report.bootstrap, stream)
            sample = Sample(gap.mean(), resampled, len(gap), max(seeds), p)
        found[f"{model_name(a)} - {model_name(b)}"] = sample
    return found


def _only_right(frames: Frames, pairs: Pairs, settings: Settings, stream: int) -> dict[str, Sample | None]:
    """Percent of images on which only the first of the pair is right, and only the second."""
    names, pair = ("share only VLM right", "share only ViT right"), _correct(frames, *pairs[0])
    if pair is None:
        return dict.fromkeys(names)
    shares = (100 * pair["a"] * (1 - pair["b"]), 100 * pair["b"] * (1 - pair["a"]))
    return {
        name: Sample(x.mean(), bootstrap_means(x.to_numpy(), settings.report.bootstrap, stream), len(x), 1)
        for name, x in zip(names, shares, strict=True)
    }


def _trade_offs(frames: Frames, pairs: Pairs, settings: Settings, stream: int) -> dict[str, Sample | None]:
    """Score of the paper's alpha minus that of each other; pairs: (head of an alpha, teacher)."""
    alphas, ours, tau = settings.distill.alphas, settings.distill.alpha, settings.distill.tau
    names = {i: f"score of alpha {ours:g} - alpha {a:g}" for i, a in enumerate(alphas) if a != ours}
    heads, teacher = [frames.get(head) for head, _ in pairs], frames.get(pairs[0][1])
    if teacher is None or ours not in alphas or any(head is None for head in heads):
        return dict.fromkeys(names.values())
    columns = [correct_by_image(head) for head in heads] + [kl_by_image(teacher, head, tau) for head in heads]
    both = pd.concat(columns, axis=1, join="inner").to_numpy(float)
    if not len(both):
        return dict.fromkeys(names.values())
    resampled = bootstrap_means(both, settings.report.bootstrap, stream)
    k, at, seeds = len(alphas), alphas.index(ours), max(head["seed"].nunique() for head in heads)
    score, scores = (trade_off(x[..., :k], x[..., k:]) for x in (both.mean(axis=0), resampled))
    return {
        name: Sample(score[at] - score[i], scores[:, at] - scores[:, i], len(both), seeds) for i, name in names.items()
    }


def trade_off(accuracy: np.ndarray, kl: np.ndarray) -> np.ndarray:
    """C7's score (..., K) of K alphas: accuracy and -KL scaled to 0..1 over the K, averaged."""

    def scale(x: np.ndarray) -> np.ndarray:
        low, span = x.min(-1, keepdims=True), np.ptp(x, axis=-1, keepdims=True)
        return np.divide(x - low, span, out=np.zeros_like(x), where=span > 0)

    return (scale(np.asarray(accuracy, float)) + scale(-np.asarray(kl, float))) / 2


def _correct(frames: Frames, a: str, b: str) -> pd.DataFrame | None:
    if frames.get(a) is None or frames.get(b) is None:
        return None
    pair = paired_correctness(frames[a], frames[b])
    return None if pair.empty else pair


# ---- the claims ----------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """A claim's rule in words, the models that it compares, and how."""

    rule: str
    pairs: Callable[[Settings], Pairs]
    measure: Callable[[Frames, Pairs, Settings, int], dict[str, Sample | None]] = _gaps
    threshold: float = 0.0
    on_each: bool = False  # in all: on each dataset, instead of in the mean


CLAIMS = {
    "C1": Claim(
        f"share of test images where only the VLM is right, and where only the ViT is: both above {_SHARE:g} %",
        lambda s: [("vlm_tuned", "vit")],
        _only_right,
        _SHARE,
    ),
    "C2": Claim("accuracy of the head minus its teacher's: above 0", lambda s: [("head", s.teacher.teacher)]),
    "C3": Claim(
        "accuracy of the head of one hidden layer minus that of each deeper head: all above 0",
        lambda s: [("head", head_model(s.distill, hidden=hidden)) for hidden in s.distill.depths if len(hidden) > 1],
    ),
    "C4": Claim(
        "accuracy with the concat & linear gate minus that with each other gate: all above 0",
        lambda s: [("emovlmkd", f"gate_{kind}") for kind in s.gate.kinds if kind != s.gate.kind],
    ),
    "C5": Claim("accuracy of the tuned VLM minus zero-shot: above 0", lambda s: [("vlm_tuned", "vlm_zero_shot")]),
    "C6": Claim(
        "accuracy of EmoVLM-KD minus tuned VLM, ViT, head: all above 0; in all: on each dataset",
        lambda s: [("emovlmkd", rival) for rival in ("vlm_tuned", "vit", "head")],
        on_each=True,
    ),
    "C7": Claim(
        "score = mean of accuracy and of -KL, each scaled to 0..1 over the alphas tried; "
        "the paper's alpha minus each other alpha: all above 0",
        lambda s: [(head_model(s.distill, alpha=a), s.teacher.teacher) for a in s.distill.alphas],
        _trade_offs,
    ),
}
RULES = {name: claim.rule for name, claim in CLAIMS.items()} | {
    "C8": f"head, gate and LoRA below {_TINY:g} % of all parameters of Qwen2-VL-7B (computed, no interval)",
}


def verdict(low: float, high: float, threshold: float = 0.0) -> str:
    """ "holds", "does not hold" or "undecided" of an interval and a threshold."""
    return HOLDS if low > threshold else FAILS if high <= threshold else UNDECIDED


def combine(verdicts: Sequence[str]) -> str:
    """Verdict of a claim from its comparisons: the weakest link."""
    return FAILS if FAILS in verdicts else HOLDS if set(verdicts) == {HOLDS} else UNDECIDED


def comparisons(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Every comparison behind C1-C7: one row per claim, comparison and dataset, and the mean of all.

    Columns: claim, dataset, comparison, value, ci_low, ci_high, threshold, verdict, mcnemar_p, n, seeds.
    A comparison without prediction files has empty numbers and is undecided.
    """
    frames = {d: {m: test_rows(predictions, d, m) for n, m in predictions if n == d} for d in settings.datasets}
    rows = []
    for name, claim in CLAIMS.items():
        # a stream for each dataset keeps their resamples independent
        found = {
            d: claim.measure(frames[d], claim.pairs(settings), settings, stream) for stream, d in enumerate(frames)
        }
        for comparison in next(iter(found.values())):
            samples = {dataset_title(d): measured[comparison] for d, measured in found.items()}
            for title, sample in {**samples, "all": _mean(list(samples.values()))}.items():
                judged = (np.nan, np.nan, np.nan, claim.threshold, UNDECIDED, np.nan, None, None)
                if sample is not None:
                    value, low, high = interval(sample.value, sample.resampled, settings.report.confidence)
                    said = verdict(low, high, claim.threshold)
                    judged = (value, low, high, claim.threshold, said, sample.p, sample.n, sample.seeds)
                rows.append((name, title, comparison, *judged))
    columns = ["claim", "dataset", "comparison", "value", "ci_low", "ci_high"]
    table = pd.DataFrame(rows, columns=[*columns, "threshold", "verdict", "mcnemar_p", "n", "seeds"])
    table.attrs["caption"] = "Every comparison behind the claims, in points unless it says score or share."
    return table


def _mean(samples: Sequence[Sample | None]) -> Sample | None:
    """Mean over datasets, each resampled within itself; None if a dataset could not be tested."""
    if any(sample is None for sample in samples):
        return None
    value, resampled = (np.mean([s[i] for s in samples], axis=0) for i in (0, 1))
    p = samples[0].p if len(samples) == 1 else float("nan")
    return Sample(float(value), resampled, sum(s.n for s in samples), max(s.seeds for s in samples), p)


def claims(predictions: Predictions, settings: Settings, parameters: pd.DataFrame | None) -> pd.DataFrame:
    """The verdict on each claim per dataset and in all, with the comparison that decided it.

    Args:
        parameters: the table of `cost.parameter_table` (for C8); None where there is none.

    A claim that lacks predictions is undecided, and `decided_by` says of which models and datasets.
    Columns: claim, statement, dataset, verdict, decided_by, value, ci_low, ci_high, mcnemar_p, n,
    seeds, rule. `decided_by` is the comparison with the lowest value among those of that verdict.
    """
    detail, rows = comparisons(predictions, settings), []
    for (claim, dataset), part in detail.groupby(["claim", "dataset"], sort=False):
        if dataset == "all" and CLAIMS[claim].on_each:
            part = detail[(detail["claim"] == claim) & (detail["dataset"] != "all")]
        found = combine(list(part["verdict"]))
        weakest = part[part["verdict"] == found].sort_values("value", na_position="first").iloc[0].to_dict()
        where = f"{weakest['dataset']}: " if weakest["dataset"] != dataset else ""
        note = f"not tested, {_lacks(claim, dataset, predictions, settings)}: " if np.isnan(weakest["value"]) else ""
        decided = note + where + weakest.pop("comparison")
        rows.append(weakest | {"dataset": dataset, "verdict": found, "decided_by": decided})
    table = pd.DataFrame([*rows, _c8(parameters)])
    table["statement"] = table["claim"].map(resource("paper_values.yaml", "claims"))
    table["rule"] = table["claim"].map(RULES)
    order = ["claim", "statement", "dataset", "verdict", "decided_by", "value", "ci_low", "ci_high"]
    table = table[[*order, "mcnemar_p", "n", "seeds", "rule"]]
    table[["n", "seeds"]] = table[["n", "seeds"]].astype("Int64").astype(object).where(lambda x: x.notna(), None)
    drawn = any(map(is_drawn, settings.datasets))
    table.attrs["caption"] = (
        f"Claims of the paper, judged by {100 * settings.report.confidence:g} % intervals over test images. "
        + ("Drawn datasets: the mechanism is tested, not the paper's data." if drawn else "")
    ).strip()
    return table


def _c8(parameters: pd.DataFrame | None) -> dict[str, object]:
    share, decided = np.nan, "not tested, no table of parameters"
    if parameters is not None and {"system", "part", "parameters"} <= set(parameters.columns) and len(parameters):
        paper = parameters[parameters["system"] == parameters["system"].iloc[0]].set_index("part")["parameters"]
        if "VLM: all" in paper.index:
            added = paper.filter(regex="^(LoRA|head|gate)").sum()
            share, decided = 100 * added / paper["VLM: all"], "percent of parameters"
    said = {"dataset": "all", "verdict": verdict(-share, -share, -_TINY), "decided_by": decided, "value": share}
    return {"claim": "C8", **said, "n": None, "seeds": None}


def _lacks(claim: str, dataset: str, predictions: Predictions, settings: Settings) -> str:
    """Why a claim could not be tested on a dataset (by its title, or "all")."""
    parts = []
    for name in settings.datasets:
        needed = dict.fromkeys(model for pair in CLAIMS[claim].pairs(settings) for model in pair)
        missing = [model_name(m) for m in needed if test_rows(predictions, name, m) is None]
        if missing and dataset in (dataset_title(name), "all"):
            parts.append(f"no predictions of {', '.join(missing)} on {dataset_title(name)}")
    return "; ".join(parts) or "no image that both models have answered"
