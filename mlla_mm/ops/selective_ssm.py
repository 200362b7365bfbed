# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The selective state-space model of Mamba, and why it is linear attention.

One function, written three times: by its recurrence, by its closed form, and as linear
attention with the designs that arXiv 2405.16605 finds. docs/selective_ssm.md walks
through them with numbers. They are to be read, and to test other code against: for long
sequences they are slow or need much memory.

Names in capitals are the paper's. In shapes, C is the number of channels.
"""

import torch
from torch import Tensor

from .scan import decayed_scan


def selective_ssm(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """The selective state-space model, by its recurrence.

    For each token i = 1 ... L (Eq. 10 of arXiv 2405.16605)::

        h_i = exp(A o Delta_i) o h_(i-1) + B_i (Delta_i o x_i)      d x C, h_0 = 0
        y_i = C_i h_i + D o x_i                                     1 x C

    Here B_i is a column (d x 1) and C_i a row (1 x d). Delta_i is a row (1 x C), which
    counts for each of the d rows of A.

    Args:
        x (Tensor): Inputs, (N, L, C).
        delta (Tensor): Steps, (N, L, C), positive.
        A (Tensor): Rates of decay, (d, C), negative.
        B (Tensor): What the inputs are multiplied by, (N, L, d).
        C (Tensor): What the states are multiplied by, (N, L, d).
        D (Tensor): Weights of the shortcut, (C,).

    Returns:
        Tensor: (N, L, C).

    Raises:
        ValueError: If a shape does not fit the others.
    """
    _check_shapes(x, delta, A, B, C, D)
    h = x.new_zeros(len(x), *A.shape)
    y = []
    for x_i, delta_i, B_i, C_i in zip(*(t.unbind(1) for t in (x, delta, B, C))):
        forget_gate = torch.exp(A * delta_i[:, None])
        h = forget_gate * h + B_i[:, :, None] * (delta_i * x_i)[:, None]
        y.append((C_i[:, None] @ h)[:, 0] + D * x_i)
    return torch.stack(y, dim=1)


def selective_ssm_closed_form(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """The selective state-space model, as a sum over the tokens so far.

    The recurrence of :func:`selective_ssm`, unrolled::

        y_i = sum_(j<=i) C_i [exp(A o (Delta_(j+1) + ... + Delta_i))
                              o (B_j (Delta_j o x_j))] + D o x_i

    No exponent is positive, so nothing overflows. Every pair of tokens is looked at,
    which takes memory for N * L * L * d * C numbers.

    Arguments, result and errors are those of :func:`selective_ssm`.
    """
    _check_shapes(x, delta, A, B, C, D)
    # For tokens i and j, whether j is no later than i, (L, L, 1).
    is_past = x.new_ones(x.shape[1], x.shape[1]).tril()[..., None]
    until = delta.cumsum(dim=1)
    steps = (until[:, :, None] - until[:, None]) * is_past  # (N, L, L, C)
    decay = torch.exp(A * steps[..., None, :]) * is_past[..., None]  # (N, L, L, d, C)
    return torch.einsum('nid,nijdc,njd,njc->nic', C, decay, B, delta * x) + D * x


def selective_ssm_as_attention(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """The selective state-space model, as linear attention.

    The queries are C, the keys B and the values x. Causal linear attention with the
    following designs is the selective state-space model (Sec. 4 of arXiv 2405.16605):

    - Input gate: the values are Delta o x.
    - Forget gate: the state decays by exp(A o Delta).
    - Shortcut: D o x is added.
    - No normalisation: the sum is not divided by the sum of its weights.
    - Single head: all channels share the queries and the keys.

    Arguments and errors are those of :func:`selective_ssm`. The result is float32, or
    float64 if an argument is.
    """
    _check_shapes(x, delta, A, B, C, D)
    queries, keys, values = C, B, x
    # One head, an axis of length 1.
    q, k, v, step = (t[:, :, None] for t in (queries, keys, delta * values, delta))
    return decayed_scan(q, k, v, step, A.t()[None])[:, :, 0] + D * values


def _check_shapes(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> None:
    if x.dim() != 3 or A.dim() != 2:
        raise ValueError(
            f'x must be (N, L, C) and A (d, C), got {tuple(x.shape)} and '
            f'{tuple(A.shape)}.'
        )
    state, channels = A.shape[0], x.shape[2]
    wanted = {
        'delta': (delta, tuple(x.shape)),
        'A': (A, (state, channels)),
        'B': (B, (*x.shape[:2], state)),
        'C': (C, (*x.shape[:2], state)),
        'D': (D, (channels,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f'{name} must have the shape {shape} for x {tuple(x.shape)} and A '
                f'{tuple(A.shape)}, got {tuple(tensor.shape)}.'
            )
