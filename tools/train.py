# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Train a detector, segmentor or classifier as its config says."""

import argparse
import sys
from typing import Optional, Sequence

from arguments import add_run_arguments


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='checkpoint to go on from; without PATH the newest in the work_dir',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision (GPU)')
    parser.add_argument(
        '--check',
        action='store_true',
        help='rehearse the run in minutes: find errors, measure memory, time and disk',
    )
    total_batch = parser.add_mutually_exclusive_group()
    total_batch.add_argument(
        '--keep-batch-size',
        action='store_true',
        help="accumulate gradients to reach the recipe's total batch size",
    )
    total_batch.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by (total batch size / the recipe's)",
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    from mlla_mm.apis.train import train

    sys.exit(train(args))


if __name__ == '__main__':
    main()
