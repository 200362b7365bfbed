# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A pretended CUDA device, on which models run without a GPU and without numbers.

Tensors have a shape, strides, a dtype and a device, but no memory: see PyTorch's
``FakeTensorMode``. Code that needs the numbers raises an error, except ``item``, which
gives 0.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Dict, List, Optional, Tuple
from unittest import mock

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction

from mlla_mm.ops import rotary

_aten = torch.ops.aten
_Grads = Tuple[Optional[Tensor], ...]
# What a node of PyTorch's graph has received: gradients by the number of the output.
_Received = Dict[Any, Dict[int, Tensor]]


@contextlib.contextmanager
def pretended_cuda() -> Iterator[FakeTensorMode]:
    """Make tensors of device 'cuda' without a GPU.

    Within the context all new tensors are pretended, and an operation on tensors of
    different devices raises RuntimeError, as on the real device.
    """
    targets: Dict[str, Any] = {
        # These look for a device, and would find none.
        'torch.cuda.device_of': lambda x: contextlib.nullcontext(),
        'torch.cuda.is_current_stream_capturing': lambda: False,
        'torch.cuda.is_bf16_supported': lambda *args, **kwargs: True,
        'torch.cuda.amp.common.amp_definitely_not_available': lambda: False,
        'torch._subclasses.fake_tensor.init_gpu_context': lambda *args: None,
    }
    with contextlib.ExitStack() as stack:
        for target, function in targets.items():
            stack.enter_context(mock.patch(target, function))
        # Tables of pretended tensors must not meet real ones.
        for cache in (rotary._TABLES, rotary._ROTATIONS):
            stack.enter_context(mock.patch.dict(cache, clear=True))
        yield stack.enter_context(_PretendedMode())


class _PretendedMode(FakeTensorMode):
    """FakeTensorMode whose convolutions keep the layout that cuDNN keeps.

    FakeTensorMode asks PyTorch for the layout. Without a GPU, PyTorch answers for
    convolutions without cuDNN.
    """

    @property
    def avoid_device_init(self) -> bool:
        return True  # also on a machine with a GPU

    def dispatch(
        self, func: Any, types: Any, args: Sequence = (), kwargs: Any = None
    ) -> Any:
        if func is _aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype, device='cpu').item()
        out: Any = super().dispatch(func, types, args, kwargs)
        if func is _aten.convolution.default:
            return _as_cudnn(out, args[0], args[1])
        if func is _aten.convolution_backward.default:
            grad, x, weight = args[:3]
            of_x, of_weight, of_bias = out
            # cuDNN reads the gradient in the layout of x.
            return _as_cudnn(of_x, x, weight), _as_cudnn(of_weight, x, grad), of_bias
        return out


def _as_cudnn(out: Optional[Tensor], *factors: Tensor) -> Optional[Tensor]:
    """Channels-last if one of the factors is channels-last, else contiguous."""
    if out is None or out.dim() != 4 or not out.is_cuda:
        return out
    is_last = any(suggest_memory_format(x) == torch.channels_last for x in factors)
    return out.contiguous(
        memory_format=torch.channels_last if is_last else torch.contiguous_format
    )


def backward(outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """``torch.autograd.backward``, node by node.

    PyTorch's own engine refuses CUDA tensors on a machine without a device. Like that
    engine, this one reduces a gradient to the shape of its tensor, and casts it to the
    dtype of its tensor.

    Args:
        outputs (Sequence[Tensor]): Tensors that need gradients.
        grads (Sequence[Tensor]): Their gradients.

    Raises:
        RuntimeError: If a gradient is on another device than its tensor.
    """
    # Nodes are typed Any, because PyTorch's annotations lack what is read here.
    roots: List[Any] = list(dict.fromkeys(output.grad_fn for output in outputs))
    # How many gradients each node waits for.
    waits: Dict[Any, int] = defaultdict(int)
    todo, seen = list(roots), set(roots)
    while todo:
        for following, _ in todo.pop().next_functions:
            if following is None:
                continue
            waits[following] += 1
            if following not in seen:
                seen.add(following)
                todo.append(following)
    received: _Received = defaultdict(dict)
    for output, grad in zip(outputs, grads):
        _give(received, output.grad_fn, output.output_nr, grad)
    ready = [node for node in roots if not waits[node]]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            results = _run(node, received.pop(node, {}))
            for (following, index), result in zip(node.next_functions, results):
                if following is None:
                    continue
                _give(received, following, index, result)
                waits[following] -= 1
                if not waits[following]:
                    ready.append(following)


def _give(received: _Received, node: Any, index: int, grad: Optional[Tensor]) -> None:
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
    grad = grad.sum_to_size(tuple(wanted.shape)).to(wanted.dtype)
    held = received[node].get(index)
    received[node][index] = grad if held is None else held + grad


def _run(node: Any, received: Dict[int, Tensor]) -> _Grads:
    """Gradients for the nodes that follow, in the order of ``next_functions``."""
    following = node.next_functions
    if not received:
        return (None,) * len(following)
    if hasattr(node, 'variable'):
        leaf, grad = node.variable, received[0]
        if leaf.grad is not None:
            grad = leaf.grad + grad
        elif not _same_layout(grad, leaf):
            # Gradients are laid out like their parameters.
            grad = torch.empty_like(leaf).copy_(grad)
        leaf.grad = grad
        return ()
    wanted = node._input_metadata
    if not isinstance(node, BackwardCFunction):
        grads = node(*(received.get(i) for i in range(len(wanted))))
        return grads if isinstance(grads, tuple) else (grads,)
    grads = node.apply(
        *(
            received[i]
            if i in received
            else torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device)
            for i, meta in enumerate(wanted)
        )
    )
    grads = grads if isinstance(grads, tuple) else (grads,)
    # A Python function also returns gradients for arguments that are no tensors. These
    # have no entry in the graph, but one in needs_input_grad.
    given = iter([g for g, needs in zip(grads, node.needs_input_grad) if needs])
    return tuple(None if other is None else next(given) for other, _ in following)


def _same_layout(x: Tensor, y: Tensor) -> bool:
    return all(
        a == b for size, a, b in zip(x.shape, x.stride(), y.stride()) if size != 1
    )
