"""A browser, pages that must not ask for anything, and a JupyterLab server, for the tests that need real ones."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress

from conftest import wait_for

from emonb.settings import project_root


@contextmanager
def jupyterlab(folder, *options):
    """A server with settings of its own for one folder; yields its address. What it says is in `lab.log` beside."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True",
        "--expose-app-in-browser", "--LabApp.extension_manager=readonly", f"--ServerApp.root_dir={folder}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", *options,
    ]  # fmt: skip
    private = {f"JUPYTER_{kind}_DIR": str(folder.parent / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    private |= {"JUPYTERLAB_WORKSPACES_DIR": str(folder.parent / "w"), "IPYTHONDIR": str(folder.parent / "ipython")}
    environment = {**os.environ, **private, "PYTHONPATH": str(project_root())}
    with (folder.parent / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"

    def answers():
        with suppress(OSError), urllib.request.urlopen(f"{address}/api/status", timeout=5) as answer:
            return answer.status == 200

    try:
        wait_for(answers, server)
        yield address
    finally:
        server.kill()  # it has nothing to keep, and a polite end can wait for open connections
        server.wait(30)


@contextmanager
def browser_page(chromium):
    """A page that must not ask for anything outside this machine."""
    page, outside = chromium.new_page(viewport={"width": 1400, "height": 1000}), []
    page.set_default_timeout(15_000)
    inside = re.compile(r"(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:|about:")
    page.on("request", lambda request: None if inside.match(request.url) else outside.append(request.url))
    yield page
    page.close()
    assert outside == []


@contextmanager
def pages_from_disk(chromium):
    """Opens files with options of a context; at the end: they asked for nothing but files, no error, no dialog."""
    contexts, bad = [], []

    def open_file(path, **options):
        contexts.append(chromium.new_context(**{"viewport": {"width": 1200, "height": 900}} | options))
        contexts[-1].set_default_timeout(5000)
        page, inside = contexts[-1].new_page(), ("file:", "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(inside) else bad.append(request.url))
        page.on("console", lambda message: bad.append(message.text))
        page.on("pageerror", lambda error: bad.append(str(error)))
        page.on("dialog", lambda dialog: (bad.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert bad == []


def open_notebook(page, address, name, *, kernel=True):
    """A notebook in a workspace of its own, with nothing in front of it."""
    page.goto(f"{address}/lab/workspaces/{name}/tree/{name}.ipynb?reset")
    page.locator("#jupyterlab-splash").wait_for(state="detached")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    if not kernel:  # JupyterLab asks which one to start instead
        page.locator(".jp-Dialog .jp-mod-reject").first.click()
        page.locator(".jp-Dialog").wait_for(state="detached")


def run_cell(page):
    """Run the first cell by its keys until it is done; again where JupyterLab, still connecting, dropped it."""
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(state="attached")
    prompt, deadline = page.locator(".jp-InputPrompt").first, time.monotonic() + 120
    while not re.fullmatch(r"\[\d+\]:", prompt.inner_text()):
        assert time.monotonic() < deadline, "the cell does not run"
        if prompt.inner_text() == "[ ]:":
            page.locator(".jp-CodeCell .cm-content").first.click()
            page.keyboard.press("Control+Enter")
        page.wait_for_timeout(300)
