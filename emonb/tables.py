"""The result tables: pure functions of the prediction files, one row per model and dataset; and tables as text.

Columns of every table of models: `row, name, dataset, paper_dataset, paper, paper_source, ours, difference, ci_low,
ci_high, n, seeds`, then `gain, gain_low, gain_high` where rows are compared with a reference row (in points, on the
same images). Accuracies in percent on split `test`; an empty `paper` = not reported here. The mini-* sets are drawn
and only stand for the set in `paper_dataset`: their accuracies and the difference are no comparison of quality.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from emonb import metrics
from emonb import predictions as pr
from emonb.files import resource
from emonb.predictions import Predictions, dataset_title, head_model, model_name, test_rows
from emonb.settings import Settings

_COLUMNS = ["row", "name", "dataset", "paper_dataset", "paper", "paper_source", "ours", "difference"]
_COLUMNS += ["ci_low", "ci_high", "n", "seeds", "gain", "gain_low", "gain_high"]


def main(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """The paper's main table: EmoVLM-KD, its parts and baselines, models only the paper has, and any other's files."""
    return _table("main", predictions, settings, _printed("main") | _strangers(predictions, settings))


def _strangers(predictions: Predictions, settings: Settings) -> dict[str, str]:
    return {model: model for dataset in settings.datasets for model in pr.strangers(predictions, dataset)}


def modules(
    predictions: Predictions, settings: Settings, counts: Mapping[str, Mapping[str, int]] | None = None
) -> pd.DataFrame:
    """The paper's module table with parameter counts, and the rivals that could embarrass the method.

    `counts`: dataset -> our parameters by model (`cost.system_counts`).
    """
    printed = {row["row"]: row["parameters"] for row in resource("paper_values.yaml", "tables", "modules")}
    rows = _printed("modules") | {model: model_name(model) for model in ("average_vlm_head", "average_vlm_vit")}
    rows[head_model(settings.distill, alpha=0.0)] = "head without distillation (alpha = 0)"
    rows |= {"oracle": "oracle: VLM or ViT is right"} | _strangers(predictions, settings)

    def sizes(dataset: str, model: str) -> dict[str, float]:
        ours = (counts or {}).get(dataset, {}).get(model, np.nan)
        return {"parameters_paper": printed.get(model, np.nan), "parameters_ours": float(ours)}

    return _table("modules", predictions, settings, rows, "emovlmkd", sizes)


def depth(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Heads of one to five hidden layers. Ours: the head alone; the paper's column: the gated model."""
    rows = {head_model(settings.distill, hidden=hidden): str(list(hidden)) for hidden in settings.distill.depths}
    table = _table("depth", predictions, settings, rows, "head")
    table.attrs["caption"] += " Ours is the head alone, the paper's column the gated model with such a head."
    return table


