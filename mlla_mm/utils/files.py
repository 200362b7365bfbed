# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Files: whether they can be read, and how they are written whole or not at all."""

import hashlib
import os
import stat
from pathlib import Path
from typing import Optional, Union

from .text import PATH_LIMIT, describe_error, printable

Content = Union[bytes, memoryview]
# File systems allow 255 bytes.
_LONGEST_NAME = 240


def write_whole(path: Union[str, Path], content: Content) -> None:
    """Write a file such that no part of it is ever seen under its name.

    Args:
        path (str | Path): The file; a folder that is not there is made.
        content (bytes | memoryview): What to write.

    Raises:
        OSError: If it cannot be written. What was there before is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        # Not through a link that somebody left there.
        part.unlink(missing_ok=True)
        with part.open('xb') as file:
            file.write(content)
            file.flush()
            # On the disk before its name is, or a power cut leaves the name alone.
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """Where :func:`write_whole` collects a file; killed in between, it leaves this."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f'.{name}.part')


def file_problem(path: Union[str, Path]) -> Optional[str]:
    """What keeps a file of any kind from being read, or None."""
    try:
        check_regular_file(path)
        with open(path, 'rb') as file:
            return None if file.read(1) else 'is empty'
    except NotRegularFileError as error:
        return error.problem
    except OSError as error:
        return f'cannot be opened ({error.strerror})'
    except ValueError as error:  # a name that no file has
        return f'cannot be opened ({describe_error(error)})'


class NotRegularFileError(OSError):
    """A path of a pipe, device, socket or folder, where a file is to be read.

    Args:
        path (str | Path): The path.
        problem (str): What it is, to stand behind the path.
    """

    def __init__(self, path: Union[str, Path], problem: str) -> None:
        super().__init__(f'{printable(path, PATH_LIMIT)} {problem}.')
        self.problem = problem


def check_regular_file(path: Union[str, Path]) -> None:
    """Refuse what may have no end, or may never begin.

    Raises:
        NotRegularFileError: If the path is of no regular file.
        OSError: If there is nothing, or if it may not be looked at.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise NotRegularFileError(path, 'is a folder')
    if not stat.S_ISREG(mode):
        raise NotRegularFileError(path, 'is a pipe, socket or device, not a file')
