"""Where the time of `make reproduce` goes: each notebook's seconds by kind of work.

    python bench/where.py --run build/mini

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
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import arguments, save

from emonb.freshness import seconds_of

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


def imports_of(sources: list[str]) -> list[float]:
    """Seconds of each cell's import statements, in a fresh process, in order."""
    found = []
    for source in sources:
        nodes = [n for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom)]
        found.append("\n".join(map(ast.unparse, nodes)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TIMED], input=json.dumps(found), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"imports of a notebook failed:\n{done.stderr}")
    return [float(line) for line in done.stdout.split()]


def profile(record: Mapping[str, Any], cells: list[dict[str, Any]], imports: list[float]) -> dict[str, float]:
    """Seconds of one notebook by kind.

    Args:
        record: the runner's notes about it.
        cells: its executed code cells.
        imports: seconds of each cell's imports.
    """
    durations = [cell["metadata"].get("papermill", {}).get("duration") or 0.0 for cell in cells]
    stages = record.get("stages", [])
    found = {"kernel": record["seconds"] - sum(durations), "imports": sum(map(min, imports, durations))}
    found |= {kind: seconds_of(s for s in stages if s["stage"] in names) for kind, names in KINDS.items()}
    left = [max(0.0, d - i) for d, i in zip(durations, imports, strict=True)]
    drawn = [bool(DRAWS.search("".join(cell["source"]))) for cell in cells]
    found["figures"] = sum(s for s, draws in zip(left, drawn, strict=True) if draws)
    made_now = seconds_of(s for s in stages if not s["hit"])
    found["rest"] = max(0.0, sum(left) - found["figures"] - made_now)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, default=Path("build/mini"))
    options = parser.parse_args()
    start = time.monotonic()
    if not (options.run / "run.json").is_file():
        print(f"{options.run}: no finished run; `make reproduce` makes one")
        return
    run = json.loads((options.run / "run.json").read_text(encoding="utf-8"))
    found = {}
    for name, record in run["notebooks"].items():
        path = options.run / "notebooks" / f"{name}.ipynb"
        if record.get("status") not in ("executed", "up to date") or not path.is_file():
            raise SystemExit(f"{name}: {record.get('status', 'not run')}; `make reproduce` finishes the run")
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        found[name] = profile(record, cells, imports_of(["".join(c["source"]) for c in cells]))
        print(f"{name:24s}" + "".join(f" {kind} {seconds:.1f}" for kind, seconds in found[name].items()))
    total = {kind: sum(f[kind] for f in found.values()) for kind in next(iter(found.values()))}
    side_by_side = run["settings"].get("side_by_side", False)
    written = {"notebooks": found, "total": total, "totals": run["totals"], "side_by_side": side_by_side}
    save(options.out, "where", written, time.monotonic() - start)


if __name__ == "__main__":
    main()
