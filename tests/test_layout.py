# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Imports go one way, from the folders above to those below."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From below to above. What stands on one line may import nothing of that line's others.
ORDER = [
    {'mlla_mm.compat', 'mlla_mm.arch', 'mlla_mm.version'},
    {'mlla_mm.utils', 'mlla_mm.ops'},
    {'mlla_mm.models.layers'},
    {'mlla_mm.models.backbones'},
    {'mlla_mm.models'},
    {'mlla_mm.checkpoints', 'mlla_mm.datasets'},
    {'mlla_mm.reproducible', 'mlla_mm.visualization'},
    {'mlla_mm.engine'},
    {'mlla_mm.evaluation'},
    {'mlla_mm.checks', 'mlla_mm.export'},
    {'mlla_mm.apis'},
    {'mlla_mm'},
    {'benchmarks'},
    {'tools'},
]


def place(module):
    """Number of the line in ORDER and most precise name; None for other modules."""
    parts = module.split('.')
    for end in range(len(parts), 0, -1):
        name = '.'.join(parts[:end])
        for number, names in enumerate(ORDER):
            if name in names:
                return number, name
    return None


def modules():
    """Name, package and syntax tree of every module of ours."""
    for folder in ('mlla_mm', 'benchmarks', 'tools'):
        for path in sorted((ROOT / folder).rglob('*.py')):
            parts = path.relative_to(ROOT).with_suffix('').parts
            package = parts[:-1]
            name = '.'.join(package if parts[-1] == '__init__' else parts)
            yield name, package, ast.parse(path.read_text())


MODULES = list(modules())
NAMES = {name for name, *_ in MODULES}


def targets(node, package):
    """The modules that an import statement names, in full."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    start = package[: len(package) + 1 - node.level] if node.level else ()
    module = '.'.join([*start, *filter(None, [node.module])])
    # What is imported from a package may be a module of it.
    inside = [f'{module}.{alias.name}' for alias in node.names]
    found = [name for name in inside if name in NAMES]
    return found if len(found) == len(inside) else [module, *found]


def imports():
    """Every import of one module of ours by another, in functions too."""
    for name, package, tree in MODULES:
        for node in ast.walk(tree):
            for target in targets(node, package):
                if place(target) is not None:
                    yield name, target


def test_imports_go_one_way():
    seen = set()
    for name, target in imports():
        number, folder = place(name)
        below, other = place(target)
        # ``import mlla_mm`` registers everything, wherever it stands.
        if target == 'mlla_mm' or folder == other:
            continue
        assert below < number, f'{name} imports {target}'
        seen.add((folder, other))
    # The walk finds what there is to find.
    assert ('mlla_mm.models.layers', 'mlla_mm.ops') in seen
    assert ('mlla_mm.apis', 'mlla_mm.checks') in seen
    assert ('benchmarks', 'mlla_mm.models') in seen


def test_every_module_has_a_place():
    assert [name for name in NAMES if place(name) is None] == []
    folders = {place(name)[1] for name in NAMES}
    assert folders >= set().union(*ORDER)
    # The package's own line is for its __init__ alone.
    assert [name for name in NAMES if place(name)[1] == 'mlla_mm'] == ['mlla_mm']


@pytest.mark.parametrize(
    'line, fails',
    [
        ('from ..models import MLLA', True),
        ('from mlla_mm.engine import launch', True),
        ('import mlla_mm.apis.model', True),
        ('from .naive import mlp', False),
        ('from ..compat import pytorch', False),
    ],
)
def test_what_the_walk_finds(line, fails):
    """As if the line stood in a module of ops, in a function."""
    node = ast.parse(f'def f():\n    {line}').body[0].body[0]
    found = [place(target) for target in targets(node, ('mlla_mm', 'ops'))]
    number, folder = place('mlla_mm.ops')
    assert any(x[0] >= number and x[1] != folder for x in found) == fails


def test_arch_imports_nothing_of_ours():
    (tree,) = (tree for name, _, tree in MODULES if name == 'mlla_mm.arch')
    for node in ast.walk(tree):
        for target in targets(node, ('mlla_mm',)):
            assert target.split('.')[0] in ('collections', 'math', 'typing'), target
