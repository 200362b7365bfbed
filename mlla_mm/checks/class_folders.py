# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Class folders and lists of images, as mmpretrain reads them."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from mmengine.fileio import list_from_file

from ..utils.archives import scan_folder
from ..utils.files import file_problem
from .image_files import check_images
from .source import (
    ClassCounts,
    Finding,
    Source,
    examples,
    read_ann_file,
    require,
    require_folder,
    require_none,
    require_text,
    several,
    subset,
)

_LAYOUT = 'Lay the images out as FOLDER/CLASS/IMAGE.'
_POSITIONS = 'Labels are the positions of the folders in their sorted list.'
# Folders that NAS, Windows, macOS, Linux and Python make. Others begin with a dot.
_OF_PROGRAMS = {
    '@eadir',
    '@recently-snapshot',
    '@recycle',
    '#recycle',
    '#snapshot',
    '$recycle.bin',
    'system volume information',
    '__macosx',
    '__pycache__',
    'lost+found',
}
_SPLITS = {'train', 'training', 'val', 'valid', 'validation', 'test', 'testing'}
_EXTENSIONS = (
    *('.avif', '.bmp', '.gif', '.heic', '.heif', '.jfif', '.jp2', '.jpe', '.jpeg'),
    *('.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp'),
)
_LOST_FRACTION = 0.1


class _Samples(NamedTuple):
    """The samples of a data set, in the order of mmpretrain.

    Attributes:
        images (list[str]): Paths from the folder.
        labels (list[int]): Empty without labels.
        findings (list[Finding]): What is wrong.
    """

    images: List[str]
    labels: List[int]
    findings: List[Finding]


def check_folders(source: Source) -> Iterator[Finding]:
    dataset, folder = source.dataset, Path(source.dataset.img_prefix)
    require_folder(folder, source)
    require_text(source)
    read = _read_list if dataset.ann_file else _read_folders
    samples = read(folder, source)
    yield from samples.findings
    read_files = ', '.join(sorted(dataset.extensions))
    fix = f'Check data_root and data_prefix of {source.key}. {_LAYOUT}'
    require(samples.images, f'No images ({read_files}) in {folder}', fix)
    names = subset(samples.images, source)
    images = [os.path.join(dataset.img_prefix, name) for name in names]
    # Else the numbers would only repeat what is wrong.
    if not any(finding.fatal for finding in samples.findings):
        labels = samples.labels and subset(samples.labels, source)
        source.counts = _count(len(images), labels, source)
    yield from check_images(images, folder, source, listed=not dataset.ann_file)


def _count(images: int, labels: List[int], source: Source) -> ClassCounts:
    names: Sequence[Any] = source.dataset.metainfo.get('classes') or ()
    if not names and not source.dataset.ann_file:
        names = tuple(source.folder_labels)
    counted = Counter(labels)
    classes = names or range(source.num_classes or max(counted, default=-1) + 1)
    numbers = [counted[label] for label in range(len(classes))] if labels else None
    return ClassCounts(images, tuple(map(str, classes)), 'images', numbers)


def _num_classes(source: Source) -> Optional[int]:
    classes = source.dataset.metainfo.get('classes')
    return len(classes) if classes else source.num_classes


# Folders.


class _Listing(NamedTuple):
    """What is in a folder, as mmpretrain lists it. Paths are from the folder.

    Attributes:
        folder (Path): The folder.
        images (dict[str, list[str]]): Images that are read, by class folder in the
            order of labels. Without labels: all of them, under ''.
        unread (dict[str, list[str]]): Other files with names of images.
        beside (list[str]): Images beside the class folders.
    """

    folder: Path
    images: Dict[str, List[str]]
    unread: Dict[str, List[str]]
    beside: List[str]


_Rule = Callable[[_Listing, Source], Iterator[Finding]]


