"""The notebooks as a whole: one smoke run from the command line, nbval, a killed run, the report."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
from conftest import BROWSER, ROOT, emonb

from emonb.predictions import read_predictions
from emonb.run import NOTEBOOKS
from emonb.settings import load_settings

# What design promises under "Outputs of make reproduce".
TABLES = ["main", "modules", "depth", "gates", "alpha", "instruction_tuning"]
TABLES += ["parameters", "complementarity", "claims", "cost", "calibration", "gate_trust", "departures"]
FIGURES = ["complementarity_venn", "complementarity_by_emotion", "agreement", "alpha_tradeoff", "depth"]
FIGURES += ["qualitative_examples", "training_curves", "complementarity_upset", "gate_weights", "gate_trust"]
FIGURES += ["calibration", "accuracy_cost", *(f"confusion_difference_{d}" for d in load_settings("smoke").datasets)]
MODELS = ["vlm_zero_shot", "vlm_tuned", "vlm_generated", "vit", "resnet", "vgg", "average_vlm_head"]
MODELS += ["head", "head_alpha0", "head_alpha1", "head_depth2", "head_depth5"]
MODELS += ["emovlmkd", "gate_bilinear", "gate_moe", "gate_dynamic", "gate_cross"]
DATASETS = load_settings("smoke").datasets


def records(out: Path) -> dict:
    """Notebooks' records of run.json."""
    return json.loads((out / "run.json").read_text())["notebooks"]


def test_smoke_run_makes_every_output(smoke_run):
    out = smoke_run.out
    expected = [f"tables/{i}.{e}" for i in TABLES for e in ("csv", "md", "tex")]
    expected += [f"figures/{i}.{e}" for i in FIGURES for e in ("png", "svg")]
    expected += [f"figures/confusion_{d}_emovlmkd.png" for d in DATASETS]
    expected += [f"predictions/{d}__{m}.parquet" for d in DATASETS for m in MODELS]
    expected += [f"notebooks/{n}.ipynb" for n in NOTEBOOKS] + [f"site/{n}.html" for n in NOTEBOOKS]
    expected += ["index.html", "run.json"]
    assert [path for path in expected if not (out / path).is_file()] == []
    assert all((out / "models" / d).is_dir() for d in DATASETS)
    assert {r["status"] for r in records(out).values()} == {"executed"}
    assert not list(out.rglob("*.pkl")) + list(out.rglob("*.bin"))


def test_log_of_a_run_that_is_no_terminal(smoke_run):
    lines = smoke_run.result.output.splitlines()
    assert [line for line in lines if re.match(r"\d/9 09_try_your_image \d+ s, \d+ MB$", line)]
    assert [line for line in lines if re.match(r" *\d+% .* gone, about .* left, 0\d_\w+ cell \d+/\d+", line)]
    assert not [line for line in lines if "Warning" in line or "Traceback" in line]


def test_tables_follow_from_the_prediction_files(smoke_run):
    table = pd.read_csv(smoke_run.out / "tables" / "main.csv")
    compared = 0
    for row in table[table["ours"].notna()].to_dict("records"):
        path = smoke_run.out / "predictions" / f"{row['dataset'].split()[0]}__{row['row']}.parquet"
        frame = pd.read_parquet(path).query("split == 'test'")
        assert row["ours"] == pytest.approx(100 * (frame["prediction"] == frame["label"]).mean(), abs=1e-6)
        assert row["ci_low"] <= row["ours"] <= row["ci_high"]
        assert row["seeds"] == frame["seed"].nunique()
        compared += 1
    assert compared >= 5 * len(DATASETS)


def test_class_order_is_the_taxonomys_everywhere(smoke_run):
    from emonb.emotions import taxonomy_for_dataset

    for path in (smoke_run.out / "predictions").glob("*.parquet"):
        labels = taxonomy_for_dataset(path.stem.split("__")[0]).labels
        assert tuple(read_predictions(path).attrs["labels"]) == labels, path.name


def test_second_run_is_up_to_date(smoke_run, tmp_path):
    shutil.copytree(smoke_run.out, tmp_path / "out")
    result = emonb("run", "--profile", "smoke", "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.output
    assert "9 notebooks up to date, 0 to run" in result.output
    assert result.seconds < 60


def test_killed_run_goes_on_and_equals_an_undisturbed_one(smoke_run, tmp_path):
    """Also: a run of one dataset with the same seed gives the predictions that it had among others."""
    dataset, out = "mini-flickr", tmp_path / "out"
    arguments = ["run", "--profile", "smoke", "--datasets", dataset, "--out", str(out)]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "emonb", *arguments], cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not list(out.glob("artifacts/teacher/.*.tmp")):  # in the middle of a training
            assert process.poll() is None, (tmp_path / "log.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    result = emonb(*arguments)
    assert result.returncode == 0, result.output
    assert "3 notebooks up to date, 6 to run" in result.output
    for path in sorted((smoke_run.out / "predictions").glob(f"{dataset}__*.parquet")):
        whole, killed = pd.read_parquet(path), pd.read_parquet(out / "predictions" / path.name)
        probabilities = [column for column in whole if column.startswith("p_")]
        np.testing.assert_allclose(whole[probabilities], killed[probabilities], atol=1e-5, err_msg=path.name)
        pd.testing.assert_frame_equal(whole.drop(columns=probabilities), killed.drop(columns=probabilities))
    tables = [pd.read_csv(o / "tables" / "main.csv") for o in (smoke_run.out, out)]
    rows = [t[t["dataset"].str.startswith(dataset)].set_index("row")["ours"] for t in tables]
    pd.testing.assert_series_equal(*rows)


def test_nbval(smoke_run, tmp_path):
    """Every cell runs; the deterministic ones (NBVAL_CHECK_OUTPUT) print what is committed."""
    shutil.copytree(smoke_run.out, tmp_path / "out")
    prepared = [tmp_path / f"{name}.ipynb" for name in NOTEBOOKS]
    for path in prepared:
        papermill.execute_notebook(
            str(ROOT / "notebooks" / path.name),
            str(path),
            {"profile": "smoke", "out": str(tmp_path / "out")},
            prepare_only=True,
        )
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--nbval-lax", "--nbval-current-env"]
    options += ["--nbval-cell-timeout=300", "--nbval-kernel-startup-timeout=120"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, prepared)],
        cwd=tmp_path,
        env={**os.environ, "EMONB_HEADLESS": "1", "HF_HUB_OFFLINE": "1"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    cells = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert cells > 9 * 5


def test_pages_ask_for_nothing_from_the_network(smoke_run):
    for page in (smoke_run.out / "index.html", *(smoke_run.out / "site").glob("*.html")):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?https?:", text), page.name


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_report_in_a_browser(smoke_run, chromium):
    page = chromium.new_page(viewport={"width": 390, "height": 844})
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((smoke_run.out / "index.html").as_uri())
    page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("table").count() >= len(TABLES)
    links = page.evaluate("[...document.links].map(a => a.getAttribute('href'))")
    page.close()
    assert [link for link in links if not link.startswith("#") and not (smoke_run.out / link).exists()] == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert errors == []
