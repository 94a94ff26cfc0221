"""Pre-training of the conventional networks: they learn to name what is visible in drawn scenes, as ImageNet's do.

The recipe, fixed in writing before any dataset was trained on:
- Scenes of a seed of their own; objects, background and camera at random, as in the stand-in's pool: no emotion shows.
- Labels belong to the picture, not to places in it: the objects (softmax cross-entropy against equal shares, as
  Mahajan et al. 2018, section 2.2); hue, brightness, texture, light of the background; colourfulness (cross-entropy).
- Stage A: windows of half a side around an object, a quarter of the cost. In trials of 110 s objects stayed at chance
  with whole pictures (recall .03) and rose to .25 with windows. Stage B: whole pictures, cropped and flipped as in
  fine-tuning; an object counts as present while half of it is in the crop.
- AdamW; a constant learning rate after warm-up, falling to zero over the second half of stage B.
"""

from __future__ import annotations

import hashlib
import json
import time
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
from tools.pretrain.checkpoint import PATCH
from tools.pretrain.lessons import Pool, draw_pool, name_groups, overlap, to_pictures
from tools.pretrain.train import Log, shuffled

NETWORKS = resource_path("networks")
SEED, POOL, HELD_OUT = 7, 24_000, 1000  # scenes of the pool; fresh ones for the health
STEPS = {"vit": (3000, 1000), "resnet": (1500, 500), "vgg": (1500, 500)}  # stage A, stage B
BATCH, LR, WARM, DECAYED = 64, 2e-3, 100, 0.01
EVERY = 250  # steps between checkpoints
OBJECTS, BACKGROUND = 2.0, 0.5  # weights of the losses
CROP, INSIDE = (0.6, 1.0), 0.5  # the mini profile's `crop_scale`; share of an object that must be seen to be named


def visible_names() -> dict[str, list[str]]:
    """What a network names, per group, in the order of its outputs."""
    groups = name_groups()
    return {"object": groups.pop("glyph")[:-1], **groups}  # without "nothing"


