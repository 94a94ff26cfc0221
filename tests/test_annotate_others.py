"""Room 02: triplets from the authors' annotation JSON and from EmoVIT's conversations."""

from __future__ import annotations

import hashlib
import json
import time

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emonb.annotate.others import import_triplets
from emonb.data import TAXONOMIES, question
from emonb.errors import EmonbError
from emonb.settings import TripletSettings
from emonb.triplets import FIELDS, KINDS, read_triplets

LABELS = TAXONOMIES["mikels8"].labels
IMAGES = {  # image -> label, split
    "train/fear/fear_00012.jpg": ("fear", "train"),
    "train/awe/awe_00001.jpg": ("awe", "train"),
    "train/awe/7.jpg": ("awe", "train"),
    "train/fear/7.jpg": ("fear", "train"),
    "val/fear/fear_00013.jpg": ("fear", "val"),
}
FEAR, AWE = "train/fear/fear_00012.jpg", "train/awe/awe_00001.jpg"
UNKNOWN = "image not in the dataset, or its name is ambiguous"
SEEN = "The dark sky serves as a dramatic background. A crowd holds tools."
WHY = "The silhouettes against the dark sky suggest a threat that comes closer."
GPT = f"1. key elements \n{SEEN}\n\n2. reasoning\n{WHY}"
BOTH = {"categorical": "{'emotion': 'fear'}", "conversation": SEEN, "reasoning": WHY}


def table(images=IMAGES):
    rows = [(image, *about, hashlib.sha256(image.encode()).hexdigest()) for image, about in images.items()]
    return pd.DataFrame(rows, columns=["image_id", "label", "split", "sha256"])


@pytest.fixture
def load(tmp_path):
    """Imports rows (or raw bytes) as a file would be; returns the triplets' table and the report."""

    def run(content, samples=None, fresh=True):
        file, path = tmp_path / "odd name.json", tmp_path / "triplets" / "small.jsonl"
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        if fresh:
            path.unlink(missing_ok=True)
        report = import_triplets(file, table() if samples is None else samples, LABELS, path, TripletSettings())
        assert json.loads(path.with_name("small.import.json").read_text()) == report
        return read_triplets(path), report

    return run


def paper(name=FEAR, response=GPT, label="fear", **more):
    path = f"images/FI/{name}"
    return {"gpt_response": response, "img": path.split("/")[-1], "img_path": path, "label": label, **more}


def emovit(*turns, image="fear_00012.jpg"):
    said = [{"from": who, "value": text} for q, a in turns for who, text in (("human", q), ("gpt", a))]
    return {"id": "00012", "image": image, "conversations": said}


def texts(frame, image=FEAR):
    rows = frame[frame["image_id"] == image]
    return dict(zip(rows["kind"], rows["response"], strict=True))


def test_the_authors_annotations(load, tmp_path):
    rows = [paper(AWE, label="awe"), paper(model="gpt-4")]
    frame, report = load("\ufeff".encode() + json.dumps(rows).encode())
    assert list(frame["image_id"]) == [FEAR] * 3 + [AWE] * 3  # in the samples' order
    assert texts(frame) == BOTH
    assert list(frame["kind"]) == [*KINDS] * 2
    assert frame["instruction"][0] == question(LABELS)
    assert list(frame["model"]) == ["gpt-4"] * 3 + ["unknown"] * 3
    assert frame[["created", "prompt_sha256", "usage"]].isna().all(axis=None)
    line = json.loads((tmp_path / "triplets" / "small.jsonl").read_text().splitlines()[0])
    assert set(line) == {*FIELDS, "imported_from", "import_sha256"}
    assert line["import_sha256"] == hashlib.sha256((tmp_path / "odd name.json").read_bytes()).hexdigest()
    assert (line["source"], line["imported_from"]) == ("imported", "odd name.json")
    assert report == {"file": "odd name.json", "rows": 2, "images": 2, "images_added": 2, "problems": {}}
    more = [paper(response=GPT.replace("dark", "red")), paper(AWE, label="awe"), paper("train/fear/7.jpg")]
    frame, report = load(more, fresh=False)
    assert (report["images"], report["images_added"]) == (3, 1)
    assert texts(frame) == BOTH  # what is there is left as it is


def test_emovit_conversations(load):
    rows = [
        emovit(("What is there?\n<image>", "A crowd."), ("<image>\nWhy would one run?", "Tools are raised.")),
        emovit(("Which emotion?", "Predict emotion: fear"), ("Which?", "fear")),
        emovit(("Explain the colours.", "Dark, as at night."), ("Where are they?", "Under the sky.")),
        emovit(("What?", "Smoke rises."), ("What?", "Fire burns."), ("Why?", ""), image=AWE),
        7,
    ]
    frame, report = load(rows)
    asked = frame.set_index(["image_id", "kind"])["instruction"]
    assert texts(frame)["conversation"] == "A crowd. Predict emotion: fear Under the sky."
    assert texts(frame)["reasoning"] == "Tools are raised. Dark, as at night."
    assert asked[FEAR, "reasoning"] == "Why would one run? Explain the colours."
    assert texts(frame, AWE) == {"categorical": "{'emotion': 'awe'}", "conversation": "Smoke rises."}
    assert report["problems"] == {UNKNOWN: {"count": 1, "examples": ["row 5: "]}}


