# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain_mlla import PlainMLLA
from benchmarks.pretended_cuda import AVAILABLE
from mlla_mm.models import MLLA
from mlla_mm.models.layers import MLLABlock
from mlla_mm.ops import triton

if not (AVAILABLE and triton._has_triton()):
    pytest.skip('needs a pretended GPU and Triton 3.3', allow_module_level=True)

from benchmarks import roofline
from benchmarks.roofline import GPU, Case, Kernel

from .test_pretended_cuda import state

ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2))
slow = partial(pytest.param, marks=pytest.mark.slow)
SHAPE = (64, 96)


def build_nano(name, classify=False):
    return (PlainMLLA if name.startswith('plain') else MLLA)(ARCH)


@pytest.fixture
def nano(monkeypatch):
    """Models of four blocks in the place of the named ones."""
    monkeypatch.setattr(roofline.models, 'build_model', build_nano)


def count(prepare, dtype='float32', ops='fused'):
    """Kernels of the second call of what is prepared, without gradients."""
    with roofline.counted(ops) as counter:
        with torch.device('cuda'):
            call = prepare()
        autocast = dict(dtype=getattr(torch, dtype), enabled=dtype != 'float32')
        with torch.no_grad():
            call()
            with counter, torch.autocast('cuda', **autocast):
                call()
    return counter.kernels


def linear_and_residual():
    layer, x, y = nn.Linear(64, 32), torch.ones(8, 64), torch.ones(8, 32)
    return lambda: y + layer(x)


def test_linear_layer_and_residual_in_float32():
    single = torch.float32
    assert count(linear_and_residual) == [
        Kernel(
            'forward',
            'addmm',
            4 * (8 * 64 + 64 * 32 + 32 + 8 * 32),
            2 * 8 * 64 * 32,
            single,
        ),
        Kernel('forward', 'add', 4 * 3 * 8 * 32, 0, single),
    ]


def test_linear_layer_and_residual_in_half_precision():
    *casts, product, add = count(linear_and_residual, 'bfloat16')
    # From four bytes to two, each a kernel.
    assert {kernel.name for kernel in casts} == {'_to_copy'}
    assert sorted(kernel.bytes for kernel in casts) == [
        (4 + 2) * numbers for numbers in (32, 8 * 64, 64 * 32)
    ]
    numbers = 8 * 64 + 64 * 32 + 32 + 8 * 32
    assert product == ('forward', 'addmm', 2 * numbers, 2 * 8 * 64 * 32, torch.bfloat16)
    assert (add.name, add.bytes) == ('add', (4 + 2 + 4) * 8 * 32)


@pytest.mark.parametrize(
    'op, size',
    [
        (lambda x: x + x, 4 * 2 * 60),
        (lambda x: F.relu_(x), 4 * 2 * 60),  # read and written
        (lambda x: x + x[:, :1].expand_as(x), 4 * (2 * 60 + 10)),
        (lambda x: x.half(), (4 + 2) * 60),
        (lambda x: torch.zeros_like(x), 4 * 60),
        (lambda x: x.zero_(), 4 * 60),
        (lambda x: x[:, :3].copy_(x[:, 3:]), 4 * 60),
        (lambda x: torch._foreach_copy_([x[0], x[1]], [x[2], x[3]]), 4 * 24),
        (lambda x: x.t().contiguous(), 4 * 2 * 60),
        (lambda x: x.view(2, 5, 6).transpose(0, 1)[..., 2:].detach(), None),
        (lambda x: torch.empty_like(x), None),
        (lambda x: torch.zeros(9, device='cpu').exp(), None),
    ],
)
def test_bytes_of_operators(op, size):
    def prepare():
        x = torch.ones(10, 6)
        return lambda: op(x)

    kernels = count(prepare)
    assert [kernel.bytes for kernel in kernels] == ([] if size is None else [size])


