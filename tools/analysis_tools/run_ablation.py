# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Train and time the rows of the paper's analysis, with one budget for all.

What is trained already is not trained again: the same command goes on where it was
stopped, and adds rows or seeds. The exit status is 1 if a run failed.
"""

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/
from arguments import add_options_argument  # noqa: E402


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument(
        '--rows',
        nargs='+',
        metavar='NAME',
        help='rows on digits, besides the baseline, such as forget-gate (default: all)',
    )
    rows.add_argument(
        '--configs',
        nargs='+',
        metavar='CONFIG',
        help='instead, these configs of classifiers, the baseline first',
    )
    parser.add_argument(
        '--seeds', type=int, default=3, help='runs of each row (default: 3)'
    )
    parser.add_argument(
        '--jobs', type=int, default=1, help='runs at a time (default: 1)'
    )
    parser.add_argument(
        '--processes',
        type=int,
        default=1,
        help='processes of a run, such as one for each GPU (default: 1)',
    )
    parser.add_argument(
        '--device', help='of the speed (default: cuda if there is one, else cpu)'
    )
    parser.add_argument(
        '--repeats', type=int, default=20, help='rounds of the speed (default: 20)'
    )
    parser.add_argument(
        '--out',
        metavar='DIR',
        default='work_dirs/ablation',
        help='folder for the runs, the table and the picture (default: %(default)s)',
    )
    add_options_argument(parser)
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    # benchmarks/ lies beside tools/, outside the package.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from benchmarks.ablation import run
    from mlla_mm.engine.console import quiet
    from mlla_mm.engine.launch import exit_on_user_error

    quiet()
    with exit_on_user_error((FileNotFoundError, FileExistsError, ValueError)):
        status = run(args)
    sys.exit(status)


if __name__ == '__main__':
    main()
