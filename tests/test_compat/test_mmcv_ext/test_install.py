# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import importlib.util
import sys

import pytest
import torch

from mlla_mm.compat import mmcv_ext

from .shared import extension, needs_compiled, needs_stand_in


@needs_stand_in
def test_unknown_op_says_what_to_do():
    for name in ('carafe_forward', 'nms_rotated'):
        op = getattr(extension(), name)
        with pytest.raises(NotImplementedError) as error:
            op(torch.zeros(1), scale=2)
        assert name in str(error.value)
        assert '--no-build-isolation' in str(error.value)


@needs_stand_in
def test_dunder_names_are_not_ops():
    assert not hasattr(extension(), '__path__')
    assert not hasattr(extension(), '__all__')


@needs_stand_in
def test_stand_in_has_a_spec():
    spec = importlib.util.find_spec('mmcv._ext')
    assert spec.name == 'mmcv._ext'
    assert spec.loader is not None  # mmcv's check_ops_exist asks for it
    from mmengine.utils.dl_utils.misc import mmcv_full_available

    assert mmcv_full_available()


@needs_stand_in
def test_environment_report_of_mmcv():
    from mmcv.utils import collect_env

    report = collect_env()
    assert report['PyTorch'] == torch.__version__
    assert report['MMCV Compiler'] == 'not compiled'
    assert report['MMCV CUDA Compiler'] == 'not compiled'


@needs_stand_in
def test_installing_again_changes_nothing():
    module = sys.modules['mmcv._ext']
    assert mmcv_ext.install()
    assert sys.modules['mmcv._ext'] is module


@needs_compiled
def test_compiled_extension_stays():
    assert not mmcv_ext.install()
    assert importlib.util.find_spec('mmcv._ext').origin.endswith('.so')


@pytest.fixture
def other_mmcv(tmp_path, monkeypatch):
    """Another package mmcv, found first; gives its folder."""
    for name in [n for n in sys.modules if n.split('.')[0] == 'mmcv']:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    return package


def test_steps_aside_for_an_extension_that_loads(other_mmcv):
    (other_mmcv / '_ext.py').write_text('nms = 1')
    assert not mmcv_ext.install()
    assert not mmcv_ext.is_stand_in()
    assert extension().nms == 1


def test_replaces_an_extension_that_does_not_load(other_mmcv):
    (other_mmcv / '_ext.py').write_text('raise ImportError("undefined symbol: _ZN2at")')
    with pytest.warns(UserWarning, match='undefined symbol: _ZN2at'):
        assert mmcv_ext.install()
    assert mmcv_ext.is_stand_in()


def test_stands_in_where_there_is_no_extension(other_mmcv):
    assert mmcv_ext.install()
    assert extension().nms is mmcv_ext.nms


def test_does_nothing_without_mmcv(other_mmcv, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv', None)
    assert not mmcv_ext.install()
    assert 'mmcv._ext' not in sys.modules
