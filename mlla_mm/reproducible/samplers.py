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
    """The images of one of the recipe's processes, each with its place in the order.

    Args:
        sampler (Sampler): The recipe's sampler for that process.
        dataset (Sized): The data set.
        seed (int): Seed of the augmentations.
        process (int): Number of the process.
        processes (int): Number of processes.
    """

    def __init__(
        self, sampler: Any, dataset: Any, seed: int, process: int, processes: int
    ) -> None:
        self.dataset = dataset  # Batch samplers read it here.
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
    """One process stands for several of the recipe's: it has a sampler for each.

    W processes with M micro-batches each have M samplers. So an update has the images
    that it has on W x M processes, an epoch has the same padding, and the augmentations
    are the same.

    Args:
        dataset (Sized): The data set.
        sampler (dict): Config of the recipe's sampler.
        micro_batches (int): Number of the recipe's processes that this one stands for.
        seed (int, optional): Seed of all samplers on all processes. None draws one at
            random. Defaults to None.
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
        """Whether the sampler never ends, but goes on after its length.

        Samplers do not tell, so one is tried. It is a new one, because endless samplers
        remember their position.
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
    """Every item has the images of one update: its micro-batches, one after another.

    Args:
        sampler (SharedSampler): Gives the images.
        batch_size (int): Images of one micro-batch.
        batch_sampler (dict, optional): Config of the recipe's batch sampler. None is
            :class:`torch.utils.data.BatchSampler`. Defaults to None.
        drop_last (bool): Leave out an incomplete last batch. It is an argument of
            torch's batch sampler only. Defaults to False.
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

    def _build_parts(self) -> List[Any]:
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
        """Let the next pass begin after its first ``updates`` items."""
        self._skipped = updates

    def skip(self, updates: int) -> int:
        """Go on after the first ``updates`` items, counted over all passes.

        Args:
            updates (int): Number of items to leave out; they are not loaded.

        Returns:
            int: How many whole passes over the data are left out.
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
    """Collate the images of one update into micro-batches of equal size.

    Args:
        data (Sequence): The samples; those of the first micro-batch come first.
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
