"""Room 09: all that the models say about a picture, as plain data. Notebook, widget and command line show it.

Each model's distribution over the emotions, the VLM's key elements and reasons in its own words, which way the gate
leaned, and which visual tokens drove the head. The ViT teacher is no part of the assembled model, so it is
handed in where a results folder still has it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image

from emonb.emotions import check_labels
from emonb.errors import EmonbError, UnreadablePicture
from emonb.lean import GateLean, gate_lean
from emonb.saliency import Saliency, as_data, explain_head
from emonb.samples import as_seen, open_picture
from emonb.store import Artifact, Store

if TYPE_CHECKING:
    from emonb.model import EmoVLMKD

__all__ = [
    "MODELS",
    "Opinion",
    "Teacher",
    "find_teacher",
    "load_teacher",
    "opinions",
    "opinions_figure",
    "read_picture",
]

MODELS = ("VLM", "ViT", "head", "EmoVLM-KD")  # in the order in which they are shown
FORMATS = ("JPEG", "PNG", "WEBP")  # by content; others open rarely used decoders, or start other programs (EPS)
MAX_BYTES = 64 * 2**20  # a photo is 3 to 12 MB
MAX_PIXELS = 100_000_000  # 300 MB when decoded

Teacher = Callable[[Sequence[Image.Image]], np.ndarray]


@dataclass(frozen=True)
class Opinion:
    """What the models say about one picture.

    Attributes:
        image: its name.
        distributions: model -> {emotion: probability}; the ViT only where a teacher was given.
        answers: model -> its likeliest emotion; "" for a VLM whose free answer names none.
        lean: which way the gate leaned.
        saliency: the visual tokens' shares in the head's answer.
        key_elements, reasons: the VLM's own words, None where it was not asked.
    """

    image: str
    distributions: dict[str, dict[str, float]]
    answers: dict[str, str]
    lean: GateLean
    saliency: Saliency
    key_elements: str | None = None
    reasons: str | None = None

    @property
    def emotion(self) -> str:
        """EmoVLM-KD's answer."""
        return self.answers["EmoVLM-KD"]

    def confidence(self, model: str = "EmoVLM-KD") -> float:
        """Probability that a model gives to its likeliest emotion."""
        return max(self.distributions[model].values())

    def to_dict(self) -> dict[str, Any]:
        """JSON types, always the same keys: what `python -m emonb predict --json` prints."""
        models = {
            name: {"answer": self.answers[name], "confidence": self.confidence(name), "distribution": p}
            for name, p in self.distributions.items()
        }
        lean = {name: getattr(self.lean, name) for name in ("method", "emotion", "rival", "margin", "vlm", "head")}
        return {
            "image": self.image,
            "emotion": self.emotion,
            "confidence": self.confidence(),
            "models": {name: models.get(name) for name in MODELS},
            "gate": {**lean, "rest": self.lean.rest, "leaned_on": self.lean.leaned_on, "sentence": self.lean.sentence},
            "saliency": as_data(self.saliency),
            "key_elements": self.key_elements,
            "reasons": self.reasons,
        }


def opinions(
    model: EmoVLMKD,
    pictures: Sequence[str | Path | Image.Image],
    *,
    names: Sequence[str] = (),
    teacher: Teacher | None = None,
    texts: bool = False,
    generate: bool = False,
    steps: int = 1,
) -> list[Opinion]:
    """What all models say about a batch of pictures, together in memory; the same input gives the same answer.

    Args:
        model: the assembled model.
        pictures: paths or PIL images, at least one.
        names: of the pictures; default: the paths, or "image 0" and so on.
        teacher: the ViT, see `load_teacher`.
        texts: ask the VLM for key elements and reasons too: the slow part.
        generate: let the VLM write its answer freely, see `EmoVLMKD.parts`.
        steps: of the saliency, see `explain_head`.

    Raises:
        UnreadablePicture: a file that is no picture.
    """
    model.eval()
    images = [x if isinstance(x, Image.Image) else open_picture(x) for x in pictures]
    plain = [f"image {i}" if isinstance(x, Image.Image) else str(x) for i, x in enumerate(pictures)]
    with torch.inference_mode():
        parts = model.parts(images, generate=generate)
    scores = {"VLM": parts["vlm_p"], "head": parts["head"].double().softmax(-1)}
    scores = {name: p.double().cpu().numpy() for name, p in scores.items()}
    scores["EmoVLM-KD"] = parts["logits"].double().softmax(-1).cpu().numpy()
    if teacher is not None:
        scores["ViT"] = teacher(images)
    elements = model.say(images, "conversation") if texts else [None] * len(images)
    reasons = model.say(images, "reasoning") if texts else [None] * len(images)
    student = parts["head"].softmax(-1)
    found = []
    for i, name in enumerate(names or plain):
        p = {m: dict(zip(model.labels, map(float, scores[m][i]), strict=True)) for m in MODELS if m in scores}
        answers = {m: max(x, key=x.get) for m, x in p.items()}
        lean = gate_lean(model.gate, parts["vlm"][i], student[i], model.labels)
        answers["VLM"] = lean.vlm_says
        saliency = explain_head(model, parts["visual"], row=i, steps=steps)
        found.append(Opinion(name, p, answers, lean, saliency, elements[i], reasons[i]))
    return found


