# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The ops of Triton's kernels in graphs of ``torch.compile``, by torch.library.

A compiled graph keeps each op as one operator, and the compiler fuses what stands
between them: LayerNorm, GELU, casts and residual connections. It needs PyTorch 2.7.

The operators are ``custom_op``, whose kernels the compiler does not see. With
``triton_op`` it would see them, and would put the plan of each launch into the graph.
Plans branch on sizes, so they would fix the sizes or compile the graph again for
others. Triton's interpreter could not run them, either.

The compiler takes for granted that an operator depends on its inputs alone:

- Under autocast the wanted dtype is an input, because autocast is off when a compiled
  graph runs.
- The tables of the rotation are inputs, because a CUDA graph of the compiler forbids
  that what it runs keeps memory.
- Results have the same shapes whatever the plan of a launch is. So partial sums of the
  attention's state are added up.

Outside of graphs kernels are called without an operator. On the host of a test it took
3 us longer for a convolution and 5 us for an attention, with gradients 58 and 114 us.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from .rotary import tables_in_float64


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: bool = False, act: bool = False
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.depthwise_conv`. Contiguous."""
    from .triton._depthwise_conv import layer_dtype

    dtype = layer_dtype(x, residual)
    return _depthwise_conv(x, weight, bias, residual, act, dtype)


def mlla_attention(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, num_heads: int
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.mlla_attention`. Contiguous."""
    height, width = v.shape[1:3]
    # The image size may be a symbol. The number of channels is an int.
    num_freqs = int(v.shape[3]) // 4
    # Long enough for both, without a branch on which is longer. Nothing comes from the
    # host, which would copy it in each call.
    tables = tables_in_float64(height + width, num_freqs, v.device)
    cos, sin = (table.float() for table in tables)
    return _mlla_attention(qk, v, gate, weight, bias, cos, sin, num_heads)[0]


# Each operator: its kernels, the shapes of its results, and what its gradient keeps.


@torch.library.custom_op('mlla_mm::depthwise_conv', mutates_args=())
def _depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: bool,
    act: bool,
    dtype: torch.dtype,
) -> Tensor:
    from .triton._depthwise_conv import conv

    return conv(x, weight, bias, residual, act, dtype)


@_depthwise_conv.register_fake
def _(x, weight, bias, residual, act, dtype):
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op('mlla_mm::depthwise_conv_backward', mutates_args=())
def _depthwise_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: bool, act: bool
) -> Tuple[Tensor, Tensor, Tensor]:
    from .triton._depthwise_conv import layer_grad

    of_x, of_weight, of_bias = layer_grad(grad, x, weight, bias, residual, act)
    return of_x, of_weight, of_bias.clone()  # sums that lie in one piece of memory


@_depthwise_conv_backward.register_fake
def _(grad, x, weight, bias, residual, act):
    return (_empty_map(x), *_empty_like(weight, bias))


def _keep_of_conv(ctx: Any, inputs: Tuple, output: Tensor) -> None:
    x, weight, bias, ctx.residual, ctx.act, _ = inputs
    ctx.save_for_backward(x, weight, bias)


def _conv_grads(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    tensors = ctx.saved_tensors
    grads = _depthwise_conv_backward(grad, *tensors, ctx.residual, ctx.act)
    return (*grads, None, None, None)


_depthwise_conv.register_autograd(_conv_grads, setup_context=_keep_of_conv)


@torch.library.custom_op('mlla_mm::mlla_attention', mutates_args=())
def _mlla_attention(
    qk: Tensor,
    v: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
) -> Tuple[Tensor, Tensor, Tensor]:
    """The output, and what the gradient keeps: the attention, and its state."""
    from .triton._depthwise_conv import gated_conv
    from .triton._mlla_attention import linear_attention

    y, states = linear_attention(qk, v, num_heads, (cos, sin))
    if len(states) > 1:
        states = states.sum(0, keepdim=True)
    return gated_conv(v, weight, bias, y, gate), y, states


@_mlla_attention.register_fake
def _(qk, v, gate, weight, bias, cos, sin, num_heads):
    dims = v.shape[-1] // num_heads
    shape = 1, v.shape[0], num_heads, dims + 1, dims
    states = torch.empty(shape, dtype=torch.float32, device=v.device)
    return _empty_map(v), _empty_map(v), states


@torch.library.custom_op('mlla_mm::mlla_attention_backward', mutates_args=())
def _mlla_attention_backward(
    grad: Tensor,
    qk: Tensor,
    v: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    y: Tensor,
    states: Tensor,
    num_heads: int,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .triton._mlla_attention import attention_grad

    of_qk, of_v, of_gate, of_weight, of_bias = attention_grad(
        grad, qk, v, gate, weight, bias, y, states, num_heads, (cos, sin)
    )
    return of_qk, of_v, of_gate, of_weight, of_bias.clone()  # as above


@_mlla_attention_backward.register_fake
def _(grad, qk, v, gate, weight, bias, cos, sin, y, states, num_heads):
    return (*map(_empty_map, (qk, v, gate)), *_empty_like(weight, bias))


def _keep_of_attention(ctx: Any, inputs: Tuple, output: Tuple[Tensor, ...]) -> None:
    *tensors, ctx.num_heads = inputs
    _, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.set_materialize_grads(False)


def _attention_grads(
    ctx: Any, grad: Tensor, *of_kept: None
) -> Tuple[Optional[Tensor], ...]:
    grads = _mlla_attention_backward(grad, *ctx.saved_tensors, ctx.num_heads)
    return (*grads, None, None, None)


_mlla_attention.register_autograd(_attention_grads, setup_context=_keep_of_attention)


# New tensors as the kernels allocate them.
def _empty_map(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _empty_like(*parameters: Tensor) -> Tuple[Tensor, ...]:
    return tuple(torch.empty_like(x.contiguous()) for x in parameters)
