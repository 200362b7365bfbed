# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The measuring of calls on a device: time, peak memory, settings."""

import math
import os
import platform
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Hashable,
    List,
    NamedTuple,
    Optional,
    Tuple,
    TypeVar,
    Union,
)

import mmengine
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

import mlla_mm
from mlla_mm.compat.pytorch import convolutions_use_tf32, products_use_tf32
from mlla_mm.engine.cuda_graph import CudaGraph

Call = Callable[[], object]
_Key = TypeVar('_Key', bound=Hashable)

# A shorter sample depends too much on the clock and on kernel launches.
_SAMPLE_SECONDS = 0.1
# From this spread on, PyTorch's own benchmarks warn.
_STEADY = 0.1


class Spread(NamedTuple):
    """The median of samples, and the bounds of the middle half of the samples."""

    low: float
    median: float
    high: float

    @property
    def is_steady(self) -> bool:
        """Whether the middle half is narrow enough to rely on the median."""
        return self.high - self.low <= _STEADY * self.median


def spread(samples: Sequence[float]) -> Spread:
    """Quartiles of samples."""
    values = torch.tensor(samples, dtype=torch.float64)
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return Spread(*values.quantile(quartiles).tolist())


def times_as_fast(times: Sequence[float], reference: Sequence[float]) -> Spread:
    """How many times as fast as something else something is.

    Samples of the same round are compared. A machine that slows down for a while does
    so for both.

    Args:
        times (Sequence[float]): Its times, of each round.
        reference (Sequence[float]): Those of the other.
    """
    return spread([b / a for a, b in zip(times, reference)])


def time_cells(times: Spread) -> List[str]:
    """Cells of a table: milliseconds per image, their middle half, images per second.

    Args:
        times (Spread): Milliseconds per image.
    """
    low, median, high = times
    return [f'{median:.4g}', f'{low:.4g} to {high:.4g}', f'{1000 / median:.4g}']


