# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The ops on PyTorch's modules. This file chooses the implementation.

Each op computes the equation in its docstring from the layers that it is given. It
either calls the layers, or reads their weights and computes the same result faster:

- with ``mlla_mm.ops.triton`` on NVIDIA GPUs, if its kernels support the tensors,
- else with ``mlla_mm.ops.eager``.

Layers are called in two cases:

- A graph is being traced, exported, compiled or counted. Compilers fuse PyTorch's
  operators themselves, and other runtimes know only these operators. With
  ``MLLA_OPS=fused``, graphs of ``torch.compile`` have ``mlla_mm.ops.library``.
- Calling the layer does more than its weights say, see :func:`may_be_read`.

The environment variable ``MLLA_OPS`` overrides the choice:

- ``naive`` always calls the layers, which compute :mod:`mlla_mm.ops.naive`.
- ``eager`` never runs Triton's kernels.
- ``fused`` runs Triton's kernels, and raises an error on a device without them. It also
  takes those that were not measured on a GPU, and casts weights as :func:`cast_once`
  says.
"""

import functools
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, List, Optional, Tuple, Type, Union, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat.pytorch import (
    does_more_when_called,
    has_global_hooks,
    is_autocast,
    linear_dtype,
)
from . import casts, eager, naive, triton
from .tracing import is_compiled, is_graph

_VARIABLE = 'MLLA_OPS'
# In evaluation mode both compute the same.
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
    if ops is not naive and _is_depthwise(conv):
        tensors = (x, *_weight_and_bias(conv))
        if ops is not eager and triton.supports_depthwise_conv(*tensors):
            return ops.depthwise_conv(*tensors, residual, act)
        if _reads(ops):
            return eager.depthwise_conv(x, *_casts(conv, x), residual, act)
    y = _call_on_map(conv, x)
    y = F.silu(y) if act else y
    return x + y if residual else y


def mlla_attention(
    qk: Tensor, v: Tensor, gate: Tensor, lepe: nn.Module, num_heads: int
) -> Tensor:
    """Gated linear attention with local position encoding, the core of an MLLA block.

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
    if ops is not naive and _is_depthwise(lepe):
        tensors = (qk, v, gate, *_weight_and_bias(lepe))
        if ops is not eager and triton.supports_mlla_attention(*tensors, num_heads):
            return ops.mlla_attention(*tensors, num_heads)
        if _reads(ops):
            return eager.mlla_attention(qk, v, gate, *_casts(lepe, v), num_heads)
    q, k = qk.chunk(2, dim=-1)
    y = naive.linear_attention(q, k, v, num_heads) + _call_on_map(lepe, v)
    return y * F.silu(gate)


def gated_mixer(
    mixer: nn.Module, x: Tensor, gate: Tensor, readable: Type[nn.Module]
) -> Tensor:
    """A token mixer with a gate.

    ::

        y = mixer(x) * SiLU(gate)

    Args:
        mixer (nn.Module): From (N, H, W, C) to the same shape.
        x (Tensor): (N, H, W, C).
        gate (Tensor): Gate before SiLU, (N, H, W, C).
        readable (type): The type of mixer that :func:`mlla_attention` computes from its
            ``qk`` and ``lepe``. Others are called.

    Returns:
        Tensor: (N, H, W, C).
    """
    if _implementation(x) is not naive and _is_readable_attention(readable, mixer):
        attn: Any = mixer
        return mlla_attention(linear(x, attn.qk), x, gate, attn.lepe, attn.num_heads)
    return mixer(x) * F.silu(gate)


def mlp(x: Tensor, fc1: nn.Module, fc2: nn.Module, drop: nn.Module) -> Tensor:
    """Linear layer, GELU (by the error function), linear layer, with dropout.

    ::

        y = drop(fc2(drop(GELU(fc1(x)))))

    Args:
        x (Tensor): (..., C).
        fc1 (nn.Module): Linear layer to the hidden channels.
        fc2 (nn.Module): Linear layer back to C channels.
        drop (nn.Module): Dropout.

    Returns:
        Tensor: (..., C).
    """
    if (
        not _reads(_implementation(x))
        or not may_be_read(nn.Linear, fc1, fc2)
        or not _drops_nothing(drop)
        or fc1.bias is None
        or fc2.bias is None
    ):
        return drop(fc2(drop(F.gelu(fc1(x)))))
    return eager.mlp(x, *_casts(fc1, x), *_casts(fc2, x))


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """Linear layer.

    Args:
        x (Tensor): (..., C).
        layer (nn.Module): From (..., C) to (..., D).

    Returns:
        Tensor: (..., D).
    """
    if _reads(_implementation(x)) and may_be_read(nn.Linear, layer):
        return F.linear(x, *_casts(layer, x))
    return layer(x)


