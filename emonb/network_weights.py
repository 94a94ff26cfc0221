"""Pretrained weights of the conventional networks: where they are, and that they fit (paper: ViT from ImageNet)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import nn

from emonb.errors import EmonbError
from emonb.hub import hub_offline, in_short, missing_weights
from emonb.settings import NetworkSettings, project_root

__all__ = ["load_pretrained", "weights_file"]

FILE = "model.safetensors"  # in each of timm's repositories on the hub


def weights_file(settings: NetworkSettings) -> Path:
    """The file of a network's pretrained weights: `weights`, or timm's own, fetched from the hub if need be.

    Raises:
        EmonbError: no such file, with the command that fetches it.
    """
    config = timm.get_pretrained_cfg(settings.name, allow_unregistered=True)
    hub = config.hf_hub_id if config else None
    if settings.weights:
        file = project_root() / Path(settings.weights).expanduser()
        if file.is_file():
            return file
        raise _missing(settings, hub, f"there is no file {settings.weights!r}")
    if not hub:
        raise EmonbError(
            f"setting teacher.networks: timm has no pretrained weights of {settings.name!r}; "
            "set `pretrained: false`, or `weights:` to a local file"
        )
    try:
        return Path(hf_hub_download(hub, FILE, local_files_only=hub_offline()))
    except OSError as error:
        reason = "the hub cannot be reached" if hub_offline() else in_short(error)
        raise _missing(settings, hub, f"the pretrained weights of {settings.name!r} are not here ({reason})") from None


def load_pretrained(net: nn.Module, settings: NetworkSettings, options: dict[str, Any]) -> None:
    """Fill a fresh network with pretrained weights, all but its classifier, which stays as it was drawn.

    Args:
        net: built by timm with `options` and a classifier of any size.
        settings: the network's name and where its weights are.
        options: as for `timm.create_model`; timm resizes the position embedding to another `img_size`.

    Raises:
        EmonbError: the file is damaged or is of another architecture.
    """
    file = weights_file(settings)
    classifier = net.pretrained_cfg["classifier"]
    try:
        state = load_state_dict(str(file))
        overlay: dict[str, Any] = {"state_dict": state}
        if f"{classifier}.weight" in state:  # the file's own number of classes: so that timm compares all names
            overlay["num_classes"] = len(state[f"{classifier}.weight"])
        with torch.random.fork_rng(devices=[]):  # what is drawn afterwards does not depend on the file
            donor = timm.create_model(settings.name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        problem = f"{settings.weights or file.name} does not fit {settings.name!r} or is damaged ({in_short(error)})"
        raise _missing(settings, timm.get_pretrained_cfg(settings.name).hf_hub_id, problem) from None
    taken = {k: v for k, v in donor.state_dict().items() if not k.startswith(f"{classifier}.")}
    net.load_state_dict(taken, strict=False)


def _missing(settings: NetworkSettings, hub: str | None, problem: str) -> EmonbError:
    folder = f"models/{settings.name}"
    fetch = f"{hub or 'timm/<name>'} {FILE} --local-dir {folder}"
    value = f"weights: {folder}/{FILE}"
    return missing_weights(f"teacher.networks ({settings.name})", problem, fetch, value)
