# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""CUDA graphs that are simulated on the CPU.

A simulated graph records the operators of a call with the memory that they read and
write. A replay runs them again on that memory.
"""

import contextlib
import weakref
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


class Recorder(TorchDispatchMode):
    def __init__(self, tape):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        # The memory, not the parameter, whose memory may be replaced.
        memory = tree_map(lambda x: x.detach() if is_tensor(x) else x, args)
        self.tape.append((func, memory, kwargs or {}, outputs))
        return outputs


def is_tensor(x):
    return isinstance(x, torch.Tensor)


class SimulatedGraph:
    made = []

    def __init__(self):
        self.tape = []
        self.made.append(weakref.ref(self))

    def replay(self):
        for func, args, kwargs, outputs in self.tape:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(outputs)[0], tree_flatten(again)[0]):
                if is_tensor(old):
                    old.copy_(new)

    def pool(self):
        return self.memory


@contextlib.contextmanager
def simulated_capture(graph, pool, stream, capture_error_mode):
    assert stream is torch.cuda.current_stream()
    graph.memory = pool or object()
    with Recorder(graph.tape):
        yield


class Streams:
    """Simulated streams, of which one is current."""

    def __init__(self):
        self.now = mock.Mock()

    @contextlib.contextmanager
    def use(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before


@contextlib.contextmanager
def simulated_cuda_graphs():
    """Tensors on the CPU say that they are on CUDA, and graphs are simulated."""
    SimulatedGraph.made.clear()
    streams = Streams()
    replacements = dict(
        CUDAGraph=SimulatedGraph,
        Stream=mock.Mock,
        graph=simulated_capture,
        stream=streams.use,
        current_stream=lambda: streams.now,
        is_current_stream_capturing=lambda: False,
        device_of=contextlib.nullcontext,
    )
    is_cuda = property(lambda x: True)
    with (
        mock.patch.multiple(torch.cuda, **replacements),
        mock.patch.object(torch.Tensor, 'is_cuda', is_cuda),
        mock.patch.dict('os.environ', MLLA_OPS='eager'),
    ):
        yield
