"""The measurements of `bench/`: they import, and their page shows what was measured and what was not."""

from __future__ import annotations

import importlib
import json
import re

import pytest
from conftest import ROOT

MACHINE = {"cpu": "<b>some CPU</b>", "cores": 2, "gpu": None}
COMMON = {
    "machine": MACHINE, "written": "2026-01-02", "measurement_seconds": 3.0, "load_average": 0.5, "git": {},
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


def test_every_part_of_make_bench_is_there_and_has_its_place_on_the_page(bench):
    parts = re.search(r"for part in ([a-z ]+);", (ROOT / "Makefile").read_text())[1].split()
    assert set(parts) == set(bench("page").PARTS)
    for part in parts:
        assert callable(bench(part).main)


def test_page_shows_what_was_measured_and_names_what_was_not(bench, tmp_path):
    scoring = {
        "images": 64, "seconds_scoring": 2.0, "seconds_generating": 8.0, "ratio": 4.0, "agreement_percent": 87.5,
        "unparsable_percent": 3.0, "accuracy_percent": {"scoring": 50.0, "generating": 49.0},
    }  # fmt: skip
    (tmp_path / "scoring.json").write_text(json.dumps({**scoring, **COMMON}))
    text = bench("page").write(tmp_path).read_text()
    assert "Not measured: schedules, limit, growth, trainer, steps, where." in text
    assert "scoring is 4 times as fast" in text
    assert "87.5 % of the images" in text
    assert "<td>32</td>" in text, "images a second"
    assert "&lt;b&gt;some CPU&lt;/b&gt;" in text


def test_growth_of_a_linear_stage_has_exponent_one(bench):
    growth = bench("growth")
    sizes = {n: {s: {"seconds": n / 100, "peak_memory_mb": 900 + n / 2**20} for s in growth.STAGES} for n in (10, 40)}
    for rates in growth.grown(sizes).values():
        assert rates["time_exponent"] == pytest.approx(1)
        assert rates["bytes_per_picture"] == pytest.approx(1)
    assert growth.grown({10: sizes[10]}) == {}


def test_seconds_of_a_notebook_by_kind(bench):
    """Two results made at once count once; imports are taken out of the cell that they are in."""
    where = bench("where")
    made = {"hit": False, "seconds": 10.0}
    record = {"seconds": 20.0, "stages": [
        {**made, "stage": "head", "created": "2026-01-01T00:00:10.000+00:00"},
        {**made, "stage": "head", "created": "2026-01-01T00:00:14.000+00:00"},
    ]}  # fmt: skip
    sources = ["import json", "heads = side_by_side(head_stage, ws)", "figures.depth(table)"]
    cells = [
        {"source": [text], "metadata": {"papermill": {"duration": seconds}}}
        for text, seconds in zip(sources, (0.5, 15.0, 2.0), strict=True)
    ]
    found = where.profile(record, cells, [0.4, 0.0, 0.5])
    expected = {"kernel": 2.5, "imports": 0.9, "training": 14.0, "figures": 1.5, "rest": 1.1}
    assert found == pytest.approx({"drawing": 0.0, "passes": 0.0, **expected})
    assert all(seconds >= 0 for seconds in where.imports_of(sources))
