"Names that are commands in HTML, LaTeX, Markdown, figures, CSV; damaged results; full disks."

import copy
import csv
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import subprocess
import warnings
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from browser import chromium, served
from conftest import run_command
from matplotlib.cbook import is_math_text

from vlmadapt.core.files import CannotWrite
from vlmadapt.core.markup import (
    escape_figure,
    escape_frame,
    escape_html,
    escape_latex,
    escape_markdown,
    safe_style,
)
from vlmadapt.grid.params import read_runs
from vlmadapt.grid.report import write_html
from vlmadapt.grid.results import read_result_file, read_results, read_run, read_runs_below
from vlmadapt.grid.runs import execute
from vlmadapt.grid.schema import Result, to_record
from vlmadapt.grid.store import ResultStore
from vlmadapt.methods import display_name
from vlmadapt.reporting.checks import collapsed, in_words, unfinished
from vlmadapt.reporting.explore import Explorer
from vlmadapt.reporting.figures import save_figure, shot_panels
from vlmadapt.reporting.plots import gain_bars, node_maps, point_lines
from vlmadapt.reporting.published import published
from vlmadapt.reporting.reproduction import show_beside
from vlmadapt.reporting.tables import dataset_table, point_table, save_frame, write_csv

EVIL = [
    "<img src=x onerror=alert(1)>",
    '<script>document.title="pwned"</script>',
    r"\input{x}",
    "a|b",
    "$x_1$",
    "100 % & #1_{}~^",
    "line\nbreak",
    "=cmd()",
    r"\(x\) [2pt] **bold** `code` a--b <u>",
]
METHODS = ["ZeroShot", *(f"TipAdapter ({name})" for name in EVIL)]
NAMES = [display_name(label) for label in METHODS]


def one_line(text):
    return " ".join(text.split())


def write_results(run, results):
    "Write the `result.json` of a run."
    run.mkdir(parents=True, exist_ok=True)
    records = [to_record(result) for result in results]
    (run / "result.json").write_text(json.dumps({"results": records, "failed": {}}))


@pytest.fixture(scope="module")
def evil_grid(tmp_path_factory):
    "Results of made-up runs whose datasets and variants have names that are commands."
    folder = tmp_path_factory.mktemp("grid")
    shared = {"shots": 4, "backbone": EVIL[1], "prompts": "template", "metric": "accuracy"}
    for number, dataset in enumerate((EVIL[0], EVIL[3] + EVIL[4], EVIL[6])):
        made = []
        for i, variant in enumerate(["", *EVIL]):
            method = {"method": "TipAdapter" if variant else "ZeroShot", "variant": variant}
            for seed in (1, 2):
                own = {**method, "seed": seed, "value": 50.0 + i + seed / 2, "n": 100, "key": "k"}
                where = {"dataset": dataset, "evaluated_on": dataset}
                settings = {"views": 1, "trials": 0}
                made.append(Result(**shared, **where, **own, settings=settings))
        write_results(folder / f"run{number}", made)
    return folder


@pytest.fixture(scope="module")
def results(evil_grid):
    return read_results(evil_grid)


@pytest.fixture(scope="module")
def table(results):
    return dataset_table(results, shots=4)


@pytest.fixture(scope="module")
def report(table, results, tmp_path_factory):
    "The files that a report saves."
    folder = tmp_path_factory.mktemp("report")
    table.save(folder)
    save_frame(table.mean, folder, "frame", floatfmt=".1f")
    write_csv(results, folder / "results.csv", index=False)
    return folder


class Page(HTMLParser):
    "Tags and text of a page."

    def __init__(self, text):
        super().__init__()
        self.tags = set()
        self.texts = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)

    def handle_data(self, data):
        self.texts.append(data)


# HTML


TABLE_TAGS = {"style", "table", "caption", "thead", "tbody", "tr", "th", "td", "br"}
TABLE_TAGS |= {"details", "summary"}


