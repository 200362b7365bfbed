# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import argparse
import sys

import pytest
import torch
from mmengine.config import Config
from yapf.yapflib import yapf_api

from mlla_mm.engine import config as options
from mlla_mm.utils.checkpoint_file import checkpoints_are_trusted, trust_checkpoints

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
    with pytest.raises(FileNotFoundError, match='cloud.tsinghua.edu.cn/f/0e5d0b14'):
        options.check_pretrained(with_weights(tmp_path / 'MLLA_S.pth'))
    with pytest.raises(FileNotFoundError, match='init_cfg'):
        options.check_pretrained(with_weights(tmp_path / 'mine.pth'))
    (tmp_path / 'mine.pth').touch()
    options.check_pretrained(with_weights(tmp_path / 'mine.pth'))


def test_a_resumed_run_does_without_the_pretrained_weights(tmp_path):
    cfg = with_weights(tmp_path / 'MLLA_T.pth', resume=True, work_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError):
        options.check_pretrained(cfg)  # no checkpoint to resume from
    torch.save({}, tmp_path / 'epoch_1.pth')
    options.check_pretrained(cfg)
    assert cfg.model.backbone.init_cfg is None


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
    return options.read_run_config(parser.parse_args([str(word) for word in words]))


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


def test_a_hook_of_the_config_has_its_own_options(tmp_path):
    path = tmp_path / 'a.py'
    own = "dict(type='StopOnInvalidLossHook', max_skipped=9)"
    path.write_text(f'custom_hooks = [{own}]')
    hooks = run_config(path).custom_hooks
    assert [hook.type for hook in hooks] == [
        'StopOnInvalidLossHook',
        'CheckWeightsHook',
        'RecordRunHook',
        'ResumedStateHook',
    ]
    assert hooks[0].max_skipped == 9


def test_checkpoints_are_checked_and_not_trusted(tmp_path):
    path = tmp_path / 'a.py'
    path.write_text("custom_hooks = [dict(type='MyHook')]")
    cfg = run_config(path)
    assert [hook.type for hook in cfg.custom_hooks] == [
        *('MyHook', 'CheckWeightsHook', 'RecordRunHook', 'ResumedStateHook'),
        'StopOnInvalidLossHook',
    ]
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
    'hook, changed',
    [
        ('DetVisualizationHook', dict(draw=True)),
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


@pytest.mark.parametrize('compile', [True, dict(backend='eager')])
def test_compile_means_the_backbone(compile):
    cfg = Config(dict(model=dict(backbone=dict(type='MLLA')), compile=compile))
    options.compile_backbone(cfg)
    assert cfg.model.backbone.compile == compile
    assert cfg.compile is False
    cfg = Config(dict(model=dict(backbone=dict(type='ResNet')), compile=compile))
    options.compile_backbone(cfg)
    assert cfg.compile == compile
    assert 'compile' not in cfg.model.backbone


def test_a_config_is_laid_out_once(monkeypatch):
    texts = []

    def lay_out(text, **kwargs):
        texts.append(text)
        return f'{text}\n', True

    for owner in (yapf_api, sys.modules['mmengine.config.config']):
        if hasattr(owner, 'FormatCode'):
            monkeypatch.setattr(owner, 'FormatCode', lay_out)
    options.lay_out_configs_once()
    options.lay_out_configs_once()
    cfg = Config(dict(a=1))
    assert cfg.pretty_text == cfg.pretty_text == f'{texts[0]}\n'
    cfg.a = 2
    assert cfg.pretty_text == f'{texts[1]}\n'
    assert len(texts) == 2 and '2' in texts[1]
