# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The ops of ops.eager against the definitions."""

import pytest
import torch

from mlla_mm.models import MLLA
from mlla_mm.ops import eager, naive, rotary

from ..reference import relative_error

SHAPES = [
    ((1, 1, 1, 8), 1),
    ((1, 1, 1, 8), 2),
    ((2, 5, 7, 24), 3),
    ((3, 6, 4, 16), 4),
    ((1, 14, 14, 64), 2),
]


def attention_arguments(shape, dtype=torch.float64):
    """Queries and keys, values, gate, and LePE's weight and bias."""
    channels = shape[-1]
    shapes = [shape[:-1] + (2 * channels,), shape, shape, (channels, 1, 3, 3)]
    return [
        torch.randn(s, dtype=dtype, requires_grad=True) for s in (*shapes, (channels,))
    ]


def mlp_arguments(shape, dtype=torch.float64):
    channels = shape[-1]
    shapes = [shape, (3 * channels, channels), (3 * channels,)]
    shapes += [(channels, 3 * channels), (channels,)]
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def layer_norm_arguments(shape, dtype=torch.float64):
    """The map's mean is ten times its deviation, as of some channels of a network."""
    x = (torch.randn(shape, dtype=dtype) + 10).requires_grad_()
    weight, bias = torch.randn(2, shape[-1], dtype=dtype)
    return [x, weight.requires_grad_(), bias.requires_grad_()]


def assert_equal(op, arguments, *options):
    """Outputs and all gradients, in float64."""
    actual = getattr(eager, op)(*arguments, *options)
    expected = getattr(naive, op)(*arguments, *options)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, arguments, upstream),
        torch.autograd.grad(expected, arguments, upstream),
    )
    with torch.no_grad():
        actual = getattr(eager, op)(*arguments, *options)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('shape, heads', SHAPES)
def test_attention(shape, heads):
    assert_equal('mlla_attention', attention_arguments(shape), heads)


@pytest.mark.parametrize('shape, heads', SHAPES)
def test_mlp(shape, heads):
    assert_equal('mlp', mlp_arguments(shape))


@pytest.mark.parametrize('shape, heads', SHAPES)
def test_layer_norm(shape, heads):
    assert_equal('layer_norm', layer_norm_arguments(shape), 1e-5)


@pytest.mark.parametrize('act', [False, True])
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('shape, heads', SHAPES)
def test_depthwise_conv(shape, heads, residual, act):
    _, x, _, weight, bias = attention_arguments(shape)
    assert_equal('depthwise_conv', [x, weight, bias], residual, act)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('op', ['mlla_attention', 'mlp'])
def test_half_precision(op, dtype):
    if dtype == torch.float16 and torch.__version__ < '2.3':
        pytest.skip('no float16 kernels on the CPU')
    make = dict(mlla_attention=attention_arguments, mlp=mlp_arguments)[op]
    options = (3,) if op == 'mlla_attention' else ()
    arguments = [x.detach() / 4 for x in make((2, 9, 8, 24))]
    rounded = [x.to(dtype).requires_grad_() for x in arguments]
    exact = [x.double().detach().requires_grad_() for x in rounded]
    actual = getattr(eager, op)(*rounded, *options)
    expected = getattr(naive, op)(*exact, *options)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < 1e-2
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(actual, rounded, upstream.to(dtype))
    for gradient, reference in zip(
        found, torch.autograd.grad(expected, exact, upstream)
    ):
        assert gradient.dtype == dtype
        assert relative_error(gradient, reference) < 1e-2


def test_autocast():
    """Activations in bfloat16, parameters and their gradients in float32."""
    model = MLLA(dict(embed_dims=16, depths=(1,) * 4, num_heads=(1, 2, 2, 4))).eval()
    image = torch.randn(2, 3, 64, 64)
    expected = gradients(model, image)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = gradients(model, image)
    assert {x.dtype for x in actual} == {torch.float32}
    actual, expected = (torch.cat([x.flatten() for x in y]) for y in (actual, expected))
    assert relative_error(actual, expected) < 5e-2


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('act', [False, True])
def test_residual_under_autocast(act, grad):
    """The sum is in float32, because half precision would round 1 + weight."""
    _, x, _, weight, bias = attention_arguments((2, 9, 8, 24))
    arguments = [x, weight / 50, bias / 50]
    expected = naive.depthwise_conv(*arguments, True, act)
    with torch.set_grad_enabled(grad), torch.autocast('cpu', torch.bfloat16):
        actual = eager.depthwise_conv(*(x.float() for x in arguments), True, act)
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) < 1e-3


