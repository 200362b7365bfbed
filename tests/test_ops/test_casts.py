# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Weights are cast once a forward pass, and change nothing but the time."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlla_mm.models import MLLA
from mlla_mm.ops import casts, triton
from mlla_mm.ops.dispatch import block_parameters

ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2))
BFLOAT16 = torch.bfloat16
DTYPES = [BFLOAT16, torch.float16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def skip_without_kernels(dtype):
    if dtype == torch.float16 and torch.__version__ < '2.3':
        pytest.skip('no float16 kernels on the CPU')


def build(**options):
    """Biases and norms are random, so that each counts."""
    model = MLLA(ARCH, **options).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return model


def images():
    return torch.randn(2, 3, 32, 64)


def run(model, x, dtype=BFLOAT16):
    with torch.autocast('cpu', dtype):
        return model(x)


def gradients(model, x, dtype=BFLOAT16):
    maps = run(model, x, dtype)
    upstream = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=upstream).to(y.dtype) for y in maps]
    model.zero_grad()
    torch.autograd.backward(maps, grads)
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Casts(TorchDispatchMode):
    """Which parameters are cast, one by one and together."""

    def __init__(self, model):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters()}
        self.single, self.together = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        chosen = dict(_to_copy=self.single, _foreach_copy_=self.together).get(name)
        if chosen is not None:
            found = [self.names.get(x.data_ptr()) for x in tree_leaves(args)]
            chosen.extend(name for name in found if name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('training', [False, True])
def test_each_weight_is_cast_once_with_all_others(training):
    model = build()
    wanted = [
        f'{name}.{kind}'
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
        for kind, _ in layer.named_parameters()
    ]
    with torch.set_grad_enabled(training), Casts(model.train(training)) as seen:
        run(model, images())
    assert seen.single == []
    assert sorted(seen.together) == sorted(wanted)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('with_cp', [False, True])
def test_results_are_those_of_autocast(dtype, with_cp, monkeypatch):
    """Bit by bit, outputs and gradients. In the parameters' dtype and layout."""
    skip_without_kernels(dtype)
    model, x = build(with_cp=with_cp), images()
    with torch.no_grad():
        maps = run(model, x, dtype)
    found = gradients(model, x, dtype)
    monkeypatch.setattr(casts, 'cast_all', lambda *args: nullcontext())
    with torch.no_grad():
        assert_same(maps, run(model, x, dtype))
    assert_same(found, gradients(model, x, dtype))
    for name, parameter in model.named_parameters():
        assert found[name].dtype == torch.float32
        assert found[name].stride() == parameter.stride()


def test_blocks_that_are_called_again_cast_for_themselves():
    model, x = build(with_cp=True), images()
    with Casts(model) as seen:
        run(model, x)
    # Blocks run without recomputation where their input needs no gradient.
    assert not any('blocks' in name for name in seen.together)
    assert any('blocks' in name for name in seen.single)
    with torch.no_grad(), Casts(model) as seen:
        run(model, x)
    assert seen.single == []


def swap_as_ema(model, other):
    """As MMEngine's EMAHook does, which leaves no trace in the version counter."""
    for p, q in zip(model.parameters(), other.parameters()):
        p.data.copy_(q.data)


def load(model, other):
    model.load_state_dict(other.state_dict())


def assign(model, other):
    model.load_state_dict(other.state_dict(), assign=True)


def step(model, other):
    """An optimiser's step."""
    optimiser = torch.optim.SGD(model.parameters(), 1.0)
    for p, q in zip(model.parameters(), other.parameters()):
        p.grad = p.detach() - q.detach()
    optimiser.step()
    for p, q in zip(model.parameters(), other.parameters()):
        q.data.copy_(p.data)  # rounded


@pytest.mark.parametrize('change', [swap_as_ema, load, assign, step])
@pytest.mark.parametrize('frozen_stages', [-1, 2])
def test_changed_weights_take_effect(change, frozen_stages):
    model, other = (build(frozen_stages=frozen_stages) for _ in range(2))
    x = images()
    before = run(model, x)
    change(model, other)
    after = run(model, x)
    assert_same(after, run(other, x))
    assert not torch.equal(after[0], before[0])


def test_frozen_parts_get_no_gradient():
    model = build(frozen_stages=2)
    found = gradients(model, images())
    for name, parameter in model.named_parameters():
        assert (found[name] is None) == (not parameter.requires_grad)
    assert found['layers.1.blocks.0.mlp.fc1.weight'] is None
    assert found['layers.2.blocks.0.mlp.fc1.weight'] is not None


def test_gradients_do_not_wait_for_one_another():
    """Those of late layers are there while early layers are still to come."""
    model, order = build(), []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: order.append(name))

    def watch(module, inputs, y):
        y.register_hook(lambda grad: order.append('map'))

    model.layers[1].downsample.register_forward_hook(watch)
    gradients(model, images())
    before, after = order[: order.index('map')], order[order.index('map') :]
    late = ('layers.2.', 'layers.3.', 'norm2.', 'norm3.')
    names = [name for name, _ in model.named_parameters()]
    assert set(before) >= {name for name in names if name.startswith(late)}
    assert not any(name.startswith(('patch_embed', 'layers.0')) for name in before)
    assert len(after) + len(before) == len(names) + 1


def cast_is_known(parameter, dtype=BFLOAT16):
    return casts.cast(parameter, dtype) is not parameter


