"""Room 02: what the triplets cost, before and while they are asked for.

Prices stand in a small dated file that users edit (`resources/prices.yaml`, or `triplets.prices`). Tokens of a
picture follow the provider's published rules; tokens of text are counted as four characters each (English prose
has 4 to 5 a token, so that the count errs upwards); what an answer will be is a range.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from importlib import resources
from typing import Any, Literal

import pandas as pd
import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emonb.annotator import Picture, requests_for
from emonb.errors import EmonbError
from emonb.settings import TripletSettings, project_root
from emonb.transport import public_name

__all__ = [
    "ImageRule",
    "Price",
    "PriceList",
    "estimate_table",
    "image_tokens",
    "load_prices",
    "request_tokens",
    "sample_sizes",
]

_PER_CHARACTER = 1 / 4  # tokens
_WORDS = (2 * 10, 4 * 25)  # "two to four sentences" of plain English: short ones, long ones
_PER_WORD = (1.25, 1.6)  # tokens of an answer's word, JSON included: low, high
_SAMPLE = 500  # pictures whose size is read for an estimate


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageRule(_Section):
    """How many input tokens a picture costs; the default is that of the GPT-4o and GPT-4.1 models."""

    rule: Literal["tiles", "patches"] = "tiles"
    base: int = Field(85, ge=0)
    tile: int = Field(170, ge=0)
    factor: float = Field(1, gt=0)
    most: int = Field(1536, ge=1)


class Price(_Section):
    """USD per million tokens of one model."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    batch: float = Field(1.0, ge=0, le=1)
    image: ImageRule = ImageRule()

    def usd(self, prompt_tokens: float, completion_tokens: float, *, batch: bool = False) -> float:
        """Cost of so many tokens."""
        cost = (prompt_tokens * self.input + completion_tokens * self.output) / 1e6
        return cost * (self.batch if batch else 1)


class PriceList(_Section):
    """The price file."""

    as_of: Any
    source: str = ""
    models: dict[str, Price]

    def find(self, model: str) -> Price | None:
        """Price of a model; a dated name (`gpt-4.1-2025-04-14`) has that of its family. None if unknown."""
        return self.models.get(model) or self.models.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model))


def load_prices(settings: TripletSettings) -> PriceList:
    """The price file of the settings; raises `EmonbError` naming the file and the field."""
    if settings.prices:
        path, name = project_root() / settings.prices, settings.prices
    else:
        path, name = resources.files("emonb").joinpath("resources", "prices.yaml"), "emonb/resources/prices.yaml"
    try:
        return PriceList.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise EmonbError(f"{name}: cannot be read ({error.strerror}); correct triplets.prices") from None
    except yaml.YAMLError as error:
        raise EmonbError(f"{name}: not valid YAML ({error}); correct the file") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise EmonbError(f"{name}: field {field}: {first['msg']}; correct the file") from None


def image_tokens(width: int, height: int, rule: ImageRule, detail: str, max_side: int) -> int:
    """Input tokens of a picture of this size, after our shrinking to `max_side` and the provider's own scaling."""
    scale = min(1.0, max_side / max(width, height))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    if rule.rule == "patches":
        patches = math.ceil(width / 32) * math.ceil(height / 32)
        return math.ceil(min(patches, rule.most) * rule.factor)
    if detail == "low":
        return rule.base
    fit = min(1.0, 2048 / max(width, height))
    fit *= min(1.0, 768 / (min(width, height) * fit))
    return rule.base + rule.tile * math.ceil(width * fit / 512) * math.ceil(height * fit / 512)


def sample_sizes(rows: Iterable[dict[str, Any]], n: int) -> list[tuple[int, int]]:
    """Width and height of at most 500 pictures, spread evenly over the n rows; unreadable ones are left out."""
    step = max(1, -(-n // _SAMPLE))
    sizes = []
    for i, row in enumerate(rows):
        if i % step == 0:
            try:
                with Image.open(row["path"]) as image:
                    sizes.append(image.size)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                continue
    return sizes


def request_tokens(body: dict[str, Any], picture_tokens: float) -> float:
    """Input tokens of one request: its texts and its picture."""
    texts = []
    for message in body["messages"]:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [p.get("text", "") for p in content]
        texts += parts
    schema = str(body.get("response_format", ""))
    return picture_tokens + sum(len(t) for t in [*texts, schema]) * _PER_CHARACTER + 4 * len(body["messages"])


def estimate_table(
    settings: TripletSettings,
    sizes: list[tuple[int, int]],
    images: int,
    labels: list[str],
    *,
    batch: bool,
) -> pd.DataFrame:
    """What `images` pictures will cost: tokens and USD per kind of triplet and in all.

    Low and high: each image is right at the first time, with two sentences of ten words or four of 25, as the
    prompt asks for. Worst: each is asked `1 + retries` times and each answer is as long as the token limit lets
    it be. The picture and the instructions are paid once per request, for conversation and reasoning together;
    the categorical triplet follows from the label.

    Returns:
        Rows of a `part`; columns `tokens_*` and `usd_*` (NaN where the price is unknown) for low, high, worst.
    """
    price = load_prices(settings).find(public_name(settings.model))
    rule = price.image if price else ImageRule()
    sizes = sizes or [(settings.max_side, settings.max_side)]  # none could be read: the largest that is sent
    per_picture = [image_tokens(w, h, rule, settings.detail, settings.max_side) for w, h in sizes]
    row = {"label": max(labels, key=len), "sha256": "0" * 8}
    form = "schema" if settings.answer_format == "auto" else settings.answer_format
    bodies = requests_for(row, Picture("image/jpeg", b"", (1, 1)), form, settings)
    picture = sum(per_picture) / len(per_picture) * len(bodies)
    text = sum(request_tokens(body, 0) for body in bodies)
    short, long = (words * tokens for words, tokens in zip(_WORDS, _PER_WORD, strict=True))
    elements = (6.0, 40.0) if form != "questions" else (0.0, 0.0)  # three short phrases; six longer ones
    most, limit = 1 + settings.retries, settings.max_output_tokens * len(bodies)
    rows = [
        ("input: picture", True, picture, picture, picture * most),
        ("input: instructions", True, text, text, text * most),
        ("categorical (from the label)", False, 0.0, 0.0, 0.0),
        ("conversation", False, short, long, max(0.0, limit - elements[1]) / 2 * most),
        ("reasoning", False, short, long, max(0.0, limit - elements[1]) / 2 * most),
        ("key elements", False, *elements, elements[1] * most),
    ]
    cases = ("low", "high", "worst")
    table = pd.DataFrame(rows, columns=["part", "input", *(f"tokens_{case}" for case in cases)])
    for case in cases:
        tokens = (table[f"tokens_{case}"] * images).round().astype("int64")
        paid = [
            price.usd(t * is_input, t * (not is_input), batch=batch) if price else float("nan")
            for t, is_input in zip(tokens, table["input"], strict=True)
        ]
        table = table.assign(**{f"tokens_{case}": tokens, f"usd_{case}": paid})
    table = table.drop(columns="input")
    table.loc[len(table)] = ["total", *table.drop(columns="part").sum(skipna=False)]
    return table.astype({f"tokens_{case}": "int64" for case in cases})
