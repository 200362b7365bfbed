# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Train a detector, segmentor or classifier as its config says."""

import argparse
import logging

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

import mlla_mm  # noqa: F401
from mlla_mm.engine import config as options
from mlla_mm.engine import launch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_run_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='go on from a checkpoint; alone or "auto": the newest of the work_dir',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision (GPU)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by total batch size / recipe's batch size",
    )
    return parser.parse_args()


def read_config(args: argparse.Namespace) -> Config:
    cfg = options.read_run_config(args)
    options.set_resume(cfg, args.resume)
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
    launch.tear_down()


if __name__ == '__main__':
    main()
