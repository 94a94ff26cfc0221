"""The measurements of `tools/bench/`: they run, and their page shows what was measured and what was not."""

from __future__ import annotations

import importlib
import json
import re
import sys

import pytest
from conftest import ROOT

from emonb.files import read_json
from emonb.releases.imports import import_release
from tools.bench import growth, page, scoring, steps, where

HERE = {"machine": {"cpu": "<b>some CPU</b>", "cores": 2, "gpu": None}, "written": "2026-01-02", "load_average": 0.5}


def test_every_part_of_make_bench_is_there_and_has_its_place_on_the_page():
    parts = re.search(r"for part in ([a-z ]+);", (ROOT / "Makefile").read_text())[1].split()
    assert parts == list(page.PARTS)
    for part in parts:
        assert callable(importlib.import_module(f"tools.bench.{part}").main)


def test_parts_run_on_a_tiny_world_and_the_page_names_what_is_missing(tmp_path, monkeypatch, capsys, one_thread):
    for part, more in ((scoring, ["--images", "4"]), (steps, ["--rounds", "1"])):
        monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path), "--drawn", "24", "8", "8", *more])
        part.main()
        assert str(tmp_path) in capsys.readouterr().out
    assert read_json(tmp_path / "scoring.json")["images"] == 4
    assert set(read_json(tmp_path / "steps.json")["milliseconds"]["resnet"]) >= {"bfloat16", "not channels-last"}
    assert "Not measured: where, schedules, limit, growth." in page.write(tmp_path).read_text()


def test_page_shows_numbers_and_escapes_names(tmp_path):
    found = {
        "images": 64, "seconds_scoring": 2.0, "seconds_generating": 8.0, "ratio": 4.0, "agreement_percent": 87.5,
        "unparsable_percent": 3.0, "accuracy_percent": {"scoring": 50.0, "generating": 49.0}, "git": {},
    }  # fmt: skip
    (tmp_path / "scoring.json").write_text(json.dumps({**found, **HERE}))
    text = page.write(tmp_path).read_text()
    assert "scoring is 4 times as fast" in text
    assert "87.5 % of the images" in text
    assert "<td>32</td>" in text, "images a second"
    assert "&lt;b&gt;some CPU&lt;/b&gt;" in text


def test_growth_imports_its_made_up_release_and_calls_a_line_linear(tmp_path):
    growth.made_up(tmp_path / "source", 160)
    folder = import_release("emoset", tmp_path / "source", tmp_path / "images", say=str)
    report = read_json(folder / "integrity.json")
    assert {split: sum(row.values()) for split, row in report["counts"].items()} == {
        "train": 128,
        "val": 8,
        "test": 24,
    }
    assert not report["problems"], "no two pictures are the same file"
    sizes = {n: {p: {"seconds": n / 100, "peak_memory_mb": 900 + n / 2**20} for p in growth.PARTS} for n in (10, 40)}
    for rates in growth.grown(sizes).values():
        assert rates == pytest.approx({"time_exponent": 1, "bytes_per_picture": 1})
    assert growth.grown({10: sizes[10]}) == {}


def test_seconds_of_a_notebook_by_kind(tmp_path, monkeypatch, capsys):
    """Two results made at once count once, another notebook's not at all; imports are taken out of their cell."""
    made = {"stage": "head", "hit": False, "seconds": 10.0}
    stages = [{**made, "created": f"2026-01-01T00:00:{second}.000+00:00"} for second in (10, 14)]
    record = {"seconds": 20.0, "stages": [*stages, {**stages[0], "stage": "samples", "hit": True}]}
    sources = ["import json", 'heads = run.make("head")', "figures.depth(table)"]
    cells = [
        {"source": [text], "metadata": {"papermill": {"duration": seconds}}}
        for text, seconds in zip(sources, (0.5, 15.0, 2.0), strict=True)
    ]
    found = where.profile("05_distillation", record, cells, [0.4, 0.0, 0.5])
    expected = {"kernel": 2.5, "imports": 0.9, "training": 14.0, "figures": 1.5, "rest": 1.1}
    assert found == pytest.approx({"drawing": 0.0, "passes": 0.0, **expected})
    assert all(seconds >= 0 for seconds in where.imports_of(sources))
    monkeypatch.setattr(sys, "argv", ["where", "--run", str(tmp_path), "--out", str(tmp_path / "out")])
    where.main()
    assert capsys.readouterr().out == f"{tmp_path}: no finished run; `make reproduce` makes one\n"
