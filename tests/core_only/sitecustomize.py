"""Hide installed packages from a process, as if they were not installed.

`HIDDEN_PACKAGES` holds the names of their top-level modules, and `HIDDEN_DISTRIBUTIONS` their names
in the package index, separated by commas. Python imports this module at its start from PYTHONPATH.
"""

import os
import sys
from importlib.machinery import PathFinder

MODULES = frozenset(os.environ.get("HIDDEN_PACKAGES", "").split(","))
DISTRIBUTIONS = frozenset(os.environ.get("HIDDEN_DISTRIBUTIONS", "").split(","))


class CorePathFinder(PathFinder):
    """Find what lies on `sys.path`, apart from the hidden packages."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """Return None for a hidden module: no other finder knows it."""
        if fullname.partition(".")[0] in MODULES:
            return None
        return super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        """Yield the distributions that are not hidden."""
        for found in PathFinder.find_distributions(*args, **kwargs):
            if found.metadata["Name"].lower().replace("-", "_") not in DISTRIBUTIONS:
                yield found


sys.meta_path[:] = [CorePathFinder if f is PathFinder else f for f in sys.meta_path]
