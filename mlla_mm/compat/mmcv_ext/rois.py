# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Features of regions of interest (RoIs)."""

from typing import Tuple

import torch
from torch import Tensor

from .common import at_least_float32, missing_message, torchvision_ops


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (He et al., ICCV 2017) with average pooling.

    Args:
        input (Tensor): Features of shape (N, C, H, W).
        rois (Tensor): Image index and ``(x1, y1, x2, y2)`` in input pixels, of shape
            (K, 5). A RoI that is not finite gives zeros.
        output (Tensor): Output of shape (K, C, aligned_height, aligned_width).
        argmax_y (Tensor): Unused; for max pooling.
        argmax_x (Tensor): Unused; for max pooling.
        aligned_height (int): Number of bins along y.
        aligned_width (int): Number of bins along x.
        spatial_scale (float): Feature pixels per input pixel.
        sampling_ratio (int): Samples per bin along each axis. 0 means one per feature
            pixel.
        pool_mode (int): 1, average pooling.
        aligned (bool): Whether pixel centres lie at half-integer coordinates.

    Raises:
        NotImplementedError: If ``pool_mode`` is 0, max pooling.
    """
    _check_pool_mode(pool_mode)
    features = at_least_float32(input)
    output.copy_(
        torchvision_ops().roi_align(
            features,
            _finite(rois.to(features.dtype)),
            spatial_scale,
            aligned_height,
            aligned_width,
            sampling_ratio,
            aligned,
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of :func:`roi_align_forward` to ``grad_input``.

    Args:
        grad_output (Tensor): Gradient of the output, of shape
            (K, C, aligned_height, aligned_width).
        rois (Tensor): As in :func:`roi_align_forward`.
        argmax_y (Tensor): Unused; for max pooling.
        argmax_x (Tensor): Unused; for max pooling.
        grad_input (Tensor): The gradient is added to it, of shape (N, C, H, W).
        aligned_height (int): As in :func:`roi_align_forward`.
        aligned_width (int): As in :func:`roi_align_forward`.
        spatial_scale (float): As in :func:`roi_align_forward`.
        sampling_ratio (int): As in :func:`roi_align_forward`.
        pool_mode (int): 1, average pooling.
        aligned (bool): As in :func:`roi_align_forward`.

    Raises:
        NotImplementedError: If ``pool_mode`` is 0, max pooling.
    """
    _check_pool_mode(pool_mode)
    grad = at_least_float32(grad_output)
    grad_input.add_(
        torchvision_ops()._roi_align_backward(
            grad,
            _finite(rois.to(grad.dtype)),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )


def _finite(rois: Tensor) -> Tensor:
    """Move RoIs whose corners are not all finite to where there are no features.

    For their places, torchvision's CPU kernel reads memory of others.
    """
    boxes = rois[:, 1:]
    is_lost = ~boxes.isfinite().all(1, keepdim=True)
    return torch.cat([rois[:, :1], boxes.masked_fill(is_lost, -1e6)], dim=1)


def _check_pool_mode(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            missing_message("RoIAlign with pool_mode='max' (not 'avg')")
        )


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """RoIPool (Girshick, ICCV 2015): the largest feature of each bin.

    A bin covers every feature pixel that it touches. torchvision's op is another one:
    it rounds the corners of the RoI to whole feature pixels.

    Args:
        input (Tensor): Features of shape (N, C, H, W).
        rois (Tensor): Image index and ``(x1, y1, x2, y2)`` in input pixels, of shape
            (K, 5). A RoI is ``x2 - x1 + 1`` pixels wide. One that is not finite, or
            ends before it begins, gives zeros.
        output (Tensor): Output of shape (K, C, pooled_height, pooled_width). It is 0
            for bins without pixels.
        argmax (Tensor): Output of the same shape, int32: places ``y * W + x`` of the
            largest features. It is -1 for bins without pixels.
        pooled_height (int): Number of bins along y.
        pooled_width (int): Number of bins along x.
        spatial_scale (float): Feature pixels per input pixel.
    """
    features, rois = at_least_float32(input), _finite(at_least_float32(rois))
    height, width = features.shape[2:]
    images = rois[:, 0].long()[:, None, None]
    tops, bottoms = _bins(rois[:, 2], rois[:, 4], pooled_height, spatial_scale, height)
    lefts, rights = _bins(rois[:, 1], rois[:, 3], pooled_width, spatial_scale, width)
    features = features.permute(0, 2, 3, 1)
    best = features.new_full(output.permute(0, 2, 3, 1).shape, -torch.inf)
    places = torch.full_like(best, -1, dtype=torch.int)
    # In the order of places, so that of equal features the first one is taken.
    for down in range(_largest(bottoms - tops)):
        for right in range(_largest(rights - lefts)):
            y, x = (tops + down)[:, :, None], (lefts + right)[:, None]
            is_inside = (y < bottoms[:, :, None]) & (x < rights[:, None])
            y, x = y.clamp(max=height - 1), x.clamp(max=width - 1)
            values = features[images, y, x]
            is_better = is_inside[..., None] & (values > best)
            best = torch.where(is_better, values, best)
            places = torch.where(is_better, (y * width + x)[..., None].int(), places)
    is_empty = (bottoms <= tops)[:, :, None] | (rights <= lefts)[:, None]
    best = best.masked_fill(is_empty[..., None], 0)
    output.copy_(best.permute(0, 3, 1, 2))
    argmax.copy_(places.permute(0, 3, 1, 2))


def _bins(
    low: Tensor, high: Tensor, number: int, scale: float, size: int
) -> Tuple[Tensor, Tensor]:
    """First feature pixel of each bin, and the one after its last: (K, bins).

    The bins of a RoI that ends before it begins end at 0, so that they are empty.
    """
    start, length = low * scale, (high + 1 - low) * scale
    edges = torch.arange(number + 1, device=low.device) * (length / number)[:, None]
    edges = (edges + start[:, None]).clamp(0, size)
    ends = edges[:, 1:].ceil().masked_fill(length[:, None] <= 0, 0)
    return edges[:, :-1].floor().long(), ends.long()


def _largest(sizes: Tensor) -> int:
    return int(sizes.max()) if len(sizes) else 0


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add the gradient of :func:`roi_pool_forward` to ``grad_input``.

    Args:
        grad_output (Tensor): Gradient of the output, of shape
            (K, C, pooled_height, pooled_width).
        rois (Tensor): As in :func:`roi_pool_forward`.
        argmax (Tensor): As :func:`roi_pool_forward` has written it.
        grad_input (Tensor): The gradient is added to it, of shape (N, C, H, W).
        pooled_height (int): As in :func:`roi_pool_forward`.
        pooled_width (int): As in :func:`roi_pool_forward`.
        spatial_scale (float): As in :func:`roi_pool_forward`.
    """
    grad = at_least_float32(grad_output).masked_fill(argmax < 0, 0).flatten(2)
    places = argmax.long().clamp(min=0).flatten(2)
    channels = torch.arange(grad.shape[1], device=grad.device)[:, None]
    total = grad.new_zeros(grad_input.shape).flatten(2)
    images = rois[:, 0].long()[:, None, None]
    total.index_put_((images, channels, places), grad, accumulate=True)
    grad_input.add_(total.view(grad_input.shape))