@pytest.mark.parametrize('grad', [False, True])
def test_attention_under_autocast(grad):
    """Only the convolution LePE is rounded to half precision. Here it is zero."""
    *arguments, weight, bias = attention_arguments((2, 9, 8, 24))
    arguments += [0 * weight, 0 * bias]
    expected = naive.mlla_attention(*arguments, 3)
    with torch.set_grad_enabled(grad), torch.autocast('cpu', torch.bfloat16):
        actual = eager.mlla_attention(*(x.float() for x in arguments), 3)
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize('grad', [False, True])
def test_mlp_under_autocast(grad):
    """It runs in half precision, as linear layers do under autocast."""
    arguments = mlp_arguments((2, 9, 8, 24))
    expected = naive.mlp(*arguments)
    with torch.set_grad_enabled(grad), torch.autocast('cpu', torch.bfloat16):
        actual = eager.mlp(*(x.float() for x in arguments))
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) < 1e-2


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_layer_norm_under_autocast(dtype):
    """Maps stay in half precision; parameters and their gradients are in float32."""
    if dtype == torch.float16 and torch.__version__ < '2.3':
        pytest.skip('no float16 kernels on the CPU')
    x, weight, bias = layer_norm_arguments((2, 9, 8, 24))
    leaves = [x.detach().to(dtype), weight.detach().float(), bias.detach().float()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with torch.autocast('cpu', dtype):
        actual = eager.layer_norm(*leaves, 1e-5)
    expected = naive.layer_norm(*exact, 1e-5)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < 1e-2
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(actual, leaves, upstream.to(dtype))
    # On the CPU, sums over tokens are in half precision. Models do not run it there.
    for gradient, leaf, reference, bound in zip(
        found,
        leaves,
        torch.autograd.grad(expected, exact, upstream),
        (1e-2, 5e-2, 5e-2),
    ):
        assert gradient.dtype == leaf.dtype
        assert relative_error(gradient, reference) < bound


def test_small_features_are_not_rounded_to_zero():
    """ELU(-12) + 1 is 6e-6. ELU(-12) alone is -1 in half precision."""
    x = torch.linspace(-16, 4, 81)
    expected = torch.where(x > 0, x.double() + 1, x.double().exp())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        features = eager._features(x.to(dtype))  # x is exact in all of them
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=0)


def test_the_gradient_of_the_gate_stays_in_the_range_of_float16():
    """The gradient of the output times y is out of range, but SiLU' is small."""
    if torch.__version__ < '2.3':
        pytest.skip('no float16 kernels on the CPU')
    qk, v = torch.zeros(1, 4, 4, 16), torch.full((1, 4, 4, 8), 64.0)
    weights = torch.zeros(8, 1, 3, 3), torch.zeros(8)
    arguments = [x.half() for x in (qk, v, torch.full_like(v, -10), *weights)]
    found, expected = (
        torch.autograd.grad(
            ops.mlla_attention(*tensors, 1), gate, torch.full_like(v, 4096).to(gate)
        )
        for ops, tensors in (
            (eager, arguments),
            (naive, [x.double() for x in arguments]),
        )
        for gate in [tensors[2].requires_grad_()]
    )
    assert relative_error(found[0], expected[0]) < 1e-2


def gradients(model, image):
    """Gradients of all parameters. The norms do not make this loss constant."""
    torch.manual_seed(1)
    loss = sum((x.float() * torch.randn(x.shape)).mean() for x in model(image))
    return torch.autograd.grad(loss, list(model.parameters()))


def test_output_is_finite_where_the_normaliser_underflows():
    qk = torch.full((1, 16, 16, 64), -20.0)
    v, gate = torch.randn(2, 1, 16, 16, 32)
    y = eager.mlla_attention(qk, v, gate, torch.zeros(32, 1, 3, 3), torch.zeros(32), 1)
    assert y.isfinite().all()