def layer_norm(x: Tensor, norm: nn.Module, for_linear: bool = False) -> Tensor:
    """LayerNorm over the channels.

    Args:
        x (Tensor): (..., C).
        norm (nn.Module): From (..., C) to the same shape.
        for_linear (bool): Whether linear layers alone read the result. Where autocast
            would cast a map to float32 and back, which is on CUDA, ``eager`` leaves it
            in half precision. Defaults to False.

    Returns:
        Tensor: (..., C). Under autocast on CUDA it is float32, but for what
        ``for_linear`` says.
    """
    ops = _implementation(x)
    if _reads(ops) and _is_layer_norm(norm):
        layer: Any = norm
        tensors = (x, layer.weight, layer.bias)
        if ops is triton and triton.supports_layer_norm(*tensors):
            return triton.layer_norm(*tensors, layer.eps)
        if for_linear and _casts_layer_norms(x) and x.dtype == linear_dtype(x):
            return eager.layer_norm(x, *_casts(norm, x), layer.eps)
    return norm(x)


def conv_layer(
    x: Tensor, conv: nn.Module, norm: Optional[nn.Module], act: Optional[nn.Module]
) -> Tensor:
    """Convolution, then optional BatchNorm, then optional ReLU.

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
    ops = _implementation(x)
    fused = ops is triton
    if fused and norm is None and _is_pointwise(conv) and may_be_read(nn.ReLU, act):
        weight, bias = _factors(conv, x)
        # Channels last, as in memory, so that the gradient is channels-last, too.
        tensors = (x.permute(0, 2, 3, 1), _as_matrix(weight), bias)
        if triton.supports_linear_relu(*tensors):
            return triton.linear_relu(*tensors).permute(0, 3, 1, 2)
    x = _conv(x, conv) if _reads(ops) else conv(x)
    if fused and _is_fixed_norm(norm) and (act is None or may_be_read(nn.ReLU, act)):
        bn: Any = norm
        inputs = (x, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        if triton.supports_batch_norm(*inputs):
            return triton.batch_norm(*inputs, bn.eps, act is not None)
    x = x if norm is None else norm(x)
    return x if act is None else act(x)


def patch_merging(x: Tensor, layers: nn.Module, readable: Type[nn.Module]) -> Tensor:
    """Patch merging: widen a map by a 1x1 convolution, halve it, and narrow it.

    ::

        y = narrow(halve(widen(x)))

    Args:
        x (Tensor): (N, C, 2H, 2W).
        layers (nn.Module): An ``nn.Sequential`` of the three layers.
        readable (type): The type of layers whose ``conv``, ``norm`` and ``act`` say
            all, as in :func:`conv_layer`. Others are called.

    Returns:
        Tensor: (N, D, H, W).
    """
    if (
        _implementation(x) is triton
        and _takes_unmeasured()
        and _is_readable_merging(layers, readable)
    ):
        widen, halve, narrow = cast(Any, layers)
        weight, bias = _factors(widen.conv, x)
        parameters = (_as_matrix(weight), bias, *_weight_and_bias(halve.conv))
        tensors = (x.permute(0, 2, 3, 1), *parameters)
        if triton.supports_expand_and_halve(*tensors):
            return narrow(triton.expand_and_halve(*tensors).permute(0, 3, 1, 2))
    return layers(x)


def fused_block(
    attn: Type[nn.Module], mlp: Type[nn.Module], drop_path: Type[nn.Module]
) -> Callable[[Callable], Callable]:
    """Replace a block's forward pass by Triton's kernels for whole blocks.

    They run where Triton's kernels are chosen and every layer of the block may be read.
    Elsewhere the block's own forward pass runs.

    Args:
        attn (type): The expected type of the block's ``attn``, whose layers are read.
        mlp (type): The expected type of ``mlp``, whose layers are read.
        drop_path (type): The expected type of ``drop_path``, whose factors are drawn.

    Returns:
        Callable: A decorator for the forward pass of
        :class:`mlla_mm.models.layers.MLLABlock`.
    """

    def decorate(forward: Callable[[Any, Tensor], Tensor]) -> Callable:
        @functools.wraps(forward)
        def run(block: Any, x: Tensor) -> Tensor:
            if _implementation(x) is triton and _is_readable_block(
                block, attn, mlp, drop_path
            ):
                parameters, num_heads = block_parameters(block), block.attn.num_heads
                if triton.supports_mlla_block(x, parameters, num_heads):
                    eps = block.norm1.eps, block.norm2.eps
                    # One for the attention, and one for the MLP.
                    branch = len(x), linear_dtype(x), x.device
                    draw_scale = block.drop_path.draw_scale
                    scales = draw_scale(*branch), draw_scale(*branch)
                    return triton.mlla_block(
                        x, parameters, num_heads, eps, scales, _takes_unmeasured()
                    )
            return forward(block, x)

        return run

    return decorate


def block_parameters(block: Any) -> List[Optional[Tensor]]:
    """Weight and bias of each layer of an ``MLLABlock``, in order."""
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


def cast_once(
    find_layers: Callable[[], Iterable[nn.Module]], x: Tensor
) -> AbstractContextManager:
    """The context of a forward pass in which the ops use casts made by one kernel.

    Without autocast, in graphs, and where layers are called, nothing is done.

    Args:
        find_layers (Callable[[], Iterable[nn.Module]]): Gives linear layers,
            convolutions and LayerNorms that the ops may read. They must stay as they
            are during the context. It is called where something is done.
        x (Tensor): The network's input.
    """
    device, dtype = x.device, linear_dtype(x)
    if is_graph() or not is_autocast(device.type) or dtype not in naive.HALF:
        return nullcontext()
    ops = _implementation(x)
    # Beside Triton's kernels it was not measured on a GPU.
    if ops is naive or (ops is triton and not _takes_unmeasured()):
        return nullcontext()
    kernels, with_norms = ops is triton, ops is eager and _casts_layer_norms(x)
    # Not the classes of quantised and sharded parameters.
    classes = nn.Parameter, Tensor, type(x)
    parameters = [
        parameter
        for layer in find_layers()
        if with_norms or not isinstance(layer, nn.LayerNorm)
        # Triton's kernels read these as they are.
        if not (kernels and _is_depthwise(layer))
        for parameter in _weight_and_bias(layer)
        if type(parameter) in classes and parameter.device == device
    ]
    return casts.cast_all(parameters, dtype)


def may_be_read(
    kinds: Union[Type[nn.Module], Tuple[Type[nn.Module], ...]],
    *modules: Optional[nn.Module],
) -> bool:
    """Whether an op may read the weights of modules instead of calling the modules.

    The answer is no if a module has hooks, or if it was replaced or wrapped, for
    example for LoRA, quantisation or a parametrisation. Calling such a module does more
    than its weights say.

    Args:
        kinds (type | tuple[type]): The types that modules may have, without subclasses.
        *modules (nn.Module, optional): The modules. The answer is no for None.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return not any(
        module is None or type(module) not in kinds or does_more_when_called(module)
        for module in modules
    )


