# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The Triton kernels against the plain definitions in float64.

Without a GPU, Triton interprets the kernels if ``TRITON_INTERPRET=1`` was set before it
was imported, which other tests do and must not notice. So one test runs this file again
in a process of its own. The interpreter is slow; hence the small shapes.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

from mlla_mm.ops import naive
from mlla_mm.ops import triton as fused

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICES = ['cpu']
if not INTERPRETED:
    no_gpu = not torch.cuda.is_available()
    no_gpu = pytest.mark.skipif(no_gpu, reason='needs a GPU, or TRITON_INTERPRET=1')
    DEVICES = [pytest.param('cuda', marks=[pytest.mark.gpu, no_gpu])]

FLOAT32, HALF = torch.float32, [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@pytest.fixture(params=DEVICES)
def device(request):
    device = torch.device(request.param)
    if not fused.is_available(device):
        pytest.skip('needs Triton 3.3 and, on a GPU, compute capability 8.0')
    return device


@pytest.mark.skipif(INTERPRETED, reason='would start itself')
@pytest.mark.parametrize(
    'chosen', ['not slow', pytest.param('slow', marks=pytest.mark.slow)]
)
def test_without_a_gpu(chosen, run_tool):
    if not fused._has_triton():
        pytest.skip('needs Triton 3.3')
    command = ['-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', chosen]
    output = run_tool(
        sys.executable, *command, Path(__file__), env=dict(TRITON_INTERPRET='1')
    ).stdout
    assert ' passed' in output and ' failed' not in output, output


@pytest.mark.skipif(INTERPRETED, reason='about the other process')
def test_importing_the_package_does_not_import_triton(run_tool):
    run_tool(
        sys.executable,
        '-c',
        'import sys, mlla_mm, mlla_mm.ops.triton; assert "triton" not in sys.modules',
    )


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason='the interpreter does not compile')
@pytest.mark.parametrize('dtype, precision', [('bf16', 'tf32'), ('fp32', 'ieee')])
def test_compile_for_hopper(dtype, precision, tmp_path, monkeypatch):
    """The compiler, which needs no GPU, takes what the interpreter takes."""
    if not fused._has_triton():
        pytest.skip('needs Triton 3.3')
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from mlla_mm.ops.triton import _depthwise_conv, _mlla_attention

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    options = dict(C=64, D=32, BLOCK_D=32, BLOCK_C=64, BLOCK=16)
    options.update(PRECISION=precision, ACT=True, RESIDUAL=True)
    for module in (_depthwise_conv, _mlla_attention):
        kernels = [k for name, k in vars(module).items() if name.endswith('_kernel')]
        assert len(kernels) >= 3
        for kernel in kernels:
            constants = {k: v for k, v in options.items() if k in kernel.arg_names}
            signature = {k: _triton_type(k, dtype) for k in kernel.arg_names}
            signature.update(dict.fromkeys(constants, 'constexpr'))
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            assert compile(source, target=GPUTarget('cuda', 90, 32)).asm['cubin']


def _triton_type(argument, dtype):
    if not argument.endswith('_ptr'):
        return 'i32'
    exact = (
        'cos',
        'sin',
        'weight',
        'bias',
        'sums',
        'state',
        'states',
        'dstate',
        'dstates',
    )
    return '*fp32' if argument[: -len('_ptr')] in exact else f'*{dtype}'


@pytest.mark.skipif(INTERPRETED, reason='for the ordinary CPU')
def test_refuse_the_cpu():
    assert not fused.is_available(torch.device('cpu'))
    assert not fused.supports_depthwise_conv(*conv_inputs((1, 2, 3, 8)))
    assert not fused.supports_mlla_attention(*attention_inputs((1, 2, 3, 8)), 2)


# --- Inputs and comparison ---


def conv_inputs(shape, dtype=FLOAT32, device='cpu'):
    """x, weight and bias; the parameters stay float32, as under autocast."""
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


def output_and_grads(function, inputs, *options):
    """Output, then gradients of the inputs that require one."""
    output = function(*inputs, *options)
    generator = torch.Generator().manual_seed(1)
    # Values that every dtype has.
    upstream = torch.randn(output.shape, generator=generator).bfloat16().to(output)
    wanted = [t for t in inputs if t.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, upstream)]


def in_float64(inputs):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]


