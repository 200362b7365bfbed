# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Checks files before they are read, and writes files whole or not at all."""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Optional, Union

from .archives import file_size, locate, open_file
from .text import PATH_LIMIT, describe_error, printable

Content = Union[bytes, memoryview]
# File systems allow 255 bytes.
_LONGEST_NAME = 240


def write_whole(path: Union[str, Path], content: Content) -> None:
    """Write a file so that nobody ever sees a part of it under its name.

    Args:
        path (str | Path): The file. Its folder is made if it is missing.
        content (bytes | memoryview): What to write.

    Raises:
        OSError: If the file cannot be written. An older file is then still there.
    """
    with open_whole(path) as file:
        file.write(content)


@contextmanager
def open_whole(path: Union[str, Path]) -> Iterator[BinaryIO]:
    """Open a file as :func:`write_whole` writes it, for content that comes in parts.

    The file has its name after the context, and only if there was no error in it.

    Args:
        path (str | Path): The file. Its folder is made if it is missing.

    Raises:
        OSError: If the file cannot be written. An older file is then still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        # A link that somebody left there must not be followed.
        part.unlink(missing_ok=True)
        with part.open('xb') as file:
            yield file
            file.flush()
            # Without this, a power cut could leave the name of an empty file.
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """Path of the unfinished file of :func:`open_whole`, which may be left behind."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f'.{name}.part')


def file_problem(path: Union[str, Path]) -> Optional[str]:
    """Why a file cannot be read, as the end of a sentence, or None if it can."""
    try:
        check_regular_file(path)
        with open_file(path) as file:
            return None if file.read(1) else 'is empty'
    except NotRegularFileError as error:
        return error.problem
    except OSError as error:
        return f'cannot be opened ({error.strerror})'
    except ValueError as error:  # no file can have such a name
        return f'cannot be opened ({describe_error(error)})'


class NotRegularFileError(OSError):
    """The path is a pipe, device, socket or folder, not a file.

    Args:
        path (str | Path): The path.
        problem (str): What the path is, as the end of a sentence.
    """

    def __init__(self, path: Union[str, Path], problem: str) -> None:
        super().__init__(f'{printable(path, PATH_LIMIT)} {problem}.')
        self.problem = problem


def check_regular_file(path: Union[str, Path]) -> None:
    """Refuse everything but regular files, which may be in an archive.

    Reading a pipe or device may never end.

    Raises:
        NotRegularFileError: If the path is not a regular file.
        OSError: If the path does not exist, or access is denied.
    """
    place = locate(path)
    if place is not None:
        if place.is_folder:
            raise NotRegularFileError(path, 'is a folder')
        file_size(path)  # raises the error of a path that does not exist
        return
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise NotRegularFileError(path, 'is a folder')
    if not stat.S_ISREG(mode):
        raise NotRegularFileError(path, 'is a pipe, socket or device, not a file')
