# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The recurrence of the forget gate: values, gradients, types, memory, graphs."""

import math
import warnings

import pytest
import torch
from mmengine.analysis import FlopAnalyzer

from benchmarks.meter import Meter
from mlla_mm.compat.pytorch import TELLS_EXPORT
from mlla_mm.models.layers import LinearAttention
from mlla_mm.ops.scan import causal_normaliser, decayed_scan

from ..compiler import needs_compiler

HALF = [torch.bfloat16, torch.float16]


def arguments(batch=2, length=10, heads=2, c=3, d=4, dtype=torch.float64):
    q, k = torch.randn(2, batch, length, heads, d, dtype=dtype)
    v, delta = torch.randn(2, batch, length, heads, c, dtype=dtype)
    a = -torch.rand(heads, c, d, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, delta.detach().exp(), a)]


def pair_by_pair(q, k, v, delta, a):
    """The weights that each token gives to those before it and to itself."""
    y = []
    for i in range(v.shape[1]):
        of_past = [torch.zeros_like(v[:, 0])]
        for j in range(i + 1):
            steps = delta[:, j + 1 : i + 1].sum(dim=1)
            decay = torch.exp(a * steps[..., None])
            weights = torch.einsum('nhd,nhcd,nhd->nhc', q[:, i], decay, k[:, j])
            of_past.append(weights * v[:, j])
        y.append(torch.stack(of_past).sum(dim=0))
    return torch.stack(y, dim=1)


# Around the squares, the numbers and lengths of the chunks change.
@pytest.mark.parametrize('length', [1, 2, 3, 4, 5, 8, 9, 10, 11, 13])
def test_values_and_gradients(length):
    inputs = arguments(length=length)
    y, expected = decayed_scan(*inputs), pair_by_pair(*inputs)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        atol=1e-12,
        rtol=1e-10,
    )


def test_gradients_by_differences():
    assert torch.autograd.gradcheck(decayed_scan, arguments(1, 5, 2, 2, 3))


def test_no_gradient_of_the_gradient():
    """The error says so; the gradient would be wrong."""
    inputs = arguments()
    grads = torch.autograd.grad(
        decayed_scan(*inputs).square().sum(), inputs, create_graph=True
    )
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grads[0].sum().backward()


def test_gradients_of_some_arguments():
    inputs = arguments()
    expected = torch.autograd.grad(decayed_scan(*inputs).sum(), inputs)
    for i, argument in enumerate(inputs):
        others = [x.detach() for x in inputs]
        others[i] = argument
        (grad,) = torch.autograd.grad(decayed_scan(*others).sum(), argument)
        torch.testing.assert_close(grad, expected[i])


@pytest.mark.parametrize('shape', [(0, 5, 2, 3, 4), (2, 0, 2, 3, 4)])
def test_no_images_and_no_tokens(shape):
    inputs = arguments(*shape)
    y = decayed_scan(*inputs)
    assert y.shape == inputs[2].shape
    for x, grad in zip(inputs, torch.autograd.grad(y.sum(), inputs)):
        torch.testing.assert_close(grad, torch.zeros_like(x))


def test_strides_do_not_matter():
    inputs = [x.detach() for x in arguments()]
    expected = decayed_scan(*inputs)
    strided = [x.mT.contiguous().mT for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    torch.testing.assert_close(decayed_scan(*strided), expected, atol=0, rtol=0)
    q, k, v, delta, a = inputs
    once = v[:1, :1].expand_as(v).requires_grad_()
    y = decayed_scan(q, k, once, delta, a)
    torch.testing.assert_close(y, decayed_scan(q, k, once.contiguous(), delta, a))
    # The gradient of a sum is an expanded number.
    (grad,) = torch.autograd.grad(y.sum(), once)
    torch.testing.assert_close(grad.shape, v.shape)


@pytest.mark.parametrize('strength', [1e-4, 1.0, 1e3])
def test_as_many_tokens_as_the_first_stage_has(strength):
    """Nothing overflows, and at no strength does rounding add up."""
    inputs = arguments(1, 3136, 1, 2, 4)
    with torch.no_grad():
        inputs[-1].mul_(strength)
    single = [x.detach().float().requires_grad_() for x in inputs]
    y, expected = decayed_scan(*single), decayed_scan(*inputs)
    grads, expected_grads = (
        torch.autograd.grad(out.sum(), of)
        for out, of in ((y, single), (expected, inputs))
    )
    for actual, right in zip((y, *grads), (expected, *expected_grads)):
        assert actual.isfinite().all()
        assert (actual - right).abs().max() < 1e-4 * right.abs().max()


# Types.


@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('autocast', [False, True])
def test_the_state_is_float32(dtype, autocast):
    """In half precision the sum would stop at 256 or 2048, or be infinite at 65520."""
    ones = torch.ones(1, 3136, 1, 2, dtype=dtype).requires_grad_()
    never = torch.zeros(1, 2, 2)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        y = decayed_scan(ones, 100 * ones, ones, ones, never)
    assert y.dtype == torch.float32
    expected = 200 * torch.arange(1.0, 3137)
    torch.testing.assert_close(y[0, :, 0, 0], expected)
    (grad,) = torch.autograd.grad(y.mean(), ones)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


def test_autocast_changes_nothing():
    inputs = [x.detach().float().requires_grad_() for x in arguments()]
    expected = decayed_scan(*inputs)
    upstream = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    with torch.autocast('cpu', torch.bfloat16):
        y = decayed_scan(*inputs)
        grads = torch.autograd.grad(y, inputs, upstream)
    torch.testing.assert_close(y, expected, atol=0, rtol=0)
    torch.testing.assert_close(grads, expected_grads, atol=0, rtol=0)


def test_mixed_types():
    """The widest decides, as for queries of a float64 model with float32 values."""
    inputs = arguments()
    mixed = [x.to(t) for x, t in zip(inputs, [torch.float64, *[torch.float32] * 4])]
    y = decayed_scan(*mixed)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, decayed_scan(*inputs), atol=1e-5, rtol=1e-5)
    for grad, x in zip(torch.autograd.grad(y.sum(), mixed), mixed):
        assert grad.dtype == x.dtype


