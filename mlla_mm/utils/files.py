# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Files that are there whole or not at all."""

import hashlib
import os
from pathlib import Path
from typing import Union

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
