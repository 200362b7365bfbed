# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import torch.nn.functional as F
from torch import Tensor

from .tracing import is_graph


def pad_to_multiple(x: Tensor, divisor: int) -> Tensor:
    """Zero-pad (N, C, H, W) right and bottom, so that ``divisor`` divides H and W."""
    height, width = x.shape[-2:]
    # After -height % divisor, torch.export would not see that the result is a multiple.
    pad_bottom = (height + divisor - 1) // divisor * divisor - height
    pad_right = (width + divisor - 1) // divisor * divisor - width
    # A graph has to pad other sizes, even if the size that it is made with needs none.
    if is_graph() or pad_bottom or pad_right:
        x = F.pad(x, (0, pad_right, 0, pad_bottom))
    return x
