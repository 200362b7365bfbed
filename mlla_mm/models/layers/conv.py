# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from torch import Tensor, nn

from ... import ops


class ConvLayer(nn.Module):
    """Convolution, then optional BatchNorm, then optional ReLU.

    The children are named ``conv``, ``norm`` and ``act``, as in the official
    checkpoints. A child that is left out is None. The padding is half of the kernel, so
    stride 1 keeps the size of a map.

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
        kernel_size (int): Side of the kernel, an odd number.
        stride (int): Stride. Defaults to 1.
        groups (int): Number of groups. Defaults to 1.
        bias (bool): Whether the convolution has a bias. Defaults to False.
        norm (bool): Whether BatchNorm follows. Defaults to True.
        act (bool): Whether ReLU follows. Defaults to True.
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
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=bias,
        )
        self.norm = nn.BatchNorm2d(out_channels) if norm else None
        self.act = nn.ReLU(inplace=True) if act else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        return ops.conv_layer(x, self.conv, self.norm, self.act)
