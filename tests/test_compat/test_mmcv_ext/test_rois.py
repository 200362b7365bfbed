# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import math

import pytest
import torch
from torchvision.ops import roi_pool

from mlla_mm.compat import mmcv_ext

from .shared import (
    DEVICES,
    HALF,
    extension,
    mmcv_ops,
    needs_compiled,
    needs_stand_in,
    random_rois,
)


def interpolation_matrix(start, length, bins, samples, size):
    """Averages linear interpolation at the samples of each bin: (bins, size)."""
    matrix = torch.zeros(bins, size, dtype=torch.float64)
    for row in range(bins):
        for sample in range(samples):
            position = start + (row + (sample + 0.5) / samples) * length / bins
            if not -1 <= position <= size:
                continue
            position = min(max(position, 0), size - 1)
            low = min(int(position), max(size - 2, 0))
            matrix[row, low] += (1 - (position - low)) / samples
            if size > 1:
                matrix[row, low + 1] += (position - low) / samples
    return matrix


def plain_roi_align(features, rois, bins, scale, sampling_ratio, aligned):
    """RoIAlign is separable: a matrix along y and one along x."""
    output = []
    for image, *corners in rois.tolist():
        x1, y1, x2, y2 = (corner * scale - 0.5 * aligned for corner in corners)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        along_y, along_x = (
            interpolation_matrix(
                start, length, n, sampling_ratio or math.ceil(length / n), size
            )
            for start, length, n, size in zip(
                (y1, x1), (height, width), bins, features.shape[2:]
            )
        )
        output.append(along_y @ features[int(image)] @ along_x.T)
    shape = (0, features.shape[1], *bins)
    return torch.stack(output) if output else features.new_zeros(shape)


ROIS = {
    'inside': [[0, 3, 2, 40, 30], [1, 10.3, 5.7, 33.1, 50.9], [0, 0, 0, 63, 47]],
    'partly outside': [[0, -20, -30, 25, 25], [1, 50, 30, 100, 90]],
    'outside': [[0, 200, 200, 240, 260], [1, -90, -80, -40, -40]],
    'tiny': [[0, 8, 8, 8, 8], [1, 20.2, 20.2, 20.7, 20.4]],
    'none': [],
}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('place', ROIS)
def test_roi_align_follows_its_definition(
    place, sampling_ratio, aligned, device, generator
):
    if place == 'tiny' and aligned and sampling_ratio == 0:
        pytest.skip('a RoI without area has no samples')
    rois = torch.tensor(ROIS[place], dtype=torch.float64).view(-1, 5)
    features = torch.randn(2, 3, 12, 16, dtype=torch.float64, generator=generator)
    features.requires_grad_()
    expected = plain_roi_align(features, rois, (3, 5), 0.25, sampling_ratio, aligned)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    (expected_grad,) = torch.autograd.grad(
        (expected * weights).sum() + 0 * features.sum(), features
    )

    on_device = features.detach().to(device).requires_grad_()
    output = mmcv_ops.roi_align(
        on_device, rois.to(device), (3, 5), 0.25, sampling_ratio, 'avg', aligned
    )
    output.backward(weights.to(device))
    torch.testing.assert_close(output.cpu(), expected)
    torch.testing.assert_close(on_device.grad.cpu(), expected_grad)
    if place == 'outside':
        assert not output.any()
        assert not on_device.grad.any()


def test_roi_align_without_area_gives_zeros():
    features = torch.ones(1, 2, 8, 8)
    output = mmcv_ops.roi_align(features, torch.tensor([[0.0, 4, 4, 4, 4]]), 2)
    assert torch.equal(output, torch.zeros(1, 2, 2, 2))


