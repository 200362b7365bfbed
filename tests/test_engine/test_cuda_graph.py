# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""CUDA graphs, on a GPU and simulated on the CPU."""

import contextlib
import copy
import gc
import pickle
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from mlla_mm import get_model
from mlla_mm.compat.pytorch import TELLS_EXPORT
from mlla_mm.engine.cuda_graph import CudaGraph, replay_forward, use_cuda_graphs
from mlla_mm.models import MLLA, LinearAttentionSwin

from ..compiler import needs_compiler
from ..simulated_graphs import SimulatedGraph, simulated_cuda_graphs
from ..test_benchmarks.gpu import ON_GPU

ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))


@pytest.fixture(params=['simulated', pytest.param('cuda', marks=ON_GPU)])
def device(request):
    """Name of the device of tensors that are on a GPU, or that say so."""
    if request.param == 'cuda':
        yield 'cuda'
        return
    with simulated_cuda_graphs():
        yield 'cpu'


class Net(nn.Module):
    """Counts how often Python runs its forward pass."""

    def __init__(self, maps=1):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.maps = maps
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.drop(self.norm(self.conv(x)))
        return x if self.maps == 1 else (x, x.mean(dim=1))


def make(device, *args):
    torch.manual_seed(0)
    net = Net(*args).to(device).eval()
    replay_forward(net)
    return net


def usual(net, images):
    """What the class's forward pass gives; it does not count."""
    calls = net.calls
    outputs = type(net).forward(net, images)
    net.calls = calls
    return outputs


def rand(device, *shape, dtype=None):
    return torch.rand(*(shape or (2, 3, 8, 8)), device=device, dtype=dtype)


def assert_close(found, wanted, tolerance=1e-3):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def check(net, images, calls):
    """A call gives what the usual one does, and runs in Python so often."""
    before = net.calls
    found, wanted = net(images), usual(net, images)
    assert net.calls - before == calls
    assert_close(found, wanted, 1e-3 if found.dtype.itemsize > 2 else 1e-2)
    assert found.stride() == wanted.stride()
    return found


USUAL, REPLAY = 1, 0
# Three calls before, and the one that is captured.
CAPTURE = 4


@torch.no_grad()
def warm(net, images):
    for calls in (USUAL, CAPTURE, REPLAY):
        check(net, images, calls)


@torch.no_grad()
def test_the_second_call_is_captured(device):
    net = make(device)
    outputs = [check(net, rand(device), n) for n in (USUAL, CAPTURE, REPLAY, REPLAY)]
    # What the caller keeps stays as it is.
    assert len({x.sum().item() for x in outputs}) == 4
    channels_last = rand(device).to(memory_format=torch.channels_last)
    assert_close(net(x=channels_last), usual(net, channels_last))


@torch.no_grad()
def test_several_outputs(device):
    net = make(device, 2)
    found, wanted = [], []
    for _ in range(4):
        images = rand(device)
        found.append(net(images))
        wanted.append(usual(net, images))
    assert_close(found, wanted)  # tuples, and what the caller keeps stays


def autocast(device, dtype=torch.bfloat16):
    return torch.autocast(device, dtype)


@torch.no_grad()
def test_kinds_of_images(device):
    """Sizes, numbers of images, dtypes and autocast have graphs of their own."""
    net, batch = make(device), rand(device)
    warm(net, batch)
    warm(net, rand(device, 2, 3, 8, 9))
    warm(net, rand(device, 1, 3, 8, 8))
    with autocast(device):
        warm(net, batch)
        assert net(batch).dtype == torch.bfloat16
    with autocast(device, torch.float16):
        warm(net, batch)
        warm(net, batch.half())
    check(net, batch, REPLAY)


@torch.no_grad()
def test_what_was_not_used_for_longest_goes(device):
    net = make(device)
    batches = [rand(device, 1, 3, 8, 4 + i) for i in range(9)]
    for images in batches[:8]:
        warm(net, images)
    check(net, batches[0], REPLAY)
    check(net, batches[8], USUAL)  # in the place of the second one
    for images in (batches[0], *batches[2:8]):
        check(net, images, REPLAY)
    check(net, batches[1], USUAL)


@torch.no_grad()
def test_many_kinds_in_turns_capture_nothing(device):
    net = make(device)
    for _ in range(3):
        for i in range(9):
            check(net, rand(device, 1, 3, 8, 4 + i), USUAL)


def swap_average(net):
    """As MMEngine's EMAHook does, without a version that counts."""
    for parameter in net.parameters():
        parameter.data.copy_(torch.rand_like(parameter))


def train_step(net):
    net.train()
    with torch.enable_grad():
        net(rand(net.conv.weight.device)).sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    net.eval()


@pytest.mark.parametrize(
    'change',
    [
        swap_average,
        train_step,
        lambda net: net.load_state_dict(Net().state_dict()),
        lambda net: net.norm.running_mean.add_(1),
    ],
)
@torch.no_grad()
def test_values_that_change_in_place(device, change):
    net, images = make(device), rand(device)
    warm(net, images)
    before = net(images)
    change(net)
    assert not torch.allclose(check(net, images, REPLAY), before)


