"""Pre-training of the conventional networks: they learn to name what is visible in drawn scenes, as ImageNet's do.

The recipe, fixed in writing before any dataset was trained on:
- Scenes of a seed of their own; objects, background and camera at random, as the stand-in's pool: no emotion shows.
- The label belongs to the picture, not to places in it: which objects are there (softmax cross-entropy against equal
  shares of those present; Mahajan et al. 2018, section 2.2: better than a sigmoid for each, as in our short trial),
  and the background's hue, brightness, texture and light, and the picture's colourfulness (cross-entropy each).
- Stage A: windows of half a side with an object in them, a quarter of the cost each. In a trial of 110 s with whole
  pictures objects stayed at chance (recall .03), with windows they rose to .25. Stage B: whole pictures, cropped and
  flipped as in fine-tuning; an object counts as present while half of it is in the crop.
- AdamW; a constant learning rate after warm-up, falling to zero over the second half of stage B. Hence a training that
  was stopped can be resumed with fewer steps, and gives what those steps would have given from the start.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.transforms import v2

from emonb.errors import EmonbError
from emonb.files import atomic_write, read_json, resource_path, write_json
from emonb.settings import load_settings, project_root
from emonb.teacher import LAYOUT, build_network
from emonb.training import load_checkpoint, mixed_seed, save_checkpoint
from emonb.world import SIDE
from tools.pretrain.lessons import draw_pool, name_groups, to_pictures
from tools.pretrain.train import Log, shuffled

NETWORKS = resource_path("networks")
SEED, POOL, HELD_OUT = 7, 24_000, 1000  # scenes of the pool; fresh ones for the health
STEPS = {"vit": (2500, 4500), "resnet": (1500, 500), "vgg": (750, 700)}  # stage A, stage B
BATCH, LR, WARM, DECAYED = 64, 2e-3, 100, 0.01
OBJECTS, BACKGROUND = 2.0, 0.5  # weights of the losses
CROP = (0.6, 1.0)  # share of the picture, as the mini profile's `crop_scale`
GRID, INSIDE = 12, 0.5  # px between windows: the ViT's patch; share of an object that must be seen to be named


@dataclass
class Scenes:
    """Pictures (N, 3, 96, 96) uint8; up to 3 objects each: names (N, 3), -1: none, boxes (N, 3, 3): x, y, side."""

    pictures: Tensor
    objects: Tensor
    boxes: Tensor
    background: dict[str, Tensor]  # group of names -> (N,)


def visible_names() -> dict[str, list[str]]:
    """What a network names, per group, in the order of its outputs."""
    groups = name_groups()
    return {"object": groups.pop("glyph")[:-1], **groups}  # without "nothing"


def draw_scenes(size: int, seed: int, keep: Path | None = None) -> Scenes:
    """The stand-in's kind of pool under another seed, its labels turned into those of whole pictures.

    `keep`: a file that is read if it is there, else written: the networks share one pool.
    """
    if kept := load_checkpoint(keep, torch.device("cpu")):
        return Scenes(**kept)
    pool, names = draw_pool(size, seed), visible_names()["object"]
    objects, boxes = torch.full((size, 3), -1), torch.zeros(size, 3, 3, dtype=torch.long)
    for i, seen in enumerate(pool.seen):
        for k, (name, box) in enumerate(zip(seen.scene.objects, seen.scene.boxes, strict=True)):
            objects[i, k], boxes[i, k] = names.index(name), torch.tensor(box)
    scenes = Scenes(to_pictures(pool.patches), objects, boxes, pool.background)
    if keep:
        save_checkpoint(keep, vars(scenes))
    return scenes


def windows(scenes: Scenes, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of each picture a window (48 px) on the patch grid around one of its objects, and the objects seen (B, 92)."""
    objects, boxes, side = scenes.objects[rows], scenes.boxes[rows], SIDE // 2
    chosen = (torch.rand(len(rows)) * (objects >= 0).sum(1)).long()
    corner = boxes[torch.arange(len(rows)), chosen, :2]
    corner = ((corner + GRID // 2) // GRID * GRID).clamp(0, SIDE - side)
    places = zip(rows.tolist(), corner.tolist(), strict=True)
    seen = torch.stack([scenes.pictures[i, :, y : y + side, x : x + side] for i, (x, y) in places])
    return seen, _present(objects, boxes, corner[:, None], torch.tensor([side, side]))


def crops(scenes: Scenes, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One random crop for the whole batch, as in fine-tuning but for its being shared; and the objects seen."""
    top, left, high, wide = v2.RandomResizedCrop.get_params(scenes.pictures[:1], CROP, (3 / 4, 4 / 3))
    seen = scenes.pictures[rows][:, :, top : top + high, left : left + wide]
    corner, size = torch.tensor([left, top]), torch.tensor([wide, high])
    return seen, _present(scenes.objects[rows], scenes.boxes[rows], corner, size)


def _present(objects: Tensor, boxes: Tensor, corner: Tensor, size: Tensor) -> Tensor:
    low, high = torch.maximum(boxes[..., :2], corner), torch.minimum(boxes[..., :2] + boxes[..., 2:], corner + size)
    enough = (high - low).clamp(min=0).prod(-1) >= INSIDE * boxes[..., 2] ** 2
    count = len(visible_names()["object"])
    found = torch.zeros(len(objects), count + 1)  # the last column takes what is not there
    return found.scatter_(1, torch.where(enough & (objects >= 0), objects, count), 1.0)[:, :count]


def network_pixels(seen: Tensor, side: int) -> Tensor:
    """uint8 pictures (B, 3, H, W) as a network of `side` pixels takes them: colours of mean and deviation 0.5."""
    if seen.shape[-2:] != (side, side):
        seen = v2.functional.resize(seen, [side, side], antialias=True)
    return (seen.float() / 127.5 - 1).to(**LAYOUT)


def named(net: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Scores (B, names) per group."""
    groups = visible_names()
    return dict(zip(groups, net(pixels).split([len(names) for names in groups.values()], 1), strict=True))


def naming_loss(scores: dict[str, Tensor], present: Tensor, background: dict[str, Tensor]) -> Tensor:
    """Both kinds of cross-entropy; pictures whose crop shows no object count for their background alone."""
    shares = present / present.sum(1, keepdim=True).clamp(min=1)
    objects = F.cross_entropy(scores["object"], shares, reduction="sum") / (present.sum(1) > 0).sum().clamp(min=1)
    behind = sum(F.cross_entropy(scores[group], wanted) for group, wanted in background.items())
    return OBJECTS * objects + BACKGROUND * behind


@torch.inference_mode()
def network_health(net: nn.Module, scenes: Scenes, side: int) -> dict[str, float]:
    """Shares of fresh whole pictures: objects among as many best scored ones as are present, names per background."""
    net.eval()
    parts = [named(net, network_pixels(part, side)) for part in scenes.pictures.split(250)]
    scores = {group: torch.cat([part[group] for part in parts]) for group in parts[0]}
    whole = torch.tensor([0, 0]), torch.tensor([SIDE, SIDE])
    present = _present(scenes.objects, scenes.boxes, *whole) > 0
    rank = scores["object"].argsort(1, descending=True).argsort(1)
    found = {"object": ((rank < present.sum(1, keepdim=True)) & present).sum() / present.sum()}
    found |= {group: (scores[group].argmax(1) == is_so).float().mean() for group, is_so in scenes.background.items()}
    return {group: round(float(share), 3) for group, share in found.items()}


def architecture(name: str) -> dict:
    """Arguments of `build_network` of the mini profile's network `vit`, `resnet` or `vgg`."""
    building = load_settings("mini").teacher.networks[name].building
    return {key: value for key, value in building.items() if key not in ("pretrained", "weights")}


def plan(step: int, steps_a: int, steps_b: int) -> tuple[bool, float]:
    """Whether a step is one of stage A, and its learning rate."""
    left = (steps_a + steps_b - step) / max(1, steps_b / 2)
    return step < steps_a, LR * min((step + 1) / WARM, left, 1)


def rebuild_network(
    name: str,
    folder: Path = NETWORKS,
    *,
    seed: int = SEED,
    pool: int = POOL,
    steps_a: int | None = None,
    steps_b: int | None = None,
    log: Log = print,
) -> Path:
    """Make the weights of `vit`, `resnet` or `vgg` again; writes them, provenance and model card to `folder`.

    A training that was stopped goes on from its checkpoint in `build/pretrain`, which `EmonbError` names if it was
    made on another way than `steps_a` steps on windows and `steps_b` on whole pictures (None: as shipped) would take.
    """
    steps_a, steps_b = STEPS[name][0] if steps_a is None else steps_a, STEPS[name][1] if steps_b is None else steps_b
    began, total, first, earlier = time.monotonic(), steps_a + steps_b, 0, 0.0
    checkpoint = project_root() / "build" / "pretrain" / f"{name}-{seed}-{pool}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    building, outputs = architecture(name), sum(map(len, visible_names().values()))
    side, any_size = building["image_size"], {"dynamic_img_size": True} if name == "vit" else {}
    net = build_network(classes=outputs, **building, **any_size).to(**LAYOUT)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=DECAYED, betas=(0.9, 0.98), fused=True)
    if state := load_checkpoint(checkpoint, torch.device("cpu")):
        first, earlier = state["next"], state["seconds"]
        if any(plan(step, *state["steps"]) != plan(step, steps_a, steps_b) for step in range(first)):
            raise EmonbError(f"{checkpoint}: its {first} steps are not the first of these; delete it or take others")
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
    scenes = draw_scenes(pool, seed, checkpoint.with_name(f"pool-{seed}-{pool}.pt"))
    fresh = draw_scenes(HELD_OUT, seed + 1)
    batches = shuffled(pool, min(BATCH, pool), np.random.default_rng(seed))
    for step in range(total):
        rows = next(batches)
        if step < first:
            continue
        torch.manual_seed(mixed_seed(seed, step))
        in_a, lr = plan(step, steps_a, steps_b)
        for group in optimizer.param_groups:
            group["lr"] = lr
        seen, present = (windows if in_a else crops)(scenes, rows)
        seen = seen.flip(-1) if torch.rand(()) < 0.5 else seen
        scores = named(net.train(), network_pixels(seen, side // 2 if in_a else side))
        loss = naming_loss(scores, present, {group: wanted[rows] for group, wanted in scenes.background.items()})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 249 or step == total - 1:
            health, seconds = network_health(net, fresh, side), earlier + time.monotonic() - began
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "next": step + 1}
            save_checkpoint(checkpoint, {**state, "steps": [steps_a, steps_b], "seconds": seconds})
            log(f"{name} {step + 1}/{total} loss {loss.item():.3f} {health} {seconds:.0f} s")
    made = {"seed": seed, "pool": pool, "steps_a": steps_a, "steps_b": steps_b, "seconds": round(seconds)}
    file = write_network(folder, name, net, building, {**made, "health": health})
    checkpoint.unlink()
    return file


def write_network(folder: Path, name: str, net: nn.Module, building: dict, made: dict) -> Path:
    """Weights in float16 with their architecture, and provenance and card of all networks in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in net.state_dict().items()}
    fits = {**building, "classes": sum(map(len, visible_names().values()))}  # what build_network needs to take them
    atomic_write(folder / f"{name}.safetensors", save(half, {"building": json.dumps(fits)}))
    versions = {package: metadata.version(package) for package in ("torch", "timm", "numpy", "pillow", "matplotlib")}
    made |= {"parameters": sum(p.numel() for p in net.parameters()), "architecture": building["name"]}
    file = folder / "provenance.json"
    told = {**(read_json(file) if file.is_file() else {}), name: {**made, "versions": versions, "lessons": digest()}}
    write_json(file, dict(sorted(told.items())))
    atomic_write(folder / "README.md", network_card(told))
    return folder / f"{name}.safetensors"


def digest() -> str:
    """A hash of the names and of the first scenes' labels: as `lessons_digest`, for what these networks learn."""
    scenes = draw_scenes(64, SEED)
    told = [scenes.objects.tolist(), scenes.boxes.tolist(), {k: v.tolist() for k, v in scenes.background.items()}]
    return hashlib.sha256(json.dumps([visible_names(), told]).encode()).hexdigest()[:16]


def network_card(told: dict[str, dict]) -> str:
    """The model card of the networks with this provenance; the last column is chance."""
    keys = ("architecture", "parameters", "seed", "pool", "steps_a", "steps_b", "seconds")
    rows = [[key, *(str(made[key]) for made in told.values()), ""] for key in keys]
    for group, names in visible_names().items():
        rows.append(
            [
                group,
                *(f"{made['health'][group]:.3f}" for made in told.values()),
                f"{(2.5 if group == 'object' else 1) / len(names):.3f}",
            ]
        )
    head = [["what", *told, "chance"], ["---"] * (len(told) + 2)]
    return CARD.format(table="\n".join(f"| {' | '.join(row)} |" for row in head + rows))


CARD = """# Networks that have seen the drawn world

A small ViT, ResNet and VGG (float16 on disk, float32 when loaded) for emonb's drawn datasets: what ImageNet's weights
are to the paper's networks. They learnt to name what is visible in drawn scenes: which objects are there, hue,
brightness, texture and light of the background, and how colourful the picture is. They were never shown or told the
emotion of a scene; objects and backgrounds were paired at random. They know nothing of photographs.

Made by `python -m tools.pretrain vit` (`resnet`, `vgg`) on one core that other work shared: stage A on windows of
half a side, stage B on whole pictures (`seconds` includes drawing the pool). The classifier that names is in each
file; fine-tuning replaces it.

{table}

The last rows were measured on 1,000 fresh drawings: `object` is the share of the objects present that are among the
best scored ones, as many as are present; the others are shares of pictures whose background is named right.
`provenance.json` has the same numbers and the library versions.

Licence: MIT, as emonb. The glyphs are drawn from DejaVu Sans, which matplotlib ships.
"""
