# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Compare runs with the paper. The exit status is 1 if a result differs."""

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'work_dirs',
        nargs='+',
        metavar='WORK_DIR',
        help='work_dir of a run, finished or not, or of a test',
    )
    parser.add_argument(
        '--tolerance',
        type=float,
        default=0.5,
        help='accepted difference in points, up and down (default: 0.5)',
    )
    parser.add_argument(
        '--out',
        metavar='DIR',
        help='folder for the report and its curves (default: first WORK_DIR)',
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    from mlla_mm.engine.launch import exit_on_user_error
    from mlla_mm.evaluation.comparison import (
        CURVES_NAME,
        REPORT_NAME,
        compare_with_paper,
    )

    out = Path(args.out or args.work_dirs[0])
    with exit_on_user_error((OSError, ValueError)):
        report, within = compare_with_paper(args.work_dirs, out, args.tolerance)
    print(report)
    print(f'Saved in {out}: {REPORT_NAME} and, of a training, {CURVES_NAME}')
    sys.exit(0 if within else 1)


if __name__ == '__main__':
    main()
