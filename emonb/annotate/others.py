"""Triplets that somebody else had written, brought into our contract instead of being paid for again.

Two formats are told apart by their fields: *EmoVLM-KD annotations* as the authors' public `generate_instruction.py`
writes them (a row per training image, GPT-4's free text "1. key elements ... 2. reasoning ..." and the emotion it was
given), and *EmoVIT conversations*, LLaVA's instruction format (a row per image with questions and answers). The
dataset stays the judge: its label is taught, and only its training images get triplets.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from emonb.annotate.log import open_answers
from emonb.annotate.request import parse_sections
from emonb.data import parse_emotion
from emonb.errors import EmonbError
from emonb.files import visible, write_json
from emonb.settings import TripletSettings
from emonb.triplets import KINDS, categorical_triplet, make_triplet, names_emotion

_FORMATS = {"gpt_response": "EmoVLM-KD annotations", "conversations": "EmoVIT conversations"}
_NAMES = ("image_id", "img_path", "image", "img")  # not `id`: EmoVIT cuts it to five characters
_ASKS_WHY = re.compile(r"\b(why|explain|reason|evok|feel)", re.I)
_TOKEN = re.compile(r"<image>|<\|[^|<>]{1,40}\|>")  # a VLM's processor would look for another picture there


def import_triplets(
    file: Path,
    samples: pd.DataFrame,
    labels: Sequence[str],
    path: Path,
    settings: TripletSettings,
    *,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Append the triplets of somebody else's file for training images that have none, and report what was not usable.

    An image is known by its id, by its path at the end of theirs, or by a file name that no other image has.

    Args:
        file: JSON (a list of rows, or rows under keys) or JSON Lines.
        samples: the sample table.
        labels: the taxonomy's labels in order.
        path: `OUT/triplets/<dataset>.jsonl`; the report stands beside it, in `<dataset>.import.json`.
        settings: for the files, as `open_answers` takes them.
        say: gets the messages.

    Raises:
        EmonbError: no JSON, neither format, or nothing in it that fits the dataset.
    """
    rows, data = _rows(file)
    fields = [field for row in rows if isinstance(row, dict) for field in row]
    marker = max(_FORMATS, key=fields.count)
    if marker not in fields:
        raise EmonbError(
            f"{file}: neither format recognised; fields found: {', '.join(sorted({*fields})[:12]) or 'none'}; give "
            f"rows with gpt_response, img, img_path, label ({_FORMATS['gpt_response']}) or image, conversations "
            f"({_FORMATS['conversations']})"
        )
    reader = _Reader(samples, labels, marker)
    for number, row in enumerate(rows, start=1):
        reader.read(row, f"row {number}")
    origin = {"source": "imported", "imported_from": file.name, "import_sha256": hashlib.sha256(data).hexdigest()}
    groups = [group for row in reader.known.values() if (group := reader.compose(row, origin))]
    if not groups:
        first = next((f"{why} ({found['examples'][0]})" for why, found in reader.problems.items()), "no text in it")
        raise EmonbError(f"{file}: nothing to import; first problem: {first}; take a file made for this dataset")
    with open_answers(samples, labels, path, settings) as answers:
        new = [group for group in groups if group[0]["image_id"] not in answers.done]
        answers.accept(*new)
    kinds = Counter(triplet["kind"] for group in groups for triplet in group)
    report = {
        "file": file.name,
        "format": _FORMATS[marker],
        "rows": len(rows),
        "images": len(groups),
        "triplets": {kind: kinds[kind] for kind in KINDS},
        "problems": reader.problems,
        "train_images_without": int((samples["split"] == "train").sum()) - len(groups),
        "images_added": len(new),
        "images_already_there": len(groups) - len(new),
    }
    write_json(path.with_name(f"{path.stem}.import.json"), report)
    say(
        f"{file.name} ({_FORMATS[marker]}): {len(new):,} images added, {len(groups) - len(new):,} had triplets already"
    )
    for reason, problem in reader.problems.items():
        say(f"  {problem['count']:,} x {reason}, e.g. {problem['examples'][0]}")
    return report


def _rows(file: Path) -> tuple[list[Any], bytes]:
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
        try:
            content = json.loads(text)
        except ValueError:
            content = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise EmonbError(f"{file}: cannot be read as JSON ({error}); give a whole file, in UTF-8") from None
    if isinstance(content, dict) and not _FORMATS.keys() & content.keys():  # rows under the images' names
        content = [{"image_id": key, **row} if isinstance(row, dict) else row for key, row in content.items()]
    return content if isinstance(content, list) else [content], data


