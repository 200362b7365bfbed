# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Two-dimensional rotary position embedding on channels-last feature maps."""

from typing import Dict, Tuple

import torch
from torch import Tensor

from .tracing import is_compiled, is_graph

_BASE = 10000.0

# (positions, frequencies, device, dtype) -> (cos, sin), each (positions, frequencies).
# One table for each axis serves every image size. A table for each size would take
# gigabytes in an epoch of COCO. The tables are not buffers of a module: checkpoints
# would contain them, and MMEngine's EMA cannot handle a buffer that grows. No table is
# ever freed, because a CUDA graph may read it.
_TABLES: Dict[Tuple[int, int, torch.device, torch.dtype], Tuple[Tensor, Tensor]] = {}
# (channels, device, dtype) -> the last result of rotation().
_ROTATIONS: Dict[Tuple[int, torch.device, torch.dtype], Tensor] = {}
# Results of rotation() that CUDA graphs read, by id.
_ROTATIONS_IN_GRAPHS: Dict[int, Tensor] = {}


def axis_tables(
    length: int, num_freqs: int, device: torch.device, dtype: torch.dtype
) -> Tuple[Tensor, Tensor]:
    """Cosine and sine of ``position * 10000 ** (-j / num_freqs)``.

    The tables are cached for each power of two, and the smallest one that is long
    enough is taken. All of them together are less than twice as long as the longest.
    A graph that is traced computes its own tables, so that it serves every length.

    Args:
        length (int): Number of positions along the axis, from 0 to length - 1.
        num_freqs (int): Number of frequencies, with j from 0 to num_freqs - 1.
        device (torch.device): Device of the tables.
        dtype (torch.dtype): float32 or float64.

    Returns:
        tuple[Tensor, Tensor]: cos and sin, each (length, num_freqs).
    """
    if is_graph():
        return _tables_in_graph(length, num_freqs, device, dtype)
    capacity = 1 << (length - 1).bit_length()
    key = (capacity, num_freqs, device, dtype)
    if key not in _TABLES:
        _TABLES[key] = _build_tables(*key)
    cos, sin = _TABLES[key]
    return cos[:length], sin[:length]


def _build_tables(
    capacity: int, num_freqs: int, device: torch.device, dtype: torch.dtype
) -> Tuple[Tensor, Tensor]:
    # A tensor that is created in inference mode can never take part in training.
    with torch.inference_mode(False), torch.no_grad():
        # On the CPU, because some accelerators have no float64.
        cos, sin = tables_in_float64(capacity, num_freqs, torch.device('cpu'))
        return cos.to(device=device, dtype=dtype), sin.to(device=device, dtype=dtype)


def tables_in_float64(
    length: int, num_freqs: int, device: torch.device
) -> Tuple[Tensor, Tensor]:
    """The tables of :func:`axis_tables` by their formula, in float64, not cached."""
    steps = torch.arange(num_freqs, dtype=torch.float64, device=device)
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = positions[:, None] * _BASE ** (-steps / num_freqs)
    return angles.cos(), angles.sin()


def _tables_in_graph(
    length: int, num_freqs: int, device: torch.device, dtype: torch.dtype
) -> Tuple[Tensor, Tensor]:
    """The tables from float32 alone: runtimes of exported models often lack float64.

    Each frequency is split into a multiple of 2**-12 and a small remainder. The product
    of the first with a position is exact up to position 4096, and the product with the
    second is small. The addition theorems combine both angles.
    """
    freqs = [_BASE ** (-j / num_freqs) for j in range(num_freqs)]
    coarse = [round(freq * 4096) / 4096 for freq in freqs]
    fine = [freq - c for freq, c in zip(freqs, coarse)]
    positions = torch.arange(length, dtype=torch.float32, device=device)[:, None]
    a = positions * torch.tensor(coarse, dtype=torch.float32, device=device)
    b = positions * torch.tensor(fine, dtype=torch.float32, device=device)
    cos = a.cos() * b.cos() - a.sin() * b.sin()
    sin = a.sin() * b.cos() + a.cos() * b.sin()
    return cos.to(dtype), sin.to(dtype)


def rotation(x: Tensor) -> Tensor:
    """The rotation of :func:`rotary_embedding` as complex numbers of length one.

    For each number of channels the result for the last image size is cached, because
    the blocks of a stage share it. What a CUDA graph reads is kept for ever, and what
    it computes itself is not cached, because it has no values before the graph runs.

    Args:
        x (Tensor): float32 or float64 queries and keys (N, H, W, 2C).

    Returns:
        Tensor: (H, W, C / 2), complex.
    """
    height, width, channels = x.shape[1:]
    key = (channels, x.device, x.dtype)
    is_captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    table = _ROTATIONS.get(key)
    if table is None or table.shape[:2] != (height, width):
        with torch.inference_mode(False), torch.no_grad():
            table = _build_rotation(height, width, channels // 8, x.device, x.dtype)
        if not is_captured:
            _ROTATIONS[key] = table
    elif is_captured:
        _ROTATIONS_IN_GRAPHS[id(table)] = table
    return table


def _build_rotation(
    height: int, width: int, num_freqs: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    rows = torch.complex(*axis_tables(height, num_freqs, device, dtype))
    columns = torch.complex(*axis_tables(width, num_freqs, device, dtype))
    shape = (height, width, num_freqs)
    return torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], dim=-1)


def rotary_embedding(x: Tensor) -> Tensor:
    """Rotate channel pairs (2j, 2j + 1) by the position of their token.

    With C channels and theta_j = 10000^(-j / (C/4)), pair j of the first C/4 pairs
    rotates by row * theta_j, and pair j of the last C/4 pairs by column * theta_j.

    Args:
        x (Tensor): float32 or float64 feature map (N, H, W, C), C a multiple of 4.

    Returns:
        Tensor: The rotated map, shape and dtype of ``x``.
    """
    height, width = x.shape[1:3]
    # In a graph the image size may be a symbol. The number of channels is an int.
    num_freqs = int(x.shape[3]) // 4
    if is_compiled() and x.device.type == 'cpu':
        # On a CPU the compiler makes slow loops of the real formula: they are not
        # vectorised, and compute sines and exponentials. It leaves complex products to
        # PyTorch.
        table = _build_rotation(height, width, num_freqs, x.device, x.dtype)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(-2)
    rows = axis_tables(height, num_freqs, x.device, x.dtype)
    columns = axis_tables(width, num_freqs, x.device, x.dtype)
    by_row, by_column = x.chunk(2, dim=-1)
    return torch.cat(
        [
            _rotate_pairs(by_row, *(table[:, None] for table in rows)),
            _rotate_pairs(by_column, *columns),
        ],
        dim=-1,
    )


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, a sin + b cos) on neighbouring channels."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
