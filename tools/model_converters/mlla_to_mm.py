# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Turn a checkpoint of the authors or of a training into one to publish."""

import argparse
from typing import Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='checkpoint file')
    parser.add_argument(
        'destination', help='new file X.pth; its checksum is added: X-ID.pth'
    )
    parser.add_argument(
        '--ema', action='store_true', default=None, help='take the averaged weights'
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load checkpoints that may run code; only if you trust their source',
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    from mlla_mm.checkpoints.publish import publish
    from mlla_mm.engine import launch

    with launch.exit_on_user_error():
        path = publish(
            args.source, args.destination, args.ema, trust=args.trust_checkpoint
        )
    print(path)


if __name__ == '__main__':
    main()
