# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Images and label maps, as mmseg reads them."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, List, NamedTuple, Optional, Set, Tuple

import numpy as np
from mmengine.fileio import list_dir_or_file
from PIL import Image

from ..compat.openmmlab import loads_label_maps
from ..engine.parts import datasets_of, kind_of, parts_of
from ..utils.archives import is_folder
from ..utils.files import file_problem
from ..utils.images import FORMATS, image_size, open_image, try_decoding
from .image_files import (
    Problem,
    as_findings,
    check_images,
    find_problems,
    missing_files,
    relative,
    unreadable,
)
from .source import (
    PIXELS,
    ClassCounts,
    Finding,
    Source,
    examples,
    read_ann_file,
    require,
    require_folder,
    require_text,
    several,
    subset,
)

_NUM_VALUES = 256
_IGNORED_LABEL = 255
_SAMPLE = 32
_OPENMMLAB = {'mlla_mm', 'mmcv', 'mmdet', 'mmengine', 'mmpretrain', 'mmseg'}
_UNREADABLE = 'have a label map that cannot be read'
_LABEL_FIX = (
    'A label map is a PNG file of one 8-bit channel, of the size of its image, with '
    "numbers of classes: see 'reduce_zero_label' in docs/datasets.md."
)


def check_label_maps(source: Source) -> Iterator[Finding]:
    dataset = source.dataset
    folder = Path(dataset.data_prefix.get('img_path') or '')
    require_folder(folder, source)
    require_text(source)
    fix = f'Check data_prefix and seg_map_suffix of {source.key}.'
    has_list = dataset.ann_file and not os.path.isdir(dataset.ann_file)
    if has_list:
        path, suffix = dataset.ann_file, dataset.img_suffix
        lines = f'Lines of {path} are names of images without {suffix}.'
        read_ann_file(source, lines)
        fix = f'{fix} {lines}'
    infos = dataset.load_data_list()
    problem = '' if infos else _no_images(folder, dataset)
    require(infos, problem, f'Check img_suffix of {source.key}.')
    infos = subset(infos, source)
    images = [Path(info['img_path']) for info in infos]
    if 'seg_map_path' not in infos[0]:
        require(
            _reading_of(source.config.get('pipeline')) is None,
            f'data_prefix of {source.key} has no seg_map_path, but LoadAnnotations is '
            'in its pipeline',
            'Name the folder of the label maps. If there are none, leave '
            'LoadAnnotations out.',
        )
        yield from check_images(images, folder, source)
        return
    pairs = {Path(info['img_path']): Path(info['seg_map_path']) for info in infos}
    map_folder = Path(dataset.data_prefix['seg_map_path'])
    require(is_folder(map_folder), f'Folder not found: {map_folder}', fix)
    missing = set(missing_files(pairs.values()))
    names = sorted(relative(path, map_folder) for path in missing)
    yield from several(f'label maps are not in {map_folder}', names, fix)
    # A list may name some of the images; without a list all of them are used.
    if not has_list:
        yield from _check_left_out(folder, map_folder, source)
    pairs = {image: path for image, path in pairs.items() if path not in missing}
    maps = _LabelMaps(pairs, folder, map_folder, source)

    def check(path: Path) -> Optional[Problem]:
        problem = unreadable(path, folder, source)
        if problem is not None or path not in pairs:
            return problem
        return maps.look_into(path) if source.look == PIXELS else maps.look_at(path)

    yield from check_images(images, folder, source, check)
    if source.look != PIXELS:
        yield from maps.check_sample([x for x in source.images if x in pairs])
    yield from maps.check_labels()
    source.counts = maps.counts(len(images))


# Files that are left out.


def _image_suffixes() -> Set[str]:
    known = Image.registered_extensions().items()
    return {suffix for suffix, kind in known if kind in FORMATS}


def _list_files(folder: Path, suffix: Optional[str] = None) -> Set[str]:
    """Absolute paths of files, as mmseg lists them: without hidden ones."""
    root = os.path.abspath(folder)
    names = list_dir_or_file(root, list_dir=False, suffix=suffix, recursive=True)
    return {os.path.join(root, name) for name in names}


def _no_images(folder: Path, dataset: Any) -> str:
    known = _image_suffixes()
    suffixes = Counter(Path(name).suffix for name in _list_files(folder))
    others = [f'{n} *{x}' for x, n in suffixes.most_common() if x.lower() in known]
    but = f', but {" and ".join(others[:3])}' if others else ''
    return f'No images *{dataset.img_suffix} in {folder}{but}'


