"""The numbers that the paper prints (`resources/paper_values.yaml`), each with its source letter."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import pandas as pd
import yaml

__all__ = [
    "added_parameters_percent",
    "claim_statements",
    "dataset_title",
    "departures",
    "is_drawn",
    "paper_dataset",
    "paper_rows",
    "paper_value",
    "paper_values",
]


@cache
def _tree() -> dict[str, Any]:
    text = resources.files("emonb").joinpath("resources", "paper_values.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def paper_dataset(dataset: str) -> str:
    """The paper's name of the set that a dataset is or stands for ("mini-fi" -> "FI"), else ""."""
    return _tree()["datasets"].get(dataset.removeprefix("mini-"), "")


def is_drawn(dataset: str) -> bool:
    """Whether this is one of the drawn datasets, whose accuracies are not comparable with the paper's."""
    return dataset.startswith("mini-")


def dataset_title(dataset: str) -> str:
    """A dataset as every table and figure names it: a drawn one never without the word drawn."""
    return f"{dataset} (drawn)" if is_drawn(dataset) else paper_dataset(dataset) or dataset


def paper_rows(table: str) -> dict[str, dict[str, Any]]:
    """Rows of one of the paper's tables in printing order: {row id: {name, source, values, ...}}."""
    return {row["row"]: row for row in _tree()["tables"][table]}


def paper_value(table: str, row: str, dataset: str) -> float:
    """Printed accuracy, %, of a dataset or of the one a drawn set stands for; NaN = not reported here."""
    found = paper_rows(table).get(row, {"values": {}})
    return float(found["values"].get(dataset.removeprefix("mini-"), "nan"))


def paper_values() -> pd.DataFrame:
    """Everything printed, tidy: table, row, quantity, dataset, value, source, note."""
    records = []
    for table, rows in _tree()["tables"].items():
        for row in rows:
            cells = [("accuracy, %", _tree()["datasets"][d], v) for d, v in row["values"].items()]
            if "parameters" in row:
                cells.append(("parameters", "", row["parameters"]))
            for quantity, dataset, value in cells or [("named, no number here", "", float("nan"))]:
                known = (row["source"], row.get("note", ""))
                records.append((table, row["name"], quantity, dataset, value, *known))
    share = _tree()["added_parameters_percent"]
    records.append(("text", "added parameters", "percent", "", share["value"], share["source"], ""))
    return pd.DataFrame(records, columns=["table", "row", "quantity", "dataset", "value", "source", "note"])


def added_parameters_percent() -> float:
    """The share of additional parameters as the article prints it, in percent."""
    return float(_tree()["added_parameters_percent"]["value"])


def claim_statements() -> dict[str, str]:
    """{claim id: the paper's claim in one sentence}."""
    return dict(_tree()["claims"])


def departures(drawn: bool, stand_in: bool) -> pd.DataFrame:
    """What the paper has, what we have and why: for a run with drawn datasets and/or the small VLM."""
    applies = {"always": True, "drawn": drawn, "stand-in": stand_in}
    rows = [d for d in _tree()["departures"] if applies[d["when"]]]
    return pd.DataFrame(rows)[["topic", "paper", "ours", "why"]]
