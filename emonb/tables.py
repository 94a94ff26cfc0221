"""The result tables: pure functions of the prediction files, one row per model and dataset; and tables as text.

Columns of every table of models: `row, name, dataset, paper_dataset, paper, paper_source, ours, difference,
ci_low, ci_high, n, seeds`, then `gain, gain_low, gain_high` where rows are compared with a reference row (in
points, on the same images). Accuracies in percent on split `test`; an empty `paper` = not reported here. The
mini-* sets are drawn and only stand for the set in `paper_dataset`: their accuracies and the difference from
the paper are no comparison of quality.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from emonb import metrics
from emonb.files import resource
from emonb.predictions import (
    GROUPS,
    QUARTET,
    Predictions,
    dataset_title,
    first_seed,
    head_model,
    is_drawn,
    joint,
    model_name,
    paper_dataset,
    prediction_labels,
    test_rows,
)
from emonb.settings import Settings

_NONE = (np.nan, np.nan, np.nan)  # no value, no interval

# ---- what the paper prints (resources/paper_values.yaml), each number with its source letter -----------------------


def paper_rows(table: str) -> dict[str, dict[str, Any]]:
    """Rows of one of the paper's tables in printing order: {row id: {name, source, values, ...}}."""
    return {row["row"]: row for row in resource("paper_values.yaml", "tables")[table]}


def paper_value(table: str, row: str, dataset: str) -> float:
    """Printed accuracy, %, of a dataset or of the one a drawn set stands for; NaN = not reported here."""
    found = paper_rows(table).get(row, {"values": {}})
    return float(found["values"].get(dataset.removeprefix("mini-"), "nan"))


def paper_values() -> pd.DataFrame:
    """Everything printed, tidy: table, row, quantity, dataset, value, source, note."""
    records = []
    for table, rows in resource("paper_values.yaml", "tables").items():
        for row in rows:
            cells = [("accuracy, %", paper_dataset(d), v) for d, v in row["values"].items()]
            if "parameters" in row:
                cells.append(("parameters", "", row["parameters"]))
            for cell in cells or [("named, no number here", "", float("nan"))]:
                records.append((table, row["name"], *cell, row["source"], row.get("note", "")))
    share = resource("paper_values.yaml", "added_parameters_percent")
    records.append(("text", "added parameters", "percent", "", share["value"], share["source"], ""))
    return pd.DataFrame(records, columns=["table", "row", "quantity", "dataset", "value", "source", "note"])


def departures(drawn: bool, stand_in: bool) -> pd.DataFrame:
    """What the paper has, what we have and why: for a run with drawn datasets and/or the small VLM."""
    applies = {"always": True, "drawn": drawn, "stand-in": stand_in}
    rows = [d for d in resource("paper_values.yaml", "departures") if applies[d["when"]]]
    return pd.DataFrame(rows)[["topic", "paper", "ours", "why"]]


# ---- tables of models ----------------------------------------------------------------------------------------------


