"""All notebooks, one after another, headless by papermill: what is up to date is skipped, as `make` does.

`run.json` says what was run, on which machine, how long it took and how much memory. Whether a notebook is up to date
is one fingerprint in the metadata of its executed copy: over its cells, the settings, the code that they reach, the
results that it used, and the files that it read and wrote.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import nbformat
import pandas as pd
import papermill
import psutil
from huggingface_hub import try_to_load_from_cache
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from tqdm import tqdm

from emonb import annotate
from emonb.errors import EmonbError, PassingTrouble, StoppedEarly, visible
from emonb.files import atomic_write, claim_folder, file_digest, locked, read_json, write_json
from emonb.machine import git_state, hub_offline, library_versions, lock_state, machine
from emonb.pipeline import dataset_folder
from emonb.predictions import is_ours, load_all, read_review
from emonb.reach import reached_by
from emonb.releases.imports import listing_digest
from emonb.run import Run, parse_stages
from emonb.settings import Settings, checkpoint_of, from_root, load_settings, project_root
from emonb.show.notebooks import sign
from emonb.show.report import write_report
from emonb.store import STAGES, Store, stage_code
from emonb.tables import review as review_table

# Seconds of a first run of the mini profile on 2 cores: shares of the bar of a first run here.
NOTEBOOKS = {
    "01_data": 78,
    "02_triplets": 21,
    "03_instruction_tuning": 916,
    "04_teacher": 664,
    "05_distillation": 162,
    "06_gate": 90,
    "07_tables": 27,
    "08_complementarity": 80,
    "09_try_your_image": 14,
}
# What no answer depends on, of the settings; whose pictures they are about, the datasets' names say.
_NOT_IN_PREDICTIONS = {"profile", "out", "images", "datasets", "remarks", "side_by_side", "report"}
_SHOWS = ("07_tables", "08_complementarity")  # worth executing over what is there when an earlier one failed


class NotebookFailed(EmonbError):
    """A cell failed; the message says which, why, and where the executed copy lies; `reason` says why in one line."""

    def __init__(self, source: Path, target: Path, cell: str, what: str) -> None:
        super().__init__(
            *f"notebook {source.stem} failed in {cell}\n  {what[:2000]}".split("\n"),
            f"  executed copy, marked where it stopped: {target}",
            "  the next run goes on from the finished results",
        )
        self.reason = f"{cell}: {' '.join(what.split())[:300]}"


def run(
    profile: str = "mini",
    *,
    force: str = "",
    keep: str = "",
    notebooks: str = "",
    review: str = "",
    folder: Path | None = None,
    ask: Mapping[str, Any] | None = None,
    ask_images: int = 0,
    **given: str,
) -> Path:
    """Execute the notebooks that are not up to date, then write the report; returns the results folder.

    Args:
        profile, force, keep: as for `open_run`, as are in `given` datasets, images, out, seeds.
        notebooks: comma-separated numbers (`01,02`) to restrict the run to.
        folder: where the notebooks are; default `notebooks/` of the project, outside a checkout those of the package.
        ask: settings of `triplets` on whose terms a served model is asked first (`Run.ask`); `ask_images`: about how
            many test pictures of a dataset.
        review: a file that the explorer saved: the table `review` then shows accuracies after that review of labels.

    Raises:
        EmonbError: a user's mistake, found before anything starts; `NotebookFailed` for a failing cell.
    """
    settings, forced = load_settings(profile, **given), parse_stages("force", force)
    parse_stages("keep", keep)
    for name in settings.datasets:
        dataset_folder(settings, name)
    check_weights(settings)
    terms = load_settings(profile, **given, triplets=ask).triplets if ask else None
    if terms:
        annotate.check_server(terms)
    marks = read_review(from_root(review)) if review else None
    given = {"profile": profile if profile != "mini" else "", **given}  # the notebooks' own default: nothing to inject
    parameters = {name: value for name, value in given.items() if value}
    package = Path(__file__).resolve().parent  # beside it the notebooks of an editable install
    places = [folder] if folder else [base / "notebooks" for base in (project_root(), package, package.parent)]
    for place in places:
        if sources := sorted(place.resolve().glob("[0-9]*.ipynb")):
            break
    wanted = tuple(part.strip() for part in notebooks.split(",") if part.strip())
    chosen = [source for source in sources if not wanted or source.stem.startswith(wanted)]
    if not chosen:
        there = ", ".join(source.stem[:2] for source in sources) or "none"
        raise EmonbError(f"notebooks {notebooks or 'all'}: there is {there} in {place}")
    results = claim_folder(settings.out_path)
    busy = f"{results}: another run is writing here; wait for it or choose another OUT"
    environment = {
        "EMONB_HEADLESS": "1",
        "EMONB_KEEP": keep,
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # glibc keeps what one training step frees for the next: up to a quarter of a LoRA step on two threads
        "MALLOC_TRIM_THRESHOLD_": str(2**30),
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    }
    fetched = any(network.pretrained and not network.weights for network in settings.teacher.networks.values())
    environment |= {"HF_HUB_OFFLINE": "1"} if settings.vlm.base == "stand-in" and not fetched else {}
    with locked(results / ".lock", busy), chdir(project_root()), tempfile.TemporaryDirectory() as scratch:
        notes = {"EMONB_EVENTS": f"{scratch}/events", "EMONB_PROGRESS_FILE": f"{scratch}/progress"}
        if terms:
            Run(settings).ask(terms, ask_images)
        with patch.dict(os.environ, environment | notes):
            _Run(settings, parameters, sources, marks).execute(chosen, forced)
    return results


def check_weights(settings: Settings) -> None:
    """Raise `EmonbError` if weights are not here and cannot be fetched: all at once, before an hour is spent."""
    config, absent, own, files = settings.vlm, {}, [], []
    if not Path(checkpoint_of(config.base)).is_dir() and not _cached(config.base, "config.json"):
        folder = f"models/{config.base.rsplit('/')[-1]}"
        absent[config.base] = f"hf download {config.base} --local-dir {folder}"
        own += [f"vlm: {{base: {folder}}}"]
    for part, network in settings.teacher.networks.items():
        if network.pretrained and not network.weights:
            import timm

            known, folder = timm.get_pretrained_cfg(network.name), f"models/{network.name}"
            if known and known.hf_hub_id and not _cached(known.hf_hub_id, "model.safetensors"):
                absent[network.name] = f"hf download {known.hf_hub_id} model.safetensors --local-dir {folder}"
                files += [f"{part}: {{weights: {folder}/model.safetensors}}"]
    own += [f"teacher: {{networks: {{{', '.join(files)}}}}}"] if files else []
    if absent and hub_offline():
        raise EmonbError(
            f"profile {settings.profile}: weights of {', '.join(absent)} are not here, and the hub does not answer. "
            f"Where there is a network: `{'`, `'.join(absent.values())}`. Copy the folders into the project and write "
            f"a profile of your own with the lines `from: {settings.profile}`, `{'`, `'.join(own)}`"
        )


def _cached(repository: str, file: str) -> bool:
    return isinstance(try_to_load_from_cache(repository, file), str) if repository.count("/") == 1 else False


class _Run:
    """The state of one run and the file `run.json` that records it."""

    def __init__(
        self, settings: Settings, parameters: Mapping[str, str], sources: Sequence[Path], marks: pd.DataFrame | None
    ) -> None:
        self.settings, self.parameters, self.sources, self.marks = settings, parameters, sources, marks
        self.out, self.start = settings.out_path, time.monotonic()
        self.store = Store(self.out / "artifacts")
        self.earlier: Any = {}
        with suppress(EmonbError):
            self.earlier = read_json(self.out / "run.json")
        records = self.earlier.get("notebooks", {})
        self.records: dict[str, dict[str, Any]] = {s.stem: records.get(s.stem, {}) for s in sources}

    def execute(self, chosen: Sequence[Path], forced: Sequence[str]) -> None:
        """Run what is stale, record each notebook, write the report.

        After a failure tables and figures of the predictions that are there are made, and a report of what is not;
        after Ctrl-C the report alone. Nothing there hides the error: what fails too is one more line.
        """
        names, failed = [source.stem for source in chosen], None
        self._put_away()
        for path in (self.out / "tables").glob("review.*"):  # of an earlier run
            path.unlink()
        bar = Bar({n: self.records[n].get("seconds_made") or NOTEBOOKS.get(n, 10) for n in names})
        for name in names:
            self.records[name] |= {"status": "earlier run"} if self.records[name] else {}
        try:
            for name, source in zip(names, chosen, strict=True):
                own = [stage for stage in forced if STAGES[stage].notebook == name]
                files = (self.out / "predictions").glob("*__*.parquet")
                if failed and not (name in _SHOWS and any(is_ours(file.stem.split("__", 1)[1]) for file in files)):
                    continue
                if not (own or failed) and self._is_current(source):
                    self.records[name]["status"] = "up to date"
                    bar.skip(name)
                    continue
                try:
                    self._execute_one(source, ",".join(own), bar, "partial" if failed else "executed")
                except NotebookFailed as error:
                    bar.say(f"{name} failed: {error.reason}")
                    failed = failed or error
            if failed:
                raise failed
            self._review(bar)
            self._report()
            statuses = [self.records[name]["status"] for name in names]
            bar.say(f"{statuses.count('up to date')} notebooks up to date, {statuses.count('executed')} executed")
            bar.say(f"done in {time.monotonic() - self.start:.0f} s: {self.out / 'index.html'}")
        except BaseException:
            try:
                self._report()
                bar.say(f"report of what is there: {self.out / 'index.html'}")
            except Exception as also:
                bar.say(f"no report: {type(also).__name__}: {' '.join(str(also).split())[:300]}")
            raise
        finally:
            bar.close()

    def _put_away(self) -> None:
        """Take away copies of predictions that a run of other settings put there: no table shall mix the two."""
        now = self.settings.model_dump(mode="json", exclude=_NOT_IN_PREDICTIONS)
        before = self.earlier.get("settings", now)
        if all(before.get(name) == value for name, value in now.items()):
            return
        noted = {file for record in self.records.values() for file in record.get("files", ())}
        networks = before.get("teacher", {}).get("networks", {})
        for file in (self.out / "predictions").glob("*__*.parquet"):
            model = file.stem.split("__", 1)[1]
            if f"predictions/{file.name}" in noted and (is_ours(model) or model in networks):
                file.unlink()

    def _review(self, bar: Bar) -> None:
        """The table of a review of labels, and who reviewed what."""
        if self.marks is not None:
            found = load_all(self.out / "predictions", self.settings.datasets, split="test", partial=True)
            table = review_table(found, self.settings, self.marks)
            Run(self.settings).save_table(table, "review")
            bar.say(visible(table.attrs["caption"]))

    def _report(self) -> None:
        self._write()
        write_report(self.out)
        sign(self.out / "notebooks")

    def _execute_one(self, source: Path, force: str, bar: Bar, status: str) -> None:
        """Execute and record one notebook; `status`: what it is when all went well."""
        name, start, target = source.stem, time.monotonic(), self.out / "notebooks" / source.name
        old, record = self.records[name], {"status": "stopped"}
        events = Path(os.environ["EMONB_EVENTS"])
        events.write_text("", encoding="utf-8")
        bar.begin(name)
        try:
            _papermill(source, target, self.parameters | ({"force": force} if force else {}), bar)
            record["status"] = status
        except NotebookFailed as error:
            record |= {"status": "failed", "error": error.reason}
            raise
        finally:
            noted = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
            stages = {(e["stage"], e["name"], e["key"]): e for e in reversed(noted) if "stage" in e}  # each once
            seconds, peak = round(time.monotonic() - start, 2), bar.end()
            record |= {"seconds": seconds, "seconds_made": seconds, "peak_memory_mb": peak}
            if any(stage["hit"] for stage in stages.values()):  # results of an earlier run: its cost counts, too
                record |= {cost: max(record[cost], old.get(cost, 0.0)) for cost in ("seconds_made", "peak_memory_mb")}
            record |= {"stages": [*stages.values()][::-1], "files": sorted({e["file"] for e in noted if "file" in e})}
            self.records[name] = record
            self._write()
            if target.is_file():
                self._sign(source, target, record)
        bar.say(f"{name} {seconds:.0f} s, {record['peak_memory_mb']:.0f} MB")

    def _sign(self, source: Path, target: Path, record: Mapping[str, Any]) -> None:
        """Take machine paths out of papermill's notes; leave the fingerprint of a notebook that came to its end."""
        nb = nbformat.read(target, as_version=4)
        notes = nb.metadata.get("papermill", {})
        nb.metadata["papermill"] = {"parameters": notes.get("parameters", {}), "duration": notes.get("duration")}
        used = sorted({(stage["stage"], stage["name"]) for stage in record["stages"]})
        own = {"versions": _versions(), "used": [list(pair) for pair in used], "files": record["files"]}
        whole = record["status"] == "executed"
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
        results, files = {}, [self.out / path for path in own["files"]]
        folders = filter(None, (dataset_folder(self.settings, name) for name in self.settings.datasets))
        for stage, name in own["used"]:
            with suppress(EmonbError):
                results[f"{stage}/{name}"] = self.store.find(stage, name).key
        depends = {
            "cells": cells,
            "code": reached_by("\n".join(text for kind, text in cells if kind == "code")),
            "settings": self.settings.model_dump(mode="json", exclude={"out", "images"}),
            "pictures": [listing_digest(folder) for folder in folders],
            "results": results,
            "stages": {stage: stage_code(stage) for stage, _ in own["used"] if stage in STAGES},
            "files": [file_digest(f) if f.is_file() else _names(f) for f in files],
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]

    def _write(self) -> None:
        there: dict[str, str] = {}
        for source in self.sources:
            there |= read_json(source)["metadata"].get("emonb", {}).get("versions", {})
        here, records = _versions(), self.records.values()
        content = {
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": library_versions(),
            "lock": lock_state(),
            "differs_from_notebooks": {n: [here.get(n, "none"), v] for n, v in there.items() if here.get(n) != v},
            "git": git_state(),
            "profile": self.settings.profile,
            "seeds": self.settings.seeds,
            "reviewed_pictures": 0 if self.marks is None else len(self.marks),  # of the table `review`
            "totals": {
                "seconds_wall_this_run": round(time.monotonic() - self.start, 1),
                "seconds_compute": round(sum(r.get("seconds_made", 0.0) for r in records), 1),
                "peak_memory_mb": max(r.get("peak_memory_mb", 0.0) for r in records),
            },
            "settings": {**self.settings.model_dump(mode="json"), "out": os.path.relpath(self.out, project_root())},
            "notebooks": self.records,
        }
        write_json(self.out / "run.json", content)


