"""A small assembled model on the stand-in, with a random head and gate, and a results folder around it."""

from __future__ import annotations

import pandas as pd
import torch
from PIL import Image
from pipeline import COLORS, paint
from safetensors.torch import save_file

from emonb.distill import StudentHead
from emonb.gate import make_gate
from emonb.model import EmoVLMKD
from emonb.settings import NetworkSettings, VLMSettings
from emonb.store import Store, write_json
from emonb.teacher import build_network
from emonb.tuning import add_lora
from emonb.vlm import load_vlm
from emonb.workspace import open_workspace

LABELS = ["amusement", "anger", "awe", "contentment", "disgust", "excitement", "fear", "sadness"]


def assembled(kind="concat", labels=LABELS, hidden=(16,), **changes):
    """An untuned model: LoRA as it starts, everything else drawn from a fixed seed."""
    settings = VLMSettings(
        base="stand-in", dtype="float32", quantize_4bit=False, lora_dropout=0, max_new_tokens=12, **changes
    )
    base = load_vlm(settings)
    torch.manual_seed(0)
    tuned = add_lora(base, settings)
    head = StudentHead(base.width, hidden, len(labels))
    head.mean.copy_(torch.randn(base.width) / 3)
    head.deviation.copy_(torch.rand(base.width) + 0.5)
    config = {
        "labels": labels,
        "vlm": settings.model_dump(mode="json"),
        "hidden": list(hidden),
        "gate": kind,
        "seed": 0,
    }
    return EmoVLMKD(tuned, head, make_gate(kind, len(labels)), config).eval()


def results(folder, model):
    """A results folder of `mini-fi`: the model, a sample table with a picture of each colour, and an untrained ViT."""
    pictures = folder / "pictures"
    for i, color in enumerate(COLORS.values()):
        paint(pictures / f"{i}.png", color, seed=i)
    labels = model.labels[: len(COLORS)]
    rows = [(f"{i}.png", str(pictures / f"{i}.png"), "test", label) for i, label in enumerate(labels)]
    table = pd.DataFrame(rows, columns=["image_id", "path", "split", "label"])

    def samples(target):
        table.to_parquet(target / "samples.parquet")
        write_json(target / "meta.json", {"root": ".", "labels": model.labels})

    def teacher(target):
        options = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
        config = NetworkSettings(name="vit_tiny_patch16_224", image_size=32, kwargs=options)
        torch.manual_seed(0)
        save_file(build_network(config, len(model.labels)).state_dict(), target / "model.safetensors")
        write_json(target / "config.json", {"labels": model.labels, "network": config.model_dump()})

    out = folder / "out"
    store = Store(out / "artifacts")
    store.get("samples", "mini-fi", samples)
    store.get("teacher", "mini-fi--vit", teacher)
    model.save_pretrained(out / "models" / "mini-fi")
    return open_workspace("mini", datasets="mini-fi", out=str(out))


def picture(size=(96, 96)):
    """A picture with a different colour in each corner."""
    image = Image.new("RGB", size)
    for i, color in enumerate([(220, 60, 40), (40, 190, 60), (40, 60, 220), (230, 220, 40)]):
        box = (size[0] // 2 * (i % 2), size[1] // 2 * (i // 2))
        image.paste(color, (*box, box[0] + size[0] // 2, box[1] + size[1] // 2))
    return image