def test_a_kernel_takes_what_takes_longest():
    gpu = GPU(bandwidth=1e12, half=4e12, single=2e12, launch=1e-6)
    kernels = [
        Kernel('forward', 'a', 5_000_000, 0, torch.float32),
        Kernel('forward', 'b', 5_000_000, 12_000_000, torch.float32),
        Kernel('backward', 'b', 1_000_000, 12_000_000, torch.bfloat16),
        Kernel('backward', 'b', 10, 10, torch.float16),
    ]
    times = [gpu.seconds(kernel) * 1e6 for kernel in kernels]
    assert times == pytest.approx([5, 6, 3, 1])
    total = roofline.add_up(kernels, gpu)
    assert total == (4, 11_000_010, 24_000_010, pytest.approx(15e-6))
    parts = roofline.add_up_by_name(kernels, gpu)
    assert list(parts) == [('forward', 'b'), ('forward', 'a'), ('backward', 'b')]
    assert parts['backward', 'b'].launches == 2


def test_the_block_that_runs_by_default():
    """Its launches, and bytes and products of some, by their definition."""
    images, height, width, channels = 2, 8, 12, 64
    tokens = images * height * width

    def prepare():
        block = MLLABlock(channels, 2).eval()
        x = torch.ones(images, height, width, channels)
        return lambda: block(x)

    kernels = count(prepare, 'bfloat16', 'default')
    assert Counter(kernel.name for kernel in kernels) == dict(
        _foreach_copy_=1,  # weights to half precision
        _conv_kernel=4,  # CPE1, DWC, LePE with the gate, CPE2
        _layer_norm_kernel=2,
        addmm=2,  # both input projections in one; queries and keys
        _state_kernel=1,
        _output_kernel=1,
        _linear_kernel=3,  # output projection, both layers of the MLP
    )
    convs = [kernel for kernel in kernels if kernel.name == '_conv_kernel']
    map_, taps = tokens * channels, 4 * 10 * channels
    assert [kernel.bytes for kernel in convs] == [
        (4 + 4) * map_ + taps,
        (2 + 2) * map_ + taps,
        (2 + 2 + 2 + 2) * map_ + taps,
        (4 + 4) * map_ + taps,
    ]
    _, fc1, fc2 = (kernel for kernel in kernels if kernel.name == '_linear_kernel')
    weight, hidden = 4 * channels**2, 4 * tokens * channels
    assert fc1.bytes == 2 * (map_ + weight + 4 * channels + hidden)
    assert fc2.bytes == 2 * (hidden + weight + channels) + (4 + 4) * map_
    assert fc1.flops == fc2.flops == 2 * tokens * weight
    assert fc1.dtype == torch.bfloat16
    state, output = (
        next(kernel for kernel in kernels if kernel.name == name)
        for name in ('_state_kernel', '_output_kernel')
    )
    # The state of a head of 32 channels is a matrix and a vector, by two programs an
    # image at most. Both tables have 12 positions and 16 frequencies.
    states = 4 * images * 2 * 33 * 32
    tables = 2 * 4 * 12 * 16
    # Keys and values; queries and the output.
    assert (state.bytes - 2 * 2 * map_ - tables) % states == 0
    assert output.bytes == state.bytes
    assert state.flops == output.flops == 2 * map_ * 32


@pytest.mark.parametrize(
    'channels, heads, others',
    [
        (64, 2, dict(addmm=1, _linear_kernel=1, _norm_linear_kernel=1, _mlp_kernel=1)),
        (256, 8, dict(addmm=2, _linear_kernel=3)),
    ],
)
def test_a_fused_block(channels, heads, others):
    """LayerNorm is a part of the linear layers behind it, or of the convolution."""

    def prepare():
        block, x = MLLABlock(channels, heads).eval(), torch.ones(2, 8, 12, channels)
        return lambda: block(x)

    names = Counter(kernel.name for kernel in count(prepare, 'bfloat16'))
    assert names == dict(
        _foreach_copy_=1, _conv_kernel=4, _state_kernel=1, _output_kernel=1, **others
    )


