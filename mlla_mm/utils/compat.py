# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What differs between the supported versions of PyTorch, from 2.1 on.

The two sets of OpenMMLab packages run the same code; which of them is installed, and
what is wrong with it, tells :mod:`mlla_mm.utils.stack`.
"""

import torch

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
