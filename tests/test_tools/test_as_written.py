# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A config means one run, whoever's tool reads it."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlla_mm.datasets.digits import make_ade20k, make_coco, make_imagenet

from ..nano import NANO
from ..processes import ROOT

UPDATES = 5
MAKERS = {'mmdet': make_coco, 'mmseg': make_ade20k, 'mmpretrain': make_imagenet}
# Its length, and what a batch is of.
CHANGES = {
    'mmdet': 'train_cfg = dict(max_epochs=1)',
    'mmseg': f'train_cfg = dict(max_iters={UPDATES}, val_interval={UPDATES})',
    'mmpretrain': 'train_cfg = dict(max_epochs=1)\nparam_scheduler = dict(warmup=1)',
}
CONFIG = """
_base_ = {base!r}
train_dataloader = dict(batch_size=2, dataset=dict(data_root={data!r}))
val_dataloader = dict(dataset=dict(data_root={data!r}))
randomness = dict(seed=1)
default_hooks = dict(
    logger=dict(interval=1),
    checkpoint=dict(type='WholeCheckpointHook', interval={interval}),
)
log_processor = dict(window_size=1)
# Some digits are in none of a few images.
allow_empty_classes = True
{changes}
"""
RUNNER = """
import sys
from mmengine.config import Config
from mmengine.runner import Runner
cfg = Config.fromfile(sys.argv[1])
cfg.work_dir = sys.argv[3]
Runner.from_cfg(cfg).train()
"""


def write(folder: Path, scope: str, more: str = '') -> Path:
    """The demo for five updates on data of its own."""
    data = folder / 'data'
    MAKERS[scope](data, train=2 * UPDATES, val=2, size=48)
    text = CONFIG.format(
        base=str(NANO[scope]),
        data=f'{data}/',
        interval=UPDATES if scope == 'mmseg' else 1,
        changes=f'{CHANGES[scope]}\n{more}',
    )
    if scope == 'mmdet':
        text += (
            f"val_evaluator = dict(ann_file='{data}/annotations/instances_val.json')"
        )
    path = folder / 'config.py'
    path.write_text(text)
    return path


def train(tool: list, config: Path, work_dir: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *tool, config, '--work-dir', work_dir],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def theirs(scope: str) -> list:
    package = Path(importlib.import_module(scope).__file__).parent
    return [package / '.mim' / 'tools' / 'train.py']


def losses(work_dir: Path) -> list:
    (path,) = work_dir.glob('*/vis_data/scalars.json')
    entries = map(json.loads, path.read_text().splitlines())
    return [
        {key: value for key, value in entry.items() if 'loss' in key or key == 'lr'}
        for entry in entries
        if 'loss' in entry
    ]


@pytest.mark.slow
@pytest.mark.parametrize('scope', NANO)
def test_every_tool_makes_the_same_run(tmp_path, scope):
    """Losses and the weights at the end are equal bit by bit."""
    pytest.importorskip(scope)
    config = write(tmp_path, scope)
    runner = tmp_path / 'runner.py'
    runner.write_text(RUNNER)
    tools = dict(ours=['tools/train.py'], theirs=theirs(scope), runner=[runner])
    logged, weights = {}, {}
    for name, tool in tools.items():
        done = train(tool, config, tmp_path / name)
        assert done.returncode == 0, done.stdout
        logged[name] = losses(tmp_path / name)
        (path,) = (tmp_path / name).glob('[ei]*_*.pth')
        weights[name] = torch.load(path, weights_only=False)['state_dict']
    assert len(logged['ours']) == UPDATES
    for name in ('theirs', 'runner'):
        assert logged[name] == logged['ours']
        assert weights[name].keys() == weights['ours'].keys()
        for key, value in weights['ours'].items():
            assert torch.equal(weights[name][key], value), (name, key)


STOP = """
custom_imports = dict(imports=['mlla_mm', 'tests.stopper'])
custom_hooks = [dict(type='StopHook')]
"""


@pytest.mark.slow
def test_their_tool_saves_at_sigterm_and_resumes(tmp_path):
    """Its exit status tells it, and the end is that of a run in one go."""
    pytest.importorskip('mmseg')
    config = write(tmp_path, 'mmseg', STOP)
    tool = tmp_path / 'train.py'
    # Finds tests.stopper, as our tools are started in the repository.
    tool.write_text(
        f'import runpy, sys; sys.path.insert(0, {str(ROOT)!r})\n'
        f"runpy.run_path({str(theirs('mmseg')[0])!r}, run_name='__main__')"
    )
    parts, whole = tmp_path / 'parts', tmp_path / 'whole'
    done = train([tool], config, parts)
    assert done.returncode == 128 + signal.SIGTERM, done.stdout
    # The signal came at the begin of the second update.
    assert (parts / 'preempted_iter_2.pth').is_file()
    done = train([tool, '--resume'], config, parts)
    assert done.returncode == 0, done.stdout
    train(['tools/train.py'], write(tmp_path, 'mmseg'), whole)
    ends = [
        torch.load(x / f'iter_{UPDATES}.pth', weights_only=False)['state_dict']
        for x in (parts, whole)
    ]
    for key, value in ends[1].items():
        assert torch.equal(ends[0][key], value), key
