# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Deformable attention and deformable convolution.

Both sample features between pixels, bilinearly, at places that the network predicts.
Outside the features are zeros.
"""

from collections.abc import Iterator, Sequence
from typing import List, Optional, Tuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from .common import at_least_float32, torchvision_ops


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    r"""Multi-scale deformable attention (Zhu et al., ICLR 2021, equation 3).

    With the places :math:`p_{lk}` and weights :math:`A_{lk}` of a query and head, its
    output is :math:`\sum_l \sum_k A_{lk} V_l(p_{lk})`.

    Args:
        value (Tensor): Features of all levels, one level after the other, of shape
            (N, sum of H * W, heads, channels).
        value_spatial_shapes (Tensor): ``(H, W)`` of each level, int64, of shape
            (levels, 2). Reading them waits for the GPU.
        value_level_start_index (Tensor): Unused.
        sampling_locations (Tensor): Places ``(x, y)``, from 0 to 1 within the features,
            of shape (N, queries, heads, levels, points, 2).
        attention_weights (Tensor): Weights of the places, of shape
            (N, queries, heads, levels, points).
        im2col_step (int): Unused.

    Returns:
        Tensor: Output of shape (N, queries, heads * channels), in the dtype of
        ``value``.
    """
    batch, _, heads, _ = value.shape
    levels = _split_levels(
        value, value_spatial_shapes, sampling_locations, attention_weights
    )
    outputs = [
        (grid_sample(maps, grids, align_corners=False) * weights[:, None]).sum(-1)
        for maps, grids, weights in levels
    ]
    output = torch.stack(outputs).sum(0).unflatten(0, (batch, heads))
    return output.flatten(1, 2).transpose(1, 2).to(value.dtype).contiguous()


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Add the gradients of :func:`ms_deform_attn_forward` to three tensors.

    Args:
        value (Tensor): As in :func:`ms_deform_attn_forward`.
        value_spatial_shapes (Tensor): As in :func:`ms_deform_attn_forward`.
        value_level_start_index (Tensor): Unused.
        sampling_locations (Tensor): As in :func:`ms_deform_attn_forward`.
        attention_weights (Tensor): As in :func:`ms_deform_attn_forward`.
        grad_output (Tensor): Gradient of the output, of shape
            (N, queries, heads * channels).
        grad_value (Tensor): That of ``value`` is added to it.
        grad_sampling_loc (Tensor): That of ``sampling_locations`` is added to it.
        grad_attn_weight (Tensor): That of ``attention_weights`` is added to it.
        im2col_step (int): Unused.
    """
    batch, _, heads, channels = value.shape
    grad = at_least_float32(grad_output).unflatten(2, (heads, channels))
    grad = grad.permute(0, 2, 3, 1).flatten(0, 1)[..., None]
    levels = _split_levels(
        value, value_spatial_shapes, sampling_locations, attention_weights
    )
    end = 0
    for level, (maps, grids, weights) in enumerate(levels):
        samples = grid_sample(maps, grids, align_corners=False)
        of_weights = (grad * samples).sum(1)
        of_maps, of_grids = torch.ops.aten.grid_sampler_2d_backward(
            grad * weights[:, None],
            maps,
            grids,
            interpolation_mode=0,  # bilinear
            padding_mode=0,  # zeros
            align_corners=False,
            output_mask=[True, True],
        )
        start, end = end, end + maps[0, 0].numel()
        of_values = of_maps.flatten(2).unflatten(0, (batch, heads))
        grad_value[:, start:end].add_(of_values.permute(0, 3, 1, 2))
        of_locations = 2 * of_grids.unflatten(0, (batch, heads)).transpose(1, 2)
        grad_sampling_loc[:, :, :, level].add_(of_locations)
        of_weights = of_weights.unflatten(0, (batch, heads)).transpose(1, 2)
        grad_attn_weight[:, :, :, level].add_(of_weights)


