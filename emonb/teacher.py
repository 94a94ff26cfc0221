"""Room 04: the conventional vision models. The ViT is the teacher; ResNet and VGG are the paper's baselines.

Built by timm, fine-tuned on the dataset's labels with random resized crop and horizontal flip (authors'
code). They see pictures and labels, nothing else: no captions, no text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import ClassifierHead
from timm.models import register_model
from timm.models.vgg import VGG
from torch import nn

from emonb.fit import get_device, set_seed
from emonb.network_weights import check_name, load_pretrained, weights_file
from emonb.parallel import is_main
from emonb.predictions import PredictionWriter
from emonb.samples import read_samples, sample_labels
from emonb.settings import SPLITS, NetworkSettings, Settings
from emonb.shards import Shard, make_shards, shards_of
from emonb.store import Artifact, Store, read_json, write_json
from emonb.teacher_training import LAYOUT, Pictures, predict_network, train_network

__all__ = ["Pictures", "build_network", "load_network", "predict_network", "teacher_stage", "train_network"]


@register_model
def vgg_small(pretrained: bool = False, num_classes: int = 8, **kwargs: Any) -> VGG:
    """A VGG for 96 px on a laptop: VGG-11's plan at a quarter of its width, without the 4096-wide layers."""
    kwargs = {k: v for k, v in kwargs.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
    plan = (16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128, "M")
    net = VGG(plan, num_classes, norm_layer=nn.BatchNorm2d, mlp_ratio=1 / 64, **kwargs)
    net.pre_logits, net.head_hidden_size = nn.Identity(), plan[-2]
    net.head = ClassifierHead(plan[-2], num_classes)
    return net


def build_network(settings: NetworkSettings, classes: int) -> nn.Module:
    """A timm model with a fresh classifier of the given size, the rest pretrained if the settings say so.

    Raises:
        EmonbError: timm has no such model; or its weights are not here, with the command that fetches them.
    """
    check_name(settings.name)
    weights = weights_file(settings) if settings.pretrained else None
    options = dict(settings.kwargs)
    if settings.name.startswith("vit"):
        options.setdefault("img_size", settings.image_size)
    net = timm.create_model(settings.name, pretrained=False, num_classes=classes, **options)
    if weights:
        load_pretrained(net, weights, settings, options)
    return net


def teacher_stage(settings: Settings, store: Store, dataset: str, network: str) -> Artifact:
    """Train one conventional model (stage `teacher`, name `<dataset>--<network>`).

    Files: `model.safetensors`, `config.json`, `history.json`, `logits.safetensors` ((N, C) per split, with
    `ids.json`: what the student learns from) and `predictions.parquet`.
    """
    samples = store.find("samples", dataset)
    labels, config = sample_labels(samples), settings.teacher.networks[network]

    def build(folder: Path, parts: Path) -> None:
        set_seed(settings.seed)
        frames = {s: read_samples(samples, s, ["image_id", "path", "label"]) for s in SPLITS}
        net = build_network(config, len(labels)).to(get_device(), **LAYOUT)
        plain = {s: Pictures(frames[s], labels, config) for s in SPLITS}
        options = {"seed": settings.seed, "what": f"{network} on {dataset}", "parts": parts}
        history = train_network(net, plain["train"].augmented(settings.seed), plain["val"], config, **options)

        def see(shard: Shard, file: Path) -> None:
            logits = predict_network(net, plain[shard.split], rows=range(shard.start, shard.stop))
            save_file({"logits": torch.from_numpy(logits)}, file)

        shards = shards_of({s: len(frame) for s, frame in frames.items()})
        files = make_shards(shards, parts, ".safetensors", see, f"{network}'s answers for {dataset}")
        if not is_main():
            return
        save_file({k: v.cpu().contiguous() for k, v in net.state_dict().items()}, folder / "model.safetensors")
        logits = [load_file(file)["logits"] for file in files]
        whole = {s: [x for x, shard in zip(logits, shards, strict=True) if shard.split == s] for s in SPLITS}
        save_file({s: torch.cat(x) for s, x in whole.items()}, folder / "logits.safetensors")
        write_json(folder / "ids.json", {s: frame["image_id"].tolist() for s, frame in frames.items()})
        write_json(folder / "config.json", {"labels": labels, "network": config.model_dump()})
        write_json(folder / "history.json", history)
        with PredictionWriter(folder / "predictions.parquet", labels) as out:
            for shard, x in zip(shards, logits, strict=True):
                rows = frames[shard.split].iloc[shard.start : shard.stop]
                out.add_scores(rows["image_id"], shard.split, rows["label"], x, settings.seed)

    params = {**config.model_dump(), "network": network, "seed": settings.seed}
    code = ["emonb.teacher", "emonb.teacher_training", "emonb.network_weights", "emonb.shards"]
    name = f"{dataset}--{network}"
    return store.get("teacher", name, build, params=params, inputs=[samples], code=code, parts=True)


def load_network(artifact: Artifact) -> tuple[nn.Module, NetworkSettings, list[str]]:
    """A trained network with its settings and class order."""
    config = read_json(artifact.path / "config.json")
    settings = NetworkSettings.model_validate(config["network"])
    net = build_network(settings.model_copy(update={"pretrained": False}), len(config["labels"]))
    net.load_state_dict(load_file(artifact.path / "model.safetensors"))
    return net.eval(), settings, config["labels"]
