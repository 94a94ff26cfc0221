"""The head's map: its sum, its places, its baseline, its picture."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from assembled import LABELS, assembled, picture
from families import FAMILIES, save_family, settings_of
from PIL import Image
from torch import nn

from emonb import vlm
from emonb.errors import EmonbError
from emonb.saliency import COLORS, Saliency, as_data, explain_head, saliency_figure, token_saliency


@pytest.fixture(scope="module")
def model():
    return assembled()


def feature(model, image):
    """The head's input, as `EmoVLMKD.parts` makes it, and its gradient's owner."""
    return vlm.visual_tokens(model.seeing(), [image]).pooled().half().float().requires_grad_()


def test_shares_add_up_to_gradient_times_feature(model):
    x = feature(model, picture())
    logits = model.head(x)[0]
    (gradient,) = torch.autograd.grad(logits[2], x)
    found = explain_head(model, picture(), LABELS[2])
    expected = (gradient.double() * (x - model.head.mean).double()).sum().item()
    assert found.tokens.sum() == pytest.approx(expected, abs=2e-3)  # the feature is rounded to half precision
    assert found.logit == pytest.approx(logits[2].item(), abs=1e-5)
    assert found.missed == pytest.approx(found.logit - found.start - expected, abs=2e-3)


def test_a_linear_head_is_explained_to_the_last_bit(model):
    linear = nn.Linear(model.head.mean.shape[0], len(LABELS))
    head, model.head.layers = model.head.layers, linear
    try:
        for label in LABELS[:3]:
            found = explain_head(model, picture(), label)
            assert found.start == pytest.approx(linear.bias[LABELS.index(label)].item(), abs=1e-5)  # of the mean
            assert found.tokens.sum() == pytest.approx(found.logit - found.start, abs=2e-3)
    finally:
        model.head.layers = head


def test_more_steps_miss_less(model):
    model.head.layers[0].weight.data.mul_(20)  # so that the head bends
    try:
        missed = [abs(explain_head(model, picture(), "awe", steps=n).missed) for n in (1, 64)]
    finally:
        model.head.layers[0].weight.data.div_(20)
    assert missed[0] > 0.02
    assert missed[1] < missed[0] / 10


def test_default_is_the_heads_answer_and_gradients_may_be_off(model):
    with torch.inference_mode():
        visual = model.parts([picture()])["visual"]
        found = explain_head(model, visual)
    answer = LABELS[int(model.head(feature(model, picture())).argmax())]
    assert found.label == answer
    assert np.array_equal(found.tokens, token_saliency(model, picture()))
    with pytest.raises(EmonbError, match="label: 'hope' is none of"):
        token_saliency(model, picture(), "hope")


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_lie_where_their_part_of_the_picture_lies(family, tmp_path):
    """Without attention a token sees its own patches: painting one field changes one token, in the same place."""
    tuned = vlm.load_vlm(settings_of(save_family(tmp_path, family)))
    vision = tuned.core.config.vision_config
    for i in range(len(tuned.core.visual.blocks)):
        tuned.core.visual.blocks[i] = _Passes()
    side, rows, columns = vision.patch_size * vision.spatial_merge_size, 2, 4
    plain = Image.new("RGB", (columns * side, rows * side), "grey")

    def tokens(image):
        visual = vlm.visual_tokens(tuned, [image])
        assert visual.grid[0].tolist() == [1, rows * 2, columns * 2]
        return visual.tokens[0][:, : visual.width].float().reshape(rows, columns, -1)

    before = tokens(plain)
    for row, column in ((0, 0), (0, 3), (1, 0), (1, 2)):
        painted = plain.copy()
        painted.paste("orange", (column * side, row * side, (column + 1) * side, (row + 1) * side))
        changed = (tokens(painted) - before).abs().amax(-1) > 1e-3
        assert changed.nonzero().tolist() == [[row, column]]


class _Passes(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def test_picture_shows_the_sign_in_its_place():
    shares = np.zeros((2, 4))
    shares[0, 3], shares[1, 0] = 1, -1
    grey = Image.new("RGB", (400, 200), "grey")
    figure = saliency_figure(grey, Saliency("$awe$", shares, 1.0, 0.0))
    texts = [text.get_text() for axes in figure.axes for text in axes.yaxis.get_ticklabels()]
    assert "+1\nspeaks for\n$awe$" in texts
    figure.savefig(io.BytesIO(), format="png")  # "$" is no mathematics, or this fails on a label such as "$x"
    overlay = figure.axes[1].images[1]
    assert overlay.cmap.name == COLORS
    assert overlay.get_extent() == pytest.approx([-0.5, 359.5, 179.5, -0.5])
    red, _, blue, _ = overlay.cmap(overlay.norm(overlay.get_array()[0, 3]))
    assert red > blue, "for: orange"
    assert as_data(Saliency("awe", shares, 1.0, 0.0))["tokens"][1] == [-1, 0, 0, 0]
