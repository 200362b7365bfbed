# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Differences between the supported versions of PyTorch, and its private names.

Unless noted, the names exist in PyTorch 2.1 to 2.11.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from torch import Tensor, _compile, nn
from torch.nn.modules import batchnorm, module

#: Base class of all kinds of BatchNorm, but not of InstanceNorm.
BatchNorm = batchnorm._BatchNorm

#: Attribute of a state dict that holds the versions of the modules. Some modules need
#: their version to adapt old weights.
METADATA = '_metadata'

_VERSION = tuple(map(int, torch.__version__.split('.')[:2]))

#: Whether a module can know that torch.export traces it.
TELLS_EXPORT = _VERSION >= (2, 7)

#: Options of torch.onnx.export for its exporter by traces. PyTorch 2.9 has another
#: default, and PyTorch 2.1 no other exporter.
ONNX_BY_TRACE: Dict[str, Any] = dict(dynamo=False) if _VERSION >= (2, 5) else {}

#: Whether a matrix product on CUDA can have a wider dtype than its factors.
MM_TAKES_OUT_DTYPE = _VERSION >= (2, 8)

# PyTorch 2.9 gives each kind of operation a precision of its own. The older flags set
# it, too, but reading them raises an error where they disagree with it.
_HAS_PRECISIONS = hasattr(torch.backends, 'fp32_precision')
# Its annotations lack ``conv``.
_CUDNN: Any = torch.backends.cudnn

# NVIDIA's libraries read it once, when they start.
_TF32_IS_FORBIDDEN = os.environ.get('NVIDIA_TF32_OVERRIDE') == '0'

if hasattr(torch.compiler, 'is_compiling'):
    is_compiling = torch.compiler.is_compiling
else:
    from torch._dynamo import is_compiling  # noqa: F401

#: As torch.compiler.disable, but the decorator imports neither the compiler nor Triton:
#: the first call does.
not_compiled = _compile._disable_dynamo


def constant_when_compiled(function: Callable) -> Callable:
    """As torch.compiler.assume_constant_result, but imports no compiler.

    Args:
        function (Callable): A function without tensors. The compiler calls it with what
            it knows, and takes the result for a constant.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


#: Whether torch.compile is usable. PyTorch 2.1 needs more than eight minutes to trace
#: the smallest MLLA.
COMPILES = _VERSION >= (2, 2)


def require_compiler(option: str) -> None:
    """Refuse an option that needs torch.compile if PyTorch is too old for it.

    Args:
        option (str): Name of the option, for the error.

    Raises:
        ValueError: If PyTorch is older than 2.2.
    """
    if not COMPILES:
        raise ValueError(
            f'{option} needs PyTorch 2.2 or newer, and this is {torch.__version__}: '
            'leave it out.'
        )


def is_exporting() -> bool:
    """Whether torch.export traces the model. False if PyTorch cannot tell."""
    # torch.compile replaces a call of torch's own is_exporting() by True.
    return TELLS_EXPORT and torch.compiler._is_exporting_flag


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a device type, 'cpu' or 'cuda'."""
    if device_type == 'cpu':
        return torch.is_autocast_cpu_enabled()
    return torch.is_autocast_enabled()


def autocast_dtype(device_type: str) -> torch.dtype:
    """The dtype that autocast casts to on a device type, 'cpu' or 'cuda'."""
    if hasattr(torch, 'get_autocast_dtype'):  # PyTorch 2.4, which compiles this one
        return torch.get_autocast_dtype(device_type)
    if device_type == 'cpu':
        return torch.get_autocast_cpu_dtype()
    return torch.get_autocast_gpu_dtype()


