"""`python -m emonb stage NAME`: the notebooks' long steps without a notebook, alone or under `accelerate launch`.

The results lie in the store under the same keys as the notebooks' own: a run finds them there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from emonb.errors import EmonbError
from emonb.parallel import alone, is_main, sharded, wait
from emonb.settings import Settings
from emonb.store import Artifact
from emonb.workspace import Workspace

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
    base: list[Any] = []  # the VLM, loaded when it is first needed

    def vlm() -> Any:
        if not base:
            from emonb.vlm import load_vlm

            base.append(load_vlm(ws.settings.vlm))
        return base[0]

    for dataset in ws.settings.datasets:
        made: dict[str, Artifact] = {}
        for stage in wanted:
            for artifact in _make(stage, ws.settings, ws.store, dataset, vlm, made):
                made[stage] = artifact
                if is_main():
                    how = artifact.provenance
                    cost = f"{how['seconds']:.0f} s, processes: {how['processes']}"
                    say(f"{stage} of {artifact.name}: {cost}, {artifact.path}")


def _make(
    stage: str, settings: Settings, store: Any, dataset: str, vlm: Callable[[], Any], made: dict[str, Artifact]
) -> list[Artifact]:
    """The results of one stage of one dataset: one, or one for each conventional network."""
    from emonb import answers, data, distill, features, gate, teacher, triplets, tuning

    plain = {
        "samples": data.samples_stage,
        "triplets": triplets.triplets_stage,
        "head": distill.head_stage,
        "gate": gate.gate_stage,
    }
    if stage in plain:  # seconds of work: one process does it for all
        if is_main():
            with alone():
                plain[stage](settings, store, dataset)
        wait()
        return [store.find(stage, dataset)]
    if stage == "teacher":
        return [teacher.teacher_stage(settings, store, dataset, network) for network in settings.teacher.networks]
    seeing = {"features": features.features_stage, "adapter": tuning.adapter_stage}
    if stage in seeing:
        return [seeing[stage](settings, store, dataset, vlm())]
    adapter = made["adapter"] if stage == "vlm_predictions" else None
    return [answers.predictions_stage(settings, store, dataset, vlm(), adapter)]
