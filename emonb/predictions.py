"""Prediction files: one parquet per dataset and model, from which every number of every table follows.

Columns: `image_id, split, label, seed, prediction, p_<label>..., raw_text, parsed`; several seeds are
more rows. The class order is stored in the file (metadata `emonb.labels`) and checked on load.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from emonb.data import check_labels
from emonb.errors import EmonbError
from emonb.files import atomic_write, resource
from emonb.settings import DistillSettings, Settings

Predictions = Mapping[tuple[str, str], pd.DataFrame]  # (dataset, model) -> prediction frame


class Model(NamedTuple):
    """A model as people meet it; the colour is of Okabe and Ito (2008), or None for one that no figure compares."""

    name: str
    color: str | None = None


MODELS = {
    "vlm_zero_shot": Model("VLM, zero-shot", "#F0E442"),
    "vlm_tuned": Model("VLM, tuned", "#E69F00"),
    "vlm_generated": Model("VLM, free generation"),
    "vit": Model("ViT (teacher)", "#56B4E9"),
    "resnet": Model("ResNet", "#CC79A7"),
    "vgg": Model("VGG", "#999999"),
    "head": Model("distilled head", "#009E73"),
    "emovlmkd": Model("EmoVLM-KD", "#0072B2"),
    "gate_bilinear": Model("bilinear"),
    "gate_moe": Model("mixture of 3 linear experts"),
    "gate_dynamic": Model("dynamic weighting"),
    "gate_cross": Model("cross gating"),
    "gate_concat_logits": Model("concat & linear, raw logits (authors' code)"),
    "gate_concat_soft": Model("concat & linear, VLM's distribution"),
    "average_vlm_head": Model("plain average, VLM and head"),
    "average_vlm_vit": Model("plain average, VLM and ViT"),
}  # in the order of every list; head_alpha* and head_depth* follow the settings
MAIN = tuple(model for model, known in MODELS.items() if known.color)  # those that figures compare
QUARTET = ("vlm_tuned", "vit", "head", "emovlmkd")  # the system, its parts and the teacher
GROUPS = ("both right", "only VLM right", "only ViT right", "neither right")
UNPARSABLE = "(unparsable)"  # what people read where a model gave no answer
CASES = {
    "vlm": "only the VLM right,\nthe ViT wrong",
    "vit": "only the ViT right,\nthe VLM wrong",
    "gate": "only EmoVLM-KD\nright, both wrong",
    "lost": "gate lost: one right,\nEmoVLM-KD wrong",
}  # rows of the picture figure; in the first two EmoVLM-KD is right as well (paper, last figure)
_METADATA_KEY = b"emonb.labels"
_SUM_TOLERANCE = 1e-3  # bfloat16 probabilities of a GPU run need this much


# ---- names ---------------------------------------------------------------------------------------------------------


def model_name(model: str) -> str:
    """A model as people read it; an unknown one keeps its file name."""
    for start, name in {"head_depth": "head, {} hidden layers", "head_alpha": "head, alpha = {}"}.items():
        if model.startswith(start):
            return name.format(model.removeprefix(start))
    return MODELS[model].name if model in MODELS else model


def model_color(model: str) -> str | None:
    """A model's colour, the same in every figure; None for one that no figure compares."""
    return MODELS[model].color if model in MODELS else None


def head_model(distill: DistillSettings, **different: Any) -> str:
    """File name of the head that differs from the paper's in `hidden` or `alpha`; "": no such head is trained."""
    wanted = {"hidden": distill.hidden, "alpha": distill.alpha, **different}
    return next((name for name, head in distill.heads.items() if head == wanted), "")


def expected_models(settings: Settings) -> list[str]:
    """Models of which notebooks 03 to 06 write predictions for each dataset, in that order."""
    free = ["vlm_generated"] if settings.vlm.reasons else []
    trained = [*settings.teacher.networks, *settings.distill.heads, *settings.gate.gates]
    return ["vlm_zero_shot", "vlm_tuned", *free, *trained, "average_vlm_head", "average_vlm_vit"]


def paper_dataset(dataset: str) -> str:
    """The paper's name of the set that a dataset is or stands for ("mini-fi" -> "FI"), else ""."""
    return resource("paper_values.yaml", "datasets").get(dataset.removeprefix("mini-"), "")


def is_drawn(dataset: str) -> bool:
    """Whether this is one of the drawn datasets, whose accuracies are not comparable with the paper's."""
    return dataset.startswith("mini-")


