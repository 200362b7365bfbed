# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Imports go one way: arch <- ops <- layers <- backbones <- weights and layouts."""

import ast
from pathlib import Path

import mlla_mm

PACKAGE = Path(mlla_mm.__file__).parent
# From below to above; of what has no place here nothing is asked.
ORDER = [
    'mlla_mm.arch',
    'mlla_mm.ops',
    'mlla_mm.models.layers',
    'mlla_mm.models.backbones',
    'mlla_mm.checkpoints.layout',
    'mlla_mm.checkpoints.pretrained',
    'mlla_mm.models',
    'mlla_mm.engine',
    'mlla_mm.apis',
    'mlla_mm.evaluation',
]


def place(module):
    """The first that names a module, or a package around it; None if there is none."""
    places = [i for i, name in enumerate(ORDER) if f'{module}.'.startswith(f'{name}.')]
    return min(places, default=None)


def modules():
    """Names and syntax trees of the modules that have a place."""
    for path in [*PACKAGE.glob('*.py'), *PACKAGE.glob('*/**/*.py')]:
        parts = ('mlla_mm', *path.relative_to(PACKAGE).with_suffix('').parts)
        package = parts[:-1]
        name = '.'.join(package if parts[-1] == '__init__' else parts)
        if place(name) is not None:
            yield name, package, ast.parse(path.read_text())


def targets(node, package):
    """The modules that an import statement names, in full."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    start = package[: len(package) + 1 - node.level] if node.level else ()
    module = '.'.join([*start, *filter(None, [node.module])])
    # What is imported from a package may be a module of it.
    return [module, *(f'{module}.{alias.name}' for alias in node.names)]


def test_imports_go_one_way():
    seen = set()
    for name, package, tree in modules():
        for node in ast.walk(tree):
            for target in targets(node, package):
                above = place(target)
                assert above is None or above <= place(name), f'{name}: {target}'
                seen.add((place(name), above))
    # The walk finds what there is to find.
    assert {(1, 1), (2, 1), (3, 0), (3, 2), (4, 0), (5, 4)} <= seen


def test_arch_imports_nothing_of_ours():
    (tree,) = (tree for name, _, tree in modules() if name == 'mlla_mm.arch')
    for node in ast.walk(tree):
        for target in targets(node, ('mlla_mm',)):
            assert target.split('.')[0] in ('collections', 'math', 'typing'), target


def test_no_import_of_ours_hides_in_a_function_of_the_models():
    for name, _, tree in modules():
        if not name.startswith('mlla_mm.models'):
            continue
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                hidden = [
                    node
                    for node in ast.walk(function)
                    if isinstance(node, ast.ImportFrom) and node.level
                ]
                assert not hidden, f'{name}.{function.name}'
