# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Hooks and replaced layers take effect, although ops read the weights of layers."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module

from mlla_mm import ops
from mlla_mm.models import MLLA
from mlla_mm.models.layers import (
    MLLAAttention,
    MLLABlock,
    PatchMerging,
    SoftmaxAttention,
)
from mlla_mm.ops import dispatch, naive, triton
from mlla_mm.ops.triton import supports_mlla_block

from ..reference import relative_error


class Doubled(nn.Module):
    """Wraps a layer and shows its weights, like LoRA does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs) * 2


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MLLA(dict(embed_dims=16, depths=(1,) * 4, num_heads=(1, 2, 2, 4))).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return model


def leaves(model):
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm))
    ]


KINDS = ['forward', 'forward_pre', 'full_backward', 'full_backward_pre']


@pytest.mark.parametrize(
    'kind, gradients', [(kind, True) for kind in KINDS] + [('forward', False)]
)
def test_hooks_are_called_once(model, kind, gradients):
    calls = []
    for name in leaves(model):
        register = getattr(model.get_submodule(name), f'register_{kind}_hook')
        register(lambda *args, name=name: calls.append(name))
    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # in-place modules cannot have backward hooks
    with torch.set_grad_enabled(gradients):
        features = model(torch.randn(1, 3, 64, 64))
    if gradients:
        sum(x.sum() for x in features).backward()
    assert sorted(calls) == sorted(leaves(model))


def in_other_stages(name):
    """The later stages have the same classes as the first one."""
    return name.startswith(('layers.1.', 'layers.2.', 'layers.3.'))


@torch.no_grad()
def test_a_hook_of_any_module_is_called(model):
    """Also if the module has children, and if there is no other hook."""
    calls, image = [], torch.randn(1, 3, 32, 32)
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) and not in_other_stages(name):
            handle = module.register_forward_hook(
                lambda *args, name=name: calls.append(name)
            )
            model(image)
            handle.remove()
            assert name in calls


@torch.no_grad()
def test_replaced_layers_are_called(model):
    image = torch.randn(1, 3, 32, 32)
    for name in leaves(model):
        if in_other_stages(name):
            continue
        path, _, child = name.rpartition('.')
        parent, layer = model.get_submodule(path), model.get_submodule(name)
        handle = layer.register_forward_hook(lambda *args: args[2] * 2)
        expected = model(image)
        handle.remove()
        setattr(parent, child, Doubled(layer))
        actual = model(image)
        setattr(parent, child, layer)
        for one, other in zip(actual, expected):
            assert relative_error(one, other) < 1e-5, name


@pytest.mark.parametrize(
    'name, layer',
    [
        ('patch_embed.conv2.0.norm', nn.GroupNorm(1, 8)),
        ('patch_embed.conv2.0.norm', nn.Identity()),
        ('patch_embed.conv2.0.act', nn.GELU()),
        ('layers.0.downsample.conv.0.act', nn.GELU()),
        ('layers.0.downsample.conv.1.conv', nn.AvgPool2d(2)),
        ('layers.0.blocks.0.attn.lepe', nn.Identity()),
        ('layers.0.blocks.0.attn.lepe', nn.Conv2d(16, 16, 1)),
        ('layers.0.blocks.0.mlp.fc1', nn.Identity()),
        ('layers.0.blocks.0.mlp.drop', nn.Identity()),
    ],
)
def test_layers_of_another_type_are_called(model, name, layer):
    if name.endswith('fc1'):
        model.layers[0].blocks[0].mlp.fc2 = nn.Linear(16, 16)
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, layer)
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(args[2]))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        assert calls
        # Without the hook, only its type tells the layer from the original one.
        layer._forward_hooks.clear()
        for actual, output in zip(model(image), expected):
            assert relative_error(actual, output) < 1e-5


def depthwise(channels=16, kernel_size=3, padding=1, **options):
    options = dict(dict(groups=channels), **options)
    return nn.Conv2d(channels, channels, kernel_size, padding=padding, **options)


OTHER_CONVS = [
    dict(kernel_size=5, padding=2),
    dict(kernel_size=1, padding=0),
    dict(padding_mode='circular'),
    dict(dilation=2, padding=2),
    dict(groups=1),
    dict(groups=8),
    dict(bias=False),
]
OF_OTHER_SHAPES = [dict(stride=2), dict(padding=0), dict(padding=(0, 1))]


@pytest.mark.parametrize('options', OTHER_CONVS + OF_OTHER_SHAPES)
def test_another_convolution_is_called(options, fused):
    """An op calls a convolution that differs from ours in more than its weights."""
    conv, x = depthwise(**options), torch.randn(2, 8, 6, 16)
    expected = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(ops.depthwise_conv(x, conv), expected)


@pytest.mark.parametrize('name', ['cpe1', 'dwc', 'attn.lepe', 'cpe2'])
@pytest.mark.parametrize('options', OTHER_CONVS)
def test_a_block_with_another_convolution_is_not_fused(options, name, fused):
    block, calls = MLLABlock(16, 2), []
    parent, _, child = name.rpartition('.')
    setattr(block.get_submodule(parent), child, depthwise(**options))
    y = block(X)
    assert not fused
    block.get_submodule(name).register_forward_hook(lambda *args: calls.append(name))
    torch.testing.assert_close(block(X), y)
    assert calls == [name]


# --- Convolutional layers ---


@pytest.fixture
def read(monkeypatch):
    """The names of kernels for convolutional layers that run.

    The definitions run in their place, on any device.
    """
    calls = []
    run_kernels(monkeypatch)
    for name in ('linear_relu', 'batch_norm', 'expand_and_halve'):

        def run(*args, name=name):
            calls.append(name)
            return getattr(naive, name)(*args)

        monkeypatch.setattr(triton, name, run)
        monkeypatch.setattr(triton, f'supports_{name}', lambda *args: True)
    return calls


def run_kernels(monkeypatch):
    """Choose Triton's kernels wherever modules are not called."""
    implementation = dispatch._implementation

    def choose(x):
        return naive if implementation(x) is naive else triton

    monkeypatch.setattr(dispatch, '_implementation', choose)