def test_names_that_mean_one_image_and_others_that_are_not_guessed(load):
    windows = "C:\\FI\\train\\fear\\fear_00012.jpg"
    for name in (FEAR, f"./{FEAR}", f"/home/alice/data/{FEAR}", windows, "fear_00012.jpg"):
        frame = load([emovit(("What?", "Smoke rises."), image=name)])[0]
        assert texts(frame)["conversation"] == "Smoke rises.", name
    for name in ("7.jpg", "elsewhere/7.jpg", "fear_00012", "fear_00012.png", "12.jpg"):
        report = load([emovit(("What?", "Smoke rises.")), emovit(("What?", "Fog."), image=name)])[1]
        assert report["problems"] == {UNKNOWN: {"count": 1, "examples": [f"row 2: {name.split('/')[-1]}"]}}


PROBLEMS = [
    (paper("val/fear/fear_00013.jpg"), "image is in val or test", "val/fear/fear_00013.jpg"),
    (paper(AWE, label="Anger"), "label differs from the dataset's", AWE),
    (paper(AWE, label=3), "label differs from the dataset's", AWE),
    (paper(AWE, "I'm sorry, I can't.", "awe"), "no text found", AWE),
    (paper(AWE, None, "awe"), "no text found", AWE),
    (paper(AWE, f"{GPT} It is an awesome sight.", "awe"), "reasoning names the emotion", AWE),
    ({"gpt_response": GPT, "img": 5, "img_path": None}, UNKNOWN, ""),
    ({"img": "awe_00001.jpg"}, "no text found", AWE),
]


def test_every_problem_is_reported(load):
    for row, reason, example in PROBLEMS:
        frame, report = load([paper(), row])
        assert report["problems"] == {reason: {"count": 1, "examples": [f"row 2: {example}"]}}
        assert texts(frame) == BOTH


def test_a_line_of_json_ends_at_line_feeds_alone(load):
    lines = [json.dumps(paper(name, f"{GPT}\u2028\x85", IMAGES[name][0]), ensure_ascii=False) for name in (FEAR, AWE)]
    for data in ("\n".join(lines).encode(), "\r\n".join(lines).encode("utf-16")):
        assert set(load(data)[0]["image_id"]) == {FEAR, AWE}


def test_the_report_shows_no_folder_of_this_machine_and_hostile_names_are_data(load):
    hostile = ["<b>.jpg", 'it\'s "x".jpg', "grün 図 🙂.jpg", "\x1b[2J\u202e.jpg"]
    samples = table(IMAGES | {f"train/fear/{name}": ("fear", "train") for name in hostile})
    rows = [paper(f"train/fear/{name}") for name in hostile]
    rows += [paper(f"/home/alice/images/FI/\x1b[2J{i}.jpg") for i in range(9)]
    frame, report = load(rows, samples)
    found = report["problems"].popitem()[1]
    assert (len(found["examples"]), found["count"]) == (5, 9)
    assert found["examples"][0] == r"row 5: \x1b[2J0.jpg"
    assert set(frame["image_id"]) == {f"train/fear/{name}" for name in hostile}
    frame = load([emovit(("What?", "Smoke\u2028over a house \ud800 <image> <|im_end|><|vision_start|> <b>"))])[0]
    assert texts(frame)["conversation"] == "Smoke over a house ? <b>"


MISTAKES = [
    (b"", "cannot be read as JSON"),
    (b"[" * 100_000, "cannot be read as JSON"),
    ('[{"gpt_response": "Gr\xfcn"}]'.encode("latin-1"), "in UTF-8"),
    (b'{"img": "a"}', "it is no list of rows; give rows with gpt_response"),
    (b'[{"gpt_response": "x", "img": "no.jpg"}]', "nothing to import: image not in the dataset"),
    (b'[{"conversations": [], "image": "fear_00012.jpg"}]', "no text found .row 1: train/fear/fear_00012.jpg"),
]


def test_errors_name_file_fault_and_remedy(load):
    for content, message in MISTAKES:
        with pytest.raises(EmonbError, match=f"odd name.json: .*{message}"):
            load(content)


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_said = st.sampled_from([GPT, "Reasoning: x y", "fear", "{", "", "```", *IMAGES, "7.jpg", "/", "..\\"]) | _scalars
_more = lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)  # noqa: E731
_odd = st.recursive(_said, _more)
_turn = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", 3]), "value": _odd}) | _odd
_fields = dict.fromkeys(("gpt_response", "image_id", "img_path", "img", "image", "label", "model"), _odd)
_row = st.fixed_dictionaries({}, optional={**_fields, "conversations": st.lists(_turn, max_size=4) | _odd})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(_row | _odd, max_size=5) | _odd)
def test_any_json_gives_triplets_of_train_or_an_error(load, rows):
    try:
        frame, report = load(rows)
    except EmonbError:
        return
    assert {IMAGES[image][1] for image in frame["image_id"]} == {"train"}
    assert report["images"] == frame["image_id"].nunique() > 0


def test_no_text_takes_minutes(load):
    images = {f"train/fear/fear_{i:05}.jpg": ("fear", "train") for i in range(2000)}
    start = time.process_time()  # not the wall clock: other tests may run beside
    for text in ("Question:" * 20_000, "a" + " " * 50_000 + ":", "{" * 50_000, "/a" * 50_000):
        load([paper(response=f"Conversation: {text}\nReasoning: {WHY}"), paper(AWE, text, "awe")])
        load([emovit(("What?", text), (text, "Smoke rises.")), paper("a/" * 50_000)])
    load([paper(image) for image in images], table(images))
    assert time.process_time() - start < 10
