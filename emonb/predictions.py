"""Prediction files: one parquet per dataset and model, from which every number of every table follows.

Columns: `image_id, split, label, seed, repeat, prediction, p_<label>..., raw_text, parsed`; several seeds, and the
repeats of a head or gate within the pipeline of a seed, are more rows; a file without `repeat` has one. The order of
the columns `p_<label>` is the class order, checked on load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, ValidationError

from emonb.data import check_labels
from emonb.errors import EmonbError
from emonb.files import atomic_write, read_json, resource
from emonb.settings import DistillSettings, Settings

Predictions = Mapping[tuple[str, str], pd.DataFrame]  # (dataset, model) -> prediction frame
MODELS = {  # file name -> name for people; colour of Okabe and Ito (2008), None for one that no figure compares
    "vlm_zero_shot": ("zero-shot VLM", "#F0E442"),
    "vlm_tuned": ("tuned VLM", "#E69F00"),
    "vlm_generated": ("tuned VLM, free generation", None),
    "vit": ("ViT", "#56B4E9"),
    "vit_scratch": ("ViT from scratch", None),
    "resnet": ("ResNet", "#CC79A7"),
    "vgg": ("VGG", "#999999"),
    "probe": ("linear probe", None),
    "head": ("distilled head", "#009E73"),
    "emovlmkd": ("EmoVLM-KD", "#0072B2"),
    "gate_bilinear": ("bilinear", None),
    "gate_moe": ("mixture of 3 linear experts", None),
    "gate_dynamic": ("dynamic weighting", None),
    "gate_cross": ("cross gating", None),
    "gate_concat_logits": ("concat & linear, raw logits (authors' code)", None),
    "gate_concat_soft": ("concat & linear, VLM's distribution", None),
    "gate_concat_val": ("concat & linear, learnt on val", None),
    "gate_concat_oof": ("concat & linear, learnt on the head's out-of-fold answers", None),
    "average_vlm_head": ("plain average, VLM and head", None),
    "average_vlm_vit": ("plain average, VLM and ViT", None),
}  # in the order of every list; head_alpha*, head_depth* and gate_depth* follow the settings
MAIN = tuple(model for model, (_, color) in MODELS.items() if color)  # those that figures compare
QUARTET = ("vlm_tuned", "vit", "head", "emovlmkd")  # the system, its parts and the teacher
GROUPS = ("both right", "only VLM right", "only ViT right", "neither right")
UNPARSABLE = "(unparsable)"  # what people read where a model gave no answer
SAMPLE = "random sample"  # the view in which a review of labels is no choice of the reviewer's
CASES = {
    "vlm": "only the VLM right,\nthe ViT wrong",
    "vit": "only the ViT right,\nthe VLM wrong",
    "gate": "only EmoVLM-KD\nright, both wrong",
    "lost": "gate lost: one right,\nEmoVLM-KD wrong",
}  # rows of the picture figure; in the first two EmoVLM-KD is right as well (paper, last figure)
_FIRST, _LAST = ("image_id", "split", "label", "seed", "repeat", "prediction"), ("raw_text", "parsed")
_NOTHING = pd.DataFrame(columns=[*_FIRST, *_LAST])


def model_name(model: str) -> str:
    """A model as people read it; an unknown one keeps its file name."""
    if named := re.fullmatch(r"(head|gate)_depth(\d+)(?:_x(.+))?", model):
        kind, depth, length = named.groups()
        name = f"{'head' if kind == 'head' else 'EmoVLM-KD'}, {depth} hidden layer{'s' * (depth != '1')}"
        return name + (f", {length} x the authors' training" if length else "")
    if model.startswith("head_alpha"):
        return f"head, alpha = {model.removeprefix('head_alpha')}"
    return MODELS[model][0] if model in MODELS else model


def model_color(model: str) -> str | None:
    """A model's colour, the same in every figure; None for one that no figure compares."""
    return MODELS[model][1] if model in MODELS else None


