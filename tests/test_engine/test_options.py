# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import argparse
import copy
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook

from mlla_mm.checkpoints.reader import checkpoints_are_trusted, trust_checkpoints
from mlla_mm.engine import config_files, options, parts

from ..processes import load_tool, run_tool


def make(**more) -> Config:
    return Config(
        dict(
            model=dict(backbone=dict(type='MLLA')),
            train_dataloader=dict(batch_size=2),
            auto_scale_lr=dict(enable=False, base_batch_size=16),
            **more,
        )
    )


def with_weights(path, **more) -> Config:
    cfg = make(**more)
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    return cfg


def test_missing_weights_name_their_address(tmp_path):
    scoped = with_weights(tmp_path / 'MLLA_S.pth')
    scoped.model.backbone.init_cfg.type = 'mmengine.Pretrained'
    with pytest.raises(FileNotFoundError, match='cloud.tsinghua.edu.cn/f/0e5d0b14'):
        options.require_pretrained(scoped)
    with pytest.raises(FileNotFoundError, match='cloud.tsinghua.edu.cn/f/0e5d0b14'):
        options.require_pretrained(with_weights(tmp_path / 'MLLA_S.pth'))
    with pytest.raises(FileNotFoundError, match='init_cfg'):
        options.require_pretrained(with_weights(tmp_path / 'mine.pth'))
    (tmp_path / 'mine.pth').touch()
    options.require_pretrained(with_weights(tmp_path / 'mine.pth'))


def test_a_resumed_run_does_without_the_pretrained_weights(tmp_path):
    cfg = with_weights(tmp_path / 'MLLA_T.pth', work_dir=str(tmp_path))
    options.set_resume(cfg, 'auto')  # there is no checkpoint
    with pytest.raises(FileNotFoundError):
        options.require_pretrained(cfg)
    torch.save(dict(meta=dict(seed=3)), tmp_path / 'epoch_1.pth')
    options.set_resume(cfg, 'auto')
    assert cfg.model.backbone.init_cfg is None
    options.require_pretrained(cfg)


def test_weights_among_several_ways_to_start(tmp_path):
    cfg = with_weights(tmp_path / 'mine.pth', work_dir=str(tmp_path))
    constant = dict(type='Constant', layer='LayerNorm', val=1.0)
    cfg.model.backbone.init_cfg = [constant, cfg.model.backbone.init_cfg]
    with pytest.raises(FileNotFoundError, match='mine.pth'):
        options.require_pretrained(cfg)
    torch.save(dict(meta=dict(seed=3)), tmp_path / 'epoch_1.pth')
    options.set_resume(cfg, 'auto')
    assert cfg.model.backbone.init_cfg == [constant]


def test_what_a_checkpoint_says_is_checked_whatever_the_config_names(tmp_path):
    """A config that does not inherit ours may have MMEngine's hooks alone."""
    torch.save(dict(meta=dict(seed=3)), tmp_path / 'epoch_1.pth')
    hooks = dict(
        resumed_state=dict(type='ResumedStateHook'),
        resumed_settings=dict(type='ResumedSettingsHook'),
    )
    cfg = make(work_dir=str(tmp_path))
    options.set_resume(cfg, 'auto')
    assert cfg.default_hooks == hooks
    own = list(hooks.values())
    cfg = make(work_dir=str(tmp_path), custom_hooks=own)
    options.set_resume(cfg, 'auto')
    assert parts.hooks_of(cfg) == own
    off = dict(resumed_settings=dict(type='NoHook'))
    cfg = make(work_dir=str(tmp_path), default_hooks=off)
    options.set_resume(cfg, 'auto')
    assert cfg.default_hooks.resumed_settings == off['resumed_settings']


def test_tta_wraps_the_model_and_its_pipeline():
    cfg = make(
        tta_model=dict(type='SegTTAModel'),
        tta_pipeline=[dict(type='Load')],
        test_dataloader=dict(dataset=dict(dataset=dict(pipeline=[]))),
    )
    options.enable_tta(cfg)
    assert cfg.model.type == 'SegTTAModel'
    assert cfg.model.module.backbone.type == 'MLLA'
    assert cfg.test_dataloader.dataset.dataset.pipeline == [dict(type='Load')]


