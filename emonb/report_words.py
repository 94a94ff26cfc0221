"""What the report shows, in which order, and the words beside it."""

from __future__ import annotations

from typing import NamedTuple

from emonb.paper_values import dataset_title
from emonb.predictions import MODEL_NAMES, model_name

__all__ = ["FIGURES", "SECTIONS", "TABLES", "Section", "Words", "figure_words"]

FIRST = "Of models with several seeds the first seed."
MEAN = "Mean over seeds."
ALL = "All seeds of a model together."


class Words(NamedTuple):
    """Title of a figure or table, what one sees in it, and which seeds it is of."""

    title: str
    text: str = ""
    seeds: str = ""


class Section(NamedTuple):
    """A section: its tables (`table:<id>`) and figures (`figure:<id>`); `*` stands for all that begin so."""

    id: str
    title: str
    parts: tuple[str, ...] = ()
    text: str = ""


TABLES = {
    "main": Words("Main result", "The paper's number for the real dataset beside ours."),
    "claims": Words("Claims of the paper"),
    "modules": Words(
        "What each module adds", "Plain averages and the oracle stay in: they could embarrass the method."
    ),
    "instruction_tuning": Words("Instruction tuning", "Zero-shot against tuned, and free generation against scoring."),
    "depth": Words("Depth of the student head"),
    "alpha": Words("Weight of the distillation loss", "kl: how far the head is from its teacher, in nats."),
    "gates": Words("Five gates, and none"),
    "calibration": Words("Calibration", "Do the models know how sure they may be?"),
    "gate_trust": Words("Whom the gate follows", "Where VLM and head disagree."),
    "cost": Words("Cost", "What a part costs beside what it brings."),
    "parameters": Words("Parameters", "Computed from the architectures."),
    "complementarity": Words("Complementarity of VLM and ViT", "Counts and shares, with intervals."),
    "datasets": Words("Datasets", "Pictures of each split."),
    "triplets": Words("Instruction triplets", "How many of each kind, and who wrote them."),
    "departures": Words("What differs from the paper"),
}
FIGURES = {
    "depth": Words("Depth of the head", "Accuracy of the head by its number of hidden layers.", MEAN),
    "alpha_tradeoff": Words(
        "Accuracy against closeness to the teacher", "Each point is a weight of the distillation loss.", MEAN
    ),
    "gate_weights": Words(
        "What the gate weighs",
        "The two halves of the gate's weights, for the VLM's answer and the head's, and how much an opinion for an "
        "emotion lifts it.",
    ),
    "gate_trust": Words(
        "Whom the gate follows",
        "Where VLM and head disagree: how often it gave whose answer. Marks: a gate that followed whoever is right.",
        FIRST,
    ),
    "calibration": Words(
        "Calibration",
        "How often a model is right when it is this sure: below the diagonal it is too sure of itself.",
        FIRST,
    ),
    "accuracy_cost": Words(
        "Accuracy against cost", "Parameters and milliseconds per image of each model, and what it gets right.", MEAN
    ),
    "complementarity_venn": Words(
        "Who gets which images right", "A circle is all that one model gets right; the overlap both get right.", FIRST
    ),
    "complementarity_upset": Words(
        "Which models are right together",
        "A bar is the share of images that exactly the dotted models get right.",
        FIRST,
    ),
    "complementarity_by_emotion": Words(
        "Complementarity by emotion", "Share of images that both, one or none of VLM and ViT get right.", FIRST
    ),
    "agreement": Words("Agreement between models", "Cohen's kappa between the answers of each pair of models.", FIRST),
    "qualitative_examples": Words(
        "Who knows what the other does not",
        "Only the VLM or only the ViT is right and EmoVLM-KD follows; EmoVLM-KD alone is right; EmoVLM-KD loses an "
        "image that one of the two knew. Not picked by hand: emotions in turn, then file names.",
        FIRST,
    ),
    "training_curves": Words(
        "How the models learned", "Loss and accuracy by epoch, on training and validation images."
    ),
}
SECTIONS = (
    Section("result", "Main result", ("table:main",)),
    Section("claims", "Claims", ("table:claims",)),
    Section(
        "parts",
        "What each part adds",
        (
            "table:modules",
            "table:instruction_tuning",
            "table:depth",
            "figure:depth",
            "table:alpha",
            "figure:alpha_tradeoff",
            "table:gates",
            "figure:gate_weights",
            "figure:gate_trust",
            "table:gate_trust",
        ),
        "gain: points over the row it is compared with, on the same images.",
    ),
    Section(
        "price",
        "How sure, at what price",
        ("table:calibration", "figure:calibration", "table:cost", "figure:accuracy_cost", "table:parameters"),
    ),
    Section(
        "complementarity",
        "Complementarity",
        (
            "figure:complementarity_venn",
            "figure:complementarity_upset",
            "figure:complementarity_by_emotion",
            "figure:agreement",
            "table:complementarity",
        ),
    ),
    Section("confusion", "Confusion", ("figure:confusion_difference_*", "figure:confusion_*")),
    Section("explorer", "Explorer"),
    Section("examples", "Pictures", ("figure:qualitative_examples", "figure:qualitative_examples_*")),
    Section("training", "Training", ("figure:training_curves",)),
    Section("data", "Data", ("table:datasets", "table:triplets", "figure:samples_*")),
    Section("departures", "Differences from the paper", ("table:departures",)),
    Section("more", "More tables and figures", ("table:*", "figure:*")),
    Section("files", "Notebooks and files"),
)


def figure_words(id: str) -> Words:
    """Words for any figure, also for one of each dataset and for one that nobody named here."""
    if id in FIGURES:
        return FIGURES[id]
    for start, words in (
        (
            "qualitative_examples_",
            Words("Who knows what the other does not: {}", "The same four cases.", FIRST),
        ),
        (
            "confusion_difference_",
            Words(
                "What the gate changes: {}",
                "Confusion matrix minus that of another model: on the diagonal more is better, elsewhere less.",
                ALL,
            ),
        ),
        ("confusion_", Words("Confusion: {}", "Rows: the true emotion; columns: the answer.", ALL)),
        ("samples_", Words("Sample pictures: {}", "Some pictures of each emotion.")),
    ):
        if id.startswith(start):
            rest = id.removeprefix(start)
            model = next((m for m in MODEL_NAMES if rest.endswith(f"_{m}")), "")
            name = dataset_title(rest.removesuffix(f"_{model}") if model else rest)
            return words._replace(title=words.title.format(f"{model_name(model)} on {name}" if model else name))
    return Words(id.replace("_", " "))
