# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The error of what cannot be exported, and the check that most models meet."""

from typing import Any

from ..compat.openmmlab import predicts_as


class ExportError(ValueError):
    """A model cannot be exported. The message says why, and what to do."""


def require_prediction(part: Any, *bases: type) -> None:
    """Refuse what does not make predictions as one of a toolbox's classes.

    Args:
        part (Any): A model or a head.
        *bases (type): The classes.

    Raises:
        ExportError: If the part is of none of them, or has other methods.
    """
    if not any(predicts_as(part, base) for base in bases):
        package = bases[0].__module__.partition('.')[0]
        known = ' and '.join(base.__name__ for base in bases)
        raise unknown_prediction(part, f"{package}'s {known}")


def unknown_prediction(part: Any, known: str) -> ExportError:
    """The error of a part that predicts in another way than those that are known."""
    return ExportError(
        f'{type(part).__name__} is not exported: its predictions are not made as those '
        f"of {known}. Export the backbone alone, with part 'backbone'."
    )
