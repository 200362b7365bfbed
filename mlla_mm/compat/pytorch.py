# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What differs between the supported versions of PyTorch, and private names of it.

All names are of PyTorch 2.1 to 2.11, but where it says otherwise.

The two sets of OpenMMLab packages run the same code; which of them is installed, and
what is wrong with it, tells :mod:`mlla_mm.compat.stack`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, module

#: What all kinds of BatchNorm are, and InstanceNorm is not.
BatchNorm = batchnorm._BatchNorm

#: The attribute of a state dict with the versions of the modules, by which some of them
#: adapt old weights.
METADATA = '_metadata'

#: Whether a module can tell that torch.export is at work.
TELLS_EXPORT = torch.__version__ >= (2, 7)

#: Whether ONNX export goes through torch.export unless told otherwise.
EXPORTS_ONNX_THROUGH_EXPORT = torch.__version__ >= (2, 9)

#: Whether a matrix product on CUDA can have a wider dtype than its factors.
MM_TAKES_OUT_DTYPE = torch.__version__ >= (2, 8)

if hasattr(torch.compiler, 'is_compiling'):
    is_compiling = torch.compiler.is_compiling
else:
    from torch._dynamo import is_compiling  # noqa: F401

#: Whether torch.compile can be used. PyTorch 2.1 takes more than eight minutes to trace
#: even the smallest MLLA.
COMPILES = torch.__version__ >= (2, 2)


def require_compiler(option: str) -> None:
    """Refuse an option that needs torch.compile where that cannot be used.

    Raises:
        ValueError: If so.
    """
    if not COMPILES:
        raise ValueError(
            f'{option} needs PyTorch 2.2 or newer, and this is {torch.__version__}: '
            'leave it out.'
        )


def is_exporting() -> bool:
    """Whether torch.export is at work; False where that cannot be told."""
    # Not is_exporting(), which torch.compile takes to be true.
    return TELLS_EXPORT and torch.compiler._is_exporting_flag


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a kind of device."""
    if device_type == 'cpu':
        return torch.is_autocast_cpu_enabled()
    return torch.is_autocast_enabled()


def autocast_dtype(device_type: str) -> torch.dtype:
    """What autocast casts to."""
    if device_type == 'cpu':
        return torch.get_autocast_cpu_dtype()
    return torch.get_autocast_gpu_dtype()


def does_more_when_called(layer: nn.Module) -> bool:
    """Whether a module has hooks, or a forward pass set on it alone."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or 'forward' in layer.__dict__
    )


def has_global_hooks() -> bool:
    """Whether every call of every module is watched, as FLOP counters do."""
    return bool(
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or module._global_backward_hooks
        or module._global_backward_pre_hooks
    )


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy many tensors in one kernel."""
    torch._foreach_copy_(targets, sources)
