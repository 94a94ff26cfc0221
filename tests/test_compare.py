"""Two runs side by side: nothing where nothing differs; else what, by how much, and where it begins."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from emonb.cli import app
from emonb.files import write_json
from emonb.predictions import make_predictions, write_predictions
from emonb.show.compare import compare, verdict_counts

LABELS = ("negative", "positive")
STAGES = [{"stage": "samples", "name": "a", "key": "k1"}, {"stage": "teacher", "name": "a--vit", "key": "k2"}]


def answers(right):
    """Predictions about 100 images of which the given share is answered rightly, the first ones."""
    gold = ["positive"] * 100
    p = np.where(np.arange(100)[:, None] < 100 * right, [0.2, 0.8], [0.8, 0.2])
    return make_predictions([f"{i:03}" for i in range(100)], ["test"] * 100, gold, p, LABELS)


def judge(out, *verdicts):
    """The table of two claims with these verdicts."""
    claims = {"claim": ["C1", "C2"], "dataset": "all", "verdict": verdicts, "decided_by": "x", "value": 1.0}
    frame = pd.DataFrame({**claims, "ci_low": 0.5, "ci_high": 1.5})
    frame.to_csv(out / "tables" / "claims.csv", index=False)


@pytest.fixture
def runs(tmp_path):
    """Two folders of the same results."""
    a, b = tmp_path / "a", tmp_path / "b"
    for model, right in (("vit", 0.5), ("vlm_tuned", 0.6)):
        write_predictions(a / "predictions" / f"a__{model}.parquet", answers(right))
    about = {"versions": {"torch": "2.14.1"}, "machine": {"cpu": "x", "cores": 2, "gpu": None}}
    about |= {"settings": {"seeds": [0], "out": "a"}, "git": {}, "notebooks": {"04_teacher": {"stages": STAGES}}}
    write_json(a / "run.json", about)
    (a / "tables").mkdir()
    pd.DataFrame({"row": ["vit"], "ours": [50.0]}).to_csv(a / "tables" / "main.csv", index=False)
    judge(a, "holds", "undecided")
    for stage in STAGES:
        folder = a / "artifacts" / stage["stage"] / stage["key"]
        folder.mkdir(parents=True)
        write_json(folder / "provenance.json", {"digest": stage["stage"]})
    shutil.copytree(a, b)
    return a, b


def said_by(*runs):
    result = CliRunner().invoke(app, ["compare", *map(str, runs)])
    return result.exit_code, result.output


def test_equal_runs_are_the_same_whatever_made_them(runs):
    about = json.loads((runs[1] / "run.json").read_text())
    about |= {"versions": {"torch": "2.15.0"}, "settings": {"seeds": [0], "out": "b"}}
    write_json(runs[1] / "run.json", about)
    code, text = said_by(*runs)
    assert code == 0
    assert text == "the same answers, tables and verdicts\n  not alike: versions.torch: 2.14.1, 2.15.0\n"


def test_what_differs_is_told_with_paired_differences_and_where_it_begins(runs):
    a, b = runs
    write_predictions(b / "predictions" / "a__vit.parquet", answers(0.4))
    write_json(b / "artifacts" / "teacher" / "k2" / "provenance.json", {"digest": "another"})
    (b / "tables" / "main.csv").write_text("row,ours\nvit,40.0\n")
    judge(b, "holds", "does not hold")
    found = compare(a, b)
    assert found.begins == ["teacher: a--vit"]
    only = found.answers.iloc[0]
    assert (len(found.answers), only["model"], only["changed"], only["difference"]) == (1, "ViT", 10, -10)
    assert -20 < only["low"] < -10 < only["high"] < -2, "paired: only ten images differ"
    (changed,) = found.verdicts[["claim", "verdict a", "verdict b"]].to_numpy().tolist()
    assert changed == ["C2", "undecided", "does not hold"]
    code, text = said_by(a, b)
    assert code == 1
    assert "table main: largest difference 10 (ours)" in text
    assert "begins at teacher: a--vit" in text


def test_of_many_runs_the_verdicts_are_counted(runs, tmp_path):
    third = shutil.copytree(runs[0], tmp_path / "c")
    judge(third, "holds", "does not hold")
    counts = verdict_counts([*runs, third])
    assert counts.to_numpy().tolist() == [[3, 0, 0], [0, 2, 1]]
    assert said_by(*runs, third)[0] == 1
    assert said_by(*runs, runs[0])[0] == 0
    assert said_by(*runs, tmp_path)[0] == said_by(runs[0])[0] == 2


def test_runs_of_other_seeds_are_said_not_to_be_paired_and_not_to_be_the_same(runs):
    write_predictions(runs[1] / "predictions" / "a__vit.parquet", answers(0.5).assign(seed=7))
    code, text = said_by(*runs)
    assert code == 1
    assert "  other seeds or pictures, so compared by their means: ViT on a\n" in text
    (row,) = compare(*runs).answers.to_dict("records")
    assert (row["model"], row["difference"]) == ("ViT", 0)
    assert np.isnan(row["changed"])


def test_two_drawings_of_a_name_are_two_pictures(runs):
    about = json.loads((runs[0] / "run.json").read_text())
    for folder, redraw in zip(runs, (0, 1), strict=True):
        about["settings"]["world"] = {"redraw": redraw}
        write_json(folder / "run.json", about)
        frame = answers(0.5).iloc[:: 1 - 2 * redraw].assign(image_id=[f"{i:03}" for i in range(100)])
        write_predictions(folder / "predictions" / "mini-fi__vit.parquet", frame)  # one errs where the other does not
    row = compare(*runs).answers.set_index("dataset").loc["mini-fi"]
    assert (row["difference"], row["a"], np.isnan(row["changed"])) == (0, 50, True)
    assert (row["low"], row["high"]) == pytest.approx((-13.9, 13.9), abs=0.7)  # 1.96 x 5 points x root 2
    for world, changed in ({"mikels8": [8, 8, 9], "redraw": 0}, None), ({}, 100):  # of no redrawing: an older run
        write_json(runs[1] / "run.json", about | {"settings": about["settings"] | {"world": world}})
        write_json(runs[0] / "run.json", about | {"settings": about["settings"] | {"world": {"redraw": 0}}})
        row = compare(*runs).answers.set_index("dataset").loc["mini-fi"]
        assert np.isnan(row["changed"]) if changed is None else row["changed"] == changed, world


def test_claims_of_an_earlier_version_have_another_column(runs):
    for out, name in zip(runs, ("mcnemar_p", "p"), strict=True):
        file = out / "tables" / "claims.csv"
        pd.read_csv(file).assign(**{name: 0.5}).to_csv(file, index=False)
    assert compare(*runs).verdicts.empty
    assert verdict_counts(runs).to_numpy().tolist() == [[2, 0, 0], [0, 2, 0]]


def test_what_cannot_be_compared_is_an_error_of_its_own(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty", runs[0] / "run.json"):
        for given in ((runs[0], folder), (folder, *runs)):
            code, text = said_by(*given)
            assert (code, text) == (2, f"emonb: {folder}: no results folder; make one with: python -m emonb run\n")
    assert said_by(runs[0], tmp_path / (300 * "x"))[0] == 2
    for path in (runs[1] / "predictions").iterdir():
        path.rename(path.with_name(path.name.replace("a__", "z__")))
    code, text = said_by(*runs)
    assert code == 2
    assert "no dataset in common" in text


HEAD = "claim,dataset,verdict,decided_by,value,ci_low,ci_high\n"
DAMAGES = {
    "run.json": ["", "[]", "null", '{"notebooks": {}}', '{"settings": 3}', "\udcff"],
    "tables/claims.csv": ["", "claim,dat", "a,b\n1,2\n", f"{HEAD}C1,all,hol", f'{HEAD}C1,all,"holds', "\udcff"],
    "tables/main.csv": ["", 'row\n"vit', "row\nvit,1\n2,3,4", "\udcff"],
    "predictions/a__vit.parquet": ["", "PAR1"],
    "artifacts/samples/k1/provenance.json": ["", "null", "[]", "{}"],
}


@pytest.mark.parametrize(("file", "content"), [(file, content) for file in DAMAGES for content in DAMAGES[file]])
def test_a_damaged_file_is_an_error_in_one_line_that_names_it(runs, file, content):
    (runs[1] / file).write_bytes(content.encode(errors="surrogateescape"))
    for given in (runs, runs[::-1]):
        code, text = said_by(*given)
        assert (code, text.count("\n")) == (2, 1), text
        assert text.startswith(f"emonb: {runs[1] / file}: ")


@pytest.mark.parametrize("part", ["machine", "settings", "git", "notebooks"])
def test_a_part_of_run_json_of_another_kind_is_one_line(runs, part):
    file = runs[0] / "run.json"
    whole = json.loads(file.read_text())
    more = {"machine": {}, "settings": {"world": 3}, "git": [[]], "notebooks": {"01_data": {"stages": [{}]}}}
    for odd in (None, 3, [1], "text", more[part]):
        write_json(file, whole | {part: odd})
        code, text = said_by(*runs)
        assert (code, text.count("\n")) == (2, 1), (odd, text)
        assert text.startswith(f"emonb: {file}: damaged")