class _Reader:
    def __init__(self, samples: pd.DataFrame, labels: Sequence[str], marker: str) -> None:
        self.labels, self.marker = labels, marker
        self.known = {row["image_id"]: row for row in samples.to_dict("records")}
        names = Counter(PurePosixPath(image_id).name for image_id in self.known)
        self.unique = {name: i for i in self.known if names[name := PurePosixPath(i).name] == 1}
        self.turns: dict[str, dict[str, dict[str, str]]] = {}  # by image and kind: question -> answer
        self.models: dict[str, str] = {}
        self.problems: dict[str, dict[str, Any]] = {}

    def note(self, reason: str, where: str, excerpt: str = "") -> None:
        """Count a problem, and keep five examples, without folders of their machine."""
        found = self.problems.setdefault(reason, {"count": 0, "examples": []})
        found["count"] += 1
        if len(found["examples"]) < 5:
            said = re.sub(r"(?:[a-z]:)?[\\/][^\s]{0,400}[\\/]", "", excerpt[:500], flags=re.I)
            found["examples"].append(visible(" ".join(f"{where}: {said}".split()))[:120].rstrip(": "))

    def find(self, names: Sequence[str]) -> str | None:
        """The image that is meant."""
        for name in names:
            parts = name.replace("\\", "/").split("/")[-8:]
            tails = ("/".join(parts[start:]) for start in range(len(parts)))
            image = next((tail for tail in tails if tail in self.known), None) or self.unique.get(parts[-1])
            if image:
                return image
        return None

    def read(self, row: Any, where: str) -> None:
        """Take the turns of a row, or note why not."""
        row = row if isinstance(row, dict) else {}
        names = [row[field] for field in _NAMES if isinstance(row.get(field), str) and row[field]]
        if self.marker not in row or not names:
            return self.note(f"field missing: {'image' if self.marker in row else self.marker}", where)
        image = self.find(names)
        if image is None:
            return self.note("image not in the dataset, or its name is ambiguous", where, names[0].split("/")[-1])
        label = self.known[image]["label"]
        if self.known[image]["split"] != "train":
            return self.note("image is in val or test", image)
        if "label" in row and parse_emotion(_text(row["label"]), self.labels) != label:
            # the whole row: GPT-4 was given the other emotion, and its reasoning would teach that one
            return self.note("label differs from the dataset's", image, f"{_text(row['label']):.60}, here {label}")
        turns = _sections(row) if self.marker == "gpt_response" else _talk(row)
        kept = self.turns.setdefault(image, {})
        self.models.setdefault(image, _text(row.get("model")) or "unknown")
        for kind, question, answer in turns:
            if not answer or question in kept.get(kind, {}):
                self.note("answered twice, the first kept" if answer else "empty answer", image, question or kind)
            elif kind == "reasoning" and (word := names_emotion(answer, label)):
                self.note("reasoning names the emotion", image, f"{word}: {answer}")
            elif len(answer.split()) > 1:  # a bare label is the categorical answer, which is ours
                kept.setdefault(kind, {})[question] = answer
        if not turns:
            self.note("no section found", image, _text(row[self.marker]))

    def compose(self, row: dict[str, Any], origin: dict[str, Any]) -> list[dict[str, Any]]:
        """The triplets of an image in the order of `KINDS`; [] if there is nothing for it."""
        origin = {**origin, "model": self.models.get(row["image_id"], "unknown")}
        made = []
        for kind, turns in sorted(self.turns.get(row["image_id"], {}).items()):
            asked, answer = " ".join(filter(None, turns)), " ".join(turns.values())
            made.append(make_triplet(row, kind, answer, origin, asked))
        return [categorical_triplet(row, self.labels, origin), *made] if made else []


def _sections(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Kind, question and answer of GPT-4's headed sections."""
    found = parse_sections(_text(row["gpt_response"]))
    found.setdefault("conversation", found.get("key_elements", ""))  # what the authors' prompt calls it
    return [(kind, "", _text(found[kind])) for kind in KINDS[1:] if found.get(kind) is not None and len(found) > 1]


def _talk(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Kind, question and answer of LLaVA's messages."""
    question, turns = "", []
    messages = row["conversations"] if isinstance(row["conversations"], list) else []
    for message in filter(lambda message: isinstance(message, dict), messages):
        text = " ".join(_text(message.get("value")).split())
        if message.get("from") in ("gpt", "assistant"):
            turns.append(("reasoning" if _ASKS_WHY.search(question) else "conversation", question, text))
        question = text if message.get("from") in ("human", "user") else ""
    return turns


def _text(value: Any) -> str:
    """Text that can be written as UTF-8, without the marks of a VLM's template; "" for anything else."""
    text = _TOKEN.sub(" ", value.encode("utf-8", "replace").decode()) if isinstance(value, str) else ""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()
