"""Room 02: image-instruction-response triplets for instruction tuning (paper: section on instruction tuning).

Three kinds: *categorical* (pick one of the C emotions), *conversation* (key visual elements) and *reasoning* (why the
image evokes the emotion, without naming it). The paper has GPT-4 write them (`emonb.annotate`). Here are the contract,
the offline annotator, which composes them without a paid model, the checks of an answer, and the triplets file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from emonb.data import TAXONOMIES, answer_text, question
from emonb.errors import EmonbError
from emonb.files import resource, resource_path

Record = dict[str, Any]
KINDS = ("categorical", "conversation", "reasoning")
REJECTED = ".rejected.jsonl"  # beside `<dataset>.jsonl`
FIELDS = ("image_id", "kind", "instruction", "response", "source", "model", "created", "prompt_sha256", "usage")

# ---- the contract --------------------------------------------------------------------------------------------------


def instruction(row: Record, kind: str) -> str:
    """What is asked for a kind; the picture's hash chooses the wording: varied, yet reproducible."""
    conversation = resource("prompts.yaml", "conversation", "instructions")
    reasoning = resource("prompts.yaml", "reasoning", "instructions")
    ours = {"conversation": conversation, "reasoning": reasoning}[kind]
    return ours[int(row["sha256"][:8], 16) % len(ours)]


def make_triplets(
    row: Record, labels: Sequence[str], origin: Record, texts: dict[str, str], **asked: str
) -> list[Record]:
    """An image's triplets in the order of `KINDS`; the categorical one follows from the label.

    `origin` is all that is known of who wrote them (`source`, `model`, ...), `texts` the responses of the other kinds,
    `asked` the instructions of those that are not in our words.
    """
    texts = {"categorical": answer_text(row["label"]), **texts}
    asked = {"categorical": question(labels), **asked}
    kinds = [kind for kind in KINDS if kind in texts]
    said = [(row["image_id"], kind, asked.get(kind) or instruction(row, kind), texts[kind]) for kind in kinds]
    return [dict(zip_longest(FIELDS, values)) | origin for values in said]


def triplet_line(triplet: Record) -> str:
    """A triplet, or another record, as a line of JSON, newline included."""
    return json.dumps(triplet, ensure_ascii=False) + "\n"


@functools.cache
def prompts_sha256(*more: str) -> str:
    """Hash of the wording: the bytes of these resource files and of `prompts.yaml`."""
    return hashlib.sha256(b"".join(resource_path(name).read_bytes() for name in (*more, "prompts.yaml"))).hexdigest()


# ---- the offline annotator -----------------------------------------------------------------------------------------


def offline_triplets(row: Record, labels: Sequence[str]) -> list[Record]:
    """The three triplets of one training image, composed from what is known of it; every row says so.

    `row` is one of the sample table; `objects` and `scene` (else `caption`) are used where present, brightness and
    colourfulness always.
    """
    sentences, texts = resource("prompts.yaml", "conversation"), {}
    known = {name: row[name] for name in ("objects", "scene", "caption") if _is_known(row.get(name))}
    if "objects" in known or "scene" in known:
        known.pop("caption", None)
    scales = {"brightness": resource("prompts.yaml", "brightness")}
    scales["colorfulness"] = resource("prompts.yaml", "colorfulness")
    measured = {
        name: next((word for bound, word in scale if row[name] < bound), scale[-1][1])
        for name, scale in scales.items()
    }
    told = {name: listing(what) if name == "objects" else what for name, what in known.items()} | measured
    texts["conversation"] = " ".join(sentences[name] for name in (*known, "measured")).format(**told)
    texts["reasoning"] = _reasoning(row, labels, known, measured)
    origin = {"source": "offline", "model": "emonb-offline-annotator", "prompt_sha256": prompts_sha256()}
    return make_triplets(row, labels, origin, texts)


def _is_known(value: Any) -> bool:
    return len(value) > 0 if hasattr(value, "__len__") else not pd.isna(value)


