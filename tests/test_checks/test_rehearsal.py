# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Rehearsals of the digits demos, and of runs that would fail."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import LogProcessor, Runner

from mlla_mm.checks import rehearsal
from mlla_mm.datasets import speed
from mlla_mm.datasets.digits import make_ade20k, make_imagenet
from mlla_mm.engine import launch
from mlla_mm.engine.options import set_resume

from ..processes import ROOT

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

CONFIGS = {
    'detection': 'detection/mask-rcnn_mlla-nano_fpn_digits.py',
    'segmentation': 'segmentation/upernet_mlla-nano_digits.py',
    'classification': 'classification/mlla-nano_digits.py',
}


@pytest.fixture(scope='module')
def data(digits_coco, tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    make_ade20k(str(root / 'ade20k'), train=8, val=3, size=64)
    make_imagenet(str(root / 'imagenet'), train=40, val=10, size=32)
    return {
        'detection': f'{digits_coco}/',
        'segmentation': str(root / 'ade20k'),
        'classification': str(root / 'imagenet'),
    }


@pytest.fixture
def config(data, tmp_path, monkeypatch):
    """The demo of a task on little data, without data workers."""
    monkeypatch.setattr(rehearsal, 'TIMED_ITERATIONS', 2)
    monkeypatch.setattr(rehearsal, 'DATA_SECONDS', 0.1)

    def read(task, **options):
        cfg = Config.fromfile(ROOT / 'configs' / CONFIGS[task])
        for split in ('train', 'val'):
            loader = cfg[f'{split}_dataloader']
            loader.update(num_workers=0, persistent_workers=False, batch_size=2)
            loader.dataset.data_root = data[task]
        if task == 'detection':
            cfg.val_evaluator.ann_file = f'{data[task]}/annotations/instances_val.json'
        cfg.launcher = 'none'
        cfg.work_dir = str(tmp_path / 'work')
        cfg.merge_from_dict(options)
        return cfg

    return read


def check(cfg):
    layout = launch.set_up(cfg)
    return rehearsal.run(cfg, layout)


@pytest.mark.parametrize(
    'task, size', [('detection', 128), ('segmentation', 96), ('classification', 64)]
)
def test_demos(config, capfd, tmp_path, task, size):
    assert check(config(task)) == 0
    report = capfd.readouterr().out
    assert f'2 images of {size} x {size} pixels' in report
    for row in (
        'peak memory',
        'data loading',
        '1 worker makes',
        'time to the end',
        'checkpoints',
    ):
        assert row in report
    assert not (tmp_path / 'work').exists()


def test_data_are_timed_as_in_the_run(config, capfd, monkeypatch):
    """All images count, not only those of the few iterations, with the run's steps."""
    seen = []

    def time_samples(dataset, indices, limit):
        seen.append((type(dataset).__name__, len(indices), dataset[3]['inputs'].shape))
        return speed.Timing(samples=30, seconds=0.5)

    monkeypatch.setattr(speed, 'time_samples', time_samples)
    assert check(config('classification')) == 0
    assert seen == [('SeededDataset', 39, (3, 64, 64))]
    assert '1 worker makes 60 images a second' in capfd.readouterr().out


def test_a_run_that_saves_nothing(config, capfd):
    assert (
        check(config('classification', **{'default_hooks.checkpoint.type': 'NoHook'}))
        == 0
    )
    assert 'checkpoints' not in capfd.readouterr().out


@pytest.mark.slow
def test_two_processes(run_tool, data, tmp_path):
    (tmp_path / 'notes.txt').write_text('keep')
    output = run_tool(
        'bash', 'tools/dist_train.sh', f'configs/{CONFIGS["classification"]}', 2,
        '--work-dir', tmp_path, '--check', '--keep-batch-size', '--cfg-options',
        f'train_dataloader.dataset.data_root={data["classification"]}',
        f'val_dataloader.dataset.data_root={data["classification"]}',
        'train_dataloader.batch_size=4',
    ).stdout  # fmt: skip
    assert output.count('Check passed') == 1
    assert '4 images of 64 x 64 pixels, 4 times for an update' in output
    assert 'waiting for 1 workers' in output
    assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']


def test_resumed_run_keeps_its_checkpoints(config, capfd, tmp_path):
    """The best one is kept, too, although MMEngine replaces it by a better one."""
    options = {
        'train_cfg.max_epochs': 2,
        'default_hooks.logger.interval': 1000,
        'train_dataloader.dataset.indices': 8,
        'val_dataloader.dataset.indices': 2,
    }
    cfg = config('classification', **options)
    launch.set_up(cfg)
    Runner.from_cfg(cfg).train()

    def files():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / 'work').iterdir()}

    before = files()
    assert any(path.name.startswith('best_') for path in before)
    capfd.readouterr()
    cfg = config('classification', **options)
    cfg.train_cfg.max_epochs = 6
    set_resume(cfg, 'auto')
    assert check(cfg) == 0
    assert files() == before
    # The run has four epochs left, and keeps two checkpoints.
    assert ' 2 x ' in capfd.readouterr().out
    # What the run itself would refuse.
    cfg.train_cfg.max_epochs = 1
    assert check(cfg) == 1
    assert (
        'has come to epoch 2, and train_cfg.max_epochs is 1' in capfd.readouterr().err
    )
    assert files() == before


