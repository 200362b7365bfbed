# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The pretended CUDA device. Models on it: tests/test_models/test_on_cuda.py."""

import copy
import os
import re
from collections import Counter
from importlib import import_module

import mmengine
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks import pretended_cuda as module
from benchmarks.pretended_cuda import backward, pretended_cuda, triton_kernels
from mlla_mm.models import MLLA
from mlla_mm.ops import rotary, triton

from ..pretended import needs_pretended_cuda, needs_triton

ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2))
LONG = dict(dtype=torch.long, device='cuda')


# Where tensors are.


@needs_pretended_cuda
def test_tensors_have_a_device():
    with pretended_cuda():
        x = torch.ones(2, 3, device='cuda')
        assert x.device == torch.device('cuda:0')
        assert (x @ x.t()).is_cuda
        assert x.cpu().device == torch.ones(1).device == torch.device('cpu')


class OnTheWrongDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.cpu()


@needs_pretended_cuda
@pytest.mark.parametrize(
    'mix',
    [
        lambda x, y: x + y,
        lambda x, y: F.linear(x, y),
        lambda x, y: F.conv2d(x[None, None], y[None, None]),
        lambda x, y: F.conv2d(y[None, None], x[None, None]),
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.stack([x[0, 0], y[0, 0]]),
        lambda x, y: torch._foreach_add_([x], [y]),
        lambda x, y: y[torch.zeros(2, **LONG)],
        lambda x, y: y.index_put_([torch.zeros(2, **LONG)], y[:2]),
        lambda x, y: x.masked_select(y > 0),
        lambda x, y: x.index_add(0, torch.zeros(4, dtype=torch.long), x),
        lambda x, y: torchvision.ops.nms(x[:, :4], y[:, 0], 0.5),
        lambda x, y: torchvision.ops.nms(y[:, :4], x[:, 0], 0.5),
    ],
)
def test_devices_are_not_mixed(mix):
    with pretended_cuda():
        with pytest.raises(RuntimeError, match='cuda.*cpu|cpu.*cuda'):
            mix(torch.ones(4, 8, device='cuda'), torch.ones(4, 8))


@needs_pretended_cuda
def test_real_tensors_are_on_the_cpu():
    real = torch.ones(4)
    with pretended_cuda():
        assert (torch.ones(4, device='cuda') + real.to('cuda')).is_cuda
        with pytest.raises(RuntimeError, match='cuda.*cpu'):
            torch.ones(4, device='cuda') + real
        # A number may come from the CPU.
        assert (torch.ones(4, device='cuda') + torch.tensor(2.0)).is_cuda
    assert real.tolist() == [1.0] * 4


@needs_pretended_cuda
def test_gradients_are_not_mixed():
    with pretended_cuda():
        x = torch.ones(4, device='cuda', requires_grad=True)
        with pytest.raises(RuntimeError, match='on cuda:0, got one on cpu'):
            OnTheWrongDevice.apply(x).sum().backward()


@needs_pretended_cuda
@needs_triton
def test_triton_kernels_take_tensors_of_the_device(monkeypatch):
    launches = []
    monkeypatch.setenv('MLLA_OPS', 'fused')
    with pretended_cuda(lambda name, arguments: launches.append((name, arguments))):
        x, weight = torch.ones(4, 8, device='cuda'), torch.ones(8, device='cuda')
        y = triton.layer_norm(x, weight, weight, 1e-6)
        assert (y.shape, y.device) == (x.shape, x.device)
        with pytest.raises(RuntimeError, match='_layer_norm_kernel .* on cpu, cuda:0'):
            triton.layer_norm(x, torch.ones(8), weight, 1e-6)
    ((name, arguments),) = launches
    assert name == '_layer_norm_kernel'
    assert {x.dtype for x in arguments.values() if isinstance(x, Tensor)} == {x.dtype}


# Layouts and gradients.


@needs_pretended_cuda
@pytest.mark.parametrize('layout', [torch.channels_last, torch.contiguous_format])
def test_layouts_of_convolutions(layout):
    with pretended_cuda(), torch.device('cuda'):
        x = torch.ones(2, 4, 6, 8).to(memory_format=layout).requires_grad_()
        weight = torch.ones(8, 4, 3, 3, requires_grad=True)
        y = F.conv2d(x, weight, padding=1)
        backward([y], [torch.ones_like(y)])
        assert all(t.is_contiguous(memory_format=layout) for t in (y, x.grad))
        # As the parameter, whatever the convolution gives.
        assert weight.grad.is_contiguous()


@needs_pretended_cuda
@pytest.mark.parametrize('with_cp', [False, True])
def test_gradients_are_those_of_pytorch_s_engine(with_cp):
    model = MLLA(ARCH, with_cp=with_cp)
    outputs = model(torch.randn(2, 3, 64, 96))
    grads = [torch.randn_like(output) for output in outputs]
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(outputs, parameters, grads, retain_graph=True)
    for times in (1, 2):  # the second pass adds
        backward(outputs, grads)
        for parameter, grad in zip(parameters, wanted):
            torch.testing.assert_close(parameter.grad, times * grad)


