"""Room 09: which way the gate leaned for one picture, in logits and in words.

The paper's gate is linear in the two inputs side by side, so what each input adds to the lead of one emotion over
another is exact. The other gates mix their inputs; there an input is replaced by one that says nothing.
Not in the paper, which compares gates by accuracy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from emonb.errors import EmonbError
from emonb.gate import ConcatGate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GateLean", "gate_lean", "lean_figure"]

METHODS = ("halves", "ablation")
_EVEN = 0.05  # logits; a smaller difference is called even (ours: it moves a probability by about one in a hundred)


@dataclass(frozen=True)
class GateLean:
    """What each input adds to the gate's lead of `emotion` over `rival`.

    Attributes:
        emotion: the gate's answer.
        rival: the other side's answer where VLM and head disagree and the gate sides with one; else the runner-up.
        vlm_says, head_says: the inputs' own answers; `vlm_says` is "" where the VLM's text names no emotion.
        margin: logit of `emotion` minus logit of `rival`, at least 0.
        vlm, head: logits that the VLM's answer and the head's probabilities add to `margin`.
        rest: `margin - vlm - head`: the bias for `halves`, what the inputs do together for `ablation`.
        method: `halves` or `ablation`, see `gate_lean`.
    """

    emotion: str
    rival: str
    vlm_says: str
    head_says: str
    margin: float
    vlm: float
    head: float
    rest: float
    method: str

    @property
    def leaned_on(self) -> str:
        """`VLM`, `head`, or `both` where they add about the same, or `neither` where none adds anything."""
        if max(self.vlm, self.head) <= 0:
            return "neither"
        return "both" if abs(self.vlm - self.head) < _EVEN else ("VLM" if self.vlm > self.head else "head")

    @property
    def sentence(self) -> str:
        """Who said what, on whom the gate leaned, and by how much: plain text."""
        if not self.vlm_says:
            said = f"The VLM's answer could not be read; the head says {self.head_says}."
        elif self.vlm_says == self.head_says:
            said = f"VLM and head both say {self.head_says}."
        else:
            said = f"The VLM says {self.vlm_says}, the head says {self.head_says}."
        who = {"VLM": "on the VLM", "head": "on the head", "both": "on both alike", "neither": "on neither of them"}
        numbers = {"the VLM's answer": self.vlm, "the head": self.head}
        first, second = sorted(numbers, key=numbers.get, reverse=True) if self.leaned_on == "head" else numbers
        how = "adds" if self.method == "halves" else "makes a difference of"
        return (
            f"{said} The gate answers {self.emotion} and leaned {who[self.leaned_on]}: to the lead of {self.emotion} "
            f"over {self.rival}, {first} {how} {numbers[first]:+.2f} and {second} {numbers[second]:+.2f} logits "
            f"({'bias' if self.method == 'halves' else 'both together'} {self.rest:+.2f}, lead {self.margin:+.2f})."
        )


@torch.no_grad()
def gate_lean(gating: nn.Module, answer: Tensor, head: Tensor, labels: Sequence[str], method: str = "") -> GateLean:
    """On which input the gate leaned for one picture.

    Args:
        gating: one of `emonb.gate.GATES`.
        answer: (C,) the VLM's one-hot answer; zeros where it named no emotion.
        head: (C,) the head's probabilities.
        labels: the C emotions.
        method: `halves` (the default for the paper's concat gate): logits = W_vlm answer + W_head head + b, so each
            half's part in the lead is a dot product, and the parts and the bias add up to it exactly. `ablation`
            (the default for the other gates, possible for all): by how much the lead shrinks when the VLM's
            answer becomes zeros (as for an unreadable answer), or the head's probabilities become uniform.
            The two differ also for the concat gate: a half counts all of an input, an ablation only what it
            says beyond the uninformative one.

    Raises:
        EmonbError: `halves` of a gate that is not linear in its inputs, or an unknown method.
    """
    linear = isinstance(gating, ConcatGate)
    method = method or ("halves" if linear else "ablation")
    if method not in METHODS or (method == "halves" and not linear):
        raise EmonbError(f"method: {method!r} does not fit {type(gating).__name__}; use ablation")
    answer, head = answer[None].float(), head[None].float()
    logits = gating(answer, head)[0]
    said = int(answer.argmax()) if bool(answer.any()) else None
    student, winner = int(head.argmax()), int(logits.argmax())
    others = logits.clone()
    others[winner] = -torch.inf
    rival = int(others.argmax())
    if said is not None and said != student and winner in (said, student):
        rival = student if winner == said else said

    def lead(x: Tensor) -> float:
        return float(x[winner].double() - x[rival].double())

    margin, classes = lead(logits), len(labels)
    if method == "halves":
        weight = gating.linear.weight
        vlm_part, head_part = lead(weight[:, :classes] @ answer[0]), lead(weight[:, classes:] @ head[0])
    else:
        vlm_part = margin - lead(gating(torch.zeros_like(answer), head)[0])
        head_part = margin - lead(gating(answer, torch.full_like(head, 1 / classes))[0])
    return GateLean(
        emotion=labels[winner],
        rival=labels[rival],
        vlm_says="" if said is None else labels[said],
        head_says=labels[student],
        margin=margin,
        vlm=vlm_part,
        head=head_part,
        rest=margin - vlm_part - head_part,
        method=method,
    )


def lean_figure(lean: GateLean) -> Figure:
    """Bars of what each input adds to the lead: right of zero for the gate's answer, left for its rival."""
    import matplotlib
    from matplotlib.figure import Figure

    names = ["VLM's answer", "head", "bias" if lean.method == "halves" else "both together"]
    values = [lean.vlm, lean.head, lean.rest]
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 9, "axes.spines.top": False}):
        fig = Figure(figsize=(5.2, 1.7), layout="constrained")
        axes = fig.subplots()
        axes.barh(range(3), values, color=["#0072B2", "#009E73", "#BBBBBB"], height=0.65)  # Okabe and Ito
        axes.axvline(0, color="#333333", linewidth=0.8)
        axes.set_yticks(range(3), names)
        axes.invert_yaxis()
        axes.spines[["left", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        widest = max(map(abs, values)) or 1.0
        axes.set_xlim(min(0.0, *values) - 0.22 * widest, max(0.0, *values) + 0.22 * widest)
        for y, value in enumerate(values):
            side = "left" if value >= 0 else "right"
            axes.annotate(f"{value:+.2f}", (value, y), (3 if value >= 0 else -3, 0), textcoords="offset points",
                          va="center", ha=side)  # fmt: skip
        axes.set_xlabel(f"logits, for {lean.emotion} against {lean.rival}", parse_math=False)
        axes.set_title(f"lead of {lean.emotion} over {lean.rival}: {lean.margin:+.2f}", parse_math=False)
    return fig
