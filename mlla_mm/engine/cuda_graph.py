# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""CUDA graphs: the kernels of a call are started by one command.

Starting them one by one takes the host longer than small batches take the GPU.
"""

import weakref
from collections import OrderedDict
from functools import partial
from typing import Any, Callable, Hashable, List, Optional, Tuple

import torch
from torch import Tensor, nn

from ..compat.pytorch import (
    autocast_dtype,
    does_more_when_called,
    has_global_hooks,
    is_autocast,
    is_call_compiled,
    parts_and_tensors,
)
from ..models.backbones.staged import StagedBackbone
from ..ops.tracing import is_graph

# As many calls as PyTorch's documentation makes before it captures a graph.
_CALLS_BEFORE_CAPTURE = 3
# So many kinds of images are remembered. Each graph keeps images and outputs.
_MOST_GRAPHS = 8


class CudaGraph:
    """A call that is captured in a CUDA graph, and then replayed.

    A training step sets the gradients to None. The graph therefore has its own memory
    for gradients, which nothing outside the graph sees.

    Args:
        call (Callable): What to capture. It is called three times before.
        other (CudaGraph, optional): A graph of the same device whose memory is used for
            this one, too. Then only one of them may run at a time. None means memory of
            its own. Defaults to None.

    Raises:
        RuntimeError: If the call cannot be captured.
    """

    def __init__(
        self, call: Callable[[], Any], other: Optional['CudaGraph'] = None
    ) -> None:
        self._call = call  # keeps alive what the graph reads
        self.graph = torch.cuda.CUDAGraph()
        # Only captures on one stream use one another's memory.
        self.stream: torch.cuda.Stream = (
            torch.cuda.Stream() if other is None else other.stream
        )
        self.stream.wait_stream(torch.cuda.current_stream())
        # If capturing fails, PyTorch stays on the stream of the capture. This context
        # goes back to the stream before.
        with torch.cuda.stream(self.stream):
            for _ in range(_CALLS_BEFORE_CAPTURE):
                call()
            try:
                with torch.cuda.graph(
                    self.graph,
                    pool=None if other is None else other.graph.pool(),
                    stream=self.stream,
                    # Others may go on: a data loader's thread allocates pinned memory.
                    capture_error_mode='thread_local',
                ):
                    self._outputs = call()
            except RuntimeError as error:
                # After a first error the end of the capture fails too, and its error
                # hides the first one. A variable for the error would be a cycle of
                # references, which keeps the model.
                raise RuntimeError(
                    'it cannot be captured in a CUDA graph: '
                    f'{error.__context__ or error}. Leave cuda_graph out.'
                ) from error
        torch.cuda.current_stream().wait_stream(self.stream)

    def __call__(self) -> Any:
        """Replay the graph.

        Returns:
            object: What the call returned. The values hold until the next replay of a
            graph with the same memory.
        """
        self.graph.replay()
        return self._outputs


class GraphedForward:
    """A forward pass that replays CUDA graphs, for a module's attribute ``forward``.

    The first call with images of a shape and dtype, under an autocast, is a usual one.
    The second one captures a graph, and later ones replay it. The last eight kinds of
    images are remembered: a ninth one drops the kind that was not used for longest.
    A model that gets more kinds in turns therefore captures nothing.

    A call is a usual one in training mode, with gradients, on other devices than CUDA,
    while a graph is traced or captured, while hooks watch all modules, and if a part of
    the module has hooks, a ``forward`` of its own or is compiled.

    A replay reads the memory of parameters and buffers, so it sees values that were
    changed in place. If their memory or a part of the module is replaced, or the
    current stream is another one, all graphs are dropped. Other attributes, and
    settings such as TF32 and ``MLLA_OPS``, stay as they were when a graph was captured.

    Copies and pickles of the module have no graphs and capture their own. Calls from
    several threads at a time are not possible.

    Args:
        module (nn.Module): Its class's ``forward`` turns images into a tensor or a
            tuple of tensors, and does not make the host wait for the device.
    """

    def __init__(self, module: nn.Module) -> None:
        # The module has this object. A reference back would be a cycle, and the memory
        # of a deleted module would stay until Python looks for cycles.
        self._module = weakref.ref(module)
        # By kind of images; None after the first call.
        self._graphs: OrderedDict[Hashable, Optional[_Replay]] = OrderedDict()
        self._reads: Any = None
        self._kept: List[Tensor] = []

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), (self._module(),)

    # PyTorch's tracers want a method, not an object that can be called.
    def forward(self, x: Tensor) -> Any:
        """What the module's class gives for images, in new tensors."""
        if (
            is_graph()
            or torch.is_grad_enabled()
            or type(x) is not Tensor  # such as one of functorch
            or not x.is_cuda
            or has_global_hooks()
        ):
            return _forward(self._module, x)
        with torch.cuda.device_of(x):
            replay = None
            if not torch.cuda.is_current_stream_capturing() and self._may_replay():
                replay = self._replay_for(x)
            return _forward(self._module, x) if replay is None else replay(x)

    def _may_replay(self) -> bool:
        """Whether the module is what a graph repeats. Drops graphs of what it was."""
        module: Any = self._module()
        (_, *parts), tensors = parts_and_tensors(module)
        if module.training:
            return False
        # Hooks of the module itself are called around its forward pass.
        for part in parts:
            if part.training or does_more_when_called(part) or is_call_compiled(part):
                return False
        reads = torch.cuda.current_stream(), parts, [x.data_ptr() for x in tensors]
        if reads != self._reads:
            self._graphs.clear()
            self._reads = reads
            # While the memory is kept, nothing else can have its address.
            self._kept = [x.detach() for x in tensors]
        return True

    def _replay_for(self, x: Tensor) -> Optional['_Replay']:
        device = x.device.type
        dtype = autocast_dtype(device) if is_autocast(device) else None
        kind = x.shape, x.dtype, dtype
        is_known = kind in self._graphs
        replay = self._graphs.pop(kind, None)
        if is_known and replay is None:
            others = [other.graph for other in self._graphs.values() if other]
            replay = _Replay(self._module, x, dtype, *others[:1])
        self._graphs[kind] = replay
        if len(self._graphs) > _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return replay


