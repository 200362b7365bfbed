# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The ops on PyTorch's modules: what runs for a layer.

An op stands for its layers' forward passes by the equation in its docstring. Either it
calls the layers, or it reads their weights and computes the same faster:

- by ``mlla_mm.ops.triton`` on NVIDIA GPUs, for what its kernels support,
- by ``mlla_mm.ops.eager`` for the rest.

It calls them in graphs, that is what is traced, exported, compiled or counted:
compilers fuse PyTorch's operators themselves, and other runtimes know them. And it
calls a layer that does something else when it is called, see :func:`may_be_read`.

The environment variable ``MLLA_OPS`` chooses otherwise: ``naive`` calls layers always,
which is what :mod:`mlla_mm.ops.naive` defines; ``eager`` takes no kernels of Triton's,
and ``fused`` those kernels or an error where they cannot run.
"""

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import List, Optional, Tuple, Type, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat.pytorch import does_more_when_called, has_global_hooks
from . import eager, naive, triton
from .tracing import is_graph

# The second one is the first in evaluation mode.
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def depthwise_conv(
    x: Tensor, conv: nn.Module, residual: bool = False, act: bool = False
) -> Tensor:
    """3x3 depthwise convolution of a channels-last map.

    ::

        y = [x +] [SiLU](conv(x))

    Args:
        x (Tensor): Feature map (N, H, W, C).
        conv (nn.Module): From (N, C, H, W) to the same shape.
        residual (bool): Whether to add the input. Defaults to False.
        act (bool): Whether SiLU follows the convolution. Defaults to False.

    Returns:
        Tensor: (N, H, W, C).
    """
    ops = _implementation(x)
    if ops is naive or not _is_depthwise(conv):
        y = _call_on_map(conv, x)
        y = F.silu(y) if act else y
        return x + y if residual else y
    tensors = (x, conv.weight, conv.bias)
    if ops is triton and not triton.supports_depthwise_conv(*tensors):
        ops = eager
    return ops.depthwise_conv(*tensors, residual, act)


def mlla_attention(
    qk: Tensor, v: Tensor, gate: Tensor, lepe: nn.Module, num_heads: int
) -> Tensor:
    """Linear attention with local position encoding, gated: the core of a MLLA block.

    ::

        y = (LinearAttention(q, k, v) + LePE(v)) * SiLU(gate)

    Args:
        qk (Tensor): Queries, then keys, before the feature map, (N, H, W, 2C).
        v (Tensor): Values, (N, H, W, C).
        gate (Tensor): Gate before SiLU, (N, H, W, C).
        lepe (nn.Module): 3x3 depthwise convolution, (N, C, H, W) to the same shape.
        num_heads (int): Number of heads, a divisor of C.

    Returns:
        Tensor: (N, H, W, C), the dtype of ``v``. See
        :func:`mlla_mm.ops.naive.linear_attention`.
    """
    ops = _implementation(v)
    if ops is naive or not _is_depthwise(lepe):
        q, k = qk.chunk(2, dim=-1)
        y = naive.linear_attention(q, k, v, num_heads) + _call_on_map(lepe, v)
        return y * F.silu(gate)
    tensors = (qk, v, gate, lepe.weight, lepe.bias)
    if ops is triton and not triton.supports_mlla_attention(*tensors, num_heads):
        ops = eager
    return ops.mlla_attention(*tensors, num_heads)


def mlp(x: Tensor, fc1: nn.Module, fc2: nn.Module, drop: nn.Module) -> Tensor:
    """Linear layer, GELU (with the error function), linear layer, with dropout.

    ::

        y = drop(fc2(drop(GELU(fc1(x)))))

    Args:
        x (Tensor): (..., C).
        fc1 (nn.Module): To the hidden channels.
        fc2 (nn.Module): Back to (..., C).
        drop (nn.Module): Dropout.

    Returns:
        Tensor: (..., C).
    """
    if (
        _implementation(x) is naive
        or not may_be_read(nn.Linear, fc1, fc2)
        or not _drops_nothing(drop)
        or fc1.bias is None
        or fc2.bias is None
    ):
        return drop(fc2(drop(F.gelu(fc1(x)))))
    return eager.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """LayerNorm over the channels.

    Args:
        x (Tensor): (..., C).
        norm (nn.Module): From (..., C) to the same shape.

    Returns:
        Tensor: (..., C); under autocast on CUDA float32, or half precision from a
        kernel.
    """
    if _implementation(x) is triton and _is_layer_norm(norm):
        tensors = (x, norm.weight, norm.bias)
        if triton.supports_layer_norm(*tensors):
            return triton.layer_norm(*tensors, norm.eps)
    return norm(x)


def conv_layer(
    x: Tensor, conv: nn.Module, norm: Optional[nn.Module], act: Optional[nn.Module]
) -> Tensor:
    """Convolution, BatchNorm, ReLU, each of the last two optional.

    ::

        y = [act]([norm](conv(x)))

    Args:
        x (Tensor): (N, C, H, W).
        conv (nn.Module): Convolution.
        norm (nn.Module, optional): BatchNorm.
        act (nn.Module, optional): ReLU.

    Returns:
        Tensor: (N, D, H', W').
    """
    fused = _implementation(x) is triton
    if fused and norm is None and _is_pointwise(conv) and may_be_read(nn.ReLU, act):
        # In the order of channels-last memory, so that the gradient has it too.
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
        tensors = (x.permute(0, 2, 3, 1), weight, conv.bias)
        if triton.supports_linear_relu(*tensors):
            return triton.linear_relu(*tensors).permute(0, 3, 1, 2)
    x = conv(x)
    if fused and _is_fixed_norm(norm) and (act is None or may_be_read(nn.ReLU, act)):
        tensors = (x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        if triton.supports_batch_norm(*tensors):
            return triton.batch_norm(*tensors, norm.eps, act is not None)
    x = x if norm is None else norm(x)
    return x if act is None else act(x)


def fused_block(
    attn: Type[nn.Module], mlp: Type[nn.Module], drop_path: Type[nn.Module]
) -> Callable[[Callable], Callable]:
    """Let a kernel of whole blocks stand for a block's forward pass where it can.

    It can if Triton's kernels run, and if every layer of the block may be read. Else
    the forward pass runs.

    Args:
        attn (type): What the block's ``attn`` has to be, for its layers are read too.
        mlp (type): What ``mlp`` has to be.
        drop_path (type): What ``drop_path`` has to be: stochastic depth with the
            attribute ``drop_prob``.

    Returns:
        Callable: A decorator for the forward pass of
        :class:`mlla_mm.models.layers.MLLABlock`.
    """

    def decorate(forward: Callable[[nn.Module, Tensor], Tensor]) -> Callable:
        @functools.wraps(forward)
        def run(block: nn.Module, x: Tensor) -> Tensor:
            if _implementation(x) is triton and _is_readable_block(
                block, attn, mlp, drop_path
            ):
                parameters, num_heads = block_parameters(block), block.attn.num_heads
                if triton.supports_mlla_block(x, parameters, num_heads):
                    eps = block.norm1.eps, block.norm2.eps
                    scales = tuple(draw_scale(x, block.drop_path) for _ in eps)
                    return triton.mlla_block(x, parameters, num_heads, eps, scales)
            return forward(block, x)

        return run

    return decorate


def block_parameters(block: nn.Module) -> List[Optional[Tensor]]:
    """Weight and bias of each layer of a block, in their order."""
    attn, mlp = block.attn, block.mlp
    layers = (
        block.cpe1,
        block.norm1,
        block.in_proj,
        block.act_proj,
        block.dwc,
        attn.qk,
        attn.lepe,
        block.out_proj,
        block.cpe2,
        block.norm2,
        mlp.fc1,
        mlp.fc2,
    )
    return [tensor for layer in layers for tensor in (layer.weight, layer.bias)]


def draw_scale(x: Tensor, drop_path: nn.Module) -> Optional[Tensor]:
    """What stochastic depth multiplies the images of a map by, (N,); None for 1."""
    rate = drop_path.drop_prob
    if not rate or not drop_path.training:
        return None
    kept = x.new_empty(len(x), dtype=torch.float32).bernoulli_(1 - rate)
    return kept.div_(1 - rate)


def may_be_read(
    kinds: Union[Type[nn.Module], Tuple[Type[nn.Module], ...]],
    *modules: Optional[nn.Module],
) -> bool:
    """Whether a faster op may read the weights of modules instead of calling them.

    Not if one has hooks, or was replaced or wrapped, e.g. by another kind of layer, for
    LoRA, for quantisation or for a parametrisation: calling it does something else.

    Args:
        kinds (type | tuple[type]): What all modules have to be, subclasses excluded.
        *modules (nn.Module, optional): The modules.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return not any(
        type(module) not in kinds or does_more_when_called(module) for module in modules
    )