@torch.no_grad()
def test_what_is_read_of_convolutional_layers(model, read):
    """In evaluation mode, reading gives the same outputs as calling."""
    image = torch.randn(1, 3, 64, 64)
    actual = model(image)
    assert [read.count(name) for name in ('linear_relu', 'batch_norm')] == [3, 8]
    # PyTorch 2.1 creates these layers in training mode.
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
    assert type(other.patch_embed.conv1.norm) is nn.SyncBatchNorm
    read.clear()
    synchronised = other(image)
    assert [read.count(name) for name in ('linear_relu', 'batch_norm')] == [3, 8]
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *args: None)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda *args: None)
    read.clear()
    for called, *others in zip(model(image), actual, synchronised):
        assert all(relative_error(x, called) < 1e-5 for x in others)
    assert not read


@pytest.mark.parametrize(
    'options',
    [
        dict(kernel_size=3, padding=1),
        dict(kernel_size=3, padding=1, dilation=1, padding_mode='circular'),
        dict(kernel_size=1, stride=2),
        dict(kernel_size=1, padding=1),
        dict(kernel_size=1, groups=4),
        dict(kernel_size=1, bias=False),
    ],
)
def test_another_expansion_is_called(options, read):
    """In patch merging, whose own expansion is a linear layer on channels."""
    merging, x = PatchMerging(16).eval(), torch.randn(1, 16, 8, 8)
    merging(x)
    assert 'linear_relu' in read
    read.clear()
    merging.conv[0].conv = nn.Conv2d(16, 128, **options)
    actual = merging(x)
    assert 'linear_relu' not in read
    expected = merging.conv[1:](merging.conv[0].conv(x).relu())
    torch.testing.assert_close(actual, expected)


