"""Two runs side by side: which answers, tables and verdicts differ, by how much, and where the difference begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emonb.claims import FAILS, HOLDS, UNDECIDED
from emonb.data import SPLITS
from emonb.errors import EmonbError
from emonb.files import read_json, results_folder
from emonb.metrics import Interval, correctness, mean_interval
from emonb.predictions import Predictions, is_drawn, load_all, model_name

_TIMED = ("cost", "departures")  # tables of measured times, and of words
_JUDGED = ("claim", "dataset", "verdict", "decided_by", "value", "ci_low", "ci_high")  # in the claims of all versions


@dataclass
class Comparison:
    """What `compare` finds; empty tables and lists where the runs are alike.

    Attributes:
        causes: settings, versions, machine, code that differ: a line each.
        begins: results of the earliest stage that differs in content, `stage: names`.
        answers: dataset, model, images, `changed` (percent of answers; NaN: no seed and picture in common), a, b and
            `difference` (b - a, in points, with `low` and `high`) of models whose answers differ.
        tables: a line for each table that differs.
        verdicts: claim, dataset, a, b, and the deciding comparison with its value and interval in both.
    """

    causes: list[str]
    begins: list[str]
    answers: pd.DataFrame
    tables: list[str]
    verdicts: pd.DataFrame

    @property
    def same(self) -> bool:
        """Whether answers, tables and verdicts are the same."""
        return not (len(self.answers) or self.tables or len(self.verdicts))

    def __str__(self) -> str:
        lines = ["the same answers, tables and verdicts" if self.same else "the runs differ"]
        lines += [f"  not alike: {cause}" for cause in self.causes]
        lines += [f"  begins at {stage}" for stage in self.begins if not self.same]
        others = self.answers[self.answers["changed"].isna()].groupby("dataset", sort=False)["model"].unique()
        means = "other seeds or pictures, so compared by their means:"
        lines += [f"  {means} {', '.join(m) if len(m) < 4 else f'{len(m)} models'} on {d}" for d, m in others.items()]
        for what, found in (("verdicts that changed", self.verdicts), ("accuracies", self.answers)):
            if len(found):
                lines += ["", what, found.to_string(index=False, float_format="{:.2f}".format)]
        return "\n".join([*lines, *([""] if self.tables else []), *self.tables])


def compare(a: Path, b: Path) -> Comparison:
    """Compare two results folders; images that both have are paired, unless each run has drawn its own.

    Raises:
        EmonbError: a folder without run.json or predictions, a damaged file, or runs of different datasets.
    """
    about, digests, worlds = zip(_read_run(a), _read_run(b), strict=True)
    found = [load_all(out / "predictions") for out in (a, b)]
    if not {d for d, _ in found[0]} & {d for d, _ in found[1]}:
        raise EmonbError(f"{a} and {b}: no dataset in common; compare runs of the same datasets")
    return Comparison(
        causes=[*_causes(*about), *_alone(*found)],
        begins=_begins(*digests),
        answers=_answers(*found, _drawn_alike(*worlds)),
        tables=_tables(a / "tables", b / "tables"),
        verdicts=_verdicts(*(out / "tables" / "claims.csv" for out in (a, b))),
    )


def verdict_counts(runs: Sequence[Path]) -> pd.DataFrame:
    """In how many results folders each verdict came out: a row per claim and dataset, a column per verdict.

    Raises:
        EmonbError: a folder without claims, or with damaged ones.
    """
    files = [results_folder(out) / "tables" / "claims.csv" for out in runs]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise EmonbError(f"{missing[0]}: no claims; run notebook 08 there first")
    judged = pd.concat([_read_table(file, _JUDGED) for file in files])
    counts = judged.groupby(["claim", "dataset"], sort=False)["verdict"].value_counts().unstack(fill_value=0)
    return counts.reindex(columns=[HOLDS, UNDECIDED, FAILS], fill_value=0)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Whatever a damaged or foreign file makes of its reader is one line that names it."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # pandas' own errors are of the last kind
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise EmonbError(f"{file}: damaged, or not as emonb writes it ({why}); run it again") from None


def _read_run(out: Path) -> tuple[dict[str, Any], dict[tuple[str, str], str], dict[str, Any]]:
    """What `_about` and `_digests` find in a run, and its settings `world`."""
    file = results_folder(out) / "run.json"
    run = read_json(file)
    with _reading(file):
        return _about(run), _digests(out, run), {**run["settings"].get("world", {})}


def _read_table(file: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    with _reading(file):
        found = pd.read_csv(file, usecols=columns)
        if columns and not found["verdict"].isin([HOLDS, UNDECIDED, FAILS]).all():
            raise ValueError("column verdict")
        return found


def _about(run: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run may be the cause of other results, as `name.of.entry`: value."""
    settings = {name: value for name, value in run["settings"].items() if name != "out"}
    machine = {name: run["machine"][name] for name in ("cpu", "cores", "gpu")}
    tree = {"versions": run["versions"], "machine": machine, "settings": settings}
    code = {"code.commit": run["git"].get("commit"), "code.changes": run["git"].get("dirty")}
    return pd.json_normalize(tree).iloc[0].to_dict() | code


