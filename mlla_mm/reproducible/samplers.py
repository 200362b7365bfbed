# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The recipe's batches, on as many processes as it has or on fewer."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, Callable, List, Optional, Sequence

from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.registry import DATA_SAMPLERS, FUNCTIONS
from torch.utils.data import BatchSampler, Sampler

from ..compat.openmmlab import acting_as
from .seeding import SAMPLE, Draw


class _ProcessSampler(Sampler):
    """What one of the recipe's processes sees, each image with its place in the order.

    Args:
        sampler (Sampler): The recipe's sampler, as it is on that process.
        dataset (Sized): The data set.
        seed (int): Seed of the augmentations.
        process (int): Number of the process.
        processes (int): Number of processes.
    """

    def __init__(
        self, sampler: Sampler, dataset, seed: int, process: int, processes: int
    ) -> None:
        self.dataset = dataset  # where batch samplers look for it
        self.epoch = 0
        self._sampler = sampler
        self._seed = seed
        self._process = process
        self._processes = processes

    def __iter__(self) -> Iterator[Draw]:
        for i, index in enumerate(self._sampler):
            place = i * self._processes + self._process
            yield Draw(index, (SAMPLE, self._seed, self.epoch, place))

    def __len__(self) -> int:
        return len(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self._sampler, 'set_epoch'):
            self._sampler.set_epoch(epoch)


@DATA_SAMPLERS.register_module()
class SharedSampler(Sampler):
    """Several of the recipe's processes in one: a sampler for each of them.

    On W processes with M micro-batches the recipe's W x M processes are played by
    M samplers in each process, so the images that make up an update, and the padding
    of an epoch, are those of W x M processes. So are the augmentations.

    Args:
        dataset (Sized): The data set.
        sampler (dict): Config of the recipe's sampler.
        micro_batches (int): Number of the recipe's processes that this one stands for.
        seed (int, optional): Seed of all samplers on all processes. Defaults to None:
            drawn at random.
    """

    def __init__(
        self,
        dataset,
        sampler: dict,
        micro_batches: int,
        seed: Optional[int] = None,
    ) -> None:
        self.dataset = dataset
        self.seed = sync_random_seed() if seed is None else seed
        self._sampler = sampler
        self._micro_batches = micro_batches
        self.restart()

    def restart(self) -> None:
        """Go back to the first image of the first pass."""
        first = get_dist_info()[0] * self._micro_batches
        self.samplers = [self._build(first + i) for i in range(self._micro_batches)]

    def _build(self, process: int) -> _ProcessSampler:
        processes = get_dist_info()[1] * self._micro_batches
        options = dict(dataset=self.dataset, seed=self.seed)
        with acting_as(process, processes):
            sampler = DATA_SAMPLERS.build(self._sampler, default_args=options)
        return _ProcessSampler(sampler, self.dataset, self.seed, process, processes)

    @property
    def infinite(self) -> bool:
        """Whether one pass over the data never ends, but goes on behind its length.

        Samplers do not say so. Endless ones remember where they are, so a new one is
        tried.
        """
        sampler = self._build(0)
        return next(islice(sampler, len(sampler), None), None) is not None

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(zip(*self.samplers))

    def __len__(self) -> int:
        return sum(map(len, self.samplers))

    def set_epoch(self, epoch: int) -> None:
        for sampler in self.samplers:
            sampler.set_epoch(epoch)


@DATA_SAMPLERS.register_module()
class SharedBatchSampler(Sampler):
    """Every item is one update's images: the micro-batches of it, one after another.

    Args:
        sampler (SharedSampler): Where the images come from.
        batch_size (int): Images of one micro-batch.
        batch_sampler (dict, optional): Config of the recipe's batch sampler. Defaults
            to None: torch's.
        drop_last (bool): Whether to leave out an incomplete last batch; for torch's
            batch sampler only. Defaults to False.
    """

    def __init__(
        self,
        sampler: SharedSampler,
        batch_size: int,
        batch_sampler: Optional[dict] = None,
        drop_last: bool = False,
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self._batch_sampler = batch_sampler or dict(
            type=BatchSampler, drop_last=drop_last
        )
        self._parts = self._build_parts()
        self.drop_last = getattr(self._parts[0], 'drop_last', False)
        self._skipped = 0

    def _build_parts(self) -> List[Sampler]:
        return [
            DATA_SAMPLERS.build(
                self._batch_sampler,
                default_args=dict(sampler=sampler, batch_size=self.batch_size),
            )
            for sampler in self.sampler.samplers
        ]

    def __iter__(self) -> Iterator[List[int]]:
        skipped, self._skipped = self._skipped, 0
        for batches in islice(zip(*self._parts), skipped, None):
            yield list(chain.from_iterable(batches))

    def __len__(self) -> int:
        return len(self._parts[0])

    def skip_in_pass(self, updates: int) -> None:
        """Begin the next pass behind its first ``updates`` items, not loading them."""
        self._skipped = updates

    def skip(self, updates: int) -> int:
        """Go on behind the first ``updates`` items of all passes, not loading them.

        Returns:
            int: How many whole passes over the data lie behind.
        """
        self.sampler.restart()
        self._parts = self._build_parts()
        passes = 0
        if not self.sampler.infinite:
            passes, updates = divmod(updates, len(self))
            self.sampler.set_epoch(passes)
        self.skip_in_pass(updates)
        return passes


@FUNCTIONS.register_module()
def collate_micro_batches(
    data: Sequence[Any], micro_batches: int, collate_fn: dict
) -> List[Any]:
    """Collate the images of one update into its micro-batches, all of one size.

    Args:
        data (Sequence): The samples, those of the first micro-batch first.
        micro_batches (int): Number of micro-batches.
        collate_fn (dict): Config of the function that collates one micro-batch.

    Returns:
        list: The micro-batches, as ``collate_fn`` makes them.
    """
    collate, options = _collate_function(**collate_fn)
    size = len(data) // micro_batches
    return [
        collate(data[start : start + size], **options)
        for start in range(0, len(data), size)
    ]


def _collate_function(type, **options) -> 'tuple[Callable, dict]':
    return FUNCTIONS.get(type) if isinstance(type, str) else type, options