def with_article(name: str) -> str:
    """`skull` -> `a skull`, `atom` -> `an atom`; plurals stay bare."""
    if name in ("scissors", "scales", "hammers", "notes", "crossed swords"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def listing(objects: Sequence[str]) -> str:
    """`a skull, a heart and an urn`."""
    *others, last = map(with_article, objects)
    return f"{', '.join(others)} and {last}" if others else last


def _reasoning(row: Record, labels: Sequence[str], known: Record, measured: dict[str, str]) -> str:
    """Why: the objects and the background that go with the label, and whether either has nothing to do with it.

    The lexicon can tell that of drawn pictures only; of others all that is known is given as a reason, but for what
    names the emotion, as a caption may.
    """
    ties, label, sentences = associations(tuple(labels)), row["label"], resource("lexicon.yaml", "reasons")
    objects, (background, _, texture) = known.get("objects", ()), str(known.get("scene", "")).partition(" with ")
    kinds = [*known, "measured"]
    if background.split(" ")[-1] in resource("lexicon.yaml", "hues") and ties.keys() >= {*objects}:
        objects = [name for name in objects if label in ties[name]]
        kinds = ["objects" if objects else "no_objects"]
        kinds.append("scene" if label in ties.get(texture or "plain", ()) else "no_scene")
    told = known | measured | {"objects": listing(objects) if len(objects) else ""}
    number = int(row["sha256"][8:16], 16)
    said = [sentences[kind][number % len(sentences[kind])].format(**told) for kind in kinds]
    return " ".join(one for one in said if not names_emotion(one, label)) or sentences["nothing"][0]


@functools.cache
def associations(labels: tuple[str, ...]) -> dict[str, list[str]]:
    """The lexicon's objects and textures, each with the emotions that it goes with; of an own taxonomy none."""
    taxonomy = next((name for name, known in TAXONOMIES.items() if {*known.labels} == {*labels}), "")
    if not taxonomy:
        return {}
    column, moods = list(TAXONOMIES).index(taxonomy) + 1, resource("lexicon.yaml", "moods")
    found = {name: row[column : column + 1] for name, row in resource("lexicon.yaml", "glyphs").items()}
    for label, drawn_with in resource("lexicon.yaml", "labels")[taxonomy].items():
        for texture in {texture for mood in drawn_with for texture in moods[mood]["textures"]}:
            found.setdefault(texture, []).append(label)
    return found


def suggested(text: str, labels: Sequence[str]) -> list[str]:
    """The emotions that most of a text's words go with, by `associations`: several in a tie, none for other words."""
    ties = associations(tuple(labels))
    words = "|".join(sorted(map(re.escape, ties), key=len, reverse=True))
    counts = Counter(label for word in re.findall(rf"\b(?:{words})\b", text.lower()) for label in ties[word])
    return [label for label in labels if counts[label] == max(counts.values(), default=-1)]


# ---- is an answer fit to teach from? -------------------------------------------------------------------------------
# The checks and their bounds are ours; that the reasoning must not name the emotion is the paper's.

# As they stand in rejected.jsonl and in the notebook's table, in the order of checking.
REASONS = ("refused", "cut off", "empty", "not in the asked form", "names the emotion", "too short", "too long",
           "near-duplicate", "no answer")  # fmt: skip
# Inflections and derivations of the labels: what "naming the emotion" means.
_STEMS = {
    "amusement": r"amus(?!ement park)\w*",
    "anger": r"ang(?:er|r)\w*",
    "awe": r"awe\w*|awing",
    # "content" is also a noun ("the content of the image"): only the adjective names the emotion
    "contentment": r"contentment|contented\w*|(?:(?:feel|look|seem|appear)\w*|is|are|was|were|be|being|so|very|quite"
    r"|deeply|quietly|truly|more|and|a) content(?! of\b| creator)",
    "disgust": r"disgust\w*",
    "excitement": r"excit\w*",
    "fear": r"fear\w*|afraid|scar(?:ed|es|ing|y|ier|iest)|fright\w*",
    "sadness": r"sad(?:ly|der|dest|den\w*|ness)?",
    "joy": r"(?:over)?joy\w*|enjoy\w*|rejoic\w*",
    "surprise": r"surpris\w*",
    "positive": r"positiv\w*+(?! space)",
    "negative": r"negativ\w*+(?! space)",
}
# An apology alone is no refusal ("sorry-looking houses"), nor is what cannot be seen ("I cannot see any faces").
_REFUSAL = re.compile(
    r"^\W*(?:unfortunately\W+|as an ai\b[^.]{0,40}?\W+)?"
    r"(?:sorry\W+(?:but|i\b|no\b)|(?:i'm|i am) (?:\w+ ){0,2}(?:sorry\b(?!-)|afraid (?:but|that|i)\b)"
    r"|(?:i'm|i am|i) (?:\w+ )?(?:unable|not able|can't|cannot|can not|won't|do not have the ability)\b.{0,40}?"
    r"\b(?:help|assist|comply|provide|identify|view|process|describe|analy[sz]e|answer)\b(?! but))",
    re.IGNORECASE | re.DOTALL,
)


def names_emotion(text: str, label: str) -> str | None:
    """The first word of a text that is a form of the label ("fearfully" for fear), or None."""
    found = re.search(rf"(?<!\w)(?:{_STEMS.get(label, re.escape(label))})(?!\w)", text.lower().replace("’", "'"))
    return found.group(0) if found else None


def check_reply(text: str, finish_reason: str | None, refusal: str | None) -> tuple[str, str] | None:
    """What can be said before the answer is read: (reason, detail), or None."""
    if refusal or finish_reason == "content_filter":
        return "refused", refusal or "the server's content filter"
    if finish_reason == "length":
        return "cut off", "the answer reached triplets.max_output_tokens"
    return _said_nothing(text)


def _said_nothing(text: str) -> tuple[str, str] | None:
    if not text.strip():
        return "empty", ""
    return ("refused", text.strip()[:120]) if _REFUSAL.search(text.replace("’", "'").strip()) else None


def check_texts(
    conversation: str, reasoning: str, label: str, *, min_words: int = 8, max_words: int = 200
) -> tuple[str, str] | None:
    """(reason, detail) why the two texts cannot be used, or None; `REASONS` has the reasons."""
    if found := _said_nothing(conversation) or _said_nothing(reasoning):
        return found
    if word := names_emotion(reasoning, label):
        return "names the emotion", word
    for name, text in {"conversation": conversation, "reasoning": reasoning}.items():
        words = len(text.split())
        if not min_words <= words <= max_words:
            return "too short" if words < min_words else "too long", f"{name}: {words} words"
    return None


class NearDuplicates:
    """Texts seen so far, compared by the Jaccard similarity of their sets of three-word sequences.

    Two sets of similarity t or more share one of the first n - t n + 1 of their n members, whatever the order: only
    these are looked up. Sequences of long words come first, for they are rare.
    """

    def __init__(self, at_least: float) -> None:
        """`at_least`: the similarity from which a text counts as nearly the same."""
        self._at_least = at_least
        self._having = defaultdict[int, list[tuple[str, frozenset[int]]]](list)  # sequence -> texts that begin with it

    def find(self, text: str) -> tuple[str, float] | None:
        """Name and similarity of an earlier text that is similar enough."""
        sequences = _sequences(text)
        mine, near = frozenset(sequences), dict[str, frozenset[int]]()
        for key in self._first(sequences):
            near.update(self._having.get(key, ()))
        alike = ((name, len(mine & others) / len(mine | others)) for name, others in near.items())
        return next(((name, similarity) for name, similarity in alike if similarity >= self._at_least), None)

    def add(self, name: str, text: str) -> None:
        """Remember a text."""
        sequences = _sequences(text)
        seen = name, frozenset(sequences)
        for key in self._first(sequences):
            self._having[key].append(seen)

    def _first(self, sequences: Sequence[int]) -> Sequence[int]:
        return sequences[: len(sequences) - int(self._at_least * len(sequences)) + 1]


def _sequences(text: str) -> list[int]:
    """Hashes of the three-word sequences of a text, each once; case and punctuation do not count."""
    words = re.findall(r"\w+", text.lower())
    found = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
    return [zlib.crc32(sequence.encode()) for sequence in sorted(found, key=lambda text: (-len(text), text))]


def check_rates(
    triplets: pd.DataFrame, labels: pd.Series, *, min_words: int = 8, max_words: int = 200, near_duplicate: float = 0.8
) -> pd.Series:
    """How many images of a triplets table (of `read_triplets`) fail which check, whoever wrote them.

    `labels` are the images' labels, indexed by image id; the bounds are those of the settings.
    """
    counts, seen = Counter(dict.fromkeys(["images", *REASONS], 0)), NearDuplicates(near_duplicate)
    texts = triplets.pivot(index="image_id", columns="kind", values="response")
    texts = texts.reindex(columns=KINDS[1:], fill_value="").fillna("")
    for image_id, *both in texts.itertuples(name=None):
        failure = check_texts(*both, labels[image_id], min_words=min_words, max_words=max_words)
        similar = ("near-duplicate", "") if seen.find("\n".join(both)) else ()
        counts.update(["images", *(failure or similar)[:1]])
        seen.add(image_id, "\n".join(both))
    return pd.Series(counts)


# ---- the triplets file ---------------------------------------------------------------------------------------------


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a JSON Lines file, each with `folder/file, line n` for messages; none where there is no file.

    A last line without an end is passed by: its writer is at work, or was killed. Raises `EmonbError` for others that
    are no JSON.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.parent.name}/{path.name}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                if line.endswith(b"\n"):
                    reason = getattr(error, "msg", "not UTF-8")
                    raise EmonbError(f"{where}: not JSON ({reason}); delete the line and run again") from None
                continue
            if not isinstance(record, dict):
                what = f"holds {str(record)[:40]!r}, where one object a line belongs"
                raise EmonbError(f"{where}: {what}; move the file away, and import it: --import")
            yield where, record


