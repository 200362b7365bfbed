# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The ops on a pretended GPU give tensors as the definitions on the CPU do."""

import pytest
import torch
from torch import nn

from benchmarks import roofline
from benchmarks.plain_mlla import PlainMLLA
from benchmarks.pretended_cuda import pretended_cuda
from benchmarks.roofline import GPU, Case, Counter
from mlla_mm import ops as dispatched
from mlla_mm.models import MLLA
from mlla_mm.ops import naive

from ..pretended import (
    OPS,
    autocast,
    describe,
    needs_pretended_cuda,
    needs_triton,
)

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


def collect(counter, forced, monkeypatch, dtype='bfloat16'):
    """Outputs of a small model; what its forward pass launches is counted."""
    monkeypatch.delenv('MLLA_OPS', raising=False)
    if forced:
        monkeypatch.setenv('MLLA_OPS', forced)
    arch = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2))
    with pretended_cuda(counter.add_launch), torch.no_grad():
        with torch.device('cuda'):
            model, images = MLLA(arch).eval(), torch.randn(2, 3, 64, 96)
        with counter, autocast(dtype):
            return model(images)


@pytest.mark.parametrize(
    'forced, number',
    [
        ('naive', 0),
        ('eager', 1),
        # What was not measured on a GPU is not the default: each block for itself.
        pytest.param(None, 4, marks=needs_triton),
        pytest.param('fused', 1, marks=needs_triton),
    ],
)
def test_weights_are_cast_once(forced, number, monkeypatch):
    counter = Counter()
    collect(counter, forced, monkeypatch)
    names = [kernel.name for kernel in counter.kernels]
    assert names.count('_foreach_copy_') == number


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_norms_under_autocast(dtype, monkeypatch):
    """In blocks in half precision; for the outputs in float32, as autocast's."""
    counter = Counter()
    outputs = collect(counter, 'eager', monkeypatch, dtype)
    norms = [k.dtype for k in counter.kernels if k.name == 'native_layer_norm']
    assert norms == 8 * [getattr(torch, dtype)] + 4 * [torch.float32]
    assert {x.dtype for x in outputs} == {torch.float32}


@pytest.mark.parametrize('mode', ['infer', 'train'])
def test_eager_takes_less_than_the_plain_way(mode, monkeypatch):
    """By the count, under autocast, at sizes where bytes count more than launches."""
    arch = dict(embed_dims=64, depths=(2, 1, 1, 1), num_heads=(2, 4, 8, 16))
    models = dict(plain=PlainMLLA, mlla=MLLA)
    monkeypatch.setattr(
        roofline.models,
        'build_model',
        lambda name, classify: models[name](arch, out_indices=(0,)),
    )
    case = Case('backbone', (224, 224), 32, mode, 'bfloat16')
    plain, mlla = (
        roofline.add_up(roofline.count_model(name, case, ops), GPU())
        for name, ops in (('plain', 'naive'), ('mlla', 'eager'))
    )
    assert mlla.bytes < 0.9 * plain.bytes
    assert mlla.seconds < 0.9 * plain.seconds
    assert mlla.launches < 0.9 * plain.launches
