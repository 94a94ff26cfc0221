"""`python -m emonb stage NAME`: the notebooks' long steps without a notebook, alone or under `accelerate launch`.

The results lie in the store under the same keys as the notebooks' own: a run finds them there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import product
from typing import TYPE_CHECKING, Any

from emonb.errors import EmonbError
from emonb.parallel import alone, is_main, sharded, wait
from emonb.side_by_side import side_by_side
from emonb.store import Artifact
from emonb.workspace import Workspace

if TYPE_CHECKING:
    from emonb.vlm import VLM

__all__ = ["NEEDS", "run_stage"]

# What a stage reads, and what that reads, in the order in which they are made.
NEEDS = {
    "samples": (),
    "triplets": ("samples",),
    "features": ("samples",),
    "base_predictions": ("samples", "features"),
    "adapter": ("samples", "triplets", "features"),
    "vlm_predictions": ("samples", "triplets", "features", "adapter"),
    "teacher": ("samples",),
    "head": ("samples", "features", "teacher"),
    "gate": ("samples", "triplets", "features", "adapter", "vlm_predictions", "teacher", "head"),
}


def run_stage(name: str, ws: Workspace, say: Callable[[str], Any] = print) -> None:
    """Make one stage of every dataset, and before it what it needs and is not there yet.

    Args:
        name: a key of `NEEDS`, or `all`.
        ws: the run that it belongs to.
        say: gets a line for each result, in the main process.

    Raises:
        EmonbError: an unknown stage, or one that cannot run on a model spread over processes.
    """
    if name not in (*NEEDS, "all"):
        raise EmonbError(f"stage {name!r}: unknown; use one of {', '.join(NEEDS)}, all")
    if sharded() and name != "adapter":
        raise EmonbError(
            f"stage {name!r}: cannot run on a model that FSDP or ZeRO-3 spreads over processes, where only `adapter` "
            "can; launch it with whole models (--multi_gpu), with vlm.quantize_4bit if they do not fit"
        )
    wanted = tuple(NEEDS) if name == "all" else (*NEEDS[name], name)
    if sharded():  # what comes before needs whole models
        for before in NEEDS[name]:
            for dataset in ws.settings.datasets:
                ws.store.find(before, dataset)

    @functools.cache
    def vlm() -> VLM:
        from emonb.vlm import load_vlm

        return load_vlm(ws.settings.vlm)

    for stage in wanted:
        for artifact in _make(stage, ws, vlm):
            if is_main():
                how = artifact.provenance
                cost = f"{how['seconds']:.0f} s, processes: {how['processes']}"
                say(f"{stage} of {artifact.name}: {cost}, {artifact.path}")


def _make(stage: str, ws: Workspace, vlm: Callable[[], VLM]) -> Iterable[Artifact]:
    """The results of one stage: one of each dataset, or one for each conventional network."""
    from emonb import answers, data, distill, features, gate, teacher, triplets, tuning

    settings, store = ws.settings, ws.store
    plain = {
        "samples": data.samples_stage,
        "triplets": triplets.triplets_stage,
        "head": distill.head_stage,
        "gate": gate.gate_stage,
    }
    if stage in plain:  # seconds of work: one of the launched processes does it for all
        if is_main():
            with alone():
                side_by_side(plain[stage], ws)
        wait()
        return [store.find(stage, dataset) for dataset in settings.datasets]
    if stage == "teacher":
        return side_by_side(teacher.teacher_stage, ws, product(settings.datasets, settings.teacher.networks)).values()
    if stage in ("features", "adapter"):
        make = features.features_stage if stage == "features" else tuning.adapter_stage
        return (make(settings, store, dataset, vlm()) for dataset in settings.datasets)
    adapters = [store.find("adapter", d) if stage == "vlm_predictions" else None for d in settings.datasets]
    given = zip(settings.datasets, adapters, strict=True)
    return (answers.predictions_stage(settings, store, dataset, vlm(), adapter) for dataset, adapter in given)
