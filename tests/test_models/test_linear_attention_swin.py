# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import copy
import re

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import transformer
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch._dynamo.testing import CompileCounter

from mlla_mm.engine.compile import compile_backbone
from mlla_mm.models import LinearAttentionSwin
from mlla_mm.models.layers import PatchEmbed, SwinPatchMerging, TokenMixer

from ..compiler import needs_compiler
from ..reference import relative_error

NANO = dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))

#: Parameters of a classifier of 1000 classes.
BLOCK_ALL = dict(
    arch=dict(embed_dims=96, depths=(2, 2, 9, 2), num_heads=(6, 12, 24, 48)),
    block_design='all',
    expansion=2,
    token_mixer=dict(qk_head_dims=16),
)
SINGLE_HEAD = dict(token_mixer=dict(num_heads=1, qk_head_dims=32))
COUNTS = {
    'baseline': ({}, 28_265_032),
    'input gate': (dict(token_mixer=dict(input_gate=True)), 28_539_016),
    'input gate without bias': (
        dict(token_mixer=dict(input_gate=True, gate_bias=False)),
        28_534_600,
    ),
    'forget gate': (dict(token_mixer=dict(forget_gate=True)), 28_680_328),
    'shortcut': (dict(token_mixer=dict(shortcut=True)), 28_269_448),
    'no normalisation': (dict(token_mixer=dict(normalization=False)), 28_265_032),
    'single head': (SINGLE_HEAD, 24_226_504),
    'block all': (BLOCK_ALL, 28_479_688),
    'block sub': (dict(block_design='sub'), 30_470_152),
    'ape': (dict(ape=224), 29_695_048),
    'lepe': (dict(token_mixer=dict(lepe=True)), 28_309_192),
    'cpe once': (dict(cpe=1), 28_309_192),
    'cpe twice': (dict(cpe=2), 28_353_352),
    'rope': (dict(token_mixer=dict(rope=True)), 28_265_032),
}

EVERYTHING = dict(
    block_design='sub',
    expansion=2,
    cpe=2,
    token_mixer=dict(
        qk_head_dims=8,
        input_gate=True,
        forget_gate=True,
        shortcut=True,
        lepe=True,
        rope=True,
    ),
)
#: Networks that tests go through.
NETWORKS = {
    'baseline': {},
    'input gate': dict(token_mixer=dict(input_gate=True)),
    'forget gate': dict(token_mixer=dict(forget_gate=True)),
    'no normalisation': dict(token_mixer=dict(normalization=False)),
    'single head': dict(token_mixer=dict(num_heads=1, qk_head_dims=8)),
    'block sub': dict(block_design='sub'),
    'block all': dict(block_design='all', expansion=2),
    'everything': EVERYTHING,
}
networks = pytest.mark.parametrize('options', NETWORKS.values(), ids=NETWORKS)


@pytest.mark.parametrize('options, parameters', COUNTS.values(), ids=COUNTS)
def test_parameter_count(options, parameters):
    """As counted for the paper's tables."""
    with torch.device('meta'):
        model = LinearAttentionSwin(out_indices=3, **options)
    head = 768 * 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) + head == parameters


def mixed(state, prefix, u, heads, values=None):
    """Eq. 2 by every pair of tokens, (N, H, W, C)."""
    qk = F.linear(u, state[f'{prefix}.qk.weight'], state[f'{prefix}.qk.bias'])
    if values is None:
        values = F.linear(u, state[f'{prefix}.v.weight'], state[f'{prefix}.v.bias'])
    q, k = (F.elu(qk) + 1).tensor_split(2, dim=-1)
    q, k, v = (
        x.flatten(1, 2).view(len(x), -1, heads, x.shape[-1] // heads)
        for x in (q, k, values)
    )
    weights = torch.einsum('nihd,njhd->nhij', q, k)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6 * weights.shape[-1])
    return torch.einsum('nhij,njhc->nihc', weights, v).reshape(u.shape[:3] + (-1,))


