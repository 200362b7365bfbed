# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import torch.nn.functional as F
from torch import Tensor

from .tracing import is_graph


def pad_to_multiple(x: Tensor, divisor: int) -> Tensor:
    """Zero-pad (N, C, H, W) right and bottom until ``divisor`` divides H and W."""
    height, width = x.shape[-2:]
    # Not -height % divisor, whose multiples torch.export does not recognise as such.
    pad_bottom = (height + divisor - 1) // divisor * divisor - height
    pad_right = (width + divisor - 1) // divisor * divisor - width
    # A graph serves sizes that need padding, whatever the size that it is made with.
    if is_graph() or pad_bottom or pad_right:
        x = F.pad(x, (0, pad_right, 0, pad_bottom))
    return x
