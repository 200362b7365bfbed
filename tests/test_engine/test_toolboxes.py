# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import importlib
import sys

import pytest
from mmengine.registry import LOOPS

from mlla_mm.engine import toolboxes
from mlla_mm.reproducible.loops import SeededTrainLoop

from ..nano import NANO

SCRIPT = """
import importlib
import sys

from mlla_mm.checks.config import check_config
from mlla_mm.engine.config_files import read_config
from mlla_mm.engine.toolboxes import TOOLBOXES, load_own_toolbox_alone

load_own_toolbox_alone({config!r})
check_config(read_config({config!r}))
for part in ('datasets', 'engine', 'evaluation', 'models', 'visualization'):
    importlib.import_module(f'{scope}.{{part}}')
assert TOOLBOXES & set(sys.modules) == {{{scope!r}}}
{others}
"""


@pytest.mark.parametrize(
    'scope',
    [
        'mmseg',  # which would import both others
        pytest.param('mmdet', marks=pytest.mark.slow),
        pytest.param('mmpretrain', marks=pytest.mark.slow),
    ],
)
def test_toolboxes_do_without_each_other(run_tool, scope):
    others = 'import mmdet.models, mmpretrain.models'  # a user's module may import it
    script = SCRIPT.format(config=str(NANO[scope]), scope=scope, others=others)
    run_tool('python', '-c', script)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A toolbox that uses two others if it can, and a user's module."""
    use = 'try:\n    import {0}\nexcept ImportError:\n    {0} = None\n'
    (tmp_path / 'box_a.py').write_text(use.format('box_b') + use.format('box_c'))
    (tmp_path / 'box_b.py').touch()
    (tmp_path / 'box_c.py').touch()
    (tmp_path / 'of_user.py').write_text('import box_c\n')
    names = frozenset(('box_a', 'box_b', 'box_c'))
    monkeypatch.setattr(toolboxes, 'TOOLBOXES', names)
    monkeypatch.setattr(sys, 'meta_path', sys.meta_path.copy())
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in (*names, 'of_user'):
        sys.modules.pop(name, None)


def test_what_a_config_names_is_imported(packages, tmp_path):
    config = tmp_path / 'config.py'
    loop = 'train_cfg = dict(type="SeededIterBasedTrainLoop")'
    model = 'backbone = dict(type="box_b.Net")'
    config.write_text(f'default_scope = "box_a"\n{model}\n{loop}\n')
    toolboxes.load_own_toolbox_alone(str(config))
    box = importlib.import_module('box_a')
    assert box.box_b is not None
    assert box.box_c is None
    # Other modules may import it.
    assert importlib.import_module('of_user').box_c is not None


def test_nothing_is_kept_from_a_config_of_other_bases(packages, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text('default_scope = "box_a"\n')
    toolboxes.load_own_toolbox_alone(str(config))
    assert importlib.import_module('box_a').box_c is not None


def test_our_loops_are_these():
    assert {*toolboxes.OUR_LOOPS} == {
        name
        for name, loop in LOOPS.module_dict.items()
        if issubclass(loop, SeededTrainLoop)
    }


def test_a_missing_config_is_left_to_who_reads_it(packages):
    before = sys.meta_path.copy()
    toolboxes.load_own_toolbox_alone('no/config.py')
    assert sys.meta_path == before