def head_model(distill: DistillSettings, **different: Any) -> str:
    """File name of the head that differs from the paper's in `hidden` or `alpha`; "": no such head is trained."""
    wanted = {"hidden": distill.hidden, "alpha": distill.alpha, **different}
    return next((name for name, head in distill.heads.items() if head == wanted), "")


def gated(head: str) -> str:
    """File name of EmoVLM-KD with this head."""
    return "emovlmkd" if head == "head" else head.replace("head", "gate", 1)


def expected_models(settings: Settings) -> list[str]:
    """Models of which notebooks 03 to 06 write predictions for each dataset, in that order."""
    free = ["vlm_generated"] if settings.vlm.reasons else []
    trained = [*settings.teacher.networks, "probe", *settings.distill.heads, *settings.gates]
    return ["vlm_zero_shot", "vlm_tuned", *free, *trained, "average_vlm_head", "average_vlm_vit"]


def paper_dataset(dataset: str) -> str:
    """The paper's name of the set that a dataset is or stands for ("mini-fi" -> "FI"), else ""."""
    return resource("paper_values.yaml", "datasets").get(dataset.removeprefix("mini-"), "")


def is_drawn(dataset: str) -> bool:
    """Whether this is one of the drawn datasets, whose accuracies are not comparable with the paper's."""
    return dataset in resource("lexicon.yaml", "datasets")


def dataset_title(dataset: str) -> str:
    """A dataset as every table and figure names it: a drawn one never without the word drawn."""
    known = {"emotion6": "Emotion6 (label: keyword)", "emotion6-majority": "Emotion6 (label: raters' majority)"}
    return f"{dataset} (drawn)" if is_drawn(dataset) else known.get(dataset) or paper_dataset(dataset) or dataset


# ---- frames and files ----------------------------------------------------------------------------------------------


def make_predictions(
    image_ids: Sequence[str],
    split: Sequence[str],
    label: Sequence[str],
    probabilities: np.ndarray,
    labels: Sequence[str],
    *,
    seed: int = 0,
    repeat: int = 0,
    raw_text: Sequence[str | None] | None = None,
    parsed: Sequence[bool] | None = None,
) -> pd.DataFrame:
    """Predictions of one seed for N images with true `label`: the most probable of C labels.

    `probabilities`: (N, C), in the order of `labels`; `raw_text`: the VLM's texts; `parsed`: False marks an unparsable
    answer: uniform, prediction "", counted as wrong, never a class.
    """
    p, n = np.array(probabilities, dtype=np.float64), len(image_ids)
    ok = np.ones(n, bool) if parsed is None else np.asarray(parsed, bool)
    p[~ok] = 1 / len(labels)
    answers = np.where(ok, np.asarray(labels, object)[p.argmax(axis=1)], "")
    columns = {"image_id": list(image_ids), "split": list(split), "label": list(label), "seed": seed}
    columns |= {"repeat": repeat, "prediction": answers, **{f"p_{name}": p[:, i] for i, name in enumerate(labels)}}
    texts = pd.array([None] * n if raw_text is None else list(raw_text), dtype="str")
    return pd.DataFrame({**columns, "raw_text": texts, "parsed": ok})


def one_word_predictions(
    image_ids: Sequence[str],
    split: Sequence[str],
    label: Sequence[str],
    named: Sequence[str | None],
    labels: Sequence[str],
    **options: Any,
) -> pd.DataFrame:
    """Predictions of a model that names one label for each image or, where that is None or "", none; see above."""
    p = np.array([[float(label == name) for label in labels] for name in named]).reshape(-1, len(labels))
    return make_predictions(image_ids, split, label, p, labels, parsed=[bool(name) for name in named], **options)


def says_one_word(frame: pd.DataFrame) -> bool:
    """Whether a model only names a label: its probabilities are no measure of how sure it is."""
    return bool((probabilities(frame[frame["parsed"]]).max(axis=1) == 1).all())


