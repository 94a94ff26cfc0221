"""The result tables: pure functions of the prediction files, one row per model and dataset; and tables as text.

Columns of every table of models: `row, name, dataset, paper_dataset, paper, paper_source, ours, difference, ci_low,
ci_high, n, seeds`, then `gain, gain_low, gain_high` where rows are compared with a reference row (in points, on the
same images). Accuracies in percent on split `test`; an empty `paper` = not reported here. The mini-* sets are drawn
and only stand for the set in `paper_dataset`: their accuracies and the difference are no comparison of quality.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from emonb import metrics
from emonb import predictions as pr
from emonb.files import resource
from emonb.metrics import hits_by_seed
from emonb.predictions import Predictions, dataset_title, gated, head_model, model_name, test_rows
from emonb.settings import Settings

_COLUMNS = ["row", "name", "dataset", "paper_dataset", "paper", "paper_source", "ours", "difference"]
_COLUMNS += ["ci_low", "ci_high", "n", "seeds", "gain", "gain_low", "gain_high"]
LEVELS = {"chance": "always the most frequent emotion", "ceiling": "ceiling set by label noise"}
_NOTHING = metrics.Estimate(np.nan, np.nan, np.inf, None, None)  # of a model that is not there
_UNEVEN = 1.5  # largest class over smallest above which accuracy alone misleads; ours


def main(
    predictions: Predictions, settings: Settings, drawn: Mapping[str, pd.DataFrame] | None = None
) -> pd.DataFrame:
    """The paper's main table: EmoVLM-KD, its parts and baselines, models only the paper has, and any other's files.

    Extra columns, in percent: `chance`, always naming the most frequent emotion; `ceiling`, the share of pictures that
    are labelled as drawn (`drawn`: dataset -> `noisy` by image_id), since who names what is drawn gets no more;
    `macro_f1, balanced_accuracy` where the largest class has over 1.5 times the images of the smallest (our choice).
    """
    from sklearn.metrics import precision_recall_fscore_support

    def about(dataset: str, model: str) -> dict[str, float]:
        rows, known = test_rows(predictions, dataset, model), (drawn or {}).get(dataset)
        counts = pr.asked_of_all(predictions, dataset).value_counts()  # not of those that this model has seen
        found = {"chance": 100 * counts.max() / counts.sum(), "macro_f1": np.nan, "balanced_accuracy": np.nan}
        found["ceiling"] = np.nan if known is None else 100 * (1 - known["noisy"].mean())
        if len(rows) and counts.max() > _UNEVEN * counts.min():
            options = {"labels": sorted(counts.index), "average": "macro", "zero_division": 0}
            seeds = (part for _, part in rows.groupby("seed"))
            each = [precision_recall_fscore_support(x["label"], x["prediction"], **options)[1:3] for x in seeds]
            found["balanced_accuracy"], found["macro_f1"] = 100 * np.mean(each, axis=0)
        return found

    rows = _printed("main") | {"vit_scratch": model_name("vit_scratch")} | _strangers(predictions, settings)
    return _table("main", predictions, settings, rows, "emovlmkd", about)


def ahead(*parts: pd.DataFrame) -> str:
    """Rows of tables that are ahead of EmoVLM-KD, the interval of their gain wholly above 0, and where; or "none"."""
    rows = pd.concat(parts).query("row != 'oracle'").dropna(subset="gain_low").drop_duplicates(["row", "dataset"])
    on = rows["gain_low"].gt(0).groupby(rows["name"], sort=False).agg(["sum", "size"])
    return "; ".join(f"{name} on {n} of {of} datasets" for name, n, of in on[on["sum"] > 0].itertuples()) or "none"


def _strangers(predictions: Predictions, settings: Settings) -> dict[str, str]:
    """Row -> name of models that are not ours; the name says where one has not seen all test images."""
    found = dict[str, str]()
    for dataset, model in ((d, m) for d in settings.datasets for m in pr.strangers(predictions, d)):
        whole = pr.asked_of_all(predictions, dataset).index.isin(test_rows(predictions, dataset, model)["image_id"])
        found[model] = found.get(model, model) if whole.all() else f"{model} (part of the images)"
    return found


def asked(
    predictions: Predictions, settings: Settings, prices: Mapping[tuple[str, str], Mapping[str, float]]
) -> pd.DataFrame:
    """Served models that were asked our VLM's question (`run --ask`): what they get right, and what that cost.

    `prices`: (dataset, model) -> `usd`, and mean `seconds` of an answer (`Run.asked`). Columns: dataset, model, n;
    with intervals, `accuracy` in percent and `gain` over EmoVLM-KD on the same images; `unparsable` in percent; price.
    """

    def more(dataset: str, model: str) -> dict[str, float]:
        odd = 100 * (1 - test_rows(predictions, dataset, model)["parsed"].mean())
        return {"unparsable": odd, "usd": np.nan, "seconds": np.nan, **prices.get((dataset, model), {})}

    table = _table("main", predictions, settings, {model: model for _, model in prices}, "emovlmkd", more)
    names = {"row": "model", "ours": "accuracy", "ci_low": "accuracy_low", "ci_high": "accuracy_high"}
    columns = ["dataset", "model", "n", *(f"{x}{end}" for x in ("accuracy", "gain") for end in ("", "_low", "_high"))]
    table = table.rename(columns=names).reindex(columns=[*columns, "unparsable", "usd", "seconds"])
    table.attrs["caption"] += (
        " Asked in the same words as our VLM; the text is read, where ours has its candidates scored; an unparsable "
        "answer is wrong. usd: all answers, at the prices of the day; seconds: one answer."
    )
    return table


def modules(
    predictions: Predictions, settings: Settings, counts: Mapping[str, Mapping[str, int]] | None = None
) -> pd.DataFrame:
    """The paper's module table with parameter counts, and the rivals that could embarrass the method.

    `counts`: dataset -> our parameters by model (`cost.system_counts`).
    """
    printed = {row["row"]: row["parameters"] for row in resource("paper_values.yaml", "tables", "modules")}
    rivals = ("probe", "average_vlm_head", "average_vlm_vit")
    rows = _printed("modules") | {model: model_name(model) for model in rivals}
    rows[head_model(settings.distill, alpha=0.0)] = "head without distillation (alpha = 0)"
    rows |= {"oracle": "oracle: VLM or ViT is right"} | _strangers(predictions, settings)

    def sizes(dataset: str, model: str) -> dict[str, float]:
        ours = (counts or {}).get(dataset, {}).get(model, np.nan)
        return {"parameters_paper": printed.get(model, np.nan), "parameters_ours": float(ours)}

    return _table("modules", predictions, settings, rows, "emovlmkd", sizes)


def depth(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """The gated model by the depth of its head, as in the paper.

    Extra columns: `alone, alone_low, alone_high`, accuracy of that head without a gate.
    """
    heads = {head_model(settings.distill, hidden=hidden): str(list(hidden)) for hidden in settings.distill.depths}
    alone = {}
    for head in heads:
        hits = {d: 100 * hits_by_seed(test_rows(predictions, d, head)) for d in settings.datasets}
        alone[gated(head)] = _intervals(hits, settings)

    def without_gate(dataset: str, model: str) -> dict[str, float]:
        return _with_ends("alone", alone[model].get(dataset, (np.nan,) * 3))

    rows = {gated(head): name for head, name in heads.items()}
    table = _table("depth", predictions, settings, rows, "emovlmkd", without_gate)
    table.attrs["caption"] += " alone: the head without a gate."
    return table


def depth_schedule(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Heads alone by depth and length of training (ours): do deeper heads fall behind for want of steps?

    `gain` is over the head of fewest layers, trained as long. Extra columns: `layers`, and `length` in multiples of
    the authors' training (see `DistillSettings.schedules`); NaN: the profile's own, with all its seeds.
    """
    distill, parts = settings.distill, []
    for length, schedule in {**distill.schedules, np.nan: {}}.items():
        trained = "as the profile has it" if np.isnan(length) else f"{length:g} x the authors' training"
        heads = {head_model(distill, hidden=h, **schedule): list(h) for h in sorted(distill.depths, key=len)}
        rows = {head: f"{hidden}, {trained}" for head, hidden in heads.items() if head}
        if not rows:
            continue
        part = _table("depth", predictions, settings, rows, next(iter(rows)))
        parts.append(part.assign(layers=part["name"].str.count(", "), length=length))
    table = pd.concat(parts, ignore_index=True)
    over = f"points over {model_name('head')}"  # the name may stand in the caption a second time
    same = part.attrs["caption"].replace(over, "points over the head of fewest layers, trained as long")
    table.attrs["caption"] = (
        f"{same} Lengths are multiples of the authors' learning rate x steps: 5 epochs at 1e-5, one image a step, on "
        "a data set of this size."
    )
    return table


