"""The runner on notebooks of one behaviour each (`tests/notebooks/`)."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from conftest import FIXTURES, ROOT, emonb, killed, wait_for
from pipeline import make_tree
from synthetic import synthetic

from emonb import headless
from emonb.errors import EmonbError
from emonb.files import locked
from emonb.headless import NotebookFailed, run
from emonb.predictions import write_predictions
from emonb.progress import progress
from emonb.run import Run, open_run
from emonb.store import STAGES

REPORT = headless.write_report
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGKILL


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Most tests do without the report, which takes longer than the notebooks; it has tests of its own."""
    monkeypatch.setattr(headless, "write_report", lambda out: (out / "index.html").touch())


def records(out: Path) -> dict[str, dict]:
    """Records of run.json, without the numbers in the names."""
    notebooks = json.loads((out / "run.json").read_text())["notebooks"]
    return {name.split("_", 1)[1]: record for name, record in notebooks.items()}


def statuses(out: Path) -> dict[str, str]:
    return {name: record.get("status", "none") for name, record in records(out).items()}


def edit(notebook: Path, old: str, new: str) -> None:
    text = notebook.read_text()
    assert old in text
    notebook.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    """One run of two notebooks, of which each test gets a copy."""
    base = tmp_path_factory.mktemp("run")
    (base / "notebooks").mkdir()
    shutil.copy(FIXTURES / "saves_table.ipynb", base / "notebooks" / "01_data.ipynb")
    shutil.copy(FIXTURES / "reads_result.ipynb", base / "notebooks" / "02_reads_result.ipynb")
    run("smoke", out=str(base / "out"), folder=base / "notebooks")
    return base


@pytest.fixture
def finished(finished_once, tmp_path):
    """A finished run: the arguments of `run` to repeat it, and its results folder."""
    shutil.copytree(finished_once, tmp_path, dirs_exist_ok=True)
    return {"profile": "smoke", "out": str(tmp_path / "out"), "folder": tmp_path / "notebooks"}, tmp_path / "out"


def test_a_run_records_what_it_did(finished):
    _, out = finished
    record = json.loads((out / "run.json").read_text())
    assert (record["profile"], record["seeds"]) == ("smoke", [0, 1])
    assert record["settings"]["vlm"]["base"] == "stand-in"
    assert os.uname().nodename not in json.dumps(record["machine"])
    assert record["totals"]["seconds_compute"] > 0
    first, second = records(out)["data"], records(out)["reads_result"]
    assert (first["status"], first["files"]) == ("executed", ["tables/saved.csv"])
    assert first["seconds"] > 0
    assert first["peak_memory_mb"] > 20
    found = [[(s["stage"], s["name"], s["hit"]) for s in r["stages"]] for r in (first, second)]
    assert found == [[("samples", "mini-fi", False)], [("samples", "mini-fi", True)]]
    executed = nbformat.read(out / "notebooks" / "02_reads_result.ipynb", as_version=4)
    assert "42" in str(executed.cells[-2].outputs)


