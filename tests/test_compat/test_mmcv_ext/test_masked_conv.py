# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch
from torch.nn.functional import conv2d

from .shared import DEVICES, HALF, mmcv_ops, needs_stand_in

pytestmark = needs_stand_in


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kernel_size, padding', [(3, 1), ((1, 5), (0, 2)), (1, 0)])
def test_masked_convolution_is_the_convolution_at_its_pixels(
    kernel_size, padding, device, generator
):
    x = torch.randn(1, 3, 7, 9, generator=generator, dtype=torch.float64).to(device)
    mask = (torch.rand(1, 7, 9, generator=generator) > 0.6).to(device)
    conv = mmcv_ops.MaskedConv2d(3, 4, kernel_size, padding=padding).to(x)
    expected = conv2d(x, conv.weight, conv.bias, padding=padding) * mask
    torch.testing.assert_close(conv(x, mask), expected)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_masked_convolution_under_autocast(dtype, device, generator):
    x = torch.randn(1, 3, 7, 9, generator=generator).to(device, dtype)
    conv = mmcv_ops.MaskedConv2d(3, 4, 3, padding=1).to(device)
    everywhere = torch.ones(1, 7, 9, device=device)
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        found = conv(x, everywhere)
        expected = conv2d(x, conv.weight, conv.bias, padding=1)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', HALF)
def test_inputs_of_a_pixel(dtype, device):
    from mlla_mm.compat.mmcv_ext import masked_col2im_forward, masked_im2col_forward

    image = torch.arange(2 * 12, device=device).to(dtype).view(1, 2, 3, 4)
    row, column = torch.tensor([[0], [3]], device=device)
    col = torch.full((2 * 9, 1), -1, dtype=dtype, device=device)
    masked_im2col_forward(image, row, column, col, 3, 3, 1, 1)
    # In the upper right corner: zeros above and to the right.
    first = [0, 0, 0, 2, 3, 0, 6, 7, 0]
    second = [0, 0, 0, 14, 15, 0, 18, 19, 0]
    assert col.flatten().tolist() == first + second
    masked_col2im_forward(col[:2] + 100, row, column, image, 3, 4, 2)
    assert image[0, :, 0, 3].tolist() == [100, 100]
    assert image[0, 0, 1].tolist() == [4, 5, 6, 7]