def gates(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """The five gates; the best-known one with two other inputs, and learning from two other answers; and no gate."""
    more = [f"gate_concat_{what}" for what in ("logits", "soft", "val", "oof")] + ["average_vlm_head"]
    return _table("gates", predictions, settings, _printed("gates") | {m: model_name(m) for m in more}, "emovlmkd")


def alpha(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Heads by weight of distillation: accuracy and KL(teacher || head) at the paper's temperature.

    Extra columns: `alpha`, and `kl, kl_low, kl_high` in nats, from the stored probabilities.
    """
    distill, teacher = settings.distill, settings.teacher.teacher
    alphas, found = {head_model(distill, alpha=a): a for a in distill.alphas}, {}
    for model in alphas:
        pairs = {d: [test_rows(predictions, d, m) for m in (teacher, model)] for d in settings.datasets}
        apart = {d: metrics.kl_by_seed(*pair, distill.tau) for d, pair in pairs.items()}
        found[model] = _intervals(apart, settings)

    def divergence(dataset: str, model: str) -> dict[str, float]:
        kl = found[model].get(dataset, (np.nan,) * 3)
        return {"alpha": alphas[model], **_with_ends("kl", [max(x, 0.0) for x in kl])}

    rows = {model: f"alpha = {a:g}" for model, a in alphas.items()}
    return _table("alpha", predictions, settings, rows, "head", divergence)


def instruction_tuning(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Zero-shot against tuned, and free generation against scoring.

    Extra columns, of the first seeds: `mcnemar_p` (against zero-shot); `parse_rate`, percent of answers with a label;
    and `agreement`, percent of images on which the answer equals the tuned VLM's scored one.
    """
    models = ("vlm_zero_shot", "vlm_tuned", "vlm_generated")
    firsts = {(d, m): pr.first_seed(test_rows(predictions, d, m)) for d in settings.datasets for m in models}
    right = {dataset: metrics.correctness(firsts, dataset, models) for dataset in settings.datasets}

    def compared(dataset: str, model: str) -> dict[str, float]:
        frame, tuned = (firsts[dataset, m] for m in (model, "vlm_tuned"))
        both = frame.merge(tuned, on="image_id", suffixes=("", "_tuned"))
        gaps = (right[dataset][model] - right[dataset]["vlm_zero_shot"]).dropna()
        return {
            "mcnemar_p": np.nan if model == "vlm_zero_shot" else metrics.mcnemar_p(gaps),
            "parse_rate": 100 * frame["parsed"].mean(),
            "agreement": 100 * (both["prediction"] == both["prediction_tuned"]).mean(),
        }

    return _table("main", predictions, settings, {m: model_name(m) for m in models}, models[0], compared)


def _printed(table: str) -> dict[str, str]:
    """Rows of one of the paper's tables, as our models are called -> as they are printed."""
    return {row["row"]: row["name"] for row in resource("paper_values.yaml", "tables")[table]}


def _table(
    paper: str,
    predictions: Predictions,
    settings: Settings,
    rows: Mapping[str, str],
    reference: str,
    more: Callable[[str, str], dict[str, Any]] = lambda dataset, model: {},
) -> pd.DataFrame:
    """Rows (model -> name) x datasets in long form; rows known neither to us nor to the paper are left out.

    `paper`: its table with a row of the same model or name; `more`: further columns of a dataset and model.
    """
    known = {key: r for r in resource("paper_values.yaml", "tables")[paper] for key in (r["row"], r["name"])}
    whole, fewer = {d: pr.asked_of_all(predictions, d).index for d in settings.datasets}, dict[str, dict[str, int]]()
    hits = {m: _hits(predictions, whole, m) for m in dict.fromkeys([*rows, reference])}
    both = [d for d in settings.datasets if not hits[reference][d].empty]
    own, lead = {}, {}

    def gap(model: str, dataset: str) -> np.ndarray:
        a, b = hits[model][dataset], hits[reference][dataset]
        if model.startswith("gate_"):  # of the reference's pipelines, perhaps not of all: with the same luck
            seeds = a.columns.intersection(b.columns)
            a, b = a[seeds], b[seeds]
        return metrics.difference(a, b)

    for model in rows:
        own[model] = metrics.crossed_estimates({d: x.to_numpy() for d, x in hits[model].items() if not x.empty})
        gaps = {d: gap(model, d) for d in both if model != reference}
        lead[model] = metrics.crossed_estimates({d: x for d, x in gaps.items() if len(x)})
    tail, records = (1 - settings.report.confidence) / 2, []
    for dataset, (model, name) in product(settings.datasets, rows.items()):
        printed, ours = known.get(model) or known.get(name) or {"values": {}}, own[model].get(dataset, _NOTHING)
        value = printed["values"].get(dataset.removeprefix("mini-"), np.nan)
        if ours is _NOTHING and np.isnan(value):
            continue
        source = "" if np.isnan(value) else printed["source"]
        record = [model, name, dataset_title(dataset), pr.paper_dataset(dataset), value, source]
        if ours is not _NOTHING and ours.images < len(whole[dataset]):
            fewer.setdefault(model_name(model), {})[f"{ours.images:,} of {len(whole[dataset]):,}"] = 1
        mean, *ends = np.clip([ours.value, *ours.interval(tail)], 0, 100).tolist()
        gain = lead[model].get(dataset, _NOTHING)
        record += [mean, mean - value, *ends, ours.images, ours.seeds, gain.value, *gain.interval(tail)]
        records.append(dict(zip(_COLUMNS, record, strict=True)) | more(dataset, model))
    table = pd.DataFrame(records, columns=None if records else _COLUMNS).astype({"n": "Int64", "seeds": "Int64"})
    parts = [f"{name} ({', '.join(counts)})" for name, counts in fewer.items()]
    caption = [
        f"Accuracy in percent on test images, {100 * settings.report.confidence:g} % intervals over images and seeds.",
        f"gain (in the CSV at least): points over {model_name(reference)}, same images.",
        f"Of a part of the test images, so compare by the gain: {'; '.join(parts)}." * bool(parts),
        "Ours: drawn datasets that stand for the paper's; NOT comparable with its accuracies."
        * any(map(pr.is_drawn, settings.datasets)),
    ]
    table.attrs["caption"] = " ".join(filter(None, caption))
    return table


def _intervals(samples: Mapping[str, pd.DataFrame], settings: Settings) -> dict[str, metrics.Interval]:
    """By dataset: mean of values [images, seeds], with its interval over both."""
    found = metrics.crossed_estimates({d: x.to_numpy() for d, x in samples.items() if not x.empty})
    return {d: (one.value, *one.interval((1 - settings.report.confidence) / 2)) for d, one in found.items()}


def _with_ends(name: str, interval: Sequence[float]) -> dict[str, float]:
    """A value and the ends of its interval as columns of a table."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


def _hits(predictions: Predictions, whole: Mapping[str, pd.Index], model: str) -> dict[str, pd.DataFrame]:
    """Percent right of each dataset's test images (`whole`), [images, seeds]; `oracle`: of the VLM or the ViT."""
    if model != "oracle":
        hits = {d: 100 * hits_by_seed(test_rows(predictions, d, model)) for d in whole}
        # a stranger may have seen others, too, or with each seed other ones
        return {d: (x[x.index.isin(whole[d])] if len(whole[d]) else x).dropna() for d, x in hits.items()}
    parts = zip(*(_hits(predictions, whole, part).items() for part in ("vlm_tuned", "vit")), strict=True)
    return {d: (100 - (100 - a) * (100 - b) / 100).dropna(axis=1, how="all").dropna() for (d, a), (_, b) in parts}


def complementarity(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """VLM (tuned) x ViT on test images, first seeds, per dataset: emotion "all" first, then each emotion.

    Columns: dataset, emotion, n, counts by group, `only_vlm, only_vit` in percent with intervals, `oracle` in
    percent, `q_statistic`, `disagreement` in percent, `kappa` (of the answers), `mcnemar_p`; `second_vlm`, percent of
    images that the VLM's second seed gets right where its first errs, and `only_vit_over_second`, what the ViT gets
    right there beyond that, and with the roles exchanged; `metrics.error_consistency` of VLM and ViT, and of two seeds
    of each. NaN where there is one seed. Not in the paper.
    """
    rows, models, options = [], ("vlm_tuned", "vit"), (settings.report.bootstrap, settings.report.confidence)
    for dataset in (d for d in settings.datasets if all((d, model) in predictions for model in models)):
        table = pr.joint(predictions, dataset, models)
        hits = [hits_by_seed(test_rows(predictions, dataset, m)).reindex(table.index) for m in models]
        seconds = pd.concat([hit.iloc[:, 1] if hit.shape[1] > 1 else hit.iloc[:, 0] * np.nan for hit in hits], axis=1)
        for emotion, part in by_emotion(table, pr.prediction_labels(predictions[dataset, "vit"])).items():
            a, b = ((part[model] == part["label"]).to_numpy() for model in models)
            row = [dataset_title(dataset), emotion, len(part), *metrics.two_by_two(a, b).flat]
            for hit in (a & ~b, ~a & b):
                resampled = metrics.bootstrap_means(100.0 * hit, settings.report.bootstrap)
                row += metrics.interval(100 * hit.mean(), resampled, settings.report.confidence)
            row += [100 * (1 - (~a & ~b).mean()), metrics.q_statistic(a, b), 100 * (a != b).mean()]
            row += [metrics.kappa(part["vlm_tuned"], part["vit"]), metrics.mcnemar_p(1.0 * a - b)]
            more = [second for _, second in seconds.loc[part.index].items()]
            for one, again, other in ((a, more[0], b), (b, more[1], a)):
                row += [100 * (again * ~one).mean(), *metrics.mean_interval(100 * (other - again) * ~one, *options)]
            pairs = ((a, b), (a, more[0]), (b, more[1]))
            rows.append(row + [x for pair in pairs for x in metrics.error_consistency(*pair, *options)])
    columns = ["dataset", "emotion", "n", *(group.replace(" ", "_") for group in pr.GROUPS)]
    columns += ["only_vlm", "only_vlm_low", "only_vlm_high", "only_vit", "only_vit_low", "only_vit_high"]
    columns += ["oracle", "q_statistic", "disagreement", "kappa", "mcnemar_p"]
    columns += ["second_vlm", *(f"only_vit_over_second{end}" for end in ("", "_low", "_high"))]
    columns += ["second_vit", *(f"only_vlm_over_second{end}" for end in ("", "_low", "_high"))]
    columns += [f"consistency{of}{end}" for of in ("", "_vlm", "_vit") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=columns)


def evidence(predictions: Predictions, settings: Settings, drawn: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What the models make of drawn pictures, by where the emotion shows: content, mood or both. Not in the paper.

    Args:
        drawn: dataset -> `evidence` and `off_mood` by image_id (`Run.drawn`); other images do not count.

    Returns:
        dataset ("all": mean over datasets), evidence ("no false mood": all but those with another emotion's mood),
        row, name, value, ci_low, ci_high, n, seeds. Values: percent right of a model; `inherited`: points that the
        head gains by its teacher; `only_vlm, only_vit`: percent that one of the two alone gets right. Intervals over
        images and seeds, as in the claims.
    """
    alone, tail = head_model(settings.distill, alpha=0.0), (1 - settings.report.confidence) / 2
    models = (*pr.MAIN, "vit_scratch", "probe", alone, "average_vlm_head")
    names = LEVELS | {m: model_name(m) for m in models if m}
    pairs = {"inherited": ("head", alone), "only_vlm": ("vlm_tuned", "vit"), "only_vit": ("vit", "vlm_tuned")}
    said = ("gain of the head by its teacher, points", "only the tuned VLM right", "only the ViT right")
    samples: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for dataset, table in drawn.items():
        kinds = {kind: table["evidence"] == kind for kind in ("content", "mood", "both")}
        kinds |= {"all": table["evidence"].notna(), "no false mood": ~table["off_mood"]}
        there = {m: predictions[dataset, m] for m in names if (dataset, m) in predictions}
        right = {m: 100 * hits_by_seed(f[f["image_id"].isin(table.index)]) for m, f in there.items()}
        ceiling, often = 100.0 * ~table[["noisy"]], table["label"].value_counts(normalize=True).max()
        found = {"chance": ceiling * 0 + 100 * often, "ceiling": ceiling, **right}
        for row, (a, b) in pairs.items():
            if {a, b} <= right.keys():
                lead = metrics.difference(right[a], right[b])
                lead = lead if row == "inherited" else lead.clip(min=0)
                found[row] = pd.DataFrame(lead, right[a].index.intersection(right[b].index))
        for (row, values), (kind, shown) in product(found.items(), kinds.items()):
            part = values[values.index.isin(table.index[shown])].to_numpy()
            part = np.full_like(part, part.mean()) if row in LEVELS and len(part) else part  # known without error
            if len(part) > 1:  # one has no variance
                samples.setdefault((row, kind), {})[dataset_title(dataset)] = part
    names |= dict(zip(pairs, said, strict=True))
    rows = [
        (title, kind, row, names[row], one.value, *one.interval(tail), one.images, one.seeds)
        for row, kind in sorted(samples, key=lambda key: list(names).index(key[0]))
        for title, one in metrics.crossed_estimates(samples[row, kind]).items()
    ]
    columns = ["dataset", "evidence", "row", "name", "value", "ci_low", "ci_high", "n", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def label_distribution(
    predictions: Predictions, settings: Settings, samples: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """How near each model's probabilities are to the raters' shares on test images. Not in the paper.

    `samples`: dataset -> sample table with columns `share_<emotion>`; neutral is dropped, the rest sums to 1, and an
    image without any of the rest is left out. Columns: row, name, dataset, n; with intervals the measures of
    `metrics.label_distribution`, the probability of the model's answer (`surest`) and the raters' share of theirs.
    The first row gives every image the mean shares of the training images.
    """
    rows, options = [], (settings.report.bootstrap, settings.report.confidence)
    for dataset, frame in samples.items():
        labels, train = frame.attrs["labels"], frame.loc[frame["split"] == "train", "image_id"]
        shares = frame.set_index("image_id")[[f"share_{label}" for label in labels]]
        shares = shares.div(shares.sum(axis=1), axis=0).dropna()
        mean = shares[shares.index.isin(train)].mean().to_numpy()
        models = [m for m in pr.MODELS if (dataset, m) in predictions and m != "vlm_generated"]  # one word: no shares
        others = sorted(m for d, m in predictions if d == dataset and m not in pr.MODELS)
        models += [m for m in others if not pr.says_one_word(predictions[dataset, m])]
        for model in ["", *models] if models else []:
            answers = test_rows(predictions, dataset, model or models[0])
            answers = answers[answers["image_id"].isin(shares.index)]
            theirs, own = shares.loc[answers["image_id"]].to_numpy(), pr.probabilities(answers)
            own = own if model else np.tile(mean, (len(answers), 1))
            values = metrics.label_distribution(theirs, own).assign(surest=own.max(axis=1))
            values = values.assign(raters_surest=theirs.max(axis=1)).groupby(answers["image_id"].to_numpy()).mean()
            name = model_name(model) if model else "mean of the training images' raters"
            row = {"row": model, "name": name, "dataset": dataset_title(dataset), "n": len(values)}
            row["seeds"] = answers["seed"].nunique()
            for measure, x in values.items():
                row |= _with_ends(measure, metrics.mean_interval(x, *options))
            rows.append(row)
    table = pd.DataFrame(rows)
    table.attrs["caption"] = (
        "Models against the raters' distributions on test images: kl and js in nats, top2 in %; intervals over images "
        "alone, of the mean over seeds and repeats."
    )
    return table


def review(predictions: Predictions, settings: Settings, marks: pd.DataFrame) -> pd.DataFrame:
    """Accuracy as labelled, and after a review of labels (`predictions.reviewed`), beside each other; no headline.

    Args:
        marks: as `predictions.read_review` gives them; `EmonbError`: of other predictions.

    Returns:
        model, name, dataset; pictures ("all", or the reviewed ones of the random sample, the only fair estimate), n,
        reviewed; as_labelled, after_review in percent, means over seeds; difference in points, of the random sample
        with its interval over images. The caption says how many pictures were reviewed from which view.
    """
    shown = {(d, m): predictions[d, m] for d in settings.datasets for m in (*pr.MAIN, *pr.strangers(predictions, d))
             if (d, m) in predictions}  # fmt: skip
    after, rows = pr.reviewed(shown, marks), []

    def lead(means: np.ndarray) -> np.ndarray:  # [..., 3] -> [...]
        before, now, kept = np.moveaxis(means, -1, 0)
        return 100 * (now / np.where(kept > 0, kept, np.nan) - before)

    for dataset, model in shown:
        own = marks[marks["dataset"] == dataset]
        hits = metrics.hits_by_seed(test_rows(shown, dataset, model)).mean(axis=1)
        now = metrics.hits_by_seed(after[dataset, model]).mean(axis=1).reindex(hits.index)
        values = pd.DataFrame({"before": hits, "now": now.fillna(0), "kept": now.notna().astype(float)})
        fair = values[values.index.isin(own.loc[own["view"] == pr.SAMPLE, "image_id"])]
        for pictures, part, count in (("all", values, len(own)), (pr.SAMPLE, fair, len(fair))):
            if count:
                before, gain, ends = 100 * part["before"].mean(), lead(part.mean().to_numpy()), (np.nan, np.nan)
                if part is fair:
                    resampled = lead(metrics.bootstrap_means(part.to_numpy(), settings.report.bootstrap))
                    _, *ends = metrics.interval(gain, resampled, settings.report.confidence)
                about = [model, model_name(model), dataset_title(dataset), pictures, len(part), count]
                rows.append([*about, before, before + gain, gain, *ends])
    columns = ["model", "name", "dataset", "pictures", "n", "reviewed", "as_labelled", "after_review", "difference"]
    table = pd.DataFrame(rows, columns=[*columns, "difference_low", "difference_high"])
    table.attrs["caption"] = _who_reviewed(marks)
    return table


def _who_reviewed(marks: pd.DataFrame) -> str:
    """Of a review: how many pictures were looked at from which view, what was found, and what follows from that."""
    counts = {dataset_title(d): part["view"].value_counts() for d, part in marks.groupby("dataset", sort=False)}
    views = "; ".join(f"{d}: " + ", ".join(f"{n} {view}" for view, n in of.items()) for d, of in counts.items())
    found = ", ".join(f"{n} {mark}" for mark, n in marks["mark"].value_counts().items())
    fair = marks["view"].eq(pr.SAMPLE).any()
    estimate = "Only rows of the random sample are" if fair else "No random sample was reviewed, so no difference is"
    return (
        f"Labels of {len(marks)} pictures reviewed ({views}): {found}. {estimate} an estimate: who reviews errors can "
        "only help who made them. A mislabelled picture is left out, an answer that is also right counts; all other "
        "tables are as labelled."
    )


def by_emotion(table: pd.DataFrame, labels: Sequence[str]) -> dict[str, pd.DataFrame]:
    """A table of images whole ("all"), then by true emotion in the order of `labels`, without those of no image."""
    parts = {"all": table} | {label: table[table["label"] == label] for label in labels}
    return {emotion: part for emotion, part in parts.items() if len(part)}


# ---- a table as text: names and texts are data, nothing in a cell becomes markup, a formula or a link --------------

_FORMS = {"paper": ("", ".2f"), "ours": ("ci", ".1f"), "alone": ("alone", ".1f")}  # ends of intervals, digits
_FORMS |= {"gain": ("gain", "+z.1f"), "kl": ("kl", "z.3g")}
_FORMS |= {"macro_f1": ("", ".1f"), "balanced_accuracy": ("", ".1f")}
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?(\s*\[[^\[\]]*\])?")  # 58.3 [54.5, 62.1]
_TEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "\u00a0": "~"}
_TEX |= {"^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}


def format_value(value: Any) -> str:
    """A table cell for people: four significant digits, nothing for a missing value."""
    if pd.isna(value):
        return ""
    if isinstance(value, Real) and abs(value) >= 1e4:
        return f"{value:,.0f}"
    if not isinstance(value, float | np.floating):
        return str(value)
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"  # sums of thirds leave a trace


def with_interval(row: Mapping[str, Any], column: str, ends: str = "ci", form: str = ".1f") -> str:
    """`58.3 [54.5, 62.1]`: a value of a row and the ends of its interval, if it has one that is no point."""
    low, high = (row[f"{ends}_{end}"] if ends else 0 for end in ("low", "high"))
    return f"{row[column]:{form}}" + f"\u00a0[{low:{form}},\u00a0{high:{form}}]" * bool(low < high)


def by_evidence(table: pd.DataFrame) -> pd.DataFrame:
    """What `evidence` found as people read it: a row per dataset and model, a column for each kind of evidence."""
    cells = table.set_index(["dataset", "name", "evidence"]).apply(with_interval, axis=1, args=("value",))
    return cells.unstack(sort=False).fillna("").rename_axis(columns=None)


def display(table: pd.DataFrame, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A table of models as people read it: a row per model; per dataset the paper's value, ours, and `columns`."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in table.to_dict("records"):
        for column in ("paper", "ours", *columns):
            title = f"paper ({row['paper_dataset']})" if column == "paper" else column.replace("_", " ")
            texts, (ends, form) = cells.setdefault((row["dataset"], title), {}), _FORMS[column]
            if pd.notna(row[column]):
                texts[row["name"]] = with_interval(row, column, ends, form)
    wide = pd.DataFrame(cells, dtype=object).reindex(dict.fromkeys(table["name"])).fillna("")
    return wide.loc[:, (wide != "").any()].rename_axis(index="model")


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """Any of our tables as texts that people read: one of models gets a row per model, the claims one per claim.

    Beside the accuracy only what the table is about: a page of paper is narrow, the CSV has all.
    """
    if {"name", "paper", "ours", "ci_low"} <= set(frame):
        also = [column for column in ("kl", "alone", "macro_f1", "balanced_accuracy") if column in frame]
        frame = display(frame, ["gain"] if "agreement" in frame else also)
    elif {"evidence", "name", "value"} <= set(frame):
        frame = by_evidence(frame) if len(frame) else frame
    elif {"claim", "statement", "verdict"} <= set(frame):
        text = frame[["verdict", "value", "ci_low", "ci_high"]].map(format_value)
        cells = text["verdict"] + ": " + text["value"] + " [" + text["ci_low"] + ", " + text["ci_high"] + "]"
        frame = frame.assign(cell=cells.str.removesuffix(" [, ]").str.removesuffix(": "))
        frame = frame.pivot(index=["claim", "statement"], columns="dataset", values="cell")[frame["dataset"].unique()]
    return _flat(frame).map(format_value)


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame whose index, if it means something, is columns."""
    return frame if isinstance(frame.index, pd.RangeIndex) else frame.reset_index()


def numeric_columns(texts: pd.DataFrame) -> list[bool]:
    """Which columns of texts hold numbers only; an empty column is none, nor are names like [1024]."""
    filled = [[cell.strip() for cell in cells if cell] for cells in texts.T.to_numpy()]
    return [bool(cells) and all(map(_NUMBER.fullmatch, cells)) for cells in filled]


def csv_text(frame: pd.DataFrame) -> str:
    """A table with every digit, as CSV."""
    return _flat(frame).to_csv(index=False)


def markdown_text(frame: pd.DataFrame, caption: str = "") -> str:
    """A readable GitHub table: numbers to the right, texts to the left, the caption bold."""
    texts = readable(frame)
    head = [" ".join(filter(None, c)) if isinstance(c, tuple) else str(c) for c in texts.columns]
    cells = [[_quoted(cell) for cell in row] for row in (head, *texts.to_numpy())]
    cells.insert(1, ["--:" if right else "---" for right in numeric_columns(texts)])
    lines = [f"**{_quoted(caption)}**\n"] if caption else []
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)]) + "\n"


def plain_caption(text: str) -> str:
    """The caption of a table written by `markdown_text`, as it was given; "" where there is none."""
    bold = re.match(r"\*\*(.+)\*\*(\n|$)", text)
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", bold[1]) if bold else ""


def latex_text(frame: pd.DataFrame, id: str, caption: str = "") -> str:
    r"""A readable booktabs table for pdflatex, at most as wide as the page (adjustbox).

    Numbers stand to the right, with a minus sign; long texts are wrapped; a dataset's columns have a common head.
    """
    texts, columns = readable(frame), ""
    for i, right in enumerate(numeric_columns(texts)):
        cells = texts.iloc[:, i]
        columns += "r" if right else "p{12em}" if max(cells.map(len), default=0) > 36 else "l"
        texts.isetitem(i, cells.map(_tex).str.replace("-", "$-$") if right else cells.map(_tex))
    texts.columns = texts.columns.set_names([None] * texts.columns.nlevels)
    style = texts.style.hide(axis="index").format_index(_tex, axis="columns")
    options = {"column_format": columns, "hrules": True, "multicol_align": "c", "position_float": "centering"}
    text = style.to_latex(**options, caption=_tex(caption) or None, label=f"tab:{re.sub('[^A-Za-z0-9:-]', '-', id)}")
    text = text.replace(r"\begin{tabular}", "\\begin{adjustbox}{max width=\\linewidth}\n\\begin{tabular}")
    text = text.replace(r"\end{tabular}", "\\end{tabular}\n\\end{adjustbox}")
    return f"% \\usepackage{{booktabs, adjustbox}}\n{text}"


def _quoted(text: str) -> str:
    """A cell of Markdown: no markup, no formula, no link, one line."""
    text = re.sub(r"[\\|`*<$]", r"\\\g<0>", _one_line(text))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])|\](?=\()|!(?=\[)", r"\\\g<0>", text)


def _tex(text: object) -> str:
    """A cell of LaTeX; what begins with [ or * could be read as the argument of the command before it."""
    text = _one_line(str(text)).translate(str.maketrans(_TEX))
    return f"{{{text[0]}}}{text[1:]}" if text[:1] in ("[", "*") else text


def _one_line(text: str) -> str:
    return re.sub(r"[^\S\u00a0]+|[\x00-\x1f\x7f]+", " ", text)