def present(pool: Pool, rows: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 92) 1 for the objects seen in windows of pictures: `corners` (B or 1, 2) x, y and `size` in pixels."""
    names, found = visible_names()["object"], torch.zeros(len(rows), len(visible_names()["object"]))
    for i, (row, corner) in enumerate(zip(rows.tolist(), corners.expand(len(rows), 2).tolist(), strict=True)):
        scene = pool.seen[row].scene
        for name, box in zip(scene.objects, scene.boxes, strict=True):
            found[i, names.index(name)] = overlap(box, (*corner, *size)) >= INSIDE * box[2] ** 2
    return found


def windows(pool: Pool, pictures: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of each picture a window (48 px) on the patch grid around one of its objects, and the objects seen."""
    side, boxes = SIDE // 2, [pool.seen[row].scene.boxes for row in rows.tolist()]
    chosen = [boxes[i][int(x * len(boxes[i]))][:2] for i, x in enumerate(torch.rand(len(rows)).tolist())]
    corners = ((torch.tensor(chosen) + PATCH // 2) // PATCH * PATCH).clamp(0, SIDE - side)
    places = zip(pictures[rows], corners.tolist(), strict=True)
    seen = torch.stack([picture[:, y : y + side, x : x + side] for picture, (x, y) in places])
    return seen, present(pool, rows, corners, (side, side))


def crops(pool: Pool, pictures: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One random crop for the whole batch, as in fine-tuning but for its being shared; and the objects seen."""
    top, left, high, wide = v2.RandomResizedCrop.get_params(pictures[:1], CROP, (3 / 4, 4 / 3))
    seen = pictures[rows][:, :, top : top + high, left : left + wide]
    return seen, present(pool, rows, torch.tensor([[left, top]]), (wide, high))


def named(net: nn.Module, seen: Tensor, side: int) -> dict[str, Tensor]:
    """Scores (B, names) per group of uint8 pictures, resized to `side`; colours of mean and deviation 0.5."""
    pixels = v2.functional.resize(seen, [side, side], antialias=True).float() / 127.5 - 1
    groups = visible_names()
    scores = net(pixels.to(**LAYOUT)).split([len(names) for names in groups.values()], 1)
    return dict(zip(groups, scores, strict=True))


def naming_loss(scores: dict[str, Tensor], there: Tensor, background: dict[str, Tensor]) -> Tensor:
    """Both kinds of cross-entropy; pictures whose crop shows no object count for their background alone."""
    shares = there / there.sum(1, keepdim=True).clamp(min=1)
    objects = F.cross_entropy(scores["object"], shares, reduction="sum") / (there.sum(1) > 0).sum().clamp(min=1)
    behind = sum(F.cross_entropy(scores[group], wanted) for group, wanted in background.items())
    return OBJECTS * objects + BACKGROUND * behind


@torch.inference_mode()
def network_health(net: nn.Module, pool: Pool, side: int) -> dict[str, float]:
    """Shares of fresh whole pictures: objects among as many best scored ones as are present, names per background."""
    parts = [named(net.eval(), part, side) for part in to_pictures(pool.patches).split(250)]
    scores = {group: torch.cat([part[group] for part in parts]) for group in parts[0]}
    there = present(pool, torch.arange(len(pool)), torch.zeros(1, 2, dtype=torch.long), (SIDE, SIDE)) > 0
    rank = scores["object"].argsort(1, descending=True).argsort(1)
    found = {"object": ((rank < there.sum(1, keepdim=True)) & there).sum() / there.sum()}
    found |= {group: (scores[group].argmax(1) == is_so).float().mean() for group, is_so in pool.background.items()}
    return {group: round(float(share), 3) for group, share in found.items()}


def architecture(name: str) -> dict:
    """Arguments of `build_network` of the mini profile's `vit`, `resnet` or `vgg`, with a class for every name."""
    building = load_settings("mini").teacher.networks[name].building
    building = {key: value for key, value in building.items() if key not in ("pretrained", "weights")}
    return {**building, "classes": sum(map(len, visible_names().values()))}


def plan(step: int, steps_a: int, steps_b: int) -> tuple[bool, float]:
    """Whether a step is one of stage A, and its learning rate."""
    left = (steps_a + steps_b - step) / max(1, steps_b / 2)
    return step < steps_a, LR * min((step + 1) / WARM, left, 1)


def rebuild_network(
    name: str, folder: Path = NETWORKS, *, seed: int = SEED, pool: int = POOL, log: Log = print, **steps: int
) -> Path:
    """Make the weights of `vit`, `resnet` or `vgg` again; writes them, provenance and model card to `folder`.

    A training that was stopped goes on from its checkpoint in `build/pretrain`, which `EmonbError` names if it was
    made on another way than `steps_a` steps on windows and `steps_b` on whole pictures (else: as shipped) would take.
    """
    steps_a, steps_b = steps.get("steps_a", STEPS[name][0]), steps.get("steps_b", STEPS[name][1])
    began, total, first, earlier = time.monotonic(), steps_a + steps_b, 0, 0.0
    checkpoint = project_root() / "build" / "pretrain" / f"{name}-{seed}-{pool}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    building, any_size = architecture(name), {"dynamic_img_size": True} if name == "vit" else {}
    net, side = build_network(**building, **any_size).to(**LAYOUT), building["image_size"]
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=DECAYED, betas=(0.9, 0.98), fused=True)
    if state := load_checkpoint(checkpoint, torch.device("cpu")):
        first, earlier = state["next"], state["seconds"]
        if any(plan(step, *state["steps"]) != plan(step, steps_a, steps_b) for step in range(first)):
            raise EmonbError(f"{checkpoint}: its {first} steps are not the first of these; delete it or take others")
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
    scenes, fresh = draw_pool(pool, seed), draw_pool(HELD_OUT, seed + 1)
    pictures = to_pictures(scenes.patches)
    batches = shuffled(pool, min(BATCH, pool), np.random.default_rng(seed))
    for step in range(total):
        rows = next(batches)
        if step < first:
            continue
        torch.manual_seed(mixed_seed(seed, step))
        in_a, optimizer.param_groups[0]["lr"] = plan(step, steps_a, steps_b)
        seen, there = (windows if in_a else crops)(scenes, pictures, rows)
        seen = seen.flip(-1) if torch.rand(()) < 0.5 else seen
        scores = named(net.train(), seen, side // 2 if in_a else side)
        loss = naming_loss(scores, there, {group: wanted[rows] for group, wanted in scenes.background.items()})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % EVERY == EVERY - 1:
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "steps": [steps_a, steps_b]}
            save_checkpoint(checkpoint, {**state, "next": step + 1, "seconds": earlier + time.monotonic() - began})
            log(f"{name} {step + 1}/{total} loss {loss.item():.3f} {network_health(net, fresh, side)}")
    made = {"seed": seed, "pool": pool, "steps_a": steps_a, "steps_b": steps_b}
    made |= {"seconds": round(earlier + time.monotonic() - began), "health": network_health(net, fresh, side)}
    file = write_network(folder, name, net, made)
    checkpoint.unlink(missing_ok=True)
    return file


def write_network(folder: Path, name: str, net: nn.Module, made: dict) -> Path:
    """Weights in float16 with their architecture, and provenance and card of all networks in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in net.state_dict().items()}
    atomic_write(folder / f"{name}.safetensors", save(half, {"building": json.dumps(architecture(name))}))
    versions = {package: metadata.version(package) for package in ("torch", "timm", "numpy", "pillow", "matplotlib")}
    made |= {"parameters": sum(p.numel() for p in net.parameters()), "architecture": architecture(name)["name"]}
    file = folder / "provenance.json"
    told = {**(read_json(file) if file.is_file() else {}), name: {**made, "versions": versions, "lessons": digest()}}
    write_json(file, told)
    atomic_write(folder / "README.md", network_card(told))
    return folder / f"{name}.safetensors"


def digest() -> str:
    """A hash of the names and of the first scenes' labels: as `lessons_digest`, for what these networks learn."""
    pool = draw_pool(64, SEED)
    told = [(s.scene.objects, s.scene.boxes) for s in pool.seen], [v.tolist() for v in pool.background.values()]
    return hashlib.sha256(json.dumps([visible_names(), told]).encode()).hexdigest()[:16]


def network_card(told: dict[str, dict]) -> str:
    """The model card of the networks with this provenance; the last column is chance."""
    rows = [["what", *told, "chance"], ["---"] * (len(told) + 2)]
    for key in ("architecture", "parameters", "seed", "pool", "steps_a", "steps_b", "seconds"):
        rows.append([key, *(str(made[key]) for made in told.values()), ""])
    for group, names in visible_names().items():
        chance = (2.5 if group == "object" else 1) / len(names)  # two or three objects
        rows.append([group, *(f"{made['health'][group]:.3f}" for made in told.values()), f"{chance:.3f}"])
    return CARD.format(table="\n".join(f"| {' | '.join(row)} |" for row in rows))


CARD = """# Networks that have seen the drawn world

A small ViT, ResNet and VGG (float16 on disk, float32 when loaded) for emonb's drawn datasets: what ImageNet's weights
are to the paper's networks. They learnt to name what is visible in drawn scenes: objects, the background's hue,
brightness, texture and light, colourfulness. They were never shown or told the emotion of a scene; objects and
backgrounds were paired at random. They know nothing of photographs.

Made by `python -m tools.pretrain vit` (`resnet`, `vgg`) on one core that other work shared: stage A on windows of
half a side, stage B on whole pictures. Fine-tuning replaces the classifier that names.

{table}

Below `seconds`, shares of 1,000 fresh drawings: `object` is how many of the objects present are among the best scored
ones, as many as are present; the others are pictures whose background is named right. `provenance.json` has the same
numbers and the library versions.

Licence: MIT, as emonb. The glyphs are drawn from DejaVu Sans, which matplotlib ships.
"""
