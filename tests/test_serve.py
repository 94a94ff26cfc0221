"""From a real OpenAI-compatible server to a tuned VLM: `transformers serve` serves the stand-in over loopback."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
from annotating import read_lines, write_profile
from conftest import emonb

from emonb.standin import BASE_PATH

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None,
    reason="transformers serve needs fastapi and uvicorn: pip install 'transformers[serving]'",
)


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """`transformers serve stand-in` on a free port; yields its base URL."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "stand-in").symlink_to(BASE_PATH)  # the model's name is a path relative to the server
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", "stand-in", "--port", str(port), "--device", "cpu"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail((folder / "log").read_text()[-3000:])
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def test_from_the_server_into_notebook_03(tmp_path, serving, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", serving)
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    profile = write_profile(tmp_path, (24, 8, 8), model="stand-in", retries=0, min_words=3, timeout_s=60)
    out = tmp_path / "out"
    common = ("--profile", profile, "--out", str(out))
    asked = emonb("triplets", "--dataset", "mini-flickr", *common, "--annotator", "openai", "--concurrency", "4")
    assert asked.returncode == 0, asked.output
    triplets = read_lines(out / "triplets" / "mini-flickr.jsonl")
    images = {t["image_id"] for t in triplets}
    assert len(images) >= 8, asked.output
    # The server takes no schema and so small a model keeps to no headings: one question a request was left.
    assert {t["answer_format"] for t in triplets} == {"questions"}
    assert {t["asked_of"] for t in triplets} == {"stand-in"}
    assert any("the image shows" in t["response"] for t in triplets if t["kind"] == "conversation")
    assert not any("<|" in t["response"] for t in triplets)

    run = emonb("run", "--datasets", "mini-flickr", "--notebooks", "01,02,03", *common)
    assert run.returncode == 0, run.output
    shown = (out / "notebooks" / "02_triplets.ipynb").read_text()
    assert "a paid model (stand-in@main)" in shown
    assert "answers of a paid model, accepted and rejected" in shown
    pointer = json.loads((out / "artifacts/adapter/mini-flickr.json").read_text())
    adapter = json.loads((out / "artifacts/adapter" / pointer["key"] / "provenance.json").read_text())
    used = next(entry for entry in adapter["inputs"] if entry["stage"] == "triplets")
    snapshot = read_lines(out / "artifacts/triplets" / used["key"] / "triplets.jsonl")
    assert sorted(map(str, snapshot)) == sorted(map(str, triplets))  # the adapter learned from the server's answers
    tuned = pd.read_parquet(out / "predictions" / "mini-flickr__vlm_tuned.parquet")
    assert len(tuned) >= 8
    for page in ("index.html", "site/03_instruction_tuning.html"):
        assert "a paid model (stand-in@main)" in (out / page).read_text()
    assert str(tmp_path) not in (out / "triplets" / "mini-flickr.jsonl").read_text()
    assert str(os.environ["OPENAI_API_KEY"]) not in shown
