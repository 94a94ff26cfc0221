"""Time and peak memory of import and stages as the dataset grows: the work must grow with it, the memory must not.

    python -m tools.bench.growth --pictures 1000 4000 16000

Made-up pictures in EmoSet's form (96 px, 2 kB, a number in a comment, so that no two are the same file), the stand-in
VLM, and so few epochs that the training says nothing: what is measured is how a stage reads, computes and writes.
Decoding is much cheaper than for real photos. Import and every stage run in a process of their own, forked after the
libraries are imported, so that start and imports do not count as their time.

Writes `growth.json`. Each part's time is set against a straight line: `time_exponent` is the slope of log seconds over
log pictures between the two largest sizes (1 = linear), and `bytes_per_picture` the growth of the peak memory.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from emonb.data import TAXONOMIES
from emonb.releases.imports import import_release
from emonb.run import open_run
from tools.bench.common import arguments, clock, save

LABELS = TAXONOMIES["mikels8"].labels
SHARES = {"train": 0.8, "val": 0.05, "test": 0.15}  # as EmoSet's own lists
PARTS = (
    "import", "samples", "triplets", "features", "base_predictions", "adapter", "vlm_predictions", "teacher", "head",
    "gate",
)  # fmt: skip
STEPS, BATCH = 40, 32  # LoRA steps at every size, triplets in each (as in the profile)
PROFILE = """
datasets: [emoset]
vlm: {base: stand-in, dtype: float32, quantize_4bit: false, batch_size: 64, epochs: EPOCHS,
  train_batch_size: 32, gradient_accumulation: 1, gradient_checkpointing: false, lora_dropout: 0,
  reasons: 8, max_new_tokens: 8}
teacher:
  networks:
    vit: {name: vit_tiny_patch16_224, image_size: 32, epochs: 1, batch_size: 64, lr: 1.0e-3,
      kwargs: {patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}}
distill: {epochs: 1, batch_size: 256, depths: [[1024]], lengths: [], alphas: [0.0, 0.5]}
gate: {epochs: 1, batch_size: 256, kinds: [concat, cross]}
"""
FORK = multiprocessing.get_context("fork")  # the parent computes nothing, so that no thread is lost in the fork


def made_up(root: Path, n: int) -> None:
    """An EmoSet release of n pictures in EmoSet's shares, with names like EmoSet's and an annotation for each."""
    pictures, rows = {}, {split: [] for split in SHARES}
    for seed, emotion in enumerate(LABELS):
        pixels, buffer = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8), io.BytesIO()
        Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        pictures[emotion] = buffer.getvalue()
        for folder in ("image", "annotation"):
            (root / folder / emotion).mkdir(parents=True)
    for i in range(n):
        split = list(SHARES)[int(np.searchsorted(np.cumsum(list(SHARES.values())), (i + 0.5) / n))]
        emotion = LABELS[i % len(LABELS)]
        image, annotation = f"image/{emotion}/{emotion}_{i:05d}.jpg", f"annotation/{emotion}/{emotion}_{i:05d}.json"
        start, end = pictures[emotion][:2], pictures[emotion][2:]
        (root / image).write_bytes(start + b"\xff\xfe\x00\x0a" + b"%08d" % i + end)  # a comment of eight digits
        about = {"image_id": Path(image).stem, "emotion": emotion, "scene": "dark_street", "object": ["Tree", "Dog"]}
        (root / annotation).write_text(json.dumps(about))
        rows[split].append([emotion, image, annotation])
    for split, listed in rows.items():
        (root / f"{split}.json").write_text(json.dumps(listed))
    (root / "info.json").write_text(json.dumps({"emotion": {"label2idx": {e: i for i, e in enumerate(LABELS)}}}))


def made(part: str, work: Path) -> dict[str, float]:
    """Seconds and peak MB of the import, or of one stage."""
    os.environ["EMONB_HEADLESS"] = "1"
    if part == "import":
        with clock() as spent:
            import_release("emoset", work / "source", work / "images", say=str)
        return spent
    run = open_run(str(work / "growth.yaml"), images=str(work / "images"), out=str(work / "out"))
    (artifact,) = run.make(part).values()
    return {name: artifact.provenance[name] for name in ("seconds", "peak_memory_mb")}


def measured(n: int, work: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Part, and its seconds and peak MB, at n pictures."""
    shutil.rmtree(work, ignore_errors=True)
    made_up(work / "source", n)
    epochs = STEPS * BATCH / (3 * SHARES["train"] * n)  # three triplets a picture
    (work / "growth.yaml").write_text(PROFILE.replace("EPOCHS", f"{epochs}"), encoding="utf-8")
    for part in PARTS:
        with ProcessPoolExecutor(1, mp_context=FORK) as pool:
            yield part, pool.submit(made, part, work).result()
    shutil.rmtree(work)


def grown(found: Mapping[int, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Per part, between the two largest sizes: how time and memory grow."""
    if len(found) < 2:
        return {}
    small, large = sorted(found)[-2:]
    rows = {}
    for name, high in found[large].items():
        low = found[small][name]
        more = (high["peak_memory_mb"] - low["peak_memory_mb"]) * 2**20
        slope = math.log(high["seconds"] / low["seconds"]) / math.log(large / small)
        rows[name] = {"time_exponent": slope, "bytes_per_picture": more / (large - small)}
    return rows


def main() -> None:
    parser = arguments(__doc__, run=False)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1000, 4000, 16000])
    options = parser.parse_args()
    found: dict[int, dict[str, dict[str, float]]] = {}
    for n in sorted(options.pictures):
        found[n] = {}
        for part, spent in measured(n, options.out.resolve() / "growth"):
            found[n][part] = spent
            print(f"{n} pictures, {part}: {spent['seconds']:.1f} s, {spent['peak_memory_mb']:.0f} MB", flush=True)
        save(options.out, "growth", {"lora_steps": STEPS, "sizes": found, "growth": grown(found)})


if __name__ == "__main__":
    main()
