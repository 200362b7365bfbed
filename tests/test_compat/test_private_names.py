# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Private names of other packages stand in mlla_mm/compat alone.

What a subclass overrides or uses of its own base class stays with it.
"""

import ast
import textwrap
from collections.abc import Iterator

import pytest

from ..processes import ROOT

SOURCES = [
    path
    for path in sorted((ROOT / 'mlla_mm').rglob('*.py'))
    if 'compat' not in path.relative_to(ROOT).parts
]
# Documented, despite their looks: of the standard library, and MMEngine's base class.
PUBLIC = {
    *('_asdict', '_fields', '_make', '_replace'),  # of named tuples
    *('os._exit', 'sys._getframe'),
    '_ParamScheduler',
}

BY_NAME = ('getattr', 'hasattr', 'setattr', 'delattr')


def is_private(name: str) -> bool:
    return name.startswith('_') and not name.endswith('__')


def private_names(code: str) -> Iterator[str]:
    """What is touched of others: attributes, but for ``self`` and ``cls``; imports."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield name.value
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner not in ('self', 'cls'):
                found = f'{owner}.{node.attr}'
                if not {node.attr, found} & PUBLIC:
                    yield found
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [*node.module.split('.'), *(alias.name for alias in node.names)]
            yield from (
                name for name in names if is_private(name) and name not in PUBLIC
            )
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split('.')]
            yield from filter(is_private, names)


@pytest.mark.parametrize(
    'path', SOURCES, ids=lambda path: str(path.relative_to(ROOT / 'mlla_mm'))
)
def test_private_names_stand_in_compat(path):
    code = path.read_text()
    assert list(private_names(code)) == []
    assert 'unittest' not in code


def test_what_is_found():
    code = """
        import torch._dynamo
        from torch.nn.modules.batchnorm import _BatchNorm
        from torch._C import x
        from . import _own
        runner._hooks
        hasattr(model, '_shown'), getattr(model, name), getattr(model, 'shown')
        self._own, cls._own, x.__dict__, super().__init__, point._asdict()
        super()._save()
    """
    assert sorted(private_names(textwrap.dedent(code))) == [
        *('_BatchNorm', '_C', '_dynamo', '_shown', 'runner._hooks', 'super()._save'),
    ]