def run_config(*words):
    parser = argparse.ArgumentParser()
    load_tool('tools/arguments.py').add_run_arguments(parser)
    args = parser.parse_args([str(word) for word in words])
    cfg = config_files.read_config(args.config)
    options.apply_run_arguments(cfg, args)
    return cfg


def test_run_arguments(tmp_path):
    path = tmp_path / 'a_b.py'
    path.write_text('randomness = dict(seed=None, diff_rank_seed=True)\nlr = 1')
    cfg = run_config(path)
    assert cfg.work_dir == 'work_dirs/a_b'
    assert cfg.launcher == 'none'
    cfg = run_config(path, '--work-dir', 'x', '--seed', 3, '--cfg-options', 'lr=2')
    assert (cfg.work_dir, cfg.lr) == ('x', 2)
    assert cfg.randomness == dict(seed=3, diff_rank_seed=True)
    path.write_text("work_dir = 'own'")
    assert run_config(path).work_dir == 'own'
    with pytest.raises(FileNotFoundError, match='Config not found'):
        run_config(tmp_path / 'c.py')


def test_a_checkpoint_in_place_of_a_config(tmp_path):
    path = tmp_path / 'epoch_1.pth'
    path.write_bytes(b'x')
    with pytest.raises(ValueError, match='epoch_1.pth is no config, .* the order of'):
        config_files.read_config(str(path))


def test_checkpoints_are_not_trusted_by_default(tmp_path):
    path = tmp_path / 'a.py'
    path.write_text('')
    run_config(path)
    assert not checkpoints_are_trusted()
    try:
        run_config(path, '--trust-checkpoint')
        assert checkpoints_are_trusted()
        run_config(path)
        assert not checkpoints_are_trusted()
        path.write_text('trust_checkpoint = True')
        run_config(path)
        assert checkpoints_are_trusted()
    finally:
        trust_checkpoints(False)


@pytest.mark.parametrize(
    'kind, name',
    [
        ('EMAHook', 'EMAHook'),
        ('mmengine.EMAHook', 'EMAHook'),
        (EMAHook, 'EMAHook'),
        (None, None),
        (7, '7'),
    ],
)
def test_names_of_types(kind, name):
    assert parts.kind_of(dict(type=kind)) == name


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


@pytest.mark.parametrize(
    'hook, changed',
    [
        ('mmdet.DetVisualizationHook', dict(draw=True)),
        ('SegVisualizationHook', dict(draw=True, interval=1)),
        ('VisualizationHook', dict(enable=True, interval=1)),
    ],
)
def test_draw_results(hook, changed, tmp_path):
    cfg = make(
        default_hooks=dict(visualization=dict(type=hook)), visualizer=dict(type='V')
    )
    options.draw_results(cfg, str(tmp_path))
    drawn = cfg.default_hooks.visualization
    assert {key: drawn[key] for key in changed} == changed
    folder = drawn.get('test_out_dir') or drawn.get('out_dir')
    assert (folder or cfg.visualizer.save_dir) == str(tmp_path)


def test_predictions_go_where_they_were_asked_to(tmp_path):
    cfg = make(default_scope='mmdet', test_evaluator=dict(type='CocoMetric'))
    options.dump_predictions(cfg, 'all.pkl')
    assert [e['type'] for e in cfg.test_evaluator] == ['CocoMetric', 'DumpDetResults']

    cfg = make(default_scope='mmseg', test_evaluator=dict(type='IoUMetric'))
    options.dump_predictions(cfg, str(tmp_path / 'maps'))
    assert cfg.test_evaluator.output_dir == str(tmp_path / 'maps')
    assert (tmp_path / 'maps').is_dir()
    with pytest.raises(ValueError, match='folder'):
        options.dump_predictions(cfg, 'all.pkl')


def test_draw_results_needs_a_hook():
    with pytest.raises(ValueError, match='default_hooks.visualization'):
        options.draw_results(make(default_hooks=dict()), 'out')
