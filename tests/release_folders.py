"""Miniature releases of every format, built in a test's folder as they would be after unpacking."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from pipeline import paint

from emonb.emotions import TAXONOMIES

MIKELS = TAXONOMIES["mikels8"].labels
EKMAN = TAXONOMIES["ekman6"].labels
PAIR = {"positive": (220, 60, 40), "negative": (40, 60, 220)}
SMALL = (24, 24)
GREY = (120, 120, 120)
FORMS = ("emoset", "emotion6", "fi", "flickr", "instagram", "oasis", "bass", "folder")


def make_release(form: str, root: Path, **options) -> Path:
    """A release of a format below `root`."""
    makers = {"emoset": emoset, "emotion6": emotion6, "fi": fi, "oasis": oasis, "bass": bass, "folder": fi_tree}
    return makers.get(form, sentiment)(root, **options)


def emoset(root: Path, with_id: bool = False, sizes: dict[str, int] | None = None) -> Path:
    """Lists, pictures and annotations; `with_id`: rows of four."""
    for split, n in (sizes or {"train": 2, "val": 1, "test": 1}).items():
        rows = []
        for e, emotion in enumerate(MIKELS):
            for i in range(n):
                stem = f"{emotion}_{split}_{i:05d}"
                image, annotation = f"image/{emotion}/{stem}.jpg", f"annotation/{emotion}/{stem}.json"
                paint(root / image, (20 * e, 90, 200 - 20 * e), seed=100 * e + i + 1000 * len(split), size=SMALL)
                (root / annotation).parent.mkdir(parents=True, exist_ok=True)
                found = {"image_id": stem, "emotion": emotion, "brightness": 0.5, "colorfulness": 0.4}
                found |= {"scene": "dark_street", "object": ["Street light", "Dog"]} if i == 0 else {}
                found |= {"facial_expression": "happy", "human_action": "playing_guitar"} if emotion == "awe" else {}
                (root / annotation).write_text(json.dumps(found))
                rows.append([emotion, *([stem] if with_id else []), image, annotation])
        (root / f"{split}.json").write_text(json.dumps(rows))
    table = {label: i for i, label in enumerate(MIKELS)}
    (root / "info.json").write_text(json.dumps({"emotion": {"label2idx": table}, "scene": {"label2idx": {}}}))
    return root


def emotion6(root: Path, header: bool = True, n: int = 10) -> Path:
    """Pictures by searched word, probabilities by raters; the last two are a tie and a neutral one."""
    lines = []
    for e, emotion in enumerate(EKMAN):
        for i in range(n):
            shares = [0.05] * 7
            shares[e] = 0.7
            lines.append((f"{emotion}/{i + 1}.jpg", shares))
    lines.append(("fear/tie.jpg", [0.4, 0, 0.4, 0, 0.2, 0, 0]))
    lines.append(("joy/neutral.jpg", [0, 0, 0.1, 0, 0.3, 0, 0.6]))
    for k, (name, _) in enumerate(lines):
        paint(root / "images" / name, (20 * (k % 10), 90, 3 * k), seed=k, size=SMALL)
    text = [
        "\t".join([name, "4.5", "5.1", *map(str, shares)]) for name, shares in lines
    ]  # the official header is in brackets
    names = ["[image_filename]", "[valence]", "[arousal]", *(f"[prob. {e}]" for e in (*EKMAN, "neutral"))]
    (root / "ground_truth.txt").write_text("\n".join(["\t".join(names), *text] if header else text) + "\n")
    return root


def fi_tree(root: Path, n: int = 10) -> Path:
    """`<emotion>/*.jpg`."""
    for e, emotion in enumerate(MIKELS):
        for i in range(n):
            paint(root / emotion / f"{i}.jpg", (20 * e, 90, 200), seed=100 * e + i, size=SMALL)
    return root


def fi(root: Path, n: int = 10) -> Path:
    """`emotion_dataset/<emotion>/*.jpg` with a placeholder of five copies, and one picture under two emotions."""
    tree = fi_tree(root / "emotion_dataset", n)
    for i in range(5):
        paint(tree / "awe" / f"removed{i}.jpg", GREY, seed=9, size=SMALL)
    for emotion in ("fear", "sadness"):
        paint(tree / emotion / "both.jpg", (1, 2, 3), seed=8, size=SMALL)
    return root


def sentiment(root: Path, sizes: dict[str, int] | None = None) -> Path:
    """Flickr and Instagram: with split folders, or without where `sizes` is {"": n}."""
    for s, (split, n) in enumerate((sizes or {"train": 3, "val": 2, "test": 2}).items()):
        for e, (emotion, color) in enumerate(PAIR.items()):
            for i in range(n):
                paint(root / split / emotion / f"{i}.jpg", color, seed=1000 * s + 100 * e + i, size=SMALL)
    return root


def oasis(root: Path, n: int = 30) -> Path:
    """`OASIS.csv` and `images/<Theme>.jpg`; every fifth theme ends with a space."""
    rows = []
    for i in range(2 * n):
        theme = f"Theme {chr(97 + i // 2 % 26)}{'x' * (i // 52)} {i % 2 + 1}" + " " * (i % 5 == 0)
        paint(root / "images" / f"{theme.strip()}.jpg", PAIR["positive" if i // 2 % 2 else "negative"], i, SMALL)
        rows.append({"Theme": theme, "Category": "Object", "Valence_mean": 6.1 if i // 2 % 2 else 1.9})
    paint(root / "images" / "Wall 1.jpg", GREY, 1, SMALL)
    rows.append({"Theme": "Wall 1", "Category": "Object", "Valence_mean": 4.0})
    pd.DataFrame(rows).assign(Arousal_mean=3.0).to_csv(root / "OASIS.csv")
    return root


def bass(root: Path, n: int = 60) -> Path:
    """`BASS_data.csv` and `images/*.png`."""
    rows = []
    for i in range(n):
        name = f"{'abcdefghijklmnopqrstuvwxyz'[i // 2 % 26]}{'x' * (i // 52)}{'' if i % 2 == 0 else 2}.png"
        paint(root / "images" / name, PAIR["positive" if i // 2 % 2 else "negative"], seed=i, size=SMALL)
        rows.append({"file_name": name, "val_mean_us": 7.0 if i // 2 % 2 else 2.0, "keywords": "a, b"})
    rows.append({"file_name": "middle.png", "val_mean_us": 5.0, "keywords": ""})
    pd.DataFrame(rows).to_csv(root / "BASS_data.csv", index=False)
    return root