def block(state, prefix, x, heads, ape=False, cpe=0, design='transformer'):
    def linear(name, y):
        return F.linear(
            y, state[f'{prefix}.{name}.weight'], state[f'{prefix}.{name}.bias']
        )

    def norm(name, y):
        weights = state[f'{prefix}.{name}.weight'], state[f'{prefix}.{name}.bias']
        return F.layer_norm(y, y.shape[-1:], *weights)

    def conv(name, y):
        weight = state[f'{prefix}.{name}.weight']
        bias = state[f'{prefix}.{name}.bias']
        y = F.conv2d(y.movedim(-1, 1), weight, bias, padding=1, groups=len(weight))
        return y.movedim(1, -1)

    if cpe:
        x = x + conv('cpe1', x)
    u = norm('norm1', x)
    if ape:
        u = u + state[f'{prefix}.ape']
    if design == 'transformer':
        x = x + linear('proj', mixed(state, f'{prefix}.attn', u, heads))
    else:
        v = F.silu(conv('dwc', linear('in_proj', u)))
        y = mixed(state, f'{prefix}.attn', v, heads, values=v)
        x = x + linear('out_proj', y * F.silu(linear('act_proj', u)))
    if cpe == 2:
        x = x + conv('cpe2', x)
    if design == 'all':
        return x
    return x + linear('mlp.fc2', F.gelu(linear('mlp.fc1', norm('norm2', x))))


def assembled(model, images, **options):
    """The network from its weights and MMCV's patch layers."""
    state = dict(model.named_parameters())
    tokens, size = mmcvs_embedding(model.patch_embed, 3, 16)(images)
    outputs = []
    for i, (depth, heads) in enumerate(zip(NANO['depths'], NANO['num_heads'])):
        x = tokens.unflatten(1, size)
        for j in range(depth):
            x = block(state, f'layers.{i}.blocks.{j}', x, heads, **options)
        y = F.layer_norm(x, x.shape[-1:], *getattr(model, f'norm{i}').parameters())
        outputs.append(y.movedim(-1, 1))
        if i < 3:
            merging = mmcvs_merging(model.layers[i].downsample, 16 * 2**i)
            tokens, size = merging(x.flatten(1, 2), size)
    return outputs


def mmcvs_embedding(ours, in_channels, channels):
    theirs = transformer.PatchEmbed(
        in_channels, channels, kernel_size=4, stride=4, norm_cfg=dict(type='LN')
    ).double()
    theirs.projection, theirs.norm = ours.proj, ours.norm
    return theirs


def mmcvs_merging(ours, channels):
    """MMCV has the four tokens of a channel side by side, and we the channels of one.

    Ours is the order of Swin's authors.
    """
    theirs = transformer.PatchMerging(channels, 2 * channels).double()
    # (row, column) of the tokens: MMCV has 00 01 10 11, and Swin 00 10 01 11.
    order = torch.arange(4 * channels).view(4, channels)[[0, 2, 1, 3]].T.flatten()
    theirs.norm.weight = nn.Parameter(ours.norm.weight[order])
    theirs.norm.bias = nn.Parameter(ours.norm.bias[order])
    theirs.reduction.weight = nn.Parameter(ours.reduction.weight[:, order])
    return theirs


