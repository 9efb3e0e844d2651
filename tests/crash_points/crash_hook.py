"""Kill a process at one chosen write of `vlmadapt.core.files.write_atomic`.

The choice stands in environment variables, so that kernels and workers know it too:
CRASH_COUNTER  a file; every write of every process makes it one byte longer
CRASH_AT       the write at which to die, counted from 1; 0 only counts
CRASH_MOMENT   "before" or "after" the rename
CRASH_FILES    a pattern; only writes of such paths count
CRASH_WHO      "self", or "everything": the grid's driver and all its descendants
"""

import os
import signal
import sys
import threading
from fnmatch import fnmatch
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

MODULE = "vlmadapt.core.files"
DRIVER = "vlmadapt.cli"


def choice(counter, at, moment="before", files="*", who="self"):
    "The environment variables of one crash point."
    values = dict(COUNTER=counter, AT=at, MOMENT=moment, FILES=files, WHO=who)
    return {f"CRASH_{name}": str(value) for name, value in values.items()}


def count():
    "The number of this write; appending is atomic, so that no two processes get the same one."
    counter = os.open(os.environ["CRASH_COUNTER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(counter, b".")
        return os.lseek(counter, 0, os.SEEK_CUR)
    finally:
        os.close(counter)


def victims():
    if os.environ["CRASH_WHO"] == "self":
        return [os.getpid()]
    import psutil

    grid = [p for p in psutil.Process().parents() if DRIVER in " ".join(p.cmdline())][-1]
    own = os.getpid()
    others = [process.pid for process in [grid, *grid.children(recursive=True)]]
    return [*(pid for pid in others if pid != own), own]


def install(hooks):
    "Add the hook to `hooks`, the list `write_hooks`."
    numbers = {}  # of the write of each thread

    def hook(moment, path):
        if not fnmatch(str(path), os.environ["CRASH_FILES"]):
            return
        if moment == "before":
            numbers[threading.get_ident()] = count()
        chosen = int(os.environ["CRASH_AT"]), os.environ["CRASH_MOMENT"]
        if (numbers[threading.get_ident()], moment) == chosen:
            for pid in victims():
                os.kill(pid, signal.SIGKILL)

    hooks.append(hook)


class OnImport(MetaPathFinder):
    "Installs the hook when the library is imported; until then nothing is imported early."

    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            install(module.write_hooks)

        spec.loader.exec_module = exec_module
        return spec
