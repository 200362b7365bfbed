# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Check the data of a config, or a copy of COCO, ADE20K or ImageNet.

The exit status is 1 if something is wrong. Warnings do not change it.
"""

import argparse
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/
from arguments import add_options_argument  # noqa: E402

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
        help='decode a few label maps alone: annotations, names, and whether files are '
        'empty',
    )
    parser.add_argument(
        '--write-fixed',
        metavar='DIR',
        help='of a config with annotations in the format of COCO: write repaired files '
        'into this folder, and leave the originals as they are',
    )
    add_options_argument(parser)
    args = parser.parse_args(argv)
    if (args.path is None) == (args.dataset in DATASETS):
        parser.error(
            f'give a config alone, or one of {", ".join(DATASETS)} and a folder'
        )
    if args.path is not None and (args.write_fixed or args.cfg_options):
        parser.error('--write-fixed and --cfg-options need a config')
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    from mlla_mm.checks.data import check_splits, write_fixed
    from mlla_mm.checks.published import check_published
    from mlla_mm.checks.source import FILES, PIXELS
    from mlla_mm.engine import launch
    from mlla_mm.engine.config_files import read_config
    from mlla_mm.engine.console import quiet

    quiet()
    look = FILES if args.fast else PIXELS
    with launch.exit_on_user_error():
        if args.path is not None:
            findings = check_published(args.dataset, args.path, look)
            subject, reference = args.path, f'in {args.dataset}'
        else:
            cfg = read_config(args.dataset, args.cfg_options)
            if args.write_fixed:
                print(*write_fixed(cfg, args.write_fixed), sep='\n')
            report = check_splits(cfg, look)
            _print_counts(report.counts)
            findings, subject = report.findings, args.dataset
            reference = 'they should be'
    if findings:
        _print_table(
            ['', 'What is wrong', 'How to fix it'],
            [['error' if x.fatal else 'warning', x.problem, x.fix] for x in findings],
            lines=True,
        )
    if any(finding.fatal for finding in findings):
        sys.exit(1)
    scope = 'names, counts and pairs (--fast)' if args.fast else 'all'
    verdict = (
        'no error, but see the warnings' if findings else f'{scope} as {reference}'
    )
    print(f'{subject}: {verdict}.')


def _print_counts(counts: Mapping[str, Any]) -> None:
    """Images, and objects or shares of pixels, of each class and split."""
    columns: Dict[str, List[str]] = {}
    names: List[str] = []
    for split, found in counts.items():
        # Splits have the same classes, but for a classifier that is measured on some.
        if found.numbers is not None:
            names = max(names, list(found.classes), key=len)
        by_image = found.numbers if found.unit == 'images' else found.images_with
        columns[f'{split}: images'] = _column(found.images, by_image)
        if found.numbers is not None and found.unit != 'images':
            total = sum(found.numbers)
            share = found.unit == 'pixels' and total > 0
            columns[f'{split}: {found.unit}'] = _column(total, found.numbers, share)
    rows = list(zip_longest(['all', *names], *columns.values(), fillvalue=''))
    if columns:
        _print_table(['class', *columns], rows, justify='right')


def _column(total: int, numbers: Optional[List[int]], share: bool = False) -> List[str]:
    """A number of the whole, then of each class, which may be shares of the whole."""
    parts = [f'{x / total:.2%}' if share else f'{x:,}' for x in numbers or ()]
    return [f'{total:,}', *parts]


def _print_table(
    heads: List[str],
    rows: Sequence[Sequence[str]],
    justify: Any = 'left',
    lines: bool = False,
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=lines)
    for i, head in enumerate(heads):
        # Without folding, long paths and addresses would be cut off.
        table.add_column(head, justify=justify if i else 'left', overflow='fold')
    for row in rows:
        # Text, because rich takes square brackets in strings for styles.
        table.add_row(*map(Text, row))
    # A log has no width.
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)


if __name__ == '__main__':
    main()
