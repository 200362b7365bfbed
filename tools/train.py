# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Train a detector, segmentor or classifier as its config says."""

import argparse
import logging

from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

import mlla_mm  # noqa: F401
from mlla_mm.engine import config as options
from mlla_mm.engine import launch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir', help='folder for logs and checkpoints (work_dirs/CONFIG_NAME)'
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='go on from a checkpoint; alone or "auto": the newest of the work_dir',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision (GPU)')
    parser.add_argument('--seed', type=int, help='seed of all random numbers')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by total batch size / recipe's batch size",
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override the config, e.g. train_dataloader.batch_size=4',
    )
    parser.add_argument('--launcher', choices=launch.LAUNCHERS, default='none')
    return parser.parse_args()


def read_config(args: argparse.Namespace) -> Config:
    cfg = options.read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    options.set_work_dir(cfg, args.work_dir)
    options.set_resume(cfg, args.resume)
    if args.seed is not None:
        cfg.randomness = dict(cfg.get('randomness', {}), seed=args.seed)
    if args.amp:
        options.enable_amp(cfg)
    if args.auto_scale_lr:
        options.enable_auto_scale_lr(cfg)
    options.check_pretrained(cfg)
    return cfg


def main() -> None:
    args = parse_args()
    with launch.exit_on_user_error():
        cfg = read_config(args)
        world_size = launch.set_up(cfg).world_size
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    notice = options.batch_size_notice(cfg, world_size)
    if notice:
        print_log(notice, logger='current', level=logging.WARNING)
    runner.train()


if __name__ == '__main__':
    main()
