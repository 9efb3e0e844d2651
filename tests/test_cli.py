"The command `vlmadapt`: options, examples, errors, signals, and what each subcommand calls."

import csv
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run_command
from PIL import Image
from safetensors.torch import save_file
from test_structure import loaded_by

import vlmadapt as va
from vlmadapt.cli import COMMANDS, classifiers, main
from vlmadapt.cli.commands import Command
from vlmadapt.data.tasks import read_task
from vlmadapt.grid.signals import STOPPED
from vlmadapt.mini import data

BUNDLE = "features.safetensors"
EXAMPLES = [
    (name, arguments) for name, command in COMMANDS.items() for arguments in command.examples
]


def run(*arguments, **options):
    "Run `python -m vlmadapt` in a process of its own."
    command = [sys.executable, "-m", "vlmadapt", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def refusal(capsys, *arguments, status=2):
    "The one line with which a command line ends."
    assert main([*map(str, arguments)]) == status
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "Traceback" not in told.err
    return told.err


# Help


@pytest.mark.parametrize(("name", "arguments"), EXAMPLES)
def test_examples_of_the_help_are_parsed(name, arguments):
    COMMANDS[name].parser().parse(shlex.split(arguments))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples(name, capsys):
    assert main([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"usage: vlmadapt {name} " in told and f"\n  vlmadapt {name} " in told
    assert all(len(line) <= 100 for line in told.splitlines())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["-q"]])
def test_help_names_every_command(arguments, capsys):
    assert main(arguments) == 0
    told = capsys.readouterr().out
    for command in COMMANDS.values():
        assert f"{command.name:<8}  {command.summary}" in told


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlmadapt {va.__version__}\n"


def test_help_and_names_of_methods_need_no_torch():
    calls = [[], *([name, "--help"] for name in COMMANDS), ["list", "methods"], ["lst"]]
    loaded = loaded_by(f"from vlmadapt.cli import main\nfor call in {calls!r}: main(call)")
    heavy = ("torch", "pandas", "numpy", "open_clip", "IPython")
    assert not [name for name in heavy if name in loaded]


def test_module_is_a_command():
    done = run("list", "methods", "--kind", "generation")
    assert done.returncode == 0 and "BitFit" in done.stdout.splitlines()
    done = run("adpat")
    assert (done.returncode, done.stderr) == (
        2,
        "unknown command 'adpat'; did you mean 'adapt'?\n",
    )


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("adpat my_images", "unknown command 'adpat'; did you mean 'adapt'?"),
        ("--verbos list methods", "unknown option '--verbos'; did you mean '--verbose'?"),
        ("adapt x --shot 16", "unknown option '--shot'; did you mean '--shots'?"),
        ("adapt x --shots", "argument --shots: expected one argument; --help shows examples"),
        ("adapt", "vlmadapt adapt: the following arguments are required: source"),
        ("adapt x y", "unexpected argument 'y'; --help shows examples"),
        ("report mini -q -v", "not allowed with argument"),
        ("list methdos", "unknown list 'methdos'; did you mean 'methods'?"),
        ("list methods --kind feature", "did you mean 'features'?"),
        ("list datasets --kind features", "--kind is a kind of methods"),
        ("grid minni", "unknown params file 'minni'; did you mean 'mini'?"),
        ("grid none.yml", "no such file: none.yml"),
        ("grid mini --workers two", "--workers: input should be"),
        ("report none", "none: no runs there; vlmadapt grid params/none.yml makes them"),
        ("claim nonsense", "cannot read 'nonsense' in the claim"),
        ("data dtdd", "did you mean 'dtd'?"),
        ("data", "name a dataset, or all; --list shows what there is"),
        ("bench --device tpu", "--device tpu: unknown device"),
        ("adapt nowhere/", "nowhere/: no such file or folder"),
        ("adapt mini-digit", "unknown dataset 'mini-digit'; did you mean 'mini-digits'?"),
        ("adapt dtd", "dtd: name the backbone that encodes its images, such as --backbone"),
        ("adapt mini-vqa --shots 4", "--shots does not go with mini-vqa, a task"),
        ("adapt mini-digits --on-corrupt skip", "--on-corrupt does not go with mini-digits"),
        ("adapt mini-digits --out nowhere/x.safetensors", "--out nowhere/x.safetensors: no such"),
        ("adapt mini-digits --out .", "--out .: is a folder"),
        ("adapt mini-digits --shots none", "shots: input should be a number, got 'none'"),
        ("adapt mini-digits --shots 1 --method TaskRess", "did you mean 'TaskRes'?"),
        ("predict none.safetensors none.png", "no such image file: none.png"),
        ("evaluate none.safetensors mini-digits", "none.safetensors"),
    ],
)
def test_a_mistake_is_one_line(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in refusal(capsys, *arguments.split())
    assert not list(tmp_path.iterdir())


@pytest.fixture
def command(monkeypatch):
    "Put a command `try` in place that runs a function."

    def put(function, resumes=False):
        tried = Command("try", "Try.", lambda parser: None, function, {}, resumes=resumes)
        monkeypatch.setitem(COMMANDS, "try", tried)

    return put


def fail(error):
    "A command that raises an error."

    def failing(options):
        raise error

    return failing


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("a wrong\nvalue"), 2, "a wrong value"),
        (FileNotFoundError(2, "No such file", "x.csv"), 2, "x.csv: No such file"),
        (ConnectionError("no network"), 1, "no network"),
        (FloatingPointError("all candidates diverged"), 1, "all candidates diverged"),
        (ImportError("papermill is missing"), 1, "papermill is missing"),
        (KeyError("x"), 1, "KeyError: 'x' (-v shows where)"),
        (AttributeError("no y"), 1, "AttributeError: no y (-v shows where)"),
    ],
)
def test_errors_have_one_line_and_a_status(command, capsys, error, status, line):
    command(fail(error))
    assert refusal(capsys, "try", status=status) == f"{line}\n"
    for arguments in (["try", "-v"], ["--verbose", "try"]):
        assert main(arguments) == status
        assert "Traceback" in capsys.readouterr().err