def _read_folders(folder: Path, source: Source) -> _Samples:
    listing = _list(folder, source)
    rules: Sequence[_Rule] = _RULES_WITHOUT_LABELS
    if source.dataset.with_label:
        require(listing.images, f'No class folders in {folder}', _LAYOUT)
        _require_classes(listing, source)
        source.folder_labels = {name: i for i, name in enumerate(listing.images)}
        rules = _RULES
    images = [name for found in listing.images.values() for name in found]
    labels = [
        label
        for label, found in enumerate(listing.images.values())
        for _ in found
        if source.dataset.with_label
    ]
    findings = [finding for rule in rules for finding in rule(listing, source)]
    return _Samples(images, labels, findings)


def _list(folder: Path, source: Source) -> _Listing:
    # An own choice of extensions may leave out masks that lie beside the images.
    chosen = 'extensions' in source.config
    is_valid = source.dataset.is_valid_file
    listing = _Listing(folder, {}, {}, [])
    entries = sorted(scan_folder(folder), key=lambda entry: entry.name)
    parts = [('', folder)]
    if source.dataset.with_label:
        parts = [(x.name, folder / x.name) for x in entries if x.is_dir()]
        listing.beside.extend(
            x.name
            for x in entries
            if is_valid(x.name) and not x.name.startswith('.') and x.is_file()
        )
    for part, path in parts:
        images = listing.images[part] = []
        unread = listing.unread[part] = []
        for name, is_file in _files_below(path, f'{part}/' if part else ''):
            if is_valid(name):
                (images if is_file else unread).append(name)
            elif name.lower().endswith(_EXTENSIONS) and not chosen:
                unread.append(name)
        images.sort()
        # The same image in another format is not lost.
        stems = {os.path.splitext(name)[0] for name in images if unread}
        unread[:] = sorted(x for x in unread if os.path.splitext(x)[0] not in stems)
    return listing


def _files_below(folder: Any, prefix: str) -> Iterator[Tuple[str, bool]]:
    """Paths of all that is no folder, and whether it is a file.

    As MMEngine's ``list_dir_or_file`` does, it leaves out hidden files, but not hidden
    folders, and follows links.
    """
    for entry in scan_folder(folder):
        if entry.is_dir():
            yield from _files_below(entry.path, f'{prefix}{entry.name}/')
        elif not entry.name.startswith('.'):
            yield f'{prefix}{entry.name}', entry.is_file()


def _require_classes(listing: _Listing, source: Source) -> None:
    """End the check if the folders in data_prefix hold the class folders."""
    names = [name for name in listing.images if not _is_of_program(name)]
    meant, what = None, ''
    if len(names) == 1 and (_num_classes(source) or 0) > 1:
        what = 'has one class folder, with folders in it'
        paths = listing.images[names[0]]
        common = os.path.commonpath(map(os.path.dirname, paths)) if paths else ''
        # Several folders with images, and no image beside them
        if paths and all(x.count('/') > common.count('/') + 1 for x in paths):
            meant = common
    elif all(x.lower() in _SPLITS and _inner_folders(listing, x)[1:] for x in names):
        what = 'has the splits as class folders'
        own = [name for name in names if name.lower().startswith(source.split)]
        meant = next(iter(own + names), None)
    if meant is not None:
        root = source.dataset.data_root or '.'
        prefix = os.path.relpath(listing.folder / meant, root)
        fix = f'Set data_prefix of {source.key} to {examples([repr(prefix)])}.'
        require(False, f'{listing.folder} {what}: {examples(names)}', fix)


def _check_folders_of_programs(listing: _Listing, source: Source) -> Iterator[Finding]:
    remove = 'Remove them, or move them elsewhere.'
    yield from several(
        f'folders in {listing.folder} are no classes, but get a label',
        [name for name in listing.images if _is_of_program(name)],
        f'{remove} {_POSITIONS}',
    )
    first = 1 if source.dataset.with_label else 0
    yield from several(
        f'images in {listing.folder} are of a program, but are used',
        [
            name
            for names in listing.images.values()
            for name in names
            if name.count('/') > first
            and any(map(_is_of_program, name.split('/')[first:-1]))
        ],
        remove,
        fatal=False,
    )


