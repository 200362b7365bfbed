# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch
from torch import nn

from mlla_mm.compat import pytorch
from mlla_mm.compat.pytorch import (
    convolutions_use_tf32,
    parts_and_tensors,
    products_use_tf32,
    without_tf32,
)

NEW = hasattr(torch.backends, 'fp32_precision')
needs_new = pytest.mark.skipif(not NEW, reason='PyTorch 2.9 has the setting')


@pytest.fixture(autouse=True)
def defaults(monkeypatch):
    """PyTorch's defaults, before and after each test."""
    monkeypatch.setattr(pytorch, '_TF32_IS_FORBIDDEN', False)

    def reset():
        if NEW:
            torch.backends.fp32_precision = 'none'
            torch.backends.cudnn.fp32_precision = 'none'
        torch.set_float32_matmul_precision('highest')
        torch.backends.cudnn.allow_tf32 = True
        if NEW:
            torch.backends.cuda.matmul.fp32_precision = 'none'
            torch.backends.mkldnn.matmul.fp32_precision = 'none'

    reset()
    yield
    reset()


def change(*statements):
    for statement in statements:
        exec(statement, dict(torch=torch, backends=torch.backends))


def test_defaults():
    assert not products_use_tf32() and convolutions_use_tf32()


@pytest.mark.parametrize(
    'statement, products, convolutions',
    [
        ('backends.cuda.matmul.allow_tf32 = True', True, True),
        ("torch.set_float32_matmul_precision('high')", True, True),
        ("torch.set_float32_matmul_precision('medium')", True, True),
        ('backends.cudnn.allow_tf32 = False', False, False),
    ],
)
def test_older_flags(statement, products, convolutions):
    change(statement)
    assert products_use_tf32() == products
    assert convolutions_use_tf32() == convolutions


@needs_new
@pytest.mark.parametrize(
    'statements, products, convolutions',
    [
        (["backends.fp32_precision = 'tf32'"], True, True),
        (["backends.cuda.matmul.fp32_precision = 'tf32'"], True, True),
        (["backends.cudnn.conv.fp32_precision = 'ieee'"], False, False),
        # The last one to set the precision of an operation decides.
        (
            [
                "backends.cuda.matmul.fp32_precision = 'tf32'",
                'backends.cuda.matmul.allow_tf32 = False',
            ],
            *(False, True),
        ),
        (
            [
                'backends.cuda.matmul.allow_tf32 = True',
                'backends.cudnn.allow_tf32 = False',
                "backends.cuda.matmul.fp32_precision = 'ieee'",
                "backends.cudnn.conv.fp32_precision = 'tf32'",
            ],
            *(False, True),
        ),
        # One operation's own precision before that of all operations.
        (
            [
                "backends.fp32_precision = 'tf32'",
                "backends.cuda.matmul.fp32_precision = 'ieee'",
                "backends.cudnn.conv.fp32_precision = 'ieee'",
            ],
            *(False, False),
        ),
    ],
)
def test_precisions_and_mixtures(statements, products, convolutions):
    change(*statements)
    assert products_use_tf32() == products
    assert convolutions_use_tf32() == convolutions


@pytest.mark.parametrize('value, expected', [('0', False), ('1', True)])
def test_variable_of_nvidia(value, expected, run_tool):
    code = (
        'from mlla_mm.compat.pytorch import *\n'
        'torch.backends.cuda.matmul.allow_tf32 = True\n'
        'print(products_use_tf32(), convolutions_use_tf32())'
    )
    found = run_tool('python', '-c', code, env=dict(NVIDIA_TF32_OVERRIDE=value))
    assert found.stdout.splitlines()[-1] == f'{expected} {expected}'


def test_variable_of_pytorch(run_tool):
    code = 'from mlla_mm.compat.pytorch import *\nprint(products_use_tf32())'
    for value in '01':
        env = dict(TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=value)
        found = run_tool('python', '-c', code, env=env).stdout
        assert found.splitlines()[-1] == str(value == '1')


@pytest.mark.parametrize(
    'statements',
    [
        [],
        ['backends.cuda.matmul.allow_tf32 = True', 'backends.cudnn.allow_tf32 = False'],
        ["torch.set_float32_matmul_precision('medium')"],
    ],
)
def test_without_tf32_restores_older_flags(statements):
    def flags():
        return (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
        )

    change(*statements)
    before = flags()
    with pytest.raises(KeyError), without_tf32():
        assert not products_use_tf32() and not convolutions_use_tf32()
        raise KeyError
    assert flags() == before


@needs_new
@pytest.mark.parametrize(
    'statements',
    [
        ["backends.fp32_precision = 'tf32'"],
        [
            "backends.cuda.matmul.fp32_precision = 'tf32'",
            "backends.cudnn.conv.fp32_precision = 'ieee'",
        ],
        [
            'backends.cuda.matmul.allow_tf32 = True',
            "backends.cuda.matmul.fp32_precision = 'ieee'",
        ],
    ],
)
def test_without_tf32_restores_precisions(statements):
    def precisions():
        backends = torch.backends
        owners = backends, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
        return [owner.fp32_precision for owner in owners]

    change(*statements)
    before = precisions()
    with without_tf32():
        assert not products_use_tf32() and not convolutions_use_tf32()
    assert precisions() == before


def test_parts_and_tensors():
    module = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), None)
    module.append(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)))
    parts, tensors = parts_and_tensors(module)
    assert parts[0] is module
    assert {*parts} == {*module.modules()} and len(parts) == 6
    assert {*tensors} == {*module.parameters(), *module.buffers()}
    assert len(tensors) == 11
