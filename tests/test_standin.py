"""The stand-in: the classes of Qwen2-VL, a frozen vocabulary, a base that can be made again."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLForConditionalGeneration

from emonb.data import TAXONOMIES
from emonb.files import resource
from tools.pretrain import lessons, train
from tools.pretrain.checkpoint import BASE, SPECIAL, build_processor, model_config, vocabulary, words_of_resources

WHO = ("user", "assistant")
LABELS = {label for taxonomy in TAXONOMIES.values() for label in taxonomy.labels}


@pytest.fixture(scope="module")
def base():
    return AutoModelForImageTextToText.from_pretrained(BASE).eval(), AutoProcessor.from_pretrained(BASE)


@pytest.fixture(scope="module")
def drawings():
    rng = np.random.default_rng(3)
    return [lessons.random_scene(rng) for _ in range(24)]


def asked(processor, pictures, question="Describe what you see in this image."):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt.startswith(f"<|im_start|>system\n{resource('prompts.yaml', 'system')}<|im_end|>\n<|im_start|>user\n")
    return processor(text=[prompt] * len(pictures), images=pictures, return_tensors="pt")


def test_loads_by_the_auto_classes_is_small_and_gives_about_sixteen_tokens_a_picture(base):
    model, processor = base
    assert (type(model), model.dtype) == (Qwen2VLForConditionalGeneration, torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 1_463_104
    assert sum(f.stat().st_size for f in BASE.rglob("*") if f.is_file()) <= 6e6
    for size, tokens in {(96, 96): 16, (48, 48): 16, (640, 480): 12, (200, 120): 15}.items():
        ids = asked(processor, [Image.new("RGB", size)])["input_ids"]
        assert (ids == model.config.image_token_id).sum() == tokens


def test_vocabulary_is_frozen_covers_prompts_and_labels_and_decodes_to_readable_text(base):
    tokenizer = base[1].tokenizer
    assert vocabulary() == [*SPECIAL, *words_of_resources()], "a new word needs a new vocabulary.txt and a new base"
    assert tokenizer.get_vocab() == build_processor().tokenizer.get_vocab()
    assert all(len(tokenizer(label)["input_ids"]) == 1 for label in LABELS)
    for text in ("{'emotion': 'fear'}", "the image shows a skull, an urn and scissors. it is dark.", "yes!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_what_is_trained_on_equals_what_the_library_computes(base, drawings):
    """Visual tokens, token ids and positions: the pre-training has faster ways of its own."""
    model, processor = base
    pictures, rng = [Image.fromarray(picture) for picture, _ in drawings[:4]], np.random.default_rng(0)
    for picture, (_, scene) in zip(pictures, drawings, strict=False):
        dialogue = lessons.image_dialogue(rng, lessons.Described(scene, "dark", "vivid"))
        said = [
            (who, {"type": "text", "text": text}) for turn in dialogue for who, text in zip(WHO, turn, strict=True)
        ]
        messages = [{"role": who, "content": [{"type": "image"}] * (i == 0) + [t]} for i, (who, t) in enumerate(said)]
        batch = processor(text=[processor.apply_chat_template(messages)], images=[picture], return_tensors="pt")
        ids, learn = lessons.Encoder().encode(dialogue, True)
        assert batch["input_ids"][0].tolist() == ids
        learnt = processor.decode([i for i, yes in zip(ids, learn, strict=True) if yes])
        assert learnt.count("<|im_end|>") == len(dialogue)
        grid = {"image_grid_thw": batch["image_grid_thw"]}
        want, _ = model.model.get_rope_index(batch["input_ids"], batch["mm_token_type_ids"], **grid)
        assert torch.equal(train.positions(batch["input_ids"], model.config.image_token_id), want)
    seen = processor.image_processor(pictures, return_tensors="pt")
    patches = lessons.to_patches(np.stack([np.asarray(p) for p in pictures]))
    with torch.no_grad():
        want = model.model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output
        got = train.tower(model.model.visual, patches, *train.pixel_statistics(processor))
    torch.testing.assert_close(got.flatten(0, 1), want, atol=2e-4, rtol=1e-4)


def test_no_lesson_about_a_picture_names_an_emotion(drawings):
    rng = np.random.default_rng(1)
    for _, scene in drawings * 10:
        seen = lessons.Described(scene, "dark", "grey")
        turns = [*lessons.image_dialogue(rng, seen), *lessons.caption_dialogue(rng, seen)]
        assert not set(re.findall(r"\w+", str(turns))) & {*LABELS, "emotion", "feeling"}
    assert set(re.findall(r"\w+", str([lessons.text_dialogue(rng) for _ in range(200)]))) >= LABELS


def test_first_steps_of_a_rebuild_follow_from_the_seed(tmp_path, one_thread):
    small = {"steps_a": 2, "steps_b": 2, "pool": 40, "measure": False, "log": lambda _: None}
    folders = [train.rebuild(tmp_path / name, seed=0, **small) for name in ("first", "again")]
    found, again = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in folders)
    torch.manual_seed(0)
    start = Qwen2VLForConditionalGeneration(model_config(build_processor().tokenizer)).half().float().state_dict()
    assert all(torch.equal(found[name], again[name]) for name in found)
    for part in (".visual.", ".language_model.layers."):
        assert any(part in name and not torch.equal(found[name], start[name]) for name in start), part


def test_card_and_provenance_tell_of_the_base_that_is_here(base, drawings, one_thread):
    card, text = ((BASE / name).read_text("utf-8") for name in ("README.md", "provenance.json"))
    provenance = json.loads(text)
    for name, value in provenance["health"].items():
        assert f"| {name.replace('_', ' ')} | {value:.3f} |" in card
    assert not re.search(r"/(home|root|tmp|work)\b", text + card)
    assert provenance["lessons"] == lessons.lessons_digest(), "other lessons need a new base: python -m tools.pretrain"
    model, processor = base
    batch = asked(processor, [Image.fromarray(picture) for picture, _ in drawings])
    ids = model.generate(**batch, max_new_tokens=40, do_sample=False)
    texts = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [name in text for text, (_, scene) in zip(texts, drawings, strict=True) for name in scene.objects]
    assert np.mean(right) == pytest.approx(provenance["health"]["glyph_recall"], abs=0.2)
