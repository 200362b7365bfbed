# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Make the embedded digits data in COCO, ADE20K or ImageNet layout."""

import argparse
from typing import Optional, Sequence


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Compose real handwritten digits on photographs, without a '
        'download, in the layout of COCO, ADE20K or ImageNet.'
    )
    parser.add_argument('out', help='folder to make, or to keep if it is made already')
    parser.add_argument(
        '--format',
        choices=('coco', 'ade20k', 'imagenet'),
        default='coco',
        help='layout (default: coco)',
    )
    parser.add_argument('--seed', type=int, help='default: 0')
    parser.add_argument('--train', type=int, help='training images (default: 1000)')
    parser.add_argument('--val', type=int, help='validation images (default: 200)')
    parser.add_argument(
        '--size',
        type=int,
        help='height and width in pixels (default: 128, for imagenet 64)',
    )
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    from mlla_mm.datasets.digits import make_ade20k, make_coco, make_imagenet

    makers = dict(coco=make_coco, ade20k=make_ade20k, imagenet=make_imagenet)
    given = {
        name: getattr(args, name)
        for name in ('seed', 'train', 'val', 'size')
        if getattr(args, name) is not None
    }
    try:
        out = makers[args.format](args.out, **given)
    except (ValueError, FileExistsError, ImportError) as error:
        parser.error(str(error))
    print(f'\nDigits in {args.format} layout: {out}')


if __name__ == '__main__':
    main()
