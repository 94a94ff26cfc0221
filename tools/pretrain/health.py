"""Health of a base: what it sees and knows, measured on fresh pictures, and the model card that tells it.

Only these numbers guided the base's design; none is about the emotion of a scene except the linear probes, which
say how much of it the visual tokens *contain* (our choice: a reader should know what the stand-in can and cannot).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from emonb.data import TAXONOMIES
from emonb.files import atomic_write, resource, write_json
from emonb.triplets import with_article
from emonb.world import Camera, draw_scene, glyph_names, mood_background
from tools.pretrain.checkpoint import frames, model_config
from tools.pretrain.lessons import lessons_digest, random_scene, to_patches
from tools.pretrain.train import pixel_statistics, visual_tokens

SEEN, PROBE = 300, (3000, 1000)  # captions; training and test pictures of a probe


def measure_health(folder: Path, seed: int, log: Callable[[str], None] = print) -> dict[str, float]:
    """Shares (0-1) of what the checkpoint in `folder` gets right on fresh drawings of `seed`."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    torch.manual_seed(seed)
    untrained = Qwen2VLForConditionalGeneration(model_config(processor.tokenizer)).eval()
    health = {**_caption_recall(model, processor, seed), **_associations(model, processor)}
    health.update(linear_probes(model, processor, seed))
    health.update({f"random_tower_{k}": v for k, v in linear_probes(untrained, processor, seed).items()})
    health["mood_from_six_pixel_statistics"] = six_statistics(seed)
    health = {k: round(float(v), 3) for k, v in health.items()}
    for name, value in health.items():
        log(f"{name} {value}")
    return health


def _answers(model, processor, prompts: Sequence[str], pictures, longest: int = 48) -> list[str]:
    """Greedy answers to one question per picture (or to text alone, `pictures` None)."""
    out = []
    for at in range(0, len(prompts), 64):
        texts = []
        for prompt in prompts[at : at + 64]:
            content = [{"type": "image"}] if pictures is not None else []
            content.append({"type": "text", "text": prompt})
            messages = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(messages, add_generation_prompt=True))
        images = {"images": list(pictures[at : at + 64])} if pictures is not None else {}
        batch = processor(text=texts, padding=True, return_tensors="pt", **images)
        with torch.no_grad():
            ids = model.generate(**batch, max_new_tokens=longest, do_sample=False)
        out += processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return out


def _has(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text) is not None


def _caption_recall(model, processor, seed: int) -> dict[str, float]:
    rng = np.random.default_rng([seed, 5])
    pictures, scenes = zip(*(random_scene(rng) for _ in range(SEEN)), strict=True)
    asked = ["Describe what you see in this image."] * SEEN
    texts = _answers(model, processor, asked, [Image.fromarray(p) for p in pictures])
    named = [_has(text.split(". ")[0], name) for text, s in zip(texts, scenes, strict=True) for name in s.objects]
    found = {"glyph_recall": np.mean(named)}
    behind = [" ".join(text.split(". ")[1:3]) for text in texts]
    for part in ("hue", "brightness", "texture", "light"):
        right = [
            _has(text, getattr(s, part)) if getattr(s, part) != "plain" else " with " not in text
            for text, s in zip(behind, scenes, strict=True)
        ]
        found[f"background_{part}_recall"] = np.mean(right)
    return found


def _associations(model, processor) -> dict[str, float]:
    glyphs, question = resource("lexicon.yaml", "glyphs"), frames()["text"]["suggests"][0][0]
    found = {}
    for column, (name, taxonomy) in enumerate(TAXONOMIES.items(), start=1):
        rows = [(g, row[column]) for g, row in glyphs.items() if len(row) > 1]
        asked = [question.format(a_glyph=with_article(g), labels=", ".join(taxonomy.labels)) for g, _ in rows]
        texts = _answers(model, processor, asked, None, 12)
        right = [_has(text, wanted) for text, (_, wanted) in zip(texts, rows, strict=True)]
        found[f"object_association_{name}"] = np.mean(right)
    return found