def randomised(model):
    """Weights that make every part matter, in float64."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.3 * (parameter.dim() == 1), std=0.2)
    return model.double().eval()


@pytest.mark.parametrize(
    'options, parts',
    [
        ({}, {}),
        (dict(ape=(41, 60)), dict(ape=True)),
        (dict(cpe=1), dict(cpe=1)),
        (dict(cpe=2), dict(cpe=2)),
        (dict(block_design='sub'), dict(design='sub')),
        (dict(block_design='all', expansion=2), dict(design='all')),
        (
            dict(block_design='sub', expansion=1.5, ape=(41, 60), cpe=2),
            dict(design='sub', ape=True, cpe=2),
        ),
    ],
)
def test_features_equal_another_assembly(options, parts):
    torch.manual_seed(0)
    model = randomised(LinearAttentionSwin(NANO, **options))
    images = torch.rand(2, 3, 41, 60, dtype=torch.float64, requires_grad=True)
    actual, expected = model(images), assembled(model, images, **parts)
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(sum(x.square().mean() for x in actual), images),
        torch.autograd.grad(sum(x.square().mean() for x in expected), images),
    )


@pytest.mark.parametrize('size', [(8, 8), (7, 9), (1, 5)])
def test_patch_layers_are_mmcvs(size):
    torch.manual_seed(0)
    stem, merging = PatchEmbed(3, 8).double(), SwinPatchMerging(8).double()
    for layer in (stem, merging):
        randomised(layer)
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    expected, patches = mmcvs_embedding(stem, 3, 8)(images)
    torch.testing.assert_close(stem(images).flatten(2).mT, expected)
    maps = torch.rand(2, 8, *size, dtype=torch.float64)
    expected, halves = mmcvs_merging(merging, 8)(maps.flatten(2).mT, size)
    actual = merging(maps)
    assert (stem(images).shape[2:], actual.shape[2:]) == (patches, halves)
    torch.testing.assert_close(actual.flatten(2).mT, expected)


@networks
@pytest.mark.parametrize('size', [(1, 1), (2, 37), (33, 65)])
def test_any_image_size(options, size):
    model = LinearAttentionSwin(NANO, **options).eval()
    with torch.no_grad():
        features = model(torch.rand(2, 3, *size))
    height, width = (-(-side // 4) for side in size)
    for i, feature in enumerate(features):
        assert feature.shape == (2, 16 * 2**i, height, width)
        assert feature.is_contiguous()
        assert feature.isfinite().all()
        height, width = -(-height // 2), -(-width // 2)


@pytest.mark.parametrize(
    'ape, as_large, tables',
    [
        (64, (61, 62), [(16, 16), (8, 8), (4, 4), (2, 2)]),
        ((33, 1), (36, 4), [(9, 1), (5, 1), (3, 1), (2, 1)]),
    ],
)
def test_the_absolute_embedding_names_its_size(ape, as_large, tables):
    model = LinearAttentionSwin(NANO, ape=ape).eval()
    for i, (stage, table) in enumerate(zip(model.layers, tables)):
        assert stage.blocks[0].ape.shape == (*table, 16 * 2**i)
    assert model.layers[0].blocks[0].ape.std().item() == pytest.approx(0.02, rel=0.3)
    height, width = (64, 64) if ape == 64 else ape
    with torch.no_grad():
        model(torch.rand(1, 3, height, width))
        model(torch.rand(1, 3, *as_large))  # when it is padded
        for wrong in ((height + 4, width), (height, width + 4), (1, 1)):
            message = rf'ape = {re.escape(str(ape))}.* have {wrong[0]} x {wrong[1]}'
            with pytest.raises(ValueError, match=message):
                model(torch.rand(1, 3, *wrong))


def test_without_positions_patches_may_change_places():
    """The order matters to patch merging alone: quarters of the image may change."""
    model = randomised(LinearAttentionSwin(NANO))
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    maps, rolled = model(images), model(images.roll((32, 32), (2, 3)))
    for x, y in zip(maps, rolled):
        half = x.shape[-1] // 2
        torch.testing.assert_close(x.roll((half, half), (2, 3)), y)


@networks
def test_images_of_a_batch_do_not_mix(options):
    model = LinearAttentionSwin(NANO, **options).eval()
    images = torch.rand(2, 3, 24, 40)
    with torch.no_grad():
        together, alone = model(images), [model(x[None]) for x in images]
    for i, feature in enumerate(together):
        one_by_one = torch.cat([maps[i] for maps in alone])
        torch.testing.assert_close(feature, one_by_one, rtol=1e-4, atol=1e-5)


@networks
def test_every_parameter_gets_a_gradient(options):
    """DistributedDataParallel waits for it, and warns of another memory layout."""
    model = LinearAttentionSwin(NANO, **options, ape=(32, 48)).train()
    sum(f.square().mean() for f in model(torch.rand(2, 3, 32, 48))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        assert parameter.grad.stride() == parameter.stride(), name


@networks
def test_recomputing_changes_nothing(options):
    images = torch.rand(2, 3, 40, 24)
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = LinearAttentionSwin(
            NANO, drop_path_rate=0.5, drop_rate=0.1, with_cp=with_cp, **options
        ).train()
        sum(f.square().mean() for f in model(images)).backward()
        results.append([p.grad for p in model.parameters()])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_outputs_and_frozen_stages():
    """What all backbones of ours share, see the tests of MLLA."""
    model = LinearAttentionSwin(NANO, **EVERYTHING).eval()
    some = LinearAttentionSwin(
        NANO, out_indices=(0, 2), frozen_stages=1, **EVERYTHING
    ).train()
    some.load_state_dict(model.state_dict(), strict=False)
    images = torch.rand(1, 3, 32, 32)
    for one, other in zip(some(images), (model(images)[i] for i in (0, 2))):
        torch.testing.assert_close(one, other)
    frozen = (
        'patch_embed.',
        'layers.0.',
        'norm0.',
        'layers.2.downsample.',
        'layers.3.',
    )
    for name, parameter in some.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
    assert not some.layers[0].training
    assert some.layers[1].training


@MODELS.register_module()
class NormalisedMixer(TokenMixer):
    """A mixer with BatchNorm."""

    def __init__(self, embed_dims, num_heads, v_proj, qkv_bias):
        super().__init__(embed_dims, num_heads, v_proj, qkv_bias)
        self.norm = nn.BatchNorm2d(embed_dims)

    def attend(self, q, k, v):
        return self.norm((q + k + v).movedim(-1, 1)).movedim(1, -1)


def test_norm_eval():
    options = dict(token_mixer=dict(type='NormalisedMixer'), norm_eval=True)
    model = LinearAttentionSwin(NANO, **options).train()
    norms = [x for x in model.modules() if isinstance(x, nn.BatchNorm2d)]
    assert len(norms) == 5
    assert not any(x.training for x in norms)
    assert model.layers[3].blocks[0].training


def test_layer_depth():
    model = LinearAttentionSwin(NANO, **EVERYTHING, ape=32)
    assert model.get_layer_depth('patch_embed.norm.weight') == (0, 7)
    for part in ('ape', 'attn.A_log', 'attn.D', 'attn.delta.bias', 'mlp.fc1.weight'):
        name = f'layers.2.blocks.1.{part}'
        assert name in dict(model.named_parameters())
        assert model.get_layer_depth(f'backbone.{name}', 'backbone.') == (4, 7)
    assert model.get_layer_depth('layers.2.downsample.norm.weight') == (4, 7)
    assert model.get_layer_depth('norm3.weight') == (6, 7)


def is_mambas(model):
    """Whether every block has Mamba's initial values."""
    for stage in model.layers:
        for attn in (x.attn for x in stage.blocks):
            steps = F.softplus(attn.delta.bias)
            # The most probable of the wrong ones is 0.69.
            assert steps.min() > 0.99e-3 and steps.max() < 1.01e-1
            bound = attn.delta.w2.in_features**-0.5
            assert 0.5 * bound < attn.delta.w2.weight.abs().max() <= bound
            states = torch.arange(1.0, attn.qk_head_dims + 1)
            torch.testing.assert_close(attn.A_log.exp(), states.expand_as(attn.A_log))
            assert (attn.D == 1).all()
            # Other linear layers are the network's.
            assert attn.delta.w1.weight.abs().max() < 0.1
            assert (attn.qk.bias == 0).all()
    return True


