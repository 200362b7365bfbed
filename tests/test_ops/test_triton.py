# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The Triton kernels against the definitions in float64.

Without a GPU, Triton interprets the kernels if ``TRITON_INTERPRET=1`` was set before it
was imported. Other tests import it without this variable. So one test runs this file
again in a process of its own. The shapes are small because the interpreter is slow.
"""

import copy
import os
import sys
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mlla_mm.models import MLLA
from mlla_mm.models.layers import MLLABlock, PatchMerging
from mlla_mm.ops import naive
from mlla_mm.ops import triton as fused
from mlla_mm.ops.dispatch import block_parameters

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICES = ['cpu']
if not INTERPRETED:
    no_gpu = not torch.cuda.is_available()
    no_gpu = pytest.mark.skipif(no_gpu, reason='needs a GPU, or TRITON_INTERPRET=1')
    DEVICES = [pytest.param('cuda', marks=[pytest.mark.gpu, no_gpu])]

FLOAT32, HALF = torch.float32, [torch.float16, torch.bfloat16]
HALF_ONCE = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
slow = partial(pytest.param, marks=pytest.mark.slow)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# A block has a dozen layers, and each rounds its result.
# Of norms: where an output is close to zero, rounding switches its ReLU.
MERGING_TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-2, torch.bfloat16: 1e-1}
BLOCK_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


# Tests that another process runs together.
ATTENTION, NORM = 'attention or same_bits or gradients', 'norm or mlp or halve'


@pytest.fixture(params=DEVICES)
def device(request):
    device = torch.device(request.param)
    if not fused.is_available(device):
        pytest.skip('needs Triton 3.3 and, on a GPU, compute capability 8.0')
    return device


@pytest.mark.skipif(INTERPRETED, reason='would start itself')
@pytest.mark.parametrize(
    'names',
    [
        'block and merged',
        'block and not merged and (with or draws)',
        'block and not merged and not (with or draws)',
        f'not block and ({ATTENTION})',
        f'not block and not ({ATTENTION}) and ({NORM})',
        f'not block and not ({ATTENTION}) and not ({NORM})',
    ],
)
@pytest.mark.parametrize(
    'chosen', ['not slow', pytest.param('slow', marks=pytest.mark.slow)]
)
def test_without_a_gpu(chosen, names, run_tool):
    if not fused._has_triton():
        pytest.skip('needs Triton 3.3')
    command = ['-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', chosen]
    output = run_tool(
        sys.executable, *command, '-k', names, Path(__file__),
        env=dict(TRITON_INTERPRET='1'),
    ).stdout  # fmt: skip
    assert ' passed' in output and ' failed' not in output, output


@pytest.mark.skipif(INTERPRETED, reason='about the other process')
def test_importing_the_package_does_not_import_triton(run_tool):
    run_tool(
        sys.executable,
        '-c',
        'import sys, mlla_mm, mlla_mm.ops.triton; assert "triton" not in sys.modules',
    )


@pytest.mark.skipif(INTERPRETED, reason='for the ordinary CPU')
def test_refuse_the_cpu():
    assert not fused.is_available(torch.device('cpu'))
    assert not fused.supports_depthwise_conv(*conv_inputs((1, 2, 3, 8)))
    assert not fused.supports_mlla_attention(*attention_inputs((1, 2, 3, 8)), 2)
    assert not fused.supports_layer_norm(*norm_inputs((2, 8)))
    assert not fused.supports_linear_relu(*linear_inputs(2, 8, 8))
    with torch.no_grad():
        assert not fused.supports_batch_norm(*batch_norm_inputs((1, 8, 2, 3)))
    block = MLLABlock(8, 2)
    parameters = block_parameters(block)
    assert not fused.supports_mlla_block(torch.randn(1, 2, 3, 8), parameters, 2)


# --- Inputs and comparison ---


def conv_inputs(shape, dtype=FLOAT32, device='cpu'):
    """x, weight and bias. The parameters stay float32, as under autocast."""
    channels = shape[-1]
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(channels, 1, 3, 3, device=device) / 3
    bias = torch.randn(channels, device=device)
    return [t.requires_grad_() for t in (x, weight, bias)]


def attention_inputs(shape, dtype=FLOAT32, device='cpu'):
    """qk, v, gate, weight and bias."""
    v, weight, bias = conv_inputs(shape, dtype, device)
    qk = torch.randn(*shape[:3], 2 * shape[3], device=device).to(dtype)
    gate = torch.randn(shape, device=device).to(dtype)
    return [qk.requires_grad_(), v, gate.requires_grad_(), weight, bias]


def norm_inputs(shape, dtype=FLOAT32, device='cpu'):
    """x, far from zero, weight and bias."""
    x = (torch.randn(shape, device=device) + 3).to(dtype)
    weight, bias = (torch.randn(shape[-1], device=device) for _ in '12')
    return [t.requires_grad_() for t in (x, weight, bias)]


def linear_inputs(rows, summands, columns, dtype=FLOAT32, device='cpu'):
    """x, weight and bias, all in one dtype."""
    x = torch.randn(rows, summands, device=device)
    weight = torch.randn(columns, summands, device=device) / summands**0.5
    bias = torch.randn(columns, device=device)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


def batch_norm_inputs(shape, dtype=FLOAT32, device='cpu'):
    """x, mean, variance, weight and bias."""
    mean, weight, bias = (torch.randn(shape[1], device=device) for _ in '123')
    var = torch.rand(shape[1], device=device) + 0.1
    return [torch.randn(shape, device=device).to(dtype), mean, var, weight, bias]


def image_scales(device='cpu'):
    """Factors of stochastic depth for two images."""
    return torch.tensor([0.0, 1.25], device=device)


def scaled(x, scale):
    """The rows of two images, multiplied by the scales of the images."""
    return x if scale is None else x * scale.repeat_interleave(len(x) // 2)[:, None]


def output_and_grads(function, inputs, *options):
    """The output, then the gradients of the inputs that require one."""
    output = function(*inputs, *options)
    generator = torch.Generator().manual_seed(1)
    # Every dtype can hold these values.
    upstream = torch.randn(output.shape, generator=generator).bfloat16().to(output)
    wanted = [t for t in inputs if t.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, upstream)]


def in_float64(inputs):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]


def assert_close(actual, expected, dtype=FLOAT32, tolerances=TOLERANCE):
    """Compare the largest difference with the largest value, or with 1."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        assert one.shape == other.shape
        scale = max(1.0, other.abs().max().item())
        tolerance = max(tolerances[dtype], tolerances[one.dtype])
        assert (one.double() - other).abs().max().item() <= tolerance * scale


def check(name, inputs, *options):
    """Compare a kernel with its definition, forward and backward."""
    assert getattr(fused, f'supports_{name}')(*inputs, *_heads(name, options))
    actual = output_and_grads(getattr(fused, name), inputs, *options)
    expected = output_and_grads(getattr(naive, name), in_float64(inputs), *options)
    wanted = [t for t in inputs if t.requires_grad]
    dtype = inputs[1 if name == 'mlla_attention' else 0].dtype
    assert [t.dtype for t in actual] == [dtype, *(t.dtype for t in wanted)]
    assert_close(actual, expected, dtype)