def prediction_labels(frame: pd.DataFrame) -> list[str]:
    """The class order of a prediction frame, read from its `p_<label>` columns."""
    return [c.removeprefix("p_") for c in frame.columns if c.startswith("p_")]


def probabilities(frame: pd.DataFrame) -> np.ndarray:
    """(N, C) probabilities in the frame's own class order."""
    return frame[[f"p_{name}" for name in prediction_labels(frame)]].to_numpy(np.float64)


def write_predictions(path: str | Path, frame: pd.DataFrame) -> None:
    """Check a frame and write it as parquet, whole or not at all."""
    path = Path(path)
    _check(frame, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, frame.to_parquet(index=False, write_page_checksum=True))


def read_predictions(
    path: str | Path, labels: Sequence[str] | None = None, *, split: str | None = None
) -> pd.DataFrame:
    """Read and check a prediction file, whole or one split of it; `frame.attrs["labels"]` holds its class order.

    `EmonbError`: missing or damaged file, wrong columns, impossible values, a class order other than `labels`.
    """
    try:
        wanted = [("split", "==", split)] if split else None
        frame = pd.read_parquet(path, filters=wanted, page_checksum_verification=True)
    except Exception as error:  # whatever a damaged file makes pyarrow raise
        raise EmonbError(f"{path}: no predictions ({error!r}); run the notebook that writes them (03 to 06)") from None
    if "repeat" not in frame and "seed" in frame:
        frame.insert(frame.columns.get_loc("seed") + 1, "repeat", 0)
    if labels is not None:
        check_labels(prediction_labels(frame), labels, str(path))
    _check(frame, path)
    frame.attrs["labels"] = prediction_labels(frame)
    return frame


def _check(frame: pd.DataFrame, path: str | Path) -> None:
    labels = prediction_labels(frame)
    columns = [*_FIRST, *(f"p_{name}" for name in labels), *_LAST]
    if list(frame.columns) != columns:
        raise EmonbError(f"{path}: columns are {list(frame)}, expected {columns}; delete the file and run again")
    if not labels:
        raise EmonbError(f"{path}: no column p_<label>; each label of the dataset has one, with its probability")
    p, parsed, answers = probabilities(frame), frame["parsed"].to_numpy(bool), frame["prediction"]
    at = pd.Index(labels).get_indexer(answers)  # -1: no label
    likely = p[np.arange(len(p)), at] >= p.max(axis=1) - 1e-6
    twice = frame.duplicated(["image_id", "split", "seed", "repeat"])
    checks = {  # bfloat16 probabilities of a GPU run need the tolerance
        "p_* holds no probabilities that sum to 1": (p >= 0).all() and (np.abs(p.sum(axis=1) - 1) <= 1e-3).all(),
        f"label has labels outside {labels}": frame["label"].isin(labels).all(),
        'prediction must be a label where parsed and "" where not': (np.where(parsed, at >= 0, answers == "")).all(),
        "prediction is not the most probable label: class order and probabilities disagree": likely[parsed].all(),
        "image_id names an image twice for one split, seed and repeat": not twice.any(),
    }
    for what, ok in checks.items():
        if not ok:
            raise EmonbError(f"{path}: column {what}; delete the file and run again")


class LoadedPredictions(dict[tuple[str, str], pd.DataFrame]):
    """{(dataset, model): frame}; `folder`: where from; `problems`: a sentence for each damaged file left out."""

    folder: Path
    problems: dict[tuple[str, str], str]