def _names(folder: Path) -> list[str]:
    """What a folder holds, but for hidden files: one that comes later makes what was read from it out of date."""
    return sorted(path.name for path in folder.glob("[!.]*"))


def _versions() -> dict[str, str]:
    """What numbers may hang on besides code and settings."""
    return {**library_versions(), "processor": machine()["cpu"]}


# ---- one notebook --------------------------------------------------------------------------------------------------


class _OwnKernel(AsyncKernelManager):
    """The kernel of this interpreter: a `python3` kernel that the user registered elsewhere cannot win.

    It talks over sockets in the run's temporary folder: of kernels that start at a time, two may choose one TCP port.
    """

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])

    def _transport_default(self) -> str:
        return "ipc" if len(os.environ["EMONB_PROGRESS_FILE"]) < 80 else "tcp"  # macOS takes at most 103 letters

    def _ip_default(self) -> str:
        folder = Path(os.environ["EMONB_PROGRESS_FILE"]).parent
        return str(folder / uuid4().hex[:8]) if self.transport == "ipc" else super()._ip_default()


def _papermill(source: Path, target: Path, parameters: Mapping[str, Any], bar: Bar) -> None:
    """Execute a notebook into `target`, from the current folder; raises `NotebookFailed`, the marked copy is kept."""
    target.parent.mkdir(parents=True, exist_ok=True)
    cells = len(read_json(source)["cells"]) + bool(parameters)  # papermill puts them into a cell

    def tell(cell: Any, cell_index: int) -> None:
        bar.what = f"{source.stem} cell {cell_index + 1}/{cells}"

    logging.getLogger("papermill").setLevel(logging.ERROR)  # it does not know parameters of a second cell
    quiet = ["--IPKernelApp.log_level=50"]  # kernels warn of TCP and of their own shutdown on our console
    options = {"kernel_manager_class": _OwnKernel, "extra_arguments": quiet, "on_cell_start": tell}
    options |= {"kernel_name": "python3", "progress_bar": False, "start_timeout": 120, "cwd": "."}
    paths = (os.path.relpath(path) for path in (source, target))
    paths = (path.replace("{", "{{").replace("}", "}}") for path in paths)  # papermill formats them
    try:
        papermill.execute_notebook(*paths, dict(parameters), **options)
    except papermill.PapermillExecutionError as error:
        ours = {kind.__name__: kind for kind in (EmonbError, StoppedEarly, PassingTrouble)}
        what = error.evalue.strip() if error.ename in ours else f"{error.ename}: {error.evalue}".strip()
        failed = NotebookFailed(source, target, f"In [{error.exec_count}]", what)
        failed.exit_code = ours.get(error.ename, EmonbError).exit_code
        raise failed from None
    except DeadKernelError:
        what = "the kernel died; most often because memory ran out: close programs or choose a smaller PROFILE"
        raise NotebookFailed(source, target, "the cell that was running", what) from None
    except RuntimeError as error:  # of jupyter_client; it talks over sockets, for which TMPDIR must be good
        what = f"no kernel started ({error}); look at TMPDIR ({tempfile.gettempdir()}), then start again"
        raise NotebookFailed(source, target, "the first cell", what) from None