def hooked(layer):
    layer.register_forward_hook(lambda layer, args, out: out * 2)
    return layer


@pytest.mark.parametrize(
    'name, change',
    [
        ('0.conv', lambda _: nn.Conv2d(16, 128, 3, padding=1)),
        ('0.norm', lambda _: nn.BatchNorm2d(128)),
        ('0.act', lambda _: nn.GELU()),
        ('1.conv', lambda _: depthwise(128)),
        ('1.conv', lambda _: depthwise(128, kernel_size=5, padding=2, stride=2)),
        ('1.conv', lambda _: depthwise(128, groups=64, stride=2)),
        ('1.conv', lambda _: depthwise(128, bias=False, stride=2)),
        ('1.norm', lambda _: nn.BatchNorm2d(128)),
        ('1.act', lambda _: None),
        *((name, Doubled) for name in ('0', '0.conv', '1', '1.conv', '1.act')),
        *((name, hooked) for name in ('0', '0.conv', '0.act', '1', '1.conv', '1.act')),
        ('', hooked),
        ('', lambda layers: nn.Sequential(*layers, nn.Tanh())),
        ('', lambda layers: layers[:2]),
    ],
)
@torch.no_grad()
def test_another_patch_merging_is_called(name, change, read, monkeypatch):
    monkeypatch.setattr(triton, 'is_available', lambda device: True)
    merging, x = PatchMerging(16).eval(), torch.randn(1, 16, 8, 8)

    def run(ops):
        monkeypatch.setenv('MLLA_OPS', ops)
        read.clear()
        return merging(x)

    torch.testing.assert_close(run('fused'), run('naive'))
    run('fused')
    assert 'expand_and_halve' in read
    run('')
    assert 'expand_and_halve' not in read
    path, _, child = f'conv.{name}'.rstrip('.').rpartition('.')
    parent = merging.get_submodule(path)
    setattr(parent, child, change(getattr(parent, child)))
    actual = run('fused')
    assert 'expand_and_halve' not in read
    torch.testing.assert_close(actual, run('naive'))


@pytest.mark.parametrize(
    'norm',
    [nn.BatchNorm2d(8, track_running_stats=False), nn.BatchNorm2d(8, affine=False)],
)
@torch.no_grad()
def test_batch_norm_without_statistics_or_weights_is_called(norm, model, read):
    layer, x = model.patch_embed.conv1, torch.randn(2, 3, 8, 8)
    layer.norm = norm.eval()
    torch.testing.assert_close(layer(x), norm(layer.conv(x)).relu())
    assert not read


# --- All modules ---

GLOBAL_HOOKS = [
    nn_module.register_module_forward_hook,
    nn_module.register_module_forward_pre_hook,
    nn_module.register_module_full_backward_hook,
    nn_module.register_module_full_backward_pre_hook,
]


@pytest.mark.parametrize('register', GLOBAL_HOOKS)
def test_hooks_of_all_modules_are_called(model, register, fused):
    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # in-place modules cannot have backward hooks
    names, calls = {layer: name for name, layer in model.named_modules()}, []
    image = torch.randn(1, 3, 64, 64)
    handle = register(lambda layer, *args: calls.append(names[layer]))
    try:
        sum(x.sum() for x in model(image)).backward()
    finally:
        handle.remove()
    found = [name for name in calls if name in leaves(model)]
    assert sorted(found) == sorted(leaves(model)) and not fused
    model(image)
    assert len(fused) == 4


def test_a_forward_pass_of_a_single_module_is_called(fused):
    """Libraries that move weights between devices set such a forward pass."""
    block = MLLABlock(16, 2).eval()
    layer, calls = block.out_proj, []
    forward = layer.forward
    layer.forward = lambda x: calls.append(x) or forward(x)
    block(X)
    assert len(calls) == 1 and not fused


