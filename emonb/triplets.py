"""Room 02: image-instruction-response triplets for instruction tuning (paper: section on instruction tuning).

Three kinds: *categorical* (pick one of the C emotions), *conversation* (key visual elements) and *reasoning* (why the
image evokes the emotion, without naming it). The paper has GPT-4 write them (`emonb.annotate`). Here are the contract,
the offline annotator, which composes them without a paid model, the checks of an answer, and the triplets file.
"""

from __future__ import annotations

import colorsys
import functools
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from emonb.data import WORD_FORMS, open_picture, question
from emonb.errors import EmonbError
from emonb.files import resource, resource_path

KINDS = ("categorical", "conversation", "reasoning")
FIELDS = ("image_id", "kind", "instruction", "response", "source", "model", "created", "prompt_sha256", "usage")
_SOURCES = {
    "offline": "offline annotator, no paid model",
    "openai": "a paid model",
    "imported": "somebody else's file",
}


# ---- the contract --------------------------------------------------------------------------------------------------


def make_triplet(
    row: dict[str, Any], kind: str, response: str, origin: dict[str, Any], instruction: str = ""
) -> dict[str, Any]:
    """One triplet as the contract has it.

    Args:
        row: a row of the sample table; its `sha256` chooses the wording of the instruction: varied, yet reproducible.
        kind, response: one of `KINDS`, and what the model is to say.
        origin: `source`, `model`, `prompt_sha256`, and what else is known of who wrote it.
        instruction: what was asked, if not in our words.
    """
    if not instruction:
        conversation = resource("prompts.yaml", "conversation", "instructions")
        reasoning = resource("prompts.yaml", "reasoning", "instructions")
        ours = {"conversation": conversation, "reasoning": reasoning}[kind]
        instruction = ours[int(row["sha256"][:8], 16) % len(ours)]
    head = {"image_id": row["image_id"], "kind": kind, "instruction": instruction, "response": response}
    return {**head, "source": "", "model": "", "created": None, "prompt_sha256": None, "usage": None, **origin}


def three_triplets(
    row: dict[str, Any], labels: Sequence[str], origin: dict[str, Any], conversation: str, reasoning: str
) -> list[dict[str, Any]]:
    """An image's triplets in the order of `KINDS`; the categorical one follows from the label."""
    return [
        categorical_triplet(row, labels, origin),
        make_triplet(row, "conversation", conversation, origin),
        make_triplet(row, "reasoning", reasoning, origin),
    ]


def categorical_triplet(row: dict[str, Any], labels: Sequence[str], origin: dict[str, Any]) -> dict[str, Any]:
    """The question of every evaluation, answered by the image's label."""
    response = resource("prompts.yaml", "categorical", "response").format(label=row["label"])
    return make_triplet(row, "categorical", response, origin, question(labels))


def triplet_line(triplet: dict[str, Any]) -> str:
    """A triplet as a line of JSON, newline included."""
    return json.dumps(triplet, ensure_ascii=False) + "\n"


@functools.cache
def prompts_sha256(*more: str) -> str:
    """Hash of the wording: the bytes of these resource files and of `prompts.yaml`."""
    return hashlib.sha256(b"".join(resource_path(name).read_bytes() for name in (*more, "prompts.yaml"))).hexdigest()


# ---- the offline annotator -----------------------------------------------------------------------------------------

_ATTRIBUTES = {  # EmoSet's annotation fields: sentence of the conversation, of the reasoning
    "facial_expression": ("There is a face with the expression {}.", "The {} face speaks to the viewer."),
    "human_action": ("Somebody is {}.", "One follows what is being done: {}."),
}
_COLORS = ("The main colours are {}.", "Its main colours are {}.")
_HUES = ((15, "red"), (45, "orange"), (70, "yellow"), (165, "green"), (260, "blue"), (320, "purple"))


