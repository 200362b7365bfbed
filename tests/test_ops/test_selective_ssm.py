# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The selective state-space model: three ways, Mamba's, and as a token mixer."""

import contextlib
import io
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from mlla_mm.models.layers import LinearAttention
from mlla_mm.ops.selective_ssm import (
    selective_ssm,
    selective_ssm_as_attention,
    selective_ssm_closed_form,
)

from ..processes import ROOT
from ..reference import DATA, array, parameter

WAYS = (selective_ssm, selective_ssm_closed_form, selective_ssm_as_attention)
SHAPES = [(1, 1, 1), (7, 3, 3), (17, 2, 5), (30, 8, 3)]  # L, d, C
# Forget gates near 1, of all sizes, and most of them 0.
DECAYS = {'weak': 1e-3, 'usual': 1.0, 'strong': 1e3}


def arguments(length, state, channels, decay=1.0, batch=2, dtype=torch.float64):
    x, delta = torch.randn(2, batch, length, channels, dtype=dtype)
    B, C = torch.randn(2, batch, length, state, dtype=dtype)
    A = -decay * torch.rand(state, channels, dtype=dtype)
    D = torch.randn(channels, dtype=dtype)
    return [x, F.softplus(delta), A, B, C, D]


def channel_by_channel(x, delta, A, B, C, D):
    """Eq. 8, a model of its own for each number of x, with matrices d x d."""
    y = torch.empty_like(x)
    for n, c in np.ndindex(len(x), x.shape[2]):
        h = x.new_zeros(len(A), 1)
        for i in range(x.shape[1]):
            step = delta[n, i, c]
            h = torch.exp(step * A[:, c]).diag() @ h
            h = h + step * B[n, i, :, None] * x[n, i, c]
            y[n, i, c] = C[n, i] @ h[:, 0] + D[c] * x[n, i, c]
    return y


