"""Which predictions a results folder should hold, and which are missing or damaged."""

from __future__ import annotations

from collections.abc import Iterable

from emonb.predictions import LoadedPredictions, Predictions
from emonb.settings import Settings
from emonb.tables import alpha_model, depth_model, test_rows

__all__ = ["expected_models", "gaps", "list_gaps"]


def expected_models(settings: Settings) -> list[str]:
    """Models of which notebooks 03 to 06 write predictions for each dataset, in the order of the notebooks."""
    heads = [alpha_model(a, settings) for a in settings.distill.alphas]
    heads += [depth_model(hidden, settings) for hidden in settings.distill.depths]
    gates = [f"gate_{kind}" for kind in settings.gate.kinds if kind != settings.gate.kind]
    models = ["vlm_zero_shot", "vlm_tuned", *(["vlm_generated"] if settings.vlm.reasons else [])]
    models += [*settings.teacher.networks, "head", *heads]
    models += ["emovlmkd", *gates, "gate_concat_logits", "gate_concat_soft", "average_vlm_head", "average_vlm_vit"]
    return list(dict.fromkeys(models))


def gaps(predictions: Predictions, settings: Settings) -> list[str]:
    """One sentence for each dataset of which models are missing, and one for each damaged file.

    An empty list says that every prediction of the run is there. See `load_all(..., partial=True)`.
    """
    there = [key for key in predictions if test_rows(predictions, *key) is not None]
    damaged = predictions.problems if isinstance(predictions, LoadedPredictions) else {}
    return [*damaged.values(), *list_gaps([*there, *damaged], settings.datasets, expected_models(settings))]


def list_gaps(there: Iterable[tuple[str, str]], datasets: Iterable[str], models: Iterable[str]) -> list[str]:
    """`mini-flickr: no predictions of vit, head` for each dataset that lacks some of the models."""
    known, models, lines = set(there), list(models), []
    for dataset in datasets:
        missing = [model for model in models if (dataset, model) not in known]
        if missing:
            what = "any model" if len(missing) == len(models) else ", ".join(missing)
            lines.append(f"{dataset}: no predictions of {what}")
    return lines
