# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What ``tools/train.py`` does."""

import argparse
from typing import Optional

from mmengine.config import Config

from ..checkpoints.reader import CheckpointError
from ..checks import rehearsal
from ..checks.config import check_config, check_loop, make_work_dir
from ..checks.data import require_data
from ..datasets.corrupt_images import CorruptImageError
from ..engine import batch_size, launch, options
from ..engine.console import build_runner, quiet
from ..engine.hooks import DivergedError, RecordRecipeHook
from ..engine.recipe import describe_recipe, describe_run
from ..engine.toolboxes import load_own_toolbox_alone
from ..reproducible import Preempted


def train(args: argparse.Namespace) -> int:
    """Train, or with ``check`` rehearse, as the command line says.

    Args:
        args (argparse.Namespace): The arguments of ``tools/train.py``.

    Returns:
        int: The exit status: 143, as a shell reports it, where SIGTERM ended the run;
        1 where a rehearsal failed; else 0.

    Raises:
        SystemExit: With a message, if what the user gave is wrong.
    """
    with launch.exit_on_user_error():
        load_own_toolbox_alone(args.config)
        written, cfg = options.read_run_config(args.config)
        notice = apply_command_line(cfg, args)
        if not args.verbose:
            quiet(cfg.get('default_scope'))
        check_config(cfg)
        check_loop(cfg)
        record = _record(written, cfg, notice)
        options.require_pretrained(cfg)
        layout = launch.set_up(cfg)
        if layout.rank == 0:
            options.print_changes(written, cfg)
            require_data(cfg, 'train', 'val')
            if not args.check:
                make_work_dir(cfg)
    if args.check:
        return rehearsal.run(cfg, layout)
    # An image is one process's; the other errors are all of theirs.
    with launch.exit_on_user_error((CorruptImageError,), shared=False):
        with launch.exit_on_user_error((CheckpointError, DivergedError)):
            status = _run(cfg, record, args.verbose)
    launch.tear_down()
    return status


def apply_command_line(cfg: Config, args: argparse.Namespace) -> Optional[str]:
    """All that ``tools/train.py`` changes in a config: what it is asked for.

    (On CPUs :func:`mlla_mm.engine.launch.set_up` fits a run of several processes to
    them.)

    Args:
        cfg (Config): The config as it was read; changed in place.
        args (argparse.Namespace): The arguments of ``tools/train.py``.

    Returns:
        str | None: What to warn of, if the total batch size is not the recipe's.

    Raises:
        FileNotFoundError, ValueError: If something cannot be done.
    """
    options.apply_run_arguments(cfg, args)
    launch.require_restart_allowed(cfg.work_dir)
    options.set_resume(cfg, launch.restart_checkpoint(cfg.work_dir) or args.resume)
    layout = launch.processes(cfg.launcher)
    if args.resume and not cfg.resume and layout.rank == 0:
        print(f'Nothing to resume in {cfg.work_dir}: a new run begins.', flush=True)
    if args.amp:
        options.enable_amp(cfg)
    return batch_size.settle(
        cfg,
        layout.world_size,
        keep=args.keep_batch_size,
        scale=args.auto_scale_lr,
    )


def _record(written: Config, cfg: Config, notice: Optional[str]) -> RecordRecipeHook:
    """Note what the run makes of its recipe."""
    recipe = describe_recipe(written)
    if cfg.get('resume'):
        # It starts from its checkpoint.
        recipe['pretrained weights'] = None
    world_size = launch.processes(cfg.launcher).world_size
    return RecordRecipeHook(recipe, describe_run(cfg, world_size), notice)


def _run(cfg: Config, record: RecordRecipeHook, verbose: bool) -> int:
    """Train to the end, or until SIGTERM; returns the exit status."""
    runner = build_runner(cfg, verbose)
    runner.register_hook(record)
    try:
        runner.train()
    except Preempted as stop:
        launch.forbid_restart(cfg.work_dir, 'it was stopped by SIGTERM.')
        return stop.code
    except DivergedError as error:
        launch.forbid_restart(cfg.work_dir, str(error).splitlines()[0])
        raise
    return 0
