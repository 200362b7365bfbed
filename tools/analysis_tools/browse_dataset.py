# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Draw training samples, as stored beside augmented, on one sheet."""

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/
from arguments import add_config_arguments  # noqa: E402


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        '--mode',
        choices=('spread', 'repeat'),
        default='spread',
        help='samples spread over the data set (default), or the first one augmented '
        'again and again',
    )
    parser.add_argument(
        '--num-images', type=int, default=8, help='number of samples (default: 8)'
    )
    parser.add_argument(
        '--out',
        metavar='FILE',
        default='training_samples.png',
        help='picture to write (default: %(default)s)',
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    from mlla_mm.engine.arguments import named_arguments
    from mlla_mm.engine.config_files import read_config
    from mlla_mm.engine.console import quiet
    from mlla_mm.engine.launch import exit_on_user_error
    from mlla_mm.visualization.samples import training_sheet

    with exit_on_user_error():
        cfg = read_config(args.config, args.cfg_options)
        quiet(cfg.get('default_scope'))
        with named_arguments(cfg):
            training_sheet(cfg, args.out, args.num_images, repeat=args.mode == 'repeat')
    print(f'Training samples: {args.out}')


if __name__ == '__main__':
    main()