def load_all(
    folder: str | Path, datasets: Sequence[str] | None = None, *, split: str | None = None, partial: bool = False
) -> LoadedPredictions:
    """All prediction files of a run, or those of some datasets, or one split of them.

    A damaged file is an `EmonbError`, as no file is; with `partial` it is left out, and `problems` says so.
    """
    found = LoadedPredictions()
    found.folder, found.problems = Path(folder).resolve(), {}
    for path in sorted(found.folder.glob("*__*.parquet")):
        dataset, model = path.stem.split("__", 1)
        try:
            if datasets is None or dataset in datasets:
                found[dataset, model] = read_predictions(path, split=split)
        except (EmonbError, ValueError, TypeError) as error:
            if not partial:
                raise
            why = " ".join(str(error).replace(f"{path}: ", "").replace(str(path), path.name).split())
            found.problems[dataset, model] = f"{dataset}: predictions of {model} are damaged: {why}"
    for dataset, model in [key for key in found if not is_ours(key[1])]:
        ours, theirs = asked_of_all(found, dataset), test_rows(found, dataset, model)
        known, why, order = theirs["image_id"].map(ours), "", prediction_labels(found[dataset, model])
        orders = (prediction_labels(frame) for (name, own), frame in found.items() if name == dataset and is_ours(own))
        if (odd := known.notna() & (known != theirs["label"])).any():
            at = odd.idxmax()
            why = f"column label: {theirs['label'][at]!r} of {theirs['image_id'][at]}, which is {known[at]!r} here"
        elif order != (right := next(orders, order)):
            why = f"columns p_...: {', '.join(order)}, where the order is {', '.join(right)}"
        if why and not partial:
            remedy = "write labels and their order as in the sample table, delete the file, or run again"
            raise EmonbError(f"{dataset}__{model}.parquet: {why}; {remedy}")
        if why:
            found.problems[dataset, model] = f"{dataset}: predictions of {model} are of other labels: {why}"
            del found[dataset, model]
    if not found:
        what = "; ".join([", ".join(datasets or ["any dataset"]), *found.problems.values()])
        raise EmonbError(f"{folder}: no predictions of {what}; run notebooks 03 to 06")
    return found


def gaps(predictions: Predictions, datasets: Iterable[str], models: Iterable[str]) -> list[str]:
    """A sentence for each damaged file and each dataset without test rows of some models (see `expected_models`)."""
    damaged, models = getattr(predictions, "problems", {}), list(models)
    lines = list(damaged.values())
    for d in datasets:
        missing = [m for m in models if (d, m) not in damaged and test_rows(predictions, d, m).empty]
        if missing:
            lines.append(f"{d}: no predictions of {'any model' if missing == models else ', '.join(missing)}")
    return lines


def test_rows(predictions: Predictions, dataset: str, model: str) -> pd.DataFrame:
    """Test rows of a model; none where this run has no such predictions."""
    frame = predictions.get((dataset, model), _NOTHING)
    return frame[frame["split"] == "test"]


def is_ours(model: str) -> bool:
    """Whether a model's file name is one of those that notebooks 03 to 06 write."""
    return model in MODELS or model.startswith(("head_", "gate_"))


def asked_of_all(predictions: Predictions, dataset: str) -> pd.Series:
    """Labels of a dataset's test images by image_id: those that the first of `MAIN` was asked; none without one."""
    model = next((model for model in MAIN if (dataset, model) in predictions), "")
    return test_rows(predictions, dataset, model).drop_duplicates("image_id").set_index("image_id")["label"]


def strangers(predictions: Predictions, dataset: str) -> list[str]:
    """Models that somebody else trained or serves: any other name, and answers to some of our test images.

    At least two, for one has no interval; `joint` and the tables compare models on the images that both have seen.
    """
    asked, others = asked_of_all(predictions, dataset).index, sorted(m for d, m in predictions if d == dataset)
    ids = {model: {*test_rows(predictions, dataset, model)["image_id"]} for model in others if not is_ours(model)}
    return [model for model, seen in ids.items() if len(seen.intersection(asked) if len(asked) else seen) > 1]


def first_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """One answer per image, of the first seed and repeat (a majority would be a model that nobody trained)."""
    return frame[(frame["seed"] == frame["seed"].min()) & (frame["repeat"] == frame["repeat"].min())]