def _mood_pictures(rng: np.random.Generator, count: int, telling: str) -> tuple[np.ndarray, np.ndarray]:
    """Mikels-8 pictures whose emotion shows in the mood alone or in the content alone, and class numbers."""
    labels, neutral = TAXONOMIES["mikels8"].labels, glyph_names("mikels8", "")
    pictures, classes = [], np.arange(count) % len(labels)
    for k in classes:
        pool = neutral if telling == "mood" else glyph_names("mikels8", labels[k])
        objects = [pool[i] for i in rng.choice(len(pool), 2, replace=False)]
        background = mood_background(rng, labels[k] if telling == "mood" else "neutral")
        pictures.append(draw_scene(rng, objects, background, Camera(4))[0])
    return np.stack(pictures), classes


def _fit_score(x: np.ndarray, y: np.ndarray, train: int) -> float:
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.3))
    return probe.fit(x[:train], y[:train]).score(x[train:], y[train:])


def linear_probes(model, processor, seed: int) -> dict[str, float]:
    """Accuracy of a linear probe for the emotion on mean-pooled visual tokens (8 classes, chance .125)."""
    found = {}
    for telling in ("mood", "content"):
        pictures, classes = _mood_pictures(np.random.default_rng([seed, 6]), sum(PROBE), telling)
        tokens = visual_tokens(model, to_patches(pictures), pixel_statistics(processor))
        found[f"{telling}_probe"] = _fit_score(tokens.mean(1).numpy(), classes, PROBE[0])
    return found


def six_statistics(seed: int, sizes: tuple[int, int] = PROBE) -> float:
    """How far mean and spread of R, G, B alone tell the mood of mood-only pictures (8 classes)."""
    pictures, classes = _mood_pictures(np.random.default_rng([seed, 6]), sum(sizes), "mood")
    statistics = [np.r_[p.mean((0, 1)), p.std((0, 1))] for p in pictures]
    return _fit_score(np.stack(statistics) / 255, classes, sizes[0])


def write_card(folder: Path, recipe: dict, seconds: dict, health: dict) -> None:
    """Write `provenance.json` and the model card `README.md` from the same numbers."""
    made_with = ("torch", "transformers", "tokenizers", "numpy", "pillow", "matplotlib")  # whose font the glyphs are
    versions = {name: metadata.version(name) for name in made_with}
    provenance = {**recipe, "seconds": seconds, "health": health, "versions": versions, "lessons": lessons_digest()}
    write_json(folder / "provenance.json", dict(sorted(provenance.items())))
    atomic_write(folder / "README.md", card(provenance))


def card(provenance: dict) -> str:
    """The model card of a checkpoint with this provenance."""
    table = "\n".join(f"| {name.replace('_', ' ')} | {value:.3f} |" for name, value in provenance["health"].items())
    seconds = {f"{name}_seconds": value for name, value in provenance["seconds"].items()}
    return CARD.format(**provenance, **seconds, table=table)


CARD = """# emonb stand-in base

A Qwen2-VL of 1.5 million parameters (`Qwen2VLForConditionalGeneration` with `Qwen2VLProcessor`; float16 on disk,
float32 when loaded) for the drawn world of emonb. It plays the part of Qwen2-VL-7B-Instruct on machines without a
GPU. It knows nothing but drawn scenes of 96 x 96 pixels, and its accuracies say nothing about real photographs.

It was pre-trained on descriptions of everything visible (objects, places, colour, brightness, texture, light) and on
common sense as text alone (which emotion word an object suggests, whether a feeling is positive). It was never shown
or told the emotion of a scene; the pictures of its pool pair objects and backgrounds at random.

Made by `python -m tools.pretrain`: seed {seed}, pool {pool} scenes ({pool_seconds} s), vision tower {steps_a}
steps ({stage_a_seconds} s), language model {steps_b} steps ({stage_b_seconds} s) on two cores. `provenance.json` has
the recipe, the library versions and the numbers below.

Measured on fresh drawings (shares; probes and statistics: 8 classes, chance 0.125):

| what | share |
|---|---|
{table}

Glyph and background recalls are read off greedy captions; associations are greedy answers; probes are logistic
regressions on mean-pooled visual tokens of pictures whose emotion shows in the mood alone or in the content alone
(`random tower`: the same on untrained weights; six pixel statistics: mean and spread of R, G and B).

Licence: MIT, as emonb. The glyphs are drawn from DejaVu Sans, which matplotlib ships.
"""
