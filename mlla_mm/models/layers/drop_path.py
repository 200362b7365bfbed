# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from typing import Optional

import torch
from torch import Tensor, nn

from ...compat.pytorch import without_autocast


class DropPath(nn.Module):
    """Add a residual branch with stochastic depth (Huang et al., ECCV 2016).

    For each image n, in training with rate p::

        y_n = x_n + m_n / (1 - p) branch_n,    m_n = 1 with probability 1 - p, else 0

    In evaluation y = x + branch. The random numbers are those of mmcv's ``DropPath``,
    which gives the branch alone.

    Args:
        drop_prob (float): The rate p, in [0, 1).
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Both of shape (N, ...) -> (N, ...)."""
        # Not len(x), which would fix the number of images in a graph.
        scale = self.draw_scale(x.shape[0], branch.dtype, x.device)
        if scale is None:
            return x + branch
        scale = scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        # Autocast would cast the branch in a pass of its own.
        with without_autocast(x.device.type):
            return torch.addcmul(x, branch, scale)

    def draw_scale(
        self, number: int, dtype: torch.dtype, device: torch.device
    ) -> Optional[Tensor]:
        """Draw the factor of each image's branch.

        Args:
            number (int): Number of images N.
            dtype (torch.dtype): The branch's, in which random numbers are drawn.
            device (torch.device): Device of the result.

        Returns:
            Tensor | None: m / (1 - p), (N,), in float32, or float64 if that is the
            branch's dtype. None stands for ones.
        """
        if not self.drop_prob or not self.training:
            return None
        keep = 1 - self.drop_prob
        kept = torch.rand(number, dtype=dtype, device=device).add_(keep).floor_()
        # Not in place: torch.export of PyTorch 2.4 refuses that after a cast.
        return kept.to(torch.promote_types(dtype, torch.float32)) / keep

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:g}'