def test_what_is_up_to_date_is_skipped_and_keeps_its_record(finished, capsys):
    arguments, out = finished
    before = records(out)
    for source in arguments["folder"].glob("*.ipynb"):  # committed outputs do not count
        nb = nbformat.read(out / "notebooks" / source.name, as_version=4)
        nb.cells = [cell for cell in nb.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
        nbformat.write(nb, source)
    run(**arguments, force="teacher")  # of a notebook that is not here
    assert set(statuses(out).values()) == {"up to date"}
    assert [r["seconds"] for r in records(out).values()] == [r["seconds"] for r in before.values()]
    assert "2 notebooks up to date, 0 executed" in capsys.readouterr().err


DAMAGE = {
    "deleted output": lambda out: (out / "tables" / "saved.csv").unlink(),
    "edited output": lambda out: (out / "tables" / "saved.csv").write_text("answer\n41\n"),
    "lost result": lambda out: next(out.glob("artifacts/samples/*/provenance.json")).unlink(),
    "lost copy": lambda out: (out / "notebooks" / "01_data.ipynb").unlink(),
    "half a copy": lambda out: (out / "notebooks" / "01_data.ipynb").write_text('{"cells": ['),
    "half a run.json": lambda out: (out / "run.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_repaired(finished, damage):
    arguments, out = finished
    DAMAGE[damage](out)
    run(**arguments)
    assert statuses(out)["data"] == ("up to date" if damage == "half a run.json" else "executed")
    assert (out / "tables" / "saved.csv").read_text() == "answer\n42\n"
    run(**arguments)
    assert set(statuses(out).values()) == {"up to date"}


def test_a_changed_cell_a_forced_stage_and_other_settings_run_what_depends_on_them(finished):
    arguments, out = finished
    run(**arguments, force="samples")
    assert statuses(out) == {"data": "executed", "reads_result": "up to date"}
    assert [stage["hit"] for stage in records(out)["data"]["stages"]] == [False]
    assert "injected-parameters" in (out / "notebooks" / "01_data.ipynb").read_text()
    edit(arguments["folder"] / "02_reads_result.ipynb", "# reads_result", "# reads the result")
    run(**arguments)
    assert statuses(out) == {"data": "up to date", "reads_result": "executed"}
    edit(arguments["folder"] / "01_data.ipynb", r"\\n42\\n", r"\\n43\\n")
    run(**arguments)
    assert set(statuses(out).values()) == {"executed"}, "the other one reads what it wrote"
    assert "43" in (out / "notebooks" / "02_reads_result.ipynb").read_text()
    run(**arguments, seeds="7")
    assert set(statuses(out).values()) == {"executed"}


def test_predictions_of_other_settings_are_taken_away_and_somebody_s_stay(finished):
    arguments, out = finished
    frame, folder = synthetic(("mini-fi",), n=16, models=["vit"])["mini-fi", "vit"], out / "predictions"
    for model in ("vit", "resnet", "head", "mine"):
        write_predictions(folder / f"mini-fi__{model}.parquet", frame.assign(raw_text=None))

    noted = ("vit", "resnet", "mine")

    def note():
        about = json.loads((out / "run.json").read_text())
        about["notebooks"]["01_data"]["files"] += [f"predictions/mini-fi__{m}.parquet" for m in noted]
        (out / "run.json").write_text(json.dumps(about))

    note()
    run(**arguments)
    assert len([*folder.iterdir()]) == 4
    (out.parent / "mine.yaml").write_text("from: smoke\nreport: {bootstrap: 300}\n")
    run(**arguments | {"profile": str(out.parent / "mine.yaml")}, datasets="mini-fi")
    assert len([*folder.iterdir()]) == 4, "no answer depends on these"
    note()
    run(**arguments, seeds="7")
    assert sorted(path.stem for path in folder.iterdir()) == ["mini-fi__head", "mini-fi__mine"], "noted, and ours"


def test_a_selection_and_one_run_at_a_time(finished):
    arguments, out = finished
    (out / "notebooks" / "01_data.ipynb").unlink()
    run(**arguments, notebooks="02")
    assert statuses(out) == {"data": "executed", "reads_result": "up to date"}
    assert not (out / "notebooks" / "01_data.ipynb").exists()
    with locked(out / ".lock"), pytest.raises(EmonbError, match="another run is writing here"):
        run(**arguments)


def test_outside_a_checkout_the_notebooks_beside_the_package_are_there(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()  # somebody's, without any of ours
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EmonbError, match=r"notebooks 77: there is 01, 02, .*, 09 in .*notebooks\Z"):
        run("smoke", notebooks="77")
    with pytest.raises(EmonbError, match=r"notebooks all: there is none in .*notebooks\Z"):
        run("smoke", folder=tmp_path / "notebooks")


def test_a_failing_cell_leaves_its_marked_copy_and_a_report(tmp_path, notebook_folder, monkeypatch):
    monkeypatch.setattr(headless, "write_report", REPORT)
    folder, out = notebook_folder("saves_table", "fails", "reads_result"), tmp_path / "out"
    with pytest.raises(NotebookFailed) as caught:
        run("smoke", out=str(out), folder=folder)
    message = str(caught.value)
    assert "02_fails failed in In [5]" in message
    assert "ValueError: the <b>reason</b>" in message
    assert "Traceback" not in message
    assert str(out / "notebooks" / "02_fails.ipynb") in message
    assert "papermill-error-cell" in (out / "notebooks" / "02_fails.ipynb").read_text()
    assert statuses(out) == {"saves_table": "executed", "fails": "failed", "reads_result": "none"}
    page = (out / "index.html").read_text()
    assert "notebook 02_fails failed: In [5]: ValueError: the &lt;b&gt;reason&lt;/b&gt;" in page
    assert "notebook 03_reads_result was not run" in page
    assert (out / "site" / "01_saves_table.html").is_file()
    edit(folder / "02_fails.ipynb", "raise ValueError", "print")  # mended: it goes on behind what is finished
    run("smoke", out=str(out), folder=folder)
    assert statuses(out) == {"saves_table": "up to date", "fails": "executed", "reads_result": "executed"}
    assert "02_fails failed" not in (out / "index.html").read_text()


FAILURES = {  # error -> exit code, message
    "EmonbError": (1, r"01_users_mistake failed in In \[4\]\n  file x: field y is wrong; do z\n"),
    "StoppedEarly": (3, r"01_users_mistake failed in In \[4\]\n  file x: field y is wrong; do z\n"),
    "dead kernel": (1, r"01_kernel_dies failed in the cell that was running\n  the kernel died; .*memory"),
    "no kernel": (1, r"01_users_mistake failed in the first cell\n  no kernel started \(.*look at TMPDIR"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_is_one_message_and_its_exit_code(tmp_path, notebook_folder, monkeypatch, how):
    folder = notebook_folder("kernel_dies" if how == "dead kernel" else "users_mistake")
    if how == "StoppedEarly":
        edit(folder / "01_users_mistake.ipynb", "EmonbError", how)
    if how == "no kernel":
        monkeypatch.setattr(headless, "uuid4", lambda: SimpleNamespace(hex="no/where"))  # to put its sockets
    with pytest.raises(NotebookFailed, match=FAILURES[how][1]) as caught:
        run("smoke", out=str(tmp_path / "out"), folder=folder)
    assert caught.value.exit_code == FAILURES[how][0]


def partial_folder(folder: Path, **changed: str) -> Path:
    """Notebooks of one line each: 01 saves predictions, 04 fails, 07 and 08 would show what is there."""
    start = "from emonb.files import Path, make_folder"
    sources = {
        "01_data": "Path(make_folder(Path(out, 'predictions')), 'mini-fi__vit.parquet').write_bytes(b'x')",
        "04_teacher": "raise ValueError('no teacher')",
        "05_distillation": "pass",
        "07_tables": "raise KeyError('also')",
        "08_complementarity": "pass",
    }
    folder.mkdir()
    for name, code in (sources | changed).items():
        nb = nbformat.read(FIXTURES / "fails.ipynb", as_version=4)
        nb.cells[-2].source, nb.cells[-1].source = start, code
        nbformat.write(nb, folder / f"{name}.ipynb")
    return folder


def test_after_a_failure_what_is_there_is_shown(tmp_path, capsys):
    folder, out = partial_folder(tmp_path / "notebooks"), tmp_path / "out"
    with pytest.raises(NotebookFailed, match="04_teacher failed"):
        run("smoke", out=str(out), folder=folder)
    told = capsys.readouterr().err
    assert [*statuses(out).values()] == ["executed", "failed", "none", "failed", "partial"]
    assert records(out)["teacher"]["error"] == "In [5]: ValueError: no teacher"
    assert "07_tables failed: In [5]: KeyError: 'also'" in told
    assert "Traceback" not in told
    assert "report of what is there" in told
    for name in ("04_teacher", "07_tables"):  # mended: the partial one is made again, too
        shutil.copy(folder / "01_data.ipynb", folder / f"{name}.ipynb")
    run("smoke", out=str(out), folder=folder)
    assert [*statuses(out).values()] == ["up to date", *4 * ["executed"]]


def test_without_predictions_no_more_is_executed_and_a_failing_report_hides_no_error(tmp_path, monkeypatch, capsys):
    def full(out):
        raise OSError("disk full")

    monkeypatch.setattr(headless, "write_report", full)
    folder, out = partial_folder(tmp_path / "notebooks", **{"01_data": "pass"}), tmp_path / "out"
    with pytest.raises(NotebookFailed, match="no teacher"):
        run("smoke", out=str(out), folder=folder)
    assert statuses(out)["complementarity"] == "none"
    assert "no report: OSError: disk full" in capsys.readouterr().err


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Runs ended by a signal in the middle of a cell, all at once: signal -> results, exit code, words, survivors."""
    started, found = {}, {}
    for how in SIGNALS:
        folder = tmp_path_factory.mktemp(how.name)
        (folder / "notebooks").mkdir()
        (folder / "pyproject.toml").write_text('name = "emonb"')  # a project of one notebook
        shutil.copy(FIXTURES / "sleeps.ipynb", folder / "notebooks" / "01_sleeps.ipynb")
        options = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "start_new_session": True}
        started[how] = folder / "out", emonb("run", "--profile", "smoke", "--out", "out", **options)
    for how, (out, process) in started.items():
        wait_for((out / "asleep").is_file, process)
        end = os.killpg if how == signal.SIGINT else os.kill
        survivors = killed(process, lambda end=end, process=process, how=how: end(process.pid, how))
        found[how] = out, process.returncode, process.stdout.read(), survivors
    return found


@pytest.mark.parametrize("how", SIGNALS)
def test_a_run_that_is_stopped_leaves_a_report_and_no_kernel(ended, how):
    out, code, told, survivors = ended[how]
    assert survivors == []
    if how != signal.SIGKILL:
        assert code == 130
        assert told.rstrip().endswith("emonb: stopped; the next run goes on from the finished results")
        assert "Traceback" not in told
        assert statuses(out) == {"sleeps": "stopped"}
        assert "notebook 01_sleeps was stopped" in (out / "index.html").read_text()


def test_the_users_own_kernel_cannot_win(tmp_path, notebook_folder, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    kernel = {"argv": ["/bin/false", "{connection_file}"], "display_name": "theirs", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    out = run("smoke", out=str(tmp_path / "out"), folder=notebook_folder("saves_table"))
    assert (out / "tables" / "saved.csv").is_file()


def test_inner_progress_reaches_the_bar(tmp_path, monkeypatch, capsys):
    note = tmp_path / "progress"
    monkeypatch.setenv("EMONB_HEADLESS", "1")
    monkeypatch.setenv("EMONB_PROGRESS_FILE", str(note))
    assert [note.read_text() for _ in progress(range(2), "features")] == ["features 0/2", "features 1/2"]
    assert note.read_text() == ""
    assert capsys.readouterr().out == ""


def test_weights_that_cannot_be_had_are_named_all_at_once_before_anything_runs(tmp_path, monkeypatch):
    """And with the commands that fetch them."""
    monkeypatch.setattr(headless, "hub_offline", lambda: True)
    monkeypatch.setattr(headless, "try_to_load_from_cache", lambda repository, file: None)
    make_tree(tmp_path / "images" / "own", {"train": 2, "val": 1, "test": 1})
    with pytest.raises(EmonbError) as caught:
        run("photos", datasets="own", images=str(tmp_path / "images"), out=str(tmp_path / "out"))
    vlm, vit = "SmolVLM-256M-Instruct", "vit_small_patch16_224"
    assert f"`hf download HuggingFaceTB/{vlm} --local-dir models/{vlm}`" in str(caught.value)
    assert f"model.safetensors --local-dir models/{vit}`" in str(caught.value)
    assert f"`teacher: {{networks: {{vit: {{weights: models/{vit}/model.safetensors}}}}}}`" in str(caught.value)
    with pytest.raises(EmonbError, match=r"`teacher: {networks: {vit: {.*}, resnet: {.*}, vgg: {.*}}}`$") as caught:
        run("paper", datasets="own", images=str(tmp_path / "images"), out=str(tmp_path / "out"))
    assert str(caught.value).count("teacher:") == 1, "a key that is there twice is refused"
    assert not (tmp_path / "out").exists()


def test_other_weights_in_a_folder_of_the_same_name_make_other_features(tmp_path):
    (tmp_path / "vlm" / ".cache").mkdir(parents=True)  # as `hf download` leaves it
    (tmp_path / "vlm" / "v1.0").mkdir()
    (tmp_path / "mine.yaml").write_text(f"from: smoke\nvlm: {{base: '{tmp_path / 'vlm'}'}}\n")
    opened, keys = open_run(str(tmp_path / "mine.yaml"), out=str(tmp_path / "out")), set()
    for weights in (b"one", b"two", b"two", 2**16 * b"." + b"one", 2**17 * b"." + b"one"):
        (tmp_path / "vlm" / "model.safetensors").write_bytes(weights)
        keys.add(json.dumps(STAGES["features"].recipe(opened, "mini-fi", samples=None).params))
    assert len(keys) == 4


def test_the_picture_that_we_follow_is_chosen_by_its_rule():
    def followed(table):
        return Run.example.fget(SimpleNamespace(datasets=["d"], samples=lambda name, split: table))["image_id"]

    drawn = pd.DataFrame({"image_id": range(10), "off_mood": [False, *[True] * 9], "noisy": [False] * 10})
    drawn.loc[1, "noisy"] = True
    assert followed(drawn) == 7, "the sixth trap: off_mood, not mislabelled"
    assert followed(drawn[:5]) == 4, "of fewer the last"
    assert followed(drawn[:2]) == followed(drawn[["image_id"]]) == 0, "without a trap, and from disk, the first"


def test_remarks_on_a_dataset_stand_beside_every_table(tmp_path):
    (tmp_path / "mine.yaml").write_text("from: smoke\nremarks: {mini-fi: seen before., bass: not in this run.}\n")
    opened = open_run(str(tmp_path / "mine.yaml"), out=str(tmp_path / "out"))
    opened.save_table(pd.DataFrame({"x": [1]}), "some", "A caption.")
    assert "A caption. mini-fi: seen before." in (tmp_path / "out" / "tables" / "some.md").read_text()
    assert "mini-fi: seen before." in opened.describe()


def test_a_review_makes_a_table_beside_the_others_and_goes_with_it(finished, tmp_path, capsys):
    arguments, out = finished
    frame = synthetic(("mini-fi",), n=16, models=["vit"])["mini-fi", "vit"]
    write_predictions(out / "predictions" / "mini-fi__vit.parquet", frame.assign(raw_text=None))
    row = frame.iloc[0]
    picture = {"dataset": "mini-fi", "image_id": row["image_id"], "label": row["label"], "mark": "mislabelled"}
    review = {"emonb_review": 1, "pictures": [picture | {"also_right": [], "view": "errors of ViT"}]}
    (tmp_path / "review.json").write_text(json.dumps(review))
    run(**arguments, review=str(tmp_path / "review.json"))
    table = pd.read_csv(out / "tables" / "review.csv")
    assert table[["model", "n", "reviewed"]].to_numpy().tolist() == [["vit", 16, 1]]
    said = "Labels of 1 pictures reviewed (mini-fi (drawn): 1 errors of ViT): 1 mislabelled"
    assert said in capsys.readouterr().err
    assert said in (out / "tables" / "review.md").read_text()
    assert json.loads((out / "run.json").read_text())["reviewed_pictures"] == 1
    review["pictures"][0]["label"] = "none"
    (tmp_path / "review.json").write_text(json.dumps(review))
    with pytest.raises(EmonbError, match=r"review\.json: mini-fi, image_id .*: label 'none'"):
        run(**arguments, review=str(tmp_path / "review.json"))
    run(**arguments)
    assert not list((out / "tables").glob("review.*"))
