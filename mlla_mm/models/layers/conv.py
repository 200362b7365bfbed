# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.tracing import is_tracing


def conv_layer(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    norm: bool = True,
    act: bool = True,
) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU, each of the last two optional.

    The children are named ``conv``, ``norm`` and ``act`` as in the official
    checkpoints. Padding is "same" for stride 1.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers['conv'] = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding=kernel_size // 2,
        groups=groups,
        bias=bias,
    )
    if norm:
        layers['norm'] = nn.BatchNorm2d(out_channels)
    if act:
        layers['act'] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def pad_to_multiple(x: Tensor, divisor: int) -> Tensor:
    """Zero-pad (N, C, H, W) right and bottom until ``divisor`` divides H and W."""
    height, width = x.shape[-2:]
    # Not -height % divisor, whose multiples torch.export does not recognise as such.
    pad_bottom = (height + divisor - 1) // divisor * divisor - height
    pad_right = (width + divisor - 1) // divisor * divisor - width
    if is_tracing() or pad_bottom or pad_right:
        x = F.pad(x, (0, pad_right, 0, pad_bottom))
    return x


class DepthwiseConv2d(nn.Conv2d):
    """3x3 depthwise convolution with bias on channels-last maps (N, H, W, C).

    The permuted view is a channels-last tensor to PyTorch, so nothing is copied.

    Args:
        channels (int): Number of channels C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