def replace_weight(net):
    net.conv.weight = nn.Parameter(-net.conv.weight)


def replace_data(net):
    net.conv.weight.data = -net.conv.weight.data


def replace_part(net):
    net.drop = nn.Tanh().eval()


def replace_buffer(net):
    net.norm.running_var = net.norm.running_var + 1


@pytest.mark.parametrize(
    'change', [replace_weight, replace_data, replace_part, replace_buffer]
)
@torch.no_grad()
def test_weights_that_are_replaced(device, change):
    net, images = make(device), rand(device)
    warm(net, images)
    before = net(images)
    change(net)
    assert not torch.allclose(check(net, images, USUAL), before)
    check(net, images, CAPTURE)
    check(net, images, REPLAY)


@torch.no_grad()
def test_nothing_gets_the_address_of_a_weight_that_is_gone(device):
    """Its graph would be replayed with it."""
    net = make(device)
    net.register_buffer('gone', torch.ones(2**16, device=device))
    warm(net, rand(device))
    address = net.gone.data_ptr()
    net.gone = None
    others = [torch.ones(2**16, device=device) for _ in range(50)]
    assert address not in [x.data_ptr() for x in others]


@torch.no_grad()
def test_another_dtype_of_weights(device):
    net, images = make(device), rand(device)
    warm(net, images)
    net.double()
    warm(net, images.double())
    net.float()
    warm(net, images)


def hook(module, args, output=None):
    pass


def compile_part(net):
    net.conv.compile(backend='eager')


@pytest.mark.parametrize(
    'change',
    [
        lambda net: net.train(),
        lambda net: setattr(net, 'training', True),  # not its parts
        lambda net: net.drop.train(),
        lambda net: net.conv.register_forward_hook(hook),
        lambda net: net.conv.register_forward_pre_hook(hook),
        lambda net: setattr(net.drop, 'forward', torch.relu),
        pytest.param(compile_part, marks=needs_compiler),
    ],
)
@torch.no_grad()
def test_usual_calls(device, change):
    net, images = make(device), rand(device)
    warm(net, images)
    change(net)
    for _ in range(3):
        calls = net.calls
        net(images)
        assert net.calls - calls == USUAL


@torch.no_grad()
def test_usual_calls_of_some_kinds(device, monkeypatch):
    class Images(torch.Tensor):
        pass

    net, images = make(device), rand(device)
    warm(net, images)
    with torch.enable_grad():
        check(net, images, USUAL).sum().backward()
        assert net.conv.weight.grad is not None
    check(net, images.as_subclass(Images), USUAL)
    handle = register_module_forward_hook(hook)
    check(net, images, USUAL)
    handle.remove()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
        check(net, images, USUAL)
    check(net, images, REPLAY)
    # On the CPU itself, where there is a GPU.
    monkeypatch.setattr(torch.Tensor, 'is_cuda', property(lambda x: False))
    check(net, images, USUAL)


@torch.no_grad()
def test_hooks_of_the_module_itself_run(device):
    net, images, seen = make(device), rand(device), []
    net.register_forward_hook(lambda *args: seen.append(1))
    warm(net, images)
    assert len(seen) == 3


@pytest.mark.parametrize('first, then', [(0, 1), (1, 0)])
def test_inference_mode(device, first, then):
    modes = torch.no_grad, torch.inference_mode
    net = make(device)
    with modes[first]():
        warm(net, rand(device))
        images = rand(device)
    with modes[then]():
        found = check(net, images, REPLAY)
    assert found.is_inference() == (then == 1)


@torch.no_grad()
def test_autocast_keeps_no_casts_for_a_graph(device):
    net, images = make(device), rand(device)
    with autocast(device):
        warm(net, images)  # autocast keeps casts from the first call on
    before = net.conv.weight.clone()
    swap_average(net)
    assert not torch.equal(net.conv.weight, before)
    with autocast(device):
        check(net, images, REPLAY)


@torch.no_grad()
def test_graphs_share_memory(device, monkeypatch):
    pools = []
    original = torch.cuda.graph

    def capture(*args, pool, **kwargs):
        pools.append(pool)
        return original(*args, pool=pool, **kwargs)

    monkeypatch.setattr(torch.cuda, 'graph', capture)
    net = make(device)
    for width in (8, 9, 10):
        warm(net, rand(device, 1, 3, 8, width))
    assert pools[0] is None and pools[1] == pools[2] is not None
    # PyTorch does not take the memory of graphs that are all gone.
    net.double()
    warm(net, rand(device, dtype=torch.float64))
    assert pools[3] is None


@torch.no_grad()
def test_another_stream(device):
    net, images = make(device), rand(device)
    warm(net, images)
    other = torch.cuda.Stream()
    for _ in range(2):
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            check(net, images, USUAL)
        torch.cuda.current_stream().wait_stream(other)
        check(net, images, USUAL)
    check(net, images, CAPTURE)


