# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Our tools with a config that names MMEngine's loops and hooks."""

import json

import pytest

from mlla_mm.datasets.digits import make_ade20k

from ..nano import NANO
from ..runs import logged

CONFIG = """
_base_ = {base!r}
train_dataloader = dict(num_workers=0, persistent_workers=False,
                        dataset=dict(data_root={data!r}))
val_dataloader = dict(num_workers=0, persistent_workers=False,
                      dataset=dict(data_root={data!r}))
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=3, val_interval=3)
val_cfg = dict(type='ValLoop')
default_hooks = dict(
    _delete_=True,
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
)
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
auto_scale_lr = None
"""


@pytest.fixture
def config(tmp_path):
    data = make_ade20k(tmp_path / 'data', train=8, val=2, size=48)
    path = tmp_path / 'config.py'
    path.write_text(CONFIG.format(base=str(NANO['mmseg']), data=str(data)))
    return path


def test_a_run_of_mmengines(tmp_path, run_tool, config):
    """It trains, resumes, and is rehearsed; nothing of ours is swapped in."""
    pytest.importorskip('mmseg')
    tool = ['python', 'tools/train.py', config, '--work-dir', tmp_path / 'work']
    run_tool(*tool, '--check')
    first = run_tool(*tool, '--seed', 1)
    log = next((tmp_path / 'work').glob('*/*.log')).read_text()
    for ours in ('Seeded', 'WholeCheckpointHook', 'PreemptionHook', 'CheckedDataset'):
        assert ours not in log, ours
    assert 'total batch' in first.stdout
    resumed = run_tool(*tool, '--resume', '--cfg-options', 'train_cfg.max_iters=5')
    assert "resumed_state: - -> {'type': 'ResumedStateHook'}" in resumed.stdout
    updates = [entry['step'] for entry in logged(tmp_path / 'work') if 'lr' in entry]
    assert updates == [1, 2, 3, 4, 5]
    (record, *_) = (tmp_path / 'work').glob('*/recipe.json')
    assert json.loads(record.read_text())['total batch']['recipe'] is None


def test_what_it_cannot_do_is_said(tmp_path, run_tool, config):
    pytest.importorskip('mmseg')
    text = config.read_text().replace('None', 'dict(base_batch_size=8)')
    config.write_text(text)
    refused = run_tool(
        'python', 'tools/train.py', config, '--work-dir', tmp_path / 'work',
        '--keep-batch-size', check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    line = "train_cfg = dict(type='SeededIterBasedTrainLoop')"
    assert line in refused.stdout + refused.stderr
