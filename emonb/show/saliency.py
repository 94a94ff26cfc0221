"""Room 09: which visual tokens drove the distilled head. Not in the paper.

Gradient times input (Shrikumar et al. 2017, "Learning Important Features Through Propagating Activation Differences"),
with more steps integrated gradients (Sundararajan et al. 2017). It explains the head: not the VLM's answer, and not
what lies inside a token, which has seen the whole picture through the vision tower's attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from emonb.errors import EmonbError

if TYPE_CHECKING:
    from emonb.model import EmoVLMKD
    from emonb.vlm import VisualTokens


def explain_head(
    model: EmoVLMKD, visual: VisualTokens, label: str | None = None, *, row: int = 0, steps: int = 1
) -> dict[str, Any]:
    """Share the head's logit out over a picture's visual tokens, whose mean is all that the head sees (paper).

    With g the gradient of the logit with respect to the mean x of N tokens t_i, token i contributes g . (t_i - b) / N,
    and all of them together exactly g . (x - b). The baseline b is the mean feature of the training pictures
    (`StudentHead.mean`; zero for a head that does not standardise): else what all pictures share would dominate.

    Args:
        visual: visual tokens of a batch of pictures; `row` says which.
        label: whose logit; default: the head's own answer.
        steps: 1 takes the gradient at x: exact for a linear head, else `missed` says by how much it fails; more
            average it over the way from b to x, so that `missed` goes to 0.

    Returns:
        JSON types: label; logit of this picture, and `start`, of the baseline; `tokens`, rows x columns parts in their
        difference, positive for the label; `missed`, what these leave unexplained, in logits.

    Raises:
        EmonbError: a label that the model does not know.
    """
    if label not in (None, *model.labels):
        raise EmonbError(f"label: {label!r} is none of the model's emotions; use one of: {', '.join(model.labels)}")
    head = model.head
    _, height, width = (int(n) // model.merge_size for n in visual.grid[row])
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
