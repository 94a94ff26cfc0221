"""The measurements of `tools/bench/`: they run, and their page shows what was measured and what was not."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
from conftest import ROOT

from emonb.files import read_json, write_json
from emonb.releases.imports import import_release
from tools.bench import growth, page, scoring, steps, where


def test_every_part_of_make_bench_is_there_and_has_its_place_on_the_page():
    parts = re.search(r"for part in ([a-z ]+);", (ROOT / "Makefile").read_text())[1].split()
    assert parts == list(page.PARTS)
    for part in parts:
        assert callable(importlib.import_module(f"tools.bench.{part}").main)


def test_parts_run_on_a_tiny_world_and_the_page_shows_them(tmp_path, monkeypatch, one_thread):
    for part, more in ((scoring, ["--images", "4"]), (steps, ["--rounds", "1"])):
        monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path), "--drawn", "24", "8", "8", *more])
        part.main()
    assert set(read_json(tmp_path / "steps.json")["milliseconds"]["resnet"]) >= {"bfloat16", "not channels-last"}
    found = read_json(tmp_path / "scoring.json")
    found["ratio"], found["machine"]["cpu"] = 4.04, "<b>CPU</b>"
    write_json(tmp_path / "scoring.json", found)
    text = page.write(tmp_path).read_text()
    assert "Not measured: where, schedules, limit, growth." in text
    assert "The same 4 images: scoring is 4.04 times as fast" in text
    assert "&lt;b&gt;CPU&lt;/b&gt;" in text


def test_growth_imports_its_made_up_release_and_calls_a_line_linear(tmp_path):
    growth.made_up(tmp_path / "source", 160)
    folder = import_release("emoset", tmp_path / "source", tmp_path / "images", say=str)
    report = read_json(folder / "integrity.json")
    assert [sum(report["counts"][split].values()) for split in ("train", "val", "test")] == [128, 8, 24]
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
    took = {"import json": 0.5, 'heads = run.make("head")': 15.0, "figures.depth(table)": 2.0}
    cells = [{"source": [text], "metadata": {"papermill": {"duration": s}}} for text, s in took.items()]
    found = where.profile("05_distillation", record, cells, [0.4, 0.0, 0.5])
    expected = {"kernel": 2.5, "imports": 0.9, "training": 14.0, "figures": 1.5, "rest": 1.1}
    assert found == pytest.approx({"drawing": 0.0, "passes": 0.0, **expected})
    assert all(seconds >= 0 for seconds in where.imports_of(took))
    monkeypatch.setattr(sys, "argv", ["where", "--run", str(tmp_path), "--out", str(tmp_path / "out")])
    where.main()
    assert capsys.readouterr().out == f"{tmp_path}: no finished run; `make reproduce` makes one\n"
