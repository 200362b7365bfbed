# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The work of ``tools/train.py``."""

import argparse
import signal
from typing import Optional

from mmengine.config import Config

from ..checkpoints.reader import CheckpointError
from ..checks import rehearsal
from ..checks.config import check_config, check_loop, make_work_dir
from ..checks.data import describe, require_data
from ..checks.monitors import check_monitors
from ..checks.runner_keys import check_numbers
from ..checks.units import CheckIntervalsHook, IntervalError, check_units
from ..datasets.corrupt_images import CorruptImageError
from ..engine import batch_size, launch, options
from ..engine.arguments import named_arguments
from ..engine.config_files import print_changes, print_unread_keys, read_run_config
from ..engine.console import build_runner, quiet
from ..engine.hooks import DivergedError, RecordRecipeHook
from ..engine.parts import require_parts, require_whole_splits
from ..engine.recipe import describe_recipe, describe_run
from ..engine.toolboxes import load_own_toolbox_alone
from ..reproducible import Preempted


def train(args: argparse.Namespace) -> int:
    """Train as the command line says, or rehearse the training with ``--check``.

    Args:
        args (argparse.Namespace): The arguments of ``tools/train.py``.

    Returns:
        int: The exit status. It is 143, as a shell reports it, if SIGTERM ended the
        run, 1 if a rehearsal failed, and else 0.

    Raises:
        SystemExit: With a message, if the config or the command line is wrong.
    """
    with launch.exit_on_user_error():
        load_own_toolbox_alone(args.config)
        written, cfg = read_run_config(args.config)
        notice = apply_command_line(cfg, args)
        if not args.verbose:
            quiet(cfg.get('default_scope'))
        check_config(cfg, ('train', 'val'))
        check_loop(cfg)
        check_units(cfg)
        check_monitors(cfg)
        record = _record(written, cfg, notice)
        options.require_pretrained(cfg)
        layout = launch.set_up(cfg)
        if layout.rank == 0:
            print_changes(written, cfg)
            print_unread_keys(written)
            for line in describe(require_data(cfg, 'train', 'val')):
                print(line, flush=True)
            if not args.check:
                make_work_dir(cfg)
    if args.check:
        return rehearsal.run(cfg, layout)
    # One process alone meets a corrupt image. All of them have the other errors.
    with launch.exit_on_user_error((CorruptImageError,), shared=False):
        kinds = (CheckpointError, DivergedError, IntervalError)
        with launch.exit_on_user_error(kinds), named_arguments(cfg):
            status = _run(cfg, record, args.verbose)
    launch.tear_down()
    return status


def apply_command_line(cfg: Config, args: argparse.Namespace) -> Optional[str]:
    """Change a config as the command line of ``tools/train.py`` asks.

    Nothing else in ``tools/train.py`` changes the config. (But without GPUs
    :func:`mlla_mm.engine.launch.set_up` adapts a run of several processes to CPUs.)

    Args:
        cfg (Config): The config as it was read. It is changed in place.
        args (argparse.Namespace): The arguments of ``tools/train.py``.

    Returns:
        str | None: A warning, if the total batch size is not that of the recipe.

    Raises:
        FileNotFoundError, ValueError: If an argument cannot be applied.
    """
    options.apply_run_arguments(cfg, args)
    needed = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
    require_parts(cfg, *needed, user='Training')
    require_whole_splits(cfg)
    launch.require_restart_allowed(cfg.work_dir)
    options.set_resume(cfg, launch.restart_checkpoint(cfg.work_dir) or args.resume)
    options.add_weight_hooks(cfg)
    options.start_from_whole_model(cfg)
    layout = launch.processes(cfg.launcher)
    if args.resume and not cfg.resume and layout.rank == 0:
        print(f'Nothing to resume in {cfg.work_dir}: a new run begins.', flush=True)
    if args.amp:
        options.enable_amp(cfg)
    check_numbers(cfg)  # the next function calculates with them
    return batch_size.settle(
        cfg,
        layout.world_size,
        keep=args.keep_batch_size,
        scale=args.auto_scale_lr,
    )


def _record(written: Config, cfg: Config, notice: Optional[str]) -> RecordRecipeHook:
    """The hook that records how the run differs from its recipe."""
    recipe = describe_recipe(written)
    if cfg.get('load_from'):
        # The run starts from this checkpoint instead.
        recipe['pretrained weights'] = None
    world_size = launch.processes(cfg.launcher).world_size
    return RecordRecipeHook(recipe, describe_run(cfg, world_size), notice)


def _run(cfg: Config, record: RecordRecipeHook, verbose: bool) -> int:
    """Train to the end, or until SIGTERM. Returns the exit status."""
    runner = build_runner(cfg, verbose)
    runner.register_hook(CheckIntervalsHook(cfg))
    runner.register_hook(record)
    try:
        runner.train()
    except Preempted:
        launch.forbid_restart(cfg.work_dir, 'it was stopped by SIGTERM.')
        return 128 + signal.SIGTERM
    except DivergedError as error:
        launch.forbid_restart(cfg.work_dir, str(error).splitlines()[0])
        raise
    return 0