def test_initial_values_survive_mmengine():
    """Also that of a classifier, as a Runner calls it."""
    pytest.importorskip('mmpretrain')
    init_default_scope('mmpretrain')
    backbone = dict(type='LinearAttentionSwin', arch=NANO, out_indices=3, **EVERYTHING)
    assert is_mambas(MODELS.build(backbone))
    model = MODELS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=backbone,
            neck=dict(type='mmpretrain.GlobalAveragePooling'),
            head=dict(type='mmpretrain.LinearClsHead', num_classes=4, in_channels=128),
        )
    )
    model.init_weights()
    assert is_mambas(model.backbone)


@networks
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast(options, dtype):
    if dtype is torch.float16 and torch.__version__ < '2.3':
        pytest.skip('no float16 kernels on the CPU')
    torch.manual_seed(0)
    model = LinearAttentionSwin(NANO, **options).train()
    double = copy.deepcopy(model).double()
    # Constant images, too.
    images = torch.cat([torch.randn(2, 3, 40, 48), torch.full((1, 3, 40, 48), -2.0)])
    with torch.autocast('cpu', dtype=dtype):
        features = model(images)
    for one, other in zip(features, double(images.double())):
        assert relative_error(one, other) < 5e-2
    (sum(f.float().square().mean() for f in features) * 64).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@needs_compiler
def test_compiled():
    torch._dynamo.reset()
    counter = CompileCounter()
    options = dict(block_design='sub', token_mixer=dict(input_gate=True, rope=True))
    plain = LinearAttentionSwin(NANO, out_indices=0, **options).train()
    compiled = copy.deepcopy(plain)
    compile_backbone(compiled, backend=counter)
    images = torch.randn(2, 3, 48, 40)
    assert relative_error(compiled(images)[0], plain(images)[0]) < 1e-5
    assert counter.frame_count == 1


