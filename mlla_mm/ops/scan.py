# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Linear attention as a recurrence whose state decays: the forget gate of Mamba."""

from typing import Any, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..compat.pytorch import is_exporting, not_compiled, without_autocast
from .naive import EPS, at_least_float32


def decayed_scan(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor) -> Tensor:
    """Sum the values of the tokens so far, with weights that decay.

    For each head, with tokens i = 1 ... L, d channels of queries and keys, and c
    channels of values (Eqs. 4 and 10 of arXiv 2405.16605)::

        S_i = exp(A o Delta_i) o S_(i-1) + K_i^T V_i        d x c, S_0 = 0
        y_i = Q_i S_i                                       1 x c

    The states are float32 (or float64), whatever the types of the tensors. The
    backward pass computes them again, and keeps those of all tokens for a while.

    Args:
        q (Tensor): Queries, (N, L, heads, d).
        k (Tensor): Keys, of the same shape.
        v (Tensor): Values, (N, L, heads, c).
        delta (Tensor): Steps, of the shape of ``v``, positive.
        a (Tensor): Rates, (heads, c, d), negative. exp(a delta) is the forget gate.

    Returns:
        Tensor: (N, L, heads, c), the dtype of ``v``.

    Raises:
        NotImplementedError: In an export, which would fix the number of tokens.
    """
    if is_exporting() or torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            'The recurrence of the forget gate cannot be exported: it runs token by '
            'token. Export a model with forget_gate=False.'
        )
    return _call(q, k, v, delta, a)


# The compiler would write out the loop over the tokens.
@not_compiled
def _call(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor) -> Tensor:
    with without_autocast(v.device.type):
        tensors = (at_least_float32(x) for x in (q, k, v, delta, a))
        return _DecayedScan.apply(*tensors).to(v.dtype)


class _DecayedScan(torch.autograd.Function):
    """The recurrence of :func:`decayed_scan`, with an explicit gradient.

    With G_i the gradient of S_i, and E_i = exp(A o Delta_i)::

        G_i = Q_i^T dy_i + E_(i+1) o G_(i+1)
        dQ_i = dy_i S_i^T     dK_i = V_i G_i^T     dV_i = K_i G_i
        d(A o Delta_i) = G_i o E_i o S_(i-1)
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, delta, a)
        outputs, state = [], _first_state(v, a)
        for i in range(v.shape[1]):
            state = _next_state(state, k[:, i], v[:, i], delta[:, i], a)
            outputs.append(_read(state, q[:, i]))
        return torch.stack(outputs, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, ...]:
        q, k, v, delta, a = ctx.saved_tensors
        states = [_first_state(v, a)]
        for i in range(v.shape[1]):
            states.append(_next_state(states[-1], k[:, i], v[:, i], delta[:, i], a))
        grad_a = torch.zeros_like(a)
        grads = []
        grad_state = torch.zeros_like(states[0])
        for i in reversed(range(v.shape[1])):
            # (N, heads, c, d)
            grad_state = grad_state + grad[:, i, ..., None] * q[:, i, :, None]
            grad_q = (grad[:, i, :, None] @ states.pop()).squeeze(2)
            grad_k = (v[:, i, :, None] @ grad_state).squeeze(2)
            grad_v = _read(grad_state, k[:, i])
            # Of the state before, and then of the exponent.
            grad_state = grad_state * (delta[:, i, ..., None] * a).exp_()
            grad_exponent = grad_state * states[-1]
            grad_a += torch.einsum('nhcd,nhc->hcd', grad_exponent, delta[:, i])
            grad_delta = (grad_exponent * a).sum(-1)
            grads.append((grad_q, grad_k, grad_v, grad_delta))
        of_tokens = (torch.stack(x[::-1], dim=1) for x in zip(*grads))
        return (*of_tokens, grad_a)


def _first_state(v: Tensor, a: Tensor) -> Tensor:
    """Zeros, (N, heads, c, d)."""
    return a.new_zeros(v.shape[0], *a.shape)


def _next_state(state: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor):
    return torch.addcmul(
        v[..., None] * k[:, :, None], state, (delta[..., None] * a).exp_()
    )


def _read(state: Tensor, q: Tensor) -> Tensor:
    """(N, heads, c, d), (N, heads, d) -> (N, heads, c)."""
    return (state @ q[..., None]).squeeze(-1)


def causal_normaliser(q: Tensor, k: Tensor) -> Tensor:
    """The sum of the weights of the tokens so far, which do not decay.

    ::

        z_i = (Q_i (K_1 + ... + K_i)^T) / L + 1e-6

    At the last token it is the normaliser of :func:`mlla_mm.ops.linear_attention`.

    Args:
        q (Tensor): Queries, (N, L, heads, d), float32 or float64.
        k (Tensor): Keys, of the same shape.

    Returns:
        Tensor: (N, L, heads, 1).
    """
    return (q * k.cumsum(1)).sum(-1, keepdim=True) / k.shape[1] + EPS
