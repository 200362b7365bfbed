# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Whether images of the training are measured again in validation or testing."""

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from multiprocessing.pool import ThreadPool
from typing import Any, Dict, List, Tuple

from ..utils.archives import file_size, locate, open_file
from .source import NAMES, Finding, Source, progress, several

_END, _CHUNK = 4096, 2**20


def check_shared_images(sources: Sequence[Source]) -> Iterator[Finding]:
    """Find images of the training that are also in another split.

    They are the same path, or, unless names alone are looked at, files of the same
    content. Copies within a split are not reported, nor those of validation and
    testing, which are often the same data set. Subsets of one folder are left out: data
    sets with ``indices``, and those below a ``KFoldDataset``.

    Args:
        sources (list[Source]): The data sets of all splits, with their ``images``.

    Yields:
        Finding: A warning for each other split.
    """
    splits: Dict[str, List[str]] = defaultdict(list)
    for source in sources:
        if not (source.folded or source.config.get('indices') is not None):
            splits[source.split] += map(str, source.images)
    train = splits.pop('train', [])
    for split, images in splits.items():
        pairs = _same_path(images, train)
        if sources[0].look != NAMES:
            known = {image for image, _ in pairs}
            others = [image for image in images if image not in known]
            pairs += _same_content(others, train, f'Comparing images of {split}')
        yield from several(
            f'images of {split} are also in train',
            [x if x == other else f'{x} = {other}' for x, other in pairs],
            f'Take them out of train or {split}: {split} would measure what the model '
            f'was trained on. If they are all images of {split}, check data_prefix and '
            f'ann_file of {split}_dataloader.',
            fatal=False,
        )


def _same_path(images: Iterable[str], others: Iterable[str]) -> List[Tuple[str, str]]:
    """Pairs of paths of one file. Links of folders are followed."""
    real = lru_cache(None)(os.path.realpath)

    def resolved(paths: Iterable[str]) -> Iterator[Tuple[str, str]]:
        for path in paths:
            folder, name = os.path.split(path)
            whole = real(folder)
            yield (path if whole == folder else os.path.join(whole, name)), path

    known = dict(resolved(images))
    return [(known[key], path) for key, path in resolved(others) if key in known]


def _same_content(
    images: List[str], others: List[str], what: str
) -> List[Tuple[str, str]]:
    """Pairs of files of the same content, each of the images with one other.

    Reading all files would take long: few of the same size have the same end, and most
    of these are copies.
    """
    pairs: List[Tuple[str, str]] = []
    for key in (_size, _end, _digest):
        keys = list(_map(key, images + others, what))
        ours, theirs = keys[: len(images)], keys[len(images) :]
        both = {*ours} & {*theirs} - {None}
        first = dict(zip(reversed(theirs), reversed(others)))
        pairs = [(x, first[k]) for k, x in zip(ours, images) if k in both]
        images = [image for image, _ in pairs]
        others = [x for k, x in zip(theirs, others) if k in both]
    return pairs


def _map(key: Any, paths: List[str], what: str) -> Iterator[Any]:
    def attempt(path: str) -> Any:
        try:
            return key(path)
        except (OSError, ValueError):
            return None

    with ThreadPool() as pool:
        found = pool.imap(attempt, paths, chunksize=64)
        yield from progress(found, what, len(paths))


def _size(path: str) -> Any:
    if locate(path) is not None:
        return file_size(path) or None
    info = os.stat(path)
    # Reading a pipe or device may never end.
    return info.st_size if stat.S_ISREG(info.st_mode) and info.st_size else None


def _end(path: str) -> Any:
    with open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END))
        return size, hashlib.blake2b(file.read(_END), digest_size=16).digest()


def _digest(path: str) -> Any:
    digest = hashlib.blake2b()
    with open_file(path) as file:
        for chunk in iter(lambda: file.read(_CHUNK), b''):
            digest.update(chunk)
    return digest.digest()
