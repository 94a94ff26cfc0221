"""Executed notebooks made fit for the repository: outputs stay, machine notes go."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pandas as pd

from emonb.errors import EmonbError
from emonb.explorer import sentence_only
from emonb.settings import project_root
from emonb.store import atomic_write, read_json

__all__ = ["copy_back", "refresh_readme", "sign"]


def copy_back(out: Path) -> list[Path]:
    """Copy the executed notebooks of a mini run over their sources; returns the paths written.

    Of an explorer the picture stays and the data goes: a notebook of the repository stays below 1 MB.

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
            for output in cell.get("outputs", []):
                if "text/html" in output.get("data", {}):
                    output.data["text/html"] = sentence_only(output.data["text/html"])
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


def refresh_readme(out: Path, readme: Path) -> None:
    """Write a run's headline figures between the README's markers, and its picture into `docs/pictures/`."""
    main, modules = (pd.read_csv(out / "tables" / f"{table}.csv") for table in ("main", "modules"))
    rivals = modules[modules["row"].isin(["head", "average_vlm_head"])]  # the honest ones belong in the headline
    main = pd.concat([main[main["ours"].notna()], rivals])
    datasets = list(dict.fromkeys(main["dataset"]))
    lines = ["| accuracy on test, % | " + " | ".join(datasets) + " | paper, FI |", "|---" * (len(datasets) + 2) + "|"]
    for name, rows in main.groupby("name", sort=False):
        cells = rows.set_index("dataset")
        ours = [
            f"{cells.at[d, 'ours']:.1f} [{cells.at[d, 'ci_low']:.1f}, {cells.at[d, 'ci_high']:.1f}]" for d in datasets
        ]
        printed = rows.loc[rows["paper_dataset"] == "FI", "paper"].dropna()
        lines.append(f"| {name} | {' | '.join(ours)} | {f'{printed.iloc[0]:.2f}' if len(printed) else ''} |")
    claims = pd.read_csv(out / "tables" / "claims.csv").query("dataset == 'all'")
    verdicts = [f"{row.claim} {row.verdict}" for row in claims.itertuples()]
    run = read_json(out / "run.json")
    totals, seeds = run["totals"], ", ".join(map(str, run["seeds"]))
    n = " to ".join(dict.fromkeys(f"{x:.0f}" for x in (main["n"].min(), main["n"].max())))
    lines += [
        "",
        f"95 % bootstrap intervals over {n} test images in each; head and gate: "
        f"mean of seeds {seeds}. Claims over all datasets: {'; '.join(verdicts)}.",
        f"This run: {totals['seconds_compute'] / 60:.1f} minutes of computing on {run['machine']['cores']} cores, "
        f"peak memory {totals['peak_memory_mb'] / 1024:.1f} GB.",
    ]
    start, end = "<!-- results: make notebooks writes them -->", "<!-- end of results -->"
    text = readme.read_text(encoding="utf-8")
    if start not in text or end not in text:
        raise EmonbError(f"{readme}: the markers {start!r} and {end!r} are missing; put them back")
    picture = readme.parent / "docs" / "pictures" / "complementarity.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(picture, (out / "figures" / "complementarity_venn.png").read_bytes())
    head, tail = text.split(start)[0], text.split(end)[1]
    atomic_write(readme, head + start + "\n" + "\n".join(lines) + "\n" + end + tail)


def sign(folder: Path) -> None:
    """Mark executed notebooks as trusted by this user, so that Jupyter shows their HTML outputs."""
    from nbformat.sign import NotebookNotary

    try:
        notary = NotebookNotary()
        Path(notary.data_dir).mkdir(parents=True, exist_ok=True)  # not there before Jupyter's first start
        for path in sorted(folder.glob("*.ipynb")):
            notary.sign(nbformat.read(path, as_version=4))
    except Exception:  # a convenience: no home folder, no sqlite
        return
