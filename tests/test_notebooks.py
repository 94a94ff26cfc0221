"""The notebooks: as they are committed, as one run that was killed, cell by cell under nbval, and what readers try."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from conftest import ROOT, emonb
from safetensors.torch import load_file

from emonb.data import taxonomy_for_dataset
from emonb.headless import NOTEBOOKS
from emonb.predictions import read_predictions
from emonb.run import open_run
from emonb.settings import load_settings

MACHINE_PATH = re.compile(r"/(?:home|root|Users|tmp|work|usr|opt|var)/[\w.-]+|site-packages")
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def cells_of(name: str) -> list:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells


def tagged(name: str, tag: str) -> list:
    return [cell for cell in cells_of(name) if tag in cell.metadata.get("tags", [])]


# ---- as they are committed


@every_notebook
def test_it_opens_with_parameters(name):
    badges, install, title, *_ = cells = cells_of(name)
    assert [badges.metadata.tags, install.metadata.tags] == [["badges"], ["install", "remove-cell"]]
    assert title.source.startswith("# ")
    (parameters,), (more,) = tagged(name, "parameters"), tagged(name, "more-parameters")
    found = re.findall(r"^(\w+): str = \".*?\"  # \S", parameters.source, re.MULTILINE)
    assert found == ["profile", "datasets", "out"]
    same = [tagged("05_distillation", tag)[0].source for tag in ("parameters", "more-parameters")]
    assert [parameters.source, more.source] == same, "not the same in all"
    assert cells.index(more) == cells.index(parameters) + 1
    assert all(cell.metadata["jupyter"]["source_hidden"] for cell in (install, more))


@every_notebook
def test_it_was_executed_in_order_without_errors(name):
    code = [cell for cell in cells_of(name) if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


@every_notebook
def test_it_is_small_portable_and_readable(name):
    file = ROOT / "notebooks" / f"{name}.ipynb"
    assert file.stat().st_size < 1_000_000
    nb, cells = json.loads(file.read_text(encoding="utf-8")), cells_of(name)
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
        assert not MACHINE_PATH.findall(json.dumps([cell["source"], cell.get("outputs")]))
    assert max(len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code") <= 40
    rows = [(kind, len([*row])) for kind, row in groupby(cell.cell_type for cell in cells)]
    assert max(length for kind, length in rows if kind == "code") <= 3
    begin = next(i for i, cell in enumerate(cells) if cell.source.startswith("## Exercises"))  # they come last
    end = "\n".join(cell.source for cell in cells[begin - 8 : begin] if cell.cell_type == "markdown")
    assert re.search(r"Takeaways(.|\n)*Differences from the paper", end)


def bare(source: str) -> str:
    """A syntax tree as text, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.body = node.body[ast.get_docstring(node) is not None :]
    return ast.unparse(tree)


@every_notebook
def test_shown_code_is_the_packages(name):
    shown = tagged(name, "shown")
    assert shown or not "03" <= name[:2] <= "06"
    for cell in shown:
        module, names = cell.metadata["emonb"]["shows"].split(":")
        tree, wanted = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")), []
        for path in names.split(","):
            node = tree
            for part in path.split("."):
                defined = {getattr(n, "name", getattr(getattr(n, "targets", [n])[0], "id", "")): n for n in node.body}
                node = defined[part]
            wanted.append(ast.unparse(node))
        assert bare(cell.source) == bare("\n\n".join(wanted)), f"{name} shows another {names}"


def trials(name: str) -> Iterator[tuple[int, str, list[tuple[str, str]]]]:
    """(cell, prompt, changes) of a notebook; a change is a text in backticks and what stands after the word "to"."""
    for at, cell in enumerate(cells_of(name)):
        for prompt in re.split(r"\n\s*\n", cell.source) if cell.cell_type == "markdown" else ():
            if not prompt.startswith("**Try it.**"):
                continue
            old, changes = "", []
            for to, text in re.findall(r"(\bto\s+)?`([^`]+)`", prompt):
                changes.append((old, text) if to and old else (text, text))
                old = old if to and old else text
            yield at, prompt, changes


@every_notebook
def test_prompts_speak_of_code_that_is_there(name):
    found = [*trials(name)]
    assert 2 <= len(found) <= 4
    for at, prompt, changes in found:
        assert "?" in prompt
        assert any(old != new for old, new in changes), f"changes nothing: {prompt}"
        above = [cell.source for cell in cells_of(name)[:at] if cell.cell_type == "code"]
        for old, new in changes:
            last = next((code for code in reversed(above) if old in code), None)
            assert last, f"`{old}` stands in no code cell above: {prompt}"
            assert old == new or last.count(old) == 1, f"`{old}` stands more than once in the cell: {prompt}"
            assert old == new or bare(last.replace(old, new)) != bare(last), f"`{new}` changes nothing"