@pytest.mark.parametrize('mode', ['infer', 'train'])
def test_products_are_those_of_pytorch_s_counter(nano, mode):
    kernels = roofline.count_model('mlla-t', Case('backbone', SHAPE, 2, mode), 'plain')
    found = Counter()
    for kernel in kernels:
        found[kernel.name.split()[0]] += kernel.flops
    found = +found
    model = build_nano('plain-t').train(mode == 'train')
    with FlopCounterMode(display=False) as counter:
        outputs = model(torch.randn(2, 3, *SHAPE))
        if mode == 'train':
            sum(output.sum() for output in outputs).backward()
    counts = counter.get_flop_counts()['Global']
    wanted = {str(op).split('.')[-1]: flops for op, flops in counts.items()}
    if mode == 'train':
        # PyTorch's takes the gradients of depthwise weights for those of full ones.
        del wanted['convolution_backward']
        first = next(k for k in kernels if k.name.startswith('convolution'))
        # Images get none.
        backward = 2 * found['convolution'] - first.flops
        assert found.pop('convolution_backward') == backward
    assert found == wanted


def test_fused_kernels_save_traffic(nano):
    def add_up(ops):
        # Maps so large that launches do not matter.
        case = Case('backbone', (128, 128), 64, 'train', 'bfloat16')
        kernels = roofline.count_model('mlla-t', case, ops)
        assert {kernel.stage for kernel in kernels} == {'forward', 'backward'}
        return roofline.add_up(kernels, GPU())

    fused, plain = add_up('fused'), add_up('plain')
    assert fused.bytes < plain.bytes
    assert fused.seconds < plain.seconds
    assert fused.launches < plain.launches


@pytest.mark.parametrize(
    'ops, mode, milliseconds, launches',
    [
        ('fused', 'infer', 5.8, 225),
        slow('fused', 'train', 22, 725),
        slow('default', 'infer', 7, 315),
        slow('default', 'train', 24.5, 825),
        # The plain assembly: 21.7 and 58.6.
        slow('eager', 'infer', 16, 725),
        slow('eager', 'train', 50, 2625),
    ],
)
def test_nothing_is_lost_again(ops, mode, milliseconds, launches):
    """The figures of docs/benchmarks.md for MLLA-T, with little to spare."""
    case = Case('classification', (224, 224), 128, mode, 'bfloat16')
    kernels = roofline.count_model('mlla-t', case, ops, mode == 'infer')
    total = roofline.add_up(kernels, GPU())
    assert total.seconds * 1e3 <= milliseconds
    assert total.launches <= launches


def test_convolutions_leave_maps_channels_last(nano):
    """BatchNorm and the blocks find them as they need them."""
    case = Case('backbone', SHAPE, 2, dtype='bfloat16')
    names = [kernel.name for kernel in roofline.count_model('mlla-t', case)]
    # The images, and the outputs of four stages.
    assert names.count('clone') == 1 + 4


def test_all_is_restored(nano):
    before = state()
    roofline.count_model('mlla-t', Case('backbone', SHAPE, 1))
    assert state() == before


def test_without_triton_there_is_no_fused_count(nano, monkeypatch):
    monkeypatch.setattr(triton, '_has_triton', lambda: False)
    with pytest.raises(ValueError, match='need an NVIDIA GPU .* and Triton 3.3'):
        roofline.count_model('mlla-t', Case('backbone', SHAPE, 1))


@pytest.mark.parametrize('ops', ['plain', 'fused'])
def test_batch_norm_in_the_convolutions(nano, ops):
    """Nothing of it is left, and no more is added than biases."""
    case = Case('backbone', SHAPE, 2, dtype='bfloat16')
    before, after = (
        Counter(k.name for k in roofline.count_model('mlla-t', case, ops, fuses))
        for fuses in (False, True)
    )
    assert {name for name in before - after if 'norm' in name} == {
        'native_batch_norm' if ops == 'plain' else '_batch_norm_kernel'
    }
    assert not [name for name in after if 'batch_norm' in name]


def test_default_ops_are_what_runs_without_the_variable(nano, monkeypatch):
    case = Case('backbone', SHAPE, 2, dtype='bfloat16')
    monkeypatch.setenv('MLLA_OPS', 'naive')
    names = {kernel.name for kernel in roofline.count_model('mlla-t', case, 'default')}
    assert '_state_kernel' in names


def test_a_kernel_without_a_statement_is_not_counted():
    with roofline.counted() as counter, torch.device('cuda'):
        with pytest.raises(ValueError, match='_new_kernel does not state'):
            counter.add_launch('_new_kernel', dict(x_ptr=torch.ones(3)))


