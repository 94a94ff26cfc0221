"""Prediction files: one parquet per dataset and model, from which every number of every table follows.

Columns: `image_id, split, label, seed, prediction, p_<label>..., raw_text, parsed`; several seeds are
more rows. The class order is stored in the file and checked on load.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from emonb.emotions import check_labels
from emonb.errors import EmonbError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MODEL_NAMES",
    "LoadedPredictions",
    "PredictionWriter",
    "Predictions",
    "load_all",
    "make_predictions",
    "model_name",
    "prediction_labels",
    "probabilities",
    "read_predictions",
    "write_predictions",
]

Predictions = Mapping[tuple[str, str], pd.DataFrame]  # (dataset, model) -> prediction frame

MODEL_NAMES = {
    "vlm_zero_shot": "VLM, zero-shot",
    "vlm_tuned": "VLM, tuned",
    "vlm_generated": "VLM, free generation",
    "vit": "ViT (teacher)",
    "resnet": "ResNet",
    "vgg": "VGG",
    "head": "distilled head",
    "emovlmkd": "EmoVLM-KD",
    "gate_bilinear": "bilinear",
    "gate_moe": "mixture of 3 linear experts",
    "gate_dynamic": "dynamic weighting",
    "gate_cross": "cross gating",
    "gate_concat_logits": "concat & linear, raw logits (authors' code)",
    "gate_concat_soft": "concat & linear, VLM's distribution",
    "average_vlm_head": "plain average, VLM and head",
    "average_vlm_vit": "plain average, VLM and ViT",
}  # files of predictions/<dataset>__<model>.parquet; head_alpha* and head_depth* follow the settings


class LoadedPredictions(dict[tuple[str, str], pd.DataFrame]):
    """{(dataset, model): frame} that knows the folder it was read from: a run's pictures are found from there.

    `problems` has a sentence for each file that was left out because it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.problems: dict[tuple[str, str], str] = {}


_METADATA_KEY = b"emonb.labels"
_BEFORE = ["image_id", "split", "label", "seed", "prediction"]
_AFTER = ["raw_text", "parsed"]
_GROUP = 8192  # rows written, and later read, at a time
_SUM_TOLERANCE = 1e-3  # bfloat16 probabilities of a GPU run need this much


def make_predictions(
    image_ids: Sequence[str],
    split: Sequence[str],
    label: Sequence[str],
    probabilities: np.ndarray,
    labels: Sequence[str],
    *,
    seed: int = 0,
    raw_text: Sequence[str | None] | None = None,
    parsed: Sequence[bool] | None = None,
) -> pd.DataFrame:
    """Assemble a prediction frame; the prediction is the most probable label.

    Args:
        image_ids, split, label: one entry per image (N); `label` is the true one.
        probabilities: (N, C), columns in the order of `labels`. Rows with `parsed` False are replaced
            by the uniform distribution: an unparsable answer has no opinion.
        labels: the taxonomy's labels in their fixed order (C).
        seed: training seed of the model that predicted.
        raw_text: the VLM's text, where there is one.
        parsed: False marks an unparsable answer: prediction "", counted as wrong, never a class.
    """
    p = np.array(probabilities, dtype=np.float64)
    n = len(image_ids)
    if p.shape != (n, len(labels)):
        raise EmonbError(
            f"predictions: probabilities have shape {p.shape}, expected {(n, len(labels))}; "
            "give one row per image and one column per label"
        )
    ok = np.ones(n, bool) if parsed is None else np.asarray(parsed, bool)
    p[~ok] = 1 / len(labels)
    best = np.asarray(labels, object)[p.argmax(axis=1)] if n else np.empty(0, object)
    frame = pd.DataFrame(
        {
            "image_id": list(image_ids),
            "split": list(split),
            "label": list(label),
            "seed": seed,
            "prediction": np.where(ok, best, ""),
            **{f"p_{name}": p[:, i] for i, name in enumerate(labels)},
            "raw_text": [None] * n if raw_text is None else list(raw_text),
            "parsed": ok,
        }
    )
    frame.attrs["labels"] = list(labels)
    return frame


def model_name(model: str) -> str:
    """A model as people read it; an unknown one keeps its file name."""
    known = {"head_depth": "head, {} hidden layers", "head_alpha": "head, alpha = {}"}
    for start, name in known.items():
        if model.startswith(start):
            return name.format(model.removeprefix(start))
    return MODEL_NAMES.get(model, model)


def prediction_labels(frame: pd.DataFrame) -> list[str]:
    """The class order of a prediction frame, read from its `p_<label>` columns."""
    return [c.removeprefix("p_") for c in frame.columns if c.startswith("p_")]


def probabilities(frame: pd.DataFrame) -> np.ndarray:
    """(N, C) probabilities in the frame's own class order."""
    return frame[[f"p_{name}" for name in prediction_labels(frame)]].to_numpy(np.float64)