# --- Whole blocks ---


@pytest.fixture
def fused(monkeypatch):
    """The arguments of a pretended kernel for whole blocks, which computes nothing."""
    calls = []

    def mlla_block(*args):
        calls.append(args)
        return args[0].clone()

    run_kernels(monkeypatch)
    monkeypatch.setattr(triton, 'supports_mlla_block', fits)
    monkeypatch.setattr(triton, 'mlla_block', mlla_block)
    return calls


def fits(x, parameters, num_heads):
    """The answer of ``supports_mlla_block`` on a GPU."""
    with mock.patch.object(triton, 'is_available', lambda device: True):
        return supports_mlla_block(x, parameters, num_heads)


BLOCK = [
    'cpe1',
    'norm1',
    'in_proj',
    'act_proj',
    'dwc',
    'attn.qk',
    'attn.lepe',
    'out_proj',
    'cpe2',
    'norm2',
    'mlp.fc1',
    'mlp.fc2',
]
# A block calls these twice.
DROPS = ['mlp.drop', 'drop_path']
X = torch.randn(2, 3, 5, 16)


def test_a_block_hands_over_its_parameters(fused):
    block = MLLABlock(16, 2, qkv_bias=False)
    assert torch.equal(block(X), X)
    ((x, parameters, num_heads, eps, scales, _),) = fused
    expected = []
    for name in BLOCK:
        layer = block.get_submodule(name)
        expected += [layer.weight, layer.bias]
    assert x is X and num_heads == 2 and eps == (1e-5, 1e-5)
    assert scales == (None, None)
    assert len(parameters) == 24 and parameters[11] is None
    assert all(one is other for one, other in zip(parameters, expected))
    assert {id(p) for p in parameters if p is not None} == set(
        map(id, block.parameters())
    )


@pytest.mark.parametrize(
    'name, kind',
    [
        *((name, 'forward') for name in [*BLOCK, 'attn', 'mlp', *DROPS]),
        *(('out_proj', kind) for kind in KINDS[1:]),
    ],
)
def test_a_block_with_a_hook_is_not_fused(name, kind, fused):
    block, calls = MLLABlock(16, 2), []
    register = getattr(block.get_submodule(name), f'register_{kind}_hook')
    handle = register(lambda *args: calls.append(name))
    block(X).sum().backward()
    assert not fused
    assert calls == [name] * (2 if name in DROPS else 1)
    handle.remove()
    block(X)
    assert len(fused) == 1


@pytest.mark.parametrize('name', [*BLOCK, 'attn', 'mlp', *DROPS])
def test_a_block_with_a_wrapped_layer_is_not_fused(name, fused):
    block = MLLABlock(16, 2).eval()
    expected = copy.deepcopy(block)
    expected.get_submodule(name).register_forward_hook(lambda *args: args[2] * 2)
    parent, _, child = name.rpartition('.')
    parent = block.get_submodule(parent)
    setattr(parent, child, Doubled(getattr(parent, child)))
    assert relative_error(block(X), expected(X)) < 1e-5
    assert not fused


@pytest.mark.parametrize(
    'name, layer',
    [
        ('norm1', nn.LayerNorm([5, 16])),
        ('norm2', nn.GroupNorm(1, 3)),
        ('norm1', nn.Identity()),
        ('dwc', nn.Identity()),
        ('mlp.drop', nn.Identity()),
    ],
)
def test_a_block_with_a_layer_of_another_type_is_not_fused(name, layer, fused):
    block = MLLABlock(16, 2)
    parent, _, child = name.rpartition('.')
    setattr(block.get_submodule(parent), child, layer)
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(name))
    block(X)
    assert not fused and calls
    layer._forward_hooks.clear()
    block(X)
    assert not fused


def test_a_block_with_a_forward_pass_of_its_own_is_not_fused(fused):
    class Block(MLLABlock):
        def forward(self, x):
            return x + self.norm1(x)

    block = Block(16, 2)
    torch.testing.assert_close(block(X), X + block.norm1(X))
    assert not fused


