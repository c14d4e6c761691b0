"""JupyterLab on this machine's loopback, driven in a headless Chromium: for tests and for the benchmark."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
#: WebGL without a graphics card; and no sandbox for root, as whom build machines run.
OPTIONS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-dev-shm-usage"]


class NoBrowser(RuntimeError):
    """There is no browser, or nothing to drive it with; the message says how to install it."""


def find_browser() -> str:
    """The path of Chromium or Chrome.

    Raises:
        NoBrowser: neither is there, or Playwright is not.
    """
    try:
        import playwright  # noqa: F401
    except ImportError as error:
        raise NoBrowser('Playwright is not installed: run `pip install -e ".[test]"`.') from error
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise NoBrowser(
        "no Chromium or Chrome on this machine: install it, for example with `apt-get install chromium` as root."
    )


@contextmanager
def jupyter_lab(folder: Path) -> Iterator[str]:
    """JupyterLab serving a folder, with settings of its own; gives the address with a place for the path, "{}"."""
    token = secrets.token_hex(16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        config = Path(home) / "config" / "labconfig"
        config.mkdir(parents=True)
        off = {"@jupyterlab/apputils-extension:announcements": True}
        (config / "page_config.json").write_text(json.dumps({"disabledExtensions": off}))
        whole = {"@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}}  # keep cells out of sight, too
        (config / "default_setting_overrides.json").write_text(json.dumps(whole))
        own = {f"JUPYTER_{kind.upper()}_DIR": str(Path(home) / kind) for kind in ("config", "data", "runtime")}
        own |= {f"JUPYTERLAB_{kind}_DIR": str(Path(home) / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")}
        options = [f"--ServerApp.root_dir={folder}", f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1"]
        options += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", "--no-browser", "--allow-root"]
        options += ["--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
        with open(Path(home) / "log", "w+b") as log:
            server = subprocess.Popen(
                [sys.executable, "-m", "jupyterlab", *options],
                env={**os.environ, **own, "IPYTHONDIR": str(Path(home) / "ipython"), "JUPYTER_PREFER_ENV_PATH": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                _wait(f"http://127.0.0.1:{port}/api/status?token={token}", server, Path(home) / "log")
                yield f"http://127.0.0.1:{port}/doc/tree/{{}}?token={token}&reset"
            finally:
                server.terminate()
                try:
                    server.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()


def _wait(address: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(errors='replace')[-2000:]}")


@contextmanager
def page_of(width: int = 1400, height: int = 1000) -> Iterator[tuple[Any, list[str]]]:
    """A page of a headless browser, and the errors of its console as they come."""
    path = find_browser()
    from playwright.sync_api import sync_playwright

    options = [*OPTIONS, *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(60_000)
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            yield page, errors
        finally:
            browser.close()


def write_notebook(path: Path, cells: Sequence[str]) -> Path:
    """A notebook of code cells that has not been run."""
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in cells], metadata=metadata), path)
    return path


def open_notebook(page: Any, address: str, name: str) -> None:
    """Open a notebook in JupyterLab and wait for its kernel."""
    page.goto(address.format(name))
    # The indicator says idle before there is a kernel; the status bar does not.
    page.wait_for_function("() => /ipykernel\\) \\| Idle/.test(document.body.innerText)", timeout=120_000)


def open_and_run(page: Any, address: str, name: str, cells: int | None = None) -> None:
    """Open a notebook in JupyterLab and run its first cells, by default all."""
    open_notebook(page, address, name)
    if cells is None:
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    for _ in range(cells or 0):
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-cell-and-select-next')")
    page.wait_for_function(
        """(count) => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]
            .slice(0, count ?? undefined).every((prompt) => /\\[\\d+\\]/.test(prompt.innerText))""",
        arg=cells,
        timeout=240_000,
    )
