# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The sizes of MLLA, and the checks of its arguments."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any, Dict, NamedTuple, Optional, Tuple, Union

#: Number of stages of a network.
NUM_STAGES = 4

#: The published sizes by name.
ARCH_ZOO: Dict[str, dict] = {
    **dict.fromkeys(
        ['t', 'tiny'],
        dict(embed_dims=64, depths=(2, 4, 8, 4), num_heads=(2, 4, 8, 16)),
    ),
    **dict.fromkeys(
        ['s', 'small'],
        dict(embed_dims=64, depths=(3, 6, 21, 6), num_heads=(2, 4, 8, 16)),
    ),
    **dict.fromkeys(
        ['b', 'base'],
        dict(embed_dims=96, depths=(3, 6, 21, 6), num_heads=(3, 6, 12, 24)),
    ),
}


class Arch(NamedTuple):
    """The size of a network.

    Attributes:
        embed_dims (int): Number of channels of the first stage. Each later stage has
            twice as many as the one before it.
        depths (tuple[int]): Number of blocks of each stage.
        num_heads (tuple[int]): Number of attention heads of each stage.
    """

    embed_dims: int
    depths: Tuple[int, ...]
    num_heads: Tuple[int, ...]


def parse_arch(arch: Union[str, dict], arch_zoo: Mapping[str, dict] = ARCH_ZOO) -> Arch:
    """Turn the ``arch`` of a config into a size.

    Args:
        arch (str | dict): A name in upper or lower case, or a dict with the fields of
            :class:`Arch`.
        arch_zoo (Mapping[str, dict]): Sizes by name. Defaults to the published sizes.

    Returns:
        Arch: The size.

    Raises:
        ValueError: If the name is unknown, or if a field of the dict is missing,
            unknown or impossible.
    """
    if isinstance(arch, str):
        if arch.lower() not in arch_zoo:
            raise ValueError(
                f"Unknown arch '{arch}': choose from {sorted(arch_zoo)}, or give a "
                'dict with embed_dims, depths and num_heads.'
            )
        arch = arch_zoo[arch.lower()]
    if not isinstance(arch, dict) or set(arch) != set(Arch._fields):
        raise ValueError(
            'arch must be a name or a dict with exactly the keys embed_dims, '
            f'depths and num_heads, got {arch!r}.'
        )
    embed_dims = arch['embed_dims']
    if not _is_int(embed_dims) or embed_dims < 4 or embed_dims % 4:
        raise ValueError(
            'embed_dims must be a positive multiple of 4 (the rotary embedding '
            f'pairs channels on two axes), got {embed_dims!r}.'
        )
    for key in ('depths', 'num_heads'):
        values = arch[key]
        if not _is_int_sequence(values) or len(values) != NUM_STAGES:
            raise ValueError(f'{key} must be four ints, got {values!r}.')
        if min(values) < 1:
            raise ValueError(f'{key} must be positive, got {values!r}.')
    for i, heads in enumerate(arch['num_heads']):
        if embed_dims * 2**i % heads:
            raise ValueError(
                f'num_heads[{i}] = {heads} does not divide the '
                f'{embed_dims * 2**i} channels of stage {i}.'
            )
    return Arch(embed_dims, tuple(arch['depths']), tuple(arch['num_heads']))


def parse_out_indices(out_indices: Union[int, Sequence[int]]) -> Tuple[int, ...]:
    """Turn the ``out_indices`` of a config into stages from 0 to 3, in their order.

    Args:
        out_indices (int | Sequence[int]): One or several stages. Negative numbers count
            from the end.

    Returns:
        tuple[int]: The stages.

    Raises:
        ValueError: If there is no stage, or if a stage does not exist or is named
            twice.
    """
    indices: Any = [out_indices] if _is_int(out_indices) else out_indices
    if not _is_int_sequence(indices) or not indices:
        raise ValueError(f'out_indices must be one or more ints, got {indices!r}.')
    if not all(-NUM_STAGES <= i < NUM_STAGES for i in indices):
        raise ValueError(
            f'out_indices must lie between 0 and {NUM_STAGES - 1}, or '
            f'-{NUM_STAGES} and -1, got {indices!r}.'
        )
    stages = sorted({i % NUM_STAGES for i in indices})
    if len(stages) != len(indices):
        raise ValueError(f'out_indices names a stage twice: {indices!r}.')
    return tuple(stages)


def name_size(embed_dims: int, depths: Tuple[int, ...]) -> Optional[str]:
    """'t', 's' or 'b' if a published network has these numbers, else None."""
    for name, arch in ARCH_ZOO.items():
        if (arch['embed_dims'], arch['depths']) == (embed_dims, depths):
            return name[0]
    return None


def check_int(name: str, value: Any, low: int, high: float = inf) -> None:
    """Raise a ValueError unless a value is an int from ``low`` to ``high``."""
    if not _is_int(value) or not low <= value <= high:
        bounds = f'of at least {low}' if high == inf else f'from {low} to {high}'
        raise ValueError(f'{name} must be an int {bounds}, got {value!r}.')


def check_rate(name: str, value: Any) -> None:
    """Raise a ValueError unless a value is a number in [0, 1)."""
    # Dropout divides by 1 - rate.
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(
            f'{name} must be a number of at least 0 and below 1, got {value!r}.'
        )


def check_ratio(name: str, ratio: Any, embed_dims: int) -> None:
    """Raise a ValueError if hidden channels, divided by others, leave none."""
    if not _is_number(ratio) or not 1 <= embed_dims * ratio < inf:
        raise ValueError(
            f'{name} must be a number that gives at least one hidden channel, got '
            f'{ratio!r}.'
        )


def check_flags(**flags: Any) -> None:
    """Raise a ValueError unless every value is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f'{name} must be True or False, got {value!r}.')


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise a ValueError unless a value is one of some."""
    # A list, because a value may have no hash.
    if value not in list(choices):
        raise ValueError(f'{name} must be one of {list(choices)}, got {value!r}.')


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_int_sequence(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(map(_is_int, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
