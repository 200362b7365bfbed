# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Tables of what the recipes need on 8, 32 and 128 GPUs: docs/scaling.md."""

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--models', nargs='+', metavar='NAME', help='such as MLLA-T (default: all)'
    )
    parser.add_argument(
        '--gpus', nargs='+', type=int, help='(default: 8 32 128; 8 for COCO and ADE20K)'
    )
    parser.add_argument(
        '--model-speed',
        type=float,
        metavar='N',
        help='images a second that a GPU takes in training (default: by model)',
    )
    parser.add_argument(
        '--core-speed',
        type=float,
        metavar='N',
        help='images a second that a core makes (default: by data set)',
    )
    parser.add_argument(
        '--inside',
        type=float,
        default=450,
        metavar='GB/S',
        help='that a GPU sends within a machine of 8 (default: 450, NVLink)',
    )
    parser.add_argument(
        '--between',
        type=float,
        default=50,
        metavar='GB/S',
        help='that a machine sends to another (default: 50, 400 Gb/s InfiniBand)',
    )
    parser.add_argument(
        '--disk',
        type=float,
        default=1,
        metavar='GB/S',
        help='at which a checkpoint is written (default: 1)',
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    # benchmarks/ lies beside tools/, outside the package.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from benchmarks.scaling import run
    from mlla_mm.engine.console import quiet
    from mlla_mm.engine.launch import exit_on_user_error

    quiet()
    with exit_on_user_error():
        run(args)


if __name__ == '__main__':
    main()
