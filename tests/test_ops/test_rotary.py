# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import math

import pytest
import torch

from benchmarks.pretended_cuda import pretended_cuda
from mlla_mm.compat.pytorch import TELLS_EXPORT
from mlla_mm.ops import rotary, rotary_embedding

from ..pretended import needs_pretended_cuda


@pytest.fixture(autouse=True)
def empty_tables():
    rotary._TABLES.clear()


def test_against_the_definition():
    x = torch.randn(1, 3, 5, 16, dtype=torch.float64)
    y = rotary_embedding(x)
    for row in range(3):
        for column in range(5):
            for pair in range(8):
                j, position = (pair, row) if pair < 4 else (pair - 4, column)
                angle = position * 10000 ** (-j / 4)
                a, b = x[0, row, column, 2 * pair : 2 * pair + 2].tolist()
                expected = [
                    a * math.cos(angle) - b * math.sin(angle),
                    a * math.sin(angle) + b * math.cos(angle),
                ]
                actual = y[0, row, column, 2 * pair : 2 * pair + 2].tolist()
                assert actual == pytest.approx(expected, abs=1e-12)


def test_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 8, dtype=torch.float64)
    rotated_q = rotary_embedding(q.expand(1, 9, 9, 8))[0]
    rotated_k = rotary_embedding(k.expand(1, 9, 9, 8))[0]
    near = rotated_q[2, 3] @ rotated_k[4, 2]
    far = rotated_q[6, 8] @ rotated_k[8, 7]
    torch.testing.assert_close(near, far, rtol=0, atol=1e-12)


def test_tables_are_bounded_over_many_sizes():
    device = torch.device('cpu')
    generator = torch.Generator().manual_seed(0)
    longest = 0
    for height, width in torch.randint(1, 334, (500, 2), generator=generator).tolist():
        longest = max(longest, height, width)
        cos, _ = rotary.axis_tables(height, 16, device, torch.float32)
        assert len(cos) == height
        rotary.axis_tables(width, 16, device, torch.float32)
    lengths = []
    for cos, sin in rotary._TABLES.values():
        assert cos.untyped_storage().nbytes() == len(cos) * 16 * 4
        assert sin.shape == cos.shape
        lengths.append(len(cos))
    assert longest <= max(lengths) < 2 * longest
    assert sum(lengths) < 2 * max(lengths)


def test_tables_stay_where_they_are():
    """A CUDA graph would read freed memory otherwise."""
    device = torch.device('cpu')
    short = rotary.axis_tables(5, 8, device, torch.float32)[1].clone()
    first = rotary._TABLES.copy()
    long = rotary.axis_tables(300, 8, device, torch.float32)[1]
    assert torch.equal(rotary.axis_tables(5, 8, device, torch.float32)[1], short)
    assert torch.equal(long[:5], short)
    for key, tables in first.items():
        assert rotary._TABLES[key] is tables


@needs_pretended_cuda
def test_a_cuda_graph_keeps_the_rotation_that_it_reads(monkeypatch):
    monkeypatch.setattr(rotary, '_ROTATIONS_IN_GRAPHS', {})
    captures = False
    with pretended_cuda():
        monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: captures)
        x, other = (torch.ones(1, *s, 16, device='cuda') for s in ((5, 7), (6, 4)))
        # A forward pass before the capture, the capture, and another image size.
        table = rotary.rotation(x)
        captures = True
        assert rotary.rotation(x) is table
        own = rotary.rotation(other)
        captures = False
        assert rotary.rotation(other) is not own  # has no values before the graph runs
    assert list(rotary._ROTATIONS_IN_GRAPHS.values()) == [table]


def test_training_after_a_first_use_in_inference_mode():
    with torch.inference_mode():
        rotary_embedding(torch.randn(1, 6, 4, 8))
    x = torch.randn(1, 6, 4, 8, requires_grad=True)
    rotary_embedding(x).square().sum().backward()
    # A rotation keeps the length.
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize('num_freqs', [2, 16, 192])
def test_traced_tables_are_those_of_eager_execution(num_freqs):
    class Tables(torch.nn.Module):
        def forward(self, x):
            return rotary.axis_tables(x.shape[0], num_freqs, x.device, x.dtype)

    traced = torch.jit.trace(Tables(), torch.zeros(7), check_trace=False)
    assert not rotary._TABLES
    for length in (1, 7, 4096):
        x = torch.zeros(length)
        expected = rotary.axis_tables(length, num_freqs, x.device, x.dtype)
        for one, other in zip(traced(x), expected):
            torch.testing.assert_close(one, other, rtol=0, atol=3e-7)


class Rotate(torch.nn.Module):
    def forward(self, x):
        return rotary_embedding(x)


@pytest.mark.skipif(not TELLS_EXPORT, reason='the same in both below PyTorch 2.7')
def test_compiled_on_the_cpu_it_is_a_complex_product():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(Rotate(), backend=backend)
    for size in ((5, 7), (6, 4), (3, 9)):
        x = torch.randn(2, *size, 16, requires_grad=True)
        weight = torch.randn(2, *size, 16)
        expected = rotary_embedding(x)
        torch.testing.assert_close(compiled(x), expected)
        gradients = [
            torch.autograd.grad((y * weight).sum(), x)[0]
            for y in (compiled(x), expected)
        ]
        torch.testing.assert_close(*gradients)
    assert len(graphs) == 2
    assert all('view_as_complex' in graph for graph in graphs)


@pytest.mark.skipif(not TELLS_EXPORT, reason='the same in both below PyTorch 2.7')
@pytest.mark.parametrize('strict', [True, False])
def test_exported_it_has_no_complex_numbers(strict):
    torch._dynamo.reset()
    exported = torch.export.export(Rotate(), (torch.randn(2, 5, 7, 16),), strict=strict)
    assert 'complex' not in exported.graph_module.code
