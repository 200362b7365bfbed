# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""How long calls take, measured so that they can be compared."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Callable, Dict, NamedTuple

import torch
from torch.utils.benchmark import Measurement, Timer

# A sample shorter than this is at the mercy of the clock and of kernel launches.
_SAMPLE_SECONDS = 0.1
# PyTorch's own benchmarks warn from here on.
_STEADY = 0.1


class Spread(NamedTuple):
    """The median of samples, between what bounds the middle half of them."""

    low: float
    median: float
    high: float

    @property
    def is_steady(self) -> bool:
        """Whether the middle half is narrow enough for the median to be relied on."""
        return self.high - self.low <= _STEADY * self.median


def spread(samples: Sequence[float]) -> Spread:
    """Quartiles of samples."""
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    samples = torch.tensor(samples, dtype=torch.float64)
    return Spread(*samples.quantile(quartiles).tolist())


def unsteady_note(spreads: Mapping[str, Spread]) -> str:
    """Name the measurements that are not to be relied on, and tell what helps.

    Args:
        spreads (Mapping[str, Spread]): Measurements by name.

    Returns:
        str: Two line ends and a sentence, to be appended to a table, or nothing.
    """
    unsteady = [name for name, found in spreads.items() if not found.is_steady]
    if not unsteady:
        return ''
    return (
        f'\n\nUnsteady, the middle half wider than {_STEADY:.0%} of the median: '
        f'{", ".join(unsteady)}. Stop other programs on the device, or take more '
        '--repeats.'
    )


def measure_latency(
    calls: Mapping[str, Callable[[], object]], repeats: int = 20
) -> Dict[str, Measurement]:
    """Time calls against one another.

    Every round times each call once, in a random order, so that what changes with time
    (clock rates, temperature, other processes) hits all of them alike. A sample is the
    mean over as many calls as take a tenth of a second, after two or more calls to warm
    up; CUDA is waited for.

    Args:
        calls (Mapping[str, Callable]): What to time, by name.
        repeats (int): Number of rounds. Defaults to 20.

    Returns:
        dict[str, Measurement]: PyTorch's measurements, with a sample per round:
        ``times`` in seconds per call, ``median``, and ``iqr``, the range of the middle
        half.

    Raises:
        ValueError: If there are no rounds.
    """
    if repeats < 1:
        raise ValueError(f'repeats must be at least 1, got {repeats}.')
    timers = {
        name: Timer(
            'call()',
            globals=dict(call=call),
            description=name,
            num_threads=torch.get_num_threads(),
        )
        for name, call in calls.items()
    }
    # The first call compiles, picks convolution algorithms and allocates: not timed,
    # like those that the timer makes before each sample.
    numbers = {}
    for name, timer in timers.items():
        calls[name]()
        seconds = timer.timeit(1).median
        numbers[name] = max(1, math.ceil(_SAMPLE_SECONDS / seconds))
    samples = {name: [] for name in calls}
    order = list(calls)
    generator = random.Random(0)
    for _ in range(repeats):
        generator.shuffle(order)
        for name in order:
            samples[name].append(timers[name].timeit(numbers[name]))
    return {name: _merge(samples[name]) for name in calls}


def _merge(samples: list) -> Measurement:
    (merged,) = Measurement.merge(samples)
    return merged
