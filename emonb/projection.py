"""From measured seconds to hours: what the datasets cost under our schedule and under the authors'.

Pure arithmetic, no torch: a rehearsal measures the costs, `bench` and the report read what follows. A cost that
was not measured is NaN and makes every sum that needs it NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from emonb.settings import Settings

__all__ = ["Schedule", "Size", "after_tuning", "authors", "dataset_size", "disk_bytes", "extrapolate", "ours"]

# Images of the paper's datasets as far as they are recorded: (train, val, test), or a total.
_RECORDED: dict[str, tuple[int, int, int] | int] = {
    "fi": 23_000,  # the paper: 23 k
    "emoset": (94_481, 5_905, 17_716),  # the official lists, 118,102 in all
    "emotion6": 1_980,  # the paper
}
UNKNOWN = 10_000  # images of a dataset of unknown size: hours are then "per 10,000 images"


@dataclass(frozen=True)
class Size:
    """Images of one dataset by split, and where the numbers come from."""

    name: str
    train: int
    val: int
    test: int
    source: str

    @property
    def total(self) -> int:
        """All images."""
        return self.train + self.val + self.test


def dataset_size(settings: Settings, name: str, given: int | None = None) -> Size:
    """Size of a dataset: recorded, that of a drawn one, `given`, or 10,000 images with a note that says so.

    A total is split 80/10/10, as an unsplit tree is on import (our choice: the paper prints no sizes of splits).
    """
    if name.startswith("mini-"):
        from emonb.scenes import lexicon

        return Size(name, *getattr(settings.world, lexicon()["datasets"][name]["taxonomy"]), "drawn")
    known = _RECORDED.get(name)
    if isinstance(known, tuple):
        return Size(name, *known, "official lists")
    total, source = (known, "size from the paper") if known else (given, "size as given")
    if total is None:
        total, source = UNKNOWN, "size not recorded here: per 10,000 images"
    part = round(total / 10)
    return Size(name, total - 2 * part, part, part, f"{source}, split 80/10/10")


@dataclass(frozen=True)
class Schedule:
    """How often the settings visit an image in each stage."""

    kinds: int  # triplets an image
    lora_epochs: float
    lora_batch: int  # sequences per optimizer update
    cached_tokens: bool  # whether visual tokens are kept on disk
    asked: int  # test images that get reasons and a free answer
    longest: int  # tokens of the longest generated answer
    shortest: int  # tokens of `{'emotion': 'anger'}`
    teacher: str
    networks: Mapping[str, int]  # epochs of each conventional network
    heads: int  # trained heads, ablations and seeds included
    head_epochs: int
    gates: int
    gate_epochs: int
    workers: int  # processes that decode pictures for the conventional networks

    @classmethod
    def of(cls, settings: Settings, *, heads: int, gates: int, shortest: int, workers: int) -> Schedule:
        """The schedule of a profile; `heads` and `gates` are counted per seed."""
        vlm, seeds = settings.vlm, len(settings.seeds)
        return cls(
            kinds=len(vlm.triplet_kinds),
            lora_epochs=vlm.epochs,
            lora_batch=vlm.train_batch_size * vlm.gradient_accumulation,
            cached_tokens=vlm.cache_visual_tokens,
            asked=vlm.reasons,
            longest=vlm.max_new_tokens,
            shortest=shortest,
            teacher=settings.teacher.teacher,
            networks={name: network.epochs for name, network in settings.teacher.networks.items()},
            heads=heads * seeds,
            head_epochs=settings.distill.epochs,
            gates=gates * seeds,
            gate_epochs=settings.gate.epochs,
            workers=workers,
        )


def _network(cost: Mapping[str, float], name: str, size: Size, plan: Schedule) -> float:
    """Seconds: training with a look at val after each epoch, then the logits of every image."""
    epochs, decode = plan.networks[name], cost["decode"] / plan.workers
    looked = size.val * epochs + size.total
    return size.train * epochs * (cost[f"{name}_train"] + decode) + looked * (cost[f"{name}_predict"] + decode)


def _lora(cost: Mapping[str, float], size: Size, plan: Schedule, picture: float) -> float:
    """Seconds of the LoRA tuning; `picture` is what the picture of one sequence costs before the language model."""
    sequences = size.train * plan.kinds * plan.lora_epochs
    return sequences * (cost["lora"] + picture) + math.ceil(sequences / plan.lora_batch) * cost["lora_update"]


def _answer(cost: Mapping[str, float], tokens: int) -> float:
    """Seconds of one generated answer, the picture's decoding excepted: tower, prompt, then token by token."""
    return cost["tower"] + cost["prefill"] + tokens * cost["token"]


