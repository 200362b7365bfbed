# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mlla_mm import ops
from mlla_mm.models.layers import MLLAAttention, MLLABlock, SoftmaxAttention
from mlla_mm.ops import dispatch, eager, naive, triton


def depthwise(channels):
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


@pytest.fixture
def chosen(monkeypatch):
    """A function that returns the implementation whose attention runs."""
    called = []

    def record(module, name):
        attention = getattr(module, name)

        def call(*args):
            called.append(module)
            return attention(*args)

        monkeypatch.setattr(module, name, call)

    def run():
        called.clear()
        qk, v = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 8)
        ops.mlla_attention(qk, v, v, depthwise(8), 2)
        (module,) = called
        return module

    record(naive, 'linear_attention')
    record(eager, 'mlla_attention')
    return run


def test_the_environment_chooses(monkeypatch, chosen):
    monkeypatch.delenv('MLLA_OPS', raising=False)
    assert chosen() is eager
    monkeypatch.setenv('MLLA_OPS', 'naive')
    assert chosen() is naive
    monkeypatch.setenv('MLLA_OPS', 'eager')
    assert chosen() is eager
    monkeypatch.setenv('MLLA_OPS', 'fast')
    with pytest.raises(ValueError, match="MLLA_OPS is 'fast'"):
        chosen()
    monkeypatch.setenv('MLLA_OPS', 'fused')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with pytest.raises(ValueError, match="MLLA_OPS is 'fused', but .* on cpu"):
        chosen()
    with pytest.raises(ValueError, match="MLLA_OPS is 'fused', but .* on cpu"):
        MLLABlock(8, 2)(torch.randn(1, 2, 3, 8))


def test_what_a_gated_mixer_runs(monkeypatch):
    """MLLA's attention is read, unless layers are to be called; others are called."""
    mlla, softmax = MLLAAttention(8, 2), SoftmaxAttention(8, 2, v_proj=False)
    calls, x = [], torch.randn(1, 2, 3, 8)
    attention = eager.mlla_attention
    monkeypatch.setattr(
        eager, 'mlla_attention', lambda *args: calls.append(args) or attention(*args)
    )
    for mixer, number in ((mlla, 1), (softmax, 0)):
        monkeypatch.delenv('MLLA_OPS', raising=False)
        y = ops.gated_mixer(mixer, x, -x, MLLAAttention)
        assert len(calls) == number
        calls.clear()
        torch.testing.assert_close(y, mixer(x) * nn.functional.silu(-x))
        monkeypatch.setenv('MLLA_OPS', 'naive')
        torch.testing.assert_close(ops.gated_mixer(mixer, x, -x, MLLAAttention), y)
        assert not calls


@pytest.mark.parametrize('available', [False, True])
def test_the_environment_chooses_on_a_gpu(available, monkeypatch):
    """The default is the kernels. The environment can require or forbid them."""
    monkeypatch.setattr(triton, 'is_available', lambda device: available)
    x = SimpleNamespace(is_cuda=True, device=torch.device('cuda'))
    monkeypatch.delenv('MLLA_OPS', raising=False)
    assert dispatch._implementation(x) is (triton if available else eager)
    for name, module in (('naive', naive), ('eager', eager)):
        monkeypatch.setenv('MLLA_OPS', name)
        assert dispatch._implementation(x) is module
    monkeypatch.setenv('MLLA_OPS', 'fused')
    if available:
        assert dispatch._implementation(x) is triton
    else:
        with pytest.raises(ValueError, match="MLLA_OPS is 'fused', but .* on cuda"):
            dispatch._implementation(x)


def test_nothing_is_fused_on_the_cpu(monkeypatch):
    monkeypatch.delenv('MLLA_OPS', raising=False)
    block, x = MLLABlock(8, 2), torch.randn(1, 2, 3, 8)
    # Even if Triton interprets the kernels.
    monkeypatch.setattr(triton, 'is_available', lambda device: True)
    monkeypatch.setattr(triton, 'mlla_block', None)
    assert dispatch._implementation(x) is eager
    assert block(x).shape == x.shape


