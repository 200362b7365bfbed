# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The recipe on its processes beside ``--keep-batch-size`` on fewer, resumed once."""

import json
from pathlib import Path
from statistics import mean

import pytest
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mlla_mm.datasets.digits import make_ade20k, make_coco, make_imagenet

CONFIGS = Path(__file__).parents[2] / 'configs'

# 19 images do not fill the last update. These settings are random, as are the demos'
# augmentations and the choice of region proposals.
DETECTION = {
    'model.backbone.drop_path_rate': 0.2,
    'train_dataloader.dataset.pipeline': [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(type='RandomChoiceResize', scales=[(64, 64), (96, 96)], keep_ratio=True),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs'),
    ],
}
SEGMENTATION = {
    'model.backbone.drop_path_rate': 0.2,
    'train_dataloader.batch_size': 2,
    'train_cfg.val_interval': 2,
    'default_hooks.checkpoint.interval': 2,
}
CLASSIFICATION = {
    'model.backbone.drop_path_rate': 0.2,
    # The recipe's batch augments, and its erasing of many images.
    'model.train_cfg': dict(
        _delete_=True,
        **Config.fromfile(CONFIGS / '_base_/models/mlla_classifier.py').model.train_cfg,
    ),
    'train_dataloader.dataset.pipeline': [
        dict(type='LoadImageFromFile'),
        dict(type='PackInputs'),
        dict(type='mlla_mm.datasets.transforms.erasing.DrawErasing', prob=0.6),
    ],
    'train_dataloader.batch_size': 4,
    'auto_scale_lr.base_batch_size': 8,
}


def mesa(start: float) -> dict:
    return {'default_hooks.mesa': dict(type='MESAHook', decay=0.9, start=start)}


# Config, changes of it, function that makes its data, processes of the recipe and of
# the other run, options for half of the training and for all of it, modules to import.
TASKS = {
    'detection': (
        'detection/mask-rcnn_mlla-nano_fpn_digits.py',
        DETECTION,
        make_coco,
        (2, 1),
        ({'train_cfg.max_epochs': 1}, {'train_cfg.max_epochs': 2}),
        [],
    ),
    'segmentation': (
        'segmentation/upernet_mlla-nano_digits.py',
        SEGMENTATION,
        make_ade20k,
        (4, 1),
        ({'train_cfg.max_iters': 2}, {'train_cfg.max_iters': 4}),
        [],
    ),
    'classification': (
        'classification/mlla-nano_digits.py',
        CLASSIFICATION,
        make_imagenet,
        (2, 1),
        # The average is the teacher in the second half.
        (
            {'train_cfg.max_epochs': 1, **mesa(start=1.0)},
            {'train_cfg.max_epochs': 2, **mesa(start=0.5)},
        ),
        ['tests.float64'],
    ),
}
name, changes, *rest = TASKS['classification']
changes = {**changes, 'train_cfg.running_statistics': 'first'}
TASKS['statistics of the first process'] = (name, changes, *rest)


