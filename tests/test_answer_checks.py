"""Room 02: the checks that an answer must pass."""

from __future__ import annotations

import random
import time

import pytest

from emonb.answer_checks import REASONS, NearDuplicates, check_reply, check_texts, names_emotion
from emonb.emotions import TAXONOMIES, WORD_FORMS
from emonb.settings import TripletSettings

TERMS = TripletSettings()
FINE = "A narrow street lies in the dark and nobody else can be seen there."

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


@pytest.mark.parametrize("label", NAMED)
def test_any_form_of_the_emotion_is_found(label):
    for text in (label, *WORD_FORMS.get(label, ()), *NAMED[label]):
        assert names_emotion(f"It looks {text} here.", label), text


@pytest.mark.parametrize("label", NOT_NAMED)
def test_other_words_are_not_taken_for_the_emotion(label):
    assert names_emotion(NOT_NAMED[label], label) is None


def test_every_label_of_every_taxonomy_has_forms():
    assert set(NAMED) == {label for taxonomy in TAXONOMIES.values() for label in taxonomy.labels}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (("", "stop", None), "empty"),
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
        (("I can't help but smile at the puppy.", "stop", None), None),
        (("I cannot see any faces, yet the light is warm.", "stop", None), None),
        (("Sorry-looking houses line a street.", "stop", None), None),
        (("I am afraid of nothing more than this cliff.", "stop", None), None),
        (("Sorry, no.", "stop", None), "refused"),
        (("I see a street.", "stop", None), None),
    ],
)
def test_replies(reply, reason):
    found = check_reply(*reply)
    assert (found and found[0]) == reason


@pytest.mark.parametrize(
    ("conversation", "reasoning", "reason"),
    [
        (FINE, FINE, None),
        (FINE, " ", "empty"),
        (FINE, FINE + " It is frightening.", "names the emotion"),
        (FINE + " It is frightening.", FINE, None),  # the conversation may say it
        (FINE, "Too dark.", "too short"),
        (FINE, FINE * 30, "too long"),
        ("I'm unable to describe people in pictures like this one at all.", FINE, "refused"),
    ],
)
def test_texts(conversation, reasoning, reason):
    found = check_texts(conversation, reasoning, "fear", TERMS)
    assert (found and found[0]) == reason
    assert reason is None or reason in REASONS


def sentence(rng, n=60):
    return [rng.choice(WORDS) for _ in range(n)]


WORDS = [f"word{i}" for i in range(300)]


def jaccard(a, b):
    one, two = ({tuple(t[i : i + 3]) for i in range(len(t) - 2)} for t in (a, b))
    return len(one & two) / len(one | two)


def test_near_duplicates_estimate_the_jaccard_similarity():
    rng = random.Random(0)
    for changed in (0, 1, 2, 5, 20):
        first = sentence(rng)
        second = list(first)
        for i in rng.sample(range(len(first)), changed):
            second[i] = "other"
        seen = NearDuplicates()
        seen.add("first", seen.signature(" ".join(first)))
        found = seen.find(seen.signature(" ".join(second)), 0.05)
        exact = jaccard(first, second)
        assert abs((found[1] if found else 0) - exact) < 0.2, (changed, exact)


def test_the_most_similar_text_is_found_among_many_and_quickly():
    rng = random.Random(1)
    seen, texts = NearDuplicates(), [sentence(rng) for _ in range(3000)]
    for i, text in enumerate(texts):
        seen.add(f"image {i}", seen.signature(" ".join(text)))
    start = time.perf_counter()
    for i in range(0, 3000, 30):
        assert seen.find(seen.signature(" ".join(texts[i]) + " more"), 0.8)[0] == f"image {i}"
        assert seen.find(seen.signature(" ".join(sentence(rng))), 0.5) is None
    assert (time.perf_counter() - start) / 200 < 0.01
    assert len(seen) == 3000


def test_case_and_punctuation_do_not_make_a_text_new():
    seen = NearDuplicates()
    seen.add("a", seen.signature("A dark street. Nobody is there."))
    assert seen.find(seen.signature("a DARK street - nobody is there"), 1.0) == ("a", 1.0)
