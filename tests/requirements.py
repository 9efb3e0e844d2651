"""Requirements of the project, from settings.ini, and what of the environment they leave out."""

import importlib.metadata

from derived import settings
from packaging.requirements import Requirement


def plain(name):
    """Return the name of a distribution in one spelling, such as `torch_geometric`."""
    return name.lower().replace("-", "_").replace(".", "_")


def requirements(extra=None):
    """Return the names of the core requirements, or of those of an extra."""
    key = f"{extra}_requirements" if extra else "requirements"
    return {plain(Requirement(text).name) for text in settings()[key].split()}


def extras():
    """Return the names of the extras."""
    return [
        key.removesuffix("_requirements")
        for key in settings()
        if key.endswith("_requirements") and key != "requirements"
    ]


def with_dependencies(names):
    """Return the installed distributions `names` and all that they require."""
    found, open_names = set(), set(names)
    while open_names:
        name = open_names.pop()
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # required on other systems only
        needed = [Requirement(line) for line in lines]
        here = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
        open_names |= {plain(r.name) for r in here} - found
    return found


def without_extras():
    """Return variables for `core_only/sitecustomize.py` that hide all but the core requirements."""
    core = with_dependencies(requirements()) | {"vlmadapt", "pip"}
    owners = importlib.metadata.packages_distributions()
    modules = {m for m, names in owners.items() if not core & set(map(plain, names))}
    absent = {plain(d.metadata["Name"]) for d in importlib.metadata.distributions()} - core
    return {
        "HIDDEN_PACKAGES": ",".join(sorted(modules)),
        "HIDDEN_DISTRIBUTIONS": ",".join(sorted(absent)),
    }