def test_the_page_about_the_notebooks_lists_all_with_minutes():
    text = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[.*?\]\((\w+)\.ipynb\) \|.*?\|(.*?)\|(.*?)\|", text, flags=re.MULTILINE)
    assert [row[0] for row in rows] == list(NOTEBOOKS)
    assert all(re.search(r"\d|under one", minutes) for row in rows for minutes in row[1:])


# ---- one run

DATASETS = load_settings("smoke").datasets
OUTPUTS = {
    "tables/{}.csv tables/{}.md tables/{}.tex": "main modules depth depth_schedule gates alpha instruction_tuning "
    "parameters complementarity claims cost calibration gate_trust departures",
    "figures/{}.png figures/{}.svg": "complementarity_venn complementarity_by_emotion agreement alpha_tradeoff depth "
    "qualitative_examples training_curves complementarity_upset gate_weights gate_trust calibration accuracy_cost "
    + " ".join(f"confusion_difference_{dataset}" for dataset in DATASETS),
    " ".join(f"predictions/{dataset}__{{}}.parquet" for dataset in DATASETS): "vlm_zero_shot vlm_tuned vlm_generated "
    "vit resnet vgg average_vlm_head head head_alpha0 head_alpha1 head_depth2 head_depth5 emovlmkd gate_bilinear "
    "gate_moe gate_dynamic gate_cross gate_depth2 gate_depth5 gate_concat_val gate_concat_oof head_depth5_x0.125",
    "notebooks/{}.ipynb site/{}.html": " ".join(NOTEBOOKS),
    "models/{}/config.json triplets/{}.jsonl": " ".join(DATASETS),
    "{}": "index.html run.json",
}


def test_a_killed_run_leaves_no_process_and_the_next_makes_every_output(smoke_run):
    out, lines = smoke_run.out, smoke_run.said.splitlines()
    assert smoke_run.survivors == []
    expected = [form.format(i) for forms, ids in OUTPUTS.items() for form in forms.split() for i in ids.split()]
    assert [path for path in expected if not (out / path).is_file()] == []
    assert not [*out.rglob("*.pkl"), *out.rglob("*.bin"), *out.glob("artifacts/*/.*.tmp")]
    assert "3 notebooks up to date, 6 executed" in lines
    assert [line for line in lines if re.match(r" *\d+% .* gone, about .* left, 0\d_\w+ cell \d+/\d+", line)]
    assert not [line for line in lines if "Warning" in line or "Traceback" in line]


def test_what_a_killed_run_made_is_what_an_undisturbed_one_makes_alone(smoke_run, tmp_path):
    run, theirs = open_run("smoke", datasets=DATASETS[0], out=str(tmp_path)), open_run("smoke", out=str(smoke_run.out))
    run.make("samples")
    run.make("teacher")
    for network in run.settings.teacher.networks:
        made = [r.find("teacher", DATASETS[0], network) for r in (run, theirs)]
        assert made[0].key == made[1].key
        logits = [load_file(artifact.path / "logits.safetensors")["test"] for artifact in made]
        np.testing.assert_allclose(*logits, atol=1e-4)


def test_tables_follow_from_the_prediction_files_in_the_taxonomys_order(smoke_run):
    for path in (smoke_run.out / "predictions").glob("*.parquet"):
        labels = taxonomy_for_dataset(path.stem.split("__")[0]).labels
        assert tuple(read_predictions(path).attrs["labels"]) == labels, path.name
    rows = pd.read_csv(smoke_run.out / "tables" / "main.csv").dropna(subset="ours").to_dict("records")
    assert len(rows) >= 5 * len(DATASETS)
    for row in rows:
        path = smoke_run.out / "predictions" / f"{row['dataset'].split()[0]}__{row['row']}.parquet"
        frame = pd.read_parquet(path).query("split == 'test'")
        assert row["ours"] == pytest.approx(100 * (frame["prediction"] == frame["label"]).mean(), abs=1e-6)
        assert row["ci_low"] <= row["ours"] <= row["ci_high"]


def test_a_finished_run_is_up_to_date(smoke_run, tmp_path):
    shutil.copytree(smoke_run.out, tmp_path / "out")
    start = time.monotonic()
    said, _ = emonb("run", "--profile", "smoke", "--out", str(tmp_path / "out")).communicate()
    assert "9 notebooks up to date, 0 executed" in said
    assert time.monotonic() - start < 60


# ---- cell by cell