def _heads(name, options):
    return options if name == 'mlla_attention' else ()


# --- Depthwise convolution ---


@pytest.mark.parametrize(
    'shape, dtype, residual, act',
    [
        *(
            ((2, 3, 5, 12), FLOAT32, *flags)
            for flags in product([False, True], repeat=2)
        ),
        ((1, 3, 5, 8), torch.bfloat16, True, True),
        slow((1, 3, 5, 8), torch.float16, True, True),
        ((1, 1, 1, 8), FLOAT32, False, False),  # one token
        ((1, 5, 3, 4), FLOAT32, False, False),
        ((1, 1, 7, 72), FLOAT32, False, False),  # one row, two blocks of channels
        ((1, 10, 9, 4), FLOAT32, False, False),  # sums of several programs
        *(
            slow(shape, dtype, True, True)
            for shape in [(3, 14, 14, 64), (1, 17, 23, 32), (2, 7, 7, 136)]
            for dtype in [FLOAT32, *HALF]
        ),
    ],
)
def test_depthwise_conv(shape, dtype, residual, act, device):
    check('depthwise_conv', conv_inputs(shape, dtype, device), residual, act)


def test_depthwise_conv_under_autocast(device):
    x, weight, bias = conv_inputs((1, 2, 3, 8), device=device)
    for inputs in ((x, weight, bias), (x.bfloat16(), weight, bias)):
        for residual in (False, True):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                actual = fused.depthwise_conv(*inputs, residual)
                expected = naive.depthwise_conv(*inputs, residual)
            assert actual.dtype == expected.dtype
            assert_close([actual], [expected.double()], torch.bfloat16)


# --- Attention ---


@pytest.mark.parametrize(
    'shape, heads, dtype',
    [
        ((1, 1, 1, 8), 2, FLOAT32),  # one token
        ((2, 1, 7, 8), 2, FLOAT32),  # heads of four channels
        ((1, 3, 2, 8), 4, FLOAT32),  # heads of two channels
        ((1, 3, 5, 24), 3, FLOAT32),  # a head across both halves of the rotation
        ((1, 5, 2, 32), 1, FLOAT32),
        ((1, 2, 3, 40), 2, FLOAT32),  # 20 channels: not a power of two
        ((1, 9, 17, 4), 1, FLOAT32),  # sums of several programs
        ((1, 3, 5, 16), 2, torch.float16),
        slow((1, 3, 5, 16), 2, torch.bfloat16),
        *(
            slow(shape, heads, dtype)
            for shape, heads in [
                ((3, 14, 14, 64), 2),
                ((1, 17, 23, 96), 3),
                ((1, 7, 7, 128), 4),
                ((1, 5, 9, 64), 1),
            ]
            for dtype in [FLOAT32, *HALF]
        ),
    ],
)
def test_mlla_attention(shape, heads, dtype, device):
    check('mlla_attention', attention_inputs(shape, dtype, device), heads)


def test_mlla_attention_of_queries_in_half_precision_and_other_values(device):
    qk, v, gate, weight, bias = attention_inputs((1, 3, 3, 8), device=device)
    qk, gate = (t.detach().half().requires_grad_() for t in (qk, gate))
    check('mlla_attention', (qk, v, gate, weight, bias), 2)


def test_finite_where_a_half_precision_normaliser_underflows(device):
    # As in test_naive.py. Also for sums over tokens that float16 cannot hold.
    for value in (-20.0, 200.0):
        qk = torch.full((1, 3, 9, 16), value, dtype=torch.float16, device=device)
        inputs = attention_inputs((1, 3, 9, 8), torch.float16, device)
        inputs[0] = qk.requires_grad_()
        inputs[1] = (inputs[1].detach() * 200).requires_grad_()
        y = fused.mlla_attention(*inputs, 1)
        (grad_gate,) = torch.autograd.grad(y.float().sum(), inputs[2])
        assert y.isfinite().all() and grad_gate.isfinite().all()


def test_gradients_through_a_small_normaliser(device):
    """As in test_eager.py: logits near -8, and a loss scale."""
    inputs = [x.detach() for x in attention_inputs((1, 5, 7, 16), device=device)]
    inputs[0] -= 8
    rounded = [x.half().requires_grad_() for x in inputs]
    exact = in_float64(rounded)

    def loss(ops, inputs):
        return ops.mlla_attention(*inputs, 2).double().sum() * 1024

    actual = torch.autograd.grad(loss(fused, rounded), rounded[:3])
    expected = torch.autograd.grad(loss(naive, exact), exact[:3])
    for one, other in zip(actual, expected):
        assert (one - other).norm() <= 1e-2 * other.norm()


@pytest.mark.parametrize('which', [0, 1, 2])
def test_not_a_number_is_not_hidden(which, device):
    inputs = [t.detach() for t in attention_inputs((1, 2, 3, 8), device=device)]
    inputs[which][0, 0, 0, 0] = torch.nan
    actual = fused.mlla_attention(*inputs, 2).isnan()
    assert actual.any()
    assert torch.equal(actual, naive.mlla_attention(*inputs, 2).isnan())


# --- Parts of both ---


@pytest.mark.parametrize('scaling', [False, True])
def test_gated_conv(scaling, device):
    """Forward and backward. The gate and its gradient are parts of wider maps."""
    from mlla_mm.ops.triton._depthwise_conv import gated_conv, gated_conv_grad

    x, weight, bias = (t.detach() for t in conv_inputs((2, 3, 9, 12), device=device))
    added, upstream = torch.randn_like(x), torch.randn_like(x)
    gate = torch.randn(2, 3, 9, 20, device=device)[..., 8:]
    scale = image_scales(device) if scaling else None
    exact = in_float64([added.requires_grad_(), gate.requires_grad_()])
    y = exact[0] + naive.depthwise_conv(*in_float64([x, weight, bias]))
    y = y * F.silu(exact[1])
    scaled_y = y if scale is None else y * scale.view(-1, 1, 1, 1)
    expected = torch.autograd.grad(scaled_y, exact, upstream.double())

    added, gate = added.detach(), gate.detach()
    assert_close([gated_conv(x, weight, bias, added, gate)], [y])
    wide = torch.zeros(2, 3, 9, 20, device=device)
    grad, again = gated_conv_grad(
        x, weight, bias, added, gate, upstream, wide[..., 8:], scale
    )
    assert_close([grad, wide[..., 8:], again], [*expected, scaled_y])
    assert not wide[..., :8].any()


