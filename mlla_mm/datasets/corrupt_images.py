# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Images that cannot be read: an error that names the file, or skipped and counted."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, List, Optional, Tuple, Union

from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import tensor
from torch.utils.data import Dataset

from ..utils.archives import is_file
from ..utils.images import image_problem, lacks_end, open_image
from ..utils.text import PATH_LIMIT, printable

_FILE_KEYS = ('img_path', 'seg_map_path')
# Long side over short side. Resizing a thinner image may leave less than a pixel.
_THIN = 100


class CorruptImageError(ValueError):
    """An image or a label map cannot be read. The message names the file.

    Args:
        message (str): The message. A data loader gives the traceback of its worker as
            text, which ends with the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition('CorruptImageError: ')[2].strip())


@DATASETS.register_module()
class CheckedDataset(Dataset):
    """A data set that names the file if an image cannot be read.

    A cut-off JPEG or PNG file is found even if the decoder fills up what is missing, as
    OpenCV does before version 4.12.

    All attributes are those of the wrapped data set, so hooks and metrics read them, or
    switch the pipeline, as without the wrapper. But ``metainfo`` is always a dict:
    mmdet's ConcatDataset has a list where its data sets differ, be it in a colour,
    which metrics and visualizers do not take. It then is that of the first data set.

    Args:
        dataset (dict | Dataset): The data set, or its config. Files are known for data
            sets with OpenMMLab's ``get_data_info``, and for samples whose
            ``data_samples`` name them.

    Raises:
        CorruptImageError: When a sample is loaded, if an image or a label map exists,
            but cannot be read, or is so thin that a transform fails.
    """

    _way_out = 'Replace it, or take it out of the data set.'
    _own: Tuple[str, ...] = ('dataset',)

    # Any, because PyTorch's base class does not declare a length.
    dataset: Any

    def __init__(self, dataset: Union[dict, Dataset]) -> None:
        is_config = isinstance(dataset, dict)
        self.dataset = DATASETS.build(dataset) if is_config else dataset
        for mixing in _mixing_datasets(self.dataset):
            # The other images of a mix are known below it alone.
            if not isinstance(mixing.dataset, CheckedDataset):
                mixing.dataset = type(self)(mixing.dataset)

    @property
    def metainfo(self) -> Any:
        metainfo = self.dataset.metainfo
        return metainfo[0] if isinstance(metainfo, list) else metainfo

    def __getitem__(self, index: int) -> Any:
        try:
            sample = self.dataset[index]
        except CorruptImageError:
            raise
        except Exception as error:
            for path in _files_of_index(self.dataset, index):
                self._refuse(path, image_problem(path) or _thin_problem(path), error)
            raise
        for path in _files_of_sample(sample):
            if lacks_end(path):
                self._refuse(path, image_problem(path))
        return sample

    def _refuse(
        self, path: Path, problem: Optional[str], cause: Optional[Exception] = None
    ) -> None:
        """Raise the error of a file, if the file has a problem."""
        if problem is not None:
            raise CorruptImageError(
                f'{printable(path, PATH_LIMIT)} {problem}. {self._way_out}'
            ) from cause

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # There is no data set yet while this object is unpickled.
        if name in self._own:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:
            super().__setattr__(name, value)
        else:
            setattr(self.dataset, name, value)


def _mixing_datasets(dataset: Any) -> Iterator[Any]:
    """The wrappers that load several samples for one."""
    if any(base.__name__ == 'MultiImageMixDataset' for base in type(dataset).__mro__):
        yield dataset
    own = getattr(dataset, '__dict__', {})
    parts = own.get('datasets')
    for part in parts if isinstance(parts, list) else [own.get('dataset')]:
        if part is not None:
            yield from _mixing_datasets(part)


def _thin_problem(path: Path) -> Optional[str]:
    """Whether a side has one pixel, or may have less than one after resizing.

    mmseg takes a label map of one row or column for a vector.
    """
    with open_image(path) as image:
        width, height = image.size
    if min(width, height) > 1 and max(width, height) < _THIN * min(width, height):
        return None
    return f'is of {width} x {height} pixels, which the pipeline cannot process'


def _files_of_index(dataset: Any, index: int) -> List[Path]:
    """The local files of a sample, if the data set tells them."""
    if not hasattr(dataset, 'get_data_info'):
        return []
    info = dataset.get_data_info(index)
    paths = [info.get(key) for key in _FILE_KEYS]
    return [Path(path) for path in paths if path and _exists(path)]


def _exists(path: str) -> bool:
    return os.path.exists(path) or is_file(path)


def _files_of_sample(sample: Any) -> List[Path]:
    """The files of a sample, if the sample tells them."""
    sample = sample if isinstance(sample, dict) else {}
    # Below a wrapper that mixes samples, they are not packed yet.
    packed = sample.get('data_samples', sample)
    if isinstance(packed, (list, tuple)):  # the views of test-time augmentation
        packed = packed[0]
    get = packed.get if isinstance(packed, dict) else partial(getattr, packed)
    paths = [get(key, None) for key in _FILE_KEYS]
    return [Path(path) for path in paths if path]


@HOOKS.register_module()
class SkippedImagesHook(Hook):
    """Log at the end of every epoch how many corrupt images were skipped.

    Runs that count iterations log it before each evaluation and at the end. The number
    is that of all images loaded until then, a few of which may not be used yet.
    """

    def __init__(self) -> None:
        self._reported = 0

    def after_train_epoch(self, runner: Runner) -> None:
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        self._report(runner, f'Epoch {runner.epoch + 1}' if by_epoch else 'Training')

    def before_val_epoch(self, runner: Runner) -> None:
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._report(runner, f'Iteration {runner.iter}')

    def _report(self, runner: Runner, when: str) -> None:
        count = tensor(runner.train_dataloader.dataset.skipped.value)
        all_reduce(count)
        total = int(count)
        runner.logger.info(
            f'{when}: {total - self._reported} corrupt images skipped ({total} since '
            'the start of this run).'
        )
        self._reported = total
