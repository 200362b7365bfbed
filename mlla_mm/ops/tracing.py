# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import torch

from ..utils.compat import is_exporting


def is_tracing() -> bool:
    """Whether a graph is being recorded that shall serve every image size.

    True inside ``torch.jit.trace`` (which ONNX export and MMEngine's FLOP counter use
    too), where sizes are tensors, and ``torch.export``, where they are symbols. Python
    branches on sizes and caches by size would fix them in the graph. False under
    ``torch.compile``, which recompiles when a branch goes the other way.
    """
    return torch.jit.is_tracing() or is_exporting()
