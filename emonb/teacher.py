"""Room 04: the conventional vision models. The ViT is the teacher; ResNet and VGG are the paper's baselines.

Built by timm, fine-tuned on the dataset's labels with random resized crop and horizontal flip (authors' code). They
see pictures and labels, nothing else. Which crop and flip a picture gets follows from seed, epoch and picture alone,
so that a result does not depend on how many processes or loader workers share the work, nor on a kill in between.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import ClassifierHead
from timm.models import load_state_dict
from timm.models.vgg import VGG
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from emonb.data import open_picture, sizes_of
from emonb.errors import EmonbError
from emonb.files import file_digest, read_json
from emonb.machine import cores, get_device, hub_offline, is_main, process_count, wait_for_all
from emonb.progress import progress
from emonb.settings import DRAWN_SCENES, NetworkSettings, weights_of
from emonb.training import Best, load_checkpoint, mixed_seed, save_checkpoint, warn_if_short

LAYOUT = {"memory_format": torch.channels_last}  # a sixth to a quarter faster for the convolutions on 2 CPU cores
CACHE_BYTES = 512 * 2**20  # decoded pictures are kept only while they fit here; larger sets are streamed


def vgg_small(num_classes: int = 8, **kwargs: Any) -> VGG:
    """A VGG for 96 px on a laptop: VGG-11's plan at a quarter of its width, without the 4096-wide layers."""
    plan = (16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128, "M")
    net = VGG(plan, num_classes, norm_layer=nn.BatchNorm2d, mlp_ratio=1 / 64, **kwargs)
    net.pre_logits, net.head_hidden_size = nn.Identity(), plan[-2]
    net.head = ClassifierHead(plan[-2], num_classes)
    return net