def test_command_line(tmp_path, capsys):
    out = tmp_path / 'roofline.json'
    arguments = ['mlla-t', '--batch-size', '2', '--bandwidth', '3.8', '--tflops', '500']
    roofline.main([*arguments, '--operators', '--json', str(out)])
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(out.read_text())
    assert found['gpu'] == dict(
        bandwidth=3.8e12, half=5e14, single=4.5e13, launch=pytest.approx(2.2e-6)
    )
    (count,) = found['counts']
    total, operators = count['total'], count['operators']
    for key in total:
        assert total[key] == pytest.approx(sum(part[key] for part in operators))
    assert printed[0] == (
        'mlla-t, fused: classification 224x224, batch 2, infer, bfloat16: '
        f'{total["launches"]} launches, {total["bytes"] / 1e9:.1f} GB, '
        f'{total["flops"] / 1e12:.2f} TFLOP, {total["seconds"] * 1e3:.2f} ms'
    )
    # One for each block.
    (state,) = (part for part in operators if part['name'] == '_state_kernel')
    assert state['launches'] == 18
    # A table with a row for each operator, and one with a row for the model. Above are
    # the titles and a rule.
    tables = [line for line in printed if line.startswith('|')]
    assert len(tables) == 2 + len(operators) + 2 + 1
    assert [cell.strip() for cell in tables[-1].split('|')] == [
        '',
        'mlla-t',
        'classification 224x224, batch 2, infer, bfloat16',
        f'{total["seconds"] * 1e3:.2f} ({total["launches"]})',
        '',
    ]


def test_many_counts_in_a_table(monkeypatch, tmp_path, capsys):
    counted = []

    def count_model(*arguments):
        counted.append(arguments)
        return [Kernel('forward', 'a', len(counted) * 10**9, 0, torch.float32)]

    monkeypatch.setattr(roofline, 'count_model', count_model)
    out = tmp_path / 'roofline.json'
    roofline.main(
        ['mlla-t', 'mlla-s', '--ops', 'plain', 'eager', '--shape', '64x96', '96x96']
        + ['--batch-size', '2', '4', '--mode', 'infer', 'train', '--dtype', 'float32']
        + ['--bandwidth', '1', '--fuse-conv-bn', '--json', str(out)]
    )
    infer = Case('backbone', (64, 96), 2, 'infer', 'float32')
    larger = infer._replace(shape=(96, 96), batch_size=4)
    train = dict(mode='train')
    of_all = [infer, infer._replace(**train), larger, larger._replace(**train)]
    assert counted == [
        (name, case, ops, case.mode == 'infer')
        for name in ('mlla-t', 'mlla-s')
        for case in of_all
        for ops in ('plain', 'eager')
    ]
    lines = capsys.readouterr().out.splitlines()
    lines = [line.split('|')[1:-1] for line in lines if line.startswith('|')]
    titles, _, *rows = ([cell.strip() for cell in line] for line in lines)
    assert titles == ['Model', 'Case', 'plain', 'eager']
    assert len(rows) == 8
    folded = 'backbone 64x96, batch 2, infer, float32, after fuse_conv_bn'
    assert rows[0] == ['mlla-t', folded, '1.00 (1)', '2.00 (1)']
    assert rows[-1] == ['mlla-s', str(of_all[-1]), '15.00 (1)', '16.00 (1)']
    counts = json.loads(out.read_text())['counts']
    assert [(c['model'], c['mode'], c['ops'], c['fuse_conv_bn']) for c in counts] == [
        (name, case.mode, ops, fuses) for name, case, ops, fuses in counted
    ]


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['swin-t'], 'invalid choice'),
        (['mlla-t', '--shape', '224'], '--shape takes'),
        (['mlla-t', '--batch-size', '0'], '--batch-size takes'),
        (['mlla-t', '--mode', 'train', '--fuse-conv-bn'], 'is for inference'),
        (['mlla-t', '--bandwidth', '0'], '--bandwidth and --tflops take'),
        (['mlla-t', '--launch', '-1'], 'no less than 0'),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        roofline.main(arguments)
    assert message in capsys.readouterr().err
