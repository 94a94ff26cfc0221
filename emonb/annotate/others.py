"""Triplets that somebody else had written, brought into our contract instead of being paid for again.

Two formats: *EmoVLM-KD annotations* as the authors' public `generate_instruction.py` writes them (a row per training
image, GPT-4's free text "1. key elements ... 2. reasoning ..." and the emotion it was given), and *EmoVIT
conversations*, LLaVA's instruction format (rows with questions and answers about an image). The dataset stays the
judge: its label is taught, and only its training images get triplets.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from emonb.annotate.log import Answers
from emonb.annotate.request import dig, json_answer, parse_sections, spoken, text_lines
from emonb.data import parse_emotion
from emonb.errors import EmonbError, visible
from emonb.files import write_json
from emonb.settings import TripletSettings
from emonb.triplets import Record, make_triplets, names_emotion

_NAMES = ("image_id", "img_path", "image", "img")  # not `id`: EmoVIT cuts it to five characters
_ASKS_WHY = re.compile(r"\b(why|explain|reason|evok|feel)", re.I)


def import_triplets(
    file: Path,
    samples: pd.DataFrame,
    labels: Sequence[str],
    path: Path,
    settings: TripletSettings,
    say: Callable[[str], None] = print,
) -> Record:
    """Append the triplets of somebody else's file for training images that have none, and report what was not usable.

    `file` is JSON, a list of rows; the other arguments are those of `write_triplets`. An image is known by the end of
    its path, as far as no other image's ends alike. The report is returned, and stands in `<dataset>.import.json`.
    Raises `EmonbError` where there is no list of rows, or nothing in it that fits the dataset.
    """
    try:
        data = file.read_bytes()
        rows = [row if isinstance(row, dict) else {} for row in _rows(data)]
    except (OSError, ValueError, RecursionError) as error:
        raise EmonbError(f"{file}: cannot be read as JSON ({error}); give a whole file, in UTF-8") from None
    known = {row["image_id"]: row for row in samples.to_dict("records")}
    counts = Counter(end for image_id in known for end in _ends(image_id))
    images = {end: image_id for image_id in known for end in _ends(image_id) if counts[end] == 1 or end == image_id}
    found: dict[str, dict[str, dict[str, str]]] = {}  # image -> kind -> question -> answer
    models, problems = dict[str, str](), defaultdict[str, list[str]](list)
    for number, row in enumerate(rows, start=1):
        names = [end for field in _NAMES if isinstance(row.get(field), str) for end in _ends(row[field])]
        image_id = next((images[name] for name in names if name in images), "")
        turns, problem = _usable(row, known.get(image_id), labels)
        for kind, question, answer in turns:
            found.setdefault(image_id, {}).setdefault(kind, {}).setdefault(question, answer)
            models.setdefault(image_id, _text(row.get("model")) or "unknown")
        if problem:
            problems[problem].append(visible(f"row {number}: {image_id or ''.join(names[-1:])}")[:120])
    if not found:
        first = next((f"{why} ({where[0]})" for why, where in problems.items()), "it is no list of rows")
        raise EmonbError(
            f"{file}: nothing to import: {first}; give rows with gpt_response, img_path, label (the authors' "
            "annotations) or image, conversations (EmoVIT), made for this dataset"
        )
    origin = {"source": "imported", "imported_from": file.name, "import_sha256": hashlib.sha256(data).hexdigest()}
    with Answers.opened(samples, labels, path, settings) as answers:
        new = [image_id for image_id in known if image_id in found and image_id not in answers.done]
        made = []
        for image_id in new:
            texts = {kind: " ".join(said.values()) for kind, said in found[image_id].items()}
            asked = {kind: " ".join(said).strip() for kind, said in found[image_id].items()}
            by = {**origin, "model": models[image_id]}
            made.append(make_triplets(known[image_id], labels, by, texts, **asked))
        answers.accept(*made)
    report = {
        **{"file": file.name, "rows": len(rows), "images": len(found), "images_added": len(new)},
        "problems": {why: {"count": len(where), "examples": where[:5]} for why, where in problems.items()},
    }
    write_json(path.with_suffix(".import.json"), report)
    say(f"{file.name}: {len(new):,} images added, {len(found) - len(new):,} had triplets already")
    for why, where in problems.items():
        say(f"  {len(where):,} x {why}, e.g. {where[0]}")
    return report


def _rows(data: bytes) -> list[Any]:
    """The rows of a JSON file: a list, one a line, or a list inside an object; also fenced, with a comma too many."""
    text = data.decode(json.detect_encoding(data)).strip()
    text = re.sub(r"\A```\w*", "", text).removesuffix("```").strip()
    try:
        content = json.loads(text, strict=False)
    except ValueError:
        with suppress(ValueError):
            if "\n" in text:
                return [json.loads(line, strict=False) for line in text_lines(text.encode())]
        content = json.loads(re.sub(r",(\s*[}\]]\s*)(?=[,}\]]|\Z)", r"\1", text), strict=False)
    known = isinstance(content, dict) and not content.keys() & {*_NAMES}  # no row alone
    lists = [part for part in content.values() if isinstance(part, list)] if known else [content]
    return lists[0] if len(lists) == 1 and isinstance(lists[0], list) else []


def _ends(name: str) -> list[str]:
    """A path and its ends, the longest first."""
    parts = name.replace("\\", "/").split("/")[-8:]
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _usable(row: Record, image: Record | None, labels: Sequence[str]) -> tuple[list[tuple[str, str, str]], str]:
    """Kind, question and answer of what a row says about an image; and why not all of it, or nothing, is usable."""
    if image is None:
        return [], "image not in the dataset, or its name is ambiguous"
    if image["split"] != "train":
        return [], "image is in val or test"
    if "label" in row and parse_emotion(_text(row["label"]), labels) != image["label"]:
        return [], "label differs from the dataset's"  # GPT-4 was given it: its reasoning would teach the other one
    said = row.get("gpt_response")
    said = _text(said if isinstance(said, str) else json.dumps(said))
    sections = json_answer(said) or {name: _text(text) for name, text in parse_sections(said).items()}
    seen = sections.get("conversation") or sections.get("key_elements", "")  # what the authors' prompt calls it
    seen = ", ".join(seen) if isinstance(seen, list) else seen
    turns = [("conversation", "", seen), ("reasoning", "", sections.get("reasoning", "")), *_talk(row)]
    turns = [(kind, question, answer) for kind, question, answer in turns if answer]
    usable = [turn for turn in turns if turn[0] != "reasoning" or not names_emotion(turn[2], image["label"])]
    return usable, "no text found" if not turns else "reasoning names the emotion" if usable != turns else ""


def _talk(row: Record) -> list[tuple[str, str, str]]:
    """The questions and answers of LLaVA's messages; a bare label is the categorical answer, which is ours."""
    question, turns = "", []
    messages = row.get("conversations")
    for message in messages if isinstance(messages, list) else []:
        who, text = dig(message, "from"), " ".join(_text(dig(message, "value")).split())
        if who in ("gpt", "assistant") and " " in text:
            turns.append(("reasoning" if _ASKS_WHY.search(question) else "conversation", question, text))
        question = text if who in ("human", "user") else ""
    return turns


def _text(value: Any) -> str:
    """Text that can be written as UTF-8, as far as it may be taught; "" for anything else."""
    text = spoken(value.encode("utf-8", "replace").decode()) if isinstance(value, str) else ""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()