def _split_levels(
    value: Tensor,
    value_spatial_shapes: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Iterator[Tuple[Tensor, Tensor, Tensor]]:
    """Rearrange one level after the other for ``grid_sample``; B is N * heads.

    Yields:
        Tuple[Tensor, Tensor, Tensor]: Features (B, channels, H, W), places from -1 to 1
        (B, queries, points, 2) and weights (B, queries, points).
    """
    shapes = value_spatial_shapes.tolist()
    values = value.split([height * width for height, width in shapes], dim=1)
    for level, (shape, maps) in enumerate(zip(shapes, values)):
        maps = maps.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, shape)
        grids = 2 * at_least_float32(sampling_locations[:, :, :, level]) - 1
        weights = attention_weights[:, :, :, level]
        yield (
            at_least_float32(maps),
            grids.transpose(1, 2).flatten(0, 1),
            weights.transpose(1, 2).flatten(0, 1),
        )


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution (Dai et al., ICCV 2017).

    Args:
        input (Tensor): Features of shape (N, C, H, W).
        weight (Tensor): Kernel of shape (D, C / group, kH, kW).
        offset (Tensor): Shifts ``(y, x)`` in pixels, of each place of the kernel, of
            shape (N, deformable_group * kH * kW * 2, H', W').
        output (Tensor): Output of shape (N, D, H', W').
        columns (Tensor): Unused.
        ones (Tensor): Unused.
        kW (int): Width of the kernel.
        kH (int): Height of the kernel.
        dW (int): Stride along x.
        dH (int): Stride along y.
        padW (int): Columns of zeros left and right of the features.
        padH (int): Rows of zeros above and below the features.
        dilationW (int): Distance along x between places of the kernel.
        dilationH (int): Distance along y between places of the kernel.
        group (int): Number of groups of input and output channels.
        deformable_group (int): Number of groups of input channels with the same shifts.
        im2col_step (int): Unused.
    """
    settings = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(_deform_conv(input, weight, offset, None, None, settings))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Add the gradients of :func:`deform_conv_forward` by the features and the shifts.

    Args:
        input (Tensor): As in :func:`deform_conv_forward`, like all that follow.
        offset (Tensor): Shifts.
        gradOutput (Tensor): Gradient of the output.
        gradInput (Tensor): That of ``input`` is added to it.
        gradOffset (Tensor): That of ``offset`` is added to it.
        weight (Tensor): Kernel.
        columns (Tensor): Unused.
        kW (int): Width of the kernel.
        kH (int): Height of the kernel.
        dW (int): Stride along x.
        dH (int): Stride along y.
        padW (int): Padding along x.
        padH (int): Padding along y.
        dilationW (int): Dilation along x.
        dilationH (int): Dilation along y.
        group (int): Number of groups.
        deformable_group (int): Number of groups of shifts.
        im2col_step (int): Unused.
    """
    settings = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _deform_conv_grads(gradOutput, input, weight, offset, None, None, settings)
    of_input, _, of_offset, _, _ = grads
    gradInput.add_(of_input)
    gradOffset.add_(of_offset)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add the gradient of :func:`deform_conv_forward` by the kernel.

    torchvision computes all gradients at once, so those of
    :func:`deform_conv_backward_input` are computed here again.

    Args:
        input (Tensor): As in :func:`deform_conv_forward`, like all that follow.
        offset (Tensor): Shifts.
        gradOutput (Tensor): Gradient of the output.
        gradWeight (Tensor): That of the kernel, times ``scale``, is added to it.
        columns (Tensor): Unused.
        ones (Tensor): Unused.
        kW (int): Width of the kernel.
        kH (int): Height of the kernel.
        dW (int): Stride along x.
        dH (int): Stride along y.
        padW (int): Padding along x.
        padH (int): Padding along y.
        dilationW (int): Dilation along x.
        dilationH (int): Dilation along y.
        group (int): Number of groups.
        deformable_group (int): Number of groups of shifts.
        scale (float): Factor of the gradient.
        im2col_step (int): Unused.
    """
    settings = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    # The gradient by the kernel does not depend on the kernel, only on its shape.
    grads = _deform_conv_grads(
        gradOutput, input, gradWeight, offset, None, None, settings
    )
    gradWeight.add_(grads[1], alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Deformable convolution with a weight for each sample (Zhu et al., CVPR 2019).

    Shifts and weights may be of a larger output, as DyHead's are. As in mmcv, the first
    numbers of an image are then taken, one after the other.

    Args:
        input (Tensor): As in :func:`deform_conv_forward`.
        weight (Tensor): As in :func:`deform_conv_forward`.
        bias (Tensor): Bias of shape (D, ), if ``with_bias``.
        ones (Tensor): Unused.
        offset (Tensor): As in :func:`deform_conv_forward`.
        mask (Tensor): Weights of the samples, of shape
            (N, deformable_group * kernel_h * kernel_w, H', W').
        output (Tensor): Output of shape (N, D, H', W').
        columns (Tensor): Unused.
        kernel_h (int): Height of the kernel.
        kernel_w (int): Width of the kernel.
        stride_h (int): Stride along y.
        stride_w (int): Stride along x.
        pad_h (int): Rows of zeros above and below the features.
        pad_w (int): Columns of zeros left and right of the features.
        dilation_h (int): Distance along y between places of the kernel.
        dilation_w (int): Distance along x between places of the kernel.
        group (int): Number of groups of input and output channels.
        deformable_group (int): Number of groups of input channels with the same shifts.
        with_bias (bool): Whether the bias is added.
    """
    settings = (
        *(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w),
        *(group, deformable_group),
    )
    size = output.shape[2:]
    offset, mask = _first_numbers(offset, size), _first_numbers(mask, size)
    output.copy_(
        _deform_conv(input, weight, offset, mask, bias if with_bias else None, settings)
    )


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Add the gradients of :func:`modulated_deform_conv_forward` to five tensors.

    Args:
        input (Tensor): As in :func:`modulated_deform_conv_forward`, like all that
            follow.
        weight (Tensor): Kernel.
        bias (Tensor): Bias, if ``with_bias``.
        ones (Tensor): Unused.
        offset (Tensor): Shifts.
        mask (Tensor): Weights of the samples.
        columns (Tensor): Unused.
        grad_input (Tensor): The gradient of ``input`` is added to it.
        grad_weight (Tensor): That of ``weight`` is added to it.
        grad_bias (Tensor): That of ``bias`` is added to it, if ``with_bias``.
        grad_offset (Tensor): That of ``offset`` is added to it.
        grad_mask (Tensor): That of ``mask`` is added to it.
        grad_output (Tensor): Gradient of the output.
        kernel_h (int): Height of the kernel.
        kernel_w (int): Width of the kernel.
        stride_h (int): Stride along y.
        stride_w (int): Stride along x.
        pad_h (int): Padding along y.
        pad_w (int): Padding along x.
        dilation_h (int): Dilation along y.
        dilation_w (int): Dilation along x.
        group (int): Number of groups.
        deformable_group (int): Number of groups of shifts.
        with_bias (bool): Whether the bias was added.
    """
    settings = (
        *(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w),
        *(group, deformable_group),
    )
    size = grad_output.shape[2:]
    grads = _deform_conv_grads(
        grad_output,
        input,
        weight,
        _first_numbers(offset, size),
        _first_numbers(mask, size),
        bias if with_bias else None,
        settings,
    )
    of_input, of_weight, of_offset, of_mask, of_bias = grads
    grad_input.add_(of_input)
    grad_weight.add_(of_weight)
    grad_offset.add_(_fill_with_zeros(of_offset, grad_offset.shape))
    grad_mask.add_(_fill_with_zeros(of_mask, grad_mask.shape))
    if with_bias:
        grad_bias.add_(of_bias)


def _first_numbers(tensor: Tensor, size: torch.Size) -> Tensor:
    """Make a tensor (N, C, H, W) of this size (H', W'), if it is larger."""
    number = tensor.shape[1] * size.numel()
    if number >= tensor.shape[1:].numel():
        return tensor
    return tensor.flatten(1)[:, :number].unflatten(1, (-1, *size))


def _fill_with_zeros(grad: Tensor, shape: torch.Size) -> Tensor:
    """Turn the gradient by :func:`_first_numbers` into that by the larger tensor."""
    grad = grad.flatten(1)
    return pad(grad, (0, shape[1:].numel() - grad.shape[1])).view(shape)


# Strides, padding and dilation, each along y and x, groups, and groups of shifts.
_Settings = Tuple[int, int, int, int, int, int, int, int]


def _deform_conv(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Optional[Tensor],
    bias: Optional[Tensor],
    settings: _Settings,
) -> Tensor:
    """Call torchvision's kernel."""
    factors = _factors(input, weight, offset, mask, bias)
    return torchvision_ops().deform_conv2d(*factors, *settings, mask is not None)


