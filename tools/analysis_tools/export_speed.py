# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Race exported files of a whole model against PyTorch, on the CPU, image by image."""

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/
from arguments import (  # noqa: E402
    add_config_arguments,
    add_ema_argument,
    add_fuse_argument,
    add_trust_argument,
)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint that was exported')
    parser.add_argument(
        'files',
        nargs='+',
        metavar='FILE',
        help='whole models from tools/export.py: TorchScript (.pt) or ONNX (.onnx)',
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='size of the image in pixels (detectors 800 1280, segmentors 512 512, '
        'classifiers 224 224)',
    )
    parser.add_argument(
        '--image',
        metavar='FILE',
        help="picture that is resized to it (the first of the config's test data, or "
        'where they are not here a synthetic one)',
    )
    parser.add_argument(
        '--compile',
        action='store_true',
        help='also time PyTorch with its backbone compiled',
    )
    parser.add_argument('--repeats', type=int, default=20, help='rounds (default: 20)')
    parser.add_argument(
        '--threads', type=int, help="CPU threads of every row (default: PyTorch's)"
    )
    add_ema_argument(parser)
    add_fuse_argument(parser)
    add_trust_argument(parser)
    parser.add_argument(
        '--out',
        metavar='DIR',
        default='work_dirs/export_speed',
        help='folder for the table and the samples (default: %(default)s)',
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    # benchmarks/ lies beside tools/, outside the package.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from mmengine.logging import MMLogger

    from benchmarks.exported import run
    from mlla_mm.engine.console import quiet
    from mlla_mm.engine.launch import exit_on_user_error
    from mlla_mm.engine.toolboxes import load_own_toolbox_alone

    quiet()
    # mmpretrain tells what its data preprocessor does.
    MMLogger.get_instance('export_speed', log_level='ERROR')
    with exit_on_user_error():
        load_own_toolbox_alone(args.config)
        run(args)


if __name__ == '__main__':
    main()
