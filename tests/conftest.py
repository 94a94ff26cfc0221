"""Shared fixtures: the project root, small runner folders, and one smoke run for all that need it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network; read when transformers is imported

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).parent / "notebooks"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(autouse=True)
def _from_the_project_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def notebook_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of numbered notebooks from the fixtures named."""

    def make(*names: str) -> Path:
        folder = tmp_path / "notebooks"
        folder.mkdir(exist_ok=True)
        for number, name in enumerate(names, 1):
            shutil.copy(FIXTURES / f"{name}.ipynb", folder / f"{number:02}_{name}.ipynb")
        return folder

    return make


@pytest.fixture(scope="module")
def chromium():
    """A real browser, for the tests of one file."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass(frozen=True)
class CommandResult:
    """A finished `python -m emonb ...`."""

    returncode: int
    output: str
    seconds: float


def emonb(*arguments: str, cwd: Path = ROOT, timeout: float = 600) -> CommandResult:
    """Run the command line as a user does."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "emonb", *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )
    return CommandResult(done.returncode, done.stdout, time.monotonic() - start)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, untrained_base: Path):
    """The tiny run, every stage of it, made once."""
    import torch
    from pipeline import DATASET, Tiny, make_tree, tiny_profile

    from emonb.run import open_run
    from emonb.store import STAGES

    folder, threads = tmp_path_factory.mktemp("tiny"), torch.get_num_threads()
    make_tree(folder / "images" / DATASET, {"train": 16, "val": 6, "test": 8})
    profile = tiny_profile(folder / "tiny.yaml", untrained_base)
    run = open_run(str(profile), images=str(folder / "images"), out=str(folder / "out"))
    torch.set_num_threads(1)
    for stage in STAGES:
        run.make(stage)
    torch.set_num_threads(threads)
    return Tiny(run, profile, folder / "images")


@dataclass(frozen=True)
class SmokeRun:
    """The one run of the smoke profile that the end-to-end tests share."""

    out: Path
    result: CommandResult
    survivors: list  # processes that lived on for 5 s when it was killed


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """`python -m emonb run --profile smoke`: killed in the middle of a training, then run again to its end."""
    import psutil

    out = tmp_path_factory.mktemp("smoke") / "out"
    command = ["run", "--profile", "smoke", "--out", str(out)]
    with (out.parent / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "emonb", *command], cwd=ROOT, stdout=log, stderr=log)
    deadline = time.monotonic() + 600
    while not list(out.glob("artifacts/teacher/.*.tmp")):
        assert process.poll() is None, (out.parent / "log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    survivors = psutil.wait_procs(family, timeout=5)[1]
    result = emonb(*command)
    assert result.returncode == 0, result.output
    return SmokeRun(out, result, survivors)


@pytest.fixture(scope="session")
def untrained_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the stand-in's architecture with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from emonb.files import resource_path

    base, folder = resource_path("base"), tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base)).save_pretrained(folder)
    for file in (*base.glob("*token*"), *base.glob("*processor*"), *base.glob("*template*")):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny steps: two threads on a busy machine only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
