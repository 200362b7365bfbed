# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Evaluate a checkpoint with the metrics of its config."""

import argparse
from typing import Optional, Sequence

from arguments import add_ema_argument, add_fuse_argument, add_run_arguments


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        metavar='PATH',
        help='where to write predictions: a .pkl file, or a folder for segmentation',
    )
    parser.add_argument(
        '--show-dir',
        metavar='DIR',
        help='folder for drawn predictions; only the first process draws, its part',
    )
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation of the config'
    )
    add_ema_argument(parser)
    add_fuse_argument(parser)
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    from mlla_mm.apis.test import test

    test(args)


if __name__ == '__main__':
    main()
