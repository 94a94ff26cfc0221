"""Room 04: pictures as tensors, and the training loop of the conventional networks, on one device or several.

Which crop and flip a picture gets follows from seed, epoch and picture alone, so that a result does not depend
on how many processes or loader workers share the work, nor on a kill in between.
"""

from __future__ import annotations

import copy
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

from emonb.parallel import cores, group, is_main, process_count, process_index, total, wait
from emonb.progress import progress
from emonb.samples import open_picture
from emonb.settings import NetworkSettings

__all__ = ["LAYOUT", "Pictures", "predict_network", "train_network"]

LAYOUT = {"memory_format": torch.channels_last}  # a sixth to a quarter faster for the convolutions on 2 CPU cores
CACHE_BYTES = 512 * 2**20  # decoded pictures are kept only while they fit here; larger sets are streamed


class Pictures(Dataset):
    """(image, label index) pairs; images (3, S, S) float, normalised as the pretrained weights expect.

    Without pretrained weights, and for timm's ViT, that is mean 0.5 and deviation 0.5.
    They are resized whole; the twin that `augmented` makes is for training.
    """

    def __init__(self, frame: pd.DataFrame, labels: Sequence[str], settings: NetworkSettings):
        self.paths = frame["path"].array
        self.targets = np.array([labels.index(x) for x in frame["label"]], dtype=np.int64)
        self.crops, self.seed, self.epoch = False, 0, 0
        side = settings.image_size
        self.side = side
        resize, flip = v2.RandomResizedCrop(side, settings.crop_scale, antialias=True), v2.RandomHorizontalFlip()
        self.transform = v2.Compose([resize, flip])
        known = timm.get_pretrained_cfg(settings.name) if settings.pretrained else None
        colours = (known.mean, known.std) if known else ([0.5] * 3, [0.5] * 3)
        self.mean, self.deviation = (255 * torch.tensor(c)[:, None, None] for c in colours)
        self.cache: dict[int, Tensor] | None = {} if len(frame) * 3 * side**2 <= CACHE_BYTES else None

    def augmented(self, seed: int) -> Pictures:
        """The same pictures with a random resized crop and flip (authors' code); decoded ones are kept for both.

        The crop belongs to `seed`, `epoch` (set it before each) and the picture's position.
        """
        twin = copy.copy(self)
        twin.crops, twin.seed = True, seed
        return twin

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture = self._decode(i) if self.cache is None else self.cache.get(i)
        if picture is None:
            picture = self.cache[i] = self._decode(i)
        if self.crops:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(_mixed(self.seed, self.epoch, i))
                picture = self.transform(picture)
        # two plain operations: torchvision's ToDtype and Normalize take as long as the crop
        return picture.float().sub_(self.mean).div_(self.deviation), self.targets[i]

    def _decode(self, i: int) -> Tensor:
        picture = open_picture(self.paths[i])
        if picture.size != (self.side, self.side):
            picture = picture.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers, in the 32 bits that torch's CPU generator makes use of."""
    return zlib.crc32(repr(numbers).encode())


def _workers(pictures: Pictures) -> int:
    return 0 if pictures.cache is not None else min(8, cores())


def train_network(
    net: nn.Module,
    train: Pictures,
    val: Pictures,
    settings: NetworkSettings,
    *,
    seed: int,
    what: str,
    parts: Path | None = None,
) -> list[dict[str, Any]]:
    """Train with Adam (authors' code) or AdamW and keep the epoch with the best val accuracy.

    Several processes share each batch; a batch gives the same gradient however many they are (for networks
    without batch normalisation; with it, statistics are the whole batch's on GPUs, each process's on CPUs).

    Args:
        parts: where a checkpoint is kept after each epoch, from which a killed training goes on.

    Returns:
        Training curve: rows of epoch, split, metric, value. `net` holds the chosen epoch.
    """
    device = next(net.parameters()).device
    shared = _share(net, device)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    optimizer = kind(net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    state: dict[str, Any] = {"epoch": 0, "rows": [], "accuracy": -1.0, "best": None}
    checkpoint = parts / "checkpoint.pt" if parts else None
    if checkpoint and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        net.load_state_dict(state.pop("net"))
        optimizer.load_state_dict(state.pop("optimizer"))
    epochs = range(state["epoch"] + 1, settings.epochs + 1)
    for epoch in progress(epochs, what, unit="epoch"):
        net.train()
        train.epoch, summed = epoch, 0.0
        for images, targets, size in _batches(train, settings.batch_size, seed, epoch):
            logits = shared(images.to(device, **LAYOUT))
            loss = nn.functional.cross_entropy(logits, targets.to(device), reduction="sum") / size
            optimizer.zero_grad()
            (loss * process_count()).backward()  # the processes' gradients are averaged
            optimizer.step()
            summed += loss.item() * size
        _same_buffers(net)
        mine = range(process_index(), len(val), process_count())
        hits = (predict_network(net, val, rows=mine).argmax(1) == val.targets[list(mine)]).sum()
        accuracy = 100 * total(float(hits)) / len(val)
        loss_row = {"epoch": epoch, "split": "train", "metric": "loss", "value": total(summed) / len(train)}
        state["rows"] += [loss_row, {"epoch": epoch, "split": "val", "metric": "accuracy", "value": accuracy}]
        if accuracy > state["accuracy"]:
            state |= {"accuracy": accuracy, "best": copy.deepcopy(net.state_dict())}
        state["epoch"] = epoch
        if checkpoint and is_main():
            partial = checkpoint.with_suffix(".partial")
            torch.save({**state, "net": net.state_dict(), "optimizer": optimizer.state_dict()}, partial)
            os.replace(partial, checkpoint)
        wait()
    net.load_state_dict(state["best"])
    return state["rows"]


def _share(net: nn.Module, device: torch.device) -> nn.Module:
    """The network whose gradients are averaged over all processes."""
    if process_count() == 1:
        return net
    group()
    if device.type != "cuda":
        return DistributedDataParallel(net)
    return DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(net), device_ids=[device.index])


def _same_buffers(net: nn.Module) -> None:
    """Give every process the main one's buffers, such as running means."""
    if process_count() > 1:
        for buffer in net.buffers():
            torch.distributed.broadcast(buffer, 0)


def _batches(train: Pictures, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """This process's share of each shuffled batch, and the size of the whole batch."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(_mixed(seed, epoch)))
    whole = [batch.tolist() for batch in order.split(size)]
    mine = [batch[process_index() :: process_count()] for batch in whole]
    loaded = [share or batch[:1] for share, batch in zip(mine, whole, strict=True)]  # no process may stand aside
    loader = DataLoader(train, batch_sampler=loaded, num_workers=_workers(train))
    for (images, targets), share, batch in zip(loader, mine, whole, strict=True):
        ignored = torch.full_like(targets, -100)  # torch's cross-entropy leaves these targets out
        yield images, targets if share else ignored, len(batch)


@torch.inference_mode()
def predict_network(
    net: nn.Module, pictures: Pictures, batch_size: int = 128, rows: Sequence[int] | None = None
) -> np.ndarray:
    """(N, C) float32 logits of unaugmented pictures; `rows`: of these positions only."""
    net.eval()
    device = next(net.parameters()).device
    chosen = pictures if rows is None else Subset(pictures, rows)
    loader = DataLoader(chosen, batch_size, num_workers=_workers(pictures))
    found = [net(images.to(device, **LAYOUT)).float().cpu().numpy() for images, _ in loader]
    return np.concatenate(found) if found else np.empty((0, 1), np.float32)  # more processes than pictures
