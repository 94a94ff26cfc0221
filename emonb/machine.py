"""What the figures were measured on, and whether this machine is fit for a run."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from emonb.errors import EmonbError
from emonb.files import make_folder

__all__ = ["doctor", "keep_freed_memory", "machine", "peak_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


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


def doctor(out: Path) -> list[tuple[str, bool, str]]:
    """Checks of this environment: what, whether it is fine, and the finding or the remedy."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("Python >= 3.11", _python),
        ("torch and torchvision agree", _torch),
        ("libraries import", _libraries),
        ("notebook kernel", _kernel),
        ("free memory >= 4 GB", _memory),
        ("free disk >= 2 GB", lambda: _disk(out)),
        ("write permission", lambda: str(make_folder(out))),
        ("stand-in checkpoint", _checkpoint),
    ]
    findings = []
    for what, check in checks:
        try:
            findings.append((what, True, check()))
        except Exception as error:  # whatever is broken here is the finding
            findings.append((what, False, f"{type(error).__name__}: {error}".splitlines()[0]))
    return findings


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

    names = [m.__name__ for m in (transformers, timm, papermill)]
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


def _kernel() -> str:
    return f"ipykernel {metadata.version('ipykernel')}"


def _memory() -> str:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    _require(free >= 4, f"{free:.1f} GB free; close other programs")
    return f"{free:.1f} GB"


def _disk(out: Path) -> str:
    free = shutil.disk_usage(next(p for p in (out, *out.parents) if p.is_dir())).free / 2**30
    _require(free >= 2, f"{free:.1f} GB free for {out}; choose another folder with --out")
    return f"{free:.1f} GB"


def _checkpoint() -> str:
    path = Path(__file__).parent / "resources" / "base" / "model.safetensors"
    _require(path.is_file(), "missing; make it again with: python -m emonb base --rebuild")
    return f"{path.stat().st_size / 2**20:.1f} MB"


def _require(fine: bool, message: str) -> None:
    if not fine:
        raise EmonbError(message)


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    """Names of NVIDIA GPUs, without importing torch."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        names = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return ", ".join(names.split("\n")).strip(", ") or None
    return None


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