def _check_left_out(
    folder: Path, map_folder: Path, source: Source
) -> Iterator[Finding]:
    """Whether images and label maps are left out, which mmseg does in silence."""
    dataset = source.dataset
    suffix, map_suffix = dataset.img_suffix, dataset.seg_map_suffix
    root, map_root = os.path.abspath(folder), os.path.abspath(map_folder)
    known = _image_suffixes()
    all_maps = _list_files(map_folder, map_suffix)
    files = _list_files(folder)

    def map_of(path: str, end: str) -> str:
        return map_root + path[len(root) : len(path) - len(end)] + map_suffix

    # Another data set of the split may read the images of another suffix.
    leaves = datasets_of(source.cfg, source.split)
    read = (suffix, *(x.get('img_suffix', suffix) for _, x in leaves))
    lonely = all_maps - {map_of(x, y) for x in files for y in read if x.endswith(y)}
    # A suffix may have more than the type of the file, such as '_leftImg8bit.png'.
    words = suffix.rpartition('.')[0]
    left_out = {}
    for path in files - all_maps:
        kind = os.path.splitext(path)[1]
        if kind.lower() in known and not path.endswith(read):
            end = words + kind
            left_out[path] = map_of(path, end) if path.endswith(end) else None
    pairs = {path for path, label_map in left_out.items() if label_map in lonely}
    what = f'images in {folder} do not end in {suffix} and are left out'
    yield from several(
        f'{what}, though they have a label map',
        sorted(relative(Path(path), folder) for path in pairs),
        f'Give all images one suffix, that of img_suffix of {source.key}, or read the '
        'others as a second data set of a ConcatDataset.',
    )
    # Folders within each other hold files of several kinds.
    if os.path.commonpath([root, map_root]) not in (root, map_root):
        yield from several(
            what,
            sorted(relative(Path(path), folder) for path in left_out.keys() - pairs),
            f'Check img_suffix of {source.key}.',
            fatal=False,
        )
    lonely -= {left_out[path] for path in pairs}
    yield from several(
        f'label maps in {map_folder} have no image in {folder}',
        sorted(relative(Path(path), map_folder) for path in lonely),
        f'Add the images. Check img_suffix of {source.key}.',
        # The label maps of training and validation may lie in one folder.
        fatal=source.num_images is not None,
    )


# How label maps are read.


class _Reading(NamedTuple):
    """How a pipeline reads label maps.

    Attributes:
        backend (str): What decodes them, by mmcv's name.
        is_known (bool): Whether all transforms are OpenMMLab's or ours. Others may
            change labels.
        turns_images (bool): Whether images are turned as their EXIF data say.
        has_one_size (bool): Whether images and label maps are resized to a fixed size.
    """

    backend: str
    is_known: bool
    turns_images: bool
    has_one_size: bool


def _reading_of(pipeline: Any) -> Optional[_Reading]:
    """How a pipeline reads label maps. None if mmseg's transform does not read them."""
    from mmseg.registry import TRANSFORMS

    steps = [step for step in parts_of(pipeline) if 'type' in step]
    kinds = [
        TRANSFORMS.get(x['type']) if isinstance(x['type'], str) else x['type']
        for x in steps
    ]
    loads = list(map(loads_label_maps, kinds))
    if not any(loads):
        return None
    first = loads.index(True)
    backend = steps[first].get('imdecode_backend', 'pillow')
    # Others read files that Pillow may not know.
    if backend not in ('pillow', 'cv2'):
        return None
    packages = {x.__module__.partition('.')[0] for x in kinds if x is not None}
    images = [step for step in steps if 'LoadImage' in str(kind_of(step))]
    return _Reading(
        backend=backend,
        is_known=packages <= _OPENMMLAB,
        turns_images=all(
            x.get('color_type', 'color') in ('color', 'grayscale') for x in images
        ),
        has_one_size=any(
            kind_of(step) == 'Resize' and not step.get('keep_ratio')
            for step in steps[first:]
        ),
    )


def _image_size(path: Path, reading: _Reading) -> Optional[Tuple[int, int]]:
    """Width and height of an image as the pipeline reads it; None if unknown."""
    try:
        with open_image(path) as image:
            return image_size(image) if reading.turns_images else image.size
    # Something else may read what Pillow cannot.
    except Exception:
        return None


