# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""How fast a data set makes samples, and which of its steps take the time."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, DefaultDict, List, NamedTuple, Tuple

import cv2
import torch

from ..utils.images import RegularFilesBackend

READING = 'reading files'
"""The step of :func:`timed_steps` that is a part of others: the bytes of local files,
without decoding them."""


class Timing(NamedTuple):
    """Samples that were made, and the seconds that they took."""

    samples: int
    seconds: float

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / max(self.seconds, 1e-9)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch and OpenCV use one thread, as in the workers of data loaders."""
    threads, opencv_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(opencv_threads)


def time_samples(
    dataset: Any, indices: Iterable[int], limit: float = float('inf')
) -> Timing:
    """Make samples in this process, with one thread, as one worker does.

    Args:
        dataset (Dataset): The data set.
        indices (Iterable[int]): The samples. One sample is made in any case.
        limit (float): Seconds after which no further sample is begun. Defaults to
            infinity.
    """
    samples = 0
    with one_thread():
        begin = time.perf_counter()
        for index in indices:
            dataset[index]
            samples += 1
            if time.perf_counter() - begin > limit:
                break
        return Timing(samples, time.perf_counter() - begin)


def spread_indices(length: int, count: int) -> Sequence[int]:
    """At most so many indices of a data set, at equal distances."""
    return range(0, length, max(1, -(-length // count)))


@contextmanager
def timed_steps(dataset: Any) -> Iterator[DefaultDict[str, float]]:
    """Add up the seconds of each step of a data set's pipelines.

    A step that contains others (``RandomChoice``, ``RandAugment``) counts as a whole.

    Args:
        dataset (Dataset): The data set, or a wrapper such as ``RepeatDataset``. Its
            steps are wrapped until the end of the context.

    Yields:
        defaultdict[str, float]: Seconds by step: its number in the pipeline and its
        class, in the order of the pipeline, and :data:`READING`.
    """
    seconds: DefaultDict[str, float] = defaultdict(float)
    read = RegularFilesBackend.get

    def timed_read(self: Any, filepath: Any) -> bytes:
        begin = time.perf_counter()
        content = read(self, filepath)
        seconds[READING] += time.perf_counter() - begin
        return content

    found = {id(steps): steps for steps in _pipelines(dataset)}
    pipelines = [(steps, list(steps)) for steps in found.values()]
    try:
        for steps, plain in pipelines:
            names = (f'{i + 1} {type(step).__name__}' for i, step in enumerate(plain))
            steps[:] = [_Timed(x, name, seconds) for x, name in zip(plain, names)]
        RegularFilesBackend.get = timed_read  # type: ignore[method-assign]
        yield seconds
    finally:
        RegularFilesBackend.get = read  # type: ignore[method-assign]
        for steps, plain in pipelines:
            steps[:] = plain


class _Timed:
    """A step of a pipeline whose calls are timed."""

    def __init__(self, step: Any, name: str, seconds: DefaultDict[str, float]) -> None:
        self._step, self._name, self._seconds = step, name, seconds

    def __call__(self, results: Any) -> Any:
        begin = time.perf_counter()
        results = self._step(results)
        self._seconds[self._name] += time.perf_counter() - begin
        return results

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


def _pipelines(dataset: Any) -> Iterator[List[Any]]:
    """The lists of steps of a data set, and of the data sets below it."""
    own = getattr(dataset, '__dict__', {})
    pipeline = own.get('pipeline')
    # mmdet's MultiImageMixDataset has a list, all others MMEngine's Compose.
    steps = getattr(pipeline, 'transforms', pipeline)
    parts: Tuple[Any, ...] = tuple(own.get('datasets') or ())
    for part in (*parts, own.get('dataset')):
        if part is not None:
            yield from _pipelines(part)
    if isinstance(steps, list):
        yield steps
