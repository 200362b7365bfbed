# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What torch.compile makes of models whose ops are Triton's kernels.

Graphs are looked at with kernels that do nothing. Numbers need kernels that run: on a
GPU, or in Triton's interpreter, for which a test runs this file again in a process of
its own, as test_triton.py does.
"""

import copy
import inspect
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.pretended_cuda import backward, pretended_cuda, triton_kernels
from mlla_mm import ops
from mlla_mm.models.backbones.staged import Stage
from mlla_mm.models.layers import MLLABlock
from mlla_mm.ops import naive, triton
from mlla_mm.ops.rotary import axis_tables, tables_in_float64

from ..compiler import graphs_of
from ..pretended import needs_pretended_cuda

if not triton._has_triton():
    pytest.skip('needs Triton 3.3', allow_module_level=True)

from torch.library import opcheck

from mlla_mm.ops import library

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICES = ['cpu']
if not INTERPRETED:
    no_gpu = not torch.cuda.is_available()
    no_gpu = pytest.mark.skipif(no_gpu, reason='needs a GPU, or TRITON_INTERPRET=1')
    DEVICES = [pytest.param('cuda', marks=[pytest.mark.gpu, no_gpu])]
of_graphs = pytest.mark.skipif(INTERPRETED, reason='needs no kernel that runs')

CONV, ATTENTION = 'mlla_mm.depthwise_conv', 'mlla_mm.mlla_attention'
OF_BLOCK = {CONV: 3, ATTENTION: 1}
OF_BACKWARD = {f'{name}_backward': number for name, number in OF_BLOCK.items()}


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    monkeypatch.setenv('MLLA_OPS', 'fused')
    device = torch.device(request.param)
    if not triton.is_available(device):
        pytest.skip('needs a GPU of compute capability 8.0')
    return device


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    torch.manual_seed(0)


@pytest.mark.skipif(INTERPRETED, reason='would start itself')
@pytest.mark.parametrize('names', ['operators', 'compiled'])
def test_without_a_gpu(names, run_tool):
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider']
    output = run_tool(
        *command, '-k', names, Path(__file__), env=dict(TRITON_INTERPRET='1')
    ).stdout
    assert ' passed' in output and ' failed' not in output, output


# --- Numbers ---


def maps(device, *channels):
    return [
        torch.randn(1, 2, 3, c, device=device, requires_grad=True) for c in channels
    ]


def conv_weights(channels, device):
    conv = nn.Conv2d(channels, channels, 3, groups=channels, device=device)
    return [conv.weight, conv.bias]


def test_operators_of_the_convolution(device):
    """Schema, shapes, strides and gradients are what PyTorch's own check expects."""
    (x,), weights = maps(device, 8), conv_weights(8, device)
    options = True, True
    opcheck(library._depthwise_conv, (x, *weights, *options, torch.float32))
    tensors = [t.detach() for t in (x, x, *weights)]
    opcheck(library._depthwise_conv_backward, (*tensors, *options))


def test_operators_of_the_attention(device):
    qk, v, gate = maps(device, 16, 8, 8)
    given = qk, v, gate, *conv_weights(8, device)
    tables = [torch.randn(5, 2, device=device) for _ in '12']
    opcheck(library._mlla_attention, (*given, *tables, 2))
    _, *kept = library._mlla_attention(*given, *tables, 2)
    tensors = [t.detach() for t in (v, *given, *tables, *kept)]
    opcheck(library._mlla_attention_backward, (*tensors, 2))


@pytest.mark.parametrize('dtype, with_cp', [(None, False), (torch.bfloat16, True)])
def test_compiled_equals_fused(device, dtype, with_cp):
    """Output and gradients of blocks, in float32 and under autocast."""
    model = Stage([MLLABlock(8, 2, drop_path_rate=0.1)], None, with_cp).to(device)
    backend = 'inductor' if device.type == 'cuda' else 'aot_eager'
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(1, 2, 3, 8, device=device, requires_grad=True)
    leaves = [x, *model.parameters()]
    found = []
    for run in (model.eval(), compiled):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            y = run(x)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    rtol, atol = (1e-4, 1e-5) if dtype is None else (4e-2, 4e-2)
    for expected, actual in zip(*found):
        assert actual.dtype == expected.dtype
        scale = expected.detach().abs().max()
        torch.testing.assert_close(
            actual / scale, expected / scale, rtol=rtol, atol=atol
        )


# --- Graphs ---


