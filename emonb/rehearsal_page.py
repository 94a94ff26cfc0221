"""The rehearsal's report as a page for people: what was run, what was extrapolated, hours, and every assumption."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emonb.paper_values import dataset_title, is_drawn

__all__ = ["markdown", "span"]


def span(seconds: float | None) -> str:
    """Seconds as people read them, two digits: `3.2 ms`, `41 s`, `5.0 min`, `1.7 h`, `12,000 h`; `-` if unknown."""
    if seconds is None:
        return "-"
    for unit, size, most in (("ms", 1e-3, 1), ("s", 1, 120), ("min", 60, 7200), ("h", 3600, float("inf"))):
        if seconds < most:
            return f"{_two(seconds / size)} {unit}"
    return "-"


def _two(value: float | None) -> str:
    """Two significant digits, thousands separated."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if value < 1e-3:
        return f"{value:.1e}"
    if value < 10:
        return f"{float(f'{value:.2g}'):g}" if value < 1 else f"{value:.1f}"
    return f"{int(float(f'{value:.2g}')):,}"


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{_two(value / 1e9)} GB" if value >= 1e8 else f"{_two(value / 1e6)} MB"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def markdown(report: Mapping[str, Any]) -> str:
    """report.md from the tree of report.json."""
    model, machine, cpu = report["model"]["base"], report["machine"], report["device"] == "cpu"
    lines = [f"# Rehearsal: {model} on {machine['cpu'] if cpu else report['device']}", ""]
    if not report["complete"]:
        lines += ["**Not complete: it was stopped, or still runs.** What is missing shows as `-`.", ""]
    if cpu:
        lines += [
            f"Hours are projected **for this CPU** ({machine['cores']} cores): they are no statement about a GPU, nor "
            "would anybody run the paper's profile like this. The ratio of the two schedules is what they can show.",
            "",
        ]
    lines += _machine(report)
    for precision, part in report["precisions"].items():
        lines += [f"## Stages in {precision}", "", *_stages(part["stages"])]
        lines += [f"## Hours in {precision}", "", *_hours(report, part["datasets"])]
        first = next(iter(part["datasets"]))
        lines += [f"Where the time goes, {dataset_title(first)}:", "", *_parts(part["datasets"][first])]
    lines += ["## Disk and GPT-4", "", *_disk(report), "## Assumptions", "", *[f"- {x}" for x in _assumptions(report)]]
    return "\n".join(lines) + "\n"