def test_a_status_is_returned(command):
    for status, expected in ((None, 0), (0, 0), (3, 3)):
        command(lambda options, status=status: status)
        assert main(["try"]) == expected


WARNING = """import sys, warnings
from vlmadapt.cli import COMMANDS, main
from vlmadapt.cli.commands import Command
from vlmadapt.data.tasks import read_task
def run(options):
    warnings.warn("two\\nlines")
COMMANDS["try"] = Command("try", "Try.", lambda parser: None, run, {})
sys.exit(main(["try", *sys.argv[1:]]))"""


@pytest.mark.parametrize(("arguments", "told"), [([], "two lines\n"), (["-q"], "")])
def test_warnings_are_one_line_or_quiet(arguments, told):
    command = [sys.executable, "-c", WARNING, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, told)


def test_nothing_of_a_command_is_left_in_the_process(command):
    before = warnings.formatwarning, warnings.filters[:], va.verbosity()
    command(lambda options: None)
    main(["try", "-q"])
    assert (warnings.formatwarning, warnings.filters[:], va.verbosity()) == before


def test_verbosity_is_that_of_the_library(command):
    found = []
    command(lambda options: found.append(va.verbosity()))
    for arguments in (["try"], ["try", "-q"], ["-q", "try"], ["try", "--verbose"]):
        main(arguments)
    assert found == [va.verbosity(), "quiet", "quiet", "debug"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("resumes", "line"), [(True, STOPPED), (False, "stopped")])
def test_a_signal_is_one_line(command, capsys, number, resumes, line):
    command(lambda options: signal.raise_signal(number), resumes)
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, handler)  # whatever the tests' own shell ignores
    try:
        assert refusal(capsys, "try", status=128 + number) == f"{line}\n"
    finally:
        signal.signal(number, before)