def load_teacher(artifact: Artifact, labels: Sequence[str]) -> Teacher:
    """The trained ViT of a results folder (stage `teacher`): PIL images -> (N, C) probabilities.

    Args:
        artifact: the stage's result.
        labels: the class order that the assembled model has.

    Raises:
        EmonbError: the teacher knows other emotions, or the same in another order.
    """
    from emonb.teacher import Pictures, load_network, predict_network

    net, config, known = load_network(artifact)
    check_labels(known, labels, str(artifact.path))

    def ask(images: Sequence[Image.Image]) -> np.ndarray:
        files = [_file(image) for image in images]  # `Pictures` decodes files, as in training
        frame = pd.DataFrame({"path": files, "label": [known[0]] * len(files)})  # the label is not looked at
        logits = predict_network(net, Pictures(frame, known, config))
        return torch.from_numpy(logits).double().softmax(-1).numpy()

    return torch.inference_mode()(ask)


def find_teacher(folder: Path, labels: Sequence[str]) -> Teacher | None:
    """The ViT beside a model folder `OUT/models/<dataset>`, or None for a model folder on its own."""
    store = folder.resolve().parent.parent / "artifacts"
    if not (store / "teacher" / f"{folder.resolve().name}--vit.json").is_file():
        return None
    try:
        return load_teacher(Store(store).find("teacher", f"{folder.resolve().name}--vit"), labels)
    except EmonbError:  # a results folder that was thinned out: the model answers without its teacher
        return None


def read_picture(source: Path | bytes, name: str) -> Image.Image:
    """A picture from outside, checked before it is decoded, as people see it (`emonb.samples.as_seen`).

    What counts is the content, not the ending of the name.

    Args:
        source: a file, or what it holds.
        name: how the messages call it.

    Raises:
        UnreadablePicture: larger than 64 MB or 100 megapixels, none of JPEG, PNG and WebP, or damaged.
    """
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > MAX_BYTES:
            raise UnreadablePicture(
                f"{name}: {size / 2**20:.0f} MB; the limit is {MAX_BYTES // 2**20} MB, make it smaller"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as raw:
                if raw.width * raw.height > MAX_PIXELS:
                    raise UnreadablePicture(
                        f"{name}: {raw.width} x {raw.height} px; the limit is {MAX_PIXELS // 10**6} megapixels, "
                        "make it smaller"
                    )
                return as_seen(raw)
    except UnreadablePicture:
        raise
    except Image.DecompressionBombError:
        raise UnreadablePicture(
            f"{name}: more than {MAX_PIXELS // 10**6} megapixels; make the picture smaller"
        ) from None
    except Image.UnidentifiedImageError:
        raise UnreadablePicture(f"{name}: not a JPEG, PNG or WebP picture, whatever its name says") from None
    except Exception as error:  # PIL's decoders raise what they meet: struct.error, ValueError, SyntaxError, ...
        raise UnreadablePicture(f"{name}: a damaged picture ({error}); replace the file") from None


def opinions_figure(picture: Image.Image, opinion: Opinion, truth: str = "") -> Figure:
    """The picture beside each model's probabilities: its answer in blue, a tick where people said the same.

    Args:
        picture: as people see it.
        opinion: what the models say.
        truth: what people say, or "" where nobody was asked.
    """
    labels, models = list(opinion.distributions["VLM"]), list(opinion.distributions)
    small = picture.copy()
    small.thumbnail((256, 256))
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 9, "axes.spines.top": False}):
        fig = Figure(figsize=(2.4 + 1.7 * len(models), 0.9 + 0.19 * len(labels)), layout="constrained")
        axes = fig.subplots(1, 1 + len(models), width_ratios=[1.2, *[1] * len(models)])
        axes[0].imshow(small)
        axes[0].set_axis_off()
        if truth:
            axes[0].set_title(f"people say: {truth}", parse_math=False)
        for i, (ax, model) in enumerate(zip(axes[1:], models, strict=True)):
            p = opinion.distributions[model]
            answer = opinion.answers[model]
            ax.barh(range(len(labels)), list(p.values()), color=["#0072B2" if x == answer else "#BBBBBB" for x in p])
            names = labels if i == 0 else [""] * len(labels)
            ax.set_yticks(range(len(labels)), names, parse_math=False)
            ax.invert_yaxis()
            ax.spines["right"].set_visible(False)
            ax.set(xlim=(0, 1))
            ax.set_xticks([0, 0.5, 1], ["0", "50", "100 %"])
            mark = "" if not truth else (" \u2713" if answer == truth else " \u2717")
            ax.set_title(f"{model}\n{answer or 'no answer'}{mark}", parse_math=False)
    return fig


def _file(image: Image.Image) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer
