"""Claims C1-C8 of the paper, and C2b, C3b, C9, E1, E2 of ours, judged by intervals over test images and seeds.

Second edition of the rules (27 November 2026), written before the runs that they judge; they stand in words in
`resources/paper_values.yaml`, with what changed and why. A claim is one or several comparisons, each a difference that
the claim says is above a threshold, with an interval in which images and seeds are crossed
(`metrics.crossed_estimates`). The claim holds if every interval lies above (an intersection-union test: no correction
is due); it does not hold if one lies at or below, at a level that is shared among the comparisons (Bonferroni, the
first step of Holm's), since one of several rivals is soon ahead by luck; else it is undecided. Over all datasets the
mean over datasets is judged; each dataset stands beside it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from emonb import metrics
from emonb.files import resource
from emonb.metrics import difference, hits_by_seed, kl_by_seed
from emonb.predictions import Predictions, dataset_title, gated, head_model, model_name, test_rows
from emonb.settings import Settings

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
_MARGIN = 1.0  # points of accuracy that "not worse" allows (C4, C7); our choice
_TINY = 1.0  # percent of all parameters that counts as tiny; our choice
RESAMPLINGS = 20  # of a run's own images and pipelines; our choice


class Comparison(NamedTuple):
    """A difference that a claim says is above `threshold`, from the predictions of `models` on a dataset.

    `evidence`: on the drawn pictures whose emotion shows there, "": on all. `test`: gives the p of a test that must
    reject as well, on a dataset.
    """

    name: str
    models: Sequence[str]
    values: Callable[..., np.ndarray]  # of the models' frames: [images, seeds]
    threshold: float = 0.0
    evidence: str = ""
    test: Callable[..., float] | None = None


class Sample(NamedTuple):
    """A comparison on a dataset: values [images, seeds], and the p of a test (NaN: none)."""

    values: np.ndarray
    p: float


# Of each claim its comparisons, each with its sample on each dataset (by title), or why there is none.
Samples = dict[str, list[tuple[Comparison, dict[str, Sample | str]]]]


def compared(settings: Settings) -> dict[str, list[Comparison]]:
    """The comparisons behind all claims but C8, which is a count."""
    distill, gate, teacher = settings.distill, settings.gate, settings.teacher.teacher
    alone = head_model(distill, alpha=0.0)  # the head without teacher
    deeper = [head_model(distill, hidden=hidden) for hidden in distill.depths if len(hidden) > len(distill.hidden)]
    alphas = [head_model(distill, alpha=alpha) for alpha in distill.alphas]

    def nearer(teacher: pd.DataFrame, head: pd.DataFrame, without: pd.DataFrame) -> np.ndarray:
        return difference(*(kl_by_seed(teacher, student, distill.tau) for student in (without, head)))

    beyond = {"values": metrics.excess_hits, "test": metrics.permutation_p}
    alone = "" if alone == "head" else alone
    drawn_near = [Comparison("KL(teacher || head): alpha 0 - ours", (teacher, "head", alone), nearer)] if alone else []
    return {
        "C1": [
            Comparison("ViT right where the VLM errs, over chance", ("vlm_tuned", "vit"), **beyond),
            Comparison("VLM right where the ViT errs, over chance", ("vit", "vlm_tuned"), **beyond),
        ],
        "C2": _gaps("head", teacher),
        "C2b": _gaps("head", alone),
        "C3": _gaps("emovlmkd", *map(gated, deeper)),
        "C3b": _gaps("head", *deeper),
        "C4": _gaps("emovlmkd", *(f"gate_{kind}" for kind in gate.kinds if kind != gate.kind), threshold=-_MARGIN),
        "C5": _gaps("vlm_tuned", "vlm_zero_shot"),
        "C6": _gaps("emovlmkd", "vlm_tuned", "vit", "head"),
        "C7": [*_gaps("head", *alphas, threshold=-_MARGIN), *drawn_near],
        "C9": [*_gaps("emovlmkd", "vlm_tuned", "head"), *_gaps("gate_concat_soft", "average_vlm_head")],
        "E1": [one._replace(evidence="mood") for one in _gaps("head", alone)],
        "E2": [one._replace(evidence="content") for one in (_gaps(alone, "head") if alone else [])],
    }


def _gaps(model: str, *rivals: str, threshold: float = 0.0) -> list[Comparison]:
    """Accuracy of a model minus that of each rival, in points; a rival without a name is not trained."""

    def gap(ours: pd.DataFrame, theirs: pd.DataFrame) -> np.ndarray:
        return 100 * difference(hits_by_seed(ours), hits_by_seed(theirs))

    names = {rival: f"{model_name(model)} - {model_name(rival)}" for rival in rivals if rival not in ("", model)}
    return [Comparison(name, (model, rival), gap, threshold) for rival, name in names.items()]


def verdict(estimate: metrics.Estimate, threshold: float = 0.0, *, rivals: int = 1, tail: float = 0.025) -> str:
    """ "holds", "does not hold" or "undecided" of a comparison that is one of so many `rivals`."""
    if estimate.interval(tail)[0] > threshold:
        return HOLDS
    return FAILS if estimate.interval(tail / rivals)[1] <= threshold else UNDECIDED


def combine(verdicts: Sequence[str]) -> str:
    """Verdict of a claim from its comparisons: the weakest link."""
    return FAILS if FAILS in verdicts else HOLDS if set(verdicts) == {HOLDS} else UNDECIDED


def collect(predictions: Predictions, settings: Settings, evidence: Mapping[str, pd.Series] | None = None) -> Samples:
    """What the claims are judged by.

    `evidence`: drawn dataset -> where the emotion of each image_id shows (E1, E2 are judged on these datasets alone).
    """
    found: Samples = {}
    for claim, several in compared(settings).items():
        for one in several:
            datasets = [d for d in settings.datasets if not one.evidence or d in (evidence or {})]
            samples = {dataset_title(d): _sample(one, predictions, d, evidence) for d in datasets}
            found.setdefault(claim, []).append((one, samples))
    return found


def comparisons(samples: Samples, settings: Settings) -> pd.DataFrame:
    """Every comparison behind the claims (`collect`): a row per claim, comparison and dataset, and the mean of all.

    Columns: claim, dataset, comparison, value, ci_low, ci_high, threshold, verdict, detectable (the smallest true
    distance from the threshold that this run finds with a probability of 80 %, in this comparison), p (of the
    comparison's own test; of McNemar's between two models of one seed), n, seeds. One that cannot be made has no
    numbers, is undecided, and `comparison` says why; a claim about models that the settings do not train has no row.
    """
    tail, rows = (1 - settings.report.confidence) / 2, []
    for claim, several in samples.items():
        for one, found in several:
            missing = {title: why for title, why in found.items() if isinstance(why, str)}
            missing |= {"all": "; ".join(missing.values())} if missing else {}
            there = {title: sample for title, sample in found.items() if isinstance(sample, Sample)}
            estimates = metrics.crossed_estimates({title: sample.values for title, sample in there.items()})
            for title in [*found, "all"] if found else ():
                row = {"claim": claim, "dataset": title, "comparison": one.name, "threshold": one.threshold}
                if title in missing:
                    row |= {"comparison": f"not tested, {missing[title]}: {one.name}", "verdict": UNDECIDED}
                else:
                    estimate, p = estimates[title], there[title].p if title in there else np.nan
                    judged = verdict(estimate, one.threshold, rivals=len(several), tail=tail)
                    if judged == HOLDS and one.test and p > tail:
                        judged = UNDECIDED
                    low, high = estimate.interval(tail)
                    row |= {"value": estimate.value, "ci_low": low, "ci_high": high, "n": estimate.images, "p": p}
                    row |= {"verdict": judged, "detectable": estimate.detectable(tail), "seeds": estimate.seeds}
                rows.append(row)
    columns = ["claim", "dataset", "comparison", "value", "ci_low", "ci_high", "threshold", "verdict", "detectable"]
    return pd.DataFrame(rows, columns=[*columns, "p", "n", "seeds"]).astype({"n": "Int64", "seeds": "Int64"})


def shares(samples: Samples, settings: Settings, resamplings: int = RESAMPLINGS) -> pd.Series:
    """How often each verdict comes out: percent of resamplings, by claim, dataset and verdict.

    Test images and pipelines are drawn again with replacement, the same ones for all comparisons of a dataset. Our
    choice: it says which verdicts hang on luck.
    """
    found = []
    for number in range(resamplings):
        again = {
            claim: [(one, {title: _redrawn(x, title, number) for title, x in given.items()}) for one, given in several]
            for claim, several in samples.items()
        }
        verdicts = comparisons(again, settings).groupby(["claim", "dataset"])["verdict"]
        found.append(verdicts.agg(list).map(combine).reset_index())
    return (100 * pd.concat(found).value_counts(["claim", "dataset", "verdict"]) / resamplings).rename("share")


def _redrawn(sample: Sample | str, title: str, number: int) -> Sample | str:
    """A sample with its images and seeds drawn again."""
    if isinstance(sample, str):
        return sample
    rng = np.random.default_rng([number, zlib.crc32(title.encode())])
    images, seeds = (rng.integers(size, size=size) for size in sample.values.shape)
    return sample._replace(values=sample.values[images][:, seeds])


def _sample(
    one: Comparison, predictions: Predictions, dataset: str, evidence: Mapping[str, pd.Series] | None
) -> Sample | str:
    """A comparison on a dataset, or why there is none."""
    frames = {model: test_rows(predictions, dataset, model) for model in one.models}
    if missing := ", ".join(model_name(model) for model, frame in frames.items() if frame.empty):
        return f"no predictions of {missing} on {dataset_title(dataset)}"
    if one.evidence:
        shows = evidence[dataset]
        frames = {m: frame[frame["image_id"].map(shows) == one.evidence] for m, frame in frames.items()}
    if not set.intersection(*(set(frame["image_id"]) for frame in frames.values())):
        return f"no image of {dataset_title(dataset)} that all models have answered"
    values = one.values(*frames.values())
    paired = values.shape[1] == 1 and len(frames) == 2
    p = one.test(*frames.values()) if one.test else metrics.mcnemar_p(values[:, 0]) if paired else np.nan
    return Sample(values, p)


def claims(detail: pd.DataFrame, parameters: pd.DataFrame | None, resampled: pd.Series | None = None) -> pd.DataFrame:
    """The verdict on each claim per dataset and in all, with the comparison that decided it.

    Args:
        detail: what `comparisons` found.
        parameters: the table of `cost.parameter_table` (for C8); None where there is none.
        resampled: what `shares` found.

    Columns: claim, statement, dataset, verdict, share (percent of the resamplings with that verdict), decided_by,
    value, ci_low, ci_high, detectable, p, n, seeds, rule. `decided_by` is the comparison of that verdict which is the
    least above its threshold, in widths of its interval.
    """
    rows = []
    for _, part in detail.groupby(["claim", "dataset"], sort=False):
        found = combine(list(part["verdict"]))
        lead = (part["value"] - part["threshold"]) / (part["ci_high"] - part["ci_low"])
        lead = lead.where(part["verdict"] == found)
        at = lead.idxmin() if lead.notna().any() else part.index[part["verdict"] == found][0]
        rows.append(part.loc[at].to_dict() | {"decided_by": part.loc[at, "comparison"]})
    share, decided = np.nan, "not tested, no table of parameters"
    if parameters is not None:
        paper = parameters[parameters["system"] == parameters["system"].iloc[0]].set_index("part")["parameters"]
        share = 100 * paper.filter(regex="^(LoRA|head|gate)").sum() / paper["VLM: all"]
        decided = "percent of parameters"
    judged = HOLDS if share < _TINY else FAILS if share >= _TINY else UNDECIDED
    rows.append({"claim": "C8", "dataset": "all", "verdict": judged, "decided_by": decided, "value": share})
    table = pd.DataFrame(rows).astype({"n": "Int64", "seeds": "Int64"})
    said, rules = resource("paper_values.yaml", "claims"), resource("paper_values.yaml", "rules")
    table = table.assign(statement=table["claim"].map(said), rule=table["claim"].map(rules))
    order = {claim: i for i, claim in enumerate(said)}
    table = table.sort_values("claim", key=lambda claims: claims.map(order), kind="stable", ignore_index=True)
    keys = ["claim", "dataset", "verdict"]
    table["share"] = np.nan if resampled is None else pd.MultiIndex.from_frame(table[keys]).map(resampled)
    columns = ["claim", "statement", "dataset", "verdict", "share", "decided_by", "value", "ci_low", "ci_high"]
    return table[[*columns, "detectable", "p", "n", "seeds", "rule"]]
