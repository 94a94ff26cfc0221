"""Room 02: triplets that somebody else had written, brought into our contract instead of being paid for again.

Two formats are told apart by their fields: *EmoVLM-KD annotations* as the authors' public `generate_instruction.py`
writes them (a row per training image, GPT-4's free text "1. key elements ... 2. reasoning ..." and the emotion it was
given), and *EmoVIT conversations*, LLaVA's instruction format (EmoVIT's public `all.py`: a row per question).
The dataset stays the judge: its label is taught, and only its training images get triplets.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd

from emonb.annotator import parse_sections
from emonb.answer_checks import names_emotion
from emonb.emotions import TAXONOMIES, parse_emotion
from emonb.errors import EmonbError
from emonb.triplets import KINDS, categorical_instruction, load_prompts, make_triplet

__all__ = ["Import", "import_triplets"]

_FORMATS = {"gpt_response": "EmoVLM-KD annotations", "conversations": "EmoVIT conversations"}
_NAME_FIELDS = ("image_id", "img_path", "image", "img")  # not `id`: EmoVIT cuts it to five characters
_SPEAKERS = {"human": "q", "user": "q", "gpt": "a", "assistant": "a"}
_LABELS = tuple(dict.fromkeys(label for taxonomy in TAXONOMIES.values() for label in taxonomy.labels))
_ASKS_WHY = re.compile(r"\b(why|explain|reason|evok|feel)", re.I)
# repetitions are bounded: the text is foreign, and an open-ended pattern can take minutes on a hostile one
_MARK = re.compile(r"(?<!\S)[*_#>]{0,4}(?:complex )?(question|q|answer|a) ?\d{0,3}[*_]{0,2} ?:[*_]{0,2}", re.I)
_BARE_LABEL = re.compile(r"\W{0,9}(?:[\w ]{0,40}\b(?:emotions?|label)\W{1,6}(?:is\W{1,3})?)?([a-z]+)\W{0,9}", re.I)
_TOKEN = re.compile(r"<image>|<\|[^|<>]{1,40}\|>")  # a VLM's processor would look for another picture there
_SUFFIX = re.compile(r"\.(jpe?g|png|webp|bmp|gif|tiff?)$", re.I)
_FOLDERS = re.compile(r"(?<![\w.])(?:file://)?(?:[a-z]:)?[\\/](?:[^\s\\/]+[\\/])+", re.I)  # reports get published


@dataclass(frozen=True)
class Import:
    """Triplets in the samples' order; where they came from and what was left out."""

    triplets: list[dict[str, Any]]
    report: dict[str, Any]


def import_triplets(path: Path, samples: pd.DataFrame, labels: Sequence[str]) -> Import:
    """Triplets for the training images of a dataset, from JSON (rows in a list or under keys) or JSON Lines.

    Of the sample table `image_id`, `label`, `split` and `sha256` are used; `labels` have the taxonomy's order.

    Raises:
        EmonbError: no JSON, neither format, or nothing in it that fits the dataset.
    """
    try:
        data = path.read_bytes()
        rows = _rows(path, data.decode("utf-8-sig"))
    except OSError as error:
        raise EmonbError(f"{path}: cannot be read ({error.strerror}); give the path of a JSON file") from None
    except UnicodeDecodeError as error:
        raise EmonbError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 and import again") from None
    fields = [field for _, row in rows if isinstance(row, dict) for field in row]
    marker = max(_FORMATS, key=fields.count)
    if marker not in fields:
        found = ", ".join(f"'{field:.40}'" for field in list(dict.fromkeys(fields))[:12]) or "none"
        raise EmonbError(
            f"{path}: neither format recognised; fields found: {found}; give rows with gpt_response, img, img_path, "
            f"label ({_FORMATS['gpt_response']}) or id, image, conversations ({_FORMATS['conversations']})"
        )
    reader = _Reader(samples, labels, marker)
    for number, (key, row) in enumerate(rows, start=1):
        reader.read(row, key, f"row {number}")
    origin = {"imported_from": path.name, "import_sha256": hashlib.sha256(data).hexdigest()}
    triplets = [{**triplet, **origin} for image in reader.known for triplet in reader.compose(image)]
    if not triplets:
        first = next((f"{why} ({entry['examples'][0]})" for why, entry in reader.problems.items()), "no text in it")
        raise EmonbError(f"{path}: nothing to import; first problem: {first}; take a file made for this dataset")
    kinds = [triplet["kind"] for triplet in triplets]
    images = kinds.count("categorical")  # each image has that one
    report = {"file": path.name, "format": _FORMATS[marker], "rows": len(rows), "images": images}
    report |= {"triplets": {kind: kinds.count(kind) for kind in KINDS}, "problems": reader.problems}
    return Import(triplets, report | {"train_images_without": int((samples["split"] == "train").sum()) - images})


