# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Export a backbone or a classifier to a file for any batch and image size.

The input of the file is normalised RGB images (N, C, H, W). Its outputs are compared
with those of the model, at other sizes than the one that it was traced with.
"""

import argparse
from pathlib import Path
from typing import Optional, Sequence

from arguments import add_ema_argument, add_fuse_argument, add_trust_argument


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--format', choices=('torchscript', 'onnx', 'torch-export'), required=True
    )
    parser.add_argument(
        '--part',
        choices=('backbone', 'classifier'),
        help='what to export (for a classification config classifier, else backbone)',
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=(224, 224),
        metavar=('H', 'W'),
        help='image size to trace with (224 224); the file takes other sizes, too',
    )
    parser.add_argument(
        '--out', metavar='FILE', help='file to write (CHECKPOINT_PART and a suffix)'
    )
    parser.add_argument(
        '--device',
        default='cpu',
        help='where torchscript and torch-export files will run (%(default)s)',
    )
    add_ema_argument(parser)
    add_fuse_argument(parser)
    add_trust_argument(parser)
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    from mlla_mm.apis import load_model
    from mlla_mm.apis.export import FORMATS, export_model, select_part
    from mlla_mm.engine import launch
    from mlla_mm.engine.config_files import read_config
    from mlla_mm.engine.console import quiet

    quiet()
    with launch.exit_on_user_error():
        cfg = read_config(args.config)
        model = load_model(
            cfg,
            args.checkpoint,
            args.device,
            args.ema,
            args.trust_checkpoint,
            args.fuse_conv_bn,
        )
        is_classifier = cfg.get('default_scope') == 'mmpretrain'
        part = args.part or ('classifier' if is_classifier else 'backbone')
        checkpoint = Path(args.checkpoint)
        out = args.out or checkpoint.with_name(
            f'{checkpoint.stem}_{part}{FORMATS[args.format]}'
        )
        error = export_model(
            select_part(model, part), args.format, out, tuple(args.shape)
        )
    print(f'{out}: {part}, differs from eager execution by at most {error:.1e}')


if __name__ == '__main__':
    main()
