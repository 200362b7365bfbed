# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What Triton's compiler makes of the kernels that MLLA launches. It needs no GPU.

Models run on a pretended GPU. Triton turns each launch into the binary that it would
run there, and NVIDIA's tool says what the binary takes of a multiprocessor.
"""

import re
import subprocess
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, NamedTuple
from unittest import mock

import pytest
import torch

from mlla_mm.compat.pytorch import without_tf32
from mlla_mm.models import MLLA
from mlla_mm.models.layers import MLLABlock
from mlla_mm.ops import triton as fused

if not fused._has_triton():  # nor a PyTorch as new as the pretended device needs
    pytest.skip('needs Triton 3.3', allow_module_level=True)

from triton.backends import nvidia
from triton.backends.compiler import GPUTarget

from benchmarks.pretended_cuda import backward, pretended_cuda, triton_kernels
from mlla_mm.ops.triton import _mlla_attention

CUOBJDUMP = Path(nvidia.__file__).parent / 'bin' / 'cuobjdump'
# KiB of shared memory that a program can have, by ten times the compute capability: see
# the CUDA C++ programming guide. Others than the A100's and H100's are of RTX cards.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227}
# Of a thread. The first kernel has a warp that holds 8 numbers of each of ten sums, the
# others hold matrices, which float32 makes large.
REGISTERS = dict(
    _conv_grad_kernel=255,
    _query_grad_kernel=240,
    _key_value_grad_kernel=255,
    _mlp_kernel=255,
)
# Bytes that a thread may spill: a number that LayerNorm's gradient needs only behind
# its loop, with padding.
SPILLED = dict(_layer_norm_grad_kernel=8)
NANO = dict(embed_dims=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
SHAPES = [(128, 3, 224, 224), (2, 3, 800, 1280)]


@dataclass(frozen=True)
class Pointer:
    """What Triton asks of a tensor. New memory has addresses that 16 divides."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple

    def compile(self) -> Any:
        return self.kernel.run(grid=(1,), warmup=True, **dict(self.arguments))


def described(value):
    if isinstance(value, torch.Tensor):
        offset = value.storage_offset() * value.element_size()
        return Pointer(value.dtype, offset % 16)
    return tuple(map(described, value)) if isinstance(value, tuple) else value


def launches(
    arch, mode, dtype, shape=SHAPES[0], readable=True, ops='fused'
) -> List[Launch]:
    """The different launches of a call of a model, in training with a backward pass.

    A block that is not readable runs as single layers. ``ops`` is what ``MLLA_OPS``
    says: with 'fused' layers are merged that are not by default.
    """
    found, training = {}, mode == 'train'
    kernels = {name: kernel for _, name, kernel in triton_kernels()}

    def record(name, arguments):
        given = tuple((key, described(value)) for key, value in arguments.items())
        found[Launch(kernels[name], given)] = None

    with (
        mock.patch.dict('os.environ', MLLA_OPS=ops),
        pretended_cuda(on_launch=record),
    ):
        with torch.device('cuda'):
            model = MLLA(arch, drop_path_rate=0.2).train(training)
            images = torch.empty(shape)
        if not readable:
            for block in model.modules():
                if isinstance(block, MLLABlock):
                    block.mlp.register_forward_hook(lambda *_: None)
        half = dtype != torch.float32
        with (
            torch.set_grad_enabled(training),
            torch.autocast('cuda', dtype if half else None, enabled=half),
        ):
            outputs = model(images)
        if training:
            backward(outputs, [torch.ones_like(output) for output in outputs])
    return list(found)


@pytest.fixture(scope='module', autouse=True)
def empty_cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('triton'))
    with mock.patch.dict('os.environ', TRITON_CACHE_DIR=folder):
        yield


@pytest.fixture
def capability(request):
    """Triton's kernels are compiled for GPUs of this compute capability."""
    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget('cuda', request.param, 32),
        get_current_device=lambda: f'pretended {request.param}',
        get_current_stream=lambda device: 0,
    )
    with mock.patch('triton.runtime.jit.driver', SimpleNamespace(active=gpu)):
        yield request.param


def check(found, capability, folder):
    """Compile launches, and compare what they take with the bounds."""
    compiled = {}
    for launch in found:
        binary = launch.compile()
        compiled[binary.hash] = launch, binary
    assert compiled
    for launch, binary in compiled.values():
        name, options = launch.kernel.__name__, launch.arguments
        registers, spilled = read_resources(binary.asm['cubin'], folder / 'cubin')
        shared = binary.metadata.shared
        print(name, capability, registers, spilled, shared, options)
        assert spilled <= SPILLED.get(name, 0), launch
        assert shared <= SHARED_MEMORY[capability] * 1024, launch
        assert registers <= REGISTERS.get(name, 200), launch


def read_resources(cubin, path):
    """Registers of a thread, and bytes of local memory, where it spills registers."""
    path.write_bytes(cubin)
    command = [CUOBJDUMP, '--dump-resource-usage', path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers, stack, local) = re.search(
        r' REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+) ', text
    ).groups()
    return int(registers), int(stack) + int(local)


def test_models_launch_every_kernel():
    found = [
        launches(NANO, mode, torch.bfloat16, ops=ops)
        for mode, ops in product(('infer', 'train'), ('', 'fused'))
    ]
    launched = {launch.kernel for one in found for launch in one}
    assert launched == {kernel for _, _, kernel in triton_kernels()}


@pytest.mark.parametrize(
    'mode, dtype, capability',
    [('train', torch.bfloat16, 80), ('infer', torch.float16, 90)],
    indirect=['capability'],
)
def test_one_launch_of_each_kernel(mode, dtype, capability, tmp_path):
    """The last one of each kernel, and of each step that a kernel can end with."""
    found = {}
    for ops in ('', 'fused'):
        for launch in launches('t', mode, dtype, ops=ops):
            found[launch.kernel, dict(launch.arguments).get('MODE')] = launch
    check(found.values(), capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('capability', SHARED_MEMORY, indirect=True)
@pytest.mark.parametrize('arch', 'tsb')
@pytest.mark.parametrize('precision', ['float32', 'tf32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('mode', ['infer', 'train'])
def test_all_launches(mode, precision, arch, capability, tmp_path, monkeypatch):
    """Of all sizes, and of blocks that are not readable."""
    uses_tf32 = precision == 'tf32'
    monkeypatch.setattr(_mlla_attention, 'products_use_tf32', lambda: uses_tf32)
    dtype = torch.float32 if uses_tf32 else getattr(torch, precision)
    for shape, variant in product(SHAPES, [(True, ''), (True, 'fused'), (False, '')]):
        found = launches(arch, mode, dtype, shape, *variant)
        check(found, capability, tmp_path)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_precision_of_products_of_attention(dtype):
    def precisions():
        found = [dict(launch.arguments) for launch in launches(NANO, 'train', dtype)]
        return {given['PRECISION'] for given in found if 'PRECISION' in given}

    with without_tf32():
        # Of bfloat16 factors nothing is rounded away.
        assert precisions() == {'ieee' if dtype == torch.float32 else 'tf32'}
        if hasattr(torch.backends, 'fp32_precision'):
            torch.backends.cuda.matmul.fp32_precision = 'tf32'
        else:
            torch.backends.cuda.matmul.allow_tf32 = True
        assert precisions() == {'tf32'}
