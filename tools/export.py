# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Export a whole model, or a part of it, to a file for any image size.

A whole model takes images (N, C, H, W) as they are in files, in the channel order that
the file's metadata names; it normalises and pads them itself. Its outputs:

  detection       boxes, scores, labels, masks: NMS and thresholds are inside; one image
  segmentation    labels (N, H, W), and on request logits
  classification  scores (N, classes)

Resizing stays outside; the metadata describe it. The parts 'backbone' and 'classifier'
take normalised images, to feature maps and to logits. The file is compared with the
model at other sizes than the one that it was traced with.
"""

import argparse
from typing import Optional, Sequence

from arguments import (
    add_config_arguments,
    add_ema_argument,
    add_fuse_argument,
    add_trust_argument,
)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--format', choices=('torchscript', 'onnx', 'torch-export'), required=True
    )
    parser.add_argument(
        '--part',
        choices=('model', 'backbone', 'classifier'),
        help='what to export (model)',
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
        '--logits', action='store_true', help="a segmentor's logits besides its labels"
    )
    parser.add_argument(
        '--no-normalize',
        action='store_true',
        help='the images of a whole model are normalised before',
    )
    parser.add_argument(
        '--opset', type=int, default=17, help='of an onnx file (%(default)s)'
    )
    parser.add_argument(
        '--int8',
        action='store_true',
        help='onnx: linear layers in int8, quantised as the file runs',
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
    from mlla_mm.apis.export import export
    from mlla_mm.engine import launch
    from mlla_mm.engine.console import quiet
    from mlla_mm.engine.toolboxes import load_own_toolbox_alone

    quiet()
    with launch.exit_on_user_error():
        load_own_toolbox_alone(args.config)
        print('\n'.join(export(args)))


if __name__ == '__main__':
    main()
