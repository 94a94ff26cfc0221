"""What a notebook opens: settings, store, and one place to save tables, figures and predictions."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from emonb.errors import EmonbError
from emonb.machine import keep_freed_memory
from emonb.settings import Settings, load_settings
from emonb.store import STAGES, Store, atomic_write, make_folder
from emonb.table_text import flat, format_value, latex, markdown, readable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Workspace", "format_value", "open_workspace", "parse_force", "readable"]


@dataclass
class Workspace:
    """The settings of this run, its store, and its results folder."""

    settings: Settings
    store: Store
    out: Path
    _saved: list[Path] = field(default_factory=list, repr=False)

    def save_table(self, frame: pd.DataFrame, id: str, caption: str = "") -> None:
        """Save `tables/<id>.csv` (full precision) and `.md`, `.tex` (rounded; caption: also `frame.attrs`)."""
        caption = caption or frame.attrs.get("caption", "")
        self._save(f"tables/{id}.csv", flat(frame).to_csv(index=False))
        shown = readable(frame)
        self._save(f"tables/{id}.md", markdown(shown, caption))
        self._save(f"tables/{id}.tex", latex(shown, id, caption))

    def save_figure(self, fig: Figure, id: str) -> None:
        """Save `figures/<id>.png` and `.svg`; the same figure gives the same bytes."""
        import matplotlib

        from emonb.figure_style import tight_box

        with matplotlib.rc_context({"svg.hashsalt": "emonb"}):
            box = tight_box(fig)
            for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                buffer = io.BytesIO()
                fig.savefig(buffer, format=ending, dpi=150, bbox_inches=box, metadata=metadata)
                self._save(f"figures/{id}.{ending}", buffer.getvalue())

    def save_page(self, html: str, id: str) -> None:
        """Save `integrity/<id>.html`, a page that opens from disk."""
        self._save(f"integrity/{id}.html", html)

    def save_predictions(self, frame: pd.DataFrame | Path, dataset: str, model: str) -> Path:
        """Save `predictions/<dataset>__<model>.parquet`: a frame, or a stage's file, which is copied as it is."""
        from emonb.predictions import prediction_labels, write_predictions

        path = self.out / "predictions" / f"{dataset}__{model}.parquet"
        make_folder(path.parent)
        if isinstance(frame, Path):
            partial = path.with_name(f".{path.name}.partial")
            shutil.copyfile(frame, partial)
            partial.replace(path)
        else:
            write_predictions(path, frame, prediction_labels(frame))
        self._note(path)
        return path

    def predictions(self, dataset: str, model: str, split: str | None = None) -> pd.DataFrame:
        """Predictions saved by this or an earlier notebook, of all splits or of one."""
        from emonb.predictions import read_predictions

        path = self.out / "predictions" / f"{dataset}__{model}.parquet"
        if not path.is_file():
            raise EmonbError(f"{path}: not there; run the notebooks before this one with the same settings")
        return read_predictions(path, split=split)

    def describe(self) -> str:
        """One line for the top of a notebook: datasets, seeds, and who wrote the triplets."""
        from emonb.triplet_tables import source_note

        said = source_note(self.out, self.settings.datasets)
        parts = [f"datasets: {', '.join(self.settings.datasets)}", f"seeds: {self.settings.seeds}", said]
        return "\n".join(filter(None, parts))

    def files_written(self) -> pd.DataFrame:
        """Files that this object saved: path below the results folder, and kB."""
        import pandas as pd

        rows = [(p.relative_to(self.out).as_posix(), round(p.stat().st_size / 1024, 1)) for p in self._saved]
        return pd.DataFrame(rows, columns=["file", "kB"])

    def _save(self, relative: str, data: str | bytes) -> None:
        path = self.out / relative
        make_folder(path.parent)
        atomic_write(path, data)
        self._note(path)

    def _note(self, path: Path) -> None:
        if path not in self._saved:
            self._saved.append(path)


def open_workspace(
    profile: str = "mini",
    *,
    datasets: str = "",
    images: str = "",
    out: str = "",
    seeds: str = "",
    force: str = "",
) -> Workspace:
    """Open the results folder of a run; the arguments are the notebooks' parameters.

    Raises:
        EmonbError: invalid settings, an unknown stage in `force`, or no write permission.
    """
    keep_freed_memory()
    settings = load_settings(profile, datasets=datasets, images=images, out=out, seeds=seeds)
    store = Store(settings.out_path / "artifacts", force=parse_force(force))
    return Workspace(settings, store, settings.out_path)


def parse_force(force: str) -> tuple[str, ...]:
    """Stages of a comma-separated list (`all` for every one); raises `EmonbError` for an unknown one."""
    stages = tuple(part.strip() for part in force.split(",") if part.strip())
    unknown = [stage for stage in stages if stage not in (*STAGES, "all")]
    if unknown:
        raise EmonbError(f"force: unknown stage {', '.join(unknown)}; use one of: {', '.join(STAGES)}, all")
    return tuple(STAGES) if "all" in stages else stages
