"""Synthetic predictions in the contract's layout: models of chosen accuracies, partly right together."""

import numpy as np
import pandas as pd

from emonb.data import taxonomy_for_dataset
from emonb.predictions import make_predictions

ACCURACY = {
    "vlm_zero_shot": 0.45, "vlm_tuned": 0.62, "vlm_generated": 0.6, "vit": 0.57, "resnet": 0.52, "vgg": 0.5,
    "head": 0.6, "head_alpha0": 0.56, "head_alpha0.25": 0.58, "head_alpha0.75": 0.59, "head_alpha1": 0.58,
    "head_depth2": 0.58, "head_depth3": 0.58, "head_depth4": 0.57, "head_depth5": 0.56, "emovlmkd": 0.66,
    "gate_bilinear": 0.6, "gate_moe": 0.62, "gate_dynamic": 0.63, "gate_cross": 0.65, "gate_concat_logits": 0.6,
    "gate_concat_soft": 0.65, "gate_concat_val": 0.6, "gate_concat_oof": 0.64, "gate_depth2": 0.63,
    "gate_depth3": 0.63, "gate_depth4": 0.62, "gate_depth5": 0.6, "head_depth1_x1": 0.58, "head_depth2_x1": 0.57,
    "head_depth5_x1": 0.5, "head_depth1_x0.125": 0.5, "head_depth2_x0.125": 0.4, "head_depth5_x0.125": 0.3,
    "average_vlm_head": 0.64, "average_vlm_vit": 0.63, "probe": 0.55,
}  # fmt: skip
SEEDED = ("head", "emovlmkd", "gate")


def truth(dataset: str, n: int) -> list[str]:
    """True labels of n test images, all classes in turn."""
    labels = taxonomy_for_dataset(dataset).labels
    return [labels[i % len(labels)] for i in range(n)]


def partly(label, hits, labels):
    """Answers that are right where `hits` says so, else the emotion before."""
    return [name if hit else labels[labels.index(name) - 1] for name, hit in zip(label, hits, strict=True)]


def rated(dataset: str, n: int) -> pd.DataFrame:
    """A sample table with raters' shares: true emotion 0.5, the next 0.25, neutral 0.25; of one image all neutral."""
    labels = list(taxonomy_for_dataset(dataset).labels)
    pattern = np.r_[0.5, 0.25, np.zeros(len(labels) - 2)]
    shares = np.array([np.roll(pattern, labels.index(x)) for x in truth(dataset, n)])
    frame = pd.DataFrame(shares, columns=[f"share_{label}" for label in labels]).assign(share_neutral=0.25)
    frame.iloc[0] = [*[0.0] * len(labels), 1.0]
    frame = pd.concat([frame.assign(split=split, image_id=[f"{split}/{i:05d}.png" for i in range(n)])
                       for split in ("train", "test")], ignore_index=True)  # fmt: skip
    frame.attrs["labels"] = labels
    return frame


def frame_of(answers, label, labels, *, seed=0, split="test", rng=None, parsed=None):
    """A prediction frame that gives these answers (names), with some probability on every class."""
    rng, rows = rng or np.random.default_rng(0), np.arange(len(label))
    logits = rng.normal(size=(len(label), len(labels)))
    logits[rows, [labels.index(a) for a in answers]] = logits.max(axis=1) + 3 * rng.uniform(0.2, 1, len(label))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = [f"{split}/{i:05d}.png" for i in rows]
    return make_predictions(ids, [split] * len(ids), label, p, labels, seed=seed, parsed=parsed)


def synthetic(datasets=("mini-fi", "mini-emotion6", "mini-flickr"), n=120, seeds=(0, 1, 2), models=None):
    """{(dataset, model): frame}: each model's errors come half from the image, half from itself."""
    found = {}
    for d, dataset in enumerate(datasets):
        labels, rng = taxonomy_for_dataset(dataset).labels, np.random.default_rng(d)
        label, hard = truth(dataset, n), rng.uniform(size=n)
        for model in models or ACCURACY:
            frames = []
            for seed in seeds if model.startswith(SEEDED) else seeds[:1]:
                trouble = (hard + rng.uniform(size=n)) / 2
                right = trouble < np.quantile(trouble, ACCURACY[model])
                step = np.where(right, 0, rng.integers(1, len(labels), size=n))
                answers = [labels[(labels.index(x) + k) % len(labels)] for x, k in zip(label, step, strict=True)]
                size = max(8, n // 8) if model == "vlm_generated" else n
                parsed = np.arange(size) % 10 > 0 if model == "vlm_generated" else None
                frames.append(frame_of(answers[:size], label[:size], labels, seed=seed, rng=rng, parsed=parsed))
            found[dataset, model] = pd.concat(frames, ignore_index=True)
    return found


def drawn_of(predictions, datasets):
    """What the drawn world would say of the images: {dataset: table by image_id}; every tenth label is noise."""
    found = {}
    for dataset in datasets:
        label = predictions[dataset, "vit"].drop_duplicates("image_id").set_index("image_id")["label"]
        order, names = np.arange(len(label)), list(taxonomy_for_dataset(dataset).labels)
        table = pd.DataFrame({"label": label, "evidence": np.array(["content", "mood", "both"])[order // 2 % 3]})
        table = table.assign(off_mood=(table["evidence"] == "content") & (order % 2 == 0), noisy=order % 10 == 9)
        found[dataset] = table.assign(drawn_as=partly(label, ~table["noisy"], names))
    return found
