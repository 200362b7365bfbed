# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What is wrong with a copy of COCO, ADE20K or ImageNet, and how to mend it."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import numpy as np
from mmengine.utils import track_iter_progress
from PIL import ExifTags, Image

from ..utils import images as image_files
from ..utils.files import check_regular_file
from ..utils.text import printable

COCO_COUNTS = (118287, 5000)
ADE20K_COUNTS = (20210, 2000)
IMAGENET_COUNTS = (1281167, 50000)

_COCO_SOURCE = 'http://images.cocodataset.org'
_ADE20K_SOURCE = (
    'http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip'
)
_IMAGENET_SOURCE = 'ILSVRC2012 from https://image-net.org'
_IMAGENET_SUFFIXES = ('.jpeg', '.jpg', '.png')
_NUM_EXAMPLES = 3
# Decoded at a time: a future for each of ImageNet's images would take gigabytes.
_CHUNK = 4096


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes:
        problem (str): What is wrong, with examples.
        fix (str): How to mend it.
        fatal (bool): Whether a run would fail, or learn wrong things. Defaults to True.
    """

    problem: str
    fix: str
    fatal: bool = True


def check_coco(
    root: Union[str, Path],
    fast: bool = False,
    counts: Tuple[int, int] = COCO_COUNTS,
    num_classes: int = 80,
) -> List[Finding]:
    """Check COCO 2017 for detection and instance segmentation.

    Files: ``{train,val}2017/*.jpg`` and ``annotations/instances_{train,val}2017.json``.

    Args:
        root (str | Path): The folder.
        fast (bool): Do not decode the images. Defaults to False.
        counts (tuple[int, int]): Number of training and validation images. Defaults
            to COCO's.
        num_classes (int): Number of categories. Defaults to 80.

    Returns:
        list[Finding]: What is wrong; empty if nothing is.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    root = _require_folder(root)
    findings = []
    for split, count in zip(('train2017', 'val2017'), counts):
        again = f'Download {_COCO_SOURCE}/zips/{split}.zip and unzip it in {root}.'
        images = _files(root / split, ('.jpg',))
        findings += _check_files(root / split, images, count, again)
        path = root / 'annotations' / f'instances_{split}.json'
        content = _read_coco_json(path)
        findings += _check_coco_json(path, content, count, num_classes)
        sizes = {
            root / split / x['file_name']: (x['width'], x['height'])
            for x in content['images']
        }
        missing = sorted(path.name for path in sizes.keys() - set(images))
        if images and missing:
            findings.append(
                Finding(
                    f'{len(missing)} images of {path.name} are not in {root / split}: '
                    f'{examples(missing)}',
                    again,
                )
            )
        if not fast:
            problems = track(images, SizeCheck(sizes))
            findings += group(problems, root / split, again)
    return findings


def check_ade20k(
    root: Union[str, Path],
    fast: bool = False,
    counts: Tuple[int, int] = ADE20K_COUNTS,
    num_classes: int = 150,
) -> List[Finding]:
    """Check ADE20K in the layout of the scene parsing challenge 2016.

    Files: ``images/{training,validation}/*.jpg`` and
    ``annotations/{training,validation}/*.png`` with labels from 0, which is
    unlabelled, to ``num_classes``.

    Args:
        root (str | Path): The folder ``ADEChallengeData2016``.
        fast (bool): Do not decode the images and label maps. Defaults to False.
        counts (tuple[int, int]): Number of training and validation images. Defaults
            to ADE20K's.
        num_classes (int): Number of classes. Defaults to 150.

    Returns:
        list[Finding]: What is wrong; empty if nothing is.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    root = _require_folder(root)
    again = f'Download {_ADE20K_SOURCE} and unzip it in {root.parent}.'
    findings = []
    for split, count in zip(('training', 'validation'), counts):
        image_folder = root / 'images' / split
        mask_folder = root / 'annotations' / split
        images = _files(image_folder, ('.jpg',))
        masks = _files(mask_folder, ('.png',))
        findings += _check_files(image_folder, images, count, again)
        findings += _check_files(mask_folder, masks, count, again)
        if not (images and masks):
            continue
        paired = {mask.stem for mask in masks}
        for lonely, other in (
            ([i.name for i in images if i.stem not in paired], mask_folder),
            (sorted(paired - {i.stem for i in images}), image_folder),
        ):
            if lonely:
                findings.append(
                    Finding(
                        f'{len(lonely)} without a partner of the same name in {other}: '
                        f'{examples(lonely)}',
                        again,
                    )
                )
        if not fast:
            pairs = [image for image in images if image.stem in paired]
            problems = track(pairs, _PairCheck(mask_folder, num_classes))
            findings += group(problems, image_folder, again)
    return findings


def check_imagenet(
    root: Union[str, Path],
    fast: bool = False,
    counts: Tuple[int, int] = IMAGENET_COUNTS,
    num_classes: int = 1000,
) -> List[Finding]:
    """Check ImageNet-1K in class folders.

    Files: ``{train,val}/CLASS/*`` with images; ``meta/{train,val}.txt`` with
    ``CLASS/NAME LABEL`` lines, which mmpretrain prefers to the folders, if they are
    there.

    Args:
        root (str | Path): The folder.
        fast (bool): Do not decode the images. Defaults to False.
        counts (tuple[int, int]): Number of training and validation images. Defaults
            to ImageNet's.
        num_classes (int): Number of classes. Defaults to 1000.

    Returns:
        list[Finding]: What is wrong; empty if nothing is.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    root = _require_folder(root)
    again = f'Extract {_IMAGENET_SOURCE} anew: {root}/{{train,val}}/CLASS/IMAGE.'
    findings, classes = [], {}
    for split, count in zip(('train', 'val'), counts):
        folder = root / split
        folders = sorted(x for x in folder.glob('*') if x.is_dir())
        images = _files(folder, _IMAGENET_SUFFIXES)
        listed = (root / 'meta' / f'{split}.txt').is_file()
        if images and not listed:
            findings.append(
                Finding(
                    f'{len(images)} images lie in {folder} itself: '
                    f'{examples([image.name for image in images])}',
                    'Move every image into a folder named after its class (for val '
                    'the usual valprep.sh does it).',
                )
            )
        for class_folder in _progress(folders):
            images += _files(class_folder, _IMAGENET_SUFFIXES)
        findings += _check_files(folder, images, count, again)
        if listed:
            findings += _check_list(root, split, images, num_classes)
        elif folders:
            classes[split] = {x.name for x in folders}
            if len(folders) != num_classes:
                findings.append(
                    Finding(
                        f'{len(folders)} class folders in {folder}, expected '
                        f'{num_classes}',
                        'Remove what is no class and extract those that are missing: '
                        'labels are the positions in the sorted list of folders.',
                    )
                )
        if not fast:
            findings += group(track(images, decode_problem), folder, again)
    if len(classes) == 2 and classes['train'] != classes['val']:
        different = sorted(classes['train'] ^ classes['val'])
        findings.append(
            Finding(
                f'{len(different)} class folders are in only one of train and val: '
                f'{examples(different)}',
                'Name the folders of both alike: labels are their sorted positions.',
            )
        )
    return findings


CHECKS = dict(coco=check_coco, ade20k=check_ade20k, imagenet=check_imagenet)


def _require_folder(root: Union[str, Path]) -> Path:
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f'Folder not found: {root}. Give the folder that holds the data set.'
        )
    return root


def _files(folder: Path, suffixes: Sequence[str]) -> List[Path]:
    """Sorted files with one of the suffixes; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)


def _check_files(
    folder: Path, files: List[Path], count: int, again: str
) -> List[Finding]:
    if not folder.is_dir():
        return [Finding(f'Folder missing: {folder}', again)]
    findings = []
    if len(files) < count:
        findings.append(
            Finding(f'{len(files)} files in {folder}, expected {count}', again)
        )
    elif len(files) > count:
        findings.append(
            Finding(
                f'{len(files)} files in {folder}, expected {count}',
                'Remove the files that do not belong to the data set.',
            )
        )
    empty = [relative_name(path, folder) for path in files if is_empty(path)]
    if empty:
        findings.append(
            Finding(
                f'{len(empty)} files of zero bytes in {folder}: {examples(empty)}',
                f'Often a full disk while extracting. {again}',
            )
        )
    return findings


def _read_coco_json(path: Path) -> dict:
    """The three lists of COCO's annotations; empty ones if the file has none."""
    try:
        check_regular_file(path)
        content = json.loads(path.read_text(encoding='utf-8'))
        return {key: content[key] for key in ('images', 'annotations', 'categories')}
    except (OSError, ValueError, KeyError, TypeError):
        return dict(images=[], annotations=[], categories=[])


def _check_coco_json(
    path: Path, content: dict, count: int, num_classes: int
) -> List[Finding]:
    fix = (
        f'Download {_COCO_SOURCE}/annotations/annotations_trainval2017.zip and unzip '
        f'it in {path.parents[1]}.'
    )
    if not content['images']:
        return [Finding(f'Missing, or no annotations of COCO: {path}', fix)]
    findings = []
    categories = {category['id'] for category in content['categories']}
    images = {image['id'] for image in content['images']}
    for number, name, expected in (
        (len(images), 'images', count),
        (len(categories), 'categories', num_classes),
    ):
        if number != expected:
            findings.append(
                Finding(f'{number} {name} in {path}, expected {expected}', fix)
            )
    for key, known in (('category_id', categories), ('image_id', images)):
        unknown = sum(a[key] not in known for a in content['annotations'])
        if unknown:
            findings.append(
                Finding(f'{unknown} annotations with an unknown {key} in {path}', fix)
            )
    return findings


def _check_list(
    root: Path, split: str, images: List[Path], num_classes: int
) -> List[Finding]:
    """Check mmpretrain's list of images and labels."""
    path = root / 'meta' / f'{split}.txt'
    fix = f'Mend {path}, or remove it: without it the folders give the labels.'
    lines = [line.rpartition(' ') for line in path.read_text().splitlines() if line]
    present = {relative_name(image, root / split) for image in images}
    findings = []
    missing = [name for name, _, _ in lines if name not in present]
    if missing:
        findings.append(
            Finding(
                f'{len(missing)} images of {path} do not exist: {examples(missing)}',
                fix,
            )
        )
    wrong = [
        ' '.join((name, label))
        for name, _, label in lines
        if not (label.isdigit() and int(label) < num_classes)
    ]
    if wrong:
        findings.append(
            Finding(
                f'{len(wrong)} labels of {path} are not in 0 to {num_classes - 1}: '
                f'{examples(wrong)}',
                fix,
            )
        )
    return findings


def decode_problem(path: Path) -> Optional[str]:
    """What keeps an image from being read, or None."""
    # Zero bytes are found without decoding.
    if is_empty(path):
        return None
    try:
        with image_files.open_image(path) as image:
            image.load()
    except Image.DecompressionBombError:
        limit = f'{image_files.MAX_PIXELS_VARIABLE}={image_files.max_pixels()}'
        return f'of more pixels than {limit} allows'
    # Pillow's plugins raise errors of many types for broken files.
    except Exception:
        return 'unreadable'
    return None


def is_empty(path: Path) -> bool:
    """Whether a file has no bytes; pipes, devices and broken links are no files."""
    return path.is_file() and path.stat().st_size == 0


def image_size(image: Image.Image) -> Tuple[int, int]:
    """Width and height as mmcv reads an image: turned as its EXIF data say."""
    width, height = image.size
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(5, 9)
    # mmcv leaves an image as it is whose EXIF data are damaged.
    except Exception:
        turned = False
    return (height, width) if turned else (width, height)


class SizeCheck:
    """Whether an image decodes, to the size (W, H) that the annotations give."""

    def __init__(self, sizes: Dict[Path, Tuple[int, int]]) -> None:
        self.sizes = sizes

    def __call__(self, path: Path) -> Optional[str]:
        problem = decode_problem(path)
        if problem or path not in self.sizes or is_empty(path):
            return problem
        with image_files.open_image(path) as image:
            if image_size(image) != self.sizes[path]:
                return 'of another size than annotated'
        return None


class _PairCheck:
    """Whether an image and its label map decode, fit and have valid labels."""

    def __init__(self, mask_folder: Path, num_classes: int) -> None:
        self.mask_folder = mask_folder
        self.num_classes = num_classes

    def __call__(self, path: Path) -> Optional[str]:
        mask_path = self.mask_folder / f'{path.stem}.png'
        if is_empty(path) or is_empty(mask_path):
            return None
        problem = decode_problem(path)
        if problem:
            return problem
        if decode_problem(mask_path):
            return 'with an unreadable label map'
        open_image = image_files.open_image
        with open_image(path) as image, open_image(mask_path) as mask:
            if image_size(image) != mask.size:
                return 'of another size than the label map'
            labels = np.asarray(mask)
        if labels.ndim != 2 or labels.dtype != np.uint8:
            return 'whose label map is not of one 8-bit channel'
        if labels.max() > self.num_classes:
            return f'with labels above {self.num_classes}'
        return None


def _progress(items: Sequence) -> Iterable:
    # In a log the bar would be a thousand lines.
    return track_iter_progress(items) if items and sys.stdout.isatty() else items


def track(
    paths: List[Path], check: Callable[[Path], Optional[str]]
) -> Iterator[Tuple[Path, str]]:
    """Paths and their problems, found in threads: decoding releases the GIL."""
    with ThreadPoolExecutor() as pool:

        def results():
            for start in range(0, len(paths), _CHUNK):
                chunk = paths[start : start + _CHUNK]
                yield from zip(chunk, pool.map(check, chunk))

        found = results()
        if paths and sys.stdout.isatty():
            found = track_iter_progress((found, len(paths)))
        for path, problem in found:
            if problem:
                yield path, problem


def group(
    problems: Iterable[Tuple[Path, str]], folder: Path, fix: str
) -> List[Finding]:
    """One finding for each kind of problem."""
    groups = {}
    for path, problem in problems:
        groups.setdefault(problem, []).append(relative_name(path, folder))
    return [
        Finding(f'{len(names)} images {problem} in {folder}: {examples(names)}', fix)
        for problem, names in groups.items()
    ]


def relative_name(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def examples(names: Sequence[str]) -> str:
    shown = ', '.join(map(printable, names[:_NUM_EXAMPLES]))
    more = len(names) - _NUM_EXAMPLES
    return f'{shown} and {more} more' if more > 0 else shown