def _machine(report: Mapping[str, Any]) -> list[str]:
    machine, model, versions = report["machine"], report["model"], report["versions"]
    counts, plan, picture, notes = model["parameters"], report["plan"], report["picture"], report["notes"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ", no GPU"
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    known = {k: f"{notes[k]:,}" if k in notes else "-" for k in ("visual_tokens", "prompt_tokens", "sequence_tokens")}
    rows = [
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB{gpu}; {libraries}"),
        ("load average at the start", f"{machine['load_average_at_start']} (1 minute)"),
        ("measured", f"{report['written']}, commit {report['git'].get('commit', 'unknown')[:12]}"),
        ("profile", report["profile"]),
        (
            "parameters, random values",
            f"{counts['total']:,}: vision tower {counts['vision tower']:,}, merger {counts['merger']:,}, "
            f"language model {counts['language model']:,}; LoRA {counts['lora']:,} more",
        ),
        (
            "layers; attention",
            f"vision tower {model['layers']['tower']}, language model {model['layers']['language']}; "
            f"{model['attention']}",
        ),
        ("what was run", "; ".join(plan["words"])),
        (
            "picture",
            f"{picture['width']} x {picture['height']} px: {known['visual_tokens']} visual tokens, prompt "
            f"{known['prompt_tokens']}, training sequence {known['sequence_tokens']} tokens",
        ),
        ("tokenizer of the prompts", model["tokenizer"]),
    ]
    return _table(("", ""), rows)


def _stages(stages: Mapping[str, Any]) -> list[str]:
    rows, notes, depths = [], [], []
    for name, stage in stages.items():
        if stage["status"] in ("failed", "not measured"):
            rows.append((name, stage["status"], "-", "-", "-", "-"))
            if stage["status"] == "failed":
                depth = f" with {stage['layers']} layers" if stage["layers"] else ""
                notes.append(f"- {name} failed{depth}: {stage['message']}")
            continue
        each = ", ".join(f"{span(stage['seconds'][cost])} / {unit}" for cost, unit in stage["units"].items())
        how = stage["status"] if stage["status"] == "measured" else f"extrapolated to {stage['layers']} layers"
        if stage.get("noisy"):
            notes.append(
                f"- {name}: the deeper model was not slower; too noisy to trust, run again on an idle machine"
            )
        rows.append(
            (name, how, f"{stage['batch']}", each, span(stage["seconds_per_step"]), _bytes(stage["peak_bytes"]))
        )
        if "points" in stage:
            for cost, unit in stage["units"].items():
                points = stage["points"]["seconds"][cost]
                depths.append((name, unit, *map(span, points.values()), span(stage["seconds"][cost])))
    lines = _table(("stage", "how", "batch", "time", "a step", "peak memory"), rows) + notes + [""] * bool(notes)
    if depths:
        measured = next(s["points"]["seconds_per_step"] for s in stages.values() if "points" in s)
        head = ("stage", "per", *(f"{k} layer{'s' * (k != '1')}" for k in measured), "whole, extrapolated")
        lines += ["The two depths of the real width, and the straight line through them:", "", *_table(head, depths)]
    return lines


def _hours(report: Mapping[str, Any], datasets: Mapping[str, Any]) -> list[str]:
    schedule = report["schedule"]
    short, long = (schedule[case] if schedule[case] is not None else "?" for case in ("shortest", "longest"))
    rows = []
    for name, found in datasets.items():
        size, theirs = report["sizes"][name], found["authors_hours"]
        ratio, after = found["cached"]["ratio"], found["cached"]["ratio_after_tuning"]
        source = "" if is_drawn(name) else f" ({size['source']})"
        rows.append(
            (
                f"{dataset_title(name)}{source}",
                f"{size['total']:,}",
                *(span(_seconds(found[kind]["hours"])) for kind in ("recomputed", "cached")),
                *(span(_seconds(theirs[case])) for case in ("shortest", "longest")),
                f"{_two(ratio['shortest'])} to {_two(ratio['longest'])}",
                f"{_two(after['shortest'])} to {_two(after['longest'])}",
            )
        )
    head = (
        "dataset",
        "images",
        "ours",
        "ours, visual tokens kept on disk",
        f"authors', answers of {short} tokens",
        f"authors', {long} tokens",
        "authors' / ours (tokens kept)",
        "the same, after tuning only",
    )
    return _table(head, rows)


def _seconds(hours: float | None) -> float | None:
    return None if hours is None else hours * 3600


def _parts(found: Mapping[str, Any]) -> list[str]:
    mine, kept, theirs = found["recomputed"]["seconds"], found["cached"]["seconds"], found["authors_seconds"]
    rows = [(name, span(mine[name]), span(kept[name])) for name in mine]
    lines = _table(("our stage", "tokens computed again", "tokens kept"), rows)
    rows = [(name, span(theirs["shortest"][name]), span(theirs["longest"][name])) for name in theirs["longest"]]
    return lines + _table(("authors' stage", "short answers", "longest answers"), rows)


def _disk(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, disk in report["disk_bytes"].items():
        usd = report["triplets"][name]
        price = (
            "-" if usd["low"] is None else f"{_two(usd['low'])} to {_two(usd['high'])}, at worst {_two(usd['worst'])}"
        )
        rows.append((dataset_title(name), _bytes(disk["pooled"]), _bytes(disk["tokens"]), price))
    prices = report["prices"]
    head = ("dataset", "pooled features", "all visual tokens", f"triplets by {prices['model']}, USD")
    note = f"Prices of {prices['as_of']}; the Batch API takes half. An unknown price shows as `-`."
    return [*_table(head, rows), note, ""]


def _assumptions(report: Mapping[str, Any]) -> list[str]:
    schedule, cpu = report["schedule"], report["device"] == "cpu"
    networks = ", ".join(f"{name} {epochs}" for name, epochs in schedule["networks"].items())
    return [
        "Weights are random: time and memory do not depend on their values. Nothing here says anything of accuracy.",
        "Times are medians after a warm-up; a step over 12 s is measured once. Other work on the machine is in them.",
        "Two depths: time grows linearly with the number of layers of the vision tower (features) or of the language "
        "model (the other stages); so does, on a GPU, the memory beside the weights, which are counted exactly. A "
        "process's resident memory is too coarse for that: on a CPU it is that of the deeper measurement.",
        *(["On the CPU two depths are measured with one image at a time, to end in minutes."] if cpu else []),
        "Ours: every image through the vision tower for features, val and test scored zero-shot, every image scored "
        f"tuned, {schedule['kinds']} triplets an image for {schedule['lora_epochs']:g} epochs of LoRA, "
        f"{schedule['lora_batch']} sequences an update; epochs of the networks: {networks}; {schedule['heads']} heads "
        f"of {schedule['head_epochs']} epochs and {schedule['gates']} gates of {schedule['gate_epochs']} on cached "
        f"tensors, all ablations and seeds; reasons and free answers for {schedule['asked']} test images at full "
        "length, one at a time. The deeper heads are taken to cost what the paper's does.",
        "`ours` computes visual tokens again wherever the language model needs them; with `vlm.cache_visual_tokens` "
        "they are kept on disk, and each image goes through the vision tower once (column and sizes above).",
        "Authors': the vision tower for every sequence of LoRA (our reading) and in every epoch of the distillation; "
        "each epoch of the gate answers each image again by sampling, one image at a time, up to "
        f"{schedule['longest']} tokens; how many they are is not known, so both ends stand here. "
        "One head, one gate, one seed; test answers once zero-shot and once tuned. Validation passes, and the "
        "teacher's passes during distillation, are not known and not counted. Generation is a bare loop on the KV "
        "cache: `generate` is slower.",
        "The total leaves the other baselines out on our side: they are no part of the method.",
        "Decoding a JPEG is added to every pass that opens pictures, as if nothing overlapped; scaling and patching "
        "are in the time of the features. For the networks it is "
        f"divided by {schedule['workers']} workers; the authors keep pictures in memory and decode once a stage.",
        "Labels of two words stand for labels of several tokens: the second pass of the scoring is in its time.",
        "Training sequences are of the longest kind, reasons of four sentences; categorical ones are some 40 tokens "
        "shorter.",
        "Sizes: FI about 23,000 and Emotion6 1,980 (paper), EmoSet 118,102 (official lists); Flickr and Instagram are "
        "not recorded here: `--dataset-size N` sets them.",
    ]
