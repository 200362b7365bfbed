# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Whether the images of a data set are there, and can be read."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Set, TypeVar, Union

from ..utils.archives import is_folder, scan_folder
from ..utils.files import file_problem
from ..utils.images import image_problem
from .source import NAMES, PIXELS, Finding, Source, progress, require_folder, several

_Path = TypeVar('_Path', str, Path, Union[str, Path])


class Problem(NamedTuple):
    """What is wrong with an image: said of several images, an example, and the fix."""

    kind: str
    example: str
    fix: str = 'Replace them, or take them out of the data set.'
    fatal: bool = True


def check_images(
    images: Sequence[Union[str, Path]],
    folder: Path,
    source: Source,
    check: Optional[Callable[[Path], Optional[Problem]]] = None,
    listed: bool = False,
) -> Iterator[Finding]:
    """Whether images exist, are as many as expected, and pass a check of each image.

    Args:
        images (list[str | Path]): The images of the data set. To make a million paths
            takes seconds, and names alone do not need them.
        folder (Path): The folder that has them.
        source (Source): The data set.
        check (callable, optional): Says what is wrong with an image; called in threads,
            as decoding releases the GIL. By default it is :func:`unreadable`.
        listed (bool): Whether the images were found in the folder, so that they exist.
            Defaults to False.
    """
    require_folder(folder, source)
    where = f'Check data_root and data_prefix of {source.key}.'
    if os.path.isfile(source.dataset.ann_file):
        where = f'{where} Names of images are read from {source.dataset.ann_file}.'
    if source.num_images not in (None, len(images)):
        number = f'{len(images)} images in {folder}, expected {source.num_images}'
        yield Finding(number, where)
    missing = set() if listed else set(missing_files(images))
    names = [relative(path, folder) for path in images if path in missing]
    yield from several(f'images are not in {folder}', names, where)
    source.images = [path for path in images if path not in missing]
    if source.look == NAMES:
        return
    check = check or partial(unreadable, folder=folder, source=source)
    problems = find_problems(source.images, check, f'Checking {folder}')
    yield from as_findings(problems, f'images in {folder}')


def find_problems(
    paths: Sequence[Union[str, Path]],
    check: Callable[[Path], Optional[Problem]],
    title: str,
) -> List[Problem]:
    """What a check of each image finds; it is called in threads."""
    with ThreadPool() as pool:
        found = pool.imap(check, map(Path, paths), chunksize=16)
        return [x for x in progress(found, title, len(paths)) if x is not None]


def as_findings(problems: Iterable[Problem], what: str) -> Iterator[Finding]:
    """One finding for all problems of a kind."""
    kinds: Dict[str, List[Problem]] = defaultdict(list)
    for problem in problems:
        kinds[problem.kind].append(problem)
    for kind, alike in kinds.items():
        names = [problem.example for problem in alike]
        yield from several(f'{what} {kind}', names, alike[0].fix, alike[0].fatal)


def unreadable(path: Path, folder: Path, source: Source) -> Optional[Problem]:
    """Why an image cannot be read, as closely as the check looks; None if it can."""
    if source.look == PIXELS and source.backend is not None:
        problem = image_problem(path, source.backend)
    else:
        problem = file_problem(path)
    if problem is None:
        return None
    return Problem('cannot be read', f'{relative(path, folder)} {problem}')


def missing_files(paths: Iterable[_Path]) -> List[_Path]:
    """The paths of a list at which there is no file."""

    # A look into each folder once: a file system over a network answers slowly.
    @lru_cache(None)
    def names(folder: str) -> Set[str]:
        folder = folder or '.'
        return {x.name for x in scan_folder(folder)} if is_folder(folder) else set()

    def exists(path: _Path) -> bool:
        folder, name = os.path.split(path)
        return name in names(str(folder))

    return [path for path in paths if not exists(path)]


def relative(path: Union[str, Path], folder: Path) -> str:
    """A path as it is seen from a folder, with slashes."""
    return Path(os.path.relpath(path, folder)).as_posix()