def ours(cost: Mapping[str, float], size: Size, plan: Schedule) -> dict[str, float]:
    """Seconds per stage of our schedule; `total` leaves out the other baselines, which are no part of the method.

    Args:
        cost: seconds. Per image: `decode`, `tower`, `score`, `score_tuned`, `prefill`, `<network>_train`,
            `<network>_predict`; `token`: per generated token; `lora`: per sequence; `lora_update`: per optimizer
            update; `head`, `gate`: per row and epoch.
        size, plan: the dataset and the settings.

    Without cached visual tokens the tower runs again wherever the language model needs an image, which is what
    the stages do when `vlm.cache_visual_tokens` is off.
    """
    seen = cost["decode"] + cost["tower"]
    again = 0.0 if plan.cached_tokens else seen
    generated = cost["decode"] + _answer(cost, plan.longest)
    stages = {
        "features": size.total * seen,
        "zero-shot answers": (size.val + size.test) * (cost["score"] + again),
        "LoRA": _lora(cost, size, plan, again),
        "tuned answers": size.total * (cost["score_tuned"] + again),
        "reasons": 2 * min(plan.asked, size.test) * generated,
        "teacher": _network(cost, plan.teacher, size, plan),
        "heads": plan.heads * plan.head_epochs * size.train * cost["head"],
        "gates": plan.gates * plan.gate_epochs * size.train * cost["gate"],
    }
    others = [_network(cost, name, size, plan) for name in plan.networks if name != plan.teacher]
    return {**stages, "total": math.fsum(stages.values()), "other baselines": math.fsum(others)}


def authors(cost: Mapping[str, float], size: Size, plan: Schedule, tokens: int) -> dict[str, float]:
    """Seconds per stage of the authors' schedule, when every generated answer has `tokens` tokens.

    The vision tower runs in every epoch of the distillation; the VLM generates its answer again for each image in
    each epoch of the gate, one image at a time (authors' code). One head, one gate, one seed; no pass over val,
    none of the teacher during distillation: not known, so not counted. Their pictures stay in memory: decoded once
    a stage. Test answers are generated once zero-shot and once tuned.
    """
    decode = size.train * cost["decode"]
    stages = {
        "LoRA": decode + _lora(cost, size, plan, cost["tower"]),
        "teacher": _network(cost, plan.teacher, size, plan),
        "distillation": decode + plan.head_epochs * size.train * (cost["tower"] + cost["head"]),
        "gate": decode + plan.gate_epochs * size.train * (_answer(cost, tokens) + cost["gate"]),
        "test answers": 2 * size.test * (cost["decode"] + _answer(cost, tokens)),
    }
    return {**stages, "total": math.fsum(stages.values())}


def after_tuning(mine: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """Authors' seconds over ours for distillation and gate, where the schedules differ.

    Ours counts all that these two stages live on (features, tuned answers) and all ablations and seeds.
    """
    cheap = mine["features"] + mine["tuned answers"] + mine["heads"] + mine["gates"]
    return (theirs["distillation"] + theirs["gate"]) / cheap


def extrapolate(points: Mapping[int, float], layers: int) -> float:
    """The value at `layers` layers on the straight line through two measured depths.

    Every layer does the same work, so time and memory are linear in their number; what does not depend on it is the
    intercept. A falling line is noise of the timer: then the larger value is taken.
    """
    (low, first), (high, second) = sorted(points.items())
    slope = (second - first) / (high - low)
    return first + slope * (layers - low) if slope >= 0 else max(first, second)


def disk_bytes(size: Size, width: int, tokens: int) -> dict[str, int]:
    """Bytes of the stored features in float16: pooled (one vector an image) and token-level (all of them)."""
    return {"pooled": size.total * width * 2, "tokens": size.total * tokens * width * 2}
