# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Random numbers that depend on what they are drawn for, and on nothing before.

An augmentation draws from a generator that is seeded by the place of its image in the
order of all images; an update's dropout and the like from one that is seeded by the
number of the update and of the recipe's process. So neither the number of workers and
processes nor an interruption changes them, and there are no random states to restore.
"""

import random
from typing import Any, Tuple

import numpy as np
import torch
from mmengine.registry import DATASETS
from torch.utils.data import Dataset

# Streams that must not meet.
SAMPLE, UPDATE = 0, 1


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
class SeededDataset(Dataset):
    """A data set whose augmentations are seeded by :class:`Draw`.

    Another index is passed on as it is, and so are all attributes.

    Args:
        dataset (dict): Config of the data set.
    """

    def __init__(self, dataset: dict) -> None:
        self.dataset = DATASETS.build(dataset)

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, Draw):
            seed_generators(*index.key)
            index = int(index)
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # While it is unpickled it has no data set yet.
        if name == 'dataset':
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Hooks that switch the pipeline mean that of the data set."""
        if name == 'dataset':
            super().__setattr__(name, value)
        else:
            setattr(self.dataset, name, value)
