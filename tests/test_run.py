"""The runner on fixture notebooks of one behaviour each (`tests/notebooks/`)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import FIXTURES

from emonb.errors import EmonbError
from emonb.execution import NotebookFailed, OverallBar
from emonb.progress import progress, read_progress
from emonb.run import check_datasets, run
from emonb.settings import load_settings


def statuses(out: Path) -> dict[str, str]:
    """Status of each notebook in run.json, without the numbers in the names."""
    records = json.loads((out / "run.json").read_text())["notebooks"]
    return {name.split("_", 1)[1]: record.get("status", "none") for name, record in records.items()}


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    """One run of two notebooks, of which each test gets a copy."""
    base = tmp_path_factory.mktemp("run")
    (base / "notebooks").mkdir()
    for number, name in enumerate(("saves_table", "reads_result"), 1):
        shutil.copy(FIXTURES / f"{name}.ipynb", base / "notebooks" / f"{number:02}_{name}.ipynb")
    run("smoke", out=str(base / "out"), folder=base / "notebooks")
    return base


@pytest.fixture
def finished(finished_once, tmp_path):
    """A finished run: the arguments of `run` to repeat it, and its results folder."""
    shutil.copytree(finished_once, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "out"
    return {"profile": "smoke", "out": str(out), "folder": tmp_path / "notebooks"}, out


def test_run_records_what_it_did(finished):
    _, out = finished
    record = json.loads((out / "run.json").read_text())
    assert record["profile"] == "smoke"
    assert record["seeds"] == [0, 1, 2]
    assert record["settings"]["vlm"]["base"] == "stand-in"
    assert record["machine"]["cores"] >= 1
    first = record["notebooks"]["01_saves_table"]
    assert first["status"] == "executed"
    assert first["seconds"] > 0
    assert first["peak_memory_mb"] > 20
    assert [(s["stage"], s["name"], s["hit"]) for s in first["stages"]] == [("samples", "mini-fi", False)]
    assert set(first["outputs"]) == {f"tables/saved.{ending}" for ending in ("csv", "md", "tex")}
    assert record["totals"]["seconds_compute"] > 0
    executed = (out / "notebooks" / "02_reads_result.ipynb").read_text()
    assert "42" in executed
    assert os.uname().nodename not in json.dumps(record["machine"])
    assert (out / "site" / "01_saves_table.html").is_file()
    assert "saved" in (out / "index.html").read_text()


def test_up_to_date_is_skipped_and_keeps_its_figures(finished, capsys):
    arguments, out = finished
    before = json.loads((out / "run.json").read_text())["notebooks"]
    run(**arguments)
    after = json.loads((out / "run.json").read_text())["notebooks"]
    assert statuses(out) == {"saves_table": "up to date", "reads_result": "up to date"}
    assert {n: r["seconds"] for n, r in before.items()} == {n: r["seconds"] for n, r in after.items()}
    assert "2 notebooks up to date, 0 to run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / "tables" / "saved.md").unlink(),
        lambda out: (out / "tables" / "saved.csv").write_text("answer\n41\n"),
        lambda out: next(out.glob("artifacts/samples/*/provenance.json")).unlink(),
        lambda out: (out / "notebooks" / "01_saves_table.ipynb").unlink(),
        lambda out: (out / "run.json").write_text("{"),
    ],
    ids=["deleted output", "edited output", "lost artefact", "lost copy", "damaged run.json"],
)
def test_damage_is_repaired(finished, damage):
    arguments, out = finished
    damage(out)
    run(**arguments)
    assert statuses(out) == {"saves_table": "executed", "reads_result": "executed"}
    assert (out / "tables" / "saved.csv").read_text() == "answer\n42\n"
    assert (out / "tables" / "saved.md").is_file()


def test_changed_source_runs_it_and_the_later_ones(finished):
    arguments, out = finished
    source = arguments["folder"] / "02_reads_result.ipynb"
    source.write_text(source.read_text().replace("# reads_result", "# reads the result"))
    run(**arguments)
    assert statuses(out) == {"saves_table": "up to date", "reads_result": "executed"}
    source = arguments["folder"] / "01_saves_table.ipynb"
    source.write_text(source.read_text().replace("[42]", "[43]"))
    run(**arguments)
    assert statuses(out) == {"saves_table": "executed", "reads_result": "executed"}
    assert "43" in (out / "notebooks" / "02_reads_result.ipynb").read_text()


def test_committed_outputs_do_not_count(finished):
    arguments, out = finished
    for source in arguments["folder"].glob("*.ipynb"):
        source.write_bytes((out / "notebooks" / source.name).read_bytes())
        nb = json.loads(source.read_text())
        nb["cells"] = [c for c in nb["cells"] if "injected-parameters" not in c["metadata"].get("tags", [])]
        source.write_text(json.dumps(nb))
    run(**arguments)
    assert set(statuses(out).values()) == {"up to date"}


def test_other_settings_and_force_run_again(finished):
    arguments, out = finished
    run(**arguments, force="samples")  # of a notebook called 01_data: none here is forced, all are current
    assert set(statuses(out).values()) == {"up to date"}
    run(**arguments, seeds="7")
    assert set(statuses(out).values()) == {"executed"}


def test_force_reaches_the_notebook_of_its_stage_only(tmp_path, notebook_folder):
    folder = notebook_folder("saves_table", "reads_result")
    (folder / "01_saves_table.ipynb").rename(folder / "01_data.ipynb")
    for force in ("", "samples"):
        out = run("smoke", out=str(tmp_path / "out"), folder=folder, force=force)
        record = json.loads((out / "run.json").read_text())["notebooks"]["01_data"]
        assert record["status"] == "executed"
        assert [stage["hit"] for stage in record["stages"]] == [False]
    assert 'force = \\"samples\\"' in (out / "notebooks" / "01_data.ipynb").read_text()
    assert 'force = \\"samples\\"' not in (out / "notebooks" / "02_reads_result.ipynb").read_text()


def test_selection(finished):
    arguments, out = finished
    (out / "tables" / "saved.md").unlink()
    run(**arguments, notebooks="02")
    assert statuses(out) == {"saves_table": "executed", "reads_result": "up to date"}
    assert not (out / "tables" / "saved.md").exists()
    with pytest.raises(EmonbError, match="none of 01, 02"):
        run(**arguments, notebooks="12")


def test_failing_cell_keeps_the_marked_copy(tmp_path, notebook_folder):
    folder = notebook_folder("saves_table", "fails", "reads_result")
    with pytest.raises(NotebookFailed) as caught:
        run("smoke", out=str(tmp_path / "out"), folder=folder)
    message = str(caught.value)
    assert "02_fails failed in In [4]" in message
    assert "ValueError: the reason" in message
    assert "Traceback" not in message
    copy = tmp_path / "out" / "notebooks" / "02_fails.ipynb"
    assert str(copy) in message
    assert "papermill-error-cell" in copy.read_text()
    assert statuses(tmp_path / "out") == {"saves_table": "executed", "fails": "failed", "reads_result": "none"}
    with pytest.raises(NotebookFailed):  # goes on behind what is finished
        run("smoke", out=str(tmp_path / "out"), folder=folder)
    assert statuses(tmp_path / "out")["saves_table"] == "up to date"


def test_users_mistake_is_its_message_only(tmp_path, notebook_folder):
    with pytest.raises(NotebookFailed, match="file x: field y is wrong; do z") as caught:
        run("smoke", out=str(tmp_path / "out"), folder=notebook_folder("users_mistake"))
    assert "EmonbError" not in str(caught.value)


def test_dead_kernel(tmp_path, notebook_folder):
    with pytest.raises(NotebookFailed, match=r"01_kernel_dies failed(.|\n)*memory"):
        run("smoke", out=str(tmp_path / "out"), folder=notebook_folder("kernel_dies"))


def test_undeclared_parameter_is_found_before_anything_runs(tmp_path, notebook_folder):
    with pytest.raises(EmonbError, match=r"02_no_parameters\.ipynb: no parameter 'profile'"):
        run("smoke", out=str(tmp_path / "out"), folder=notebook_folder("saves_table", "no_parameters"))
    assert not (tmp_path / "out").exists()


def test_users_own_kernel_cannot_win(tmp_path, notebook_folder, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    kernel = {"argv": ["/bin/false", "{connection_file}"], "display_name": "theirs", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    out = run("smoke", out=str(tmp_path / "out"), folder=notebook_folder("saves_table"))
    assert (out / "tables" / "saved.csv").is_file()


def test_one_run_at_a_time(finished):
    import fcntl

    arguments, out = finished
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(EmonbError, match="another run"):
            run(**arguments)


def test_report_says_what_is_missing(finished):
    _, out = finished
    page = (out / "index.html").read_text()
    assert "Not made in this run: table main" in page
    assert "not comparable" in page
    assert "http:" not in page
    assert "https:" not in page


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"datasets": "mini-fy"}, "unknown dataset 'mini-fy'; drawn ones are mini-fi"),
        ({"datasets": "fi", "images": "/nowhere"}, "/nowhere is no folder"),
        ({"datasets": "fi", "images": "tests"}, "no folder .*tests/fi; .* holds: .*notebooks"),
    ],
)
def test_datasets_are_checked_early(overrides, message):
    with pytest.raises(EmonbError, match=message):
        check_datasets(load_settings("smoke", **overrides))


def test_inner_progress_reaches_the_bar(tmp_path, monkeypatch, capsys):
    note = tmp_path / "progress.json"
    monkeypatch.setenv("EMONB_HEADLESS", "1")
    monkeypatch.setenv("EMONB_PROGRESS_FILE", str(note))
    seen = [read_progress(note) for _ in progress(range(3), "features", unit="image")]
    assert seen[0] == "features 0/3"
    assert read_progress(note) == ""
    assert capsys.readouterr().out == ""


def test_bar_estimates_time_left(tmp_path):
    bar = OverallBar({"01_a": 100.0, "02_b": 300.0}, tmp_path / "progress.json")
    try:
        assert bar.state()[0] == pytest.approx(0.0, abs=0.01)
        bar.notebook("01_a", [1.0, 3.0])
        bar.cell(1)
        fraction, text = bar.state()
        assert fraction == pytest.approx(25 / 400, abs=0.01)
        assert "01_a cell 2/2" in text
        bar.done()
        assert bar.state()[0] == pytest.approx(0.25, abs=0.01)
        assert "left" in bar.state()[1]
    finally:
        bar.close()


def partial_folder(folder: Path, **changed: str) -> Path:
    """Notebooks 01 to 08 of one line each: 01 saves predictions, 04 fails, 07 and 08 show what is there."""
    sources = {
        "01_data": "open_out('predictions').joinpath('mini-fi__vit.parquet').write_bytes(b'x')",
        "04_teacher": "raise ValueError('no <b>teacher</b>')",
        "05_distillation": "open_out('tables').joinpath('never.csv').write_text('a')",
        "07_tables": "open_out('tables').joinpath('main.csv').write_text('a\\n1\\n')",
        "08_complementarity": "open_out('tables').joinpath('claims.csv').write_text('a\\n1\\n')",
    } | {f"{name}": code for name, code in changed.items()}
    folder.mkdir(exist_ok=True)
    for name, code in sources.items():
        nb = json.loads((FIXTURES / "fails.ipynb").read_text())
        nb["cells"][2]["source"] = (
            "from pathlib import Path\n"
            "def open_out(name):\n    folder = Path(out) / name\n    folder.mkdir(exist_ok=True)\n    return folder"
        )
        nb["cells"][3]["source"] = code
        (folder / f"{name}.ipynb").write_text(json.dumps(nb))
    return folder


def test_after_a_failure_what_is_there_is_shown(tmp_path, capsys):
    folder, out = partial_folder(tmp_path / "notebooks"), tmp_path / "out"
    with pytest.raises(NotebookFailed, match="04_teacher failed"):
        run("smoke", out=str(out), folder=folder)
    records = json.loads((out / "run.json").read_text())["notebooks"]
    assert {name: r.get("status", "none") for name, r in records.items()} == {
        "01_data": "executed",
        "04_teacher": "failed",
        "05_distillation": "none",
        "07_tables": "partial",
        "08_complementarity": "partial",
    }
    assert "fingerprint" not in records["07_tables"]
    assert records["04_teacher"]["error"] == "In [4]: ValueError: no <b>teacher</b>"
    page = (out / "index.html").read_text()
    assert "notebook 04_teacher failed: In [4]: ValueError: no &lt;b&gt;teacher&lt;/b&gt;" in page
    assert "notebook 05_distillation was not run" in page
    assert "report of what is there" in capsys.readouterr().err
    (folder / "04_teacher.ipynb").write_text((folder / "01_data.ipynb").read_text())  # mended
    run("smoke", out=str(out), folder=folder)
    assert statuses(out) == {
        "data": "up to date",
        "teacher": "executed",
        "distillation": "executed",
        "tables": "executed",
        "complementarity": "executed",
    }
    assert "04_teacher failed" not in (out / "index.html").read_text()


def test_what_fails_after_a_failure_is_one_more_line(tmp_path, capsys):
    changed = {"07_tables": "raise KeyError('also')"}
    folder, out = partial_folder(tmp_path / "notebooks", **changed), tmp_path / "out"
    with pytest.raises(NotebookFailed, match="04_teacher failed"):
        run("smoke", out=str(out), folder=folder)
    told = capsys.readouterr().err
    assert "partial 07_tables failed: In [4]: KeyError: 'also'" in told
    assert "Traceback" not in told
    assert statuses(out)["complementarity"] == "partial"
    assert "notebook 07_tables failed" in (out / "index.html").read_text()


def test_without_predictions_nothing_more_is_executed(tmp_path):
    folder, out = partial_folder(tmp_path / "notebooks", **{"01_data": "pass"}), tmp_path / "out"
    with pytest.raises(NotebookFailed):
        run("smoke", out=str(out), folder=folder)
    assert statuses(out)["tables"] == "none"
    assert "no predictions" in (out / "index.html").read_text()


def test_ctrl_c_leaves_a_report(tmp_path, notebook_folder, monkeypatch):
    from emonb import execution

    real = execution.execute

    def stopped(source, *arguments):
        if source.stem == "02_reads_result":
            raise KeyboardInterrupt
        return real(source, *arguments)

    monkeypatch.setattr(execution, "execute", stopped)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run("smoke", out=str(out), folder=notebook_folder("saves_table", "reads_result", "saves_table"))
    assert statuses(out)["reads_result"] == "stopped"
    assert "notebook 02_reads_result was stopped" in (out / "index.html").read_text()


def test_a_report_that_fails_does_not_hide_the_error(tmp_path, notebook_folder, monkeypatch, capsys):
    from emonb import report

    def no_report(out):
        raise OSError("disk full")

    monkeypatch.setattr(report, "write_report", no_report)
    with pytest.raises(NotebookFailed, match="the reason"):
        run("smoke", out=str(tmp_path / "out"), folder=notebook_folder("fails"))
    assert "no report: OSError: disk full" in capsys.readouterr().err
