# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Images that cannot be read: named, or in training skipped and counted."""

import os
from pathlib import Path
from typing import Any, List, Optional, Tuple, Union

import mmcv
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS
from mmengine.runner import EpochBasedTrainLoop
from torch import tensor
from torch.utils.data import Dataset

from ..utils import images
from ..utils.text import PATH_LIMIT, printable

_ENDS = {b'\xff\xd8': b'\xff\xd9', b'\x89P': b'IEND\xaeB`\x82'}
"""The last bytes of a JPEG and of a PNG file, by the first two."""


# Long side over short side, from which on a usual resize may leave nothing.
_THIN = 100


class CorruptImageError(ValueError):
    """An image or label map that cannot be read; the message names the file.

    Args:
        message (str): The message. A data loader gives the text of its worker's
            traceback, which ends with the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition('CorruptImageError: ')[2].strip())


@DATASETS.register_module()
class CheckedDataset(Dataset):
    """A data set whose images that cannot be read are errors that name the file.

    All attributes are the data set's: hooks and metrics that read them, or switch the
    pipeline, do that of the data set.

    Args:
        dataset (dict | Dataset): The data set, or its config.

    Raises:
        CorruptImageError: See :func:`read_sample`.
    """

    _way_out = 'Replace it, or take it out of the data set.'
    _own: Tuple[str, ...] = ('dataset',)

    def __init__(self, dataset: Union[dict, Dataset]) -> None:
        is_config = isinstance(dataset, dict)
        self.dataset = DATASETS.build(dataset) if is_config else dataset

    def __getitem__(self, index: int) -> Any:
        return read_sample(self.dataset, index, self._way_out)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # While it is unpickled it has no data set yet.
        if name in self._own:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:
            super().__setattr__(name, value)
        else:
            setattr(self.dataset, name, value)


def read_sample(dataset: Any, index: int, way_out: str) -> Any:
    """``dataset[index]``, with an error that names the file if one cannot be read.

    A cut-off JPEG or PNG file is found even if the decoder has filled up what is
    missing, as OpenCV's did before version 4.12: such a file lacks its last bytes.

    Args:
        dataset (Dataset): The data set. Files are known of those with OpenMMLab's
            ``get_data_info``, and of samples whose ``data_samples`` tell.
        index (int): The index.
        way_out (str): End of the error's message.

    Raises:
        CorruptImageError: If an image or a label map exists, but cannot be read, or is
            so thin that a transform fails.
    """
    try:
        sample = dataset[index]
    except Exception as error:
        for path in _files(dataset, index):
            problem = image_problem(path) or _size_problem(path)
            if problem is not None:
                raise _corrupt(path, problem, way_out) from error
        raise
    for path in _files_of(sample):
        problem = image_problem(path) if _lacks_end(path) else None
        if problem is not None:
            raise _corrupt(path, problem, way_out)
    return sample


def _corrupt(path: Path, problem: str, way_out: str) -> CorruptImageError:
    return CorruptImageError(f'{printable(path, PATH_LIMIT)} {problem}. {way_out}')


def image_problem(path: Path) -> Optional[str]:
    """What keeps an existing file from being read as an image, or None."""
    problem = images.image_problem(path)
    if problem is not None:
        return problem
    try:
        decoded = mmcv.imread(path) is not None
    # OpenCV may have been imported before, and with it another limit of pixels.
    except Exception:
        decoded = False
    return None if decoded else 'cannot be decoded by OpenCV'


def _size_problem(path: Path) -> Optional[str]:
    """What a transform may have failed for: a side of one pixel, now or once resized.

    mmseg takes a label map of one row or column for a vector.
    """
    with images.open_image(path) as image:
        width, height = image.size
    if min(width, height) > 1 and max(width, height) < _THIN * min(width, height):
        return None
    return f'is of {width} x {height} pixels, which the pipeline cannot process'


_FILE_KEYS = ('img_path', 'seg_map_path')


def _files(dataset: Any, index: int) -> List[Path]:
    """What a sample is made of in local folders, as far as the data set tells."""
    if not hasattr(dataset, 'get_data_info'):
        return []
    info = dataset.get_data_info(index)
    paths = [info.get(key) for key in _FILE_KEYS]
    return [Path(path) for path in paths if path and os.path.exists(path)]


def _files_of(sample: Any) -> List[Path]:
    """The files that a sample was made of, as far as it tells."""
    packed = sample.get('data_samples') if isinstance(sample, dict) else None
    if isinstance(packed, (list, tuple)):  # test-time augmentation: one image's views
        packed = packed[0]
    paths = [getattr(packed, key, None) for key in _FILE_KEYS]
    return [Path(path) for path in paths if path]


def _lacks_end(path: Path) -> bool:
    """Whether a JPEG or PNG file ends otherwise than such files do."""
    try:
        with path.open('rb') as file:
            end = _ENDS.get(file.read(2))
            if end is None:
                return False
            file.seek(-len(end), 2)
            return file.read() != end
    except OSError:  # of no local file, or too short a one
        return False


@HOOKS.register_module()
class SkippedImagesHook(Hook):
    """Say at the end of every epoch how many corrupt images were skipped.

    Runs that count iterations say it before an evaluation and at the end, for all
    images that were loaded until then, which may be a few more than trained on.
    """

    def __init__(self) -> None:
        self._reported = 0

    def after_train_epoch(self, runner) -> None:
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        self._report(runner, f'Epoch {runner.epoch + 1}' if by_epoch else 'Training')

    def before_val_epoch(self, runner) -> None:
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._report(runner, f'Iteration {runner.iter}')

    def _report(self, runner, when: str) -> None:
        count = tensor(runner.train_dataloader.dataset.skipped.value)
        all_reduce(count)
        total = int(count)
        runner.logger.info(
            f'{when}: {total - self._reported} corrupt images skipped ({total} since '
            'the start of this run).'
        )
        self._reported = total
