"""A clickable confusion matrix: every model, every dataset, the pictures behind each cell.

The output is one picture (for places that run no scripts) and one piece of HTML with its data, its pictures
and its script inside: it works in JupyterLab, without a kernel and from disk, and asks for nothing.
Not in the paper, which shows a few chosen pictures: here the reader chooses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from emonb.complementarity import MODELS, UNPARSABLE, first_seed, joint
from emonb.errors import EmonbError
from emonb.paper_values import dataset_title
from emonb.predictions import LoadedPredictions, Predictions, model_name, prediction_labels, probabilities
from emonb.samples import read_samples
from emonb.sprites import ACROSS, SIDE, TILES, sprites
from emonb.store import Store
from emonb.workspace import Workspace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Pictures", "choose_images", "explore", "explorer_html", "filters", "matrices", "sentence_only"]

Pictures = Mapping[str, pd.DataFrame] | pd.DataFrame | Workspace | None

LONGEST = 2000  # characters of a model's text
_SENTENCE = (
    "The picture above shows the confusion matrices. To click through their images, run this notebook, or trust it "
    "(in JupyterLab: View, Activate Command Palette, Trust Notebook), or open its exported page."
)


def explore(
    predictions: Predictions,
    dataset: str | Sequence[str] | None = None,
    samples: Pictures = None,
    *,
    models: Sequence[str] = MODELS,
    limit: int = 1000,
) -> None:
    """Show clickable confusion matrices of the test split, as outputs of the cell: a picture, then HTML.

    Of models with several seeds the first seed is shown: probabilities averaged over seeds would be an
    ensemble that nobody trained.

    Args:
        predictions: {(dataset, model): frame}, as `load_all` gives them.
        dataset: one or some of the datasets; default all.
        samples: where the pictures are: a workspace, a sample table (`image_id, path`) or one for each
            dataset; default: the run that `load_all` read from.
        models: in this order, where there are predictions; the last is shown first.
        limit: pictures embedded of each dataset, errors first. The counts are always those of all images.
            1,000 pictures are about 1.6 MB of notebook.

    Raises:
        EmonbError: no such predictions, or no pictures for them.
    """
    from IPython.display import HTML, display

    from emonb.figures import as_image

    names = _datasets(predictions, dataset)
    html = explorer_html(predictions, names, samples, models=models, limit=limit)
    display(as_image(matrices(predictions, names, models), f"confusion matrices of {', '.join(names)}", dpi=80))
    display(HTML(html))


def explorer_html(
    predictions: Predictions,
    dataset: str | Sequence[str] | None = None,
    samples: Pictures = None,
    *,
    models: Sequence[str] = MODELS,
    limit: int = 1000,
) -> str:
    """The explorer as HTML that stands alone in any page; arguments and errors as in `explore`.

    Equal input gives equal bytes. File names, labels and texts are data in it, never markup.
    """
    names = _datasets(predictions, dataset)
    if limit < 1:
        raise EmonbError(f"limit: {limit} pictures; give at least 1")
    paths = [_paths(predictions, name, samples) for name in names]
    with ThreadPoolExecutor() as pool:  # pictures are decoded and packed outside Python's lock
        sets = list(pool.map(lambda name, found: _dataset(predictions, name, found, models, limit), names, paths))
    resources = files("emonb") / "resources"
    script, style = ((resources / f"explorer.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    data = {"css": style, "side": SIDE, "across": ACROSS, "tiles": TILES, "sets": sets}
    # "<" as an escape: neither "</script>" nor "<!--" in a text can end the block
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    uid = hashlib.sha256(text.encode()).hexdigest()[:16]
    # JupyterLab's shortcuts stay off only if the attribute is on the shadow host itself
    return (
        f'<div class="emonb-explorer" data-emonb="{uid}" data-lm-suppress-shortcuts="true"><p>{_SENTENCE}</p></div>'
        f'<script type="application/json">{text}</script><script>{script}</script>'
    )


def sentence_only(html: str) -> str:
    """An explorer without its data: the sentence that says how to switch it on. Other HTML stays as it is.

    For the notebooks in the repository, where megabytes of thumbnails do not belong.
    """
    return html.split("<script", 1)[0] if html.startswith('<div class="emonb-explorer"') else html


def matrices(
    predictions: Predictions, dataset: str | Sequence[str] | None = None, models: Sequence[str] = MODELS
) -> Figure:
    """The same matrices as one figure: a row for each dataset, a column for each model."""
    from matplotlib.figure import Figure

    rows = {name: _frames(predictions, name, models)[1] for name in _datasets(predictions, dataset)}
    sizes = [len(prediction_labels(next(iter(frames.values())))) for frames in rows.values()]
    columns = max(map(len, rows.values()))
    heights = [0.3 * max(4, size) + 1.2 for size in sizes]  # inches: cells, then title and names below
    fig = Figure(figsize=(columns * (0.3 * max(4, *sizes) + 0.3) + 1, sum(heights)), layout="constrained")
    axes = fig.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for line, (name, frames) in zip(axes, rows.items(), strict=True):
        for ax in line[len(frames) :]:
            ax.set_axis_off()
        for ax, (model, frame) in zip(line, frames.items(), strict=False):
            _matrix(ax, frame, f"{model_name(model)}\n{dataset_title(name)}, n = {len(frame)}, 1 seed")
        line[0].set_yticklabels(prediction_labels(next(iter(frames.values()))), parse_math=False)
        line[0].set_ylabel("true")
    return fig


def _matrix(ax: Axes, frame: pd.DataFrame, title: str) -> None:
    """One panel: row percent as colour, counts as text. `figures.confusion` is finer, and 35 of them too slow."""
    from emonb.figures_confusion import confusion_counts, row_percent

    table = confusion_counts(frame)
    counts, share = table.to_numpy(), row_percent(table).to_numpy() / 100
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, col in zip(*np.nonzero(counts), strict=True):
        ink = "white" if share[row, col] > 0.7 else "black"
        ax.text(col, row, str(counts[row, col]), ha="center", va="center", fontsize=7, color=ink)
    ax.set_xticks(range(len(table.columns)), table.columns, rotation=90, fontsize=7, parse_math=False)
    ax.set_yticks(range(len(table)), [""] * len(table), fontsize=7)
    ax.tick_params(length=0)
    ax.set_title(title, fontsize=8, parse_math=False)  # a name is no formula


def filters(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Which images of a joint table each filter keeps: {name: (N,) bool}; those whose models are missing are left out.

    Args:
        table: `label` and a column of answers for each model (`complementarity.joint`).
    """
    right = {model: (table[model] == table["label"]).to_numpy() for model in table.columns.drop("label")}
    found = {"all": np.ones(len(table), bool)}
    if {"vlm_tuned", "vit"} <= set(right):
        vlm, vit = right["vlm_tuned"], right["vit"]
        found |= {"VLM right, ViT wrong": vlm & ~vit, "ViT right, VLM wrong": vit & ~vlm}
    found["all wrong"] = ~np.logical_or.reduce(list(right.values()))
    if {"vlm_tuned", "vit"} <= set(right):
        if "emovlmkd" in right:
            found["EmoVLM-KD right, both wrong"] = right["emovlmkd"] & ~vlm & ~vit
        found["VLM and ViT disagree"] = (table["vlm_tuned"] != table["vit"]).to_numpy()
    return found


