"""Claims C1-C8 of the paper, judged by intervals; the rules were written before any result was seen.

One rule for all: a comparison is a quantity that the claim says is above a threshold (0 points unless stated). Its
bootstrap interval over test images wholly above: "holds"; wholly at or below: "does not hold"; else "undecided". A
claim of several comparisons (best of several) holds if all hold, does not hold if one does not, else it is undecided;
no correction is made for several rivals. Over all datasets the quantity is the mean over datasets, images resampled
within each; only C6, which says "on all five datasets", holds in all only if it holds on each, and does not if it
fails on one. Seeds of one image are averaged first. McNemar's p stands beside pairs of single-seed models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from emonb.files import resource
from emonb.metrics import bootstrap_means, correctness, interval, kl_by_image, mcnemar_p
from emonb.predictions import Predictions, dataset_title, head_model, model_name, test_rows
from emonb.settings import Settings

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
_THRESHOLD = {"C1": 5.0}  # percent of test images that counts as substantial; our choice
_TINY = 1.0  # percent of all parameters that counts as tiny; our choice
_ON_EACH = ("C6",)  # in all: on each dataset, instead of in the mean


class Comparison(NamedTuple):
    """A quantity: the value or K values of each image, from the table of `_by_image`, and what their means come to."""

    name: str
    models: Sequence[str]
    values: Callable[..., pd.Series | pd.DataFrame]  # of the table and the models
    score: Callable[[np.ndarray], np.ndarray] = lambda means: means  # means (..., K) of the values -> (...)


def compared(settings: Settings) -> dict[str, list[Comparison]]:
    """The comparisons behind C1-C7."""
    distill, gate = settings.distill, settings.gate
    return {
        "C1": [
            Comparison("share only VLM right", ("vlm_tuned", "vit"), _only_first),
            Comparison("share only ViT right", ("vit", "vlm_tuned"), _only_first),
        ],
        "C2": _gaps("head", settings.teacher.teacher),
        "C3": _gaps("head", *(head_model(distill, hidden=hidden) for hidden in distill.depths if len(hidden) > 1)),
        "C4": _gaps("emovlmkd", *(f"gate_{kind}" for kind in gate.kinds if kind != gate.kind)),
        "C5": _gaps("vlm_tuned", "vlm_zero_shot"),
        "C6": _gaps("emovlmkd", "vlm_tuned", "vit", "head"),
        "C7": _trade_offs(settings),
    }


def _only_first(table: pd.DataFrame, a: str, b: str) -> pd.Series:
    return 100 * table[a] * (1 - table[b])


def _gap(table: pd.DataFrame, a: str, b: str) -> pd.Series:
    return 100 * (table[a] - table[b])


def _gaps(model: str, *rivals: str) -> list[Comparison]:
    """Accuracy of a model minus that of each rival, in points."""
    return [Comparison(f"{model_name(model)} - {model_name(rival)}", (model, rival), _gap) for rival in rivals]


def _trade_offs(settings: Settings) -> list[Comparison]:
    """Score of the paper's alpha minus that of each other."""
    distill, heads = settings.distill, _heads(settings)

    def values(table: pd.DataFrame, teacher: str, *heads: str) -> pd.DataFrame:
        return table[[*heads, *(f"KL of {head}" for head in heads)]]

    def ahead(other: int, means: np.ndarray) -> np.ndarray:
        scores = trade_off(*np.split(means, 2, axis=-1))
        return scores[..., heads.index("head")] - scores[..., other]

    name = f"score of alpha {distill.alpha:g} - alpha"
    others = [(i, alpha) for i, alpha in enumerate(distill.alphas) if alpha != distill.alpha]
    models = (settings.teacher.teacher, *heads)
    return [Comparison(f"{name} {alpha:g}", models, values, partial(ahead, i)) for i, alpha in others]


def _heads(settings: Settings) -> list[str]:
    """The heads of all alphas, and the paper's."""
    return list(dict.fromkeys([*(head_model(settings.distill, alpha=a) for a in settings.distill.alphas), "head"]))


def trade_off(accuracy: np.ndarray, kl: np.ndarray) -> np.ndarray:
    """C7's score (..., K) of K alphas: accuracy and -KL scaled to 0..1 over the K, averaged."""
    both = np.stack([accuracy, -kl])
    low, span = both.min(-1, keepdims=True), np.ptp(both, axis=-1, keepdims=True)
    return np.divide(both - low, span, out=np.zeros_like(both), where=span > 0).mean(axis=0)


def verdict(low: float, high: float, threshold: float = 0.0) -> str:
    """ "holds", "does not hold" or "undecided" of an interval and a threshold."""
    return HOLDS if low > threshold else FAILS if high <= threshold else UNDECIDED


def combine(verdicts: Sequence[str]) -> str:
    """Verdict of a claim from its comparisons: the weakest link."""
    return FAILS if FAILS in verdicts else HOLDS if set(verdicts) == {HOLDS} else UNDECIDED


