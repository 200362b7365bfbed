# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Arguments that several tools share.

A tool reads its arguments before it imports ``mlla_mm``, PyTorch and the toolboxes,
because these imports take seconds. So ``-h`` and a mistyped option are answered at
once.
"""

import argparse

from mmengine.config import DictAction


class OptionsAction(DictAction):
    """MMEngine's KEY=VALUE, with errors of argparse in place of tracebacks."""

    def __call__(self, parser, namespace, values, option_string=None):
        for text in values:
            key, equals, value = text.partition('=')
            if not key or not equals:
                parser.error(
                    f'{option_string}: {text!r} is no KEY=VALUE. Write it without '
                    'spaces, or in quotes: "KEY=VALUE".'
                )
            try:
                parsed = self._parse_iterable(value)
            except AssertionError:
                parser.error(
                    f'{option_string}: {text!r} has a bracket without its other half. '
                    'Write lists in quotes: "KEY=[1, 2]".'
                )
            if _has_dict(parsed):
                parser.error(
                    f'{option_string}: {text!r} has a dict. Write its keys one by one, '
                    f'{key}.NAME=VALUE, and {key}._delete_=True if they are to be all.'
                )
        super().__call__(parser, namespace, values, option_string)


def _has_dict(value: object) -> bool:
    """Whether MMEngine has taken the code of a dict for text, or for several texts."""
    if isinstance(value, (list, tuple)):
        return any(map(_has_dict, value))
    return isinstance(value, str) and value.startswith(('{', 'dict('))


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the config file and the changes to it."""
    parser.add_argument('config', help='config file')
    add_options_argument(parser)


def add_options_argument(parser: argparse.ArgumentParser) -> None:
    """Add the changes to a config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=OptionsAction,
        metavar='KEY=VALUE',
        help='override the config, e.g. train_dataloader.batch_size=4',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of both training and testing. The config comes first."""
    add_config_arguments(parser)
    parser.add_argument(
        '--work-dir', help='folder for logs and results (work_dirs/CONFIG_NAME)'
    )
    parser.add_argument('--seed', type=int, help='seed of all random numbers')
    parser.add_argument(
        '-v',
        '--verbose',
        action='store_true',
        help='print all that the log file has: environment, config, hooks, warnings',
    )
    parser.add_argument(
        '--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none'
    )
    add_trust_argument(parser)


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add the switch that lets checkpoints run code."""
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load checkpoints that may run code; only if you trust their source',
    )


def add_fuse_argument(parser: argparse.ArgumentParser) -> None:
    """Add the switch that removes BatchNorm from the model."""
    parser.add_argument(
        '--fuse-conv-bn',
        action='store_true',
        help='fold every BatchNorm into the convolution before it, for inference',
    )


def add_ema_argument(parser: argparse.ArgumentParser) -> None:
    """Add the switch that takes a checkpoint's averaged weights."""
    parser.add_argument(
        '--ema',
        action='store_true',
        # Not the plain ones: MMEngine's EMAHook saves them elsewhere.
        default=None,
        help="take the checkpoint's averaged weights, of MESAHook or EMAHook",
    )
