"""The front door of all figures: `figures.NAME` takes tidy data (and pictures as arrays), returns a Figure.

Nothing here reads a file or touches pyplot's state. Every figure says how many images and seeds it rests on, is
drawn at the width of one or both columns of a page (`figure_style`) and has no text below 6 points there.

- `confusion`: one model's confusion matrix, row percent and counts.
- `confusion_difference`: one model's matrix minus another's, in points.
- `complementarity_venn`: what VLM and ViT get right, as overlapping circles.
- `complementarity_by_emotion`: both, one or none right, per emotion.
- `complementarity_upset`: which of four models are right together.
- `agreement`: Cohen's kappa between the answers of all models.
- `qualitative_examples`: pictures chosen by rule, with every answer.
- `gate_weights`: the two halves of the gate's weights, and its trust per emotion.
- `gate_trust`: whom the gate followed where VLM and head disagree, and who was right.
- `calibration`: accuracy against confidence.
- `accuracy_cost`: accuracy against parameters and milliseconds per image.
- `alpha_tradeoff`: accuracy against closeness to the teacher.
- `depth`: accuracy by number of the head's hidden layers.
- `training_curves`: losses and accuracies per epoch.
- `as_image`: a figure as a small output of a notebook.
"""

from emonb.figure_style import as_image
from emonb.figures_complementarity import (
    agreement,
    complementarity_by_emotion,
    complementarity_upset,
    complementarity_venn,
    qualitative_examples,
)
from emonb.figures_confusion import confusion, confusion_difference
from emonb.figures_gate import gate_trust, gate_weights
from emonb.figures_models import accuracy_cost, alpha_tradeoff, calibration, depth, training_curves

__all__ = [
    "accuracy_cost",
    "agreement",
    "alpha_tradeoff",
    "as_image",
    "calibration",
    "complementarity_by_emotion",
    "complementarity_upset",
    "complementarity_venn",
    "confusion",
    "confusion_difference",
    "depth",
    "gate_trust",
    "gate_weights",
    "qualitative_examples",
    "training_curves",
]