def dataset_title(dataset: str) -> str:
    """A dataset as every table and figure names it: a drawn one never without the word drawn."""
    return f"{dataset} (drawn)" if is_drawn(dataset) else paper_dataset(dataset) or dataset


# ---- frames and files ----------------------------------------------------------------------------------------------


def make_predictions(
    image_ids: Sequence[str],
    split: Sequence[str],
    label: Sequence[str],
    probabilities: np.ndarray,
    labels: Sequence[str],
    *,
    seed: int = 0,
    raw_text: Sequence[str | None] | None = None,
    parsed: Sequence[bool] | None = None,
) -> pd.DataFrame:
    """Assemble a prediction frame; the prediction is the most probable label.

    Args:
        image_ids, split, label: one entry per image (N); `label` is the true one.
        probabilities: (N, C), columns in the order of `labels`. Rows with `parsed` False are replaced
            by the uniform distribution: an unparsable answer has no opinion.
        labels: the taxonomy's labels in their fixed order (C).
        seed: training seed of the model that predicted.
        raw_text: the VLM's text, where there is one.
        parsed: False marks an unparsable answer: prediction "", counted as wrong, never a class.
    """
    p, n = np.array(probabilities, dtype=np.float64), len(image_ids)
    if p.shape != (n, len(labels)):
        raise EmonbError(
            f"predictions: probabilities have shape {p.shape}, expected {(n, len(labels))}; "
            "give one row per image and one column per label"
        )
    ok = np.ones(n, bool) if parsed is None else np.asarray(parsed, bool)
    p[~ok] = 1 / len(labels)
    frame = pd.DataFrame(
        {
            "image_id": list(image_ids),
            "split": list(split),
            "label": list(label),
            "seed": seed,
            "prediction": np.where(ok, np.asarray(labels, object)[p.argmax(axis=1)], ""),
            **{f"p_{name}": p[:, i] for i, name in enumerate(labels)},
            "raw_text": [None] * n if raw_text is None else list(raw_text),
            "parsed": ok,
        }
    )
    frame.attrs["labels"] = list(labels)
    return frame


def prediction_labels(frame: pd.DataFrame) -> list[str]:
    """The class order of a prediction frame, read from its `p_<label>` columns."""
    return [c.removeprefix("p_") for c in frame.columns if c.startswith("p_")]


def probabilities(frame: pd.DataFrame) -> np.ndarray:
    """(N, C) probabilities in the frame's own class order."""
    return frame[[f"p_{name}" for name in prediction_labels(frame)]].to_numpy(np.float64)


def write_predictions(path: str | Path, frame: pd.DataFrame) -> None:
    """Check a frame and write it as parquet, whole or not at all; its columns say the class order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, labels = Path(path), prediction_labels(frame)
    _check(frame, labels, path)
    kinds = {"seed": pa.int64(), "parsed": pa.bool_(), **{f"p_{name}": pa.float64() for name in labels}}
    schema = pa.schema([(column, kinds.get(column, pa.string())) for column in frame.columns])
    table, buffer = pa.Table.from_pandas(frame, schema, preserve_index=False), io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_METADATA_KEY: json.dumps(labels)}), buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())


def read_predictions(
    path: str | Path, labels: Sequence[str] | None = None, *, split: str | None = None
) -> pd.DataFrame:
    """Read and check a prediction file, whole or one split of it; `frame.attrs["labels"]` holds its class order.

    Raises:
        EmonbError: missing or damaged file, wrong columns, impossible values, a class order other than `labels`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise EmonbError(f"{path}: no such predictions; run the notebook that writes them (03 to 06)")
    try:
        table = pq.read_table(path, filters=[("split", "==", split)] if split else None)
    except (pa.ArrowException, OSError) as error:
        raise EmonbError(f"{path}: not a readable parquet file ({error}); delete it and run again") from None
    stored = (table.schema.metadata or {}).get(_METADATA_KEY)
    if stored is None:
        raise EmonbError(f"{path}: metadata 'emonb.labels' is missing; write it with write_predictions")
    found = json.loads(stored)
    if labels is not None:
        check_labels(found, labels, str(path))
    frame = table.to_pandas()
    _check(frame, found, path)
    frame.attrs["labels"] = found
    return frame


