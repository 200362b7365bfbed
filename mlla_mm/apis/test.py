# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The work of ``tools/test.py``."""

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import MODELS

from ..checkpoints.reader import CheckpointError
from ..checks.classes import head_classes
from ..checks.config import check_config, make_work_dir
from ..checks.data import describe, require_data
from ..datasets.corrupt_images import CorruptImageError
from ..engine import launch, options
from ..engine.arguments import named_arguments
from ..engine.config_files import print_changes, print_unread_keys, read_run_config
from ..engine.console import build_runner, quiet
from ..engine.parts import require_parts, require_whole_splits
from ..engine.toolboxes import load_own_toolbox_alone
from ..export import ExportError
from ..export.exported import exported_model, is_exported, require_no_options


def test(args: argparse.Namespace) -> None:
    """Evaluate a checkpoint as the command line says.

    Args:
        args (argparse.Namespace): The arguments of ``tools/test.py``.

    Raises:
        SystemExit: With a message, if the config or the command line is wrong.
    """
    with launch.exit_on_user_error():
        load_own_toolbox_alone(args.config)
        written, cfg = read_run_config(args.config)
        apply_command_line(cfg, args)
        if not args.verbose:
            quiet(cfg.get('default_scope'))
        check_config(cfg, ('test',))
        if launch.set_up(cfg).rank == 0:
            print_changes(written, cfg)
            print_unread_keys(written)
            for line in describe(require_data(cfg, 'test')):
                print(line, flush=True)
            make_work_dir(cfg)
        if is_exported(args.checkpoint):
            take_exported_file(cfg, args.checkpoint)
    # One process alone meets a corrupt image. All of them have a bad checkpoint.
    with launch.exit_on_user_error((CorruptImageError,), shared=False):
        with launch.exit_on_user_error((CheckpointError,)):
            # A variable would keep the runner, which keeps the process group alive.
            with named_arguments(cfg):
                build_runner(cfg, args.verbose).test()
    launch.tear_down()


def take_exported_file(cfg: Config, path: str) -> None:
    """Let an exported file stand for the model of a config that was checked.

    Args:
        cfg (Config): The config. It is changed in place.
        path (str): The file.

    Raises:
        ExportError: If onnxruntime is missing or cannot read the file, or if the file
            is for another task or another number of classes.
    """
    model = exported_model(cfg, path)
    names = MODELS.build(model).dataset_meta.get('classes')
    for key, count in head_classes(cfg.model):
        if names and len(names) != count:
            raise ExportError(
                f'{path} has {len(names)} classes, and {key} is {count}: give the '
                'config of the exported model.'
            )
    cfg.model = model


def apply_command_line(cfg: Config, args: argparse.Namespace) -> None:
    """Change a config as the command line of ``tools/test.py`` asks.

    Nothing else in ``tools/test.py`` changes the config.

    Args:
        cfg (Config): The config as it was read. It is changed in place.
        args (argparse.Namespace): The arguments of ``tools/test.py``.

    Raises:
        FileNotFoundError, ValueError: If an argument cannot be applied.
    """
    options.apply_run_arguments(cfg, args)
    needed = ('model', 'test_dataloader', 'test_cfg', 'test_evaluator')
    require_parts(cfg, *needed, user='A test')
    require_whole_splits(cfg)
    if not Path(args.checkpoint).is_file():
        raise FileNotFoundError(f'Checkpoint not found: {args.checkpoint}')
    cfg.resume = False
    if is_exported(args.checkpoint):
        cfg.load_from = None
        require_no_options(
            ema=args.ema, fuse_conv_bn=args.fuse_conv_bn, amp=args.amp, tta=args.tta
        )
    else:
        cfg.load_from = args.checkpoint
        options.add_weight_hooks(cfg)
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.ema:
        options.add_hook(cfg, 'UseEMAWeightsHook')
    if args.fuse_conv_bn:
        options.add_hook(cfg, 'FuseConvBNHook')
    if args.tta:
        options.enable_tta(cfg)
    if args.show_dir:
        options.draw_results(cfg, args.show_dir)
    if args.out:
        options.dump_predictions(cfg, args.out)
