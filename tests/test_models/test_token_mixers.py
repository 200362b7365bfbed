# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn

from mlla_mm.checkpoints import load_pretrained
from mlla_mm.checkpoints.pretrained import Pretrained
from mlla_mm.checkpoints.reader import CheckpointError
from mlla_mm.models import MLLA, LinearAttentionSwin
from mlla_mm.models.layers import (
    EfficientAttention,
    EnhancedLinearAttention,
    FocusedLinearAttention,
    HydraAttention,
    LinearAttention,
    MLLAAttention,
    SoftmaxAttention,
    TokenMixer,
)

from ..reference import official_weights, relative_error

NANO = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
BACKBONES = [MLLA, LinearAttentionSwin]
OTHERS = [
    EfficientAttention,
    EnhancedLinearAttention,
    FocusedLinearAttention,
    HydraAttention,
    SoftmaxAttention,
]


def mixer_of(kind, channels=12, heads=3, **options):
    """A mixer whose parameters are all of order one."""
    mixer = kind(channels, heads, **options)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer


# --- The papers' equations, in float64, head by head and token by token ---


def weighted_mean(weights, values):
    return sum(w * v for w, v in zip(weights, values)) / sum(weights)


def softmax(q, keys, values):
    return weighted_mean([(q @ k / len(q) ** 0.5).exp() for k in keys], values)


def relu(q, keys, values):
    # The average over the tokens and the small number are those of the package.
    weights = [q.clamp(min=0) @ k.clamp(min=0) for k in keys]
    total = sum(w * v for w, v in zip(weights, values)) / len(keys)
    return total / (sum(weights) / len(keys) + 1e-6)


def efficient(q, keys, values):
    normalised = torch.stack(keys).exp()
    normalised = normalised / normalised.sum(0)
    query = q.exp() / q.exp().sum()
    return sum((query @ k) * v for k, v in zip(normalised, values))


def focus(mixer, x):
    """f(x) of all channels of a token."""
    x = (x.clamp(min=0) + 1e-6) / (1 + mixer.scale.exp()).log()
    power = x**mixer.power
    return math.sqrt(x @ x) / math.sqrt(power @ power) * power


def focused(q, keys, values):
    weights = [q @ k for k in keys]
    total = sum(w * v for w, v in zip(weights, values)) / len(keys)
    return total / (sum(weights) / len(keys) + 1e-6)


def hydra(q, keys, values):
    """All channels at once: each is a head."""
    total = sum(k / math.sqrt(k @ k) * v for k, v in zip(keys, values))
    return q / math.sqrt(q @ q) * total


