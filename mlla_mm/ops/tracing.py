# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import torch

from ..compat.pytorch import TELLS_EXPORT, is_compiling, is_exporting


def is_tracing() -> bool:
    """Whether a graph for every image size is being recorded.

    True inside ``torch.jit.trace``, which ONNX export and MMEngine's FLOP counter use,
    too, and inside ``torch.export``. Sizes are then tensors or symbols. Branches on
    sizes and caches by size would fix the sizes in the graph.
    """
    return torch.jit.is_tracing() or is_exporting()


def is_graph() -> bool:
    """Whether a graph is being recorded, also by ``torch.compile``.

    ``torch.compile`` could handle branches, but would make a graph for each.
    """
    return is_tracing() or is_compiling()


def is_compiled() -> bool:
    """Whether ``torch.compile`` is at work by itself, not for ``torch.export``.

    Always False before PyTorch 2.7, which cannot tell them apart. PyTorch 2.7 takes
    ``torch.export`` with ``strict=True``, which is not its default, for this one.
    """
    return TELLS_EXPORT and is_compiling() and not is_tracing()
