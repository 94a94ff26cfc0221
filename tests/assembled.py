"""A small assembled model on the stand-in, with a random head and gate, and a results folder around it."""

from __future__ import annotations

import torch
from PIL import Image
from safetensors.torch import save_file

from emonb.data import TAXONOMIES
from emonb.distill import StudentHead
from emonb.files import write_json
from emonb.gate import make_gate
from emonb.model import EmoVLMKD
from emonb.settings import NetworkSettings, VLMSettings
from emonb.store import Recipe, Store
from emonb.teacher import build_network
from emonb.tuning import add_lora
from emonb.vlm import load_vlm

LABELS = list(TAXONOMIES["mikels8"].labels)
HOSTILE = "<img src=x onerror=alert(1)>.png"


def assembled(kind="concat"):
    """An untuned model: LoRA as it starts, everything else drawn from a fixed seed."""
    settings = VLMSettings(base="stand-in", dtype="float32", quantize_4bit=False, max_new_tokens=12)
    base = load_vlm("stand-in")
    torch.manual_seed(0)
    tuned = add_lora(base, dropout=0)
    head = StudentHead(base.width, (16,), len(LABELS))
    head.mean.copy_(torch.randn(base.width) / 3)
    head.deviation.copy_(torch.rand(base.width) + 0.5)
    config = {"labels": LABELS, "vlm": settings.model_dump(mode="json"), "hidden": [16], "gate": kind, "seed": 0}
    return EmoVLMKD(tuned, head, make_gate(kind, len(LABELS)), config).eval()


def results(out, model):
    """A results folder of `mini-fi`: the model, and an untrained ViT; returns the model's folder."""

    def teacher(folder, parts):
        options = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
        config = NetworkSettings(name="vit_tiny_patch16_224", image_size=32, kwargs=options)
        torch.manual_seed(0)
        net = build_network(config.name, len(LABELS), image_size=32, **options)
        save_file(net.state_dict(), folder / "model.safetensors")
        write_json(folder / "config.json", {"labels": LABELS, "network": config.model_dump()})

    Store(out / "artifacts").get("teacher", "mini-fi--vit--seed0", Recipe(teacher, {}))
    model.save_pretrained(out / "models" / "mini-fi")
    return out / "models" / "mini-fi"


def picture(size=(96, 96)):
    """A picture with a different colour in each corner."""
    corners = Image.new("RGB", (2, 2))
    corners.putdata([(220, 60, 40), (40, 190, 60), (40, 60, 220), (230, 220, 40)])
    return corners.resize(size, Image.Resampling.NEAREST)
