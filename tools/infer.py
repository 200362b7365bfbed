# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Detect, segment or classify in pictures and videos. Draw and write the results.

The exit status is 1 if a file could not be read, predicted or drawn, or if there is
none. The other files are processed all the same.
"""

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

from arguments import add_ema_argument, add_fuse_argument, add_trust_argument


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('inputs', help='picture, video, or folder with them')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        metavar='DIR',
        help='folder for the results (work_dirs/CONFIG_NAME/infer)',
    )
    parser.add_argument('--device', help='such as cuda:1 (a GPU if there is one)')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='only detections with a higher score are kept (%(default)s)',
    )
    parser.add_argument(
        '--batch-size',
        type=int,
        default=1,
        help='most pictures of one size to predict together (%(default)s)',
    )
    add_ema_argument(parser)
    add_fuse_argument(parser)
    parser.add_argument(
        '--cuda-graph',
        action='store_true',
        help='replay the backbone as a CUDA graph, for pictures of few sizes',
    )
    add_trust_argument(parser)
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    from mlla_mm.apis import Inferencer
    from mlla_mm.apis.output import summary
    from mlla_mm.engine import launch
    from mlla_mm.engine.console import quiet
    from mlla_mm.engine.toolboxes import load_own_toolbox_alone

    quiet()
    out_dir = args.out or Path('work_dirs') / Path(args.config).stem / 'infer'
    with launch.exit_on_user_error():
        load_own_toolbox_alone(args.config)
        inferencer = Inferencer(
            args.config,
            args.checkpoint,
            device=args.device,
            ema=args.ema,
            trust_checkpoint=args.trust_checkpoint,
            fuse_conv_bn=args.fuse_conv_bn,
            cuda_graph=args.cuda_graph,
        )
        results = inferencer(
            args.inputs, out_dir, args.batch_size, score_thr=args.score_thr
        )
    print('\n'.join(summary(results, out_dir)))
    if not results or any('error' in result for result in results):
        sys.exit(1)


if __name__ == '__main__':
    main()