def seeds_alike(frame: pd.DataFrame) -> pd.Series:
    """By image_id (sorted): on how many of the model's seeds, counting the first, the answer is that of the first."""
    once = frame[frame["repeat"] == frame["repeat"].min()]
    answers = once.pivot(index="image_id", columns="seed", values="prediction")
    return answers.eq(answers.iloc[:, 0], axis=0).sum(axis=1)


def how_alike(folder: Path) -> str:
    """What `OUT/models/<dataset>` is of several pipelines, and on how many pictures they agree; or ""."""
    file = folder.resolve().parent.parent / "predictions" / f"{folder.resolve().name}__emovlmkd.parquet"
    try:
        frame = read_predictions(file, split="test")
    except EmonbError:
        return ""
    alike, seeds = seeds_alike(frame), frame["seed"].nunique()
    share = f"which give the same answer to {(alike == seeds).mean():.0%} of the test pictures"
    return f"the first of {seeds} pipelines, {share}" if seeds > 1 else ""


def joined(files: Iterable[Path]) -> pd.DataFrame:
    """Prediction files of one model, of several seeds, under each other; `write_predictions` checks them."""
    frames = [pd.read_parquet(file) for file in files]
    return pd.concat([frame.assign(raw_text=frame["raw_text"].astype("str")) for frame in frames], ignore_index=True)


def joint(predictions: Predictions, dataset: str, models: Iterable[str] = MAIN) -> pd.DataFrame:
    """One row per test image that all have seen: `label`, and a column of answers for each model of this run."""
    there = [model for model in models if (dataset, model) in predictions]
    frames = [first_seed(test_rows(predictions, dataset, m)).set_index("image_id") for m in there] or [_NOTHING]
    columns = {"label": frames[0]["label"], **{m: f["prediction"] for m, f in zip(there, frames, strict=False)}}
    return pd.concat(columns, axis=1, join="inner").sort_index().rename_axis("image_id")


