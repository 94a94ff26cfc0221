"""Room 02: what the triplets are like: who wrote them, for how many images, and what the checks say of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from emonb.answer_checks import REASONS, NearDuplicates, check_texts
from emonb.answer_log import rejected_path
from emonb.settings import Settings, TripletSettings
from emonb.triplets import triplets_path

__all__ = ["Summary", "check_rates", "rejected_answers", "rejection_rates", "source_note", "triplet_sources"]

_SOURCES = {
    "offline": "offline annotator, no paid model",
    "openai": "a paid model",
    "imported": "somebody else's file",
}


@dataclass(frozen=True)
class Summary:
    """What stands in the files after a run.

    Attributes:
        images: training images of the dataset.
        accepted: images with triplets.
        given_up: images whose answers failed the checks as often as they may.
        missing: images that the next run asks for.
        reasons: rejected answers by reason.
        answers: paid answers in all; `prompt_tokens` and `completion_tokens` are theirs.
        usd: what they cost, None where the price is unknown.
        stopped: why the run ended early, or "".
    """

    images: int
    accepted: int
    given_up: int
    missing: int
    reasons: dict[str, int]
    answers: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    stopped: str = ""

    def __str__(self) -> str:
        cost = "price unknown" if self.usd is None else f"${self.usd:,.4f}"
        lines = [
            f"{self.accepted:,} of {self.images:,} training images have triplets, "
            f"{self.given_up:,} were given up, {self.missing:,} are missing",
            f"{self.answers:,} paid answers, {self.prompt_tokens:,} tokens in, {self.completion_tokens:,} out: {cost}",
        ]
        if self.reasons:
            found = ", ".join(f"{reason} {n:,}" for reason, n in sorted(self.reasons.items(), key=lambda x: -x[1]))
            lines.append(f"rejected: {found}")
        if self.stopped:
            lines.append(f"stopped: {self.stopped}")
        return "\n".join(lines)


def check_rates(triplets: pd.DataFrame, labels: pd.Series, settings: TripletSettings) -> pd.Series:
    """How many images of a triplets table fail which check, whoever wrote them.

    Args:
        triplets: as `read_triplets` gives it.
        labels: label of each image, indexed by image id.
        settings: bounds of the checks.
    """
    counts = dict.fromkeys(["images", *REASONS], 0)
    seen = NearDuplicates()
    texts = triplets.pivot(index="image_id", columns="kind", values="response").reindex(
        columns=["conversation", "reasoning"], fill_value=""
    )
    for image_id, conversation, reasoning in texts.fillna("").itertuples(name=None):
        counts["images"] += 1
        failure = check_texts(conversation, reasoning, labels[image_id], settings)
        signature = seen.signature(f"{conversation}\n{reasoning}")
        if failure is None and seen.find(signature, settings.near_duplicate):
            failure = ("near-duplicate", "")
        seen.add(image_id, signature)
        if failure:
            counts[failure[0]] += 1
    return pd.Series(counts)


def rejected_answers(settings: Settings, dataset: str) -> pd.DataFrame:
    """Answers that a check rejected, newest last: image_id, reason, detail, text; empty where nothing was asked."""
    path = rejected_path(triplets_path(settings, dataset))
    rows = [
        {name: record.get(name) or "" for name in ("image_id", "reason", "detail", "text")} for record in _read(path)
    ]
    return pd.DataFrame(rows, columns=["image_id", "reason", "detail", "text"])


def rejection_rates(settings: Settings, datasets: Sequence[str]) -> pd.DataFrame:
    """Per dataset: answers of a paid model, accepted and rejected by reason; empty where nothing was asked."""
    rows = []
    for dataset in datasets:
        paid = sum(
            r["kind"] == "conversation" and r["source"] == "openai" for r in _read(triplets_path(settings, dataset))
        )
        rejected = rejected_answers(settings, dataset)["reason"].value_counts()
        if paid or len(rejected):
            rows.append({"dataset": dataset, "accepted": paid, **rejected})
    order = ["dataset", "accepted", *REASONS]
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=[c for c in order if c in frame]).fillna(0) if rows else frame


def triplet_sources(folder: Path) -> dict[str, str]:
    """Who wrote the triplets of each dataset of a results folder: dataset -> words; from its `triplets/*.jsonl`."""
    found = {}
    for path in sorted((folder / "triplets").glob("*.jsonl")):
        if path.name.endswith(".rejected.jsonl"):
            continue
        images: dict[str, int] = {}
        with path.open("rb") as file:
            for line in file:
                source = re.search(rb'"source": "(\w+)", "model": "([^"\\]*)', line)
                if source and b'"kind": "categorical"' in line:
                    who, model = (part.decode("utf-8", "replace") for part in source.groups())
                    said = _SOURCES.get(who, "unknown") + (f" ({model})" if who == "openai" else "")
                    images[said] = images.get(said, 0) + 1
        counted = (f"{said}: {n:,} images" if len(images) > 1 else said for said, n in images.items())
        found[path.stem] = ", ".join(counted) or "unknown"
    return found


def source_note(folder: Path, datasets: Sequence[str]) -> str:
    """One line for every page: who wrote the triplets of these datasets, or "" where there are none yet."""
    sources = triplet_sources(folder)
    groups: dict[str, list[str]] = {}
    for dataset in datasets:
        if dataset in sources:
            groups.setdefault(sources[dataset], []).append(dataset)
    return "; ".join(f"triplets of {', '.join(names)}: {said}" for said, names in groups.items())


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):  # a torn last line is mended by the next run that asks
                    yield json.loads(line)