@pytest.mark.parametrize('residual', [False, True])
def test_conv_grad_is_added_and_written_where_asked(residual, device):
    from mlla_mm.ops.triton._depthwise_conv import conv_grad, silu_conv_grad
    from mlla_mm.ops.triton._sums import add_up

    inputs = conv_inputs((2, 9, 3, 12), device=device)
    weight, bias = (t.detach() for t in inputs[1:])
    wide = torch.randn(2, 9, 3, 20, device=device)
    added, upstream = torch.randn(2, 2, 9, 3, 12, device=device)
    # z is the input of SiLU.
    exact = in_float64(inputs)
    z = naive.depthwise_conv(*exact)
    (grad_z,) = torch.autograd.grad(F.silu(z), z, upstream.double(), retain_graph=True)
    x = wide[..., 4:16].copy_(inputs[0].detach())
    assert_close([silu_conv_grad(x, weight, bias, upstream)], [grad_z])

    expected = list(torch.autograd.grad(z, exact, upstream.double()))
    expected[0] = expected[0] + added + (upstream if residual else 0)
    before, out = wide.clone(), wide.clone()
    grad, sums = conv_grad(x, weight, upstream, residual, added, out[..., 4:16])
    assert grad.data_ptr() == out[..., 4:16].data_ptr()
    assert_close([grad, *add_up((sums, (weight, bias)))], expected)
    assert torch.equal(out[..., :4], before[..., :4])
    assert torch.equal(out[..., 16:], before[..., 16:])


# --- Sums ---


@pytest.mark.parametrize(
    'dtype', [*HALF_ONCE, pytest.param(FLOAT32, marks=pytest.mark.slow)]
)
def test_column_sums(dtype, device, monkeypatch):
    """Each program takes several tiles, and the sums of programs fill several."""
    from mlla_mm.ops.triton import _sums

    monkeypatch.setattr(_sums, '_NUMBERS', 32)
    x = torch.randn(150, 20, device=device).to(dtype)[:, 5:17]
    for programs, like in ((512, FLOAT32), (4, dtype)):
        monkeypatch.setattr(_sums, '_PROGRAMS', programs)
        sums = _sums.column_sums(x)
        assert sums.dtype == FLOAT32
        (actual,) = _sums.add_up((sums, [torch.empty(12, dtype=like, device=device)]))
        assert actual.dtype == like
        assert_close([actual], [x.double().sum(0)])


def test_sums_of_many_maps_are_added_up_at_once(device):
    """Other numbers of programs, rows and columns, and two results of one row."""
    from mlla_mm.ops.triton._sums import add_up

    shapes = [(300, 10, 40), (1, 3, 8), (5, 1, 72), (2, 10, 4), (257, 1, 33)]
    maps = [torch.randn(shape, device=device) for shape in shapes]
    likes = [
        [torch.empty(40, 1, 3, 3), torch.empty(40)],
        [torch.empty(8), torch.empty(8).half(), torch.empty(8)],
        [torch.empty(36), torch.empty(36)],
        [torch.empty(4, 1, 3, 3).permute(0, 2, 3, 1), torch.empty(4)],
        [torch.empty(33)],
    ]
    first, second, third, fourth, fifth = (x.double().sum(0) for x in maps)
    expected = [
        first[:9].t().reshape(40, 1, 3, 3),
        first[9],
        *second,
        *third.view(2, 36),
        fourth[:9].t().reshape(4, 3, 3, 1),
        fourth[9],
        fifth[0],
    ]
    actual = add_up(*zip(maps, likes))
    assert actual[3].dtype == torch.float16
    assert_close(actual, expected)
    nine = [(sums, [sums[0]]) for sums in maps[1:3] * 4 + maps[4:]]
    assert_close(add_up(*nine), [sums.double().sum(0) for sums, _ in nine])


def test_sums_that_float16_cannot_hold_on_the_way(device):
    from mlla_mm.ops.triton._linear import linear_residual
    from mlla_mm.ops.triton._sums import column_sums

    x = torch.full((150, 32), 1000.0, dtype=torch.float16, device=device)
    x[1::2] = -1000
    assert not column_sums(x).sum(0).any()
    x, weight = x.abs()[:2], torch.full((16, 32), 100.0).half().to(device)
    weight[:, 16:] = -100
    y = linear_residual(x, weight, weight[:, 0], torch.zeros(2, 1, 1, 16).to(weight))
    assert torch.equal(y, torch.full_like(y, 100))


# --- LayerNorm ---


@pytest.mark.parametrize(
    'shape, dtype, eps',
    [
        ((1, 1, 1, 8), FLOAT32, 1e-5),  # one row
        ((2, 3, 5, 12), FLOAT32, 1e-5),
        ((30, 96), FLOAT32, 1e-5),  # more rows than a tile has
        ((1, 3, 513), FLOAT32, 1e-5),  # not a power of two
        ((3, 5, 24), torch.float16, 1e-6),
        ((3, 5, 24), torch.bfloat16, 1e-6),
        *(
            slow(shape, dtype, 1e-5)
            for shape in [(2, 56, 56, 64), (3, 7, 7, 640), (2, 5, 2048)]
            for dtype in [FLOAT32, *HALF]
        ),
    ],
)
def test_layer_norm(shape, dtype, eps, device):
    check('layer_norm', norm_inputs(shape, dtype, device), eps)


