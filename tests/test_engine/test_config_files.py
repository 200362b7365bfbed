# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import copy
import re
import sys

import pytest
from mmengine.config import Config

from mlla_mm.engine import config_files
from mlla_mm.engine.config_files import read_config

from ..bad_data import assert_says
from ..nano import NANO
from ..processes import run_tool


def test_a_checkpoint_in_place_of_a_config(tmp_path):
    path = tmp_path / 'epoch_1.pth'
    path.write_bytes(b'x')
    with pytest.raises(ValueError, match='epoch_1.pth is no config, .* the order of'):
        config_files.read_config(str(path))


def changes_of(written, run):
    return list(config_files.describe_changes(written.to_dict(), run.to_dict()))


def test_changes_of_a_config():
    written = Config(dict(a=1, b=dict(c=[1, dict(d=2)], e='x'), f=[1, 2], g=None))
    run = copy.deepcopy(written)
    assert not changes_of(written, run)
    run.merge_from_dict({'a': 2, 'b.e': '/folder' * 50 + '/coco', 'h': dict(i=1)})
    run.b.c[1].d = 3
    run.b.c.append(4)
    run.f = [1]
    run.pop('g')
    changes = changes_of(written, run)
    assert re.fullmatch(r"b.e: 'x' -> '/folder.{50,200}/coco'", changes.pop(3))
    assert changes == [
        'a: 1 -> 2',
        'b.c.1.d: 2 -> 3',
        'b.c.2: - -> 4',
        'f: [1, 2] -> [1]',
        'g: None -> -',
        "h: - -> {'i': 1}",
    ]
    assert written.a == 1


def test_everything_of_ours_is_registered(tmp_path):
    """Also if the config does not import mlla_mm."""
    path = tmp_path / 'a.py'
    path.write_text(
        "default_scope = 'mmpretrain'\ncustom_imports = dict(imports=['re'])"
    )
    script = (
        'from mlla_mm.engine.config_files import read_config\n'
        'from mmengine.registry import MODELS\n'
        f'read_config({str(path)!r})\n'
        "assert 'MESAClassifier' in MODELS.module_dict"
    )
    pytest.importorskip('mmpretrain')
    run_tool('python', '-c', script)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with modules, where the tool is started; what is imported is removed."""
    (tmp_path / 'own_module.py').write_text('VALUE = 1')
    (tmp_path / 'own_failing.py').write_text('\nimport own_missing_library')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    yield tmp_path
    for name in ('own_module', 'own_failing'):
        sys.modules.pop(name, None)


def read(folder, text, options=None):
    path = folder / 'a.py'
    path.write_text(text)
    return read_config(str(path), options)


def test_modules_of_the_folder_are_imported(folder):
    read(folder, "custom_imports = dict(imports=['own_module'])")
    assert sys.modules['own_module'].VALUE == 1
    # No file there hides an installed module.
    assert sys.path[-1] == str(folder)


def test_options_name_modules_too(folder):
    read(folder, 'a = 1', {'custom_imports.imports': ['own_module']})
    assert 'own_module' in sys.modules


@pytest.mark.parametrize(
    'value, words',
    [
        ("dict(imports=['own_absent.x'])", ['own_absent.x', 'PYTHONPATH', 'no module']),
        ("dict(imports='own_failing')",
         ["No module named 'own_missing_library'", 'own_failing.py, line 2']),
        ("['own_module']", ["dict(imports=['own_module'], allow_failed_imports"]),
        ("'own_module'", ["dict(imports=['own_module'], allow_failed_imports"]),
        ("dict(imports=('own_module',))", ["dict(imports=['own_module']"]),
        ("dict(import_=['re'])", ['custom_imports.import_', 'imports']),
    ],
)  # fmt: skip
def test_modules_that_cannot_be_imported(folder, value, words):
    with pytest.raises(ValueError) as caught:
        read(folder, f'custom_imports = {value}')
    assert_says(caught.value, 'custom_imports', *words)
    assert '\n' not in str(caught.value)


def test_failures_that_are_allowed_are_warned_of(folder):
    with pytest.warns(UserWarning, match='own_failing.*own_missing_library'):
        read(
            folder,
            "custom_imports = dict(imports=['own_failing', 'own_module'], "
            'allow_failed_imports=True)',
        )
    assert 'own_module' in sys.modules


def test_a_config_with_other_imports_loses_nothing_of_ours(tmp_path):
    """Nor in mmpretrain's own tools, which do not import mlla_mm themselves."""
    pytest.importorskip('mmpretrain')
    path = tmp_path / 'a.py'
    path.write_text(
        f'_base_ = {str(NANO["mmpretrain"])!r}\n'
        "custom_imports = dict(imports=['re'], _delete_=True)"
    )
    script = (
        'from mmengine.config import Config\n'
        'from mmpretrain.registry import HOOKS, MODELS\n'
        'from mmengine.registry import init_default_scope\n'
        f'cfg = Config.fromfile({str(path)!r})\n'
        'init_default_scope(cfg.default_scope)\n'
        'MODELS.build(cfg.model)\n'
        'HOOKS.build(cfg.default_hooks.mesa)\n'
    )
    run_tool('python', '-c', script)


