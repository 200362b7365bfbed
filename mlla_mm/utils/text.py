# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Words of strangers in our messages: names of files, and what is in files."""

from pathlib import PurePath
from typing import Any

#: For paths, which a message gives whole: no system has longer ones.
PATH_LIMIT = 4096


def printable(value: Any, limit: int = 200) -> str:
    """What a message says for a value that a stranger chose.

    It is one line, and nothing in it moves a terminal's cursor, changes its colours or
    turns the direction of writing: characters that are not printable are escaped.

    Args:
        value (Any): Of a str, bytes, path, number, bool or None the text counts; of
            anything else only its type is named, because a text of its own may be long
            or take code of its own.
        limit (int): Most characters of the text to keep, half of them from its end,
            where a path has its file's name. Defaults to 200.

    Returns:
        str: The text, with ``...`` for what is left out. Escapes make it longer.

    Examples:
        >>> printable('a\\nb')
        'a\\\\nb'
        >>> printable([1, 2])
        '<list>'
    """
    if isinstance(value, bytes):
        # Not all of a long one. A character has at most four bytes.
        if len(value) > 8 * limit:
            value = value[: 4 * limit] + value[-4 * limit :]
        text = value.decode('utf-8', 'backslashreplace')
    elif isinstance(value, int) and value.bit_length() > 1024:
        # Python refuses to write out the longest, and takes long for others.
        return f'<int of {value.bit_length()} bits>'
    elif isinstance(value, (str, PurePath, int, float, complex, type(None))):
        text = str(value)
    else:
        text = f'<{type(value).__name__}>'
    if len(text) > limit:
        tail = limit // 2
        text = f'{text[: limit - tail]}...{text[len(text) - tail :]}'
    return ''.join(c if c.isprintable() else _escaped(c) for c in text)


def describe_error(error: BaseException) -> str:
    """Type and text of an error, on one line."""
    text = ' '.join(str(error).split())
    return printable(
        f'{type(error).__name__}: {text}' if text else type(error).__name__
    )


def _escaped(character: str) -> str:
    return character.encode('unicode_escape').decode('ascii')
