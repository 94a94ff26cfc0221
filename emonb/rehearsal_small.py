"""The stages of a rehearsal that need no VLM: decoding pictures, conventional networks, heads and gates."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn

from emonb.distill import train_head
from emonb.gate import GATES, train_gate
from emonb.rehearsal_bench import Bench, Step
from emonb.samples import open_picture
from emonb.teacher import LAYOUT, build_network

__all__ = ["SMALL_STEPS", "network_step"]


def decode(bench: Bench) -> tuple[dict[str, float], int]:
    """Reading a JPEG, upright and in RGB."""
    bench.notes["jpeg_bytes"] = bench.jpeg.stat().st_size
    seconds = bench.time(lambda: open_picture(bench.jpeg))
    return {"decode": seconds, "step": seconds}, 1


def network(bench: Bench, name: str) -> tuple[dict[str, float], int]:
    """One conventional network: a training step at its own batch size, and a pass without gradient."""
    config = bench.settings.teacher.networks[name].model_copy(update={"pretrained": False})
    net = build_network(config, len(bench.labels)).to(bench.device, **LAYOUT)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    def pictures(batch: int) -> tuple[Tensor, Tensor]:
        images = torch.randn(batch, 3, config.image_size, config.image_size)
        return images.to(bench.device, **LAYOUT), torch.randint(len(bench.labels), (batch,), device=bench.device)

    def train(batch: int) -> float:
        images, targets = pictures(batch)

        def step() -> None:
            loss = nn.functional.cross_entropy(net.train()(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return bench.time(step)

    @torch.inference_mode()
    def predict(batch: int) -> float:
        images, _ = pictures(batch)
        return bench.time(lambda: net.eval()(images))

    seconds, batch = bench.halved(train, config.batch_size)
    predicted, wide = bench.halved(predict, config.batch_size)
    return {f"{name}_train": seconds / batch, f"{name}_predict": predicted / wide, "step": seconds}, batch


def head(bench: Bench) -> tuple[dict[str, float], int]:
    """One epoch of the distilled head on cached tensors of the real width, validation included."""
    config = bench.settings.distill.model_copy(update={"epochs": 1})
    width, classes = bench.notes["width"], len(bench.labels)
    data = {
        split: {
            "features": torch.randn(rows, width),
            "teacher": torch.randn(rows, classes),
            "labels": torch.randint(classes, (rows,)),
        }
        for split, rows in (("train", bench.rows), ("val", max(1, bench.rows // 8)))
    }
    seconds = bench.time(lambda: train_head(data, config.hidden, config.alpha, classes, config, 0))
    batch = min(config.batch_size, bench.rows)
    return {"head": seconds / bench.rows, "step": seconds / bench.rows * batch}, batch


def gate(bench: Bench) -> tuple[dict[str, float], int]:
    """One epoch of each of the five gates on cached answers: the mean of them."""
    config, classes = bench.settings.gate.model_copy(update={"epochs": 1}), len(bench.labels)

    def rows(count: int) -> tuple[Tensor, Tensor, Tensor]:
        answers = nn.functional.one_hot(torch.randint(classes, (count,)), classes).float()
        return answers, torch.randn(count, classes).softmax(-1), torch.randint(classes, (count,))

    train, val = rows(bench.rows), rows(max(1, bench.rows // 8))
    seconds = statistics.mean(bench.time(lambda k=kind: train_gate(k, train, val, config, 0)) for kind in GATES)
    batch = min(config.batch_size, bench.rows)
    return {"gate": seconds / bench.rows, "step": seconds / bench.rows * batch}, batch


def network_step(name: str) -> Step:
    """The step of one network of the settings."""
    return Step(
        lambda bench: network(bench, name), {f"{name}_train": "trained image", f"{name}_predict": "classified image"}
    )


SMALL_STEPS = {
    "decoding": Step(decode, {"decode": "image"}),
    "heads": Step(head, {"head": "row and epoch"}),
    "gates": Step(gate, {"gate": "row and epoch"}),
}
