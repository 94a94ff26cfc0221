"""Where the time of `make reproduce` goes: each notebook's seconds by kind of work.

    python -m tools.bench.where --run build/mini

Read from what the runner noted (`run.json`, the cells' durations in the executed notebooks); imports are measured
anew, cell by cell in a fresh process. `kernel`: from the start of a notebook to its first cell and from its last cell
to its end. `drawing`: the drawn world. `passes`: pictures through networks. `figures`: cells that draw or show
pictures. `rest`: tables, reading, and all else. A result that an earlier run had made counts as if made now.

Writes `where.json`.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from emonb.files import read_json
from emonb.store import STAGES
from tools.bench.common import arguments, save  # importing it declares the stages

KINDS = {
    "drawing": ("samples",),
    "passes": ("features", "base_predictions", "vlm_predictions", "cost"),
    "training": ("adapter", "teacher", "head", "gate"),
}
DRAWS = re.compile(r"\bfigures\.|as_image\(|explore\(|_sheet\(|\bsaliency_|\bdisplay\(")
TIMED = """
import json, sys, time
for source in json.load(sys.stdin):
    start = time.perf_counter()
    exec(source, {})
    print(time.perf_counter() - start)
"""


def imports_of(sources: Iterable[str]) -> list[float]:
    """Seconds of each cell's import statements, in a fresh process, in order."""
    nodes = [[n for n in ast.parse(s).body if isinstance(n, ast.Import | ast.ImportFrom)] for s in sources]
    found = json.dumps(["\n".join(map(ast.unparse, cell)) for cell in nodes])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TIMED], input=found, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"imports of a notebook failed:\n{done.stderr}")
    return [float(line) for line in done.stdout.split()]


def seconds_of(stages: Iterable[Mapping[str, Any]]) -> float:
    """Wall time in which results were made: seconds in which several were made at once count once."""
    ends = [(datetime.fromisoformat(stage["created"]).timestamp(), stage["seconds"]) for stage in stages]
    total, until = 0.0, float("-inf")
    for start, end in sorted((end - seconds, end) for end, seconds in ends):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def profile(
    name: str, record: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], imports: Sequence[float]
) -> dict[str, float]:
    """Seconds of one notebook by kind.

    Args:
        record: the runner's notes about it: `seconds`, and the results (`stages`) that it used.
        cells: its executed code cells.
        imports: seconds of each cell's imports.
    """
    durations = [cell["metadata"].get("papermill", {}).get("duration") or 0.0 for cell in cells]
    own = [stage for stage in record["stages"] if STAGES[stage["stage"]].notebook == name]
    found = {"kernel": record["seconds"] - sum(durations), "imports": sum(map(min, imports, durations))}
    found |= {kind: seconds_of(s for s in own if s["stage"] in names) for kind, names in KINDS.items()}
    left = [max(0.0, d - i) for d, i in zip(durations, imports, strict=True)]
    drawn = [bool(DRAWS.search("".join(cell["source"]))) for cell in cells]
    found["figures"] = sum(s for s, draws in zip(left, drawn, strict=True) if draws)
    made_now = seconds_of(s for s in own if not s["hit"])
    found["rest"] = max(0.0, sum(left) - found["figures"] - made_now)
    return found


def main() -> None:
    parser = arguments(__doc__, run=False)
    parser.add_argument("--run", type=Path, default=Path("build/mini"))
    options = parser.parse_args()
    run = read_json(options.run / "run.json") if (options.run / "run.json").is_file() else {"notebooks": {"": {}}}
    notebooks, found = run["notebooks"], {}
    if not all(record.get("status") in ("executed", "up to date") for record in notebooks.values()):
        print(f"{options.run}: no finished run; `make reproduce` makes one")
        return
    for name, record in notebooks.items():
        notebook = read_json(options.run / "notebooks" / f"{name}.ipynb")
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        found[name] = profile(name, record, cells, imports_of("".join(cell["source"]) for cell in cells))
    total = {kind: sum(parts[kind] for parts in found.values()) for kind in found[name]}
    side_by_side = run["settings"]["side_by_side"]
    save(options.out, "where", {"notebooks": found, "total": total, "side_by_side": side_by_side})


if __name__ == "__main__":
    main()
