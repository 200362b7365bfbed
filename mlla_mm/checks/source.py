# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What the checks of data have in common: a data set, and what is found in it."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Tuple,
    TypeVar,
    Union,
)

import numpy as np
from rich.markup import escape
from rich.progress import track

from ..utils.archives import is_folder
from ..utils.text import PATH_LIMIT, printable

NAMES, FILES, PIXELS = 'names', 'files', 'pixels'
LOOKS = (NAMES, FILES, PIXELS)
"""How closely images are looked at.

'names': annotation files, folders and the names of files, and into a few label maps.
'files': also whether every image and label map is a file with something in it.
'pixels': also whether each can be decoded, and its size and labels.
"""

_NUM_EXAMPLES = 3
_Item = TypeVar('_Item')


class Finding(NamedTuple):
    """Something that is wrong with the data.

    Attributes:
        problem (str): What is wrong, with examples.
        fix (str): How to mend it.
        fatal (bool): Whether a run would fail, or learn something wrong. Defaults to
            True.
    """

    problem: str
    fix: str
    fatal: bool = True


class UnusableError(Exception):
    """Ends the check of a data set. Its argument is the last :class:`Finding`."""


class ClassCounts(NamedTuple):
    """How often each class occurs in a data set, as a training sees it.

    Attributes:
        images (int): Number of images, after the data set's own filters.
        classes (tuple[str]): Names of the classes, by label.
        unit (str): What is counted: 'objects', 'pixels' or 'images'.
        numbers (list[int], optional): Objects, pixels or images of each class. None if
            they were not counted.
        images_with (list[int], optional): Number of images with the class, if this is
            another number.
    """

    images: int
    classes: Tuple[str, ...]
    unit: str
    numbers: Optional[List[int]] = None
    images_with: Optional[List[int]] = None

    def __add__(self, other: Any) -> 'ClassCounts':
        """The counts of two data sets of the same classes together."""
        return self._replace(
            images=self.images + other.images,
            numbers=_add(self.numbers, other.numbers),
            images_with=_add(self.images_with, other.images_with),
        )


@dataclass
class Source:
    """A data set of a config that reads files.

    Attributes:
        split (str): 'train', 'val' or 'test'.
        key (str): Its key in the config.
        dataset (Dataset): Built, but without its annotations and its pipeline.
        config (dict): Its config.
        num_classes (int, optional): Number of classes of the model's heads.
        look (str): How closely to look, one of :data:`LOOKS`.
        num_images (int, optional): Expected number of images, if it is known.
        backend (str, optional): What decodes the images, by mmcv's name. None if it is
            unknown. Defaults to 'cv2'.
        cfg (Config): The whole config. Defaults to an empty one.
        counts (ClassCounts, optional): Set by the check of the format, unless the data
            are too wrong to be counted.
        images (list[str | Path]): The images that exist; set by the check of the
            format.
        image_ids (dict[Any, bool]): The ids of the images in the file, by which metrics
            know them, and whether they have an object of a class; set by the check of
            COCO's format.
        used_ids (list): The ids of the images that the data set's own filters leave;
            set by the check of COCO's format.
        folder_labels (dict[str, int]): Labels of class folders; set by their check.
        folded (bool): Whether a KFoldDataset takes a part of it. Defaults to False.
    """

    split: str
    key: str
    dataset: Any
    config: Any
    num_classes: Optional[int]
    look: str
    num_images: Optional[int] = None
    backend: Optional[str] = 'cv2'
    cfg: Any = field(default_factory=dict)
    counts: Optional[ClassCounts] = None
    images: List[Union[str, Path]] = field(default_factory=list)
    image_ids: Dict[Any, bool] = field(default_factory=dict)
    used_ids: List[Any] = field(default_factory=list)
    folder_labels: Dict[str, int] = field(default_factory=dict)
    folded: bool = False

    @property
    def evaluator(self) -> Any:
        """The config of the metrics of its split; None for training."""
        return self.cfg.get(f'{self.split}_evaluator')


Check = Callable[[Source], Iterator[Finding]]


def require(condition: object, problem: str, fix: str) -> None:
    """End the check of this data set if it makes no sense to go on."""
    if not condition:
        raise UnusableError(Finding(problem, fix))


