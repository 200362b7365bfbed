# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Train a detector, segmentor or classifier as its config says."""

import argparse
import signal
import sys

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

import mlla_mm  # noqa: F401
from mlla_mm.datasets.check_config import require_data
from mlla_mm.engine import batch_size, launch, preflight
from mlla_mm.engine import config as options
from mlla_mm.engine.config_check import check_config, require_work_dir
from mlla_mm.engine.corrupt_images import CorruptImageError, check_images
from mlla_mm.engine.hooks import DivergedError, Preempted, RecordRecipeHook
from mlla_mm.engine.loops import use_seeded_loop
from mlla_mm.engine.recipe import describe_recipe, describe_run
from mlla_mm.utils.checkpoint_file import CheckpointError


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
        '--check',
        action='store_true',
        help='rehearse the run in minutes: what would fail, memory, time and disk',
    )
    total_batch = parser.add_mutually_exclusive_group()
    total_batch.add_argument(
        '--keep-batch-size',
        action='store_true',
        help="accumulate gradients up to the recipe's total batch size",
    )
    total_batch.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by total batch size / recipe's",
    )
    return parser.parse_args()


def read_config(args: argparse.Namespace) -> Config:
    cfg = options.read_run_config(args)
    launch.require_restart_allowed(cfg.work_dir)
    options.set_resume(cfg, launch.restart_checkpoint(cfg.work_dir) or args.resume)
    if args.amp:
        options.enable_amp(cfg)
    return cfg


def fit_to_processes(cfg: Config, args: argparse.Namespace) -> RecordRecipeHook:
    """Settle the total batch size, and note what the run makes of its recipe."""
    world_size = launch.processes(cfg.launcher).world_size
    notice = batch_size.settle(
        cfg, world_size, keep=args.keep_batch_size, scale=args.auto_scale_lr
    )
    use_seeded_loop(cfg)
    recipe = describe_recipe(options.read_config(args.config))
    return RecordRecipeHook(recipe, describe_run(cfg, world_size), notice)


def main() -> None:
    args = parse_args()
    with launch.exit_on_user_error():
        cfg = read_config(args)
        check_config(cfg)
        record = fit_to_processes(cfg, args)
        check_images(cfg, 'val')
        options.check_pretrained(cfg)
        layout = launch.set_up(cfg)
        if layout.rank == 0:
            require_data(cfg, 'train', 'val')
            if not args.check:
                require_work_dir(cfg.work_dir)
    if args.check:
        sys.exit(preflight.run(cfg, layout))
    # An image is one process's; the other errors are all of theirs.
    with launch.exit_on_user_error((CorruptImageError,), shared=False):
        with launch.exit_on_user_error((CheckpointError, DivergedError)):
            is_complete = train(cfg, record)
    launch.tear_down()
    if not is_complete:
        # As a shell reports a process that the signal ended.
        sys.exit(128 + signal.SIGTERM)


def train(cfg: Config, record: RecordRecipeHook) -> bool:
    """Train to the end, or until SIGTERM: then the result is False."""
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.register_hook(record)
    try:
        runner.train()
    except Preempted:
        launch.forbid_restart(cfg.work_dir, 'it was stopped by SIGTERM.')
        return False
    except DivergedError as error:
        launch.forbid_restart(cfg.work_dir, str(error).splitlines()[0])
        raise
    return True


if __name__ == '__main__':
    main()