def _check(frame: pd.DataFrame, labels: list[str], path: Path) -> None:
    def need(ok: Any, column: str, what: str, remedy: str = "delete the file and run again") -> None:
        if not ok:
            raise EmonbError(f"{path}: column {column!r} {what}; {remedy}")

    columns = ["image_id", "split", "label", "seed", "prediction", *(f"p_{name}" for name in labels)]
    columns += ["raw_text", "parsed"]
    if list(frame.columns) != columns:
        check_labels(prediction_labels(frame), labels, str(path))
        odd = [c for c in columns if c not in frame.columns] or [c for c in frame if c not in columns] or columns
        need(False, odd[0], "is missing, unexpected or out of order")
    p, parsed = probabilities(frame), frame["parsed"].to_numpy(bool)
    for name, finite in zip(labels, np.isfinite(p).all(axis=0), strict=True):
        need(finite, f"p_{name}", "has values that are not finite")
    is_p = (p >= 0).all() and (np.abs(p.sum(axis=1) - 1) <= _SUM_TOLERANCE).all()
    need(is_p, "p_*", "does not hold probabilities that sum to 1", "apply a softmax before writing")
    need(frame["label"].isin(labels).all(), "label", f"has labels outside {labels}")
    answer = frame["prediction"]
    named = answer[parsed].isin(labels).all() and (answer[~parsed] == "").all()
    need(named, "prediction", 'must be a label where parsed and "" where not')
    chosen = p[parsed, [labels.index(name) for name in answer[parsed]]] if parsed.any() else np.empty(0)
    most = (chosen >= p[parsed].max(axis=1, initial=0) - 1e-6).all()
    need(most, "prediction", "is not the most probable label: class order and probabilities disagree")
    once = not frame.duplicated(["image_id", "split", "seed"]).any()
    need(once, "image_id", "names an image twice for one split and seed")


class LoadedPredictions(dict[tuple[str, str], pd.DataFrame]):
    """{(dataset, model): frame}; `folder`: where from; `problems`: a sentence for each damaged file left out."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.problems: dict[tuple[str, str], str] = {}


def load_all(
    folder: str | Path, datasets: Sequence[str] | None = None, *, split: str | None = None, partial: bool = False
) -> LoadedPredictions:
    """All prediction files of a run as {(dataset, model): frame}, optionally of some datasets or one split only.

    A damaged file is an `EmonbError`, as no file is: a number of your own should not rest on less data unnoticed.
    With `partial` it is left out, `problems` says so, and `gaps` names what is missing.
    """
    found = LoadedPredictions(Path(folder).resolve())
    for path in sorted(Path(folder).glob("*__*.parquet")):
        dataset, model = path.stem.split("__", 1)
        if datasets is not None and dataset not in datasets:
            continue
        try:
            found[dataset, model] = read_predictions(path, split=split)
        except (EmonbError, ValueError, TypeError) as error:
            if not partial:
                raise
            why = " ".join(str(error).replace(f"{path}: ", "").replace(str(path), path.name).split())[:300]
            found.problems[dataset, model] = f"{dataset}: predictions of {model} are damaged: {why}"
    if not found:
        what = ", ".join(datasets or ["any dataset"])
        damaged = f" ({'; '.join(found.problems.values())})" if found.problems else ""
        raise EmonbError(f"{folder}: no predictions of {what}; run notebooks 03 to 06{damaged}")
    return found


def gaps(predictions: Predictions, datasets: Iterable[str], models: Iterable[str]) -> list[str]:
    """A sentence for each damaged file and each dataset without test rows of some models (see `expected_models`)."""
    damaged = predictions.problems if isinstance(predictions, LoadedPredictions) else {}
    lines, models = list(damaged.values()), list(models)
    for dataset in datasets:
        known = [m for m in models if (dataset, m) in damaged or test_rows(predictions, dataset, m) is not None]
        missing = [model for model in models if model not in known]
        if missing:
            lines.append(f"{dataset}: no predictions of {', '.join(missing) if known else 'any model'}")
    return lines


# ---- several models on the same images -----------------------------------------------------------------------------


def test_rows(predictions: Predictions, dataset: str, model: str) -> pd.DataFrame | None:
    """Test rows of a model, or None where this run has no such predictions, or none of test images."""
    frame = predictions.get((dataset, model))
    rows = None if frame is None else frame[frame["split"] == "test"]
    return None if rows is None or rows.empty else rows


def first_seed(frame: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """One answer per image: a split's rows of the first seed (a majority would be a model that nobody trained)."""
    return frame[(frame["split"] == split) & (frame["seed"] == frame["seed"].min())]


