# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The ops on a pretended GPU give tensors as the definitions on the CPU do."""

import pytest
import torch
from torch import nn

from benchmarks.pretended_cuda import pretended_cuda
from mlla_mm import ops as dispatched
from mlla_mm.ops import naive

from ..pretended import OPS, describe, needs_pretended_cuda, needs_triton

pytestmark = needs_pretended_cuda

DTYPES = [torch.float32, torch.bfloat16]


def depthwise(channels, dtype):
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels).to(dtype)


def check(ops, call, definition, layer, inputs, monkeypatch):
    """Compare a call's output and gradients with those of its definition."""
    monkeypatch.setenv('MLLA_OPS', ops)
    leaves = [*inputs, layer.weight, layer.bias]
    wanted = definition(*leaves)
    grads = torch.autograd.grad(wanted, leaves, torch.ones_like(wanted))
    with pretended_cuda() as device:
        layer.to('cuda')
        inputs = [x.detach().to('cuda').requires_grad_() for x in inputs]
        call(layer, *inputs)  # builds the tables
        device.waits.clear()
        found = call(layer, *inputs)
        found.backward(torch.ones_like(found))
        assert device.waits == []
        tensors = [found, *(x.grad for x in (*inputs, layer.weight, layer.bias))]
        assert all(x.is_cuda for x in tensors)
        assert describe(tensors) == describe([wanted, *grads])


@pytest.mark.parametrize('ops', OPS)
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('residual, act', [(True, False), (False, True)])
@pytest.mark.parametrize('shape', [(2, 5, 7, 16), (1, 1, 1, 8)])
def test_depthwise_conv(ops, dtype, residual, act, shape, monkeypatch):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    check(
        ops,
        lambda conv, x: dispatched.depthwise_conv(x, conv, residual, act),
        lambda *tensors: naive.depthwise_conv(*tensors, residual, act),
        depthwise(shape[-1], dtype),
        [x],
        monkeypatch,
    )


@pytest.mark.parametrize('ops', OPS)
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape, heads', [((2, 5, 7, 16), 2), ((1, 1, 1, 8), 1)])
def test_mlla_attention(ops, dtype, shape, heads, monkeypatch):
    qk, v, gate = (
        torch.randn(*shape[:-1], n * shape[-1], dtype=dtype, requires_grad=True)
        for n in (2, 1, 1)
    )
    check(
        ops,
        lambda lepe, *maps: dispatched.mlla_attention(*maps, lepe, heads),
        lambda *tensors: naive.mlla_attention(*tensors, heads),
        depthwise(shape[-1], dtype),
        [qk, v, gate],
        monkeypatch,
    )


@needs_triton
@pytest.mark.parametrize('forced', [None, 'fused'])
def test_kernels_run_where_triton_is(forced, monkeypatch):
    """Also if nothing forces them, as on a GPU."""
    monkeypatch.delenv('MLLA_OPS', raising=False)
    if forced:
        monkeypatch.setenv('MLLA_OPS', forced)
    launches = []
    conv, x = depthwise(8, torch.float32), torch.randn(1, 4, 4, 8)
    with pretended_cuda(lambda name, arguments: launches.append(name)):
        dispatched.depthwise_conv(x.to('cuda'), conv.to('cuda'))
    assert launches == ['_conv_kernel']
