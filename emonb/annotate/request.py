"""What a paid model is asked about one image, how its answer is read, and what it costs.

One request gives conversation and reasoning (the categorical triplet follows from the label and is never paid for):
by a schema where the server can do schemas, else as headed sections, else (tiny models) as one question a request.

Prices stand in a small dated file that users edit (`resources/prices.yaml`, or `triplets.prices`). Tokens of a
picture follow the provider's published rules; tokens of text are counted as four characters each (English prose
has 4 to 5 a token, so that the count errs upwards); what an answer will be is a range.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from pydantic import BaseModel, Field

from emonb.data import open_picture, question, sizes_of
from emonb.errors import EmonbError
from emonb.files import read_yaml, resource, resource_path
from emonb.settings import TripletSettings, from_root
from emonb.triplets import KINDS, Record, has_paid_answers, instruction, triplet_lines

FORMS = ("schema", "sections", "questions")  # in this order: from the strictest to what any model can do
TOKENS = ("prompt_tokens", "completion_tokens")

# ---- what is asked -------------------------------------------------------------------------------------------------


class Answer(BaseModel, extra="forbid"):
    """The schema of a structured answer; the descriptions are sent with it."""

    conversation: str = Field(description="two to four sentences on the visual elements that stand out")
    reasoning: str = Field(description="two to four sentences on why people feel so; the emotion is not named")
    key_elements: list[str] = Field(description="three to six short noun phrases")


def encode_picture(path: str | Path, max_side: int) -> str:
    """A picture as it is sent: the data URL of a JPEG (quality 90), as people see it and at most `max_side` px a side.

    Never the file itself, which may say where and when a photo was taken. Raises `UnreadablePicture`.
    """
    image, content = open_picture(path), io.BytesIO()
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    image.save(content, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def requests_for(
    row: Record, picture: str, form: str, settings: TripletSettings, again: str = "", limit: str = "max_tokens"
) -> list[Record]:
    """Bodies of the chat completions for one image of the sample table: one, or two in the form `questions`.

    `picture` is what `encode_picture` gave, `again` says why the last answer could not be used, and `limit` is what
    the server calls the token limit.
    """
    asked = resource("annotator.yaml")
    if form == "questions":
        system, texts = resource("prompts.yaml", "system"), [instruction(row, kind) for kind in KINDS[1:]]
    else:
        more = [asked["sections"]] * (form == "sections") + [asked["again"].format(reason=again)] * bool(again)
        system, texts = asked["system"], ["\n\n".join([asked["user"].format(label=row["label"]), *more])]
    schema = {"name": "triplets", "strict": True, "schema": Answer.model_json_schema()}
    more = {"response_format": {"type": "json_schema", "json_schema": schema}} if form == "schema" else {}
    return [{**_request(system, text, picture, settings, limit), **more} for text in texts]


def emotion_request(labels: Sequence[str], picture: str, settings: TripletSettings, limit: str) -> Record:
    """Body of the chat completion that asks what our VLM is asked about a picture; arguments as in `requests_for`."""
    return _request(resource("prompts.yaml", "system"), question(labels), picture, settings, limit)


def _request(system: str, text: str, picture: str, settings: TripletSettings, limit: str) -> Record:
    image = {"type": "image_url", "image_url": {"url": picture, "detail": settings.detail}}
    user = {"role": "user", "content": [image, {"type": "text", "text": text}]}
    body = {"model": settings.model, limit: settings.max_output_tokens}
    body |= {} if settings.temperature is None else {"temperature": settings.temperature}
    return {**body, "messages": [{"role": "system", "content": system}, user]}


# ---- how it is read ------------------------------------------------------------------------------------------------

_HEADING = re.compile(  # at the start of a line, with Markdown, numbers or quotes around; bounded, so never slow
    r"^[^a-z{\n]{0,16}(?P<name>categorical|conversation|reasoning|key[\s_-](?:visual\s)?elements)"
    r"(?: (?:section|part|response|answer|triplet))?[*_\"”]{0,4}(?: ?\([^()\n]{0,80}\))?[*_]{0,4}[^\S\n]{0,8}"
    r"(?:[:：\-–—]+[^\S\n]{0,8}[*_]{0,4}|$)",
    re.IGNORECASE | re.MULTILINE,
)
_MARK = (  # of a VLM's template, whose processor would look for another picture there, or end the text
    r"(?:<[|｜][^<>\n]{1,60}>|<[^<>|｜\s]{1,60}[|｜]>|</?(?:s|unk|pad|bos|eos|image|img|video|audio|global-img|answer"
    r"|unused\d{1,4}|\w{1,40}_\w{1,40})>|\[/?(?:img|inst|video|audio)(?:_\w{1,20})?\])"
)
_ROLE = rf"\A\s*(?:{_MARK}\s*)+(?:assistant)?\s*"  # some servers leave it in
# Thoughts have no common form: tags with such a word in their name (DeepSeek, Magistral, Kimi-VL, Skywork, Cohere), a
# word behind a mark of the template (gpt-oss, Gemma), the same where the server leaves out marks, fences, headings.
_WORD = r"[\w:.\-]{0,24}?(?:think|thought|reason|analysis|scratch|monolog|reflect|deliberat)[\w:.\-]{0,24}"
_LEFT, _RIGHT = r"(?:<|&lt;|\[|◁)[|｜]?", r"\s{0,4}[|｜]?(?:>|&gt;|\]|▷)"
_OPEN = (
    rf"(?:{_LEFT}(?!/|end){_WORD}(?:\s{{1,4}}\w+=[^<>\]\n]{{0,60}})?{_RIGHT}"
    r"|assistantanalysis|\A\s*(?-i:analysis[A-Z]))"
)
_SHUT = (
    rf"(?:{_LEFT}(?:/|end_?){_WORD}{_RIGHT}"
    r"|assistantfinal|<\|channel\|>final<\|message\|>|<channel\|>|<unused95>|<\|begin_of_solution\|>)"
)
_THOUGHT = re.compile(
    rf"{_OPEN}.*?(?:{_SHUT}|\Z)"
    rf"|{_MARK}\s*(?:thinking|think|thoughts?|analysis|commentary)\s*(?:\n|{_MARK}).*?(?:{_MARK}|\Z)"
    rf"|^[`~]{{3,}}[^\S\n]{{0,4}}{_WORD}[^\S\n]*\n.*?(?:^[`~]{{3,}}[^\S\n]*$|\Z)"
    r"|\A[\s#*_]{0,12}(?:(?:my|inner|internal|chain of) )?(?:thinking|thoughts?|scratch ?pad|monologue)(?: process)?"
    r"(?:[*_]{1,3}:?|:[*_]{0,3}|(?=\n)).*?(?:^[\s#*_>]{0,12}(?:final )?(?:answer|response|output)\b[*_:]*"
    r"|(?=^[^a-z{\n]{0,16}(?:categorical|conversation))|(?=^\s{0,4}(?:```\w*\s)?\{)|\Z)",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)
_LATE = re.compile(rf"\A.*{_SHUT}", re.IGNORECASE | re.DOTALL)  # opened in the prompt, where nobody sees it
_PRIVATE = {
    r"\bsk-[\w*\-]{4,}|\b(?:Basic|Bearer)\s+[\w+/=\-.]+": "[key]",  # also a masked or a foreign one
    r"//[^/\s@]+@": "//",  # user:password@ in a URL
    r"(?<![\w/:.])(?:/[\w.@+\-]+){2,}/?|[A-Za-z]:\\[^\s'\"]+": "[path]",
}


def dig(tree: Any, *path: str | int) -> Any:
    """An entry of what a server sent, which may be anything; None where it is not there."""
    with suppress(KeyError, IndexError, TypeError):
        for name in path:
            tree = tree[name]
        return tree
    return None


def token_counts(usage: Any) -> dict[str, int] | None:
    """Input and output tokens as a server, or a file of answers, counts them; None where they cannot be so."""
    counts = {name: dig(usage, name) for name in TOKENS}
    sound = all(isinstance(n, int) and 0 <= n < 10**9 for n in counts.values()) and any(counts.values())
    if sound and isinstance(total := dig(usage, "total_tokens"), int) and total < 10**9:
        answered = total - counts["prompt_tokens"]  # some leave out thoughts in the count of their own
        counts["completion_tokens"] = max(counts["completion_tokens"], answered)
    return counts if sound else None


def without_thoughts(text: str) -> str:
    """A model's text without what it thought before it answered, also where that has no end, or no beginning."""
    return _LATE.sub("", _THOUGHT.sub("", text)).strip()