# In a process of its own, because Triton reads the variable when it is imported.
FUSED = """
import os
from collections import Counter

import torch

from mlla_mm.models import MLLA
from mlla_mm.ops import triton

arch = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2))
model, image = MLLA(arch).eval(), torch.randn(2, 3, 20, 33)
with torch.no_grad():
    expected = model(image)
os.environ["MLLA_OPS"] = "fused"
calls = Counter()
for name in OPS:
    op = getattr(triton, name)
    setattr(triton, name, lambda *x, op=op, name=name: calls.update([name]) or op(*x))


def run(image):
    calls.clear()
    features = model(image)
    for actual, exact in zip(features, expected):
        torch.testing.assert_close(actual.to(exact), exact, rtol=1e-4, atol=1e-5)
    print([calls[name] for name in OPS])


with torch.no_grad():
    run(image)
run(image)
for layer in model.modules():
    if layer.__class__.__name__ == "MLLABlock":
        layer.norm1.register_forward_hook(lambda *args: None)
run(image)
model.double()
run(image.double())
"""
OPS = [
    'mlla_block',
    'depthwise_conv',
    'mlla_attention',
    'layer_norm',
    'expand_and_halve',
    'batch_norm',
]


def test_fused_kernels_are_taken_where_they_fit(run_tool):
    """Without gradients, with gradients, with hooks in the blocks, and in float64."""
    if not triton._has_triton():
        pytest.skip('needs Triton 3.3')
    code = f'OPS = {OPS}\n{FUSED}'
    output = run_tool('python', '-c', code, env=dict(TRITON_INTERPRET='1')).stdout
    # The model has four blocks, four LayerNorms for outputs, three patch mergings, and
    # a BatchNorm in each of these besides the five of the stem.
    assert output.splitlines()[-4:] == EXPECTED_CALLS


# In the order of OPS.
EXPECTED_CALLS = [
    str(calls)
    for calls in (
        [4, 0, 0, 4, 3, 8],
        [4, 0, 0, 4, 3, 0],
        [0, 12, 4, 8, 3, 0],  # the blocks call norm1, which has a hook
        [0, 0, 0, 0, 0, 0],
    )
]


def test_graphs_have_the_plain_definitions():
    class Recorded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = depthwise(8)

        def forward(self, x):
            return ops.depthwise_conv(x, self.conv, residual=True)

    x = torch.randn(1, 2, 3, 8)
    graph = torch.jit.trace(Recorded(), x).inlined_graph
    # Outside of graphs, this sum is a part of the weights.
    (end,) = graph.outputs()
    assert end.node().kind() == 'aten::add'


@pytest.mark.parametrize('forced', ['', 'eager', 'fused'])
def test_graphs_have_no_fused_blocks(forced, monkeypatch):
    """Even if the environment asks for kernels, and if they could run."""
    monkeypatch.setenv('MLLA_OPS', forced)
    monkeypatch.setattr(triton, 'is_available', lambda device: True)
    block, x = MLLABlock(8, 2).eval(), torch.randn(1, 2, 3, 8)
    graph = torch.jit.trace(block, x, check_trace=False).inlined_graph
    kinds = {node.kind() for node in graph.nodes()}
    assert {
        'aten::layer_norm',
        'aten::gelu',
        'aten::elu',
        'aten::_convolution',
    } <= kinds
    assert not any(kind.startswith('prim::Python') for kind in kinds)


# The modules that have an op.
IMPLEMENTATIONS = dict(
    depthwise_conv=(naive, eager, triton),
    mlla_attention=(naive, eager, triton),
    mlp=(naive, eager),
    layer_norm=(naive, eager, triton),
    linear_relu=(naive, triton),
    batch_norm=(naive, triton),
    expand_and_halve=(naive, triton),
    mlla_block=(triton,),
)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_same_signatures(name):
    modules = IMPLEMENTATIONS[name]
    assert modules == tuple(m for m in (naive, eager, triton) if hasattr(m, name))
    signatures = {inspect.signature(getattr(m, name)) for m in modules}
    assert len(signatures) == 1


def test_no_op_is_forgotten():
    for module in (naive, eager, triton):
        ops_of_module = {
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value)
            and value.__module__ == module.__name__
            and not name.startswith(('_', 'supports_'))
        }
        helpers = {'linear_attention', 'mean_over_tokens', 'normaliser'}
        helpers |= {'product_dtype', 'at_least_float32', 'is_available'}
        assert ops_of_module - helpers == {
            name for name, modules in IMPLEMENTATIONS.items() if module in modules
        }
    for name, modules in IMPLEMENTATIONS.items():
        assert hasattr(triton, f'supports_{name}') == (triton in modules)