def unsteady_note(spreads: Mapping[str, Spread]) -> str:
    """Name the measurements whose medians are not reliable, and say what helps.

    Args:
        spreads (Mapping[str, Spread]): Measurements by name.

    Returns:
        str: A paragraph to append to a table. Empty if all measurements are steady.
    """
    unsteady = [name for name, found in spreads.items() if not found.is_steady]
    if not unsteady:
        return ''
    return (
        f'\n\nUnsteady, the middle half wider than {_STEADY:.0%} of the median: '
        f'{", ".join(unsteady)}. Stop other programs on the device, or take more '
        '--repeats.'
    )


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Meter:
    """Measures calls on a device.

    Args:
        device (str, optional): The device, e.g. 'cuda'. Defaults to None: the GPU if
            there is one, else the CPU.
        repeats (int): How many samples of a time are taken. Defaults to 20.

    Attributes:
        device (torch.device): The device.
        is_cuda (bool): Whether the device is a CUDA device.
        repeats (int): How many samples of a time are taken.

    Raises:
        ValueError: If tensors cannot be put on the device, or ``repeats`` is less
            than 1.
    """

    def __init__(self, device: Optional[str] = None, repeats: int = 20) -> None:
        if repeats < 1:
            raise ValueError(f'--repeats must be at least 1, got {repeats}.')
        device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f'Device {device!r} cannot be used: {error}') from error
        self.device = torch.device(device)
        self.is_cuda = self.device.type == 'cuda'
        self.repeats = repeats

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def samples(self, calls: Mapping[_Key, Call]) -> Dict[_Key, List[float]]:
        """Time calls against one another.

        Every round times each call once, in a random order. What changes with time
        (clock rates, temperature, other processes) then affects all calls alike. A
        sample is the mean of as many calls as take a tenth of a second, after two or
        more calls to warm up. The timer waits for the current CUDA device.

        Args:
            calls (Mapping[Hashable, Callable]): What to time, by name.

        Returns:
            dict[Hashable, list[float]]: Seconds per call, a sample for each of
            ``repeats`` rounds.
        """
        threads = torch.get_num_threads()
        timers = {}
        numbers = {}
        for name, call in calls.items():
            timers[name] = Timer('call()', globals=dict(call=call), num_threads=threads)
            # The first call is not timed: it compiles, picks convolution algorithms
            # and allocates.
            call()
            seconds = timers[name].timeit(1).median
            numbers[name] = max(1, math.ceil(_SAMPLE_SECONDS / seconds))
        samples: Dict[_Key, List[float]] = {name: [] for name in calls}
        order = list(calls)
        generator = random.Random(0)
        for _ in range(self.repeats):
            generator.shuffle(order)
            for name in order:
                samples[name].append(timers[name].timeit(numbers[name]).median)
        return samples

    def milliseconds(self, call: Call) -> Tuple[float, float]:
        """Median times of a call on the device, and on the host until it returns."""
        times = []
        for _ in range(self.repeats):
            self.synchronize()
            begin = time.perf_counter()
            if self.is_cuda:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
            call()
            if self.is_cuda:
                last.record()
            on_device = on_host = (time.perf_counter() - begin) * 1000
            if self.is_cuda:
                last.synchronize()
                on_device = first.elapsed_time(last)
            times.append((on_device, on_host))
        device_times, host_times = zip(*times)
        return statistics.median(device_times), statistics.median(host_times)

    def graph_microseconds(self, call: Call, calls: int = 10) -> float:
        """Median time of a call in a CUDA graph of several; on a CPU, of one call."""
        if not self.is_cuda:
            return self.milliseconds(call)[0] * 1000

        def several() -> None:  # keeps no outputs, whose memory the next call takes
            for _ in range(calls):
                call()

        graph = CudaGraph(several)
        graph()
        return self.milliseconds(graph)[0] * 1000 / calls

    def copy_rate(self) -> float:
        """Bytes per second that a copy reads and writes."""
        size = 2**30 if self.is_cuda else 2**20
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        for _ in range(3):
            target.copy_(source)
        time_of_copy, _ = self.milliseconds(lambda: target.copy_(source))
        return 2 * size / (time_of_copy / 1000)

    def peak_bytes(self, call: Call, resident: int = 0) -> int:
        """Peak memory of tensors during a call, in bytes.

        The CUDA allocator keeps the maximum itself. On a CPU the allocations that
        PyTorch's profiler records are added up.

        Args:
            call (Callable): What is measured.
            resident (int): Bytes of the tensors that existed before. Only a CPU needs
                them: its record begins with the call. Defaults to 0.
        """
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            call()
            return torch.cuda.max_memory_allocated(self.device)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            call()
        events: List[Any] = record.profiler.kineto_results.events()  # type: ignore[union-attr]  # set in the context
        current = peak = 0
        for event in sorted(events, key=_start):
            if event.name() == '[memory]':
                current += event.nbytes()
                peak = max(peak, current)
        return resident + peak

    def device_name(self) -> str:
        """Name of the device for a title, for a CPU with the number of threads."""
        if self.is_cuda:
            return torch.cuda.get_device_name(self.device)
        # Linux alone tells the model of the CPU.
        model = _search('/proc/cpuinfo', r'^model name\s*: (.+)$')
        model = model or f'{platform.machine()} CPU'
        return f'{model}, threads: {torch.get_num_threads()}'

    def describe(self) -> Dict[str, object]:
        """What the numbers depend on. None: the machine does not have it."""
        driver = r'^NVRM.*?\s(\d+(?:\.\d+)+)\s'
        try:  # importing Triton would take a second
            triton: Optional[str] = metadata.version('triton')
        except metadata.PackageNotFoundError:
            triton = None
        return dict(
            device=self.device_name(),
            threads=torch.get_num_threads(),
            repeats=self.repeats,
            python=platform.python_version(),
            torch=torch.__version__,
            cuda=torch.version.cuda if self.is_cuda else None,
            cudnn=torch.backends.cudnn.version() if self.is_cuda else None,
            driver=_search('/proc/driver/nvidia/version', driver)
            if self.is_cuda
            else None,
            triton=triton,
            tf32_products=products_use_tf32() if self.is_cuda else None,
            tf32_convolutions=convolutions_use_tf32() if self.is_cuda else None,
            mlla_ops=os.environ.get('MLLA_OPS') or 'default',
            mmengine=mmengine.__version__,
            mlla_mm=mlla_mm.__version__,
            command=shlex.join(sys.argv),
        )


def _start(event: Any) -> Union[int, float]:
    # PyTorch before 2.3 counts in microseconds.
    return event.start_ns() if hasattr(event, 'start_ns') else event.start_us()


def _search(path: str, pattern: str) -> Optional[str]:
    """The first group of a pattern in a file; None if the file or it is not there."""
    file = Path(path)
    found = re.search(pattern, file.read_text(), re.M) if file.is_file() else None
    return found[1] if found else None


def format_settings(settings: Mapping[str, Any]) -> str:
    """The device, the versions and what was done to the models, in one line.

    Args:
        settings (Mapping): From :meth:`Meter.describe`, with ``fuse_conv_bn`` if
            BatchNorm was folded into the convolutions.
    """
    names = dict(
        torch='torch',
        cuda='CUDA',
        cudnn='cuDNN',
        driver='driver',
        triton='Triton',
        python='Python',
    )
    versions = [
        f'{name} {settings[key]}' for key, name in names.items() if settings[key]
    ]
    done = ['BatchNorm in the convolutions'] if settings.get('fuse_conv_bn') else []
    return ', '.join([settings['device'], *versions, *done])