def _check_number(listing: _Listing, source: Source) -> Iterator[Finding]:
    names, count = list(listing.images), _num_classes(source)
    if count not in (None, len(names)) and not any(map(_is_of_program, names)):
        yield from several(
            f'class folders in {listing.folder}, but {count} classes in the config',
            names,
            'Set num_classes of the model, or mend the folders: a class without images '
            f'has an empty one. {_POSITIONS}',
        )


def _check_names(listing: _Listing, source: Source) -> Iterator[Finding]:
    yield from _check_positions(source)
    classes = source.dataset.metainfo.get('classes')
    names = list(listing.images)
    if not classes or len(classes) != len(names):
        return
    known = set(map(_plain, classes))
    others = [name for name in names if _plain(name) not in known]
    if len(others) < len(names):
        what = f'class folders in {listing.folder} are not in metainfo.classes'
        fix = f'Name them as in metainfo.classes of {source.key}.'
        yield from several(what, others, fix, fatal=False)
    elif all(map(str.isdecimal, names)) and names != sorted(names, key=int):
        yield Finding(
            f'class folders in {listing.folder} are numbers, and are not sorted as '
            f'numbers: {examples(names)}',
            f'Write them with leading zeros. {_POSITIONS}',
            fatal=False,
        )


def _check_positions(source: Source) -> Iterator[Finding]:
    """Whether a class folder has the label of its name in the config."""
    classes = list(map(_plain, source.dataset.metainfo.get('classes') or ()))
    where = {name: label for label, name in enumerate(classes)}
    wrong = [
        f'{name} has label {label}, and is metainfo.classes[{where[_plain(name)]}]'
        for name, label in source.folder_labels.items()
        if _plain(name) in where
        and not (label < len(classes) and classes[label] == _plain(name))
    ]
    what = f'class folders of {source.key} have the label of another name'
    fix = f'Sort metainfo.classes as the labels. {_POSITIONS}'
    if source.dataset.ann_file:
        fix = f'Mend {source.dataset.ann_file}, or sort metainfo.classes as its labels.'
    yield from several(what, wrong, fix)


def _check_nested(listing: _Listing, source: Source) -> Iterator[Finding]:
    """Whether a class folder is a folder of class folders."""
    found = {name: _inner_folders(listing, name) for name in listing.images}
    yield from several(
        f'class folders in {listing.folder} have only folders with images, and each '
        'is one class',
        [f'{x} ({", ".join(inner[:2])})' for x, inner in found.items() if inner[1:]],
        f'If the inner folders are the classes: {_LAYOUT}',
        fatal=False,
    )


def _check_beside(listing: _Listing, source: Source) -> Iterator[Finding]:
    what = f'images in {listing.folder} lie beside the class folders, and are not read'
    yield from several(what, listing.beside, _LAYOUT, fatal=False)


def _check_unread(listing: _Listing, source: Source) -> Iterator[Finding]:
    """Whether images are left out, as mmpretrain does without a word."""
    lost = [name for names in listing.unread.values() for name in names]
    total = len(lost) + sum(map(len, listing.images.values()))
    fatal = len(lost) > _LOST_FRACTION * total or any(
        names and not listing.images[part] for part, names in listing.unread.items()
    )
    is_valid = source.dataset.is_valid_file
    problems = [f'{x} {file_problem(listing.folder / x)}' for x in lost if is_valid(x)]
    what = f'images in {listing.folder} cannot be read, and are left out'
    yield from several(what, problems, 'Replace them, or remove them.', fatal)
    names = [name for name in lost if not is_valid(name)]
    extensions = sorted({Path(name).suffix.lower() for name in names})
    default = sorted(source.dataset.extensions)
    yield from several(
        f'images in {listing.folder} are left out, because of their extension',
        names,
        f'Convert them, or set extensions of {source.key} to '
        f'{[*default, *extensions]}. To leave them out, set it to {default}.',
        fatal,
    )


