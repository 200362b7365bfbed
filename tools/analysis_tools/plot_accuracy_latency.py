# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Plot published accuracy over the latency on this device, MLLA among other models."""

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--models',
        nargs='+',
        metavar='NAME',
        help="names from configs/classification/metafile.yml and mmpretrain's model "
        'zoo; default: MLLA, Swin, ConvNeXt, MViTv2 and DaViT',
    )
    parser.add_argument('--device', help='default: cuda if there is one, else cpu')
    parser.add_argument(
        '--batch-size', type=int, help='default: 64 where there is a GPU, else 1'
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=(224, 224),
        metavar=('HEIGHT', 'WIDTH'),
        help='default: 224 224, for which the accuracies are published',
    )
    parser.add_argument(
        '--repeats', type=int, default=20, help='samples of each model (default: 20)'
    )
    parser.add_argument(
        '--out',
        metavar='DIR',
        default='work_dirs/accuracy_latency',
        help='folder for the picture and its table (default: %(default)s)',
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    # benchmarks/ lies beside tools/, outside the package.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import torch

    import mlla_mm
    from benchmarks.accuracy_latency import (
        DEFAULT_MODELS,
        PICTURE_NAME,
        TABLE_NAME,
        describe_device,
        find_candidate,
        format_measured,
        measure_candidates,
        save_measured,
    )
    from benchmarks.tradeoff import plot_accuracy_latency
    from mlla_mm.engine.console import quiet
    from mlla_mm.engine.launch import exit_on_user_error

    quiet()
    has_gpu = torch.cuda.is_available()
    device = args.device or ('cuda' if has_gpu else 'cpu')
    batch_size = args.batch_size
    if batch_size is None:
        batch_size = 64 if has_gpu else 1
    with exit_on_user_error():
        candidates = [find_candidate(name) for name in args.models or DEFAULT_MODELS]
        measured = measure_candidates(
            candidates, device, batch_size, args.shape, args.repeats
        )
    settings = dict(
        device=describe_device(device),
        dtype='float32',
        batch_size=batch_size,
        shape=args.shape,
        samples=args.repeats,
        torch=torch.__version__,
        mlla_mm=mlla_mm.__version__,
    )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_measured(measured, settings, out / TABLE_NAME)
    height, width = args.shape
    title = f'{settings["device"]}, float32, batch {batch_size}, {height}x{width}'
    plot_accuracy_latency(measured, title, out / PICTURE_NAME)
    print(f'{title}\n\n{format_measured(measured)}\n\nSaved in {out}')


if __name__ == '__main__':
    main()