def assert_close(actual, expected, dtype=FLOAT32):
    """Largest difference against the largest value, or against 1."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        assert one.shape == other.shape
        scale = max(1.0, other.abs().max().item())
        tolerance = max(TOLERANCE[dtype], TOLERANCE[one.dtype])
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


@pytest.mark.parametrize('act', [False, True])
@pytest.mark.parametrize('residual', [False, True])
def test_depthwise_conv(residual, act, device):
    check('depthwise_conv', conv_inputs((2, 3, 5, 12), device=device), residual, act)


@pytest.mark.parametrize(
    'dtype', [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_depthwise_conv_in_half_precision(dtype, device):
    inputs = conv_inputs((1, 3, 5, 8), dtype, device)
    check('depthwise_conv', inputs, True, True)


# One token; one row; two blocks of channels.
@pytest.mark.parametrize('shape', [(1, 1, 1, 8), (1, 5, 3, 4), (1, 1, 7, 72)])
def test_depthwise_conv_of_odd_shapes(shape, device):
    check('depthwise_conv', conv_inputs(shape, device=device))


def test_depthwise_conv_adds_up_what_programs_find(device):
    check('depthwise_conv', conv_inputs((1, 10, 9, 4), device=device))


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [FLOAT32, *HALF])
@pytest.mark.parametrize('shape', [(3, 14, 14, 64), (1, 17, 23, 32), (2, 7, 7, 136)])
def test_depthwise_conv_of_larger_shapes(shape, dtype, device):
    check('depthwise_conv', conv_inputs(shape, dtype, device), True, True)


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


# One token; heads of four and of two channels; a head across both halves of the
# rotation; one head; dimensions that are no power of two.
@pytest.mark.parametrize(
    'shape, heads',
    [
        ((1, 1, 1, 8), 2),
        ((2, 1, 7, 8), 2),
        ((1, 3, 2, 8), 4),
        ((1, 3, 5, 24), 3),
        ((1, 5, 2, 32), 1),
        ((1, 2, 3, 40), 2),
    ],
)
def test_mlla_attention(shape, heads, device):
    check('mlla_attention', attention_inputs(shape, device=device), heads)


@pytest.mark.parametrize(
    'dtype', [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_mlla_attention_in_half_precision(dtype, device):
    check('mlla_attention', attention_inputs((1, 3, 5, 16), dtype, device), 2)


def test_mlla_attention_adds_up_what_programs_find(device):
    check('mlla_attention', attention_inputs((1, 9, 17, 4), device=device), 1)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [FLOAT32, *HALF])
@pytest.mark.parametrize(
    'shape, heads',
    [
        ((3, 14, 14, 64), 2),
        ((1, 17, 23, 96), 3),
        ((1, 7, 7, 128), 4),
        ((1, 5, 9, 64), 1),
    ],
)
def test_mlla_attention_of_larger_shapes(shape, heads, dtype, device):
    check('mlla_attention', attention_inputs(shape, dtype, device), heads)


def test_mlla_attention_of_queries_in_half_precision_and_other_values(device):
    qk, v, gate, weight, bias = attention_inputs((1, 3, 3, 8), device=device)
    qk, gate = (t.detach().half().requires_grad_() for t in (qk, gate))
    check('mlla_attention', (qk, v, gate, weight, bias), 2)


def test_finite_where_a_half_precision_normaliser_underflows(device):
    # As in test_naive.py. And sums over tokens that float16 cannot hold.
    for value in (-20.0, 200.0):
        qk = torch.full((1, 3, 9, 16), value, dtype=torch.float16, device=device)
        inputs = attention_inputs((1, 3, 9, 8), torch.float16, device)
        inputs[0] = qk.requires_grad_()
        inputs[1] = (inputs[1].detach() * 200).requires_grad_()
        y = fused.mlla_attention(*inputs, 1)
        (grad_gate,) = torch.autograd.grad(y.float().sum(), inputs[2])
        assert y.isfinite().all() and grad_gate.isfinite().all()


@pytest.mark.parametrize('which', [0, 1, 2])
def test_not_a_number_is_not_hidden(which, device):
    inputs = [t.detach() for t in attention_inputs((1, 2, 3, 8), device=device)]
    inputs[which][0, 0, 0, 0] = torch.nan
    actual = fused.mlla_attention(*inputs, 2).isnan()
    assert actual.any()
    assert torch.equal(actual, naive.mlla_attention(*inputs, 2).isnan())


# --- Both ---


def test_slices_of_merged_projections(device):
    """Rows of the inputs are apart, and nothing is copied."""
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
    """Channels apart, a cropped map, and a gradient that is one number."""
    x, weight, bias = conv_inputs((1, 8, 5, 4), device=device)
    for view in (x.transpose(1, 3), x[:, 1:4, 1:]):
        taps = weight[:1].expand(view.shape[-1], 1, 3, 3)
        offset = bias[:1].expand(view.shape[-1])
        grads = [
            torch.autograd.grad(ops.depthwise_conv(view, taps, offset).sum(), x)
            for ops in (fused, naive)
        ]
        assert_close(*grads)


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
        assert all(torch.equal(one, other) for one, other in zip(*runs))


def test_second_derivatives_are_refused(device):
    inputs = conv_inputs((1, 1, 2, 4), device=device)
    y = fused.depthwise_conv(*inputs)
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
    inputs = attention_inputs((1, 1, 1, 128), device=device)
    assert fused.supports_mlla_attention(*inputs, 2)
    assert not fused.supports_mlla_attention(*inputs, 1)