def _fits(map_size: Tuple[int, ...], size: Tuple[int, int], reading: _Reading) -> bool:
    """Whether a label map fits to its image after resizing."""
    alike = size[0] * map_size[1] == size[1] * map_size[0]
    return map_size == size or (alike and reading.has_one_size)


def _decode(path: Path, backend: str) -> Tuple[np.ndarray, str, str]:
    """The values of a label map, its format and its mode."""
    import mmcv

    with open_image(path) as image:
        # As mmcv's 'pillow' does. This also finds files that are cut off.
        values = np.array(image)
        kind, mode = str(image.format), image.mode
    if backend != 'pillow':
        values = mmcv.imread(path, 'unchanged', backend=backend)
    return values, kind, mode


def _problem_of_values(
    values: np.ndarray, kind: str, mode: str
) -> Optional[Tuple[str, str]]:
    """What is wrong with the values of any label map, and the fix."""
    png = 'Write PNG files of one 8-bit channel with numbers of classes'
    if values.ndim != 2 and mode in ('1', 'P'):
        fix = "Leave imdecode_backend of LoadAnnotations out: 'pillow' reads numbers."
        return 'have a label map with a palette, which OpenCV turns into colours', fix
    if values.ndim != 2:
        fix = f'{png}: convert each colour to the number of its class.'
        return f'have a label map that is not of one channel (mode {mode})', fix
    # mmseg converts them so.
    if values.dtype != np.uint8 and (values.astype(np.uint8) != values).any():
        return 'have a label map with values that do not fit into 8 bits', f'{png}.'
    if kind == 'JPEG':
        fix = f'{png}, from the original labels.'
        return 'have a label map that is a JPEG file, which changes labels', fix
    return None


def _labels_of_values(dataset: Any) -> np.ndarray:
    """What mmseg's LoadAnnotations makes of each value of a label map's pixels."""
    labels = np.arange(_NUM_VALUES)
    if dataset.reduce_zero_label:
        labels -= 1
        labels[[0, -1]] = _IGNORED_LABEL
    new = dataset.label_map or {}
    return np.array([new.get(label, label) for label in labels.tolist()])


def likely_cause(
    histogram: np.ndarray, num_classes: int, reduce_zero_label: bool
) -> Optional[str]:
    """Why label maps may have other values than numbers of classes.

    Args:
        histogram (np.ndarray): Number of pixels of each value, (256,).
        num_classes (int): Number of classes in the files.
        reduce_zero_label (bool): Whether 0 is unlabelled, and 1 the first class.

    Returns:
        str | None: The likely cause and what to do; None if there is no likely one.
    """
    values = np.flatnonzero(histogram).tolist()
    labelled = {*values} - {_IGNORED_LABEL}
    first, last = int(reduce_zero_label), num_classes - 1 + int(reduce_zero_label)
    above = [value for value in labelled if value > last]
    shown = ', '.join(map(str, values[:5])) + (', ...' if len(values) > 5 else '')
    zero = ' and set reduce_zero_label=False' if reduce_zero_label else ''
    is_apart = len(values) > 1 and min(np.diff(values)) >= 10
    # Of several classes, some images may have one, and 255 where nothing is labelled.
    is_binary = values == [0, _IGNORED_LABEL] and num_classes <= 2
    if is_binary or (is_apart and above and len(values) == 2):
        return f'Values {values[0]} and {values[1]}: is a binary mask saved as a ' + (
            f'picture? Write 0 and 1{zero}.'
        )
    if is_apart and above:
        return (
            f'Values {shown}: are classes saved as shades of grey? Write their numbers '
            f'from {first} to {last}.'
        )
    if len(above) > 16 and max(above) > 200:
        return (
            f'{len(values)} values: JPEG files and smooth resizing change labels. '
            'Write PNG files of the original labels, or resize to the nearest pixel.'
        )
    if above == [num_classes] and 0 not in labelled:
        return (
            f'Labels from {min(labelled)} to {num_classes}: set reduce_zero_label=True '
            'if 0 is no class, or subtract 1.'
        )
    if above == [num_classes]:
        return (
            f'Labels from 0 to {num_classes}: set reduce_zero_label=True if 0 is no '
            'class. Else there is one class more: add it to metainfo.classes.'
        )
    if reduce_zero_label and not above and labelled == {*range(num_classes)}:
        return (
            f'Labels from 0 to {num_classes - 1}: is 0 a class? Then set '
            'reduce_zero_label=False. True leaves the pixels of 0 out.'
        )
    return None


