# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Reads the JSON files in the work_dir of a run, which a stranger may have written."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Dict, Optional

from .text import printable

# Bytes. A log line of a thousand classes has 40 thousand.
_LONGEST = 2**20


def read_record(path: Path) -> Optional[Dict[str, Any]]:
    """Read a file that holds one JSON object.

    Args:
        path (Path): The file.

    Returns:
        dict | None: The object. None if its end is missing, because it is still being
        written or its writer was killed.

    Raises:
        ValueError: If the path is no file, if the file holds anything else, or if it is
            too large or too deeply nested.
    """
    with _open(path) as file:
        return _parse(file.read(_LONGEST + 1), path)


def read_record_lines(path: Path) -> Iterator[Dict[str, Any]]:
    """Read a file that holds one JSON object in each line, as logs do.

    Args:
        path (Path): The file.

    Yields:
        dict: The objects. Those whose ends are missing are left out.

    Raises:
        ValueError: As in :func:`read_record`, with the number of the line.
    """
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST + 1), b'')):
            # A power cut may leave zeros.
            if line.strip(b' \t\r\n\0'):
                record = _parse(line, path, f' in line {number + 1}')
                if record is not None:
                    yield record


def is_number(value: Any) -> bool:
    """Whether a value is a number that a figure can show. NaN and inf are."""
    # No run has larger finite numbers, and they break the axes.
    return type(value) in (int, float) and not 1e100 < abs(value) < math.inf


def _open(path: Path) -> BinaryIO:
    # Opening a pipe would wait until somebody writes.
    if not path.is_file():
        raise ValueError(
            f'{printable(path)} is no file. Move its folder out of the work_dir.'
        )
    return path.open('rb')


def _parse(content: bytes, path: Path, where: str = '') -> Optional[Dict[str, Any]]:
    try:
        if len(content) > _LONGEST:
            raise ValueError(f'it is longer than {_LONGEST} bytes')
        record = json.loads(content.decode('utf-8'))
        if isinstance(record, dict):
            return record
        reason = f'it is a {type(record).__name__}'
    except (ValueError, RecursionError) as error:  # also errors of the decoders
        content = content.strip()
        is_cut = content.startswith(b'{') and not content.endswith(b'}')
        if is_cut and isinstance(error, json.JSONDecodeError):
            return None
        reason = printable(str(error))
    raise ValueError(
        f'{printable(path)} holds no JSON object{where}: {reason}. Move its folder out '
        'of the work_dir.'
    )
