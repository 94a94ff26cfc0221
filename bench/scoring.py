"""Answers by scored candidates against answers by greedy generation: speed, agreement, share unparsable.

    python bench/scoring.py --images 256

Both ask the tuned stand-in the same question about the same test images, in the same batches, from the file on disk.
Writes `scoring.json`.
"""

from __future__ import annotations

import time

import torch
from measure import DATASET, arguments, clock, save, small_run, tuned

from emonb.emotions import parse_emotion
from emonb.samples import read_samples, sample_labels
from emonb.triplets import categorical_instruction
from emonb.vlm import answer_distribution, generate, visual_tokens


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args()
    start = time.monotonic()
    settings, store = small_run(options.out)
    samples = store.find("samples", DATASET)
    test, labels = read_samples(samples, "test", ["path", "label"]).head(options.images), sample_labels(samples)
    size, question = settings.vlm.batch_size, categorical_instruction(labels)
    batches = [test["path"].iloc[i : i + size].tolist() for i in range(0, len(test), size)]
    with tuned(settings, store) as vlm:
        generate(vlm, batches[0][:4], question, 4)  # warm up
        with clock() as scoring:
            scores = [answer_distribution(vlm, visual_tokens(vlm, paths), labels) for paths in batches]
        with clock() as generating:
            texts = [generate(vlm, paths, question, settings.vlm.max_new_tokens) for paths in batches]
    scored = [labels[i] for i in torch.cat(scores).argmax(-1).tolist()]
    written = [parse_emotion(text, labels) for part in texts for text in part]
    parsed = [(a, b, truth) for a, b, truth in zip(scored, written, test["label"], strict=True) if b is not None]
    n = len(test)
    found = {
        "images": n,
        "seconds_scoring": scoring["seconds"],
        "seconds_generating": generating["seconds"],
        "ratio": generating["seconds"] / scoring["seconds"],
        "peak_memory_mb": {"scoring": scoring["peak_memory_mb"], "generating": generating["peak_memory_mb"]},
        "agreement_percent": 100 * sum(a == b for a, b, _ in parsed) / n,
        "unparsable_percent": 100 * (n - len(parsed)) / n,
        "accuracy_percent": {
            "scoring": 100 * sum(a == t for a, t in zip(scored, test["label"], strict=True)) / n,
            "generating": 100 * sum(b == t for _, b, t in parsed) / n,
        },
    }
    save(options.out, "scoring", found, time.monotonic() - start)
    print(f"scoring {scoring['seconds']:.1f} s, generating {generating['seconds']:.1f} s: {found['ratio']:.1f} x")


if __name__ == "__main__":
    main()
