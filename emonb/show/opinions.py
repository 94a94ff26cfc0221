"""Room 09: what the models say about a picture, each with its distribution, and which way the gate leaned.

The ViT teacher is no part of the assembled model, so it is handed in where a results folder still has it.
The gate's lean and the head's map are not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from emonb.data import check_labels
from emonb.errors import EmonbError
from emonb.figures import FULL, GREY, styled
from emonb.files import read_json
from emonb.gate import ConcatGate
from emonb.predictions import model_color
from emonb.show.saliency import Saliency, explain_head
from emonb.store import Store
from emonb.teacher import LAYOUT, build_network, colours_of

if TYPE_CHECKING:
    from emonb.model import EmoVLMKD

MODELS = {"VLM": "vlm_tuned", "ViT": "vit", "head": "head", "EmoVLM-KD": "emovlmkd"}  # as shown, as in predictions/
_EVEN = 0.05  # logits; a smaller difference is called even: it moves a probability by about one in a hundred; ours

Teacher = Callable[[Sequence[Image.Image]], Tensor]


@dataclass(frozen=True)
class GateLean:
    """What each input adds to the gate's lead of `emotion` over `rival`, in logits."""

    method: str  # `halves` (concat gate: an exact sum) or `ablation` (the others), see `gate_lean`
    emotion: str  # the gate's answer
    rival: str  # the other side's answer where VLM and head disagree and the gate sides with one; else the runner-up
    margin: float  # the lead, at least 0
    vlm: float  # what the VLM's answer adds
    head: float  # what the head's probabilities add
    rest: float  # margin - vlm - head: the bias for `halves`, what the inputs do together for `ablation`

    @property
    def leaned_on(self) -> str:
        """`VLM`, `head`, or `both` where they add about the same, or `neither` where none adds anything."""
        if max(self.vlm, self.head) <= 0:
            return "neither"
        return "both" if abs(self.vlm - self.head) < _EVEN else ("VLM" if self.vlm > self.head else "head")

    @property
    def sentence(self) -> str:
        """On whom the gate leaned, and by how much: plain text."""
        who = {"VLM": "the VLM", "head": "the head", "both": "both alike", "neither": "neither input"}[self.leaned_on]
        rest = "the bias" if self.method == "halves" else "both together"
        return (
            f"The gate answers {self.emotion} and leaned on {who}: to the lead of {self.emotion} over {self.rival}, "
            f"{self.margin:+.2f} logits, the VLM adds {self.vlm:+.2f}, the head {self.head:+.2f} and {rest} "
            f"{self.rest:+.2f}."
        )


@torch.no_grad()
def gate_lean(gating: nn.Module, answer: Tensor, head: Tensor, labels: Sequence[str]) -> GateLean:
    """On which input the gate leaned for one picture.

    The paper's concat gate is linear, logits = W_vlm answer + W_head head + b, so each half's part in the lead is a
    dot product, and parts and bias add up to it exactly. For the other gates a part is what the lead loses when that
    input says nothing: an answer of zeros, as for an unreadable one, or uniform probabilities.

    Args:
        gating: one of `emonb.gate.GATES`.
        answer: [C] the VLM's one-hot answer; zeros where it named no emotion.
        head: [C] the head's probabilities.
        labels: the C emotions.
    """
    answer, head = answer[None].float(), head[None].float()
    logits = gating(answer, head)[0]
    winner, rival = logits.argsort(descending=True, stable=True)[:2].tolist()
    said, student = int(answer.argmax()), int(head.argmax())
    if answer.any() and said != student and winner in (said, student):
        rival = student if winner == said else said

    def lead(x: Tensor) -> float:
        return float(x[winner].double() - x[rival].double())

    margin, classes, linear = lead(logits), len(labels), isinstance(gating, ConcatGate)
    if linear:
        weight = gating.linear.weight  # [C, 2C]
        by_vlm, by_head = lead(weight[:, :classes] @ answer[0]), lead(weight[:, classes:] @ head[0])
    else:
        by_vlm = margin - lead(gating(torch.zeros_like(answer), head)[0])
        by_head = margin - lead(gating(answer, torch.full_like(head, 1 / classes))[0])
    method, rest = "halves" if linear else "ablation", margin - by_vlm - by_head
    return GateLean(method, labels[winner], labels[rival], margin, by_vlm, by_head, rest)


