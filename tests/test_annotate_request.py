"""Room 02: what a paid model is sent, how its answers are read, and what they cost."""

from __future__ import annotations

import base64
import io
import json
import time

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emonb.annotate import request as module
from emonb.annotate.request import FORMS, Answer, encode_picture, estimate_table, parse_reply, parse_sections
from emonb.errors import EmonbError
from emonb.settings import TripletSettings

TERMS = TripletSettings()
ROW = {"image_id": "a.png", "label": "fear", "sha256": "0" * 64}
GOOD = {"conversation": "A dark street.", "reasoning": "Nobody is near.", "key_elements": ["street"]}
LABELS = ["positive", "negative"]


def picture(path, size=(40, 30), **options):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_a_picture_is_sent_as_people_see_it_without_what_the_camera_noted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    picture(tmp_path / "large.png", size=(200, 100))
    picture(tmp_path / "turned.jpg", exif=exif)
    picture(tmp_path / "a.bmp")
    sizes = {"large.png": (64, 32), "turned.jpg": (30, 40), "a.bmp": (40, 30), "moving.gif": (20, 20)}
    for name, size in {**sizes, "clear.png": (20, 20)}.items():
        media, _, content = encode_picture(tmp_path / name, 64).partition(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        assert (media, image.format, image.size) == ("data:image/jpeg", "JPEG", size), name
        assert not image.getexif()
    assert image.getpixel((5, 5)) == (255, 255, 255)  # transparency becomes white
    path = picture(tmp_path / "torn.png")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(EmonbError, match="not a readable picture"):
        encode_picture(path, 64)


def test_requests_of_each_form():
    bodies = {form: module.requests_for(ROW, "data:x", form, TERMS, "names the emotion (fearful)") for form in FORMS}
    assert [len(bodies[form]) for form in FORMS] == [1, 1, 2]
    schema = bodies["schema"][0]["response_format"]["json_schema"]
    assert (schema["strict"], schema["schema"]["additionalProperties"]) == (True, False)
    assert schema["schema"]["required"] == ["conversation", "reasoning", "key_elements"]
    for form, asked in bodies.items():
        for body in asked:
            image, text = body["messages"][1]["content"]
            assert image["image_url"] == {"url": "data:x", "detail": "high"}
            assert ("feel fear" in text["text"]) == (form != "questions")
            assert ("names the emotion (fearful)" in text["text"]) == (form != "questions")
            assert (body["model"], body["max_tokens"]) == (TERMS.model, TERMS.max_output_tokens)
            assert "temperature" not in body
    assert "Conversation:" in bodies["sections"][0]["messages"][1]["content"][1]["text"]
    assert module.requests_for(ROW, "", "schema", TripletSettings(temperature=0.3))[0]["temperature"] == 0.3


READABLE = [
    "Conversation: A dark street.\nReasoning: Nobody is near.\nKey elements: street, lamp",
    "**Conversation:** A dark street.\n\n**Reasoning**: Nobody is near.\n\n**Key Elements:** street, lamp",
    "### 1. Conversation\nA dark street.\n\n## Reasoning\nNobody is near.\n### Key visual elements\nlamp",
    "1) conversation - A dark street.\r\n\r\n**2) REASONING** - Nobody is near.",
    "```text\nConversation:\nA dark street.\n\nReasoning:\nNobody is near.\n```",
    "Categorical: fear\nConversation: A dark street.\nReasoning: Nobody is near.",
    '"Conversation": A dark street.\n"Reasoning": Nobody is near.',
    "<|im_start|> assistantConversation: A dark street.\nReasoning: Nobody is near.",
    *(text.replace("{}", json.dumps(GOOD)) for text in ("{}", "It is:\n```json\n{}\n```\nDone.", "<|x|> assistant{}")),
]
MORE = ({**GOOD, "mood": "x"}, {**GOOD, "key_elements": "street"}, [GOOD], {"it": GOOD})
READABLE += [*map(json.dumps, MORE), repr(GOOD), "{a}: " * 3 + json.dumps(GOOD), json.dumps(GOOD)[:-1] + ",}"]
READABLE += [json.dumps({"Conversation": GOOD["conversation"], "Reasoning": GOOD["reasoning"], "Key elements": []})]
MISSING = {"conversation": 1, "reasoning": []}
UNREADABLE = ["", "text", "{", '{"conversation": "a"}', json.dumps(MISSING), json.dumps(GOOD)[:-9]]


def test_json_and_sections_are_read_tolerantly():
    for text in READABLE:
        answer = parse_reply([text], "schema")
        assert (answer.conversation, answer.reasoning) == ("A dark street.", "Nobody is near."), text
    assert [parse_reply([text], "schema") for text in UNREADABLE] == [None] * len(UNREADABLE)
    text = "Conversation: They are in conversation.\nReasoning about it is easy here.\nReasoning: Nobody is near."
    assert parse_sections(text)["conversation"].endswith("easy here.")  # words within a text are no headings


def test_odd_texts_are_read_quickly():
    start = time.process_time()
    for text in ("\n" * 20_000, "* \n" * 20_000, "- " * 20_000, "1. " * 20_000, "#" * 50_000):
        parse_sections(text)
    odd = [
        "<think>" * 20_000,
        "</think>" * 20_000,
        "<" * 50_000,
        "<a_" * 20_000,
        "```" * 20_000,
        "<|a|> think\n" * 8000,
    ]
    for text in ("{" * 50_000, "{'a':" * 5000, "Thinking:" + "\n " * 20_000, *odd):
        parse_reply([module.without_thoughts(text)], "schema")
    assert time.process_time() - start < 2


THOUGHTS = [
    "<think>\nReasoning: {draft}\n</think>\n\n{}",
    "Reasoning: draft</think>{}",
    "<thinking>a</thinking> {}",
    "<think>a</think><think>b</think>{}",
    "<seed:think>a</seed:think>{}",
    "[THINK]a[/THINK]{}",
    "◁think▷a◁/think▷{}",
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>{}",
    "<|begin_of_thought|>a<|end_of_thought|>\n<|begin_of_solution|>{}<|end_of_solution|>",
    "<|START_THINKING|>a<|END_THINKING|>{}",
    "a<|END_THINKING|>{}",
    "<unused94>thought\na<unused95>{}",
    "<|channel>thought\na<channel|>{}",
    "<|im_start|>think\na<|im_end|><|im_start|>assistant\n{}",
    "assistantanalysisaassistantfinal{}",
    "analysisWe look.assistantfinal{}",
    "<|thinking|>a<|/thinking|>{}",
    "<inner_monologue>a</inner_monologue>{}",
    "<Thought_Process>a</Thought_Process><answer>{}</answer>",
    '<reasoning_engine id="1">a</reasoning_engine>{}',
    "&lt;scratch_pad&gt;a&lt;/scratch_pad&gt;{}",
    "```thinking\na\n```\n{}",
    "**Thinking:** a\n\n**Answer:** {}",
    "## My thought process\na\n\n{}",
]
LEGITIMATE = [
    "I think so <b>",
    "Thoughtful colours: red. A thought: calm.",
    "Thinking of it, the lamp's reflection is <b>bright</b> [1].",
    "**Conversation:** An analysis.\n**Reasoning:** One thinks of home; 1 < 2, x_y > 3.",
]
MARKS = ["<|im_end|>", "<|image_pad|>", "<image>", "<|end_of_box|>", "</s>", "<end_of_turn>", "<row_1_col_1>", "[IMG]"]
MARKS += ["<｜end▁of▁sentence｜>", "<turn|>", "<fake_token_around_image>"]


def test_thoughts_are_no_answer_and_their_tokens_count():
    def said(content, total=150, **more):
        usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": total}
        return module.read_reply({"choices": [{"message": {"content": content, **more}}], "usage": usage})

    for thought in THOUGHTS:
        reply = said(thought.replace("{}", json.dumps(GOOD)))
        assert (reply["text"], reply["thought"]) == (json.dumps(GOOD), True), thought
        assert [*reply["usage"].values()] == [100, 50]  # some count thoughts in the total alone
    for text in (
        "<think>Conversation: a.\nReasoning: b.",
        "<inner_monologue>a",
        "Thoughts: a",
        "<unused94>thought\na",
    ):
        assert said(text)["text"] == ""  # cut, or never ended
    assert said(None, reasoning_content=json.dumps(GOOD))["text"] == ""
    assert said([{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "y"}], total=120)["text"] == "y"
    for kind in ("reasoning", "reasoning_text", "redacted_thinking", "summary_text", None):
        assert said([{"type": kind, "text": "x"}, {"type": "output_text", "text": "y"}])["text"] == "y"
    for text in LEGITIMATE:
        assert (said(text)["text"], said(text)["thought"]) == (text, False)


@pytest.mark.parametrize("mark", MARKS)
def test_marks_of_a_template_do_not_reach_training(mark):
    texts = dict.fromkeys(("conversation", "reasoning"), f"{mark}A dark {mark} street.")
    for said in (json.dumps(texts), json.dumps(texts).replace("<", "\\u003c")):
        answer = parse_reply([said], "schema")
        assert {" ".join(text.split()) for text in (answer.conversation, answer.reasoning)} == {"A dark street."}
    reply = module.read_reply({"choices": [{"message": {"content": mark}}]})
    assert (reply["text"], reply["thought"]) == ("", False)


@given(st.text(), st.sampled_from(FORMS))
def test_any_text_is_an_answer_or_none(text, form):
    assert isinstance(parse_reply([text] * 2, form), Answer | None)


def test_tokens_of_a_picture_as_in_the_provider_s_examples():
    def tokens(rule, size, **terms):
        return module.picture_tokens(rule, size, TripletSettings(**{"max_side": 10_000, **terms}))

    tiles, patches = module._UNKNOWN["image"], {"rule": "patches", "factor": 1.0, "most": 1536}
    assert [tokens(tiles, size) for size in ((1024, 1024), (2048, 4096), (96, 96))] == [765, 1105, 255]
    assert tokens(tiles, (4096, 8192), detail="low") == 85
    assert [tokens(patches, size) for size in ((1024, 1024), (33, 32), (5000, 5000))] == [1024, 2, 1536]
    assert tokens(tiles, (4000, 2000), max_side=512) == 85 + 170  # our own shrinking comes first
    assert tokens(patches, (2000, 4000), max_side=320) == 5 * 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("as_of: 2026-01-01\nmodels: {m: {input: -1, output: 1}}", "m: .*0 or more"),
        ("as_of: 2026-01-01\nmodels: {m: {input: 1}}", "m: .*0 or more"),
        ("as_of: 2026-01-01\nmodels: {m: {input: 1, output: 1, image: {rule: patches}}}", "m: .*most"),
        ("models: [", "not valid YAML"),
        (None, "No such file"),
    ],
)
def test_the_price_file(tmp_path, text, said):
    prices = module.load_prices(TERMS)
    own, mini = (module.find_price(prices, model) for model in (TERMS.model, "gpt-4.1-mini"))
    assert module.find_price(prices, "gpt-4.1-2025-04-14") == own != mini
    assert np.isnan(module.find_price(prices, "gpt-4.1-sonnet")["input"])
    if text:
        (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(EmonbError, match=rf"own.yaml.*: .*{said}.*; correct the file"):
        module.load_prices(TripletSettings(prices=str(tmp_path / "own.yaml")))


def test_an_estimate_adds_up(tmp_path):
    own = {"as_of": "2026-01-01", "models": {"m": {"input": 2.0, "output": 8.0, "batch": 0.5}}}
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump(own))
    terms = TripletSettings(model="m", prices=str(tmp_path / "prices.yaml"), retries=1)
    table = estimate_table(terms, [(1024, 1024), (96, 96)], 1000, LABELS, batch=False).set_index("part")
    asked, answered, total = (table.loc[part] for part in ("input", "output", "total"))
    assert total.to_dict() == (asked + answered).to_dict()
    assert asked["tokens_worst"] == 2 * asked["tokens_low"] > 2 * 510e3  # two pictures of 765 and 255 tokens
    assert answered["tokens_worst"] == 1000 * 2 * terms.max_output_tokens
    assert total["usd_low"] < total["usd_high"] < total["usd_worst"]
    usd = (asked["tokens_low"] * 2 + answered["tokens_low"] * 8) / 1e6
    assert total["usd_low"] == pytest.approx(usd)
    half = estimate_table(terms, [(1024, 1024), (96, 96)], 1000, LABELS, batch=True).iloc[-1]
    assert half["usd_high"] == pytest.approx(total["usd_high"] / 2)
    unknown = estimate_table(TripletSettings(model="my-server"), [(96, 96)], 10, LABELS, batch=False)
    assert (unknown["tokens_high"].gt(0).all(), unknown["usd_high"].isna().all()) == (True, True)


