"""Room 02: what a paid annotator is asked about one image, and how its answer is read.

The paper has GPT-4 write the conversation and the reasoning (section on instruction tuning); the categorical
triplet follows from the label and is never paid for. One request gives both, by a schema where the server can
do schemas, else as two headed sections, else (tiny models) as one question per request.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import re
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emonb.samples import open_picture
from emonb.settings import TripletSettings
from emonb.triplets import load_prompts, make_triplet, three_triplets

__all__ = [
    "FORMATS",
    "Answer",
    "Picture",
    "Reply",
    "annotator_sha256",
    "encode_picture",
    "paid_triplets",
    "parse_reply",
    "parse_sections",
    "requests_for",
]

FORMATS = ("schema", "sections", "questions")  # in this order: from the strictest to what any model can do
_SENDABLE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
# Only blanks within the line before a heading: across lines the search would take cubic time.
_SECTION = re.compile(
    r"^[^\S\n]{0,8}[>#*_\-]{0,6}[^\S\n]{0,8}(?:\(?\d{1,2}[.):]?[^\S\n]{0,8})?[*_\"“]{0,4}[^\S\n]{0,4}"
    r"(?P<name>categorical|conversation|reasoning|key[\s_-](?:visual\s)?elements)"
    r"(?: (?:section|part|response|answer|triplet))?[*_\"”]{0,4}(?: ?\([^()\n]{0,80}\))?[*_]{0,4}[^\S\n]{0,8}"
    r"(?:[:：\-–—]+[^\S\n]{0,8}[*_]{0,4}|$)",
    re.IGNORECASE | re.MULTILINE,
)
_ROLE = re.compile(r"^\s*(?:<\|[^|>]*\|>\s*)+(?:assistant)?\s*")  # some servers leave the template's marks in


class Answer(BaseModel):
    """The schema of a structured answer; the descriptions are sent with it."""

    model_config = ConfigDict(extra="forbid")

    conversation: str = Field(description="two to four sentences on the visual elements that stand out")
    reasoning: str = Field(description="two to four sentences on why people feel so; the emotion is not named")
    key_elements: list[str] = Field(description="three to six short noun phrases")


@dataclass(frozen=True)
class Picture:
    """A picture as it is sent: its true media type, its bytes, and its (width, height) in pixels."""

    media_type: str
    content: bytes
    size: tuple[int, int]


@dataclass(frozen=True)
class Reply:
    """What came back from the server for one image: the last or only message, and what it cost in tokens."""

    text: str
    finish_reason: str | None
    refusal: str | None
    model: str
    created: str
    usage: dict[str, Any] | None


@functools.cache
def _annotator_prompts() -> tuple[dict[str, str], str]:
    content = resources.files("emonb").joinpath("resources", "annotator.yaml").read_bytes()
    prompts = resources.files("emonb").joinpath("resources", "prompts.yaml").read_bytes()
    return yaml.safe_load(content), hashlib.sha256(content + prompts).hexdigest()


def annotator_sha256() -> str:
    """Hash of the wording: `resources/annotator.yaml` and the instructions of `resources/prompts.yaml`."""
    return _annotator_prompts()[1]


def encode_picture(path: str | Path, max_side: int) -> Picture:
    """A picture as it is sent.

    The file itself where it is small enough, upright and of a type that servers take; else turned as its EXIF
    says, on white, shrunk to `max_side` px on the longer side, as JPEG (quality 90).

    Raises:
        UnreadablePicture: not a readable picture.
    """
    try:
        with Image.open(path) as raw:
            media = _SENDABLE.get(raw.format or "")
            upright = raw.getexif().get(0x0112, 1) == 1  # EXIF orientation
            plain = raw.mode in ("RGB", "L") and not getattr(raw, "is_animated", False)
            if media and upright and plain and max(raw.size) <= max_side and "transparency" not in raw.info:
                raw.load()  # a truncated file is found here, not by the server
                return Picture(media, Path(path).read_bytes(), raw.size)
    except Exception:  # whatever a decoder raises: open_picture says what is wrong
        pass
    image = open_picture(path)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return Picture("image/jpeg", buffer.getvalue(), image.size)


def requests_for(
    row: dict[str, Any], picture: Picture, form: str, settings: TripletSettings, again: str = ""
) -> list[dict[str, Any]]:
    """Bodies of the chat completions for one image: one, or two in the form `questions`.

    Args:
        row: `label` and `sha256` of a training image.
        picture: what `encode_picture` gave.
        form: one of `FORMATS`.
        settings: model, detail, temperature and token limit.
        again: why the last answer could not be used; it is told, so that the next one is another.
    """
    url = f"data:{picture.media_type};base64,{base64.b64encode(picture.content).decode()}"
    image = {"type": "image_url", "image_url": {"url": url, "detail": settings.detail}}
    prompts = _annotator_prompts()[0]
    system, texts = prompts["system"], [prompts["user"].format(label=row["label"])]
    if form == "sections":
        texts = [f"{texts[0]}\n\n{prompts['sections']}"]
    if again and form != "questions":
        texts = [f"{texts[0]}\n\n{prompts['again'].format(reason=again)}"]
    if form == "questions":
        system, texts = load_prompts()["system"], list(_instructions(row).values())
    body: dict[str, Any] = {"model": settings.model, "max_completion_tokens": settings.max_output_tokens}
    if settings.temperature is not None:
        body["temperature"] = settings.temperature
    if form == "schema":
        schema = {"name": "triplets", "strict": True, "schema": Answer.model_json_schema()}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return [
        {
            **body,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": [image, {"type": "text", "text": text}]},
            ],
        }
        for text in texts
    ]


def _instructions(row: dict[str, Any]) -> dict[str, str]:
    """The instruction of each paid kind: the wording varies with the picture, yet reproducibly."""
    prompts, turn = load_prompts(), int(row["sha256"][:8], 16)
    return {
        kind: prompts[kind]["instructions"][turn % len(prompts[kind]["instructions"])]
        for kind in ("conversation", "reasoning")
    }


def parse_sections(text: str) -> dict[str, str]:
    """The headed sections of a free answer; keys among categorical, conversation, reasoning, key_elements.

    Tolerant of Markdown, numbering, capitals, quotes and code fences; the first of two equal headings counts.
    """
    text = re.sub(r"^[^\S\n]*```\w*[^\S\n]*$", "", text, flags=re.MULTILINE)
    marks = list(_SECTION.finditer(text))
    sections: dict[str, str] = {}
    for mark, following in zip_longest(marks, marks[1:]):
        name = mark["name"].lower().split()[0].split("_")[0].split("-")[0]
        content = text[mark.end() : following.start() if following else None].strip().strip("*_").strip()
        sections.setdefault("key_elements" if name == "key" else name, content)
    return sections


def parse_reply(replies: list[Reply], form: str) -> Answer | None:
    """The answer in the replies of one image, or None where it is not in the asked form.

    JSON is looked for first (also fenced, or with words around it), then sections.
    """
    if form == "questions":
        texts = [_ROLE.sub("", reply.text).strip() for reply in replies]
        return Answer(conversation=texts[0], reasoning=texts[1], key_elements=[])
    text = _ROLE.sub("", replies[0].text)
    found = re.search(r"\{.*\}", text, re.DOTALL)
    if found:
        try:
            return Answer.model_validate(json.loads(found.group(0)))
        except (ValidationError, ValueError, RecursionError):
            pass
    if form == "schema":
        return None
    sections = parse_sections(text)
    if not sections.get("conversation") or not sections.get("reasoning"):
        return None
    elements = [part.strip(" .*-\t") for part in re.split(r"[,;\n]", sections.get("key_elements", ""))]
    return Answer(
        conversation=sections["conversation"],
        reasoning=sections["reasoning"],
        key_elements=[element for element in elements if element],
    )


def paid_triplets(
    row: dict[str, Any], labels: list[str], answer: Answer, origin: dict[str, Any], usage: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The three triplets of an image from a paid answer.

    Args:
        row: `image_id`, `label`, `sha256` of the image.
        labels: the taxonomy's labels in order.
        answer: the checked answer.
        origin: `source`, `model`, `created`, `prompt_sha256` and what else is known of the request.
        usage: tokens of the request; it stands with the conversation alone, so that a sum counts it once.
    """
    asked = _instructions(row)
    conversation = make_triplet(row, "conversation", asked["conversation"], answer.conversation, **origin)
    reasoning = make_triplet(row, "reasoning", asked["reasoning"], answer.reasoning, **origin)
    return three_triplets(
        row, labels, origin, {**conversation, "usage": usage, "key_elements": answer.key_elements}, reasoning
    )
