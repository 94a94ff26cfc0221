"""Ground floor: what this machine is and has, and how several processes make results together.

Two ways, never at once. `accelerate launch -m emonb stage ...` starts processes that share each step of one result;
`side_by_side` makes several small results at a time, each in a process of its own with one thread.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from emonb.errors import EmonbError
from emonb.files import make_folder, resource_path
from emonb.settings import project_root

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

T = TypeVar("T")
LOCK = "requirements.lock"
_LIBRARIES = ("torch", "torchvision", "transformers", "timm", "peft", "accelerate", "numpy", "pandas", "scikit-learn")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_ALONE: list[bool] = []
_PATIENCE = timedelta(days=7)  # one process may work for hours on what the others wait for; a dead one ends them all
_MEMORY = 1.5 * 2**30  # bytes that a process side by side may take: torch, timm and a small dataset take 0.9 GB
_ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "LOKY_MAX_MEMORY_LEAK_SIZE": "1e9",  # datasets differ in size: a process that grows is no leak
}


# ---- processes that make one result together -----------------------------------------------------------------------


def launched() -> bool:
    """Whether a launcher has started this process, and perhaps others like it."""
    return "LOCAL_RANK" in os.environ


def process_count() -> int:
    """Number of processes that make one result together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if launched() and not _ALONE else 1


def process_index() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if process_count() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that decides, merges and writes results."""
    return process_index() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process does not count on the others: for what only one of them does."""
    _ALONE.append(True)
    try:
        yield
    finally:
        _ALONE.pop()


@functools.cache
def _group() -> PartialState:
    """accelerate's state of this process: its device, and the process group, which is started here."""
    import torch
    from accelerate import PartialState

    options = {"timeout": _PATIENCE} if process_count() > 1 else {}
    return PartialState(cpu=not torch.cuda.is_available(), **options)


def wait_for_all() -> None:
    """Wait until every process is here."""
    if process_count() > 1:
        _group().wait_for_everyone()


def agree(value: T) -> T:
    """The main process's value, for all: what is to be done is decided once."""
    if process_count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _group()
    return broadcast_object_list([value])[0]


def get_device() -> torch.device:
    """The accelerator if there is one, under a launcher this process's own, else the CPU."""
    import torch

    if process_count() > 1:
        return _group().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def hub_offline() -> bool:
    """Whether only what is on this machine can be loaded: `HF_HUB_OFFLINE` is set, or the hub does not answer.

    One look of 3 s, once per process: left alone, huggingface_hub tries each missing file six times.
    """
    from huggingface_hub import constants, get_session

    try:
        return bool(constants.HF_HUB_OFFLINE or not get_session().head(constants.ENDPOINT, timeout=3))
    except Exception:  # the hub's HTTP library differs by version; whatever it raises, there was no answer
        return True


# ---- several results at a time -------------------------------------------------------------------------------------


