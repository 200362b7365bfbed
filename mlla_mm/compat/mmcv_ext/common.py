# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What the ops share: precision, torchvision's kernels and the error of missing ops."""

from typing import Any

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32.

    The kernels do not support bfloat16, and most do not support float16 on the CPU.
    Coordinates are also inexact: above 256 in bfloat16 and above 2048 in float16, the
    error reaches a pixel.

    Args:
        tensor (Tensor): Floating-point tensor of any shape.

    Returns:
        Tensor: In float32 if it was float16 or bfloat16, else unchanged.
    """
    return tensor.float() if tensor.dtype in (torch.half, torch.bfloat16) else tensor


def as_float32(value: float) -> float:
    """Round a threshold to float32, as compiled mmcv does.

    It matters for overlaps that are equal to the threshold.

    Args:
        value (float): Any number.

    Returns:
        float: The nearest number that float32 has.
    """
    return torch.tensor(value, dtype=torch.float32).item()


def torchvision_ops() -> Any:
    """Import torchvision.

    Returns:
        Any: The namespace of its kernels, ``torch.ops.torchvision``.

    Raises:
        ImportError: If torchvision is missing or is for another PyTorch.
    """
    try:
        import torchvision.ops  # noqa: F401
    except (ImportError, RuntimeError) as error:
        # The RuntimeError is "operator torchvision::nms does not exist", of a
        # torchvision for another PyTorch.
        raise ImportError(
            'NMS, RoIAlign and deformable convolution need a torchvision for PyTorch '
            f'{torch.__version__}, and importing torchvision failed: {error}. `python '
            '-m mlla_mm.utils.collect_env` names the version to install.'
        ) from error
    return torch.ops.torchvision


def commands() -> str:
    """Give the commands that install compiled mmcv.

    Returns:
        str: Lines for a shell.
    """
    # Imported here so that nothing else is imported before install().
    from ..stack import compiled_mmcv_commands

    return compiled_mmcv_commands()


def missing_message(what: str) -> str:
    """Say that something needs compiled mmcv, and how to get it.

    Args:
        what (str): Subject of the sentence.

    Returns:
        str: Message for an error.
    """
    return (
        f"{what} needs mmcv's compiled ops, and this mmcv was installed without them. "
        f'To get them:\n{commands()}'
    )