def joint(predictions: Predictions, dataset: str, models: Iterable[str] = MAIN, split: str = "test") -> pd.DataFrame:
    """One row per image: `label` and one column of answers per model that this run has.

    Indexed by image_id (sorted); images that some model has not seen are left out.
    """
    columns: dict[str, pd.Series] = {}
    for model in models:
        if (dataset, model) in predictions:
            frame = first_seed(predictions[dataset, model], split).set_index("image_id")
            columns.setdefault("label", frame["label"])
            columns[model] = frame["prediction"]
    table = pd.concat(columns, axis=1, join="inner").sort_index() if columns else pd.DataFrame({"label": []})
    return table.rename_axis("image_id")


def with_groups(table: pd.DataFrame) -> pd.DataFrame:
    """The joint table with a column `group` (one of `GROUPS`) for tuned VLM and ViT."""
    vlm, vit = (table[m] == table["label"] for m in ("vlm_tuned", "vit"))
    names = np.select([vlm & vit, vlm & ~vit, ~vlm & vit], GROUPS[:3], GROUPS[3])
    return table.assign(group=pd.Categorical(names, categories=GROUPS))


def intersections(tables: Mapping[str, pd.DataFrame], models: Sequence[str] = QUARTET) -> pd.DataFrame:
    """Images by which models are right: one row for each combination that occurs, the commonest first.

    Args:
        tables: {title: joint table}; a model that one of them lacks is left out of all.

    Returns:
        Counts with a column per title; the index has a level per model (True = right). Empty without any.
    """
    models = [m for m in models if all(m in table.columns for table in tables.values())]
    if not tables or not models:
        return pd.DataFrame()
    hits = {title: table[models].eq(table["label"], axis=0) for title, table in tables.items()}
    counts = pd.DataFrame({title: hit.value_counts() for title, hit in hits.items()}).fillna(0).astype(int)
    share = (counts / counts.sum().clip(lower=1)).sum(axis=1).sort_index(ascending=False)
    return counts.loc[share.sort_values(ascending=False, kind="stable").index]


def select_examples(table: pd.DataFrame, per_case: int = 4) -> pd.DataFrame:
    """Images of a joint table for each of `CASES`; column `case` names it. Without VLM or ViT there are none.

    `vlm`, `vit`: exactly that one of tuned VLM and ViT is right, and EmoVLM-KD with it; `gate`: EmoVLM-KD is
    right where both are wrong; `lost`: EmoVLM-KD is wrong where exactly one of the two is right. Without
    EmoVLM-KD only the first two, by VLM and ViT alone.

    No picking by hand: within each case the images go by emotion in turn, then by image_id.
    """
    table = table.sort_index()
    right = {m: table[m] == table["label"] for m in ("vlm_tuned", "vit", "emovlmkd") if m in table.columns}
    if not {"vlm_tuned", "vit"} <= right.keys():
        return table.assign(case="").iloc[:0]
    vlm, vit, ours = right["vlm_tuned"], right["vit"], right.get("emovlmkd", True)
    cases = {"vlm": vlm & ~vit & ours, "vit": vit & ~vlm & ours}
    if "emovlmkd" in right:
        cases |= {"gate": ours & ~vlm & ~vit, "lost": ~ours & (vlm ^ vit)}
    parts = []
    for case, hit in cases.items():
        part = table[hit].assign(case=case)
        part["turn"] = part.groupby("label").cumcount()
        parts.append(part.sort_values(["turn", "label"], kind="stable").drop(columns="turn").head(per_case))
    return pd.concat(parts)


def answers(predictions: Predictions, dataset: str, image_id: str) -> pd.DataFrame:
    """Every model's answer for one test image: model, answer, confidence in percent, right, the VLM's text."""
    rows = []
    for model in MODELS:
        frame = predictions.get((dataset, model)) if model in (*MAIN, "vlm_generated") else None
        if frame is None:
            continue
        row = frame[(frame["image_id"] == image_id) & (frame["split"] == "test")].sort_values("seed").head(1)
        for answer, truth, text in row[["prediction", "label", "raw_text"]].itertuples(index=False, name=None):
            sure = 100 * probabilities(row).max() if answer else np.nan
            shown = (answer or UNPARSABLE, sure, answer == truth, "" if pd.isna(text) else text)
            rows.append((model_name(model), *shown))
    return pd.DataFrame(rows, columns=["model", "answer", "confidence", "right", "text"])