class Bar:
    """One bar for all notebooks: time gone and left, notebook, cell, inner loop; and the memory of this process and
    its kernels. In a terminal it is a tqdm bar; elsewhere (a CI log) a plain line every ten seconds.
    """

    def __init__(self, expected: Mapping[str, float]) -> None:
        """`expected`: seconds each notebook to come took earlier, or should take; how fast it goes here is seen."""
        self.expected, self.what, self.done, self.share, self.peak = expected, "", 0.0, 0.0, 0.0
        self.since, self.seen = time.monotonic(), sys.stderr.isatty()
        shape = "{percentage:3.0f}% {bar:20} {elapsed} gone, about {remaining} left, {desc}"
        screen = {"file": sys.stderr if self.seen else io.StringIO(), "dynamic_ncols": self.seen, "leave": False}
        self.bar = tqdm(total=sum(expected.values()), bar_format=shape, smoothing=0, **screen)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def skip(self, name: str) -> None:
        """A notebook is up to date."""
        self.bar.total -= self.expected[name]

    def begin(self, name: str) -> None:
        """A notebook starts."""
        self.what, self.share, self.peak, self.since = name, self.expected[name], 0.0, time.monotonic()

    def end(self) -> float:
        """It ended; returns its peak memory in MB."""
        self.what, self.done, self.share = "", self.done + self.share, 0.0
        return round(self.peak, 1)

    def say(self, line: str) -> None:
        """A line that stays."""
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Stop the thread and remove the bar."""
        self._stop.set()
        self._thread.join()
        self.bar.close()

    def _watch(self) -> None:
        process, inner, shown = psutil.Process(), Path(os.environ["EMONB_PROGRESS_FILE"]), time.monotonic()
        while not self._stop.wait(0.5):
            with suppress(psutil.Error):  # a child ended while we looked
                family = (process, *process.children(recursive=True))
                self.peak = max(self.peak, sum(member.memory_info().rss for member in family) / 2**20)
            said = inner.read_text(encoding="utf-8", errors="replace") if inner.is_file() else ""
            self.bar.n = min(self.done + min(time.monotonic() - self.since, 0.95 * self.share), self.bar.total)
            self.bar.set_description_str(", ".join(filter(None, (self.what, said))), refresh=self.seen)
            if not self.seen and time.monotonic() - shown >= 10:
                shown = time.monotonic()
                print(self.bar, file=sys.stderr, flush=True)
