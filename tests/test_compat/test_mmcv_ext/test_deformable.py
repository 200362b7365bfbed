# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import itertools

import pytest
import torch
from torch.nn.functional import conv2d
from torch.nn.modules.utils import _pair

from mlla_mm.compat import mmcv_ext

from .shared import DEVICES, HALF, extension, mmcv_ops, needs_compiled, needs_stand_in


def sample(maps, y, x):
    """Interpolate maps (C, H, W) bilinearly at pixels y and x; zeros lie outside."""
    height, width = maps.shape[1:]
    total = 0
    for row, of_row in ((y.floor(), 1 - y % 1), (y.floor() + 1, y % 1)):
        for column, of_column in ((x.floor(), 1 - x % 1), (x.floor() + 1, x % 1)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            row_, column_ = row.clamp(0, height - 1), column.clamp(0, width - 1)
            pixels = maps[:, row_.long(), column_.long()]
            total = total + pixels * (of_row * of_column * inside)
    return total


def gradients(outputs, weights, inputs):
    return torch.autograd.grad((outputs * weights).sum(), inputs)


# --- Multi-scale deformable attention ---


SHAPES = torch.tensor([(6, 4), (3, 2), (1, 5)])


def attention_case(generator, dtype=torch.float64, device='cpu'):
    """Features, shapes, starts, places and weights: 2 images, 3 heads, 7 channels."""
    sizes = SHAPES.prod(1)
    value = torch.randn(2, int(sizes.sum()), 3, 7, generator=generator)
    # Some lie outside.
    places = torch.rand(2, 5, 3, 3, 4, 2, generator=generator) * 1.6 - 0.3
    weights = torch.rand(2, 5, 3, 3, 4, generator=generator)
    starts = sizes.cumsum(0) - sizes
    case = [value.to(dtype), SHAPES, starts, places.to(dtype), weights.to(dtype)]
    return [tensor.to(device) for tensor in case]


def plain_attention(value, shapes, starts, places, weights):
    output = torch.zeros_like(places[..., 0, 0, :1]).repeat_interleave(7, -1)
    for image in range(2):
        for head in range(3):
            for level, (height, width) in enumerate(shapes.tolist()):
                start = int(starts[level])
                maps = value[image, start : start + height * width, head].T
                x, y = places[image, :, head, level].unbind(-1)
                samples = sample(
                    maps.unflatten(1, (height, width)),
                    y * height - 0.5,
                    x * width - 0.5,
                )
                factors = weights[image, :, head, level]
                output[image, :, head] += (samples * factors).sum(-1).T
    return output.flatten(2)


def attend(value, shapes, starts, places, weights):
    function = mmcv_ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction
    return function.apply(value, shapes, starts, places, weights, 64)


@needs_stand_in
@pytest.mark.parametrize('device', DEVICES)
def test_attention_follows_its_definition(device, generator):
    case = attention_case(generator)
    ours = [tensor.to(device) for tensor in case]
    for tensors in (case, ours):
        for i in (0, 3, 4):
            tensors[i] = tensors[i].clone().requires_grad_()
    expected, found = plain_attention(*case), attend(*ours)
    torch.testing.assert_close(found.cpu(), expected)
    assert found.is_contiguous()
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    wanted = gradients(expected, weights, [case[i] for i in (0, 3, 4)])
    grads = gradients(found, weights.to(device), [ours[i] for i in (0, 3, 4)])
    for grad, want in zip(grads, wanted):
        torch.testing.assert_close(grad.cpu(), want)


@needs_stand_in
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('autocast', [False, True])
def test_attention_in_half_precision_is_computed_in_float32(
    autocast, dtype, device, generator
):
    case = attention_case(generator, dtype, device)
    exact = [x.float() if x.is_floating_point() else x for x in case]
    grads = [case[i].clone().zero_() for i in (0, 3, 4)]
    wanted = [exact[i].clone().zero_() for i in (0, 3, 4)]
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        found = mmcv_ext.ms_deform_attn_forward(*case, 64)
        mmcv_ext.ms_deform_attn_backward(*case, found, *grads, 64)
    expected = mmcv_ext.ms_deform_attn_forward(*exact, 64)
    assert torch.equal(found, expected.to(dtype))
    mmcv_ext.ms_deform_attn_backward(*exact, found.float(), *wanted, 64)
    for grad, want in zip(grads, wanted):
        torch.testing.assert_close(grad, want.to(dtype))


def test_attention_adds_its_gradients(generator):
    case = attention_case(generator)
    grad_output = torch.ones(2, 5, 21, dtype=torch.float64)
    first = [torch.zeros_like(case[i]) for i in (0, 3, 4)]
    second = [torch.full_like(case[i], 3) for i in (0, 3, 4)]
    for grads in (first, second):
        mmcv_ext.ms_deform_attn_backward(*case, grad_output, *grads, 64)
    for a, b in zip(first, second):
        assert a.any()
        torch.testing.assert_close(a + 3, b)


def test_attention_without_queries(generator):
    case = attention_case(generator)
    case[3:] = case[3][:, :0], case[4][:, :0]
    output = mmcv_ext.ms_deform_attn_forward(*case, 64)
    assert output.shape == (2, 0, 21)
    grads = [torch.zeros_like(case[i]) for i in (0, 3, 4)]
    mmcv_ext.ms_deform_attn_backward(*case, output, *grads, 64)
    assert not grads[0].any()


def test_attention_refuses_levels_that_do_not_fill_the_features(generator):
    case = attention_case(generator)
    case[1] = SHAPES + 1
    with pytest.raises(RuntimeError, match='split_with_sizes'):
        mmcv_ext.ms_deform_attn_forward(*case, 64)


# --- Deformable convolution ---


def plain_deform_conv(x, offset, mask, weight, bias, settings):
    stride, padding, dilation, groups, deform_groups = settings
    kernel_h, kernel_w = weight.shape[2:]
    height, width = offset.shape[2:]
    shifts = offset.view(len(x), deform_groups, kernel_h, kernel_w, 2, height, width)
    factors = mask.view(len(x), deform_groups, kernel_h, kernel_w, height, width)
    rows = torch.arange(height)[:, None] * stride[0] - padding[0]
    columns = torch.arange(width) * stride[1] - padding[1]
    total = 0
    for i in range(kernel_h):
        for j in range(kernel_w):
            y = shifts[:, :, i, j, 0] + rows + i * dilation[0]
            x_ = shifts[:, :, i, j, 1] + columns + j * dilation[1]
            samples = [
                sample(part, y[n, g], x_[n, g]) * factors[n, g, i, j]
                for n, image in enumerate(x)
                for g, part in enumerate(image.chunk(deform_groups))
            ]
            samples = torch.stack(samples).view(*x.shape[:2], height, width)
            one = weight[:, :, i : i + 1, j : j + 1]
            total = total + conv2d(samples, one, groups=groups)
    return total + bias[:, None, None]


# Stride, padding, dilation, groups, groups of shifts; and the size of the kernel.
CONVOLUTIONS = {
    'plain': (((1, 1), (1, 1), (1, 1), 1, 1), (3, 3)),
    'strided': (((2, 3), (1, 0), (1, 1), 1, 1), (3, 3)),
    'dilated': (((1, 1), (2, 4), (2, 3), 1, 1), (3, 3)),
    'uneven': (((1, 2), (0, 2), (1, 1), 1, 1), (1, 5)),
    'groups': (((1, 1), (1, 1), (1, 1), 2, 1), (3, 3)),
    'groups of shifts': (((1, 1), (1, 1), (1, 1), 1, 4), (3, 3)),
    'both groups': (((2, 1), (1, 1), (1, 2), 2, 4), (3, 2)),
}


def conv_case(name, generator, dtype=torch.float64):
    """Features, shifts, weights of samples, kernel and bias."""
    settings, kernel_size = CONVOLUTIONS[name]
    stride, padding, dilation, groups, deform_groups = settings

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x = randn(2, 8, 9, 11)
    weight = randn(6, 8 // groups, *kernel_size)
    size = conv2d(x[:, :1], weight[:1, :1], None, stride, padding, dilation).shape[2:]
    places = deform_groups * kernel_size[0] * kernel_size[1]
    case = [x, 2 * randn(2, places * 2, *size), randn(2, places, *size)]
    return [tensor.to(dtype) for tensor in (*case, weight, randn(6))], settings


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_modulated_convolution_follows_its_definition(name, device, generator):
    case, settings = conv_case(name, generator)
    ours = [tensor.to(device).requires_grad_() for tensor in case]
    theirs = [tensor.clone().requires_grad_() for tensor in case]
    found = mmcv_ops.modulated_deform_conv2d(*ours, *settings)
    expected = plain_deform_conv(*theirs, settings)
    torch.testing.assert_close(found.cpu(), expected)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    grads = gradients(found, weights.to(device), ours)
    for grad, want in zip(grads, gradients(expected, weights, theirs)):
        torch.testing.assert_close(grad.cpu(), want)
    without = mmcv_ops.modulated_deform_conv2d(*ours[:4], None, *settings)
    torch.testing.assert_close(without + ours[4][:, None, None], found)
    # The bias that mmcv makes up gets no gradient.
    gradients(without, 1, ours[:4])


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_deformable_convolution_follows_its_definition(name, device, generator):
    (x, offset, mask, weight, bias), settings = conv_case(name, generator)
    ours = [t.to(device).requires_grad_() for t in (x, offset, weight)]
    x, offset, weight = (t.clone().requires_grad_() for t in (x, offset, weight))
    found = mmcv_ops.deform_conv2d(*ours, *settings)
    ones, zeros = torch.ones_like(mask), torch.zeros_like(bias)
    expected = plain_deform_conv(x, offset, ones, weight, zeros, settings)
    torch.testing.assert_close(found.cpu(), expected)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    grads = gradients(found, weights.to(device), ours)
    for grad, want in zip(grads, gradients(expected, weights, [x, offset, weight])):
        torch.testing.assert_close(grad.cpu(), want)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(
    'stride, padding, dilation',
    [(1, 1, 1), ((2, 1), 3, (1, 2)), ((1, 2), 3, (2, 1))],
)
def test_shifts_of_zero_have_no_gradient_above_and_left_of_the_features(
    stride, padding, dilation, device
):
    """As in mmcv. There the derivative jumps, and networks start there."""
    x = torch.ones(1, 1, 6, 6, dtype=torch.float64, device=device)
    weight = torch.ones(1, 1, 3, 3, dtype=x.dtype, device=device)
    settings = (stride, padding, dilation)
    size = conv2d(x, weight, None, *settings).shape[2:]
    offset = torch.zeros(1, 18, *size, dtype=x.dtype, device=device).requires_grad_()
    mmcv_ops.deform_conv2d(x, offset, weight, *settings).sum().backward()
    grad = offset.grad.view(3, 3, 2, *size)
    steps = zip(*map(_pair, settings))
    (stride_y, pad_y, dilation_y), (stride_x, pad_x, dilation_x) = steps
    for i, j, row, column in itertools.product(range(3), range(3), *map(range, size)):
        y = row * stride_y - pad_y + i * dilation_y
        x = column * stride_x - pad_x + j * dilation_x
        inside = 0 <= y <= 5 and 0 <= x <= 5
        # The features end behind row 5 and column 5.
        expected = [-1 if inside and place == 5 else 0 for place in (y, x)]
        assert grad[i, j, :, row, column].tolist() == expected


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('autocast', [False, True])
@needs_stand_in
def test_convolution_in_half_precision_is_computed_in_float32(
    autocast, dtype, device, generator
):
    case, settings = conv_case('both groups', generator, dtype)
    results = []
    for tensors in (case, [tensor.float() for tensor in case]):
        leaves = [tensor.to(device).requires_grad_() for tensor in tensors]
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            output = mmcv_ops.modulated_deform_conv2d(*leaves, *settings)
            x, offset, _, weight, _ = leaves
            other = mmcv_ops.deform_conv2d(x, offset, weight, *settings)
        # A power of two is exact in all dtypes.
        grads = gradients(output, 0.5, leaves)
        results.append([output, other, *grads, *gradients(other, 0.5, leaves[:2])])
    for found, expected in zip(*results):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected.to(dtype))


def test_convolution_adds_its_gradients(generator):
    (x, offset, mask, weight, bias), settings = conv_case('plain', generator)
    case = (x, offset, mask, weight, bias)
    grad_output = mmcv_ops.modulated_deform_conv2d(*case, *settings)
    x_, offset_, mask_, weight_, bias_ = (torch.full_like(t, 3) for t in case)
    zeros = [torch.zeros_like(tensor) for tensor in (x, weight, bias, offset, mask)]
    sizes = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1)
    tensors = (x, weight, bias, bias, offset, mask, bias)
    added = (x_, weight_, bias_, offset_, mask_)
    for grads in (zeros, added):
        mmcv_ext.modulated_deform_conv_backward(
            *tensors, *grads, grad_output, *sizes, True
        )
    for grad, want in zip(added, zeros):
        assert want.any()
        torch.testing.assert_close(grad, want + 3)
    halves = torch.full_like(weight, 3)
    ones = torch.zeros_like(weight)
    for grad, scale in ((halves, 0.5), (ones, 1.0)):
        mmcv_ext.deform_conv_backward_parameters(
            x, offset, grad_output, grad, bias, bias, *sizes, scale, 2
        )
    assert ones.any()
    torch.testing.assert_close(halves, 3 + ones / 2)


