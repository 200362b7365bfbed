# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Check the data of a config, or a copy of COCO, ADE20K or ImageNet.

The exit status is 1 if something is wrong.
"""

import argparse
import sys
from typing import Optional, Sequence

DATASETS = ('coco', 'ade20k', 'imagenet')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'dataset', help=f'config file, or one of: {", ".join(DATASETS)}'
    )
    parser.add_argument(
        'path',
        nargs='?',
        help='folder of the data set, e.g. data/ade/ADEChallengeData2016; not for a '
        'config',
    )
    parser.add_argument(
        '--fast',
        action='store_true',
        help='do not decode images: names, and whether files are empty',
    )
    args = parser.parse_args(argv)
    if (args.path is None) == (args.dataset in DATASETS):
        parser.error(
            f'give a config alone, or one of {", ".join(DATASETS)} and a folder'
        )
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mlla_mm.checks.data import check_splits
    from mlla_mm.checks.published import check_published
    from mlla_mm.checks.source import FILES, PIXELS
    from mlla_mm.engine import launch
    from mlla_mm.engine.console import quiet
    from mlla_mm.engine.options import read_config

    quiet()
    look = FILES if args.fast else PIXELS
    with launch.exit_on_user_error():
        if args.path is None:
            findings = check_splits(read_config(args.dataset), look).findings
            subject, reference = args.dataset, 'they should be'
        else:
            findings = check_published(args.dataset, args.path, look)
            subject, reference = args.path, f'in {args.dataset}'
    if not findings:
        scope = 'names, counts and pairs (no image was decoded)' if args.fast else 'all'
        print(f'{subject}: {scope} as {reference}.')
        return
    table = Table(show_lines=True)
    for column in ('What is wrong', 'How to fix it'):
        # Without this option, long paths and addresses would be cut off.
        table.add_column(column, overflow='fold')
    for finding in findings:
        # Text, because rich takes square brackets in strings for styles.
        table.add_row(Text(finding.problem), Text(finding.fix))
    # A log has no width.
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)
    sys.exit(1)


if __name__ == '__main__':
    main()
