# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Races of models on a GPU, the most telling first, in one process.

    python benchmarks/gpu/speed.py --out DIR [--seconds N] [--first RACE] [--dry]
    python benchmarks/gpu/speed.py --warm t bfloat16
    python benchmarks/gpu/speed.py --draw DIR/speed.json PICTURE

The second command compiles the kernels of a size in a precision, so that several
processes can do that side by side before anything is timed. The third draws the first
race.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import List, NamedTuple, Sequence

import torch
from mmengine.logging import MMLogger

from benchmarks import races
from benchmarks.plots import plot_benchmark
from mlla_mm.models import MLLA


class Race(NamedTuple):
    """Models that are raced in some cases, see :mod:`benchmarks.races`."""

    families: Sequence[str]
    size: str
    shape: str
    batch_size: int
    dtypes: Sequence[str]
    variants: Sequence[str] = ()

    @property
    def models(self) -> List[str]:
        return [f'{family}-{self.size}' for family in self.families]

    @property
    def cases(self) -> List[races.Case]:
        return races.make_cases(
            [self.shape], [self.batch_size], races.MODES, self.dtypes
        )


_OURS, _OTHERS = ('mlla', 'plain'), ('mlla', 'plain', 'convnext')
_HALF, _GRAPH = ('bfloat16',), (races.CUDA_GRAPH,)
_IMAGENET, _COCO = ('classification', 128), ('detection', 2)
RACES = (
    Race(('mlla', 'eager', 'plain'), 't', *_IMAGENET, _HALF, _GRAPH),
    Race(_OURS, 't', *_COCO, _HALF, _GRAPH),
    Race(_OURS, 's', *_IMAGENET, _HALF, _GRAPH),
    Race(_OURS, 'b', *_IMAGENET, _HALF, _GRAPH),
    Race(_OTHERS, 't', *_IMAGENET, _HALF, _GRAPH),
    # By itself, in case that it cannot be captured.
    Race(('plain', 'swin'), 't', *_IMAGENET, _HALF, _GRAPH),
    Race(_OURS, 't', *_IMAGENET, ('float32', 'float16'), _GRAPH),
    Race(_OURS, 't', 'classification', 64, _HALF, _GRAPH),
    Race((*_OTHERS, 'swin'), 't', *_COCO, _HALF),
    Race(_OURS, 't', *_COCO, ('float32',), _GRAPH),
    Race((*_OTHERS, 'swin'), 's', *_IMAGENET, _HALF),
    Race((*_OTHERS, 'swin'), 'b', *_IMAGENET, _HALF),
    Race(_OURS, 's', *_COCO, _HALF, _GRAPH),
    Race(_OURS, 'b', *_COCO, _HALF, _GRAPH),
)


def run(
    races: Sequence[Race], device: str, repeats: int, seconds: float, out: Path
) -> bool:
    """Measure race by race; what is measured is printed and saved at once.

    Returns:
        bool: Whether nothing failed.
    """
    end = time.monotonic() + seconds
    settings = races.describe_run(device, repeats)
    texts = [f'# {races.format_settings(settings)}']
    print(texts[0], flush=True)
    runs, failed = [], False
    for race in races:
        results = {}
        for case in race.cases:
            name = f'{race.size}: {case}'
            if time.monotonic() > end:
                print(f'SKIP {name}: no time left', flush=True)
                continue
            try:
                results[case] = races.measure_case(
                    case, race.models, device, repeats, race.variants
                )
            except (RuntimeError, ValueError) as error:
                print(f'FAIL {name}: {error}', flush=True)
                failed = True
                continue
            texts.append(races.format_case(case, results[case]))
            print(f'\n{texts[-1]}', flush=True)
            (out / 'speed.md').write_text('\n\n'.join(texts) + '\n')
            races.save_results(results, settings, out / 'race.json')
            found = json.loads((out / 'race.json').read_text())
            (out / 'speed.json').write_text(json.dumps([*runs, found], indent=1) + '\n')
        if results:
            runs.append(found)
    (out / 'race.json').unlink(missing_ok=True)
    return not failed


def warm(size: str, dtype: str, device: str) -> None:
    """Run each stage of a size once, in evaluation and in training."""
    arch = MLLA.arch_zoo[size]
    model = MLLA(dict(arch, depths=(1, 1, 1, 1))).to(device)
    images = torch.randn(2, 3, 64, 64, device=device)
    half = dtype != 'float32'
    options = dict(dtype=getattr(torch, dtype) if half else None, enabled=half)
    with torch.autocast(torch.device(device).type, **options):
        with torch.no_grad():
            model.eval()(images)
        outputs = model.train()(images)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def draw(results: str, picture: str) -> None:
    """Draw the first race of a file that :func:`run` wrote."""
    (race, *_) = json.loads(Path(results).read_text())
    cases = {}
    for found in race['cases']:
        values = {name: found[name] for name in races.Case._fields}
        case = races.Case(**dict(values, shape=tuple(values['shape'])))
        cases[case] = [
            races.Measured(*(model[name] for name in races.Measured._fields))
            for model in found['models']
        ]
    plot_benchmark(cases, races.format_settings(race), picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--warm', nargs=2, metavar=('SIZE', 'DTYPE'))
    parser.add_argument('--draw', nargs=2, metavar=('RESULTS', 'PICTURE'))
    parser.add_argument(
        '--first', type=int, default=0, help='number of the race to begin with'
    )
    parser.add_argument('--dry', action='store_true', help='tiny images, no graphs')
    parser.add_argument('--seconds', type=float, default=float('inf'))
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu'
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/gpu_speed'))
    args = parser.parse_args()
    if args.warm:
        warm(*args.warm, args.device)
        return
    if args.draw:
        draw(*args.draw)
        return
    # mmpretrain would tell how each of its classifiers augments images in training.
    MMLogger.get_instance('benchmark', log_level='ERROR')
    args.out.mkdir(parents=True, exist_ok=True)
    races, repeats = RACES[args.first :], args.repeats
    if args.dry:
        tiny = dict(shape='64x64', batch_size=2, variants=())
        races, repeats = [race._replace(**tiny) for race in races], 1
    sys.exit(not run(races, args.device, repeats, args.seconds, args.out))


if __name__ == '__main__':
    main()