def test_contexts_end_and_nest():
    outer, inner = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    with casts.cast_all([outer], BFLOAT16):
        with pytest.raises(ZeroDivisionError), casts.cast_all([inner], BFLOAT16):
            assert cast_is_known(inner) and not cast_is_known(outer)
            1 / 0  # noqa: B018
        assert cast_is_known(outer) and not cast_is_known(inner)
        assert not cast_is_known(outer, torch.float16)
        assert casts.parts([outer, inner], BFLOAT16) is None
        found = []
        thread = threading.Thread(target=lambda: found.append(cast_is_known(outer)))
        thread.start()
        thread.join()
        assert found == [False]
    assert not cast_is_known(outer)


def test_an_error_ends_the_casts(monkeypatch):
    model = build()
    weight = model.layers[0].blocks[0].in_proj.weight
    seen = []

    def fail(x):
        seen.append(cast_is_known(weight))
        raise ZeroDivisionError

    monkeypatch.setattr(model.layers[3], 'forward', fail)
    with pytest.raises(ZeroDivisionError):
        run(model, images())
    assert seen == [True]
    assert not cast_is_known(weight)


def test_a_model_within_the_forward_pass_of_another():
    """As a teacher may be. Each has its own casts, also with another dtype."""
    model, teacher, x = build(), build(), images()
    alone = run(model, x)
    taught, expected = [], run(teacher, x)

    def teach(*args):
        taught.append(run(teacher, x))
        with torch.autocast('cpu', enabled=False):
            taught.append(teacher(x))

    model.layers[1].register_forward_pre_hook(teach)
    assert_same(run(model, x), alone)
    assert_same(taught[0], expected)
    assert_same(taught[1], teacher(x))


def test_layers_are_called_that_do_more_than_their_weights_say():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    model, x = build(), images()
    block = model.layers[0].blocks[0]
    expected = copy.deepcopy(model)
    for layer in (block.in_proj, block.attn.qk, model.patch_embed.conv1.conv):
        parametrize.register_parametrization(layer, 'weight', Doubled())
    block.out_proj.register_forward_hook(lambda module, inputs, y: 2 * y)
    of_copy = expected.layers[0].blocks[0]
    with torch.no_grad():
        for layer in (of_copy.in_proj, of_copy.attn.qk):
            layer.weight *= 2
        expected.patch_embed.conv1.conv.weight *= 2
        of_copy.out_proj.weight *= 2
        of_copy.out_proj.bias *= 2
    # Doubling is exact.
    assert_same(run(model, x), run(expected, x))


def test_a_hook_of_a_block_may_change_its_weights():
    model, x = build(), images()
    block = model.layers[1].blocks[0]
    expected = copy.deepcopy(model)
    expected.layers[1].blocks[0].in_proj.weight.data.neg_()
    weight = block.in_proj.weight

    def negate(*args):
        weight.data.neg_()

    block.register_forward_pre_hook(negate)
    assert_same(run(model, x), run(expected, x))


@pytest.mark.parametrize('ops', ['naive', 'eager'])
def test_nothing_is_cast_without_need(ops, monkeypatch):
    """Without autocast, where layers are called, and in graphs."""
    monkeypatch.setenv('MLLA_OPS', ops)
    model, x = build(), images()
    with torch.no_grad(), Casts(model) as seen:
        model(x)
    assert seen.together == seen.single == []
    with torch.no_grad(), Casts(model) as seen:
        if ops == 'naive':
            run(model, x)
        else:
            with torch.autocast('cpu', BFLOAT16):
                torch.jit.trace(model, x, check_trace=False)
    assert seen.together == []


@pytest.mark.skipif(not triton._has_triton(), reason='needs Triton 3.3')
@pytest.mark.parametrize('known', ['none', 'all', 'some', 'shared'])
def test_products_of_fused_blocks(known):
    from mlla_mm.ops.triton import _block

    block = build().layers[1].blocks[0]
    if known == 'shared':
        # Then its cast has one place in memory, which cannot be beside itself.
        block.act_proj.weight = block.in_proj.weight
    parameters = block_parameters(block)
    layers = [m for m in block.modules() if isinstance(m, nn.Linear)]
    if known in ('none', 'some'):
        layers = layers[: dict(none=0, some=3)[known]]
    read = [p for layer in layers for p in layer.parameters()]
    with torch.no_grad(), casts.cast_all(read, BFLOAT16):
        products = _block._cast(_block.Weights._make(parameters), BFLOAT16)
        kept = casts.cast(block.in_proj.weight, BFLOAT16).data_ptr()
    wanted = _block._Products(
        torch.cat([block.in_proj.weight, block.act_proj.weight]),
        torch.cat([block.in_proj.bias, block.act_proj.bias]),
        *(block.attn.qk.weight, block.attn.qk.bias),
        *(block.out_proj.weight, block.out_proj.bias),
        *(block.mlp.fc1.weight, block.mlp.fc1.bias),
        *(block.mlp.fc2.weight, block.mlp.fc2.bias),
    )
    for product, expected in zip(products, wanted):
        assert_same(product, expected.to(BFLOAT16))
    assert (products.in_act.data_ptr() == kept) == (known == 'all')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('ops', ['eager', 'fused'])
def test_a_cuda_graph_casts_in_each_replay(ops, monkeypatch):
    monkeypatch.setenv('MLLA_OPS', ops)
    model, other, x = build().cuda(), build().cuda(), images().cuda()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad(), torch.autocast('cuda', BFLOAT16, cache_enabled=False):
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            maps = model(x)
        swap_as_ema(model, other)
        graph.replay()
        assert_same(maps, other(x))