def _causes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterable[str]:
    for name in dict.fromkeys([*a, *b]):
        if str(a.get(name)) != str(b.get(name)):
            yield f"{name}: {a.get(name)}, {b.get(name)}"


def _alone(a: Predictions, b: Predictions) -> Iterable[str]:
    for one, other, name in ((a, b, "first"), (b, a, "second")):
        if missing := [f"{model} on {dataset}" for dataset, model in one if (dataset, model) not in other]:
            yield f"only the {name} run has predictions of {', '.join(missing)}"


def _digests(out: Path, run: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """(stage, name) -> digest of the files of each result that the run used, in pipeline order."""
    used = [stage for record in run["notebooks"].values() for stage in record.get("stages", [])]
    places = {(s["stage"], s["name"]): out / "artifacts" / s["stage"] / s["key"] / "provenance.json" for s in used}
    return {result: _digest(place) for result, place in places.items() if place.is_file()}


def _digest(place: Path) -> str:
    with _reading(place):
        return read_json(place)["digest"]


def _begins(a: Mapping[tuple[str, str], str], b: Mapping[tuple[str, str], str]) -> list[str]:
    """The first stage with differing results, per dataset the earliest only."""
    first = dict[str, tuple[str, str]]()
    for (stage, name), digest in a.items():
        if stage != "cost" and b.get((stage, name), digest) != digest:
            first.setdefault(name.split("--")[0], (stage, name))
    stages = dict.fromkeys(stage for stage, _ in first.values())
    return [f"{stage}: {', '.join(name for s, name in first.values() if s == stage)}" for stage in stages]


def _drawn_alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, ...]:
    """Splits whose drawn pictures are the same in two runs (settings `world`); else one name is two pictures."""
    worlds = [{"redraw": 0, **world} for world in (a, b)]
    sizes = [{**world, "redraw": 0} for world in worlds]
    return SPLITS if worlds[0] == worlds[1] else SPLITS[:2] if sizes[0] == sizes[1] else ()


def _answers(a: Predictions, b: Predictions, drawn_alike: Sequence[str]) -> pd.DataFrame:
    rows = []
    for dataset, model in (key for key in a if key in b):
        keys = ["image_id", "split", "seed", "repeat"]
        both = a[dataset, model].merge(b[dataset, model], on=keys, suffixes=("", "_b"))
        splits = drawn_alike if is_drawn(dataset) else SPLITS
        both, alike = both[both["split"].isin(splits)], "test" in splits
        changed = both["prediction"] != both["prediction_b"]
        if len(both) and alike and not changed.any():
            continue
        right = [100 * correctness(run, dataset, [model])[model] for run in (a, b)]
        gap, low, high = mean_interval((right[1] - right[0]).dropna()) if alike else _apart(*right)
        row = (dataset, model_name(model), len(right[0]), 100 * changed.mean(), *(r.mean() for r in right))
        rows.append((*row, gap, low, high))
    columns = ["dataset", "model", "images", "changed", "a", "b", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _apart(a: pd.Series, b: pd.Series) -> Interval:
    """b - a of means over different images, with the interval that theirs leave it (Zou and Donner 2008, MOVER)."""
    (before, *was), (after, *now) = mean_interval(a), mean_interval(b)
    low, high = np.hypot(after - now[0], was[1] - before), np.hypot(now[1] - after, before - was[0])
    return after - before, after - before - low, after - before + high


def _tables(a: Path, b: Path) -> list[str]:
    lines = []
    for name in sorted({path.stem for folder in (a, b) for path in folder.glob("*.csv")} - {*_TIMED}):
        files = [folder / f"{name}.csv" for folder in (a, b)]
        if not all(file.is_file() for file in files):
            lines.append(f"table {name}: in one of the runs only")
        elif files[0].read_bytes() != files[1].read_bytes():
            one, other = map(_read_table, files)
            alike = one.shape == other.shape and list(one) == list(other)
            gaps = (one.select_dtypes("number") - other.select_dtypes("number")).abs().max() if alike else None
            largest = f"largest difference {gaps.max():.4g} ({gaps.idxmax()})" if alike and gaps.max() > 0 else ""
            lines.append(f"table {name}: {largest or 'other rows or words'}")
    return lines


def _verdicts(a: Path, b: Path) -> pd.DataFrame:
    if not (a.is_file() and b.is_file()):
        return pd.DataFrame()
    one, other = (_read_table(path, _JUDGED) for path in (a, b))
    both = one.merge(other, "outer", ["claim", "dataset"], suffixes=(" a", " b"))
    return both[both["verdict a"].fillna("") != both["verdict b"].fillna("")]
