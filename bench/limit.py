"""How close the run is to its limit: one pass over the images against the bare forward, and all ablations against it.

    python bench/limit.py

The one pass is what the stages `features` and `vlm_predictions` do with every image of a drawn dataset, from the file
on disk to the stored result, and the teacher's logits. The bare forward is the same three networks on tensors that
already lie in memory, in the same batches: no decoding, no patches, no tokenizer, nothing written. The ablations are
the stages `head` and `gate`: head, depths, alphas and all gates, for every seed of the settings.

Writes `limit.json`: `one_pass_seconds`, `bare_forward_seconds`, `ablations_seconds`, their parts, and the two shares
with the goals (at most 1.3 and at most 0.1).
"""

from __future__ import annotations

import time
from typing import Any

import pandas as pd
import torch
from measure import DATASET, arguments, save, small_run, tuned

from emonb.answers import predictions_stage
from emonb.distill import head_names, head_stage
from emonb.features import features_stage
from emonb.gate import gate_names, gate_stage
from emonb.samples import read_samples, sample_labels
from emonb.settings import SPLITS, Settings
from emonb.store import Store
from emonb.teacher import LAYOUT, Pictures, load_network, predict_network, teacher_stage
from emonb.visual import picture_inputs
from emonb.vlm import VLM, answer_tokens, load_vlm, make_batch, visual_tokens

MEASURED = ("features", "vlm_predictions", "head", "gate")  # made anew each time
GOALS = {"one_pass_over_bare_forward": 1.3, "ablations_over_one_pass": 0.1}


def stages(settings: Settings, store: Store) -> tuple[dict[str, float], float]:
    """Seconds of the measured stages, and of the teacher's logits of all images from their files."""
    vlm = load_vlm(settings.vlm)
    adapter = store.find("adapter", DATASET)
    made = {"features": features_stage(settings, store, DATASET, vlm)}
    made["vlm_predictions"] = predictions_stage(settings, store, DATASET, vlm, adapter)
    teacher = teacher_stage(settings, store, DATASET, "vit")
    made |= {"head": head_stage(settings, store, DATASET), "gate": gate_stage(settings, store, DATASET)}
    net, config, labels = load_network(teacher)
    samples = store.find("samples", DATASET)
    start = time.perf_counter()
    for split in SPLITS:
        predict_network(net, Pictures(read_samples(samples, split, ["path", "label"]), labels, config))
    logits = time.perf_counter() - start
    return {name: artifact.provenance["seconds"] for name, artifact in made.items()}, logits


def bare(settings: Settings, store: Store, vlm: VLM) -> dict[str, float]:
    """Seconds of the three networks alone, on prepared tensors, in the batches of the stages."""
    samples, size = store.find("samples", DATASET), settings.vlm.batch_size
    frame = pd.concat([read_samples(samples, s, ["path", "label"]) for s in SPLITS], ignore_index=True)
    paths, labels = frame["path"].tolist(), sample_labels(samples)
    batches = [paths[i : i + size] for i in range(0, len(paths), size)]
    pixels = [picture_inputs(vlm.processor, batch, vlm.max_side) for batch in batches]
    prefix, tails = answer_tokens(vlm, labels)
    if max(map(len, tails)) > 1:
        raise SystemExit("a label of several tokens: the bare forward here is of one; use another dataset")
    prompts = [make_batch(vlm, [prefix] * len(p), visual_tokens(vlm, p), pad_left=True) for p in pixels]
    net, config, _ = load_network(store.find("teacher", f"{DATASET}--vit"))
    shown = Pictures(frame, labels, config)
    ready = [t.to(**LAYOUT) for t in torch.stack([shown[i][0] for i in range(len(shown))]).split(128)]
    found = {}
    with torch.inference_mode():
        for name, run in {
            "vision tower": lambda: [vlm.core.get_image_features(p.pixel_values, p.grid) for p in pixels],
            "language model": lambda: [vlm.model(**p, use_cache=False, logits_to_keep=1) for p in prompts],
            "teacher": lambda: [net(images) for images in ready],
        }.items():
            run()  # warm up
            start = time.perf_counter()
            run()
            found[name] = time.perf_counter() - start
    return found


def main() -> None:
    parser = arguments(__doc__)
    options = parser.parse_args()
    start = time.monotonic()
    settings, store = small_run(options.out)
    seconds, logits = stages(settings, Store(store.root, force=MEASURED))
    with tuned(settings, store) as vlm:
        forward = bare(settings, store, vlm)
    one_pass = {"features": seconds["features"], "tuned answers": seconds["vlm_predictions"], "teacher logits": logits}
    ablations = {"heads": seconds["head"], "gates": seconds["gate"]}
    totals = [sum(part.values()) for part in (one_pass, forward, ablations)]
    shares = {"one_pass_over_bare_forward": totals[0] / totals[1], "ablations_over_one_pass": totals[2] / totals[0]}
    found: dict[str, Any] = {
        "images": sum(len(read_samples(store.find("samples", DATASET), s, ["image_id"])) for s in SPLITS),
        "one_pass_seconds": totals[0],
        "bare_forward_seconds": totals[1],
        "ablations_seconds": totals[2],
        "parts": {"one pass": one_pass, "bare forward": forward, "ablations": ablations},
        "trained": {
            "heads": list(head_names(settings.distill)),
            "gates": list(gate_names(settings.gate)),
            "seeds": list(settings.seeds),
        },
        **shares,
        "goals": {name: {"at_most": goal, "met": shares[name] <= goal} for name, goal in GOALS.items()},
    }
    save(options.out, "limit", found, time.monotonic() - start)
    print(f"one pass {totals[0]:.1f} s, bare forward {totals[1]:.1f} s, ablations {totals[2]:.1f} s")


if __name__ == "__main__":
    main()
