"""A browser, pages that must not ask for anything, and a JupyterLab server, for the tests that need real ones."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

from conftest import BROWSER

from emonb.settings import project_root


@contextmanager
def jupyterlab(folder, *options):
    """A server with settings of its own for one folder; yields its address."""
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
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
                break
            except OSError:
                said = (folder.parent / "lab.log").read_text()[-2000:]
                assert server.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.2)
        yield address
    finally:
        server.kill()  # it has nothing to keep, and a polite end can wait for open connections
        server.wait(30)


@contextmanager
def browser_page():
    """A page, and the list of its requests that leave the machine."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page, outside = chromium.new_page(viewport={"width": 1400, "height": 1000}), []
        page.set_default_timeout(15_000)
        inside = re.compile(r"(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:|about:")
        page.on("request", lambda request: None if inside.match(request.url) else outside.append(request.url))
        yield page, outside
        chromium.close()


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
