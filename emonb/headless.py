"""All notebooks, one after another, headless by papermill: what is up to date is skipped, as `make` does.

`run.json` says what was run, on which machine, how long it took and how much memory. Whether a notebook is up to date
is one fingerprint in the metadata of its executed copy: over its cells, the settings, the code that they reach, the
results that it used, and the files that it read and wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
import papermill
import psutil
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from tqdm import tqdm

from emonb.errors import EmonbError
from emonb.files import atomic_write, locked, make_folder, read_json, write_json
from emonb.machine import git_state, library_versions, lock_state, machine
from emonb.progress import read_progress
from emonb.reach import reached_by
from emonb.releases.imports import listing_digest
from emonb.run import parse_stages, stage_code
from emonb.settings import Settings, load_settings, project_root
from emonb.show.notebooks import sign
from emonb.show.report import write_report
from emonb.store import STAGES, Store
from emonb.world import DRAWN

# Seconds of a first run of the mini profile on 2 cores: shares of the bar until there is an own run.json.
NOTEBOOKS = {
    "01_data": 30,
    "02_triplets": 15,
    "03_instruction_tuning": 290,
    "04_teacher": 220,
    "05_distillation": 70,
    "06_gate": 45,
    "07_tables": 20,
    "08_complementarity": 55,
    "09_try_your_image": 12,
}
_SHOWS = ("07_tables", "08_complementarity")  # worth executing over what is there when an earlier one failed
_MORE = ("images", "seeds", "force")  # parameters that stand in a cell of their own, below the first one


class NotebookFailed(EmonbError):
    """A cell failed; the message says which, why, and where the executed copy lies; `reason` says why in one line."""

    def __init__(self, source: Path, target: Path, cell: str, what: str) -> None:
        super().__init__(
            f"notebook {source.stem} failed in {cell}\n  {what[:2000]}\n"
            f"  executed copy, marked where it stopped: {_short(target)}\n"
            "  the next run goes on from the finished results"
        )
        self.reason = f"{cell}: {' '.join(what.split())[:300]}"


def run(
    profile: str = "mini",
    *,
    datasets: str = "",
    images: str = "",
    out: str = "",
    seeds: str = "",
    force: str = "",
    keep: str = "",
    notebooks: str = "",
    folder: Path | None = None,
) -> Path:
    """Execute the notebooks that are not up to date, then write the report; returns the results folder.

    Args:
        profile, datasets, images, out, seeds, force: the notebooks' parameters; relative paths count
            from the project root.
        keep: stages of which an older result is taken in spite of changed code.
        notebooks: comma-separated numbers (`01,02`) to restrict the run to.
        folder: where the notebooks are; default `notebooks/` of the project.

    Raises:
        EmonbError: a user's mistake, found before anything starts; `NotebookFailed` for a failing cell.
    """
    given = {"profile": profile, "datasets": datasets, "images": images, "out": out, "seeds": seeds}
    settings, forced = load_settings(**given), parse_stages("force", force)
    check_datasets(settings)
    parse_stages("keep", keep)
    parameters = {name: value for name, value in given.items() if value}
    if profile == "mini":  # the notebooks' own default: nothing to inject
        del parameters["profile"]
    place = (folder or project_root() / "notebooks").resolve()
    sources = sorted(place.glob("[0-9]*.ipynb"))
    if not sources:
        raise EmonbError(f"{place}: no notebooks; start from the project's folder")
    for source in sources:
        known = (*papermill.inspect_notebook(str(source)), *_MORE)  # papermill only warns of an unknown one
        if unknown := [name for name in parameters if name not in known]:
            raise EmonbError(f"{source}: no parameter {unknown[0]!r} in its cell tagged 'parameters'; add it there")
    wanted = [part.strip() for part in notebooks.split(",") if part.strip()]
    chosen = [s for s in sources if not wanted or s.stem in wanted or s.stem.split("_")[0] in wanted]
    if not chosen:
        raise EmonbError(f"notebooks {notebooks!r}: none of {', '.join(s.stem[:2] for s in sources)}")
    results = make_folder(settings.out_path)
    busy = f"{results}: another run is writing here; wait for it or choose another OUT"
    if threading.current_thread() is threading.main_thread():
        for end in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(end) is signal.SIG_DFL:  # not under nohup
                signal.signal(end, signal.default_int_handler)  # as Ctrl-C: a report of what is there remains
    with locked(results / ".lock", busy), chdir(project_root()), patch.dict(os.environ, {"EMONB_KEEP": keep}):
        _Run(settings, parameters, sources).execute(chosen, forced)
    return results


def check_datasets(settings: Settings) -> None:
    """Raise `EmonbError` for a dataset that is neither drawn nor below the images folder."""
    root = settings.images_path
    if root is not None and not root.is_dir():
        raise EmonbError(f"images: {root} is no folder; give the parent of the datasets' folders (--images, IMAGES)")
    for name in settings.datasets:
        if name not in DRAWN and root is None:
            raise EmonbError(
                f"datasets: unknown dataset {name!r}; drawn ones are {', '.join(DRAWN)}; "
                "for one on disk also give its parent folder: --images ROOT (IMAGES=ROOT)"
            )
        if name not in DRAWN and not (root / name).is_dir():
            there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:20]) or "no folder"
            raise EmonbError(f"datasets: no folder {root / name}; {root} holds: {there}")


class _Run:
    """The state of one run and the file `run.json` that records it."""

    def __init__(self, settings: Settings, parameters: Mapping[str, str], sources: Sequence[Path]) -> None:
        self.settings, self.parameters, self.sources, self.out = settings, parameters, sources, settings.out_path
        self.store, self.start = Store(self.out / "artifacts"), time.monotonic()
        earlier: Any = {}
        with suppress(EmonbError):
            earlier = read_json(self.out / "run.json").get("notebooks", {})
        self.records: dict[str, dict[str, Any]] = {s.stem: earlier.get(s.stem, {}) for s in sources}

    def execute(self, chosen: Sequence[Path], forced: Sequence[str]) -> None:
        """Run what is stale; record after each notebook; then the report, also after a failure or Ctrl-C."""
        bar = Bar({s.stem: self._expected(s.stem) for s in chosen}, self.out / ".progress")
        left = list(chosen)
        try:
            for source in chosen:
                del left[0]
                own = [stage for stage in forced if STAGES[stage].notebook == source.stem]
                if not own and self._is_current(source):
                    self.records[source.stem]["status"] = "up to date"
                    bar.done(source.stem)
                else:
                    self._execute_one(source, {**self.parameters, **({"force": ",".join(own)} if own else {})}, bar)
            self._report()
            statuses = [self.records[s.stem]["status"] for s in chosen]
            bar.say(f"{statuses.count('up to date')} notebooks up to date, {statuses.count('executed')} executed")
            seconds, peak = time.monotonic() - self.start, self._peak()
            bar.say(f"done in {seconds:.0f} s, peak memory {peak:.0f} MB: {_short(self.out / 'index.html')}")
        except BaseException as error:  # Ctrl-C too: what is there is worth a page
            self._salvage(left, error, bar)
            raise
        finally:
            bar.close()

    def _salvage(self, left: Sequence[Path], error: BaseException, bar: Bar) -> None:
        """After a failure: tables and figures of the predictions that are there, and a report of what is not.

        Nothing here may hide the error that led here: what fails too is one more line.
        """
        for source in left:
            if self.records[source.stem]:  # of an earlier run
                self.records[source.stem]["status"] = "earlier run"
        if isinstance(error, NotebookFailed) and any((self.out / "predictions").glob("*.parquet")):
            for source in (source for source in left if source.stem in _SHOWS):
                with suppress(NotebookFailed):  # said by the bar, kept in run.json
                    self._execute_one(source, self.parameters, bar, partial=True)
        try:
            self._report()
            bar.say(f"report of what is there: {_short(self.out / 'index.html')}")
        except Exception as also:
            bar.say(f"no report: {type(also).__name__}: {' '.join(str(also).split())[:300]}")

    def _report(self) -> None:
        self._write()
        write_report(self.out)
        sign(self.out / "notebooks")

    def _execute_one(self, source: Path, parameters: Mapping[str, str], bar: Bar, *, partial: bool = False) -> None:
        """Execute and record one notebook; `partial`: over incomplete results, so the next run does it again."""
        name, old, start = source.stem, self.records[source.stem], time.monotonic()
        events, target = self.out / "artifacts" / "events.jsonl", self.out / "notebooks" / source.name
        offset = events.stat().st_size if events.is_file() else 0
        offline = {"HF_HUB_OFFLINE": "1"} if self.settings.vlm.base == "stand-in" else {}
        environment = {
            "EMONB_HEADLESS": "1",
            "EMONB_NOTEBOOK": name,
            "EMONB_PROGRESS_FILE": str(bar.progress_file),
            "PYTHONHASHSEED": "0",
            "TOKENIZERS_PARALLELISM": "false",
        }
        record: dict[str, Any] = {"status": "stopped"}
        bar.notebook(name)
        try:
            with patch.dict(os.environ, environment | offline):
                _papermill(source, target, parameters, bar)
            record = {"status": "partial" if partial else "executed"}
        except NotebookFailed as error:
            record = {"status": "failed", "error": error.reason}
            bar.say(f"{name} failed" + (f": {error.reason}" if partial else ""))
            raise
        finally:
            stages, files = _noted(events, offset, name)
            record["seconds"], peak, made = round(time.monotonic() - start, 2), bar.done(name), 0.0
            if old and any(s["hit"] for s in stages):  # some results are of an earlier run: its cost counts, too
                peak, made = max(peak, old.get("peak_memory_mb", 0.0)), old.get("seconds_made", 0.0)
            record |= {"peak_memory_mb": peak, "seconds_made": max(record["seconds"], made)}
            self.records[name] = {**record, "stages": stages, "files": files}
            self._write()
            if target.is_file():
                self._finish(source, target, record["status"] == "executed", stages, files)
        bar.say(f"{name} {record['seconds']:.0f} s, {record['peak_memory_mb']:.0f} MB")

    def _finish(self, source: Path, target: Path, whole: bool, stages: list[dict], files: list[str]) -> None:
        """Take machine paths out of papermill's notes; leave the fingerprint of a notebook that came to its end."""
        nb = nbformat.read(target, as_version=4)
        notes = nb.metadata.get("papermill", {})
        nb.metadata["papermill"] = {"parameters": notes.get("parameters", {}), "duration": notes.get("duration")}
        used = sorted({(stage["stage"], stage["name"]) for stage in stages})
        own = {"versions": library_versions(), "used": [list(pair) for pair in used], "files": files}
        nb.metadata["emonb"] = own | ({"fingerprint": self._fingerprint(source, own)} if whole else {})
        atomic_write(target, nbformat.writes(nb))

    def _is_current(self, source: Path) -> bool:
        try:
            own = read_json(self.out / "notebooks" / source.name)["metadata"]["emonb"]
            return own["fingerprint"] == self._fingerprint(source, own)
        except (EmonbError, KeyError, TypeError):
            return False

    def _fingerprint(self, source: Path, own: Mapping[str, Any]) -> str:
        """One digest of all that an executed notebook depends on, and of what it wrote."""
        cells = [(c["cell_type"], "".join(c["source"])) for c in read_json(source)["cells"]]
        root, results, files = self.settings.images_path, {}, [self.out / path for path in own["files"]]
        for stage, name in own["used"]:
            with suppress(EmonbError):
                results[f"{stage}/{name}"] = self.store.find(stage, name).key
        depends = {
            "cells": cells,
            "code": reached_by("\n".join(text for kind, text in cells if kind == "code")),
            "settings": self.settings.model_dump(mode="json", exclude={"out", "images"}),
            "pictures": [listing_digest(root / name) for name in self.settings.datasets] if root else [],
            "results": results,
            "stages": {stage: stage_code(stage) for stage, _ in own["used"] if stage in STAGES},
            "files": [hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else "" for f in files],
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]

    def _expected(self, name: str) -> float:
        """Seconds that a notebook should take: as measured, results that were there included."""
        record = self.records[name]
        if "seconds" in record:
            return record["seconds"] + sum(s["seconds"] for s in record["stages"] if s["hit"]) / 2  # two at a time
        return NOTEBOOKS.get(name, 10.0) * (0.15 if self.settings.profile == "smoke" else 1.0)

    def _peak(self) -> float:
        return max((record.get("peak_memory_mb", 0.0) for record in self.records.values()), default=0.0)

    def _write(self) -> None:
        content = {
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": library_versions(),
            "lock": lock_state(),
            "differs_from_notebooks": _other_versions(self.sources),
            "git": git_state(),
            "profile": self.settings.profile,
            "seeds": self.settings.seeds,
            "totals": {
                "seconds_wall_this_run": round(time.monotonic() - self.start, 1),
                "seconds_compute": round(sum(r.get("seconds_made", 0.0) for r in self.records.values()), 1),
                "peak_memory_mb": self._peak(),
            },
            "settings": {**self.settings.model_dump(mode="json"), "out": os.path.relpath(self.out, project_root())},
            "notebooks": self.records,
        }
        write_json(self.out / "run.json", content)


