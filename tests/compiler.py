# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""For tests that compile a model."""

from collections import Counter

import pytest
import torch

from mlla_mm.compat.pytorch import COMPILES

needs_compiler = pytest.mark.skipif(not COMPILES, reason='PyTorch 2.1 takes too long')


def graphs_of(model, x, **options):
    """Compile a model, and call it once, with a backward pass if gradients are on.

    Returns:
        tuple: The compiled model, and for each graph how often it has each operator.
        Later graphs are added to the list.
    """
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def look(graph, inputs):
        names = (
            node.target for node in graph.graph.nodes if node.op == 'call_function'
        )
        graphs.append(Counter(str(name).removesuffix('.default') for name in names))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    compiled = torch.compile(model, backend=backend, fullgraph=True, **options)
    y = compiled(x)
    if y.requires_grad:
        y.sum().backward()
    return compiled, graphs