class Twice(MLLAAttention):
    """What a user derives, with the same layers."""

    def attend(self, q, k, v):
        return super().attend(q, k, v) * 2


def set_attend(attn):
    attend = attn.attend
    attn.attend = lambda q, k, v: attend(q, k, v) * 2
    return attn


OTHER_ATTENTIONS = {
    'a subclass': lambda: Twice(16, 2),
    'an attend of the object': lambda: set_attend(MLLAAttention(16, 2)),
    'projected values': lambda: MLLAAttention(16, 2, v_proj=True),
    'softmax': lambda: SoftmaxAttention(16, 2, v_proj=False),
}


@pytest.mark.parametrize('name', OTHER_ATTENTIONS)
@pytest.mark.parametrize('kernels', [True, False])
def test_another_attention_is_called(name, kernels, request, monkeypatch):
    fused = request.getfixturevalue('fused') if kernels else []
    block, calls = MLLABlock(16, 2), []
    block.attn = OTHER_ATTENTIONS[name]()
    y = block(X)
    assert not fused
    y.sum().backward()
    assert all(x.grad.any() for x in block.attn.parameters())
    block.attn.register_forward_hook(lambda *args: calls.append(name))
    torch.testing.assert_close(block(X), y)
    assert calls == [name]
    monkeypatch.setenv('MLLA_OPS', 'naive')
    torch.testing.assert_close(block(X), y)


@pytest.mark.parametrize('name', ['attn', 'attn.qk', 'attn.lepe'])
def test_a_changed_attention_takes_effect_without_kernels_for_blocks(name):
    """The gated mixer reads an attention, but calls what has hooks or is wrapped."""
    block, x = MLLABlock(16, 2).eval(), torch.randn(2, 3, 5, 16)
    plain = block(x)
    handle = block.get_submodule(name).register_forward_hook(lambda *args: args[2] * 2)
    expected = block(x)
    handle.remove()
    assert relative_error(expected, plain) > 1e-4
    parent, _, child = name.rpartition('.')
    parent = block.get_submodule(parent)
    setattr(parent, child, Doubled(getattr(parent, child)))
    torch.testing.assert_close(block(x), expected)


def test_a_parametrised_block_is_not_fused(fused):
    block = MLLABlock(16, 2)
    nn.utils.parametrizations.weight_norm(block.out_proj)
    block(X).sum().backward()
    assert not fused
    assert block.out_proj.parametrizations.weight.original0.grad is not None


def test_dropout_is_not_fused_but_stochastic_depth_is(fused):
    block = MLLABlock(16, 2, drop_rate=0.5, drop_path_rate=0.5)
    block(X)
    assert not fused
    block.eval()(X)
    ((*_, scales, _),) = fused
    assert scales == (None, None)
    block.train().mlp.drop.p = 0
    block(X)
    scales = fused[1][-2]
    assert all({0.0, 2.0} >= set(scale.tolist()) for scale in scales)


# --- Ops that read or call layers equal their definitions ---


def layer(kind, *args, **options):
    torch.manual_seed(1)
    module = kind(*args, **options).eval()
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return module


CONV_LAYERS = {
    'batch norm': [layer(nn.BatchNorm2d, 16, eps=0.3), nn.ReLU()],
    'batch norm in training': [layer(nn.BatchNorm2d, 16).train(), nn.ReLU()],
    'batch norm without weight': [layer(nn.BatchNorm2d, 16, affine=False), nn.ReLU()],
    'of the batch': [layer(nn.BatchNorm2d, 16, track_running_stats=False), None],
    'another activation': [layer(nn.BatchNorm2d, 16), nn.GELU()],
    'another activation alone': [None, nn.GELU()],
    'no activation': [layer(nn.BatchNorm2d, 16), None],
    'activation alone': [None, nn.ReLU()],
}
IS_READ = {
    'batch norm': ['batch_norm'],
    'no activation': ['batch_norm'],
    'activation alone': ['linear_relu'],
}