def _deform_conv_grads(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Optional[Tensor],
    bias: Optional[Tensor],
    settings: _Settings,
) -> Tuple[Tensor, ...]:
    """Gradients by input, weight, offset, mask and bias."""
    factors = _factors(input, weight, offset, mask, bias)
    grads = torchvision_ops()._deform_conv2d_backward(
        at_least_float32(grad), *factors, *settings, mask is not None
    )
    _clear_at_border(grads[2], factors[2], weight.shape[2:], settings)
    return grads


def _clear_at_border(
    grad: Tensor, offset: Tensor, kernel_size: Sequence[int], settings: _Settings
) -> None:
    """Set the gradient of shifts to 0 that lead to row -1 or column -1, as mmcv does.

    There the features begin to differ from zero, so that each side has its derivative.
    torchvision takes the inner side's. Networks start there, with shifts of 0.
    """
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, _, shift_groups = settings
    batch, _, height, width = offset.shape
    shape = (batch, shift_groups, *kernel_size, 2, height, width)

    def steps(number: int, size: int) -> Tensor:
        return torch.arange(0, number * size, size, device=offset.device)

    rows = steps(kernel_size[0], dilation_h)[:, None] + steps(height, stride_h) - pad_h
    columns = steps(kernel_size[1], dilation_w)[:, None] + steps(width, stride_w)
    y, x = offset.view(shape).unbind(4)
    y = y + rows[:, None, :, None]
    x = x + (columns - pad_w)[:, None]
    is_at_border = (y == -1) | (x == -1)
    grad.view(shape).masked_fill_(is_at_border.unsqueeze(4), 0)


def _factors(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Optional[Tensor],
    bias: Optional[Tensor],
) -> List[Tensor]:
    """Tensors for torchvision, which wants some in place of a mask and of a bias."""
    # For a shift that is not a number, its CPU kernel reads memory of others. As in
    # mmcv, such a shift leads outside.
    offset = at_least_float32(offset).nan_to_num(torch.inf, torch.inf, -torch.inf)
    if mask is None:
        mask = input.new_zeros(len(input), 1)
    if bias is None:
        bias = input.new_zeros(len(weight))
    return [at_least_float32(x) for x in (input, weight, offset, mask, bias)]
