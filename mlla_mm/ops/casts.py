# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Parameters in the dtype of autocast, all cast by one kernel in a forward pass.

Autocast casts each parameter by a kernel of its own. Most parameters are small, so the
launches cost more than the bytes. Nothing is kept from one forward pass to the next:
whatever changes a parameter in between, by whatever way, takes effect.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from ..compat.pytorch import copy_all


class _Entry:
    """A parameter with its cast."""

    def __init__(self, parameter: Tensor, part: Tensor) -> None:
        # Keeps the parameter alive, so that no other tensor gets its id.
        self.parameter = parameter
        self.part = part
        self.with_gradient: Optional[Tensor] = None


# The casts of the innermost context, by the id of the parameter. Each thread has its
# own, as the replicas of DataParallel need.
_CASTS: ContextVar[Optional[Dict[int, _Entry]]] = ContextVar('casts', default=None)


@contextmanager
def cast_all(parameters: Iterable[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Cast float32 parameters, for :func:`cast` and :func:`parts` in the context.

    The casts lie in one piece of memory: first matrices and kernels, then vectors, both
    in the order given. Contexts can be nested, and the inner one hides the outer one.

    Args:
        parameters (Iterable[Tensor]): Parameters on one device. Those in another dtype
            are passed over.
        dtype (torch.dtype): float16 or bfloat16.
    """
    wanted = {id(p): p for p in parameters if p.dtype == torch.float32}
    ordered = sorted(wanted.values(), key=lambda p: p.dim() == 1)
    casts = {id(p): _Entry(p, part) for p, part in zip(ordered, make(ordered, dtype))}
    token = _CASTS.set(casts)
    try:
        yield
    finally:
        _CASTS.reset(token)


def cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The cast of a parameter, with its gradient; else the parameter itself.

    Args:
        parameter (Tensor): A parameter.
        dtype (torch.dtype): The dtype that the cast must have.
    """
    entry = (_CASTS.get() or {}).get(id(parameter))
    if entry is None or entry.part.dtype != dtype:
        return parameter
    if not (parameter.requires_grad and torch.is_grad_enabled()):
        return entry.part
    if entry.with_gradient is None:
        entry.with_gradient = _Cast.apply(parameter, entry.part)
    return entry.with_gradient


def parts(parameters: Sequence[Tensor], dtype: torch.dtype) -> Optional[List[Tensor]]:
    """The casts of parameters without their gradients, or None if one is missing."""
    casts = _CASTS.get() or {}
    found = [casts[id(p)].part for p in parameters if id(p) in casts]
    if len(found) < len(parameters) or any(part.dtype != dtype for part in found):
        return None
    return found


def make(parameters: Sequence[Tensor], dtype: torch.dtype) -> List[Tensor]:
    """Cast parameters by one kernel. The casts follow one another in memory."""
    if not parameters:
        return []
    sizes = [p.numel() for p in parameters]
    memory = torch.empty(sum(sizes), dtype=dtype, device=parameters[0].device)
    made, offset = [], 0
    for p, size in zip(parameters, sizes):
        # The kernel takes pairs of equal strides alone. Others cost a kernel each.
        if p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last):
            made.append(memory.as_strided(p.shape, p.stride(), offset))
        else:
            made.append(memory[offset : offset + size].view(p.shape))
        offset += size
    with torch.no_grad():
        copy_all(made, parameters)
    return made


def are_neighbours(first: Tensor, second: Tensor) -> bool:
    """Whether a cast follows another one of the same context in memory."""
    return second.storage_offset() == first.storage_offset() + first.numel()


class _Cast(torch.autograd.Function):
    """The cast of one parameter. There is one for each, so no gradient waits.

    DistributedDataParallel sends gradients while others are still computed.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, part: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return part.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