def offline_triplets(row: dict[str, Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    """The three triplets of one training image, composed from what is known of it; every row says so.

    Args:
        row: a row of the sample table; `objects`, `scene`, `facial_expression`, `human_action` or `caption`
            are used where present; where none is, the dominant colours of the picture at `path`.
        labels: the taxonomy's labels in their order.
    """
    prompts = resource("prompts.yaml")
    has = {name for name in ("objects", "scene", "caption", *_ATTRIBUTES) if _is_known(row.get(name))}
    names = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in row["objects"]] if "objects" in has else []
    known = {
        "objects": _enumerate(names),
        "scene": row.get("scene"),
        "caption": row.get("caption"),
        "brightness": _word(prompts["brightness"], row["brightness"]),
        "colorfulness": _word(prompts["colorfulness"], row["colorfulness"]),
    }
    parts = [name for name in ("objects", "scene") if name in has] or [name for name in ("caption",) if name in has]
    more = [(frames, str(row[name]).replace("_", " ")) for name, frames in _ATTRIBUTES.items() if name in has]
    if not parts and not more and row.get("path"):
        more = [(_COLORS, _enumerate(dominant_colors(open_picture(row["path"]))))]
    texts = []
    for side, kind in enumerate(("conversation", "reasoning")):
        sentences = [prompts[kind][name].format(**known) for name in parts]
        sentences += [frames[side].format(value) for frames, value in more]
        texts.append(" ".join([*sentences, prompts[kind]["measured"].format(**known)]))
    texts[1] += " " + prompts["reasoning"]["closing"][row["label"]]
    origin = {"source": "offline", "model": "emonb-offline-annotator", "prompt_sha256": prompts_sha256()}
    return three_triplets(row, labels, origin, *texts)


def dominant_colors(image: Image.Image, most: int = 3) -> list[str]:
    """Names of the colours that cover most of a picture, most frequent first; each covers at least 15 %.

    Median cut to eight colours at 64 x 64 px; each is named by hue, saturation and value (our bounds), and
    equal names are added up.
    """
    small = image.convert("RGB").resize((64, 64)).quantize(8, Image.Quantize.MEDIANCUT)
    palette = np.array(small.getpalette()).reshape(-1, 3)
    share = Counter[str]()
    for count, index in small.getcolors():
        share[_color_name(*(palette[index] / 255))] += count / 64**2
    ordered = sorted(share, key=lambda name: (-share[name], name))
    return [name for name in ordered[:most] if share[name] >= 0.15] or ordered[:1]


def _color_name(red: float, green: float, blue: float) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    if value < 0.2:
        return "black"
    if saturation < 0.15:
        return "white" if value > 0.85 else "grey"
    degrees = hue * 360
    if 10 <= degrees < 50 and value < 0.65:
        return "brown"
    if degrees >= 320:
        return "pink" if degrees < 345 and value > 0.7 else "red"
    return next(name for bound, name in _HUES if degrees < bound)


def _is_known(value: Any) -> bool:
    if value is None or isinstance(value, str | list | tuple | np.ndarray):
        return value is not None and len(value) > 0
    return not pd.isna(value)


def _enumerate(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _word(scale: list[tuple[float, str]], value: float) -> str:
    return next((word for bound, word in scale if value < bound), scale[-1][1])


# ---- is an answer fit to teach from? -------------------------------------------------------------------------------
# The checks and their bounds are ours; that the reasoning must not name the emotion is the paper's.

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
    # "content" is also a noun ("the content of the image"): only the adjective names the emotion
    "contentment": r"contentment|contented\w*|(?:(?:feel|look|seem|appear)\w*|is|are|was|were|be|being|so|very|quite"
    r"|deeply|quietly|truly|more|and|a) content(?! of\b| creator)",
    "disgust": r"disgust\w*",
    "excitement": r"excit\w*",
    "fear": r"fear\w*|scar(?:ed|es|ing|y|ier|iest)|fright\w*",
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
    forms = [re.escape(form) for form in WORD_FORMS.get(label, ()) if form != "content"]
    forms.insert(0, _STEMS.get(label, re.escape(label)))
    found = re.search(rf"(?<!\w)(?:{'|'.join(forms)})(?!\w)", text.lower().replace("’", "'"))
    return found.group(0) if found else None


def check_reply(text: str, finish_reason: str | None, refusal: str | None) -> tuple[str, str] | None:
    """What can be said before the answer is read: (reason, detail), or None."""
    if refusal or finish_reason == "content_filter":
        return "refused", refusal or "the server's content filter"
    if finish_reason == "length":
        return "cut off", "the answer reached triplets.max_output_tokens"
    if not text.strip():
        return "empty", ""
    return _refused(text)


def check_texts(
    conversation: str, reasoning: str, label: str, *, min_words: int = 8, max_words: int = 200
) -> tuple[str, str] | None:
    """(reason, detail) why the two texts cannot be used, or None; `REASONS` has the reasons."""
    texts = {"conversation": conversation, "reasoning": reasoning}
    for name, text in texts.items():
        if not text.strip():
            return "empty", name
        if found := _refused(text):
            return found
    if word := names_emotion(reasoning, label):
        return "names the emotion", word
    for name, text in texts.items():
        words = len(text.split())
        if not min_words <= words <= max_words:
            return "too short" if words < min_words else "too long", f"{name}: {words} words"
    return None


def _refused(text: str) -> tuple[str, str] | None:
    return ("refused", text.strip()[:120]) if _REFUSAL.search(text.replace("’", "'").strip()) else None


class NearDuplicates:
    """Texts seen so far, compared by the Jaccard similarity of their sets of three-word sequences.

    Each sequence is a 32-bit hash. Sorted arrays of (hash, text) tell which texts share how many with a new one;
    arrays of like size are merged, so that there are few of them.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._blocks: list[tuple[np.ndarray, np.ndarray]] = []  # hashes in order, number of the text of each

    def find(self, text: str, at_least: float) -> tuple[str, float] | None:
        """The most similar text's name and its similarity, if it is at least so similar."""
        hashes, having = _sequences(text), [np.zeros(0, np.uint32)]
        for keys, texts in self._blocks:
            first, last = np.searchsorted(keys, hashes), np.searchsorted(keys, hashes, side="right")
            having += [texts[first[i] : last[i]] for i in np.flatnonzero(first < last)]
        shared = np.bincount(np.concatenate(having))
        best = ("", 0.0)
        for number in np.flatnonzero(shared >= at_least * len(hashes)):
            similarity = float(shared[number] / (self._sizes[number] + len(hashes) - shared[number]))
            best = max(best, (self._names[number], similarity), key=lambda found: found[1])
        return best if self._names and best[1] >= at_least else None

    def add(self, name: str, text: str) -> None:
        """Remember a text."""
        keys = _sequences(text)
        texts = np.full(len(keys), len(self._names), np.uint32)
        self._names.append(name)
        self._sizes.append(len(keys))
        while self._blocks and len(self._blocks[-1][0]) < 2 * len(keys):
            others = self._blocks.pop()
            keys, texts = np.concatenate([others[0], keys]), np.concatenate([others[1], texts])
            order = np.argsort(keys, kind="stable")
            keys, texts = keys[order], texts[order]
        self._blocks.append((keys, texts))


def _sequences(text: str) -> np.ndarray:
    """Hashes of the three-word sequences of a text, each once, in order; case and punctuation do not count."""
    words = re.findall(r"\w+", text.lower()) or [""]
    sequences = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
    return np.unique(np.array([zlib.crc32(sequence.encode()) for sequence in sequences], np.uint32))


def check_rates(
    triplets: pd.DataFrame,
    labels: pd.Series,
    *,
    min_words: int = 8,
    max_words: int = 200,
    near_duplicate: float = 0.8,
) -> pd.Series:
    """How many images of a triplets table fail which check, whoever wrote them.

    Args:
        triplets: as `read_triplets` gives it.
        labels: label of each image, indexed by image id.
        min_words, max_words, near_duplicate: bounds, as in the settings.
    """
    counts = dict.fromkeys(["images", *REASONS], 0)
    seen = NearDuplicates()
    texts = triplets.pivot(index="image_id", columns="kind", values="response")
    texts = texts.reindex(columns=["conversation", "reasoning"], fill_value="").fillna("")
    for image_id, conversation, reasoning in texts.itertuples(name=None):
        counts["images"] += 1
        failure = check_texts(conversation, reasoning, labels[image_id], min_words=min_words, max_words=max_words)
        both = f"{conversation}\n{reasoning}"
        if failure is None and seen.find(both, near_duplicate):
            failure = ("near-duplicate", "")
        seen.add(image_id, both)
        if failure:
            counts[failure[0]] += 1
    return pd.Series(counts)


# ---- the triplets file ---------------------------------------------------------------------------------------------


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a JSON Lines file, each with `folder/file, line n` for messages.

    A last line without an end is passed by: its writer is at work, or was killed. Raises `EmonbError` for others that
    are no JSON.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.parent.name}/{path.name}, line {number}"
            try:
                if line.strip():
                    yield where, json.loads(line)
            except ValueError as error:
                if line.endswith(b"\n"):
                    reason = getattr(error, "msg", "not UTF-8")
                    raise EmonbError(f"{where}: not JSON ({reason}); delete the line and run again") from None


def triplet_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Validated triplets of a file; raises `EmonbError` naming file, line and field, also for one that is twice."""
    seen: set[int] = set()  # hashes: a third of the memory of the names
    for where, triplet in json_lines(path):
        missing = [field for field in FIELDS if not isinstance(triplet, dict) or field not in triplet]
        if missing:
            raise EmonbError(f"{where}: field {missing[0]!r} missing; delete the line and make the triplets again")
        if triplet["kind"] not in KINDS:
            raise EmonbError(f"{where}: field 'kind' is {triplet['kind']!r}; use one of {', '.join(KINDS)}")
        for field in ("image_id", "instruction", "response"):
            if not isinstance(triplet[field], str) or not triplet[field].strip():
                raise EmonbError(f"{where}: field {field!r} is empty; delete the line and make the triplets again")
        key = (triplet["image_id"], triplet["kind"])
        if hash(key) in seen:
            raise EmonbError(f"{where}: {key} occurs twice; delete one of the lines")
        seen.add(hash(key))
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


def answered_images(path: Path) -> set[str]:
    """Images that have triplets in a file which the offline annotator did not write."""
    return {triplet["image_id"] for triplet in triplet_lines(path)} if has_paid_answers(path) else set()


def triplet_sources(out: Path) -> dict[str, str]:
    """Who wrote the triplets of each dataset of a results folder: dataset -> words; from its `triplets/*.jsonl`."""
    found = {}
    for path in sorted((out / "triplets").glob("*.jsonl")):
        if path.name.endswith(".rejected.jsonl"):
            continue
        images = Counter[str]()
        with suppress(EmonbError, AttributeError):  # damage is named by those who need the file
            for _, triplet in json_lines(path):
                said = _SOURCES.get(triplet.get("source"), "unknown")
                if triplet.get("kind") == "categorical":
                    images[f"{said} ({triplet.get('model')})" if triplet.get("source") == "openai" else said] += 1
        counted = (f"{said}: {n:,} images" if len(images) > 1 else said for said, n in images.items())
        found[path.stem] = ", ".join(counted) or "unknown"
    return found


def source_note(out: Path, datasets: Sequence[str]) -> str:
    """One line for every page: who wrote the triplets of these datasets, or "" where there are none yet."""
    sources = triplet_sources(out)
    groups: dict[str, list[str]] = {}
    for dataset in datasets:
        if dataset in sources:
            groups.setdefault(sources[dataset], []).append(dataset)
    return "; ".join(f"triplets of {', '.join(names)}: {said}" for said, names in groups.items())


def rejected_path(path: Path) -> Path:
    """`<dataset>.rejected.jsonl` beside `<dataset>.jsonl`."""
    return path.with_name(f"{path.stem}.rejected.jsonl")


def rejected_answers(path: Path) -> pd.DataFrame:
    """Answers of a paid model that a check rejected, newest last; empty where nothing was asked.

    Args:
        path: `OUT/triplets/<dataset>.jsonl`.

    Returns:
        Columns image_id, reason, detail, text.
    """
    columns = ["image_id", "reason", "detail", "text"]
    records = json_lines(rejected_path(path)) if rejected_path(path).is_file() else ()
    return pd.DataFrame([[record.get(name) or "" for name in columns] for _, record in records], columns=columns)


def rejection_rates(out: Path, datasets: Sequence[str]) -> pd.DataFrame:
    """Per dataset: answers of a paid model, accepted and rejected by reason; empty where nothing was asked."""
    rows = []
    for dataset in datasets:
        path = out / "triplets" / f"{dataset}.jsonl"
        triplets = json_lines(path) if path.is_file() else ()
        paid = sum(t["kind"] == "conversation" and t["source"] == "openai" for _, t in triplets)
        rejected = rejected_answers(path)["reason"].value_counts()
        if paid or len(rejected):
            rows.append({"dataset": dataset, "accepted": paid, **rejected})
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=[c for c in ("dataset", "accepted", *REASONS) if c in frame]).fillna(0)
