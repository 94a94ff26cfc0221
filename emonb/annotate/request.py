"""What a paid model is asked about one image, and how its answer is read.

One request gives conversation and reasoning (the categorical triplet follows from the label and is never paid for):
by a schema where the server can do schemas, else as headed sections, else (tiny models) as one question a request.
"""

from __future__ import annotations

import base64
import io
import os
import re
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from pydantic import BaseModel, Field

from emonb.data import open_picture
from emonb.files import resource
from emonb.settings import TripletSettings
from emonb.triplets import make_triplet

FORMS = ("schema", "sections", "questions")  # in this order: from the strictest to what any model can do
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


_LOCAL_PATH = re.compile(r"(?<![\w/:.])(?:/[\w.@+\-]+){2,}/?|[A-Za-z]:\\[^\s'\"]+")


class Answer(BaseModel, extra="forbid"):
    """The schema of a structured answer; the descriptions are sent with it."""

    conversation: str = Field(description="two to four sentences on the visual elements that stand out")
    reasoning: str = Field(description="two to four sentences on why people feel so; the emotion is not named")
    key_elements: list[str] = Field(description="three to six short noun phrases")


class Reply(NamedTuple):
    """What a server said to one request, and the tokens that it counted (None: it does not count)."""

    text: str
    refusal: str
    model: str
    finish_reason: str | None
    usage: dict[str, int] | None


def encode_picture(path: str | Path, max_side: int) -> str:
    """A picture as it is sent: a data URL with its true media type.

    The file itself where it is small enough, upright and of a type that servers take; else turned as its EXIF
    says, on white, shrunk to `max_side` px on the longer side, as JPEG (quality 90).

    Raises:
        UnreadablePicture: not a readable picture.
    """
    media, content = "", b""
    with suppress(Exception), Image.open(path) as raw:  # whatever a decoder raises: open_picture says what is wrong
        upright = raw.getexif().get(0x0112, 1) == 1  # EXIF orientation
        plain = raw.mode in ("RGB", "L") and not getattr(raw, "is_animated", False)
        if upright and plain and max(raw.size) <= max_side and "transparency" not in raw.info:
            raw.load()  # a truncated file is found here, not by the server
            media, content = _SENDABLE.get(raw.format or "", ""), Path(path).read_bytes()
    if not media:
        image, buffer = open_picture(path), io.BytesIO()
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=90)
        media, content = "image/jpeg", buffer.getvalue()
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def requests_for(
    row: dict[str, Any], picture: str, form: str, settings: TripletSettings, again: str = ""
) -> list[dict[str, Any]]:
    """Bodies of the chat completions for one image: one, or two in the form `questions`.

    Args:
        row: `image_id`, `label` and `sha256` of a training image; `picture`: what `encode_picture` gave.
        form: one of `FORMS`; `settings`: model, detail, temperature and token limit.
        again: why the last answer could not be used; it is told, so that the next one is another.
    """
    asked = resource("annotator.yaml")
    system, texts = asked["system"], [asked["user"].format(label=row["label"])]
    if form == "sections":
        texts[0] += "\n\n" + asked["sections"]
    if again:
        texts[0] += "\n\n" + asked["again"].format(reason=again)
    if form == "questions":
        system = resource("prompts.yaml", "system")
        texts = [make_triplet(row, kind, "", {})["instruction"] for kind in ("conversation", "reasoning")]
    body: dict[str, Any] = {"model": settings.model, "max_completion_tokens": settings.max_output_tokens}
    if settings.temperature is not None:
        body["temperature"] = settings.temperature
    if form == "schema":
        schema = {"name": "triplets", "strict": True, "schema": Answer.model_json_schema()}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    first = {"role": "system", "content": system}
    image = {"type": "image_url", "image_url": {"url": picture, "detail": settings.detail}}
    users = [{"role": "user", "content": [image, {"type": "text", "text": text}]} for text in texts]
    return [{**body, "messages": [first, user]} for user in users]


def read_reply(completion: Any) -> Reply:
    """What a chat completion (JSON) says; with tokens alone it was paid for. Raises ValueError if it is none."""
    usage, message, choice = None, None, {}
    with suppress(AttributeError, KeyError, TypeError, ValueError, OverflowError):
        usage = {name: int(completion["usage"][name]) for name in ("prompt_tokens", "completion_tokens")}
        usage = usage if min(usage.values()) >= 0 < max(usage.values()) else None
    with suppress(AttributeError, KeyError, TypeError, IndexError):
        choice = completion["choices"][0]
        message = choice["message"]
    if not isinstance(message, dict) and not usage:
        raise ValueError("the server's answer is not a chat completion")
    said = (message.get("content"), message.get("refusal")) if isinstance(message, dict) else ("", "")
    texts = [str(text or "").encode("utf-8", "replace").decode() for text in (*said, completion.get("model"))]
    return Reply(*texts, choice.get("finish_reason"), usage)


def parse_sections(text: str) -> dict[str, str]:
    """The headed sections of a free answer; keys among categorical, conversation, reasoning, key_elements.

    Tolerant of Markdown, numbering, capitals, quotes and code fences; the first of two equal headings counts.
    """
    text = re.sub(r"^[^\S\n]*```\w*[^\S\n]*$", "", text, flags=re.MULTILINE)
    marks = list(_SECTION.finditer(text))
    sections: dict[str, str] = {}
    for mark, following in zip_longest(marks, marks[1:]):
        name = re.split(r"[\s_-]", mark["name"].lower())[0]
        content = text[mark.end() : following.start() if following else None].strip().strip("*_").strip()
        sections.setdefault("key_elements" if name == "key" else name, content)
    return sections


def parse_reply(texts: list[str], form: str) -> Answer | None:
    """The answer in the replies to the requests for one image, or None where it is not in a form that can be read.

    JSON is looked for first (also fenced, or with words around it), then sections.
    """
    texts = [_ROLE.sub("", text).strip() for text in texts]
    if form == "questions":
        return Answer(conversation=texts[0], reasoning=texts[1], key_elements=[])
    if found := re.search(r"\{.*\}", texts[0], re.DOTALL):
        with suppress(ValueError, RecursionError):
            return Answer.model_validate_json(found.group(0))
    sections = parse_sections(texts[0])
    if not sections.get("conversation") or not sections.get("reasoning"):
        return None
    elements = [part.strip(" .*-\t") for part in re.split(r"[,;\n]", sections.get("key_elements", ""))]
    texts = [sections["conversation"], sections["reasoning"]]
    return Answer(conversation=texts[0], reasoning=texts[1], key_elements=[part for part in elements if part])


def public_name(model: str) -> str:
    """A model's name without the folder that a local server may put before it."""
    is_path = model.startswith(("/", "~", ".")) or re.match(r"[A-Za-z]:\\", model)
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1] if is_path else model


def scrub(text: str) -> str:
    """A server's message without the key, without local paths, on one line of at most 300 characters."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    text = text.replace(key, "[key]") if len(key) >= 4 else text
    text = re.sub(r"\bsk-[\w*\-]{4,}", "[key]", text)  # also a masked or a foreign one
    text = re.sub(r"\b(Basic|Bearer)\s+[\w+/=\-.]+", "[key]", text)
    text = re.sub(r"//[^/\s@]+@", "//", text)  # user:password@ in a URL
    text = text.replace(str(Path.home()), "[home]") if str(Path.home()) != "/" else text
    return " ".join(_LOCAL_PATH.sub("[path]", text).split())[:300]
