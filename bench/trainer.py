"""What the trainer costs: LoRA tuning by `emonb.tuning.tune` against a bare loop on the same batches.

    python bench/trainer.py --steps 40

First the stage's own code tunes for some steps, while a hook keeps every batch that reaches the model. Then a loop of
forward, loss, backward, clipping and AdamW replays these batches from memory, on a fresh adapter drawn with the same
seed. What the trainer takes longer is its own work, the collation of the batches (measured apart, inside it), and what
it does once: starting and saving, taken from a training of two steps. Writes `trainer.json`.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import DATASET, arguments, clock, save, small_run

from emonb import tuning
from emonb.features import VisualSource
from emonb.settings import Settings
from emonb.tuning import TripletRows, add_lora, response_loss, tune
from emonb.vlm import VLM, load_vlm

INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "mm_encoder_outputs")


def fresh(settings: Settings) -> VLM:
    """The stand-in under a new adapter, always the same one."""
    vlm = load_vlm(settings.vlm)
    torch.manual_seed(settings.seed)
    return add_lora(vlm, settings.vlm)


class Timed:
    """A function that adds up the seconds spent in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


def by_trainer(settings: Settings, store: Any, steps: int) -> tuple[dict[str, float], float, list[dict]]:
    """Time and memory of `tune`, seconds of it in collation, and the batches that the model was given."""
    vlm = fresh(settings)
    rows = TripletRows(store.find("triplets", DATASET).path / "triplets.jsonl", settings.vlm.triplet_kinds)
    config = settings.vlm.model_copy(update={"epochs": steps * settings.vlm.train_batch_size / len(rows)})
    features, samples = store.find("features", DATASET), store.find("samples", DATASET)
    source = Timed(VisualSource(vlm, features, samples, "train", config.cache_visual_tokens))
    batching, batches = Timed(tuning.make_batch), []

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        batches.append(dict(kwargs))

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
        batches[-1]["labels"] = labels  # the Trainer takes them out before the model is called
        return response_loss(outputs, labels, num_items_in_batch)

    hook = vlm.model.register_forward_pre_hook(keep, with_kwargs=True)
    folder = Path(tempfile.mkdtemp())
    tuning.make_batch, tuning.response_loss = batching, loss
    try:
        with clock() as spent:
            tune(vlm, rows, source, config, seed=settings.seed, what="LoRA by the trainer", folder=folder / "adapter",
                 parts=folder / "parts")  # fmt: skip
    finally:
        tuning.make_batch, tuning.response_loss = batching.function, response_loss
        hook.remove()
        shutil.rmtree(folder)
    return spent, source.seconds + batching.seconds, batches


def bare(settings: Settings, batches: list[dict[str, Any]]) -> dict[str, float]:
    """Time and memory of the same steps written out."""
    vlm, config = fresh(settings), settings.vlm
    weights = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0)
    vlm.model.train()
    with clock() as spent:
        for batch in batches:
            labels = batch["labels"]
            outputs = vlm.model(**{name: value for name, value in batch.items() if name in INPUTS})
            response_loss(outputs, labels, (labels[:, 1:] != tuning.IGNORE).sum()).backward()
            torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return spent


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    start = time.monotonic()
    settings, store = small_run(options.out)
    by_trainer(settings, store, 2)  # warm up: imports and first calls
    short, _, _ = by_trainer(settings, store, 2)
    trained, collating, batches = by_trainer(settings, store, options.steps)
    looped = bare(settings, batches)
    around = max(0.0, short["seconds"] - 2 * looped["seconds"] / len(batches))  # a long training pays it once, too
    each = (trained["seconds"] - around - collating) / looped["seconds"]
    found = {
        "steps": len(batches),
        "seconds_trainer": trained["seconds"],
        "seconds_start_and_save": around,
        "seconds_collating": collating,
        "seconds_bare_loop": looped["seconds"],
        "ratio": trained["seconds"] / looped["seconds"],
        "overhead_percent_of_a_step": 100 * each - 100,
        "peak_memory_mb": {"trainer": trained["peak_memory_mb"], "bare loop": looped["peak_memory_mb"]},
    }
    save(options.out, "trainer", found, time.monotonic() - start)
    print(f"trainer {trained['seconds']:.1f} s, bare loop {looped['seconds']:.1f} s: {found['ratio']:.2f} x")


if __name__ == "__main__":
    main()