def choose_images(table: pd.DataFrame, limit: int) -> np.ndarray:
    """Positions, ascending, of the images to embed: errors of the last model, other errors, then hits of all.

    Within each kind the hash of the image_id decides: a fair sample that every run repeats.
    """
    wrong = table.drop(columns="label").ne(table["label"], axis=0)
    kind = np.select([wrong.iloc[:, -1], wrong.any(axis=1)], [0, 1], 2)
    chance = [hashlib.sha256(name.encode()).hexdigest() for name in table.index]
    return np.sort(np.lexsort((chance, kind))[:limit])


def _datasets(predictions: Predictions, dataset: str | Sequence[str] | None) -> list[str]:
    there = list(dict.fromkeys(name for name, model in predictions if model in MODELS))
    wanted = there if dataset is None else [dataset] if isinstance(dataset, str) else list(dataset)
    missing = [name for name in wanted if name not in {d for d, _ in predictions}]
    if missing or not wanted:
        raise EmonbError(
            f"dataset: no predictions of {', '.join(missing) or 'any dataset'}; "
            f"there are {', '.join(there) or 'none'}: run notebooks 03 to 06"
        )
    return wanted


def _frames(
    predictions: Predictions, dataset: str, models: Sequence[str]
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """The joint table, and per model the test rows of its first seed in the table's order."""
    table, frames = joint(predictions, dataset, models), {}
    for model in table.columns.drop("label", errors="ignore"):
        frames[model] = first_seed(predictions[dataset, model]).set_index("image_id").loc[table.index].reset_index()
    if table.empty or not frames:
        raise EmonbError(f"{dataset}: no test image that all of {', '.join(models)} have answered; check the models")
    return table, frames


def _paths(predictions: Predictions, dataset: str, samples: Pictures) -> pd.Series:
    """Paths of the test pictures by image_id."""
    store = samples.store if isinstance(samples, Workspace) else None
    if samples is None and isinstance(predictions, LoadedPredictions):
        store = _store_beside(predictions.folder)
    if store:
        samples = read_samples(store.find("samples", dataset), "test", ["image_id", "path"])
    table = samples if isinstance(samples, pd.DataFrame) else (samples or {}).get(dataset)
    if table is None:
        raise EmonbError(f"{dataset}: where are its pictures? Give explore(..., samples=ws), or a sample table")
    lacking = {"image_id", "path"} - set(table.columns)
    if lacking:
        raise EmonbError(f"samples of {dataset}: column {lacking.pop()!r} is missing; see emonb.samples.read_samples")
    return table.drop_duplicates("image_id").set_index("image_id")["path"]


def _store_beside(folder: Path) -> Store | None:
    """The store of the run whose `predictions` folder this is."""
    root = folder.parent / "artifacts"
    return Store(root) if root.is_dir() else None


def _dataset(
    predictions: Predictions, dataset: str, paths: pd.Series, models: Sequence[str], limit: int
) -> dict[str, Any]:
    """Everything that the script shows of one dataset, as lists of plain numbers and texts."""
    table, frames = _frames(predictions, dataset, models)
    labels = prediction_labels(next(iter(frames.values())))
    lost = any((frame["prediction"] == "").any() for frame in frames.values())
    columns = [*labels, UNPARSABLE] if lost else labels
    place = {name: i for i, name in enumerate(columns)} | {"": len(labels)}
    truth = table["label"].map(place).to_numpy()
    answers = {model: table[model].map(place).to_numpy() for model in frames}
    kept = filters(table)
    size = len(labels) * len(columns)
    pairs = {model: truth * len(columns) + answer for model, answer in answers.items()}
    chosen = choose_images(table, limit)
    ids = [table.index[i] for i in chosen]
    sheets, sizes = sprites([paths.get(name) for name in ids])
    seeds = sorted({int(predictions[dataset, model]["seed"].nunique()) for model in frames})
    sure = [_confidence(frame)[chosen].tolist() for frame in frames.values()]
    return {
        "title": dataset_title(dataset),
        "labels": labels,
        "columns": columns,
        "models": [model_name(model) for model in frames],
        "filters": list(kept),
        "totals": [int(mask.sum()) for mask in kept.values()],
        "counts": [[np.bincount(p[m], minlength=size).tolist() for p in pairs.values()] for m in kept.values()],
        "n": len(table),
        "seeds": "Of models with several seeds the first is shown." if seeds[-1] > 1 else "",
        "kept": f"first the errors of {model_name([*frames][-1])}, then of any other model, then a sample of the hits",
        "id": ids,
        "label": truth[chosen].tolist(),
        "mask": sum(mask[chosen].astype(int) << bit for bit, mask in enumerate(kept.values())).tolist(),
        "answer": [answer[chosen].tolist() for answer in answers.values()],
        "sure": sure,
        "text": _texts([frame["raw_text"].iloc[chosen] for frame in frames.values()]),
        "size": sizes,
        "sprites": sheets,
    }


def _confidence(frame: pd.DataFrame) -> np.ndarray:
    """Probability of the answer in whole percent; -1 = no answer."""
    percent = np.rint(100 * probabilities(frame).max(axis=1)).astype(int)
    return np.where(frame["prediction"] == "", -1, percent)


def _texts(columns: Sequence[pd.Series]) -> dict[int, list[tuple[int, str]]]:
    """What the models wrote: {image: [(model, text)]}, cut where it is very long."""
    found: dict[int, list[tuple[int, str]]] = {}
    for model, texts in enumerate(columns):
        for image, text in enumerate(texts):
            if isinstance(text, str) and text.strip():
                found.setdefault(image, []).append((model, text if len(text) <= LONGEST else text[:LONGEST] + "…"))
    return dict(sorted(found.items()))
