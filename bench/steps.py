"""What a training step gains on this CPU by more threads, by bfloat16, and by the memory layout of the convolutions.

    python bench/steps.py

One step (forward, loss, backward, optimizer) of each conventional network, of a head and of LoRA on the stand-in, on
prepared tensors: with one thread, with all of them, and with all of them under bfloat16 autocast; for the convolutions
also without channels-last. Medians; the variants take turns, so that a slow moment meets all of them. torch.compile
is left out: on a CPU it needs a C++ compiler, which the laptops of our readers may not have.

Writes `steps.json`: milliseconds by network and variant, and the gain side by side: how much more processes with a
thread each do than all threads together on one network (threads times the time on all over the time on one).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from measure import arguments, save, small_run
from trainer import INPUTS, by_trainer, fresh

from emonb.distill import StudentHead, distillation_loss
from emonb.settings import Settings
from emonb.store import Store
from emonb.teacher import LAYOUT, build_network
from emonb.tuning import IGNORE, response_loss

CLASSES, WIDTH = 8, 128
Step = Callable[[], Any]


def half() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def network_step(settings: Settings, name: str, *, channels_last: bool = True, bf16: bool = False) -> Step:
    """A step of one conventional network on a random batch of its size."""
    config = settings.teacher.networks[name]
    layout = LAYOUT if channels_last else {}
    net = build_network(config, CLASSES).to(**layout).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, fused=True)
    images = torch.randn(config.batch_size, 3, config.image_size, config.image_size).to(**layout)
    targets = torch.randint(CLASSES, (config.batch_size,))

    def step() -> None:
        with half() if bf16 else nullcontext():
            logits = net(images)
        torch.nn.functional.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def head_step(settings: Settings, *, bf16: bool = False) -> Step:
    """A step of the deepest head on random features as wide as the stand-in's."""
    config = settings.distill
    head = StudentHead(WIDTH, config.depths[-1], CLASSES, config.dropout).train()
    optimizer = torch.optim.Adam(head.parameters(), lr=config.lr, fused=True)
    features, teacher = torch.randn(config.batch_size, WIDTH), torch.randn(config.batch_size, CLASSES)
    labels = torch.randint(CLASSES, (config.batch_size,))

    def step() -> None:
        with half() if bf16 else nullcontext():
            logits = head(features)
        distillation_loss(logits.float(), teacher, labels, alpha=config.alpha, tau=config.tau).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lora_step(settings: Settings, batch: dict[str, Any], *, bf16: bool = False) -> Step:
    """A step of instruction tuning on one batch of triplets."""
    vlm = fresh(settings)
    optimizer = torch.optim.AdamW([p for p in vlm.model.parameters() if p.requires_grad], lr=settings.vlm.lr)
    vlm.model.train()
    labels, inputs = batch["labels"], {name: value for name, value in batch.items() if name in INPUTS}
    count = (labels[:, 1:] != IGNORE).sum()

    def step() -> None:
        with half() if bf16 else nullcontext():
            outputs = vlm.model(**inputs)
        response_loss(outputs, labels, count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def medians(variants: dict[str, tuple[int, Step]], rounds: int) -> dict[str, float]:
    """Milliseconds of each variant: (threads, step)."""
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, (threads, step) in variants.items():
            torch.set_num_threads(threads)
            start = time.perf_counter()
            step()
            if turn:  # the first warms up
                spent[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in spent.items()}


def measured(settings: Settings, store: Store, rounds: int) -> dict[str, dict[str, float]]:
    every = torch.get_num_threads()
    found = {}
    for name in settings.teacher.networks:
        plain = network_step(settings, name)
        variants = {
            "one thread": (1, plain),
            "all threads": (every, plain),
            "bfloat16": (every, network_step(settings, name, bf16=True)),
        }
        if not name.startswith("vit"):
            variants["not channels-last"] = (every, network_step(settings, name, channels_last=False))
        found[name] = medians(variants, rounds)
    plain = head_step(settings)
    found["head"] = medians(
        {
            "one thread": (1, plain),
            "all threads": (every, plain),
            "bfloat16": (every, head_step(settings, bf16=True)),
        },
        20 * rounds,  # a step is a few milliseconds
    )
    _, _, batches = by_trainer(settings, store, 1)
    plain = lora_step(settings, batches[0])
    found["LoRA"] = medians(
        {
            "one thread": (1, plain),
            "all threads": (every, plain),
            "bfloat16": (every, lora_step(settings, batches[0], bf16=True)),
        },
        rounds,
    )
    torch.set_num_threads(every)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    start, threads = time.monotonic(), torch.get_num_threads()
    settings, store = small_run(options.out)
    found = measured(settings, store, options.rounds)
    gains = {name: threads * ms["all threads"] / ms["one thread"] for name, ms in found.items()}
    written = {"milliseconds": found, "all_threads": threads, "side_by_side_gain": gains}
    save(options.out, "steps", written, time.monotonic() - start)
    for name, ms in found.items():
        print(f"{name:8s}" + "".join(f" {variant} {value:.0f} ms" for variant, value in ms.items()))


if __name__ == "__main__":
    main()