@pytest.mark.parametrize('dtype', [FLOAT32, torch.bfloat16])
def test_layer_norm_under_autocast(dtype, device):
    inputs = norm_inputs((3, 5, 24), dtype, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = output_and_grads(fused.layer_norm, inputs, 1e-5)
        if device.type == 'cuda':
            assert naive.layer_norm(*inputs, 1e-5).dtype == FLOAT32
    assert [t.dtype for t in actual] == [FLOAT32, *(t.dtype for t in inputs)]
    expected = output_and_grads(naive.layer_norm, in_float64(inputs), 1e-5)
    assert_close(actual, expected)


@pytest.mark.parametrize('scaling', [False, True])
def test_gradient_of_a_branch_at_its_layer_norm(scaling, device, monkeypatch):
    """Each program takes several tiles. The map is a part of a wider one."""
    from mlla_mm.ops.triton import _layer_norm
    from mlla_mm.ops.triton._sums import add_up

    monkeypatch.setattr(_layer_norm, '_NUMBERS', 32)
    monkeypatch.setattr(_layer_norm, '_PROGRAMS', 3)
    x, weight, bias = norm_inputs((2, 5, 20), device=device)
    inputs = [x.detach()[..., 4:16].requires_grad_(), weight[:12], bias[:12]]
    exact = in_float64([t.detach().requires_grad_() for t in inputs])
    scale = image_scales(device) if scaling else None
    grad, residual = torch.randn(2, 2, 5, 12, device=device)
    output = naive.layer_norm(*exact, 1e-5)
    expected = torch.autograd.grad(output, exact, grad.double())
    behind = scaled(residual.double().view(10, 12), scale).sum(0)
    inputs = [t.detach() for t in inputs]
    dx, sums, again = _layer_norm.layer_norm_residual_grad(
        *inputs, 1e-5, grad, residual, scale
    )
    sums = add_up((sums, [*inputs[1:], torch.empty(12)]))
    assert_close(
        [dx, *sums, again],
        [expected[0] + residual, *expected[1:], behind, output.detach()],
    )


# --- Linear layers ---

# Numbers of summands and of columns. None is a multiple of the largest block.
SIZES = [(96, 40), (40, 24), (24, 96)]
# Rows of two images: the first tile ends in the second image.
ROWS = 140


@pytest.mark.parametrize('dtype', [FLOAT32, *HALF_ONCE])
@pytest.mark.parametrize('sizes', SIZES)
def test_linear_gelu(sizes, dtype, device):
    from mlla_mm.ops.triton._linear import linear_gelu

    inputs = [t.detach() for t in linear_inputs(ROWS, *sizes, dtype, device)]
    z = F.linear(*in_float64(inputs))
    y, kept = linear_gelu(*inputs, keep=True)
    assert y.dtype == kept.dtype == dtype
    assert_close([y, kept], [F.gelu(z), z])
    again, nothing = linear_gelu(*inputs, keep=False)
    assert torch.equal(again, y) and nothing is None


@pytest.mark.parametrize('scaling', [False, True])
@pytest.mark.parametrize('dtype', [FLOAT32, *HALF_ONCE])
@pytest.mark.parametrize('sizes', SIZES)
def test_linear_residual(sizes, dtype, scaling, device):
    from mlla_mm.ops.triton._linear import linear_residual

    inputs = [t.detach() for t in linear_inputs(ROWS, *sizes, dtype, device)]
    scale = image_scales(device) if scaling else None
    z = scaled(F.linear(*in_float64(inputs)), scale)
    for residual_dtype in {FLOAT32, dtype}:
        residual = torch.randn(2, 7, 10, sizes[1], device=device).to(residual_dtype)
        y = linear_residual(*inputs, residual, scale)
        assert y.dtype == residual_dtype
        assert_close([y], [residual + z.view(residual.shape)], dtype)


@pytest.mark.parametrize('scaling', [False, True])
@pytest.mark.parametrize('dtype', [FLOAT32, *HALF_ONCE])
@pytest.mark.parametrize('sizes', SIZES)
def test_gelu_linear_grad(sizes, dtype, scaling, device):
    from mlla_mm.ops.triton._linear import gelu_linear_grad

    grad, weight, _ = linear_inputs(ROWS, *sizes, dtype, device)
    grad, weight = grad.detach(), weight.detach().t().contiguous()
    hidden = torch.randn(ROWS, sizes[1], device=device).to(dtype)
    scale = image_scales(device) if scaling else None
    h = hidden.double().requires_grad_()
    activated = scaled(F.gelu(h), scale)
    (expected,) = torch.autograd.grad(activated @ weight.double().t(), h, grad.double())
    *actual, sums = gelu_linear_grad(grad, weight, hidden, scale)
    assert [t.dtype for t in (*actual, sums)] == [dtype, dtype, FLOAT32]
    expected = [expected, activated.detach(), expected.sum(0)]
    assert_close([*actual, sums.sum((0, 1))], expected, dtype)


def test_gelu_is_that_with_the_error_function(device):
    """To seven digits. The kernel writes float32 here, since half precision rounds."""
    from mlla_mm.ops.triton import _linear

    x = torch.linspace(-12, 12, 4800, device=device).half()
    x[:3] = torch.tensor([0.0, 6e-8, -6e-8])
    x, identity = x.view(-1, 16), torch.eye(16, device=device).half()
    exact = x.double().requires_grad_()
    expected = F.gelu(exact)
    (expected_grad,) = torch.autograd.grad(expected.sum(), exact)

    y, grad, again = torch.empty(3, *x.shape, device=device)
    _linear._run(_linear._GELU, x, identity, y)
    ones, sums = torch.ones_like(x), torch.empty(3, 16, device=device)
    _linear._run(_linear._GELU_GRAD, ones, identity, grad, again, sums, other=x)
    for actual, exact in ((y, expected), (again, expected), (grad, expected_grad)):
        assert (actual.double() - exact).abs().max() < 1e-6
    assert_close([sums.sum(0)], [expected_grad.sum(0)])


def test_gelu_of_what_is_not_finite(device):
    from mlla_mm.ops.triton._linear import linear_gelu

    x = torch.zeros(3, 16, dtype=torch.float16, device=device)
    x[:, 0] = torch.tensor([torch.nan, torch.inf, 6e4])
    weight = torch.ones(16, 16, dtype=torch.float16, device=device)
    y, _ = linear_gelu(x, weight, weight[0] - 1, keep=False)
    assert y[0].isnan().all()
    assert torch.equal(y[1:], F.gelu(F.linear(x, weight)[1:]))


@pytest.mark.parametrize('dtype', [FLOAT32, *HALF])
@pytest.mark.parametrize('sizes', SIZES)
def test_linear_relu(sizes, dtype, device):
    check('linear_relu', linear_inputs(ROWS, *sizes, dtype, device))


def test_linear_relu_of_maps(device):
    """The map may have any strides. Here it is channels-first in memory."""
    x = torch.randn(2, 12, 3, 5, device=device).requires_grad_()
    _, weight, bias = linear_inputs(1, 12, 24, device=device)

    def function(ops, x, weight, bias):
        return ops.linear_relu(x.permute(0, 2, 3, 1), weight, bias)

    inputs = [x, weight, bias]
    assert_close(
        output_and_grads(lambda *t: function(fused, *t), inputs),
        output_and_grads(lambda *t: function(naive, *t), in_float64(inputs)),
    )


def test_linear_relu_under_autocast(device):
    x, weight, bias = linear_inputs(30, 24, 40, torch.bfloat16, device)
    inputs = [x, *(t.detach().float().requires_grad_() for t in (weight, bias))]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for x in (inputs[0], inputs[0].detach().float().requires_grad_()):
            y = fused.linear_relu(x, *inputs[1:])
            assert y.dtype == torch.bfloat16
    check('linear_relu', inputs)
    inputs[1].requires_grad_(False)
    check('linear_relu', inputs)


# --- LayerNorm with the layers before or behind it ---


@pytest.mark.parametrize(
    'shape, dtype',
    [
        ((2, 3, 5, 12), FLOAT32),  # not a power of two
        ((1, 9, 9, 16), FLOAT32),  # several programs
        *(((1, 4, 3, 24), dtype) for dtype in HALF),
        slow((2, 7, 7, 512), FLOAT32),
        slow((2, 14, 14, 96), torch.bfloat16),
        slow((1, 7, 7, 768), torch.float16),
    ],
)
def test_conv_norm(shape, dtype, device):
    from mlla_mm.ops.triton._depthwise_conv import conv, conv_norm
    from mlla_mm.ops.triton._layer_norm import layer_norm

    inputs = [t.detach() for t in conv_inputs(shape, dtype, device)]
    norm = torch.randn(2, shape[-1], device=device)
    y, normalised = conv_norm(*inputs, *norm, 1e-5, dtype)
    assert y.dtype == normalised.dtype == dtype
    exact = naive.depthwise_conv(*in_float64(inputs), residual=True)
    expected = naive.layer_norm(exact, *norm.double(), 1e-5)
    assert_close([y, normalised], [exact, expected], dtype)
    # The same as two kernels.
    assert torch.equal(y, conv(*inputs, residual=True))
    assert_close([normalised], [layer_norm(y, *norm, 1e-5, dtype).double()], dtype)


def test_conv_norm_under_autocast(device):
    from mlla_mm.ops.triton._depthwise_conv import conv_norm

    x, weight, bias = (t.detach() for t in conv_inputs((1, 2, 3, 8), device=device))
    norm = torch.randn(2, 8, device=device)
    for given in (x, x.bfloat16()):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y, normalised = conv_norm(given, weight, bias, *norm, 1e-5, torch.bfloat16)
            expected = naive.depthwise_conv(given, weight, bias, residual=True)
        assert y.dtype == expected.dtype and normalised.dtype == torch.bfloat16
        assert_close([y], [expected.double()], torch.bfloat16)


# Numbers of channels and of columns. Neither is a multiple of a block.
NARROW = [(24, 40), slow(64, 128), (96, 72), slow(128, 512)]


@pytest.mark.parametrize('given', [FLOAT32, torch.float16])
@pytest.mark.parametrize('channels, columns', NARROW)
def test_norm_linear(channels, columns, given, device):
    from mlla_mm.ops.triton._norm_linear import norm_linear

    x, *norm = (t.detach() for t in norm_inputs((ROWS, channels), given, device))
    _, *layer = linear_inputs(1, channels, columns, torch.float16, device)
    layer = [t.detach() for t in layer]
    actual = norm_linear(x, *norm, 1e-5, *layer)
    assert actual.dtype == torch.float16
    exact = naive.layer_norm(*in_float64([x, *norm]), 1e-5)
    assert_close([actual], [F.linear(exact, *in_float64(layer))], torch.float16)


@pytest.mark.parametrize('scaling', [False, True])
@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('channels, columns', NARROW)
def test_mlp(channels, columns, dtype, scaling, device):
    from mlla_mm.ops.triton._norm_linear import mlp

    _, *first = linear_inputs(1, channels, columns, dtype, device)
    _, *second = linear_inputs(1, columns, channels, dtype, device)
    layers = [t.detach() for t in (*first, *second)]
    scale = image_scales(device) if scaling else None
    for given in {FLOAT32, dtype}:
        shape = 2, 7, 10, channels
        x, *norm = (t.detach() for t in norm_inputs(shape, given, device))
        y, hidden = mlp(x, *norm, 1e-5, *layers, scale, keep=True)
        assert y.dtype == given and hidden.dtype == dtype
        weights = in_float64([x, *norm, *layers])
        z = F.linear(naive.layer_norm(*weights[:3], 1e-5), *weights[3:5])
        z = z.view(ROWS, columns)
        branch = scaled(F.linear(F.gelu(z), *weights[5:]), scale).view(shape)
        assert_close([y, hidden], [weights[0] + branch, z], dtype)
        again, nothing = mlp(x, *norm, 1e-5, *layers, scale, keep=False)
        assert torch.equal(again, y) and nothing is None


# --- Patch merging ---


def merging_inputs(shape, columns, dtype=FLOAT32, device='cpu'):
    """x, and weights and biases of both layers."""
    x, weight, bias = linear_inputs(1, shape[-1], columns, device=device)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    _, taps, conv_bias = conv_inputs((1, 1, 1, columns), device=device)
    return [x, weight, bias, taps, conv_bias]


@pytest.mark.parametrize(
    'shape, columns, dtype',
    [
        ((1, 2, 2, 4), 8, FLOAT32),  # one output
        ((2, 4, 6, 4), 20, FLOAT32),
        ((1, 6, 18, 4), 8, FLOAT32),  # several strips
        ((1, 34, 4, 4), 8, FLOAT32),  # several programs on top of each other
        *(((1, 4, 4, 8), 16, dtype) for dtype in HALF),
        *(slow((2, 14, 14, 12), 96, dtype) for dtype in [FLOAT32, *HALF]),
        slow((1, 28, 12, 24), 136, FLOAT32),
    ],
)
def test_expand_and_halve(shape, columns, dtype, device):
    inputs = merging_inputs(shape, columns, dtype, device)
    if dtype == FLOAT32:
        check('expand_and_halve', inputs)
    with torch.autocast(device.type, dtype, enabled=dtype != FLOAT32):
        assert fused.supports_expand_and_halve(*inputs)
        actual = output_and_grads(fused.expand_and_halve, inputs)
        with torch.no_grad():
            assert torch.equal(fused.expand_and_halve(*inputs), actual[0])
    assert [t.dtype for t in actual] == [dtype, *(t.dtype for t in inputs)]
    # The hidden map is rounded.
    inputs[1:3] = (t.detach().to(dtype).requires_grad_() for t in inputs[1:3])
    expected = output_and_grads(naive.expand_and_halve, in_float64(inputs))
    for one, other in zip(actual, expected):
        assert (one - other).norm() <= MERGING_TOLERANCE[dtype] * other.norm()


def test_expand_and_halve_of_what_is_not_a_number(device):
    inputs = merging_inputs((1, 4, 4, 4), 8, device=device)
    with torch.no_grad():
        inputs[0][0, 3, 3] = torch.nan
    actual, grad, *_ = output_and_grads(fused.expand_and_halve, inputs)
    expected, *_ = output_and_grads(naive.expand_and_halve, inputs)
    assert torch.equal(actual.isnan(), expected.isnan()) and actual.isnan().any()


def test_gradients_of_some_inputs_of_patch_merging(device):
    inputs = merging_inputs((1, 4, 4, 4), 8, device=device)
    for i in (0, 2, 3):
        inputs[i].requires_grad_(False)
    check('expand_and_halve', inputs)


def test_expand_and_halve_of_odd_maps_is_not_supported(device):
    for shape in ((1, 3, 4, 4), (1, 4, 3, 4)):
        inputs = merging_inputs(shape, 8, device=device)
        assert not fused.supports_expand_and_halve(*inputs)


@pytest.mark.parametrize('forced', ['fused', ''])
def test_patch_merging_as_a_whole(forced, device, monkeypatch):
    """The layers are read where fused is asked for, else called."""
    from mlla_mm.ops.triton import _merging

    monkeypatch.setenv('MLLA_OPS', forced)
    merging, called = PatchMerging(4).to(device), []
    monkeypatch.setattr(
        _merging, 'halve', lambda *args, f=_merging.halve: called.append(1) or f(*args)
    )
    exact, x = copy.deepcopy(merging).double(), torch.randn(2, 4, 3, 5, device=device)
    wanted = [x.requires_grad_(), *merging.parameters()]
    actual = output_and_grads(lambda *_: merging(x), wanted)
    assert len(called) == (forced == 'fused')
    monkeypatch.setenv('MLLA_OPS', 'naive')
    precise = x.detach().double().requires_grad_()
    wanted = [precise, *exact.parameters()]
    assert_close(actual, output_and_grads(lambda *_: exact(precise), wanted))
    monkeypatch.setenv('MLLA_OPS', 'fused')
    merging.conv[1].act.register_forward_hook(lambda *_: called.append('hook'))
    merging(x)
    assert called[-1] == 'hook'


# --- BatchNorm ---


@pytest.mark.parametrize('act', [False, True])
@pytest.mark.parametrize('dtype', [FLOAT32, *HALF])
@pytest.mark.parametrize('shape', [(1, 8, 1, 1), (2, 12, 3, 5), (1, 96, 5, 7)])
@torch.no_grad()
def test_batch_norm(shape, dtype, act, device):
    inputs = batch_norm_inputs(shape, dtype, device)
    assert fused.supports_batch_norm(*inputs)
    expected = [naive.batch_norm(*in_float64(inputs), 1e-5, act)]
    channels_last = inputs[0].contiguous(memory_format=torch.channels_last)
    for x in (inputs[0], channels_last):
        actual = fused.batch_norm(x, *inputs[1:], 1e-5, act)
        assert actual.dtype == dtype
        assert_close([actual], expected)


@torch.no_grad()
def test_relu_does_not_hide_what_is_not_a_number(device):
    inputs = batch_norm_inputs((2, 12, 3, 5), device=device)
    inputs[0][0, 3, 1, 2] = torch.nan
    for act in (False, True):
        actual = fused.batch_norm(*inputs, 1e-5, act).isnan()
        assert torch.equal(actual, inputs[0].isnan())
    x, weight, bias = linear_inputs(3, 8, 12, device=device)
    x[1, 2] = torch.nan
    actual = fused.linear_relu(x, weight, bias).isnan()
    assert actual[1].all() and actual.sum() == 12


# --- Block ---


def make_block(channels, num_heads, device='cpu', **options):
    block = MLLABlock(channels, num_heads, **options)
    for parameter in block.parameters():
        with torch.no_grad():
            parameter += torch.randn_like(parameter) / 10
    return block.to(device)


def apply_block(block, x, scales, merged=False):
    """Run a block by the kernels."""
    eps = block.norm1.eps, block.norm2.eps
    parameters = block_parameters(block)
    return fused.mlla_block(x, parameters, block.attn.num_heads, eps, scales, merged)


class Scaled(nn.Module):
    """Stochastic depth that takes one of the given scales in each call."""

    def __init__(self, scales):
        super().__init__()
        self.scales = list(scales)

    def forward(self, x, branch):
        scale = self.scales.pop(0)
        return x + (branch if scale is None else branch * scale.view(-1, 1, 1, 1))


def apply_naive_block(block, x, scales):
    block.drop_path = Scaled(scales)
    with mock.patch.dict(os.environ, MLLA_OPS='naive'):
        return block(x)


def block_and_grads(block, x, scales, apply=apply_block):
    """The output, the gradient of x, and those of the parameters, sorted by name."""
    x = x.detach().requires_grad_()
    inputs = [x, *dict(sorted(block.named_parameters())).values()]
    return output_and_grads(lambda *_: apply(block, x, scales), inputs)


def check_block(block, x, scales, computed=FLOAT32, merged=False):
    """Compare with the definitions. ``computed`` is the dtype of autocast."""
    num_heads = block.attn.num_heads
    assert fused.supports_mlla_block(x, block_parameters(block), num_heads)
    with torch.autocast(x.device.type, computed, enabled=computed != FLOAT32):
        actual = block_and_grads(block, x, scales, partial(apply_block, merged=merged))
    parameters = dict(sorted(block.named_parameters())).values()
    assert [t.dtype for t in actual] == [t.dtype for t in (x, x, *parameters)]
    exact = copy.deepcopy(block).double()
    expected = block_and_grads(exact, x.double(), scales, apply_naive_block)
    assert_close(actual, expected, computed, BLOCK_TOLERANCE)


# ``dtype`` is autocast's, and ``given`` that of the map.
@pytest.mark.parametrize(
    'shape, num_heads, scaling, dtype, given',
    [
        ((2, 1, 3, 24), 1, True, FLOAT32, FLOAT32),
        slow((2, 1, 1, 8), 4, False, FLOAT32, FLOAT32),  # one token
        # More rows than a strip has.
        slow((2, 9, 10, 16), 2, False, FLOAT32, FLOAT32),
        slow((2, 9, 10, 16), 2, True, FLOAT32, FLOAT32),
        ((2, 2, 3, 16), 1, True, torch.float16, FLOAT32),
        ((2, 2, 3, 16), 1, True, torch.bfloat16, torch.bfloat16),
        slow((2, 2, 3, 16), 1, True, torch.float16, torch.float16),
        slow((2, 2, 3, 16), 1, True, torch.bfloat16, FLOAT32),
        *(
            slow(shape, num_heads, True, dtype, FLOAT32)
            for shape, num_heads in [((2, 10, 11, 96), 3), ((2, 7, 7, 128), 4)]
            for dtype in [FLOAT32, *HALF]
        ),
    ],
)
def test_block(shape, num_heads, scaling, dtype, given, device):
    scale = image_scales(device)
    scales = (scale, scale.flip(0)) if scaling else (None, None)
    x = torch.randn(shape, device=device).to(given)
    check_block(make_block(shape[-1], num_heads, device), x, scales, dtype)


@pytest.mark.parametrize(
    'channels, computed, given',
    [
        (16, torch.bfloat16, FLOAT32),
        (12, FLOAT32, FLOAT32),  # not for half precision: layer by layer
        # Too wide for whole rows.
        slow(132, torch.float16, torch.float16),
        slow(96, torch.float16, torch.float16),
        slow(132, FLOAT32, FLOAT32),
    ],
)
def test_block_of_merged_layers(channels, computed, given, device):
    scale = image_scales(device)
    x = torch.randn(2, 2, 3, channels, device=device).to(given)
    scales = scale, scale.flip(0)
    block = make_block(channels, max(1, channels // 44), device)
    check_block(block, x, scales, computed, merged=True)
    with torch.autocast(device.type, computed, enabled=computed != FLOAT32):
        expected = apply_block(block, x, scales, merged=True)
        with torch.no_grad():
            assert torch.equal(apply_block(block, x, scales, merged=True), expected)
        # Whether layers are merged changes no more than the order of sums does.
        assert_close([expected], [apply_block(block, x, scales).double()], computed)


def test_layers_are_merged_where_fused_is_asked_for(device, monkeypatch):
    from mlla_mm.ops.triton import _block

    block, called = make_block(8, 1, device), []
    x = torch.randn(1, 2, 3, 8, device=device)
    for name in ('conv_norm', 'norm_linear', 'mlp'):
        function = getattr(_block, name)
        spy = partial(lambda name, f, *a: called.append(name) or f(*a), name, function)
        monkeypatch.setattr(_block, name, spy)
    monkeypatch.setenv('MLLA_OPS', 'fused')
    with torch.no_grad():
        block(x)
        assert called == ['conv_norm', 'conv_norm']
        with torch.autocast(device.type, torch.float16):
            block(x)
        assert called[2:] == ['norm_linear', 'mlp']
        monkeypatch.delenv('MLLA_OPS')
        block(x)
    assert len(called) == 4


@pytest.mark.parametrize(
    'dtype', [FLOAT32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in HALF)]
)
def test_block_of_96_channels_without_a_bias(dtype, device):
    """The number of channels is not a power of two. A head has 32."""
    block = make_block(96, 3, device, qkv_bias=False)
    x = torch.randn(1, 2, 3, 96, device=device)
    check_block(block, x, (None, image_scales(device)[1:]), dtype)


def test_block_of_any_strides(device):
    x = torch.randn(1, 8, 2, 3, device=device).permute(0, 2, 3, 1)
    check_block(make_block(8, 1, device), x, (None, None))


@pytest.mark.parametrize('dtype', [FLOAT32, torch.float16])
def test_block_without_gradients(dtype, device):
    block, scale = make_block(8, 1, device), image_scales(device)
    x = torch.randn(2, 1, 3, 8, device=device)
    with torch.autocast(device.type, torch.float16, enabled=dtype == torch.float16):
        expected = apply_block(block, x, (scale, scale))
        assert expected.requires_grad
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                actual = apply_block(block, x, (scale, scale))
            assert not actual.requires_grad and torch.equal(actual, expected)


@torch.no_grad()
def test_block_whose_parameters_are_in_half_precision(device):
    block = make_block(16, 2, device).half()
    x = torch.randn(2, 3, 5, 16, device=device).half()
    actual = apply_block(block, x, (None, None))
    assert actual.dtype == torch.float16
    exact = copy.deepcopy(block).double()
    assert_close([actual], [apply_naive_block(exact, x.double(), (None, None))])


def test_gradients_of_some_parameters(device):
    block, scale = make_block(8, 1, device), image_scales(device)[1:]
    x = torch.randn(1, 1, 3, 8, device=device)

    def grads():
        block.zero_grad()
        apply_block(block, x, (scale, None)).square().sum().backward()
        return {name: p.grad for name, p in block.named_parameters()}

    expected = grads()
    frozen = ['cpe1.weight', 'norm2.bias', 'attn.qk.bias', 'attn.lepe.weight']
    frozen += [name for name in expected if name.startswith('mlp.fc1')]
    for name in frozen:
        block.get_parameter(name).requires_grad_(False)
    for name, grad in grads().items():
        if name in frozen:
            assert grad is None
        else:
            assert torch.equal(grad, expected[name]), name


def test_block_draws_stochastic_depth(device, monkeypatch):
    monkeypatch.setenv('MLLA_OPS', 'fused')
    block = make_block(8, 1, device, drop_path_rate=0.25)
    x = torch.randn(4, 1, 2, 8, device=device)
    torch.manual_seed(4)
    y = block(x)
    torch.manual_seed(4)
    scales = [block.drop_path.draw_scale(4, FLOAT32, device) for _ in '12']
    for scale in scales:
        assert scale.shape == (4,) and scale.dtype == FLOAT32
    assert torch.cat(scales).unique().tolist() == pytest.approx([0, 4 / 3])
    exact = copy.deepcopy(block).double()
    assert_close([y], [apply_naive_block(exact, x.double(), scales)])
    block.eval()
    assert block.drop_path.draw_scale(4, FLOAT32, device) is None
    exact = copy.deepcopy(block).double()
    assert_close([block(x)], [apply_naive_block(exact, x.double(), (None, None))])


@pytest.mark.parametrize(
    'use_reentrant', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_block_with_checkpointing(use_reentrant, device, monkeypatch):
    """Stochastic depth draws the same factors when the block runs again."""
    monkeypatch.setenv('MLLA_OPS', 'fused')
    block = make_block(8, 1, device, drop_path_rate=0.5)
    x = torch.randn(2, 1, 2, 8, device=device).requires_grad_()
    wanted = [x, *block.parameters()]
    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        torch.manual_seed(2)
        for tensor in wanted:
            tensor.grad = None
        y = run(x)
        y.square().sum().backward()
        results.append([y, *(tensor.grad for tensor in wanted)])
    assert all(map(torch.equal, *results))


def test_not_a_number_is_not_hidden_by_a_block(device):
    block = make_block(8, 1, device)
    x = torch.randn(2, 2, 3, 8, device=device)
    x[0, 1, 2, 3] = torch.nan
    for dtype in (FLOAT32, torch.float16):
        with torch.autocast(device.type, torch.float16, enabled=dtype != FLOAT32):
            actual = apply_block(block, x, (None, None)).isnan()
        assert actual[0].all() and not actual[1].any()


@pytest.mark.slow
def test_model_with_stochastic_depth(device):
    """In training, the blocks multiply by the factors that they draw."""
    arch = dict(embed_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2))
    model = MLLA(arch, drop_path_rate=0.6).to(device).train()
    exact = copy.deepcopy(model).double()
    image = torch.randn(3, 3, 52, 64, device=device)
    state = torch.get_rng_state(), torch.cuda.get_rng_state_all()

    def features_and_grads(model, image):
        features = model(image)
        loss = sum(y.square().mean() for y in features)
        loss.backward()
        grads = [p.grad for name, p in sorted(model.named_parameters())]
        return [*(y.detach() for y in features), *grads]

    with mock.patch.dict(os.environ, MLLA_OPS='fused'):
        actual = features_and_grads(model, image)
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1])
    drawn = []
    for block in exact.modules():
        if isinstance(block, MLLABlock):
            draw_scale = block.drop_path.draw_scale
            scales = [draw_scale(3, FLOAT32, device) for _ in '12']
            block.drop_path = Scaled(scales)
            drawn += [scale for scale in scales if scale is not None]
    drawn = torch.cat(drawn)
    assert len(drawn) == 24 and (drawn == 0).any() and (drawn > 1).any()
    with mock.patch.dict(os.environ, MLLA_OPS='naive'):
        expected = features_and_grads(exact, image.double())
    for i, (one, other) in enumerate(zip(actual, expected)):
        assert one.shape == other.shape
        # After the features come gradients, which change where a ReLU switches.
        tolerance = 1e-4 if i < 4 else 2e-2
        assert (one - other).norm() <= tolerance * other.norm() + 1e-6


