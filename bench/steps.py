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
from functools import partial
from typing import Any

import torch
from measure import arguments, save, small_run
from torch import Tensor, nn
from torch.optim import Optimizer
from trainer import INPUTS, by_trainer, fresh

from emonb.distill import StudentHead, distillation_loss
from emonb.settings import Settings
from emonb.store import Store
from emonb.teacher import LAYOUT, build_network
from emonb.tuning import IGNORE, response_loss

CLASSES, WIDTH = 8, 128
Step = Callable[[], Any]


def training_step(
    net: nn.Module, optimizer: Optimizer, forward: Callable[[], Any], loss: Callable[[Any], Tensor], bf16: bool
) -> Step:
    """Forward (under autocast if asked for), loss in full precision, backward, optimizer."""
    net.train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = forward()
        loss(outputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def network_step(settings: Settings, name: str, *, channels_last: bool = True, bf16: bool = False) -> Step:
    """A step of one conventional network on a random batch of its size."""
    config = settings.teacher.networks[name]
    layout = LAYOUT if channels_last else {}
    net = build_network(config, CLASSES).to(**layout)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, fused=True)
    images = torch.randn(config.batch_size, 3, config.image_size, config.image_size).to(**layout)
    targets = torch.randint(CLASSES, (config.batch_size,))
    return training_step(
        net, optimizer, lambda: net(images), lambda x: nn.functional.cross_entropy(x.float(), targets), bf16
    )


def head_step(settings: Settings, *, bf16: bool = False) -> Step:
    """A step of the deepest head on random features as wide as the stand-in's."""
    config = settings.distill
    head = StudentHead(WIDTH, config.depths[-1], CLASSES, config.dropout)
    optimizer = torch.optim.Adam(head.parameters(), lr=config.lr, fused=True)
    features, teacher = torch.randn(config.batch_size, WIDTH), torch.randn(config.batch_size, CLASSES)
    labels = torch.randint(CLASSES, (config.batch_size,))

    def loss(logits: Tensor) -> Tensor:
        return distillation_loss(logits.float(), teacher, labels, alpha=config.alpha, tau=config.tau)

    return training_step(head, optimizer, lambda: head(features), loss, bf16)


def lora_step(settings: Settings, batch: dict[str, Any], *, bf16: bool = False) -> Step:
    """A step of instruction tuning on one batch of triplets."""
    model = fresh(settings).model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings.vlm.lr)
    labels, inputs = batch["labels"], {name: value for name, value in batch.items() if name in INPUTS}
    count = (labels[:, 1:] != IGNORE).sum()
    return training_step(model, optimizer, lambda: model(**inputs), lambda x: response_loss(x, labels, count), bf16)


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
    """Milliseconds by network and variant."""
    every, networks = torch.get_num_threads(), settings.teacher.networks
    _, _, batches = by_trainer(settings, store, 1)
    makers: dict[str, Callable[..., Step]] = {name: partial(network_step, settings, name) for name in networks}
    makers |= {"head": partial(head_step, settings), "LoRA": partial(lora_step, settings, batches[0])}
    found = {}
    for name, make in makers.items():
        plain = make()
        variants = {"one thread": (1, plain), "all threads": (every, plain), "bfloat16": (every, make(bf16=True))}
        if name in networks and name != "vit":
            variants["not channels-last"] = (every, make(channels_last=False))
        found[name] = medians(variants, rounds * (20 if name == "head" else 1))  # a head's step is a few ms
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
