# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Makes tar archives of folders, and their indices: see :mod:`..utils.archives`."""

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np

from ..utils.archives import INDEX_FIELDS, INDEX_SUFFIX
from ..utils.files import check_regular_file, open_whole, write_whole

# Two empty blocks.
_END = bytes(1024)


def folder_files(folder: Path) -> List[str]:
    """Paths of all files below a folder, from it, sorted.

    Hidden files and folders are left out. Links are followed.

    Raises:
        ValueError: If there is no file.
    """
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith('.')]
        found += [
            os.path.relpath(os.path.join(parent, name), folder)
            for name in names
            if not name.startswith('.')
        ]
    if not found:
        raise ValueError(f'{folder} is no folder with files in it.')
    return sorted(found)


def write_archive(folder: Path, names: Iterable[str], archive: Path) -> None:
    """Write files into a tar archive, whole or not at all.

    Args:
        folder (Path): The folder of the files.
        names (Iterable[str]): Their paths from the folder, and in the archive.
        archive (Path): The archive. Until it is complete it has another name.

    Raises:
        OSError: If a file cannot be read or is no regular file, or the archive cannot
            be written.
    """
    with (
        open_whole(archive) as target,
        tarfile.open(fileobj=target, mode='w', format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in names:
            path = folder / name
            check_regular_file(path)
            with path.open('rb') as file:
                # tarfile would store links, and the second of two hard links without
                # its content.
                member = tarfile.TarInfo(name)
                status = os.fstat(file.fileno())
                member.size, member.mtime = status.st_size, int(status.st_mtime)
                tar.addfile(member, file)


def write_index(archive: Path) -> int:
    """Write the index of an archive, which may be made by another program.

    Args:
        archive (Path): A tar archive without compression.

    Returns:
        int: Number of files in the archive.

    Raises:
        ValueError: If it is no such archive, is cut off, or contains links.
    """
    members: Dict[bytes, Tuple[int, int]] = {}
    try:
        # Without compression, which has no places to go to.
        with tarfile.open(archive, 'r:') as tar:
            member = tar.next()
            while member is not None:
                # They would take a gigabyte for a million files.
                tar.members = []  # type: ignore[attr-defined]
                if member.islnk() or member.issym() or member.issparse():
                    raise ValueError(
                        f'{archive} has links or sparse files, such as {member.name}. '
                        'Make it with tar --dereference --hard-dereference.'
                    )
                if member.isreg():
                    name = os.fsencode(os.path.normpath(member.name))
                    members[name] = member.offset_data, member.size
                member = tar.next()
        with archive.open('rb') as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(-len(_END), os.SEEK_END)
            if file.read() != _END:
                raise tarfile.ReadError('it is cut off')
    except tarfile.TarError as error:
        raise ValueError(
            f'{archive} is no whole, uncompressed tar archive ({error}). Make it anew.'
        ) from error
    if not members:
        raise ValueError(f'{archive} has no files.')
    rows = [(b'', 0, size), *((name, *x) for name, x in sorted(members.items()))]
    kinds = (f'S{max(map(len, members))}', '<i8', '<i8')
    index = np.array(rows, dtype=list(zip(INDEX_FIELDS, kinds)))
    content = io.BytesIO()
    np.save(content, index)
    write_whole(f'{archive}{INDEX_SUFFIX}', content.getvalue())
    return len(members)