def triplet_lines(path: Path) -> Iterator[Record]:
    """Validated triplets of a file; raises `EmonbError` naming file, line and field, also for one that is twice."""
    seen: set[int] = set()  # hashes: a third of the memory of the names
    for where, triplet in json_lines(path):
        texts = {name: triplet.get(name) for name in ("image_id", "instruction", "response")}
        key = hash(str((texts["image_id"], triplet.get("kind"))))
        problems = [
            *(f"field {name!r} missing" for name in FIELDS if name not in triplet),
            *(f"field {name!r} is empty" for name, text in texts.items() if not str(text or "").strip()),
            *([] if triplet.get("kind") in KINDS else [f"field 'kind' is {triplet.get('kind')!r}"]),
            *(["occurs twice"] if key in seen else []),
        ]
        if problems:
            raise EmonbError(f"{where}: {problems[0]}; delete the line and make the triplets again")
        seen.add(key)
        yield triplet


def read_triplets(path: Path) -> pd.DataFrame:
    """A triplets file as a table, one row per triplet, columns `FIELDS`; raises as `triplet_lines`."""
    return pd.DataFrame(triplet_lines(path), columns=list(FIELDS))


def has_paid_answers(path: Path) -> bool:
    """Whether a triplets file holds anything that the offline annotator cannot write again."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return any(line.strip() and b'"source": "offline"' not in line for line in file)


def triplet_sources(out: Path) -> dict[str, str]:
    """Who wrote the triplets of each dataset of a results folder: dataset -> words; from its `triplets/*.jsonl`."""
    words = {"offline": "offline annotator, no paid model", "openai": "a paid model ({})"}
    words, found = {**words, "imported": "somebody else's file"}, {}
    for path in sorted({*(out / "triplets").glob("*.jsonl")} - {*(out / "triplets").glob(f"*{REJECTED}")}):
        images = Counter[str]()
        with suppress(EmonbError, AttributeError, TypeError):  # damage is named by those who need the file
            for _, triplet in json_lines(path):
                who = words.get(triplet.get("source"), "unknown").format(triplet.get("model"))
                images[who] += triplet.get("kind") == KINDS[0]
        counted = (f"{who}: {n:,} images" if len(images) > 1 else who for who, n in images.items())
        found[path.stem] = ", ".join(counted) or "unknown"
    return found


def source_note(out: Path, datasets: Sequence[str]) -> str:
    """One line for every page: who wrote the triplets of these datasets, or "" where there are none yet."""
    sources = triplet_sources(out)
    writers = dict.fromkeys(filter(None, map(sources.get, datasets)))
    groups = {who: [dataset for dataset in datasets if sources.get(dataset) == who] for who in writers}
    return "; ".join(f"triplets of {', '.join(names)}: {who}" for who, names in groups.items())


def rejected_answers(path: Path) -> pd.DataFrame:
    """Answers of a paid model that a check rejected, newest last: image_id, reason, detail, text.

    `path` is `OUT/triplets/<dataset>.jsonl`; the table is empty where nothing was asked.
    """
    records = [record for _, record in json_lines(path.with_suffix(REJECTED))]
    return pd.DataFrame(records, columns=["image_id", "reason", "detail", "text"], dtype=object).fillna("")


def rejection_rates(out: Path, datasets: Sequence[str]) -> pd.DataFrame:
    """Per dataset: answers of a paid model, accepted and rejected by reason; empty where nothing was asked."""
    rates = {}
    for path in (out / "triplets" / f"{dataset}.jsonl" for dataset in datasets):
        paid = sum(t["kind"] == "conversation" and t["source"] == "openai" for _, t in json_lines(path))
        rates[path.stem] = Counter(rejected_answers(path)["reason"]) | Counter(accepted=paid)
    frame = pd.DataFrame(rates).T.reindex(columns=["accepted", *REASONS])
    return frame.dropna(how="all").dropna(how="all", axis=1).fillna(0).rename_axis("dataset").reset_index()
