"""Room 02: triplets from the authors' annotation JSON and from EmoVIT's conversations."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emonb.emotions import TAXONOMIES
from emonb.errors import EmonbError
from emonb.triplet_import import import_triplets
from emonb.triplets import FIELDS, KINDS, categorical_instruction, load_prompts, read_triplets, validate_triplet

LABELS = TAXONOMIES["mikels8"].labels
IMAGES = {  # image -> label, split
    "train/fear/fear_00012.jpg": ("fear", "train"),
    "train/awe/awe_00001.jpg": ("awe", "train"),
    "train/awe/7.jpg": ("awe", "train"),
    "train/fear/7.jpg": ("fear", "train"),
    "train/sadness/9.jpg": ("sadness", "train"),
    "val/fear/fear_00013.jpg": ("fear", "val"),
    "test/anger/anger_00500.jpg": ("anger", "test"),
}
FEAR, AWE = "train/fear/fear_00012.jpg", "train/awe/awe_00001.jpg"
SEEN = "The dark sky serves as a dramatic background. A crowd holds tools."
WHY = "The silhouettes against the dark sky suggest a threat that comes closer."
GPT = f"1. key elements \n{SEEN}\n\n2. reasoning\n{WHY}"


def table(images=IMAGES):
    rows = [(image, *about, hashlib.sha256(image.encode()).hexdigest()) for image, about in images.items()]
    return pd.DataFrame(rows, columns=["image_id", "label", "split", "sha256"])


@pytest.fixture
def load(tmp_path):
    """Imports rows (or raw bytes) as a file would be; the sample table can be another."""

    def run(content, samples=None, name="annotations.json", labels=LABELS):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        path = tmp_path / name
        path.write_bytes(data)
        return import_triplets(path, table() if samples is None else samples, labels)

    return run


def paper(name=FEAR, response=GPT, label="fear", **more):
    path = f"images/FI/{name}"
    return {"gpt_response": response, "img": path.split("/")[-1], "img_path": path, "label": label, **more}


def emovit(*turns, image="fear_00012.jpg", **more):
    said = [{"from": who, "value": text} for q, a in turns for who, text in (("human", q), ("gpt", a))]
    return {"id": "00012", "image": image, "conversations": said, **more}


def texts(found, image=FEAR):
    return {t["kind"]: t["response"] for t in found.triplets if t["image_id"] == image}


def counts(found):
    return {reason: problem["count"] for reason, problem in found.report["problems"].items()}


def test_the_authors_annotations(load):
    rows = [paper(AWE, label="awe"), paper(model="gpt-4")]
    found = load(rows)
    assert [(t["image_id"], t["kind"]) for t in found.triplets] == [(FEAR, k) for k in KINDS] + [
        (AWE, k) for k in KINDS
    ]
    assert texts(found) == {"categorical": "{'emotion': 'fear'}", "conversation": SEEN, "reasoning": WHY}
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    for triplet in found.triplets:
        validate_triplet(triplet, "here")
        assert set(triplet) == {*FIELDS, "imported_from", "import_sha256"}
        assert (triplet["source"], triplet["imported_from"]) == ("imported", "annotations.json")
        assert triplet["import_sha256"] == digest
        assert [triplet[field] for field in ("created", "prompt_sha256", "usage")] == [None] * 3
        assert triplet["model"] == ("gpt-4" if triplet["image_id"] == FEAR else "unknown")
    sha = hashlib.sha256(FEAR.encode()).hexdigest()
    asked = {t["kind"]: t["instruction"] for t in found.triplets[:3]}
    assert asked.pop("categorical") == categorical_instruction(LABELS)
    for kind, instruction in asked.items():
        ours = load_prompts()[kind]["instructions"]
        assert instruction == ours[int(sha[:8], 16) % len(ours)]
    assert found.report == {
        "file": "annotations.json",
        "format": "EmoVLM-KD annotations",
        "rows": 2,
        "images": 2,
        "triplets": {"categorical": 2, "conversation": 2, "reasoning": 2},
        "train_images_without": 3,
        "problems": {},
    }


@pytest.mark.parametrize(
    "response",
    [
        f"Conversation: {SEEN}\nReasoning: {WHY}",
        f"**1. Key Elements:**\n{SEEN}\n\n**2. Reasoning:**\n{WHY}",
        f"### 1. Conversation\n\n{SEEN}\n\n### 2. Reasoning\n\n{WHY}\n",
        f"1) conversation - {SEEN}\n2) reasoning - {WHY}",
        f"KEY ELEMENTS\n{SEEN}\nREASONING\n{WHY}",
        f"```\nCategorical: {{'emotion': 'fear'}}\nConversation: {SEEN}\nReasoning: {WHY}\n```",
        json.dumps({"conversation": SEEN, "reasoning": WHY}),
        "```json\n" + json.dumps({"Key elements": SEEN, "Reasoning": WHY}, indent=2) + "\n```",
        json.dumps({"conversation": SEEN, "reasoning": WHY, "key_elements": ["sky", "tools"]}, indent=1),
        GPT.replace("\n", "\r\n"),
        GPT.replace("\n\n", "\n" * 5000),  # an answer that ran away must not take minutes
    ],
)
def test_gpt_4_heads_its_sections_in_many_ways(load, response):
    found = load([paper(response=response)])
    assert texts(found) == {"categorical": "{'emotion': 'fear'}", "conversation": SEEN, "reasoning": WHY}
    assert found.report["problems"] == {}


@pytest.mark.parametrize(
    "talk",
    [
        "Question: What is there?\nAnswer: A crowd.\nQuestion: Where?\nAnswer: Under a dark sky.",
        "Question 1: What is there? Answer 1: A crowd. Question 2: Where? Answer 2: Under a dark sky.",
        "Q: What is there?\nA: A crowd.\n\nQ: Where?\nA: Under a dark sky.",
        "**Question:** What is there?\n**Answer:** A crowd.\n**Complex question:** Where?\n**A:** Under a dark sky.",
        "Here they are.\nQuestion: What is there?\nAnswer: A crowd.\nQ2: Where?\nA2: Under a dark sky.",
    ],
)
def test_questions_in_a_section_become_the_instruction(load, talk):
    found = load([paper(response=f"Conversation:\n{talk}\nReasoning: {WHY}")])
    conversation = found.triplets[1]
    assert conversation["instruction"] == "What is there? Where?"
    assert conversation["response"] == "A crowd. Under a dark sky."
    assert texts(found)["reasoning"] == WHY


def test_prose_with_a_colon_is_no_question(load):
    prose = "It raises the question: who are they? Plan A: they run."
    assert texts(load([paper(response=f"Conversation: {prose}\nReasoning: {WHY}")]))["conversation"] == prose


def test_an_annotation_is_read_once(load):
    found = load(
        [
            paper(),
            paper(response=GPT.replace("dark", "bright")),
            paper(AWE, "I cannot.", "awe"),
            paper(AWE, label="awe"),
        ]
    )
    assert texts(found)["conversation"] == SEEN
    assert texts(found, AWE)["conversation"] == SEEN  # the first answer that could be used
    assert counts(found) == {"answered twice, the first kept": 1, "no section found": 1}


def test_emovit_conversations(load):
    rows = [
        emovit(("What is there?\n<image>", "A crowd."), ("<image>\nWhy would one run?", "Tools are raised.")),
        emovit(("Which emotion?", "Predict emotion: fear")),
        emovit(("Explain the colours.", "Dark, as at night."), ("Where are they?", "Under the sky."), model="gpt-4"),
        emovit(("Please select the emotion", "Predict emotion: awe"), image="awe_00001"),
    ]
    found = load(rows, name="all.json")
    assert texts(found) == {
        "categorical": "{'emotion': 'fear'}",
        "conversation": "A crowd. Under the sky.",
        "reasoning": "Tools are raised. Dark, as at night.",
    }
    assert [t["instruction"] for t in found.triplets[:3]] == [
        categorical_instruction(LABELS),
        "What is there? Where are they?",
        "Why would one run? Explain the colours.",
    ]
    assert texts(found, AWE) == {"categorical": "{'emotion': 'awe'}"}
    assert found.report["format"] == "EmoVIT conversations"
    assert found.report["triplets"] == {"categorical": 2, "conversation": 1, "reasoning": 1}
    assert found.report["problems"] == {}


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("Which emotion?", "{'emotion': 'fear'}", "categorical"),
        ("Which emotion?", '{"emotion": "fear"}', "categorical"),
        ("Which emotion?", "Fear", "categorical"),
        ("Which emotion?", "Emotion: fear.", "categorical"),
        ("Which emotion?", "The predicted emotion is **fear**.", "categorical"),
        ("What do they show?", "Afraid.", "categorical"),
        ("Is it night?", "Yes.", "conversation"),
        ("What is it?", "A sad dog.", "conversation"),
        ("What is it?", "not fear", "conversation"),
        ("What is it?", "A room full of fear and smoke.", "conversation"),
        ("What evokes the mood?", "The light.", "reasoning"),
        ("How might one FEEL here?", "Uneasy.", "reasoning"),
        ("What is the reason?", "Smoke.", "reasoning"),
        ("", "Smoke over a house.", "conversation"),
        ("<image>", "Smoke over a house.", "conversation"),
    ],
)
def test_what_kind_of_turn(load, question, answer, kind):
    found = load([emovit((question, answer)), emovit(("What else?", "Trees."), image=AWE)])
    assert kind in texts(found)
    assert set(texts(found)) == {"categorical", kind}
    if not question.replace("<image>", ""):
        assert found.triplets[1]["instruction"] in load_prompts()["conversation"]["instructions"]


def test_other_speakers_and_open_ends(load):
    said = [
        {"from": "system", "value": "You see one image."},
        {"from": "user", "value": "What is there?"},
        {"from": "assistant", "value": "Smoke."},
        {"from": "gpt", "value": "And a house."},
        {"from": "human", "value": "Who lives there?"},
        {"from": "human", "value": "Is it night?"},
        {"from": "gpt", "value": "  "},
        None,
        {"from": None},
    ]
    found = load([{**emovit(), "conversations": said}])
    assert texts(found)["conversation"] == "Smoke. And a house."
    assert counts(found) == {"conversation without answer": 1, "empty answer": 1}


@pytest.mark.parametrize(
    "name",
    [
        FEAR,
        f"./{FEAR}",
        f"/home/alice/emotion data/{FEAR}",
        "C:\\Users\\alice\\FI\\train\\fear\\fear_00012.jpg",
        f"file:///home/alice/emotion%20data/{FEAR}",
        "elsewhere/fear_00012.jpg",
        "fear_00012.jpg",
        "fear_00012",
        "train/fear/fear_00012",
        "fear_00012.png",
    ],
)
def test_names_that_mean_one_image(load, name):
    assert set(texts(load([emovit(("What?", "Smoke."), image=name)]))) == {"categorical", "conversation"}


def test_the_longest_tail_decides_between_equal_names(load):
    rows = [paper("train/fear/7.jpg"), paper("train/awe/7.jpg", label="awe"), emovit(image="7.jpg")]
    found = load([*rows[:2], paper("7.jpg"), paper("7.jpg", image_id="train/sadness/9.jpg", label="sadness")])
    assert {t["image_id"] for t in found.triplets} == {"train/fear/7.jpg", "train/awe/7.jpg", "train/sadness/9.jpg"}
    assert found.report["problems"]["image name is ambiguous"] == {"count": 1, "examples": ["row 3: 7.jpg"]}


def test_names_that_contradict_are_not_guessed(load):
    # 9.jpg is unique here, but the file's 9.jpg is a picture of awe
    found = load([emovit(("What?", "Smoke.")), emovit(("What?", "Smoke."), image="train/awe/9.jpg")])
    assert counts(found) == {"image not in the dataset": 1}


def test_an_image_id_comes_before_every_path(load):
    rows = [{**emovit(("What?", "Smoke."), image=image), "image_id": FEAR} for image in ("7.jpg", "awe_00001.jpg")]
    assert set(texts(load(rows[:1]))) == set(texts(load(rows[1:]))) == {"categorical", "conversation"}


def test_rows_under_keys_and_flat_image_ids(load):
    samples = table(
        {"fear_12.jpg": ("fear", "train"), "more/fear_12.jpg": ("fear", "train"), "a b.jpg": ("awe", "train")}
    )
    rows = {
        "fear_12.jpg": {"gpt_response": GPT, "label": "fear"},
        "a b.jpg": {"gpt_response": GPT, "label": "awe"},
        "b.jpg": {"gpt_response": GPT, "label": "awe"},
    }
    found = load(rows, samples)
    assert [t["image_id"] for t in found.triplets] == ["fear_12.jpg"] * 3 + ["a b.jpg"] * 3
    assert counts(found) == {"image not in the dataset": 1}


def test_json_lines_a_bom_and_a_single_row(load):
    one, two = json.dumps(paper()), json.dumps(paper(AWE, label="awe"))
    for content in (f"{one}\n{two}\n", f"\ufeff{one}\r\n\r\n{two}", f"\ufeff[{one}, {two}]"):
        assert load(content.encode()).report["images"] == 2
    assert load(one.encode()).report["rows"] == 1


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("make", [paper, lambda name, **more: emovit(("What?", "Smoke."), image=name)])
def test_val_and_test_get_nothing(load, split, make):
    name, label = next((image, label) for image, (label, part) in IMAGES.items() if part == split)
    good = make(FEAR)
    found = load([make(name, label=label), good])
    assert {t["image_id"] for t in found.triplets} == {FEAR}
    assert found.report["problems"] == {"image is in val or test": {"count": 1, "examples": [name]}}
    everything = [make(image, label=label) for image, (label, _) in IMAGES.items()]
    held_out = {image for image, (_, part) in IMAGES.items() if part != "train"}
    assert not held_out & {t["image_id"] for t in load(everything).triplets}


@pytest.mark.parametrize(
    ("row", "reason", "example"),
    [
        (paper("train/fear/none.jpg"), "image not in the dataset", "row 2: none.jpg"),
        (paper("7.jpg"), "image name is ambiguous", "row 2: 7.jpg"),
        (paper("val/fear/fear_00013.jpg"), "image is in val or test", "val/fear/fear_00013.jpg"),
        (paper(AWE, label="Anger"), "label differs from the dataset's", f"{AWE}: Anger, here awe"),
        (paper(AWE, label=3), "label differs from the dataset's", f"{AWE}: , here awe"),
        (paper(AWE, "I'm sorry, I can't.", "awe"), "no section found", f"{AWE}: I'm sorry, I can't."),
        (paper(AWE, "", "awe"), "empty answer", AWE),
        (paper(AWE, None, "awe"), "empty answer", AWE),
        (paper(AWE, {"conversation": SEEN}, "awe"), "empty answer", AWE),
        (paper(AWE, f"Conversation:\n\nReasoning: {WHY}", "awe"), "empty answer", AWE),
        (paper(AWE, f"{GPT} It is an awesome sight.", "awe"), "reasoning names the emotion", f"{AWE}: awesome: {WHY}"),
        (7, "row is not an object", "row 2 (int)"),
        (None, "row is not an object", "row 2 (NoneType)"),
        (["/home/alice/x.jpg"], "row is not an object", "row 2 (list)"),
        ({"img": "awe_00001.jpg"}, "field missing: gpt_response", "row 2"),
        ({"gpt_response": GPT, "img": 5, "img_path": None}, "field missing: image or img_path", "row 2"),
        ({"gpt_response": GPT, "img": "./"}, "field missing: image or img_path", "row 2"),
        (paper(), "answered twice, the first kept", FEAR),
    ],
)
def test_every_problem_of_an_annotation_is_reported(load, row, reason, example):
    found = load([paper(), row])
    problem = found.report["problems"][reason]
    assert problem["count"] == 1
    assert problem["examples"][0][:60] == example[:60]
    assert set(counts(found)) == {reason}
    assert set(texts(found)) == set(KINDS)


@pytest.mark.parametrize(
    ("row", "reason", "example"),
    [
        (emovit(("Which emotion?", "Predict emotion: anger")), "label differs from the dataset's", "anger, here fear"),
        (
            emovit(("Which emotion?", "joy")),
            "label differs from the dataset's",
            "joy, here fear",
        ),  # of another taxonomy
        (emovit(("Why?", "")), "empty answer", "Why?"),
        (emovit(("Why?", None)), "empty answer", "Why?"),
        (emovit(("What is there?", "Another crowd.")), "answered twice, the first kept", "What is there?"),
        (emovit(("Why run?", "One is scared.")), "reasoning names the emotion", "scared: One is scared."),
        (emovit(), "conversation without answer", ""),
        ({**emovit(), "conversations": None}, "conversation without answer", ""),
        ({**emovit(), "conversations": [{"from": "human", "value": "Who?"}]}, "conversation without answer", "Who?"),
    ],
)
def test_every_problem_of_a_conversation_is_reported(load, row, reason, example):
    found = load([emovit(("What is there?", "A crowd.")), row])
    assert found.report["problems"] == {reason: {"count": 1, "examples": [f"{FEAR}: {example}".rstrip(": ")]}}
    assert texts(found) == {"categorical": "{'emotion': 'fear'}", "conversation": "A crowd."}


def test_a_wrong_categorical_section_is_not_used(load):
    found = load([paper(response=f"Categorical: {{'emotion': 'awe'}}\nConversation: {SEEN}\nReasoning: {WHY}")])
    assert texts(found)["categorical"] == "{'emotion': 'fear'}"
    assert counts(found) == {"label differs from the dataset's": 1}


def test_labels_may_be_written_otherwise(load):
    found = load([paper(label="Fear"), paper("train/sadness/9.jpg", label="sad")])
    assert found.report["images"] == 2


def test_the_report_is_short_and_shows_no_folder_of_this_machine(load):
    home = "/home/alice/images/FI/train/fear"
    error = f"Error: could not open {home}/1.jpg\nor C:\\Users\\alice\\2.jpg " + "x" * 500
    rows = [paper(), *[paper(AWE, error, "awe")] * 9, paper(f"{home}/99.jpg"), emovit(image=f"file://{home}/98.jpg")]
    rows += [{"gpt_response": GPT, "img_path": "D:\\alice\\97.jpg"}]
    report = load(rows).report
    dumped = json.dumps(report)
    assert "alice" not in dumped
    assert "home" not in dumped
    assert report["problems"]["no section found"]["count"] == 9
    assert len(report["problems"]["no section found"]["examples"]) == 5
    assert all(len(text) <= 120 for problem in report["problems"].values() for text in problem["examples"])


HOSTILE = [
    "<script>alert(1)</script>.jpg",
    'it\'s "quoted".jpg',
    "grün 図 🙂.jpg",
    "a b  c.jpg",
    "100%25.jpg",
    "[x](y).jpg",
]


def test_hostile_names_and_texts(load, tmp_path):
    samples = table({f"train/fear/{name}": ("fear", "train") for name in HOSTILE} | {"awe.jpg": ("awe", "train")})
    nasty = "Smoke\u2028over\x85a house \ud800 <image> <|im_end|><|vision_start|> <script>"
    rows = [emovit(("What?", nasty), image=f"/data/train/fear/{name}") for name in HOSTILE]
    found = load([*rows, emovit(("What?", ""), image="\ud800\u2028<b>.jpg")], samples)
    assert [t["image_id"] for t in found.triplets][::2] == [f"train/fear/{name}" for name in HOSTILE]
    assert {t["response"] for t in found.triplets[1::2]} == {"Smoke\nover\na house ?      <script>"}
    json.dumps(found.report, ensure_ascii=False).encode()
    path = tmp_path / "triplets.jsonl"
    path.write_text("".join(json.dumps(t, ensure_ascii=False) + "\n" for t in found.triplets), encoding="utf-8")
    assert len(read_triplets(path)) == 2 * len(HOSTILE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither format recognised; fields found: none"),
        (b"gpt_response: x", "not JSON (Expecting value: line 1 column 1"),
        (b'[{"gpt_response": "x"},', "not JSON"),
        (b'{"img": "a"}\n\n{"img": ', "line 3 is not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'[{"a": ' + b"9" * 5000 + b"}]", "not JSON"),
        ('[{"gpt_response": "Gr\xfcn"}]'.encode("latin-1"), "byte 21 is not UTF-8; save the file as UTF-8"),
        ('[{"img": "a"}]'.encode("utf-16"), "is not UTF-8"),
        (b'[{"image": "a", "text": "b"}]', "neither format recognised; fields found: 'image', 'text'; give rows with"),
        (
            b"[]",
            "fields found: none; give rows with gpt_response, img, img_path, label (EmoVLM-KD annotations) or id,",
        ),
        (b"3", "neither format recognised"),
        (b'{"a": [1], "b": 2}', "neither format recognised"),
        (b'[{"gpt_response": "x", "img": "no.jpg"}]', "first problem: image not in the dataset (row 1: no.jpg); take"),
        (b'[{"conversations": [], "image": "fear_00012.jpg"}]', "first problem: conversation without answer"),
        (b'[{"conversations": [{"from": "human"}], "image": "fear_00012.jpg"}]', "conversation without answer"),
        (b'[{"gpt_response": "Categorical: x y", "img": "fear_00012.jpg"}]', "first problem: no section found"),
    ],
)
def test_errors_name_file_fault_and_remedy(load, content, message):
    with pytest.raises(EmonbError) as caught:
        load(content, name="odd name.json")
    assert message in str(caught.value)
    assert "odd name.json: " in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(EmonbError, match=r"none\.json: cannot be read \(No such file.*give the path"):
        import_triplets(Path("none.json"), table(), LABELS)
    with pytest.raises(EmonbError, match="cannot be read"):
        import_triplets(tmp_path, table(), LABELS)


def test_two_classes(load):
    samples = table({"1.jpg": ("negative", "train"), "2.jpg": ("positive", "train")})
    labels = TAXONOMIES["sentiment2"].labels
    found = load([emovit(("Which?", "Negative."), ("What?", "Rain."), image="1.jpg")], samples, labels=labels)
    assert texts(found, "1.jpg") == {"categorical": "{'emotion': 'negative'}", "conversation": "Rain."}
    assert found.triplets[0]["instruction"] == categorical_instruction(labels)
    assert found.report["train_images_without"] == 1


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_names = st.sampled_from([*IMAGES, "7.jpg", "", "/", "file://", "fear_00012", "..\\"]) | _scalars
_said = st.sampled_from([GPT, "Reasoning: x", "fear", "Q: a A: b", "{", '{"reasoning": 1}', "", "```"]) | _scalars
_speakers = st.sampled_from(["human", "gpt", "GPT", "system"]) | _scalars
_odd = st.recursive(
    _scalars | _said,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_turn = st.fixed_dictionaries({}, optional={"from": _speakers | _odd, "value": _said | _odd})
_row = st.fixed_dictionaries(
    {},
    optional={
        "gpt_response": _said | _odd,
        "conversations": st.lists(_turn | _odd, max_size=5) | _odd,
        "image_id": _names | _odd,
        "img_path": _names | _odd,
        "img": _names | _odd,
        "image": _names | _odd,
        "label": st.sampled_from(LABELS) | _odd,
        "model": _odd,
    },
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(_row | _odd, max_size=6) | _odd)
def test_any_json_gives_a_report_or_an_error(tmp_path, rows):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    try:
        found = import_triplets(path, table(), LABELS)
    except EmonbError:
        return
    json.dumps(found.report, ensure_ascii=False).encode()
    splits = {image: split for image, (_, split) in IMAGES.items()}
    keys = [(t["image_id"], t["kind"]) for t in found.triplets]
    assert keys == sorted(set(keys), key=lambda key: (list(IMAGES).index(key[0]), KINDS.index(key[1])))
    for triplet in found.triplets:
        validate_triplet(triplet, "here")
        assert splits[triplet["image_id"]] == "train"
    assert found.report["images"] == len({image for image, _ in keys}) > 0
    assert found.report["triplets"] == {kind: sum(k == kind for _, k in keys) for kind in KINDS}


@pytest.mark.parametrize("make", [paper, lambda name, **more: emovit(("Why?", WHY), ("What?", SEEN), image=name)])
def test_twenty_thousand_rows_take_seconds(load, make):
    images = {f"train/fear/fear_{i:05}.jpg": ("fear", "train") for i in range(20_000)}
    rows, samples = [make(image, label="fear") for image in images], table(images)
    start = time.process_time()  # not the wall clock: other tests may run beside
    assert load(rows, samples).report["triplets"] == dict.fromkeys(KINDS, 20_000)
    assert time.process_time() - start < 5


def test_twenty_thousand_rows_of_one_image_take_seconds(load):
    start = time.process_time()
    found = load([emovit((f"What is {i}?", f"Thing {i}.")) for i in range(20_000)] * 2)
    assert len(found.triplets) == 2
    assert counts(found) == {"answered twice, the first kept": 20_000}
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "text",
    [
        "Question:" * 20_000,
        "q: " * 30_000,
        "a" + " " * 50_000 + ":",
        "emotion " * 20_000,
        "{" * 50_000,
        "/a" * 50_000,
        "<|" * 50_000,
    ],
)
def test_no_text_takes_minutes(load, text):
    rows = [paper(response=f"Conversation: {text}\nReasoning: {WHY}"), paper(AWE, text, "awe")]
    start = time.process_time()
    load(rows)
    load([emovit(("What?", text), (text, "Smoke.")), emovit(("Which?", text), image="a/" * 50_000)])
    assert time.process_time() - start < 5