@pytest.mark.parametrize(
    'text, words',
    [
        ('x = 1\ny = [1, 2))', ['line 2', 'y = [1, 2))']),
        ('x = y', ["name 'y' is not defined"]),
        ("_base_ = ['nowhere.py']", ['nowhere.py']),
    ],
)
def test_configs_that_cannot_be_read(call_tool, tmp_path, text, words):
    path = tmp_path / 'own.py'
    path.write_text(text)
    result = call_tool('tools/train.py', path, check=False)
    assert result.returncode == 1
    assert_says(result.stderr, f'Error: {path}', *words)


@pytest.mark.parametrize(
    'option, words',
    [
        ('train_cfg.max_epochs', ['KEY=VALUE', 'without spaces']),
        ('a=[1,2', ['bracket']),
        ("a={'type':'SGD','lr':1}", ['a dict', 'a.NAME=VALUE', 'a._delete_=True']),
        ("a=[dict(type='SGD')]", ['a dict']),
    ],
)
@pytest.mark.parametrize('tool', ['train.py', 'misc/print_config.py'])
def test_options_of_another_form(call_tool, tool, option, words):
    path = NANO['mmseg']
    options = ('--cfg-options', option)
    result = call_tool(f'tools/{tool}', path, *options, check=False)
    assert result.returncode == 2
    assert_says(result.stderr, option, *words)


def test_items_of_lists_by_their_number():
    cfg = Config.fromfile(NANO['mmseg'])
    config_files.merge_options(cfg, {'param_scheduler[0].end': 7})
    assert cfg.param_scheduler[0].end == 7


def test_none_becomes_a_dict():
    cfg = Config.fromfile(NANO['mmdet'])
    assert cfg.model.backbone.init_cfg is None
    options = {
        'model.backbone.init_cfg.type': 'Pretrained',
        'model.backbone.init_cfg.checkpoint': 'x.pth',
        'optim_wrapper.clip_grad.max_norm': 1.0,
        'model.rpn_head.init_cfg.type': 'Normal',
    }
    cfg.optim_wrapper.clip_grad = None
    config_files.merge_options(cfg, options)
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='x.pth')
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=1.0)
    assert cfg.model.rpn_head.init_cfg.type == 'Normal'
    config_files.merge_options(cfg, {'model.backbone.init_cfg': None})
    assert cfg.model.backbone.init_cfg is None


def test_a_dict_in_place_of_a_text():
    cfg = Config(dict(model=dict(backbone=dict(arch='tiny'))))
    arch = 'model.backbone.arch.'
    options = {f'{arch}_delete_': True, f'{arch}embed_dims': 48}
    config_files.merge_options(cfg, options)
    assert cfg.model.backbone.arch == dict(embed_dims=48)