def other_images(data, tmp_path):
    """Annotations of the validation images under other numbers."""
    path = Path(data['detection']) / 'annotations/instances_val.json'
    content = json.loads(path.read_text())
    for image in content['images']:
        image['id'] += 1000
    for annotation in content['annotations']:
        annotation['image_id'] += 1000
    (tmp_path / 'others.json').write_text(json.dumps(content))
    return str(tmp_path / 'others.json')


@HOOKS.register_module()
class _OutOfMemoryHook(Hook):
    def before_train_iter(self, runner, *args, **kwargs):
        raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate')


FAILURES = {
    'annotations of training': (
        'detection',
        {'train_dataloader.dataset.ann_file': 'no.json'},
        'while reading the training data: FileNotFoundError',
    ),
    'few images': (
        'classification',
        {'train_dataloader.dataset.indices': 1},
        'while reading the training data: an epoch has no update: the 1 images',
    ),
    'data of validation': (
        'classification',
        {'val_dataloader.dataset.data_root': 'no/such/data'},
        'while reading the validation data: FileNotFoundError',
    ),
    'annotations of the metric': (
        'detection',
        {'val_evaluator.ann_file': 'no.json'},
        "No such file or directory: 'no.json'",
    ),
    'another best metric': (
        'classification',
        {'default_hooks.checkpoint.save_best': 'accuracy/top7'},
        "while saving the best checkpoint: KeyError: 'accuracy/top7'",
    ),
    'memory': (
        'classification',
        {'custom_hooks': [dict(type='_OutOfMemoryHook')]},
        'while training at the largest scale: out of GPU memory. To need less: '
        'model.backbone.with_cp=True',
    ),
    'loss': (
        'classification',
        {'optim_wrapper.optimizer.lr': 1e30, 'param_scheduler.warmup': 0},
        'while training at the largest scale: the loss is nan',
    ),
    'type': (
        'detection',
        {'model.neck.type': 'FPNN'},
        'while building the model, the data loaders and the metric: FPNN is not in the',
    ),
    'checkpoint': (
        'classification',
        {'resume': True, 'load_from': 'no.pth'},
        'while reading the checkpoint to resume: FileNotFoundError',
    ),
    'weights': (
        'classification',
        {'load_from': __file__},
        f'while loading the initial weights or the checkpoint: {__file__} is damaged',
    ),
}


@pytest.mark.parametrize('name', FAILURES)
def test_failures(config, capfd, tmp_path, name):
    task, options, message = FAILURES[name]
    assert check(config(task, **options)) == 1
    error = capfd.readouterr().err
    assert message in error
    assert error.count('Error: check failed while') == 1
    # There is no traceback if the message says everything.
    assert ('Traceback' in error) == (name == 'another best metric')
    assert not (tmp_path / 'work').exists()


def test_corrupt_image(config, capfd, data, tmp_path):
    """The message names the file and the way out, so no traceback is shown."""
    shutil.copytree(data['classification'], tmp_path / 'data')
    path = min((tmp_path / 'data/train').rglob('*.png'))
    path.write_bytes(b'x')
    options = {'train_dataloader.dataset.data_root': str(tmp_path / 'data')}
    assert check(config('classification', **options)) == 1
    error = capfd.readouterr().err
    assert f'while reading the training data: {path} is not an image' in error
    assert 'skip_corrupt_images' in error and 'Traceback' not in error