def test_a_reader_that_has_gone_is_no_error():
    command = [sys.executable, "-m", "vlmadapt", "list", "methods"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


# What the commands call


@pytest.mark.parametrize(
    ("line", "function", "arguments", "options"),
    [
        (
            "grid a.yml --dry-run --smoke --only x* --redo y --workers 2 --address auto "
            "--gpus-per-run 0.5 --memory-per-run 4 --out o --set b=1 --set c=2 --only-methods d e",
            "grid.command.run_grid",
            ("a.yml",),
            dict(
                dry_run=True,
                smoke=True,
                only="x*",
                redo="y",
                workers="2",
                address="auto",
                gpus_per_run="0.5",
                memory_per_run="4",
                out="o",
                changes=["b=1", "c=2"],
                only_methods=["d", "e"],
            ),
        ),
        ("grid a.yml", "grid.command.run_grid", ("a.yml",), dict(changes=())),
        ("claim c --results r", "reporting.claims.print_claim", ("c",), dict(results="r")),
        ("data --list", "data.downloads.print_benchmarks", (), {}),
        (
            "data dtd eurosat --root r --check --use u --keep --rebuild-split",
            "data.downloads.prepare_datasets",
            (["dtd", "eurosat"],),
            dict(root="r", check=True, use="u", keep=True, rebuild=True),
        ),
    ],
)
def test_options_become_arguments_of_the_library(monkeypatch, line, function, arguments, options):
    called = []

    def called_with(*given, **named):
        called.append((given, named))
        return 0

    monkeypatch.setattr(f"vlmadapt.{function}", called_with)
    assert main(line.split()) == 0
    assert called == [(arguments, options | {"rebuild": False} if line == "data" else options)]


def test_a_failed_run_is_a_failure(monkeypatch):
    monkeypatch.setattr("vlmadapt.grid.command.run_grid", lambda *a, **k: {"run": "error"})
    assert main(["grid", "a.yml"]) == 1


def test_a_shipped_grid_is_found_by_name(capsys, tmp_path):
    assert run_command("grid", "mini", dry_run=True, out=tmp_path) == 0
    by_name = capsys.readouterr().out
    assert run_command("grid", ROOT / "params/mini.yml", dry_run=True, out=tmp_path) == 0
    assert capsys.readouterr().out == by_name


def test_a_part_of_a_shipped_grid(capsys, tmp_path):
    line = ["grid", "mini", "--dry-run", "--out", tmp_path, "--only", "features/*"]
    assert run_command(*line) == 0
    whole = capsys.readouterr().out
    line += ["--set", "seeds=[1]", "--set", "trials=0", "--only-methods", "TaskRes", "ZeroShot"]
    assert run_command(*line) == 0
    part = capsys.readouterr().out
    assert len(part.splitlines()) == len(whole.splitlines())
    assert "2 of 2 measurements missing" in part and "2 of 2 " not in whole
    assert "--set takes name=value" in refusal(capsys, *line[:5], "--set", "seeds")


def listed(capsys, *arguments):
    assert main(["list", *arguments]) == 0
    return capsys.readouterr().out


def test_lists(capsys):
    assert listed(capsys, "methods").split() == va.list_methods()
    prompts = json.loads(listed(capsys, "methods", "--kind", "prompts", "--json"))
    assert prompts == va.list_methods("prompts")
    for name, some in {
        "datasets": {"dtd", "mini-digits"},
        "tasks": {"vqav2", "mini-vqa"},
        "backbones": {"ViT-B-16", "mini"},
        "grids": {"mini", "mudpt"},
        "experiments": {"few_shot"},
        "reports": {"few_shot"},
    }.items():
        assert some <= set(listed(capsys, name).split())


# adapt, predict, evaluate


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "A folder of images: three classes of twelve digits."
    drawn = data.load("mini-digits")
    images, labels = drawn["train"]
    root = tmp_path_factory.mktemp("cli") / "photos"
    for k, name in enumerate(drawn["class_names"][:3]):
        (root / name).mkdir(parents=True)
        for i in np.flatnonzero(np.asarray(labels) == k)[:12]:
            Image.fromarray(images[i]).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def stored(photos):
    "A method that was adapted to the photos."
    out = photos.parent / "digits.safetensors"
    line = ["adapt", photos, "--backbone", "mini", "--shots", "2", "--trials", "2", "--out", out]
    assert run_command(*line) == 0
    return out


def test_adapt_says_what_it_found(photos, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    line = ["adapt", photos, "--backbone", "mini", "--shots", "2", "--trials", "2", "--out", out]
    assert run_command(*line, "--method", "TaskRes") == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    method = va.load_method(out)
    problem = va.from_folder(photos, backbone="mini", shots=2)
    same = va.adapt(problem, "TaskRes", trials=2)
    assert told["method"] == "TaskRes on photos, 2 shots, seed 1"
    assert (
        "the best of" in told["chosen"] and f"lr={method.hyper_parameters['lr']}" in told["chosen"]
    )
    assert told["validation"] == f"accuracy {same.card['selection']['value']:.1f}"
    zero_shot = va.evaluate(va.create_method("ZeroShot", problem), problem)["accuracy"]
    accuracy = va.evaluate(same, problem)["accuracy"]
    assert told["test"] == f"accuracy {accuracy:.1f} (zero-shot {zero_shot:.1f})"
    assert told["file"] == str(out)
    assert told["next"] == f"vlmadapt predict {out} {photos}"
    COMMANDS["predict"].parser().parse(shlex.split(told["next"])[2:])


def test_adapt_passes_its_options_on(photos, tmp_path, monkeypatch):
    "Templates, descriptions and class names are those of the problem that is adapted to."
    names = tmp_path / "names.json"
    names.write_text('{"one": "the digit 1"}')
    texts = tmp_path / "texts.json"
    texts.write_text('{"the digit 1": ["a single stroke"], "two": ["a swan"], "zero": ["a ring"]}')
    seen = []
    adapt = va.adapt
    monkeypatch.setattr(
        va, "adapt", lambda problem, **k: seen.append((problem, k)) or adapt(problem, **k)
    )
    line = f"adapt {photos} --backbone mini --shots 1 --seed 3 --method ZeroShot --trials 0"
    line += f" --template {{}}. --class-names {names} --descriptions {texts}"
    assert run_command(*line.split(), out=tmp_path / "x.safetensors") == 0
    ((problem, options),) = seen
    assert options == dict(method="ZeroShot", trials="0", seed="3")
    assert problem.class_names == ["the digit 1", "two", "zero"]
    assert problem.provenance["template"] == ["{}."]
    assert problem.provenance["descriptions"] == str(texts)
    assert (problem.provenance["shots"], problem.provenance["seed"]) == (1, 3)


def test_adapt_with_a_second_encoder(photos, tmp_path, capsys):
    "A stored method is tested with the second encoder that it was adapted with."
    out = tmp_path / "x.safetensors"
    line = f"adapt {photos} --backbone mini --auxiliary mini-rn --shots 2 --trials 0"
    assert run_command(*line.split(), "--method", "AMUTuning", out=out) == 0
    told = capsys.readouterr().out
    problem = va.from_folder(photos, backbone="mini", shots=2, auxiliary="mini-rn")
    method = va.adapt(problem, "AMUTuning", trials=0)
    found = va.evaluate(method, problem)
    assert f"test        accuracy {found['accuracy']:.1f}" in told
    assert run_command("evaluate", out, photos, "--json") == 0
    tested = json.loads(capsys.readouterr().out)
    assert (tested["accuracy"], tested["predictions"]) == (found["accuracy"], found["predictions"])
    line = f"adapt {photos} --backbone mini --shots 2 --trials 0 --method AMUTuning"
    assert "features of a second image encoder (auxiliary=)" in refusal(
        capsys, *line.split(), "--out", out
    )


def test_adapt_to_a_table(photos, tmp_path, capsys):
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows([path, path.parent.name] for path in sorted(photos.rglob("*.png")))
    out = tmp_path / "table.safetensors"
    line = f"adapt {table} --backbone mini --shots 1 --method ZeroShot --trials 0"
    assert run_command(*line.split(), out=out) == 0
    told = capsys.readouterr().out
    assert f"vlmadapt evaluate {out} {table}" in told
    assert sorted(va.load_method(out).class_names) == ["one", "two", "zero"]


def test_adapt_to_features(photos, tmp_path, capsys):
    "A folder of features needs no backbone, and its method is tested on such a folder."
    features = va.from_folder(photos, backbone="mini", shots=4).features
    problem = va.from_folder(photos, backbone="mini", shots=4)
    folder = tmp_path / "features"
    folder.mkdir()
    arrays = {"text": features.text, "test_x": features.test, "train_x": features.train}
    labels = {"train_y": problem.labels["train"], "test_y": problem.labels["test"]._labels}
    save_file({name: x.contiguous() for name, x in {**arrays, **labels}.items()}, folder / BUNDLE)
    (folder / "classnames.json").write_text(json.dumps(problem.class_names))
    out = tmp_path / "x.safetensors"
    line = f"adapt {folder} --shots 2 --seed 2 --trials 0 --method TipAdapter"
    assert run_command(*line.split(), out=out) == 0
    told = capsys.readouterr().out
    drawn = va.FewShotProblem.from_bundle(folder, shots=2, seed=2)
    accuracy = va.evaluate(va.adapt(drawn, "TipAdapter", trials=0, seed=2), drawn)["accuracy"]
    assert f"test        accuracy {accuracy:.1f}" in told
    assert run_command("evaluate", out, folder) == 0
    second = tmp_path / "second"
    shutil.copytree(folder, second)
    line = f"adapt {folder} --auxiliary second --shots 2 --trials 0 --method AMUTuning"
    assert run_command(*line.split(), out=out) == 0
    assert va.load_method(out).input_width == 2 * problem.features.test.shape[1]
    assert run_command("evaluate", out, folder) == 0
    assert "--backbone does not go with" in refusal(capsys, "adapt", folder, "--backbone", "mini")


def test_a_method_of_ones_own_by_its_file(photos, tmp_path, capsys):
    file = tmp_path / "own_command_method.py"
    file.write_text(
        "import vlmadapt as va\n"
        "@va.register_method('OfTheCommand')\n"
        "class OfTheCommand(va.Method):\n"
        "    def constants(self, problem):\n"
        "        return {'text': problem.features.text}\n"
        "    def logits(self, batch):\n"
        "        return self.cosine_logits(batch.x, self.text)\n"
    )
    out = tmp_path / "own.safetensors"
    own = ["--plugin", file]
    line = ["adapt", photos, "--backbone", "mini", "--shots", "2", "--method", "OfTheCommand"]
    assert run_command(*line, *own, "--out", out) == 0
    assert "OfTheCommand on" in capsys.readouterr().out
    assert run_command("predict", out, photos, *own) == 0
    assert run_command("evaluate", out, photos, *own) == 0
    missing = refusal(capsys, "predict", out, photos, "--plugin", tmp_path / "nothing.py")
    assert "nothing.py" in missing


def test_predictions_are_those_of_the_library(stored, photos, capsys, tmp_path):
    paths = sorted(photos.rglob("*.png"))
    table = va.load_method(stored).predict_table([str(path) for path in paths])
    assert run_command("predict", stored, photos) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(path, name) for path, name, _ in lines] == list(
        zip(table.index, table["prediction"], strict=True)
    )
    assert [float(p) for *_, p in lines] == pytest.approx(list(table["probability"]), abs=1e-4)
    assert run_command("predict", stored, photos, csv=tmp_path / "x.csv", top=1) == 0
    with (tmp_path / "x.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["path", "class", "probability"], *lines]
    assert run_command("predict", stored, photos, csv=tmp_path / "x.csv") == 0
    wide = pd.read_csv(tmp_path / "x.csv")
    assert list(wide.columns[3:]) == ["class_2", "probability_2", "class_3", "probability_3"]
    assert wide["class"].tolist() == [name for _, name, _ in lines]
    shares = wide[["probability", "probability_2", "probability_3"]].to_numpy()
    assert np.allclose(shares.sum(1), 1, atol=2e-4) and (np.diff(shares, axis=1) <= 0).all()
    assert run_command("predict", stored, *paths[:2], photos / "two", json=True, top=2) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["path"] for line in found] == [*map(str, paths[:2]), *table.index[12:24]]
    for line in found:
        assert len(line["classes"]) == 2
        best = max(line["classes"], key=line["classes"].get)
        assert line["class"] == best == table["prediction"][line["path"]]


def test_a_csv_file_is_read_as_it_was_meant(photos, tmp_path, capsys):
    "Commas, quotes and line ends in names, and names that a spreadsheet takes for a formula."
    names = ["=cmd|' /C calc'!A0", 'grey, "small"', "@sum(1)"]
    problem = va.from_folder(photos, backbone="mini", shots=2, class_names=names)
    va.adapt(problem, "ZeroShot", trials=0).save(tmp_path / "m.safetensors")
    folder = tmp_path / "given"
    folder.mkdir()
    for k, path in enumerate(sorted(photos.rglob("*.png"))[::12]):
        (folder / ["-1+2.png", "a, b.png", 'c"d.png'][k]).write_bytes(path.read_bytes())
    out = tmp_path / "x.csv"
    assert run_command("predict", tmp_path / "m.safetensors", folder, csv=out) == 0
    with out.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert len(header) == 7 and [len(row) for row in rows] == [7, 7, 7]
    assert [row[0].rpartition("/")[2] for row in rows] == ["-1+2.png", "a, b.png", 'c"d.png']
    assert {row[k].removeprefix("'") for row in rows for k in (1, 3, 5)} == set(names)
    cells = [cell for row in rows for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


def test_predictions_come_in_chunks(stored, photos, capsys, monkeypatch):
    assert run_command("predict", stored, photos, top=3) == 0
    whole = capsys.readouterr().out
    monkeypatch.setattr(classifiers, "IMAGES_PER_STEP", 5)
    assert run_command("predict", stored, photos, top=3) == 0
    assert capsys.readouterr().out == whole


def test_corrupt_images_are_refused_or_skipped(stored, photos, capsys, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "bad.png").write_text("no image")
    good = sorted(photos.rglob("*.png"))[0]
    (folder / "good.png").write_bytes(good.read_bytes())
    (folder / "notes.txt").write_text("no image either")
    (folder / ".hidden.png").write_text("nor this")
    told = refusal(capsys, "predict", stored, folder)
    assert "bad.png: cannot be decoded" in told
    with pytest.warns(UserWarning, match="skipped: 1 of 2 files"):
        assert run_command("predict", stored, folder, on_corrupt="skip") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split()[0] == str(folder / "good.png")
    (tmp_path / "empty").mkdir()
    assert "empty: no images in this folder" in refusal(
        capsys, "predict", stored, tmp_path / "empty"
    )
    assert "--top: input should be" in refusal(capsys, "predict", stored, good, "--top", 0)


def test_evaluate_gives_what_the_library_gives(stored, photos, capsys):
    problem = va.from_folder(photos, backbone="mini", shots=2)
    found = va.evaluate(va.load_method(stored), problem)
    assert run_command("evaluate", stored, photos) == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(told["accuracy"]) == pytest.approx(found["accuracy"], abs=1e-3)
    assert int(told["n"]) == found["n"] == 12
    assert run_command("evaluate", stored, photos, json=True) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_evaluate_gives_further_metrics(stored, photos, capsys):
    metrics = ["top5_accuracy", "confusion_matrix"]
    problem = va.from_folder(photos, backbone="mini", shots=2)
    found = va.evaluate(va.load_method(stored), problem, metrics)
    line = ["evaluate", stored, photos, "--metrics", "top5-accuracy", "confusion_matrix"]
    assert run_command(*line) == 0
    told = capsys.readouterr().out
    assert f"top5_accuracy  {found['top5_accuracy']:g}" in told
    assert found["confusion_matrix"].to_string() in told
    assert run_command(*line, "--json") == 0
    assert json.loads(capsys.readouterr().out)["confusion_matrix"]["one"]["one"] > 0
    assert "did you mean 'top5_accuracy'?" in refusal(
        capsys, "evaluate", stored, photos, "--metrics", "top5-acuracy"
    )


def test_a_method_that_generates_text_answers(photos, tmp_path, capsys):
    task = va.load_task("mini-vqa", backbone="mini", train=16)
    method = va.fit(va.create_method("BitFit", task, epochs=1), task)
    out = tmp_path / "answers.safetensors"
    method.save(out)
    paths = sorted(str(path) for path in photos.rglob("*.png"))[:2]
    question = "how many shapes are there ?"
    assert run_command("predict", out, *paths, text=question, json=True) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    answers = method.predict(paths, question)
    assert [(line["path"], line["text"]) for line in found] == list(
        zip(paths, answers, strict=True)
    )
    told = refusal(capsys, "predict", out, *paths)
    assert "BitFit generates text" in told and "--text 'what is it?'" in told


def test_a_classifier_takes_no_text(stored, photos, capsys):
    told = refusal(capsys, "predict", stored, photos, "--text", "what is it?")
    assert "classifies images: leave --text out" in told


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    "A folder with images of mini-vqa and files of questions about them, in three forms."
    root = tmp_path_factory.mktemp("task")
    images, examples = read_task("mini-vqa")["train"]
    (root / "photos").mkdir()
    entries = []
    for example in examples[:60]:
        name = f"photos/{example.image}.png"
        if not (root / name).exists():
            Image.fromarray(images[example.image]).save(root / name)
        answers = list(example.answers)
        entries.append(dict(image=name, question=example.prompt, answers=answers))
    (root / "lines.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (root / "list.json").write_text(json.dumps(entries))
    with (root / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(entries[0]))
        writer.writeheader()
        writer.writerows({**entry, "answers": json.dumps(entry["answers"])} for entry in entries)
    return root


@pytest.mark.parametrize("form", ["lines.jsonl", "list.json", "rows.csv"])
def test_adapt_and_evaluate_with_questions_of_ones_own(questions, form, tmp_path, capsys):
    "Both divide the file in the same way, whatever the seed."
    source, out = questions / form, tmp_path / "x.safetensors"
    line = f"adapt {source} --backbone mini --method Frozen --trials 0 --seed 2"
    assert run_command(*line.split(), out=out) == 0
    told = capsys.readouterr().out
    problem = va.load_task(source, backbone="mini")
    found = va.evaluate(va.create_method("Frozen", problem), problem)
    value = found[problem.metric]
    assert f"test        {problem.metric} {value:.1f}" in told
    assert f"next        vlmadapt evaluate {out} {source}" in told
    assert run_command("evaluate", out, source, "--json") == 0
    tested = json.loads(capsys.readouterr().out)
    assert tested[problem.metric] == value and tested["n"] == found["n"]
    assert run_command("evaluate", out, source) == 0
    assert f"{problem.metric} " in capsys.readouterr().out


def test_a_folder_of_parts_and_images_elsewhere(questions, tmp_path, capsys):
    lines = (questions / "lines.jsonl").read_text().splitlines()
    for part, own in (("train", lines[:40]), ("test", lines[40:])):
        (tmp_path / f"{part}.jsonl").write_text("\n".join(own))
    out = tmp_path / "x.safetensors"
    line = ["adapt", tmp_path, "--backbone", "mini", "--method", "Frozen", "--trials", "0"]
    assert "photos/40.png is missing" in refusal(capsys, *line, "--out", out)
    assert run_command(*line, "--root", questions, "--out", out) == 0
    assert "GenerationProblem" in capsys.readouterr().out
    assert run_command("evaluate", out, tmp_path, "--root", questions, "--json") == 0
    assert json.loads(capsys.readouterr().out)["n"] == 20


@pytest.mark.slow
def test_adapt_and_evaluate_with_a_task_by_name(tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    line = "adapt mini-captions --method BitFit --trials 0 --seed 2"
    assert run_command(*line.split(), out=out) == 0
    value = re.search(r"test +cider ([\d.]+)", capsys.readouterr().out)[1]
    assert run_command("evaluate", out, "mini-captions") == 0
    assert f"cider  {float(value):g}"[:8] in re.sub(" +", "  ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--backbone mini --shots 4", "--shots does not go with"),
        ("", "name the backbone that encodes its images, such as --backbone CoCa-B-32"),
        ("--backbone mini --class-names {names}", "--class-names does not go with"),
    ],
)
def test_questions_refuse_what_they_do_not_take(questions, tmp_path, capsys, arguments, told):
    (tmp_path / "names.txt").write_text("a\nb\n")
    given = arguments.format(names=tmp_path / "names.txt").split()
    assert told in refusal(capsys, "adapt", questions / "lines.jsonl", *given)
    assert "--root does not go with mini-digits" in refusal(
        capsys, "adapt", "mini-digits", "--root", questions
    )


def test_the_next_line_names_what_the_file_needs():
    from argparse import Namespace

    from vlmadapt.cli.classifiers import _next_line

    given = Namespace(source="mini-digits", out="own.safetensors", plugin=["my method.py"])
    expected = "vlmadapt evaluate own.safetensors mini-digits --plugin 'my method.py'"
    assert _next_line(given, "dataset") == expected
    assert _next_line(given, "folder of images") == expected.replace("evaluate", "predict")


def test_the_report_command_names_runs_that_are_not_finished(monkeypatch, tmp_path, capsys):
    report = tmp_path / "my_grid/report"
    monkeypatch.setattr("vlmadapt.grid.report.make_report", lambda name: report)
    monkeypatch.setattr("vlmadapt.grid.report.print_report", lambda target: None)
    report.mkdir(parents=True)
    assert main(["report", "my_grid"]) == 0
    assert capsys.readouterr().out == ""
    for run_name in ("photos_shots16", "photos_shots4"):
        (tmp_path / "my_grid" / run_name).mkdir()
        file = tmp_path / "my_grid" / run_name / "params.yml"
        file.write_text("methods: [ZeroShot, TaskRes]\nseeds: [1, 2]\n")
    assert main(["report", "my_grid"]) == 0
    told = capsys.readouterr().out
    assert told == "incomplete: 8 results are missing in photos_shots16, photos_shots4\n"


def test_a_dry_run_names_data_that_are_too_few(photos, tmp_path, capsys):
    "A folder of twelve images a class has six train images; no image is read."
    rows = [f"{path},{path.parent.name}" for path in sorted(photos.rglob("*.png"))]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *rows]))
    file = tmp_path / "own.yml"
    file.write_text(
        f"experiment: few_shot\ngrid: {{dataset: [{photos}, ./table.csv], shots: [4, 16]}}\n"
        "parameters: {backbone: mini, methods: [ZeroShot], seeds: [1]}\n"
    )
    assert run_command("grid", file, dry_run=True, out=tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    failing = [line for line in lines if "will fail: " in line]
    assert len(failing) == 2 and all("shots16" in line for line in failing)
    for line in failing:
        assert "divided into 18 train, 6 val, 12 test" in line
        assert line.endswith("take at most 6 shots: shots=6, or --shots 6")
    told = refusal(capsys, "adapt", photos, "--backbone", "mini", "--shots", "16")
    assert "divided into 18 train, 6 val, 12 test" in told and "--shots 6" in told