TRY = '''
from pathlib import Path as _Path
from IPython.utils.capture import capture_output as _captured

def _try(*sources):
    """What cells say and show; they may touch no result."""
    def results():
        folders = [_Path(out, name) for name in ("tables", "figures", "predictions", "models", "triplets")]
        return sorted((str(file), file.stat().st_mtime_ns) for folder in folders for file in folder.rglob("*"))

    before = results()
    with _captured() as said:
        for source in sources:
            get_ipython().run_cell(source).raise_error()
    assert results() == before, "a stored result was touched"
    return said.stdout, [output.data for output in said.outputs]
'''

SOCKETS = '''
"""Of kernels that two processes start at one moment, two may choose one TCP port."""
import os
import uuid

import nbval.kernel

tcp = nbval.kernel.KernelManager
nbval.kernel.KernelManager = lambda **more: tcp(transport="ipc", ip=os.path.abspath(uuid.uuid4().hex[:8]), **more)
'''


def with_trials(name: str, folder: Path, out: Path) -> Path:
    """A notebook of the smoke run in which every prompt is followed by what it asks for, and by what was before."""
    path, parameters = folder / f"{name}.ipynb", {"profile": "smoke", "out": str(out)}
    papermill.execute_notebook(str(ROOT / "notebooks" / path.name), str(path), parameters, prepare_only=True)
    nb, committed = nbformat.read(path, as_version=4), cells_of(name)
    moved = len(nb.cells) - len(committed) + 1  # by the injected parameters
    for at, _, changes in reversed([*trials(name)]):
        tried = []
        for old, new in ((old, new) for old, new in changes if old != new):
            first = max(i for i, cell in enumerate(committed[:at]) if cell.cell_type == "code" and old in cell.source)
            chain = [cell.source for cell in committed[first:at] if cell.cell_type == "code"]
            changed = [chain[0].replace(old, new), *chain[1:]]
            check = f"assert _try(*{changed!r}) != _try(*{chain!r}), {f'`{new}` changes nothing'!r}"
            tried.append(nbformat.v4.new_code_cell(check))
        nb.cells[at + moved : at + moved] = tried
    nb.cells.insert(0, nbformat.v4.new_code_cell(TRY))
    nbformat.write(nb, path)
    return path


def test_every_cell_runs_says_what_is_committed_and_survives_what_readers_try(smoke_run, tmp_path):
    """nbval compares the outputs of cells that say NBVAL_CHECK_OUTPUT."""
    outs = [shutil.copytree(smoke_run.out, tmp_path / f"out{part}") for part in (0, 1)]
    (tmp_path / "sockets.py").write_text(SOCKETS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "sockets", "-c", os.devnull]
    command += ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600", "--nbval-kernel-startup-timeout=120"]
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    options = {"env": {**os.environ, "EMONB_HEADLESS": "1", "PYTHONPATH": path}, "cwd": tmp_path, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    files = [str(with_trials(name, tmp_path, outs[i % 2])) for i, name in enumerate(NOTEBOOKS)]
    for process in [subprocess.Popen([*command, *files[part::2]], **options) for part in (0, 1)]:  # two at a time
        said, _ = process.communicate()
        assert process.returncode == 0, said[-12000:]
    for path in (file for name in ("tables", "figures", "predictions") for file in (smoke_run.out / name).iterdir()):
        for out in outs:
            assert (out / path.parent.name / path.name).read_bytes() == path.read_bytes(), path.name


def test_plain_papermill_runs_a_notebook_with_parameters_of_both_cells(smoke_run, tmp_path):
    shutil.copytree(smoke_run.out, tmp_path / "out")
    given = ["-p", "profile", "smoke", "-p", "images", "tests", "-p", "out", str(tmp_path / "out"), "-k", "python3"]
    cells = {}
    for name, option in (("prepared", ["--prepare-only"]), ("executed", [])):
        paths = [str(ROOT / "notebooks" / "05_distillation.ipynb"), str(tmp_path / f"{name}.ipynb")]
        command = [sys.executable, "-m", "papermill", *paths, *given, *option]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        cells[name] = nbformat.read(paths[1], as_version=4).cells
    known: dict = {}
    for cell in cells["prepared"]:
        if {"parameters", "injected-parameters", "more-parameters"} & {*cell.metadata.get("tags", [])}:
            exec(cell.source, known)
    assert (known["profile"], known["more"]) == ("smoke", {"images": "tests", "seeds": "", "force": ""})
    said = [str(cell.outputs) for cell in cells["executed"] if cell.cell_type == "code"]
    assert any("files written" in text for text in said)
    assert "not written yet" in said[-1]
