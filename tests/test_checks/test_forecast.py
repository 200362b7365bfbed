# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import shutil

import pytest
import torch
from mmengine.config import Config

from mlla_mm.checks import forecast
from mlla_mm.checks.forecast import CheckError, Measured, remaining

EPOCHS = dict(max_epochs=12, val_interval=5)
ITERATIONS = dict(max_iters=1000, val_interval=400)


@pytest.mark.parametrize(
    'loop, hook, done, expected',
    [
        # Evaluations after epochs 5, 10 and the last.
        (EPOCHS, dict(interval=1), 0, (1200, 3, 12)),
        (EPOCHS, dict(interval=1, max_keep_ckpts=2), 600, (600, 2, 2)),
        (EPOCHS, dict(interval=500, by_epoch=False), 0, (1200, 3, 3)),
        (EPOCHS, dict(interval=-1), 0, (1200, 3, 1)),
        (EPOCHS, None, 0, (1200, 3, 12)),
        (EPOCHS, dict(interval=1), 1300, (0, 0, 0)),
        (ITERATIONS, dict(interval=100, by_epoch=False), 0, (1000, 3, 10)),
        (ITERATIONS, dict(interval=1), 500, (500, 2, 1)),
        (dict(max_iters=2000), None, 0, (2000, 2, 1)),
    ],
)
def test_what_remains(loop, hook, done, expected):
    hooks = {} if hook is None else dict(checkpoint=hook)
    cfg = Config(dict(train_cfg=loop, default_hooks=hooks))
    assert remaining(cfg, done, epoch=100) == expected


def describe(tmp_path, **changes):
    cfg = Config(
        dict(
            work_dir=str(tmp_path / 'work'),
            train_cfg=dict(max_epochs=12, val_interval=4),
            train_dataloader=dict(batch_size=2, num_workers=4),
            optim_wrapper=dict(accumulative_counts=8),
            default_hooks=dict(checkpoint=dict(interval=1, max_keep_ckpts=2)),
        )
    )
    measured = dict(
        size=(1333, 800), memory=2**31, tensors=2**30, iteration=0.5, waiting=0.3,
        made=5, cores=8, evaluation=60, checkpoint=2**20, best=2**19, done=0, epoch=600,
    )  # fmt: skip
    cfg.merge_from_dict(changes.pop('options', {}))
    measured = Measured(**dict(measured, **changes))
    return forecast.describe(cfg, 8, measured)


def test_report(tmp_path):
    lines = describe(tmp_path).splitlines()
    rows = {line[:19].strip(): line[19:] for line in lines}
    assert rows['processes'] == '8'
    images = '2 images of 1333 x 800 pixels, 8 times for an update, on each process'
    assert rows['largest batch'] == images
    assert rows['peak memory'].startswith('2 ')
    assert rows['iteration'] == '0.5 s'
    assert rows['data loading'] == '30% of it, waiting for 4 workers'
    made = '1 worker makes 5 images a second; 4 workers x 8 processes on 8 cores each'
    assert rows['data'] == f'{made} at most 160'
    times = '1:03:00 (training 1:00:00, evaluation 0:03:00)'
    assert rows['time to the end'].startswith(times)
    assert rows['checkpoints'].startswith('2 x 0.000977 GiB + 0.000488 GiB; ')
    assert 'checkpoints' not in describe(tmp_path, checkpoint=0, best=0)
    elsewhere = {'default_hooks.checkpoint.out_dir': 's3://bucket'}
    assert describe(tmp_path, options=elsewhere).endswith(', at s3://bucket')


@pytest.mark.parametrize(
    'measured, options, advice',
    [
        # The model makes 16 images in 0.35 s, and 46 a second; the workers 4 x 10.
        (dict(made=10), {}, 'would take 366: train_dataloader.num_workers=5 would'),
        (dict(made=10, cores=4.5), {}, 'that needs 5 cores for each process'),
        # No number of workers more than cores is advised.
        (dict(made=1, cores=6), {}, 'train_dataloader.num_workers=6 would help'),
        # The workers are fast enough, so something else made it wait.
        (dict(made=12), {}, None),
        # The model waits too little to be sure.
        (dict(made=10, waiting=0.2, iteration=0.4), {}, None),
        # MMEngine counts batches, not updates: 2 images in 0.35 s.
        (dict(made=10), {'train_cfg.micro_batches': 1}, None),
        (dict(made=10), {'train_dataloader.num_workers': 0}, 'num_workers=5 would'),
    ],
)
def test_advice_on_data(tmp_path, monkeypatch, measured, options, advice):
    """It is given where a GPU waits, and the workers are too slow by the numbers."""
    options = {'train_cfg.micro_batches': 8, **options}
    options['optim_wrapper.accumulative_counts'] = 1
    arguments = dict(measured, options=options)
    assert 'would' not in describe(tmp_path, **arguments).split('checkpoints')[0]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (0, 80 * 2**30))
    (line,) = (x for x in describe(tmp_path, **arguments).splitlines() if 'makes' in x)
    assert (advice in line) if advice else line.endswith(('320', '384'))


def test_memory_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (0, 80 * 2**30))
    text = '2 GiB of 80 GiB of a GPU (1 GiB by tensors), the largest of all processes'
    assert text in describe(tmp_path)


def test_full_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage('/')._replace(free=2**21)
    monkeypatch.setattr(forecast.shutil, 'disk_usage', lambda _: usage)
    with pytest.raises(CheckError) as caught:
        describe(tmp_path)
    assert '0.00195 GiB are free' in str(caught.value)
    assert 'default_hooks.checkpoint.max_keep_ckpts' in str(caught.value)
