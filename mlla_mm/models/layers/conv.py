# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import batch_norm, depthwise_conv, is_fused
from ...ops.tracing import is_graph
from .unmodified import is_unmodified

# The second one is the first in evaluation mode.
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class ConvLayer(nn.Sequential):
    """Convolution, BatchNorm, ReLU, each of the last two optional.

    The children are named ``conv``, ``norm`` and ``act`` as in the official
    checkpoints. Padding is "same" for stride 1.

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
        kernel_size (int): Side of the kernel.
        stride (int): Stride. Defaults to 1.
        groups (int): Number of groups. Defaults to 1.
        bias (bool): Whether the convolution has a bias. Defaults to False.
        norm (bool): Whether BatchNorm follows. Defaults to True.
        act (bool): Whether ReLU comes last. Defaults to True.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: bool = True,
    ) -> None:
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
        super().__init__(layers)

    def forward(self, x: Tensor) -> Tensor:
        norm = getattr(self, 'norm', None)
        if (
            norm is None
            or norm.training
            or not is_fused(x)
            or not self.has_own_layers()
        ):
            return super().forward(x)
        statistics = norm.running_mean, norm.running_var
        x, act = self.conv(x), hasattr(self, 'act')
        return batch_norm(x, *statistics, norm.weight, norm.bias, norm.eps, act)

    def has_own_layers(self) -> bool:
        """Whether the children are those that it was made with, without hooks."""
        kinds = dict(conv=nn.Conv2d, norm=_BATCH_NORMS, act=nn.ReLU)
        return all(
            is_unmodified(kinds.get(name, ()), layer)
            for name, layer in self.named_children()
        )


def pad_to_multiple(x: Tensor, divisor: int) -> Tensor:
    """Zero-pad (N, C, H, W) right and bottom until ``divisor`` divides H and W."""
    height, width = x.shape[-2:]
    # Not -height % divisor, whose multiples torch.export does not recognise as such.
    pad_bottom = (height + divisor - 1) // divisor * divisor - height
    pad_right = (width + divisor - 1) // divisor * divisor - width
    if is_graph() or pad_bottom or pad_right:
        x = F.pad(x, (0, pad_right, 0, pad_bottom))
    return x


class DepthwiseConv2d(nn.Conv2d):
    """3x3 depthwise convolution with bias on channels-last maps (N, H, W, C).

    Args:
        channels (int): Number of channels C.
        residual (bool): Whether to add the input. Defaults to False.
        act (bool): Whether SiLU follows. Defaults to False.
    """

    def __init__(
        self, channels: int, residual: bool = False, act: bool = False
    ) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)
        self.residual = residual
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv(x, self.weight, self.bias, self.residual, self.act)