def main(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """The paper's main table: EmoVLM-KD, its parts and baselines, and models only the paper has."""
    note = "Rows without a value of ours are models that only the paper reports."
    return _table("main", predictions, settings, _printed("main"), note=note)


def modules(
    predictions: Predictions, settings: Settings, counts: Callable[[int], Mapping[str, int]] | None = None
) -> pd.DataFrame:
    """The paper's module table with parameter counts, and the rivals that could embarrass the method.

    Args:
        counts: our parameters by model for a number of classes (`cost.system_counts`).
    """
    classes = {dataset: len(prediction_labels(frame)) for (dataset, _), frame in predictions.items()}
    ours = {dataset: counts(n) for dataset, n in classes.items()} if counts else {}
    printed = {row: known["parameters"] for row, known in paper_rows("modules").items()}
    either = {}
    for dataset in settings.datasets:
        vlm, vit = (test_rows(predictions, dataset, m) for m in ("vlm_tuned", "vit"))
        if vlm is not None and vit is not None:
            either[dataset, "oracle"] = metrics.either_right(vlm, vit)

    def sizes(dataset: str, model: str) -> tuple[float, float]:
        return printed.get(model, np.nan), float(ours.get(dataset, {}).get(model, np.nan))

    rows = _printed("modules") + _named("average_vlm_head", "average_vlm_vit")
    rows.append((head_model(settings.distill, alpha=0.0), "head without distillation (alpha = 0)", ""))
    rows.append(("oracle", "oracle: VLM or ViT is right", ""))
    more = {"more": ("parameters_paper", "parameters_ours"), "values": sizes}
    return _table("modules", {**predictions, **either}, settings, rows, "emovlmkd", **more)


def depth(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Heads of one to five hidden layers. Ours: the head alone; the paper's column: the gated model."""
    printed = {known["name"]: row for row, known in paper_rows("depth").items()}
    names = {str(list(hidden)): head_model(settings.distill, hidden=hidden) for hidden in settings.distill.depths}
    rows = [(model, name, printed.get(name, "")) for name, model in names.items()]
    note = "Ours is the head alone, the paper's column the gated model with such a head."
    return _table("depth", predictions, settings, rows, "head", note=note)


def gates(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """The five gates, two other inputs of the best-known one, and no gate at all."""
    rows = _printed("gates") + _named("gate_concat_logits", "gate_concat_soft", "average_vlm_head")
    return _table("gates", predictions, settings, rows, "emovlmkd")


def alpha(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Heads by weight of distillation: accuracy and KL(teacher || head) at the paper's temperature.

    Extra columns: `alpha`, and `kl, kl_low, kl_high` in nats, from the stored probabilities.
    """
    distill, report = settings.distill, settings.report
    alphas = {head_model(distill, alpha=a): a for a in distill.alphas}

    def divergence(dataset: str, model: str) -> tuple[float, ...]:
        teacher, student = (test_rows(predictions, dataset, m) for m in (settings.teacher.teacher, model))
        both = teacher is not None and student is not None
        kl = metrics.kl_by_image(teacher, student, distill.tau) if both else ()
        return alphas[model], *(metrics.mean_interval(kl, report.bootstrap, report.confidence) if len(kl) else _NONE)

    rows = [(model, f"alpha = {a:g}", f"{a:g}") for model, a in alphas.items()]
    more = ("alpha", "kl", "kl_low", "kl_high")
    return _table("alpha", predictions, settings, rows, "head", more=more, values=divergence)


def instruction_tuning(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """Zero-shot against tuned, and free generation against scoring.

    Extra columns: `mcnemar_p` (against zero-shot); `parse_rate`, percent of answers with a label; and
    `agreement`, percent of images on which the answer equals the tuned VLM's scored one.
    """
    models = ("vlm_zero_shot", "vlm_tuned", "vlm_generated")

    def compared(dataset: str, model: str) -> tuple[float, float, float]:
        frame, zero, tuned = (test_rows(predictions, dataset, m) for m in (model, *models[:2]))
        p = same = np.nan
        if frame is not None and zero is not None and model != "vlm_zero_shot":
            pair = metrics.paired_correctness(frame, zero)
            p = metrics.mcnemar_p(pair["a"] == 1, pair["b"] == 1) if len(pair) else np.nan
        if frame is not None and tuned is not None:
            both = frame.merge(tuned, on="image_id", suffixes=("", "_tuned"))
            same = 100 * (both["prediction"] == both["prediction_tuned"]).mean()
        return p, np.nan if frame is None else 100 * frame["parsed"].mean(), same

    rows = [(model, model_name(model), model) for model in models]
    more = {"more": ("mcnemar_p", "parse_rate", "agreement"), "values": compared}
    return _table("main", predictions, settings, rows, models[0], title="instruction_tuning", **more)


def _printed(table: str) -> list[tuple[str, str, str]]:
    return [(row, known["name"], row) for row, known in paper_rows(table).items()]


def _named(*models: str) -> list[tuple[str, str, str]]:
    return [(model, model_name(model), "") for model in models]


def _table(
    paper_table: str,
    predictions: Predictions,
    settings: Settings,
    rows: Sequence[tuple[str, str, str]],
    reference: str = "",
    *,
    note: str = "",
    title: str = "",
    more: Sequence[str] = (),
    values: Callable[[str, str], Sequence[float]] = lambda dataset, model: (),
) -> pd.DataFrame:
    """Rows x datasets in long form; rows known neither to us nor to the paper are left out.

    `rows`: our model, its name, the paper's row of the same thing or "". `values` gives the columns `more` of a
    dataset's model.
    """
    options, known, records = (settings.report.bootstrap, settings.report.confidence), paper_rows(paper_table), []
    for dataset in settings.datasets:
        base = test_rows(predictions, dataset, reference)
        for model, name, paper_row in rows:
            frame, paper = test_rows(predictions, dataset, model), paper_value(paper_table, paper_row, dataset)
            if frame is None and np.isnan(paper):
                continue
            source = "" if np.isnan(paper) else known[paper_row]["source"]
            (ours, *ends), sizes, gain = _NONE, (None, None), _NONE
            if frame is not None:
                ours, *ends = metrics.accuracy_interval(frame, *options)
                sizes = (frame["image_id"].nunique(), frame["seed"].nunique())
                if base is not None and model != reference and set(frame["image_id"]) & set(base["image_id"]):
                    gain = metrics.paired_interval(frame, base, *options)
            names = (model, name, dataset_title(dataset), paper_dataset(dataset), paper, source)
            gain = gain if reference else ()
            records.append((*names, ours, ours - paper, *ends, *sizes, *gain, *values(dataset, model)))
    columns = ["row", "name", "dataset", "paper_dataset", "paper", "paper_source", "ours", "difference"]
    columns += ["ci_low", "ci_high", "n", "seeds", *(("gain", "gain_low", "gain_high") if reference else ())]
    table = pd.DataFrame(records, columns=[*columns, *more])
    for column in ("n", "seeds"):  # whole numbers or nothing, also in the CSV
        table[column] = pd.Series([record[columns.index(column)] for record in records], dtype=object)
    level = f"{100 * settings.report.confidence:g} %"
    caption = (
        f"Table {title or paper_table}: accuracy in percent on test images, {level} bootstrap intervals over images."
    )
    caption += f" gain: points over {model_name(reference)} on the same images." if reference else ""
    if any(map(is_drawn, settings.datasets)):
        caption += " Ours: drawn datasets that stand for the paper's; NOT comparable with its accuracies."
    table.attrs["caption"] = f"{caption} {note}".strip()
    return table


# ---- tables of other shapes ----------------------------------------------------------------------------------------


def complementarity(predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """VLM (tuned) x ViT on test images, per dataset: emotion "all" first, then each emotion.

    Columns: dataset, emotion, n, counts by group, `only_vlm, only_vit` in percent with intervals,
    `oracle` in percent, `q_statistic`, `disagreement` in percent, `kappa` (of the answers), `mcnemar_p`.
    The paper prints no numbers for these.
    """
    rows = []
    for *where, part in _by_emotion(predictions, settings.datasets, ("vlm_tuned", "vit")):
        a, b = ((part[m] == part["label"]).to_numpy() for m in ("vlm_tuned", "vit"))
        row = [*where, len(part), *metrics.two_by_two(a, b).flat]
        for hit in (a & ~b, ~a & b):
            resampled = metrics.bootstrap_means(100.0 * hit, settings.report.bootstrap)
            row += metrics.interval(100 * hit.mean(), resampled, settings.report.confidence)
        row += [100 * metrics.oracle(a, b), metrics.q_statistic(a, b), 100 * metrics.disagreement(a, b)]
        rows.append([*row, metrics.kappa(part["vlm_tuned"], part["vit"]), metrics.mcnemar_p(a, b)])
    columns = ["dataset", "emotion", "n", *(group.replace(" ", "_") for group in GROUPS)]
    columns += ["only_vlm", "only_vlm_low", "only_vlm_high", "only_vit", "only_vit_low", "only_vit_high"]
    table = pd.DataFrame(rows, columns=[*columns, "oracle", "q_statistic", "disagreement", "kappa", "mcnemar_p"])
    drawn = "Drawn datasets: not comparable with the paper's. " if any(map(is_drawn, settings.datasets)) else ""
    caption = f"tuned VLM and ViT on the same test images. {drawn}Shares in percent; one seed."
    table.attrs["caption"] = f"Table complementarity: {caption}"
    return table


def gate_trust(predictions: Predictions, datasets: Sequence[str]) -> pd.DataFrame:
    """Whom the gate followed where VLM and head disagree, per true emotion; "all" first. Holds for any gate.

    Columns: dataset (title), emotion, n (images of disagreement, first seed), then in percent of n:
    `followed_vlm, followed_head, followed_neither` and `vlm_right, head_right, gate_right`.
    """
    models, rows = ("vlm_tuned", "head", "emovlmkd"), []
    for *where, part in _by_emotion(predictions, datasets, models, differ=True):
        vlm, head = (part["emovlmkd"] == part[m] for m in models[:2])
        shares = [vlm, head, ~vlm & ~head, *(part[m] == part["label"] for m in models)]
        rows.append((*where, len(part), *(100 * hit.mean() for hit in shares)))
    columns = ["dataset", "emotion", "n", "followed_vlm", "followed_head", "followed_neither"]
    table = pd.DataFrame(rows, columns=[*columns, "vlm_right", "head_right", "gate_right"])
    table.attrs["caption"] = (
        "Table gate_trust: test images on which tuned VLM and head name different emotions; whose answer EmoVLM-KD "
        "gives, and who is right there, in percent of them; one seed."
    )
    return table


def _by_emotion(
    predictions: Predictions, datasets: Sequence[str], models: Sequence[str], differ: bool = False
) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(title, emotion, images) of datasets that have all models; `differ`: where the first two models do."""
    for dataset in datasets:
        table = joint(predictions, dataset, models)
        if set(models) <= set(table.columns):
            table = table[table[models[0]] != table[models[1]]] if differ else table
            for emotion in ("all", *prediction_labels(predictions[dataset, models[-1]])):
                part = table if emotion == "all" else table[table["label"] == emotion]
                if len(part):
                    yield dataset_title(dataset), emotion, part


def calibration(predictions: Predictions, datasets: Sequence[str], models: Sequence[str] = QUARTET) -> pd.DataFrame:
    """How far confidence is from accuracy: first seed of each model on test images; lacking models are left out.

    Columns: dataset (title), model, name, n, `ece, confidence, accuracy` in percent (`metrics.calibration_error`).
    """
    rows = []
    for dataset, model in ((d, m) for d in datasets for m in models if (d, m) in predictions):
        frame = first_seed(predictions[dataset, model])
        bins = metrics.reliability(frame)
        means = [100 * np.average(bins[c], weights=bins["n"]) for c in ("confidence", "accuracy")]
        names = (dataset_title(dataset), model, model_name(model))
        rows.append((*names, len(frame), metrics.calibration_error(frame), *means))
    table = pd.DataFrame(rows, columns=["dataset", "model", "name", "n", "ece", "confidence", "accuracy"])
    table.attrs["caption"] = (
        "Table calibration: expected calibration error over 15 bins of equal width (Guo et al. 2017), mean "
        "confidence and accuracy, in percent, on test images; first seed of each model."
    )
    return table


def accuracy_cost(cost: pd.DataFrame, predictions: Predictions, settings: Settings) -> pd.DataFrame:
    """The `cost` table with test accuracies: rows without predictions are left out.

    Added columns: `accuracy, low, high` in percent (interval over images, all seeds), `seeds`; `n` becomes the
    number of test images.
    """
    titles, rows = {dataset_title(d): d for d in settings.datasets}, []
    for row in cost.to_dict("records"):
        frame = test_rows(predictions, titles.get(row["dataset"], ""), row["model"])
        if frame is not None:
            measured = metrics.accuracy_interval(frame, settings.report.bootstrap, settings.report.confidence)
            row |= zip(("accuracy", "low", "high"), measured, strict=True)
            rows.append(row | {"n": frame["image_id"].nunique(), "seeds": frame["seed"].nunique()})
    return pd.DataFrame(rows, columns=[*cost.columns, "accuracy", "low", "high", "seeds"])


# ---- a table as text: names and texts are data, nothing in a cell becomes markup, a formula or a link --------------

_NUMBER = re.compile(r"[-+\u2212]?[\d,]*\.?\d+(e[-+]?\d+)?( ?%)?([\s\u00a0]*\[[^\[\]]*\])?")  # 58.3 [54.5, 62.1]
_LONG = 36  # characters from which a column of LaTeX is a paragraph
_LINE = 95  # characters that a page of LaTeX holds in a line; a wider table is scaled
_TEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "\u00a0": "~", "\u2026": r"\ldots{}",
    "\u2212": "$-$", "\u00d7": r"$\times$", "\u2264": r"$\leq$", "\u2265": r"$\geq$", "\u03b1": r"$\alpha$",
    "\u03c4": r"$\tau$", "\u2713": r"$\surd$",
})  # fmt: skip


def format_value(value: Any) -> str:
    """A table cell for people: four significant digits, nothing for a missing value."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, float | np.floating):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1e4:
        return f"{value:,}"
    return str(value)


def display(table: pd.DataFrame, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A table of models as people read it: one row per model; per dataset the paper's value and ours.

    Args:
        columns: further columns of the table to show, e.g. `("gain",)`.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in table.to_dict("records"):
        ours = f"{row['ours']:.1f}\u00a0[{row['ci_low']:.1f},\u00a0{row['ci_high']:.1f}]"
        shown = [(f"paper ({row['paper_dataset']})", row["paper"], f"{row['paper']:.2f}")] * bool(row["paper_dataset"])
        shown += [("ours", row["ours"], ours)] if row["ours"] == row["ours"] else []
        for column, value, text in [*shown, *((c, row[c], f"{row[c]:.3g}") for c in columns)]:
            cells.setdefault((row["dataset"], column), {})[row["name"]] = "" if np.isnan(value) else text
    wide = pd.DataFrame(cells).reindex(dict.fromkeys(table["name"])).fillna("")
    wide.columns = pd.MultiIndex.from_tuples(wide.columns) if len(wide.columns) else wide.columns
    return wide.rename_axis(index=None)


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """Any of our tables as people read it: one of models gets one row per model, the claims one per claim."""
    if {"name", "dataset", "paper", "ours", "ci_low"} <= set(frame.columns):
        # beside the accuracy only what the table is about: a page of paper is narrow, the CSV has all
        more = ["kl"] if "kl" in frame else ["gain"] if "agreement" in frame else []
        frame = display(frame, more).rename_axis(index="model")
        frame = frame.loc[:, (frame != "").any()]  # datasets of which the paper reports nothing
    elif {"claim", "statement", "dataset", "verdict", "value", "ci_low"} <= set(frame.columns):
        cells = []
        for row in frame.to_dict("records"):
            value, low, high = (format_value(row[key]) for key in ("value", "ci_low", "ci_high"))
            cells.append(row["verdict"] + (f": {value}" if value else "") + (f" [{low}, {high}]" if low else ""))
        wide = frame.assign(cell=cells).pivot(index=["claim", "statement"], columns="dataset", values="cell")
        frame = wide[list(dict.fromkeys(frame["dataset"]))].fillna("")
    return _flat(frame)


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame whose index, if it means something, is columns."""
    return frame if isinstance(frame.index, pd.RangeIndex) else frame.reset_index()


def text_rows(frame: pd.DataFrame) -> list[list[str]]:
    """The cells as people read them."""
    return [[format_value(value) for value in row] for row in frame.itertuples(index=False, name=None)]


def numeric_columns(rows: Sequence[Sequence[str]], columns: int) -> list[bool]:
    """Which columns hold numbers only; an empty column is none, nor are names like [1024]."""
    parts = [[row[i].strip() for row in rows if row[i]] for i in range(columns)]
    return [bool(cells) and all(map(_NUMBER.fullmatch, cells)) for cells in parts]


def csv_text(frame: pd.DataFrame) -> str:
    """A table with every digit, as CSV."""
    return _flat(frame).to_csv(index=False)


def markdown_text(frame: pd.DataFrame, caption: str = "") -> str:
    """A readable GitHub table in columns of equal width: numbers to the right, texts to the left, the caption bold."""
    frame = readable(frame)
    head = [" ".join(filter(None, c)) if isinstance(c, tuple) else str(c) for c in frame.columns]
    rows = text_rows(frame)
    right = numeric_columns(rows, len(head))
    cells = [[_quoted(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    lines = [f"**{_quoted(caption)}**\n"] if caption else []
    for row in (cells[0], rule, *cells[1:]):
        texts = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True)]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def plain_caption(text: str) -> str:
    """The caption of a table written by `markdown_text`, as it was given; "" where there is none."""
    bold = re.match(r"\*\*(.+)\*\*(\n|$)", text)
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", bold[1]) if bold else ""


def latex_text(frame: pd.DataFrame, id: str, caption: str = "") -> str:
    r"""A readable booktabs table for pdflatex: numbers to the right, a common head over the columns of a dataset.

    Long texts are paragraphs; a table wider than a page is scaled to it (graphicx).
    """
    frame = readable(frame)
    rows = text_rows(frame)
    right = numeric_columns(rows, frame.shape[1])
    minus = [[t.replace("-", "\u2212") if r else t for t, r in zip(row, right, strict=True)] for row in rows]
    texts = pd.DataFrame(minus, columns=frame.columns).rename_axis(columns=[None] * frame.columns.nlevels)
    heads = [c[-1] or c[0] if isinstance(c, tuple) else str(c) for c in frame.columns]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    paragraphs = [f"p{{{10 if w < 60 else 15}em}}" if w > _LONG else "l" for w in widths]
    text = (
        texts.style.hide(axis="index")
        .format(_tex)
        .format_index(_tex, axis="columns")
        .to_latex(
            column_format="".join("r" if r else kind for r, kind in zip(right, paragraphs, strict=True)),
            hrules=True,
            multicol_align="c",
            position_float="centering",
            caption=_tex(caption) or None,
            label=f"tab:{re.sub('[^A-Za-z0-9:-]', '-', id)}",
        )
    )
    packages = r"% \usepackage{booktabs}"
    if sum(min(w, 30) for w in widths) + 2 * len(widths) > _LINE:
        packages += r", \usepackage{graphicx}"
        text = text.replace(r"\begin{tabular}", "\\resizebox{\\linewidth}{!}{%\n\\begin{tabular}")
        text = text.replace(r"\end{tabular}", r"\end{tabular}}")
    return f"{packages}\n{text}"


def _one_line(text: str) -> str:
    return re.sub(r"[^\S\u00a0]+|[\x00-\x1f\x7f]+", " ", text)


def _quoted(text: str) -> str:
    """A cell of Markdown: no markup, no formula, no link, one line."""
    text = re.sub(r"[\\|`*<$]", r"\\\g<0>", _one_line(text))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])|\](?=\()|!(?=\[)", r"\\\g<0>", text)


def _tex(text: object) -> str:
    """A cell of LaTeX; what begins with [ or * could be read as the argument of the command before it."""
    text = _one_line(str(text)).translate(_TEX)
    return f"{{{text[0]}}}{text[1:]}" if text[:1] in ("[", "*") else text
