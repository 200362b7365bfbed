# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import argparse
import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook

from mlla_mm.checkpoints.reader import checkpoints_are_trusted, trust_checkpoints
from mlla_mm.engine import config_files, options, parts

from ..processes import load_tool


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


def test_weights_that_the_command_line_is_to_name(tmp_path):
    written = with_weights('')
    del written.model.backbone.init_cfg.checkpoint
    with pytest.raises(ValueError, match='init_cfg.checkpoint=FILE'):
        options.require_pretrained(written)
    with pytest.raises(ValueError, match='init_cfg.checkpoint=FILE'):
        options.require_pretrained(with_weights(''))


def test_a_resumed_run_does_without_the_pretrained_weights(tmp_path):
    cfg = with_weights(tmp_path / 'MLLA_T.pth', work_dir=str(tmp_path))
    options.set_resume(cfg, 'auto')  # there is no checkpoint
    with pytest.raises(FileNotFoundError):
        options.require_pretrained(cfg)
    torch.save(dict(meta=dict(seed=3)), tmp_path / 'epoch_1.pth')
    options.set_resume(cfg, 'auto')
    assert cfg.model.backbone.init_cfg is None
    options.require_pretrained(cfg)


def test_a_whole_model_does_without_the_pretrained_weights(tmp_path):
    (tmp_path / 'whole.pth').touch()
    cfg = with_weights(tmp_path / 'MLLA_T.pth', load_from=str(tmp_path / 'whole.pth'))
    off = copy.deepcopy(cfg)
    options.add_weight_hooks(cfg)
    options.start_from_whole_model(cfg)
    assert cfg.model.backbone.init_cfg is None
    options.require_pretrained(cfg)
    # Without the check the file may be of anything.
    off.default_hooks = dict(check_weights=dict(type='NoHook'))
    options.add_weight_hooks(off)
    options.start_from_whole_model(off)
    with pytest.raises(FileNotFoundError):
        options.require_pretrained(off)


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
    if folder is None:  # mmseg's hook draws with the visualizer's backends
        (backend,) = cfg.visualizer.vis_backends
        assert backend.type == 'LocalVisBackend'
        folder = Path(backend.save_dir).parent
    assert Path(folder) == tmp_path


@pytest.mark.parametrize('visualizer', [None, dict(type='Visualizer'), dict(name='v')])
@pytest.mark.parametrize(
    'hook, right',
    [
        ('DetVisualizationHook', 'DetLocalVisualizer'),
        ('SegVisualizationHook', 'SegLocalVisualizer'),
        ('VisualizationHook', 'UniversalVisualizer'),
    ],
)
def test_draw_results_needs_a_visualizer_that_draws(visualizer, hook, right, tmp_path):
    cfg = make(default_hooks=dict(visualization=dict(type=hook)), visualizer=visualizer)
    with pytest.raises(ValueError, match=right):
        options.draw_results(cfg, str(tmp_path))


def test_other_backends_stay_where_they_are(tmp_path):
    backends = [
        dict(type='TensorboardVisBackend'),
        dict(type='LocalVisBackend', img_save_dir='drawn'),
    ]
    cfg = make(
        default_hooks=dict(visualization=dict(type='SegVisualizationHook')),
        visualizer=dict(type='SegLocalVisualizer', vis_backends=backends),
    )
    options.draw_results(cfg, str(tmp_path))
    other, local = cfg.visualizer.vis_backends
    assert local.img_save_dir == 'drawn'
    assert local.save_dir == str(tmp_path / 'vis_data')
    assert other == dict(type='TensorboardVisBackend')

    cfg.visualizer.vis_backends = dict(type='TensorboardVisBackend')
    options.draw_results(cfg, str(tmp_path))
    kinds = [x['type'] for x in cfg.visualizer.vis_backends]
    assert kinds == ['TensorboardVisBackend', 'LocalVisBackend']


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


@pytest.mark.parametrize('wrapped', [False, True], ids=['list', 'evaluator'])
def test_predictions_of_several_metrics(wrapped, tmp_path):
    def evaluator(*kinds):
        metrics = [dict(type=kind) for kind in kinds]
        return dict(type='Evaluator', metrics=metrics) if wrapped else metrics

    def metrics(cfg):
        return cfg.test_evaluator.metrics if wrapped else cfg.test_evaluator

    several = evaluator('CocoMetric', 'VOCMetric')
    cfg = make(default_scope='mmdet', test_evaluator=several)
    options.dump_predictions(cfg, 'all.pkl')
    kinds = [x['type'] for x in metrics(cfg)]
    assert kinds == ['CocoMetric', 'VOCMetric', 'DumpDetResults']

    several = evaluator('DepthMetric', 'IoUMetric', 'IoUMetric')
    cfg = make(default_scope='mmseg', test_evaluator=several)
    options.dump_predictions(cfg, str(tmp_path / 'maps'))
    folders = [x.get('output_dir') for x in metrics(cfg)]
    assert folders == [None, str(tmp_path / 'maps'), None]

    cfg = make(default_scope='mmseg', test_evaluator=evaluator('DepthMetric'))
    with pytest.raises(ValueError, match='IoUMetric'):
        options.dump_predictions(cfg, str(tmp_path / 'none'))
    assert not (tmp_path / 'none').exists()


def test_draw_results_needs_a_hook():
    with pytest.raises(ValueError, match='default_hooks.visualization'):
        options.draw_results(make(default_hooks=dict()), 'out')


@pytest.mark.parametrize('source', ['', '/nowhere/epoch_1.pth'])
def test_checkpoints_to_load_that_are_not_there(source):
    cfg = Config(dict(load_from=source))
    with pytest.raises((FileNotFoundError, ValueError), match='load_from=None'):
        options.add_weight_hooks(cfg)
