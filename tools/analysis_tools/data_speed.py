# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Measure how fast a config's data are loaded, and how many cores a GPU needs."""

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/
from arguments import add_config_arguments  # noqa: E402


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        '--phase', choices=('train', 'val'), default='train', help='(default: train)'
    )
    parser.add_argument(
        '--synthetic',
        action='store_true',
        help='on pictures of the size of ImageNet, COCO or ADE20K, which are made in a '
        'temporary folder',
    )
    parser.add_argument(
        '--model-speed',
        type=float,
        metavar='N',
        help='images a second that the model takes on one GPU: how many cores it needs',
    )
    parser.add_argument(
        '--against',
        choices=('timm',),
        help="for classification: also time the authors' transforms, from timm",
    )
    parser.add_argument(
        '--images', type=int, default=64, help='images of a round (default: 64)'
    )
    parser.add_argument(
        '--repeats',
        type=int,
        default=3,
        help='rounds; of each image the fastest counts (default: 3)',
    )
    parser.add_argument(
        '--seconds',
        type=float,
        default=5,
        metavar='N',
        help='about how long to load with all workers (default: 5)',
    )
    parser.add_argument(
        '--device',
        help='of the data preprocessor (default: cuda if there is one, else cpu)',
    )
    parser.add_argument(
        '--out',
        metavar='DIR',
        default='work_dirs/data_speed',
        help='folder for data_speed.json (default: %(default)s)',
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    # benchmarks/ lies beside tools/, outside the package.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from mmengine.logging import MMLogger

    from benchmarks.data import run
    from mlla_mm.engine.console import quiet
    from mlla_mm.engine.launch import exit_on_user_error

    quiet()
    # mmpretrain tells what its data preprocessor does.
    MMLogger.get_instance('data_speed', log_level='ERROR')
    with exit_on_user_error():
        run(args)


if __name__ == '__main__':
    main()
