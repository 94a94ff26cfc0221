"""What a rehearsal found, as one JSON tree: costs of each stage, and what follows for each dataset.

Layout of report.json, for programs that read it: `precisions.<precision>.costs` holds seconds per unit by the names
of `emonb.projection.ours`; `precisions.<precision>.datasets.<name>` holds hours and ratios; `precision` names the one
that a run of the profile would use here. A value that was not measured is null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from emonb.distill import head_names
from emonb.files import atomic_write, write_json
from emonb.gate import gate_names
from emonb.paper_values import dataset_title
from emonb.parallel import cores
from emonb.prices import estimate_table, load_prices
from emonb.projection import Schedule, Size, after_tuning, authors, disk_bytes, extrapolate, ours
from emonb.random_vlm import weight_bytes
from emonb.rehearsal_page import markdown, span
from emonb.rehearsal_small import SMALL_STEPS, network_step
from emonb.rehearsal_steps import VLM_STEPS
from emonb.settings import Settings

__all__ = ["assemble", "headlines", "write_report"]

NAN = float("nan")


def assemble(
    facts: dict[str, Any],
    raw: Sequence[dict[str, Any]],
    notes: Mapping[str, Any],
    settings: Settings,
    sizes: Sequence[Size],
) -> dict[str, Any]:
    """The whole report from the measurements so far.

    Args:
        facts: machine, model, plan.
        raw: one entry per stage, precision and depth, with `status` measured or failed.
        notes: lengths found on the way, e.g. `prompt_tokens`.
        settings: of the profile.
        sizes: datasets to project to.
    """
    tokens = notes.get("visual_tokens", NAN)
    schedule = Schedule.of(
        settings,
        heads=len(head_names(settings.distill)),
        gates=len(gate_names(settings.gate)),
        shortest=notes.get("shortest_answer", NAN),
        workers=min(8, cores()),  # as the loader of the conventional networks has it
    )
    names = list(dict.fromkeys(row["precision"] for row in raw if row["precision"])) or [facts["precision"]]
    precisions = {}
    for precision in names:
        stages = _stages(raw, precision, facts["model"], settings, facts["device"] != "cpu")
        costs = _every_cost(settings) | {k: v for s in stages.values() for k, v in s.get("seconds", {}).items()}
        precisions[precision] = {
            "stages": stages,
            "costs": costs,
            "datasets": {size.name: _dataset(costs, size, schedule) for size in sizes},
        }
    picture = (facts["picture"]["width"], facts["picture"]["height"])
    width = facts["model"]["parameters"]["features"]
    return _plain(
        {
            **facts,
            "notes": dict(notes),
            "schedule": asdict(schedule),
            "sizes": {size.name: {**asdict(size), "total": size.total} for size in sizes},
            "disk_bytes": {size.name: disk_bytes(size, width, tokens) for size in sizes},
            "triplets": {size.name: _triplets(settings, size, picture, notes) for size in sizes},
            "prices": {"model": settings.triplets.model, "as_of": str(load_prices(settings.triplets).as_of)},
            "precisions": precisions,
            "measurements": list(raw),
        }
    )


def write_report(report: dict[str, Any], folder: Path) -> None:
    """`report.json` and `report.md`."""
    write_json(folder / "report.json", report)
    atomic_write(folder / "report.md", markdown(report))


def headlines(report: dict[str, Any]) -> list[str]:
    """What failed, and the hours of each dataset, in the precision that a run would use."""
    part = report["precisions"][report["precision"]]
    failed = {name: stage["message"] for name, stage in part["stages"].items() if stage["status"] == "failed"}
    lines = [f"{name} failed: {message}" for name, message in failed.items()]
    for name, found in part["datasets"].items():
        hours = [found["recomputed"]["hours"], found["cached"]["hours"], *found["authors_hours"].values()]
        again, kept, short, long = (span(None if h is None else h * 3600) for h in hours)
        images = f"{dataset_title(name)}, {report['sizes'][name]['total']:,} images"
        lines.append(
            f"{images}: ours {again}, with visual tokens kept {kept}; the authors' schedule {short} to {long}"
        )
    return lines


def _every_cost(settings: Settings) -> dict[str, float]:
    """All cost names, not measured yet."""
    steps = [*VLM_STEPS.values(), *SMALL_STEPS.values(), *map(network_step, settings.teacher.networks)]
    return {cost: NAN for step in steps for cost in step.units}


def _stages(
    raw: Sequence[dict[str, Any]], precision: str, model: Mapping[str, Any], settings: Settings, on_gpu: bool
) -> dict[str, dict[str, Any]]:
    steps = {"decoding": SMALL_STEPS["decoding"], **VLM_STEPS}
    steps |= {name: network_step(name) for name in settings.teacher.networks}
    steps |= {name: SMALL_STEPS[name] for name in ("heads", "gates")}
    stages = {}
    for name, step in steps.items():
        rows = [row for row in raw if row["stage"] == name and row["precision"] in ("", precision)]
        layers = model["layers"]["tower" if step.tower else "language"]
        weights = weight_bytes(model["parameters"], precision)
        stages[name] = _stage(rows, layers, weights, on_gpu) | {"units": step.units}
    return stages


def _stage(rows: Sequence[dict[str, Any]], layers: int, weights: float, on_gpu: bool) -> dict[str, Any]:
    """One stage of the whole model: as measured, or on the line through two depths.

    The weights of the whole model are known. Memory beside them is extrapolated too, but not on a CPU: what a layer
    adds there (some MB of KV cache or checkpoints) is less than the resident memory of a process wavers.
    """
    failed = next((row for row in rows if row["status"] == "failed"), None)
    if failed:
        return {"status": "failed", "message": failed["message"], "layers": failed["layers"]}
    if rows and rows[0]["layers"] is None:
        row = rows[0]
        seconds = {cost: value for cost, value in row["seconds"].items() if cost != "step"}
        found = {"status": "measured", "seconds": seconds, "seconds_per_step": row["seconds"]["step"]}
        return {**found, "batch": row["batch"], "peak_bytes": row["peak_bytes"]}
    if len(rows) < 2:
        return {"status": "not measured"}
    depths = {row["layers"]: row for row in rows}
    values = {cost: {k: row["seconds"][cost] for k, row in depths.items()} for cost in rows[0]["seconds"]}
    step = values.pop("step")
    beside = {k: row["peak_bytes"] - row["weight_bytes"] for k, row in depths.items()}
    return {
        "status": "extrapolated",
        "layers": layers,
        "seconds": {cost: extrapolate(points, layers) for cost, points in values.items()},
        "seconds_per_step": extrapolate(step, layers),
        "batch": min(row["batch"] for row in rows),
        "peak_bytes": weights + (extrapolate(beside, layers) if on_gpu else max(beside.values())),
        "points": {"seconds": values, "seconds_per_step": step, "bytes_beside_weights": beside},
        "noisy": step[max(step)] <= step[min(step)],
    }


def _dataset(costs: Mapping[str, float], size: Size, schedule: Schedule) -> dict[str, Any]:
    """Seconds per stage, hours and ratios of one dataset, with and without cached visual tokens."""
    tokens = {"shortest": schedule.shortest, "longest": schedule.longest}
    theirs = {case: authors(costs, size, schedule, count) for case, count in tokens.items()}
    result: dict[str, Any] = {"authors_seconds": theirs}
    result["authors_hours"] = {case: seconds["total"] / 3600 for case, seconds in theirs.items()}
    for name, cached in (("recomputed", False), ("cached", True)):
        mine = ours(costs, size, replace(schedule, cached_tokens=cached))
        result[name] = {
            "seconds": mine,
            "hours": mine["total"] / 3600,
            "ratio": {case: seconds["total"] / mine["total"] for case, seconds in theirs.items()},
            "ratio_after_tuning": {case: after_tuning(mine, seconds) for case, seconds in theirs.items()},
        }
    return result


def _triplets(
    settings: Settings, size: Size, picture: tuple[int, int], notes: Mapping[str, Any]
) -> dict[str, float | int]:
    """USD for the triplets of the training images by the configured model, from the estimator of room 02."""
    labels = list(notes["labels"])
    total = estimate_table(settings.triplets, [picture], size.train, labels, batch=False).iloc[-1]
    return {case: float(total[f"usd_{case}"]) for case in ("low", "high", "worst")}


def _plain(tree: Any) -> Any:
    """The tree with text keys, and None for what is not a finite number."""
    if isinstance(tree, Mapping):
        return {str(key): _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
