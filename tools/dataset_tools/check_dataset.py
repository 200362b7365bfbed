# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Check the data of a config, or a copy of COCO, ADE20K or ImageNet.

Exit status 1 if something is wrong.
"""

import argparse
import sys
from typing import List

from rich.console import Console
from rich.table import Table
from rich.text import Text

import mlla_mm  # noqa: F401
from mlla_mm.datasets.check import CHECKS, Finding
from mlla_mm.datasets.check_config import check_split
from mlla_mm.engine import launch
from mlla_mm.engine.config import read_config
from mlla_mm.engine.config_check import check_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('dataset', help=f'config file, or one of: {", ".join(CHECKS)}')
    parser.add_argument(
        'path',
        nargs='?',
        help='folder of the data set, e.g. data/ade/ADEChallengeData2016; not for a '
        'config',
    )
    parser.add_argument(
        '--fast', action='store_true', help='do not decode images: names and sizes only'
    )
    args = parser.parse_args()
    if (args.path is None) == (args.dataset in CHECKS):
        parser.error(f'give a config alone, or one of {", ".join(CHECKS)} and a folder')
    return args


def check_data_of(path: str, fast: bool) -> List[Finding]:
    """Check the data sets for training and validation of a config."""
    cfg = read_config(path)
    check_config(cfg)
    found = {split: check_split(cfg, split, not fast) for split in ('train', 'val')}
    if found['train'] is None and found['val'] is None:
        raise ValueError(f'{path} has no data set of a known kind: there is no check.')
    return [finding for findings in found.values() for finding in findings or []]


def main() -> None:
    args = parse_args()
    with launch.exit_on_user_error():
        if args.path is None:
            findings = check_data_of(args.dataset, args.fast)
            subject, reference = args.dataset, 'they should be'
        else:
            findings = CHECKS[args.dataset](args.path, fast=args.fast)
            subject, reference = args.path, f'in {args.dataset}'
    if not findings:
        scope = 'names, counts and pairs (no image was decoded)' if args.fast else 'all'
        print(f'{subject}: {scope} as {reference}.')
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