@pytest.mark.parametrize('device', DEVICES)
@needs_stand_in
def test_a_shift_that_is_not_a_number_leads_outside(device, generator):
    case, settings = conv_case('plain', generator)
    x, offset, mask, weight, bias = (tensor.to(device) for tensor in case)
    is_lost = torch.rand(offset.shape, generator=generator).to(device) > 0.8
    results = []
    for place in (torch.nan, 1000.0):
        shifts = offset.masked_fill(is_lost, place)
        plain = mmcv_ops.deform_conv2d(x, shifts, weight, *settings)
        args = (x, shifts, mask, weight, bias)
        results.append((plain, mmcv_ops.modulated_deform_conv2d(*args, *settings)))
    torch.testing.assert_close(*results)


def larger_case(generator):
    """Shifts and weights of DyHead: parts of one tensor, of another level."""
    case, settings = conv_case('both groups', generator)
    x, offset, mask, weight, bias = case
    height, width = offset.shape[2:]
    channels = offset.shape[1] + mask.shape[1]
    shape = (2, channels, height + 3, width + 2)
    both = torch.randn(shape, dtype=torch.float64, generator=generator)
    return x, both, offset.shape[1:], mask.shape[1:], weight, bias, settings


@pytest.mark.parametrize('device', DEVICES)
def test_of_too_many_shifts_the_first_numbers_are_taken(device, generator):
    x, both, *shapes, weight, bias, settings = larger_case(generator)
    x, weight, bias = (tensor.to(device) for tensor in (x, weight, bias))
    both = both.to(device).requires_grad_()
    large = both.split([shape[0] for shape in shapes], dim=1)
    small = [
        torch.stack([image.reshape(-1)[: shape.numel()].view(shape) for image in part])
        for part, shape in zip(large, shapes)
    ]
    found, expected = (
        mmcv_ops.modulated_deform_conv2d(x, *parts, weight, bias, *settings)
        for parts in (large, small)
    )
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    grads = [gradients(y, weights.to(device), [both]) for y in (found, expected)]
    torch.testing.assert_close(*grads)


