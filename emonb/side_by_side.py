"""Several results at once: on a CPU each is made in a process of its own, with one thread.

The laptop profile's networks are too small to keep all threads busy: on two, a ViT step is 1.6 times, a head's 1.3
times as fast as on one (`bench/steps.py`), while two trainings on a thread each are done in the time of one. And what
one thread computes is the same on any number of cores. LoRA is not done so: of five trainings on two cores the last
finds no partner, and nothing was won.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emonb.errors import EmonbError
from emonb.machine import keep_freed_memory
from emonb.parallel import cores, launched
from emonb.progress import follow
from emonb.settings import Settings
from emonb.store import Artifact, NotThere, Store

if TYPE_CHECKING:
    from emonb.workspace import Workspace

__all__ = ["side_by_side"]

_MEMORY = 1.5 * 2**30  # bytes that a process may take: torch, timm and a small dataset take 0.9 GB
_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "LOKY_MAX_MEMORY_LEAK_SIZE": "1e9",  # datasets differ in size: a process that grows is no leak
}
_IDLE = 60  # seconds after which a process without work ends
_STOP = "stop"


def side_by_side(
    stage: Callable[..., Artifact],
    ws: Workspace,
    jobs: Iterable[Any] | None = None,
) -> dict[Any, Artifact]:
    """The results of one stage, in the order of the jobs; what is in the store already is only looked up.

    With the setting `side_by_side`, and without an accelerator or a launcher, what is missing is made in as many
    processes as there are cores (fewer if memory is short), each with one thread; else here, one after another. A
    job that fails does not stop those that run already: their results are in the store when the error is raised.

    Args:
        stage: called as `stage(settings, store, *job)`; it must be a function of a module.
        ws: the run.
        jobs: datasets, or tuples that begin with one; default: every dataset of the run.

    Raises:
        EmonbError: what a stage raised; or a process died, most often for lack of memory.
    """
    jobs = list(ws.settings.datasets if jobs is None else jobs)
    calls = [job if isinstance(job, tuple) else (job,) for job in jobs]

    def here(store: Store, call: Sequence[Any]) -> Artifact:
        return stage(ws.settings, store, *call)

    if ws.settings.side_by_side and not launched() and not _accelerator():
        missing = [call for call in calls if not _is_there(here, ws.store.looking(), call)]
        if missing:
            for artifact in _elsewhere(stage, ws.settings, ws.store, missing):
                ws.store.was_made(artifact)
    return {job: here(ws.store, call) for job, call in zip(jobs, calls, strict=True)}


def _is_there(here: Callable[..., Artifact], store: Store, call: Sequence[Any]) -> bool:
    try:
        here(store, call)
    except NotThere:
        return False
    return True


def _accelerator() -> bool:
    """Whether the work belongs on a GPU; a stage that computes on one has imported torch."""
    if "torch" not in sys.modules:
        return False
    from emonb.fit import get_device

    return get_device().type != "cpu"


def _elsewhere(
    stage: Callable[..., Artifact], settings: Settings, store: Store, calls: Sequence[Sequence[Any]]
) -> list[Artifact]:
    """Make the results in other processes; they are in the store when this returns."""
    from loky import get_reusable_executor
    from loky.process_executor import TerminatedWorkerError

    what = stage.__name__.removesuffix("_stage")
    count = _processes()
    env = {**_ENVIRONMENT, "EMONB_SIDE_BY_SIDE": str(count)}
    executor = get_reusable_executor(max_workers=count, timeout=_IDLE, env=env, initializer=_begin)
    with tempfile.TemporaryDirectory(prefix="emonb-") as folder:
        notes = [Path(folder) / f"{i}.json" for i in range(len(calls))]
        futures = [
            executor.submit(_made, stage, settings, store, call, note) for call, note in zip(calls, notes, strict=True)
        ]
        try:
            follow(futures, what, notes)
            (Path(folder) / _STOP).touch()  # one has failed, or all are done: what waits in the queue is not begun
            wait(futures)
            return [future.result() for future in futures]
        except TerminatedWorkerError as error:
            raise EmonbError(
                f"{what}: one of {count} processes died, most often because memory ran out; finished results "
                "are kept: close programs and run again, or set `side_by_side: false` in a profile of your own"
            ) from error
        except KeyboardInterrupt:  # finished results and checkpoints are in the store
            executor.shutdown(kill_workers=True)
            raise


def _processes() -> int:
    """As many as cores, but no more than memory allows."""
    import psutil

    return max(1, min(cores(), int(psutil.virtual_memory().available / _MEMORY)))


def _begin() -> None:
    """In a new process: end when the notebook's kernel does, and leave Ctrl-C and the bars to it."""
    parent = os.getppid()
    os.environ["EMONB_HEADLESS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _made(
    stage: Callable[..., Artifact], settings: Settings, store: Store, call: Sequence[Any], note: Path
) -> Artifact | None:
    """One job, in another process; None where another job has failed before it began."""
    if note.with_name(_STOP).exists():
        return None
    os.environ["EMONB_PROGRESS_FILE"] = str(note)
    return stage(settings, store, *call)
