"""What a training step gains on this CPU by more threads, by bfloat16, and by the memory layout of the convolutions.

    python -m tools.bench.steps

One step (forward, loss, backward, optimizer) of each conventional network, of a head and of LoRA on the stand-in, by
the package's own loops on prepared tensors: with one thread, with all of them, and with all of them under bfloat16
autocast; for the convolutions also without channels-last. Medians; the variants take turns, so that a slow moment
meets all of them. torch.compile is left out: on a CPU it needs a C++ compiler, which the laptops of our readers may
not have.

Writes `steps.json`: milliseconds by network and variant, and the gain side by side: how much more processes with a
thread each do than all threads together on one network (threads times the time on all over the time on one).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from emonb.distill import Cached, train_head
from emonb.run import Run
from emonb.teacher import LAYOUT, build_network, train_epoch
from emonb.tuning import add_lora, step_gradients
from tools.bench.common import DATASET, arguments, save, small_run

CLASSES, STEPS = 8, 20  # of the head's epoch: a step of it is too short to be timed


def network_step(run: Run, name: str, plain: bool = False) -> Callable[[], Any]:
    """A step of one conventional network on a random batch of its size; `plain`: not channels-last."""
    config = run.settings.teacher.networks[name]
    net = build_network(classes=CLASSES, **config.building)
    if plain:
        net.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
    else:
        net.to(**LAYOUT)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, fused=True)
    images = torch.randn(config.batch_size, 3, config.image_size, config.image_size)
    batch = images.to(**LAYOUT), torch.randint(CLASSES, (config.batch_size,))
    return lambda: train_epoch(net, [batch], optimizer)


def head_epoch(run: Run) -> Callable[[], Any]:
    """A short epoch of the deepest head on random features as wide as the stand-in's."""
    config = run.settings.distill
    rows = STEPS * config.batch_size
    data = Cached(torch.randn(rows, 128), torch.randn(rows, CLASSES), torch.randint(CLASSES, (rows,)))
    val, options = Cached(*(x[:CLASSES] for x in data)), {**config.training, "epochs": 1}
    return lambda: train_head(data, val, hidden=config.depths[-1], **options)


def lora_step(run: Run) -> Callable[[], Any]:
    """A step of instruction tuning on one batch of triplets."""
    config, see = run.settings.vlm, run.tokens(DATASET, "train")
    vlm, rows = add_lora(run.vlm, **config.lora), run.triplets(DATASET)[: config.train_batch_size]
    optimizer = torch.optim.AdamW([p for p in vlm.model.parameters() if p.requires_grad], lr=config.lr)
    vlm.model.train()

    def step() -> None:
        step_gradients(vlm, rows, see, [slice(None)])
        optimizer.step()
        optimizer.zero_grad()

    return step


def medians(variants: dict[str, tuple[int, bool, Callable[[], Any]]], rounds: int) -> dict[str, float]:
    """Milliseconds of each variant: (threads, bfloat16, step)."""
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, (threads, short, step) in variants.items():
            torch.set_num_threads(threads)
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=short):
                step()
            if turn:  # the first warms up
                spent[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in spent.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    run, every, found = small_run(options), torch.get_num_threads(), {}
    networks = {name: network_step(run, name) for name in run.settings.teacher.networks}
    for name, step in {**networks, "head": head_epoch(run), "LoRA": lora_step(run)}.items():
        variants = {
            "one thread": (1, False, step),
            "all threads": (every, False, step),
            "bfloat16": (every, True, step),
        }
        if name in networks and name != "vit":
            variants["not channels-last"] = (every, False, network_step(run, name, plain=True))
        found[name] = medians(variants, options.rounds)
    found["head"] = {variant: ms / STEPS for variant, ms in found["head"].items()}
    torch.set_num_threads(every)
    gains = {name: every * ms["all threads"] / ms["one thread"] for name, ms in found.items()}
    save(options.out, "steps", {"milliseconds": found, "all_threads": every, "side_by_side_gain": gains})


if __name__ == "__main__":
    main()
