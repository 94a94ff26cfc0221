"""How long an import takes and how much memory it needs: EmoSet's size with placeholder pictures.

    python bench/import_scale.py --pictures 5000 20000 118102
    python bench/import_scale.py --lists FOLDER    # EmoSet's info.json, val.json, test.json: one import of each list

Every import runs in a process of its own. Each placeholder is a small JPEG (96 x 96 px, 2 kB) with a number in a
comment, so that no two are the same file: decoding is much cheaper than for real photos, and what is measured is
all the rest. Prints pictures, seconds, peak memory and its growth in bytes a picture against the row before.
Generated trees lie in a temporary folder (`--work`), which is removed.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from emonb.emotions import TAXONOMIES

LABELS = TAXONOMIES["mikels8"].labels
SHARES = {"train": 0.8, "val": 0.05, "test": 0.15}  # as EmoSet's own lists
CHILD = """
import resource, sys, time
from pathlib import Path
from emonb.imports import import_release
start = time.monotonic()
import_release("emoset", Path(sys.argv[1]), Path(sys.argv[2]), allow_missing_split=True, say=str)
print(time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def jpegs() -> list[bytes]:
    """One small JPEG an emotion."""
    found = []
    for seed in range(len(LABELS)):
        pixels = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found


def release(root: Path, lists: dict[str, list[list[str]]]) -> Path:
    """An EmoSet release with these lists, a placeholder and an annotation for every row."""
    pictures = dict(zip(LABELS, jpegs(), strict=True))
    for emotion in LABELS:
        for folder in ("image", "annotation"):
            (root / folder / emotion).mkdir(parents=True, exist_ok=True)
    for n, (emotion, *_, image, annotation) in enumerate(row for rows in lists.values() for row in rows):
        comment = str(n).zfill(8).encode()
        whole = pictures[emotion]
        (root / image).write_bytes(
            whole[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + whole[2:]
        )
        found = {"image_id": Path(image).stem, "emotion": emotion, "scene": "dark_street", "object": ["Tree", "Dog"]}
        (root / annotation).write_text(json.dumps(found))
    for split, rows in lists.items():
        (root / f"{split}.json").write_text(json.dumps(rows, indent=2))
    (root / "info.json").write_text(json.dumps({"emotion": {"label2idx": {e: i for i, e in enumerate(LABELS)}}}))
    return root


def made_up(n: int) -> dict[str, list[list[str]]]:
    """Lists of n pictures in all, in EmoSet's shares and with names like EmoSet's."""
    lists: dict[str, list[list[str]]] = {split: [] for split in SHARES}
    ends = np.cumsum(list(SHARES.values()))
    for i in range(n):
        split = list(SHARES)[int(np.searchsorted(ends, (i + 0.5) / n))]
        emotion = LABELS[i % len(LABELS)]
        stem = f"{emotion}/{emotion}_{i:05d}"
        lists[split].append([emotion, f"image/{stem}.jpg", f"annotation/{stem}.json"])
    return lists


def measured(lists: dict[str, list[list[str]]], work: Path) -> tuple[float, float]:
    """Seconds and peak bytes of one import in a fresh process."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        source = release(Path(folder) / "source", lists)
        command = [sys.executable, "-c", CHILD, str(source), f"{folder}/out"]
        seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="*", default=[])
    parser.add_argument("--lists", type=Path, help="folder of official lists")
    parser.add_argument("--work", type=Path, help="where the trees are made; default: the system's")
    options = parser.parse_args()
    jobs = {f"{n} made up": made_up(n) for n in options.pictures}
    if options.lists:
        names = [s for s in SHARES if (options.lists / f"{s}.json").is_file()]
        jobs |= {f"official {s}": {s: json.loads((options.lists / f"{s}.json").read_text())} for s in names}
    before = None
    for what, lists in jobs.items():
        start = time.monotonic()
        n = sum(map(len, lists.values()))
        seconds, peak = measured(lists, options.work)
        grown = f"{(peak - before[1]) / (n - before[0]):6.0f} B a picture more" if before and n > before[0] else ""
        made = time.monotonic() - start - seconds
        print(
            f"{what}: {n} pictures, {seconds:.1f} s, peak {peak / 2**20:.0f} MB {grown} (made in {made:.0f} s)",
            flush=True,
        )
        before = (n, peak)


if __name__ == "__main__":
    main()