@pytest.mark.parametrize('decay', DECAYS)
@pytest.mark.parametrize('shape', SHAPES)
def test_three_ways(shape, decay):
    inputs = arguments(*shape, DECAYS[decay])
    expected = channel_by_channel(*inputs)
    for way in WAYS:
        torch.testing.assert_close(way(*inputs), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize('decay', DECAYS)
def test_gradients(decay):
    inputs = [t.requires_grad_() for t in arguments(9, 3, 4, DECAYS[decay])]
    upstream = torch.randn_like(inputs[0])
    expected, *others = (
        torch.autograd.grad(way(*inputs), inputs, upstream) for way in WAYS
    )
    for grads in others:
        torch.testing.assert_close(grads, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    inputs = arguments(20, 4, 3)
    expected = selective_ssm(*inputs)
    error = 20 * torch.finfo(dtype).eps * expected.abs().max().item()
    for way in WAYS:
        y = way(*(t.to(dtype) for t in inputs))
        torch.testing.assert_close(y.double(), expected, atol=error, rtol=0)


def test_a_shape_that_does_not_fit():
    x, delta, A, B, C, D = arguments(5, 2, 3)
    for way in WAYS:
        with pytest.raises(ValueError, match=r'^C must have the shape \(2, 5, 2\)'):
            way(x, delta, A, B, C.transpose(1, 2), D)
        with pytest.raises(ValueError, match=r'x must be \(N, L, C\)'):
            way(x[0], delta[0], A, B[0], C[0], D)
        with pytest.raises(ValueError, match='^delta must have the shape'):
            way(x, delta[..., :1], A, B, C, D)


# Linear attention is the same recurrence, with gates that are 1.


def ones_for_gates(q, k, v):
    """Q_i S_i / (Q_i Z_i) by Eq. 11, whose gates are 1 and shortcut 0."""
    no_decay, no_shortcut = (v.new_zeros(*s) for s in ((q.shape[2], v.shape[2]), [1]))
    sums = selective_ssm(
        v, torch.ones_like(v), no_decay, k, q, no_shortcut.expand(v.shape[2])
    )
    one = torch.ones_like(v[..., :1])
    weights = selective_ssm(one, one, no_decay[:, :1], k, q, no_shortcut)
    return sums / weights


def test_linear_attention_is_the_recurrence_with_gates_of_one():
    q, k = torch.rand(2, 2, 9, 4, dtype=torch.float64)
    v = torch.randn(2, 9, 6, dtype=torch.float64)
    y = ones_for_gates(q, k, v)
    # Eq. 3: each token attends to itself and those before it.
    weights = (q @ k.mT).tril()
    causal = weights @ v / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(y, causal, atol=1e-10, rtol=0)
    # Eq. 2, where the last token has seen all.
    everything = q @ (k.mT @ v) / (q @ k.sum(1)[..., None])
    torch.testing.assert_close(y[:, -1], everything[:, -1], atol=1e-10, rtol=0)


def mixer(**switches):
    """A mixer with weights that matter, (N, H, W, 12) -> (N, H, W, 12), in float64."""
    mixer = LinearAttention(12, **switches).double()
    for weight in mixer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return mixer


AS_SSM = dict(
    num_heads=1,
    v_proj=False,
    qk_head_dims=5,
    feature_map='identity',
    input_gate=True,
    forget_gate=True,
    shortcut=True,
    normalization=False,
)


@pytest.mark.parametrize('qkv_bias', [True, False])
def test_mixer_with_all_designs_is_the_selective_ssm(qkv_bias):
    ssm = mixer(**AS_SSM, qkv_bias=qkv_bias)
    x = torch.randn(2, 4, 6, 12, dtype=torch.float64)
    tokens = x.flatten(1, 2)
    queries, keys = ssm.qk(tokens).chunk(2, dim=-1)
    delta = F.softplus(
        tokens @ ssm.delta.w1.weight.T @ ssm.delta.w2.weight.T + ssm.delta.bias
    )
    A = -ssm.A_log.exp().T
    expected = selective_ssm(tokens, delta, A, keys, queries, ssm.D)
    torch.testing.assert_close(ssm(x).flatten(1, 2), expected, atol=1e-10, rtol=1e-10)


@pytest.fixture
def never_forgets():
    """Causal linear attention: a forget gate of 1."""
    causal = mixer(num_heads=3, forget_gate=True)
    torch.nn.init.constant_(causal.A_log, -torch.inf)  # A = 0
    return causal


def test_order_of_earlier_tokens_matters_with_a_forget_gate_alone(never_forgets):
    def change(mixer):
        """What exchanging tokens 1 and 2 does to those from 3 on."""
        x = torch.randn(2, 1, 8, 12, dtype=torch.float64)
        y = mixer(x[:, :, [1, 0, *range(2, 8)]]) - mixer(x)
        return y[:, :, 2:].abs().max().item()

    assert change(never_forgets) < 1e-12
    assert change(mixer(num_heads=3, forget_gate=True)) > 1e-3


# Mamba, as the package transformers computes it: in_proj, a causal convolution, the
# selective state-space model, a gate, out_proj.

SHAPES_OF_MAMBA = {
    'in_proj.weight': (64, 16),
    'conv1d.weight': (32, 1, 4),
    'conv1d.bias': (32,),
    'x_proj.weight': (18, 32),
    'dt_proj.weight': (32, 2),
    'dt_proj.bias': (32,),
    'A_log': (32, 8),
    'D': (32,),
    'out_proj.weight': (16, 32),
}
# It rounds some factors to float32.
ROUNDED = dict(atol=1e-6, rtol=1e-6)


@pytest.fixture
def weights():
    return {
        name: torch.from_numpy(parameter(f'mamba.{name}', shape)).double()
        for name, shape in SHAPES_OF_MAMBA.items()
    }


@pytest.fixture
def tokens():
    return torch.from_numpy(array('mamba.input', (2, 20, 16))).double()


@pytest.fixture
def recorded():
    return torch.from_numpy(np.load(DATA / 'mamba_reference_outputs.npz')['y'])


def mamba(tokens, weights, ssm):
    """Mamba's block around a selective state-space model."""
    x, gate = (tokens @ weights['in_proj.weight'].T).chunk(2, dim=-1)
    x = F.pad(x.mT, (3, 0))
    x = F.conv1d(x, weights['conv1d.weight'], weights['conv1d.bias'], groups=32)
    y = ssm(F.silu(x).mT)
    return (y * F.silu(gate)) @ weights['out_proj.weight'].T


@pytest.mark.parametrize('way', WAYS)
def test_mamba(way, tokens, weights, recorded):
    def ssm(x):
        low, B, C = (x @ weights['x_proj.weight'].T).split([2, 8, 8], dim=-1)
        delta = low @ weights['dt_proj.weight'].T + weights['dt_proj.bias']
        A = -weights['A_log'].exp().T
        return way(x, F.softplus(delta), A, B, C, weights['D'])

    y = mamba(tokens, weights, ssm)
    torch.testing.assert_close(y, recorded, **ROUNDED)


def test_mixer_in_mamba(tokens, weights, recorded):
    switches = dict(AS_SSM, qk_head_dims=8)
    mixer = LinearAttention(32, **switches, qkv_bias=False, gate_dims=2).double()
    w1, keys, queries = weights['x_proj.weight'].split([2, 8, 8])
    mixer.load_state_dict(
        {
            'qk.weight': torch.cat([queries, keys]),
            'delta.w1.weight': w1,
            'delta.w2.weight': weights['dt_proj.weight'],
            'delta.bias': weights['dt_proj.bias'],
            'A_log': weights['A_log'],
            'D': weights['D'],
        }
    )
    y = mamba(tokens, weights, lambda x: mixer(x[:, None])[:, 0])
    torch.testing.assert_close(y, recorded, **ROUNDED)


def random_block(transformers, **options):
    config = transformers.MambaConfig(num_hidden_layers=1, vocab_size=8, **options)
    return transformers.MambaModel(config).layers[0].mixer


def test_recorded_outputs_are_those_of_transformers(tokens, weights, recorded):
    transformers = pytest.importorskip('transformers')
    block = random_block(
        transformers, hidden_size=16, state_size=8, time_step_rank=2
    ).eval()
    block.double().load_state_dict(weights)
    torch.testing.assert_close(block(tokens), recorded, atol=1e-12, rtol=0)


# Where training starts.


def steps_without_input(bias):
    return F.softplus(bias.detach().double()).log().numpy()


def test_starting_values_are_those_of_transformers():
    transformers = pytest.importorskip('transformers')
    theirs = random_block(transformers, hidden_size=2048, state_size=32)
    ours = LinearAttention(4096, 128, forget_gate=True, shortcut=True)
    # Mamba's C_0 counts the channels outside of the block, half of those inside.
    assert theirs.dt_proj.in_features == 128
    scaled = [
        layer.weight.detach()[:, :2].flatten().numpy() * layer.in_features**0.5
        for layer in (theirs.dt_proj, ours.delta.w2)
    ]
    assert stats.ks_2samp(*scaled).pvalue > 1e-3
    biases = theirs.dt_proj.bias, ours.delta.bias
    assert stats.ks_2samp(*map(steps_without_input, biases)).pvalue > 1e-3
    torch.testing.assert_close(ours.A_log, theirs.A_log)
    torch.testing.assert_close(ours.D, theirs.D)


# The page.


def test_python_of_the_page():
    """Its blocks run one after the other, and print what is shown below them."""
    page = (ROOT / 'docs' / 'selective_ssm.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```(?:\n\n```text\n(.*?)```)?', page, re.S)
    assert len([shown for _, shown in blocks if shown]) > 5
    variables = {}
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, variables)
        assert printed.getvalue() == shown, code