def spoken(text: str) -> str:
    """What of a model's text may be taught: neither its thoughts nor the marks of a VLM's template."""
    text = re.sub(_ROLE, "", without_thoughts(text), flags=re.IGNORECASE)
    return re.sub(_MARK, " ", text, flags=re.IGNORECASE).strip()


def read_reply(completion: Any) -> Record:
    """What a chat completion (JSON) says: text, refusal, model, finish, and usage, None where the server counts none.

    Thoughts are no text, whether they stand in it, in parts of it or in a field of their own; their tokens count. One
    with tokens alone was paid for, too. Raises ValueError for anything else, with the server's words if it has any.
    """
    usage = token_counts(dig(completion, "usage"))
    message, finish = (dig(completion, "choices", 0, name) for name in ("message", "finish_reason"))
    if usage is None and not isinstance(message, dict):
        words = dig(completion, "error", "message") or dig(completion, "error") or dig(completion, "message")
        otherwise = "the server's answer is not a chat completion; set OPENAI_BASE_URL up to and including /v1"
        raise ValueError(f"the server says: {words}" if words else otherwise)
    content, fields = dig(message, "content"), message if isinstance(message, dict) else {}
    thought = any(value for name, value in fields.items() if re.search("reason|think|thought", name))
    if isinstance(content, list):
        texts = [part for part in content if dig(part, "type") in ("text", "output_text") and not dig(part, "thought")]
        thought = thought or len(texts) < len(content)
        content = "".join(text for part in texts if isinstance(text := part.get("text"), str))
    said = {"text": content, "refusal": dig(message, "refusal"), "model": dig(completion, "model")}
    reply = {name: str(words or "").encode("utf-8", "replace").decode() for name, words in said.items()}
    thought = thought or len(without_thoughts(reply["text"])) < len(reply["text"].strip())
    return {**reply, "text": spoken(reply["text"]), "thought": thought, "finish": finish, "usage": usage}


