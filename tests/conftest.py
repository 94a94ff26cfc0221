"""Shared fixtures: the project root, small runner folders, one tiny run and one smoke run for all that need them."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

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


def emonb(*arguments: str, **options) -> subprocess.Popen:
    """Start the command line as a user does; `communicate()[0]` is all that it says."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT} | options
    return subprocess.Popen([sys.executable, "-m", "emonb", *arguments], **pipes)


def wait_for(found: Callable[[], object], process: subprocess.Popen) -> None:
    """Until `found()` is true while a process runs."""
    deadline = time.monotonic() + 600
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def killed(process: subprocess.Popen, kill: Callable[[], None] | None = None) -> list:
    """End a process, by default with kill -9; returns what of its family lives 5 s longer."""
    import psutil

    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    (kill or process.kill)()
    assert process.wait(60) != 0
    return psutil.wait_procs(family, timeout=5)[1]


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`python -m emonb run --profile smoke`: killed in the middle of a training, then run again to its end.

    `out`: the results; `said`: by the second run; `survivors`: processes that lived on for 5 s when it was killed.
    """
    out = tmp_path_factory.mktemp("smoke") / "out"
    command = ["run", "--profile", "smoke", "--out", str(out)]
    process = emonb(*command)
    wait_for(lambda: list(out.glob("artifacts/teacher/.*.tmp")), process)
    survivors = killed(process)
    process = emonb(*command)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return SimpleNamespace(out=out, said=said, survivors=survivors)


@pytest.fixture(scope="session")
def untrained_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the stand-in's architecture with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    base, folder = ROOT / "emonb" / "resources" / "base", tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base)).save_pretrained(folder)
    for file in (*base.glob("*token*"), *base.glob("*processor*"), *base.glob("*template*")):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, untrained_base: Path):
    """The tiny run, every stage of it, made once (see `pipeline`)."""
    from pipeline import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"), untrained_base)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny steps: two threads on a busy machine only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