def comparisons(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Every comparison behind C1-C7: one row per claim, comparison and dataset, and the mean of all.

    Columns: claim, dataset, comparison, value, ci_low, ci_high, threshold, verdict, mcnemar_p, n, seeds. One that
    cannot be made has no numbers, is undecided, and `comparison` says why.
    """
    wanted = [(claim, one) for claim, several in compared(settings).items() for one in several]
    models = {model for _, one in wanted for model in one.models}
    tables, rows = {d: _by_image(predictions, d, models, settings) for d in settings.datasets}, []
    for claim, one in wanted:
        # a stream for each dataset keeps their resamples independent
        tried = [_sample(one, tables[d], predictions, d, settings.report.bootstrap, i) for i, d in enumerate(tables)]
        samples = {dataset_title(d): [sample] for d, sample in zip(tables, tried, strict=True)} | {"all": tried}
        for title, found in samples.items():
            missing = "; ".join(sample for sample in found if isinstance(sample, str))
            row = {"claim": claim, "dataset": title, "threshold": _THRESHOLD.get(claim, 0.0), "verdict": UNDECIDED}
            row["comparison"] = f"not tested, {missing}: {one.name}" if missing else one.name
            if not missing:
                value, resampled, n, seeds, p = zip(*found, strict=True)
                value, low, high = interval(np.mean(value), np.mean(resampled, axis=0), settings.report.confidence)
                row |= {"value": value, "ci_low": low, "ci_high": high, "n": sum(n), "seeds": max(seeds)}
                row |= {"verdict": verdict(low, high, row["threshold"]), "mcnemar_p": p[0] if len(p) == 1 else np.nan}
            rows.append(row)
    columns = ["claim", "dataset", "comparison", "value", "ci_low", "ci_high", "threshold", "verdict", "mcnemar_p"]
    return pd.DataFrame(rows, columns=[*columns, "n", "seeds"]).astype({"n": "Int64", "seeds": "Int64"})


def _by_image(predictions: Predictions, dataset: str, models: Iterable[str], settings: Settings) -> pd.DataFrame:
    """`metrics.correctness`, and the divergence from the teacher of the head of each alpha."""
    table = correctness(predictions, dataset, models)
    teacher, *students = (test_rows(predictions, dataset, m) for m in (settings.teacher.teacher, *_heads(settings)))
    kl = [kl_by_image(teacher, student, settings.distill.tau) for student in students]
    return table.assign(**{f"KL of {head}": each for head, each in zip(_heads(settings), kl, strict=True)})


def _sample(
    one: Comparison, table: pd.DataFrame, predictions: Predictions, dataset: str, resamples: int, stream: int
) -> tuple[float, np.ndarray, int, int, float] | str:
    """A comparison on a dataset: value, resampled values (B,), images, seeds, McNemar's p; or why there is none."""
    frames = {model: test_rows(predictions, dataset, model) for model in one.models}
    missing = ", ".join(model_name(model) for model, frame in frames.items() if frame.empty)
    if missing:
        return f"no predictions of {missing} on {dataset_title(dataset)}"
    values = one.values(table, *one.models).dropna().to_numpy()
    if not len(values):
        return f"no image of {dataset_title(dataset)} that all models have answered"
    seeds = max(frame["seed"].nunique() for frame in frames.values())
    p = mcnemar_p(values) if one.values is _gap and seeds == 1 else np.nan
    resampled = bootstrap_means(values, resamples, stream)
    return one.score(values.mean(axis=0)), one.score(resampled), len(values), seeds, p


def claims(predictions: Predictions, settings: Settings, parameters: pd.DataFrame | None) -> pd.DataFrame:
    """The verdict on each claim per dataset and in all, with the comparison that decided it.

    Args:
        parameters: the table of `cost.parameter_table` (for C8); None where there is none.

    Columns: claim, statement, dataset, verdict, decided_by, value, ci_low, ci_high, mcnemar_p, n, seeds, rule.
    `decided_by` is the comparison with the lowest value among those of that verdict.
    """
    detail, rows = comparisons(predictions, settings), []
    for (claim, dataset), part in detail.groupby(["claim", "dataset"], sort=False):
        if dataset == "all" and claim in _ON_EACH:
            part = detail[(detail["claim"] == claim) & (detail["dataset"] != "all")]
        found = combine(list(part["verdict"]))
        weakest = part[part["verdict"] == found].sort_values("value", na_position="first").iloc[0]
        where = "" if weakest["dataset"] == dataset else f"{weakest['dataset']}: "
        rows.append(weakest.to_dict() | {"dataset": dataset, "decided_by": where + weakest["comparison"]})
    share, decided = np.nan, "not tested, no table of parameters"
    if parameters is not None:
        paper = parameters[parameters["system"] == parameters["system"].iloc[0]].set_index("part")["parameters"]
        share = 100 * paper.filter(regex="^(LoRA|head|gate)").sum() / paper["VLM: all"]
        decided = "percent of parameters"
    judged = {"verdict": verdict(-share, -share, -_TINY), "decided_by": decided, "value": share}
    rows.append({"claim": "C8", "dataset": "all", **judged})
    table = pd.DataFrame(rows).astype({"n": "Int64", "seeds": "Int64"})
    said, rules = resource("paper_values.yaml", "claims"), resource("paper_values.yaml", "rules")
    table = table.assign(statement=table["claim"].map(said), rule=table["claim"].map(rules))
    order = ["claim", "statement", "dataset", "verdict", "decided_by", "value", "ci_low", "ci_high", "mcnemar_p"]
    return table[[*order, "n", "seeds", "rule"]]
