"""What is missing is named: predictions that are not there, files that are damaged."""

import pytest
from synthetic import synthetic

from emonb.errors import EmonbError
from emonb.gaps import expected_models, gaps
from emonb.predictions import load_all, prediction_labels, write_predictions
from emonb.settings import load_settings


@pytest.fixture
def folder(tmp_path):
    """Predictions of two datasets by three models."""
    for (dataset, model), frame in synthetic(
        ("mini-fi", "mini-flickr"), n=16, models=("vit", "head", "resnet")
    ).items():
        write_predictions(tmp_path / f"{dataset}__{model}.parquet", frame, prediction_labels(frame))
    return tmp_path


def test_damaged_file_is_an_error_unless_partial_is_asked_for(folder):
    path = folder / "mini-fi__vit.parquet"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(EmonbError, match="mini-fi__vit"):
        load_all(folder)
    found = load_all(folder, partial=True)
    assert ("mini-fi", "vit") not in found
    assert ("mini-fi", "head") in found
    (problem,) = found.problems.values()
    assert problem.startswith("mini-fi: predictions of vit are damaged: ")
    assert "\n" not in problem
    assert str(folder) not in problem


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not a table" * 99])
def test_every_kind_of_damage_is_recorded(folder, content):
    for path in folder.iterdir():
        path.write_bytes(content)
    with pytest.raises(EmonbError, match="damaged"):
        load_all(folder, partial=True)


def test_gaps_name_dataset_and_models_once(folder):
    settings = load_settings("smoke", datasets="mini-fi,mini-flickr,mini-emoset")
    (folder / "mini-fi__head.parquet").write_bytes(b"")
    found = load_all(folder, partial=True)
    lines = gaps(found, settings)
    assert len(lines) == 4
    assert lines[0].startswith("mini-fi: predictions of head are damaged")
    first, second, third = (line.partition(": no predictions of ") for line in lines[1:])
    assert (first[0], second[0], third[0]) == ("mini-fi", "mini-flickr", "mini-emoset")
    assert "vlm_tuned" in first[2].split(", ")
    assert not {"head", "vit"} & set(first[2].split(", "))
    assert "head" not in second[2].split(", ")
    assert third[2] == "any model"


def test_nothing_is_missing_from_a_full_run(tmp_path):
    settings = load_settings("smoke", datasets="mini-fi")
    full = {
        ("mini-fi", model): synthetic(("mini-fi",), n=8, models=("vit",))["mini-fi", "vit"]
        for model in expected_models(settings)
    }
    assert gaps(full, settings) == []
