"Grids that are killed, mistyped, failing, or run twice: what a notebook cell cannot hold."
import json, os, random, signal, subprocess, sys, time
from pathlib import Path
import nbformat, psutil, pytest
import vlmadapt
from vlmadapt.grid import vlmadapt_grid
from vlmadapt.runs import execute, read_runs, shipped

ROOT = Path(vlmadapt.__file__).resolve().parent.parent
PARAMETERS = """dataset = 'mini-digits'  # name in DATASETS
shots = 1  # images per class
methods = ['ZeroShot']
seeds = [1]
fixed = {}  # method -> hyper-parameters
broken = ''  # a dataset that fails
out = ''"""
BODY = """import os, time
from vlmadapt.foundation import np_stream
from vlmadapt.rows import Rows
if dataset == broken: raise ValueError(f'{dataset} is broken')
def compute(method, seeds):
    for seed in seeds:
        time.sleep(float(os.environ.get('PAUSE', 0)))
        yield dict(accuracy=100*np_stream(seed, dataset, method).random(), predictions='0 1', cost=dict(fit_s=time.time()))
Rows(out, dataset=dataset, shots=shots, fixed=fixed, broken=broken).fill(methods, seeds, compute)"""
TINY = """experiment: tiny.ipynb
grid:
  dataset: [mini-digits, mini-shapes]
parameters:
  methods: [ZeroShot, TipAdapter]
  seeds: [1, 2, 3, 4, 5, 6]
"""
CALL = "import sys; from vlmadapt.grid import vlmadapt_grid; sys.exit(vlmadapt_grid(sys.argv[1], out=sys.argv[2], workers=2))"


@pytest.fixture
def params(tmp_path):
    "Writes a params file beside a tiny experiment, whose rows are random numbers from named streams."
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(BODY)]
    kernelspec = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernelspec)), tmp_path/"tiny.ipynb")
    def write(text=TINY, name="tiny.yml"):
        (tmp_path/name).write_text(text); return tmp_path/name
    return write


def numbers(runs):
    "What a grid found, wall-clock fields aside."
    return {(run.name, r["method"], r["seed"]): (r["accuracy"], r["predictions"], r["key"])
            for run in runs for r in json.loads((run.folder/"result.json").read_text())["rows"]}


def files(out): return {f: f.stat().st_mtime_ns for f in Path(out).rglob("rows/*.json")}


def children(process, text):
    return [c for c in psutil.Process(process.pid).children(recursive=True) if text in " ".join(c.cmdline())]


def wait_for(condition, process):
    end = time.time() + 120
    while not condition():
        assert process.poll() is None and time.time() < end, process.communicate()[0]
        time.sleep(.05)


