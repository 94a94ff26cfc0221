"""The stage `samples`, a part of `emonb.pipeline`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from emonb.data import taxonomy_for_dataset
from emonb.errors import EmonbError
from emonb.files import write_json
from emonb.releases import Release
from emonb.releases.imports import listing_digest, read_dataset, write_table
from emonb.settings import SPLITS, project_root
from emonb.store import Recipe, stage
from emonb.world import DRAWN, draw_dataset


@stage("01_data", side_by_side=True)
def samples(run: Any, dataset: str) -> Recipe:
    """Sample table of one dataset: drawn, imported, or a release on disk."""
    if dataset in DRAWN:
        return _drawn(run, dataset)
    if run.settings.images_path is None:
        raise EmonbError(
            f"unknown dataset {dataset!r}: drawn ones are {', '.join(DRAWN)}; "
            "for a dataset on disk also give its folder's parent: IMAGES=ROOT"
        )
    source = run.settings.images_path / dataset
    if not source.is_dir():
        raise EmonbError(f"{source}: no such folder; IMAGES must be the folder that contains {source.name!r}")

    def build(folder: Path, parts: Path) -> None:
        meta = read_dataset(source, folder)
        places = {key: os.path.relpath(meta[key], project_root()) for key in ("root", "pictures")}
        write_json(folder / "meta.json", {**meta, **places, "drawn": False})

    params = {"source": os.path.relpath(source, project_root()), "listing": listing_digest(source)}
    return Recipe(build, params)


def _drawn(run: Any, dataset: str) -> Recipe:
    taxonomy = taxonomy_for_dataset(dataset)
    sizes = dict(zip(SPLITS, getattr(run.settings.world, taxonomy.name), strict=True))

    def build(folder: Path, parts: Path) -> None:
        release = Release(draw_dataset(dataset, folder, sizes), folder, taxonomy.labels)
        meta = write_table(release, folder, dataset, "drawn", where=dataset)
        write_json(folder / "meta.json", {**meta, "root": ".", "pictures": ".", "drawn": True})

    return Recipe(build, {"source": "drawn", "sizes": sizes})