def test_an_estimate_of_a_dataset(tmp_path):
    rows = [(f"{i}.png", str(picture(tmp_path / f"{i}.png")), "train" if i < 4 else "test") for i in range(5)]
    samples, path = pd.DataFrame(rows, columns=["image_id", "path", "split"]), tmp_path / "small.jsonl"
    (tmp_path / "1.png").write_bytes(b"")
    assert module.picture_sizes(samples) == [(40, 30)] * 3
    said = module.estimate_text(samples, LABELS, path, TERMS, batch=True)
    assert "small: 4 training images, 0 of them done; gpt-4.1 by the Batch API, prices of 20" in said
    assert "nothing was sent" in said
    said = module.estimate_text(samples, LABELS, path, TripletSettings(model="x"))
    assert "the price of x is unknown" in said
    assert "--price IN,OUT" in said
    said = module.estimate_text(samples, LABELS, path, TripletSettings(model="x", price="0.5,1"))
    assert "total: $0.0" in said


def test_a_dataset_of_mini_never_meets_the_default_limit():
    for model in module.load_prices(TERMS)["models"]:
        table = estimate_table(TripletSettings(model=model), [(96, 96)], 1040, ["amusement"], batch=False)
        assert table.iloc[-1]["usd_worst"] < TERMS.max_cost, model