class _Replay:
    """A forward pass for images of one kind, as a graph."""

    def __init__(
        self,
        module: 'weakref.ref[nn.Module]',
        x: Tensor,
        dtype: Optional[torch.dtype],
        *others: CudaGraph,
    ) -> None:
        # Tensors of the inference mode could not be written outside of it. Autocast
        # must not take casts of weights that were made outside of the graph.
        autocast = torch.autocast(
            x.device.type, dtype, enabled=dtype is not None, cache_enabled=False
        )
        with torch.inference_mode(False), torch.no_grad(), autocast:
            self._images = x.clone()
            self.graph = CudaGraph(partial(_forward, module, self._images), *others)

    def __call__(self, x: Tensor) -> Any:
        self._images.copy_(x)
        outputs = self.graph()
        # The next replay overwrites them.
        if isinstance(outputs, Tensor):
            return outputs.clone()
        return tuple(output.clone() for output in outputs)


def _forward(module: 'weakref.ref[nn.Module]', x: Tensor) -> Any:
    """The forward pass of a module's class."""
    found: Any = module()
    return type(found).forward(found, x)


def replay_forward(module: nn.Module) -> None:
    """Replay the forward pass of a module, see :class:`GraphedForward`."""
    module.forward = GraphedForward(module).forward  # type: ignore[method-assign]


def use_cuda_graphs(model: nn.Module) -> None:
    """Let the backbones of a model replay their forward pass as CUDA graphs.

    See :class:`GraphedForward`.

    Args:
        model (nn.Module): An MLLA or LinearAttentionSwin, or a model that has one or
            several; changed in place.

    Raises:
        ValueError: If there is no such backbone.
    """
    backbones = [x for x in model.modules() if isinstance(x, StagedBackbone)]
    if not backbones:
        raise ValueError(
            f'{type(model).__name__} has no MLLA and no LinearAttentionSwin, whose '
            'forward pass could be a CUDA graph. Leave cuda_graph out.'
        )
    for backbone in backbones:
        replay_forward(backbone)