@pytest.mark.parametrize('ops', [naive, eager])
@pytest.mark.parametrize('part', ['queries', 'keys', 'both'])
def test_gradients_through_a_small_normaliser(part, ops):
    """With logits near -8 the features are near e^-8, and so is the normaliser."""
    if torch.__version__ < '2.3':
        pytest.skip('no float16 kernels on the CPU')
    qk, *others = (x.detach() for x in attention_arguments((1, 14, 14, 64)))
    chosen = dict(queries=slice(64), keys=slice(64, None), both=slice(None))[part]
    qk[..., chosen] -= 8
    rounded = [x.half().requires_grad_() for x in (qk, *others)]
    exact = [x.double().detach().requires_grad_() for x in rounded]
    upstream, loss_scale = torch.randn(1, 14, 14, 64), 1024
    y = ops.mlla_attention(*rounded, 2)
    found = torch.autograd.grad(y, rounded, (upstream * loss_scale).half())
    y = naive.mlla_attention(*exact, 2)
    expected = torch.autograd.grad(y, exact, upstream.double() * loss_scale)
    for gradient, reference in zip(found, expected):
        assert relative_error(gradient, reference) < 5e-3


def test_many_tokens_stay_in_the_range_of_float16():
    """The sum of k~^T v over the tokens is out of range. Its mean is in range."""
    if torch.__version__ < '2.3':
        pytest.skip('no float16 kernels on the CPU')
    qk, v = torch.full((1, 256, 256, 16), 4.0), torch.full((1, 256, 256, 8), 8.0)
    weights = torch.zeros(8, 1, 3, 3), torch.zeros(8)
    arguments = [x.half() for x in (qk, v, v, *weights)]
    y = eager.mlla_attention(*arguments, 1)
    expected = naive.mlla_attention(*(x.double() for x in arguments), 1)
    assert relative_error(y, expected) < 1e-2


def test_other_strides():
    """Maps are channels-first in memory, and the gradient has its axes swapped."""
    shape = (2, 5, 7, 8)
    arguments = [
        x.detach().movedim(-1, 1).contiguous().movedim(1, -1).requires_grad_()
        if x.dim() == 4 and len(x) == 2
        else x
        for x in attention_arguments(shape)
    ]
    assert not arguments[1].is_contiguous()
    upstream = torch.randn(2, 8, 7, 5, dtype=torch.float64).transpose(1, 3)
    found, expected = (
        torch.autograd.grad(ops.mlla_attention(*arguments, 2), arguments, upstream)
        for ops in (eager, naive)
    )
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(
            eager.mlla_attention(*arguments, 2), naive.mlla_attention(*arguments, 2)
        )


def test_inputs_are_left_as_they_were():
    arguments = attention_arguments((1, 1, 1, 8))
    before = [x.detach().clone() for x in arguments]
    upstream = torch.randn(1, 1, 1, 8, dtype=torch.float64)
    copy = upstream.clone()
    y = eager.mlla_attention(*arguments, 2)
    torch.autograd.grad(y, arguments, upstream)
    with torch.no_grad():
        eager.mlla_attention(*arguments, 2)
        eager.depthwise_conv(*arguments[2:], True, True)
    assert torch.equal(upstream, copy)
    for x, expected in zip(arguments, before):
        assert torch.equal(x, expected)


def test_rotations_of_the_last_size_alone_are_kept():
    rotary._ROTATIONS.clear()
    with torch.inference_mode():
        for size in (3, 9, 5):
            table = rotary.rotation(torch.zeros(1, size, size + 1, 32))
    assert table.shape == (5, 6, 8)
    assert [x.shape for x in rotary._ROTATIONS.values()] == [table.shape]
    # The table is created in inference mode, and used in training.
    qk = torch.randn(1, 5, 6, 32, requires_grad=True)
    v = torch.randn(1, 5, 6, 16)
    y = eager.mlla_attention(qk, v, v, torch.zeros(16, 1, 3, 3), torch.zeros(16), 1)
    y.sum().backward()
    assert qk.grad.isfinite().all()