@torch.no_grad()
def test_copies(device):
    net, images = make(device), rand(device)
    keys = list(Net().state_dict())
    warm(net, images)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert list(other.state_dict()) == list(net.state_dict()) == keys
        swap_average(other)
        warm(other, images)
        check(net, images, REPLAY)


def test_a_deleted_module_leaves_no_memory(device):
    net = make(device)
    warm(net, rand(device))
    graphs = SimulatedGraph.made if device == 'cpu' else []
    memory = weakref.ref(net.conv.weight), *graphs
    assert all(x() is not None for x in memory)
    gc.disable()  # a cycle of references would be freed, but later
    try:
        del net
        assert all(x() is None for x in memory)
    finally:
        gc.enable()


@contextlib.contextmanager
def failing_capture(graph, **kwargs):
    """In the place of ``torch.cuda.graph``: after an error its end fails, too."""
    try:
        yield
    finally:
        raise RuntimeError('capture_end')


def test_a_failed_capture_names_the_first_error_and_keeps_no_model():
    def capture():
        model, calls = nn.Linear(1, 1), []

        def call():
            calls.append(model.in_features)
            if len(calls) > 3:  # the calls before the capture
                raise RuntimeError('not permitted')

        with pytest.raises(
            RuntimeError, match=r'captured in .*: not permitted\. Leave cuda_graph out'
        ):
            CudaGraph(call)
        return weakref.ref(model)

    fakes = dict.fromkeys(('CUDAGraph', 'Stream', 'current_stream'), mock.DEFAULT)
    fakes.update(stream=contextlib.nullcontext, graph=failing_capture)
    gc.disable()  # a cycle of references would be freed, but later
    try:
        with mock.patch.multiple(torch.cuda, **fakes):
            assert capture()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize('kind', [MLLA, LinearAttentionSwin])
@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
@torch.no_grad()
def test_backbones_of_a_model(device, kind, dtype):
    if device == 'cpu' and dtype:
        pytest.skip('takes a CPU long')
    torch.manual_seed(0)
    model = nn.Sequential(kind(ARCH)).to(device).eval()
    wanted = copy.deepcopy(model)
    use_cuda_graphs(model)

    def check_maps(height, width):
        images = rand(device, 1, 3, height, width)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            assert_close(model(images), wanted(images), 3e-2 if dtype else 1e-3)

    sizes = [(16, 24), (9, 13)]
    for size in 2 * sizes:
        check_maps(*size)
    for a, b in zip(model.parameters(), wanted.parameters()):
        b.data.copy_(torch.randn_like(b) / 10)
        a.data.copy_(b)
    called, forward = [], kind.forward
    with mock.patch.object(kind, 'forward', lambda *x: called.append(x) or forward(*x)):
        for size in sizes:
            check_maps(*size)
    assert [module for module, _ in called] == 2 * [wanted[0]]


def test_models_without_a_backbone():
    with pytest.raises(ValueError, match='Linear has no MLLA .* Leave cuda_graph out'):
        use_cuda_graphs(nn.Linear(1, 1))


@pytest.mark.parametrize(
    'make_graph',
    [
        lambda net, images: torch.jit.trace(net, images, check_trace=False),
        pytest.param(
            lambda net, images: torch.export.export(net, (images,)).module(),
            marks=pytest.mark.skipif(not TELLS_EXPORT, reason='as in our exports'),
        ),
        pytest.param(
            lambda net, images: torch.compile(net, backend='eager', fullgraph=True),
            marks=needs_compiler,
        ),
    ],
    ids=['trace', 'export', 'compile'],
)
def test_graphs_of_pytorch(device, make_graph):
    """They contain the operators, also if a CUDA graph was captured before."""
    net, images = make(device).requires_grad_(False), rand(device)
    warm(net, images)
    replay = mock.patch.object(torch.cuda.CUDAGraph, 'replay', side_effect=ValueError)
    with torch.no_grad(), replay:
        graph = make_graph(net, images)
        for _ in range(3):
            other = rand(device)
            assert_close(graph(other), usual(net, other))


@torch.no_grad()
def test_get_model(device, monkeypatch):
    monkeypatch.setitem(MLLA.arch_zoo, 't', ARCH)
    classifier = get_model('mlla-t', num_classes=5, cuda_graph=True).eval().to(device)
    features = get_model('mlla-t', features_only=True, cuda_graph=True)
    features = features.eval().to(device)
    for model in (classifier, features):
        wanted = copy.deepcopy(model)
        del wanted.forward
        assert list(model.state_dict()) == list(wanted.state_dict())
        for _ in range(3):
            images = rand(device, 2, 3, 32, 32)
            found = model(images)
            assert_close(found, wanted(images))
        with mock.patch.object(type(model), 'forward', side_effect=AssertionError):
            assert_close(model(images), found)