@pytest.mark.parametrize("kind", ["table", "frame", "points", "published"])
def test_tables_hold_no_tag_of_a_name(kind, table, results):
    if kind == "table":
        html = table._repr_html_()
    elif kind == "frame":
        frame = pd.DataFrame({EVIL[0]: EVIL[:2]}, index=pd.Index(EVIL[2:4], name=EVIL[1]))
        html = safe_style(frame).format(na_rep="").to_html()
    elif kind == "points":
        points = pd.DataFrame(dict(parameter=EVIL[:2], value=EVIL[2:4], mean=[1.0, 2.0]))
        html = point_table(points, {EVIL[1]: EVIL[0]}).to_html()
    else:
        one = published("HeGraphAdapter", "Table 2").head(1)
        line = one.assign(
            ours="", method=EVIL[0], dataset=EVIL[1], note=EVIL[0], mark="not run",
            published=one["value"], mean=np.nan, sd=np.nan, seeds=pd.NA,
        )  # fmt: skip
        html = show_beside(line).to_html()
    page = Page(html)
    assert page.tags <= TABLE_TAGS
    assert "tex2jax_ignore" in html
    assert EVIL[0] in " ".join(page.texts)


def notebook_of(table, lines, path):
    "An executed notebook with a table, a list and output that nothing has escaped."
    output = nbformat.v4.new_output
    outputs = [
        output("display_data", {"text/html": table._repr_html_()}),
        output("display_data", {"text/markdown": "\n".join(f"* {line}" for line in lines)}),
        output("display_data", {"text/html": pd.DataFrame({"a": EVIL})._repr_html_()}),
        output("stream", name="stdout", text="\n".join(EVIL)),
        output("display_data", {"text/html": f"<p id='raw'>raw {EVIL[0]} {EVIL[1]}</p>"}),
    ]
    cell = nbformat.v4.new_code_cell("", outputs=outputs)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    return path


READ = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"


def test_pages_in_a_browser(table, results, report, tmp_path):
    "No script runs, not even in an output that nothing has escaped; names stay as they are."
    lines = [escape_markdown(line) for line in in_words(results, 4)]
    write_html(notebook_of(table, lines, tmp_path / "page.ipynb"), tmp_path / "page.html")
    shutil.copy(report / "table.html", tmp_path / "table.html")
    with served(tmp_path) as address, chromium() as driver:
        for page in ("table.html", "page.html"):
            driver.get(f"{address}/{page}")
            assert driver.title == ("page" if page == "page.html" else "")
            heads = [one_line(text) for text in driver.execute_script(READ, "th")]
            assert {one_line(name) for name in [*NAMES, *table.mean.columns]} <= set(heads)
        listed = [one_line(text) for text in driver.execute_script(READ, "li")]
        assert listed == [one_line(line) for line in in_words(results, 4)]
        assert driver.execute_script(READ, "#raw")
        assert one_line("\n".join(EVIL)) in one_line(driver.execute_script(READ, "pre")[0])
        folder = os.environ.get("VLMADAPT_SHOTS")
        if folder:
            driver.save_screenshot(f"{folder}/page.png")


@pytest.mark.slow
def test_whole_chain_in_a_browser(tmp_path, monkeypatch):
    "A real run with variants of such names, its real report, and the page in a real browser."
    names = (EVIL[0], EVIL[1], f"{EVIL[2]} {EVIL[3]} {EVIL[4]}")
    labels = [f"TipAdapter ({name})" for name in names]
    variants = []
    for i, name in enumerate(names):
        given = {"hyper_parameters": {"alpha": 1.0 + i}}
        variants.append({"method": "TipAdapter", "variant": name, **given})
    monkeypatch.chdir(tmp_path)
    parameters = dict(methods=["ZeroShot", *variants], seeds=[1], trials=0)
    Path("evil.yml").write_text(json.dumps(dict(experiment="few_shot", parameters=parameters)))
    for run in read_runs("evil.yml"):
        assert execute(run) is None
    assert run_command("report", "evil") == 0
    page = tmp_path / "outputs" / "evil" / "report"
    with served(page) as address, chromium() as driver:
        driver.get(f"{address}/report.html")
        assert driver.title == "report"
        heads = {one_line(text) for text in driver.execute_script(READ, "th")}
        assert {one_line(display_name(label)) for label in labels} <= heads
        if os.environ.get("VLMADAPT_SHOTS"):
            driver.save_screenshot(f"{os.environ['VLMADAPT_SHOTS']}/report.png")


