# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Real runs of the tools that several test files look at."""

import json
from pathlib import Path

from mlla_mm.datasets.digits import make_ade20k
from mlla_mm.reproducible.resume import newest_checkpoint, seed_of

from .processes import run_tool

SEGMENTOR = 'configs/segmentation/upernet_mlla-nano_digits.py'


def logged(work_dir: Path) -> list:
    """Every entry of a work_dir's logs, in the order of the runs."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(x) for f in files for x in f.read_text().splitlines()]


def without_workers(data_root: Path, *splits: str) -> list:
    """Options of a run on some data, which this process reads itself."""
    return [
        option
        for split in splits
        for option in (
            f'{split}_dataloader.dataset.data_root={data_root}/',
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
        )
    ]


def run_segmentor(folder: Path) -> None:
    """Train the demo for five iterations, in one run and in two; test the first one's.

    Args:
        folder (Path): Gets ``data``, and the work_dirs ``whole`` and ``parts``.
    """
    data = make_ade20k(folder / 'data', train=6, val=2, size=48)
    options = [
        *('--cfg-options', *without_workers(data, 'train', 'val', 'test')),
        'default_hooks.logger.interval=1',
    ]

    def train(name: str, length: int, workers: int, *arguments) -> Path:
        run_tool(
            'python', 'tools/train.py', SEGMENTOR, '--work-dir', folder / name,
            *arguments, *options, f'train_cfg.max_iters={length}',
            'train_cfg.val_interval=3', 'default_hooks.checkpoint.interval=3',
            f'train_dataloader.num_workers={workers}',
            f'train_dataloader.persistent_workers={workers > 0}',
        )  # fmt: skip
        return newest_checkpoint(folder / name)

    interrupted = train('parts', 3, 2)
    train('parts', 5, 0, '--resume')
    last = train('whole', 5, 1, '--seed', seed_of(interrupted))
    run_tool(
        'python', 'tools/test.py', SEGMENTOR, last, '--work-dir', folder / 'whole',
        '--tta', '--amp', '--fuse-conv-bn', *options,
    )  # fmt: skip