@needs_stand_in
def test_too_few_shifts_are_refused(generator):
    (x, offset, *others), settings = conv_case('plain', generator)
    with pytest.raises(RuntimeError, match='offset output dims'):
        mmcv_ops.modulated_deform_conv2d(x, offset[..., :-1], *others, *settings)


def test_shifts_of_zero_change_nothing(generator):
    # Switchable atrous convolution starts with them.
    conv = mmcv_ops.SAConv2d(3, 5, 3, padding=1, use_deform=True)
    plain = mmcv_ops.SAConv2d(3, 5, 3, padding=1)
    plain.load_state_dict(conv.state_dict(), strict=False)
    x = torch.randn(1, 3, 16, 16, generator=generator)
    torch.testing.assert_close(conv(x), plain(x), atol=1e-5, rtol=1e-5)


# --- Against compiled mmcv ---


@needs_compiled
@pytest.mark.compiled_mmcv
@pytest.mark.parametrize('start', ['at zero', 'anywhere'])
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_modulated_convolution_equals_compiled(name, start, generator):
    (x, offset, mask, weight, bias), settings = conv_case(name, generator)
    if start == 'at zero':
        offset.zero_()
    (stride, padding, dilation, groups, deform_groups), _ = CONVOLUTIONS[name]
    sizes = (*weight.shape[2:], *stride, *padding, *dilation, groups, deform_groups)
    empty = torch.zeros(0, dtype=x.dtype)
    results = []
    for ops in (mmcv_ext, extension()):
        output = x.new_zeros(len(x), len(weight), *offset.shape[2:])
        arguments = (x, weight, bias, empty.clone(), offset, mask)
        ops.modulated_deform_conv_forward(
            *arguments, output, empty.clone(), *sizes, True
        )
        grads = [torch.zeros_like(tensor) for tensor in (x, weight, bias, offset, mask)]
        ops.modulated_deform_conv_backward(
            *arguments, empty.clone(), *grads, output, *sizes, True
        )
        results.append([output, *grads])
    torch.testing.assert_close(*results)


