# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Draw the pictures of a finished demo run and print its summary."""

import argparse
from typing import Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of the run')
    parser.add_argument('work_dir', help='work_dir of the run, with its tests')
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    from mlla_mm.engine.config_files import read_config
    from mlla_mm.engine.console import quiet
    from mlla_mm.engine.launch import exit_on_user_error
    from mlla_mm.evaluation.report import write_report

    with exit_on_user_error((OSError, ValueError)):
        cfg = read_config(args.config)
        quiet(cfg.default_scope)
        print('\n'.join(write_report(cfg, args.work_dir)))


if __name__ == '__main__':
    main()
