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
from torch import Tensor, nn

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
_CASTS: ContextVar[Dict[int, _Entry]] = ContextVar('mlla_mm_casts')


@contextmanager
def cast_all(parameters: Iterable[Optional[Tensor]], dtype: torch.dtype) -> Iterator:
    """Cast parameters to a dtype, for :func:`cast` and :func:`parts` in the context.

    The casts lie in one piece of memory: first matrices and kernels, then vectors, both
    in the order given. Contexts can be nested, and the inner one hides the outer one.

    Args:
        parameters (Iterable[Tensor | None]): Parameters on one device. What is not a
            dense float32 tensor is passed over.
        dtype (torch.dtype): float16 or bfloat16.
    """
    wanted = [p for p in parameters if p is not None and _is_plain(p)]
    wanted.sort(key=lambda p: p.dim() == 1)
    token = _CASTS.set(_cast_to_one_memory(wanted, dtype) if wanted else {})
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
    entry = _CASTS.get({}).get(id(parameter))
    if entry is None or entry.part.dtype != dtype:
        return parameter
    if not (parameter.requires_grad and torch.is_grad_enabled()):
        return entry.part
    if entry.with_gradient is None:
        entry.with_gradient = _Cast.apply(parameter, entry.part)
    return entry.with_gradient


def parts(
    parameters: Sequence[Optional[Tensor]], dtype: torch.dtype
) -> Optional[List[Tensor]]:
    """The casts of parameters without their gradients, or None if one is missing."""
    casts = _CASTS.get({})
    found = [casts[id(p)].part for p in parameters if id(p) in casts]
    if len(found) < len(parameters) or any(part.dtype != dtype for part in found):
        return None
    return found


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


def _is_plain(p: Tensor) -> bool:
    """Whether a tensor is of no other class, in float32, and dense in memory."""
    return (
        type(p) in (nn.Parameter, Tensor)
        and p.dtype == torch.float32
        and (p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last))
    )


def _cast_to_one_memory(
    parameters: Sequence[Tensor], dtype: torch.dtype
) -> Dict[int, _Entry]:
    total = sum(p.numel() for p in parameters)
    memory = torch.empty(total, dtype=dtype, device=parameters[0].device)
    entries, offset = {}, 0
    for p in parameters:
        # With other strides, each would be copied by a kernel of its own.
        part = memory.as_strided(p.shape, p.stride(), offset)
        entries[id(p)] = _Entry(p, part)
        offset += p.numel()
    with torch.no_grad():
        copy_all([entry.part for entry in entries.values()], parameters)
    return entries