@needs_compiled
@pytest.mark.compiled_mmcv
@pytest.mark.parametrize('start', ['at zero', 'anywhere'])
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_deformable_convolution_equals_compiled(name, start, generator):
    (x, offset, _, weight, _), settings = conv_case(name, generator)
    if start == 'at zero':
        offset.zero_()
    stride, padding, dilation, groups, deform_groups = settings
    pairs = (weight.shape[2:], stride, padding, dilation)
    sizes = [size for pair in pairs for size in reversed(pair)]  # x before y
    sizes += [groups, deform_groups]
    empty = torch.zeros(0, dtype=x.dtype)
    results = []
    for ops in (mmcv_ext, extension()):
        output = x.new_zeros(len(x), len(weight), *offset.shape[2:])
        buffers = [empty.clone(), empty.clone()]
        ops.deform_conv_forward(x, weight, offset, output, *buffers, *sizes, 2)
        grads = [torch.zeros_like(tensor) for tensor in (x, offset, weight)]
        ops.deform_conv_backward_input(
            x, offset, output.clone(), *grads[:2], weight, empty.clone(), *sizes, 2
        )
        ops.deform_conv_backward_parameters(
            x, offset, output.clone(), grads[2], *buffers, *sizes, 1.0, 2
        )
        results.append([output, *grads])
    torch.testing.assert_close(*results)
