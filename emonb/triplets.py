"""Room 02: image-instruction-response triplets for instruction tuning (paper: section on instruction tuning).

Three kinds: *categorical* (pick one of the C emotions), *conversation* (key visual elements) and
*reasoning* (why the image evokes the emotion, without naming it). The paper has GPT-4 write them; the
offline annotator here composes them from what is known of a training image (drawn-scene descriptions or
captions) and from measured brightness and colourfulness, and every row says so (`source: offline`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from emonb.errors import EmonbError
from emonb.samples import read_samples
from emonb.settings import Settings
from emonb.store import Artifact, Store

__all__ = [
    "KINDS",
    "categorical_instruction",
    "load_prompts",
    "offline_triplets",
    "read_triplets",
    "triplets_stage",
    "validate_triplet",
]

KINDS = ("categorical", "conversation", "reasoning")
FIELDS = (
    "image_id",
    "kind",
    "instruction",
    "response",
    "source",
    "model",
    "created",
    "prompt_sha256",
    "usage",
)


@functools.cache
def load_prompts() -> dict[str, Any]:
    """The wording of all questions and of the offline annotator (`resources/prompts.yaml`)."""
    text = resources.files("emonb").joinpath("resources", "prompts.yaml").read_text("utf-8")
    return yaml.safe_load(text)


@functools.cache
def _prompts_sha256() -> str:
    return hashlib.sha256(resources.files("emonb").joinpath("resources", "prompts.yaml").read_bytes()).hexdigest()


def categorical_instruction(labels: Sequence[str]) -> str:
    """The question of training and of every evaluation, with the labels in the taxonomy's order."""
    return load_prompts()["categorical"]["instruction"].format(labels=", ".join(labels))


def triplets_stage(settings: Settings, store: Store, dataset: str) -> Artifact:
    """Triplets of all training images as `triplets.jsonl` (stage `triplets`).

    Keywords, captions and scene descriptions are read here and nowhere else: no model sees them at test.
    """
    samples = store.find("samples", dataset)

    def build(folder: Path) -> None:
        train = read_samples(samples, "train")
        with (folder / "triplets.jsonl").open("w", encoding="utf-8") as file:
            for row in train.to_dict("records"):
                for triplet in offline_triplets(row, train.attrs["labels"]):
                    file.write(json.dumps(triplet, ensure_ascii=False) + "\n")

    params = {"annotator": "offline", "prompts": _prompts_sha256()}
    return store.get("triplets", dataset, build, params=params, inputs=[samples], code=["emonb.triplets"])


def offline_triplets(row: dict[str, Any], labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The three triplets of one training image, composed without a paid model.

    Args:
        row: a row of the sample table; `objects` and `scene`, or `caption`, are used where present.
        labels: the taxonomy's labels in their order.
    """
    prompts = load_prompts()
    turn = int(row["sha256"][:8], 16)  # which wording of the instruction: varied, yet reproducible
    categorical = prompts["categorical"]
    yield _triplet(row, "categorical", categorical_instruction(labels), categorical["response"], label=row["label"])
    for kind in ("conversation", "reasoning"):
        frames = prompts[kind]
        known = _known(row, prompts)
        parts = [frames[name].format(**known) for name in _usable(row)]
        if kind == "reasoning":
            parts.append(frames["closing"][row["label"]])
        yield _triplet(row, kind, frames["instructions"][turn % len(frames["instructions"])], " ".join(parts))


def _usable(row: dict[str, Any]) -> list[str]:
    """Which sentence frames can be filled for this image, in reading order."""
    has_objects = row.get("objects") is not None and len(row["objects"]) > 0
    names = ["objects"] if has_objects else []
    if row.get("scene"):
        names.append("scene")
    if not names and row.get("caption"):
        names.append("caption")
    return [*names, "measured"]


def _known(row: dict[str, Any], prompts: dict[str, Any]) -> dict[str, str]:
    names = row["objects"] if row.get("objects") is not None else []
    objects = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    return {
        "objects": " and ".join(filter(None, [", ".join(objects[:-1]), *objects[-1:]])),
        "scene": row.get("scene") or "",
        "caption": row.get("caption") or "",
        "brightness": _word(prompts["brightness"], row["brightness"]),
        "colorfulness": _word(prompts["colorfulness"], row["colorfulness"]),
    }


def _word(scale: list[tuple[float, str]], value: float) -> str:
    return next((word for bound, word in scale if value < bound), scale[-1][1])


def _triplet(row: dict[str, Any], kind: str, instruction: str, response: str, **fields: str) -> dict[str, Any]:
    return {
        "image_id": row["image_id"],
        "kind": kind,
        "instruction": instruction,
        "response": response.format(**fields) if fields else response,
        "source": "offline",
        "model": "emonb-offline-annotator",
        "created": None,  # no date: equal inputs give equal files
        "prompt_sha256": _prompts_sha256(),
        "usage": None,
    }


def validate_triplet(triplet: dict[str, Any], where: str) -> None:
    """Raise `EmonbError` naming file, line and field unless a triplet is complete and of a known kind."""
    missing = [field for field in FIELDS if field not in triplet]
    if missing:
        raise EmonbError(f"{where}: field {missing[0]!r} missing; delete the line and make the triplets again")
    if triplet["kind"] not in KINDS:
        raise EmonbError(f"{where}: field 'kind' is {triplet['kind']!r}; use one of {', '.join(KINDS)}")
    for field in ("image_id", "instruction", "response"):
        if not isinstance(triplet[field], str) or not triplet[field].strip():
            raise EmonbError(f"{where}: field {field!r} is empty; delete the line and make the triplets again")


def read_triplets(path: Path) -> pd.DataFrame:
    """Read and validate a triplets file (JSONL); one row per triplet, duplicates refused."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise EmonbError(f"{where}: not JSON ({error.msg}); delete the line and run again") from None
        validate_triplet(rows[-1], where)
    repeated = [k for k, n in Counter((r["image_id"], r["kind"]) for r in rows).items() if n > 1]
    if repeated:
        raise EmonbError(f"{path}: {repeated[0]} occurs twice; delete one of the lines")
    return pd.DataFrame(rows, columns=list(FIELDS))
