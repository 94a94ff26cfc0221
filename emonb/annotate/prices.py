"""What the triplets cost, before and while they are asked for.

Prices stand in a small dated file that users edit (`resources/prices.yaml`, or `triplets.prices`). Tokens of a
picture follow the provider's published rules; tokens of text are counted as four characters each (English prose
has 4 to 5 a token, so that the count errs upwards); what an answer will be is a range.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from emonb.annotate.request import requests_for
from emonb.errors import EmonbError
from emonb.files import resource_path
from emonb.settings import TripletSettings, project_root
from emonb.triplets import answered_images

_PER_CHARACTER = 1 / 4  # tokens
_WORDS = (2 * 10, 4 * 25)  # "two to four sentences" of plain English: short ones, long ones
_PER_WORD = (1.25, 1.6)  # tokens of an answer's word, JSON included: low, high
_SAMPLE = 500  # pictures whose size is read for an estimate


class ImageRule(BaseModel, extra="forbid"):
    """How many input tokens a picture costs; the default is that of the GPT-4o and GPT-4.1 models."""

    rule: Literal["tiles", "patches"] = "tiles"
    base: int = Field(85, ge=0)
    tile: int = Field(170, ge=0)
    factor: float = Field(1, gt=0)
    most: int = Field(1536, ge=1)


class Price(BaseModel, extra="forbid"):
    """USD per million tokens of one model."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    batch: float = Field(1.0, ge=0, le=1)
    image: ImageRule = ImageRule()

    def usd(self, prompt_tokens: float, completion_tokens: float, *, batch: bool = False) -> float:
        """Cost of so many tokens."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6 * (self.batch if batch else 1)


class PriceList(BaseModel, extra="forbid"):
    """The price file."""

    as_of: Any
    source: str = ""
    models: dict[str, Price]

    def find(self, model: str) -> Price | None:
        """Price of a model; a dated name (`gpt-4.1-2025-04-14`) has that of its family. None if unknown."""
        return self.models.get(model) or self.models.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model))


def load_prices(settings: TripletSettings) -> PriceList:
    """The price file of the settings; raises `EmonbError` naming the file and the field."""
    path = project_root() / settings.prices if settings.prices else resource_path("prices.yaml")
    try:
        return PriceList.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        why = " ".join(str(error).split())
        raise EmonbError(f"{price_file(settings)}: {why}; correct the file, or triplets.prices") from None


def price_file(settings: TripletSettings) -> str:
    """The price file as people know it."""
    return settings.prices or "emonb/resources/prices.yaml"


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


def most_tokens(
    settings: TripletSettings, labels: Sequence[str], form: str, price: Price | None
) -> tuple[float, float]:
    """Input and output tokens that the requests for one image take at most."""
    rule, side = price.image if price else ImageRule(), settings.max_side
    shapes = ((side, side), (side, min(side, 768)))  # of the tiles rule, a square is not always the dearest
    picture = max(image_tokens(*size, rule, settings.detail, side) for size in shapes)
    requests, text = _requests(settings, labels, form, again="x" * 300)
    return 1.2 * (text + picture * requests), float(settings.max_output_tokens * requests)


def _requests(settings: TripletSettings, labels: Sequence[str], form: str, again: str = "") -> tuple[int, float]:
    """Number of requests for an image, and input tokens of their texts."""
    row = {"image_id": "", "label": max(labels, key=len), "sha256": "0" * 8}
    bodies = requests_for(row, "", form, settings, again)
    texts = [body["messages"][0]["content"] + body["messages"][1]["content"][1]["text"] for body in bodies]
    texts.append(str(bodies[0].get("response_format", "")))
    return len(bodies), sum(map(len, texts)) * _PER_CHARACTER + 8 * len(bodies)


def estimate_table(
    settings: TripletSettings, sizes: Sequence[tuple[int, int]], images: int, labels: Sequence[str], *, batch: bool
) -> pd.DataFrame:
    """What so many pictures will cost: tokens and USD per kind of triplet and in all.

    Low and high: each image is right at the first time, with two sentences of ten words or four of 25, as the
    prompt asks for. Worst: each is asked `1 + retries` times and each answer is as long as the token limit lets
    it be. The picture and the instructions are paid once per request, for conversation and reasoning together.

    Args:
        settings: the terms.
        sizes: width and height of some of the pictures.
        images: number of pictures.
        labels: the taxonomy's labels.
        batch: by the Batch API.

    Returns:
        Rows of a `part`; columns `tokens_*` and `usd_*` (NaN where the price is unknown) for low, high, worst.
    """
    price = load_prices(settings).find(settings.model)
    rule = price.image if price else ImageRule()
    requests, text = _requests(settings, labels, settings.answer_format.replace("auto", "schema"))
    sizes = sizes or [(settings.max_side, settings.max_side)]  # none could be read: the largest that is sent
    pictures = [image_tokens(*size, rule, settings.detail, settings.max_side) for size in sizes]
    picture = sum(pictures) / len(pictures) * requests
    short, long = (words * tokens for words, tokens in zip(_WORDS, _PER_WORD, strict=True))
    few, many = (6, 40) if settings.answer_format != "questions" else (0, 0)  # three short phrases; six longer ones
    longest = max(0.0, settings.max_output_tokens * requests - many) / 2
    parts = {
        "input: picture": (picture, picture, picture),
        "input: instructions": (text, text, text),
        "categorical (from the label)": (0, 0, 0),
        "conversation": (short, long, longest),
        "reasoning": (short, long, longest),
        "key elements": (few, many, many),
    }
    each = pd.DataFrame.from_dict(parts, orient="index", columns=("low", "high", "worst")) * [1, 1, 1 + settings.retries]
    tokens = (each * images).round().astype("int64")
    is_input = tokens.index.str.startswith("input")
    usd = tokens * float("nan")
    if price:
        usd = tokens.apply(lambda column: price.usd(column * is_input, column * ~is_input, batch=batch))
    table = tokens.add_prefix("tokens_").join(usd.add_prefix("usd_"))
    table = pd.concat([table, table.sum(skipna=False).to_frame("total").T.astype(table.dtypes)])
    return table.rename_axis("part").reset_index()


def estimate(
    samples: pd.DataFrame,
    labels: Sequence[str],
    settings: TripletSettings,
    *,
    batch: bool = False,
    without: Collection[str] = (),
) -> pd.DataFrame:
    """What the triplets of a dataset will cost, before anything is sent: see `estimate_table`.

    Args:
        samples: the sample table; at most 500 of its training pictures are measured.
        labels: the taxonomy's labels.
        settings: the terms.
        batch: by the Batch API.
        without: ids of images that have their triplets.
    """
    train = samples[samples["split"] == "train"]
    sizes = []
    for path in train["path"].iloc[:: max(1, -(-len(train) // _SAMPLE))]:
        with suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError), Image.open(path) as image:
            sizes.append(image.size)
    images = int((~train["image_id"].isin(list(without))).sum())
    return estimate_table(settings, sizes, images, labels, batch=batch)


def estimate_text(
    samples: pd.DataFrame, labels: Sequence[str], path: Path, settings: TripletSettings, *, batch: bool = False
) -> str:
    """The estimate as people read it; images in the triplets file `path` are not paid for again."""
    prices, done, train = load_prices(settings), answered_images(path), (samples["split"] == "train").sum()
    table = estimate(samples, labels, settings, batch=batch, without=done)
    usd = {column: "{:,.4f}".format for column in table if column.startswith("usd")}
    end = f"the price of {settings.model!r} is unknown: add it to {price_file(settings)}"
    if prices.find(settings.model):
        low, high, worst = (f"${table[f'usd_{case}'].iloc[-1]:,.2f}" for case in ("low", "high", "worst"))
        end = f"total: {low} to {high}, at worst {worst}; nothing was sent"
    return (
        f"{path.stem}: {train:,} training images, {len(done):,} of them done; {settings.model}"
        f"{' by the Batch API' if batch else ''}, prices of {prices.as_of}\n\n"
        f"{table.to_string(index=False, formatters=usd)}\n\n"
        "low, high: short or long sentences, as many as the prompt asks for, right at the first time;\n"
        f"worst: each image asked {1 + settings.retries} times, each answer of {settings.max_output_tokens} tokens\n"
        f"{end}"
    )