_RULES_WITHOUT_LABELS = (_check_folders_of_programs, _check_unread)
_RULES = (
    _check_folders_of_programs,
    _check_unread,
    _check_number,
    _check_names,
    _check_nested,
    _check_beside,
)


def _is_of_program(folder: str) -> bool:
    return folder.startswith('.') or folder.lower() in _OF_PROGRAMS


def _plain(name: Any) -> str:
    return str(name).casefold().replace('_', ' ')


def _inner_folders(listing: _Listing, name: str) -> List[str]:
    """The folders in a class folder, if all of its images are in them."""
    paths = listing.images[name]
    if not all(path.count('/') > 1 for path in paths):
        return []
    inner = {path.split('/')[1] for path in paths}
    return sorted(x for x in inner if not _is_of_program(x))


# Lists.


def _read_list(folder: Path, source: Source) -> _Samples:
    path, with_label = source.dataset.ann_file, source.dataset.with_label
    form = 'IMAGE LABEL' if with_label else 'IMAGE'
    fix = f'Mend {path}: its lines are {form}.'
    read_ann_file(source, fix)
    lines = list_from_file(path)
    if not with_label:
        wrong = [f'line {i}' for i, line in enumerate(lines, 1) if not line.strip()]
        require_none(f'lines of {path} are empty', wrong, fix)
        return _Samples(lines, [], [])
    count = _num_classes(source) or math.inf
    pairs = [line.strip().rpartition(' ') for line in lines]
    wrong = [
        f'line {i}'
        for i, (name, _, label) in enumerate(pairs, 1)
        if not (name and label.isdecimal() and int(label) < count)
    ]
    what = form if count == math.inf else f'a label from 0 to {count - 1}'
    require_none(f'lines of {path} without {what}', wrong, fix)
    images, labels = [name for name, _, _ in pairs], [int(x) for *_, x in pairs]
    source.folder_labels = _labels_of_folders(images, labels)
    return _Samples(images, labels, list(_check_positions(source)))


def _labels_of_folders(images: List[str], labels: List[int]) -> Dict[str, int]:
    """Labels of the class folders in a list; empty if its folders are no classes.

    Dates, for example, are not: each class has several, or a folder several classes.
    """
    common = os.path.commonprefix([min(images), max(images)])
    start = common.rfind('/') + 1
    found: Dict[str, int] = {}
    for image, label in zip(images, labels):
        name, slash, _ = image[start:].partition('/')
        if not slash or found.setdefault(name, label) != label:
            return {}
    return found if len(set(found.values())) == len(found) else {}


# Several data sets.


def check_same_classes(sources: Sequence[Source]) -> Iterator[Finding]:
    """Whether class folders have the same label in all data sets."""
    known: Dict[str, Tuple[int, str]] = {}
    first: Optional[Source] = None
    for source in sources:
        labels = source.folder_labels
        if labels and not source.dataset.ann_file:
            first = first or source
            if labels.keys() != first.folder_labels.keys():
                yield from _different_folders(first, source)
                continue
        yield from several(
            'class folders have two labels',
            [
                f'{name} is {known[name][0]} in {known[name][1]} and {label} in '
                f'{source.key}'
                for name, label in labels.items()
                if known.get(name, (label,))[0] != label
            ],
            'Give a class the same label in all lists. In class folders, labels are '
            'the positions in the sorted list.',
        )
        for name, label in labels.items():
            known.setdefault(name, (label, source.key))


def _different_folders(a: Source, b: Source) -> Iterator[Finding]:
    one, other = sorted(a.folder_labels), sorted(b.folder_labels)
    names = (a.split, b.split) if a.split != b.split else (a.key, b.key)
    yield from several(
        f'class folders are in only one of {names[0]} and {names[1]}',
        sorted({*one} ^ {*other}),
        f'Name the folders of both alike. {_POSITIONS}',
        # Labels differ unless one list only ends earlier than the other.
        fatal=any(x != y for x, y in zip(one, other)),
    )
