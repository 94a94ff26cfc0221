"""Small pictures, a sample table and terms for tests that ask a loopback server for triplets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from openai_server import Server, serve
from PIL import Image

from emonb.annotate import write_triplets
from emonb.settings import TripletSettings
from emonb.triplets import KINDS, read_triplets

EMOTIONS = ("anger", "disgust", "fear", "joy", "sadness", "surprise")  # Ekman's six
KEY = "sk-test-0123456789abcdef"


def make_samples(root: Path, train: int) -> pd.DataFrame:
    """A sample table: `train` training pictures of noise, each with its own bytes, and one of val and of test."""
    rng, rows = np.random.default_rng(0), []
    for i in range(train + 2):
        split = "train" if i < train else "val" if i == train else "test"
        image_id = f"{split}/{EMOTIONS[i % 6]}/{i:05}.png"
        path = root / image_id
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(path)
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append((image_id, str(path), EMOTIONS[i % 6], split, sha))
    return pd.DataFrame(rows, columns=["image_id", "path", "label", "split", "sha256"])


class Asking:
    """One dataset `small` of so many training pictures, whose triplets are asked for; `said` collects the messages."""

    def __init__(self, folder: Path, train: int) -> None:
        self.samples, self.path = make_samples(folder / "samples", train), folder / "triplets" / "small.jsonl"
        self.said: list[str] = []

    def ask(self, *, batch: bool = False, patient: bool = True, **terms: Any) -> str:
        """Run the annotator; returns why it stopped."""
        settings = TripletSettings(**{"timeout_s": 2, "batch_poll_s": 0.05, **terms})
        options = {"batch": batch, "patient": patient, "say": self.said.append}
        return write_triplets(self.samples, EMOTIONS, self.path, settings, **options)

    @property
    def accepted(self) -> list[dict[str, Any]]:
        """The triplets that carry the tokens: one for each image."""
        return [triplet for triplet in read_lines(self.path) if triplet["kind"] == "conversation"]

    @property
    def rejected(self) -> list[dict[str, Any]]:
        """What was rejected."""
        return read_lines(self.path.with_name("small.rejected.jsonl"))

    def assert_complete(self, images: int = 24) -> None:
        """Each image has its three triplets, once."""
        kinds = read_triplets(self.path).groupby("image_id")["kind"].agg(tuple)
        assert (len(kinds), set(kinds)) == (images, {KINDS})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All records of a JSON Lines file; [] if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def completion(content: Any, **more: Any) -> dict[str, Any]:
    """A chat completion with this content."""
    usage = {"prompt_tokens": 100, "completion_tokens": 50}
    choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return {"model": "m", "choices": [choice], "usage": usage, **more}


@contextmanager
def asked_of(monkeypatch: pytest.MonkeyPatch, **config: Any) -> Iterator[Server]:
    """A running server that the environment points at; retries come soon."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("emonb.annotate.ask._BACKOFF", 0.05)
    with serve(**config) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        yield server
