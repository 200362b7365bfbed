# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What Triton's kernels say that they move, against what they load and store.

Triton's interpreter tells the addresses. As in test_triton.py, one test runs this file
again in a process of its own, where ``TRITON_INTERPRET=1`` is set.
"""

import contextlib
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from benchmarks.pretended_cuda import (
    AVAILABLE,
    backward,
    pretended_cuda,
    triton_kernels,
)
from mlla_mm.models import MLLA
from mlla_mm.models.layers import MLLABlock
from mlla_mm.ops import triton as fused
from mlla_mm.ops.dispatch import block_parameters
from mlla_mm.ops.triton import _moves
from mlla_mm.ops.triton._moves import Moves, moves_of

from .test_triton import (
    INTERPRETED,
    attention_inputs,
    batch_norm_inputs,
    conv_inputs,
    norm_inputs,
    slow,
)

if not fused._has_triton():
    pytest.skip('needs Triton 3.3', allow_module_level=True)

interpreted = pytest.mark.skipif(not INTERPRETED, reason='needs TRITON_INTERPRET=1')
EPS = 1e-5


@pytest.mark.skipif(INTERPRETED, reason='would start itself')
@pytest.mark.parametrize('names', ['convolutions', 'not convolutions'])
@pytest.mark.parametrize('chosen', ['not slow', slow('slow')])
def test_without_a_gpu(chosen, names, run_tool):
    command = ['-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', chosen]
    output = run_tool(
        sys.executable, *command, '-k', names, Path(__file__),
        env=dict(TRITON_INTERPRET='1'),
    ).stdout  # fmt: skip
    assert ' passed' in output and ' failed' not in output, output


# --- What a launch touches ---


class Launch(NamedTuple):
    """A launch, the bytes at the addresses of its loads and stores, and its products.

    Attributes:
        name (str): Name of the kernel.
        arguments (dict): Its arguments by name.
        reads (Counter): How many bytes are read, by the names of the pointers to the
            memory. Each byte counts once.
        writes (Counter): The same for writing.
        flops (list[int]): Operations of each product of tiles.
    """

    name: str
    arguments: Dict[str, Any]
    reads: Counter
    writes: Counter
    flops: List[int]


def tensors_of(value: Any) -> List[Tensor]:
    return [x for x in tree_flatten(value)[0] if isinstance(x, Tensor)]


def memory(x: Tensor) -> Tuple[int, int]:
    """Where the memory of a tensor begins and ends."""
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def name_memory(arguments: Dict[str, Any]) -> Dict[Tuple[int, int], str]:
    """Names of the pointers to each memory, such as 'x_ptr/added_ptr'."""
    names: Dict[Tuple[int, int], str] = {}
    for pointer, value in arguments.items():
        for where in dict.fromkeys(map(memory, tensors_of(value))):
            names[where] = f'{names[where]}/{pointer}' if where in names else pointer
    return names


def count_touched(touched, arguments) -> Counter:
    """Distinct bytes by the names of their memory. Others are not allowed."""
    found = Counter()
    for size, addresses in touched.items():
        addresses = np.unique(np.concatenate(addresses))
        outside = len(addresses)
        for (start, end), name in name_memory(arguments).items():
            number = int(((addresses >= start) & (addresses < end)).sum())
            found[name] += size * number
            outside -= number
        assert not outside, 'an address outside all tensors'
    return +found


@contextlib.contextmanager
def recorded():
    """Lists all launches within."""
    from triton.runtime import interpreter

    launches: List[Launch] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    dot, call = builder.create_dot, executor.__call__
    reads, writes, flops = defaultdict(list), defaultdict(list), []

    def note(touched, pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        touched[size].append(pointers.data[mask.data.astype(bool)])

    def noted_load(self, pointers, mask, *rest):
        note(reads, pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        note(writes, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def noted_dot(self, a, b, *rest):
        flops.append(2 * a.data.size * b.data.shape[-1])
        return dot(self, a, b, *rest)

    def refuse(*_, **__):
        raise AssertionError('atomics are not counted')

    def noted_call(self, *args, **kwargs):
        for found in (reads, writes, flops):
            found.clear()
        call(self, *args, **kwargs)
        given = dict(zip(self.arg_names, args), **kwargs)
        sides = (count_touched(touched, given) for touched in (reads, writes))
        launches.append(Launch(self.fn.__name__, given, *sides, list(flops)))

    with (
        mock.patch.multiple(
            builder,
            create_masked_load=noted_load,
            create_masked_store=noted_store,
            create_dot=noted_dot,
            create_atomic_rmw=refuse,
            create_atomic_cas=refuse,
        ),
        mock.patch.object(executor, '__call__', noted_call),
    ):
        yield launches


def check(launch: Launch) -> Moves:
    """Compare a launch with its statement, memory by memory."""
    stated = moves_of(launch.name, launch.arguments)
    names = name_memory(launch.arguments)
    for side in ('reads', 'writes'):
        wanted = Counter()
        for pointer, size in getattr(stated, side).items():
            first, *_ = tensors_of(launch.arguments[pointer])
            wanted[names[memory(first)]] += size
        assert getattr(launch, side) == wanted, f'{launch.name} {side}'
    # Tiles are padded to what a product needs.
    assert (stated.flops > 0) == bool(launch.flops), launch.name
    assert stated.flops <= sum(launch.flops), launch.name
    check_sizes(stated, launch.arguments)
    return stated


def check_sizes(stated: Moves, arguments: Dict[str, Any]) -> None:
    """No more is moved than the tensors have."""
    for numbers in (stated.reads, stated.writes):
        for pointer, size in numbers.items():
            tensors = tensors_of(arguments[pointer])
            assert 0 < size <= sum(x.numel() * x.element_size() for x in tensors)


# --- The kernels, in all their modes ---


def scales_of(x):
    return torch.linspace(0.5, 1.5, len(x))


def wide_map(x):
    """A map that is a part of another one, whose pixels are further apart."""
    return torch.randn(*x.shape[:-1], x.shape[-1] + 8).to(x)[..., 4:-4]


def run_convolutions(shape, dtype):
    from mlla_mm.ops.triton._depthwise_conv import (
        conv,
        conv_grad,
        conv_norm,
        gated_conv,
        gated_conv_grad,
        silu_conv_grad,
    )

    x, *weights = (t.detach() for t in conv_inputs(shape, dtype))
    single = torch.randn(shape)
    conv(x, *weights)
    conv(x, *weights, residual=True)
    conv(wide_map(x), *weights, residual=True, act=True)
    conv_norm(x, *weights, *torch.randn(2, shape[-1]), EPS, torch.float32)
    silu_conv_grad(wide_map(x), *weights, single)
    gated_conv(x, *weights, torch.randn_like(x), wide_map(x))
    for scale in (None, scales_of(x)):
        maps = (torch.randn_like(x), wide_map(x), single, wide_map(x))
        gated_conv_grad(x, *weights, *maps, scale)
    conv_grad(x, weights[0], single)
    conv_grad(x, weights[0], wide_map(x), residual=True)
    conv_grad(x, weights[0], wide_map(x), added=single, out=wide_map(x))


def run_attention(shape, dtype):
    from mlla_mm.ops.triton._mlla_attention import (
        linear_attention,
        linear_attention_grad,
    )

    qk, v, *_ = (t.detach() for t in attention_inputs(shape, dtype))
    for heads in (1, 2):
        y, states = linear_attention(wide_map(qk), v, heads)
        linear_attention_grad(qk, wide_map(v), y, states, torch.randn(shape), heads)


def run_norms(shape, dtype):
    from mlla_mm.ops.triton._layer_norm import (
        layer_norm,
        layer_norm_grad,
        layer_norm_residual_grad,
    )

    inputs = [t.detach() for t in norm_inputs(shape, dtype)]
    x, single = inputs[0], torch.randn(shape)
    layer_norm(*inputs, EPS, dtype)
    layer_norm(wide_map(x), *inputs[1:], EPS, torch.float32)
    layer_norm_grad(*inputs[:2], EPS, torch.randn_like(x))
    inputs[0] = wide_map(x)
    for scale in (None, scales_of(x)):
        layer_norm_residual_grad(*inputs, EPS, wide_map(x), single, scale)
    number, *sides, channels = shape
    inputs = batch_norm_inputs((number, channels, *sides), dtype)
    for act in (False, True):
        fused.batch_norm(*inputs, EPS, act)


def run_linear_layers(shape, dtype):
    from mlla_mm.ops.triton import _linear

    x = torch.randn(shape).to(dtype)
    rows, channels = x.view(-1, shape[-1]), shape[-1]
    hidden = 2 * channels
    weight = torch.randn(hidden, channels).to(dtype)
    bias = torch.randn(hidden).to(dtype)
    for keep in (False, True):
        activated, z = _linear.linear_gelu(rows, weight, bias, keep)
    fused.linear_relu(x, weight, bias.float())
    other = torch.randn(channels, hidden).to(dtype)
    for scale, residual in ((None, x), (scales_of(x), x.float())):
        _linear.linear_residual(activated, other, bias[:channels], residual, scale)
        _linear.gelu_linear_grad(rows, other, z, scale)


def run_norms_and_linear_layers(shape, dtype):
    from mlla_mm.ops.triton import _norm_linear

    x, *norm = (t.detach() for t in norm_inputs(shape, dtype))
    channels = shape[-1]
    if not _norm_linear.fits(channels, dtype):
        return
    hidden = 4 * channels
    layers = [torch.randn(hidden, channels), torch.randn(hidden)]
    layers += [torch.randn(channels, hidden), torch.randn(channels)]
    layers = [t.to(dtype) for t in layers]
    for given, scale in ((x, None), (x.float(), scales_of(x))):
        _norm_linear.norm_linear(given, *norm, EPS, *layers[:2])
        for keep in (False, True):
            _norm_linear.mlp(given, *norm, EPS, *layers, scale, keep)


def run_patch_merging(shape, dtype):
    from mlla_mm.ops.triton._merging import halve, halve_grad

    number, height, width, channels = shape
    wide = number, 2 * height, 2 * width, channels
    h, weight, bias = (t.detach() for t in conv_inputs(wide, dtype))
    y = halve(h, weight, bias)
    halve_grad(h, weight, y, wide_map(torch.randn(shape)))


def run_sums(shape, dtype):
    from mlla_mm.ops.triton._sums import add_up, column_sums

    x = wide_map(torch.randn(shape).to(dtype))
    sums, channels = column_sums(x.reshape(-1, shape[-1])), shape[-1]
    taps = torch.randn(3, 10, channels)
    likes = torch.empty(channels, 1, 3, 3), torch.empty(channels)
    add_up((sums, likes[1:]), (taps, likes))


def run_block(shape, dtype):
    """All kernels in their places, also those that this file does not name."""
    block = MLLABlock(shape[-1], 1)
    x = torch.randn(shape).requires_grad_()
    scales = scales_of(x), scales_of(x)
    parameters = block_parameters(block)
    with torch.autocast('cpu', dtype):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                y = fused.mlla_block(x, parameters, 1, (EPS, EPS), scales, True)
    y.sum().backward()


RUNS = [
    run_convolutions,
    run_attention,
    run_norms,
    run_linear_layers,
    run_norms_and_linear_layers,
    run_patch_merging,
    run_sums,
]
SMALL = (2, 2, 5, 12)


@interpreted
@pytest.mark.parametrize(
    'shape, dtype',
    [
        (SMALL, torch.float16),
        ((1, 1, 9, 72), torch.float16),  # two strips, two blocks of channels
        ((1, 7, 7, 32), torch.float16),
        slow((1, 16, 3, 4), torch.float16),  # several programs in an image
        slow(SMALL, torch.float32),
        slow((1, 17, 23, 12), torch.float32),
        slow((1, 14, 14, 96), torch.float16),
        slow((1, 56, 56, 8), torch.float16),
    ],
)
@pytest.mark.parametrize('run', RUNS)
def test_statements_say_what_is_touched(run, shape, dtype):
    with recorded() as launches:
        run(shape, dtype)
    for launch in launches:
        check(launch)


@interpreted
def test_each_pointer_of_each_kernel_is_compared():
    with recorded() as launches:
        for run in (*RUNS, run_block):
            run((1, 1, 1, 8), torch.float16)
    moved = defaultdict(set)
    for launch in launches:
        stated = check(launch)
        moved[launch.name].update(stated.reads, stated.writes)
    moved['_add_up_kernel'].remove('sums')  # a tuple of pointers
    assert moved == {
        name: {pointer for pointer in kernel.arg_names if pointer.endswith('_ptr')}
        for _, name, kernel in triton_kernels()
    }


@interpreted
def test_products_that_fill_their_tiles():
    with recorded() as launches:
        run_attention((1, 4, 8, 32), torch.float16)
        run_linear_layers((1, 8, 16, 32), torch.float16)
        run_norms_and_linear_layers((1, 8, 16, 32), torch.float16)
    found = [launch for launch in launches if launch.flops]
    assert len({launch.name for launch in found}) == 7
    for launch in found:
        assert check(launch).flops == sum(launch.flops), launch


@interpreted
@pytest.mark.parametrize(
    'side, pointer, numbers',
    [('reads', 'bias_ptr', 0), ('reads', 'x_ptr', 230), ('writes', 'y_ptr', 241)],
)
def test_wrong_statements_are_found(side, pointer, numbers):
    from mlla_mm.ops.triton._layer_norm import _layer_norm_moves

    def wrong(k):
        stated = _layer_norm_moves(k)
        return stated._replace(**{side: {**getattr(stated, side), pointer: numbers}})

    x, weight, bias = norm_inputs(SMALL)
    with recorded() as launches, torch.no_grad():
        fused.layer_norm(x, weight, bias, EPS)
    (launch,) = launches
    check(launch)
    with mock.patch.dict(_moves._STATEMENTS, _layer_norm_kernel=wrong):
        with pytest.raises(AssertionError, match='_layer_norm_kernel'):
            check(launch)


# --- The launches of whole models ---


@pytest.mark.skipif(INTERPRETED or not AVAILABLE, reason='needs a pretended GPU')
@pytest.mark.parametrize('shape', [(128, 3, 224, 224), (2, 3, 800, 1280)])
def test_no_launch_of_a_model_moves_more_than_its_tensors(shape, monkeypatch):
    launched = set()

    def check_launch(name, arguments):
        launched.add(name)
        check_sizes(moves_of(name, arguments), arguments)

    monkeypatch.setenv('MLLA_OPS', 'fused')
    arch = dict(embed_dims=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    with pretended_cuda(check_launch):
        with torch.device('cuda'):
            model, images = MLLA(arch, drop_path_rate=0.2), torch.empty(shape)
        with torch.autocast('cuda', torch.bfloat16):
            with torch.no_grad():
                model.eval()(images)
            outputs = model.train()(images)
        backward(outputs, [torch.ones_like(output) for output in outputs])
    assert launched == {name for _, name, _ in triton_kernels()}


def test_a_kernel_without_a_statement():
    with pytest.raises(ValueError, match='_other_kernel does not state what it moves'):
        moves_of('_other_kernel', {})
