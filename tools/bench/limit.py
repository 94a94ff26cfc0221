"""How close the run is to its limit: one pass over the images against the bare forward, and all ablations against it.

    python -m tools.bench.limit

The one pass is what the stages `features` and `vlm_predictions` do with every image of a drawn dataset, from the file
on disk to the stored result, and the teacher's logits. The bare forward is the same three networks on tensors that
already lie in memory, in the same batches: no decoding, no patches, no tokenizer, nothing written. The ablations are
the stages `head` and `gate`: head, depths, alphas and all gates, for every seed of the settings.

Writes `limit.json`: seconds of the three with their parts, and the two shares with their goals.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from emonb.run import Run
from emonb.teacher import LAYOUT, Pictures, colours_of, load_network, predict_network
from emonb.vlm import VLM, answer_tokens, make_batch, patches, visual_tokens
from tools.bench.common import DATASET, arguments, save, small_run, tuned

MEASURED = ("features", "vlm_predictions", "head", "gate")  # made anew each time
GOALS = {"one_pass_over_bare_forward": 1.3, "ablations_over_one_pass": 0.1}


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bare(run: Run, vlm: VLM, net: nn.Module, pictures: Pictures) -> dict[str, float]:
    """Seconds of the three networks alone, on prepared tensors, in the batches of the stages."""
    paths, size, labels = run.samples(DATASET)["path"].tolist(), run.settings.vlm.batch_size, run.labels(DATASET)
    cut = [patches(vlm, paths[i : i + size]) for i in range(0, len(paths), size)]
    prefix, tails = answer_tokens(vlm, labels)
    if max(map(len, tails)) > 1:
        raise SystemExit("a label of several tokens: the bare forward here is of one; use another dataset")
    seen = [visual_tokens(vlm, (), part) for part in cut]
    prompts = [make_batch(vlm, [prefix] * len(visual), visual, pad_left=True) for visual in seen]
    ready = [t.to(**LAYOUT) for t in torch.stack([picture for picture, _ in pictures]).split(128)]
    networks = {
        "vision tower": lambda: [vlm.core.get_image_features(*part, return_dict=True) for part in cut],
        "language model": lambda: [vlm.model(**prompt, use_cache=False, logits_to_keep=1) for prompt in prompts],
        "teacher": lambda: [net(images) for images in ready],
    }
    with torch.inference_mode():
        return {name: min(timed(call), timed(call)) for name, call in networks.items()}  # the first warms up


def main() -> None:
    options = arguments(__doc__).parse_args()
    run = small_run(options, force=",".join(MEASURED))
    made = {"teacher": run.make("teacher")[DATASET, "vit"]} | {stage: run.make(stage)[DATASET] for stage in MEASURED}
    seconds = {stage: artifact.provenance["seconds"] for stage, artifact in made.items()}
    net, config, labels = load_network(made["teacher"].path)
    frame, colours = run.samples(DATASET), colours_of(config.name, config.pretrained, config.weights)
    targets = [labels.index(label) for label in frame["label"]]
    pictures = Pictures(frame["path"].tolist(), targets, config.image_size, colours)
    one_pass = {"features": seconds["features"], "tuned answers": seconds["vlm_predictions"]}
    one_pass["teacher logits"] = timed(lambda: predict_network(net, pictures))
    with tuned(run) as vlm:
        forward = bare(run, vlm, net, pictures)
    ablations, terms = {"heads": seconds["head"], "gates": seconds["gate"]}, run.settings
    trained = {"heads": len(terms.distill.heads), "gates": len(terms.gates), "seeds": len(terms.seeds)}
    totals = [sum(part.values()) for part in (one_pass, forward, ablations)]
    shares = {"one_pass_over_bare_forward": totals[0] / totals[1], "ablations_over_one_pass": totals[2] / totals[0]}
    found = {
        "images": len(frame),
        **dict(zip(("one_pass_seconds", "bare_forward_seconds", "ablations_seconds"), totals, strict=True)),
        "parts": {"one pass": one_pass, "bare forward": forward, "ablations": ablations},
        "trained": trained,
        **shares,
        "goals": {name: {"at_most": goal, "met": shares[name] <= goal} for name, goal in GOALS.items()},
    }
    save(options.out, "limit", found)


if __name__ == "__main__":
    main()