class Idle:
    """A kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture
def idle(monkeypatch):
    """Kernels seem to run on the CPU."""
    for module, name, _ in list(triton_kernels()):
        monkeypatch.setattr(module, name, Idle())
    monkeypatch.setattr(triton, 'is_available', lambda device: True)
    monkeypatch.setenv('MLLA_OPS', 'fused')


def kernels(graph):
    return {name: n for name, n in graph.items() if name.startswith('mlla_mm.')}


def size(graph):
    return sum(graph.values())


@of_graphs
def test_graphs_keep_the_kernels(idle, monkeypatch):
    """What is left to the compiler is half as large as without them."""
    model, x = MLLABlock(8, 2), torch.randn(2, 5, 7, 8)
    with torch.no_grad():
        compiled, (graph,) = graphs_of(model, x)
        assert compiled(x).shape == x.shape
    assert kernels(graph) == OF_BLOCK
    _, (forward, backward) = graphs_of(model, x)
    assert kernels(forward) == OF_BLOCK
    assert kernels(backward) == OF_BACKWARD
    monkeypatch.setenv('MLLA_OPS', 'naive')
    _, (naive_forward, naive_backward) = graphs_of(model, x)
    assert not kernels(naive_forward + naive_backward)
    assert 2 * size(forward) < size(naive_forward)
    assert size(backward) < size(naive_backward)


@of_graphs
@pytest.mark.parametrize('training', [False, True])
def test_one_graph_for_all_sizes(idle, training):
    model = Stage([MLLABlock(8, 2)], None, with_cp=False).train(training)
    sizes = [(2, 5, 7), (3, 9, 4), (5, 40, 40)]
    with torch.set_grad_enabled(training):
        compiled, graphs = graphs_of(model, torch.randn(*sizes[0], 8), dynamic=True)
        for shape in sizes[1:]:
            y = compiled(torch.randn(*shape, 8))
            assert y.shape == (*shape, 8)
            if training:
                y.sum().backward()
    assert len(graphs) == 1 + training


@of_graphs
def test_what_is_recomputed_has_kernels_too(idle):
    model = Stage([MLLABlock(8, 2)], None, with_cp=True)
    x = torch.randn(2, 5, 7, 8, requires_grad=True)
    _, (forward, backward) = graphs_of(model, x)
    assert kernels(forward) == OF_BLOCK
    assert kernels(backward) == {**OF_BLOCK, **OF_BACKWARD}


@of_graphs
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_operators_have_the_dtypes_of_autocast(idle, dtype):
    """Also where autocast is off when the graph runs."""
    block = MLLABlock(8, 2)
    maps = [torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8, dtype=dtype)]

    def run(x):
        conv = block.dwc.weight, block.dwc.bias
        return [
            module.depthwise_conv(x, *conv, residual, act)
            for residual, act in ((False, True), (True, False))
        ]

    for x in maps:
        found = []
        for module in (triton, library):
            function = run
            if module is library:
                function = torch.compile(run, backend='aot_eager', fullgraph=True)
            with torch.autocast('cpu', dtype):
                found.append([y.dtype for y in function(x)])
        assert found[0] == found[1]


@of_graphs
def test_what_kernels_do_not_take_is_left_to_the_compiler(idle):
    model, x = MLLABlock(8, 2).double(), torch.randn(1, 2, 3, 8).double()
    changed = copy.deepcopy(model).float()
    changed.cpe1.padding_mode = 'reflect'
    with torch.no_grad():
        _, (graph,) = graphs_of(model, x)
        assert not kernels(graph)
        _, (graph,) = graphs_of(changed, x.float())
        assert kernels(graph) == {CONV: 2, ATTENTION: 1}


@of_graphs
def test_the_environment_is_read_again(idle, monkeypatch):
    """A graph is compiled again for another value."""
    conv, x = MLLABlock(8, 2).dwc, torch.randn(1, 2, 3, 8)
    with torch.no_grad():
        compiled, graphs = graphs_of(lambda x: ops.depthwise_conv(x, conv), x)
        for value in ('naive', 'fused', 'eager'):
            monkeypatch.setenv('MLLA_OPS', value)
            compiled(x)
        monkeypatch.delenv('MLLA_OPS')
        compiled(x)
    assert [kernels(graph) for graph in graphs[:2]] == [{CONV: 1}, {}]
    assert not any(map(kernels, graphs[1:]))


@of_graphs
def test_kernels_that_cannot_run_are_an_error(monkeypatch):
    monkeypatch.setenv('MLLA_OPS', 'fused')
    compiled = torch.compile(MLLABlock(8, 2), backend='eager')
    with pytest.raises(ValueError, match="MLLA_OPS is 'fused', but .* on cpu"):
        compiled(torch.randn(1, 2, 3, 8))


@of_graphs
def test_exports_have_the_definitions(idle):
    """Files run where this package is not."""
    model, x = MLLABlock(8, 2).eval(), torch.randn(1, 2, 3, 8)
    program = torch.export.export(model, (x,), strict=False)
    names = Counter(str(node.target) for node in program.graph.nodes)
    assert not kernels(names)
    assert names['aten.conv2d.default'] == 4


@of_graphs
def test_the_tables_are_those_of_the_kernels():
    """The rotation in a graph is the one that kernels get outside of graphs."""
    expected = axis_tables(300, 16, torch.device('cpu'), torch.float32)
    for actual, table in zip(tables_in_float64(300, 16, torch.device('cpu')), expected):
        torch.testing.assert_close(actual.float(), table, rtol=0, atol=1e-7)


@of_graphs
@pytest.mark.parametrize('name', ['depthwise_conv', 'mlla_attention'])
def test_same_signatures(name):
    functions = (getattr(module, name) for module in (naive, triton, library))
    assert len({inspect.signature(function) for function in functions}) == 1


@of_graphs
@needs_pretended_cuda
@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_the_pretended_device_lists_launches(backend, monkeypatch):
    """A compiled block launches the kernels that it launches layer by layer."""
    monkeypatch.setenv('MLLA_OPS', 'fused')
    launches = Counter()
    with pretended_cuda(lambda name, arguments: launches.update([name])):
        with torch.device('cuda'):
            model, x = MLLABlock(8, 2), torch.randn(1, 2, 3, 8)
        training = backend == 'eager'  # only there PyTorch's own engine stays away
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        with torch.set_grad_enabled(training):
            y = compiled(x)
        assert launches == dict(_conv_kernel=4, _state_kernel=1, _output_kernel=1)
        if training:
            launches.clear()
            backward([y], [torch.ones_like(y)])
            assert launches == dict(
                _conv_kernel=2,
                _conv_grad_kernel=4,
                _add_up_kernel=4,
                _query_grad_kernel=1,
                _key_value_grad_kernel=1,
            )
