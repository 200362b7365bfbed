# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Race models against the plain assembly of MLLA: time, peak memory, a picture."""

import argparse
import time
from pathlib import Path
from typing import Dict, List

import torch
from mmengine.logging import MMLogger

import mlla_mm  # noqa: F401
from mlla_mm.engine.launch import exit_on_user_error
from mlla_mm.evaluation import benchmark
from mlla_mm.visualization.benchmark import plot_benchmark, plot_sweep

_PRESETS = ', '.join(f'{name} ({h}x{w})' for name, (h, w) in benchmark.PRESETS.items())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--models',
        nargs='+',
        metavar='NAME',
        default=benchmark.DEFAULT_MODELS,
        help='{mlla,eager,plain,swin,convnext}-{t,s,b}, with the plain one of each '
        f'size (default: {" ".join(benchmark.DEFAULT_MODELS)})',
    )
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        '--shape',
        nargs='+',
        default=['classification'],
        help=f'{_PRESETS}, or HEIGHTxWIDTH. A classifier for the first, else the '
        'backbone (default: classification)',
    )
    images.add_argument(
        '--sweep',
        nargs='*',
        type=int,
        metavar='SIDE',
        help='instead, in one mode and dtype: cost of the backbone on square images of '
        f'these sides (default: {" ".join(map(str, benchmark.SWEEP_SIDES))})',
    )
    parser.add_argument(
        '--batch-size',
        nargs='+',
        type=int,
        default=[1],
        help='images of a call, one number for all shapes or one for each (default: 1)',
    )
    parser.add_argument(
        '--mode',
        nargs='+',
        choices=benchmark.MODES,
        default=['infer'],
        help='train: forward and backward (default: infer)',
    )
    parser.add_argument(
        '--dtype',
        nargs='+',
        choices=benchmark.DTYPES,
        default=['float32'],
        help='float16 and bfloat16: by autocast (default: float32)',
    )
    parser.add_argument(
        '--compile',
        action='store_true',
        help='time each model a second time with its backbone compiled',
    )
    parser.add_argument(
        '--cuda-graph',
        action='store_true',
        help='time each model a second time as a CUDA graph that is replayed',
    )
    parser.add_argument(
        '--repeats', type=int, default=20, help='rounds of a case (default: 20)'
    )
    parser.add_argument(
        '--seconds',
        type=float,
        metavar='N',
        help='skip cases, but for the first, whose turn comes after N seconds '
        '(default: no limit)',
    )
    parser.add_argument('--threads', type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='default: cuda if there is one, else cpu',
    )
    parser.add_argument(
        '--out',
        metavar='DIR',
        default='work_dirs/benchmark',
        help=f'folder for {benchmark.TABLE_NAME}, {benchmark.SAMPLES_NAME} and '
        f'{benchmark.PICTURE_NAME} (default: %(default)s)',
    )
    return parser.parse_args()


def set_threads(threads: int) -> None:
    if threads < 1:
        raise ValueError(f'--threads must be at least 1, got {threads}.')
    torch.set_num_threads(threads)


def make_cases(args: argparse.Namespace) -> List[benchmark.Case]:
    if args.sweep is None:
        return benchmark.make_cases(args.shape, args.batch_size, args.mode, args.dtype)
    if max(map(len, (args.batch_size, args.mode, args.dtype))) > 1:
        raise ValueError('--sweep takes one --batch-size, one --mode and one --dtype.')
    return benchmark.make_sweep(
        args.sweep or benchmark.SWEEP_SIDES,
        args.batch_size[0],
        args.mode[0],
        args.dtype[0],
    )


def find_variants(args: argparse.Namespace) -> List[str]:
    wanted = zip(benchmark.VARIANTS, (args.compile, args.cuda_graph))
    return [variant for variant, is_wanted in wanted if is_wanted]


def race(
    cases: List[benchmark.Case],
    args: argparse.Namespace,
    settings: Dict[str, object],
    out: Path,
) -> Dict[benchmark.Case, List[benchmark.Measured]]:
    """Measure case by case; what is measured is printed and saved at once."""
    variants = find_variants(args)
    results = {}
    start = time.monotonic()
    for case in cases:
        # One case at least: there is something to show.
        if args.seconds and results and time.monotonic() - start > args.seconds:
            print(f'\nSkipped after {args.seconds:g} s: {case}', flush=True)
            continue
        results[case] = benchmark.measure_case(
            case, args.models, args.device, args.repeats, variants
        )
        print(f'\n{benchmark.format_case(case, results[case])}', flush=True)
        benchmark.save_results(results, settings, out / benchmark.SAMPLES_NAME)
    return results


def main() -> None:
    args = parse_args()
    # mmpretrain would tell how each of its classifiers augments images in training.
    MMLogger.get_instance('benchmark', log_level='ERROR')
    with exit_on_user_error():
        benchmark.check_models(args.models)
        benchmark.check_device(args.device)
        benchmark.check_variants(find_variants(args), args.device)
        if args.threads is not None:
            set_threads(args.threads)
        if args.seconds is not None and not args.seconds > 0:
            raise ValueError(f'--seconds must be positive, got {args.seconds:g}.')
        cases = make_cases(args)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        settings = benchmark.describe_run(args.device, args.repeats)
        title = benchmark.format_settings(settings)
        print(title, flush=True)
        results = race(cases, args, settings, out)
    texts = [benchmark.format_case(case, found) for case, found in results.items()]
    if args.sweep is None or len(results) < 2:  # one point has no slope
        plot_benchmark(results, title, out / benchmark.PICTURE_NAME)
    else:
        curves = benchmark.fit_curves(results)
        texts.append(benchmark.format_curves(curves))
        print(f'\n{texts[-1]}')
        case = cases[0]
        title += f', batch {case.batch_size}, {case.mode}, {case.dtype}'
        plot_sweep(curves, title, out / benchmark.PICTURE_NAME)
    (out / benchmark.TABLE_NAME).write_text('\n\n'.join([title, *texts]) + '\n')
    print(f'\nSaved in {out}')


if __name__ == '__main__':
    main()
