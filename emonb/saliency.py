"""Room 09: which visual tokens drove the distilled head, and the picture that shows it.

The head sees the mean of a picture's merged visual tokens and nothing else (paper: distillation), so its
logit can be shared out over the tokens: gradient times input (Shrikumar et al. 2017, "Learning Important
Features Through Propagating Activation Differences", who compare with it; the gradient alone is the saliency map
of Simonyan et al. 2014). With more steps along the way from the average picture it becomes integrated gradients
(Sundararajan et al. 2017). It explains the head: not the VLM's answer, and not what lies inside a token, which
has seen the whole picture through the vision tower's attention. Not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from emonb import vlm
from emonb.errors import EmonbError

if TYPE_CHECKING:
    from pathlib import Path

    from emonb.model import EmoVLMKD
    from emonb.visual import VisualTokens

__all__ = ["Saliency", "explain_head", "saliency_figure", "token_saliency"]

COLORS = "PuOr_r"  # purple to orange, which colour-blind readers can tell apart; ColorBrewer
SIDE = 360  # px of the long side in the figure: larger would only make the notebook heavy


@dataclass(frozen=True)
class Saliency:
    """Shares of the visual tokens in one logit of the head.

    Attributes:
        label: the emotion whose logit it is.
        tokens: (rows, columns) float64, in logits: a token's part in `logit - start`; positive speaks for `label`.
        logit: the head's logit for this picture.
        start: the head's logit at the baseline, the mean feature of the training pictures.
    """

    label: str
    tokens: np.ndarray
    logit: float
    start: float

    @property
    def missed(self) -> float:
        """What the shares leave unexplained, in logits: 0 for a linear head, or with many steps."""
        return self.logit - self.start - float(self.tokens.sum())


def token_saliency(
    model: EmoVLMKD, picture: str | Path | Image.Image, label: str | None = None, *, steps: int = 1
) -> np.ndarray:
    """(rows, columns) contributions of the visual tokens to the head's logit of `label`; see `explain_head`."""
    return explain_head(model, picture, label, steps=steps).tokens


def explain_head(
    model: EmoVLMKD,
    picture: str | Path | Image.Image | VisualTokens,
    label: str | None = None,
    *,
    steps: int = 1,
    row: int = 0,
) -> Saliency:
    """Share the head's logit out over the picture's visual tokens.

    The head reads the mean x of N tokens t_i. With g the gradient of the logit with respect to x, each token's
    gradient is g / N, so token i contributes g . (t_i - b) / N, and all of them together exactly g . (x - b).
    The baseline b is the mean feature of the training pictures, which a standardising head subtracts anyway
    (`StudentHead.mean`; zero for a head that does not standardise: plain gradient times input). So a token
    speaks for the emotion as far as it differs from the average picture; without a baseline what all pictures
    share would dominate.

    Args:
        model: the assembled model.
        picture: a path, a PIL image, or visual tokens that are there already.
        label: whose logit; default: the head's own answer.
        steps: 1 takes the gradient at the picture (first order: exact for a linear head, else `missed` says by
            how much it fails); more average it over the way from b to x, so that `missed` goes to 0.
        row: which picture of the visual tokens.

    Raises:
        EmonbError: a label that the model does not know.
    """
    if label is not None and label not in model.labels:
        raise EmonbError(f"label: {label!r} is none of the model's emotions; use one of: {', '.join(model.labels)}")
    known = hasattr(picture, "tokens")
    visual = picture if known else vlm.visual_tokens(model.seeing(), [picture])
    tokens, head = visual.tokens[row], model.head
    side = model.merge_size
    _, height, width = (int(n) for n in visual.grid[row])
    with torch.inference_mode(False), torch.enable_grad():  # also where the caller has switched gradients off
        device = head.mean.device
        tokens = tokens[:, : visual.width].clone().float().to(device)
        start = head.mean.clone()
        pooled = tokens.mean(0).half().float()  # rounded as in `EmoVLMKD.parts`
        with torch.no_grad():
            ends = head(torch.stack([start, pooled]))
        k = int(ends[1].argmax()) if label is None else model.labels.index(label)
        way = torch.ones(1) if steps == 1 else (torch.arange(steps) + 0.5) / steps
        points = (start + way[:, None].to(device) * (pooled - start)).requires_grad_()
        (gradients,) = torch.autograd.grad(head(points)[:, k].sum(), points)
    shares = (tokens - start).double() @ gradients.mean(0).double() / len(tokens)
    grid = shares.reshape(height // side, width // side).cpu().numpy()  # merged tokens lie row by row
    return Saliency(model.labels[k], grid, float(ends[1, k]), float(ends[0, k]))


def saliency_figure(picture: Image.Image, saliency: Saliency) -> Figure:
    """The picture, and beside it the same in grey under the tokens' shares, with a legend in logits.

    One coloured field is one visual token; the scale is symmetric, so white is "no matter". Labels are text,
    never mathematics.
    """
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    width, height = small.size
    tall = float(np.clip(2.6 * height / width, 1.2, 3.9))
    limit = float(np.abs(saliency.tokens).max()) or 1.0
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 9}):
        fig = Figure(figsize=(6.6, tall + 0.5), layout="constrained")
        left, right = fig.subplots(1, 2)
        left.imshow(small)
        left.set_title("the picture")
        right.imshow(small.convert("L"), cmap="gray", vmin=-255, vmax=255)  # pale, so that the colours read
        shown = right.imshow(
            saliency.tokens, cmap=COLORS, vmin=-limit, vmax=limit, extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            alpha=0.7, interpolation="nearest",
        )  # fmt: skip
        right.set_title("what drove the head")
        for axes in (left, right):
            axes.set_axis_off()
        bar = fig.colorbar(shown, ax=right, shrink=0.9, ticks=[-limit, 0, limit])
        bar.ax.set_yticklabels(
            [f"{-limit:+.2g}\nspeaks against\n{saliency.label}", "0", f"{limit:+.2g}\nspeaks for\n{saliency.label}"],
            parse_math=False,
        )
    return fig


def as_data(saliency: Saliency) -> dict[str, Any]:
    """JSON types: label, size, logits rounded to 1e-5, and the shares row by row."""
    rows, columns = saliency.tokens.shape
    numbers = {name: round(getattr(saliency, name), 5) for name in ("logit", "start", "missed")}
    tokens = [[round(float(x), 5) for x in line] for line in saliency.tokens]
    return {"label": saliency.label, "rows": rows, "columns": columns, **numbers, "tokens": tokens}