def test_meta_tensors():
    q, k, v, delta, a = (x.detach().to('meta') for x in arguments())
    assert decayed_scan(q, k, v, delta, a).shape == v.shape


# Memory.


@pytest.mark.parametrize('length', [400, 1600])
def test_memory_grows_with_the_root_of_the_number_of_tokens(length):
    """A few times as many states, besides what is as large as the arguments."""
    inputs = arguments(2, length, 2, 16, 64)
    of_states = 2 * 2 * 16 * 64 * math.isqrt(length)
    of_arguments = sum(x.numel() for x in inputs)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        decayed_scan(*inputs)
    assert sum(x.numel() for x in kept) == of_arguments + of_states

    def update():
        y = decayed_scan(*inputs)
        torch.autograd.grad(y, inputs, torch.ones_like(y))

    numbers = Meter('cpu').peak_bytes(update) / inputs[0].element_size()
    assert numbers < 2 * of_arguments + 8 * of_states


# Graphs.


@pytest.fixture
def forgetful():
    return LinearAttention(8, 2, forget_gate=True).eval()


@pytest.fixture
def maps():
    return torch.randn(2, 5, 4, 8)


def test_a_traced_program_is_right_for_every_size(forgetful, maps):
    """MMEngine's FLOP counter traces, and the recurrence is one operation of it."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(forgetful, maps)
    for other in (maps, torch.randn(1, 7, 9, 8)):
        torch.testing.assert_close(traced(other), forgetful(other))
    nodes = list(traced.inlined_graph.nodes())
    assert [x.pyname() for x in nodes if x.kind() == 'prim::PythonOp'] == [
        '_DecayedScan'
    ]
    # It has no file format.
    with pytest.raises(RuntimeError, match='_DecayedScan'):
        traced.save('/dev/null')


def test_the_flop_counter_meets_one_operation(forgetful, maps):
    counter = FlopAnalyzer(forgetful, maps).unsupported_ops_warnings(False)
    assert counter.total() > 0
    assert counter.unsupported_ops()['prim::PythonOp._DecayedScan'] == 1


REFUSAL = 'forget gate cannot be exported'


@pytest.mark.skipif(not TELLS_EXPORT, reason='the module cannot know of the export')
@pytest.mark.parametrize('strict', [True, False])
def test_export_is_refused(forgetful, maps, strict):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=REFUSAL):
        torch.export.export(forgetful, (maps,), strict=strict)


def test_export_to_onnx_is_refused(forgetful, maps, tmp_path):
    options = dict(dynamo=False) if TELLS_EXPORT else {}
    with warnings.catch_warnings(), pytest.raises(NotImplementedError, match=REFUSAL):
        warnings.simplefilter('ignore')
        torch.onnx.export(forgetful, (maps,), tmp_path / 'model.onnx', **options)


@needs_compiler
def test_compiled(forgetful, maps):
    """The recurrence stays a call, however many tokens there are."""
    torch._dynamo.reset()
    sizes = []

    def backend(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(forgetful, backend=backend)
    maps.requires_grad_()
    y, expected = compiled(maps), forgetful(maps)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), maps), torch.autograd.grad(expected.sum(), maps)
    )
    of_few = sizes.copy()
    torch._dynamo.reset()
    sizes.clear()
    compiled(torch.randn(2, 20, 20, 8))
    assert len(of_few) > 1
    assert sizes == of_few


# The normaliser.


def test_normaliser():
    """The sums over the weights of the past, divided by the number of all tokens."""
    q, k = torch.rand(2, 2, 7, 3, 4, dtype=torch.float64)
    weights = torch.einsum('nihd,njhd->nhij', q, k).tril()
    expected = weights.sum(-1).transpose(1, 2)[..., None] / 7 + 1e-6
    torch.testing.assert_close(causal_normaliser(q, k), expected)
