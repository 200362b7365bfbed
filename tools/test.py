# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Evaluate a checkpoint with the metrics of its config."""

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

import mlla_mm  # noqa: F401
from mlla_mm.datasets.check_config import require_data
from mlla_mm.engine import config as options
from mlla_mm.engine import launch
from mlla_mm.engine.config_check import check_config, require_work_dir
from mlla_mm.engine.corrupt_images import CorruptImageError, check_images
from mlla_mm.engine.ema import use_ema_weights
from mlla_mm.utils.checkpoint_file import CheckpointError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_run_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        metavar='PATH',
        help='write the predictions: a .pkl file, for segmentation a folder',
    )
    parser.add_argument(
        '--show-dir',
        metavar='DIR',
        help='draw the predictions here; of several processes the first draws its part',
    )
    parser.add_argument(
        '--tta', action='store_true', help="test-time augmentation of the config's"
    )
    options.add_ema_argument(parser)
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    return parser.parse_args()


def read_config(args: argparse.Namespace) -> Config:
    cfg = options.read_run_config(args)
    if not Path(args.checkpoint).is_file():
        raise FileNotFoundError(f'Checkpoint not found: {args.checkpoint}')
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.ema:
        use_ema_weights(cfg)
    if args.tta:
        options.enable_tta(cfg)
    if args.show_dir:
        options.draw_results(cfg, args.show_dir)
    if args.out:
        options.dump_predictions(cfg, args.out)
    return cfg


def main() -> None:
    args = parse_args()
    with launch.exit_on_user_error():
        cfg = read_config(args)
        check_config(cfg)
        check_images(cfg, 'test')
        if launch.set_up(cfg).rank == 0:
            require_data(cfg, 'test')
            require_work_dir(cfg.work_dir)
    # An image is one process's; a checkpoint is all of theirs.
    with launch.exit_on_user_error((CorruptImageError,), shared=False):
        with launch.exit_on_user_error((CheckpointError,)):
            test(cfg)
    launch.tear_down()


def test(cfg: Config) -> None:
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.test()


if __name__ == '__main__':
    main()