def _implementation(x: Tensor) -> ModuleType:
    """The module of ops that computes. ``naive`` means that layers are called."""
    compiled = is_compiled()
    if is_graph() and not compiled:
        return naive
    # A compiled graph is compiled again for another value.
    forced = os.environ.get(_VARIABLE, '')
    if compiled and forced != 'fused':
        return naive
    if forced not in ('', 'naive', 'eager', 'fused'):
        raise ValueError(
            f"MLLA_OPS is '{forced}'. Set it to 'naive', 'eager' or 'fused', or unset "
            'it.'
        )
    if has_global_hooks() or forced == 'naive':
        return naive
    if forced == 'eager' or not (forced or x.is_cuda):
        return eager
    if triton.is_available(x.device):
        if not compiled:
            return triton
        from . import library  # old versions of PyTorch cannot import it

        return library
    if forced:
        raise ValueError(
            f"MLLA_OPS is 'fused', but Triton's kernels do not run on {x.device}: they "
            'need an NVIDIA GPU of compute capability 8.0 or more, and Triton 3.3 '
            '(PyTorch 2.7). Unset MLLA_OPS.'
        )
    return eager


def _reads(ops: ModuleType) -> bool:
    """Whether weights are read outside of graphs. In graphs, most layers are called."""
    return ops is eager or ops is triton


def _takes_unmeasured() -> bool:
    """Whether kernels that were not measured on a GPU run, too."""
    return os.environ.get(_VARIABLE) == 'fused'