@needs_pretended_cuda
def test_a_checkpoint_recomputes_once_in_each_pass():
    calls = []

    def block(x):
        calls.append(x)
        return x.sin().cos().exp()

    x = torch.randn(3, requires_grad=True)
    y = checkpoint(block, x, use_reentrant=False)
    for passes in (1, 2):
        backward([y], [torch.ones_like(y)])
        assert len(calls) == 1 + passes


# What waits for the device.


def x():
    return torch.ones(4, 6, device='cuda')


def mask():
    return x() > 0


def on_cpu(*shape, pinned=False):
    y = torch.ones(*shape)
    return y.pin_memory() if pinned else y


WAITS = [
    ('item', lambda: x().sum().item(), 0.0),
    ('item', lambda: bool(mask().any()), True),
    ('item', lambda: int(torch.ones((), **LONG)), 1),
    ('copy to cpu', lambda: x().tolist(), [[0.0] * 6] * 4),
    ('nonzero', lambda: mask().nonzero(), (12, 2)),
    ('nonzero', lambda: torch.where(mask())[1], (12,)),
    ('masked_select', lambda: x().masked_select(mask()[0]), (12,)),
    ('unique', lambda: x().unique(), (12,)),
    ('unique', lambda: x().unique(return_inverse=True)[1], (4, 6)),
    ('index by mask', lambda: x()[mask()], (12,)),
    ('index by mask', lambda: x()[mask()[:, 0]], (2, 6)),
    ('index by mask', lambda: x()[:, mask()[0]], (4, 3)),
    ('index by mask', lambda: x().index_put_([mask()], x()[0, 0]), (4, 6)),
    ('nms', lambda: torchvision.ops.nms(x()[:, :4], x()[:, 0], 0.5), (2,)),
    ('synchronize', lambda: torch.cuda.synchronize(), None),
    ('copy to cpu', lambda: x().cpu(), (4, 6)),
    ('copy to cpu', lambda: on_cpu(4, 6).copy_(x()), (4, 6)),
    ('copy to cpu', lambda: on_cpu(4, 6).copy_(x(), non_blocking=True), (4, 6)),
    ('copy to cuda', lambda: on_cpu(4).cuda(), (4,)),
    ('copy to cuda', lambda: on_cpu(4).to('cuda', non_blocking=True), (4,)),
    ('copy to cuda', lambda: on_cpu(4, pinned=True).to('cuda'), (4,)),
    ('copy to cuda', lambda: x().copy_(on_cpu(4, 6)), (4, 6)),
    ('copy to cuda', lambda: torch.tensor([1, 2], device='cuda'), (2,)),
    ('copy to cuda', lambda: x()[[0, 1]], (2, 6)),
    ('copy to cuda', lambda: x()[torch.zeros(3, dtype=torch.long)], (3, 6)),
]
GOES_ON = [
    lambda: x().to('cpu', non_blocking=True),
    lambda: on_cpu(4, 6, pinned=True).copy_(x(), non_blocking=True),
    lambda: on_cpu(4, pinned=True).to('cuda', non_blocking=True),
    lambda: x().copy_(on_cpu(4, 6, pinned=True), True),
    lambda: x().half().to('cuda').copy_(x()),
    lambda: x()[torch.zeros(3, **LONG)],
    lambda: x().index_put_([torch.zeros(3, **LONG)], x()[0]),
    # PyTorch takes masked_fill_ for one value from the host.
    lambda: x().__setitem__(mask(), 1.0),
    lambda: x().masked_fill_(mask(), 1.0),
    lambda: torch.where(mask(), x(), 0.0),
    lambda: x().repeat_interleave(torch.ones(4, **LONG), 0, output_size=9),
    lambda: x() + torch.tensor(3.0),
    lambda: torch.zeros(3, device='cuda'),
    lambda: F.one_hot(torch.zeros(3, **LONG), 5),
    lambda: on_cpu(4).sum().item(),
    lambda: on_cpu(4)[on_cpu(4) > 0],
]


@needs_pretended_cuda
@pytest.mark.parametrize('operator, call, result', WAITS)
def test_what_waits(operator, call, result):
    with pretended_cuda() as device:
        found = call()
        assert [wait.operator for wait in device.waits] == [operator]
        assert (tuple(found.shape) if isinstance(found, Tensor) else found) == result


@needs_pretended_cuda
@pytest.mark.parametrize('call', GOES_ON)
def test_what_does_not_wait(call):
    with pretended_cuda() as device:
        call()
        assert device.waits == []


@needs_pretended_cuda
def test_waits_are_told_with_their_place():
    """Functions of PyTorch in between are left out."""

    def sort(values):
        return torch.unique(values)

    with pretended_cuda() as device:
        sort(x())
        sort(x())
        assert device.synchronisations() == {('unique', f'{__name__}.sort'): 2}
        place, outer = device.waits[0].stack[:2]
        assert place.startswith(__file__) and place.endswith(' sort')
        assert outer.endswith(' test_waits_are_told_with_their_place')


# Numbers that are made up, or known.