def text_lines(data: bytes, errors: str = "strict") -> list[str]:
    """JSON Lines in any UTF, or a list as such lines; U+2028 and its like may stand in a text, and end no line."""
    text = data.decode(json.detect_encoding(data), errors)
    if isinstance(items := _opened(text), list):
        return [*map(json.dumps, items)]
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def read_batch_line(line: str) -> tuple[str, Record | None, str]:
    """A line of a batch's results: its custom id, the reply if it has one, and the error that stands there instead."""
    tree = _opened(line)
    response = _opened(dig(tree, "response"))
    body, reply = _opened(dig(response, "body")), None
    for completion in (body, response):
        with suppress(ValueError):
            reply = reply or read_reply(completion)
    status, error = dig(response, "status_code"), dig(tree, "error") or dig(body, "error")
    failed = error or (isinstance(status, int) and status >= 400)
    named = str(dig(tree, "custom_id"))
    name = next(iter(re.findall(r"[\da-f]{40}", named.lower())), named)  # ours, also where a server adds to it
    return name, reply, f"status {status}: {json.dumps(body or error)}" if failed else ""


def _opened(value: Any) -> Any:
    """A part of JSON that some write as a text."""
    with suppress(ValueError, RecursionError):
        return json.loads(value) if isinstance(value, str) else value
    return None


