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
FEW = 400  # pictures of a dataset, of which the page can afford twice the side: they can be looked at large
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
        limit: pictures embedded of each dataset, see `choose_images`; all else is of all. 1,000 are about 2 MB.
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
    data = {"css": style, "across": ACROSS, "tiles": TILES, "sets": sets}
    # "<" as an escape: neither "</script>" nor "<!--" in a text can end the block
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    uid = hashlib.sha256(text.encode()).hexdigest()[:16]
    # JupyterLab's shortcuts stay off only if the attribute is on the shadow host itself
    return (
        f'<div class="emonb-explorer" id="the-explorer" data-emonb="{uid}" data-lm-suppress-shortcuts="true">'
        f"<p>{_SENTENCE}</p></div>"
        f'<script type="application/json">{text}</script><script>{script}</script>'
    )


def filters(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Which images of a joint table each filter keeps, {name: (N,) bool}; none whose models are missing."""
    right = table.drop(columns="label").eq(table["label"], axis=0)
    kept = {"all": table["label"].notna(), "all models wrong": ~right.any(axis=1)}
    if {"vlm_tuned", "vit"} <= {*right}:
        vlm, vit = right["vlm_tuned"], right["vit"]
        kept |= {"VLM right, ViT wrong": vlm & ~vit, "ViT right, VLM wrong": vit & ~vlm}
        if "emovlmkd" in right:
            kept["EmoVLM-KD right, VLM and ViT wrong"] = right["emovlmkd"] & ~vlm & ~vit
        kept["VLM and ViT disagree"] = table["vlm_tuned"] != table["vit"]
    return kept


def choose_images(table: pd.DataFrame, limit: int) -> np.ndarray:
    """Positions, ascending, of the images to embed: an eighth is a random sample of all, for whoever reviews labels.

    Then errors of the tuned VLM, of the last model, of any, hits of all; small cells of the VLM's matrix are whole.
    """
    said = table["vlm_tuned" if "vlm_tuned" in table else table.columns[-1]]
    wrong, chance = table.drop(columns="label").ne(table["label"], axis=0), _chance(table.index)
    errors = [said != table["label"], wrong.iloc[:, -1], wrong.any(axis=1)]
    turn = pd.Series(chance, table.index).groupby([table["label"], said]).rank()
    kind = np.select([chance < limit // 8, *errors], [0, 1, 2, 3], 4)
    return np.sort(np.lexsort((chance, turn, kind))[:limit])


def _chance(names: pd.Index) -> np.ndarray:
    """The place of each image in a random order that every run repeats: by the hash of its image_id."""
    return np.argsort(np.argsort([hashlib.sha256(name.encode()).hexdigest() for name in names]))


def sprites(paths: Sequence[str | None], side: int = SIDE) -> tuple[list[str], list[tuple[int, int]]]:
    """Thumbnails on sheets of at most `TILES`, as WebP in base64, and each one's size; (0, 0) = no picture."""
    sheets, sizes = [], []
    for start in range(0, len(paths), TILES):
        part, buffer = paths[start : start + TILES], io.BytesIO()
        sheet = Image.new("RGB", (min(len(part), ACROSS) * side, -(-len(part) // ACROSS) * side), "white")
        for i, path in enumerate(part):
            try:
                picture = thumbnail(path, side)
                sheet.paste(picture, (i % ACROSS * side, i // ACROSS * side))
                sizes.append(picture.size)
            except UnreadablePicture:  # missing or damaged: the others are still worth showing
                sizes.append((0, 0))
        sheet.save(buffer, "WEBP", quality=50, method=2)
        sheets.append(base64.b64encode(buffer.getvalue()).decode())
    return sheets, sizes


def _dataset(predictions: LoadedPredictions, dataset: str, limit: int) -> dict[str, Any]:
    """All that the script shows of one dataset, as plain numbers and texts; images with a picture come first."""
    others = strangers(predictions, dataset)
    table = joint(predictions, dataset, MAIN if any((dataset, m) in predictions for m in MAIN) else others)
    if table.empty:
        there = ", ".join(dict.fromkeys(name for name, _ in predictions)) or "no dataset"
        raise EmonbError(f"{dataset}: no test image that all models have answered; there are predictions of {there}")
    models = [model for model in (*MAIN[:-1], *others, MAIN[-1]) if (dataset, model) in predictions]
    rows = {m: test_rows(predictions, dataset, m) for m in models}
    firsts = {m: first_seed(frame).set_index("image_id").reindex(table.index) for m, frame in rows.items()}
    table = table[["label"]].assign(**{m: frame["prediction"] for m, frame in firsts.items()})  # NaN: was not asked
    chosen = choose_images(table.apply(lambda said: said.fillna(table["label"])), limit)
    table = table.iloc[np.r_[chosen, np.delete(np.arange(len(table)), chosen)]]
    few, frames = table.index[: len(chosen)], {m: frame.loc[table.index] for m, frame in firsts.items()}
    by = dict.fromkeys(model_name(m) for m in ("vlm_tuned", models[-1]) if m in models)
    samples = Store(predictions.folder.parent / "artifacts").find("samples", dataset).path
    samples = read_samples(samples, "test").set_index("image_id").reindex(table.index)
    labels = prediction_labels(next(iter(frames.values())))
    columns = [*labels, UNPARSABLE] if (table == "").any(axis=None) else labels
    codes = table.replace("", UNPARSABLE).apply(pd.Index(columns).get_indexer)  # [N, 1 + models] numbers of labels
    drawn = samples["drawn_as"].where(samples["noisy"].eq(True)) if "drawn_as" in samples else []
    evidence = samples["evidence"].fillna("") if "evidence" in samples else pd.Series("", table.index)
    if "off_mood" in samples:
        evidence = evidence.mask(samples["off_mood"].eq(True), evidence + ", before another emotion's mood")
    kinds = pd.Categorical(evidence)
    kept, side = filters(table), SIDE if len(few) > FEW else 2 * SIDE
    sheets, sizes = sprites(samples["path"].iloc[: len(few)].where(pd.notna, None).tolist(), side)
    sure, texts = [], []  # per model percent of each image's answer, -1: none; {image: what it wrote}
    for frame in frames.values():
        percent = np.rint(100 * np.nan_to_num(probabilities(frame).max(axis=1))).astype(int)
        unsaid = frame["prediction"].isin(["", np.nan]) | says_one_word(frame.dropna(subset="parsed"))
        sure.append(_packed(np.where(unsaid, -1, percent)))
        texts.append({i: text for i, text in enumerate(map(_short, frame["raw_text"])) if text})
    said = [_short(text) for text in samples["caption"]] if "caption" in samples else []
    return {
        "name": dataset,
        "title": dataset_title(dataset),
        "labels": labels,
        "columns": columns,
        "models": [model_name(m) for m in models],
        "filters": list(kept),
        "of": [frame["seed"].nunique() for frame in rows.values()],
        "alike": [seeds_alike(frame).reindex(few, fill_value=0).tolist() for frame in rows.values()],
        "kept": f"a random sample, the errors of {' and of '.join(by)}, of any other model, then of the hits",
        "id": table.index.tolist(),
        "label": _packed(codes["label"]),
        "drawn": _packed(pd.Index(labels).get_indexer(drawn)),
        "kinds": kinds.categories.tolist(),
        "kind": _packed(kinds.codes),
        "mask": _packed(sum(2**bit * mask for bit, mask in enumerate(kept.values()))),
        "answer": [_packed(codes[m]) for m in models],
        "sure": sure,
        "caption": said if any(said) else [],
        "text": texts,
        "judged": [reasons_note(predictions.folder.parent, dataset) if m == "vlm_tuned" else "" for m in models],
        "sample": np.argsort(_chance(few))[: limit // 8].tolist(),
        "side": side,
        "size": sizes,
        "sprites": sheets,
    }


def _packed(numbers: Sequence[int]) -> str:
    """Numbers from -1 on as a text of one character each, "0" for 0: a page has some hundred thousand of them."""
    return "".join(chr(48 + number) for number in numbers)


def _short(text: object) -> str:
    """A text of a model or of a sample table, cut where it is too long; "": there is none."""
    text = text if isinstance(text, str) and text.strip() else ""
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"
