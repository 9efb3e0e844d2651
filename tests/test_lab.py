"The widgets of the first tutorial in a real JupyterLab with a real browser."

import json
import os
import re
import secrets
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from browser import chromium
from conftest import ROOT
from test_docs import wait

TUTORIAL = "nbs/tutorials/explore.ipynb"
IS_IDLE = """
const widget = window.jupyterapp && jupyterapp.shell.currentWidget;
return widget?.sessionContext?.session?.kernel?.status == 'idle';
"""
RUN_ALL = """
const shell = jupyterapp.shell.currentWidget;
jupyterapp.commands.execute('notebook:run-all-cells');
return shell.title.label;
"""
PICTURE = """
const image = document.querySelector(
  '.widget-output img, .jupyter-widgets-output-area img');
return image && image.src.length + image.src.slice(-3000);
"""
ERRORS = """
const outputs = document.querySelectorAll(
  '[data-mime-type="application/vnd.jupyter.stderr"],' +
  '[data-mime-type="application/vnd.jupyter.error"]');
return [...outputs].map(output => output.textContent.slice(0, 200));
"""
SELECT = """
const dropdowns = [...document.querySelectorAll('.widget-dropdown')];
const found = dropdowns.find(widget => widget.textContent.startsWith(arguments[0]));
const select = found.querySelector('select');
select.value = arguments[1];
select.dispatchEvent(new Event('change', {bubbles: true}));
"""


def write_tutorial(folder):
    "Write the imports and the widgets of the tutorial; its other cells run with the notebooks."
    notebook = nbformat.read(ROOT / TUTORIAL, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    imports = [
        cell
        for cell in code
        if "import explorer" in cell.source or "import PICTURES" in cell.source
    ]
    widgets = [cell for cell in code if cell.source == "explorer()"]
    assert len(imports) == len(widgets) == 1
    notebook.cells = imports + widgets
    (folder / TUTORIAL).parent.mkdir(parents=True)
    nbformat.write(notebook, folder / TUTORIAL)


def write_configuration(folder):
    "Switch off JupyterLab's question about news."
    page = folder / "config/labconfig/page_config.json"
    page.parent.mkdir(parents=True)
    disabled = {"@jupyterlab/apputils-extension:announcements": True}
    page.write_text(json.dumps({"disabledExtensions": disabled}))


@contextmanager
def jupyterlab(folder, token):
    "Start a JupyterLab in `folder` as `make lab` does; yield the process and its log."
    environment = {name: v for name, v in os.environ.items() if name != "MPLBACKEND"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--notebook-dir={folder}",
        "--no-browser",
        "--ip=127.0.0.1",
        "--port=0",
        "--allow-root",
        f"--IdentityProvider.token={token}",
        "--ServerApp.password=",
        "--LabApp.expose_app_in_browser=True",
    ]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )
    try:
        yield server, folder / "log"
    finally:
        server.terminate()
        server.wait(20)


def port_of(server, log):
    "Wait for the line of the log that names the port."
    for _ in range(1200):
        found = re.search(r"http://127\.0\.0\.1:(\d+)/lab", log.read_text())
        if found:
            return found[1]
        assert server.poll() is None, log.read_text()[-2000:]
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab does not start: {log.read_text()[-2000:]}")


@pytest.fixture
def lab(tmp_path):
    "The address of the tutorial in a JupyterLab."
    write_tutorial(tmp_path)
    write_configuration(tmp_path)
    token = secrets.token_hex()
    with jupyterlab(tmp_path, token) as (server, log):
        port = port_of(server, log)
        yield f"http://127.0.0.1:{port}/lab/tree/{TUTORIAL}?reset&token={token}"


def settled(driver, script, other_than=None, seconds=200):
    "Wait until `script` returns something, other than before; return it."

    def changed(driver):
        found = driver.execute_script(script)
        return found if found != other_than else None

    return wait(driver, changed, seconds)


def test_widgets_change_the_picture(lab, tmp_path):
    screenshot = Path(os.environ.get("VLMADAPT_SHOTS", tmp_path)) / "explorer.png"
    choices = [
        ("dataset", "mini-shapes"),
        ("picture", "graph around a class"),
        ("class", "star"),
    ]
    with chromium() as driver:
        driver.get(lab)
        try:
            settled(driver, IS_IDLE)
            assert driver.execute_script(RUN_ALL) == "explore.ipynb"
            pictures = [settled(driver, PICTURE)]
            for label, value in choices:
                driver.execute_script(SELECT, label, value)
                pictures.append(settled(driver, PICTURE, other_than=pictures[-1]))
        finally:
            driver.save_screenshot(str(screenshot))
            print(screenshot)
        assert len(set(pictures)) == 4
        assert not driver.execute_script(ERRORS)
