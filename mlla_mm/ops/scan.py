# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Linear attention as a recurrence whose state decays: the forget gate of Mamba."""

import functools
import math
from typing import Any, List, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..compat.pytorch import is_exporting, not_compiled, without_autocast
from .naive import EPS


def decayed_scan(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor) -> Tensor:
    """Sum the values of the tokens so far, with weights that decay.

    For each head, with tokens i = 1 ... L, d channels of queries and keys, and c
    channels of values (Eqs. 4 and 10 of arXiv 2405.16605)::

        S_i = exp(A o Delta_i) o S_(i-1) + K_i^T V_i        d x c, S_0 = 0
        y_i = Q_i S_i                                       1 x c

    States and result are float32, or float64 if a tensor is. In half precision, sums
    over thousands of tokens would be out of range.

    The tokens are taken in about sqrt(L) chunks of sqrt(L) tokens. Only the chunks'
    first states are kept for the backward pass, which computes the others again. At no
    time are there more than a few times sqrt(L) states of N * heads * c * d numbers.

    Args:
        q (Tensor): Queries, (N, L, heads, d).
        k (Tensor): Keys, of the same shape.
        v (Tensor): Values, (N, L, heads, c).
        delta (Tensor): Steps, of the shape of ``v``, positive.
        a (Tensor): Rates, (heads, c, d), negative. exp(a delta) is the forget gate.

    Returns:
        Tensor: (N, L, heads, c), float32 or float64.

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
def _call(*tensors: Tensor) -> Tensor:
    dtypes = (x.dtype for x in tensors)
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    with without_autocast(tensors[0].device.type):
        return _DecayedScan.apply(*(x.to(dtype) for x in tensors))


class _DecayedScan(torch.autograd.Function):
    """The recurrence of :func:`decayed_scan`, with an explicit gradient.

    With G_i the gradient of S_i, and E_i = exp(A o Delta_i)::

        G_i = Q_i^T dy_i + E_(i+1) o G_(i+1)
        dQ_i = dy_i S_i^T     dK_i = V_i G_i^T     dV_i = K_i G_i
        d(A o Delta_i) = G_i o E_i o S_(i-1)

    States are stored as (c, d), and those of a chunk's n tokens as (n, N, heads, c, d).
    Of a chunk, only S_i and G_i are computed token by token.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor
    ) -> Tensor:
        y = torch.empty_like(v)
        state = a.new_zeros(len(v), *a.shape)
        first_states = []
        for chunk in _chunks(v.shape[1]):
            first_states.append(state)
            queries, keys, values, steps = (
                _tokens_first(x[:, chunk]) for x in (q, k, v, delta)
            )
            states, _ = _states(state, keys, values, steps, a)
            y[:, chunk] = (states @ queries[..., None]).squeeze(-1).transpose(0, 1)
            state = states[-1].clone()  # A view would keep all of them.
        ctx.save_for_backward(q, k, v, delta, a, *first_states)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, ...]:
        q, k, v, delta, a, *first_states = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in (q, k, v, delta))
        grad_a = torch.zeros_like(a)
        # What the tokens after a chunk give its last state.
        grad_state = a.new_zeros(len(v), *a.shape)
        with without_autocast(grad.device.type):
            for chunk, state in zip(_chunks(v.shape[1])[::-1], first_states[::-1]):
                queries, keys, values, steps, grad_y = (
                    _tokens_first(x[:, chunk]) for x in (q, k, v, delta, grad)
                )
                states, gates = _states(state, keys, values, steps, a)
                grad_states = grad_y[..., None] * queries[..., None, :]
                grad_states[-1] += grad_state
                for i in reversed(range(len(gates) - 1)):
                    grad_states[i].addcmul_(gates[i + 1], grad_states[i + 1])
                grad_state = gates[0] * grad_states[0]

                previous = torch.cat([state[None], states[:-1]])
                grad_exponents = gates.mul_(grad_states).mul_(previous)
                grad_a += torch.einsum('tnhcd,tnhc->hcd', grad_exponents, steps)
                of_chunk = (
                    (grad_y[..., None, :] @ states).squeeze(-2),
                    (values[..., None, :] @ grad_states).squeeze(-2),
                    (grad_states @ keys[..., None]).squeeze(-1),
                    (grad_exponents * a).sum(-1),
                )
                for x, part in zip(grads, of_chunk):
                    x[:, chunk] = part.transpose(0, 1)
        return (*grads, grad_a)


def _chunks(length: int) -> List[slice]:
    """About sqrt(length) slices of so many tokens, the last may have fewer."""
    size = math.isqrt(length) or 1
    return [slice(i, i + size) for i in range(0, length, size)]


def _tokens_first(x: Tensor) -> Tensor:
    """(N, n, ...) -> (n, N, ...), contiguous for each token."""
    return x.transpose(0, 1).contiguous()


def _states(
    state: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor
) -> Tuple[Tensor, Tensor]:
    """The states and the gates of a chunk's tokens, given the state before them."""
    gates = (delta[..., None] * a).exp_()
    states = v[..., None] * k[..., None, :]
    for i in range(len(gates)):
        state = states[i].addcmul_(gates[i], state)
    return states, gates


def causal_normaliser(q: Tensor, k: Tensor) -> Tensor:
    """The sum of the weights of the tokens so far, which do not decay.

    ::

        z_i = (Q_i (K_1 + ... + K_i)^T) / L + 1e-6

    At the last token it is that of :func:`mlla_mm.ops.naive.linear_attention`.

    Args:
        q (Tensor): Queries, (N, L, heads, d), float32 or float64.
        k (Tensor): Keys, of the same shape.

    Returns:
        Tensor: (N, L, heads, 1).
    """
    return (q * k.cumsum(1)).sum(-1, keepdim=True) / k.shape[1] + EPS