def test_metric_of_other_images(config, capfd, data, tmp_path):
    cfg = config('detection')
    cfg.val_evaluator.ann_file = other_images(data, tmp_path)
    assert check(cfg) == 1
    error = capfd.readouterr().err
    assert 'check failed while evaluating' in error
    assert 'Traceback' in error  # the error comes from mmdet's code
    assert not (tmp_path / 'work').exists()


def test_work_dir_that_cannot_be_made(config, capfd, tmp_path):
    (tmp_path / 'file').write_text('')
    cfg = config('classification', work_dir=str(tmp_path / 'file' / 'work'))
    assert check(cfg) == 1
    error = capfd.readouterr().err
    assert 'check failed while writing to the work_dir' in error
    assert str(tmp_path / 'file') in error


def test_sigterm_leaves_nothing_behind(config, tmp_path, monkeypatch):
    """Also where the training does not handle the signal."""
    (tmp_path / 'work').mkdir()
    seen = []

    def end(dataset):
        seen.extend((tmp_path / 'work').iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(rehearsal, 'find_sizes', end)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        check(config('classification'))
    assert caught.value.code == 143
    assert len(seen) == 1 and not list((tmp_path / 'work').iterdir())
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize(
    'options, processes, expected',
    [
        ({}, 1, (3, 2)),
        (dict(drop_last=True), 1, (2, 2)),
        ({}, 3, (1, 0)),
        (dict(drop_last=True), 3, (1, 0)),
        (dict(drop_last=True), 4, (0, 0)),
        (dict(batch_sampler=dict(drop_last=True)), 1, (2, 2)),
        (dict(num_batch_per_epoch=1), 1, (1, 1)),
    ],
)
def test_batches_of_an_epoch(options, processes, expected):
    """Batches of four images, from eleven images."""
    loader = dict(batch_size=4, **options)
    assert rehearsal._count_batches(loader, range(11), processes) == expected


def test_peak_memory_of_a_gpu(monkeypatch):
    """All that was in use at the peak, if CUDA and others have what they had then."""
    total, cuda, other_program = 80_000, 500, 3_000
    reserved = [2_000, 9_000, 1_500]  # by PyTorch, at its peak and in the end
    in_use = [x + cuda + other_program for x in reserved]
    values = dict(
        is_available=True,
        mem_get_info=(total - in_use[-1], total),
        memory_reserved=reserved[-1],
        max_memory_reserved=max(reserved),
        max_memory_allocated=7_000,
    )
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert rehearsal._peak_memory() == (max(in_use), 7_000)


def test_peak_memory_of_training_is_kept(config, monkeypatch):
    """MMEngine's log resets the peak after training, and before the evaluation."""
    peaks, measured = [(500, 400)], []
    log, describe = LogProcessor.get_log_after_iter, rehearsal.describe

    def reset(*args):
        peaks[0] = 300, 100
        return log(*args)

    def record(cfg, processes, found):
        measured.append(found)
        return describe(cfg, processes, found)

    monkeypatch.setattr(rehearsal, 'UPDATES', 1)
    monkeypatch.setattr(LogProcessor, 'get_log_after_iter', reset)
    monkeypatch.setattr(rehearsal, '_peak_memory', lambda: peaks[0])
    monkeypatch.setattr(rehearsal, 'describe', record)
    assert check(config('classification')) == 0
    assert peaks == [(300, 100)]
    assert (measured[0].memory, measured[0].tensors) == (500, 400)


def test_an_evaluator_of_several_data_sets(config, capfd):
    """mmdet's needs images of each of them, so none is left out."""
    pytest.importorskip('mmdet')
    cfg = config('detection')
    one = cfg.val_dataloader.dataset
    datasets = [dict(one, indices=4), dict(one, indices=1)]
    cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=datasets)
    cfg.val_dataloader.batch_size = 1
    metric = dict(cfg.val_evaluator, metric='bbox')
    cfg.val_evaluator = dict(
        type='MultiDatasetsEvaluator',
        metrics=[metric, dict(metric)],
        dataset_prefixes=['a', 'b'],
    )
    cfg.default_hooks.checkpoint.save_best = 'b/coco/bbox_mAP'
    assert check(cfg) == 0, capfd.readouterr()
