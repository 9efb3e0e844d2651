"""Figures about the code: public names, repeated names, long functions and long modules.

`python tools/measure_code.py [FOLDER]` prints them for this checkout, or for another one.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LIBRARY = "vlmadapt"
BENCHMARK = "mini"  # package of the built-in synthetic benchmark
LONGEST_FUNCTION = 45  # lines
LONGEST_MODULE = 400  # lines

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules(root: Path) -> dict[str, ast.Module]:
    "Return the syntax tree of every module below `root`, by its path."
    trees = {}
    for path in sorted((root / LIBRARY).rglob("*.py")):
        if path.name != "_modidx.py":
            name = path.relative_to(root / LIBRARY).as_posix()
            trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def defined_names(tree: ast.Module) -> Iterator[str]:
    "Yield the names of classes, functions and constants that a module defines."
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def length(node: ast.AST) -> int:
    "Return the number of lines of a definition, decorators included."
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return node.end_lineno - first + 1


def long_functions(trees: dict[str, ast.Module]) -> list[tuple[int, str]]:
    "Return lines and name of the functions that are too long, longest first."
    found = []
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, Function) and length(node) > LONGEST_FUNCTION:
                found.append((length(node), f"{module}: {node.name}"))
    return sorted(found, reverse=True)


def long_modules(root: Path, trees: dict[str, ast.Module]) -> list[tuple[int, str]]:
    "Return lines and name of the modules that are too long, longest first."
    found = []
    for module in trees:
        lines = len((root / LIBRARY / module).read_text(encoding="utf-8").splitlines())
        if lines > LONGEST_MODULE:
            found.append((lines, module))
    return sorted(found, reverse=True)


def public_names(trees: dict[str, ast.Module]) -> Counter:
    "Count in how many modules each public name is defined."
    counts: Counter = Counter()
    for tree in trees.values():
        counts.update({name for name in defined_names(tree) if not name.startswith("_")})
    return counts


def report(root: Path) -> Iterator[str]:
    "Yield the lines of the report."
    trees = modules(root)
    library = {k: tree for k, tree in trees.items() if not k.startswith(f"{BENCHMARK}/")}
    names = public_names(trees)
    repeated = sorted(name for name, number in names.items() if number > 1)
    functions = long_functions(trees)
    files = long_modules(root, trees)
    yield f"modules: {len(trees)}"
    yield f"public names: {len(names)}, without {BENCHMARK}: {len(public_names(library))}"
    yield f"public names defined in several modules: {len(repeated)}"
    yield from (f"  {name}" for name in repeated)
    yield f"functions of more than {LONGEST_FUNCTION} lines: {len(functions)}"
    yield from (f"  {lines:4} {name}" for lines, name in functions)
    yield f"modules of more than {LONGEST_MODULE} lines: {len(files)}"
    yield from (f"  {lines:4} {name}" for lines, name in files)


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    print("\n".join(report(Path(folder))))
