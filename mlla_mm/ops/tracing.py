# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import torch

from ..compat.pytorch import TELLS_EXPORT, is_compiling, is_exporting


def is_tracing() -> bool:
    """Whether a graph is being recorded that shall serve every image size.

    True inside ``torch.jit.trace`` (which ONNX export and MMEngine's FLOP counter use
    too), where sizes are tensors, and ``torch.export``, where they are symbols. Python
    branches on sizes and caches by size would fix them in the graph.
    """
    return torch.jit.is_tracing() or is_exporting()


def is_graph() -> bool:
    """Whether a graph is being recorded, also by ``torch.compile``.

    That one could follow a branch, with a graph for each way.
    """
    return is_tracing() or is_compiling()


def is_compiled() -> bool:
    """Whether ``torch.compile`` is at work, and it is not for ``torch.export``.

    False before PyTorch 2.7, where that cannot be told.
    """
    return TELLS_EXPORT and is_compiling() and not is_tracing()
