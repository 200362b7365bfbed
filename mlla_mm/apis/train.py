# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What ``tools/train.py`` does."""

import argparse
import signal

from mmengine.config import Config

from ..datasets.check_config import require_data
from ..engine import batch_size, launch, preflight
from ..engine import config as options
from ..engine.config_check import check_config, require_work_dir
from ..engine.console import build_runner, quiet
from ..engine.corrupt_images import CorruptImageError, check_images
from ..engine.hooks import DivergedError, Preempted, RecordRecipeHook
from ..engine.loops import use_seeded_loop
from ..engine.recipe import describe_recipe, describe_run
from ..engine.toolboxes import load_own_toolbox_alone
from ..utils.checkpoint_file import CheckpointError


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
        cfg = _read_config(args)
        if not args.verbose:
            quiet(cfg.get('default_scope'))
        check_config(cfg)
        record = _fit_to_processes(cfg, args)
        check_images(cfg, 'val')
        options.check_pretrained(cfg)
        layout = launch.set_up(cfg)
        if layout.rank == 0:
            require_data(cfg, 'train', 'val')
            if not args.check:
                require_work_dir(cfg)
    if args.check:
        return preflight.run(cfg, layout)
    # An image is one process's; the other errors are all of theirs.
    with launch.exit_on_user_error((CorruptImageError,), shared=False):
        with launch.exit_on_user_error((CheckpointError, DivergedError)):
            is_complete = _run(cfg, record, args.verbose)
    launch.tear_down()
    return 0 if is_complete else 128 + signal.SIGTERM


def _read_config(args: argparse.Namespace) -> Config:
    cfg = options.read_run_config(args)
    launch.require_restart_allowed(cfg.work_dir)
    options.set_resume(cfg, launch.restart_checkpoint(cfg.work_dir) or args.resume)
    is_first = launch.processes(cfg.launcher).rank == 0
    if args.resume and not cfg.resume and is_first:
        print(f'Nothing to resume in {cfg.work_dir}: a new run begins.', flush=True)
    if args.amp:
        options.enable_amp(cfg)
    return cfg


def _fit_to_processes(cfg: Config, args: argparse.Namespace) -> RecordRecipeHook:
    """Settle the total batch size, and note what the run makes of its recipe."""
    world_size = launch.processes(cfg.launcher).world_size
    notice = batch_size.settle(
        cfg, world_size, keep=args.keep_batch_size, scale=args.auto_scale_lr
    )
    use_seeded_loop(cfg)
    recipe = describe_recipe(options.read_config(args.config))
    return RecordRecipeHook(recipe, describe_run(cfg, world_size), notice)


def _run(cfg: Config, record: RecordRecipeHook, verbose: bool) -> bool:
    """Train to the end, or until SIGTERM: then the result is False."""
    runner = build_runner(cfg, verbose)
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
