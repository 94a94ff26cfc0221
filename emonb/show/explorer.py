"""A clickable confusion matrix: every model, every dataset, the pictures behind each cell.

The output is one picture (for places that run no scripts) and one piece of HTML with its data, its pictures
and its script inside: it works in JupyterLab, without a kernel and from disk, and asks for nothing.
Not in the paper, which shows a few chosen pictures: here the reader chooses.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from emonb.data import read_samples, thumbnail
from emonb.errors import EmonbError, UnreadablePicture
from emonb.files import resource_path
from emonb.predictions import (
    MAIN,
    UNPARSABLE,
    LoadedPredictions,
    Predictions,
    dataset_title,
    first_seed,
    joint,
    model_name,
    prediction_labels,
    probabilities,
)
from emonb.store import Store

SIDE = 80  # px, longest side of a thumbnail
ACROSS, TILES = 32, 1024  # thumbnails per row and per sheet: 3,072 px square, far below WebP's 16,383
QUALITY = 50  # of WebP: about 1.6 kB a picture as base64, measured on drawn ones
LONGEST = 2000  # characters of a model's text
_SENTENCE = (
    "The picture above shows the confusion matrices. To click through their images, run this notebook, or trust it "
    "(in JupyterLab: View, Activate Command Palette, Trust Notebook), or open its exported page."
)


def explore(
    predictions: Predictions,
    dataset: str | Sequence[str] | None = None,
    samples: Mapping[str, pd.DataFrame] | None = None,
    *,
    models: Sequence[str] = MAIN,
    limit: int = 1000,
) -> None:
    """Show clickable confusion matrices of the test split, as outputs of the cell: a picture, then HTML.

    Of models with several seeds the first seed is shown: probabilities averaged over seeds would be an
    ensemble that nobody trained.

    Args:
        predictions: {(dataset, model): frame}, as `load_all` gives them.
        dataset: one or some of the datasets; default all.
        samples: {dataset: table with `image_id, path`}; default: those of the run that `load_all` read from.
        models: in this order, where there are predictions; the last is shown first.
        limit: pictures embedded of each dataset, errors first. The counts are always those of all images.
            1,000 pictures are about 1.6 MB of notebook.

    Raises:
        EmonbError: no such predictions, or no pictures for them.
    """
    from IPython.display import HTML, display

    from emonb.figures import as_image, confusion_overview

    names = _datasets(predictions, dataset)
    html = explorer_html(predictions, names, samples, models=models, limit=limit)
    matrices = confusion_overview({dataset_title(name): _frames(predictions, name, models)[1] for name in names})
    display(as_image(matrices, f"confusion matrices of {', '.join(names)}", dpi=90))
    display(HTML(html))


def explorer_html(
    predictions: Predictions,
    dataset: str | Sequence[str] | None = None,
    samples: Mapping[str, pd.DataFrame] | None = None,
    *,
    models: Sequence[str] = MAIN,
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
    script, style = (resource_path(f"explorer.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
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


def filters(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Which images of a joint table each filter keeps: {name: (N,) bool}; those whose models are missing are left out.

    Args:
        table: `label` and a column of answers for each model (`predictions.joint`).
    """
    right = {model: (table[model] == table["label"]).to_numpy() for model in table.columns.drop("label")}
    wrong = ~np.logical_or.reduce(list(right.values()))
    if not {"vlm_tuned", "vit"} <= right.keys():
        return {"all": np.ones(len(table), bool), "all wrong": wrong}
    vlm, vit, ours = right["vlm_tuned"], right["vit"], right.get("emovlmkd")
    return {
        "all": np.ones(len(table), bool),
        "VLM right, ViT wrong": vlm & ~vit,
        "ViT right, VLM wrong": vit & ~vlm,
        "all wrong": wrong,
        **({} if ours is None else {"EmoVLM-KD right, both wrong": ours & ~vlm & ~vit}),
        "VLM and ViT disagree": (table["vlm_tuned"] != table["vit"]).to_numpy(),
    }


def choose_images(table: pd.DataFrame, limit: int) -> np.ndarray:
    """Positions, ascending, of the images to embed: errors of the last model, other errors, then hits of all.

    Within each kind the hash of the image_id decides: a fair sample that every run repeats.
    """
    wrong = table.drop(columns="label").ne(table["label"], axis=0)
    kind = np.select([wrong.iloc[:, -1], wrong.any(axis=1)], [0, 1], 2)
    chance = [hashlib.sha256(name.encode()).hexdigest() for name in table.index]
    return np.sort(np.lexsort((chance, kind))[:limit])


