"""`python -m emonb predict`: the opinions about pictures and folders of pictures, as text or JSON."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emonb.data import open_picture
from emonb.errors import EmonbError
from emonb.files import visible
from emonb.progress import progress
from emonb.settings import load_settings, project_root

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
BATCH = 8  # decoded pictures in memory at a time


def predict(
    images: Sequence[Path], model_folder: Path | None = None, *, as_json: bool = False, reasons: bool = False
) -> int:
    """Print an answer for each picture in order; returns how many could not be answered.

    Args:
        images: pictures, and folders that are searched for pictures.
        model_folder: a saved model; default: `default_model()`.
        as_json: print one JSON list of `opinions` at the end (also when something stops the command),
            instead of text as soon as it is known.
        reasons: ask the VLM for key elements and reasons too.

    Raises:
        EmonbError: a file, folder or model that is not there.
    """
    paths, folder = find_pictures(images), model_folder or default_model()
    if not folder.is_dir():
        raise EmonbError(f"{visible(folder)}: no such model folder; make it with: python -m emonb run")
    from transformers.utils import logging

    from emonb.model import EmoVLMKD
    from emonb.show.opinions import find_teacher, opinions

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # of loading the weights
    _say(f"model: {visible(folder)}", sys.stderr)
    model = EmoVLMKD.from_pretrained(folder)
    ask = partial(opinions, model, teacher=find_teacher(folder, model.labels), texts=reasons)
    found, starts = [], range(0, len(paths), BATCH)
    try:
        for start in progress(starts, f"batches of {BATCH} pictures", note=lambda: visible(folder.name)):
            for opinion in _answers(paths[start : start + BATCH], ask):
                found.append(opinion)
                if not as_json:
                    _say(as_text(opinion))
    finally:
        if as_json:
            print(json.dumps(found, indent=1))  # ASCII: also names that are not UTF-8 come through, as \udcXX
    return len(paths) - len(found)


def _say(text: str, where: Any = None) -> None:
    with tqdm.external_write_mode():  # not behind a progress bar
        print(text, file=where, flush=True)


def _answers(batch: Sequence[Path], ask: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Opinions about the pictures of a batch; one without an answer is named, and takes no other along."""
    try:
        return ask([open_picture(path, "the file") for path in batch], list(map(str, batch)))
    except Exception as error:  # damaged; or what a model meets: a strip of 1:300, a GPU's full memory
        if len(batch) > 1:
            return [opinion for path in batch for opinion in _answers([path], ask)]
        _say(f"emonb: {visible(batch[0])}: could not be answered ({visible(error)})", sys.stderr)
        return []


def find_pictures(images: Sequence[Path]) -> list[Path]:
    """The pictures named, and those below the folders named, sorted by name; links to folders are not followed.

    A folder that cannot be read is named on standard error.

    Raises:
        EmonbError: no such file or folder, or a folder without pictures.
    """

    def left_out(error: OSError) -> None:
        _say(f"emonb: {visible(error.filename)}: left out ({error.strerror})", sys.stderr)

    found = []
    for path in images:
        if not path.exists():
            raise EmonbError(f"{visible(path)}: no such picture or folder")
        walked = os.walk(path, onerror=left_out) if path.is_dir() else [("", (), [path])]
        files = [Path(root, name) for root, _, names in walked for name in names]
        inside = sorted(file for file in files if file == path or file.suffix.lower() in ENDINGS)
        if not inside:
            raise EmonbError(f"{visible(path)}: no picture in this folder ({', '.join(ENDINGS)})")
        found += inside
    return found


def default_model() -> Path:
    """The first model of the mini profile's results; raises `EmonbError` where there is none."""
    settings = load_settings("mini")
    models = settings.out_path / "models"
    there = [models / name for name in settings.datasets if (models / name / "config.json").is_file()]
    if not there:
        where = os.path.relpath(models, project_root())
        raise EmonbError(f"no model in {where}: make one with python -m emonb run, or name a folder with --model")
    return Path(os.path.relpath(there[0]))


def as_text(opinion: dict[str, Any]) -> str:
    """An opinion for a terminal: the answer, each model's own, which way the gate leaned, and the VLM's words."""
    lines = [f"{visible(opinion['image'])}: {opinion['emotion']} ({opinion['confidence']:.0%})"]
    for name, said in opinion["models"].items():
        if said and name != "EmoVLM-KD":
            lines.append(f"  {name + ':':6}{said['answer']} ({said['confidence']:.0%})")
    texts = {
        "Gate": opinion["gate"]["sentence"],
        "Key elements": opinion["key_elements"],
        "Reasons": opinion["reasons"],
    }
    for name, text in texts.items():
        if text:
            lines += textwrap.wrap(f"{name}: {visible(text)}", 100, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)
