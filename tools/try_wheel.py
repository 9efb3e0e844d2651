"""Install the wheel without extras into an empty environment, and run README's lines there.

`python tools/try_wheel.py --python python3.13` prints one line: version of Python, packages, size
and seconds. It takes minutes, and 5 GB where pip fetches the CUDA build of torch;
`PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu` has it fetch the CPU build.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (
    ".git .venv* build dist outputs _docs _proc *.egg-info __pycache__ .ipynb_checkpoints .ready"
)
LIST = "from importlib.metadata import distributions as d; print(len({x.name for x in d()}))"
TIME = """
import time
began = time.perf_counter()
import vlmadapt
print(time.perf_counter() - began)
"""


def build(folder):
    "Build source archive and wheel of this checkout in `folder`; return the wheel."
    source = Path(folder) / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_OUT.split()))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
    subprocess.run(command, check=True, capture_output=True)
    return next(Path(folder).glob("*.whl"))


def offline_blocks():
    "Return the blocks of Python in README.md that need no network: those on `mini`."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if '"mini' in block]


def run(command, folder):
    "Run a command in `folder` outside of this checkout; return what it prints, or exit."
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=folder, env=clean, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr[-2000:]}")
    return done.stdout.strip()


def try_wheel(python, environment, folder):
    "Install the wheel into `environment` and check it; return the line that reports it."
    wheel = build(folder)
    run([python, "-m", "venv", environment], folder)
    inside = Path(environment) / "bin"
    install = ["install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    run([inside / "python", "-m", "pip", *install, wheel], folder)
    run([inside / "python", "-m", "pip", "check"], folder)
    began = time.perf_counter()
    answers = [run([inside / "python", "-c", block], folder) for block in offline_blocks()]
    seconds = time.perf_counter() - began
    version = run(
        [inside / "python", "-c", "import platform as p; print(p.python_version())"], folder
    )
    size = sum(path.lstat().st_size for path in Path(environment).rglob("*")) / 1e6
    packages = run([inside / "python", "-c", LIST], folder)
    light = float(run([inside / "python", "-c", TIME], folder))
    last = ", ".join(answer.splitlines()[-1] for answer in answers if answer)
    return (
        f"Python {version}: {packages} packages, {size:.0f} MB, import vlmadapt {light:.2f} s, "
        f"README in {seconds:.0f} s: {last}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment")
    parser.add_argument("--environment", help="its folder, kept; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        kept = given.environment or Path(scratch) / "environment"
        print(try_wheel(given.python, Path(kept).resolve(), scratch))
