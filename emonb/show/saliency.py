"""Room 09: which visual tokens drove the distilled head, and the picture that shows it.

Gradient times input (Shrikumar et al. 2017, "Learning Important Features Through Propagating Activation Differences"),
with more steps integrated gradients (Sundararajan et al. 2017). It explains the head: not the VLM's answer, and not
what lies inside a token, which has seen the whole picture through the vision tower's attention. Not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from emonb.errors import EmonbError
from emonb.figures import FULL, styled

if TYPE_CHECKING:
    from emonb.model import EmoVLMKD
    from emonb.vlm import VisualTokens

COLORS = "PuOr_r"  # purple to orange, which colour-blind readers can tell apart; ColorBrewer


@dataclass(frozen=True)
class Saliency:
    """Shares of the visual tokens in one logit of the head."""

    label: str  # the emotion whose logit it is
    tokens: np.ndarray  # [rows, columns] float64: a token's part in `logit - start`; positive speaks for `label`
    logit: float  # the head's, for this picture
    start: float  # the head's logit at the baseline, the mean feature of the training pictures

    @property
    def missed(self) -> float:
        """What the shares leave unexplained, in logits: 0 for a linear head, or with many steps."""
        return self.logit - self.start - float(self.tokens.sum())

    def to_dict(self) -> dict[str, Any]:
        """JSON types: label, size, logits rounded to 1e-5, and the shares row by row."""
        rows, columns = self.tokens.shape
        numbers = {name: round(getattr(self, name), 5) for name in ("logit", "start", "missed")}
        tokens = self.tokens.round(5).tolist()
        return {"label": self.label, "rows": rows, "columns": columns, **numbers, "tokens": tokens}


def explain_head(
    model: EmoVLMKD, visual: VisualTokens, label: str | None = None, *, row: int = 0, steps: int = 1
) -> Saliency:
    """Share the head's logit out over a picture's visual tokens, whose mean is all that the head sees (paper).

    With g the gradient of the logit with respect to the mean x of N tokens t_i, token i contributes g . (t_i - b) / N,
    and all of them together exactly g . (x - b). The baseline b is the mean feature of the training pictures
    (`StudentHead.mean`; zero for a head that does not standardise): else what all pictures share would dominate.

    Args:
        visual: visual tokens of a batch of pictures; `row` says which.
        label: whose logit; default: the head's own answer.
        steps: 1 takes the gradient at x: exact for a linear head, else `missed` says by how much it fails; more
            average it over the way from b to x, so that `missed` goes to 0.

    Raises:
        EmonbError: a label that the model does not know.
    """
    if label not in (None, *model.labels):
        raise EmonbError(f"label: {label!r} is none of the model's emotions; use one of: {', '.join(model.labels)}")
    head = model.head
    _, height, width = (int(n) // model.merge_size for n in visual.grid[row])
    with torch.inference_mode(False), torch.enable_grad():  # also where the caller has switched gradients off
        tokens = visual.tokens[row][:, : visual.width].clone().float().to(head.mean.device)  # [N, D]
        start = head.mean.clone()  # [D]
        pooled = tokens.mean(0).half().float()  # [D], rounded as in `EmoVLMKD.parts`
        with torch.no_grad():
            ends = head(torch.stack([start, pooled]))  # [2, C]
        k = int(ends[1].argmax()) if label is None else model.labels.index(label)
        way = torch.ones(1) if steps == 1 else (torch.arange(steps) + 0.5) / steps
        points = (start + way[:, None].to(start.device) * (pooled - start)).requires_grad_()  # [steps, D]
        (gradients,) = torch.autograd.grad(head(points)[:, k].sum(), points)
    shares = (tokens - start).double() @ gradients.mean(0).double() / len(tokens)  # [N], row by row
    return Saliency(model.labels[k], shares.reshape(height, width).cpu().numpy(), float(ends[1, k]), float(ends[0, k]))


@styled
def saliency_figure(picture: Image.Image, saliency: Saliency) -> Figure:
    """The picture, and beside it the same in grey under the tokens' shares, with a legend in logits.

    One coloured field is one visual token; the scale is symmetric, so white is "no matter".
    """
    small = picture.convert("RGB")
    small.thumbnail((360, 360))  # larger would only make the notebook heavy
    width, height = small.size
    limit = float(np.abs(saliency.tokens).max()) or 1.0
    fig = Figure(figsize=(FULL, 0.5 + float(np.clip(2.6 * height / width, 1.2, 3.9))), layout="constrained")
    left, right = fig.subplots(1, 2)
    left.imshow(small)
    right.imshow(small.convert("L"), cmap="gray", vmin=-255, vmax=255)  # pale, so that the colours read
    where = (-0.5, width - 0.5, height - 0.5, -0.5)
    scale = {"cmap": COLORS, "vmin": -limit, "vmax": limit}
    shown = right.imshow(saliency.tokens, extent=where, alpha=0.7, interpolation="nearest", **scale)
    for axes, title in ((left, "the picture"), (right, "what drove the head")):
        axes.set_title(title)
        axes.set_axis_off()
    bar = fig.colorbar(shown, ax=right, shrink=0.9, ticks=[-limit, 0, limit])
    against, speaks_for = (f"speaks {side}\n{saliency.label}" for side in ("against", "for"))
    bar.ax.set_yticklabels([f"{-limit:+.2g}\n{against}", "0", f"{limit:+.2g}\n{speaks_for}"])
    return fig
