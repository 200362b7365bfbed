# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Text of messages: strangers' words made safe to print, and the nearest name."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any, Optional

# So many words of a list are named.
_LISTED = 4
#: Limit that keeps paths whole: no system has longer ones.
PATH_LIMIT = 4096


def printable(value: Any, limit: int = 200) -> str:
    """Make one line of printable text from a value that a stranger chose.

    Characters that are not printable are escaped. So the text cannot move the cursor of
    a terminal, change its colours or reverse the direction of writing.

    Args:
        value (Any): A str, bytes, path, number, bool or None. For any other value only
            its type is named, because making its text may take long or run its code.
        limit (int): Number of characters to keep. Half of them are from the end, where
            a path has the name of its file. Defaults to 200.

    Returns:
        str: The text, with ``...`` in place of what is left out. Escapes make it
        longer.

    Examples:
        >>> printable('a\\nb')
        'a\\\\nb'
        >>> printable([1, 2])
        '<list>'
    """
    if isinstance(value, bytes):
        # A character has at most four bytes, so the rest is not needed.
        if len(value) > 8 * limit:
            value = value[: 4 * limit] + value[-4 * limit :]
        text = value.decode('utf-8', 'backslashreplace')
    elif isinstance(value, int) and value.bit_length() > 1024:
        # Python takes long to write out such a number, or refuses to.
        return f'<int of {value.bit_length()} bits>'
    elif isinstance(value, (str, PurePath, int, float, complex, type(None))):
        text = str(value)
    else:
        text = f'<{type(value).__name__}>'
    if len(text) > limit:
        tail = limit // 2
        text = f'{text[: limit - tail]}...{text[len(text) - tail :]}'
    escaped = (c.encode('unicode_escape').decode('ascii') for c in text)
    return ''.join(c if c.isprintable() else e for c, e in zip(text, escaped))


def describe_error(error: BaseException) -> str:
    """Type and text of an error in one line of printable text."""
    text = ' '.join(str(error).split())
    return printable(
        f'{type(error).__name__}: {text}' if text else type(error).__name__
    )


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> Optional[str]:
    """The name that is most like another name, or None if no name is like it.

    Args:
        name (str): The other name. Upper and lower case are the same.
        names (Iterable[str]): The names to choose from.
        cutoff (float): How like it has to be, from 0 to 1. Defaults to 0.6.
    """
    by_lower = {x.lower(): x for x in sorted(names)}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def listed(words: Sequence[str], conjunction: str) -> str:
    """Words with commas, and a conjunction before the last of them.

    Args:
        words (Sequence[str]): The words, at least one. Four of them are named.
        conjunction (str): Such as 'or'.

    Examples:
        >>> listed(['a', 'b', 'c'], 'or')
        'a, b or c'
        >>> listed('abcdef', 'and')
        'a, b, c, d and 2 more'
    """
    more = len(words) - _LISTED
    named = [*words[:_LISTED], *([f'{more} more'] if more > 0 else [])]
    *first, last = named
    return f'{", ".join(first)} {conjunction} {last}' if first else last
