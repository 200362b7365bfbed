# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Folding BatchNorm into convolutions, for inference."""

from collections import Counter
from typing import Optional

import mmcv.cnn
from mmcv.cnn.bricks.wrappers import Conv2d
from torch import nn
from torch.nn.utils import parametrize

from ..compat.pytorch import BatchNorm, does_more_when_called


def fuse_conv_bn(model: nn.Module) -> nn.Module:
    """Fold every BatchNorm into the convolution before it, by mmcv's function.

    ::

        w' = w * gamma / sqrt(var + eps)
        b' = beta + (b - mean) * gamma / sqrt(var + eps)

    The results are the same, but for rounding. After that the model is for inference
    only.

    mmcv's function takes the children of a module in the order in which they were
    created. So the check before it cannot see whether ``forward`` calls them in another
    order.

    Args:
        model (nn.Module): A model in evaluation mode. It is changed in place.

    Returns:
        nn.Module: The model.

    Raises:
        ValueError: If a BatchNorm cannot be folded: it does not follow a plain
            convolution of its own, or it does not use running statistics. The model is
            not changed then.
    """
    uses = Counter(
        id(module)
        for _, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Conv2d)
    )
    for name, parent in model.named_modules():
        # mmcv's function looks for pairs in the same way.
        conv: Optional[nn.Conv2d] = None
        last = parent
        for child_name, child in parent.named_children():
            if isinstance(child, BatchNorm) and conv is not None:
                problem = _problem(parent, conv, last, child, uses[id(conv)])
                if problem is not None:
                    raise ValueError(
                        f'{f"{name}.{child_name}".lstrip(".")} cannot be folded into a '
                        f'convolution: {problem}. Leave fuse_conv_bn out.'
                    )
                conv = None
            elif isinstance(child, nn.Conv2d):
                conv = child
            last = child
    return mmcv.cnn.fuse_conv_bn(model)


def _problem(
    parent: nn.Module, conv: nn.Conv2d, last: nn.Module, norm: BatchNorm, uses: int
) -> Optional[str]:
    """Why a BatchNorm cannot be folded into the convolution that mmcv would take."""
    if last is not conv:
        return f'a {type(last).__name__} lies between them'
    if isinstance(parent, mmcv.cnn.ConvModule):
        order = parent.order
        if order.index('norm') < order.index('conv'):
            return 'it comes before the convolution'
    if uses > 1:
        return 'the convolution is used in several places'
    if type(conv) not in (nn.Conv2d, Conv2d) or parametrize.is_parametrized(conv):
        return f'the convolution is a {type(conv).__name__}'
    if does_more_when_called(conv) or does_more_when_called(norm):
        return 'one of them has hooks'
    if norm.training or norm.running_mean is None or norm.weight is None:
        return 'it is in training mode, or lacks running statistics or a weight'
    if norm.num_features != conv.out_channels:
        return 'they have different numbers of channels'
    return None
