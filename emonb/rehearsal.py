"""`python -m emonb rehearse`: a few real steps of every stage on this machine, with random weights.

What they cost is measured, what a run over the paper's datasets would cost follows by arithmetic
(`emonb.projection`). The report is written after each measurement, so that a stage that fails or a Ctrl-C loses
nothing that was measured before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from emonb.checkpoints import attention_of
from emonb.emotions import TAXONOMIES
from emonb.errors import EmonbError
from emonb.files import git_state, library_versions, make_folder
from emonb.fit import get_device
from emonb.machine import machine, peak_memory
from emonb.parameters import count_vlm
from emonb.progress import progress
from emonb.projection import dataset_size
from emonb.random_vlm import build_vlm, has_nf4, load_config, own_processor, resolve_base, weight_bytes
from emonb.rehearsal_bench import Bench, Step, noise_picture, release
from emonb.rehearsal_report import assemble, headlines, write_report
from emonb.rehearsal_small import SMALL_STEPS, network_step
from emonb.rehearsal_steps import VLM_STEPS
from emonb.settings import Settings, load_settings

__all__ = ["rehearse"]

_DEPTHS = (1, 3)  # layers that are measured where the whole is not
_PASSES = 20  # passes of one image through the model that a rehearsal is worth: repeats, training, generation
_LONGEST = 300.0  # seconds: a whole model whose rehearsal would take longer is measured at two depths


def rehearse(
    profile: str = "paper",
    *,
    model: str = "",
    dataset_size: int | None = None,
    image_side: int = 1024,
    layers: str = "",
    device: str = "auto",
    out: Path = Path("build/rehearsal"),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure every stage and write `report.json` and `report.md`.

    Args:
        profile: as for `python -m emonb run`.
        model: 7b, 2b, stand-in, or a folder with config.json; "" is the profile's.
        dataset_size: images of each dataset whose size is not recorded here.
        image_side: long side of the pictures, pixels; the short one is three quarters of it.
        layers: two depths such as "1,3", or "whole"; "" decides by memory and speed.
        device: auto, cpu or cuda.
        out: folder of the report.
        say: gets the messages.

    Returns:
        The report as it stands in report.json.

    Raises:
        EmonbError: an unknown model, depth, device or profile. A stage that fails is in the report instead.
    """
    settings = load_settings(profile)
    if image_side < 56 or (dataset_size is not None and dataset_size < 10):
        raise EmonbError("rehearse: --image-side must be at least 56 (pixels), --dataset-size at least 10 (images)")
    base, where = resolve_base(model or settings.vlm.base), _device(device)
    folder = make_folder(Path(out))
    session = _Session(settings, base, where, (image_side, image_side * 3 // 4), dataset_size, layers, folder)
    for line in session.facts["plan"]["words"]:
        say(line)
    session.run()
    for line in headlines(session.report):
        say(line)
    say(f"{folder / 'report.md'}")
    return session.report


class _Session:
    """One rehearsal: its plan, what was measured so far, and the report of it."""

    def __init__(
        self,
        settings: Settings,
        base: str,
        device: torch.device,
        picture: tuple[int, int],
        given: int | None,
        layers: str,
        folder: Path,
    ) -> None:
        self.settings, self.base, self.device, self.folder = settings, base, device, folder
        config, self.counts = load_config(base), count_vlm(base, settings.vlm.lora_r, settings.vlm.lora_targets)
        self.full = {"tower": config.vision_config.depth, "language": config.text_config.num_hidden_layers}
        dtype = settings.vlm.dtype
        self.precisions = ["nf4"] if settings.vlm.quantize_4bit and device.type == "cuda" and has_nf4() else []
        self.precisions.append(dtype)
        self.attention = attention_of(settings.vlm, device)
        self.sizes = [dataset_size(settings, name, given) for name in settings.datasets]
        self.plan = _plan(layers, self.counts, self.precisions, config.text_config.vocab_size, device, self.full)
        whole, labels = self.plan["layers"] is None, list(TAXONOMIES["mikels8"].labels)
        self.raw: list[dict[str, Any]] = []
        self.bench = Bench(
            settings=settings,
            device=device,
            picture=noise_picture(*picture),
            jpeg=folder / "picture.jpg",
            labels=labels,
            rows=self.sizes[0].train,
            batch=settings.vlm.batch_size if whole or device.type == "cuda" else 1,
            repeats=5 if device.type == "cuda" else 3,
            notes={"width": self.counts["features"], "labels": labels},
        )
        self.facts = {
            "kind": "rehearsal",
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "profile": settings.profile,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "machine": {**machine(), "load_average_at_start": round(os.getloadavg()[0], 2)},
            "versions": library_versions(),
            "git": git_state(),
            "model": {
                "base": base if not Path(base).is_dir() else Path(base).name,
                "parameters": self.counts,
                "layers": self.full,
                "attention": self.attention,
                "tokenizer": "the checkpoint's own" if own_processor(base) else "the stand-in's, word by word",
            },
            "picture": {"width": picture[0], "height": picture[1]},
            "precision": self.precisions[0],
            "plan": self.plan,
        }
        self._write(complete=False)

    def run(self) -> None:
        """Measure everything; the report is on disk after each measurement."""
        jobs: list[tuple[str, Step, str, int | None]] = [("decoding", SMALL_STEPS["decoding"], "", None)]
        for precision in self.precisions:
            for layers in self.plan["layers"] or [None]:
                jobs += [(name, step, precision, layers) for name, step in VLM_STEPS.items()]
        jobs += [(name, network_step(name), "", None) for name in self.settings.teacher.networks]
        jobs += [(name, SMALL_STEPS[name], "", None) for name in ("heads", "gates")]
        doing = [""]
        with TemporaryDirectory() as scratch:
            self.bench.jpeg = Path(scratch) / "picture.jpg"
            self.bench.picture.save(self.bench.jpeg, quality=90)
            self.built: tuple[str, int | None] | None = None
            for name, step, precision, layers in progress(jobs, "rehearsal", unit="step", note=lambda: doing[0]):
                doing[0] = f"{name}{f', depth {layers}' if layers else ''}"
                self.raw.append(self._measure(name, step, precision, layers))
                self._write(complete=False)
        self._write(complete=True)

    def _measure(self, name: str, step: Step, precision: str, layers: int | None) -> dict[str, Any]:
        """One stage at one depth; whatever it raises is its result, the others still run."""
        row: dict[str, Any] = {"stage": name, "precision": precision, "layers": layers}
        start = time.perf_counter()
        try:
            self._prepare(precision, layers)
            on_gpu = self.device.type == "cuda" and name not in SMALL_STEPS
            with _peak(self.device if on_gpu else torch.device("cpu")) as peak:
                seconds, batch = step.run(self.bench)
            row |= {"status": "measured", "seconds": seconds, "batch": batch, "peak_bytes": peak[0]}
            if precision:
                row["weight_bytes"] = self.weights
        except Exception as error:
            why = next(iter(str(error).strip().splitlines()), "")
            row |= {"status": "failed", "message": f"{type(error).__name__}: {why}"[:300]}
        release()
        return {**row, "took": round(time.perf_counter() - start, 1)}

    def _prepare(self, precision: str, layers: int | None) -> None:
        """Put the model that a stage needs into memory, and only that one."""
        wanted = (precision, layers) if precision else None
        if self.built == wanted:
            return
        self.bench.vlm = self.bench.visual = self.built = None
        release()
        if wanted:
            side = self.settings.vlm.max_side
            self.bench.vlm = build_vlm(self.base, precision, self.device, side, layers, self.attention)
            self.weights = sum(p.nbytes for p in self.bench.vlm.model.parameters())  # before peft widens any
            self.built = wanted

    def _write(self, *, complete: bool) -> None:
        self.facts["complete"] = complete
        self.report = assemble(self.facts, self.raw, self.bench.notes, self.settings, self.sizes)
        write_report(self.report, self.folder)


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise EmonbError(f"rehearse: no device {name!r} here; use --device auto or cpu (cuda needs an NVIDIA GPU)")
    return get_device() if name == "auto" else torch.device(name)


def _plan(
    layers: str,
    counts: dict[str, int],
    precisions: list[str],
    vocabulary: int,
    device: torch.device,
    full: dict[str, int],
) -> dict[str, Any]:
    """Whether the whole model is measured or two depths of it, and why, in words for the report.

    It is measured whole if weights and a training step's logits fit the free memory, and if the rehearsal would end
    within five minutes at the speed of one matrix product (our bounds).
    """
    weights = max(weight_bytes(counts, precision) for precision in precisions)
    needed = 1.1 * weights + 3 * 4 * 1200 * vocabulary  # three float32 copies of the logits of some 1,200 tokens
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    speed = _speed(device, precisions[-1])
    seconds = _PASSES * 2 * counts["total"] * 1200 / speed
    plan = {"weights_gb": weights / 1e9, "needed_gb": needed / 1e9, "free_gb": free / 1e9, "tflops": speed / 1e12}
    reason = f"it needs some {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    if needed <= free:
        fits, reason = seconds <= _LONGEST, f"a rehearsal of it would take some {seconds / 60:.0f} minutes here"
    else:
        fits = False
    chosen = None if fits else _DEPTHS
    if layers:
        chosen, reason = _chosen(layers), "as asked for with --layers"
    if chosen is not None and max(chosen) > min(full.values()):
        raise EmonbError(f"rehearse: --layers {layers or chosen}: the model has {full}; use smaller depths or whole")
    room = f"{weights / 1e9:.2g} GB of weights, {free / 1e9:.1f} GB free"
    words = [f"{room}; a matrix product runs at {speed / 1e12:.2g} TFLOP/s"]
    if chosen is None:
        words.append("measured whole")
    else:
        depths = f"{chosen[0]} and {chosen[1]} layers of the real width"
        words.append(f"measured with {depths} ({reason})")
    return {**plan, "layers": chosen and list(chosen), "words": words}


def _chosen(layers: str) -> tuple[int, int] | None:
    if layers == "whole":
        return None
    try:
        low, high = sorted(int(part) for part in layers.split(","))
        if not 1 <= low < high:
            raise ValueError
    except ValueError:
        raise EmonbError(f"rehearse: --layers {layers!r}: use two different depths such as 1,3, or whole") from None
    return low, high


def _speed(device: torch.device, precision: str) -> float:
    """Operations per second of a square matrix product in the model's precision: the best of three."""
    dtype = getattr(torch, precision)
    a = torch.randn(2048, 2048, device=device).to(dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


@contextmanager
def _peak(device: torch.device) -> Iterator[list[float]]:
    """Peak memory within the block in bytes, in the yielded list: of the GPU, or of this process."""
    result = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        result[0] = float(torch.cuda.max_memory_allocated(device))
        return
    with peak_memory() as megabytes:
        yield result
    result[0] = megabytes[0] * 2**20
