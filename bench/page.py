"""One page over what was measured: the JSON files of a folder as tables and plots, opened from disk.

    python bench/page.py --out build/bench

Every number is read from the JSON files; a measurement that is missing is named as missing.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from emonb.figure_style import OKABE_ITO

CSS = """
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.8rem;margin:0 0 .2rem}h2{margin:2.4rem 0 .4rem;border-bottom:1px solid #8886;padding-bottom:.2rem}
p{max-width:46rem}.soft{opacity:.75;font-size:.9rem}.bad{border-left:.3rem solid #d55e00;padding-left:.7rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid #8884;text-align:right}th:first-child,td:first-child{text-align:left}
img{max-width:100%;background:#fff;border-radius:.4rem}code{font-size:.9em}
"""


def number(value: Any) -> str:
    """Three significant digits, thousands apart."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Rows as an HTML table, everything escaped."""
    lines = ["<tr>" + "".join(f"<th>{escape(x)}</th>" for x in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(number(x))}</td>" for x in row) + "</tr>" for row in rows]
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def picture(fig: Figure, alt: str) -> str:
    """A figure inside the page."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=130)
    return f"<p><img alt='{escape(alt)}' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def bars(parts: dict[str, dict[str, float]], title: str, unit: str) -> str:
    """One horizontal bar for each name, its parts one after the other."""
    fig = Figure(figsize=(7, 0.9 + 0.45 * len(parts)), layout="constrained")
    ax = fig.subplots()
    names = list(dict.fromkeys(part for stack in parts.values() for part in stack))
    colors = dict(zip(names, OKABE_ITO * 2, strict=False))
    for y, stack in enumerate(parts.values()):
        left = 0.0
        for part, value in stack.items():
            ax.barh(y, value, left=left, color=colors[part], height=0.6)
            left += value
        ax.text(left, y, f" {number(left)}", va="center", fontsize=8)
    for part in names:
        ax.barh([0], [0], color=colors[part], label=part)
    ax.set_yticks(range(len(parts)), list(parts), fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.tick_params(labelsize=8)
    ax.set_xlabel(unit, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return picture(fig, title)


def schedules(found: dict[str, Any]) -> str:
    stages = {who: {n: s["seconds"] for n, s in found["stages"][who].items()} for who in ("authors", "ours")}
    rows = [
        ["authors' schedule", found["seconds_authors"], found["images_per_second"]["authors"]],
        ["ours", found["seconds_ours"], found["images_per_second"]["ours"]],
    ]
    memory = found["peak_memory_mb"]
    rows = [[*row, memory[who]] for row, who in zip(rows, ("authors", "ours"), strict=True)]
    epochs = found["epochs"]
    text = (
        f"<p>Distillation ({epochs['distillation']} epochs) and gate ({epochs['gate']} epochs) on the same "
        f"{found['images']} images with the same stand-in: ours is <b>{number(found['ratio'])} times</b> as fast. The "
        f"authors' answers had {number(found['authors_answers']['tokens_per_answer'])} tokens on average, "
        f"{number(100 * found['authors_answers']['unparsable_share'])} % could not be parsed.</p>"
    )
    projected = found["projected_7b"]
    if "fi" in projected:
        ratios = projected["fi"]
        after = {k: [number(x) for x in sorted(ratios[k]["ratio_after_tuning"].values())] for k in ratios}
        text += (
            "<p>Projected for Qwen2-VL-7B on FI from what an image costs in "
            f"<code>{escape(projected['report'])}</code> (a CPU): {' to '.join(after['cached'])} times "
            f"with visual tokens kept, {' to '.join(after['recomputed'])} times without; "
            "there, ours pays for all ablations and seeds too.</p>"
        )
    head = ["schedule", "seconds", "images a second", "peak MB"]
    return text + table(head, rows) + bars(stages, "seconds per stage under both schedules", "seconds")


def limit(found: dict[str, Any]) -> str:
    parts = found["parts"]
    goals = {k: ("met" if g["met"] else "NOT met") + f" (at most {g['at_most']:g})" for k, g in found["goals"].items()}
    rows = [
        ["one pass / bare forward", found["one_pass_over_bare_forward"], goals["one_pass_over_bare_forward"]],
        ["ablations / one pass", found["ablations_over_one_pass"], goals["ablations_over_one_pass"]],
    ]
    trained = found["trained"]
    text = (
        f"<p>{found['images']:,} images. Ablations: {len(trained['heads'])} heads and {len(trained['gates'])} gates, "
        f"{len(trained['seeds'])} seeds each.</p>"
    )
    return text + table(["share", "measured", "goal"], rows) + bars(parts, "seconds of each part", "seconds")


def growth(found: dict[str, Any]) -> str:
    sizes = sorted(map(int, found["sizes"]))
    head = ["stage", *(f"{n:,} images: s / MB" for n in sizes), "exponent of time", "bytes an image"]
    rows = []
    for stage, rates in found["growth"].items():
        cells = [found["sizes"][str(n)][stage] for n in sizes]
        cells = [f"{number(c['seconds'])} / {c['peak_memory_mb']:.0f}" for c in cells]
        rows.append([stage, *cells, f"{rates['time_exponent']:.2f}", f"{rates['bytes_per_picture']:.0f}"])
    fig = Figure(figsize=(7, 2.8), layout="constrained")
    for ax, key, name in zip(fig.subplots(1, 2), ("seconds", "peak_memory_mb"), ("seconds", "peak MB"), strict=True):
        looks = [(color, line) for line in ("-", "--") for color in OKABE_ITO]  # more stages than colours
        for (color, line), stage in zip(looks, found["growth"], strict=False):
            values = [found["sizes"][str(n)][stage][key] for n in sizes]
            label = stage if key == "seconds" else None
            ax.plot(sizes, values, marker="o", markersize=3, color=color, linestyle=line, label=label)
        ax.set_xscale("log")
        ax.set_yscale("log" if key == "seconds" else "linear")
        ax.set_ylim(bottom=None if key == "seconds" else 0)
        ax.set_xlabel("images", fontsize=8)
        ax.set_ylabel(name, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside upper center", ncols=5, fontsize=7, frameon=False)
    text = f"<p>LoRA takes {found['lora_steps']} steps at every size. Exponent 1: time is linear in images.</p>"
    return text + table(head, rows) + picture(fig, "time and memory of every stage by number of images")


def scoring(found: dict[str, Any]) -> str:
    n, accuracy = found["images"], found["accuracy_percent"]
    rows = [
        ["scored candidates", found["seconds_scoring"], n / found["seconds_scoring"], accuracy["scoring"], 0.0],
        ["greedy generation", found["seconds_generating"], n / found["seconds_generating"], accuracy["generating"],
         found["unparsable_percent"]],
    ]  # fmt: skip
    text = (
        f"<p>The same {n} images: scoring is {number(found['ratio'])} times as fast; the answers agree on "
        f"{number(found['agreement_percent'])} % of the images.</p>"
    )
    return text + table(["answers by", "seconds", "images a second", "accuracy, %", "unparsable, %"], rows)


def trainer(found: dict[str, Any]) -> str:
    rows = [
        ["trainer", found["seconds_trainer"], found["peak_memory_mb"]["trainer"]],
        ["of that, starting and saving", found["seconds_start_and_save"], ""],
        ["of that, collating batches", found["seconds_collating"], ""],
        ["bare loop on the same batches", found["seconds_bare_loop"], found["peak_memory_mb"]["bare loop"]],
    ]
    text = (
        f"<p>{found['steps']} steps of LoRA: the trainer takes {number(found['ratio'])} times as long as the bare "
        f"loop; collation and what it does once apart, {number(found['overhead_percent_of_a_step'])} % more.</p>"
    )
    return text + table(["", "seconds", "peak MB"], rows)


def steps(found: dict[str, Any]) -> str:
    variants = list(dict.fromkeys(v for ms in found["milliseconds"].values() for v in ms))
    rows = [
        [name, *(ms.get(v, "") for v in variants), found["side_by_side_gain"][name]]
        for name, ms in found["milliseconds"].items()
    ]
    head = ["network", *(f"{v}, ms" for v in variants), "gain side by side"]
    threads = found["all_threads"]
    text = (
        f"<p>One training step. The gain side by side: what {threads} processes with a thread each do in the time in "
        f"which {threads} threads do one network (time on all threads x {threads} / time on one); less where the last "
        "dataset finds no partner.</p>"
    )
    return text + table(head, rows)


def where(found: dict[str, Any]) -> str:
    kinds, total = list(found["total"]), found["total"]
    rows = [[name, *parts.values(), sum(parts.values())] for name, parts in found["notebooks"].items()]
    rows.append(["all", *total.values(), sum(total.values())])
    order = "Drawing, teachers, heads, gates: side by side." if found["side_by_side"] else "One after another."
    largest = sorted(total, key=total.get, reverse=True)[:3]
    text = f"<p>{number(sum(total.values()) / 60)} minutes in all; most of it: {', '.join(largest)}. {order}</p>"
    return text + table(["notebook", *kinds, "seconds"], rows) + bars(found["notebooks"], "seconds by kind", "seconds")


PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "schedules": ("Both schedules", schedules),
    "limit": ("How close to the limit", limit),
    "growth": ("Growth", growth),
    "scoring": ("Scoring against generating", scoring),
    "trainer": ("The trainer against a bare loop", trainer),
    "steps": ("Threads, precision, layout", steps),
    "where": ("Where the time of make reproduce goes", where),
}


def write(out: Path) -> Path:
    """Write `index.html` beside the JSON files."""
    body, missing = [], []
    for name, (title, show) in PARTS.items():
        path = out / f"{name}.json"
        if not path.is_file():
            missing.append(name)
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        machine = found["machine"]
        note = (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}; {found['written']}; took "
            f"{found['measurement_seconds']:.0f} s; load average at the end {found['load_average']:.1f}; "
            f"commit {found['git'].get('commit', 'none')[:10]}{' with changes' if found['git'].get('dirty') else ''}"
        )
        link = f"<a href='{name}.json'>{name}.json</a>"
        body.append(f"<h2>{escape(title)}</h2>{show(found)}<p class=soft>{escape(note)}. {link}</p>")
    gone = f"<p class=bad>Not measured: {', '.join(missing)}.</p>" if missing else ""
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>emonb: measurements</title><style>{CSS}</style><h1>Measurements</h1>"
        "<p class=soft>The stand-in VLM on one drawn dataset, unless said otherwise.</p>"
        f"{gone}{''.join(body)}</html>\n"
    )
    path = out / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    print(write(parser.parse_args().out))
