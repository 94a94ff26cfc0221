"""`python -m emonb predict`: the opinions about pictures and folders of pictures, as text or JSON."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emonb.errors import EmonbError, UnreadablePicture
from emonb.files import visible
from emonb.progress import progress
from emonb.settings import load_settings, project_root

if TYPE_CHECKING:
    from emonb.opinions import Opinion

__all__ = ["as_text", "default_model", "find_pictures", "predict"]

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
BATCH = 8  # decoded pictures in memory at a time


def predict(
    images: Sequence[Path],
    model_folder: Path | None,
    *,
    as_json: bool,
    reasons: bool,
    say: Callable[[str], None],
    complain: Callable[[str], None],
) -> int:
    """Answer for each picture in order; returns how many could not be read.

    Args:
        images: pictures, and folders that are searched for pictures.
        model_folder: a saved model; default: `default_model()`.
        as_json: print one JSON list of `Opinion.to_dict` at the end, instead of text as soon as it is known.
        reasons: ask the VLM for key elements and reasons too.
        say: prints to standard output.
        complain: prints to standard error, a line for each picture that cannot be read.

    Raises:
        EmonbError: a file, folder or model that is not there.
    """
    paths = find_pictures(images, complain)
    folder = model_folder or default_model()
    if not folder.is_dir():
        raise EmonbError(f"{visible(folder)}: no such model folder; make it with: python -m emonb run")
    from transformers.utils import logging

    from emonb.model import EmoVLMKD
    from emonb.opinions import find_teacher, opinions, read_picture

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # of loading the weights
    complain(f"model: {visible(folder)}")
    model = EmoVLMKD.from_pretrained(folder)
    teacher = find_teacher(folder, model.labels)
    found, damaged = [], 0
    batches = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
    for batch in progress(batches, f"batches of {BATCH} pictures", note=lambda: visible(folder.name)):
        pictures, names = [], []
        for path in batch:
            try:
                pictures.append(read_picture(path, visible(path)))
                names.append(str(path))
            except UnreadablePicture as error:
                damaged += 1
                complain(f"emonb: {error}")
        said = opinions(model, pictures, names=names, teacher=teacher, texts=reasons) if pictures else []
        if as_json:
            found += [opinion.to_dict() for opinion in said]
            continue
        for opinion in said:
            say(as_text(opinion))
    if as_json:
        say(json.dumps(found, indent=1))  # ASCII: also names that are not UTF-8 come through, as \udcXX
    return damaged


def find_pictures(images: Sequence[Path], complain: Callable[[str], None] = lambda line: None) -> list[Path]:
    """The pictures named, and those below the folders named: .jpg, .jpeg, .png and .webp, sorted by name.

    Links to folders are not followed, so that no loop can trap the search.

    Raises:
        EmonbError: no such file or folder, or a folder without pictures.
    """
    found = []
    for path in images:
        if not path.exists():
            raise EmonbError(f"{visible(path)}: no such picture or folder")
        inside = sorted(_below(path, complain)) if path.is_dir() else [path]
        if not inside:
            raise EmonbError(f"{visible(path)}: no picture in this folder ({', '.join(ENDINGS)})")
        found += inside
    return found


def _below(folder: Path, complain: Callable[[str], None]) -> Iterator[Path]:
    def failed(error: OSError) -> None:
        complain(f"emonb: {visible(error.filename)}: left out ({error.strerror})")

    for root, _, names in os.walk(folder, onerror=failed):
        yield from (Path(root, name) for name in names if name.lower().endswith(ENDINGS))


def default_model() -> Path:
    """The first model of the mini profile's results.

    Raises:
        EmonbError: there is none yet.
    """
    settings = load_settings("mini")
    folder = settings.out_path / "models"
    for name in settings.datasets:
        if (folder / name / "config.json").is_file():
            return Path(os.path.relpath(folder / name))
    where = os.path.relpath(folder, project_root())
    raise EmonbError(f"no model in {where}: make one with python -m emonb run, or name a folder with --model")


def as_text(opinion: Opinion) -> str:
    """An opinion for a terminal: the answer, each model's own, which way the gate leaned, and the VLM's words."""
    lines = [f"{visible(opinion.image)}: {opinion.emotion} ({opinion.confidence():.0%})"]
    for name in opinion.distributions:
        if name != "EmoVLM-KD":
            lines.append(f"  {name + ':':6}{opinion.answers[name] or 'no answer'} ({opinion.confidence(name):.0%})")
    texts = {"Gate": opinion.lean.sentence, "Key elements": opinion.key_elements, "Reasons": opinion.reasons}
    for name, text in texts.items():
        if text:
            lines += textwrap.wrap(f"{name}: {visible(text)}", 100, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)