# --- All ---


def test_slices_of_merged_projections(device):
    """The rows of the inputs are not contiguous, and nothing is copied."""
    merged = torch.randn(2, 3, 5, 32, device=device).requires_grad_()
    _, _, _, weight, bias = attention_inputs((2, 3, 5, 8), device=device)

    def attention(ops, merged, weight, bias):
        x, gate, qk = merged.split([8, 8, 16], dim=-1)
        v = ops.depthwise_conv(x, weight, bias, act=True)
        return ops.mlla_attention(qk, v, gate, weight, bias, 2)

    inputs = [merged, weight, bias]
    assert_close(
        output_and_grads(lambda *t: attention(fused, *t), inputs),
        output_and_grads(lambda *t: attention(naive, *t), in_float64(inputs)),
    )


def test_any_strides(device):
    """Channels that are not contiguous, a cropped map, and an expanded gradient."""
    x, weight, bias = conv_inputs((1, 8, 5, 4), device=device)
    for view in (x.transpose(1, 3), x[:, 1:4, 1:]):
        taps = weight[:1].expand(view.shape[-1], 1, 3, 3)
        offset = bias[:1].expand(view.shape[-1])
        grads = [
            torch.autograd.grad(ops.depthwise_conv(view, taps, offset).sum(), x)
            for ops in (fused, naive)
        ]
        assert_close(*grads)


