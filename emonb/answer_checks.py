"""Room 02: is a written answer fit to teach from? Each check gives one plain reason, or none.

The checks and their bounds are ours; that the reasoning must not name the emotion is the paper's
(section on instruction tuning).
"""

from __future__ import annotations

import re
import zlib

import numpy as np

from emonb.emotions import WORD_FORMS
from emonb.settings import TripletSettings

__all__ = ["REASONS", "NearDuplicates", "check_reply", "check_texts", "names_emotion"]

# Reasons as they stand in rejected.jsonl and in the notebook's table, in the order of checking.
REASONS = (
    "refused",
    "cut off",
    "empty",
    "not in the asked form",
    "names the emotion",
    "too short",
    "too long",
    "near-duplicate",
    "no answer",
)

# Inflections and derivations of the labels; with WORD_FORMS these are what "naming the emotion" means.
_STEMS = {
    "amusement": r"amus(?!ement park)\w*",
    "anger": r"ang(?:er|r)\w*",
    "awe": r"awe\w*|awing",
    "contentment": r"contentment|contented\w*",
    "disgust": r"disgust\w*",
    "excitement": r"excit\w*",
    "fear": r"fear\w*|scar(?:ed|es|ing|y|ier|iest)|fright\w*",
    "sadness": r"sad(?:ly|der|dest|den\w*|ness)?",
    "joy": r"(?:over)?joy\w*|enjoy\w*|rejoic\w*",
    "surprise": r"surpris\w*",
    "positive": r"positiv\w*+(?! space)",
    "negative": r"negativ\w*+(?! space)",
}
# "content" is also a noun ("the content of the image"): only the adjective names the emotion.
_CONTENT = (
    r"(?:(?:feel|look|seem|appear)\w*|is|are|was|were|be|being|so|very|quite|deeply|quietly|truly|more|and|a) content"
    r"(?! of\b| creator)"
)
# An apology alone is no refusal ("sorry-looking houses"), nor is what cannot be seen ("I cannot see any faces").
_REFUSAL = re.compile(
    r"^\W*(?:unfortunately\W+|as an ai\b[^.]{0,40}?\W+)?"
    r"(?:sorry\W+(?:but|i\b|no\b)|(?:i'm|i am) (?:\w+ ){0,2}(?:sorry\b(?!-)|afraid (?:but|that|i)\b)"
    r"|(?:i'm|i am|i) (?:\w+ )?(?:unable|not able|can't|cannot|can not|won't|do not have the ability)\b.{0,40}?"
    r"\b(?:help|assist|comply|provide|identify|view|process|describe|analy[sz]e|answer)\b(?! but))",
    re.IGNORECASE | re.DOTALL,
)
_PERMUTATIONS = 64


def names_emotion(text: str, label: str) -> str | None:
    """The first word of a text that is a form of the label ("fearfully" for fear), or None."""
    forms = [_STEMS.get(label, re.escape(label))]
    forms += [re.escape(form) for form in WORD_FORMS.get(label, ()) if form != "content"]
    if label == "contentment":
        forms.append(_CONTENT)
    found = re.search(rf"(?<!\w)(?:{'|'.join(forms)})(?!\w)", text.lower().replace("’", "'"))
    return found.group(0) if found else None


def is_refusal(text: str) -> bool:
    """Whether a text begins as a model does that will not answer."""
    return bool(_REFUSAL.search(text.replace("’", "'").strip()))


def check_reply(text: str, finish_reason: str | None, refusal: str | None) -> tuple[str, str] | None:
    """What can be said before the answer is read: (reason, detail), or None."""
    if refusal or finish_reason == "content_filter":
        return "refused", refusal or "the server's content filter"
    if finish_reason == "length":
        return "cut off", "the answer reached triplets.max_output_tokens"
    if not text.strip():
        return "empty", ""
    if is_refusal(text):
        return "refused", text.strip()[:120]
    return None


def check_texts(conversation: str, reasoning: str, label: str, settings: TripletSettings) -> tuple[str, str] | None:
    """(reason, detail) why the two texts cannot be used, or None."""
    texts = {"conversation": conversation, "reasoning": reasoning}
    for name, text in texts.items():
        if not text.strip():
            return "empty", name
        if is_refusal(text):
            return "refused", text.strip()[:120]
    word = names_emotion(reasoning, label)
    if word:
        return "names the emotion", word
    for name, text in texts.items():
        words = len(text.split())
        if words < settings.min_words:
            return "too short", f"{name}: {words} words"
        if words > settings.max_words:
            return "too long", f"{name}: {words} words"
    return None


class NearDuplicates:
    """Texts seen so far, as MinHash signatures of 128 bytes: the Jaccard similarity of three-word sequences.

    Broder (1997); 64 permutations estimate a similarity of 0.8 with a standard error of 0.05. Eight of them
    alone pick the candidates, so that 100,000 texts are searched in about three milliseconds.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._a = rng.integers(0, 2**31, _PERMUTATIONS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        self._b = rng.integers(0, 2**32, _PERMUTATIONS, dtype=np.uint32)
        self._first = np.zeros((256, 8), np.uint16)
        self._rest = np.zeros((256, _PERMUTATIONS - 8), np.uint16)
        self._ids: list[str] = []

    def __len__(self) -> int:
        return len(self._ids)

    def signature(self, text: str) -> np.ndarray:
        """MinHash signature of a text, (64,) uint16."""
        words = re.findall(r"\w+", text.lower()) or [""]
        triples = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        hashes = np.array([zlib.crc32(t.encode()) for t in triples], np.uint32)
        return ((hashes[:, None] * self._a + self._b).min(axis=0) >> np.uint32(16)).astype(np.uint16)

    def find(self, signature: np.ndarray, at_least: float) -> tuple[str, float] | None:
        """The most similar text's id and its similarity, if it is at least so similar."""
        n = len(self._ids)
        if not n:
            return None
        quick = (self._first[:n] == signature[:8]).sum(axis=1)
        rows = np.flatnonzero(quick >= max(1, int(8 * at_least) - 2))  # misses one in a hundred at a similarity of 0.8
        if not len(rows):
            return None
        same = quick[rows] + (self._rest[rows] == signature[8:]).sum(axis=1)
        best = int(same.argmax())
        similarity = float(same[best]) / _PERMUTATIONS
        return (self._ids[rows[best]], similarity) if similarity >= at_least else None

    def add(self, image_id: str, signature: np.ndarray) -> None:
        """Remember a text under its image's id."""
        n = len(self._ids)
        if n == len(self._first):
            self._first = np.concatenate([self._first, np.zeros_like(self._first)])
            self._rest = np.concatenate([self._rest, np.zeros_like(self._rest)])
        self._first[n], self._rest[n] = signature[:8], signature[8:]
        self._ids.append(image_id)
