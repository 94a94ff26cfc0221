"""From a real OpenAI-compatible server to triplets: `transformers serve` serves the stand-in over loopback."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from annotating import Asking
from conftest import wait_for

from emonb.files import resource_path
from emonb.triplets import read_triplets, source_note

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None,
    reason="transformers serve needs fastapi and uvicorn: pip install 'transformers[serving]'",
)


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """`transformers serve stand-in` on a free port; yields its base URL."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "stand-in").symlink_to(resource_path("base"))  # the model's name is a path relative to the server
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    with (folder / "log").open("w") as log:
        command = [program, "serve", "stand-in", "--port", str(port), "--device", "cpu"]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)

    def answers() -> object:
        with suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)

    try:
        wait_for(answers, process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def test_triplets_from_a_server_of_one_s_own(tmp_path, serving, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", serving)
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    listed = json.load(urllib.request.urlopen(f"{serving}/models"))["data"]
    asking = Asking(tmp_path, 18)
    terms = {"retries": 0, "min_words": 3, "near_duplicate": 1.0, "timeout_s": 60, "price": "none"}
    assert asking.ask(model="stand-in", concurrency=2, **terms) == ""
    assert len(asking.accepted) >= 3, asking.said
    # The server takes no schema and so small a model keeps to no headings: one question a request was left.
    assert {t["answer_format"] for t in asking.accepted} == {"questions"}
    assert {t["asked_of"] for t in asking.accepted} == {"stand-in"}
    assert {t["model"].split("@")[0] for t in asking.accepted} <= {about["id"].split("@")[0] for about in listed}
    assert not any("<|" in text for text in read_triplets(asking.path)["response"])
    assert "a paid model (stand-in" in source_note(tmp_path, ["small"])
    assert str(tmp_path) not in asking.path.read_text()