def require_folder(folder: Path, source: Source) -> None:
    """End the check of this data set if a folder does not exist."""
    fix = f'Check data_root and data_prefix of {source.key}.'
    require(is_folder(folder), f'Folder not found: {folder}', fix)


def require_text(source: Source) -> None:
    """End the check of this data set if its ``ann_file`` is no text."""
    value = source.dataset.ann_file
    fix = f"Write {source.key}.ann_file='' for no file."
    problem = f'ann_file is {printable(repr(value))}, which is no path'
    require(isinstance(value, str), problem, fix)


def read_ann_file(source: Source, fix: str) -> str:
    """The text of the annotation file; ends the check if there is none."""
    path = Path(source.dataset.ann_file or '')
    where = f'Check data_root and ann_file of {source.key}.'
    require(path.is_file(), f'Annotation file not found: {path}', where)
    try:
        text = path.read_text(encoding='utf-8').strip()
    except UnicodeDecodeError as error:
        raise UnusableError(Finding(f'{path} is not UTF-8 ({error})', fix)) from error
    require(text, f'{path} is empty', fix)
    return text


def several(
    what: str, things: Sequence[str], fix: str, fatal: bool = True
) -> Iterator[Finding]:
    """One finding for all things of a kind; none if there are no such things."""
    if things:
        yield Finding(f'{len(things)} {what}: {examples(things)}', fix, fatal)


def require_none(what: str, things: Sequence[str], fix: str) -> None:
    """End the check of this data set if there are such things."""
    for finding in several(what, things, fix):
        raise UnusableError(finding)


def subset(samples: List[Any], source: Source) -> List[Any]:
    """What MMEngine's ``indices`` leave of samples; ends the check if it is nothing."""
    indices = source.config.get('indices')
    if indices is None:
        return samples
    fix, count = f'Mend indices of {source.key}, or leave them out.', len(samples)
    if isinstance(indices, int):
        kept = samples[:indices] if indices >= 0 else samples[indices:]
    else:
        outside = [str(i) for i in indices if not -count <= i < count]
        what = f'indices of {source.key} are not those of its {count} images'
        require(not outside, f'{what}: {examples(outside)}', fix)
        kept = [samples[i] for i in indices]
    require(kept, f'indices of {source.key} leave none of its {count} images', fix)
    return kept


def examples(things: Sequence[str]) -> str:
    """The first things of a list in words, and how many more there are."""
    shown = ', '.join(printable(thing, PATH_LIMIT) for thing in things[:_NUM_EXAMPLES])
    more = len(things) - _NUM_EXAMPLES
    return f'{shown} and {more} more' if more > 0 else shown


def progress(items: Iterable[_Item], what: str, total: int) -> Iterable[_Item]:
    """The items, with a progress bar in a terminal; in a log it would be many lines."""
    # rich takes square brackets in the name of a folder for styles.
    title, silent = escape(printable(what)), not sys.stdout.isatty()
    return track(items, title, total, disable=silent, transient=True)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Name in a terminal what takes a while and has no parts to count."""
    for _ in progress([0], what, 1):
        yield


def labels_of(info: Mapping) -> List[int]:
    """The labels that a training learns of a sample, as MMEngine's data sets list it.

    Raises:
        AttributeError, KeyError, TypeError: If a label is no number, or is not there.
    """
    if 'instances' in info:
        objects = [x for x in info['instances'] if not x.get('ignore_flag')]
        return [index(x['bbox_label']) for x in objects]
    return [index(x) for x in np.atleast_1d(info.get('gt_label', []))]


def count_labels(
    labels: Sequence[Sequence[int]], classes: Sequence[Any], unit: str
) -> ClassCounts:
    """Count the labels of each image. Labels that are no class are left out."""
    names = tuple(map(str, classes))
    numbers, images_with = [0] * len(names), [0] * len(names)
    for image in labels:
        for label in image:
            if 0 <= label < len(names):
                numbers[label] += 1
        for label in set(image):
            if 0 <= label < len(names):
                images_with[label] += 1
    return ClassCounts(len(labels), names, unit, numbers, images_with)


def _add(a: Optional[List[int]], b: Optional[List[int]]) -> Optional[List[int]]:
    return None if a is None or b is None else [x + y for x, y in zip(a, b)]