def parse_sections(text: str) -> dict[str, str]:
    """The headed sections of a free answer; keys among categorical, conversation, reasoning, key_elements.

    Tolerant of Markdown, numbering, capitals, quotes and code fences; the first of two equal headings counts.
    """
    text = re.sub(r"^[^\S\n]*```\w*[^\S\n]*$", "", text, flags=re.MULTILINE)
    sections, end = {}, len(text)
    for heading in reversed([*_HEADING.finditer(text)]):
        name = re.sub(r"[\s_-].*", "_elements", heading["name"].lower())
        sections[name] = text[heading.end() : end].strip().strip("*_").strip()
        end = heading.start()
    return sections


def parse_reply(texts: list[str], form: str) -> Answer | None:
    """The answer in the replies to the requests for one image, or None where it is not in a form that can be read.

    JSON is looked for first (see `json_answer`), then sections.
    """
    first, *more = map(spoken, texts)
    if form == "questions":
        said: Record = {"conversation": first, "reasoning": more[0]}
    else:
        said = json_answer(first) or parse_sections(first)
    elements = said.get("key_elements", "")
    elements = re.split(r"\s*[,;\n]\s*", elements) if isinstance(elements, str) else elements
    both = said.get("conversation", ""), said.get("reasoning", "")
    if not (all(both) or more):
        return None
    return Answer(conversation=both[0], reasoning=both[1], key_elements=[element for element in elements if element])


def json_answer(text: str) -> Record:
    """Conversation, reasoning and key elements of the first object that has one of them, {} where none has.

    As models write JSON: fenced, with words around it, other keys, capitals in keys, a comma too many, line breaks in
    texts, Python's quotes, or inside another object or a list.
    """
    for found in _objects(text):
        named = {re.sub(r"\W+", "_", str(name).lower()): value for name, value in found.items()}
        named["key_elements"] = named.get("key_elements") or named.get("key_visual_elements")
        texts = {name: spoken(v) for name in ("conversation", "reasoning") if isinstance(v := named.get(name), str)}
        if any(texts.values()):
            elements = named["key_elements"]
            listed = [str(e) for e in elements] if isinstance(elements, list) else str(elements or "")
            return {**texts, "key_elements": listed}
    return {}


def _objects(text: str) -> Iterator[Record]:
    """The objects of a text that look like JSON, and those inside them; a few tries, so that no text takes long."""
    start, decoder = text.find("{"), json.JSONDecoder(strict=False)
    whole = re.sub(r",(\s*[}\]])", r"\1", text[start : text.rfind("}") + 1])
    tries = [match.start() for match, _ in zip(re.finditer(r"\{", text), range(20), strict=False)]
    for read in (*(lambda at=at: decoder.raw_decode(text, at)[0] for at in tries), lambda: decoder.decode(whole)):
        with suppress(ValueError, RecursionError):
            yield from _inside(read())
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        yield from _inside(ast.literal_eval(whole[:20_000]))


def _inside(tree: Any, depth: int = 3) -> Iterator[Record]:
    if isinstance(tree, dict):
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        if depth:
            yield from _inside(part, depth - 1)


def given(name: str) -> str:
    """A variable of the environment as it was meant: no blanks or quotes around, nor its own name before."""
    around = " \t\n\r\"'<>`\u00a0\u200b\ufeff\u201c\u201d\u2018\u2019"
    text = os.environ.get(name, "").strip(around)
    return re.sub(rf"^(?:(?:export|set)\s+|\$env:)?{name}\s*[=:]|^Bearer\s", "", text).strip(around)


def public_name(model: str) -> str:
    """A model's name without the folder that a local server may put before it."""
    return re.sub(r"^(?:[/~.]|[A-Za-z]:\\)(?:.*[/\\])?", "", model.rstrip("/\\"))


