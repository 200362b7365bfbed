# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Print a config with all that it inherits."""

import argparse

import mlla_mm  # noqa: F401
from mlla_mm.engine.config import add_config_arguments, read_config
from mlla_mm.engine.launch import exit_on_user_error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with exit_on_user_error():
        cfg = read_config(args.config, args.cfg_options)
    print(cfg.pretty_text)


if __name__ == '__main__':
    main()
