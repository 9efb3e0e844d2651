"A real headless browser for tests, where one is installed."

import contextlib
import functools
import http.server
import shutil
import tempfile
import threading

import pytest

QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1400,1000",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)


def _first_installed(*names):
    "Return the path of the first of some commands that is installed, or None."
    paths = (shutil.which(name) for name in names)
    return next((path for path in paths if path), None)


@contextlib.contextmanager
def chromium():
    """Yield a Selenium driver of the installed Chromium, which finds this machine and no other.

    The test is skipped where there is no Chromium.
    """
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="Selenium is not installed: pip install -e '.[dev]'"
    )
    browser = _first_installed("chromium", "chromium-browser", "google-chrome")
    driver = _first_installed("chromedriver", "chromium.chromedriver")
    if not browser or not driver:
        install = "Debian, Ubuntu: apt install chromium chromium-driver"
        pytest.skip(f"no Chromium with ChromeDriver on this machine ({install})")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for argument in (*QUIET, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        try:
            found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        except Exception as e:
            pytest.skip(f"{browser} does not start here: {str(e).splitlines()[0]}")
        found.set_page_load_timeout(120)
        try:
            yield found
        finally:
            found.quit()


def width(driver, pixels, height=900):
    "Set the width of the page in pixels; below 700 it is shown as on a telephone."
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        dict(width=pixels, height=height, deviceScaleFactor=1, mobile=pixels < 700),
    )


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(folder):
    "Yield the address of a server for `folder`."
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Silent, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
