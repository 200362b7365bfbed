# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Race models against the plain assembly of MLLA: time, peak memory, a picture."""

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--models',
        nargs='+',
        metavar='NAME',
        default=('mlla-t', 'plain-t', 'swin-t', 'convnext-t'),
        help='{mlla,eager,plain,swin,convnext}-{t,s,b}, with the plain one of each '
        'size (default: mlla-t plain-t swin-t convnext-t)',
    )
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        '--shape',
        nargs='+',
        default=['classification'],
        help='classification (224x224), detection (800x1280), segmentation (512x2048), '
        'or HEIGHTxWIDTH. A classifier for the first, else the backbone (default: '
        'classification)',
    )
    images.add_argument(
        '--sweep',
        nargs='*',
        type=int,
        metavar='SIDE',
        help='instead, in one mode and dtype: cost of the backbone on square images of '
        'these sides (default: 224 to 1120)',
    )
    parser.add_argument(
        '--batch-size',
        nargs='+',
        type=int,
        default=[1],
        help='images of a call, one number for all shapes or one for each (default: 1)',
    )
    parser.add_argument(
        '--mode',
        nargs='+',
        choices=('infer', 'train'),
        default=['infer'],
        help='train: forward and backward (default: infer)',
    )
    parser.add_argument(
        '--dtype',
        nargs='+',
        choices=('float32', 'float16', 'bfloat16'),
        default=['float32'],
        help='float16 and bfloat16: by autocast (default: float32)',
    )
    parser.add_argument(
        '--compile',
        action='store_true',
        help='time each model a second time with its backbone compiled',
    )
    parser.add_argument(
        '--cuda-graph',
        action='store_true',
        help='time each model a second time as a CUDA graph that is replayed',
    )
    parser.add_argument(
        '--fuse-conv-bn',
        action='store_true',
        help='fold BatchNorm into convolutions first, in every model that has it; for '
        '--mode infer',
    )
    parser.add_argument(
        '--repeats', type=int, default=20, help='rounds of a case (default: 20)'
    )
    parser.add_argument(
        '--seconds',
        type=float,
        metavar='N',
        help='skip cases, but for the first, whose turn comes after N seconds '
        '(default: no limit)',
    )
    parser.add_argument('--threads', type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument('--device', help='default: cuda if there is one, else cpu')
    parser.add_argument(
        '--out',
        metavar='DIR',
        default='work_dirs/benchmark',
        help='folder for the table, the samples and the picture (default: %(default)s)',
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    # benchmarks/ lies beside tools/, outside the package.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from benchmarks.races import run
    from mlla_mm.engine.console import quiet
    from mlla_mm.engine.launch import exit_on_user_error

    quiet()
    with exit_on_user_error():
        run(args)


if __name__ == '__main__':
    main()