@needs_pretended_cuda
def test_numbers_that_the_host_wrote_are_known():
    with pretended_cuda() as device:
        number = torch.tensor([7])
        assert number.item() == int(number[0] + 1) - 1 == 7
        assert number.tolist() == [7]
        assert number.numpy().sum() == 7
        assert not number.nonzero().any()
        assert device.waits == []


@needs_pretended_cuda
def test_numbers_of_real_tensors_are_known():
    number, row = torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor([0, 3])
    with pretended_cuda() as device:
        assert number.item() == 3
        assert row.tolist() == row.numpy().tolist() == [0, 3]
        assert row.nonzero().shape == (1, 1)  # made up
        assert device.waits == []


@needs_pretended_cuda
def test_loops_end():
    with pretended_cuda() as device:
        values = x()
        while (values > 0).any():
            values = values / 2
        assert len(device.waits) > 1
        assert (values > 0).any()  # another line


@needs_pretended_cuda
def test_numpy_takes_tensors_of_the_cpu():
    with pretended_cuda():
        assert x().cpu().numpy().shape == (4, 6)
        assert mask().cpu().numpy().dtype == bool
        with pytest.raises(TypeError, match='cuda:0'):
            x().numpy()


@needs_pretended_cuda
def test_random_numbers_may_be_seeded():
    with pretended_cuda():
        torch.manual_seed(3)
        torch.rand(4, device='cuda')


@needs_pretended_cuda
def test_copies_of_a_module():
    layer = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    layer[0].weight.data = layer[0].weight.to(memory_format=torch.channels_last)
    layer[0].bias.requires_grad_(False)
    with pretended_cuda():
        layer.to('cuda')
        copied = copy.deepcopy([layer, layer[0].weight])
        assert copied[0][0].weight is copied[1] is not layer[0].weight
        for own, other in zip(layer.parameters(), copied[0].parameters()):
            assert isinstance(other, nn.Parameter)
            assert own.requires_grad == other.requires_grad
            assert own.stride() == other.stride()
        assert all(value.is_cuda for value in copied[0].state_dict().values())


# Training.


@needs_pretended_cuda
@pytest.mark.parametrize(
    'optimiser, operator',
    [(torch.optim.AdamW, '_foreach_addcdiv_'), (torch.optim.SGD, '_foreach_add_')],
)
def test_optimisers_take_all_tensors_at_once(optimiser, operator):
    """As they do on CUDA, and clipping too."""
    layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    with pretended_cuda() as device:
        layers.to('cuda')
        updates = optimiser(layers.parameters(), lr=0.1)
        layers(torch.ones(2, 3, device='cuda')).sum().backward()
        device.waits.clear()
        with Called() as called:
            nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
            updates.step()
        assert device.waits == []
    assert called.names['_foreach_norm'] == called.names[operator] == 1


class Called(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@needs_pretended_cuda
def test_a_scaler_waits_once_for_a_step():
    layer = nn.Linear(3, 3)
    with pretended_cuda() as device:
        layer.to('cuda')
        updates = torch.optim.AdamW(layer.parameters())
        scaler = torch.amp.GradScaler('cuda')
        assert scaler.is_enabled()
        inputs = torch.ones(2, 3, device='cuda')
        for _ in range(2):
            device.waits.clear()
            with torch.autocast('cuda', torch.float16):
                loss = layer(inputs).float().sum()
            scaler.scale(loss).backward()
            scaler.step(updates)
            scaler.update()
            assert [wait.operator for wait in device.waits] == ['item']
        assert len(updates.state) == 2


# What stays.


def state():
    """All that the device replaces, and the caches that it hides."""
    kernels = {
        (module.__name__, name): kernel for module, name, kernel in triton_kernels()
    }
    found = dict(
        kernels=kernels,
        environment=dict(os.environ),
        triton=triton.is_available,
        mmengine=mmengine.device.get_device(),
        to_list=fake_tensor.FakeTensor.tolist,
        gpu_context=fake_tensor.init_gpu_context,
        autocast=torch.cuda.amp.common.amp_definitely_not_available,
        foreach=import_module('torch.optim.optimizer')._foreach_supported_types,
        tables=dict(rotary._TABLES),
        rotations=dict(rotary._ROTATIONS),
    )
    found.update((name, value) for name, value in vars(torch.cuda).items())
    found.update((name, value) for name, value in vars(Tensor).items())
    return found


@needs_pretended_cuda
def test_all_is_restored():
    rotary.axis_tables(5, 3, torch.device('cpu'), torch.float32)
    before = state()
    with pytest.raises(ZeroDivisionError), pretended_cuda():
        within = state()
        changed = {name for name in before if within[name] is not before[name]}
        assert changed > {'is_available', 'backward', 'kernels', 'tables'}
        assert not within['tables']
        MLLA(ARCH)(torch.ones(1, 3, 32, 64))
        raise ZeroDivisionError
    assert state() == before
    # No mode is left either.
    assert type(torch.ones(1)) is Tensor


def test_an_old_pytorch_cannot_pretend(monkeypatch):
    monkeypatch.setattr(module, 'AVAILABLE', False)
    with pytest.raises(RuntimeError, match=re.escape(torch.__version__)):
        with pretended_cuda():
            pass
