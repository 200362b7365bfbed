# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What a launch of each kernel moves, stated below the kernel.

A statement counts the numbers of a perfect run: the kernel reads each number that it
needs once, and writes each one once. Borders of tiles, which neighbours read again,
come from a cache and count once. What a kernel reads again in a later loop counts
again. Partial sums count as they are. No statement is called when kernels run.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Dict, NamedTuple


class Moves(NamedTuple):
    """What a launch moves and multiplies.

    Attributes:
        reads (dict[str, int]): How much is read through each pointer. Statements say
            how many numbers, :func:`moves_of` says how many bytes.
        writes (dict[str, int]): How much is written through each pointer.
        flops (int): Operations of matrix products. A multiplication and its addition
            count two. Defaults to 0.
    """

    reads: Dict[str, int]
    writes: Dict[str, int]
    flops: int = 0


_Statement = Callable[[Any], Moves]
_STATEMENTS: Dict[str, _Statement] = {}


def statement_of(kernel: Any) -> Callable[[_Statement], _Statement]:
    """Decorate a statement. It gets the arguments of a launch as attributes.

    It may count numbers behind a pointer that is None: they are left out.
    """

    def register(statement: _Statement) -> _Statement:
        _STATEMENTS[kernel.fn.__name__] = statement
        return statement

    return register


def moves_of(name: str, arguments: Mapping[str, Any]) -> Moves:
    """What a launch moves, in bytes.

    Args:
        name (str): Name of the kernel, whose module is imported.
        arguments (Mapping[str, Any]): The arguments of the launch by name.

    Returns:
        Moves: Pointers through which nothing moves are left out.

    Raises:
        ValueError: If the kernel has no statement.
    """
    if name not in _STATEMENTS:
        raise ValueError(
            f'{name} does not state what it moves. Add a function below it, decorated '
            f'with {statement_of.__module__}.statement_of({name}).'
        )
    found = _STATEMENTS[name](SimpleNamespace(**arguments))
    reads, writes = (
        {
            pointer: numbers * _element_size(arguments[pointer])
            for pointer, numbers in numbers_of.items()
            if numbers and arguments[pointer] is not None
        }
        for numbers_of in (found.reads, found.writes)
    )
    return Moves(reads, writes, found.flops)


def _element_size(pointer: Any) -> int:
    """Of a tensor, or of a tuple of tensors of one dtype."""
    return (pointer[0] if isinstance(pointer, tuple) else pointer).element_size()
