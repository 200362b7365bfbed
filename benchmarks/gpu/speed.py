# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Races of models on a GPU, the most telling first, in one process.

    python benchmarks/gpu/speed.py --out DIR [--seconds N] [--first RACE] [--dry]
    python benchmarks/gpu/speed.py --warm t bfloat16
    python benchmarks/gpu/speed.py --draw DIR/speed.json PICTURE

The second command compiles the kernels of a size in a precision. Several processes can
do that side by side before anything is timed. The third command draws the first race.
"""

import argparse
import json
import math
import sys
from itertools import product
from pathlib import Path
from typing import List, Optional, Sequence

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.cases import MODES, Case, make_cases  # noqa: E402
from benchmarks.forced_mlla import FusedMLLA  # noqa: E402
from benchmarks.meter import Meter, format_settings  # noqa: E402
from benchmarks.plots import plot_benchmark  # noqa: E402
from benchmarks.races import CUDA_GRAPH, Race, make_call, run_races  # noqa: E402
from benchmarks.results import (  # noqa: E402
    Results,
    format_case,
    read_results,
    results_record,
)
from mlla_mm.models import MLLA  # noqa: E402
from mlla_mm.ops import triton  # noqa: E402

HALF, GRAPH = ('bfloat16',), (CUDA_GRAPH,)
OURS, OTHERS = ('mlla', 'plain'), ('mlla', 'plain', 'convnext')
# With the kernels that are no default.
ALL = ('mlla', 'fused', 'plain')
IMAGENET, COCO = ('classification', 128), ('detection', 2)
# Families, size, shape, batch size, dtypes, variants.
RACES = (
    (('mlla', 'fused', 'eager', 'plain'), 't', *IMAGENET, HALF, GRAPH),
    (ALL, 't', *COCO, HALF, GRAPH),
    (ALL, 's', *IMAGENET, HALF, GRAPH),
    (ALL, 'b', *IMAGENET, HALF, GRAPH),
    (OTHERS, 't', *IMAGENET, HALF, GRAPH),
    # Swin may fail to be captured, so it has a race of its own.
    (('plain', 'swin'), 't', *IMAGENET, HALF, GRAPH),
    (OURS, 't', *IMAGENET, ('float32', 'float16'), GRAPH),
    (OURS, 't', 'classification', 64, HALF, GRAPH),
    ((*OTHERS, 'swin'), 't', *COCO, HALF, ()),
    (OURS, 't', *COCO, ('float32',), GRAPH),
    ((*OTHERS, 'swin'), 's', *IMAGENET, HALF, ()),
    ((*OTHERS, 'swin'), 'b', *IMAGENET, HALF, ()),
    (OURS, 's', *COCO, HALF, GRAPH),
    (OURS, 'b', *COCO, HALF, GRAPH),
)


def make_races(first: int, dry: bool, device: torch.device) -> List[Race]:
    """The races of :data:`RACES` from a number on; dry: on tiny images, no graphs."""
    races = []
    for families, size, shape, batch_size, dtypes, variants in RACES[first:]:
        if dry:
            shape, batch_size, variants = '64x64', 2, ()
        # They need a GPU that runs Triton's kernels.
        left_out = () if triton.is_available(device) else ('fused',)
        models = [f'{f}-{size}' for f in families if f not in left_out]
        cases = make_cases([shape], [batch_size], MODES, dtypes)
        races.append(Race(models, cases, variants))
    return races


def warm(size: str, dtype: str, meter: Meter) -> None:
    """Run each stage of a size once, in evaluation and in training."""
    arch = dict(MLLA.arch_zoo[size], depths=(1, 1, 1, 1))
    images = torch.randn(2, 3, 64, 64, device=meter.device)
    kinds = (MLLA, FusedMLLA) if triton.is_available(meter.device) else (MLLA,)
    for kind, mode in product(kinds, MODES):
        model = kind(arch).to(meter.device).train(mode == 'train')
        make_call(model, images, Case('backbone', (64, 64), 2, mode, dtype))()


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--warm', nargs=2, metavar=('SIZE', 'DTYPE'))
    parser.add_argument('--draw', nargs=2, metavar=('RESULTS', 'PICTURE'))
    parser.add_argument(
        '--first', type=int, default=0, help='number of the race to begin with'
    )
    parser.add_argument('--dry', action='store_true', help='tiny images, no graphs')
    parser.add_argument('--seconds', type=float, default=math.inf)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--device', help='default: cuda if there is one, else cpu')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/gpu_speed'))
    args = parser.parse_args(argv)
    if args.draw:
        record = json.loads(Path(args.draw[0]).read_text())[0]
        plot_benchmark(read_results(record), format_settings(record), args.draw[1])
        return
    meter = Meter(args.device, 1 if args.dry else args.repeats)
    if args.warm:
        size, dtype = args.warm
        warm(size, dtype, meter)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    settings = meter.describe()
    title = f'# {format_settings(settings)}'
    print(title, flush=True)

    def save(results: List[Results]) -> None:
        records = [results_record(found, settings) for found in results if found]
        texts = [format_case(*item) for found in results for item in found.items()]
        (args.out / 'speed.json').write_text(json.dumps(records, indent=1) + '\n')
        (args.out / 'speed.md').write_text('\n\n'.join([title, *texts]) + '\n')

    races = make_races(args.first, args.dry, meter.device)
    passed = run_races(races, meter, save, args.seconds, keep_going=True)
    sys.exit(not passed)


if __name__ == '__main__':
    main()