def test_parameters_of_any_strides(device):
    x = torch.randn(2, 3, 4, 8, device=device)
    apart = [(torch.rand(16, device=device) + 1)[::2] for _ in range(4)]
    actual = fused.layer_norm(x, *apart[:2], 1e-5)
    assert_close([actual], [naive.layer_norm(x, *apart[:2], 1e-5).double()])
    maps = x.permute(0, 3, 1, 2)
    with torch.no_grad():
        actual = fused.batch_norm(maps, *apart, 1e-5, True)
        assert_close([actual], [naive.batch_norm(maps, *apart, 1e-5, True).double()])
    weight = torch.randn(3, 3, 1, 8, device=device).permute(3, 2, 0, 1)
    inputs = [x, weight.requires_grad_(), torch.randn(8, device=device)]
    check('depthwise_conv', inputs)


def test_gradients_lie_in_memory_as_the_weights_do(device):
    """Weights of a model are channels-last, and so are buckets for gradients."""
    weight = torch.randn(8, 1, 3, 3, device=device)
    weight = weight.to(memory_format=torch.channels_last).requires_grad_()
    x, bias = torch.randn(2, 3, 4, 8, device=device), torch.randn(8, device=device)
    fused.depthwise_conv(x, weight, bias).sum().backward()
    assert weight.grad.stride() == weight.stride() == (9, 1, 3, 1)


