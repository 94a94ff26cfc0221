"""The head's map: its sum, its places, its baseline."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from assembled import LABELS, assembled, picture
from families import FAMILIES, save_family
from PIL import Image
from torch import nn

from emonb.errors import EmonbError
from emonb.show.saliency import explain_head
from emonb.vlm import load_vlm, visual_tokens


@pytest.fixture(scope="module")
def model():
    return assembled()


@pytest.fixture(scope="module")
def visual(model):
    return visual_tokens(model.seeing(), [picture(), picture((192, 96))])


@pytest.mark.parametrize("steps", [1, 8])
def test_shares_are_gradient_times_input_in_double_precision(model, visual, steps):
    head = copy.deepcopy(model.head).double()
    tokens = visual.tokens[1].double()  # [N, D]
    x, base = visual.pooled()[1].half().double(), head.mean
    way = [1.0] if steps == 1 else [(i + 0.5) / steps for i in range(steps)]
    gradients = [torch.autograd.functional.jacobian(lambda z: head(z)[2], base + a * (x - base)) for a in way]
    expected = (tokens - base) @ torch.stack(gradients).mean(0) / len(tokens)
    found = explain_head(model, visual, LABELS[2], row=1, steps=steps)
    rows, columns = (n // model.merge_size for n in visual.grid[1].tolist()[1:])
    assert (found["rows"], found["columns"], len(found["tokens"])) == (rows, columns, rows)
    np.testing.assert_allclose(np.ravel(found["tokens"]), expected.detach().numpy(), rtol=1e-4, atol=1e-7)
    assert found["logit"] == pytest.approx(head(x)[2].item(), abs=1e-5)
    assert found["start"] == pytest.approx(head(base)[2].item(), abs=1e-5)
    assert found["missed"] == pytest.approx(found["logit"] - found["start"] - expected.sum().item(), abs=1e-5)


def test_default_is_the_heads_answer_and_gradients_may_be_off(model, visual):
    with torch.inference_mode():
        parts = model.parts([picture()])
        found = explain_head(model, parts["visual"])
    assert found["label"] == LABELS[int(parts["head"].argmax())]
    np.testing.assert_allclose(found["tokens"], explain_head(model, visual, found["label"])["tokens"], atol=1e-3)
    with pytest.raises(EmonbError, match="label: 'hope' is none of"):
        explain_head(model, visual, "hope")


class _Passes(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_lie_where_their_part_of_the_picture_lies(family, tmp_path):
    """Without attention a token sees its own patches: painting one field changes one token, in the same place."""
    tuned = load_vlm(str(save_family(tmp_path, family)))
    for i in range(len(tuned.core.visual.blocks)):
        tuned.core.visual.blocks[i] = _Passes()
    side, rows, columns = tuned.core.config.vision_config.patch_size * 2, 2, 4
    plain = Image.new("RGB", (columns * side, rows * side), "grey")

    def tokens(image):
        visual = visual_tokens(tuned, [image])
        assert visual.grid[0].tolist() == [1, rows * 2, columns * 2]
        return visual.tokens[0][:, : visual.width].float().reshape(rows, columns, -1)

    before = tokens(plain)
    for row, column in ((0, 0), (0, 3), (1, 0), (1, 2)):
        painted = plain.copy()
        painted.paste("orange", (column * side, row * side, (column + 1) * side, (row + 1) * side))
        changed = (tokens(painted) - before).abs().amax(-1) > 1e-3
        assert changed.nonzero().tolist() == [[row, column]]
