"""Code that runs in forks of an interpreter which has imported the heavy packages already.

A new interpreter needs five seconds of processor time for PyTorch, open_clip and their like; a fork
of one that has imported them needs none.
"""

import atexit
import json
import logging
import os
import subprocess
import sys
import tempfile
import traceback
import types
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parent


class WarmPython:
    "An interpreter, started with further variables, that is forked for each piece of code."

    def __init__(self, **environment):
        path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        self.own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}  # forks have no pool
        self.process = subprocess.Popen(
            [sys.executable, "-m", "warm_process"],
            env=os.environ | self.own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, code, *arguments):
        "Run code as a script, in the present folder; return its status and what it printed."
        with tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder) / name) for name in ("stdout", "stderr")]
            request = dict(code=code, arguments=[*map(str, arguments)], files=files)
            request |= dict(folder=os.getcwd(), environment=os.environ | self.own)
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
            told = [Path(file).read_text(errors="replace") for file in files]
        return subprocess.CompletedProcess([code, *arguments], status, *told)

    def close(self):
        "End the interpreter."
        self.process.communicate()


@cache
def warm_python():
    "The interpreter that the tests of this process share."
    python = WarmPython()
    atexit.register(python.close)
    return python


def next_request():
    "Fork for each request; return it in the fork, and None where there are no more."
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def run_request(code, arguments, files, folder, environment):
    "Run code as the script of this process, whose output goes to two files; end the process."
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = ["-c", *arguments]
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the usual end would take half a second, to free what it shares


if __name__ == "__main__":
    import heavy_packages  # noqa: F401

    logging.root.handlers.clear()  # open_clip's first message adds one
    request = next_request()
    if request:
        run_request(**request)
