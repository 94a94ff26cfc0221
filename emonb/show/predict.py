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

from emonb.data import ENDINGS, is_leftover, open_picture
from emonb.errors import EmonbError, PassingTrouble, UnreadablePicture, visible
from emonb.predictions import how_alike
from emonb.progress import progress
from emonb.settings import load_settings

_TOGETHER = 8  # pictures in a pass: a third less time each than alone; ours


def predict(
    images: Sequence[Path], model_folder: Path | None = None, *, as_json: bool = False, reasons: bool = False
) -> int:
    """Print an answer for each picture in order; returns how many could not be answered.

    Args:
        images: pictures, and folders that are searched for pictures.
        model_folder: a saved model; default: `default_model()`. `EmonbError`: anything named is not there.
        as_json: one list of `opinions` at the end, also when something stops the command, instead of text at once.
        reasons: ask the VLM for key elements and reasons too.
    """
    paths, folder = find_pictures(images), model_folder or default_model()
    if not folder.is_dir():
        raise EmonbError(f"{folder}: no such model folder; python -m emonb run makes one, --model names one")
    from transformers.utils import logging

    from emonb.model import EmoVLMKD
    from emonb.show.opinions import find_stranger, find_teacher, opinions
    from emonb.show.reasons import reasons_note

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # of loading the weights
    _warn(", ".join(filter(None, [f"model: {folder}", how_alike(folder)])))
    model = EmoVLMKD.from_pretrained(folder)
    note = reasons_note(folder.resolve().parent.parent, folder.resolve().name) if reasons else ""
    others = {"teacher": find_teacher(folder, model.labels), "stranger": find_stranger(folder)}
    ask, found, answered, waiting = partial(opinions, model, **others, texts=reasons), [], 0, []

    def say_all() -> None:
        """Answer those that wait, at once or, if that fails, one by one."""
        nonlocal answered
        for opinion in _answers(ask, waiting):
            opinion |= {"reasons_judged": note} if note else {}
            answered += 1
            if as_json:
                found.append(opinion)
            else:
                _say(as_text(opinion))
        waiting.clear()

    try:
        for path in progress(paths, "pictures", note=lambda: visible(folder.name)):
            try:
                waiting.append((str(path), open_picture(path, "the file")))
            except PassingTrouble:  # the next would fail, too
                say_all()
                raise
            except UnreadablePicture as error:
                _warn(f"emonb: {path}: could not be answered ({error})")
            if len(waiting) == _TOGETHER:
                say_all()
        say_all()
    finally:
        if as_json:
            print(json.dumps(found, indent=1))  # ASCII: also names that are not UTF-8 come through, as \udcXX
    return len(paths) - answered


def _answers(ask: Callable[..., list[dict[str, Any]]], pictures: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Opinions about named pictures; one that no model can take is named on standard error and left out."""
    if not pictures:
        return []
    names, opened = zip(*pictures, strict=True)
    try:
        return ask(opened, names)
    except Exception as error:  # what a model meets: a strip of 1:300, a GPU's full memory
        if len(pictures) > 1:
            return [opinion for one in pictures for opinion in _answers(ask, [one])]
        _warn(f"emonb: {names[0]}: could not be answered ({error})")
        return []


def _say(text: str, where: Any = None) -> None:
    with tqdm.external_write_mode():  # not behind a progress bar
        print(text, file=where, flush=True)


def _warn(text: str) -> None:
    _say(visible(text), sys.stderr)


def find_pictures(images: Sequence[Path]) -> list[Path]:
    """The pictures named, and those below the folders named, sorted by name; links to folders are not followed.

    What else a folder holds is told on standard error. What is not there, or holds no picture, is among the pictures,
    to be told as one without an answer. Raises `EmonbError` where that is all.
    """
    found = []
    for path in images:
        inside = _pictures_below(path) if os.path.isdir(path) else []
        found += inside or [path]
    if not any(os.path.exists(path) and not os.path.isdir(path) for path in found):
        empty = f"no picture in this folder ({', '.join(ENDINGS)})"
        raise EmonbError(f"{found[0]}: {empty if os.path.isdir(found[0]) else 'no such picture or folder'}")
    return found


def _pictures_below(folder: Path) -> list[Path]:
    """The pictures below a folder, sorted; leftovers and other files are told on standard error."""
    files, leftovers = [], 0
    walked = os.walk(folder, onerror=lambda error: _warn(f"emonb: {error}: left out"))
    for root, folders, names in walked:
        leftovers += sum(map(is_leftover, (*folders, *names)))
        folders[:] = [name for name in folders if not is_leftover(name)]
        files += [Path(root, name) for name in names if not is_leftover(name)]
    pictures = sorted(path for path in files if path.name.lower().endswith(ENDINGS))
    told = [f"{leftovers} made by macOS, Windows, a NAS or Jupyter passed over"] if leftovers else []
    if others := sorted(path.name for path in files if not path.name.lower().endswith(ENDINGS)):
        which = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        told.append(f"{len(others)} file{'s' * (len(others) > 1)} with an ending not taken: {which}")
    if told:
        _warn(f"{folder}: {'; '.join(told)}")
    return pictures


def default_model() -> Path:
    """The first model of the mini profile's results, or where it would be."""
    settings = load_settings("mini")
    models = [settings.out_path / "models" / name for name in settings.datasets]
    there = [folder for folder in models if (folder / "config.json").is_file()]
    return Path(os.path.relpath((there or models)[0]))


def as_text(opinion: dict[str, Any]) -> str:
    """An opinion for a terminal: the answer, each model's own, which way the gate leaned, and the VLM's words."""
    lines = [f"{visible(opinion['image'])}: {opinion['emotion']} ({opinion['confidence']:.0%})"]
    for name, said in opinion["models"].items():
        if said and name != "EmoVLM-KD":
            lines.append(f"  {name + ':':6}{said['answer']} ({said['confidence']:.0%})")
    words = [("Careful, this picture is", opinion["unfamiliar"]), ("Gate", opinion["gate"]["sentence"])]
    words += [("Key elements", opinion["key_elements"])]
    words += [("Reasons", opinion["reasons"]), ("Judged", opinion.get("reasons_judged"))]
    for name, text in words:
        if text:
            lines += textwrap.wrap(f"{name}: {visible(text)}", 100, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)
