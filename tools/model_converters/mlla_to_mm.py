# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Turn a checkpoint of the authors or a training into one to publish: weights alone."""

import argparse

from mlla_mm.engine import config as options
from mlla_mm.engine import launch
from mlla_mm.engine.publish import publish


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='checkpoint file')
    parser.add_argument('destination', help='new file; its checksum is added: X-ID.pth')
    parser.add_argument(
        '--ema', action='store_true', help='the averaged weights, not the plain ones'
    )
    options.add_trust_argument(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with launch.exit_on_user_error():
        path = publish(
            args.source, args.destination, args.ema, trust=args.trust_checkpoint
        )
    print(path)


if __name__ == '__main__':
    main()
