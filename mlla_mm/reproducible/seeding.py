# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Random numbers that depend on what they are drawn for, and on nothing before.

An augmentation draws from a generator that is seeded by the place of its image in the
order of all images; an update's dropout and the like from one that is seeded by the
number of the update and of the recipe's process. So neither the number of workers and
processes nor an interruption changes them, and there are no random states to restore.
"""

import multiprocessing
import random
import warnings
from typing import Any, Tuple, Union

import numpy as np
import torch
from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from ..datasets.corrupt_images import CheckedDataset, CorruptImageError

# Streams that must not meet.
SAMPLE, UPDATE = 0, 1
# Corrupt images in a row, before a data set is taken to be beyond repair.
_MAX_SKIPS = 20


def seed_generators(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators of this process, on all devices.

    Args:
        *key (int): Non-negative numbers that say what is to be drawn for. Other numbers
            give independent streams.
    """
    python, numpy, low, high = map(int, np.random.SeedSequence(key).generate_state(4))
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(low + (high << 32))


class Draw(int):
    """An index into a data set that knows what its augmentation is seeded with.

    Args:
        index (int): The index.
        key (tuple[int]): For :func:`seed_generators`.
    """

    key: Tuple[int, ...]

    def __new__(cls, index: int, key: Tuple[int, ...]) -> 'Draw':
        draw = super().__new__(cls, index)
        draw.key = key
        return draw

    def __getnewargs__(self) -> Tuple[int, Tuple[int, ...]]:
        return int(self), self.key


@DATASETS.register_module()
class SeededDataset(CheckedDataset):
    """A data set whose augmentations are seeded by :class:`Draw`.

    Another index is passed on as it is.

    Args:
        dataset (dict | Dataset): The data set, or its config.
        skip_corrupt_images (bool): Put another image, drawn from the same seed, in the
            place of one that cannot be read, and count it in ``skipped``, which the
            workers share. False raises an error. Defaults to False.

    Raises:
        CorruptImageError: If an image cannot be read, or too many in a row.
    """

    _way_out = (
        'Replace it, take it out of the data set, or set '
        'train_cfg.skip_corrupt_images=True.'
    )
    _own = ('dataset', 'skipped')

    def __init__(
        self, dataset: Union[dict, Dataset], skip_corrupt_images: bool = False
    ) -> None:
        super().__init__(dataset)
        self.skipped = multiprocessing.Value('q', 0) if skip_corrupt_images else None

    def __getitem__(self, index: int) -> Any:
        key = (int(index),)
        if isinstance(index, Draw):
            key, index = index.key, int(index)
            seed_generators(*key)
        if self.skipped is None:
            return super().__getitem__(index)
        for skips in range(1, _MAX_SKIPS + 1):
            try:
                return super().__getitem__(index)
            except CorruptImageError as error:
                self._count(error)
            seed_generators(*key, skips)
            index = random.randrange(len(self))
        return super().__getitem__(index)

    def _count(self, error: CorruptImageError) -> None:
        with self.skipped.get_lock():
            self.skipped.value += 1
        warnings.warn(f'Skipped: {str(error).split(". ")[0]}.', stacklevel=3)
