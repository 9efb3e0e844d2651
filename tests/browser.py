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


@contextlib.contextmanager
def chromium():
    "A Selenium driver of the installed Chromium, which finds this machine and no other; the test is skipped where there is none."
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="Selenium is not installed: pip install -e '.[dev]'"
    )
    browser, driver = (
        next(filter(None, map(shutil.which, names)), None)
        for names in (
            ("chromium", "chromium-browser", "google-chrome"),
            ("chromedriver", "chromium.chromedriver"),
        )
    )
    if not browser or not driver:
        pytest.skip(
            "no Chromium with ChromeDriver on this machine (Debian, Ubuntu: apt install chromium chromium-driver)"
        )
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
    "Give the page `pixels` of width, as on a telephone."
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        dict(width=pixels, height=height, deviceScaleFactor=1, mobile=pixels < 700),
    )


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(folder):
    "The address of `folder` on this machine."
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Silent, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
