"""Room 04: the conventional vision models. The ViT is the teacher; ResNet and VGG are the paper's baselines.

Built by timm, fine-tuned on the dataset's labels with random resized crop and horizontal flip (authors'
code). They see pictures and labels, nothing else: no captions, no text.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import ClassifierHead
from timm.models import register_model
from timm.models.vgg import VGG
from torch import Tensor, nn
from torchvision.transforms import v2

from emonb.fit import get_device, set_seed
from emonb.network_weights import check_name, load_pretrained, weights_file
from emonb.predictions import make_predictions, write_predictions
from emonb.progress import progress
from emonb.samples import open_picture, read_samples, sample_labels
from emonb.settings import SPLITS, NetworkSettings, Settings
from emonb.store import Artifact, Store, read_json, write_json

__all__ = ["Pictures", "build_network", "load_network", "predict_network", "teacher_stage", "train_network"]

LAYOUT = {"memory_format": torch.channels_last}  # a sixth to a quarter faster for the convolutions on 2 CPU cores
CACHE_BYTES = 512 * 2**20  # decoded pictures are kept only while they fit here; larger sets are streamed


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


class Pictures(torch.utils.data.Dataset):
    """(image, label index) pairs; images (3, S, S) float, normalised to mean 0.5 and deviation 0.5.

    Training pictures get a random resized crop and flip (authors' code), others are resized whole.
    """

    def __init__(self, frame: pd.DataFrame, labels: list[str], settings: NetworkSettings, *, train: bool):
        self.paths = frame["path"].tolist()
        self.targets = [labels.index(x) for x in frame["label"]]
        side = settings.image_size
        self.side = side
        resize = v2.RandomResizedCrop(side, settings.crop_scale, antialias=True) if train else v2.Identity()
        flip = v2.RandomHorizontalFlip() if train else v2.Identity()
        scale = v2.ToDtype(torch.float32, scale=True)
        self.transform = v2.Compose([resize, flip, scale, v2.Normalize([0.5] * 3, [0.5] * 3)])
        self.cache: dict[int, Tensor] | None = {} if len(frame) * 3 * side**2 <= CACHE_BYTES else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if self.cache is None:
            return self.transform(self._decode(i)), self.targets[i]
        if i not in self.cache:
            self.cache[i] = self._decode(i)
        return self.transform(self.cache[i]), self.targets[i]

    def _decode(self, i: int) -> Tensor:
        picture = open_picture(self.paths[i])
        if picture.size != (self.side, self.side):
            picture = picture.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _loader(pictures: Pictures, batch_size: int, seed: int | None = None) -> torch.utils.data.DataLoader:
    workers = 0 if pictures.cache is not None else min(8, os.cpu_count() or 1)
    shuffle = {"shuffle": True, "generator": torch.Generator().manual_seed(seed)} if seed is not None else {}
    return torch.utils.data.DataLoader(pictures, batch_size, num_workers=workers, **shuffle)


def train_network(
    net: nn.Module, train: Pictures, val: Pictures, settings: NetworkSettings, *, seed: int, what: str
) -> list[dict[str, Any]]:
    """Train with Adam (authors' code) or AdamW and keep the epoch with the best val accuracy.

    Returns:
        Training curve: rows of epoch, split, metric, value. `net` holds the chosen epoch.
    """
    device = next(net.parameters()).device
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    optimizer = kind(net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    rows, best, kept = [], -1.0, copy.deepcopy(net.state_dict())
    loader = _loader(train, settings.batch_size, seed)
    for epoch in progress(range(1, settings.epochs + 1), what, unit="epoch"):
        net.train()
        total = 0.0
        for images, targets in loader:
            loss = nn.functional.cross_entropy(net(images.to(device, **LAYOUT)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(targets)
        hits = predict_network(net, val).argmax(1) == np.array(val.targets)
        accuracy = float(hits.mean() * 100)
        rows.append({"epoch": epoch, "split": "train", "metric": "loss", "value": total / len(train)})
        rows.append({"epoch": epoch, "split": "val", "metric": "accuracy", "value": accuracy})
        if accuracy > best:
            best, kept = accuracy, copy.deepcopy(net.state_dict())
    net.load_state_dict(kept)
    return rows


@torch.inference_mode()
def predict_network(net: nn.Module, pictures: Pictures, batch_size: int = 128) -> np.ndarray:
    """(N, C) float32 logits of unaugmented pictures."""
    net.eval()
    device = next(net.parameters()).device
    return np.concatenate(
        [net(x.to(device, **LAYOUT)).float().cpu().numpy() for x, _ in _loader(pictures, batch_size)]
    )


def teacher_stage(settings: Settings, store: Store, dataset: str, network: str) -> Artifact:
    """Train one conventional model (stage `teacher`, name `<dataset>--<network>`).

    Files: `model.safetensors`, `config.json`, `history.json`, `logits.safetensors` ((N, C) per split, with
    `ids.json`: what the student learns from) and `predictions.parquet`.
    """
    samples = store.find("samples", dataset)
    labels, config = sample_labels(samples), settings.teacher.networks[network]

    def build(folder: Path) -> None:
        set_seed(settings.seed)
        frame = read_samples(samples)
        parts = {s: frame[frame["split"] == s].reset_index(drop=True) for s in SPLITS}
        net = build_network(config, len(labels)).to(get_device(), **LAYOUT)
        augmented = Pictures(parts["train"], labels, config, train=True)
        plain = {s: Pictures(parts[s], labels, config, train=False) for s in SPLITS}
        what = f"{network} on {dataset}"
        history = train_network(net, augmented, plain["val"], config, seed=settings.seed, what=what)
        logits = {s: predict_network(net, plain[s]) for s in SPLITS}
        save_file({k: v.cpu().contiguous() for k, v in net.state_dict().items()}, folder / "model.safetensors")
        save_file({s: torch.from_numpy(x) for s, x in logits.items()}, folder / "logits.safetensors")
        write_json(folder / "ids.json", {s: parts[s]["image_id"].tolist() for s in SPLITS})
        write_json(folder / "config.json", {"labels": labels, "network": config.model_dump()})
        write_json(folder / "history.json", history)
        write_predictions(folder / "predictions.parquet", _predictions(parts, logits, labels, settings), labels)

    params = {**config.model_dump(), "network": network, "seed": settings.seed}
    return store.get(
        "teacher", f"{dataset}--{network}", build, params=params, inputs=[samples], code=["emonb.teacher"]
    )


def _predictions(
    parts: dict[str, pd.DataFrame], logits: dict[str, np.ndarray], labels: list[str], settings: Settings
) -> pd.DataFrame:
    frames = []
    for split, part in parts.items():
        p = torch.from_numpy(logits[split]).double().softmax(-1).numpy()
        names = [split] * len(part)
        frames.append(make_predictions(part["image_id"], names, part["label"].tolist(), p, labels, seed=settings.seed))
    return pd.concat(frames, ignore_index=True)


def load_network(artifact: Artifact) -> tuple[nn.Module, NetworkSettings, list[str]]:
    """A trained network with its settings and class order."""
    config = read_json(artifact.path / "config.json")
    settings = NetworkSettings.model_validate(config["network"])
    net = build_network(settings.model_copy(update={"pretrained": False}), len(config["labels"]))
    net.load_state_dict(load_file(artifact.path / "model.safetensors"))
    return net.eval(), settings, config["labels"]