@styled
def lean_figure(lean: GateLean) -> Figure:
    """Bars of what each input adds to the lead: right of zero for the gate's answer, left for its rival."""
    values = [lean.vlm, lean.head, lean.rest]
    names = ["VLM's answer", "head", "bias" if lean.method == "halves" else "both together"]
    fig = Figure(figsize=(4.6, 1.4), layout="constrained")
    axes = fig.subplots()
    bars = axes.barh(names, values, color=[model_color("vlm_tuned"), model_color("head"), GREY], height=0.65)
    axes.bar_label(bars, [f"{value:+.2f}" for value in values], padding=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("logits")
    axes.set_title(f"lead of {lean.emotion} over {lean.rival}: {lean.margin:+.2f}")
    return fig


@dataclass(frozen=True)
class Opinion:
    """What the models say about one picture."""

    image: str  # its name
    distributions: dict[str, dict[str, float]]  # model -> {emotion: probability}; the ViT only where it was asked
    lean: GateLean
    saliency: Saliency  # of the head's answer
    key_elements: str | None = None  # the VLM's own words, None where it was not asked
    reasons: str | None = None

    @property
    def answers(self) -> dict[str, str]:
        """Model -> its likeliest emotion."""
        return {model: max(p, key=p.get) for model, p in self.distributions.items()}

    @property
    def emotion(self) -> str:
        """EmoVLM-KD's answer."""
        return self.answers["EmoVLM-KD"]

    def confidence(self, model: str = "EmoVLM-KD") -> float:
        """Probability that a model gives to its likeliest emotion."""
        return max(self.distributions[model].values())

    def to_dict(self) -> dict[str, Any]:
        """JSON types, always the same keys: what `python -m emonb predict --json` prints."""
        models: dict[str, Any] = dict.fromkeys(MODELS)
        for name, p in self.distributions.items():
            models[name] = {"answer": self.answers[name], "confidence": self.confidence(name), "distribution": p}
        return {
            "image": self.image,
            "emotion": self.emotion,
            "confidence": self.confidence(),
            "models": models,
            "gate": {**asdict(self.lean), "leaned_on": self.lean.leaned_on, "sentence": self.lean.sentence},
            "saliency": self.saliency.to_dict(),
            "key_elements": self.key_elements,
            "reasons": self.reasons,
        }


def opinions(
    model: EmoVLMKD,
    pictures: Sequence[Image.Image],
    names: Sequence[str],
    *,
    teacher: Teacher | None = None,
    texts: bool = False,
) -> list[Opinion]:
    """What all models say about a batch of pictures; the same input gives the same answer.

    Args:
        pictures: as people see them, at least one, with their names.
        teacher: the ViT, see `find_teacher`.
        texts: ask the VLM for key elements and reasons too: the slow part.
    """
    model.eval()
    with torch.inference_mode():
        parts = model.parts(pictures)
    student = parts["head"].softmax(-1)
    scores = {"VLM": parts["vlm_p"].double(), "head": parts["head"].double().softmax(-1)}  # [B, C] each
    scores["EmoVLM-KD"] = parts["logits"].double().softmax(-1)
    if teacher is not None:
        scores["ViT"] = teacher(pictures)
    said = [model.say(pictures, kind) if texts else [None] * len(names) for kind in ("conversation", "reasoning")]
    found = []
    for i, (name, elements, reasons) in enumerate(zip(names, *said, strict=True)):
        p = {m: dict(zip(model.labels, scores[m][i].tolist(), strict=True)) for m in MODELS if m in scores}
        lean = gate_lean(model.gate, parts["vlm"][i], student[i], model.labels)
        found.append(Opinion(name, p, lean, explain_head(model, parts["visual"], row=i), elements, reasons))
    return found


def find_teacher(folder: Path, labels: Sequence[str]) -> Teacher | None:
    """The ViT beside a model folder `OUT/models/<dataset>`: pictures -> [B, C] probabilities.

    None for a model folder on its own, and where the ViT does not know these emotions in this order.
    """
    folder = folder.resolve()
    artifacts = folder.parent.parent / "artifacts"
    if not artifacts.is_dir():
        return None
    try:
        made = Store(artifacts).find("teacher", f"{folder.name}--vit").path
        config = read_json(made / "config.json")
        check_labels(config["labels"], labels, str(made))
    except EmonbError:
        return None
    known = config["network"]
    side, colours = known["image_size"], colours_of(known["name"], known["pretrained"])
    mean, deviation = (255 * torch.tensor(c)[:, None, None] for c in colours)
    net = build_network(known["name"], len(labels), image_size=side, **known["kwargs"]).eval()
    net.load_state_dict(load_file(made / "model.safetensors"))

    @torch.inference_mode()
    def ask(pictures: Sequence[Image.Image]) -> Tensor:
        small = [np.array(picture.resize((side, side), Image.Resampling.BICUBIC)) for picture in pictures]
        x = (torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() - mean) / deviation  # [B, 3, S, S]
        return net(x.to(**LAYOUT)).double().softmax(-1)

    return ask


@styled
def opinions_figure(picture: Image.Image, opinion: Opinion, truth: str = "") -> Figure:
    """The picture beside each model's probabilities: its answer is outlined.

    Args:
        truth: what people say, or "" where nobody was asked; a tick where the model says the same.
    """
    labels, models = list(opinion.distributions["VLM"]), list(opinion.distributions)
    small = picture.copy()
    small.thumbnail((256, 256))
    fig = Figure(figsize=(FULL, 0.7 + 0.16 * len(labels)), layout="constrained")
    first, *others = fig.subplots(1, 1 + len(models))
    first.imshow(small)
    first.set_axis_off()
    first.set_title(f"people say: {truth}" if truth else "")
    for ax, model in zip(others, models, strict=True):
        answer, p = opinion.answers[model], opinion.distributions[model]
        bars = ax.barh(labels, list(p.values()), color=model_color(MODELS[model]), alpha=0.45)
        bars[labels.index(answer)].set(alpha=1, edgecolor="black", linewidth=0.8)
        ax.tick_params(axis="y", length=0, labelleft=ax is others[0])
        ax.invert_yaxis()
        ax.set_xlim(0, 1)
        ax.set_xticks([0, 0.5, 1], ["0", "50", "100 %"])
        mark = (" \u2713" if answer == truth else " \u2717") if truth else ""
        ax.set_title(f"{model}\n{answer}{mark}")
    return fig
