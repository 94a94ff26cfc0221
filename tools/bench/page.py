"""One page over what was measured: the JSON files of a folder as tables and plots, opened from disk.

    python -m tools.bench.page --out build/bench

Every number is read from the JSON files; a measurement that is missing is named as missing.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn
from matplotlib.figure import Figure

from emonb.figures import FULL, as_files, styled
from emonb.files import atomic_write, make_folder, read_json
from tools.bench.common import arguments

LOOKS = seaborn.color_palette("colorblind")  # ten colours
CSS = """
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.8rem;margin:0 0 .2rem}h2{margin:2.4rem 0 .4rem;border-bottom:1px solid #8886;padding-bottom:.2rem}
p{max-width:46rem}.soft{opacity:.75;font-size:.9rem}.bad{border-left:.3rem solid #d55e00;padding-left:.7rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid #8884;text-align:right}tbody th{text-align:left;font-weight:400}
img{max-width:100%;background:#fff;border-radius:.4rem}code{font-size:.9em}
"""


def number(value: Any) -> str:
    """Three significant digits, thousands apart."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return "" if value != value else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows by name as an HTML table, everything escaped."""
    frame = pd.DataFrame.from_dict(rows, orient="index").map(number)
    return f"<div class=wide>{frame.to_html(border=0)}</div>"


def picture(fig: Figure, alt: str) -> str:
    """A figure inside the page."""
    data = base64.b64encode(as_files(fig)["png"]).decode()
    return f"<p><img alt='{escape(alt)}' src='data:image/png;base64,{data}'>"


@styled
def bars(parts: Mapping[str, Mapping[str, float]]) -> Figure:
    """One horizontal bar of seconds for each name, its parts one after the other."""
    fig = Figure(figsize=(FULL, 0.9 + 0.4 * len(parts)), layout="constrained")
    ax, frame = fig.subplots(), pd.DataFrame(parts).T
    frame.plot.barh(stacked=True, ax=ax, color=LOOKS[: frame.shape[1]], legend=False, xlabel="seconds")
    for y, total in enumerate(frame.sum(axis=1)):
        ax.text(total, y, f" {number(total)}", va="center")
    ax.invert_yaxis()
    ax.margins(x=0.12)
    fig.legend(loc="outside upper center", ncols=4)
    return fig


@styled
def curves(sizes: Mapping[int, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Seconds and peak memory of every part by number of images."""
    fig, counts = Figure(figsize=(FULL, 3), layout="constrained"), sorted(sizes)
    for ax, key in zip(fig.subplots(1, 2), ("seconds", "peak_memory_mb"), strict=True):
        for i, part in enumerate(sizes[counts[0]]):
            values, style = [sizes[n][part][key] for n in counts], "--" if i >= len(LOOKS) else "-"
            ax.plot(counts, values, style, marker="o", color=LOOKS[i % len(LOOKS)], label=part)
        ax.set(xscale="log", yscale="log" if key == "seconds" else "linear", xlabel="images", ylabel=key)
        ax.minorticks_off()
        ax.set_xticks(counts, [f"{n:,}" for n in counts])
        ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylim(0)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return fig


def schedules(found: Mapping[str, Any]) -> str:
    keys = {"seconds": "seconds", "images a second": "images_per_second", "peak MB": "peak_memory_mb"}
    rows = {who: {head: found[key][who] for head, key in keys.items()} for who in ("authors", "ours")}
    stages = {who: {name: s["seconds"] for name, s in parts.items()} for who, parts in found["stages"].items()}
    epochs, answers, large = found["epochs"], found["authors_answers"], found["projected_7b"]
    text = (
        f"<p>Distillation ({epochs['distillation']} epochs) and gate ({epochs['gate']} epochs) on the same "
        f"{found['images']} images with the same stand-in: ours is <b>{number(found['ratio'])} times</b> as fast. The "
        f"authors' answers had {number(answers['tokens_per_answer'])} tokens on average, "
        f"{number(100 * answers['unparsable_share'])} % could not be parsed.</p>"
    )
    if "ratio" in large:
        text += (
            f"<p>Projected for {escape(large['model'])} from what a picture costs in <code>{escape(large['report'])}"
            f"</code>: at least {number(large['ratio'])} times, with the authors' answers counted as scored ones.</p>"
        )
    return text + table(rows) + picture(bars(stages), "seconds per stage under both schedules")


def limit(found: Mapping[str, Any]) -> str:
    rows = {}
    for name, goal in found["goals"].items():
        met = f"{'met' if goal['met'] else 'NOT met'} (at most {goal['at_most']:g})"
        rows[name.replace("_", " ")] = {"measured": found[name], "goal": met}
    text = "<p>{:,} images. Ablations: {heads} heads and {gates} gates, {seeds} seeds each.</p>"
    plot = picture(bars(found["parts"]), "seconds of each part")
    return text.format(found["images"], **found["trained"]) + table(rows) + plot


def growth(found: Mapping[str, Any]) -> str:
    sizes, rows = {int(n): parts for n, parts in found["sizes"].items()}, {}
    for part, rates in found["growth"].items():
        spent = {n: sizes[n][part] for n in sorted(sizes)}
        rows[part] = {
            f"{n:,}: s / MB": f"{number(s['seconds'])} / {s['peak_memory_mb']:.0f}" for n, s in spent.items()
        }
        rows[part] |= {"exponent of time": rates["time_exponent"], "bytes an image": rates["bytes_per_picture"]}
    text = f"<p>LoRA takes {found['lora_steps']} steps at every size. Exponent 1: time is linear in images.</p>"
    return text + table(rows) + picture(curves(sizes), "time and memory of every part by number of images")


def scoring(found: Mapping[str, Any]) -> str:
    rows, unparsable = {}, {"scoring": 0.0, "generating": found["unparsable_percent"]}
    for way in unparsable:
        rows[way] = {"seconds": found[f"seconds_{way}"], "images a second": found["images"] / found[f"seconds_{way}"]}
        rows[way] |= {"accuracy, %": found["accuracy_percent"][way], "unparsable, %": unparsable[way]}
    text = (
        f"<p>The same {found['images']} images: scoring is {number(found['ratio'])} times as fast; the answers agree "
        f"on {number(found['agreement_percent'])} % of the images.</p>"
    )
    return text + table(rows)


def steps(found: Mapping[str, Any]) -> str:
    rows = {
        name: {f"{variant}, ms": ms for variant, ms in spent.items()} | {"gain side by side": gain}
        for (name, spent), gain in zip(found["milliseconds"].items(), found["side_by_side_gain"].values(), strict=True)
    }
    text = (
        "<p>One training step. The gain side by side: what {0} processes with a thread each do in the time in which "
        "{0} threads do one network; less where the last dataset finds no partner.</p>"
    )
    return text.format(found["all_threads"]) + table(rows)


def where(found: Mapping[str, Any]) -> str:
    total = found["total"]
    rows = {
        name: {**parts, "all": sum(parts.values())} for name, parts in {**found["notebooks"], "all": total}.items()
    }
    order = "Drawing, teachers, heads, gates: side by side." if found["side_by_side"] else "One after another."
    largest = ", ".join(sorted(total, key=total.get, reverse=True)[:3])
    text = f"<p>{number(sum(total.values()) / 60)} minutes in all; most of it: {largest}. {order}</p>"
    return text + table(rows) + picture(bars(found["notebooks"]), "seconds of each notebook by kind")


PARTS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "where": ("Where the time of make reproduce goes", where),
    "schedules": ("Both schedules", schedules),
    "limit": ("How close to the limit", limit),
    "scoring": ("Scoring against generating", scoring),
    "steps": ("Threads, precision, layout", steps),
    "growth": ("Growth", growth),
}


def write(out: Path) -> Path:
    """Write `index.html` beside the JSON files."""
    body, missing = "", [name for name in PARTS if not (out / f"{name}.json").is_file()]
    for name, (title, show) in PARTS.items():
        if name in missing:
            continue
        found = read_json(out / f"{name}.json")
        here, git = found["machine"], found["git"]
        note = (
            f"{here['cpu']}, {here['cores']} cores, {here['gpu'] or 'no GPU'}; {found['written']}; load average at "
            f"the end {found['load_average']:.1f}; commit {git.get('commit', 'none')[:10]}"
            f"{' with changes' if git.get('dirty') else ''}"
        )
        link = f"<a href='{name}.json'>{name}.json</a>"
        body += f"<h2>{escape(title)}</h2>{show(found)}<p class=soft>{escape(note)}. {link}</p>"
    gone = f"<p class=bad>Not measured: {', '.join(missing)}.</p>" if missing else ""
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>emonb: measurements</title><style>{CSS}</style><h1>Measurements</h1>"
        f"<p class=soft>The stand-in VLM on one drawn dataset, unless said otherwise.</p>{gone}{body}</html>\n"
    )
    atomic_write(make_folder(out) / "index.html", page)
    return out / "index.html"


if __name__ == "__main__":
    print(write(arguments(__doc__, run=False).parse_args().out))