def scrub(text: str) -> str:
    """A server's message without keys and local paths, on one line of at most 300 characters."""
    key = given("OPENAI_API_KEY")
    text = text.replace(key, "[key]") if len(key) >= 4 else text
    for pattern, shown in _PRIVATE.items():
        text = re.sub(pattern, shown, text)
    return " ".join(text.split())[:300]


# ---- what it costs -------------------------------------------------------------------------------------------------

# A model that is not in the price file; its pictures are counted as those of GPT-4o and GPT-4.1.
_UNKNOWN = {"input": math.nan, "output": math.nan, "batch": 1.0, "image": {"rule": "tiles", "base": 85, "tile": 170}}
# Output tokens: two texts of two sentences of ten words, or of four of 25, at 1.25 or 1.6 tokens a word; key elements.
_SHORT, _LONG = 2 * 2 * 10 * 1.25 + 6, 2 * 4 * 25 * 1.6 + 40


def load_prices(settings: TripletSettings) -> Record:
    """The price file: `as_of`, and `models` with the input, output, batch and image of each.

    Raises `EmonbError` naming file and model if it cannot be read or lacks something.
    """
    path, where = from_root(settings.prices) if settings.prices else resource_path("prices.yaml"), "models"
    prices = read_yaml(path, "correct the file, or triplets.prices")
    try:
        for where, price in prices["models"].items():
            prices["models"][where] = price = {**_UNKNOWN, **price}
            tokens = picture_tokens(price["image"], (512, 512), settings)
            if not all(0 <= number < math.inf for number in (price["input"], price["output"], price["batch"], tokens)):
                raise ValueError("input and output must be 0 or more")
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        why = f"{where}: {type(error).__name__} {' '.join(str(error).split())}"
        raise EmonbError(f"{path.name}: {why}; correct the file, or triplets.prices") from None
    if isinstance(settings.price, tuple):
        given = dict(zip(("input", "output"), settings.price, strict=True))
        prices["models"][public_name(settings.model)] = {**find_price(prices, public_name(settings.model)), **given}
    return {"as_of": "an unknown day", **prices}


def find_price(prices: Record, model: str) -> Record:
    """Price of a model, NaN if unknown; a dated name (`gpt-4.1-2025-04-14`) has that of its family."""
    family = re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model)
    return prices["models"].get(model) or prices["models"].get(family) or _UNKNOWN


def unknown_price(model: str, settings: TripletSettings) -> str:
    """What to do about a model that is not in the price file."""
    file = settings.prices or "emonb/resources/prices.yaml"
    return (
        f"the price of {model} is unknown, and with it what a run may cost; give --price IN,OUT (USD per million "
        f"tokens), --no-price (no limit; a server that costs nothing), or add it to {file}"
    )


def cost(price: Record, prompt_tokens: float, completion_tokens: float, *, batch: bool = False) -> float:
    """USD of so many tokens."""
    usd = (prompt_tokens * price["input"] + completion_tokens * price["output"]) / 1e6
    return usd * price["batch"] if batch else usd


