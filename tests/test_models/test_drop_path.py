# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import contextlib

import pytest
import torch
from mmcv.cnn.bricks.drop import DropPath as Reference

from mlla_mm.compat.pytorch import TELLS_EXPORT
from mlla_mm.models.layers import DropPath

from ..pretended import needs_pretended_cuda

HALF = [torch.float16, torch.bfloat16]
SHAPE = (64, 2, 3, 4)


def output_and_grads(layer, x, branch):
    x, branch = (t.detach().requires_grad_() for t in (x, branch))
    torch.manual_seed(3)
    y = layer(x, branch)
    upstream = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return y, *torch.autograd.grad(y, (x, branch), upstream)


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize('rate', [0.0, 0.1, 0.6])
def test_against_mmcv(rate, dtype, autocast):
    """The same images are dropped, and the results are equal within rounding."""
    if dtype == torch.float16 and torch.__version__ < '2.3':
        pytest.skip('no float16 kernels on the CPU')
    layer, reference = DropPath(rate), Reference(rate)
    # Under autocast the map is in float32, and the branch in half precision.
    x = torch.randn(SHAPE, dtype=torch.float32 if autocast else dtype)
    branch = torch.randn(SHAPE, dtype=dtype)
    context = (
        torch.autocast('cpu', torch.bfloat16) if autocast else contextlib.nullcontext()
    )
    with context:
        actual = output_and_grads(layer, x, branch)
        expected = output_and_grads(lambda x, y: x + reference(y), x, branch)
    tolerance = 4 * max(torch.finfo(t.dtype).eps for t in (x, branch))
    for one, other in zip(actual, expected):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    dropped, as_reference = ((y[2] == 0).flatten(1).all(1) for y in (actual, expected))
    assert torch.equal(dropped, as_reference)
    assert dropped.any() == (rate > 0) and not dropped.all()


def test_evaluation_drops_nothing():
    x, branch = torch.randn(2, *SHAPE)
    assert torch.equal(DropPath(0.9).eval()(x, branch), x + branch)


def test_the_mean_is_that_of_evaluation():
    torch.manual_seed(0)
    y = DropPath(0.25)(torch.ones(40_000, 1), torch.ones(40_000, 1))
    assert y.unique().tolist() == pytest.approx([1, 1 + 4 / 3])
    assert y.mean().item() == pytest.approx(2, abs=0.02)


def trace(layer, example):
    return torch.jit.trace(layer, example, check_trace=False)


def export(layer, example, strict):
    batch = torch.export.Dim('batch', min=2, max=128)
    shapes = ({0: batch}, {0: batch})
    exported = torch.export.export(layer, example, dynamic_shapes=shapes, strict=strict)
    assert 'autocast' not in exported.graph_module.code
    return exported.module()


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('strict', [None, True, False])
def test_a_graph_serves_every_number_of_images(strict, training):
    if strict is not None and not TELLS_EXPORT:
        pytest.skip('needs PyTorch 2.7')
    torch._dynamo.reset()
    layer, example = DropPath(0.5).train(training), tuple(torch.ones(2, 3, 5))
    graph = trace(layer, example) if strict is None else export(layer, example, strict)
    factors = graph(torch.zeros(100, 5), torch.ones(100, 5)).unique(dim=0)
    assert factors.tolist() == ([[0.0] * 5, [2.0] * 5] if training else [[1.0] * 5])


@needs_pretended_cuda
@pytest.mark.parametrize('dtype', [torch.float32, *HALF])
def test_one_pass_over_the_map(dtype):
    """On CUDA under autocast, too: the map is read and written once, in its dtype."""
    from benchmarks.roofline import counted  # needs a new PyTorch

    with counted() as counter:
        x = torch.randn(SHAPE, device='cuda', requires_grad=True)
        branch = torch.randn(SHAPE, device='cuda').to(dtype).requires_grad_()
        with torch.autocast('cuda', torch.float16, enabled=dtype != torch.float32):
            with counter:
                y = DropPath(0.5)(x, branch)
    passes = [kernel for kernel in counter.kernels if kernel.bytes > x.numel()]
    assert [kernel.name for kernel in passes] == ['addcmul']
    size = x.numel()
    assert passes[0].bytes == size * (4 + 4 + branch.element_size()) + 4 * SHAPE[0]
    assert y.dtype == torch.float32
