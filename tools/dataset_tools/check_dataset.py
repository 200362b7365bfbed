# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Check a copy of COCO, ADE20K or ImageNet: exit status 1 if something is wrong."""

import argparse
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlla_mm.datasets.check import CHECKS


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('dataset', choices=CHECKS, help='data set')
    parser.add_argument('path', help='its folder, e.g. data/ade/ADEChallengeData2016')
    parser.add_argument(
        '--fast', action='store_true', help='do not decode images: names and sizes only'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        findings = CHECKS[args.dataset](args.path, fast=args.fast)
    except FileNotFoundError as error:
        sys.exit(f'Error: {error}')
    if not findings:
        scope = 'names, counts and pairs (no image was decoded)' if args.fast else 'all'
        print(f'{args.path}: {scope} as in {args.dataset}.')
        return
    table = Table(show_lines=True)
    for column in ('What is wrong', 'How to fix it'):
        # Paths and addresses stay whole.
        table.add_column(column, overflow='fold')
    for finding in findings:
        # As text: rich takes square brackets for styles.
        table.add_row(Text(finding.problem), Text(finding.fix))
    # A log has no width to wrap to.
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)
    sys.exit(1)


if __name__ == '__main__':
    main()
