# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A pretended CUDA device, on which models run without a GPU and without numbers.

Tensors have a shape, strides, a dtype and a device, but no memory: see PyTorch's
``FakeTensorMode``. An operator whose tensors are on different devices raises an error.
Numbers that the host reads are made up. Each operator that makes the host wait for the
device is listed.
"""

import contextlib
import importlib
import itertools
import pkgutil
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Dict, List, NamedTuple, Optional, Tuple
from unittest import mock

import mmengine
import numpy as np
import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_flatten

from mlla_mm.compat.pytorch import constant_when_compiled
from mlla_mm.ops import rotary, triton

#: Whether PyTorch can pretend. Old ones ask the driver when they copy to the device.
AVAILABLE = hasattr(torch._C, '_ensureCUDADeviceGuardSet')

_aten = torch.ops.aten
_Grads = Tuple[Optional[Tensor], ...]
# What a node of PyTorch's graph has received: gradients by the number of the output.
_Received = Dict[Any, Dict[int, Tensor]]
# Called with the name of a Triton kernel and its arguments by name.
_OnLaunch = Callable[[str, Dict[str, Any]], None]

# Operators whose devices FakeTensorMode, or what is made up here, does not compare.
_UNCOMPARED = (
    'cat convolution convolution_backward index_add index_add_ masked_select stack'
).split()
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_INDEX_PUT = (_aten.index_put.default, _aten.index_put_.default)
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# So often a line that does nothing but ask for a bool is told True.
_PATIENCE = 20
_backward_numbers = itertools.count()


class Wait(NamedTuple):
    """What made the host wait for the device.

    Attributes:
        operator (str): 'item', 'nonzero', 'index by mask', 'copy to cpu', 'copy to
            cuda' and so on.
        place (str): Module and function that called the operator.
        stack (tuple[str]): File, line and name of all functions that led to it, the
            innermost first. ``place`` and ``stack`` leave PyTorch's functions out.
    """

    operator: str
    place: str
    stack: Tuple[str, ...]


@contextlib.contextmanager
def pretended_cuda(
    on_launch: _OnLaunch = lambda name, arguments: None,
) -> Iterator['PretendedCUDA']:
    """Make tensors of device 'cuda' without a GPU.

    Within the context all new tensors are pretended. Real ones can be used: a model is
    built before and moved to the device, or built within ``torch.device('cuda')``.
    Triton's kernels compute nothing. ``Tensor.backward`` is :func:`backward`. PyTorch
    and MMEngine say that there is a GPU.

    Args:
        on_launch (Callable): Gets the name of each Triton kernel that is launched, and
            a dict of its arguments. Defaults to a function that does nothing.

    Yields:
        PretendedCUDA: The device.

    Raises:
        RuntimeError: If PyTorch is too old. Within the context, if an operator or a
            kernel gets tensors of different devices.
    """
    if not AVAILABLE:
        raise RuntimeError(
            'Pretending a GPU needs torch._C._ensureCUDADeviceGuardSet, which PyTorch '
            f'2.11 has and {torch.__version__} lacks.'
        )
    device = PretendedCUDA()
    with contextlib.ExitStack() as stack:
        for owner, names in _replacements(device, on_launch):
            stack.enter_context(mock.patch.multiple(owner, **names))
        # Tables of pretended tensors must not meet real ones.
        for cache in (rotary._TABLES, rotary._ROTATIONS):
            stack.enter_context(mock.patch.dict(cache, clear=True))
        yield stack.enter_context(device)


def _replacements(
    device: 'PretendedCUDA', on_launch: _OnLaunch
) -> Iterator[Tuple[Any, Dict[str, Any]]]:
    """What stands in for what looks for a GPU, or for numbers: by owner and name."""

    def answer(value: object) -> Callable[..., object]:
        return lambda *args, **kwargs: value

    def synchronize(of: object = None) -> None:
        device.note_wait('synchronize')

    yield (
        torch.cuda,
        dict(
            is_available=answer(True),
            device_count=answer(1),
            current_device=answer(0),
            device_of=answer(contextlib.nullcontext()),
            is_bf16_supported=answer(True),
            is_current_stream_capturing=answer(False),
            manual_seed_all=answer(None),
            get_rng_state=answer(torch.empty(0, dtype=torch.uint8)),
            set_rng_state=answer(None),
            max_memory_allocated=answer(0),
            reset_peak_memory_stats=answer(None),
            synchronize=synchronize,
        ),
    )
    yield torch, dict(Generator=_Generator)
    # torch.compile asks for a stream, and for what Triton can do on the device.
    yield torch.accelerator, dict(is_available=answer(False))
    of_triton = importlib.import_module('torch.utils._triton')  # PyTorch 2.1 lacks it
    asked = [name for name in vars(of_triton) if name.startswith('has_triton')]
    yield of_triton, dict.fromkeys(asked, answer(False))
    yield torch.cuda.amp.common, dict(amp_definitely_not_available=answer(False))
    yield fake_tensor, dict(init_gpu_context=answer(None))
    yield mmengine.device.utils, dict(DEVICE='cuda')
    # These take many tensors at once only if they know the type of the tensors.
    known = [Tensor, nn.Parameter, FakeTensor]
    for name in ('torch.optim.optimizer', 'torch.utils._foreach_utils'):
        yield importlib.import_module(name), dict(_foreach_supported_types=known)
    yield Tensor, dict(backward=_backward, numpy=_numpy, __deepcopy__=_deepcopy)
    yield FakeTensor, dict(tolist=_tolist)
    yield triton, dict(is_available=_has_kernels)
    for module, name, kernel in triton_kernels():
        yield module, {name: _PretendedKernel(kernel, name, on_launch)}


class _Generator(torch.Generator):
    """A generator of any device, which is one of the CPU: it is asked for no number."""

    def __new__(cls, device: object = 'cpu') -> '_Generator':
        return super().__new__(cls, 'cpu')  # type: ignore[call-arg]


class PretendedCUDA(FakeTensorMode):
    """FakeTensorMode that makes up numbers and lists who waits for them.

    Of a number that depends on the numbers of tensors, an integer is 1, a
    floating-point number 0.0 and a bool True. A line that asks for a bool again and
    again gets False at last, so that its loop ends. A mask holds for half of the
    entries, and NMS keeps half of the boxes. A single number on the CPU that was never
    elsewhere is known.

    Convolutions keep the layout that cuDNN keeps. FakeTensorMode asks PyTorch for the
    layout, which without a GPU answers for convolutions without cuDNN.

    Attributes:
        waits (list[Wait]): What made the host wait: reading numbers, shapes that depend
            on numbers, and copies between the devices. A copy does not wait if it is
            ``non_blocking`` and its side on the CPU is pinned.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: List[Wait] = []
        self._depth = 0
        self._asked, self._times = '', 0

    @property
    def avoid_device_init(self) -> bool:
        return True  # also on a machine with a GPU

    def synchronisations(self) -> Dict[Tuple[str, str], int]:
        """How often the host has waited, by operator and place."""
        return dict(Counter((wait.operator, wait.place) for wait in self.waits))

    def note_wait(self, operator: str) -> None:
        """List a wait of the function that calls an operator."""
        place, stack = _callers()
        self.waits.append(Wait(operator, place, stack))

    def answer(self) -> bool:
        """The bool that the host reads now."""
        line = _callers()[1][0]
        self._times = self._times + 1 if line == self._asked else 1
        self._asked = line
        if self._times < _PATIENCE:
            return True
        self._times = 0
        return False

    def dispatch(
        self, func: Any, types: Any, args: Sequence = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _UNCOMPARED or name.startswith('_foreach'):
            _require_one_device(func, args)
        # Operators call others, whose waits are their own.
        operator = None if self._depth else _name_wait(func, args, kwargs)
        if operator is not None:
            self.note_wait(operator)
        self._depth += 1
        try:
            out: Any = _make_up(self, func, args)
            if func.namespace == 'mlla_mm':
                with self:
                    out = _function_of(func)(*args, **kwargs)
            if out is NotImplemented:
                out = super().dispatch(func, types, args, kwargs)
        finally:
            self._depth -= 1
        if func is _aten.convolution.default:
            return _as_cudnn(out, args[0], args[1])
        if func is _aten.convolution_backward.default:
            grad, x, weight = args[:3]
            of_x, of_weight, of_bias = out
            # cuDNN reads the gradient in the layout of x.
            return _as_cudnn(of_x, x, weight), _as_cudnn(of_weight, x, grad), of_bias
        if kwargs.get('pin_memory'):
            out.has_pinned_memory = True
        return out


def _callers() -> Tuple[str, Tuple[str, ...]]:
    """The place and the stack of a :class:`Wait`."""
    frames = [
        (frame, line)
        for frame, line in traceback.walk_stack(None)
        # The code of a compiled graph has no module.
        if not _is_inner(frame.f_globals.get('__name__', 'torch'))
    ]
    caller = frames[0][0]
    place = f'{caller.f_globals["__name__"]}.{caller.f_code.co_name}'
    stack = tuple(
        f'{frame.f_code.co_filename}:{line} {frame.f_code.co_name}'
        for frame, line in frames
    )
    return place, stack


def _require_one_device(func: Any, args: Sequence) -> None:
    """Raise what FakeTensorMode forgets for some operators."""
    tensors = [x for x in tree_flatten(args)[0] if isinstance(x, Tensor)]
    if func.overloadpacket.__name__ not in ('cat', 'stack'):
        # A tensor of one number may be on the CPU.
        tensors = [x for x in tensors if x.dim()]
    devices = {str(x.device) for x in tensors}
    if len(devices) > 1:
        raise RuntimeError(f'{func} got tensors on {", ".join(sorted(devices))}.')


def _is_inner(module: str) -> bool:
    """Whether a module is PyTorch's or this one."""
    return module == __name__ or module.split('.')[0] in ('torch', 'torchvision')


def _as_cudnn(out: Optional[Tensor], *factors: Tensor) -> Optional[Tensor]:
    """Channels-last if one of the factors is channels-last, else contiguous."""
    if out is None or out.dim() != 4 or not out.is_cuda:
        return out
    is_last = any(suggest_memory_format(x) == torch.channels_last for x in factors)
    return out.contiguous(
        memory_format=torch.channels_last if is_last else torch.contiguous_format
    )


# What waits for the device.


def _name_wait(func: Any, args: Sequence, kwargs: Dict[str, Any]) -> Optional[str]:
    """What an operator waits for, or None."""
    x = args[0] if args else None
    if not isinstance(x, Tensor):
        return None
    if func in _COPIES:
        return _name_copy(func, args, kwargs)
    name = func.overloadpacket.__name__
    if func is _aten.index.Tensor or func in _INDEX_PUT:
        return _name_index(func, *args)
    if not x.is_cuda:
        return None
    if name == 'repeat_interleave' and kwargs.get('output_size') is not None:
        return None
    if name == 'nms' or not _DATA_DEPENDENT.isdisjoint(func.tags):
        return dict(_local_scalar_dense='item', _unique2='unique').get(name, name)
    return None


def _name_copy(func: Any, args: Sequence, kwargs: Dict[str, Any]) -> Optional[str]:
    if func is _aten.copy_.default:
        target, source = args[:2]
        non_blocking = kwargs.get('non_blocking', args[2] if len(args) > 2 else False)
        to, is_pinned = target.device, _is_pinned(source) or _is_pinned(target)
    else:
        source = args[0]
        non_blocking = kwargs.get('non_blocking', False)
        to = torch.device(kwargs.get('device') or source.device)
        # A new tensor on the CPU is pinned if the copy shall not block.
        is_pinned = to.type == 'cpu' or _is_pinned(source)
    if source.device.type == to.type or (non_blocking and is_pinned):
        return None
    return f'copy to {to.type}'


def _name_index(
    func: Any, x: Tensor, indices: Sequence[Optional[Tensor]], *values: Any
) -> Optional[str]:
    given = [index for index in indices if index is not None]
    if not x.is_cuda:
        if any(index.is_cuda for index in given):
            raise RuntimeError(
                f'{func} needs indices on cpu, as its tensor is, but they are on cuda.'
            )
        return None
    if any(not index.is_cuda for index in given):
        return 'copy to cuda'
    # One value from the host fills the places of a mask, without looking for them.
    fills = func in _INDEX_PUT and values[0].numel() == 1 and not values[0].is_cuda
    return 'index by mask' if any(map(_is_mask, given)) and not fills else None


def _is_mask(index: Optional[Tensor]) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


# What is made up.


def _make_up(device: PretendedCUDA, func: Any, args: Sequence) -> Any:
    """The result of an operator that depends on numbers, or NotImplemented."""
    x = args[0] if args else None
    make_up = _MADE_UP.get(func.overloadpacket.__name__)
    if make_up is None or not isinstance(x, Tensor):
        return NotImplemented
    if not isinstance(x, FakeTensor):
        if make_up is _item:
            with no_dispatch():
                return x.item()
        x = device.from_tensor(x)
    # A constant is a tensor whose numbers are known.
    if x.constant is not None:
        return NotImplemented
    if make_up is _item and x.dtype == torch.bool:
        return device.answer()
    return make_up(x, *args[1:])


def _item(x: Tensor) -> Any:
    if x.dtype == torch.bool:
        return True
    return 0.0 if x.dtype.is_floating_point else 1


def _nonzero(x: Tensor) -> Tensor:
    return x.new_empty((_half(x), x.dim()), dtype=torch.long)


def _masked_select(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(_half(torch.broadcast_tensors(x, mask)[0]))


def _unique(x: Tensor, *options: bool) -> Tuple[Tensor, Tensor, Tensor]:
    """Unique values, where the entries of ``x`` are among them, and their counts."""
    values = x.new_empty(_half(x))
    inverse = torch.empty_like(x, dtype=torch.long)
    return values, inverse, torch.empty_like(values, dtype=torch.long)


def _index(x: Tensor, indices: Sequence[Optional[Tensor]]) -> Any:
    if not any(map(_is_mask, indices)):
        return NotImplemented
    chosen: List[Optional[Tensor]] = []
    for index in indices:
        if index is None or not _is_mask(index):
            chosen.append(index)
        else:  # a mask stands for one index into each of its axes
            chosen += _nonzero(index).unbind(1)
    return _aten.index.Tensor(x, chosen)


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    if boxes.device != scores.device:
        raise RuntimeError(
            f'nms got boxes on {boxes.device} and scores on {scores.device}.'
        )
    return boxes.new_empty(_half(scores), dtype=torch.long)


def _pin_memory(x: Tensor, *options: Any) -> Tensor:
    pinned: Any = x.clone()
    pinned.has_pinned_memory = True
    return pinned


def _is_pinned(x: Tensor, *options: Any) -> bool:
    return getattr(x, 'has_pinned_memory', False)


_MADE_UP: Dict[str, Callable[..., Any]] = dict(
    _local_scalar_dense=_item,
    nonzero=_nonzero,
    masked_select=_masked_select,
    _unique2=_unique,
    index=_index,
    nms=_nms,
    _pin_memory=_pin_memory,
    is_pinned=_is_pinned,
)


def _half(x: Tensor) -> int:
    return -(-x.numel() // 2)


def _numpy(self: Tensor, *args: Any, **kwargs: Any) -> np.ndarray:
    """``Tensor.numpy``."""
    known = self.constant if isinstance(self, FakeTensor) else self
    if known is not None:
        with no_dispatch():
            return _real_numpy(known, *args, **kwargs)
    if self.device.type != 'cpu':
        raise TypeError(f"can't convert {self.device} device type tensor to numpy.")
    return np.full(tuple(self.shape), _item(self), str(self.dtype).split('.')[-1])


def _tolist(self: Tensor) -> Any:
    """``Tensor.tolist``, which copies all numbers at once."""
    return self.cpu().numpy().tolist()


def _deepcopy(self: Tensor, memo: Dict[int, Any]) -> Tensor:
    """``Tensor.__deepcopy__``, which otherwise reads the memory."""
    if id(self) not in memo:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
    return memo[id(self)]


_real_numpy = Tensor.numpy


# Triton's kernels.


class _PretendedKernel:
    """Replaces a Triton kernel: its launches are told, and nothing is computed."""

    def __init__(self, kernel: Any, name: str, on_launch: _OnLaunch) -> None:
        self._names = kernel.arg_names
        self._name = name
        self._on_launch = on_launch

    def __getitem__(self, grid: Tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(self._names, args), **kwargs)
        tensors = [x for x in tree_flatten(given)[0] if isinstance(x, Tensor)]
        if not all(x.is_cuda for x in tensors):
            devices = ', '.join(sorted({str(x.device) for x in tensors}))
            raise RuntimeError(f'{self._name} got tensors on {devices}.')
        self._on_launch(self._name, given)


def triton_kernels() -> Iterator[Tuple[ModuleType, str, Any]]:
    """Module, name and function of every Triton kernel, if there is a Triton."""
    if not triton._has_triton():
        return
    for info in pkgutil.iter_modules(triton.__path__):
        module = importlib.import_module(f'{triton.__name__}.{info.name}')
        for name, kernel in list(vars(module).items()):
            if name.endswith('_kernel'):
                yield module, name, kernel


def _function_of(operator: Any) -> Callable:
    """The Python function of an operator of :mod:`mlla_mm.ops.library`."""
    from torch._library.custom_ops import OPDEFS  # which old PyTorch lacks

    return OPDEFS[operator._schema.name]._init_fn


@constant_when_compiled
def _has_kernels(device: torch.device) -> bool:
    """``triton.is_available``."""
    return device.type == 'cuda' and triton._has_triton()


# The backward pass.


def _backward(
    self: Tensor,
    gradient: Optional[Tensor] = None,
    retain_graph: Optional[bool] = None,
) -> None:
    """``Tensor.backward``."""
    backward([self], [torch.ones_like(self) if gradient is None else gradient])


def backward(outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """``torch.autograd.backward``, node by node.

    PyTorch's own engine refuses CUDA tensors on a machine without a device. Like that
    engine, this one reduces a gradient to the shape of its tensor, and casts it to the
    dtype of its tensor. Hooks of tensors and nodes are not called.

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
    # A checkpoint recomputes once in each pass, and knows a pass by its number.
    number = next(_backward_numbers)
    with torch.no_grad(), mock.patch('torch._C._current_graph_task_id', lambda: number):
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
