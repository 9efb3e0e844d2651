"The widgets of the first tutorial in a real JupyterLab with a real browser: choices change the picture."

import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from browser import chromium
from conftest import ROOT
from test_docs import wait

RUN = "const s = jupyterapp.shell.currentWidget; jupyterapp.commands.execute('notebook:run-all-cells'); return s.title.label"
PICTURE = "const e = document.querySelector('.widget-output img, .jupyter-widgets-output-area img'); return e && e.src.length + e.src.slice(-3000)"
ERRORS = """return [...document.querySelectorAll('[data-mime-type="application/vnd.jupyter.stderr"], [data-mime-type="application/vnd.jupyter.error"]')].map(e => e.textContent.slice(0, 200))"""
SELECT = """const found = [...document.querySelectorAll('.widget-dropdown')].find(w => w.textContent.startsWith(arguments[0])).querySelector('select');
found.value = arguments[1]; found.dispatchEvent(new Event('change', {bubbles: true}));"""


@pytest.fixture
def lab(tmp_path):
    "The address of a JupyterLab as `make lab` starts it, on the imports and the widgets of the tutorial; its other cells are run as notebooks are."
    (tmp_path / "nbs/tutorials").mkdir(parents=True)
    nb = nbformat.read(ROOT / "nbs/tutorials/explore.ipynb", as_version=4)
    nb.cells = [
        c
        for c in nb.cells
        if c.cell_type == "code"
        and (
            "import explorer" in c.source
            or "import PICTURES" in c.source
            or c.source == "explorer()"
        )
    ]
    assert len(nb.cells) == 2
    nbformat.write(nb, tmp_path / "nbs/tutorials/explore.ipynb")
    page = tmp_path / "config/labconfig/page_config.json"
    page.parent.mkdir(parents=True)
    page.write_text(
        '{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}'
    )
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | {
        "PYTHONPATH": str(ROOT),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    token = secrets.token_hex()
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--notebook-dir={tmp_path}",
        "--no-browser",
        "--ip=127.0.0.1",
        "--port=0",
        "--allow-root",
        f"--IdentityProvider.token={token}",
        "--ServerApp.password=",
        "--LabApp.expose_app_in_browser=True",
    ]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=tmp_path
        )
    try:
        for _ in range(1200):
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/lab", (tmp_path / "log").read_text()):
                break
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{found[1]}/lab/tree/nbs/tutorials/explore.ipynb?reset&token={token}"
    finally:
        server.terminate()
        server.wait(20)


def test_widgets_change_the_picture(lab, tmp_path):
    shot = Path(os.environ.get("VLMADAPT_SHOTS", tmp_path)) / "explorer.png"
    with chromium() as driver:
        driver.get(lab)
        script = lambda code, *args: driver.execute_script(code, *args)
        settled = lambda code, seconds=200, other_than=None: wait(
            driver, lambda d: (found := script(code)) and found != other_than and found, seconds
        )
        try:
            settled(
                "return window.jupyterapp && jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'"
            )
            assert script(RUN) == "explore.ipynb"
            first = settled(PICTURE)
            script(SELECT, "dataset", "mini-shapes")
            second = settled(PICTURE, other_than=first)
            script(SELECT, "picture", "graph around a class")
            third = settled(PICTURE, other_than=second)
            script(SELECT, "class", "star")
            fourth = settled(PICTURE, other_than=third)
        finally:
            driver.save_screenshot(str(shot))
            print(shot)
        assert len({first, second, third, fourth}) == 4
        assert not script(ERRORS)
