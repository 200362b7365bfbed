# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Table of the peak memory of training, per config, on a synthetic batch."""

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='config files')
    parser.add_argument(
        '--batch-size', type=int, help="images of the process (the config's)"
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('WIDTH', 'HEIGHT'),
        help='of the images, in pixels (the largest of the training pipeline)',
    )
    parser.add_argument(
        '--with-cp', action='store_true', help="recompute the backbone's blocks"
    )
    parser.add_argument(
        '--amp', choices=('float16', 'bfloat16'), help='mixed precision, on a GPU'
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    # benchmarks/ lies beside tools/, outside the package.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from mmengine.logging import MMLogger

    from benchmarks.peak_memory import measure_config
    from mlla_mm.engine import launch
    from mlla_mm.engine.config_files import read_config
    from mlla_mm.engine.console import quiet

    quiet()
    # MMEngine would list the rate of every parameter.
    MMLogger.get_instance('peak_memory', log_level='ERROR')
    print('| Config | Batch | Peak memory |\n|---|---|---|', flush=True)
    for path in args.configs:
        with launch.exit_on_user_error():
            measured = measure_config(
                read_config(path),
                args.batch_size,
                tuple(args.size) if args.size else None,
                args.with_cp,
                args.amp,
            )
        width, height = measured.size
        print(
            f'| {path} | {measured.batch_size} x {width} x {height} | '
            f'{measured.bytes / 2**30:.2f} GiB |',
            flush=True,
        )


if __name__ == '__main__':
    main()
