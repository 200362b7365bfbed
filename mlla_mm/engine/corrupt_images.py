# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Training images that cannot be read: named, or skipped and counted."""

from pathlib import Path
from typing import Any, List, Optional

import cv2
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop
from PIL import Image, UnidentifiedImageError
from torch import tensor

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


def read_sample(dataset: Any, index: int) -> Any:
    """``dataset[index]``, with an error that names the file if one cannot be read.

    A cut-off JPEG or PNG file is found even if the decoder has filled up what is
    missing, as OpenCV's did before version 4.12: such a file lacks its last bytes.

    Args:
        dataset (Dataset): The data set. Files are known of those with OpenMMLab's
            ``get_data_info``, and of samples with ``data_samples.img_path``.
        index (int): The index.

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
                raise _error(path, problem) from error
        raise
    path = _file_of(sample)
    if path is not None and _lacks_end(path):
        problem = image_problem(path)
        if problem is not None:
            raise _error(path, problem)
    return sample


def image_problem(path: Path) -> Optional[str]:
    """What keeps an existing file from being read as an image, or None."""
    if path.stat().st_size == 0:
        return 'is empty'
    try:
        with Image.open(path) as image:
            image.load()
    except UnidentifiedImageError:
        return 'is not an image'
    # Pillow's plugins raise SyntaxError and ValueError too for broken files.
    except (OSError, SyntaxError, ValueError) as error:
        return 'is truncated' if 'runcated' in str(error) else f'is damaged ({error})'
    return 'cannot be decoded by OpenCV' if cv2.imread(str(path)) is None else None


def _size_problem(path: Path) -> Optional[str]:
    """What a transform may have failed for: a side of one pixel, now or once resized.

    mmseg takes a label map of one row or column for a vector.
    """
    with Image.open(path) as image:
        width, height = image.size
    if min(width, height) > 1 and max(width, height) < _THIN * min(width, height):
        return None
    return f'is of {width} x {height} pixels, which the pipeline cannot process'


def _error(path: Path, problem: str) -> CorruptImageError:
    return CorruptImageError(
        f'{path} {problem}. Replace it, take it out of the data set, or set '
        'skip_corrupt_images=True.'
    )


def _files(dataset: Any, index: int) -> List[Path]:
    """The local files that a sample is made of, as far as the data set tells."""
    if not hasattr(dataset, 'get_data_info'):
        return []
    info = dataset.get_data_info(index)
    paths = [info.get(key) for key in ('img_path', 'seg_map_path')]
    return [Path(path) for path in paths if path and Path(path).is_file()]


def _file_of(sample: Any) -> Optional[Path]:
    if not isinstance(sample, dict):
        return None
    path = getattr(sample.get('data_samples'), 'img_path', None)
    return Path(path) if path else None


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
