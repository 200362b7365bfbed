# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch
import torch.nn.functional as F

from mlla_mm.compat.pytorch import TELLS_EXPORT
from mlla_mm.ops import linear_attention, rotary_embedding


def token_by_token(q, k, v, num_heads):
    """The quadratic form: every pair of tokens, for each head."""
    out = torch.empty_like(v)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    q_rotated, k_rotated = rotary_embedding(q), rotary_embedding(k)
    for n in range(len(v)):
        for channels in torch.arange(v.shape[-1]).chunk(num_heads):
            flat = [t[n, ..., channels].flatten(0, 1) for t in (q, k, v)]
            qr, kr = (t[n, ..., channels].flatten(0, 1) for t in (q_rotated, k_rotated))
            weights = qr @ kr.T / len(kr)
            norm = (flat[0] @ flat[1].T).mean(dim=1, keepdim=True) + 1e-6
            out[n, ..., channels] = (weights @ flat[2] / norm).unflatten(
                0, v.shape[1:3]
            )
    return out


@pytest.mark.parametrize('shape, heads', [((2, 5, 7, 24), 3), ((1, 1, 1, 8), 1)])
def test_against_the_quadratic_form(shape, heads):
    q, k, v = torch.randn(3, *shape, dtype=torch.float64).requires_grad_()
    actual = linear_attention(q, k, v, heads)
    expected = token_by_token(q, k, v, heads)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(v)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
    )


def test_output_is_finite_where_the_normaliser_underflows():
    # ELU(-20) + 1 is 2e-9: a half-precision product of two of them is zero.
    q = k = torch.full((1, 16, 16, 32), -20.0, dtype=torch.float16)
    v = torch.randn(1, 16, 16, 32).half()
    if torch.__version__ < '2.3':
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    y = linear_attention(q, k, v, 1)
    assert y.dtype == v.dtype
    assert y.isfinite().all()


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return linear_attention(q, k, v, 1)


def test_a_traced_program_under_autocast_stays_in_range():
    """It runs the products in float16, where the sum over the tokens is infinite."""
    if torch.__version__ < '2.3':
        pytest.skip('no float16 kernels on the CPU')
    q = k = torch.full((1, 256, 256, 8), 4.0)
    v = 2 * k
    traced = torch.jit.trace(Attention(), (q, k, v), check_trace=False)
    with torch.autocast('cpu', torch.float16):
        actual = traced(q, k, v)
    torch.testing.assert_close(actual, linear_attention(q, k, v, 1), rtol=1e-2, atol=0)


def test_meta_tensors():
    q, k, v = torch.randn(3, 1, 5, 7, 8, device='meta')
    assert linear_attention(q, k, v, 2).shape == v.shape


@pytest.mark.skipif(not TELLS_EXPORT, reason='no dynamic shapes below PyTorch 2.7')
@pytest.mark.parametrize('strict', [True, False])
def test_an_exported_program_has_no_context(strict):
    """Runtimes of exported programs do not know autocast."""
    torch._dynamo.reset()
    example = tuple(torch.randn(3, 1, 5, 7, 8))
    exported = torch.export.export(Attention(), example, strict=strict)
    assert 'autocast' not in exported.graph_module.code
