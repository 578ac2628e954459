"""A public name means one thing: no two modules define it differently."""

import ast
import importlib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"asgd_jax": ROOT / "src", "experiments": ROOT, "benchmarks": ROOT}

# What every module of a kind has: the figures (see `experiments.reproduce`), the benchmarks' items
# and their cases (`benchmarks.run`), the programs.
PROTOCOL = {
    *("CAPTION", "PROXY", "WHY", "PRESETS", "Config", "run", "plot", "claims", "notes"),
    *("TITLE", "Case", "CASES", "QUICK_CASES"),
    "main",
}


def defined_names(tree):
    """Yields the public names that a module binds at its top level, imports left out."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))


def modules():
    for package, root in FOLDERS.items():
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__"), file


def test_no_two_modules_mean_different_things_by_a_name():
    where = defaultdict(list)
    for module, file in modules():
        for name in set(defined_names(ast.parse(file.read_text()))):
            if not name.startswith("_") and name not in PROTOCOL:
                where[name].append(module)
    clashes = {}
    for name, found in where.items():
        if len(found) > 1:
            values = [getattr(importlib.import_module(module), name) for module in found]
            # Equal words and numbers are one thing, as an arm of the same name in two figures.
            plain = isinstance(values[0], (str, int, float))
            if any(not (value is values[0] or (plain and value == values[0])) for value in values):
                clashes[name] = found
    assert not clashes


def test_what_is_allowed_is_needed():
    counts = defaultdict(int)
    for _, file in modules():
        for name in set(defined_names(ast.parse(file.read_text()))):
            counts[name] += 1
    assert {name for name in PROTOCOL if counts[name] < 2} == set()
