"""Emotion taxonomies: the one place that fixes the order of the classes.

The authors' code takes the class order from the directory listing, so that label indices of
teacher, student and gate can disagree; here each artefact stores its labels and is checked on load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from emonb.errors import EmonbError

__all__ = [
    "TAXONOMIES",
    "WORD_FORMS",
    "Taxonomy",
    "check_labels",
    "infer_taxonomy",
    "parse_emotion",
    "taxonomy_for_dataset",
]


@dataclass(frozen=True)
class Taxonomy:
    """An emotion model: a name and its labels in their fixed order."""

    name: str
    labels: tuple[str, ...]

    def index(self, label: str) -> int:
        """Position of a label; raises `EmonbError` naming the label if it is not one of ours."""
        try:
            return self.labels.index(label)
        except ValueError:
            raise EmonbError(
                f"label {label!r} is not in taxonomy {self.name!r}; use one of: {', '.join(self.labels)}"
            ) from None


TAXONOMIES = {
    "mikels8": Taxonomy(
        "mikels8",
        ("amusement", "anger", "awe", "contentment", "disgust", "excitement", "fear", "sadness"),
    ),  # Mikels et al. 2005; FI and EmoSet
    "ekman6": Taxonomy("ekman6", ("anger", "disgust", "fear", "joy", "sadness", "surprise")),  # Emotion6
    "sentiment2": Taxonomy("sentiment2", ("positive", "negative")),  # Flickr, Instagram, BASS, OASIS
}

_DATASETS = {
    "fi": "mikels8",
    "emoset": "mikels8",
    "emotion6": "ekman6",
    "flickr": "sentiment2",
    "instagram": "sentiment2",
    "bass": "sentiment2",
    "oasis": "sentiment2",
}


def taxonomy_for_dataset(name: str) -> Taxonomy | None:
    """Taxonomy of a known dataset (`fi`, `mini-fi`, ...), or None for an unknown name."""
    key = _DATASETS.get(name.removeprefix("mini-"))
    return TAXONOMIES[key] if key else None


def infer_taxonomy(labels: Iterable[str], where: str) -> Taxonomy:
    """The smallest taxonomy that contains all labels.

    Args:
        labels: label names as found in a dataset.
        where: the folder or file they came from, for the error message.

    Raises:
        EmonbError: when no taxonomy contains all of them.
    """
    found = set(labels)
    for taxonomy in sorted(TAXONOMIES.values(), key=lambda t: len(t.labels)):
        if found and found <= set(taxonomy.labels):
            return taxonomy
    best = max(TAXONOMIES.values(), key=lambda t: len(found & set(t.labels)))
    odd = ", ".join(repr(x) for x in sorted(found - set(best.labels))) or "none"
    raise EmonbError(
        f"{where}: labels outside every taxonomy: {odd}; rename the folders to labels of one taxonomy: "
        + "; ".join(f"{t.name} ({', '.join(t.labels)})" for t in TAXONOMIES.values())
    )


def check_labels(found: Sequence[str], expected: Sequence[str], where: str) -> None:
    """Raise `EmonbError` unless an artefact's stored labels equal the expected ones, order included."""
    if list(found) != list(expected):
        raise EmonbError(
            f"{where}: class order is {list(found)} but {list(expected)} was expected; "
            "the file belongs to another taxonomy or was edited: delete it and run again"
        )


# Word forms that a free answer may use for a label; ours, for the tolerant parser of vlm.py.
WORD_FORMS = {
    "amusement": ("amused", "amusing"),
    "anger": ("angry", "angered"),
    "awe": ("awed", "awestruck"),
    "contentment": ("content", "contented"),
    "disgust": ("disgusted", "disgusting"),
    "excitement": ("excited", "exciting"),
    "fear": ("fearful", "afraid", "scared", "frightening"),
    "sadness": ("sad", "saddened"),
    "joy": ("joyful", "joyous"),
    "surprise": ("surprised", "surprising"),
}


def parse_emotion(text: str, labels: Sequence[str]) -> str | None:
    """The label that a free answer names, or None. Never a default class.

    The value of an `emotion` field counts first; else the one label (or a form of it, such as "fearful")
    that the text names without a "not" before it. Two different labels are no answer.
    """
    forms = {form: label for label in labels for form in (label, *WORD_FORMS.get(label, ()))}
    text = text.lower()
    field = re.search(r"emotion\s*['\"]?\s*[:=]\s*['\"]?\s*([a-z]+)", text)
    if field:
        return forms.get(field.group(1))
    named = re.findall(r"(\bnot\s+|n't\s+)?\b(" + "|".join(map(re.escape, forms)) + r")\b", text)
    found = {forms[word] for negation, word in named if not negation}
    return found.pop() if len(found) == 1 else None