def test_parameters_of_other_shapes_are_refused(device):
    block = MLLABlock(16, 2).to(device)
    x = torch.randn(1, 2, 3, 16, device=device)
    parameters = block_parameters(block)
    assert fused.supports_mlla_block(x, parameters, 2)
    assert not fused.supports_mlla_block(x[..., :8], parameters, 2)
    for i, parameter in enumerate(parameters):
        other = parameter.detach().repeat(2, *[1] * (parameter.dim() - 1))
        for wrong in (other, None):
            if (i, wrong) != (11, None):  # qkv_bias=False
                changed = [*parameters[:i], wrong, *parameters[i + 1 :]]
                assert not fused.supports_mlla_block(x, changed, 2), i


@pytest.mark.parametrize('frozen', [[0], [1, 2, 4]])
def test_gradients_of_some_inputs(frozen, device):
    inputs = attention_inputs((1, 2, 3, 8), device=device)
    for i in frozen:
        inputs[i].requires_grad_(False)
    check('mlla_attention', inputs, 2)
    if inputs[1].requires_grad or inputs[3].requires_grad:
        check('depthwise_conv', [inputs[1], *inputs[3:]], True, True)


def test_every_run_gives_the_same_bits(device):
    shape = (2, 64, 48, 64) if device.type == 'cuda' else (1, 2, 3, 8)
    inputs = attention_inputs(shape, device=device)
    for name, given, options in (
        ('mlla_attention', inputs, [2]),
        ('depthwise_conv', [inputs[1], *inputs[3:]], [True, True]),
    ):
        runs = [output_and_grads(getattr(fused, name), given, *options) for _ in '12']
        assert all(map(torch.equal, *runs))
    block, x = make_block(shape[-1], 1, device), inputs[1].detach()
    scales = image_scales(device)[-len(x) :]
    runs = [block_and_grads(block, x, (scales, scales)) for _ in '12']
    assert all(map(torch.equal, *runs))


