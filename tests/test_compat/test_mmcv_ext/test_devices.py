# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Ops stay on the device of their input: shown without a GPU, and without numbers."""

import contextlib

import pytest
import torch

from benchmarks.pretended_cuda import pretended_cuda
from mlla_mm.compat import mmcv_ext
from mlla_mm.compat.mmcv_ext import deformable

from ...pretended import needs_pretended_cuda

pytestmark = needs_pretended_cuda

# Read on the host, as on a GPU.
SHAPES = torch.tensor([(6, 4), (3, 2)])


def rand(*shape):
    # Within torch.device('cuda'), ops would make all of their tensors there, too.
    return torch.rand(shape, device='cuda')


def attention():
    value, places = rand(1, 30, 2, 8), rand(1, 5, 2, 2, 3, 2)
    case = (value, SHAPES, SHAPES, places, rand(1, 5, 2, 2, 3))
    output = mmcv_ext.ms_deform_attn_forward(*case, 64)
    grads = [torch.zeros_like(case[i]) for i in (0, 3, 4)]
    mmcv_ext.ms_deform_attn_backward(*case, output, *grads, 64)
    return output, *grads


def convolution():
    x, weight, bias = rand(2, 4, 8, 8), rand(6, 4, 3, 3), rand(6)
    offset, mask = rand(2, 18, 8, 8), rand(2, 9, 8, 8)
    output = rand(2, 6, 8, 8)
    sizes = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1)
    mmcv_ext.deform_conv_forward(x, weight, offset, output, bias, bias, *sizes, 1)
    mmcv_ext.deform_conv_backward_input(
        x, offset, output, x, offset, weight, bias, *sizes, 1
    )
    tensors = (x, weight, bias, bias, offset, mask)
    mmcv_ext.modulated_deform_conv_forward(*tensors, output, bias, *sizes, True)
    grads = [torch.zeros_like(t) for t in (x, weight, bias, offset, mask)]
    mmcv_ext.modulated_deform_conv_backward(
        *tensors, bias, *grads, output, *sizes, True
    )
    return output, *grads


def pooling():
    features, rois = rand(1, 4, 8, 8), rand(3, 5)
    output, argmax = rand(3, 4, 2, 2), rand(3, 4, 2, 2).int()
    sizes = (2, 2, 1.0)
    mmcv_ext.roi_pool_forward(features, rois, output, argmax, *sizes)
    mmcv_ext.roi_pool_backward(output, rois, argmax, features, *sizes)
    settings = (*sizes, 2, 1, True)
    mmcv_ext.roi_align_forward(features, rois, output, argmax, argmax, *settings)
    return output, argmax, features


def losses():
    logits, target = rand(6, 4), rand(6).long()
    weight, grad, buff = rand(4), rand(6, 4), rand(6)
    for kind, loss, more in (('sigmoid', grad, ()), ('softmax', buff, (buff,))):
        forward = getattr(mmcv_ext, f'{kind}_focal_loss_forward')
        backward = getattr(mmcv_ext, f'{kind}_focal_loss_backward')
        forward(logits, target, weight, loss, 2.0, 0.25)
        backward(logits, target, weight, *more, grad, 2.0, 0.25)
    return grad, buff


def boxes_and_pixels():
    boxes, image = rand(5, 4), rand(1, 4, 8, 8)
    ious, index = rand(5, 5), rand(7).long()
    mmcv_ext.bbox_overlaps(boxes, boxes, ious, 0, False, 1)
    columns = rand(36, 7)
    mmcv_ext.masked_im2col_forward(image, index, index, columns, 3, 3, 1, 1)
    mmcv_ext.masked_col2im_forward(columns[:4], index, index, image, 8, 8, 4)
    return ious, columns, image


OPS = [attention, convolution, pooling, losses, boxes_and_pixels]


@contextlib.contextmanager
def on_cuda(autocast):
    with pretended_cuda(), torch.autocast('cuda', torch.float16, enabled=autocast):
        yield


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('op', OPS)
def test_ops_stay_on_their_device(op, autocast):
    with on_cuda(autocast):
        assert {tensor.device.type for tensor in op()} == {'cuda'}


def test_a_tensor_of_the_cpu_is_caught(monkeypatch):
    def factors(*tensors):
        mask = torch.zeros(2, 1, device='cpu')
        return [mask if x is None else x for x in tensors]

    monkeypatch.setattr(deformable, '_factors', factors)
    with on_cuda(False), pytest.raises(Exception, match='device'):
        convolution()
