"""All notebooks, one after another, headless: what is up to date is skipped, as `make` does.

`run.json` says what was run, on which machine, how long it took and how much memory; it also keeps
for each notebook a fingerprint of what it depends on and the files that it wrote.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from emonb.errors import EmonbError
from emonb.freshness import (
    cell_weights,
    code_cells,
    fingerprints,
    seconds_of,
    settings_hash,
    sha256,
    snapshot,
    stages_of,
)
from emonb.machine import machine
from emonb.run_checks import check_datasets, exclusive, is_chosen
from emonb.settings import Settings, load_settings, project_root
from emonb.store import STAGES, git_state, library_versions, make_folder, read_json, write_json
from emonb.workspace import parse_force

__all__ = ["NOTEBOOKS", "check_datasets", "run"]

# Seconds of a first run of the mini profile on 2 cores: shares of the bar until there is an own run.json.
NOTEBOOKS = {
    "01_data": 30.0,
    "02_triplets": 15.0,
    "03_instruction_tuning": 290.0,
    "04_teacher": 220.0,
    "05_distillation": 70.0,
    "06_gate": 45.0,
    "07_tables": 20.0,
    "08_complementarity": 55.0,
    "09_try_your_image": 12.0,
}
_PACE = {"smoke": 0.15}  # of the mini profile's seconds
_SHOWS = ("07_tables", "08_complementarity")  # worth executing over what is there when an earlier one failed


def run(
    profile: str = "mini",
    *,
    datasets: str = "",
    images: str = "",
    out: str = "",
    seeds: str = "",
    force: str = "",
    notebooks: str = "",
    folder: Path | None = None,
) -> Path:
    """Execute the notebooks that are not up to date, then write the report; returns the results folder.

    Args:
        profile, datasets, images, out, seeds, force: the notebooks' parameters; relative paths count
            from the project root.
        notebooks: comma-separated numbers (`01,02`) to restrict the run to.
        folder: where the notebooks are; default `notebooks/` of the project.

    Raises:
        EmonbError: a user's mistake, found before anything starts; `NotebookFailed` for a failing cell.
    """
    parameters = {"profile": profile, "datasets": datasets, "images": images, "out": out, "seeds": seeds}
    settings = load_settings(**parameters)
    check_datasets(settings)
    forced = parse_force(force)
    parameters = {name: value for name, value in parameters.items() if value}
    if profile == "mini":  # the notebooks' own default: nothing to inject
        del parameters["profile"]
    sources = sorted((folder or project_root() / "notebooks").resolve().glob("[0-9]*.ipynb"))
    if not sources:
        raise EmonbError(f"{folder or project_root() / 'notebooks'}: no notebooks; start from the project's folder")
    from emonb.execution import inspect_parameters

    for source in sources:
        inspect_parameters(source, {**parameters, "force": force})
    chosen = [source for source in sources if is_chosen(source, notebooks)]
    if not chosen:
        raise EmonbError(f"notebooks {notebooks!r}: none of {', '.join(s.stem[:2] for s in sources)}")
    results = make_folder(settings.out_path)
    with exclusive(results), chdir(project_root()):
        _Run(settings, parameters, results, sources).execute(chosen, forced)
    return results


class _Run:
    """The state of one run and the file `run.json` that records it."""

    def __init__(self, settings: Settings, parameters: Mapping[str, str], out: Path, sources: Sequence[Path]) -> None:
        self.settings, self.parameters, self.out, self.sources = settings, parameters, out, sources
        self.start = time.monotonic()
        self.progress_file = out / ".progress.json"
        earlier: dict[str, Any] = {}
        with suppress(EmonbError):
            earlier = read_json(out / "run.json").get("notebooks", {})
        self.records = {s.stem: earlier.get(s.stem, {}) for s in sources}
        self.fingerprints = fingerprints(sources, settings)

    def execute(self, chosen: Sequence[Path], forced: Sequence[str]) -> None:
        """Run what is stale; record after each notebook; then the report, also after a failure or Ctrl-C."""
        from emonb.execution import OverallBar, short_path

        stale = self._stale(chosen, forced)
        for source in chosen:
            if source not in stale:
                self.records[source.stem]["status"] = "up to date"
        bar = OverallBar({s.stem: self._expected(s.stem) for s in stale}, self.progress_file)
        try:
            current = len(chosen) - len(stale)
            bar.say(f"{current} notebooks up to date, {len(stale)} to run, results in {short_path(self.out)}")
            self._execute_all(stale, forced, bar)
            self._report()
            totals = self._totals()
            bar.say(
                f"done in {totals['seconds_wall_this_run']:.0f} s, peak memory {totals['peak_memory_mb']:.0f} MB: "
                f"{short_path(self.out / 'index.html')}"
            )
        finally:
            bar.close()
            self.progress_file.unlink(missing_ok=True)

    def _execute_all(self, stale: Sequence[Path], forced: Sequence[str], bar: Any) -> None:
        left = list(stale)
        try:
            for number, source in enumerate(stale, 1):
                del left[0]
                own = [stage for stage in forced if STAGES[stage] == source.stem]  # later notebooks only read it
                parameters = {**self.parameters, **({"force": ",".join(own)} if own else {})}
                self._execute_one(source, parameters, bar, f"{number}/{len(stale)}")
        except BaseException as error:  # Ctrl-C too: what is there is worth a page
            self._salvage(left, error, bar)
            raise

    def _salvage(self, left: Sequence[Path], error: BaseException, bar: Any) -> None:
        """After a failure: tables and figures of the predictions that are there, and a report of what is not.

        Nothing here may hide the error that led here: what fails too is one more line.
        """
        from emonb.execution import NotebookFailed, short_path

        for source in left:
            if self.records[source.stem]:  # of an earlier run
                self.records[source.stem]["status"] = "earlier run"
        shown = [source for source in left if source.stem in _SHOWS]
        if isinstance(error, NotebookFailed) and any((self.out / "predictions").glob("*.parquet")):
            for source in shown:
                try:
                    self._execute_one(source, self.parameters, bar, "partial", partial=True)
                except NotebookFailed:
                    continue  # said by the bar, kept in run.json
                except KeyboardInterrupt:
                    break
        try:
            self._report()
            bar.say(f"report of what is there: {short_path(self.out / 'index.html')}")
        except Exception as also:
            bar.say(f"no report: {type(also).__name__}: {' '.join(str(also).split())[:300]}")

    def _report(self) -> None:
        from emonb.clean import sign
        from emonb.report import write_report

        self._write()
        write_report(self.out)
        sign(self.out / "notebooks")

    def _execute_one(
        self, source: Path, parameters: Mapping[str, str], bar: Any, number: str, *, partial: bool = False
    ) -> None:
        """Execute and record one notebook; `partial`: over incomplete results, so the next run does it again."""
        from emonb.execution import NotebookFailed, execute

        name = source.stem
        before, events = snapshot(self.out), self.out / "artifacts" / "events.jsonl"
        offset = events.stat().st_size if events.is_file() else 0
        old = self.records[name]
        for later in [s.stem for s in self.sources[self.sources.index(source) :]]:
            self.records[later].pop("fingerprint", None)  # stale until executed again, also if we are killed
        self._write()
        cells = code_cells(source) + bool(parameters)  # papermill inserts one with the parameters
        durations = old.get("cell_seconds", [])
        guessed = [1.0] * bool(self.parameters) + cell_weights(source)
        bar.notebook(name, durations if len(durations) == cells else guessed)
        start = time.monotonic()
        target = self.out / "notebooks" / source.name
        environment = {
            "EMONB_HEADLESS": "1",
            "EMONB_NOTEBOOK": name,
            "EMONB_PROGRESS_FILE": str(self.progress_file),
            "PYTHONHASHSEED": "0",
            "TOKENIZERS_PARALLELISM": "false",
            **({"HF_HUB_OFFLINE": "1"} if self.settings.profile in ("smoke", "mini") else {}),
        }
        record: dict[str, Any] = {"status": "failed", "error": "stopped before its end"}
        try:
            record["cell_seconds"] = execute(source, target, parameters, environment, bar)
            record["status"] = "partial" if partial else "executed"
            record |= {} if partial else {"fingerprint": self.fingerprints[name]}
            del record["error"]
        except NotebookFailed as error:
            record["error"] = error.reason
            bar.say(f"{number} {name} failed" + (f": {error.reason}" if partial else ""))
            raise
        except KeyboardInterrupt:
            record["status"] = "stopped"
            raise
        finally:
            record["seconds"] = round(time.monotonic() - start, 2)
            record["cells"] = code_cells(source)
            record["stages"] = stages_of(events, offset, name)
            earlier = old.get("peak_memory_mb", 0.0) if any(s["hit"] for s in record["stages"]) else 0.0
            record["peak_memory_mb"] = max(bar.done(), earlier)  # of the run that made the results, too
            kept = old.get("outputs", {}) if old.get("settings") == settings_hash(self.settings) else {}
            changed = {path for path, stamp in snapshot(self.out).items() if before.get(path) != stamp}
            paths = sorted(p for p in changed | set(kept) if (self.out / p).is_file())
            record["settings"] = settings_hash(self.settings)
            record["outputs"] = {path: sha256(self.out / path) for path in paths}
            self.records[name] = record
            self._write()
        bar.say(f"{number} {name} {record['seconds']:.0f} s, {record['peak_memory_mb']:.0f} MB")

    def _stale(self, chosen: Sequence[Path], forced: Sequence[str]) -> list[Path]:
        """The chosen notebooks from the first one that is not up to date."""
        for position, source in enumerate(chosen):
            if source.stem in {STAGES[stage] for stage in forced} or not self._is_current(source):
                return list(chosen[position:])
        return []

    def _is_current(self, source: Path) -> bool:
        record = self.records[source.stem]
        if record.get("fingerprint") != self.fingerprints[source.stem]:
            return False
        if not (self.out / "notebooks" / source.name).is_file():
            return False
        for stage in record.get("stages", []):
            folder = self.out / "artifacts" / stage["stage"]
            if not (folder / stage["key"] / "provenance.json").is_file():
                return False
            with suppress(EmonbError):
                if read_json(folder / f"{stage['name']}.json") == {"key": stage["key"]}:
                    continue
            return False
        outputs = record.get("outputs", {})
        return all((self.out / p).is_file() and sha256(self.out / p) == sha for p, sha in outputs.items())

    def _expected(self, name: str) -> float:
        """Seconds that a notebook should take: as measured, stages that were in the store included."""
        record = self.records[name]
        if "seconds" in record:
            return record["seconds"] + seconds_of(s for s in record.get("stages", []) if s["hit"])
        return NOTEBOOKS.get(name, 10.0) * _PACE.get(self.settings.profile, 1.0)

    def _totals(self) -> dict[str, float]:
        """Seconds from nothing = the notebooks without the stages built in them + each stage once."""
        built, own, peaks = {}, 0.0, [0.0]
        for record in self.records.values():
            stages = record.get("stages", [])
            built |= {(s["stage"], s["name"], s["key"]): s for s in stages}
            own += record.get("seconds", 0.0) - seconds_of(s for s in stages if not s["hit"])
            peaks += [record.get("peak_memory_mb", 0.0), *(s["peak_memory_mb"] for s in stages)]
        return {
            "seconds_wall_this_run": round(time.monotonic() - self.start, 1),
            "seconds_compute": round(own + seconds_of(built.values()), 1),
            "peak_memory_mb": max(peaks),
        }

    def _write(self) -> None:
        write_json(
            self.out / "run.json",
            {
                "written": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": machine(),
                "versions": library_versions(),
                "git": git_state(),
                "profile": self.settings.profile,
                "seeds": self.settings.seeds,
                "totals": self._totals(),
                "settings": {**self.settings.model_dump(mode="json"), "out": _short(self.out)},
                "notebooks": self.records,
            },
        )


def _short(path: Path) -> str:
    return os.path.relpath(path, project_root())