def convolved(conv, v):
    """A depthwise convolution of (H, W, C) as a sum of shifted maps, zero outside.

    The kernels repeat if there are fewer than channels.
    """
    size = conv.kernel_size[0]
    repeats = v.shape[-1] // len(conv.weight)
    kernels = conv.weight[:, 0].repeat(repeats, 1, 1)
    padded = F.pad(v, (0, 0, size // 2, size // 2, size // 2, size // 2))
    shifted = (
        kernels[:, i, j] * padded[i : i + v.shape[0], j : j + v.shape[1]]
        for i in range(size)
        for j in range(size)
    )
    return sum(shifted) + conv.bias.repeat(repeats)


ATTENTIONS = {
    EfficientAttention: efficient,
    EnhancedLinearAttention: relu,
    FocusedLinearAttention: focused,
    HydraAttention: hydra,
    SoftmaxAttention: softmax,
}


def reference(mixer, x):
    """What a mixer has to return for maps x, in float64."""
    attention, heads = ATTENTIONS[type(mixer)], mixer.num_heads
    heads = 1 if attention is hydra else heads
    results = []
    for image in x:
        tokens = image.flatten(0, 1)
        q, k = (tokens @ mixer.qk.weight.T + mixer.qk.bias).chunk(2, dim=-1)
        v = tokens if mixer.v is None else tokens @ mixer.v.weight.T + mixer.v.bias
        if attention is focused:
            q, k = (torch.stack([focus(mixer, token) for token in t]) for t in (q, k))
        outputs = []
        for one in zip(*(t.chunk(heads, dim=-1) for t in (q, k, v))):
            queries, keys, values = map(list, one)
            outputs.append(torch.stack([attention(q, keys, values) for q in queries]))
        y = torch.cat(outputs, dim=-1).unflatten(0, image.shape[:2])
        if hasattr(mixer, 'dwc'):
            y = y + convolved(mixer.dwc, v.unflatten(0, image.shape[:2]))
        results.append(y)
    return torch.stack(results)


@pytest.mark.parametrize('size', [(1, 1), (5, 3), (4, 6)])
@pytest.mark.parametrize('v_proj', [True, False])
@pytest.mark.parametrize('kind', OTHERS)
@torch.no_grad()
def test_equations(kind, v_proj, size):
    mixer = mixer_of(kind, v_proj=v_proj).double()
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), reference(mixer, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('kind', [x for x in OTHERS if x is not HydraAttention])
@torch.no_grad()
def test_equations_with_narrow_queries(kind):
    mixer = mixer_of(kind, qk_head_dims=2).double()
    assert mixer.qk.out_features == 2 * 3 * 2
    x = torch.randn(1, 3, 4, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), reference(mixer, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('power', [1, 2, 32])
@torch.no_grad()
def test_the_power_of_focused_attention(power):
    mixer = mixer_of(FocusedLinearAttention, power=power).double()
    x = torch.randn(1, 3, 4, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), reference(mixer, x), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_softmax_attention_is_that_of_pytorch():
    mixer = mixer_of(SoftmaxAttention)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.in_proj_weight.copy_(torch.cat([mixer.qk.weight, mixer.v.weight]))
    theirs.in_proj_bias.copy_(torch.cat([mixer.qk.bias, mixer.v.bias]))
    theirs.out_proj.weight.copy_(torch.eye(12))
    theirs.out_proj.bias.zero_()
    x = torch.randn(2, 4, 5, 12)
    tokens = x.flatten(1, 2)
    expected, _ = theirs(tokens, tokens, tokens)
    torch.testing.assert_close(mixer(x), expected.unflatten(1, (4, 5)))


@torch.no_grad()
def test_enhanced_attention_in_terms_of_the_study():
    """The documented place of the convolution is that of LePE."""
    mixer = mixer_of(EnhancedLinearAttention)
    same = LinearAttention(12, 3, feature_map='relu', lepe=True)
    weights = {k.replace('dwc', 'lepe'): v for k, v in mixer.state_dict().items()}
    same.load_state_dict(weights)
    x = torch.randn(2, 4, 5, 12)
    torch.testing.assert_close(mixer(x), same(x))


@pytest.mark.parametrize('kind', OTHERS)
@torch.no_grad()
def test_what_knows_of_positions(kind):
    """Tokens in another order give the outputs in that order, unless neighbours do."""
    mixer = mixer_of(kind).double()
    x = torch.randn(1, 4, 5, 12, dtype=torch.float64)
    order = torch.randperm(20)

    def permuted(t):
        return t.flatten(1, 2)[:, order].unflatten(1, (4, 5))

    error = relative_error(mixer(permuted(x)), permuted(mixer(x)))
    assert error > 1e-2 if hasattr(mixer, 'dwc') else error < 1e-12


# --- Numerics ---


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kind', OTHERS)
@torch.no_grad()
def test_half_precision_on_many_tokens(kind, dtype):
    """Sums over the tokens of a large image stay in range, and so do large values."""
    if dtype == torch.float16 and torch.__version__ < '2.3':
        pytest.skip('no float16 kernels on the CPU')
    mixer = mixer_of(kind, channels=16, heads=2).double()
    q, k, v = (torch.randn(1, 64, 96, 16).to(dtype) for _ in range(3))
    v = v * 100 + 100
    expected = mixer.attend(q.double(), k.double(), v.double())
    actual = mixer.to(dtype).attend(q, k, v)
    assert actual.dtype == dtype
    bound = 2e-3 if dtype == torch.float16 else 2e-2
    assert relative_error(actual, expected) < bound


@pytest.mark.parametrize('kind', OTHERS)
def test_under_autocast(kind):
    mixer = mixer_of(kind)
    x = torch.randn(1, 4, 6, 12)
    expected = reference(mixer.double(), x.double())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = mixer.float()(x)
        actual.float().sum().backward()
    assert relative_error(actual, expected) < 3e-2
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize('kind', OTHERS)
def test_gradients_against_finite_differences(kind):
    mixer = mixer_of(kind, channels=4, heads=2).double()
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    parameters = tuple(mixer.parameters())
    assert torch.autograd.gradcheck(
        lambda x, *_: mixer(x), (x, *parameters), fast_mode=True
    )


@pytest.mark.parametrize('kind', OTHERS)
def test_tokens_whose_queries_and_keys_vanish(kind):
    """ReLU can leave zeros alone, also in every channel."""
    mixer = mixer_of(kind)
    for value in (0.0, -1.0):
        with torch.no_grad():
            mixer.qk.weight.zero_()
            mixer.qk.bias.fill_(value)
        y = mixer(torch.randn(1, 3, 4, 12))
        y.sum().backward()
        assert y.isfinite().all()
        assert all(p.grad.isfinite().all() for p in mixer.parameters())


# --- In networks ---


@pytest.mark.parametrize('backbone', BACKBONES)
@pytest.mark.parametrize('kind', [*OTHERS, LinearAttention, MLLAAttention])
def test_networks_with_each_mixer(kind, backbone):
    model = backbone(NANO, token_mixer=dict(type=kind.__name__))
    values = {
        type(module.attn) is kind and module.attn.v is None
        for module in model.modules()
        if hasattr(module, 'attn')
    }
    # MLLA's blocks project their input before.
    assert values == {backbone is MLLA}
    maps = model(torch.rand(2, 3, 37, 50))
    assert [tuple(x.shape) for x in maps] == [
        (2, 16, 10, 13), (2, 32, 5, 7), (2, 64, 3, 4), (2, 128, 2, 2)
    ]  # fmt: skip
    sum(x.square().mean() for x in maps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize('kind', OTHERS)
@torch.no_grad()
def test_a_graph_serves_every_image_size(kind):
    mixer = mixer_of(kind)
    graph = torch.jit.trace(mixer, torch.randn(2, 4, 5, 12), check_trace=False)
    x = torch.randn(1, 7, 3, 12)
    torch.testing.assert_close(graph(x), mixer(x))


def test_parameters_beside_those_of_the_baseline():
    def count(**token_mixer):
        with torch.device('meta'):
            model = LinearAttentionSwin(token_mixer=token_mixer)
        return sum(p.numel() for p in model.parameters())

    # Channels of the blocks: 2 x 96 + 2 x 192 + 6 x 384 + 2 x 768.
    baseline, channels = count(), 4416
    for name in ('HydraAttention', 'EfficientAttention', 'SoftmaxAttention'):
        assert count(type=name) == baseline
    # 3x3 weights and a bias for each channel.
    assert count(type='EnhancedLinearAttention') == baseline + 10 * channels
    # The 32 channels of a head have 5x5 weights and a bias, in each of 12 blocks.
    focused = baseline + 12 * 32 * 26 + channels
    assert count(type='FocusedLinearAttention') == focused


@torch.no_grad()
def test_the_default_of_mlla_is_its_own_attention():
    torch.manual_seed(0)
    model = MLLA(NANO).eval()
    named = MLLA(NANO, token_mixer=dict(type='MLLAAttention')).eval()
    named.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 33, 45)
    assert all(map(torch.equal, named(x), model(x)))


@pytest.mark.parametrize('backbone', BACKBONES)
def test_a_dict_without_type_is_for_the_default(backbone):
    model = backbone(NANO, token_mixer=dict(num_heads=1))
    attn = model.layers[3].blocks[0].attn
    assert type(attn) is (MLLAAttention if backbone is MLLA else LinearAttention)
    assert attn.num_heads == 1 and attn.qk_head_dims == 128


# --- Mixers of others ---


@pytest.fixture
def register():
    """Register a class for a test."""
    names = []

    def add(kind):
        MODELS.register_module(module=kind)
        names.append(kind.__name__)
        return kind

    yield add
    for name in names:
        del MODELS._module_dict[name]


class Pooling(nn.Module):
    """What a block asks of a mixer, and nothing more. It has no parameters."""

    def __init__(self, embed_dims, num_heads, v_proj, qkv_bias, size=3):
        super().__init__()
        self.arguments = embed_dims, num_heads, v_proj, qkv_bias
        self.size = size

    def forward(self, x):
        assert x.shape[-1] == self.arguments[0]
        y = F.avg_pool2d(x.permute(0, 3, 1, 2), self.size, 1, self.size // 2)
        return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize('backbone', BACKBONES)
def test_a_module_that_is_no_token_mixer(backbone, register):
    register(Pooling)
    model = backbone(NANO, token_mixer=dict(type='Pooling', size=5), qkv_bias=False)
    mixers = [m for m in model.modules() if isinstance(m, Pooling)]
    assert [m.size for m in mixers] == [5] * 4
    v_proj = backbone is LinearAttentionSwin
    assert [m.arguments for m in mixers] == [
        (16, 1, v_proj, False), (32, 2, v_proj, False),
        (64, 4, v_proj, False), (128, 8, v_proj, False),
    ]  # fmt: skip
    sum(x.sum() for x in model(torch.rand(1, 3, 64, 64))).backward()


class Started(TokenMixer):
    """Starts with weights of its own."""

    def init_weights(self):
        nn.init.eye_(self.v.weight)

    def attend(self, q, k, v):
        return v


@pytest.mark.parametrize('design', ['transformer', 'sub', 'all'])
def test_starting_values_of_a_mixer(design, register):
    """They come after those of linear layers, which are random."""
    register(Started)
    model = LinearAttentionSwin(
        NANO, token_mixer=dict(type='Started', v_proj=True), block_design=design
    )
    for attn in (stage.blocks[0].attn for stage in model.layers):
        assert torch.equal(attn.v.weight, torch.eye(len(attn.v.weight)))
        assert 0.01 < attn.qk.weight.std() < 0.03


class OfMMEngine(BaseModule):
    """Starts as MMEngine's modules do."""

    def __init__(self, embed_dims, num_heads, v_proj, qkv_bias):
        super().__init__(init_cfg=dict(type='Constant', layer='Linear', val=0.5))
        self.v = nn.Linear(embed_dims, embed_dims)

    def forward(self, x):
        return self.v(x)


@pytest.mark.parametrize('backbone', BACKBONES)
def test_starting_values_of_a_module_of_mmengine(backbone, register, tmp_path):
    register(OfMMEngine)
    model = backbone(NANO, token_mixer=dict(type='OfMMEngine'))
    model.init_weights()
    for attn in (stage.blocks[0].attn for stage in model.layers):
        assert (attn.v.weight == 0.5).all()
    # Weights of a file come after them.
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7)
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth'))
    other = backbone(NANO, token_mixer=dict(type='OfMMEngine'), init_cfg=init_cfg)
    other.init_weights()
    assert all((parameter == 7).all() for parameter in other.parameters())


# --- Errors ---


@pytest.mark.parametrize(
    'token_mixer, message',
    [
        ('HydraAttention', r"must be a dict such as dict\(type='{}'\), got 'Hydra"),
        (['HydraAttention'], r"must be a dict such as dict\(type='{}'\), got \['Hydra"),
        (dict(embed_dims=8), 'token_mixer has embed_dims = 8, .* Leave it out'),
        (dict(num_heads=5), 'num_heads = 5 does not divide the 16 channels of {}'),
        (dict(num_heads=0), 'num_heads must be an int of at least 1, got 0'),
        (dict(v_proj=1), 'v_proj must be True or False, got 1'),
        (dict(type='SoftmaxAttention', qk_head_dims=0), 'qk_head_dims must be an int'),
        (dict(type='FocusedLinearAttention', power=0), 'power must be an int'),
    ],
)
@pytest.mark.parametrize('backbone', BACKBONES)
def test_impossible_mixers(backbone, token_mixer, message):
    default = 'MLLAAttention' if backbone is MLLA else 'LinearAttention'
    with pytest.raises(ValueError, match=message.format(default)):
        backbone(NANO, token_mixer=token_mixer)


@pytest.mark.parametrize('backbone', BACKBONES)
def test_a_type_that_is_not_registered(backbone):
    with pytest.raises(KeyError, match='HydraAtention is not in the .* registry'):
        backbone(NANO, token_mixer=dict(type='HydraAtention'))


@pytest.mark.parametrize(
    'token_mixer',
    [dict(type='SoftmaxAttention'), dict(type='LinearAttention'), dict(type='Pooling')],
)
def test_official_weights_do_not_fit_another_mixer(token_mixer, register, tmp_path):
    """With a mixer that has none of the names, too: they are not loaded in part."""
    register(Pooling)
    torch.save(dict(model=official_weights('mlla-t')), tmp_path / 'MLLA_T.pth')
    model = MLLA('tiny', token_mixer=token_mixer, out_indices=(3,))
    for load in (load_pretrained, lambda m, path: Pretrained(str(path))(m)):
        with pytest.raises(CheckpointError) as error:
            load(model, tmp_path / 'MLLA_T.pth')
        assert 'attn.lepe.weight: (64, 1, 3, 3) in the file' in str(error.value)
        assert "Set the backbone's token_mixer" in str(error.value)
    load_pretrained(MLLA('tiny', out_indices=(3,)), tmp_path / 'MLLA_T.pth')