def gates(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """The five gates, two other inputs of the best-known one, and no gate at all."""
    more = ("gate_concat_logits", "gate_concat_soft", "average_vlm_head")
    return _table("gates", predictions, settings, _printed("gates") | {m: model_name(m) for m in more}, "emovlmkd")


def alpha(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Heads by weight of distillation: accuracy and KL(teacher || head) at the paper's temperature.

    Extra columns: `alpha`, and `kl, kl_low, kl_high` in nats, from the stored probabilities.
    """
    distill, options = settings.distill, (settings.report.bootstrap, settings.report.confidence)
    alphas = {head_model(distill, alpha=a): a for a in distill.alphas}

    def divergence(dataset: str, model: str) -> dict[str, float]:
        teacher, student = (test_rows(predictions, dataset, m) for m in (settings.teacher.teacher, model))
        kl = metrics.mean_interval(metrics.kl_by_seed(teacher, student, distill.tau).mean(axis=1), *options)
        return {"alpha": alphas[model], **dict(zip(("kl", "kl_low", "kl_high"), kl, strict=True))}

    rows = {model: f"alpha = {a:g}" for model, a in alphas.items()}
    return _table("alpha", predictions, settings, rows, "head", divergence)


def instruction_tuning(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Zero-shot against tuned, and free generation against scoring.

    Extra columns: `mcnemar_p` (against zero-shot); `parse_rate`, percent of answers with a label; and
    `agreement`, percent of images on which the answer equals the tuned VLM's scored one.
    """
    models = ("vlm_zero_shot", "vlm_tuned", "vlm_generated")
    right = {dataset: metrics.correctness(predictions, dataset, models) for dataset in settings.datasets}

    def compared(dataset: str, model: str) -> dict[str, float]:
        frame, tuned = (test_rows(predictions, dataset, m) for m in (model, "vlm_tuned"))
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
    reference: str = "",
    more: Callable[[str, str], dict[str, Any]] = lambda dataset, model: {},
) -> pd.DataFrame:
    """Rows (model -> name) x datasets in long form; rows known neither to us nor to the paper are left out.

    `paper`: its table with a row of the same model or name; `more`: further columns of a dataset and model.
    """
    known = {key: r for r in resource("paper_values.yaml", "tables")[paper] for key in (r["row"], r["name"])}
    options, records = (settings.report.bootstrap, settings.report.confidence), []
    for dataset in settings.datasets:
        right = metrics.correctness(predictions, dataset, {*rows, reference, "vlm_tuned", "vit"})
        right["oracle"] = 1 - (1 - right["vlm_tuned"]) * (1 - right["vit"])
        for model, name in rows.items():
            printed, n = known.get(model) or known.get(name) or {"values": {}}, right[model].count()
            value = printed["values"].get(dataset.removeprefix("mini-"), np.nan)
            if not n and np.isnan(value):
                continue
            source = "" if np.isnan(value) else printed["source"]
            about = (model, name, dataset_title(dataset), pr.paper_dataset(dataset), value, source)
            seeds = test_rows(predictions, dataset, model)["seed"].nunique() or 1  # 1: the oracle's
            ours, *ends = metrics.mean_interval(100 * right[model], *options)
            lead = 100 * (right[model] - (right[reference] if model != reference else np.nan))
            record = (*about, ours, ours - value, *ends, *((n, seeds) if n else (None, None)))
            record += metrics.mean_interval(lead, *options)
            records.append(dict(zip(_COLUMNS, record, strict=True)) | more(dataset, model))
    table = pd.DataFrame(records, columns=None if records else _COLUMNS).astype({"n": "Int64", "seeds": "Int64"})
    table = table if reference else table.drop(columns=["gain", "gain_low", "gain_high"])
    caption = [
        f"Accuracy in percent on test images, {100 * options[1]:g} % bootstrap intervals.",
        f"gain: points over {model_name(reference)} on the same images." * bool(reference),
        "Ours: drawn datasets that stand for the paper's; NOT comparable with its accuracies."
        * any(map(pr.is_drawn, settings.datasets)),
    ]
    table.attrs["caption"] = " ".join(filter(None, caption))
    return table


def complementarity(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """VLM (tuned) x ViT on test images, first seeds, per dataset: emotion "all" first, then each emotion.

    Columns: dataset, emotion, n, counts by group, `only_vlm, only_vit` in percent with intervals, `oracle` in
    percent, `q_statistic`, `disagreement` in percent, `kappa` (of the answers), `mcnemar_p`. Not in the paper.
    """
    rows, models = [], ("vlm_tuned", "vit")
    for dataset in (d for d in settings.datasets if all((d, model) in predictions for model in models)):
        table = pr.joint(predictions, dataset, models)
        for emotion, part in by_emotion(table, pr.prediction_labels(predictions[dataset, "vit"])).items():
            a, b = ((part[model] == part["label"]).to_numpy() for model in models)
            row = [dataset_title(dataset), emotion, len(part), *metrics.two_by_two(a, b).flat]
            for hit in (a & ~b, ~a & b):
                resampled = metrics.bootstrap_means(100.0 * hit, settings.report.bootstrap)
                row += metrics.interval(100 * hit.mean(), resampled, settings.report.confidence)
            row += [100 * (1 - (~a & ~b).mean()), metrics.q_statistic(a, b), 100 * (a != b).mean()]
            rows.append([*row, metrics.kappa(part["vlm_tuned"], part["vit"]), metrics.mcnemar_p(1.0 * a - b)])
    columns = ["dataset", "emotion", "n", *(group.replace(" ", "_") for group in pr.GROUPS)]
    columns += ["only_vlm", "only_vlm_low", "only_vlm_high", "only_vit", "only_vit_low", "only_vit_high"]
    return pd.DataFrame(rows, columns=[*columns, "oracle", "q_statistic", "disagreement", "kappa", "mcnemar_p"])


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
        models += sorted(m for d, m in predictions if d == dataset and m not in pr.MODELS)
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
                ends = measure, f"{measure}_low", f"{measure}_high"
                row |= dict(zip(ends, metrics.mean_interval(x, *options), strict=True))
            rows.append(row)
    table = pd.DataFrame(rows)
    table.attrs["caption"] = "Models against the raters' distributions on test images: kl and js in nats, top2 in %."
    return table


def by_emotion(table: pd.DataFrame, labels: Sequence[str]) -> dict[str, pd.DataFrame]:
    """A table of images whole ("all"), then by true emotion in the order of `labels`, without those of no image."""
    parts = {"all": table} | {label: table[table["label"] == label] for label in labels}
    return {emotion: part for emotion, part in parts.items() if len(part)}


# ---- a table as text: names and texts are data, nothing in a cell becomes markup, a formula or a link --------------

_FORMS = {"paper": ("", ".2f"), "ours": ("ci", ".1f"), "gain": ("gain", "+z.1f"), "kl": ("kl", "z.3g")}  # ends, digits
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?(\s*\[[^\[\]]*\])?")  # 58.3 [54.5, 62.1]
_TEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "\u00a0": "~"}
_TEX |= {"^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}


def format_value(value: Any) -> str:
    """A table cell for people: four significant digits, nothing for a missing value."""
    if pd.isna(value):
        return ""
    if isinstance(value, Real) and abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def display(table: pd.DataFrame, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A table of models as people read it: a row per model; per dataset the paper's value, ours, and `columns`."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in table.to_dict("records"):
        for column in ("paper", "ours", *columns):
            title = f"paper ({row['paper_dataset']})" if column == "paper" else column
            texts, (ends, form) = cells.setdefault((row["dataset"], title), {}), _FORMS[column]
            if pd.notna(row[column]):
                interval = f"\u00a0[{row[f'{ends}_low']:{form}},\u00a0{row[f'{ends}_high']:{form}}]" if ends else ""
                texts[row["name"]] = f"{row[column]:{form}}{interval}"
    wide = pd.DataFrame(cells, dtype=object).reindex(dict.fromkeys(table["name"])).fillna("")
    return wide.loc[:, (wide != "").any()].rename_axis(index="model")


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """Any of our tables as texts that people read: one of models gets a row per model, the claims one per claim.

    Beside the accuracy only what the table is about: a page of paper is narrow, the CSV has all.
    """
    if {"name", "paper", "ours", "ci_low"} <= set(frame):
        frame = display(frame, ["kl"] if "kl" in frame else ["gain"] if "agreement" in frame else [])
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
        columns += "r" if right else "p{12em}" if cells.map(len).max() > 36 else "l"
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
