"""Executed notebooks made fit for the repository: outputs stay, machine notes go."""

from __future__ import annotations

from pathlib import Path

import nbformat

from emonb.errors import EmonbError
from emonb.settings import project_root
from emonb.store import atomic_write, read_json

__all__ = ["copy_back", "sign"]


def copy_back(out: Path) -> list[Path]:
    """Copy the executed notebooks of a mini run over their sources; returns the paths written.

    Raises:
        EmonbError: the run is of another profile, or not every notebook is executed.
    """
    run = read_json(out / "run.json")
    unfinished = [name for name, record in run["notebooks"].items() if "fingerprint" not in record]
    if run["profile"] != "mini" or unfinished:
        raise EmonbError(f"{out}: needs a finished run of the profile mini (unfinished: {unfinished or 'none'})")
    written = []
    for source in sorted((out / "notebooks").glob("*.ipynb")):
        nb = nbformat.read(source, as_version=4)
        tags = [cell.metadata.get("tags", []) for cell in nb.cells]
        if any("injected-parameters" in t for t in tags):
            raise EmonbError(f"{source}: was run with options; make it again with: make notebooks")
        for cell, own in zip(nb.cells, tags, strict=True):
            cell.metadata = nbformat.from_dict({"tags": own} if own else {})
        nb.metadata = nbformat.from_dict(
            {
                "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
                "language_info": {"name": "python"},
            }
        )
        nbformat.validate(nb)
        target = project_root() / "notebooks" / source.name
        atomic_write(target, nbformat.writes(nb))
        written.append(target)
    return written


def sign(folder: Path) -> None:
    """Mark executed notebooks as trusted by this user, so that Jupyter shows their HTML outputs."""
    from nbformat.sign import NotebookNotary

    try:
        notary = NotebookNotary()
        for path in sorted(folder.glob("*.ipynb")):
            notary.sign(nbformat.read(path, as_version=4))
    except Exception:  # a convenience: no home folder, no sqlite
        return