def intersections(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Images of joint tables by who of `QUARTET` is right: a row for each combination, the commonest first.

    Counts, a column per key of `tables`; the index has a level per model that all have (True = right).
    """
    models = [model for model in QUARTET if all(model in table.columns for table in tables.values())]
    hits = {title: table[models].eq(table["label"], axis=0) for title, table in tables.items() if models}
    counts = pd.DataFrame({title: hit.value_counts() for title, hit in hits.items()}).fillna(0).astype(int)
    share = (counts / counts.sum().clip(lower=1)).sum(axis=1).sort_index(ascending=False)
    return counts.loc[share.sort_values(ascending=False, kind="stable").index]


def select_examples(table: pd.DataFrame, per_case: int = 4) -> pd.DataFrame:
    """Images of a joint table for each of `CASES`, named in column `case`; none without VLM, ViT or EmoVLM-KD.

    Not picked by hand: within a case the images go by emotion in turn, beginning after those of the case before, then
    by image_id.
    """
    models = ("vlm_tuned", "vit", "emovlmkd")
    if not set(models) <= set(table.columns):
        return table.assign(case="").iloc[:0]
    table = table.sort_index()
    vlm, vit, ours = (table[m] == table["label"] for m in models)
    hits = [vlm & ~vit & ours, vit & ~vlm & ours, ours & ~vlm & ~vit, ~ours & (vlm ^ vit)]
    names = pd.Categorical(np.select(hits, list(CASES), None), categories=list(CASES))
    table = table.assign(case=names).dropna(subset="case")
    table["turn"] = table.groupby(["case", "label"], observed=True).cumcount()
    rank, first = table["label"].rank(method="dense") - 1, per_case * table["case"].cat.codes
    table["place"] = (rank - first) % max(1, table["label"].nunique())
    chosen = table.sort_values(["case", "turn", "place"]).groupby("case", observed=True).head(per_case)
    return chosen.drop(columns=["turn", "place"])


def average(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """The honest rival of any gate: the mean of two models' probabilities, one for each seed and repeat of `second`.

    Of `first` the same seed is taken, or its first where it has no such seed.
    """
    labels, rows = prediction_labels(first), []
    check_labels(prediction_labels(second), labels, "predictions to average")
    for (seed, repeat), part in second.groupby(["seed", "repeat"]):
        same = first_seed(first[first["seed"] == seed] if seed in set(first["seed"]) else first)
        p = (probabilities(same) + probabilities(part.set_index(["image_id"]).loc[same["image_id"]])) / 2
        about, options = (same[c] for c in ("image_id", "split", "label")), {"seed": int(seed), "repeat": int(repeat)}
        rows.append(make_predictions(*about, p, labels, **options))
    return pd.concat(rows, ignore_index=True)


# ---- a review of labels --------------------------------------------------------------------------------------------


class _Mark(BaseModel, extra="forbid"):
    dataset: str
    image_id: str
    label: str
    mark: Literal["label is right", "also right", "mislabelled"]
    also_right: list[str]
    view: str  # where the picture was looked at: `SAMPLE`, "errors of ViT", ...


class _Review(BaseModel, extra="forbid"):
    emonb_review: Literal[1]
    pictures: list[_Mark] = Field(min_length=1)


def read_review(path: Path) -> pd.DataFrame:
    """Somebody's review of labels as the explorer saves it, a row per picture, columns as in `_Mark`.

    `EmonbError`: no such file, a field that is missing or impossible, a picture twice.
    """
    remedy = "correct it, or save the review again in the explorer"
    try:
        pictures = _Review.model_validate(read_json(path, remedy)).pictures
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise EmonbError(f"{path}: {field}: {first['msg']} (found {first['input']!r:.80}); {remedy}") from None
    frame = pd.DataFrame(map(dict, pictures), columns=[*_Mark.model_fields])
    odd = {"image_id: a picture twice": frame.duplicated(["dataset", "image_id"])}
    odd["also_right: does not fit the mark"] = (frame["mark"] == "also right") != frame["also_right"].map(bool)
    for field, rows in odd.items():
        if rows.any():
            raise EmonbError(f"{path}: pictures.{rows.argmax()}.{field}; {remedy}")
    frame.attrs["file"] = str(path)
    return frame


def reviewed(predictions: Predictions, review: pd.DataFrame) -> Predictions:
    """Test rows as a review leaves them: no mislabelled picture, and where the answer is also right, it is the label.

    `EmonbError`: the review has a dataset, picture, label or emotion that these predictions lack.
    """
    found, known, file = {}, {}, review.attrs.get("file", "review")  # known: dataset -> its labels by image_id
    for (dataset, model), frame in predictions.items():
        marks, rows = review[review["dataset"] == dataset], test_rows(predictions, dataset, model)
        known.setdefault(dataset, {}).update(zip(rows["image_id"], rows["label"], strict=True))
        also = {(row.image_id, name) for row in marks.itertuples() for name in row.also_right}
        if unknown := {name for _, name in also} - {*prediction_labels(frame)}:
            raise EmonbError(f"{file}: also_right: {dataset} has no emotion {', '.join(sorted(unknown))}")
        rows = rows[~rows["image_id"].isin(marks.loc[marks["mark"] == "mislabelled", "image_id"])]
        right = [pair in also for pair in zip(rows["image_id"], rows["prediction"], strict=True)]
        found[dataset, model] = rows.assign(label=rows["label"].mask(right, rows["prediction"]))
    for row in review.itertuples():
        here = known.get(row.dataset, {}).get(row.image_id, "no such test picture")
        if here != row.label:
            what = f"{file}: {row.dataset}, image_id {row.image_id}: label {row.label!r}, in this run {here!r}"
            raise EmonbError(f"{what}; take the review of these results, or run the datasets that it is of")
    return found
