"""Miniature releases of every format, built in a test's folder as they would be after unpacking."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pipeline
from PIL import Image

from emonb.data import TAXONOMIES
from emonb.pipeline import samples
from emonb.releases.imports import import_release
from emonb.settings import load_settings
from emonb.store import Store

MIKELS = TAXONOMIES["mikels8"].labels
EKMAN = TAXONOMIES["ekman6"].labels
PAIR = {"positive": (220, 60, 40), "negative": (40, 60, 220)}
GREY = (120, 120, 120)
paint = partial(pipeline.paint, size=(24, 24))


def stage(root: Path, name: str, out: Path | None = None, **settings: Any):
    """The result of the stage `samples` for the dataset `root/name`."""
    settings = load_settings("smoke", datasets=name, images=str(root), out=str(out or root / "out"), **settings)
    recipe = samples(SimpleNamespace(settings=settings), name)
    return Store(settings.out_path / "artifacts").get("samples", name, recipe)


def bring(form: str, source: Path, out: Path, **options):
    """Import; returns the sample table, the report and the lines said."""
    lines = []
    folder = import_release(form, source, out, say=lines.append, **options)
    report = json.loads((folder / "integrity.json").read_text())
    return pd.read_parquet(folder / "samples.parquet"), report, lines


def state(root: Path) -> list[tuple]:
    """Names, sizes and times of a folder and everything below it."""
    return sorted((str(p), (s := p.lstat()).st_size, s.st_mtime_ns, s.st_ctime_ns) for p in (root, *root.rglob("*")))


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    """A picture as the bytes of a file."""
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def make_release(form: str, root: Path) -> Path:
    """A release of a format below `root`."""
    makers = {"emoset": emoset, "emotion6": emotion6, "fi": fi, "oasis": oasis, "bass": bass, "list": listed}
    if form == "folder":
        return make_tree(root, {"": 10}, MIKELS)
    return makers.get(form, make_tree)(root)


def make_tree(root: Path, sizes: dict[str, int] | None = None, labels: tuple[str, ...] = (*PAIR,)) -> Path:
    """`<split>/<emotion>/<n>.jpg`, of Flickr's and Instagram's emotions if no others; {"": n}: without splits."""
    for s, (split, n) in enumerate((sizes or {"train": 3, "val": 2, "test": 2}).items()):
        for e, emotion in enumerate(labels):
            for i in range(n):
                paint(root / split / emotion / f"{i}.jpg", (20 * e, 90, 200), seed=1000 * s + 100 * e + i)
    return root


def listed(root: Path, write: Callable[[pd.DataFrame, Path], Any] | None = None, n: int = 3) -> Path:
    """`labels.csv` (path, label, split) and pictures in one folder, as a list of Mikels' emotions; or other files."""
    rows = [(f"photos/{split}{e}{i}.jpg", emotion, split) for split in ("train", "val", "test")
            for e, emotion in enumerate(MIKELS) for i in range(n)]  # fmt: skip
    for k, (path, _, _) in enumerate(rows):
        paint(root / path, (20 * (k % 8), 90, 200), seed=k)
    table = pd.DataFrame(rows, columns=["path", "label", "split"])
    write(table, root) if write else table.to_csv(root / "labels.csv", index=False)
    return root


def emoset(root: Path, with_id: bool = False, sizes: dict[str, int] | None = None) -> Path:
    """Lists, pictures and annotations; `with_id`: rows of four."""
    for split, n in (sizes or {"train": 2, "val": 1, "test": 1}).items():
        rows = []
        for e, emotion in enumerate(MIKELS):
            for i in range(n):
                stem = f"{emotion}_{split}_{i:05d}"
                image, annotation = f"image/{emotion}/{stem}.jpg", f"annotation/{emotion}/{stem}.json"
                paint(root / image, (20 * e, 90, 200 - 20 * e), seed=100 * e + i + 1000 * len(split))
                (root / annotation).parent.mkdir(parents=True, exist_ok=True)
                found = {"image_id": stem, "emotion": emotion, "brightness": 0.5, "colorfulness": 0.4}
                found |= {"scene": "dark_street", "object": ["Street light", "Dog"]} if i == 0 else {}
                (root / annotation).write_text(json.dumps(found))
                rows.append([emotion, *([stem] if with_id else []), image, annotation])
        (root / f"{split}.json").write_text(json.dumps(rows))
    table = {label: i for i, label in enumerate(MIKELS)}
    (root / "info.json").write_text(json.dumps({"emotion": {"label2idx": table}, "scene": {"label2idx": {}}}))
    return root


def emotion6(root: Path, n: int = 10) -> Path:
    """Pictures by searched word, probabilities by raters; the last two are a tie and a neutral one."""
    lines = [(f"{e}/{i + 1}.jpg", [0.7 if e == x else 0.05 for x in (*EKMAN, "")]) for e in EKMAN for i in range(n)]
    lines += [("fear/tie.jpg", [0.4, 0, 0.4, 0, 0.2, 0, 0]), ("joy/neutral.jpg", [0, 0, 0.1, 0, 0.3, 0, 0.6])]
    for k, (name, _) in enumerate(lines):
        paint(root / "images" / name, (20 * (k % 10), 90, 3 * k), seed=k)
    text = ["\t".join([name, "4.5", "5.1", *map(str, shares)]) for name, shares in lines]
    names = ["[image_filename]", "[valence]", "[arousal]", *(f"[prob. {e}]" for e in (*EKMAN, "neutral"))]
    (root / "ground_truth.txt").write_text("\n".join(["\t".join(names), *text]) + "\n")
    return root


def fi(root: Path) -> Path:
    """`emotion_dataset/<emotion>/*.jpg` with a placeholder of five copies, and one picture under two emotions."""
    emotions = make_tree(root / "emotion_dataset", {"": 10}, MIKELS)
    for name, seed in (*((f"awe/removed{i}", 9) for i in range(5)), ("fear/both", 8), ("sadness/both", 8)):
        paint(emotions / f"{name}.jpg", GREY, seed)
    return root


def oasis(root: Path) -> Path:
    """`OASIS.csv` and `images/<Theme>.jpg`; every fifth theme ends with a space."""
    rows = [{"Theme": "Wall 1", "Valence_mean": 4.0}]
    for i in range(60):
        theme = f"Theme {_letters(i)} {i % 2 + 1}" + " " * (i % 5 == 0)
        rows.append({"Theme": theme, "Valence_mean": 6.1 if i // 2 % 2 else 1.9})
    for i, row in enumerate(rows):
        paint(root / "images" / f"{row['Theme'].strip()}.jpg", GREY, i)
    pd.DataFrame(rows).assign(Category="Object", Arousal_mean=3.0).to_csv(root / "OASIS.csv")
    return root


def bass(root: Path) -> Path:
    """`BASS_data.csv` and `images/*.png`."""
    rows = [{"file_name": "middle.png", "val_mean_us": 5.0, "keywords": ""}]
    for i in range(60):
        name = f"{_letters(i)}{'' if i % 2 == 0 else 2}.png"
        rows.append({"file_name": name, "val_mean_us": 7.0 if i // 2 % 2 else 2.0, "keywords": "a, b"})
        paint(root / "images" / name, GREY, seed=i)
    pd.DataFrame(rows).to_csv(root / "BASS_data.csv", index=False)
    return root


def _letters(i: int) -> str:
    return f"{chr(97 + i // 2 % 26)}{'x' * (i // 52)}"
