# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import inspect

import pytest
import torch

from mlla_mm import ops
from mlla_mm.ops import eager, naive, triton


def is_naive() -> bool:
    """Whether the attention that runs is recorded operation by operation."""
    qk, v = torch.randn(1, 2, 3, 16, requires_grad=True), torch.randn(1, 2, 3, 8)
    y = ops.mlla_attention(qk, v, v, torch.randn(8, 1, 3, 3), torch.randn(8), 2)
    return type(y.grad_fn).__name__ == 'MulBackward0'


def test_the_environment_chooses(monkeypatch):
    assert not is_naive()
    monkeypatch.setenv('MLLA_OPS', 'naive')
    assert is_naive()
    monkeypatch.setenv('MLLA_OPS', 'fast')
    with pytest.raises(ValueError, match="MLLA_OPS is 'fast'"):
        is_naive()
    monkeypatch.setenv('MLLA_OPS', 'fused')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with pytest.raises(ValueError, match="MLLA_OPS is 'fused', but .* on cpu"):
        is_naive()


# In a process of its own, since Triton has to be told before it is imported.
FUSED = """
import torch
from mlla_mm.models import MLLA
from mlla_mm.ops import triton

arch = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2))
model, image = MLLA(arch), torch.randn(2, 3, 20, 33)
model.eval()
features = model(image)
import os
os.environ["MLLA_OPS"] = "fused"
calls = []
for name in ("depthwise_conv", "mlla_attention"):
    op = getattr(triton, name)
    setattr(triton, name, lambda *x, op=op, name=name: calls.append(name) or op(*x))
for a, b in zip(features, model(image)):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
print(calls.count("depthwise_conv"), calls.count("mlla_attention"))
model.double()(image.double())
print(len(calls))
"""


def test_fused_kernels_are_taken_where_they_fit(run_tool):
    """Three convolutions and an attention of each block; none in float64."""
    if not triton._has_triton():
        pytest.skip('needs Triton 3.3')
    output = run_tool('python', '-c', FUSED, env=dict(TRITON_INTERPRET='1')).stdout
    assert output.splitlines()[-2:] == ['12 4', '16']


def test_graphs_have_the_plain_definitions():
    class Recorded(torch.nn.Module):
        def forward(self, x):
            return ops.depthwise_conv(x, torch.ones(8, 1, 3, 3), torch.ones(8), True)

    x = torch.randn(1, 2, 3, 8)
    graph = torch.jit.trace(Recorded(), x).inlined_graph
    # The sum that is part of the weights otherwise.
    (end,) = graph.outputs()
    assert end.node().kind() == 'aten::add'


def test_same_signatures():
    for name in ('depthwise_conv', 'mlla_attention', 'mlp'):
        signatures = {
            str(inspect.signature(getattr(module, name)))
            for module in (naive, eager, ops, triton)
            if hasattr(module, name)
        }
        assert len(signatures) == 1