class PredictionWriter:
    """Write a prediction file in parts, atomically: `with PredictionWriter(path, labels) as file: file.add(frame)`.

    Every part is checked as it comes; the file appears when the block ends without error.
    """

    def __init__(self, path: str | os.PathLike, labels: Sequence[str]) -> None:
        self.path, self.labels = Path(path), list(labels)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._writer: Any = None

    def __enter__(self) -> PredictionWriter:
        return self

    def add(self, frame: pd.DataFrame) -> None:
        """Append the rows of a frame; raises as `write_predictions`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        _check(frame, self.labels, self.path)
        text, number = pa.string(), pa.float64()
        types = {"seed": pa.int64(), "parsed": pa.bool_()}
        fields = [(c, number if c.startswith("p_") else types.get(c, text)) for c in frame.columns]
        schema = pa.schema(fields, metadata={_METADATA_KEY: json.dumps(self.labels)})
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._temporary, schema)
        for start in range(0, max(1, len(frame)), _GROUP):
            part = frame.iloc[start : start + _GROUP]
            columns = [pa.array(part[c].tolist(), type=kind, from_pandas=True) for c, kind in fields]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=schema))

    def add_scores(
        self, ids: Sequence[str], split: str, label: Sequence[str], scores: Tensor, seed: int, **more: Any
    ) -> None:
        """Append images of one split by their (N, C) logits or log-probabilities; `more` as for `make_predictions`."""
        p = scores.double().softmax(-1).numpy()
        self.add(make_predictions(ids, [split] * len(p), label, p, self.labels, seed=seed, **more))

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
                if kind is None:
                    os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


def write_predictions(path: str | os.PathLike, frame: pd.DataFrame, labels: Sequence[str]) -> None:
    """Check a frame and write it as parquet, atomically (temporary file, then rename)."""
    with PredictionWriter(path, labels) as file:
        file.add(frame)


def read_predictions(
    path: str | os.PathLike, labels: Sequence[str] | None = None, *, split: str | None = None
) -> pd.DataFrame:
    """Read and check a prediction file; `frame.attrs["labels"]` holds its class order.

    Args:
        path: the file.
        labels: the class order that it must have; default: any.
        split: read the rows of this split only.

    Raises:
        EmonbError: missing or damaged file, wrong columns or class order, impossible values.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise EmonbError(f"{path}: no such predictions; run the notebook that writes them (03 to 06)")
    try:
        table = pq.read_table(path, filters=None if split is None else [("split", "==", split)])
    except (pa.ArrowException, OSError) as error:
        raise EmonbError(f"{path}: not a readable parquet file ({error}); delete it and run again") from None
    stored = (table.schema.metadata or {}).get(_METADATA_KEY)
    if stored is None:
        raise EmonbError(f"{path}: metadata 'emonb.labels' is missing; write it with write_predictions")
    found = json.loads(stored)
    if labels is not None:
        check_labels(found, labels, str(path))
    frame = table.to_pandas()
    _check(frame, found, path)
    frame.attrs["labels"] = found
    return frame


def load_all(
    folder: str | os.PathLike,
    datasets: Sequence[str] | None = None,
    *,
    split: str | None = None,
    partial: bool = False,
) -> LoadedPredictions:
    """All prediction files of a run as {(dataset, model): frame}, optionally of some datasets or one split only.

    Args:
        partial: leave damaged files out and say so in `problems` (then `emonb.gaps.gaps` names what is missing).
            By default they are an error: a number of your own should not rest on less data unnoticed.

    Raises:
        EmonbError: no predictions at all, or a damaged file (see `partial`).
    """
    found = LoadedPredictions(Path(folder).resolve())
    for path in sorted(Path(folder).glob("*__*.parquet")):
        dataset, model = path.stem.split("__", 1)
        if datasets is not None and dataset not in datasets:
            continue
        try:
            found[dataset, model] = read_predictions(path, split=split)
        except (EmonbError, ValueError, TypeError) as error:
            if not partial:
                raise
            found.problems[dataset, model] = f"{dataset}: predictions of {model} are damaged: {_reason(error, path)}"
    if not found:
        what = ", ".join(datasets or ["any dataset"])
        damaged = f" ({'; '.join(found.problems.values())})" if found.problems else ""
        raise EmonbError(f"{folder}: no predictions of {what}; run notebooks 03 to 06{damaged}")
    return found


def _reason(error: Exception, path: Path) -> str:
    """An error in one line, without the path that the reader is told anyway."""
    return " ".join(str(error).replace(f"{path}: ", "").replace(str(path), path.name).split())[:300]


def _check(frame: pd.DataFrame, labels: list[str], path: Path) -> None:
    def fail(column: str, what: str, remedy: str = "delete the file and run again") -> None:
        raise EmonbError(f"{path}: column {column!r} {what}; {remedy}")

    expected = [*_BEFORE, *(f"p_{name}" for name in labels), *_AFTER]
    if list(frame.columns) != expected:
        check_labels(prediction_labels(frame), labels, str(path))
        odd = [c for c in expected if c not in frame.columns] or [c for c in frame if c not in expected]
        fail(odd[0] if odd else "image_id", "is missing, unexpected or out of order")
    p = probabilities(frame)
    finite = np.isfinite(p).all(axis=0)
    if not finite.all():
        fail(f"p_{labels[int(np.argmin(finite))]}", "has values that are not finite")
    if len(p) and ((p < 0).any() or np.abs(p.sum(axis=1) - 1).max() > _SUM_TOLERANCE):
        fail("p_*", "does not hold probabilities that sum to 1", "apply a softmax before writing")
    parsed = frame["parsed"].to_numpy(bool)
    if not frame["label"].isin(labels).all():
        fail("label", f"has labels outside {labels}")
    if not frame["prediction"][parsed].isin(labels).all() or (frame["prediction"][~parsed] != "").any():
        fail("prediction", 'must be a label where parsed and "" where not')
    chosen = [labels.index(x) for x in frame["prediction"][parsed]]
    if len(chosen) and (p[parsed, chosen] < p[parsed].max(axis=1) - 1e-6).any():
        fail("prediction", "is not the most probable label: class order and probabilities disagree")
    if frame.duplicated(["image_id", "split", "seed"]).any():
        fail("image_id", "names an image twice for one split and seed")
