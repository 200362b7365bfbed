# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A pretended CUDA device, on which models run without a GPU, without numbers.

Tensors have a shape, strides, a dtype and a device, and no memory: see PyTorch's
``FakeTensorMode``. What depends on the numbers is an error, but for ``item``, which
gives 0.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Dict, List, Optional, Tuple
from unittest import mock

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from mlla_mm.ops import rotary

_aten = torch.ops.aten
_Grads = Tuple[Optional[Tensor], ...]


@contextlib.contextmanager
def pretended_cuda() -> Iterator[FakeTensorMode]:
    """Make tensors of device 'cuda' without a GPU.

    Within the context all new tensors are pretended, and an operation on tensors of
    different devices raises RuntimeError, as on the real device.
    """
    caches = rotary._TABLES, rotary._ROTATIONS
    patches = (
        # Whoever looks for a device would not find one.
        mock.patch('torch.cuda.device_of', lambda x: contextlib.nullcontext()),
        mock.patch('torch.cuda.is_bf16_supported', lambda *args, **kwargs: True),
        mock.patch('torch.cuda.amp.common.amp_definitely_not_available', lambda: False),
        mock.patch(
            'torch._subclasses.fake_tensor.init_gpu_context', lambda *args: None
        ),
        # Tables of pretended tensors must not meet real ones.
        *(mock.patch.dict(cache, clear=True) for cache in caches),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield stack.enter_context(_PretendedMode())


class _PretendedMode(FakeTensorMode):
    """FakeTensorMode whose convolutions keep the layout that cuDNN keeps.

    Those of FakeTensorMode ask the PyTorch of the present machine, which does without
    cuDNN if it finds no GPU.
    """

    @property
    def avoid_device_init(self) -> bool:
        return True  # also on a machine with a GPU

    def dispatch(self, func, types, args=(), kwargs=None):
        if func is _aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype, device='cpu').item()
        out = super().dispatch(func, types, args, kwargs)
        if func is _aten.convolution.default:
            return _as_cudnn(out, args[0], args[1])
        if func is _aten.convolution_backward.default:
            grad, x, weight = args[:3]
            of_x, of_weight, of_bias = out
            # cuDNN's reads the gradient in the layout of x.
            return (
                _as_cudnn(of_x, x, weight),
                _as_cudnn(of_weight, x, grad),
                of_bias,
            )
        return out


def _as_cudnn(out: Optional[Tensor], *factors: Tensor) -> Optional[Tensor]:
    """Channels-last if one of the factors is, else contiguous."""
    if out is None or out.dim() != 4 or not out.is_cuda:
        return out
    is_last = any(suggest_memory_format(x) == torch.channels_last for x in factors)
    layout = torch.channels_last if is_last else torch.contiguous_format
    return (
        out if out.is_contiguous(memory_format=layout) else out.to(memory_format=layout)
    )


def backward(outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """``torch.autograd.backward``, node by node.

    PyTorch's own engine refuses CUDA tensors on a machine without a device. As the
    engine does, this one reduces gradients to the shape of what they belong to and
    casts them to its dtype.

    Args:
        outputs (Sequence[Tensor]): Tensors that need gradients.
        grads (Sequence[Tensor]): Their gradients.

    Raises:
        RuntimeError: If a gradient is on another device than what it belongs to.
    """
    roots = dict.fromkeys(output.grad_fn for output in outputs)
    waits = _count_uses(roots)
    received: Dict[Node, Dict[int, Tensor]] = defaultdict(dict)
    for output, grad in zip(outputs, grads):
        _give(received, output.grad_fn, output.output_nr, grad)
    ready = [node for node in roots if not waits[node]]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            for following, index, grad in _run(node, received.pop(node, {})):
                _give(received, following, index, grad)
                waits[following] -= 1
                if not waits[following]:
                    ready.append(following)


def _count_uses(roots: Sequence[Node]) -> Dict[Node, int]:
    """How many gradients each node waits for."""
    waits: Dict[Node, int] = defaultdict(int)
    todo, seen = list(roots), set(roots)
    while todo:
        for following, _ in todo.pop().next_functions:
            if following is None:
                continue
            waits[following] += 1
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return waits


def _give(
    received: Dict[Node, Dict[int, Tensor]],
    node: Node,
    index: int,
    grad: Optional[Tensor],
) -> None:
    """Add a gradient to those that a node has received."""
    if grad is None:
        return
    is_leaf = hasattr(node, 'variable')
    wanted = node.variable if is_leaf else node._input_metadata[index]
    if grad.device != wanted.device:
        raise RuntimeError(
            f'{node.name()} expected a gradient on {wanted.device}, got one on '
            f'{grad.device}.'
        )
    shape = tuple(wanted.shape)
    if tuple(grad.shape) != shape:
        grad = grad.sum_to_size(shape)
    if grad.dtype != wanted.dtype:
        grad = grad.to(wanted.dtype)
    held = received[node].get(index)
    received[node][index] = grad if held is None else held + grad


def _run(
    node: Node, received: Dict[int, Tensor]
) -> List[Tuple[Node, int, Optional[Tensor]]]:
    """The nodes that follow, which output of theirs is meant, and its gradient."""
    if hasattr(node, 'variable'):
        if received:
            _accumulate(node.variable, received[0])
        return []
    following = node.next_functions
    grads: _Grads = (None,) * len(following)
    if received:
        grads = _call(node, received)
        if isinstance(node, BackwardCFunction):
            # One of our own returns something for arguments that are no tensors, too,
            # which have no entry in the graph; needs_input_grad has all arguments.
            grads = tuple(g for g, needs in zip(grads, node.needs_input_grad) if needs)
            given = iter(grads)
            grads = tuple(None if n is None else next(given) for n, _ in following)
    return [
        (other, index, grad)
        for (other, index), grad in zip(following, grads)
        if other is not None
    ]


def _call(node: Node, received: Dict[int, Tensor]) -> _Grads:
    wanted = node._input_metadata
    inputs = [received.get(i) for i in range(len(wanted))]
    if not isinstance(node, BackwardCFunction):
        grads = node(*inputs)
        return grads if isinstance(grads, tuple) else (grads,)
    inputs = [
        torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device)
        if grad is None
        else grad
        for grad, meta in zip(inputs, wanted)
    ]
    grads = node.apply(*inputs)
    return grads if isinstance(grads, tuple) else (grads,)


def _accumulate(leaf: Tensor, grad: Tensor) -> None:
    if leaf.grad is not None:
        grad = leaf.grad + grad
    elif not _same_layout(grad, leaf):
        # Gradients are laid out like their parameters.
        grad = torch.empty_like(leaf).copy_(grad)
    leaf.grad = grad


def _same_layout(x: Tensor, y: Tensor) -> bool:
    return all(
        a == b for size, a, b in zip(x.shape, x.stride(), y.stride()) if size != 1
    )
