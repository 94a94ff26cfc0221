"""What a notebook depends on and what it wrote: the runner's reasons to execute it again or not."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from emonb.listing import listing_digest
from emonb.settings import Settings
from emonb.store import code_hash

__all__ = [
    "cell_weights",
    "code_cells",
    "fingerprints",
    "seconds_of",
    "settings_hash",
    "sha256",
    "snapshot",
    "stages_of",
]

_OUTPUTS = ("tables", "figures", "predictions", "models", "integrity")
_REHEARSAL = {p.stem for p in Path(__file__).parent.glob("rehearsal*.py")} | {"projection", "random_vlm"}
_RUNNER = {
    "run",
    "run_checks",
    "freshness",
    "execution",
    "cli",
    "machine",
    "progress",
    "clean",
    "__main__",
    "__init__",
}
_RUNNER |= {p.stem for p in Path(__file__).parent.glob("report*.py")}
_UNUSED = _RUNNER | _REHEARSAL


def fingerprints(sources: Sequence[Path], settings: Settings) -> dict[str, str]:
    """For each notebook: its cells, the code cells before it, settings, package code, pictures on disk."""
    package = Path(__file__).parent
    modules = [f"emonb.{p.stem}" for p in sorted(package.glob("*.py")) if p.stem not in _UNUSED]
    resources = [
        (p.relative_to(package).as_posix(), sha256(p))
        for p in sorted(package.glob("resources/**/*"))
        if p.is_file() and p.stem != "report"
    ]
    chain = _digest([settings_hash(settings), code_hash(*modules), resources, _listing(settings)])
    result = {}
    for source in sources:
        cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
        texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
        result[source.stem] = _digest([chain, texts])
        chain = _digest([chain, [text for kind, text in texts if kind == "code"]])
    return result


def settings_hash(settings: Settings) -> str:
    return _digest(settings.model_dump(mode="json", exclude={"out", "images"}))


def _listing(settings: Settings) -> dict[str, str]:
    """Names, sizes and times of the files of the datasets on disk, and of the sources of imported ones, as digests."""
    root = settings.images_path
    return {name: listing_digest(root / name) for name in settings.datasets} if root else {}


def stages_of(events: Path, offset: int, notebook: str) -> list[dict[str, Any]]:
    """What a notebook asked of the store, each result once; `hit`: it was there before the notebook."""
    if not events.is_file():
        return []
    stages: dict[tuple[str, str, str], dict[str, Any]] = {}
    with events.open("rb") as file:
        file.seek(offset)
        for line in file:
            event = json.loads(line)
            if event["notebook"] == notebook:
                fields = ("stage", "name", "key", "hit", "seconds", "created", "peak_memory_mb")
                stages.setdefault(
                    (event["stage"], event["name"], event["key"]), {field: event[field] for field in fields}
                )
    return list(stages.values())


def seconds_of(stages: Iterable[Mapping[str, Any]]) -> float:
    """Wall time in which results were made: seconds in which several were made at once count once."""
    spans, total, until = [], 0.0, float("-inf")
    for stage in stages:
        if "created" not in stage:  # noted by an earlier version, which made one after another
            total += stage["seconds"]
            continue
        end = datetime.fromisoformat(stage["created"]).timestamp()
        spans.append((end - stage["seconds"], end))
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def snapshot(out: Path) -> dict[str, tuple[int, int]]:
    """Change time (which copying cannot fake) and size of the outputs."""
    files = (p for folder in _OUTPUTS for p in (out / folder).rglob("*") if p.is_file())
    return {p.relative_to(out).as_posix(): ((s := p.stat()).st_ctime_ns, s.st_size) for p in files}


def cell_weights(source: Path) -> list[float]:
    """Guessed shares of a notebook's time per code cell before any run: the cells that call a stage take it."""
    cells = [c for c in json.loads(source.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    return [30.0 if re.search(r"(_stage|side_by_side)\(", "".join(c["source"])) else 1.0 for c in cells]


def code_cells(source: Path) -> int:
    return sum(c["cell_type"] == "code" for c in json.loads(source.read_text(encoding="utf-8"))["cells"])


def _digest(obj: Any) -> str:
    return hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
