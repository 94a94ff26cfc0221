"""Answers by scored candidates against answers by greedy generation: speed, agreement, share unparsable.

    python -m tools.bench.scoring --images 256

Both ask the tuned stand-in the same question about the same test images, in the same batches, from the file on disk.
Writes `scoring.json`.
"""

from __future__ import annotations

import numpy as np
import torch

from emonb.data import parse_emotion, question
from emonb.vlm import answer_distribution, generate, visual_tokens
from tools.bench.common import DATASET, arguments, clock, save, small_run, tuned


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args()
    run = small_run(options)
    test, labels, terms = run.samples(DATASET, "test").head(options.images), run.labels(DATASET), run.settings.vlm
    batches = [test["path"].iloc[i : i + terms.batch_size].tolist() for i in range(0, len(test), terms.batch_size)]
    with tuned(run) as vlm:
        generate(vlm, batches[0][:4], question(labels), 4)  # warm up
        with clock() as scoring:
            scores = [answer_distribution(vlm, visual_tokens(vlm, paths), labels) for paths in batches]
        with clock() as generating:
            texts = [generate(vlm, paths, question(labels), terms.max_new_tokens) for paths in batches]
    truth, scored = test["label"].to_numpy(), np.array(labels)[torch.cat(scores).argmax(-1).numpy()]
    written = np.array([parse_emotion(text, labels) or "" for part in texts for text in part])
    found = {
        "images": len(test),
        "seconds_scoring": scoring["seconds"],
        "seconds_generating": generating["seconds"],
        "ratio": generating["seconds"] / scoring["seconds"],
        "peak_memory_mb": {"scoring": scoring["peak_memory_mb"], "generating": generating["peak_memory_mb"]},
        "agreement_percent": 100 * np.mean(scored == written),
        "unparsable_percent": 100 * np.mean(written == ""),
        "accuracy_percent": {"scoring": 100 * np.mean(scored == truth), "generating": 100 * np.mean(written == truth)},
    }
    save(options.out, "scoring", found)


if __name__ == "__main__":
    main()
