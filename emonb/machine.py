"""Ground floor: what this machine is and has, and how several processes make results together.

Two ways, never at once. `accelerate launch -m emonb stage ...` starts processes that share each step of one result;
`side_by_side` makes several small results at a time, each in a process of its own with one thread.
"""

from __future__ import annotations

import atexit
import functools
import getpass
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from emonb.errors import EmonbError
from emonb.settings import project_root

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

T = TypeVar("T")
LOCK = "requirements.lock"
_LIBRARIES = ("torch", "torchvision", "transformers", "timm", "peft", "accelerate", "numpy", "pandas", "scikit-learn")
_MEMORY = 1.5 * 2**30  # bytes that a process side by side may take: torch, timm and a small dataset take 0.9 GB


# ---- any machine ---------------------------------------------------------------------------------------------------

# Open files that a run needs (two processes with their sockets and libraries), and asks for.
_NEEDED, _ASKED = 256, 4096


def settle() -> None:
    """Make this process fit for machines as they are; the command line calls it first.

    A terminal that cannot show a character gets an escape; SIGTERM and SIGHUP end as Ctrl-C does; as many files may be
    open as the system allows; a user without a name or a home that can be written gets one for this process.

    Raises:
        EmonbError: the system allows too few open files.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # none, closed, or somebody's own
            stream.reconfigure(errors="backslashreplace")
    for end in ("SIGTERM", "SIGHUP") if process_count() == 1 else ():  # a launcher ends its processes itself
        if (number := getattr(signal, end, None)) and signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, signal.default_int_handler)
    if resource := _resource():
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _ASKED if hard == resource.RLIM_INFINITY else min(_ASKED, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < _NEEDED:
            raise EmonbError(f"only {most} files may be open at a time here, and {_NEEDED} are needed: ulimit -n 4096")
    _find_home()


def _find_home() -> None:
    """Docker's `-u 12345` has neither name nor home, and some homes are read-only: libraries want to write there."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["LOGNAME"] = "nobody"
    home = Path(os.path.expanduser("~"))  # unlike Path.home() it goes on without one
    if not os.access(home, os.W_OK | os.X_OK):
        folder = tempfile.mkdtemp(prefix="emonb-home-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for name in ("HOME",) * (not home.is_dir()) + ("IPYTHONDIR", "MPLCONFIGDIR", "JUPYTER_RUNTIME_DIR"):
            os.environ[name] = folder


# ---- processes that make one result together, under `accelerate launch` --------------------------------------------


def process_count() -> int:
    """Number of processes that make one result together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def process_index() -> int:
    """Number of this process, from 0; the first one decides, merges and writes."""
    return int(os.environ.get("RANK", "0")) if process_count() > 1 else 0


def is_main() -> bool:
    """Whether this process is the first one."""
    return process_index() == 0


@functools.cache
def _group() -> PartialState:
    """accelerate's state of this process: its device, and the process group, which is started here."""
    import torch
    from accelerate import PartialState

    end_with_parent()
    # one process may work for hours on what the others wait for; a dead one ends them all
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))


def wait_for_all() -> None:
    """Wait until every process is here."""
    if process_count() > 1:
        _group().wait_for_everyone()


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
    """Cores for threads and loader workers of this process."""
    from joblib import cpu_count

    return 1 if "EMONB_SIDE_BY_SIDE" in os.environ else max(1, cpu_count() // process_count())


def side_by_side(function: Callable[..., T], jobs: Sequence[tuple], what: str) -> Iterator[T]:
    """`function(*job)` for each job in a process of its own with one thread; results as they are finished.

    On a laptop's networks two trainings on a thread each are done in the time of one on two threads, and what one
    thread computes is the same on any number of cores.

    Raises:
        EmonbError: what a job raised; or a process died, most often for lack of memory. `what` names it.
    """
    from joblib import Parallel, delayed, parallel_config
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    count = min(cores(), max(2, int(psutil.virtual_memory().available / _MEMORY)))
    os.environ.setdefault("LOKY_MAX_MEMORY_LEAK_SIZE", "1e9")  # datasets differ in size: growing is no leak
    options = {"return_as": "generator_unordered", "pre_dispatch": "n_jobs", "batch_size": 1}
    try:
        with parallel_config("loky", inner_max_num_threads=1, initializer=_begin, idle_worker_timeout=60):
            yield from Parallel(count, **options)(delayed(function)(*job) for job in jobs)
    except TerminatedWorkerError as error:
        raise EmonbError(
            f"{what}: one of {count} processes died, most often because memory ran out; finished results are kept: "
            "close programs and run again, or set `side_by_side: false` in a profile of your own"
        ) from error


def end_with_parent() -> None:
    """Let this process end within a second or so of its parent, also after kill -9: left alone, joblib's processes
    live on for half a minute then, and those of accelerate's launcher go on to the end.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin() -> None:
    """In a new process: end when the notebook's kernel does, and leave Ctrl-C and the bars to it."""
    end_with_parent()
    os.environ |= {"EMONB_HEADLESS": "1", "EMONB_SIDE_BY_SIDE": "1", "EMONB_PROGRESS_FILE": ""}
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---- what results depend on, and cost ------------------------------------------------------------------------------


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Peak resident memory within the block, in MB, in the yielded list."""
    peak = [0.0]
    with suppress(OSError):  # elsewhere than Linux: the peak of the whole process so far
        Path("/proc/self/clear_refs").write_text("5")
    try:
        yield peak
    finally:
        peak[0] = round(_peak() / 2**20, 1)


def _peak() -> int:
    """Bytes that this process took at most; on Windows what it takes now."""
    with suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    if resource := _resource():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return psutil.Process().memory_info().rss


def _resource() -> Any:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of Python and the libraries that a result depends on."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}}


@functools.cache
def lock_state() -> dict[str, Any]:
    """Whether the installed packages are those of `requirements.lock`.

    Returns:
        `locked`: True, False, or None where there is no lock file; `differs`: package -> "installed, locked".
    """
    from packaging.requirements import Requirement

    file, differs = project_root() / LOCK, {}
    if not file.is_file():
        return {"locked": None, "differs": {}}
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line[:1].isalpha()]
    for wanted in map(Requirement, lines):
        found = "none"
        with suppress(metadata.PackageNotFoundError):
            found = metadata.version(wanted.name)
        locked = str(wanted.specifier).removeprefix("==")
        if (wanted.marker is None or wanted.marker.evaluate()) and found.split("+")[0] != locked:
            differs[wanted.name] = f"{found}, {locked}"
    return {"locked": not differs, "differs": differs}


@functools.cache
def git_state() -> dict[str, Any]:
    """Commit of the project and whether tracked files differ from it; {} outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=project_root(), capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": found.removesuffix("-dirty"), "dirty": found.endswith("-dirty")}


@functools.cache
def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU and system; no host name and no paths."""
    cpu, gpu = platform.processor() or platform.machine(), None
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    with suppress(OSError, subprocess.SubprocessError):  # without importing torch
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        gpu = ", ".join(names.split("\n")).strip(", ") or None
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    return {"cpu": cpu, "cores": cores(), "memory_gb": memory, "gpu": gpu, "system": platform.platform()}
