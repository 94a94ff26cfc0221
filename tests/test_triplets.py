"""Room 02: the offline annotator, the checks of an answer, the triplets file."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pandas as pd
import pytest

from emonb import triplets as room
from emonb.data import TAXONOMIES, WORD_FORMS, question
from emonb.errors import EmonbError
from emonb.triplets import FIELDS, KINDS, NearDuplicates, check_reply, check_texts, names_emotion

ROW = {"image_id": "a.png", "sha256": "0" * 64, "brightness": 0.2, "colorfulness": 0.6, "label": "fear"}
LABELS = TAXONOMIES["mikels8"].labels
FINE = "A narrow street lies in the dark and nobody else can be seen there."


def texts(**fields):
    labels = next(t.labels for t in TAXONOMIES.values() if fields.get("label", "fear") in t.labels)
    return {t["kind"]: t["response"] for t in room.offline_triplets({**ROW, **fields}, labels)}


def test_three_kinds_from_a_scene_description():
    made = room.offline_triplets({**ROW, "objects": ["skull", "umbrella"], "scene": "dark blue with rain"}, LABELS)
    assert [tuple(t) for t in made] == [FIELDS] * 3
    assert [t["kind"] for t in made] == list(KINDS)
    assert {t["source"] for t in made} == {"offline"}
    assert (made[0]["instruction"], made[0]["response"]) == (question(LABELS), "{'emotion': 'fear'}")
    assert made[1]["response"] == (
        "The image shows a skull and an umbrella. The background is dark blue with rain. "
        "The picture is dark and vivid."
    )
    other = room.offline_triplets({**ROW, "sha256": "00000001" + "0" * 56}, LABELS)
    assert made[1]["instruction"] != other[1]["instruction"]  # the wording varies with the picture


def test_captions_or_measurements_serve_where_nothing_is_described():
    assert "The picture is about fight, rage." in texts(caption="fight, rage")["conversation"]
    assert texts(objects=None, scene=float("nan"), caption="")["conversation"] == "The picture is dark and vivid."
    got = texts(objects=np.array(["dog"]), scene="at {rest}", caption="ignored")
    assert got["conversation"] == "The image shows a dog. The background is at {rest}. The picture is dark and vivid."


@pytest.mark.parametrize(
    ("label", "caption"), [("fear", "a scary clown"), ("dark", "a hill"), ("dark", "a dark hill")]
)
def test_a_reasoning_leaves_out_what_names_the_emotion(label, caption):
    row = {**ROW, "label": label, "caption": caption, "objects": None, "scene": None}
    *_, reasoning = room.offline_triplets(row, ["fear", "dark"])
    assert not room.names_emotion(reasoning["response"], label)
    assert len(reasoning["response"].split()) > 5


def test_the_reasoning_follows_from_what_is_in_the_picture():
    def why(label, *objects, scene="dim grey with web"):
        return texts(label=label, objects=list(objects), scene=scene)["reasoning"]

    assert "a skull" in (said := why("fear", "skull", "anchor", "cup"))
    assert "dim grey with web" in said
    assert not {"anchor", "cup"} & set(re.findall(r"\w+", said))
    assert "a cup" in (said := why("contentment", "skull", "anchor", "cup"))
    assert "skull" not in said
    assert "nothing in the background" in said
    assert "nothing in the objects" in why("anger", "skull", "anchor")
    assert "nothing in the background" in why("fear", "skull", scene="dim grey")
    photo = texts(label="fear", objects=["skull", "dog"], scene="at {rest}")["reasoning"]  # dog: not in the lexicon
    assert all(part in photo for part in ("a skull and a dog", "at {rest}", "dark and vivid"))


NAMED = {
    "amusement": ["amusing", "It amuses.", "amusedly"],
    "anger": ["angry", "angrily", "ANGER", "angering", "'anger'"],
    "awe": ["awe-inspiring", "awesome", "awestruck", "in awe."],
    "contentment": ["contentment", "contentedly", "they look content and calm", "a content face"],
    "disgust": ["disgustingly", "disgusts", "disgusted"],
    "excitement": ["exciting", "excitedly", "excites", "excitable"],
    "fear": ["fearful", "fears", "fearfully", "afraid", "scared", "scary", "frightened"],
    "sadness": ["sad", "sadly", "saddening", "a sadder place"],
    "joy": ["joyous", "joyfully", "enjoyable", "joys", "overjoyed", "rejoicing"],
    "surprise": ["surprisingly", "surprises", "surprised"],
    "positive": ["positively", "positivity"],
    "negative": ["negativity", "negatively"],
}
NOT_NAMED = {
    "anger": "a ranger with a hanger at an angle",
    "awe": "a lawyer saw the away team",
    "contentment": "the content of the picture, its content",
    "fear": "a feather and a scarf lie far off, a scarecrow stands",
    "sadness": "a saddle and a crusade",
    "joy": "a loyal boy",
    "excitement": "the exit",
    "amusement": "a muse",
    "positive": "a composition in position",
    "negative": "the negative space around a scarecrow",
}


def test_any_form_of_the_emotion_is_found_and_no_other_word():
    assert set(NAMED) == {label for taxonomy in TAXONOMIES.values() for label in taxonomy.labels}
    for label, forms in NAMED.items():
        for form in (label, *WORD_FORMS.get(label, ()), *forms):
            assert names_emotion(f"It looks {form} here.", label), form
        assert names_emotion(texts(label=label, objects=["heart"], scene="warm red")["reasoning"], label) is None
    for label, text in NOT_NAMED.items():
        assert names_emotion(text, label) is None, text


REPLIES = [
    (("  \n", "stop", None), "empty"),
    (("half a sen", "length", None), "cut off"),
    (("x", "content_filter", None), "refused"),
    (("", "stop", "I can't help with that."), "refused"),
    (("I'm sorry, but I cannot help.", "stop", None), "refused"),
    (("I can’t assist with this.", "stop", None), "refused"),
    (("I’m really sorry, but I can’t help with identifying people.", "stop", None), "refused"),
    (("Unfortunately, I cannot provide that.", "stop", None), "refused"),
    (("As an AI, I can't view pictures.", "stop", None), "refused"),
    (("I am unable to describe this.", "stop", None), "refused"),
    (("Sorry, no.", "stop", None), "refused"),
    (("I can't help but smile at the puppy.", "stop", None), None),
    (("I cannot see any faces, yet the light is warm.", "stop", None), None),
    (("Sorry-looking houses line a street.", "stop", None), None),
    (("I am afraid of nothing more than this cliff.", "stop", None), None),
]
TEXTS = [
    ((FINE, FINE), None),
    ((FINE, " "), "empty"),
    ((FINE, FINE + " It is frightening."), "names the emotion"),
    ((FINE + " It is frightening.", FINE), None),  # the conversation may say it
    ((FINE, "Too dark."), "too short"),
    ((FINE, FINE * 30), "too long"),
    (("I'm unable to describe people in pictures like this one at all.", FINE), "refused"),
]


def test_what_is_wrong_with_an_answer_is_said():
    assert [(found := check_reply(*reply)) and found[0] for reply, _ in REPLIES] == [reason for _, reason in REPLIES]
    assert [(found := check_texts(*both, "fear")) and found[0] for both, _ in TEXTS] == [reason for _, reason in TEXTS]
    assert {reason for _, reason in REPLIES + TEXTS} <= {None, *room.REASONS}


@pytest.mark.parametrize("at_least", [0.3, 0.8, 1.0])
def test_near_duplicates_are_exact(at_least):
    rng, seen, known = random.Random(0), NearDuplicates(at_least), {}
    assert seen.find("nothing yet") is None
    for number in range(120):
        text = [f"word{rng.randrange(300)}" for _ in range(60)] if number < 40 else list(known[f"{number % 40}"][0])
        for place in rng.sample(range(60), rng.randrange(15)):
            text[place] = "other"
        mine = {tuple(text[i : i + 3]) for i in range(58)}
        alike = {name: len(mine & other) / len(mine | other) for name, (_, other) in known.items()}
        found = seen.find(" ".join(text))
        assert found is None if max(alike.values(), default=0) < at_least else found[1] == alike[found[0]] >= at_least
        known[f"{number}"] = text, mine
        seen.add(f"{number}", " ".join(text))
    seen.add("a", "A dark street. Nobody is there.")
    assert seen.find("a DARK street - nobody is there") == ("a", 1.0)


def test_rates_of_a_table():
    reasonings = {"a": FINE, "b": "It is frightening, and dark as well, and nobody comes by.", "c": FINE, "d": "Dark."}
    rows = [(i, kind, text) for i, text in reasonings.items() for kind in KINDS[1:]]
    table = pd.DataFrame(rows, columns=["image_id", "kind", "response"])
    labels = pd.Series("fear", index=list(reasonings))
    rates = room.check_rates(table, labels)
    assert rates[rates > 0].to_dict() == {"images": 4, "names the emotion": 1, "near-duplicate": 1, "too short": 1}
    assert room.check_rates(table, labels, min_words=1, near_duplicate=1.0)["too short"] == 0


def test_read_back_and_bad_lines(tmp_path):
    good = room.offline_triplets(ROW, LABELS)
    path = tmp_path / "t.jsonl"
    path.write_text("".join(map(room.triplet_line, good)) + '{"image_id": "torn')  # its writer is at work
    assert list(room.read_triplets(path).columns) == list(FIELDS)
    assert len(room.read_triplets(path)) == 3
    without = {k: v for k, v in good[1].items() if k != "response"}
    bad = {
        "bad.jsonl, line 2: not JSON": [good[0], '{"image_id": "b'],
        "line 1: holds '[1]', where one object a line belongs": ["[1]"],
        "line 2: field 'response' missing": [good[0], without],
        "field 'kind' is 'poem'": [{**good[0], "kind": "poem"}],
        "field 'response' is empty": [{**good[0], "response": " "}],
        "occurs twice": [good[0], good[0]],
    }
    for message, rows in bad.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
        with pytest.raises(EmonbError) as caught:
            room.read_triplets(tmp_path / "bad.jsonl")
        assert message in str(caught.value)


def test_who_wrote_them_and_what_was_rejected(tmp_path):
    folder = tmp_path / "triplets"
    folder.mkdir()
    offline = room.offline_triplets(ROW, LABELS)
    paid = [{**t, "image_id": "p", "source": "openai", "model": 'gpt "x"'} for t in offline]
    theirs = [{**t, "image_id": "q", "source": "imported"} for t in offline]
    for name, triplets in {"one": offline, "two": [*paid, *theirs], "odd": ["x"]}.items():
        (folder / f"{name}.jsonl").write_text("".join(map(room.triplet_line, triplets)))
    (folder / "two.rejected.jsonl").write_text('{"image_id": "r", "reason": "refused", "detail": null}\n')
    assert room.triplet_sources(tmp_path) == {
        "one": "offline annotator, no paid model",
        "two": 'a paid model (gpt "x"): 1 images, somebody else\'s file: 1 images',
        "odd": "unknown",
    }
    assert room.source_note(tmp_path, ["one", "none"]) == "triplets of one: offline annotator, no paid model"
    assert [room.has_paid_answers(folder / f"{name}.jsonl") for name in ("one", "two", "none")] == [False, True, False]
    rejected = [{"image_id": "r", "reason": "refused", "detail": "", "text": ""}]
    assert room.rejected_answers(folder / "two.jsonl").to_dict("records") == rejected
    rates = room.rejection_rates(tmp_path, ["one", "two"])
    assert rates.to_dict("records") == [{"dataset": "two", "accepted": 1, "refused": 1}]
    assert room.rejection_rates(tmp_path, ["one"]).empty
