# ---
# jupyter:
#   jupytext:
#     comment_magics: false
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Registry of methods
# > Method classes by name, imported when they are looked up, and chosen by the kind of problem.

# %%
#| default_exp methods.registry

# %%
#| export
import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vlmadapt.core.registry import choose
from vlmadapt.methods.requirements import check_kind, generates

# %%
#| hide
from types import SimpleNamespace

from fastcore.test import test_eq, test_fail

# %% [markdown]
# A method is listed under its name with its kind: what it reads and trains. The class itself is named as `"module:Class"` and imported when it is looked up, so that listing methods loads neither torch
# nor any model.

# %%
#| export
Kind = Literal["features", "prompts", "towers", "generation"]


@dataclass(frozen=True)
class RegisteredMethod:
    "One registered method."

    name: str
    kind: Kind  # "features", "prompts" (of towers), "towers" (parts inside them) or "generation"
    target: Any  # the class, or "module:Class"

    def load(self) -> Any:
        "Return the class."
        if not isinstance(self.target, str):
            return self.target
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


def kind_of(
    cls: Any,  # a method class
) -> Kind:
    "The kind of a method class, from what it needs."
    if generates(cls):
        return "generation"
    if cls.needs == {"features"}:
        return "features"
    return "prompts" if hasattr(cls, "text_prompts") else "towers"


# %% [markdown]
# One name may stand for two classes where a method exists for classification and for generation. `registry[name]` gives the first of them; `find` chooses by `problem.kind`. Installed packages add methods by the
# entry point group `vlmadapt.methods`. A name with a colon, `"package.module:Class"`, needs no registration.

# %%
#| export
class MethodRegistry(Mapping[str, Any]):
    "Method classes by name, with the nearest name where one is unknown."

    def __init__(
        self,
        entry_points: str = "",  # group of entry points that name further classes
    ):
        self._classification: dict[str, RegisteredMethod] = {}
        self._generation: dict[str, RegisteredMethod] = {}
        self._entry_points = entry_points

    def register(
        self,
        name: str,  # by which it is looked up
        target: Any,  # the class, or "module:Class"
        kind: Kind | None = None,  # default: from what the class needs
        replace: bool = False,  # may it take the place of another of this name?
    ) -> Any:
        "Add a method under `name` and return `target`; refuse a name that is taken."
        if kind is None:
            kind = kind_of(target)
        choose(kind, dict.fromkeys(get_args(Kind)), "kind of method")
        table = self._generation if kind == "generation" else self._classification
        if name in table and not replace and table[name].target != target:
            raise ValueError(f"method {name!r} is registered already; pass replace=True")
        table[name] = RegisteredMethod(name, kind, target)
        return target

    def _load_entry_points(self) -> None:
        group, self._entry_points = self._entry_points, ""
        if group:
            for point in importlib.metadata.entry_points(group=group):
                self.register(point.name, point.load())

    def _entries(self) -> dict[str, RegisteredMethod]:
        self._load_entry_points()
        return {**self._generation, **self._classification}

    def entry(
        self,
        name: str,  # of a method, or "package.module:Class"
    ) -> RegisteredMethod:
        "Return what is known of a method without importing it; raise ValueError for another name."
        entries = self._entries()
        if name not in entries and isinstance(name, str) and ":" in name:
            cls = RegisteredMethod(name, "features", name).load()
            return RegisteredMethod(cls.__name__, kind_of(cls), cls)
        return choose(name, entries, "method")

    def find(
        self,
        name: str,  # of a method
        problem: Any,  # its `kind` is "classification" or "generation"
    ) -> Any:
        "Return the class of a method for the kind of a problem."
        entry = self.entry(name)
        table = self._generation if problem.kind == "generation" else self._classification
        cls = table.get(name, entry).load()
        check_kind(cls, problem, name)
        return cls

    def names(
        self,
        kind: Kind | None = None,  # only methods of this kind
    ) -> list[str]:
        "Names of the registered methods."
        if kind is None:
            return list(self)
        choose(kind, dict.fromkeys(get_args(Kind)), "kind of method")
        self._load_entry_points()
        tables = (self._classification, self._generation)
        return [name for table in tables for name, entry in table.items() if entry.kind == kind]

    def classifiers(self) -> dict[str, Any]:
        "Import and return the classes of all methods for classification, by name."
        self._load_entry_points()
        return {name: entry.load() for name, entry in self._classification.items()}

    def __getitem__(self, name: str) -> Any:
        return self.entry(name).load()

    def __contains__(self, name: object) -> bool:
        return name in self._entries()

    def __iter__(self) -> Iterator[str]:
        entries = self._entries()
        ordered = [*self._classification, *self._generation]
        return iter([name for name in dict.fromkeys(ordered) if name in entries])

    def __len__(self) -> int:
        return len(self._entries())

    def __repr__(self) -> str:
        return f"<registry of methods: {', '.join(self)}>"


# %%
class Sum:
    needs = {"features"}


class Caption:
    needs = {"generator"}


methods = MethodRegistry()
methods.register("Sum", Sum)
methods.register("Path", "pathlib:Path", "towers")
methods.register("Path", Caption)
test_eq((methods["Sum"], methods["Path"].__name__, list(methods)), (Sum, "Path", ["Sum", "Path"]))
test_eq(methods.find("Path", SimpleNamespace(kind="generation")), Caption)
test_eq(list(methods.classifiers()), ["Sum", "Path"])
test_eq((methods.names("towers"), methods.names("generation")), (["Path"], ["Path"]))
test_eq((methods.get("Product"), "Product" in methods), (None, False))
test_fail(lambda: methods["Sun"], contains="unknown method 'Sun'; did you mean 'Sum'?")
test_fail(lambda: methods.register("Sum", str, "towers"), contains="'Sum' is registered already")
test_fail(
    lambda: methods.find("Sum", SimpleNamespace(kind="generation")), contains="Sum classifies"
)
