"""What is said in several files agrees: versions of project and Python, extras, targets of make."""

import re

import pytest
import yaml
from conftest import ROOT
from derived import settings
from requirements import extras

import vlmadapt

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.M))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def steps(workflow):
    """Return the shell commands of a workflow, and the versions of Python of its matrices."""
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    matrices = [job.get("strategy", {}).get("matrix", {}) for job in jobs]
    return commands, [str(v) for matrix in matrices for v in matrix.get("python-version", [])]


def test_one_version():
    version = settings()["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    number, date = re.search(r"^## \[([^]]+)\] - (\S+)$", changes, re.M).groups()
    assert vlmadapt.__version__ == citation["version"] == number == version
    assert str(citation["date-released"]) == date
    assert f"\n[{version}]: " in changes


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_make(workflow):
    commands, _ = steps(workflow)
    assert commands
    for command in commands:
        program, target = command.split()
        assert program == "make" and target in TARGETS


def test_workflows_try_the_supported_versions_of_python():
    classifiers = re.findall(
        r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )
    _, tried = steps(ROOT / ".github/workflows/test.yml")
    assert tried == classifiers and tried[0] == settings()["min_python"]


def test_make_installs_every_extra():
    (installed,) = re.findall(r"-e '\.\[([a-z,]+)\]'", MAKEFILE)
    assert sorted(installed.split(",")) == sorted(extras())


def test_the_changelog_names_no_module_that_is_gone():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        for row in table.splitlines()[2:]:
            new = row.split(" | ")[-1]
            for name in re.findall(r"`(vlmadapt(?:\.[a-z_]+)+)", new):
                path = ROOT.joinpath(*name.split("."))
                parent = path.parent.with_suffix(".py")
                assert path.is_dir() or path.with_suffix(".py").is_file() or parent.is_file(), name


@pytest.mark.skipif(not hasattr(vlmadapt, "__all__"), reason="the root exports no names")
def test_the_changelog_names_what_the_root_exports():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    names = set(re.findall(r"\bva\.([a-z_]+)", text))
    assert len(names) > 15 and not names - set(dir(vlmadapt))
