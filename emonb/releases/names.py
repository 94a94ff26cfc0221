"""How other people name splits, classes and columns, and what their machines leave in folders."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence

from emonb.data import TAXONOMIES
from emonb.errors import EmonbError

_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "development"),
    "test": ("test", "testing"),
}  # Hugging Face, Kaggle, fast.ai, torchvision
_UNSURE = ("eval", "evaluation", "holdout", "hold out", "public test", "publictest", "private test", "privatetest")
# as in train_labels
_NOISE = {
    "", "set", "split", "data", "images", "pictures", "labels", "list", "annotations", "metadata",
    "csv", "tsv", "jsonl", "ndjson",
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
    """A name as it is compared: one case, accents composed, single blanks for blanks and underscores, 1 for 1.0."""
    name = " ".join(unicodedata.normalize("NFC", str(name)).casefold().replace("_", " ").split())
    return re.sub(r"^(\d+)\.0+$", r"\1", name)  # pandas writes whole numbers so where some are missing


def split_of(name: str, names: Mapping[str, str], where: object = "") -> str | None:
    """The split that a folder, file or column value stands for; "": to be left out; None: it names no split.

    `names` are the user's own readings. Raises `EmonbError` for a name that may be val as well as test.
    """
    word = clean(name)
    if (given := names.get(word)) is not None:
        return given if given in ("", *_SPLITS) else None
    word = " ".join(part for part in re.split(r"[ .-]+", word.removesuffix("set")) if part not in _NOISE)
    if word in _UNSURE:
        ways = f"--map '{name}=val' or --map '{name}=test' ('{name}=' leaves it out)"
        raise EmonbError(f"{where}: is {name!r} the val or the test split? Say {ways}")
    return next((split for split, others in _SPLITS.items() if word in others), None)


def split_within(name: str) -> str | None:
    """The split that a word within a name stands for, as in train2017, 01_val and emo-test: to be asked for."""
    words = re.findall(r"[^\W\d_]+", clean(name))
    return next((split for split, others in _SPLITS.items() if {*words} & {*others}), None)


def own_names(given: Iterable[str]) -> dict[str, str]:
    """`NAME=CLASS` or `NAME=SPLIT`, also several with commas, as a mapping; raises `EmonbError` for another form."""
    parts = [part for text in given for part in text.split(",") if part.strip()]
    if odd := [part for part in parts if not re.fullmatch(r"\s*[^=\s][^=]*=[^=]*", part)]:
        raise EmonbError(f"--map {odd[0]!r}: write NAME=CLASS or NAME=SPLIT, or NAME= to leave it out")
    names: dict[str, str] = {}
    for name, meaning in (map(clean, part.split("=")) for part in parts):
        if names.setdefault(name, meaning) != meaning:
            raise EmonbError(f"--map {name!r}: is it {names[name]!r} or {meaning!r}? Say it once")
    return names


def own_classes(given: Iterable[str], where: object) -> tuple[str, ...]:
    """The classes of an own taxonomy in their order; raises `EmonbError` naming what is wrong with them."""
    classes = tuple(_NUMBER.sub("", clean(name)) for name in given if clean(name))
    bare = tuple(re.sub(r"[\s,:;]+\d+$", "", name) for name in classes)  # happy 0, sad 1; not stage 1, stage 2
    classes = bare if len({*bare}) == len(bare) and not {*bare} & {*classes} else classes
    odd = [name for name in classes if not re.fullmatch(r"[^\W\d_][\w &'-]{0,39}", name) or classes.count(name) > 1]
    if odd or len(classes) < 2:
        why = f"{odd[0]!r} is there twice, or is no name" if odd else f"{len(classes)} of at least 2"
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
    if read and not any(read.values()):
        raise EmonbError(f"{where}: --map leaves out every class; name those to be kept")
    lost = {name: to for name, to in names.items() if to not in ("", *_SPLITS)} if read else {}
    if odd := [name for name in lost if name not in map(clean, read)]:
        why = f"--map '{odd[0]}={lost[odd[0]]}': no class has that name; there are {', '.join(read)}"
        raise EmonbError(f"{where}: {why}")
    targets = [fixed] if fixed else sorted((t.labels for t in TAXONOMIES.values()), key=len)
    for labels in targets:
        if (fit := _fit(read, labels, {})) is not None:
            return fit, labels
    for labels in targets:
        ways = []
        for how, table in _readings(read.values(), labels, own=bool(fixed)).items():
            if fit := _fit(read, labels, table):
                pairs = ",".join(f"{name}={label}" for name, label in fit.items() if label != read[name])
                ways.append(f"{how}? Only if so, import it with --map '{pairs}'")
        if ways:
            raise EmonbError(f"{where}: {'; or '.join(ways)}")
    near = max(targets, key=lambda labels: len({*read.values()} & {*labels}))
    odd = [name for name, word in read.items() if word and _NUMBER.sub("", word) not in near]
    way = f"import it with --map '{odd[0]}=CLASS' ('{odd[0]}=' leaves it out), or with a taxonomy of its own:"
    own = [_NUMBER.sub("", word) for word in dict.fromkeys(read.values()) if word]
    try:
        own_classes(own, where)
        way += f" --classes {','.join(own)!r}, or a line each in classes.txt"
    except EmonbError:  # such as 3 stars
        way += " --classes a,b,c and a --map of each name to one of these"
    if no_map := [name for name in odd if {*name} & {",", "="}]:
        way = f"rename {no_map[0]!r}: neither --map nor --classes takes a name with a comma or ="
    why = f"{', '.join(map(repr, odd[:12]))} is none of {', '.join(near)}"
    raise EmonbError(f"{where}: {why}; {way}")


def _fit(read: Mapping[str, str], labels: Sequence[str], table: Mapping[str, str]) -> dict[str, str] | None:
    """The labels that names stand for, with a table of other words; None if some are no label then either."""
    fit = {}
    for name, word in read.items():
        word = word if word in labels else _NUMBER.sub("", word)
        fit[name] = word if word in labels else table.get(word, word)
    return fit if {*fit.values()} <= {"", *labels} else None


def _readings(words: Collection[str], labels: Sequence[str], own: bool) -> dict[str, Mapping[str, str]]:
    """What other words and numbers, from 0 or 1, may stand for; own classes may be numbered in their own order."""
    readings: dict[str, Mapping[str, str]] = {f"other words for {', '.join(labels)}": SYNONYMS}
    first = 1 if str(len(labels)) in words and "0" not in words else 0
    if own and sorted(labels) != [*labels]:
        readings["numbers in the order given"] = {str(i): label for i, label in enumerate(labels, first)}
    in_order = {str(i): label for i, label in enumerate(sorted(labels), first)}
    return readings | {"numbers in alphabetical order, as in Keras": in_order}
