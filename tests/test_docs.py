"The documentation site: it builds without the network, and its pages work in a real browser."

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from browser import chromium, served, width
from conftest import ROOT
from test_workbook import NOTEBOOKS, name

pytestmark = pytest.mark.xdist_group("site")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The built site."
    folder = tmp_path_factory.mktemp("site")
    code = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import docs
sys.exit(docs.build(Path(sys.argv[3])))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, ROOT, ROOT / "tools", folder],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert not run.returncode, run.stdout[-2000:]
    assert "WARNING" not in run.stdout, run.stdout[-4000:]
    return folder / "html"


class Page(HTMLParser):
    "What a page links to and can be linked by."

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.loads = set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.ids |= {a.get("id"), a.get("name")} - {None}
        if tag == "a" and a.get("href"):
            self.links.add(a["href"])
        self.loads |= {
            a[k]
            for t, k in (("img", "src"), ("script", "src"), ("link", "href"))
            if tag == t and a.get(k)
        }


@pytest.fixture(scope="module")
def pages(site):
    return {str(p.relative_to(site)): Page(p.read_text()) for p in sorted(site.rglob("*.html"))}


def test_site(site, pages):
    texts = {p: (site / p).read_text() for p in pages}
    assert not {name(n) for n in NOTEBOOKS if name(n).replace(".ipynb", ".html") not in pages}
    assert not {
        p
        for p, text in texts.items()
        if re.search(r"""(src=|<link[^>]+stylesheet[^>]+href=)["']https?:""", text)
    }
    assert not {
        p
        for p, text in texts.items()
        if re.search(r"#\| *(export|hide|default_exp)\b", text) and not p.startswith("CONTRIBUTING")
    }
    assert (
        "Method.fold" in texts["api.html"]
        and "05_methods/18_hegraph_adapter.html#hegraphadapter" in pages["api.html"].links
    )
    assert any(
        re.search(r"/blob/main/vlmadapt/methods/base.py#L\d+$", link)
        for link in pages["05_methods/07_base.html"].links
    )


def test_no_dead_internal_link(site, pages):
    dead = []
    for page, found in pages.items():
        for link in found.links | found.loads:
            if urlsplit(link).scheme:
                continue
            path, anchor = urlsplit(urljoin(page, link)).path, unquote(urlsplit(link).fragment)
            path = unquote(path) + ("index.html" if path.endswith("/") else "")
            if (
                not (site / path).is_file()
                or anchor
                and path in pages
                and anchor not in pages[path].ids
            ):
                dead.append(f"{page}: {link}")
    assert not dead, dead[:20]
    assert sum(len(p.links) for p in pages.values()) > 1000


WAITING = "return document.readyState != 'complete' || [...document.images].some(i => !i.complete)"
BROKEN = "return [...document.images].filter(i => !i.naturalWidth).map(i => i.src.slice(0, 99))"
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


def wait(driver, until, seconds=30):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds, 0.1).until(until)


def test_every_page_in_a_browser(site, pages):
    "No error in the console, no image missing, nothing wider than the window, formulas drawn."
    trouble = []
    with served(site) as address, chromium() as driver:
        for page in pages:
            for pixels in (1400, 390):
                width(driver, pixels)
                if pixels == 1400:
                    driver.get(f"{address}/{page}")
                driver.execute_script(
                    "document.querySelectorAll('img').forEach(i => i.loading = 'eager')"
                )
                wait(driver, lambda d: not d.execute_script(WAITING))
                told = [
                    e["message"]
                    for e in driver.get_log("browser")
                    if e["level"] in ("SEVERE", "WARNING")
                ] + driver.execute_script(BROKEN)
                if (over := driver.execute_script(OVERFLOW)) > 0:
                    told.append(f"{over} pixels wider than {pixels}")
                if told:
                    trouble.append((page, told))
        driver.get(f"{address}/05_methods/18_hegraph_adapter.html")
        formulas = "[...document.querySelectorAll('math')]"
        wide = "m => m.getBoundingClientRect().width > 3"
        assert driver.execute_script(f"return {formulas}.filter({wide}).length") > 20
        assert not driver.execute_script(
            "return document.querySelectorAll('.katex-error, merror').length"
        )
        width(driver, 1400)
        driver.execute_script("document.body.dataset.theme = 'dark'")
        assert driver.execute_script(
            "return getComputedStyle(document.body).backgroundColor"
        ) not in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
        code = "[...document.querySelectorAll('article div.highlight')]"
        dark = "h => getComputedStyle(h).backgroundColor != 'rgb(255, 255, 255)'"
        assert driver.execute_script(f"return {code}.every({dark})")
    assert not trouble, trouble[:8]


QUERIES = {
    "HeGraphAdapter": "05_methods/18_hegraph_adapter",
    "install": "index",
    "cite": "index",
    "own images": "tutorials/own_images",
}


def test_search(site):
    "The page that answers a question is among the first three."
    hits = "return [...document.querySelectorAll('#search-results li a')].map(a => a.pathname)"
    with served(site) as address, chromium() as driver:
        for query, page in QUERIES.items():
            driver.get(f"{address}/search.html?q={query}")
            wait(driver, lambda d, p=page: any(p in hit for hit in d.execute_script(hits)[:3]))


@pytest.mark.skipif(find_spec("ziamath") is None, reason="ziamath has the font of formulas")
def test_formulas_have_their_font(site):
    "Bars, norms and brackets grow with what they hold, whatever fonts the machine has."
    loaded = (
        "return document.fonts.ready.then(() => document.fonts.check('16px Formulas', '\u2211'))"
    )
    with served(site) as address, chromium() as driver:
        driver.get(f"{address}/05_methods/29_anchored_kernel.html")
        assert driver.execute_script(loaded)
        family = "return getComputedStyle(document.querySelector('math')).fontFamily"
        assert driver.execute_script(family).startswith("Formulas")


def test_method_pages_begin_with_paper_and_use(site, pages):
    from site_pages import entries

    for info in entries():
        module = info.cls.__module__.rpartition(".")[2]
        (page,) = [p for p in pages if re.fullmatch(rf"05_methods/\d+_{module}\.html", p)]
        assert not info.arxiv or f"https://arxiv.org/abs/{info.arxiv}" in pages[page].links
        assert not info.source or info.source in pages[page].links
    text = (site / "05_methods/15_task_res.html").read_text()
    order = ["When to use it", "Best result", "from_folder", "<img", "The residual"]
    article = text[text.index("<article") :]
    assert all(part in article for part in order)
    assert article.index("When to use it") < article.index("The residual")


def test_zoo_is_sorted_by_numbers(site):
    column = "[...document.querySelectorAll('table.sortable tbody tr')].map(r => r.cells[2])"
    numbers = (
        f"return {column}.map(c => c.textContent).filter(t => t).map(t => +t.replace(/,/g, ''))"
    )
    with served(site) as address, chromium() as driver:
        driver.get(f"{address}/zoo.html")
        assert len(driver.find_elements("css selector", "table.sortable tbody tr")) > 40
        driver.find_elements("css selector", "table.sortable th button")[2].click()
        found = driver.execute_script(numbers)
        assert found == sorted(found) and found[-1] > 10**6


def test_no_docstring_of_torch(pages, site):
    "What the library does not describe itself is not described in the words of a base class."
    for page in pages:
        text = (site / page).read_text()
        assert "Define the computation performed at every call" not in text, page
        assert "Return the extra representation of the module" not in text, page