@HOOKS.register_module()
class Recorder(Hook):
    """Write down the images and the loss of each update, of every process."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        batches = data_batch if isinstance(data_batch, list) else [data_batch]
        images = [
            [sample.img_path for sample in batch['data_samples']] for batch in batches
        ]
        with open(f'{runner.work_dir}/updates_{get_rank()}.jsonl', 'a') as file:
            line = json.dumps([runner.iter, images, outputs['loss'].item()])
            file.write(line + '\n')


def updates(work_dir: Path) -> tuple:
    """The batches of every update, in the order of processes, and the mean losses."""
    batches, losses = {}, {}
    for path in sorted(work_dir.glob('updates_*.jsonl')):
        for line in path.read_text().splitlines():
            update, images, loss = json.loads(line)
            batches.setdefault(update, []).extend(images)
            losses.setdefault(update, []).append(loss)
    return batches, {update: mean(values) for update, values in losses.items()}


def logged(work_dir: Path) -> list:
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(x) for f in files for x in f.read_text().splitlines()]


@pytest.fixture(
    scope='module',
    params=[
        pytest.param(task, marks=[] if task == 'classification' else pytest.mark.slow)
        for task in TASKS
    ],
)
def runs(request, run_tool, once):
    """Work_dirs of the recipe's run and of the one on fewer processes."""
    name, changes, make_data, (processes, fewer), parts, modules = TASKS[request.param]

    def write_config(path: Path, data: Path, options: dict) -> Path:
        cfg = Config.fromfile(CONFIGS / name)
        cfg.merge_from_dict({**changes, **options})
        # AdamW would hide a wrong scale of the gradient, and enlarge rounding errors.
        cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.5, weight_decay=0.01)
        cfg.merge_from_dict(
            {
                'randomness.seed': 1,
                'default_hooks.logger.interval': 1,
                'custom_hooks': [dict(type='Recorder')],
                'custom_imports.imports': [
                    *cfg.custom_imports.imports,
                    __name__,
                    *modules,
                ],
            }
        )
        for split in ('train', 'val'):
            cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
            cfg[f'{split}_dataloader'].dataset.data_root = f'{data}/'
        if 'ann_file' in cfg.val_evaluator:
            cfg.val_evaluator.ann_file = f'{data}/annotations/instances_val.json'
        cfg.dump(path)
        return path

    def train(config: Path, processes: int, *arguments) -> None:
        run_tool(
            'python', 'tools/train.py', config, *arguments,
            '--launcher', 'pytorch', processes=processes,
        )  # fmt: skip

    def fill(folder: Path) -> None:
        data = make_data(folder / 'data', train=19, val=5, size=64)
        half, whole = (
            write_config(folder / f'{part}.py', data, options)
            for part, options in zip(('half', 'whole'), parts)
        )
        train(whole, processes, '--work-dir', folder / 'recipe')
        keeping = ['--work-dir', folder / 'fewer', '--keep-batch-size']
        train(half, fewer, *keeping)
        train(whole, fewer, *keeping, '--resume')

    folder = once(f'keep_batch_size_{request.param}', fill)
    return folder / 'recipe', folder / 'fewer'


def test_updates_are_made_of_the_same_images(runs):
    recipe, fewer = runs
    (expected, expected_losses), (found, losses) = updates(recipe), updates(fewer)
    assert found == expected
    # 19 images, 8 for an update: repeated up to whole batches, or without end.
    assert len(found) in (4, 6)
    assert losses == pytest.approx(expected_losses, rel=1e-4)


def test_rates_and_evaluations_come_at_the_same_updates(runs):
    recipe, fewer = runs
    expected, found = logged(recipe), logged(fewer)
    assert [entry['step'] for entry in found] == [entry['step'] for entry in expected]
    for a, b in zip(found, expected):
        assert a.get('lr', 0) == pytest.approx(b.get('lr', 0), rel=1e-12)
        assert set(a) == set(b)
    assert sum('lr' in entry for entry in found) >= 4
    assert sum('lr' not in entry for entry in found) >= 2


def vector(checkpoint: Path, part: str, statistics: bool) -> torch.Tensor:
    """The running statistics of a checkpoint, or everything else."""
    values = torch.load(checkpoint, weights_only=False)[part].items()
    kept = [v.flatten().double() for k, v in values if ('running_' in k) == statistics]
    return torch.cat(kept)


@pytest.mark.parametrize('statistics', [False, True])
def test_checkpoints_hold_the_same_model(runs, statistics):
    recipe, fewer = runs
    checkpoints = sorted(path.name for path in recipe.glob('[ei]*.pth'))
    assert checkpoints == sorted(path.name for path in fewer.glob('[ei]*.pth'))
    first, last = checkpoints
    parts = {'state_dict', 'state_dict_ema'} & set(
        torch.load(recipe / last, weights_only=False)
    )
    for part in parts:
        trained = vector(recipe / last, part, statistics)
        way = (trained - vector(recipe / first, part, statistics)).norm()
        for name in checkpoints:
            found = vector(fewer / name, part, statistics)
            error = (found - vector(recipe / name, part, statistics)).norm()
            assert error < 1e-3 * way, (name, part)