def _implementation(x: Tensor) -> ModuleType:
    """Who computes; naive means that modules are called."""
    if is_graph() or has_global_hooks():
        return naive
    forced = os.environ.get('MLLA_OPS', '')
    if forced not in ('', 'naive', 'eager', 'fused'):
        raise ValueError(
            f"MLLA_OPS is '{forced}': set it to 'naive', 'eager' or 'fused', or unset "
            'it.'
        )
    if forced == 'naive':
        return naive
    if forced == 'eager' or not (forced or x.is_cuda):
        return eager
    if triton.is_available(x.device):
        return triton
    if forced:
        raise ValueError(
            f"MLLA_OPS is 'fused', but Triton's kernels do not run on {x.device}: they "
            'need an NVIDIA GPU of compute capability 8.0 or more, and Triton 3.3 '
            '(PyTorch 2.7). Unset it.'
        )
    return eager


def _call_on_map(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a layer for (N, C, H, W) with (N, H, W, C)."""
    # The permuted view is a channels-last tensor to PyTorch, so nothing is copied.
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _is_depthwise(*convs: nn.Module) -> bool:
    """Whether layers are the convolution that the depthwise ops compute."""
    return may_be_read(nn.Conv2d, *convs) and all(
        conv.bias is not None
        and conv.in_channels == conv.out_channels == conv.groups
        and conv.kernel_size == (3, 3)
        and conv.padding == conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == 'zeros'
        for conv in convs
    )


def _is_pointwise(conv: nn.Module) -> bool:
    """Whether a layer is a linear one on channels."""
    return (
        may_be_read(nn.Conv2d, conv)
        and conv.bias is not None
        and conv.groups == 1
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding == (0, 0)
    )


def _is_layer_norm(*norms: nn.Module) -> bool:
    """Whether layers are LayerNorm over the last axis with weight and bias."""
    return may_be_read(nn.LayerNorm, *norms) and all(
        len(norm.normalized_shape) == 1
        and norm.weight is not None
        and norm.bias is not None
        for norm in norms
    )


def _is_fixed_norm(norm: Optional[nn.Module]) -> bool:
    """Whether a layer is BatchNorm by running statistics, with weight and bias."""
    return (
        may_be_read(_BATCH_NORMS, norm)
        and not norm.training
        and norm.running_mean is not None
        and norm.weight is not None
    )


def _drops_nothing(drop: nn.Module) -> bool:
    """Whether a layer is dropout that leaves its input as it is."""
    return may_be_read(nn.Dropout, drop) and not (drop.p and drop.training)


def _is_readable_block(
    block: nn.Module,
    attn: Type[nn.Module],
    mlp: Type[nn.Module],
    drop_path: Type[nn.Module],
) -> bool:
    """Whether weights are all that a block's layers are; shapes are looked at later."""
    if not (
        may_be_read(attn, block.attn)
        and may_be_read(mlp, block.mlp)
        and may_be_read(drop_path, block.drop_path)
    ):
        return False
    attention, perceptron = block.attn, block.mlp
    projections = (block.in_proj, block.act_proj, attention.qk, block.out_proj)
    return (
        _is_depthwise(block.cpe1, block.dwc, attention.lepe, block.cpe2)
        and _is_layer_norm(block.norm1, block.norm2)
        and may_be_read(nn.Linear, *projections, perceptron.fc1, perceptron.fc2)
        and _drops_nothing(perceptron.drop)
    )
