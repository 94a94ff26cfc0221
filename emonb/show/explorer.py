"""A clickable confusion matrix: every model, every dataset, the pictures behind each cell. Not in the paper.

The output is one piece of HTML with its data, its pictures and its script inside: it works in JupyterLab, without a
kernel and from disk, and asks for nothing. Where no script runs, a sentence says how to switch it on.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
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
    dataset_title,
    first_seed,
    joint,
    model_name,
    prediction_labels,
    probabilities,
    says_one_word,
    seeds_alike,
    strangers,
    test_rows,
)
from emonb.show.reasons import reasons_note
from emonb.store import Store

SIDE, ACROSS, TILES = 80, 32, 1024  # px of a thumbnail; how many in a row, and on a sheet (WebP: at most 16,383 px)
LONGEST = 2000  # characters of a model's text
_SENTENCE = (
    "To click through the confusion matrices and their images, run this notebook, or trust it (in JupyterLab: View, "
    "Activate Command Palette, Trust Notebook), or open its exported page."
)


def explore(predictions: LoadedPredictions, datasets: Sequence[str] = (), *, limit: int = 1000) -> None:
    """Show clickable confusion matrices of the test split, as output of the cell.

    Of models with several seeds the first is shown: a mean of seeds would be an ensemble that nobody trained.

    Args:
        predictions: as `load_all` gives them; the pictures are those of the run that they come from.
        datasets: some of them; default all. `EmonbError`: no such predictions, or no pictures for them.
        limit: pictures embedded of each dataset, errors first; the counts are of all. 1,000 are about 1.6 MB.
    """
    from IPython.display import HTML, display

    display(HTML(explorer_html(predictions, datasets, limit=limit)))


def explorer_html(predictions: LoadedPredictions, datasets: Sequence[str] = (), *, limit: int = 1000) -> str:
    """The explorer as HTML that stands alone in any page; arguments and errors as in `explore`.

    Equal input gives equal bytes. File names, labels and texts are data in it, never markup.
    """
    names = datasets or dict.fromkeys(name for name, _ in predictions)
    with ThreadPoolExecutor() as pool:  # pictures are decoded and packed outside Python's lock
        sets = list(pool.map(lambda name: _dataset(predictions, name, limit), names))
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


def filters(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Which images of a joint table each filter keeps, {name: (N,) bool}; none whose models are missing."""
    right = {model: (table[model] == table["label"]).to_numpy() for model in table.columns.drop("label")}
    kept, wrong = {"all": np.ones(len(table), bool)}, ~np.logical_or.reduce(list(right.values()))
    if not {"vlm_tuned", "vit"} <= right.keys():
        return {**kept, "all wrong": wrong}
    vlm, vit = right["vlm_tuned"], right["vit"]
    kept |= {"VLM right, ViT wrong": vlm & ~vit, "ViT right, VLM wrong": vit & ~vlm, "all wrong": wrong}
    if "emovlmkd" in right:
        kept["EmoVLM-KD right, both wrong"] = right["emovlmkd"] & ~vlm & ~vit
    return {**kept, "VLM and ViT disagree": (table["vlm_tuned"] != table["vit"]).to_numpy()}


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
        part, buffer = paths[start : start + TILES], io.BytesIO()
        sheet = Image.new("RGB", (min(len(part), ACROSS) * SIDE, -(-len(part) // ACROSS) * SIDE), "white")
        for i, path in enumerate(part):
            try:
                picture = thumbnail(path, SIDE)
                sheet.paste(picture, (i % ACROSS * SIDE, i // ACROSS * SIDE))
                sizes.append(picture.size)
            except UnreadablePicture:  # missing or damaged: the others are still worth showing
                sizes.append((0, 0))
        sheet.save(buffer, "WEBP", quality=50, method=2)
        sheets.append(base64.b64encode(buffer.getvalue()).decode())
    return sheets, sizes


def _dataset(predictions: LoadedPredictions, dataset: str, limit: int) -> dict[str, Any]:
    """Everything that the script shows of one dataset, as lists of plain numbers and texts."""
    others = strangers(predictions, dataset)
    table = joint(predictions, dataset, MAIN if any((dataset, m) in predictions for m in MAIN) else others)
    if table.empty:
        there = ", ".join(dict.fromkeys(name for name, _ in predictions)) or "no dataset"
        raise EmonbError(f"{dataset}: no test image that all models have answered; there are predictions of {there}")
    known = [model for model in (*MAIN[:-1], *others, MAIN[-1]) if (dataset, model) in predictions]
    frames = {m: first_seed(test_rows(predictions, dataset, m)).set_index("image_id") for m in known}
    frames = {model: frame.reindex(table.index) for model, frame in frames.items()}
    table = table[["label"]].assign(**{m: frame["prediction"] for m, frame in frames.items()})  # NaN: was not asked
    artifacts = predictions.folder.parent / "artifacts"
    if not artifacts.is_dir():
        raise EmonbError(f"{dataset}: where are its pictures? There is no {artifacts}")
    samples = read_samples(Store(artifacts).find("samples", dataset).path, "test").set_index("image_id")
    paths, noise = samples["path"], samples["drawn_as"][samples["noisy"]] if "noisy" in samples else {}
    labels = prediction_labels(next(iter(frames.values())))
    columns = [*labels, UNPARSABLE] if (table == "").any(axis=None) else labels
    codes = table.replace("", UNPARSABLE).apply(pd.Index(columns).get_indexer)  # [N, 1 + models] numbers of labels
    cells, size = [codes["label"] * len(columns) + codes[m] for m in frames], len(labels) * len(columns)
    seen = [codes[m] >= 0 for m in frames]
    kept, chosen = filters(table), choose_images(table.apply(lambda said: said.fillna(table["label"])), limit)
    few, sheets, sizes = codes.iloc[chosen], *sprites([paths.get(name) for name in table.index[chosen]])
    alike = [seeds_alike(test_rows(predictions, dataset, m)).reindex(few.index, fill_value=0).tolist() for m in frames]
    of = [predictions[dataset, m]["seed"].nunique() for m in frames]
    sure, texts = [], {}  # per model percent of each image's answer, -1: none; {image: [(model, what it wrote)]}
    for model, frame in enumerate(frame.iloc[chosen] for frame in frames.values()):
        percent = np.rint(100 * np.nan_to_num(probabilities(frame).max(axis=1))).astype(int)
        unsaid = frame["prediction"].isin(["", np.nan]) | says_one_word(frame.dropna(subset="parsed"))
        sure.append(np.where(unsaid, -1, percent).tolist())
        for image, text in enumerate(frame["raw_text"]):
            if isinstance(text, str) and text.strip():
                texts.setdefault(image, []).append((model, text if len(text) <= LONGEST else text[:LONGEST] + "…"))
    return {
        "title": dataset_title(dataset),
        "labels": labels,
        "columns": columns,
        "models": [model_name(m) for m in frames],
        "filters": list(kept),
        "totals": [int(mask.sum()) for mask in kept.values()],
        "counts": [
            [np.bincount(c[mask & there], minlength=size).tolist() for c, there in zip(cells, seen, strict=True)]
            for mask in kept.values()
        ],
        "n": len(table),
        "seeds": "Of models with several seeds the first is shown." if max(of) > 1 else "",
        "of": of,
        "alike": alike,
        "kept": f"first the errors of {model_name([*frames][-1])}, then of any other model, then a sample of the hits",
        "id": few.index.tolist(),
        "label": few["label"].tolist(),
        "noise": {i: labels.index(noise[name]) for i, name in enumerate(few.index) if name in noise},
        "mask": sum(mask[chosen].astype(int) << bit for bit, mask in enumerate(kept.values())).tolist(),
        "answer": [few[m].tolist() for m in frames],
        "sure": sure,
        "text": dict(sorted(texts.items())),
        "judged": [reasons_note(predictions.folder.parent, dataset) if m == "vlm_tuned" else "" for m in frames],
        "size": sizes,
        "sprites": sheets,
    }
