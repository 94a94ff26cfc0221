"""The pool of drawn scenes on which the stand-in base is pre-trained, with what each visual token should name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from emonb.dialogues import Described
from emonb.progress import progress
from emonb.scenes import SIDE, Background, Camera, Scene, draw_scene, glyph_names, lexicon, measured_words
from emonb.standin import MERGE, PATCH, resource

__all__ = ["CELLS", "Pool", "draw_pool", "name_groups", "random_scene", "to_patches"]

CELLS, CELL = (SIDE // (PATCH * MERGE)) ** 2, PATCH * MERGE  # 16 merged tokens of 24 px
TOLD = 0.3  # share of a cell that a sticker must cover for the cell to be named after it


@dataclass
class Pool:
    """Drawn scenes: patches (N, 64, 432) uint8 in merge order, descriptions, targets (N, ...) per name group."""

    patches: Tensor
    seen: list[Described]
    glyphs: Tensor  # (N, 16) index into the group "glyph"; the last is "nothing"
    background: dict[str, Tensor]  # group -> (N,)

    def __len__(self) -> int:
        return len(self.seen)


def name_groups() -> dict[str, list[str]]:
    """The names among which a visual token chooses, per group."""
    world, prompts = lexicon(), resource("prompts.yaml")
    return {
        "glyph": [*glyph_names(), "nothing"],
        "hue": list(world["hues"]),
        "brightness": [word for _, word in prompts["brightness"]],
        "texture": list(world["textures"]),
        "light": list(world["lights"]),
        "colourfulness": [word for _, word in prompts["colorfulness"]],
    }


def to_patches(pictures: np.ndarray) -> Tensor:
    """(N, 96, 96, 3) uint8 to (N, 64, 432): 12 px patches in Qwen2-VL's order (2 x 2 blocks, channel first)."""
    n, k = len(pictures), SIDE // CELL
    x = torch.from_numpy(pictures).view(n, k, MERGE, PATCH, k, MERGE, PATCH, 3)
    return x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(n, k * k * MERGE * MERGE, 3 * PATCH * PATCH).contiguous()


def cell_glyphs(scene: Scene, index: dict[str, int]) -> list[int]:
    """For each of the 16 cells the glyph that covers most of it, "nothing" below `TOLD`."""
    best, out = [TOLD] * CELLS, [index["nothing"]] * CELLS
    for name, (x, y, side) in zip(scene.objects, scene.boxes, strict=True):
        for cell in range(CELLS):
            top, left = CELL * (cell // 4), CELL * (cell % 4)
            wide = min(x + side, left + CELL) - max(x, left)
            high = min(y + side, top + CELL) - max(y, top)
            share = max(wide, 0) * max(high, 0) / CELL**2
            if share > best[cell]:
                best[cell], out[cell] = share, index[name]
    return out


def random_scene(rng: np.random.Generator) -> tuple[np.ndarray, Scene]:
    """Objects, background and camera each at random: nothing in the pool hints at an emotion."""
    world, names = lexicon(), glyph_names()
    objects = [names[i] for i in rng.choice(len(names), int(rng.integers(2, 4)), replace=False)]

    def pick(group: str) -> str:
        items = list(world[group])
        return items[int(rng.integers(len(items)))]

    background = Background(pick("hues"), float(rng.uniform(0.15, 0.95)), pick("textures"), pick("lights"))
    camera = Camera(rng.uniform(2, 8), rng.uniform(0.8, 1.2), rng.uniform(0.9, 1.1), rng.choice((0, 0, 0.1, 0.3)))
    return draw_scene(rng, objects, background, camera)


def draw_pool(size: int, seed: int) -> Pool:
    """Draw `size` scenes with their descriptions and stage-A targets; 28 kB of memory each."""
    rng, groups = np.random.default_rng([seed, 77]), name_groups()
    index = {group: {name: i for i, name in enumerate(names)} for group, names in groups.items()}
    pictures, seen, glyphs = np.empty((size, SIDE, SIDE, 3), np.uint8), [], []
    for i in progress(range(size), "drawing the pool"):
        pictures[i], scene = random_scene(rng)
        seen.append(Described(scene, *measured_words(pictures[i])))
        glyphs.append(cell_glyphs(scene, index["glyph"]))
    words = {
        "hue": [s.scene.hue for s in seen],
        "brightness": [s.scene.brightness for s in seen],
        "texture": [s.scene.texture for s in seen],
        "light": [s.scene.light for s in seen],
        "colourfulness": [s.colourfulness for s in seen],
    }
    background = {g: torch.tensor([index[g][w] for w in names]) for g, names in words.items()}
    return Pool(to_patches(pictures), seen, torch.tensor(glyphs), background)
