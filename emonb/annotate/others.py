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
from collections.abc import Callable, Collection, Iterator, Sequence
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
    fields = Counter(field for row in rows for field in row)
    marker = max(_FORMATS, key=lambda field: fields[field])
    if not fields[marker]:
        raise EmonbError(
            f"{file}: neither format recognised; fields found: {', '.join(sorted(fields)[:12]) or 'none'}; give rows "
            f"with gpt_response, img, img_path, label ({_FORMATS['gpt_response']}) or image, conversations "
            f"({_FORMATS['conversations']})"
        )
    known = {row["image_id"]: row for row in samples.to_dict("records")}
    named, found, problems = _named(rows, known), {}, {}
    for number, (row, name) in enumerate(zip(rows, named, strict=True), start=1):
        reason = "image not in the dataset, or its name is ambiguous"
        if name in known:
            reason = _take(row, known[name], labels, marker, found.setdefault(name, {}))
        if reason:
            problems.setdefault(reason, []).append(visible(f"row {number}: {name}")[:120])
    origin = {"source": "imported", "imported_from": file.name, "import_sha256": digest}
    groups = [_composed(known[name], labels, origin, found[name]) for name in known if found.get(name)]
    if not groups:
        first = next((f"{why} ({where[0]})" for why, where in problems.items()), "no row in it")
        raise EmonbError(f"{file}: nothing to import; first problem: {first}; take a file made for this dataset")
    with Answers(samples, labels, path, settings) as answers:
        new = [group for group in groups if group[0]["image_id"] not in answers.done]
        answers.accept(*new)
    kinds = Counter(triplet["kind"] for group in groups for triplet in group)
    report = {
        "file": file.name,
        "format": _FORMATS[marker],
        "rows": len(rows),
        "images": len(groups),
        "triplets": {kind: kinds[kind] for kind in KINDS},
        "problems": {why: {"count": len(where), "examples": where[:5]} for why, where in problems.items()},
        "train_images_without": int((samples["split"] == "train").sum()) - len(groups),
        "images_added": len(new),
        "images_already_there": len(groups) - len(new),
    }
    write_json(path.with_name(f"{path.stem}.import.json"), report)
    say(
        f"{file.name} ({_FORMATS[marker]}): {len(new):,} images added, {len(groups) - len(new):,} had triplets already"
    )
    for why, where in problems.items():
        say(f"  {len(where):,} x {why}, e.g. {where[0]}")
    return report


def _rows(file: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows of a file, an empty one for what is no object; and the file's digest."""
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
    rows = content if isinstance(content, list) else [content]
    return [row if isinstance(row, dict) else {} for row in rows], hashlib.sha256(data).hexdigest()


def _named(rows: list[dict[str, Any]], known: Collection[str]) -> Iterator[str]:
    """The image that each row means; the last part of the name that stands there if none is meant."""
    counts = Counter(image_id.split("/")[-1] for image_id in known)
    unique = {name: image_id for image_id in known if counts[name := image_id.split("/")[-1]] == 1}
    for row in rows:
        names = [row[field].replace("\\", "/").split("/") for field in _NAMES if isinstance(row.get(field), str)]
        tails = ("/".join(name[start:]) for name in names for start in range(-min(8, len(name)), 0))
        image = next((tail for tail in tails if tail in known), "")
        last = [name[-1] for name in names]
        yield image or next((unique[name] for name in last if name in unique), "".join(last[:1]))


def _take(
    row: dict[str, Any], image: dict[str, Any], labels: Sequence[str], marker: str, found: dict[str, dict[str, str]]
) -> str:
    """Put the turns of a row into `found`, kind -> question -> answer; says why not, or not all of them."""
    if image["split"] != "train":
        return "image is in val or test"
    if "label" in row and parse_emotion(_text(row["label"]), labels) != image["label"]:
        return "label differs from the dataset's"  # GPT-4 was given it: its reasoning would teach the other one
    turns, reason = (_sections if marker == "gpt_response" else _talk)(row.get(marker)), ""
    for kind, question, answer in turns:
        if kind == "reasoning" and names_emotion(answer, image["label"]):
            reason = "reasoning names the emotion"
        elif question in found.get(kind, {}):
            reason = "answered twice, the first kept"
        elif " " in answer:  # a bare label is the categorical answer, which is ours
            found.setdefault(kind, {})[question] = answer
            found.setdefault("", {"model": _text(row.get("model")) or "unknown"})
    return reason if turns else "no text found"


def _composed(
    row: dict[str, Any], labels: Sequence[str], origin: dict[str, Any], found: dict[str, dict[str, str]]
) -> list[dict[str, Any]]:
    """The triplets of an image in the order of `KINDS`."""
    origin = {**origin, **found.pop("")}
    made = [categorical_triplet(row, labels, origin)]
    for kind, turns in sorted(found.items()):
        made.append(make_triplet(row, kind, " ".join(turns.values()), origin, " ".join(filter(None, turns))))
    return made


def _sections(response: Any) -> list[tuple[str, str, str]]:
    """Kind, question and answer of GPT-4's headed sections."""
    found = parse_sections(_text(response))
    found.setdefault("conversation", found.get("key_elements"))  # what the authors' prompt calls it
    return [(kind, "", _text(found[kind])) for kind in KINDS[1:] if found.get(kind)]


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