@needs_compiler
def test_the_compiler_leaves_the_recurrence_alone():
    """The graphs do not grow with its tokens."""
    operations = []
    plain = LinearAttentionSwin(
        NANO, out_indices=0, token_mixer=dict(forget_gate=True, shortcut=True)
    ).train()
    for size in ((24, 20), (48, 40)):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = copy.deepcopy(plain)
        compile_backbone(compiled, backend=counter)
        images = torch.randn(2, 3, *size)
        actual, expected = compiled(images)[0], plain(images)[0]
        assert relative_error(actual, expected) < 1e-5
        grads = [
            torch.autograd.grad(
                y.square().sum(), [p for p in net.parameters() if p.requires_grad]
            )
            for y, net in ((actual, compiled), (expected, plain))
        ]
        for one, other in zip(*grads):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        operations.append(counter.op_count)
    assert operations[0] == operations[1] < 300


def test_is_registered_in_the_root_registry():
    model = MODELS.build(dict(type='LinearAttentionSwin', arch=NANO))
    assert isinstance(model, LinearAttentionSwin)


def test_drop_path_rises_linearly():
    with torch.device('meta'):
        model = LinearAttentionSwin(drop_path_rate=0.22)
    rates = [b.drop_path.drop_prob for stage in model.layers for b in stage.blocks]
    assert rates == pytest.approx([0.02 * i for i in range(12)], abs=1e-6)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(arch='small'), "Unknown arch 'small'"),
        (dict(arch={**NANO, 'num_heads': (1, 2, 3, 8)}), r'num_heads\[2\] = 3'),
        (dict(block_design='mamba'), 'block_design must be one of .*all.*mamba'),
        (dict(block_design=['sub']), 'block_design must be one of'),
        (dict(block_design='sub', expansion=0), 'expansion must be .* got 0'),
        (dict(block_design='sub', expansion=-1), 'expansion must be .* got -1'),
        (dict(block_design='all', expansion='x'), "expansion must be .* got 'x'"),
        (dict(block_design='all', expansion=True), 'expansion must be .* got True'),
        (dict(block_design='sub', expansion=float('nan')), 'expansion must be'),
        (dict(block_design='sub', expansion=1.2), 'num_heads = 8 .* 153 channels'),
        (dict(expansion=2), "expansion = 2 is for Mamba's block"),
        (dict(ape=0), 'ape must be an int of at least 1, got 0'),
        (dict(ape=(224,)), r'ape must be an image size.* got \(224,\)'),
        (dict(ape=(224, 224, 3)), 'ape must be an image size'),
        (dict(ape='224'), "ape must be an int of at least 1, got '224'"),
        (dict(ape=22.5), 'ape must be an int of at least 1, got 22.5'),
        (dict(ape=True), 'ape must be an int of at least 1, got True'),
        (dict(ape=(224, 0)), 'ape must be an int of at least 1, got 0'),
        (dict(cpe=3), 'cpe must be an int from 0 to 2, got 3'),
        (dict(cpe=True), 'cpe must be an int from 0 to 2, got True'),
        (dict(in_channels=0), 'in_channels must be an int'),
        (dict(mlp_ratio=0), 'mlp_ratio must be'),
        (dict(qkv_bias=1), 'qkv_bias must be True or False'),
        (dict(drop_rate=1), 'drop_rate must be'),
        (dict(drop_path_rate=-0.1), 'drop_path_rate must be'),
        (dict(out_indices=4), 'out_indices must lie'),
        (dict(frozen_stages=5), 'frozen_stages must be'),
        (dict(norm_eval=None), 'norm_eval must be'),
        (dict(with_cp=0), 'with_cp must be'),
        (dict(token_mixer='LinearAttention'), 'token_mixer must be a dict'),
        (dict(token_mixer=dict(input_gate=2)), 'input_gate must be True or False'),
        (dict(token_mixer=dict(rope=True, qk_head_dims=3)), 'no multiple of 4'),
        (dict(token_mixer=dict(num_heads=3)), 'num_heads = 3 does not divide'),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message) as info:
        LinearAttentionSwin(**{'arch': NANO, **options})
    assert len(str(info.value)) < 300


@pytest.mark.parametrize(
    'images, message',
    [
        (torch.rand(1, 1, 32, 32), 'Expected non-empty images'),
        (torch.rand(0, 3, 32, 32), 'Expected non-empty images'),
        (torch.ones(1, 3, 32, 32).byte(), 'floating-point numbers, got torch.uint8'),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        LinearAttentionSwin(NANO)(images)
