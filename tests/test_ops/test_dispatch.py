# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch

from mlla_mm import ops
from mlla_mm.ops import eager, naive


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
    import inspect

    for name in ('depthwise_conv', 'mlla_attention', 'mlp'):
        signatures = {
            str(inspect.signature(getattr(module, name)))
            for module in (naive, eager, ops)
        }
        assert len(signatures) == 1