def _noted(events: Path, offset: int, notebook: str) -> tuple[list[dict[str, Any]], list[str]]:
    """What a notebook used of the store (each result once; `hit`: it was there before), and its files."""
    lines = events.read_bytes()[offset:].splitlines() if events.is_file() else []
    noted = [event for event in map(json.loads, lines) if event.pop("notebook") == notebook]
    stages: dict[tuple[str, str, str], dict[str, Any]] = {}
    for event in noted:
        if "stage" in event:
            stages.setdefault((event["stage"], event["name"], event["key"]), event)
    return list(stages.values()), sorted({event["file"] for event in noted if "file" in event})


def _other_versions(sources: Sequence[Path]) -> dict[str, list[str]]:
    """Libraries whose version is not the one of the committed notebooks: [here, there]."""
    there: dict[str, str] = {}
    for source in sources:
        there |= read_json(source)["metadata"].get("emonb", {}).get("versions", {})
    here = library_versions()
    return {name: [here.get(name, "none"), v] for name, v in there.items() if here.get(name) != v}


# ---- one notebook --------------------------------------------------------------------------------------------------


class _OwnKernel(AsyncKernelManager):
    """The kernel of this interpreter: a `python3` kernel that the user registered elsewhere cannot win."""

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


class _Engine(NBClientEngine):
    """papermill's engine, telling our bar where it is."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, bar: Bar, **kwargs: Any) -> Any:
        total, start = len(nb_man.nb.cells), nb_man.cell_start

        def told(cell: Any, cell_index: int | None = None, **more: Any) -> None:
            bar.cell = f"cell {(cell_index or 0) + 1}/{total}"
            start(cell, cell_index, **more)

        nb_man.cell_start = told
        quiet = ["--IPKernelApp.log_level=50"]  # kernels warn of TCP and of their own shutdown on our console
        options = {"kernel_manager_class": _OwnKernel, "extra_arguments": quiet}
        return super().execute_managed_notebook(nb_man, kernel_name, **options, **kwargs)


papermill_engines.register("emonb", _Engine)


def _papermill(source: Path, target: Path, parameters: Mapping[str, Any], bar: Bar) -> None:
    """Execute a notebook into `target`, from the current folder; raises `NotebookFailed`, the marked copy is kept."""
    target.parent.mkdir(parents=True, exist_ok=True)
    options = {"engine_name": "emonb", "kernel_name": "python3", "progress_bar": False, "start_timeout": 120}
    paths = os.path.relpath(source), os.path.relpath(target)
    try:
        papermill.execute_notebook(*paths, dict(parameters), cwd=".", bar=bar, **options)
    except papermill.PapermillExecutionError as error:
        what = error.evalue.strip() if error.ename == "EmonbError" else f"{error.ename}: {error.evalue}".strip()
        raise NotebookFailed(source, target, f"In [{error.exec_count}]", what) from None
    except DeadKernelError:
        what = "the kernel died; most often because memory ran out: close programs or choose a smaller PROFILE"
        raise NotebookFailed(source, target, "the cell that was running", what) from None


def _short(path: Path) -> str:
    """A path for messages: relative to the current folder if it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