def cores() -> int:
    """Cores for threads and loader workers of this process: its share, if others like it run on this machine."""
    from loky import cpu_count

    beside = int(os.environ.get("EMONB_SIDE_BY_SIDE", "1"))
    return max(1, cpu_count() // (process_count() * beside))


def side_by_side(function: Callable[..., T], jobs: Sequence[tuple], what: str) -> Iterator[T]:
    """`function(*job)` for each job in a process of its own with one thread; results as they are finished.

    On a laptop's networks two trainings on a thread each are done in the time of one on two threads, and what one
    thread computes is the same on any number of cores. A job that fails does not stop those that run already, and
    none is begun after it.

    Args:
        function: of a module, so that it can be sent.
        jobs: arguments of each call.
        what: for messages.

    Raises:
        EmonbError: what a job raised; or a process died, most often for lack of memory.
    """
    import psutil
    from loky import get_reusable_executor
    from loky.process_executor import TerminatedWorkerError

    count = max(1, min(cores(), int(psutil.virtual_memory().available / _MEMORY)))
    env = {**_ONE_THREAD, "EMONB_SIDE_BY_SIDE": str(count)}
    executor = get_reusable_executor(max_workers=count, timeout=60, env=env, initializer=_begin)
    waiting, running = list(jobs), set()
    try:
        while waiting or running:
            while waiting and len(running) < count:
                running.add(executor.submit(function, *waiting.pop(0)))
            done, running = wait(running, return_when=FIRST_EXCEPTION if not waiting else "FIRST_COMPLETED")
            for future in done:
                if future.exception():
                    wait(running)  # their results are in the store when the error is raised
                yield future.result()
    except TerminatedWorkerError as error:
        raise EmonbError(
            f"{what}: one of {count} processes died, most often because memory ran out; finished results are kept: "
            "close programs and run again, or set `side_by_side: false` in a profile of your own"
        ) from error
    except KeyboardInterrupt:  # finished results and checkpoints are in the store
        executor.shutdown(kill_workers=True)
        raise


def _begin() -> None:
    """In a new process: end when the notebook's kernel does, and leave Ctrl-C and the bars to it."""
    parent = os.getppid()
    os.environ["EMONB_HEADLESS"] = "1"
    os.environ.pop("EMONB_PROGRESS_FILE", None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()

    def watch() -> None:  # kill -9 of the kernel: loky's processes would live on for half a minute
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- memory --------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Let this process reuse the memory of one training step in the next.

    glibc hands large freed blocks back to the system, which must clear them before it lends them again: up to a
    quarter of a LoRA step on two threads, where all of them go back. Does nothing where there is no glibc.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, 2**30)
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # glibc's largest


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Peak resident memory within the block, in MB, in the yielded list."""
    peak = [0.0]
    with suppress(OSError):  # elsewhere than Linux: the peak of the whole process so far
        Path("/proc/self/clear_refs").write_text("5")
    try:
        yield peak
    finally:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with suppress(OSError):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            kilobytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        peak[0] = round(kilobytes / 1024, 1)


# ---- what results depend on ----------------------------------------------------------------------------------------


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of Python and the libraries that a result depends on."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return versions


@functools.cache
def lock_state() -> dict[str, Any]:
    """Whether the installed packages are those of `requirements.lock`.

    Returns:
        `locked`: True, False, or None where there is no lock file; `differs`: package -> "installed, locked".
    """
    from packaging.requirements import Requirement

    file = project_root() / LOCK
    if not file.is_file():
        return {"locked": None, "differs": {}}
    differs = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line or line[0] in "# -":
            continue
        wanted = Requirement(line.rstrip(" \\"))
        if wanted.marker is None or wanted.marker.evaluate():
            try:
                found = metadata.version(wanted.name)
            except metadata.PackageNotFoundError:
                found = "missing"
            if not wanted.specifier.contains(found.split("+")[0], prereleases=True):
                differs[wanted.name] = f"{found}, {str(wanted.specifier).lstrip('=')}"
    return {"locked": not differs, "differs": differs}


@functools.cache
def git_state() -> dict[str, Any]:
    """Commit of the project and whether tracked files differ from it; {} outside a checkout."""
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        run = functools.partial(subprocess.run, cwd=project_root(), capture_output=True, text=True, check=True)
        commit, status = (run(command).stdout.strip() for command in commands)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit, "dirty": bool(status)}


@functools.cache
def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU and system; no host name and no paths."""
    import psutil

    system = platform.system()
    with suppress(OSError):
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": _gpu(),
        "system": f"{system}, {platform.system()} {platform.release()}",
    }


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    """Names of NVIDIA GPUs, without importing torch."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        names = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return ", ".join(names.split("\n")).strip(", ") or None
    return None


# ---- is this machine fit for a run? --------------------------------------------------------------------------------


def doctor(out: Path) -> list[tuple[str, bool, str]]:
    """Checks of this environment: what, whether it is fine, and the finding or the remedy."""
    checks: dict[str, Callable[[], str]] = {
        "Python >= 3.11": _python,
        "torch and torchvision agree": _torch,
        "libraries import": _libraries,
        "versions": _versions,
        "notebook kernel": lambda: f"ipykernel {metadata.version('ipykernel')}",
        "free memory >= 4 GB": _free_memory,
        "free disk >= 2 GB": lambda: _free_disk(out),
        "write permission": lambda: str(make_folder(out)),
        "stand-in checkpoint": _checkpoint,
    }
    findings = []
    for what, check in checks.items():
        try:
            findings.append((what, True, check()))
        except Exception as error:  # whatever is broken here is the finding
            findings.append((what, False, f"{type(error).__name__}: {error}".splitlines()[0]))
    return findings


def _require(fine: bool, message: str) -> None:
    if not fine:
        raise EmonbError(message)


def _python() -> str:
    _require(sys.version_info >= (3, 11), f"found {platform.python_version()}; install Python 3.11 or later")
    return platform.python_version()


def _torch() -> str:
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    torchvision.ops.nms(boxes, torch.ones(1), 0.5)  # fails when the two were built for different versions
    return f"torch {torch.__version__}, torchvision {torchvision.__version__}"


def _libraries() -> str:
    import papermill
    import timm
    import transformers

    return ", ".join(f"{m.__name__} {metadata.version(m.__name__)}" for m in (transformers, timm, papermill))


def _versions() -> str:
    state = lock_state()
    if state["locked"] is None:
        return f"no {LOCK} here: results may differ in their last digits from the committed notebooks'"
    if state["locked"]:
        return f"those of {LOCK}"
    first = ", ".join(f"{name} ({versions})" for name, versions in list(state["differs"].items())[:3])
    return f"{len(state['differs'])} packages differ from {LOCK} (installed, locked): {first}"


def _free_memory() -> str:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    _require(free >= 4, f"{free:.1f} GB free; close other programs")
    return f"{free:.1f} GB"


def _free_disk(out: Path) -> str:
    free = shutil.disk_usage(next(p for p in (out, *out.parents) if p.is_dir())).free / 2**30
    _require(free >= 2, f"{free:.1f} GB free for {out}; choose another folder with --out")
    return f"{free:.1f} GB"


def _checkpoint() -> str:
    path = resource_path("base", "model.safetensors")
    _require(path.is_file(), "missing; restore emonb/resources/base from the repository")
    return f"{path.stat().st_size / 2**20:.1f} MB"
