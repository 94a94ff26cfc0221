"""Room 03, first half: scored answers, visual tokens, LoRA, the parser."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from pipeline import three_pictures

from emonb import vlm as room
from emonb.emotions import parse_emotion
from emonb.errors import EmonbError
from emonb.samples import open_picture
from emonb.settings import VLMSettings
from emonb.triplets import categorical_instruction, load_prompts
from emonb.tuning import add_lora

LABELS = ("fear", "joy", "awe")
MULTI = ("fear", "fear and loss", "dark awe")  # several tokens each, and one begins another


def settings_of(base):
    return VLMSettings(base=str(base), dtype="float32", quantize_4bit=False, gradient_checkpointing=False)


@pytest.fixture(scope="module")
def vlm(untrained_base):
    return room.load_vlm(settings_of(untrained_base))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return three_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("labels", [LABELS, MULTI], ids=["one-token", "multi-token"])
def test_scored_answer_is_the_log_probability_of_a_plain_forward(vlm, pictures, labels):
    """Batched, left-padded, on a KV cache - against one official forward per image and label."""
    visual = room.visual_tokens(vlm, pictures)
    got = room.answer_distribution(vlm, visual, labels)
    prefix, tails = room.answer_tokens(vlm, labels)
    for i, path in enumerate(pictures):
        pixels = vlm.processor.image_processor([open_picture(path)], return_tensors="pt")
        for c, tail in enumerate(tails):
            ids = [*prefix, *tail]
            at, n = ids.index(vlm.image_token_id), len(visual.tokens[i])
            ids = torch.tensor([[*ids[:at], *[vlm.image_token_id] * n, *ids[at + 1 :]]])
            types = (ids == vlm.image_token_id).int()
            with torch.no_grad():
                logits = vlm.model(input_ids=ids, mm_token_type_ids=types, **pixels).logits[0].log_softmax(-1)
            start = ids.shape[1] - len(tail)
            expected = sum(logits[start - 1 + k, token].item() for k, token in enumerate(tail))
            assert got[i, c].item() == pytest.approx(expected, abs=2e-3)  # visual tokens are float16


def test_candidates_share_the_prefix_and_differ_in_their_tails(vlm):
    prefix, tails = room.answer_tokens(vlm, LABELS)
    assert all(len(t) == 1 for t in tails)
    frame = load_prompts()["categorical"]["response"]
    whole, _ = room.dialogue_ids(vlm, categorical_instruction(LABELS))
    for label, tail in zip(LABELS, tails, strict=True):
        answer = vlm.processor.tokenizer(frame.format(label=label), add_special_tokens=False)["input_ids"]
        assert [*prefix, *tail] == [*whole, *answer][: len(prefix) + len(tail)]
    tails = room.answer_tokens(vlm, MULTI)[1]
    assert not any(a == b[: len(a)] for i, a in enumerate(tails) for j, b in enumerate(tails) if i != j)


def test_answers_do_not_depend_on_the_batch(vlm, pictures):
    together = room.answer_distribution(vlm, room.visual_tokens(vlm, pictures), LABELS)
    for i, path in enumerate(pictures):
        alone = room.answer_distribution(vlm, room.visual_tokens(vlm, [path]), LABELS)
        assert torch.allclose(together[i], alone[0], atol=2e-3)


def test_feature_is_the_mean_of_the_merged_tokens(vlm, pictures):
    visual = room.visual_tokens(vlm, pictures)
    pixels = vlm.processor.image_processor([open_picture(pictures[0])], return_tensors="pt")
    with torch.no_grad():
        merged = vlm.core.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
    assert torch.allclose(visual.pooled()[0], merged.mean(0), atol=1e-3)


def test_lora_touches_only_the_language_models_attention(untrained_base, pictures):
    vlm = room.load_vlm(settings_of(untrained_base))
    visual = room.visual_tokens(vlm, pictures[:1])
    before = room.answer_distribution(vlm, visual, LABELS)
    tuned = add_lora(vlm, settings_of(untrained_base))
    named = [n for n, p in tuned.model.named_parameters() if p.requires_grad]
    layers = vlm.core.config.text_config.num_hidden_layers
    assert len(named) == layers * 4 * 2
    assert all("language_model" in n and n.split(".")[-4] in ("q_proj", "k_proj", "v_proj", "o_proj") for n in named)
    assert {p.shape[0] for n, p in tuned.model.named_parameters() if "lora_A" in n} == {8}
    assert torch.allclose(room.answer_distribution(tuned, visual, LABELS), before, atol=1e-5)
    tuned.model.unload()
    assert not [n for n, _ in tuned.model.get_base_model().named_parameters() if "lora" in n]


PARSED = [
    ("{'emotion': 'fear'}", "fear"),
    ("{ ' emotion ' : ' fear ' }", "fear"),
    ('{"emotion": "Fear"}', "fear"),
    ("emotion: joy.", "joy"),
    ("The answer is awe", "awe"),
    ("A joyful picture.", "joy"),
    ("It is frightening and scared me", "fear"),
    ("not joy but fear", "fear"),
    ("It isn't joy. It is awe.", "awe"),
    ("{'emotion': 'boredom'}", None),
    ("{'emotion': 'boredom'} joy", None),
    ("joy and fear", None),
    ("not fear", None),
    ("joyless fearsome", None),
    ("", None),
    ("I cannot help with that.", None),
]


@pytest.mark.parametrize(("text", "label"), PARSED)
def test_parser(text, label):
    assert parse_emotion(text, LABELS) == label


def test_generation_is_greedy_text(vlm, pictures):
    texts = [room.generate(vlm, pictures, "Describe what you see in this image.", 5) for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3


def test_large_pictures_are_shrunk(untrained_base):
    small = room.load_vlm(settings_of(untrained_base).model_copy(update={"max_side": 48}))
    picture = Image.new("RGB", (400, 100), "red")
    room.visual_tokens(small, [picture])
    assert max(picture.size) == 400, "the caller's picture was changed"


def test_missing_weights_say_how_to_get_them():
    with pytest.raises(EmonbError, match=r"setting vlm.base.*hf download nobody/nothing"):
        room.load_vlm(settings_of("nobody/nothing"))
