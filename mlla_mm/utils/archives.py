# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Files in tar archives, by paths as if the archive were a folder.

``data/train.tar/n01440764/1.JPEG`` is the member ``n01440764/1.JPEG`` of the file
``data/train.tar``. A path that leads into no archive is that of a usual file.

The archive's index lies beside it: ``data/train.tar.index``, an array of NumPy with the
name, the place and the size of each member, sorted by name. It is mapped into memory,
so all processes share it. Members are read by ``pread``: an archive that was opened
before a fork may be read after it, and in several threads.
"""

import io
import os
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Dict, NamedTuple, Optional, Tuple, Union

import numpy as np

SUFFIX = '.tar'
INDEX_SUFFIX = '.index'
INDEX_FIELDS = ('name', 'offset', 'size')
"""Fields of an index: bytes, and two numbers of bytes. Its first entry has no name, and
the size of the whole archive."""

_PathLike = Union[str, Path]


class ArchiveError(ValueError):
    """An archive cannot be read. The message says which, and what helps."""


class Archive:
    """A tar archive that is open for reading.

    Args:
        path (str): The archive.

    Raises:
        ArchiveError: If it has no index, or that of another archive.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        place = f'{path}{INDEX_SUFFIX}'
        make = f'Make it: python tools/dataset_tools/make_archive.py {path}'
        try:
            index = np.load(place, mmap_mode='r', allow_pickle=False)
            if index.dtype.names != INDEX_FIELDS:
                raise ValueError('it has other fields')
        except FileNotFoundError:
            raise ArchiveError(f'{path} has no index {place}. {make}') from None
        except (EOFError, ValueError) as error:
            problem = f'{place} is no index of an archive ({error})'
            raise ArchiveError(f'{problem}. {make}') from error
        self._names, self._offsets, self._sizes = map(index.__getitem__, INDEX_FIELDS)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        size, known = os.fstat(self._file).st_size, int(self._sizes[0])
        if size != known:
            raise ArchiveError(
                f'{path} is of {size} bytes, and its index of an archive of {known}. '
                f'Copy both anew, or remove the index. {make}'
            )

    def find(self, name: bytes) -> Optional[Tuple[int, int]]:
        """Place and size of a member in bytes; None if there is no such file."""
        i = bisect_left(self._names, name)  # type: ignore[type-var]
        if not name or i == len(self._names) or self._names[i] != name:
            return None
        return int(self._offsets[i]), int(self._sizes[i])

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of the archive."""
        return os.pread(self._file, size, offset)

    def children(self, folder: bytes) -> Iterator[Tuple[str, bool]]:
        """Names in a folder, sorted, and whether each is a file; none without it."""
        prefix = folder + b'/' if folder else b''
        i = bisect_left(self._names, prefix or b'\0')  # type: ignore[type-var]
        while i < len(self._names) and self._names[i].startswith(prefix):
            name, slash, _ = self._names[i][len(prefix) :].partition(b'/')
            yield os.fsdecode(name), not slash
            # Behind all in a folder: '0' comes after '/'.
            end = prefix + name + b'0'
            i = bisect_left(self._names, end, i) if slash else i + 1  # type: ignore[type-var]


class Place(NamedTuple):
    """A place in an archive, be there something or not."""

    archive: Archive
    name: bytes

    @property
    def is_file(self) -> bool:
        """Whether it is a file."""
        return self.archive.find(self.name) is not None

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder with something in it, or the archive itself."""
        return not self.name or any(True for _ in self.archive.children(self.name))


class Entry(NamedTuple):
    """What is in a folder, with those methods of ``os.DirEntry`` that are needed."""

    name: str
    path: str
    file: bool

    def is_file(self) -> bool:
        return self.file

    def is_dir(self) -> bool:
        return not self.file


_opened: Dict[str, Archive] = {}


def locate(path: _PathLike) -> Optional[Place]:
    """Where a path leads in an archive; None if it leads into none.

    Args:
        path (str | Path): The path.

    Raises:
        ArchiveError: If the archive cannot be read.
    """
    text = os.fspath(path)
    end = text.find(SUFFIX)
    while end >= 0:
        end += len(SUFFIX)
        if text[end : end + 1] in ('', '/'):
            head = text[:end]
            # A folder may have such a name.
            if head not in _opened and os.path.isfile(head):
                _opened[head] = Archive(head)
            if head in _opened:
                name = os.path.normpath(text[end:].lstrip('/'))
                return Place(_opened[head], os.fsencode(name if name != '.' else ''))
        end = text.find(SUFFIX, end)
    return None


def is_file(path: _PathLike) -> bool:
    """Whether there is a file, on the disk or in an archive."""
    place = locate(path)
    return os.path.isfile(path) if place is None else place.is_file


def is_folder(path: _PathLike) -> bool:
    """Whether there is a folder, on the disk or in an archive."""
    place = locate(path)
    return os.path.isdir(path) if place is None else place.is_folder


def file_size(path: _PathLike) -> int:
    """Bytes of a file, on the disk or in an archive.

    Raises:
        FileNotFoundError: If there is none.
    """
    place = locate(path)
    return os.path.getsize(path) if place is None else _require(place, path)[1]


def open_file(path: _PathLike) -> BinaryIO:
    """Open a file for reading, on the disk or in an archive.

    Raises:
        OSError: If there is none, or it cannot be read.
    """
    place = locate(path)
    return open(path, 'rb') if place is None else io.BytesIO(read_member(place, path))


def read_member(place: Place, path: _PathLike) -> bytes:
    """The bytes of a file in an archive.

    Args:
        place (Place): Where it is.
        path (str | Path): Its whole path, for the message.

    Raises:
        FileNotFoundError: If there is none.
    """
    return place.archive.read(*_require(place, path))


def scan_folder(path: _PathLike) -> Iterator[Union['os.DirEntry[str]', Entry]]:
    """What is in a folder, as ``os.scandir`` lists it; sorted in an archive."""
    place = locate(path)
    if place is None:
        yield from os.scandir(os.fspath(path))
        return
    for name, is_a_file in place.archive.children(place.name):
        yield Entry(name, f'{os.fspath(path)}/{name}', is_a_file)


def _require(place: Place, path: _PathLike) -> Tuple[int, int]:
    found = place.archive.find(place.name)
    if found is None:
        raise FileNotFoundError(2, 'No such file in the archive', str(path))
    return found