@pytest.mark.parametrize("error", [True, False])
def test_explorer_shows_names_as_text(error):
    def view(*names):
        if error:
            raise ValueError(EVIL[0])
        backbone = SimpleNamespace(name=EVIL[1])
        return SimpleNamespace(dataset=SimpleNamespace(name=EVIL[0]), backbone=backbone, images=[0])

    explorer = object.__new__(Explorer)
    names = ("dataset", "backbone", "picture", "image", "shots")
    explorer.controls = {name: SimpleNamespace(value=0) for name in names}
    explorer.view = view
    explorer.state = SimpleNamespace(value="")
    explorer.out = SimpleNamespace(outputs=(), append_display_data=lambda made: None)
    patch = pytest.MonkeyPatch()
    patch.setattr("vlmadapt.reporting.explore.picture", lambda name, view, **chosen: pd.DataFrame())
    explorer.draw()
    patch.undo()
    page = Page(explorer.state.value)
    assert page.tags == {"b"} and EVIL[0] in "".join(page.texts)


# LaTeX


OURS = {
    "begin",
    "centering",
    "caption",
    "toprule",
    "midrule",
    "bottomrule",
    "end",
    "textbf",
    "underline",
    "pm",
    "dagger",
    "textbackslash",
    "textbar",
    "textless",
    "textgreater",
    "textasciitilde",
    "textasciicircum",
    "textasciigrave",
    "textquotedbl",
}
BACK = {
    r"\textbackslash{}": "\\", r"\textasciicircum{}": "^", r"\textasciitilde{}": "~",
    r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|", r"\textquotedbl{}": '"',
    r"\textasciigrave{}": "`",
    "{[}": "[", "{]}": "]", "{*}": "*", "{}": "",
}  # fmt: skip


def unescape_latex(text):
    special = "|".join(map(re.escape, BACK))
    return re.sub(rf"{special}|\\([{{}}$&#%_])", lambda m: m[1] or BACK[m[0]], text)


@pytest.mark.parametrize("name", [*EVIL, "[a]", "*a", "--", "~^`\"'"])
def test_latex_text_is_read_back(name):
    assert unescape_latex(escape_latex(name)) == one_line(name)


def test_latex_has_no_commands_but_its_own(report, table):
    text = (report / "table.tex").read_text()
    assert set(re.findall(r"\\([A-Za-z]+)", text)) <= OURS
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert all(len(re.split(r"(?<!\\)&", line)) == 5 for line in lines)
    names = [unescape_latex(re.split(r" (?<!\\)& ", line)[0]) for line in lines[1:]]
    assert names == [one_line(display_name(method)) for method in table.mean.index]
    assert not re.search(r"(?<!\\)%", text)


