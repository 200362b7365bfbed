# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Evaluate a checkpoint with the metrics of its config."""

import argparse
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

import mlla_mm  # noqa: F401
from mlla_mm.engine import config as options
from mlla_mm.engine import launch
from mlla_mm.engine.ema import use_ema_weights


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--work-dir', help='folder for logs and metrics (work_dirs/CONFIG_NAME)'
    )
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
    parser.add_argument(
        '--ema',
        action='store_true',
        help="the checkpoint's averaged weights (state_dict_ema), not the plain ones",
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--seed', type=int, help='seed of all random numbers')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override the config, e.g. test_dataloader.num_workers=4',
    )
    parser.add_argument('--launcher', choices=launch.LAUNCHERS, default='none')
    return parser.parse_args()


def read_config(args: argparse.Namespace) -> Config:
    cfg = options.read_config(args.config, args.cfg_options)
    if not Path(args.checkpoint).is_file():
        raise FileNotFoundError(f'Checkpoint not found: {args.checkpoint}')
    cfg.load_from = args.checkpoint
    cfg.resume = False
    cfg.launcher = args.launcher
    options.set_work_dir(cfg, args.work_dir)
    if args.seed is not None:
        cfg.randomness = dict(cfg.get('randomness', {}), seed=args.seed)
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
        launch.set_up(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.test()


if __name__ == '__main__':
    main()