def test_second_derivatives_are_refused(device):
    inputs = conv_inputs((1, 1, 2, 4), device=device)
    block = make_block(4, 1, device)
    for y in (
        fused.depthwise_conv(*inputs),
        apply_block(block, inputs[0], (None, None)),
    ):
        (grad,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match='once_differentiable'):
            grad.sum().backward()


def test_what_is_not_supported(device):
    x, weight, bias = conv_inputs((1, 2, 3, 12), device=device)
    assert fused.supports_depthwise_conv(x, weight, bias)
    assert not fused.supports_depthwise_conv(x.double(), weight, bias)
    assert not fused.supports_depthwise_conv(x[:0], weight, bias)
    assert not fused.supports_depthwise_conv(x, weight.to('meta'), bias)

    inputs = attention_inputs((1, 2, 3, 12), device=device)
    assert fused.supports_mlla_attention(*inputs, 6)
    assert not fused.supports_mlla_attention(*inputs, 4)  # three channels in a head
    inputs = attention_inputs((1, 2, 3, 6), device=device)
    assert not fused.supports_mlla_attention(*inputs, 1)  # half of three pairs
    inputs = attention_inputs((1, 1, 1, 128), device=device)
    assert fused.supports_mlla_attention(*inputs, 2)
    assert not fused.supports_mlla_attention(*inputs, 1)

    for name, inputs in (
        ('layer_norm', norm_inputs((2, 12), device=device)),
        ('linear_relu', linear_inputs(2, 12, 8, device=device)),
    ):
        supports = getattr(fused, f'supports_{name}')
        x, weight, bias = inputs
        assert supports(*inputs)
        assert not supports(x.double(), weight, bias)
        assert not supports(x, weight, bias.double())
        assert not supports(x[:0], weight, bias)
    wide = norm_inputs((1, 2049), device=device)
    assert not fused.supports_layer_norm(*wide)
    assert not fused.supports_linear_relu(*linear_inputs(1, 4, 8193, device=device))

    x, *rest = batch_norm_inputs((1, 12, 2, 3), device=device)
    assert not fused.supports_batch_norm(x, *rest)  # gradients
    with torch.no_grad():
        assert fused.supports_batch_norm(x, *rest)
        assert not fused.supports_batch_norm(x.double(), *rest)
        wide = batch_norm_inputs((1, 2049, 1, 1), device=device)
        assert not fused.supports_batch_norm(*wide)


def test_blocks_that_are_not_supported(device):
    x = torch.randn(1, 2, 3, 24, device=device)
    block = make_block(24, 2, device)
    parameters = block_parameters(block)
    assert fused.supports_mlla_block(x, parameters, 2)
    assert not fused.supports_mlla_block(x, parameters, 8)  # three channels in a head
    assert not fused.supports_mlla_block(x.double(), parameters, 2)
    assert not fused.supports_mlla_block(x[:0], parameters, 2)
    many = x[:, :1, :1].expand(65536, 1, 1, 24)
    assert not fused.supports_mlla_block(many, parameters, 2)
    block.mlp.fc2.double()
    parameters = block_parameters(block)
    assert not fused.supports_mlla_block(x, parameters, 2)
    block = make_block(128, 1, device)
    x, parameters = torch.randn(1, 1, 1, 128, device=device), list(block.parameters())
    assert not fused.supports_mlla_block(x, parameters, 1)
    assert fused.supports_mlla_block(x, parameters, 2)