@needs_stand_in
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', HALF)
def test_roi_align_in_half_precision(dtype, device, generator):
    features = torch.randn(1, 4, 64, 64, generator=generator).to(dtype)
    rois = torch.tensor([[0, 3.25, 17, 900, 601], [0, 100, 100, 131, 160]])
    expected, expected_grad = roi_align_and_gradient(features.float(), rois)
    output, grad = roi_align_and_gradient(features.to(device), rois.to(device))
    assert output.dtype == grad.dtype == dtype
    tolerance = {'rtol': torch.finfo(dtype).eps, 'atol': 1e-6}
    torch.testing.assert_close(output.float().cpu(), expected, **tolerance)
    torch.testing.assert_close(grad.float().cpu(), expected_grad, **tolerance)


def roi_align_and_gradient(features, rois):
    features = features.clone().requires_grad_()
    output = mmcv_ops.roi_align(features, rois, 7, 1 / 16, 0, 'avg', True)
    output.sum().backward()
    return output.detach(), features.grad


def test_roi_align_backward_adds():
    grad_output = torch.ones(1, 1, 2, 2)
    rois = torch.tensor([[0.0, 0, 0, 4, 4]])
    empty = torch.zeros(0)
    grad_input = torch.full((1, 1, 4, 4), 3.0)
    mmcv_ext.roi_align_backward(
        grad_output, rois, empty, empty, grad_input, 2, 2, 1.0, 2, 1, True
    )
    # The four bins cover the 16 pixels evenly: a quarter of a gradient each.
    torch.testing.assert_close(grad_input, torch.full((1, 1, 4, 4), 3.25))


@needs_stand_in
def test_max_pooling_needs_compiled_mmcv():
    rois = torch.tensor([[0.0, 0, 0, 4, 4]])
    with pytest.raises(NotImplementedError, match=r"pool_mode='max'[\s\S]*pip install"):
        mmcv_ops.roi_align(torch.ones(1, 1, 4, 4), rois, 2, 1.0, 0, 'max', True)


@needs_stand_in
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('pool', ['align', 'max'])
def test_a_roi_that_is_not_finite_gives_zeros(pool, value, sampling_ratio, device):
    features = torch.ones(1, 2, 8, 8, device=device, requires_grad=True)
    rois = torch.tensor([[0.0, 1, 1, 5, 5]]).repeat(5, 1)
    rois[range(1, 5), range(1, 5)] = value
    rois = rois.to(device)
    if pool == 'align':
        output = mmcv_ops.roi_align(features, rois, 2, 1.0, sampling_ratio, 'avg', True)
    else:
        output = mmcv_ops.roi_pool(features, rois, 2)
    assert output[0].all()
    assert not output[1:].any()
    output.sum().backward()
    torch.testing.assert_close(features.grad.sum().item(), 8.0)


def plain_roi_pool(features, rois, bins, scale):
    height, width = features.shape[2:]
    output = []
    for image, x1, y1, x2, y2 in rois.tolist():
        rows = pixels_of_bins(y1 * scale, (y2 + 1) * scale, bins[0], height)
        columns = pixels_of_bins(x1 * scale, (x2 + 1) * scale, bins[1], width)
        for top, bottom in rows:
            for left, right in columns:
                pixels = features[int(image), :, top:bottom, left:right].flatten(1)
                empty = 0 * features[0, :, 0, 0]
                output.append(pixels.amax(1) if pixels.numel() else empty)
    return torch.stack(output).unflatten(0, (-1, *bins)).permute(0, 3, 1, 2)


def pixels_of_bins(start, end, bins, size):
    edges = [start + (end - start) * i / bins for i in range(bins + 1)]
    return [
        (min(max(math.floor(a), 0), size), min(max(math.ceil(b), 0), size))
        for a, b in zip(edges, edges[1:])
    ]


@needs_stand_in
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('scale', [1 / 16, 0.3, 2])
def test_roi_pool_follows_its_definition(scale, device, generator):
    features = torch.randn(2, 3, 9, 12, dtype=torch.float64, generator=generator)
    rois = random_rois(40, 2, generator, size=20 / scale).double()
    ours, theirs = features.to(device), features.clone()
    for x in (ours, theirs):
        x.requires_grad_()
    expected = plain_roi_pool(theirs, rois, (3, 5), scale)
    found = mmcv_ops.roi_pool(ours, rois.to(device), (3, 5), scale)
    torch.testing.assert_close(found.cpu(), expected)
    assert (expected == 0).any()  # bins outside
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    found.backward(weights.to(device))
    expected.backward(weights)
    torch.testing.assert_close(ours.grad.cpu(), theirs.grad)


