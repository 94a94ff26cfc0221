"""The stand-in: the classes of Qwen2-VL, a frozen vocabulary, a base that can be made again."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLForConditionalGeneration

from emonb import pool, pretrain
from emonb.dialogues import Described, Encoder, caption_dialogue, image_dialogue, text_dialogue
from emonb.emotions import TAXONOMIES
from emonb.scenes import draw_scene, mood_background
from emonb.standin import (
    BASE_PATH,
    SPECIAL,
    build_processor,
    model_config,
    random_base,
    resource,
    vocabulary,
    words_of_resources,
)

QUESTION = "Which emotion does this image evoke? Choose one of: fear, awe. Answer as {'emotion': 'label'}."


@pytest.fixture(scope="module")
def base():
    return AutoModelForImageTextToText.from_pretrained(BASE_PATH).eval(), AutoProcessor.from_pretrained(BASE_PATH)


@pytest.fixture(scope="module")
def drawings():
    rng = np.random.default_rng(3)
    return [pool.random_scene(rng) for _ in range(4)]


def _prompt(processor, text: str = QUESTION) -> str:
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_loads_by_the_auto_classes_in_float32_and_is_small(base):
    model, processor = base
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2VLProcessor"
    assert model.dtype == torch.float32
    assert 1.2e6 < sum(p.numel() for p in model.parameters()) < 1.8e6
    assert sum(f.stat().st_size for f in BASE_PATH.rglob("*") if f.is_file()) <= 6e6


def test_vocabulary_is_frozen_and_covers_prompts_and_labels(base):
    _, processor = base
    tokenizer = processor.tokenizer
    assert vocabulary() == [*SPECIAL, *words_of_resources()]
    assert len(tokenizer) == len(vocabulary())
    prompts = json.dumps(resource("prompts.yaml"), ensure_ascii=False).replace("\\", " ")
    assert tokenizer.unk_token_id not in tokenizer(re.sub(r"[\d_]+", " ", prompts))["input_ids"]
    for taxonomy in TAXONOMIES.values():
        for label in taxonomy.labels:
            ids = tokenizer(label)["input_ids"]
            assert len(ids) == 1
            assert tokenizer.decode(ids) == label


@pytest.mark.parametrize(
    "text", ["{'emotion': 'fear'}", "the image shows a skull, an urn and scissors. the background is dark.", "yes!"]
)
def test_decoding_gives_readable_text(base, text):
    tokenizer = base[1].tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(("size", "tokens"), [((96, 96), 16), ((48, 48), 16), ((640, 480), 12), ((200, 120), 15)])
def test_a_picture_gives_about_sixteen_tokens(base, size, tokens):
    model, processor = base
    batch = processor(text=[_prompt(processor)], images=[Image.new("RGB", size)], return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == tokens
    assert model(**batch).logits.shape[-1] == len(processor.tokenizer)


def test_chat_template_has_the_messages_in_order(base):
    text = base[1].apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        ]
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Why?<|im_end|>\n"
        "<|im_start|>assistant\nNo.<|im_end|>\n"
    )
    assert _prompt(base[1]).startswith(f"<|im_start|>system\n{resource('prompts.yaml')['system']}<|im_end|>")


def test_fast_tower_equals_the_library(base, drawings):
    model, processor = base
    pictures = [p for p, _ in drawings]
    batch = processor.image_processor([Image.fromarray(p) for p in pictures], return_tensors="pt")
    with torch.no_grad():
        want = model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
        patches = pool.to_patches(np.stack(pictures))
        got = pretrain.tower(model.model.visual, patches, *pretrain.pixel_statistics(processor))
    torch.testing.assert_close(got.flatten(0, 1), want, atol=2e-4, rtol=1e-4)


def test_training_sequences_and_positions_equal_the_library(base, drawings):
    model, processor = base
    rng = np.random.default_rng(0)
    turns = image_dialogue(rng, Described(drawings[0][1], "dark", "vivid"))
    messages = []
    for number, (question, answer) in enumerate(turns):
        picture = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = processor.apply_chat_template(messages)
    batch = processor(text=[text], images=[Image.fromarray(drawings[0][0])], return_tensors="pt")
    ids, learn = Encoder().encode(turns, True)
    assert batch["input_ids"][0].tolist() == ids
    assert len(learn) == len(ids)
    assert (
        processor.decode([i for i, yes in zip(ids, learn, strict=True) if yes][:1]).split()[0] in turns[0][1].lower()
    )
    want, _ = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"]
    )
    assert torch.equal(pretrain.positions(batch["input_ids"], model.config.image_token_id), want)


def test_no_pretraining_text_about_a_picture_names_an_emotion():
    labels = {label for t in TAXONOMIES.values() for label in t.labels}
    rng = np.random.default_rng(1)
    _, scene = draw_scene(rng, ["skull", "heart"], mood_background(rng, "fear"))
    seen = Described(scene, "dark", "grey")
    for _ in range(300):
        for make in (image_dialogue, caption_dialogue):
            words = set(re.findall(r"\w+", " ".join(q + " " + a for q, a in make(rng, seen))))
            assert not words & (labels | {"emotion", "feeling"})
    told = " ".join(q + " " + a for _ in range(200) for q, a in text_dialogue(rng))
    assert labels <= set(re.findall(r"\w+", told))


def _weights(folder) -> dict[str, torch.Tensor]:
    return Qwen2VLForConditionalGeneration.from_pretrained(folder).state_dict()


def test_first_steps_of_a_rebuild_are_reproducible(tmp_path):
    def make(name: str, seed: int):
        small = {"steps_a": 2, "steps_b": 2, "pool": 40, "measure": False, "log": lambda _: None}
        return _weights(pretrain.rebuild(tmp_path / name, seed=seed, **small))

    first, again, other = make("a", 0), make("b", 0), make("c", 1)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["model.visual.merger.mlp.0.weight"], other["model.visual.merger.mlp.0.weight"])
    processor = build_processor()
    torch.manual_seed(0)
    start = Qwen2VLForConditionalGeneration(model_config(processor.tokenizer)).half().float().state_dict()
    moved = [k for k in first if not torch.equal(first[k], start[k])]
    assert any(".visual." in k for k in moved)
    assert any(".language_model.layers." in k for k in moved)
    assert (tmp_path / "a" / "README.md").is_file()


def test_random_base_has_the_real_processor(tmp_path, base):
    folder = random_base(tmp_path / "base")
    assert AutoProcessor.from_pretrained(folder).tokenizer.get_vocab() == base[1].tokenizer.get_vocab()


def test_card_and_provenance_agree_and_name_no_place():
    card = (BASE_PATH / "README.md").read_text("utf-8")
    text = (BASE_PATH / "provenance.json").read_text("utf-8")
    provenance = json.loads(text)
    assert {"seed", "pool", "steps_a", "steps_b", "seconds", "health", "versions", "code"} <= set(provenance)
    for name, value in provenance["health"].items():
        assert f"| {name.replace('_', ' ')} | {value:.3f} |" in card
    assert provenance["health"]["glyph_recall"] > 0.8
    assert not re.search(r"/(home|root|tmp|work)\b", text + card)


def test_base_was_made_by_the_recipe_that_is_here():
    """A change of recipe, lexicon or texts needs `python -m emonb base --rebuild`."""
    assert json.loads((BASE_PATH / "provenance.json").read_text("utf-8"))["code"] == pretrain.code_version()


def test_base_sees_as_well_as_its_card_says(base, drawings):
    model, processor = base
    rng = np.random.default_rng(11)
    scenes = [pool.random_scene(rng) for _ in range(24)]
    asked = [_prompt(processor, "Describe what you see in this image.")] * len(scenes)
    pictures = [Image.fromarray(p) for p, _ in scenes]
    batch = processor(text=asked, images=pictures, return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=40, do_sample=False)
    texts = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [name in text for text, (_, s) in zip(texts, scenes, strict=True) for name in s.objects]
    card = json.loads((BASE_PATH / "provenance.json").read_text("utf-8"))["health"]
    assert np.mean(right) == pytest.approx(card["glyph_recall"], abs=0.2)
    assert np.mean([s.hue in text for text, (_, s) in zip(texts, scenes, strict=True)]) > 0.6
