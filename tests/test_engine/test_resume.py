# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mlla_mm.datasets.digits import make_ade20k, make_imagenet
from mlla_mm.engine import config as options
from mlla_mm.engine.resume import newest_checkpoint, seed_of

ROOT = Path(__file__).parents[2]


def save(path: Path, seed=None, updates=0) -> Path:
    weights = dict(weight=torch.nn.Parameter(torch.zeros(3)))
    torch.save(dict(meta=dict(seed=seed, iter=updates), state_dict=weights), path)
    return path


def test_newest_checkpoint(tmp_path, caplog):
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path / 'best_coco_bbox_mAP_epoch_30.pth')
    assert newest_checkpoint(tmp_path) is None
    for number in (9, 10, 11, 12):
        save(tmp_path / f'epoch_{number}.pth')
    assert newest_checkpoint(tmp_path) == tmp_path / 'epoch_12.pth'
    # Cut short, and empty.
    whole = (tmp_path / 'epoch_12.pth').read_bytes()
    (tmp_path / 'epoch_12.pth').write_bytes(whole[:-100])
    (tmp_path / 'epoch_11.pth').write_bytes(b'')
    assert newest_checkpoint(tmp_path) == tmp_path / 'epoch_10.pth'


def test_the_checkpoint_of_a_stopped_run_is_one_of_them(tmp_path):
    for number in (9, 10):
        save(tmp_path / f'iter_{number}.pth')
    save(tmp_path / 'preempted_iter_9.pth')
    assert newest_checkpoint(tmp_path) == tmp_path / 'iter_10.pth'
    # Stopped in the evaluation after the same update.
    save(tmp_path / 'preempted_iter_10.pth')
    assert newest_checkpoint(tmp_path) == tmp_path / 'preempted_iter_10.pth'


@pytest.mark.parametrize('updates', [29, 30, 31])
def test_epochs_and_iterations_are_compared_by_updates(tmp_path, updates):
    epoch = save(tmp_path / 'epoch_3.pth', updates=30)
    stopped = save(tmp_path / f'preempted_iter_{updates}.pth', updates=updates)
    expected = epoch if updates < 30 else stopped
    assert newest_checkpoint(tmp_path) == expected
    stopped.write_bytes(stopped.read_bytes()[:-100])
    assert newest_checkpoint(tmp_path) == epoch


def test_a_checkpoint_that_is_no_file_of_the_work_dir(tmp_path):
    """As those of FSDP, which are folders, or those of another out_dir."""
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'elsewhere'))
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / 'elsewhere').mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / 'elsewhere'


def test_the_seed_is_the_interrupted_runs(tmp_path):
    save(tmp_path / 'iter_2.pth', seed=5)
    assert seed_of(tmp_path / 'iter_2.pth') == 5
    cfg = Config(
        dict(work_dir=str(tmp_path), randomness=dict(seed=1, diff_rank_seed=True))
    )
    options.set_resume(cfg, 'auto')
    assert cfg.resume and cfg.load_from == str(tmp_path / 'iter_2.pth')
    assert cfg.randomness == dict(seed=5, diff_rank_seed=True)


def test_the_config_may_ask_to_resume(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path), resume=True, load_from=None))
    options.set_resume(cfg, None)
    assert cfg.load_from is None  # nothing there: MMEngine starts
    save(tmp_path / 'iter_2.pth', seed=5)
    options.set_resume(cfg, None)
    assert cfg.load_from == str(tmp_path / 'iter_2.pth')


# Config, data, and half of the training and all of it.
TASKS = {
    'epochs': (
        'configs/classification/mlla-nano_digits.py',
        lambda out: make_imagenet(out, train=40, val=10, size=32),
        {
            'train_dataloader.batch_size': 8,
            'model.backbone.drop_path_rate': 0.2,
            'param_scheduler.warmup': 1,
        },
        # The teacher starts in the second epoch of both.
        (
            ('train_cfg.max_epochs=2', 'custom_hooks.1.start=0.5'),
            ('train_cfg.max_epochs=4', 'custom_hooks.1.start=0.25'),
        ),
    ),
    'iterations': (
        'configs/segmentation/upernet_mlla-nano_digits.py',
        lambda out: make_ade20k(out, train=6, val=2, size=48),
        {'default_hooks.checkpoint.interval': 3, 'train_cfg.val_interval': 3},
        (('train_cfg.max_iters=3',), ('train_cfg.max_iters=5',)),
    ),
}


@pytest.mark.parametrize(
    'name', [pytest.param('epochs', marks=pytest.mark.slow), 'iterations']
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(name, run_tool, tmp_path):
    """Also with another number of workers; augmentation and drop path are random."""
    config, make_data, changes, (half, whole) = TASKS[name]
    data = make_data(tmp_path / 'data')
    common = [f'{key}={value}' for key, value in changes.items()]
    for split in ('train', 'val'):
        common.append(f'{split}_dataloader.dataset.data_root={data}')

    def train(folder: str, length: tuple, workers: int, *arguments) -> Path:
        run_tool(
            'python', 'tools/train.py', config, '--work-dir', tmp_path / folder,
            *arguments, '--cfg-options', *length, *common,
            f'train_dataloader.num_workers={workers}',
            f'train_dataloader.persistent_workers={workers > 0}',
        )  # fmt: skip
        return newest_checkpoint(tmp_path / folder)

    interrupted = train('interrupted', half, 2)
    seed = seed_of(interrupted)
    resumed = train('interrupted', whole, 0, '--resume')
    expected = train('uninterrupted', whole, 1, '--seed', seed)
    assert resumed.name == expected.name != interrupted.name
    expected, resumed = (
        torch.load(path, weights_only=False) for path in (expected, resumed)
    )
    for part in ('state_dict', 'state_dict_ema'):
        for key, value in expected.get(part, {}).items():
            assert torch.equal(resumed[part][key], value), (part, key)
    moments = expected['optimizer']['state']
    for index, state in resumed['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(value, moments[index][key])
