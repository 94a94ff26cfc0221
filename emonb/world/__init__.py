"""The drawn world: five labelled datasets of drawn scenes.

They stand in for the paper's datasets where none is on disk (our choice: a laptop run needs no download); accuracies
on them are not comparable with the paper's. A picture's emotion shows in its content, in its mood, or in both.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from emonb.data import TAXONOMIES
from emonb.errors import EmonbError
from emonb.files import resource
from emonb.settings import SPLITS
from emonb.world.scenes import Background, Camera, draw_scene, glyph_names, mood_background

COLUMNS = ("image_id", "path", "split", "label", "caption", "objects", "scene", "evidence", "noisy")
DRAWN = ("mini-fi", "mini-emoset", "mini-emotion6", "mini-flickr", "mini-instagram")


def _compose(
    rng: np.random.Generator, label: str, evidence: str, domain: Mapping[str, Any], pools: Mapping[str, list[str]]
) -> tuple[list[str], Background]:
    """Choose objects and background so that the emotion shows only where `evidence` says."""
    moods = resource("lexicon.yaml", "labels")[domain["taxonomy"]]
    count, telling = int(rng.integers(2, 4)), int(rng.integers(1, 3))
    objects = [] if evidence == "mood" else rng.choice(pools[label], telling, replace=False).tolist()
    objects += rng.choice(pools[""], count - len(objects), replace=False).tolist()
    mood = str(rng.choice(moods[label]))
    if evidence == "content":
        others = [m for other, names in moods.items() if other != label for m in names]
        mood = str(rng.choice(others)) if rng.random() < domain["off_mood"] else "neutral"
    return objects, mood_background(rng, mood)


def _swap_labels(rng: np.random.Generator, labels: list[str], share: float) -> list[str]:
    """Label noise as swaps between two images of different classes: the class counts stay as they are."""
    given, order = list(labels), rng.permutation(len(labels)).tolist()
    for _ in range(round(share * len(labels) / 2)):
        i = order.pop()
        j = next(k for k in order if labels[k] != labels[i])
        order.remove(j)
        given[i], given[j] = labels[j], labels[i]
    return given


def draw_dataset(name: str, folder: Path, sizes: Mapping[str, int]) -> pd.DataFrame:
    """Draw one of the datasets in `DRAWN`, byte-equal every time: `folder/images/<split>/<label>/<number>.png`.

    `sizes` are images per split; fewer than classes raise `EmonbError`. Returns one row per image, with `COLUMNS`:
    path (relative to folder), label (after noise), evidence (content, mood or both), noisy (label was swapped), ...
    """
    domain = resource("lexicon.yaml", "datasets")[name]
    labels, own, pools = TAXONOMIES[domain["taxonomy"]].labels, np.random.default_rng(zlib.crc32(name.encode())), {}
    for label in ("", *labels):  # the glyphs that this dataset uses, "": neutral ones; fixed by its name
        names = glyph_names(domain["taxonomy"], label)
        keep = own.permutation(len(names))[: max(3, round(domain["glyphs"] * len(names)))]
        pools[label] = [names[i] for i in sorted(keep)]
    camera = Camera(domain["grain"], domain["saturation"], domain["contrast"], domain["vignette"])
    rows = []
    for number, split in enumerate(SPLITS):
        size = sizes[split]
        if size < len(labels):
            raise EmonbError(f"dataset {name}: {split} has {size} images for {len(labels)} classes; raise world sizes")
        rng = np.random.default_rng([0, zlib.crc32(name.encode()), number])
        latent = [labels[i % len(labels)] for i in rng.permutation(size)]
        evidence = rng.choice(("content", "mood", "both"), size, p=domain["evidence"]).tolist()
        given = _swap_labels(rng, latent, domain["noise"])
        for label in labels:
            (folder / "images" / split / label).mkdir(parents=True, exist_ok=True)
        for i in range(size):
            objects, background = _compose(rng, latent[i], evidence[i], domain, pools)
            pixels, scene = draw_scene(rng, objects, background, camera)
            image_id = f"{split}/{given[i]}/{i:05d}"
            path = f"images/{image_id}.png"
            Image.fromarray(pixels).save(folder / path, compress_level=1)
            told = (scene.caption, list(scene.objects), scene.phrase, evidence[i], given[i] != latent[i])
            rows.append((image_id, path, split, given[i], *told))
    return pd.DataFrame(rows, columns=COLUMNS)
