"""One notebook executed headless by papermill, shown in the one bar of the whole run."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import papermill
import psutil
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.engines import NBClientEngine, papermill_engines
from tqdm import tqdm

from emonb.errors import EmonbError
from emonb.files import atomic_write
from emonb.progress import read_progress

__all__ = ["NotebookFailed", "OverallBar", "execute", "inspect_parameters", "short_path"]

_LINE_EVERY = 10.0  # seconds between two lines of a log that is not a terminal
_PRIOR = 30.0  # seconds of expected work after which the measured pace outweighs the expected one

_QUIET = ["--IPKernelApp.log_level=50"]  # kernels warn of TCP and of their own shutdown on our console


class NotebookFailed(EmonbError):
    """A cell failed; the message says which, why, and where the executed copy lies; `reason` says why in one line."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class OverallBar:
    """One bar for all notebooks: percentage, time gone and left, notebook, cell, inner loop.

    In a terminal it is a tqdm bar; elsewhere (a CI log) a plain line every ten seconds. Its thread
    also samples the memory of this process and its kernels.
    """

    def __init__(self, expected: Mapping[str, float], progress_file: Path) -> None:
        """`expected`: seconds each notebook to come took earlier, or should take."""
        self._expected = dict(expected)
        self._total = sum(self._expected.values()) or 1.0
        self._progress_file = progress_file
        self._start = self._cell_start = time.monotonic()
        self._before = 0.0  # expected seconds of the finished notebooks
        self._name, self._cells, self._cell = "", [], 0
        self._peak = 0.0
        self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=1.0, bar_format="{percentage:3.0f}%|{bar:20}|{desc}", dynamic_ncols=True, leave=False
            )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def notebook(self, name: str, cells: Sequence[float]) -> None:
        """A notebook starts; `cells` are the expected shares of its code cells."""
        scale = self._expected[name] / (sum(cells) or 1.0)
        self._name, self._cells, self._cell = name, [share * scale for share in cells], 0
        self._cell_start, self._peak = time.monotonic(), 0.0

    def cell(self, index: int) -> None:
        """Code cell number `index` (from 0) starts."""
        self._cell, self._cell_start = index, time.monotonic()

    def done(self) -> float:
        """The notebook ended; returns its peak memory in MB."""
        self._before += self._expected.get(self._name, 0.0)
        self._name, self._cells, self._cell = "", [], 0
        return round(self._peak, 1)

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop the thread and remove the bar."""
        self._stop.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def state(self) -> tuple[float, str]:
        """Fraction done, and the text beside the bar."""
        now = time.monotonic()
        gone = now - self._start
        finished = self._before + sum(self._cells[: self._cell])
        share = self._cells[self._cell] if self._cell < len(self._cells) else 0.0
        in_cell = now - self._cell_start
        pace = (gone - in_cell + _PRIOR) / (finished + _PRIOR)  # measured seconds per expected second
        done = finished + min(in_cell / pace, 0.95 * share)
        left = max(0.0, self._total - done) * pace
        where = "writing the report" if self._before >= self._total else "between notebooks"
        if self._name:
            left += max(0.0, in_cell - share * pace) / 4  # a cell overruns: perhaps a quarter as much again
            where = f"{self._name} cell {self._cell + 1}/{len(self._cells)}"
        inner = read_progress(self._progress_file)
        text = f"{_clock(gone)} gone, about {_clock(left)} left, {where}" + (f", {inner}" if inner else "")
        return min(done / self._total, 1.0), text

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.5):
            self._peak = max(self._peak, _resident_mb(process))
            fraction, text = self.state()
            if self._bar is not None:
                self._bar.n = fraction
                self._bar.set_description_str(f" {text}")
            elif time.monotonic() - self._last_line >= _LINE_EVERY:
                self._last_line = time.monotonic()
                print(f"{fraction:4.0%} {text}", file=sys.stderr, flush=True)


class _OwnKernel(AsyncKernelManager):
    """The kernel of this interpreter: a `python3` kernel that the user registered elsewhere cannot win."""

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


class _Engine(NBClientEngine):
    """papermill's engine, telling our bar where it is."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, bar: OverallBar, **kwargs: Any) -> Any:
        code = [i for i, cell in enumerate(nb_man.nb.cells) if cell.cell_type == "code"]
        cell_start = nb_man.cell_start

        def told_start(cell: NotebookNode, cell_index: int | None = None, **more: Any) -> None:
            if cell_index in code:
                bar.cell(code.index(cell_index))
            cell_start(cell, cell_index, **more)

        nb_man.cell_start = told_start
        return super().execute_managed_notebook(
            nb_man, kernel_name, kernel_manager_class=_OwnKernel, extra_arguments=_QUIET, **kwargs
        )


papermill_engines.register("emonb", _Engine)


def inspect_parameters(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Raise `EmonbError` for a parameter that the notebook does not declare (papermill only warns)."""
    known = papermill.inspect_notebook(str(notebook))
    for name in parameters:
        if name not in known:
            raise EmonbError(
                f"{notebook}: no parameter {name!r} in its cell tagged 'parameters' "
                f"(it has: {', '.join(known) or 'none'}); add it there"
            )


def execute(
    source: Path, target: Path, parameters: Mapping[str, Any], environment: Mapping[str, str], bar: OverallBar
) -> list[float]:
    """Execute a notebook into `target` with the current folder as its working directory.

    Returns:
        Seconds of each code cell.

    Raises:
        NotebookFailed: a cell failed or its kernel died; papermill's marked copy is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _environment(environment):
            nb = papermill.execute_notebook(
                os.path.relpath(source),
                os.path.relpath(target),
                dict(parameters),
                engine_name="emonb",
                kernel_name="python3",
                progress_bar=False,
                start_timeout=120,
                cwd=".",
                bar=bar,
            )
    except papermill.PapermillExecutionError as error:
        what = error.evalue.strip() if error.ename == "EmonbError" else f"{error.ename}: {error.evalue}".strip()
        raise _failure(source, target, f"In [{error.exec_count}]", what) from None
    except DeadKernelError:
        what = "the kernel died; most often because memory ran out: close programs or choose a smaller PROFILE"
        cell = "the cell that was running"
        raise _failure(source, target, cell, what) from None
    finally:
        _tidy(target, source)
    return [c.metadata.papermill.get("duration") or 0.0 for c in nb.cells if c.cell_type == "code"]


def short_path(path: Path) -> str:
    """A path for messages: relative to the current folder if it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _failure(source: Path, target: Path, cell: str, what: str) -> NotebookFailed:
    message = (
        f"notebook {source.stem} failed in {cell}\n  {what[:2000]}\n"
        f"  executed copy, marked where it stopped: {short_path(target)}\n"
        "  the next run goes on from the finished results"
    )
    return NotebookFailed(message, f"{cell}: {' '.join(what.split())[:300]}")


def _tidy(target: Path, source: Path) -> None:
    """Take machine paths out of papermill's notes."""
    import nbformat

    if not target.is_file():
        return
    nb = nbformat.read(target, as_version=4)
    notes = nb.metadata.setdefault("papermill", {})
    for key in ("input_path", "output_path", "environment_variables"):
        notes.pop(key, None)
    notes["input_path"] = f"notebooks/{source.name}"
    atomic_write(target, nbformat.writes(nb))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, which a kernel inherits, and put the old ones back."""
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _resident_mb(process: psutil.Process) -> float:
    total = 0
    try:
        for member in (process, *process.children(recursive=True)):
            total += member.memory_info().rss
    except psutil.Error:  # a child ended while we looked
        return 0.0
    return total / 2**20


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