def _rows(path: Path, text: str) -> list[tuple[str, Any]]:
    """The rows of the file, each with its key ("" in a list)."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as whole:
        content = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                content += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                why = f"line {number} is not JSON ({error})" if content else f"not JSON ({whole})"
                raise EmonbError(f"{path}: {why}; mend it there or fetch the file again") from None
    if isinstance(content, dict) and not _FORMATS.keys() & content.keys():
        return list(content.items())
    return [("", row) for row in (content if isinstance(content, list) else [content])]


class _Reader:
    def __init__(self, samples: pd.DataFrame, labels: Sequence[str], marker: str) -> None:
        self.labels, self.marker = labels, marker
        self.known = {row["image_id"]: row for row in samples.to_dict("records")}
        self.tails: dict[str, str | None] = {}  # None: several images
        for image in self.known:
            for tail in _tails(_parts(image)):
                self.tails[tail] = image if self.tails.get(tail, image) == image else None
        self.turns: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {}  # by image, kind, question or answer
        self.problems: dict[str, dict[str, Any]] = {}

    def note(self, reason: str, where: str, excerpt: str = "") -> None:
        entry = self.problems.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        text = _FOLDERS.sub("", f"{where:.500}: {excerpt:.500}".encode("utf-8", "replace").decode())
        entry["examples"] = [*entry["examples"], " ".join(text.split())[:120].rstrip(": ")][:5]

    def read(self, row: Any, key: str, where: str) -> None:
        """Take the turns of a row, or note why not."""
        if not isinstance(row, dict):
            return self.note("row is not an object", f"{where} ({type(row).__name__})")
        names = [row[field] for field in _NAME_FIELDS if isinstance(row.get(field), str)] or [key]
        paths = list(filter(None, map(_parts, names)))
        if self.marker not in row or not paths:
            return self.note(f"field missing: {'image or img_path' if self.marker in row else self.marker}", where)
        hits = [next((self.tails[tail] for tail in _tails(parts) if tail in self.tails), "") for parts in paths]
        image, folders = next(filter(None, hits), ""), {part for parts in paths for part in parts[:-1]}
        label, others = self.known.get(image, {}).get("label"), folders.intersection(self.labels)
        # awe/12.jpg is not our fear/12.jpg, even where we have no other 12.jpg
        if not image or (others and label not in others):
            reason = "image name is ambiguous" if None in hits else "image not in the dataset"
            return self.note(reason, f"{where}: {paths[0][-1]}")
        if self.known[image]["split"] != "train":
            return self.note("image is in val or test", image)
        if row.get("label") is not None and parse_emotion(_text(row["label"]), self.labels) != label:
            # the whole row: GPT-4 was given the other emotion, and its reasoning would teach that one
            return self.note("label differs from the dataset's", image, f"{_text(row['label']):.60}, here {label}")
        if self.marker == "gpt_response" and image in self.turns:
            return self.note("answered twice, the first kept", image)
        self.take(row[self.marker], image, label, _text(row.get("model")) or "unknown")

    def take(self, value: Any, image: str, label: str, model: str) -> None:
        """Keep each turn that can be used under its kind, or note why not."""
        talks = _talks(self.marker, value)
        if not talks.keys() - {"categorical"}:
            self.note("no section found" if _text(value) else "empty answer", image, _text(value))
        turns = [(kind, *turn) for kind, talk in talks.items() for turn in pairwise([("", ""), *talk, ("", "")])]
        for kind, (before, question), (who, text) in turns:
            question = " ".join(question.split()) if before == "q" else ""
            bare = _BARE_LABEL.fullmatch(text) if kind in ("", "categorical") else None
            named = parse_emotion(bare[1], _LABELS) if bare else None
            if who != "a":
                if before == "q":
                    self.note("conversation without answer", image, question)
            elif not text:
                self.note("empty answer", image, question)
            elif named and named != label:
                self.note("label differs from the dataset's", image, f"{named}, here {label}")
            elif named or kind != "categorical":
                why = "reasoning" if _ASKS_WHY.search(question) else "conversation"
                kept = self.turns.setdefault(image, {}).setdefault("categorical" if named else kind or why, {})
                if not named and (question.casefold() or text) in kept:
                    self.note("answered twice, the first kept", image, question or text)
                kept.setdefault(question.casefold() or text, (question, text, model))

    def compose(self, image: str) -> list[dict[str, Any]]:
        """The triplets of an image in the order of `KINDS`."""
        kinds, row, prompts, made = self.turns.get(image, {}), self.known[image], load_prompts(), []
        model = next((turn[2] for turns in kinds.values() for turn in turns.values()), "unknown")
        origin = {"source": "imported", "model": model, "prompt_sha256": None}
        for kind in KINDS[1:]:
            turns, ours = kinds.get(kind, {}).values(), prompts[kind]["instructions"]
            response = " ".join(turn[1] for turn in turns)
            if word := kind == "reasoning" and names_emotion(response, row["label"]):
                self.note("reasoning names the emotion", image, f"{word}: {response}")
            elif response:
                asked = " ".join(turn[0] for turn in turns if turn[0]) or ours[int(row["sha256"][:8], 16) % len(ours)]
                made.append(make_triplet(row, kind, asked, response, **origin))
        if made or "categorical" in kinds:
            response = prompts["categorical"]["response"].format(label=row["label"])
            made.insert(0, make_triplet(row, KINDS[0], categorical_instruction(self.labels), response, **origin))
        return made


def _talks(marker: str, value: Any) -> dict[str, list[tuple[str, str]]]:
    """Messages (q or a, text) by kind; the kind is "" where the format does not tell it."""
    if marker == "conversations":
        said = [message for message in value if isinstance(message, dict)] if isinstance(value, list) else []
        talk = [(_SPEAKERS.get(_text(m.get("from")).lower(), ""), _text(m.get("value"))) for m in said]
        return {"": [turn for turn in talk if turn[0]] or [("q", "")]}
    text, talks = _text(value), {}
    try:  # a model that is used to schemas may have answered with an object
        found = json.loads(text[text.find("{") : text.rfind("}") + 1])
    except (ValueError, RecursionError):
        found = {}
    found = {name.strip().lower().replace(" ", "_"): content for name, content in found.items()}
    if not found.keys() & {"key_elements", "conversation", "reasoning"}:
        found = parse_sections(text)
    found = {"conversation": found.get("key_elements"), **found}  # what the authors' prompt calls it
    for kind in [kind for kind in KINDS if found.get(kind) is not None]:
        before, *parts = _MARK.split(_text(found[kind]))
        talk = [(mark[0].lower(), part.strip()) for mark, part in zip(parts[::2], parts[1::2], strict=True)]
        # a mark within a line may be prose: "this raises the question: ..."
        asked = "qa" in "".join(who for who, _ in talk) and before.rstrip(" ")[-1:] in ("", "\n")
        talks[kind] = talk if asked else [("a", _text(found[kind]))]
    return talks


def _parts(name: str) -> list[str]:
    name = unquote(name[7:]) if name.startswith("file://") else name
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]


def _tails(parts: list[str]) -> list[str]:
    """In the order of trust: the whole path, its tails from long to short, the same without suffix."""
    tails = ["/".join(parts[start:]) for start in range(max(0, len(parts) - 8), len(parts))]
    return ["/" + "/".join(parts), *tails, *(_SUFFIX.sub("", tail) for tail in tails)]


def _text(value: Any) -> str:
    """Text that can be written as UTF-8, without the marks of a VLM's template; "" for anything else."""
    text = _TOKEN.sub(" ", value.encode("utf-8", "replace").decode()) if isinstance(value, str) else ""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip()