def picture_tokens(rule: Record, size: tuple[int, int], settings: TripletSettings) -> int:
    """Input tokens of a picture of this size (width, height), after our shrinking and the provider's own scaling."""
    scale = min(1.0, settings.max_side / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    if rule["rule"] == "patches":
        patches = math.ceil(width / 32) * math.ceil(height / 32)
        return math.ceil(min(patches, rule["most"]) * rule["factor"])
    fit = min(1.0, 2048 / max(width, height))
    fit *= min(1.0, 768 / (min(width, height) * fit))
    tiles = math.ceil(width * fit / 512) * math.ceil(height * fit / 512)
    return rule["base"] + (0 if settings.detail == "low" else rule["tile"] * tiles)


def sample_requests(settings: TripletSettings, labels: Sequence[str], form: str, again: str = "") -> list[Record]:
    """Bodies of the requests for an image of the longest label, without the picture."""
    return requests_for({"image_id": "", "label": max(labels, key=len), "sha256": "0" * 8}, "", form, settings, again)


def _text_tokens(bodies: Sequence[Record]) -> list[float]:
    """Input tokens of the text of each request, at most."""
    sizes = []
    for body in bodies:
        system, user = (message["content"] for message in body["messages"])
        sizes.append(len(f"{system}{user[1]['text']}{body.get('response_format', '')}") / 4 + 8)
    return sizes


def most_tokens(settings: TripletSettings, bodies: Sequence[Record], rule: Record) -> tuple[int, int]:
    """Input and output tokens that one of these requests takes at most."""
    side = settings.max_side
    shapes = ((side, side), (side, min(side, 768)))  # of the tiles rule, a square is not always the dearest
    picture = max(picture_tokens(rule, shape, settings) for shape in shapes)
    return round(1.2 * (picture + max(_text_tokens(bodies)))), settings.max_output_tokens


def estimate_table(
    settings: TripletSettings, sizes: Sequence[tuple[int, int]], images: int, labels: Sequence[str], *, batch: bool
) -> pd.DataFrame:
    """What so many pictures of such sizes (width, height) will cost: tokens and USD, before anything is sent.

    Low and high: each image is right at the first time, with two sentences of ten words or four of 25, as the prompt
    asks for. Worst: each is asked `1 + retries` times and each answer is as long as the token limit lets it be.

    Returns:
        Rows of a `part`: input, output, total; columns `tokens_*`, `usd_*` (NaN: price unknown) for low, high, worst.
    """
    price = find_price(load_prices(settings), public_name(settings.model))
    pictures = [picture_tokens(price["image"], size, settings) for size in sizes or [(settings.max_side,) * 2]]
    texts = _text_tokens(sample_requests(settings, labels, settings.answer_format.replace("auto", "schema")))
    asked = sum(texts) + len(texts) * sum(pictures) / len(pictures)
    answered = (_SHORT, _LONG, settings.max_output_tokens * len(texts))
    tokens = pd.DataFrame({"input": asked, "output": answered}, index=["low", "high", "worst"])
    tokens.loc["worst"] *= 1 + settings.retries
    tokens = (tokens * images).round().astype("int64")
    usd = tokens * [cost(price, 1, 0, batch=batch), cost(price, 0, 1, batch=batch)]
    tokens["total"], usd["total"] = tokens.sum(axis=1), usd.sum(axis=1, skipna=False)
    return tokens.T.add_prefix("tokens_").join(usd.T.add_prefix("usd_")).rename_axis("part").reset_index()


def picture_sizes(samples: pd.DataFrame) -> list[tuple[int, int]]:
    """Width and height of at most 500 training pictures, spread evenly; unreadable ones are left out."""
    return sizes_of(samples.loc[samples["split"] == "train", "path"].tolist(), 500)


def estimate_text(
    samples: pd.DataFrame, labels: Sequence[str], path: Path, settings: TripletSettings, *, batch: bool = False
) -> str:
    """The estimate of a dataset as people read it; images in the triplets file `path` are not paid for again."""
    train, model = samples.loc[samples["split"] == "train", "image_id"], public_name(settings.model)
    done = {triplet["image_id"] for triplet in triplet_lines(path)} if has_paid_answers(path) else set()
    table = estimate_table(settings, picture_sizes(samples), int((~train.isin(done)).sum()), labels, batch=batch)
    low, high, worst = (f"${usd:,.2f}" for usd in table.iloc[-1, -3:])
    total = f"total: {low} to {high}, at worst {worst}; nothing was sent"
    return (
        f"{path.stem}: {len(train):,} training images, {len(done):,} of them done; {model}"
        f"{' by the Batch API' if batch else ''}, prices of {load_prices(settings)['as_of']}\n\n"
        f"{table.to_string(index=False, float_format='{:,.4f}'.format)}\n\n"
        "low, high: short or long sentences, as many as the prompt asks for, right at the first time;\n"
        f"worst: each image asked {1 + settings.retries} times, each answer of {settings.max_output_tokens} tokens\n"
        f"{total if low != '$nan' else unknown_price(model, settings)}"
    )