def test_latex_compiles(report, tmp_path):
    program = shutil.which("pdflatex") or shutil.which("tectonic")
    if program is None:
        pytest.skip("no TeX on this machine")
    head = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs,textcomp}"
    body = (report / "table.tex").read_text().replace(r"\input{x}", "")
    (tmp_path / "a.tex").write_text(rf"{head}\begin{{document}}{body}\end{{document}}")
    command = [program, "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert made.returncode == 0, made.stdout[-1500:]
    assert (tmp_path / "a.pdf").exists()


# Markdown


def cells_of(text):
    "The cells of the tables in a Markdown text, and the tags in them."
    markdown_it = pytest.importorskip("markdown_it", reason="pip install -e '.[docs]'")
    rows, tags = [], set()
    tokens = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    for before, token in itertools.pairwise(tokens):
        if before.type == "tr_open":
            rows.append([])
        if before.type in ("th_open", "td_open"):
            parts = token.children
            tags |= {part.content for part in parts if part.type == "html_inline"}
            tags |= {
                part.type
                for part in parts
                if part.type not in ("text", "html_inline", "text_special")
            }
            rows[-1].append("".join(part.content for part in parts if part.type != "html_inline"))
    return rows, tags


def test_markdown_cells_are_the_names(report, table):
    rows, tags = cells_of((report / "table.md").read_text())
    assert [one_line(row[0]) for row in rows[1:]] == [one_line(name) for name in NAMES]
    assert [one_line(cell) for cell in rows[0][1:]] == [one_line(c) for c in table.mean.columns]
    assert {len(row) for row in rows} == {5}
    assert tags <= {"<span>", "</span>", "<u>", "</u>", "strong_open", "strong_close"}
    rows, tags = cells_of((report / "frame.md").read_text())
    assert [one_line(row[0]) for row in rows[1:]] == [one_line(name) for name in NAMES]
    assert tags <= {"<span>", "</span>"}


@pytest.mark.parametrize(
    "name", [*EVIL, "# a", "1. a", "- a", "---", "===", "[a](b)", "~~a~~", "_a_", "&lt;"]
)
def test_markdown_in_jupyter_is_the_name(name):
    "Jupyter's own converter takes dollars and backslashes for formulas."
    from nbconvert.filters import markdown2html

    page = Page(markdown2html(escape_markdown(name)))
    assert one_line("".join(page.texts)) == one_line(name)
    assert page.tags <= {"p", "span"}


# Spreadsheets and figures


def test_csv_holds_no_formula(report, tmp_path):
    evil = pd.DataFrame({"=a": ["=cmd()", "+1+cmd", "@x", "-1.5", "\t=x", "a=1"], "n": [-1.0] * 6})
    write_csv(evil, tmp_path / "evil.csv", index=False)
    for path in (report / "table.csv", report / "results.csv", tmp_path / "evil.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            for cell in (cell for row in csv.reader(file) for cell in row):
                formula = cell.lstrip().startswith(("=", "+", "-", "@"))
                assert not formula or math.isfinite(float(cell))
    back = pd.read_csv(tmp_path / "evil.csv")
    assert back.columns.tolist() == ["'=a", "n"]
    assert back["'=a"].tolist() == ["'=cmd()", "'+1+cmd", "'@x", "-1.5", "'\t=x", "a=1"]


def texts_of(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


def figures_of(results):
    more = results.assign(shots=8, value=results["value"] + 1)
    yield shot_panels(pd.concat([results, more]), METHODS)
    yield gain_bars(results, 4)
    varied = results[results["variant"] == EVIL[0]].assign(point=f"{EVIL[4]}=1")
    yield point_lines(varied, {EVIL[4]: EVIL[4]})
    points = np.random.default_rng(0).random((3, 2))
    yield node_maps(points, points, points, [0, 1, 2], [EVIL[4], EVIL[2], "$\\frac$"])


def test_figures_take_no_name_for_a_formula(results, tmp_path):
    shown = set()
    for number, figure in enumerate(figures_of(results)):
        save_figure(figure, tmp_path, f"../{EVIL[2]}{number}")
        texts = texts_of(figure)
        assert not any(is_math_text(text) and "x_1" in text for text in texts)
        shown.update(texts)
        plt.close(figure)
    assert escape_figure(NAMES[5]) in shown
    assert not list(tmp_path.parent.glob("*.png")) and len(list(tmp_path.glob("*.png"))) == 4


def test_numbers_and_plain_names_stay_as_they_are():
    frame = pd.DataFrame(
        {"peak_memory_mb": [1.5, None], "of": ["TipAdapter (x)", None]}, index=[1, 2]
    )
    for escape in (escape_html, escape_markdown):
        pd.testing.assert_frame_equal(escape_frame(frame, escape), frame, check_dtype=False)


# Damaged result files


SETTINGS = {"dataset": "mini-digits", "shots": 4, "backbone": "mini", "prompts": "template"}
REQUESTED = ["ZeroShot", "TipAdapter"]


def with_new_digest(record):
    "The record with the digest of its content, if it is a result at all."
    record = {name: value for name, value in record.items() if name != "digest"}
    try:
        return to_record(Result(**record))
    except (ValueError, TypeError):
        return {**record, "digest": "0" * 64}


@pytest.fixture
def run(tmp_path):
    "A run with four results, in `result.json` and in files of their own."
    folder = tmp_path / "grid" / "run"
    store = ResultStore(folder, SETTINGS, REQUESTED, [1, 2])
    for entry in store.entries:
        for seed in (1, 2):
            measured = dict(
                metric="accuracy", value=50.0 + seed, n=4, per_class=[25.0, 75.0],
                predictions="0 1 1 0", correct="0110", trainable_parameters=5,
                cost=dict(fit_s=1.0), provenance=dict(split="s"),
                environment=dict(versions=dict(torch="2")),
            )  # fmt: skip
            store.save(entry, seed, measured)
    store.collect()
    (folder / "params.yml").write_text(yaml.safe_dump({"methods": REQUESTED, "seeds": [1, 2]}))
    return folder


def is_right(result):
    "What a reader of results may rely on, checked a second time."
    shares = [share for share in result.per_class or () if share is not None]
    return (
        0 <= result.value <= 100
        and result.method != ""
        and result.seed >= 0
        and all(0 <= share <= 100 for share in shares)
        and result.digest == to_record(result)["digest"]
    )


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


WRONG = [
    None,
    True,
    -1,
    1000.0,
    math.nan,
    math.inf,
    "1",
    "",
    [],
    {},
    [[1]],
    {"a": 1},
    10**300,
    "x" * 10**5,
]


def places(value, path=()):
    "Every place in a nested value."
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutate(value, random):
    "A copy of a JSON value with one place missing or wrong, and sometimes a new digest."
    value = copy.deepcopy(value)
    path = random.choice(list(places(value)))
    if not path:
        return random.choice(WRONG)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if random.random() < 0.3:
        del inner[path[-1]]
    elif random.random() < 0.1:
        inner[path[-1]] = deep(random.choice([300, 5000]))
    else:
        inner[path[-1]] = random.choice(WRONG)
    records = value.get("results") if "results" in value else [value]
    if random.random() < 0.5 and isinstance(records, list):
        for record in records:
            try:
                record["digest"] = with_new_digest(record)["digest"]
            except (RecursionError, TypeError, AttributeError):
                continue
    return value


def dumped(value):
    "JSON, also of what is nested deeper than the encoder follows."
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 5000 + "]" * 5000


def damaged(text, random):
    "The bytes of a damaged file."
    kind = random.choice(
        ["value", "value", "value", "value", "cut", "bytes", "utf-16", "bom", "digit", "zero"]
    )
    if kind == "value":
        return dumped(mutate(json.loads(text), random)).encode()
    if kind == "cut":
        return text[: random.randrange(len(text))].encode()
    if kind == "bytes":
        at = random.randrange(len(text))
        return text[:at].encode() + bytes([random.randrange(128, 256)]) + text[at:].encode()
    if kind == "digit":
        at = random.choice([m.start() for m in re.finditer(r"\d", text)])
        return (text[:at] + random.choice("0123456789e-") + text[at + 1 :]).encode()
    if kind == "zero":
        return b"\0" * len(text)
    return text.encode("utf-8-sig" if kind == "bom" else kind)


def apparent_results(file):
    "How many records a file seems to hold; None where it cannot be read at all."
    try:
        return len(json.loads(file.read_text("utf-8-sig"))["results"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return None


def use(folder, tables):
    "Do with the results below a folder what reports do; only ValueError may come of it."
    unfinished(folder)
    collapsed(folder)
    try:
        lines = read_results(folder)
        accuracies = lines[lines["metric"] == "accuracy"]
        assert accuracies["value"].between(0, 100).all()
        if tables:
            dataset_table(lines, 4).markdown()
    except ValueError as e:
        assert "\n" not in str(e)


@pytest.mark.parametrize("part", range(4))
def test_mutated_results_never_stop_a_reader(run, part):
    "100 mutations each: what is returned is right, what is left out is named, in one warning."
    source = random.Random(part)
    file = run / "result.json"
    before = file.read_text()
    original = read_run(run)
    named = 0
    for number in range(100):
        file.write_bytes(damaged(before, source))
        found = read_result_file(file)
        assert all(is_right(result) for result in found.results)
        places_found = {(result.unit, result.measurement) for result in found.results}
        assert len(places_found) == len(found.results)
        if len(found.results) != apparent_results(file):
            assert found.problem.startswith(f"{file}: ") and len(found.problem) < 1000
            named += 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_run(run)
        assert all(str(file) in str(w.message) for w in caught) and len(caught) <= 1
        with warnings.catch_warnings(record=True):
            use(run.parent, tables=number % 5 == 0)
    file.write_text(before)
    assert named > 30
    assert read_run(run) == original


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(value=1000.0), "accuracy should be a percentage, not 1000"),
        (dict(value=math.nan), "value: input should be a finite number"),
        (dict(value=-1.0), "accuracy should be a percentage, not -1"),
        (dict(value=None), "value: input should be a valid number, got None"),
        (dict(value="51"), "value: input should be a valid number, got '51'"),
        (
            dict(per_class=[200.0]),
            "per_class[0]: input should be less than or equal to 100, got 200.0",
        ),
        (dict(predictions=[0, 1]), "predictions: input should be a valid string"),
        (dict(correct="0120"), "correct: string should match pattern"),
        (dict(seed=True), "seed: input should be a valid integer, got True"),
        (dict(settings=[]), "settings: input should be a valid dictionary"),
        (dict(cost=dict(fit_s=[1])), "cost.fit_s"),
        (dict(method=""), "method: string should have at least 1 character"),
    ],
)
def test_schema_names_the_place(run, change, message):
    path = run / "result.json"
    found = json.loads(path.read_text())
    found["results"][0].update(change)
    path.write_text(json.dumps(found))
    with pytest.warns(UserWarning, match="1 of 4 results are left out") as caught:
        assert len(read_run(run)) == 3
    (warning,) = caught
    assert message in str(warning.message) and str(path) in str(warning.message)


def test_missing_digest_and_edit_are_named(run):
    path = run / "result.json"
    found = json.loads(path.read_text())
    found["results"][0]["digest"] = ""
    found["results"][1]["value"] = 99.0
    path.write_text(json.dumps(found))
    message = "2 of 4 results are left out, the first is .*, seed 1: edited"
    with pytest.warns(UserWarning, match=message):
        assert len(read_run(run)) == 2


def test_result_counts_once(run):
    path = run / "result.json"
    found = json.loads(path.read_text())
    found["results"].append(found["results"][0])
    path.write_text(json.dumps(found))
    with pytest.warns(UserWarning, match="1 of 5 results are left out.*a second result"):
        assert len(read_run(run)) == 4
    shutil.copytree(run, run.parent / "copy")
    with pytest.warns(UserWarning, match="4 of 4 results are copies") as caught:
        assert sum(len(results) for _, results in read_runs_below(run.parent)) == 4
    assert len(caught) == 1


def test_caption_scores_may_exceed_100(tmp_path):
    made = {"method": "Frozen", "seed": 1, "metric": "cider", "key": "k"}
    write_results(tmp_path, [Result(**made, value=120.0)])
    assert read_run(tmp_path)[0].value == 120.0
    with pytest.raises(ValueError, match="finite number"):
        Result(**made, value=math.nan)


@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling"])
def test_no_file_in_the_place_of_results(run, kind):
    path = run / "result.json"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(run / "nowhere")
    if kind == "dangling":
        assert unfinished(run.parent)["missing"].tolist() == [4]
        return
    with pytest.warns(UserWarning, match="damaged"):
        assert read_run(run) == []


@pytest.mark.parametrize(
    "text, message",
    [
        (b"methods: [", "not YAML"),
        (b"[" * 5000, "not YAML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "valid dictionary"),
        (b"methods: ZeroShot\nseeds: [1]", "methods: input should be a valid list"),
        (b"methods: [ZeroShot]", "seeds: field required"),
        (b"methods: [ZeroShot]\nseeds: [a]", "seeds[0]"),
        (b"day: 2024-99-99", "line 1: 2024-99-99: month must be in 1..12"),
    ],
)
def test_damaged_params_are_named(run, text, message):
    other = run.parent / "other"
    other.mkdir()
    (other / "params.yml").write_bytes(text)
    with pytest.warns(UserWarning) as caught:
        assert unfinished(run.parent).empty
    (warning,) = caught
    assert message in str(warning.message) and str(other / "params.yml") in str(warning.message)


# Disks


@contextmanager
def small_files(size=300):
    "No file may grow beyond `size` bytes, as on a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only(*arguments):
    def touch(self, *args, **kwargs):
        raise OSError(30, "Read-only file system")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "touch", touch)
        yield


@pytest.mark.parametrize("disk", [small_files, read_only])
@pytest.mark.parametrize("kind", ["table", "frame", "csv", "figure", "page"])
def test_full_disk_leaves_nothing(kind, disk, table, results, tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    page = notebook_of(table, [], tmp_path / "page.ipynb")
    figure = plt.figure()
    figure.add_subplot().plot([1, 2])
    figure.canvas.draw()
    writers = dict(
        table=lambda: table.save(folder),
        frame=lambda: save_frame(table.mean, folder),
        csv=lambda: write_csv(results, folder / "results.csv"),
        figure=lambda: save_figure(figure, folder, "figure"),
        page=lambda: write_html(page, folder / "report.html"),
    )
    writers["page"]()
    (folder / "report.html").unlink()
    with (
        pytest.raises(CannotWrite, match="cannot be written: (File too large|Read-only)") as caught,
        disk(),
    ):
        writers[kind]()
    plt.close(figure)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []
