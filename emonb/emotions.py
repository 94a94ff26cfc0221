"""Emotion taxonomies: the one place that fixes the order of the classes.

The authors' code takes the class order from the directory listing, so that label indices of
teacher, student and gate can disagree; here each artefact stores its labels and is checked on load.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from emonb.errors import EmonbError

__all__ = ["TAXONOMIES", "WORD_FORMS", "Taxonomy", "check_labels", "infer_taxonomy", "taxonomy_for_dataset"]


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