def test_killed_grid_goes_on(params, tmp_path):
    file, out = params(), tmp_path/"outputs"
    for kill in ("driver", "everything", "worker"):
        kept, goal = files(out), len(files(out)) + random.randint(1, 3)
        grid = subprocess.Popen([sys.executable, "-c", CALL, file, out], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PAUSE": "0.4"})
        wait_for(lambda: len(files(out)) >= goal, grid); time.sleep(random.random()*.4)
        victims = dict(driver=[grid], everything=[grid, *children(grid, "")], worker=children(grid, "ray::execute")[:1])[kill]
        for victim in victims: os.kill(victim.pid, signal.SIGKILL)
        if kill == "driver": grid.wait(); time.sleep(3)  # its workers and their kernels notice within two seconds, and finish a row or not
        assert kept.items() <= files(out).items()
    assert grid.wait() == 0, grid.stdout.read()  # Ray has started the killed worker's run again
    assert kept.items() <= files(out).items() and len(files(out)) == 24  # rows that were there are the same files
    undisturbed = read_runs(file, tmp_path/"undisturbed")
    assert [execute(run) for run in undisturbed] == [None, None]
    assert numbers(read_runs(file, out)) == numbers(undisturbed)


def test_damaged_row_and_added_method(params, tmp_path):
    run = read_runs(params(), tmp_path/"outputs")[0]; execute(run); first, result = files(run.folder), numbers([run])
    (row,) = (run.folder/"rows").glob("TipAdapter-3-*.json"); row.write_text(row.read_text()[:200]); (run.folder/"result.json").write_text("{")
    more = read_runs(params(TINY.replace("TipAdapter]", "TipAdapter, LinearProbe]")), tmp_path/"outputs")[0]
    with pytest.warns(UserWarning, match="TipAdapter-3-.*json: damaged"): assert execute(more) is None
    changed = {f.stem.rpartition("-")[0] for f, t in files(run.folder).items() if first.get(f) != t}
    assert changed == {"TipAdapter-3", *(f"LinearProbe-{s}" for s in range(1, 7))}
    assert numbers([run]).items() >= result.items()


def test_changed_setting_computes_again(params, tmp_path):
    run = read_runs(params(), tmp_path/"outputs")[0]; rows = run.rows()
    for method, seed in rows.missing(*run.asked()): rows.save(method, seed, dict(accuracy=50.))
    rows.gather(); assert run.rows().done(*run.asked())
    for extra in ("  broken: mini-shapes\n", "  fixed: {TipAdapter: {alpha: 2.0}}\n"):
        other = read_runs(params(TINY + extra), tmp_path/"outputs")[0]
        assert not other.rows().done(*other.asked())
    assert len(other.rows().missing(*other.asked())) == 6  # what is fixed for one method leaves the other
    broken = read_runs(params(TINY + "  broken: mini-digits\n"), tmp_path/"outputs")[0]
    assert "is broken" in execute(broken) and not broken.rows().result.exists()  # no report can take the old rows for new ones


def test_failing_run_leaves_the_others(params, tmp_path, capsys):
    assert vlmadapt_grid(str(params(TINY + "  broken: mini-shapes\n")), out=str(tmp_path/"outputs"), workers=2) == 1
    told = capsys.readouterr().out
    assert "1 of 2 runs failed" in told and "mini-shapes: ValueError: mini-shapes is broken" in told and "mini-shapes/log.txt" in told
    assert (tmp_path/"outputs/tiny/mini-digits/result.json").exists() and not (tmp_path/"outputs/tiny/mini-shapes/result.json").exists()
    assert "Traceback" in (tmp_path/"outputs/tiny/mini-shapes/log.txt").read_text()


def test_two_at_once_share_the_work(params, tmp_path):
    call = "import sys; from vlmadapt.runs import execute, read_runs; sys.exit(execute(read_runs(*sys.argv[1:])[0]))"
    file = params()
    both = [subprocess.Popen([sys.executable, "-c", call, file, tmp_path/"outputs"], env={**os.environ, "PAUSE": "0.1"}) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    run = read_runs(file, tmp_path/"outputs")[0]
    assert len(numbers([run])) == 12 and (run.folder/"log.txt").read_text().count("rows asked for") == 1


@pytest.mark.parametrize("old, new, message", [
    ("dataset:", "datasets:", "unknown parameter 'datasets'; did you mean 'dataset'?"),
    ("mini-shapes", "mini-shape", "unknown dataset 'mini-shape'; did you mean 'mini-shapes'?"),
    ("TipAdapter", "TipAdaptor", "unknown method 'TipAdaptor'; did you mean 'TipAdapter'?"),
    ("seeds: [1,", "seeds: [one,", "each of seeds takes a whole number, not 'one'"),
    ("grid:", "gird:", "unknown entry 'gird'; did you mean 'grid'?"),
    ("tiny.ipynb", "few_shto", "unknown experiment 'few_shto'; did you mean 'few_shot'?")])
def test_typing_errors_are_refused_in_one_line(params, tmp_path, capsys, old, new, message):
    code = vlmadapt_grid(str(params(TINY.replace(old, new))), out=str(tmp_path/"outputs"))
    told = capsys.readouterr().err
    assert code == 2 and message in told and "tiny.yml: " in told and told.count("\n") == 1
    assert not (tmp_path/"outputs").exists()


@pytest.mark.skipif(not (ROOT/"nbs").exists(), reason="needs a checkout")
def test_parameters_cells_survive_cleaning(tmp_path):
    notebooks = [*(ROOT/"nbs/experiments").glob("*.ipynb"), *(ROOT/"nbs/reports").glob("*.ipynb")]
    assert shipped("experiments", "few_shot.ipynb") in notebooks
    for notebook in notebooks:
        copy = tmp_path/notebook.name; copy.write_bytes(notebook.read_bytes())
        subprocess.run([sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean(fname=__import__('sys').argv[1])", copy], cwd=ROOT, check=True)
        for file in (notebook, copy): assert any("parameters" in c.metadata.get("tags", []) for c in nbformat.read(file, 4).cells), file