class Bar:
    """One bar for all notebooks: time gone and left, notebook, cell, inner loop; and the memory of this process and
    its kernels. In a terminal it is a tqdm bar; elsewhere (a CI log) a plain line every ten seconds.
    """

    def __init__(self, expected: Mapping[str, float], progress_file: Path) -> None:
        """`expected`: seconds each notebook to come took earlier, or should take."""
        self.left, self.progress_file, self.name, self.cell, self.peak = dict(expected), progress_file, "", "", 0.0
        self.start = self.since = time.monotonic()
        shape = {"bar_format": "{percentage:3.0f}%|{bar:20}|{desc}", "dynamic_ncols": True, "leave": False}
        self.screen = tqdm(total=sum(expected.values()) or 1.0, disable=not sys.stderr.isatty(), **shape)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def notebook(self, name: str) -> None:
        """A notebook starts."""
        self.name, self.cell, self.peak, self.since = name, "", 0.0, time.monotonic()

    def done(self, name: str) -> float:
        """A notebook ended, or was up to date; returns its peak memory in MB."""
        self.left.pop(name, None)
        self.name = ""
        return round(self.peak, 1)

    def say(self, line: str) -> None:
        """A line that stays."""
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Stop the thread and remove the bar."""
        self._stop.set()
        self._thread.join()
        self.screen.close()
        self.progress_file.unlink(missing_ok=True)

    def state(self) -> tuple[float, str]:
        """Seconds of expected work that are done, and the text beside the bar."""
        now, share = time.monotonic(), self.left.get(self.name, 0.0)
        left = sum(self.left.values()) - min(now - self.since, 0.95 * share)
        gone, to_come = (f"{x / 60:.0f} min" if x > 90 else f"{x:.0f} s" for x in (now - self.start, left))
        parts = f"{self.name} {self.cell}".strip() or "between notebooks", read_progress(self.progress_file)
        return self.screen.total - left, f" {gone} gone, about {to_come} left, {', '.join(filter(None, parts))}"

    def _watch(self) -> None:
        process, last = psutil.Process(), time.monotonic()
        while not self._stop.wait(0.5):
            with suppress(psutil.Error):  # a child ended while we looked
                family = (process, *process.children(recursive=True))
                self.peak = max(self.peak, sum(member.memory_info().rss for member in family) / 2**20)
            self.screen.n, text = self.state()
            self.screen.set_description_str(text)
            if self.screen.disable and time.monotonic() - last >= 10:
                last = time.monotonic()
                print(f"{self.screen.n / self.screen.total:4.0%}{text}", file=sys.stderr, flush=True)
