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
from pathlib import Path
from typing import Any

import pandas as pd

from emonb.annotate.log import Answers
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
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Append the triplets of somebody else's file for training images that have none, and report what was not usable.

    An image is known by its id, by its path at the end of theirs, or by a file name that no other image has.

    Args:
        file: JSON (a list of rows, or rows under keys) or JSON Lines.
        samples, labels, path, settings: as for `write_triplets`; the report stands in `<dataset>.import.json`.
        say: gets the messages.

    Raises:
        EmonbError: no JSON, neither format, or nothing in it that fits the dataset.
    """
    rows, digest = _rows(file)
    reader = _Reader(samples, file, rows)
    for number, row in enumerate(rows, start=1):
        reader.read(row if isinstance(row, dict) else {}, f"row {number}", labels)
    origin = {"source": "imported", "imported_from": file.name, "import_sha256": digest}
    found = [reader.compose(image_id, labels, origin) for image_id in reader.known if image_id in reader.turns]
    groups = list(filter(None, found))
    if not groups:
        first = next((f"{why} ({said['examples'][0]})" for why, said in reader.problems.items()), "no text in it")
        raise EmonbError(f"{file}: nothing to import; first problem: {first}; take a file made for this dataset")
    with Answers(samples, labels, path, settings) as answers:
        new = [group for group in groups if group[0]["image_id"] not in answers.done]
        answers.accept(*new)
    kinds = Counter(triplet["kind"] for group in groups for triplet in group)
    report = {
        "file": file.name,
        "format": _FORMATS[reader.marker],
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
        f"{file.name} ({report['format']}): {len(new):,} images added, {len(groups) - len(new):,} had triplets already"
    )
    for reason, problem in reader.problems.items():
        say(f"  {problem['count']:,} x {reason}, e.g. {problem['examples'][0]}")
    return report


def _rows(file: Path) -> tuple[list[Any], str]:
    """The rows of a file, and its digest."""
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
    return content if isinstance(content, list) else [content], hashlib.sha256(data).hexdigest()


class _Reader:
    """What of a file's rows can be used: `turns` by image and kind, question -> answer; `problems` with examples."""

    def __init__(self, samples: pd.DataFrame, file: Path, rows: list[Any]) -> None:
        fields = Counter(field for row in rows if isinstance(row, dict) for field in row)
        self.marker = max(_FORMATS, key=lambda field: fields[field])
        if not fields[self.marker]:
            raise EmonbError(
                f"{file}: neither format recognised; fields found: {', '.join(sorted(fields)[:12]) or 'none'}; give "
                f"rows with gpt_response, img, img_path, label ({_FORMATS['gpt_response']}) or image, conversations "
                f"({_FORMATS['conversations']})"
            )
        self.known = {row["image_id"]: row for row in samples.to_dict("records")}
        names = Counter(image_id.split("/")[-1] for image_id in self.known)
        self.unique = {name: i for i in self.known if names[name := i.split("/")[-1]] == 1}
        self.turns: dict[str, dict[str, dict[str, str]]] = {}
        self.models: dict[str, str] = {}
        self.problems: dict[str, dict[str, Any]] = {}

    def note(self, reason: str, where: str, excerpt: str = "") -> None:
        """Count a problem, and keep five examples, without folders of their machine."""
        found = self.problems.setdefault(reason, {"count": 0, "examples": []})
        found["count"] += 1
        if len(found["examples"]) < 5:
            said = re.sub(r"(?:[a-z]:)?[\\/][^\s]{0,400}[\\/]", "", excerpt[:500], flags=re.I)
            found["examples"].append(visible(" ".join(f"{where}: {said}".split()))[:120].rstrip(": "))

    def read(self, row: dict[str, Any], where: str, labels: Sequence[str]) -> None:
        """Take the turns of a row, or note why not."""
        names = [row[field].replace("\\", "/").split("/") for field in _NAMES if isinstance(row.get(field), str)]
        tails = ("/".join(name[start:]) for name in names for start in range(-min(8, len(name)), 0))
        image = next((tail for tail in tails if tail in self.known), None)
        image = image or next((self.unique[name[-1]] for name in names if name[-1] in self.unique), None)
        if self.marker not in row or not names:
            return self.note(f"field missing: {'image' if self.marker in row else self.marker}", where)
        if image is None:
            return self.note("image not in the dataset, or its name is ambiguous", where, names[0][-1])
        label = self.known[image]["label"]
        if self.known[image]["split"] != "train":
            return self.note("image is in val or test", image)
        if "label" in row and parse_emotion(_text(row["label"]), labels) != label:
            # the whole row: GPT-4 was given the other emotion, and its reasoning would teach that one
            return self.note("label differs from the dataset's", image, f"{_text(row['label']):.60}, here {label}")
        turns = (_sections if self.marker == "gpt_response" else _talk)(row[self.marker])
        if not turns:
            self.note("no section found", image, _text(row[self.marker]))
        self.models.setdefault(image, _text(row.get("model")) or "unknown")
        kept = self.turns.setdefault(image, {})
        for kind, question, answer in turns:
            if not answer or question in kept.get(kind, {}):
                self.note("answered twice, the first kept" if answer else "empty answer", image, question or kind)
            elif kind == "reasoning" and (word := names_emotion(answer, label)):
                self.note("reasoning names the emotion", image, f"{word}: {answer}")
            elif " " in answer:  # a bare label is the categorical answer, which is ours
                kept.setdefault(kind, {})[question] = answer
        return None

    def compose(self, image_id: str, labels: Sequence[str], origin: dict[str, Any]) -> list[dict[str, Any]]:
        """The triplets of an image in the order of `KINDS`; [] if there is nothing for it."""
        row, origin = self.known[image_id], {**origin, "model": self.models[image_id]}
        made = [
            make_triplet(row, kind, " ".join(turns.values()), origin, " ".join(filter(None, turns)))
            for kind, turns in sorted(self.turns[image_id].items())
        ]
        return [categorical_triplet(row, labels, origin), *made] if made else []


def _sections(response: Any) -> list[tuple[str, str, str]]:
    """Kind, question and answer of GPT-4's headed sections."""
    found = parse_sections(_text(response))
    found.setdefault("conversation", found.get("key_elements"))  # what the authors' prompt calls it
    return [(kind, "", _text(found[kind])) for kind in KINDS[1:] if found.get(kind) is not None]


def _talk(messages: Any) -> list[tuple[str, str, str]]:
    """Kind, question and answer of LLaVA's messages."""
    question, turns = "", []
    for message in messages if isinstance(messages, list) else []:
        message = message if isinstance(message, dict) else {}
        text = " ".join(_text(message.get("value")).split())
        if message.get("from") in ("gpt", "assistant"):
            turns.append(("reasoning" if _ASKS_WHY.search(question) else "conversation", question, text))
        question = text if message.get("from") in ("human", "user") else ""
    return turns


def _text(value: Any) -> str:
    """Text that can be written as UTF-8, without the marks of a VLM's template; "" for anything else."""
    text = _TOKEN.sub(" ", value.encode("utf-8", "replace").decode()) if isinstance(value, str) else ""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()