def _as_matrix(weight: Tensor) -> Tensor:
    """(D, C, 1, 1) -> (D, C)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _weight_and_bias(layer: Any) -> Tuple[Tensor, Any]:
    """The parameters of a layer that may be read. A bias may be None."""
    return layer.weight, layer.bias


def _casts(layer: Any, x: Tensor) -> Tuple[Tensor, Any]:
    """Weight and bias of a layer of x that may be read, as :func:`cast_once` casts.

    In graphs and outside its context they are the parameters themselves, and autocast
    casts them.
    """
    weight, bias = _weight_and_bias(layer)
    if is_graph():
        return weight, bias
    dtype = linear_dtype(x)
    weight = casts.cast(weight, dtype)
    return weight, bias if bias is None else casts.cast(bias, dtype)


def _factors(layer: Any, x: Tensor) -> Tuple[Tensor, Any]:
    """Weight and bias for a kernel that casts them itself: casts, or parameters.

    The kernel's gradients of parameters are not rounded to the dtype of casts.
    """
    return _weight_and_bias(layer) if torch.is_grad_enabled() else _casts(layer, x)


def _conv(x: Tensor, conv: Any) -> Tensor:
    """Convolution of (N, C, H, W)."""
    if not may_be_read(nn.Conv2d, conv) or conv.padding_mode != 'zeros':
        return conv(x)
    options = conv.stride, conv.padding, conv.dilation, conv.groups
    return F.conv2d(x, *_casts(conv, x), *options)


def _call_on_map(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a layer that expects (N, C, H, W) on a map (N, H, W, C)."""
    # PyTorch sees the permuted view as a channels-last tensor and copies nothing.
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _is_depthwise(*convs: Any, stride: int = 1) -> bool:
    """Whether layers are the 3x3 convolution that the depthwise ops compute."""
    return may_be_read(nn.Conv2d, *convs) and all(
        conv.bias is not None
        and conv.in_channels == conv.out_channels == conv.groups
        and conv.kernel_size == (3, 3)
        and conv.padding == conv.dilation == (1, 1)
        and conv.stride == (stride, stride)
        and conv.padding_mode == 'zeros'
        for conv in convs
    )


def _casts_layer_norms(x: Tensor) -> bool:
    """Whether autocast computes LayerNorm in float32. On the CPU it does not."""
    return x.is_cuda and is_autocast(x.device.type)


def _is_pointwise(conv: Any) -> bool:
    """Whether a layer is a 1x1 convolution with bias: a linear layer on channels."""
    return (
        may_be_read(nn.Conv2d, conv)
        and conv.bias is not None
        and conv.groups == 1
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding == (0, 0)
    )


def _is_layer_norm(*norms: Any) -> bool:
    """Whether layers are LayerNorm over the last axis with weight and bias."""
    return may_be_read(nn.LayerNorm, *norms) and all(
        len(norm.normalized_shape) == 1
        and norm.weight is not None
        and norm.bias is not None
        for norm in norms
    )


def _is_fixed_norm(norm: Any) -> bool:
    """Whether a layer is BatchNorm that uses running statistics, weight and bias."""
    return (
        may_be_read(_BATCH_NORMS, norm)
        and not norm.training
        and norm.running_mean is not None
        and norm.weight is not None
    )


def _drops_nothing(drop: Any) -> bool:
    """Whether a layer is dropout that does not change its input."""
    return may_be_read(nn.Dropout, drop) and not (drop.p and drop.training)


def _is_readable_attention(kind: Type[nn.Module], attn: Any) -> bool:
    """Whether ``qk`` and ``lepe`` say all of an attention. Values are its input."""
    return may_be_read(kind, attn) and attn.v is None and 'attend' not in attn.__dict__


def _is_readable_merging(layers: Any, kind: Type[nn.Module]) -> bool:
    """Whether the first two of three layers may be read."""
    if not (may_be_read(nn.Sequential, layers) and len(layers) == 3):
        return False
    widen, halve = layers[:2]
    return (
        may_be_read(kind, widen, halve)
        and widen.norm is None
        and halve.norm is None
        and may_be_read(nn.ReLU, widen.act, halve.act)
        and _is_pointwise(widen.conv)
        and _is_depthwise(halve.conv, stride=2)
    )


def _is_readable_block(
    block: Any,
    attn: Type[nn.Module],
    mlp: Type[nn.Module],
    drop_path: Type[nn.Module],
) -> bool:
    """Whether every layer of a block may be read. Shapes are compared later."""
    if not (
        _is_readable_attention(attn, block.attn)
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
