# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Count parameters, FLOPs and activations of a model, beside the paper's figures."""

import argparse
from pathlib import Path
from typing import Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument('config', nargs='?', help='config file')
    models.add_argument(
        '--all',
        action='store_true',
        help='a Markdown table of every published config (minutes without a GPU)',
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('HEIGHT', 'WIDTH'),
        help="image size; default: the paper's, 224 224 for classification, 800 1280 "
        'for detection, 512 2048 for segmentation',
    )
    parser.add_argument(
        '--depth', type=int, default=2, help='levels of modules to list (default: 2)'
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    from mmengine.utils import track_iter_progress

    from mlla_mm.engine.config_files import read_config
    from mlla_mm.engine.console import quiet
    from mlla_mm.engine.launch import exit_on_user_error
    from mlla_mm.evaluation.complexity import (
        COLUMNS,
        complexity_row,
        count_complexity,
        scan_note,
    )
    from mlla_mm.evaluation.markdown import markdown_table
    from mlla_mm.evaluation.published import published_models

    quiet()
    with exit_on_user_error():
        published = published_models()
        if args.all:
            configs = [model.config for model in published.values()]
        else:
            configs = [Path(args.config)]
        rows, notes = [], []
        for config in track_iter_progress(configs) if args.all else configs:
            counted = count_complexity(read_config(str(config)), args.shape, args.depth)
            # The paper's counts are for the paper's image.
            paper = None if args.shape else published.get(config.stem)
            rows.append(complexity_row(counted, config.stem, paper))
            if counted.scan_flops:
                notes.append(scan_note(counted, config.stem))
    if not args.all:
        print(counted.table)
    print()
    print('\n\n'.join([markdown_table(COLUMNS, rows), *notes]))


if __name__ == '__main__':
    main()
