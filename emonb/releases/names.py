"""How other people name splits, classes and columns, and what their machines leave in folders."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from emonb.data import TAXONOMIES
from emonb.errors import EmonbError
from emonb.files import visible

_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "development"),
    "test": ("test", "testing"),
}  # Hugging Face, Kaggle, fast.ai, torchvision
_UNSURE = ("eval", "evaluation", "holdout", "hold out", "public test", "publictest", "private test", "privatetest")
# as in train_labels
_NOISE = {"", "set", "split", "data", "images", "pictures", "labels", "list", "annotations", "metadata"}
_LEFTOVERS = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "#snapshot", "@recycle", "@tmp",
    "$recycle.bin", "recycler", "system volume information", "lost+found", "icon\r", "__pycache__",
}  # fmt: skip
_NUMBER = re.compile(r"^\d+[ .):-]+(?=\D)")  # before a class's name
_WORDS = {  # beside `data.WORD_FORMS`, for that is part of results: these are offered, never taken unasked
    "amusement": "amused amusing funny", "anger": "angry mad", "awe": "awed awestruck", "contentment": "content",
    "disgust": "disgusted disgusting", "excitement": "excited exciting", "fear": "fearful afraid scared",
    "sadness": "sad sorrow", "joy": "joyful happy happiness", "surprise": "surprised surprising",
    "positive": "pos", "negative": "neg",
}  # fmt: skip
SYNONYMS = {word: label for label, words in _WORDS.items() for word in words.split()}


def clean(name: object) -> str:
    """A name as it is compared: one case, accents composed, single blanks for blanks and underscores."""
    return " ".join(unicodedata.normalize("NFC", str(name)).casefold().replace("_", " ").split())


def is_leftover(name: str) -> bool:
    """Whether macOS, Windows, a NAS, git or Jupyter has put a file or folder there: passed over and counted."""
    return name.startswith((".", "~$")) or name.casefold() in _LEFTOVERS


def split_of(name: str, names: Mapping[str, str], where: object = "") -> str | None:
    """The split that a folder, file or column value stands for; "": to be left out; None: it names no split.

    `names` are the user's own readings. Raises `EmonbError` for a name that may be val as well as test.
    """
    word = clean(name)
    if (given := names.get(word)) is not None:
        return given if given in ("", *_SPLITS) else None
    word = " ".join(part for part in re.split(r"[ .-]+", word.removesuffix("set")) if part not in _NOISE)
    if word in _UNSURE:
        ways = f"--map '{name}=val' or --map '{name}=test'"
        raise EmonbError(f"{where}: is {name!r} the val or the test split? Say {ways}")
    return next((split for split, others in _SPLITS.items() if word in others), None)


def own_names(given: Iterable[str]) -> dict[str, str]:
    """`NAME=CLASS` or `NAME=SPLIT`, also several with commas, as a mapping; raises `EmonbError` for another form."""
    parts = [part for text in given for part in text.split(",") if part.strip()]
    if odd := [part for part in parts if part.count("=") != 1]:
        raise EmonbError(f"--map {odd[0]!r}: write NAME=CLASS or NAME=SPLIT, or NAME= to leave it out")
    return {clean(name): clean(meaning) for name, meaning in (part.split("=") for part in parts)}


def own_classes(given: Iterable[str], where: object) -> tuple[str, ...]:
    """The classes of an own taxonomy in their order; raises `EmonbError` naming what is wrong with them."""
    classes = tuple(_NUMBER.sub("", clean(name)) for name in given if clean(name))
    odd = [name for name in classes if not re.fullmatch(r"[^\W\d_][\w &'-]{0,39}", name) or classes.count(name) > 1]
    if odd or len(classes) < 2:
        why = f"{visible(odd[0])!r} is there twice, or is no name" if odd else f"{len(classes)} of at least 2"
        raise EmonbError(f"{where}: {why}; list each class once, by a name that begins with a letter")
    return classes


def read_classes(
    found: Iterable[str], fixed: Sequence[str] | None, names: Mapping[str, str], where: object
) -> tuple[dict[str, str], Sequence[str]]:
    """What each class name of a source stands for ("": left out), and the class order.

    Case, blanks, underscores and a number before the name make no difference. Without `fixed` classes the smallest
    taxonomy that has them all counts. Raises `EmonbError` with what to type: synonyms are offered, not taken unasked.
    """
    read = {name: names.get(clean(name), clean(name)) for name in sorted(found)}
    lost = {name: to for name, to in names.items() if to not in ("", *_SPLITS)} if read else {}
    if odd := [name for name in lost if name not in map(clean, read)]:
        pair = f"{odd[0]}={lost[odd[0]]}"
        raise EmonbError(f"{where}: --map '{pair}': no class has that name; there are {', '.join(read)}")
    targets = [fixed] if fixed else sorted((t.labels for t in TAXONOMIES.values()), key=len)
    for table in ({}, SYNONYMS, None):
        for labels in targets:
            bare = {n: w if w in labels else _NUMBER.sub("", w) for n, w in read.items()}
            by = {str(i): label for i, label in enumerate(sorted(labels))} if table is None else table
            tried = {n: w if w in labels else by.get(w, w) for n, w in bare.items()}
            if any(tried.values()) and {*tried.values()} - {""} <= {*labels}:
                if table == {}:
                    return tried, labels
                how = f"other words for {', '.join(labels)}" if table else "numbers in alphabetical order, as in Keras"
                pairs = ",".join(f"{n}={w}" for n, w in tried.items() if w != bare[n])
                raise EmonbError(f"{where}: {how}? Only if so, import it with --map '{pairs}'")
    near = max(targets, key=lambda labels: len({*bare.values()} & {*labels}))
    odd = [name for name, word in bare.items() if word and word not in near]
    own = ",".join(dict.fromkeys(filter(None, bare.values())))
    raise EmonbError(
        f"{where}: {', '.join(map(repr, odd[:12]))} is none of {', '.join(near)}; import it with --map "
        f"'{odd[0]}=CLASS' ('{odd[0]}=' leaves it out), or with a taxonomy of its own: --classes {own!r}, or "
        "a line each in classes.txt"
    )