@torch.no_grad()
@pytest.mark.parametrize('name', CONV_LAYERS)
def test_convolutional_layers(name, read):
    """The result is that of the called layers, whichever of them are read."""
    norm, act = copy.deepcopy(CONV_LAYERS[name])
    conv, x = layer(nn.Conv2d, 16, 16, 1), torch.randn(2, 16, 6, 5)
    expected = nn.Sequential(
        conv, *(copy.deepcopy(part) for part in (norm, act) if part is not None)
    )(x)
    torch.testing.assert_close(ops.conv_layer(x, conv, norm, act), expected)
    assert read == IS_READ.get(name, [])


@torch.no_grad()
@pytest.mark.parametrize(
    'options, is_read',
    [
        (dict(eps=0.3), True),
        (dict(bias=False), False),
        (dict(elementwise_affine=False), False),
        (dict(normalized_shape=(5, 16)), False),
    ],
)
def test_layer_norm(options, is_read, monkeypatch):
    calls = []

    def layer_norm(*args):
        calls.append(args)
        return naive.layer_norm(*args)

    run_kernels(monkeypatch)
    monkeypatch.setattr(triton, 'layer_norm', layer_norm)
    monkeypatch.setattr(triton, 'supports_layer_norm', lambda *args: True)
    norm = layer(nn.LayerNorm, **{'normalized_shape': 16, **options})
    torch.testing.assert_close(ops.layer_norm(X, norm), norm(X))
    assert len(calls) == is_read


def test_each_norm_of_a_block_has_its_eps(fused):
    block = MLLABlock(16, 2)
    block.norm1.eps, block.norm2.eps = 0.3, 0.7
    block(X)
    (args,) = fused
    assert args[3] == (0.3, 0.7)


@torch.no_grad()
@pytest.mark.parametrize('bias', [(True, True), (False, True), (True, False)])
def test_mlp(bias):
    fc1 = layer(nn.Linear, 16, 8, bias=bias[0])
    fc2 = layer(nn.Linear, 8, 16, bias=bias[1])
    expected = fc2(nn.functional.gelu(fc1(X)))
    torch.testing.assert_close(ops.mlp(X, fc1, fc2, nn.Dropout().eval()), expected)


@torch.no_grad()
def test_called_layers_compute_the_definitions(monkeypatch):
    monkeypatch.setenv('MLLA_OPS', 'naive')
    conv, norm = depthwise(), layer(nn.LayerNorm, 16, eps=0.1)
    fc1, fc2 = layer(nn.Linear, 16, 8), layer(nn.Linear, 8, 16)
    qk, weights = torch.randn(2, 3, 5, 32), (conv.weight, conv.bias)
    attn = MLLAAttention(16, 2)
    pairs = [
        (ops.depthwise_conv(X, conv, True, True),
         naive.depthwise_conv(X, *weights, True, True)),
        (ops.mlla_attention(qk, X, -X, conv, 2),
         naive.mlla_attention(qk, X, -X, *weights, 2)),
        (ops.gated_mixer(attn, X, -X, MLLAAttention),
         naive.mlla_attention(attn.qk(X), X, -X, *attn.lepe.parameters(), 2)),
        (ops.layer_norm(X, norm),
         naive.layer_norm(X, norm.weight, norm.bias, norm.eps)),
        (ops.mlp(X, fc1, fc2, nn.Dropout().eval()),
         naive.mlp(X, fc1.weight, fc1.bias, fc2.weight, fc2.bias)),
    ]  # fmt: skip
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)


def test_an_empty_batch_has_gradients():
    block, x = MLLABlock(16, 2), torch.zeros(0, 3, 5, 16, requires_grad=True)
    y = block.mlp(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
