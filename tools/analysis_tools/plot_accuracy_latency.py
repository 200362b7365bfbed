# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Plot published accuracy over the latency on this device, MLLA among other models."""

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
        help="names from configs/classification/metafile.yml and mmpretrain's model "
        'zoo; default: MLLA, Swin, ConvNeXt, MViTv2 and DaViT',
    )
    parser.add_argument('--device', help='default: cuda if there is one, else cpu')
    parser.add_argument(
        '--batch-size', type=int, help='default: 64 where there is a GPU, else 1'
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=(224, 224),
        metavar=('HEIGHT', 'WIDTH'),
        help='default: 224 224, for which the accuracies are published',
    )
    parser.add_argument(
        '--repeats', type=int, default=20, help='samples of each model (default: 20)'
    )
    parser.add_argument(
        '--out',
        metavar='DIR',
        default='work_dirs/accuracy_latency',
        help='folder for the picture and its table (default: %(default)s)',
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    # benchmarks/ lies beside tools/, outside the package.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from benchmarks.accuracy_latency import run
    from mlla_mm.engine.console import quiet
    from mlla_mm.engine.launch import exit_on_user_error

    quiet()
    with exit_on_user_error():
        run(args)


if __name__ == '__main__':
    main()