def build_network(
    name: str,
    classes: int,
    *,
    image_size: int = 384,
    pretrained: bool = False,
    weights: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A network by its timm name (or `vgg_small`) with a fresh classifier for `classes` emotions.

    Args:
        image_size: pixels along a side.
        pretrained: all but the classifier from timm's weights on the hub, or from `weights`: a file, or drawn-scenes.
        kwargs: timm's own options.

    Raises:
        EmonbError: no such model; or its weights are not here or do not fit, with the command that fetches them.
    """
    if pretrained and weights == DRAWN_SCENES:
        return _seen_drawn_scenes(classes, {"name": name, "image_size": image_size, **kwargs})
    if name == "vgg_small" and not pretrained:
        return vgg_small(classes, **kwargs)
    try:
        there = timm.is_model(name)
        known = timm.get_pretrained_cfg(name) if there else None
    except RuntimeError:  # a tag behind the dot that is not there
        there, known = False, None
    if not there or (pretrained and known is None):
        raise EmonbError(f"setting teacher.networks: timm has no {'weights' if pretrained else 'model'} of {name!r}")
    if name.startswith("vit"):
        kwargs.setdefault("img_size", image_size)
    if not pretrained:
        try:
            return timm.create_model(name, num_classes=classes, **kwargs)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise EmonbError(f"setting teacher.networks ({name}): timm cannot build it so: {error}") from None
    try:
        hub = {"repo_id": known.hf_hub_id, "filename": "model.safetensors", "local_files_only": hub_offline()}
        state = load_state_dict(str(weights_of(weights, name)) if weights else hf_hub_download(**hub))
        own = state.get(f"{known.classifier}.weight", ())  # with its own classes, so that timm compares all names
        overlay = {"state_dict": state, "num_classes": len(own)}
        options = {"pretrained_cfg_overlay": overlay, "num_classes": len(own), **kwargs}
        net = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # safetensors, zip, pickle, hub: each reader has its own way to fail
        reason, folder = " ".join(str(error).split())[:160], f"models/{name}"
        raise EmonbError(
            f"setting teacher.networks ({name}): the weights {weights or 'of the hub'} cannot be used ({reason}); "
            f"fetch them with `hf download {known.hf_hub_id or 'timm/<name>'} model.safetensors --local-dir {folder}` "
            f"and write `weights: {folder}/model.safetensors` into the profile's YAML file. No network here: run the "
            "command on a machine that has one and copy the folder"
        ) from None
    net.reset_classifier(classes)
    return net


def load_network(folder: Path) -> tuple[nn.Module, NetworkSettings, list[str]]:
    """A trained network with its settings and class order, from the folder of its `teacher` result."""
    config = read_json(folder / "config.json")
    settings = NetworkSettings.model_validate(config["network"])
    untrained = settings.model_copy(update={"pretrained": False, "weights": None})
    net = build_network(classes=len(config["labels"]), **untrained.building)
    net.load_state_dict(load_file(folder / "model.safetensors"))
    return net.eval(), settings, config["labels"]


def _seen_drawn_scenes(classes: int, building: dict[str, Any]) -> nn.Module:
    """One of the networks shipped; each file fits one architecture and picture size, which stand in it."""
    file, fits = weights_of(DRAWN_SCENES, building["name"]), {}
    if file.is_file():
        with safe_open(file, "pt") as opened:
            fits = json.loads(opened.metadata()["building"])
    named = fits.pop("classes", 0)
    if building != fits:
        known = fits or "vit_tiny_patch16_224, resnet10t and vgg_small"
        what = f"weights {DRAWN_SCENES} are for {known}, not for {building}; take these or others"
        raise EmonbError(f"setting teacher.networks ({building['name']}): {what}")
    net = build_network(classes=named, **building)
    net.load_state_dict(load_file(file))
    net.reset_classifier(classes)
    return net


def weights_hash(name: str, weights: str | None) -> str | None:
    """What a result depends on beside the settings: a hash of the file whose weights a network starts from."""
    file = weights_of(weights, name) if weights else None
    return file_digest(file) if file and file.is_file() else None


class Pictures(Dataset):
    """(picture, label index) pairs; pictures [3, S, S] float, normalised as the pretrained weights expect.

    Of each the centre is taken, see `centre`; the twin that `augmented` makes is for training.

    Args:
        paths: of N pictures.
        targets: N class indices.
        image_size: S.
        colours: mean and deviation of the three channels; ours, without pretrained weights: 0.5 each.
        crop_scale: least and greatest share of a picture that a random crop keeps; torchvision's default.
    """

    def __init__(
        self,
        paths: Sequence[str],
        targets: Sequence[int],
        image_size: int = 384,
        colours: tuple[Sequence[float], Sequence[float]] = ((0.5,) * 3, (0.5,) * 3),
        crop_scale: tuple[float, float] = (0.08, 1.0),
    ):
        self.paths, self.targets = np.asarray(paths), np.asarray(targets, dtype=np.int64)
        self.seed, self.epoch, self.crop = 0, 0, centre(image_size)
        crop = v2.RandomResizedCrop(image_size, crop_scale, antialias=True)
        self.random_crop = v2.Compose([crop, v2.RandomHorizontalFlip()])
        self.mean, self.deviation = (255 * torch.tensor(c)[:, None, None] for c in colours)
        some = [width * height for width, height in sizes_of(self.paths, 32)]
        fit = 3 * sum(some) / max(1, len(some)) * len(self.paths) <= CACHE_BYTES
        self.cache: dict[int, Tensor] | None = {} if fit else None

    def augmented(self, seed: int) -> Pictures:
        """The same, each with a random resized crop of the original and a flip (authors' code).

        The crop belongs to `seed`, `epoch` (set it before each) and the picture's position.
        """
        twin = copy.copy(self)
        twin.crop, twin.seed = None, seed
        return twin

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture = None if self.cache is None else self.cache.get(i)
        if picture is None:
            picture = pil_to_tensor(open_picture(self.paths[i]))
            if self.cache is not None:
                self.cache[i] = picture
        if self.crop:
            picture = self.crop(picture)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(mixed_seed(self.seed, self.epoch, i))
                picture = self.random_crop(picture)
        # two plain operations: torchvision's ToDtype and Normalize take as long as the crop
        return picture.float().sub_(self.mean).div_(self.deviation), self.targets[i]

    @property
    def workers(self) -> int:
        """Loader processes: none where decoded pictures are kept."""
        return 0 if self.cache is not None else min(8, cores())


def centre(side: int) -> Callable[[Tensor], Tensor]:
    """What is looked at outside training: the short side resized to `side`, the centre cropped (authors' code)."""
    return v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(side)])


def network_input(pictures: Sequence[Image.Image], settings: NetworkSettings) -> Tensor:
    """[B, 3, S, S] of pictures as a network of these settings looks at them outside training."""
    mean, deviation = (
        255 * torch.tensor(c)[:, None, None] for c in colours_of(settings.name, settings.pretrained, settings.weights)
    )
    seen = torch.stack([centre(settings.image_size)(pil_to_tensor(picture)) for picture in pictures])
    return seen.float().sub_(mean).div_(deviation)


def colours_of(name: str, pretrained: bool, weights: str | None = None) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation that a network's pretrained weights expect; 0.5 without them and for drawn-scenes."""
    known = timm.get_pretrained_cfg(name) if pretrained and weights != DRAWN_SCENES else None
    return (known.mean, known.std) if known else ((0.5,) * 3, (0.5,) * 3)


def train_epoch(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer
) -> tuple[float, int]:
    """One pass over shuffled, augmented batches; returns the summed cross-entropy and the number of pictures."""
    net.train()
    total = seen = 0
    for images, targets in batches:  # [B, 3, S, S], [B]
        loss = nn.functional.cross_entropy(net(images.to(**LAYOUT)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(targets)
        seen += len(targets)
    return total, seen


def train_network(
    net: nn.Module,
    train: Pictures,
    val: Pictures,
    *,
    epochs: int = 10,
    lr: float = 3e-5,
    weight_decay: float = 1e-5,
    batch_size: int = 10,
    optimizer: str = "adam",
    seed: int = 0,
    checkpoint: Path | None = None,
    what: str = "network",
) -> list[dict[str, Any]]:
    """Train with Adam (authors' code, as the other defaults) or AdamW; keep the epoch with the best val accuracy.

    Several processes share each batch: accelerate gives each its part and averages the gradients.

    Args:
        train: `augmented` pictures.
        checkpoint: written after each epoch; a killed training goes on from there.

    Returns:
        Training curve: rows of epoch, split, metric, value. `net` holds the chosen epoch.
    """
    device, options = get_device(), DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(cpu=device.type == "cpu", dataloader_config=options)
    if batch_size % process_count():
        raise EmonbError(f"setting batch_size of {what} ({batch_size}): must be a multiple of --num_processes")
    if process_count() > 1 and device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    stepper = kind(net.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    classifier = [p for p in net.parameters() if p.ndim > 1][-1:]  # it alone starts at random where weights are known
    warn_if_short(nn.ParameterList(classifier), lr, epochs * math.ceil(len(train) / batch_size), "classifier")
    best, first = Best(net), 1
    if state := load_checkpoint(checkpoint, device):
        net.load_state_dict(state["net"])
        stepper.load_state_dict(state["optimizer"])
        best.rows, best.accuracy, best.weights, first = (state[k] for k in ("rows", "accuracy", "best", "next"))
    shared = accelerator.prepare_model(net)
    for epoch in progress(range(first, epochs + 1), what, unit="epoch"):
        train.epoch = epoch
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))
        alone = len(train) > 1 == len(train) % batch_size  # a last picture, of which no batch norm can learn
        batches = BatchSampler(order.tolist(), batch_size, drop_last=alone)
        loader = accelerator.prepare(DataLoader(train, batch_sampler=batches, num_workers=train.workers))
        sums = torch.tensor(train_epoch(shared, loader, stepper), device=device, dtype=torch.float64)
        total, seen = accelerator.reduce(sums).tolist()
        for buffer in net.buffers() if process_count() > 1 else ():
            torch.distributed.broadcast(buffer, 0)  # such as running means: every process gets the main one's
        logits = predict_network(net, val)  # every process looks at all of val: it is small
        hits = (logits.argmax(1) == torch.from_numpy(val.targets)).double().mean().item()
        best.keep(net, epoch, total / seen, 100 * hits)
        if checkpoint and is_main():
            state = {"net": net.state_dict(), "optimizer": stepper.state_dict(), "rows": best.rows, "next": epoch + 1}
            save_checkpoint(checkpoint, {**state, "accuracy": best.accuracy, "best": best.weights})
        wait_for_all()
    net.load_state_dict(best.weights)
    return best.rows


@torch.inference_mode()
def predict_network(
    net: nn.Module, pictures: Pictures, rows: Sequence[int] | None = None, batch_size: int = 128
) -> Tensor:
    """[N, C] float32 logits of unaugmented pictures on the CPU; `rows`: of these positions only."""
    net.eval()
    device = next(net.parameters()).device
    chosen = pictures if rows is None else Subset(pictures, rows)
    loader = DataLoader(chosen, batch_size, num_workers=pictures.workers)
    return torch.cat([net(images.to(device, **LAYOUT)).float().cpu() for images, _ in loader])
