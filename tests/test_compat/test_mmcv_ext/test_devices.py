# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Ops stay on the device of their input: shown without a GPU, and without numbers."""

import contextlib

import pytest
import torch
from mmengine.utils import digit_version

from benchmarks.pretended_cuda import pretended_cuda
from mlla_mm.compat import mmcv_ext
from mlla_mm.compat.mmcv_ext import deformable

pytestmark = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.4'),
    reason='pretending a GPU needs PyTorch 2.4',
)

# Read on the host, as on a GPU.
SHAPES = torch.tensor([(6, 4), (3, 2)])


def attention():
    value, places = torch.rand(1, 30, 2, 8), torch.rand(1, 5, 2, 2, 3, 2)
    case = (value, SHAPES, SHAPES, places, torch.rand(1, 5, 2, 2, 3))
    output = mmcv_ext.ms_deform_attn_forward(*case, 64)
    grads = [torch.zeros_like(case[i]) for i in (0, 3, 4)]
    mmcv_ext.ms_deform_attn_backward(*case, output, *grads, 64)
    return output, *grads


def convolution():
    x, weight, bias = torch.rand(2, 4, 8, 8), torch.rand(6, 4, 3, 3), torch.rand(6)
    offset, mask = torch.rand(2, 18, 8, 8), torch.rand(2, 9, 8, 8)
    output = torch.empty(2, 6, 8, 8)
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
    features, rois = torch.rand(1, 4, 8, 8), torch.rand(3, 5)
    output, argmax = torch.empty(3, 4, 2, 2), torch.empty(3, 4, 2, 2, dtype=torch.int)
    sizes = (2, 2, 1.0)
    mmcv_ext.roi_pool_forward(features, rois, output, argmax, *sizes)
    mmcv_ext.roi_pool_backward(output, rois, argmax, features, *sizes)
    settings = (*sizes, 2, 1, True)
    mmcv_ext.roi_align_forward(features, rois, output, argmax, argmax, *settings)
    return output, argmax, features


def losses():
    logits, target = torch.rand(6, 4), torch.zeros(6, dtype=torch.long)
    weight, grad, buff = torch.rand(4), torch.empty(6, 4), torch.empty(6)
    for kind, loss, more in (('sigmoid', grad, ()), ('softmax', buff, (buff,))):
        forward = getattr(mmcv_ext, f'{kind}_focal_loss_forward')
        backward = getattr(mmcv_ext, f'{kind}_focal_loss_backward')
        forward(logits, target, weight, loss, 2.0, 0.25)
        backward(logits, target, weight, *more, grad, 2.0, 0.25)
    return grad, buff


def boxes_and_pixels():
    boxes, image = torch.rand(5, 4), torch.rand(1, 4, 8, 8)
    ious, index = torch.empty(5, 5), torch.zeros(7, dtype=torch.long)
    mmcv_ext.bbox_overlaps(boxes, boxes, ious, 0, False, 1)
    columns = torch.empty(36, 7)
    mmcv_ext.masked_im2col_forward(image, index, index, columns, 3, 3, 1, 1)
    mmcv_ext.masked_col2im_forward(columns[:4], index, index, image, 8, 8, 4)
    return ious, columns, image


OPS = [attention, convolution, pooling, losses, boxes_and_pixels]


@contextlib.contextmanager
def on_cuda(autocast):
    with pretended_cuda(), torch.device('cuda'):
        with torch.autocast('cuda', torch.float16, enabled=autocast):
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
