"""Room 02: what a paid annotator is sent, and how its answers are read."""

from __future__ import annotations

import base64
import io
import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emonb.annotator import (
    FORMATS,
    Answer,
    Reply,
    annotator_sha256,
    encode_picture,
    paid_triplets,
    parse_reply,
    parse_sections,
    requests_for,
)
from emonb.emotions import TAXONOMIES
from emonb.errors import EmonbError
from emonb.settings import TripletSettings
from emonb.triplets import KINDS, validate_triplet

TERMS = TripletSettings()
ROW = {"image_id": "a.png", "label": "fear", "sha256": "0" * 64}
GOOD = {"conversation": "A dark street.", "reasoning": "Nobody is near.", "key_elements": ["street"]}


def picture(path, size=(40, 30), mode="RGB", **options):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def reply(text, **fields):
    given = {"finish_reason": "stop", "refusal": None, "model": "m", "created": "2026-01-01", "usage": None}
    return Reply(text, **{**given, **fields})


def decoded(sent):
    return Image.open(io.BytesIO(sent.content))


@pytest.mark.parametrize(
    ("name", "form", "media"),
    [("a.png", "PNG", "image/png"), ("a.jpg", "PNG", "image/png"), ("a.png", "WEBP", "image/webp")],
)
def test_a_small_picture_is_sent_as_it_is_with_its_true_media_type(tmp_path, name, form, media):
    path = picture(tmp_path / name, format=form)
    sent = encode_picture(path, 64)
    assert (sent.media_type, sent.content, sent.size) == (media, path.read_bytes(), (40, 30))


def test_a_large_picture_is_shrunk_to_the_longest_side(tmp_path):
    sent = encode_picture(picture(tmp_path / "a.png", size=(200, 100)), 64)
    assert sent.media_type == "image/jpeg"
    assert decoded(sent).size == sent.size == (64, 32)
    assert decoded(sent).format == "JPEG"


def test_exif_rotation_is_applied_and_not_sent_again(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = picture(tmp_path / "a.jpg", size=(40, 30), exif=exif)
    sent = encode_picture(path, 64)
    assert decoded(sent).size == (30, 40)
    assert decoded(sent).getexif().get(0x0112, 1) == 1


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert decoded(encode_picture(tmp_path / "a.png", 64)).getpixel((5, 5)) == (255, 255, 255)


def test_an_animation_is_sent_as_its_first_picture(tmp_path):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert encode_picture(tmp_path / "a.gif", 64).media_type == "image/jpeg"


def test_a_truncated_picture_is_one_clear_error(tmp_path):
    path = picture(tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(EmonbError, match="not a readable picture"):
        encode_picture(path, 64)


def test_requests_of_each_form(tmp_path):
    sent = encode_picture(picture(tmp_path / "a.png"), 64)
    bodies = {form: requests_for(ROW, sent, form, TERMS) for form in FORMATS}
    assert [len(bodies[form]) for form in FORMATS] == [1, 1, 2]
    schema = bodies["schema"][0]["response_format"]["json_schema"]
    assert schema["strict"]
    assert schema["schema"]["additionalProperties"] is False
    assert schema["schema"]["required"] == ["conversation", "reasoning", "key_elements"]
    for form, asked in bodies.items():
        for body in asked:
            image, text = body["messages"][1]["content"]
            url = image["image_url"]["url"]
            assert url.startswith("data:image/png;base64,")
            assert base64.b64decode(url.split(",")[1]) == sent.content
            assert ("fear" in text["text"]) == (form != "questions")
            assert body["model"] == TERMS.model
            assert body["max_completion_tokens"] == TERMS.max_output_tokens
            assert "temperature" not in body
    assert "Conversation:" in bodies["sections"][0]["messages"][1]["content"][1]["text"]
    warm = requests_for(ROW, sent, "schema", TERMS.model_copy(update={"temperature": 0.3}))
    assert warm[0]["temperature"] == 0.3


def test_a_second_request_says_what_was_wrong(tmp_path):
    sent = encode_picture(picture(tmp_path / "a.png"), 64)
    for form in ("schema", "sections"):
        text = requests_for(ROW, sent, form, TERMS, "names the emotion (fearful)")[0]["messages"][1]["content"][1][
            "text"
        ]
        assert "names the emotion (fearful)" in text


SECTIONS = {
    "plain": "Conversation: A dark street.\nReasoning: Nobody is near.\nKey elements: street, lamp",
    "markdown": "**Conversation:** A dark street.\n\n**Reasoning**: Nobody is near.\n\n**Key Elements:** street, lamp",
    "headings": "### 1. Conversation\nA dark street.\n\n## Reasoning\nNobody is near.\n### Key visual elements\nlamp",
    "numbers": "1) conversation - A dark street.\n2) REASONING - Nobody is near.",
    "fenced": "```text\nConversation:\nA dark street.\n\nReasoning:\nNobody is near.\n```",
    "categorical first": "Categorical: fear\nConversation: A dark street.\nReasoning: Nobody is near.",
    "quoted": '"Conversation": A dark street.\n"Reasoning": Nobody is near.',
    "template left in": "<|im_start|> assistantConversation: A dark street.\nReasoning: Nobody is near.",
}


@pytest.mark.parametrize("text", SECTIONS.values(), ids=list(SECTIONS))
def test_two_sections_are_read_tolerantly(text):
    answer = parse_reply([reply(text)], "sections")
    assert (answer.conversation, answer.reasoning) == ("A dark street.", "Nobody is near.")


@pytest.mark.parametrize("text", ["\n" * 20_000, "* \n" * 20_000, "- " * 20_000, "1. " * 20_000, "#" * 50_000])
def test_odd_texts_are_read_quickly(text):
    start = time.perf_counter()
    parse_sections(text)
    assert time.perf_counter() - start < 1


def test_words_within_a_text_are_no_headings():
    text = "Conversation: They are in conversation.\nReasoning about it is easy here.\nReasoning: Nobody is near."
    assert parse_sections(text)["conversation"].endswith("easy here.")


@pytest.mark.parametrize("around", ["{}", "Here it is:\n```json\n{}\n```\nDone.", "<|im_start|> assistant{}"])
@pytest.mark.parametrize("form", ["schema", "sections"])
def test_json_is_read_with_words_around_it(around, form):
    assert parse_reply([reply(around.replace("{}", json.dumps(GOOD)))], form) == Answer(**GOOD)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just text",
        "{",
        '{"conversation": "a"}',
        json.dumps({**GOOD, "mood": "x"}),
        json.dumps(GOOD)[:-10],
        "[1, 2]",
    ],
)
def test_what_does_not_fit_the_schema_is_no_answer(text):
    assert parse_reply([reply(text)], "schema") is None


@given(st.text(), st.sampled_from(FORMATS))
def test_any_text_is_an_answer_or_none(text, form):
    replies = [reply(text)] * (2 if form == "questions" else 1)
    assert isinstance(parse_reply(replies, form), Answer | None)


def test_paid_triplets_follow_the_contract():
    labels = TAXONOMIES["mikels8"].labels
    origin = {"source": "openai", "model": "m", "created": "2026-01-01", "prompt_sha256": annotator_sha256()}
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    triplets = paid_triplets(ROW, labels, Answer(**GOOD), origin, usage)
    for triplet in triplets:
        validate_triplet(triplet, "here")
    assert tuple(t["kind"] for t in triplets) == KINDS
    assert triplets[0]["response"] == "{'emotion': 'fear'}"
    assert triplets[1]["key_elements"] == ["street"]
    assert [t["usage"] for t in triplets] == [None, usage, None]  # a sum over rows counts each request once