@needs_stand_in
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, *HALF])
def test_roi_pool_of_whole_pixels_equals_torchvision(dtype, device, generator):
    # Then torchvision has nothing to round.
    features = torch.randn(2, 3, 20, 30, generator=generator).to(device, dtype)
    rois = random_rois(40, 2, generator, size=25).round().to(device)
    expected = roi_pool(features.float(), rois, (3, 5)).to(dtype)
    assert torch.equal(mmcv_ops.roi_pool(features, rois, (3, 5)), expected)


@needs_stand_in
def test_roi_pool_gives_the_gradient_to_the_first_of_equal_features():
    features = torch.ones(1, 1, 4, 4, requires_grad=True)
    mmcv_ops.roi_pool(features, torch.tensor([[0.0, 1, 2, 3, 3]]), 1).backward()
    assert features.grad.nonzero().tolist() == [[0, 0, 2, 1]]


@needs_stand_in
@pytest.mark.parametrize('dtype', HALF)
def test_gradients_of_many_rois_are_added_in_float32(dtype):
    # 1 + 1 + ... ends at 256 in bfloat16 and at 2048 in float16.
    features = torch.ones(1, 1, 1, 1, dtype=dtype, requires_grad=True)
    rois = torch.zeros(3000, 5, dtype=dtype)
    mmcv_ops.roi_pool(features, rois, 1).sum().backward()
    torch.testing.assert_close(features.grad.item(), 3000.0, rtol=0.01, atol=0)


@needs_stand_in
def test_roi_pool_does_not_hide_a_feature_that_is_not_a_number():
    features = torch.full((1, 1, 4, 4), torch.nan)
    rois = torch.tensor([[0.0, 0, 0, 1, 1], [0, 9, 9, 12, 12]])
    inside, outside = mmcv_ops.roi_pool(features, rois, 1).flatten()
    assert not inside.isfinite()
    assert outside == 0


@needs_stand_in
def test_roi_pool_of_a_roi_that_ends_before_it_begins():
    # Both edges, 2.9 and 2.4, lie in pixel 2.
    features = torch.ones(1, 1, 4, 4, requires_grad=True)
    rois = torch.tensor([[0.0, 5.8, 0, 3.8, 3], [0, 0, 5.8, 3, 3.8]])
    output = mmcv_ops.roi_pool(features, rois, 1, 0.5)
    assert not output.any()
    output.sum().backward()
    assert not features.grad.any()


@needs_stand_in
def test_roi_pool_of_nothing():
    features = torch.ones(1, 2, 4, 4, requires_grad=True)
    output = mmcv_ops.roi_pool(features, torch.zeros(0, 5), 3)
    assert output.shape == (0, 2, 3, 3)
    output.sum().backward()
    assert not features.grad.any()


@needs_compiled
@pytest.mark.compiled_mmcv
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align_equals_compiled(sampling_ratio, aligned, dtype, generator):
    features = torch.randn(2, 3, 25, 32, dtype=dtype, generator=generator)
    rois = random_rois(100, 2, generator, size=128.0).to(dtype)
    grad_output = torch.randn(100, 3, 7, 7, dtype=dtype, generator=generator)
    empty = torch.zeros(0, dtype=dtype)
    settings = (7, 7, 0.25, sampling_ratio, 1, aligned)
    results = []
    for ops in (mmcv_ext, extension()):
        output, grad = torch.zeros_like(grad_output), torch.zeros_like(features)
        ops.roi_align_forward(features, rois, output, empty, empty, *settings)
        ops.roi_align_backward(grad_output, rois, empty, empty, grad, *settings)
        results.append((output, grad))
    torch.testing.assert_close(results[0], results[1])
