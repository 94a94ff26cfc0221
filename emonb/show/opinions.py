"""Room 09: what the models say about a picture, which way the gate leaned, and which tokens drove the head.

The ViT teacher is no part of the assembled model, so it is handed in where a results folder still has it.
The gate's lean and the head's map are not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from emonb.data import check_labels
from emonb.errors import EmonbError
from emonb.files import read_json
from emonb.store import Store
from emonb.teacher import LAYOUT, load_network, network_input
from emonb.vlm import shown

if TYPE_CHECKING:
    from emonb.model import EmoVLMKD
    from emonb.vlm import Picture, VisualTokens

MODELS = {"VLM": "vlm_tuned", "ViT": "vit", "head": "head", "EmoVLM-KD": "emovlmkd"}  # as shown, as in predictions/
_EVEN = 0.05  # logits; a smaller difference is called even: it moves a probability by about one in a hundred; ours

Teacher = Callable[[Sequence[Image.Image]], Tensor]
Stranger = Callable[[Sequence[Image.Image], "VisualTokens"], list[str]]

SEEN = "seen.safetensors"  # in a model's folder: `known` pictures' traits, their `limit`, their patch grids `shapes`
_SMALL, _LEVELS = 96, (0.1, 0.25, 0.5, 0.75, 0.9)  # longest side in px; quantiles; ours
_LEAST = 0.01  # of 0.001 to 0.03 the one with most photographs beyond the limit, over five drawn datasets; ours


@torch.no_grad()
def gate_lean(gating: nn.Module, answer: Tensor, head: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """What each input adds to the gate's lead of its answer, `emotion`, over `rival`, for one picture, in logits.

    The rival is the other side's answer where VLM and head disagree and the gate sides with one; else the runner-up.
    A part is what the lead loses when that input is all zeros, and `rest` what is left of it. The paper's concat gate
    is linear, logits = W_vlm answer + W_head head + b, and these are the three terms of the lead.

    `answer` is the VLM's [C], one-hot or, where it named none of the C `labels`, zeros; `head` its probabilities [C].

    Returns:
        emotion, rival, and in logits margin (the lead) = vlm + head + rest; `leaned_on`: VLM, head, both or
        neither; `sentence`: the same in words.
    """
    silent = torch.zeros_like(head)
    logits = gating(torch.stack([answer, silent, answer]).float(), torch.stack([head, head, silent]).float()).double()
    winner, rival = logits[0].argsort(descending=True, stable=True)[:2].tolist()
    said, student = int(answer.argmax()), int(head.argmax())
    if answer.any() and said != student and winner in (said, student):
        rival = student if winner == said else said
    margin, without_vlm, without_head = (logits[:, winner] - logits[:, rival]).tolist()
    by_vlm, by_head = margin - without_vlm, margin - without_head
    rest, emotion, other = margin - by_vlm - by_head, labels[winner], labels[rival]
    leaned = "both" if abs(by_vlm - by_head) < _EVEN else "VLM" if by_vlm > by_head else "head"
    leaned = leaned if max(by_vlm, by_head) > 0 else "neither"
    who = leaned if leaned in ("both", "neither") else f"the {leaned}"
    sentence = (
        f"The gate answers {emotion} and leaned on {who}: to its lead of {margin:+.2f} logits over {other} the VLM "
        f"adds {by_vlm:+.2f}, the head {by_head:+.2f} and the rest is {rest:+.2f}."
    )
    lean = {"emotion": emotion, "rival": other, "margin": margin, "vlm": by_vlm, "head": by_head, "rest": rest}
    return {**lean, "leaned_on": leaned, "sentence": sentence}


def explain_head(
    model: EmoVLMKD, visual: VisualTokens, label: str | None = None, *, row: int = 0, steps: int = 1
) -> dict[str, Any]:
    """Share the head's logit out over a picture's visual tokens, whose mean is all that the head sees (paper).

    Gradient times input (Shrikumar et al. 2017, "Learning Important Features Through Propagating Activation
    Differences"), with more steps integrated gradients (Sundararajan et al. 2017). It explains the head: not the VLM,
    and not what lies inside a token, which has seen the whole picture through the vision tower's attention.

    With g the gradient of the logit with respect to the mean x of N tokens t_i, token i contributes g . (t_i - b) / N.
    The baseline b is the mean feature of the training pictures (`StudentHead.mean`; zero for a head that does not
    standardise): else what all pictures share would dominate.

    Args:
        visual: visual tokens of a batch of pictures; `row` says which.
        label: whose logit; default: the head's own answer. `EmonbError`: the model does not know it.
        steps: 1 takes the gradient at x, exact for a linear head; more average it over the way from b to x.

    Returns:
        JSON types: label; logit of this picture, and `start`, of the baseline; `tokens`, rows x columns parts in their
        difference, positive for the label; `missed`, what these leave unexplained, in logits. Of a class without a
        patch grid the tokens stand in one row, in their order: it does not say where in the picture they lie.
    """
    if label not in (None, *model.labels):
        raise EmonbError(f"label: {label!r} is none of the model's emotions; use one of: {', '.join(model.labels)}")
    head = model.head
    *_, height, width = 1, *(int(n) // model.seeing().merge_size for n in visual.grid[row])
    with torch.inference_mode(False), torch.enable_grad():  # also where the caller has switched gradients off
        tokens = visual.tokens[row][:, : visual.width].clone().float().to(head.mean.device)  # [N, D]
        base = head.mean.clone()  # [D]
        pooled = tokens.mean(0).half().float()  # [D], rounded as in `EmoVLMKD.parts`
        with torch.no_grad():
            ends = head(torch.stack([base, pooled]))  # [2, C]
        k = int(ends[1].argmax()) if label is None else model.labels.index(label)
        way = torch.ones(1) if steps == 1 else (torch.arange(steps) + 0.5) / steps
        points = (base + way[:, None].to(base.device) * (pooled - base)).requires_grad_()  # [steps, D]
        (gradients,) = torch.autograd.grad(head(points)[:, k].sum(), points)
    shares = (tokens - base).double() @ gradients.mean(0).double() / len(tokens)  # [N], row by row
    start, logit = ends[:, k].tolist()
    found = {"label": model.labels[k], "logit": logit, "start": start, "missed": logit - start - float(shares.sum())}
    return {**found, "rows": height, "columns": width, "tokens": shares.reshape(height, width).tolist()}


def opinions(
    model: EmoVLMKD,
    pictures: Sequence[Image.Image],
    names: Sequence[str],
    *,
    teacher: Teacher | None = None,
    stranger: Stranger | None = None,
    texts: bool = False,
) -> list[dict[str, Any]]:
    """What all models say about a batch of pictures; the same input gives the same answer.

    Args:
        pictures: as people see them, at least one, with their names.
        teacher: the ViT, see `find_teacher`; stranger: see `find_stranger`.
        texts: ask the VLM for key elements and reasons too: the slow part.

    Returns:
        JSON types: image, emotion, confidence, models (answer, confidence and distribution of each of `MODELS`; None
        for a ViT that was not asked), gate, saliency, key_elements, reasons (None: not asked), unfamiliar (why the
        picture is nothing that the models have seen; else "", None: not known).
    """
    model.eval()
    with torch.inference_mode():
        parts = model.parts(pictures)
    student = parts["head"].softmax(-1)
    scores = {"VLM": parts["vlm_p"].double(), "head": parts["head"].double().softmax(-1)}  # [B, C] each
    scores |= {"EmoVLM-KD": parts["logits"].double().softmax(-1)} | ({"ViT": teacher(pictures)} if teacher else {})
    words = [model.say(pictures, kind) if texts else [None] * len(names) for kind in ("conversation", "reasoning")]
    strange, found = stranger(pictures, parts["visual"]) if stranger else [None] * len(names), []
    for i, (name, elements, reasons) in enumerate(zip(names, *words, strict=True)):
        models: dict[str, Any] = dict.fromkeys(MODELS)
        for who, p in scores.items():
            distribution = dict(zip(model.labels, p[i].tolist(), strict=True))
            best = max(distribution, key=distribution.get)
            models[who] = {"answer": best, "confidence": distribution[best], "distribution": distribution}
        ours, lean = models["EmoVLM-KD"], gate_lean(model.gate, parts["vlm"][i], student[i], model.labels)
        said = {"image": name, "emotion": ours["answer"], "confidence": ours["confidence"], "models": models}
        said |= {"gate": lean, "saliency": explain_head(model, parts["visual"], row=i)}
        found.append({**said, "key_elements": elements, "reasons": reasons, "unfamiliar": strange[i]})
    return found


def traits(pictures: Sequence[Picture], visual: VisualTokens) -> Tensor:
    """[B, 2 D + 45] numbers in float16 by which a stranger is told: what its visual tokens and its texture are like.

    Mean and log deviation of each picture's D-wide tokens; and of the picture, at most 96 px long, quantiles of how
    much neighbouring pixels differ, to the right, downwards and from a straight line. A tower trained on drawings
    sees of one photograph in ten only what drawings have, too; grain and sharpness give that one away. Ours.
    """
    found = []
    for picture, seen in zip(pictures, visual.tokens, strict=True):
        tokens = seen[:, : visual.width].float().cpu()
        pixels = np.asarray(shown(picture, _SMALL), dtype=np.float32)  # [H, W, 3]
        pixels = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), "edge")  # so that a line of pixels has differences, too
        right, down = np.diff(pixels, axis=1), np.diff(pixels, axis=0)
        bent = np.diff(right, axis=1)[1:-1] + np.diff(down, axis=0)[:, 1:-1]
        steps = [np.quantile(np.abs(x).reshape(-1, 3), _LEVELS, axis=0).ravel() for x in (right, down, bent)]
        deviation = tokens.std(0, correction=0) + 1e-3
        found.append(torch.cat([tokens.mean(0), deviation.log(), torch.from_numpy(np.concatenate(steps)).log1p()]))
    return torch.stack(found).half()


def distance_to(known: Tensor) -> Callable[[Tensor], Tensor]:
    """How far pictures ([M, F] `traits`) lie from the most alike of the known ones ([N, F]).

    Lengths count in units of the known pictures' spread in that direction, or of a hundredth of their largest spread.
    """
    known = known.double()
    centre = known.mean(0)
    _, size, directions = torch.linalg.svd(known - centre, full_matrices=False)  # [K], [K, F]
    spread = size / max(len(known) - 1, 1) ** 0.5
    least = _LEAST * spread[0]
    unit = (spread**2 + least**2).sqrt()
    places = (known - centre) @ directions.T / unit  # [N, K]

    def distance(pictures: Tensor) -> Tensor:
        gaps = pictures.double() - centre
        along = gaps @ directions.T
        beside = (gaps - along @ directions).norm(dim=1) / least  # where the known have no spread at all
        return torch.hypot(torch.cdist(along / unit, places).amin(1), beside)

    return distance


def familiar_limit(known: Tensor) -> float:
    """What 99 % of new pictures of the known ones' kind stay below: each tenth of these is new to the other nine."""
    tenth = torch.arange(len(known)) % 10
    return float(torch.cat([distance_to(known[tenth != k])(known[tenth == k]) for k in tenth.unique()]).quantile(0.99))


def find_stranger(folder: Path) -> Stranger | None:
    """Why a picture is unlike all of those that a model knows; None: a model that was saved without them."""
    if not (folder / SEEN).is_file():
        return None
    seen = load_file(folder / SEEN)
    distance, limit, shapes = distance_to(seen["known"]), float(seen["limit"]), seen["shapes"].tolist()

    def ask(pictures: Sequence[Image.Image], visual: VisualTokens) -> list[str]:
        said, far_away = [], distance(traits(pictures, visual)).tolist()
        for far, grid in zip(far_away, visual.grid.tolist(), strict=True):
            why = [f"far from all of them ({far:.1f}; 99 % of new ones of their kind stay below {limit:.1f})"]
            why = why * (far > limit) + ["not of their one shape"] * (len(shapes) == 1 and [grid] != shapes)
            said.append(f"unlike the pictures that these models know: {' and '.join(why)}" if why else "")
        return said

    return ask


def _beside(folder: Path, stage: str, *job: str) -> Path:
    """The result of a stage for the model in `OUT/models/<dataset>`; `EmonbError`: a model folder on its own."""
    folder = folder.resolve()
    return Store(folder.parent.parent / "artifacts").find(stage, "--".join((folder.name, *job))).path


def find_teacher(folder: Path, labels: Sequence[str]) -> Teacher | None:
    """The ViT beside a model folder `OUT/models/<dataset>`: pictures -> [B, C] probabilities.

    None for a model folder on its own, and where the ViT does not know these emotions in this order.
    """
    try:
        made = _beside(folder, "teacher", "vit", f"seed{read_json(folder / 'config.json')['seed']}")
        net, settings, known = load_network(made)
        check_labels(known, labels, str(made))
    except EmonbError:
        return None

    @torch.inference_mode()
    def ask(pictures: Sequence[Image.Image]) -> Tensor:
        return net(network_input(pictures, settings).to(**LAYOUT)).double().softmax(-1)

    return ask