def without_autocast(device_type: str) -> AbstractContextManager:
    """The context in which autocast is off for a device type, 'cpu' or 'cuda'.

    Where it is off already, nothing is done: an exported program would contain the
    context, and meta tensors have no autocast.
    """
    if is_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a linear layer or a convolution of x, which autocast may change."""
    device = x.device.type
    return autocast_dtype(device) if is_autocast(device) else x.dtype


def products_use_tf32() -> bool:
    """Whether matrix products of float32 tensors on CUDA may be taken in TF32.

    The answer holds for every mixture of ``fp32_precision``, which PyTorch 2.9 has in
    ``torch.backends``, and older flags. ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`` and
    ``NVIDIA_TF32_OVERRIDE=0`` in the environment count, too. GPUs before compute
    capability 8.0 have no TF32 and ignore all of them.
    """
    matmul = torch.backends.cuda.matmul
    if _HAS_PRECISIONS:
        return matmul.fp32_precision == 'tf32' and not _TF32_IS_FORBIDDEN
    return matmul.allow_tf32 and not _TF32_IS_FORBIDDEN


def convolutions_use_tf32() -> bool:
    """Whether convolutions of float32 tensors on CUDA may be computed in TF32.

    PyTorch's default is yes. See :func:`products_use_tf32`.
    """
    if _HAS_PRECISIONS:
        return _CUDNN.conv.fp32_precision == 'tf32' and not _TF32_IS_FORBIDDEN
    return _CUDNN.allow_tf32 and not _TF32_IS_FORBIDDEN


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute products and convolutions on CUDA in float32 within the context.

    Afterwards the settings have the values of before. A value that an operation
    inherited is then its own. Within the context PyTorch 2.9 and newer raise an error
    where the older flags are read and disagree, as ``torch.backends.cudnn.flags`` does.
    """
    before = _precisions()
    try:
        _set_precisions(*(('ieee', 'ieee') if _HAS_PRECISIONS else ('highest', False)))
        yield
    finally:
        _set_precisions(*before)


def _precisions() -> Tuple[str, Union[str, bool]]:
    """The settings for products and for convolutions."""
    if _HAS_PRECISIONS:
        return torch.backends.cuda.matmul.fp32_precision, _CUDNN.conv.fp32_precision
    return torch.get_float32_matmul_precision(), _CUDNN.allow_tf32


def _set_precisions(products: str, convolutions: Union[str, bool]) -> None:
    if _HAS_PRECISIONS:
        torch.backends.cuda.matmul.fp32_precision = products
        _CUDNN.conv.fp32_precision = convolutions
    else:
        torch.set_float32_matmul_precision(products)
        _CUDNN.allow_tf32 = convolutions


def does_more_when_called(layer: nn.Module) -> bool:
    """Whether calling a module does more than its class's ``forward``.

    This is so if it has hooks, or a ``forward`` that was set on this object.
    """
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or 'forward' in layer.__dict__
    )


def is_call_compiled(layer: nn.Module) -> bool:
    """Whether ``torch.nn.Module.compile`` has compiled the calls of a module."""
    return layer._compiled_call_impl is not None


def parts_and_tensors(module: nn.Module) -> Tuple[List[nn.Module], List[Tensor]]:
    """All modules in a module, itself first, and all its parameters and buffers.

    What is used in several places may be listed as often. ``modules()``,
    ``parameters()`` and ``buffers()`` give the same in several times the time.
    """
    parts: List[nn.Module] = []
    tensors: List[Tensor] = []
    waiting = [module]
    while waiting:
        part = waiting.pop()
        parts.append(part)
        waiting.extend(child for child in part._modules.values() if child is not None)
        for owned in (part._parameters, part._buffers):
            tensors.extend(tensor for tensor in owned.values() if tensor is not None)
    return parts, tensors


def has_global_hooks() -> bool:
    """Whether hooks watch every call of every module, as FLOP counters do."""
    return bool(
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or module._global_backward_hooks
        or module._global_backward_pre_hooks
    )


def loss_scale(optim_wrapper: Any) -> Optional[Tensor]:
    """The loss scale of mixed precision, where it is: ``get_scale`` reads it.

    Args:
        optim_wrapper (OptimWrapper): MMEngine's wrapper of the optimiser.

    Returns:
        Tensor | None: Of shape (), float32, on the device of the losses. None if there
        is no scaler, if it is switched off, or before its first update.
    """
    scaler = getattr(optim_wrapper, 'loss_scaler', None)
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler._scale


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy many tensors to others of the same shapes, with one kernel."""
    torch._foreach_copy_(list(targets), list(sources))
