"""Pretrained weights of the conventional networks: where they are, and that they fit (paper: ViT from ImageNet)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from timm.models import load_state_dict
from torch import nn

from emonb.errors import EmonbError
from emonb.hub import hub_offline, in_short, missing_weights
from emonb.settings import NetworkSettings, project_root

__all__ = ["check_name", "load_pretrained", "weights_file"]

FILE = "model.safetensors"  # in each of timm's repositories on the hub


def check_name(name: str) -> None:
    """Refuse a name that timm does not know, with or without a tag of pretrained weights.

    Raises:
        EmonbError: no such model.
    """
    known = timm.is_model(name)
    if known:
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError:  # a tag behind the dot that is not there
            known = False
    if not known:
        raise EmonbError(f"setting teacher.networks: timm has no model {name!r}")


def weights_file(settings: NetworkSettings) -> Path:
    """The file of a network's pretrained weights: `weights`, or timm's own, fetched from the hub if need be.

    Raises:
        EmonbError: no such file, with the command that fetches it; timm has no weights of this network.
    """
    config = timm.get_pretrained_cfg(settings.name)
    if config is None:
        raise EmonbError(
            f"setting teacher.networks: {settings.name!r} cannot take pretrained weights; set `pretrained: false`"
        )
    hub = config.hf_hub_id
    if settings.weights:
        file = project_root() / Path(settings.weights).expanduser()
        if file.is_file():
            return file
        raise _missing(settings, hub, f"there is no file {settings.weights!r}")
    if not hub:
        raise EmonbError(
            f"setting teacher.networks: timm has no pretrained weights of {settings.name!r} on the hub; "
            "set `pretrained: false`, or `weights:` to a local file"
        )
    try:
        return Path(hf_hub_download(hub, FILE, local_files_only=hub_offline()))
    except OSError as error:
        reason = "the hub cannot be reached" if hub_offline() else in_short(error)
        raise _missing(settings, hub, f"the pretrained weights of {settings.name!r} are not here ({reason})") from None


def load_pretrained(net: nn.Module, file: Path, settings: NetworkSettings, options: dict[str, Any]) -> None:
    """Fill a fresh network with pretrained weights, all but its classifier, which stays as it was drawn.

    Args:
        net: built by timm with `options` and a classifier of any size.
        file: a state dict in timm's naming, of any number of classes.
        settings: the network's name.
        options: as for `timm.create_model`; timm resizes the position embedding to another `img_size`.

    Raises:
        EmonbError: the file is damaged or is of another architecture.
    """
    classifier = net.pretrained_cfg["classifier"]
    hub = timm.get_pretrained_cfg(settings.name).hf_hub_id
    name = settings.weights or file.name
    try:
        state = load_state_dict(str(file))
    except Exception as error:  # safetensors, zip, pickle: each reader has its own way to fail on a damaged file
        raise _missing(settings, hub, f"cannot read the weights in {name} ({in_short(error)})") from None
    overlay: dict[str, Any] = {"state_dict": state}
    if f"{classifier}.weight" in state:  # the file's own number of classes: so that timm compares all names
        overlay["num_classes"] = len(state[f"{classifier}.weight"])
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn afterwards does not depend on the file
            donor = timm.create_model(settings.name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except RuntimeError as error:
        raise _missing(settings, hub, f"{name} does not fit {settings.name!r} ({in_short(error)})") from None
    taken = {k: v for k, v in donor.state_dict().items() if not k.startswith(f"{classifier}.")}
    net.load_state_dict(taken, strict=False)


def _missing(settings: NetworkSettings, hub: str | None, problem: str) -> EmonbError:
    folder = f"models/{settings.name}"
    fetch = f"{hub or 'timm/<name>'} {FILE} --local-dir {folder}"
    value = f"weights: {folder}/{FILE}"
    return missing_weights(f"teacher.networks ({settings.name})", problem, fetch, value)
