"""What the triplets cost, before and while they are asked for.

Prices stand in a small dated file that users edit (`resources/prices.yaml`, or `triplets.prices`). Tokens of a
picture follow the provider's published rules; tokens of text are counted as four characters each (English prose
has 4 to 5 a token, so that the count errs upwards); what an answer will be is a range.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from emonb.annotate.request import public_name, requests_for
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

    def tokens(self, width: int, height: int, detail: str, max_side: int) -> int:
        """Of a picture of this size, after our shrinking to `max_side` px and the provider's own scaling."""
        scale = min(1.0, max_side / max(width, height))
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        if self.rule == "patches":
            return math.ceil(min(math.ceil(width / 32) * math.ceil(height / 32), self.most) * self.factor)
        fit = min(1.0, 2048 / max(width, height))
        fit *= min(1.0, 768 / (min(width, height) * fit))
        tiles = math.ceil(width * fit / 512) * math.ceil(height * fit / 512)
        return self.base + self.tile * tiles * (detail != "low")


class Price(BaseModel, extra="forbid"):
    """USD per million tokens of one model; `batch` is the factor for the Batch API."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    batch: float = Field(1.0, ge=0, le=1)
    image: ImageRule = ImageRule()

    def usd(self, prompt_tokens: Any, completion_tokens: Any, *, batch: bool = False) -> Any:
        """Cost of so many tokens: numbers or columns of them."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6 * (self.batch if batch else 1)


class PriceList(BaseModel, extra="forbid"):
    """The price file."""

    as_of: Any
    source: str = ""
    models: dict[str, Price]

    @classmethod
    def load(cls, settings: TripletSettings) -> PriceList:
        """That of the settings; raises `EmonbError` naming the file and the field."""
        path = project_root() / settings.prices if settings.prices else resource_path("prices.yaml")
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            why = " ".join(str(error).split())
            raise EmonbError(f"{path.name}: {why}; correct the file, or triplets.prices") from None

    def find(self, model: str) -> Price | None:
        """Price of a model; a dated name (`gpt-4.1-2025-04-14`) has that of its family. None if unknown."""
        return self.models.get(model) or self.models.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model))


def unknown_price(model: str, settings: TripletSettings) -> str:
    """What to do about a model that is not in the price file."""
    file = settings.prices or "emonb/resources/prices.yaml"
    return f"the price of {model!r} is unknown; add it to {file} (zeros for a server that costs nothing)"


def _texts(settings: TripletSettings, labels: Sequence[str], form: str, again: str = "") -> tuple[int, float]:
    """Number of requests for an image, and input tokens of all their texts, at most."""
    row = {"image_id": "", "label": max(labels, key=len), "sha256": "0" * 8}
    bodies = requests_for(row, "", form, settings, again)
    texts = [body["messages"][0]["content"] + body["messages"][1]["content"][1]["text"] for body in bodies]
    texts.append(str(bodies[0].get("response_format", "")))
    return len(bodies), sum(map(len, texts)) * _PER_CHARACTER + 8 * len(bodies)


def most_tokens(settings: TripletSettings, labels: Sequence[str], form: str, rule: ImageRule) -> tuple[float, float]:
    """Input and output tokens that the requests for one image take at most."""
    requests, text = _texts(settings, labels, form, again="x" * 300)
    side = settings.max_side
    shapes = ((side, side), (side, min(side, 768)))  # of the tiles rule, a square is not always the dearest
    picture = max(rule.tokens(*size, settings.detail, side) for size in shapes)
    return 1.2 * (text + picture * requests), float(settings.max_output_tokens * requests)


def estimate_table(
    settings: TripletSettings, sizes: Sequence[tuple[int, int]], images: int, labels: Sequence[str], *, batch: bool
) -> pd.DataFrame:
    """What so many pictures of such sizes (width, height) will cost: tokens and USD, before anything is sent.

    Low and high: each image is right at the first time, with two sentences of ten words or four of 25, as the
    prompt asks for. Worst: each is asked `1 + retries` times and each answer is as long as the token limit lets
    it be. The picture and the instructions are paid once per request, for conversation and reasoning together.

    Returns:
        Rows of a `part`, the last `total`; columns `tokens_*` and `usd_*` (NaN: price unknown) for low, high, worst.
    """
    price = PriceList.load(settings).find(public_name(settings.model))
    rule, side = price.image if price else ImageRule(), settings.max_side
    requests, text = _texts(settings, labels, settings.answer_format.replace("auto", "schema"))
    pictures = [rule.tokens(*size, settings.detail, side) for size in sizes or [(side, side)]]
    picture = sum(pictures) / len(pictures) * requests
    short, long = (words * tokens for words, tokens in zip(_WORDS, _PER_WORD, strict=True))
    few, many = (6, 40) if settings.answer_format != "questions" else (0, 0)  # three short phrases; six longer ones
    longest = max(0.0, settings.max_output_tokens * requests - many) / 2
    each = {
        "input: picture": (picture, picture, picture),
        "input: instructions": (text, text, text),
        "categorical (from the label)": (0, 0, 0),
        "conversation": (short, long, longest),
        "reasoning": (short, long, longest),
        "key elements": (few, many, many),
    }
    tokens = pd.DataFrame.from_dict(each, orient="index", columns=["low", "high", "worst"])
    tokens = (tokens * [1, 1, 1 + settings.retries] * images).round().astype("int64")
    kind = tokens.index.str.startswith("input")
    usd = tokens.apply(lambda n: price.usd(n * kind, n * ~kind, batch=batch) if price else n * float("nan"))
    table = tokens.add_prefix("tokens_").join(usd.add_prefix("usd_"))
    table = pd.concat([table, table.sum(skipna=False).to_frame("total").T.astype(table.dtypes)])
    return table.rename_axis("part").reset_index()


def picture_sizes(samples: pd.DataFrame) -> list[tuple[int, int]]:
    """Width and height of at most 500 training pictures, spread evenly; unreadable ones are left out."""
    paths, sizes = samples.loc[samples["split"] == "train", "path"], []
    for path in paths.iloc[:: max(1, -(-len(paths) // _SAMPLE))]:
        with suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError), Image.open(path) as image:
            sizes.append(image.size)
    return sizes


def estimate_text(
    samples: pd.DataFrame, labels: Sequence[str], path: Path, settings: TripletSettings, *, batch: bool = False
) -> str:
    """The estimate of a dataset as people read it; images in the triplets file `path` are not paid for again."""
    prices, done, model = PriceList.load(settings), answered_images(path), public_name(settings.model)
    train = samples.loc[samples["split"] == "train", "image_id"]
    images = int((~train.isin(list(done))).sum())
    table = estimate_table(settings, picture_sizes(samples), images, labels, batch=batch)
    usd = {column: "{:,.4f}".format for column in table if column.startswith("usd")}
    end = unknown_price(model, settings)
    if prices.find(model):
        low, high, worst = (f"${table[column].iloc[-1]:,.2f}" for column in usd)
        end = f"total: {low} to {high}, at worst {worst}; nothing was sent"
    return (
        f"{path.stem}: {len(train):,} training images, {len(done):,} of them done; {model}"
        f"{' by the Batch API' if batch else ''}, prices of {prices.as_of}\n\n"
        f"{table.to_string(index=False, formatters=usd)}\n\n"
        "low, high: short or long sentences, as many as the prompt asks for, right at the first time;\n"
        f"worst: each image asked {1 + settings.retries} times, each answer of {settings.max_output_tokens} tokens\n"
        f"{end}"
    )