def sprites(paths: Sequence[str | None]) -> tuple[list[str], list[tuple[int, int]]]:
    """Thumbnails on sheets of at most `TILES`, as WebP in base64, and each one's size; (0, 0) = no picture."""
    sheets, sizes = [], []
    for start in range(0, len(paths), TILES):
        part = paths[start : start + TILES]
        sheet = Image.new("RGB", (min(len(part), ACROSS) * SIDE, -(-len(part) // ACROSS) * SIDE), "white")
        for i, path in enumerate(part):
            try:
                picture = thumbnail(path, SIDE)
            except UnreadablePicture:  # missing or damaged: the others are still worth showing
                sizes.append((0, 0))
                continue
            sheet.paste(picture, (i % ACROSS * SIDE, i // ACROSS * SIDE))
            sizes.append(picture.size)
        buffer = io.BytesIO()
        sheet.save(buffer, "WEBP", quality=QUALITY, method=2)
        sheets.append(base64.b64encode(buffer.getvalue()).decode())
    return sheets, sizes


def _datasets(predictions: Predictions, dataset: str | Sequence[str] | None) -> list[str]:
    there = list(dict.fromkeys(name for name, model in predictions if model in MAIN))
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


def _paths(predictions: Predictions, dataset: str, samples: Mapping[str, pd.DataFrame] | None) -> pd.Series:
    """Paths of the test pictures by image_id."""
    table = None if samples is None else samples.get(dataset)
    if samples is None and isinstance(predictions, LoadedPredictions):
        store = predictions.folder.parent / "artifacts"
        if store.is_dir():
            table = read_samples(Store(store).find("samples", dataset).path, "test", ["image_id", "path"])
    if table is None:
        raise EmonbError(f"{dataset}: where are its pictures? Give explore(..., samples={{dataset: sample table}})")
    lacking = {"image_id", "path"} - set(table.columns)
    if lacking:
        raise EmonbError(f"samples of {dataset}: column {lacking.pop()!r} is missing; see emonb.data.read_samples")
    return table.drop_duplicates("image_id").set_index("image_id")["path"]


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
    pairs = [truth * len(columns) + answer for answer in answers.values()]
    kept, size = filters(table), len(labels) * len(columns)
    chosen = choose_images(table, limit)
    ids = [table.index[i] for i in chosen]
    sheets, sizes = sprites([paths.get(name) for name in ids])
    seeds = max(predictions[dataset, model]["seed"].nunique() for model in frames)
    return {
        "title": dataset_title(dataset),
        "labels": labels,
        "columns": columns,
        "models": [model_name(model) for model in frames],
        "filters": list(kept),
        "totals": [int(mask.sum()) for mask in kept.values()],
        "counts": [[np.bincount(p[m], minlength=size).tolist() for p in pairs] for m in kept.values()],
        "n": len(table),
        "seeds": "Of models with several seeds the first is shown." if seeds > 1 else "",
        "kept": f"first the errors of {model_name([*frames][-1])}, then of any other model, then a sample of the hits",
        "id": ids,
        "label": truth[chosen].tolist(),
        "mask": sum(mask[chosen].astype(int) << bit for bit, mask in enumerate(kept.values())).tolist(),
        "answer": [answer[chosen].tolist() for answer in answers.values()],
        "sure": [_confidence(frame.iloc[chosen]) for frame in frames.values()],
        "text": _texts([frame["raw_text"].iloc[chosen] for frame in frames.values()]),
        "size": sizes,
        "sprites": sheets,
    }


def _confidence(frame: pd.DataFrame) -> list[int]:
    """Probability of the answer in whole percent; -1 = no answer."""
    percent = np.rint(100 * probabilities(frame).max(axis=1)).astype(int)
    return np.where(frame["prediction"] == "", -1, percent).tolist()


def _texts(columns: Sequence[pd.Series]) -> dict[int, list[tuple[int, str]]]:
    """What the models wrote: {image: [(model, text)]}, cut where it is very long."""
    found: dict[int, list[tuple[int, str]]] = {}
    for model, texts in enumerate(columns):
        for image, text in enumerate(texts):
            if isinstance(text, str) and text.strip():
                found.setdefault(image, []).append((model, text if len(text) <= LONGEST else text[:LONGEST] + "…"))
    return dict(sorted(found.items()))