# What label maps hold.


class _LabelMaps:
    """The label maps of a data set, and what was seen of them.

    Args:
        pairs (dict[Path, Path]): Label maps by image.
        folder (Path): The folder of the images.
        map_folder (Path): The folder of the label maps.
        source (Source): The data set.
    """

    def __init__(
        self, pairs: Mapping[Path, Path], folder: Path, map_folder: Path, source: Source
    ) -> None:
        dataset, heads = source.dataset, [*parts_of(source.cfg.get('model'))]
        self.pairs, self.source = pairs, source
        self.folder, self.map_folder = folder, map_folder
        self.reading = _reading_of(source.config.get('pipeline'))
        self.is_known = self.reading is not None and self.reading.is_known
        # Another data set of a ConcatDataset may have what this one lacks.
        self.is_all = self.is_known and '.datasets.' not in source.key
        names = dataset.metainfo.get('classes') or range(source.num_classes or 0)
        self.classes = tuple(map(str, names))
        # One class may be a sigmoid: 0 is the background, and 1 the class.
        self.num_labels = max(len(self.classes), 2) if self.classes else _NUM_VALUES
        self.num_in_files = len(dataset.label_map or range(self.num_labels))
        self.labels = _labels_of_values(dataset)
        # Heads that predict masks learn one class from its masks alone.
        has_queries = any('num_queries' in head for head in heads)
        num_needed = len(self.classes) if has_queries else self.num_labels
        self.num_needed = min(num_needed, 2)
        # mmseg does not use ignore_index of the data set.
        ignored = {head['ignore_index'] for head in heads if 'ignore_index' in head}
        ignored = {_IGNORED_LABEL, *ignored} - {None}
        is_ignored = np.isin(self.labels, list(ignored))
        self.is_outside = (self.labels >= self.num_labels) & ~is_ignored
        self.is_class = (self.labels < self.num_labels) & ~is_ignored

        self.lock = Lock()
        self.looked = 0
        self.pixels = np.zeros(_NUM_VALUES, np.int64)
        self.images_with = np.zeros(_NUM_VALUES, np.int64)
        self.outside: List[str] = []
        self.unlabelled: List[str] = []
        self.is_countable = True

    def look_at(self, image: Path) -> Optional[Problem]:
        """Whether the label map of an image is a file with something in it."""
        return self._unreadable(image, file_problem(self.pairs[image]))

    def _unreadable(self, image: Path, problem: Optional[str]) -> Optional[Problem]:
        name = relative(self.pairs[image], self.folder)
        return Problem(_UNREADABLE, f'{name} {problem}') if problem else None

    def look_into(self, image: Path) -> Optional[Problem]:
        """What is wrong with the label map of an image; counts its labels if nothing.

        Labels that are no class are counted, too.
        """
        reading, path = self.reading, self.pairs[image]
        if reading is None:
            return self.look_at(image)
        decoded, problem = try_decoding(path, lambda: _decode(path, reading.backend))
        if problem is not None:
            return self._unreadable(image, problem)
        with self.lock:
            self.looked += 1
        values, kind, mode = decoded
        name, size = relative(image, self.folder), _image_size(image, reading)
        if size is not None and not _fits(values.shape[1::-1], size, reading):
            other = 'have another size than their label map'
            return Problem(other, name, _LABEL_FIX, self.is_known)
        wrong = _problem_of_values(values, kind, mode)
        if wrong is not None:
            self.is_countable = False
            return Problem(wrong[0], name, wrong[1], self.is_known)
        self._count(image, values.astype(np.uint8))
        return None

    def _count(self, image: Path, values: np.ndarray) -> None:
        pixels = np.bincount(values.ravel(), minlength=_NUM_VALUES)
        with self.lock:
            self.pixels += pixels
            self.images_with += pixels > 0
        if pixels[self.is_outside].any():
            self.outside.append(relative(self.pairs[image], self.map_folder))
        elif not pixels[self.is_class].any():
            self.unlabelled.append(relative(image, self.folder))

    def check_sample(self, images: Sequence[Path]) -> Iterator[Finding]:
        """Look into a few label maps, and into more of them if they look odd."""
        if not images or self.reading is None:
            return
        places = np.unique(np.linspace(0, len(images) - 1, _SAMPLE).astype(int))
        some = [images[i] for i in places]
        title = f'Looking into {self.map_folder}'
        problems = find_problems(some, self.look_into, title)
        # Training may skip a few files that cannot be read.
        if len(problems) < len(some) or any(x.kind != _UNREADABLE for x in problems):
            problems = [x for x in problems if x.kind != _UNREADABLE]
        what = f'of the {len(some)} images looked into in {self.folder}'
        yield from as_findings(problems, what)
        is_good = not problems and not self.outside
        if self.is_all and is_good and self._seem_useless():
            rest = [images[i] for i in sorted({*range(len(images))} - {*places})]
            find_problems(rest, self._look_for_classes, title)

    def _look_for_classes(self, image: Path) -> None:
        if self._seem_useless():
            self.look_into(image)

    def _seem_useless(self) -> bool:
        """Whether nothing can be learnt from the labels that were seen."""
        return len(self._labels_seen()) < self.num_needed

    def _labels_seen(self) -> List[int]:
        return np.unique(self.labels[self.is_class & (self.pixels > 0)]).tolist()

    def check_labels(self) -> Iterator[Finding]:
        """Whether the labels that were seen are those of the classes."""
        source, dataset = self.source, self.source.dataset
        if not self.looked or not self.classes or not self.pixels.any():
            return
        cause = likely_cause(self.pixels, self.num_in_files, dataset.reduce_zero_label)
        fix = cause or _LABEL_FIX
        maps = f'{self.looked} label maps looked into in {self.map_folder}'
        if self.outside:
            values = np.flatnonzero(self.is_outside & (self.pixels > 0))
            numbers = [f'{value} in {self.pixels[value]} pixels' for value in values]
            last = self.num_in_files - 1 + int(dataset.reduce_zero_label)
            what = f'of the {maps} have labels above {last} ({examples(numbers)})'
            self.is_countable = False
            yield from several(what, sorted(self.outside), fix, self.is_known)
        elif self.is_countable:
            yield from self._check_classes(maps, cause)
        if source.look == PIXELS and self._labels_seen():
            what = f'images in {self.folder} have no labelled pixel'
            yield from several(what, sorted(self.unlabelled), _LABEL_FIX, fatal=False)

    def _check_classes(self, maps: str, cause: Optional[str]) -> Iterator[Finding]:
        """Whether nothing can be learnt, or a class is lacking for a known cause."""
        source, seen, name = self.source, self._labels_seen(), ''
        is_fatal = source.split == 'train' and not source.cfg.get('allow_empty_classes')
        if self._seem_useless():
            name = f'Only label {seen[0]}' if seen else 'No label'
            is_fatal = is_fatal or cause is not None
        elif cause is not None and self._lacks_last():
            name = f'No pixel of class {self.classes[-1]}'
        is_fatal = is_fatal and self.is_all
        if name and (is_fatal or cause or not seen):
            self.is_countable = not is_fatal
            fix = cause or _LABEL_FIX
            if is_fatal and not cause:
                fix += ' With allow_empty_classes = True in the config a run starts.'
            yield Finding(f'{name} is in the {maps}', fix, is_fatal)

    def _lacks_last(self) -> bool:
        """Whether the class of the highest label is in none of all label maps."""
        dataset = self.source.dataset
        is_all = self.source.look == PIXELS or len(self.pairs) <= _SAMPLE
        is_last = dataset.reduce_zero_label and dataset.label_map is None
        return is_all and is_last and len(self.classes) - 1 not in self._labels_seen()

    def counts(self, num_images: int) -> ClassCounts:
        """How often each class was seen."""
        is_countable = self.is_known and self.is_countable and self.pixels.any()
        if self.source.look != PIXELS or not is_countable:
            return ClassCounts(num_images, self.classes, 'pixels')
        return ClassCounts(
            images=num_images,
            classes=self.classes,
            unit='pixels',
            numbers=self._of_classes(self.pixels),
            images_with=self._of_classes(self.images_with),
        )

    def _of_classes(self, numbers: np.ndarray) -> List[int]:
        """Sums by class of numbers for each value in the files."""
        found = np.zeros(_NUM_VALUES, np.int64)
        np.add.at(found, self.labels, numbers)
        if len(self.classes) == 1:
            return [int(found[1] or found[0])]
        return found[: len(self.classes)].tolist()
