# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS

from mlla_mm.models.layers import LinearAttention
from mlla_mm.models.layers.linear_attention import Delta

from ..reference import relative_error

#: Each switch alone, with what belongs to it, and several together.
SWITCHES = {
    'baseline': {},
    'without bias': dict(qkv_bias=False),
    'relu': dict(feature_map='relu'),
    'identity': dict(feature_map='identity', normalization=False),
    'values are the input': dict(v_proj=False),
    'wide queries': dict(qk_head_dims=8),
    'single head': dict(num_heads=1, qk_head_dims=4),
    'input gate': dict(input_gate=True),
    'input gate without bias': dict(input_gate=True, gate_bias=False, gate_dims=3),
    'forget gate': dict(forget_gate=True),
    'forget gate by columns': dict(forget_gate=True, scan_order='columns'),
    'decayed normaliser': dict(forget_gate=True, decayed_normalizer=True),
    'forget gate, single head': dict(forget_gate=True, num_heads=1, qk_head_dims=4),
    'shortcut': dict(shortcut=True),
    'shortcut of the input': dict(shortcut=True, shortcut_of='input'),
    'no normalisation': dict(normalization=False),
    'lepe': dict(lepe=True),
    'rope': dict(rope=True),
    'positions': dict(lepe=True, rope=True),
    'selective SSM': dict(
        num_heads=1,
        qk_head_dims=4,
        feature_map='identity',
        input_gate=True,
        forget_gate=True,
        shortcut=True,
        normalization=False,
    ),
    'all': dict(
        qk_head_dims=4,
        input_gate=True,
        forget_gate=True,
        shortcut=True,
        lepe=True,
        rope=True,
        scan_order='columns',
    ),
    'all, decayed normaliser': dict(
        qk_head_dims=4,
        input_gate=True,
        forget_gate=True,
        shortcut=True,
        lepe=True,
        rope=True,
        decayed_normalizer=True,
        shortcut_of='input',
    ),
}


def build(embed_dims=12, num_heads=2, **options) -> LinearAttention:
    """A mixer in float64, all of whose parameters matter."""
    torch.manual_seed(0)
    mixer = LinearAttention(embed_dims, num_heads, **options).double()
    for name, parameter in mixer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if parameter.dim() == 1 else 0.3)
        if name == 'A_log':
            parameter.data -= 1  # the weights of some tokens are above 0.1
    return mixer


def phi(x, name):
    """The feature map, as cases."""
    return {
        'elu+1': torch.where(x > 0, x + 1, x.clamp(max=0).exp()),
        'relu': x * (x > 0),
        'identity': x,
    }[name]


def rotated(x, height, width):
    """(L, channels), row by row: pair p of the first half turns with the row."""
    pairs = torch.complex(x[:, 0::2], x[:, 1::2])
    num_freqs = pairs.shape[1] // 2
    angles = torch.tensor(
        [
            [i // width * 10000 ** (-p / num_freqs) for p in range(num_freqs)]
            + [i % width * 10000 ** (-p / num_freqs) for p in range(num_freqs)]
            for i in range(height * width)
        ],
        dtype=torch.float64,
    )
    turned = pairs * torch.exp(1j * angles)
    return torch.stack([turned.real, turned.imag], dim=-1).flatten(1)


def decays(a, delta, order):
    """How much is left of token j at token i, (L, L, c, d); and whether i sees j."""
    count = len(order)
    gates = torch.zeros(count, count, *a.shape, dtype=torch.float64)
    seen = torch.zeros(count, count, 1, 1, dtype=torch.float64)
    left = {}
    for place, i in enumerate(order):
        for j in order[:place]:
            left[i, j] = left[order[place - 1], j] * (a * delta[i, :, None]).exp()
        left[i, i] = torch.ones_like(a)
    for (i, j), factor in left.items():
        index = torch.tensor(i * count + j)
        gates = gates.flatten(0, 1).index_put((index,), factor).view_as(gates)
        seen[i, j] = 1
    return gates, seen


def quadratic(mixer: LinearAttention, x: torch.Tensor, options: dict) -> torch.Tensor:
    """The mixer by the weight of every pair of tokens, for every channel of values."""
    _, height, width, channels = x.shape
    count = height * width
    heads = mixer.num_heads
    grid = torch.arange(count).view(height, width)
    by_columns = options.get('scan_order') == 'columns'
    order = (grid.T if by_columns else grid).flatten().tolist()
    outputs = []
    for image in x:
        u = image.reshape(count, channels)
        qk = F.linear(u, mixer.qk.weight, mixer.qk.bias)
        q, k = phi(qk, options.get('feature_map', 'elu+1')).tensor_split(2, dim=1)
        v = u
        if options.get('v_proj', True):
            v = F.linear(u, mixer.v.weight, mixer.v.bias)
        q_num, k_num = q, k
        if options.get('rope'):
            q_num, k_num = (rotated(t, height, width) for t in (q, k))
        delta = torch.ones_like(v)
        if options.get('input_gate') or options.get('forget_gate'):
            steps = u @ mixer.delta.w1.weight.T @ mixer.delta.w2.weight.T
            if options.get('gate_bias', True):
                steps = steps + mixer.delta.bias
            delta = (1 + steps.exp()).log()
        values = v * delta if options.get('input_gate') else v
        c, d = channels // heads, q.shape[1] // heads
        y = torch.zeros_like(v)
        for h in range(heads):
            cs, ds = slice(h * c, (h + 1) * c), slice(h * d, (h + 1) * d)
            weights = torch.einsum('is,js->ijs', q_num[:, ds], k_num[:, ds])
            plain = torch.einsum('is,js->ijs', q[:, ds], k[:, ds])
            weights, plain = (
                t[:, :, None].expand(-1, -1, c, -1) for t in (weights, plain)
            )
            undecayed = plain
            if options.get('forget_gate'):
                gates, seen = decays(-mixer.A_log[cs].exp(), delta[:, cs], order)
                weights, undecayed = weights * gates, plain * seen
                plain = plain * gates
            sums = torch.einsum('ijcs,jc->ic', weights, values[:, cs])
            if not options.get('normalization', True):
                y[:, cs] = sums if options.get('forget_gate') else sums / count
            elif options.get('decayed_normalizer'):
                y[:, cs] = sums / (plain.sum((1, 3)) + 1e-6)
            else:
                y[:, cs] = sums / (undecayed.sum((1, 3)) + count * 1e-6)
        if options.get('shortcut'):
            y = y + mixer.D * (u if options.get('shortcut_of') == 'input' else v)
        y = y.view(height, width, channels)
        if options.get('lepe'):
            padded = F.pad(v.view(height, width, channels), (0, 0, 1, 1, 1, 1))
            y = y + mixer.lepe.bias
            for i in range(3):
                for j in range(3):
                    window = padded[i : i + height, j : j + width]
                    y = y + window * mixer.lepe.weight[:, 0, i, j]
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize('size', [(3, 4), (1, 1)])
@pytest.mark.parametrize('name', SWITCHES)
def test_against_the_quadratic_form(name, size):
    options = SWITCHES[name]
    mixer = build(**options)
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    actual, expected = mixer(x), quadratic(mixer, x, options)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    upstream = torch.randn_like(actual)
    inputs = [x, *mixer.parameters()]
    unused = size == (1, 1)  # a single token forgets nothing
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, upstream, materialize_grads=True),
        torch.autograd.grad(expected, inputs, upstream, materialize_grads=unused),
        rtol=1e-7,
        atol=1e-9,
    )


@pytest.mark.parametrize('options', [{}, dict(rope=True), dict(input_gate=True)])
def test_the_last_token_of_the_recurrence_attends_to_all(options):
    """Without decay Eq. 4 becomes Eq. 2 there."""
    mixer = build(forget_gate=True, **options)
    mixer.A_log.data.fill_(-60)
    everywhere = LinearAttention(12, 2, **options).double()
    everywhere.load_state_dict(mixer.state_dict(), strict=False)
    x = torch.randn(2, 4, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[:, -1, -1], everywhere(x)[:, -1, -1])
    assert relative_error(mixer(x), everywhere(x)) > 0.01


@pytest.mark.parametrize(
    'options, keeps',
    [
        ({}, True),
        (dict(input_gate=True, shortcut=True), True),
        (dict(normalization=False), True),
        (dict(num_heads=1, qk_head_dims=4), True),
        (dict(lepe=True), False),
        (dict(rope=True), False),
        (dict(forget_gate=True), False),
    ],
)
def test_the_order_of_the_tokens(options, keeps):
    """What has no position encoding and no recurrence does not know it."""
    mixer = build(**options)
    x = torch.randn(1, 4, 6, 12, dtype=torch.float64)
    shuffle = torch.randperm(24)

    def shuffled(maps):
        return maps.flatten(1, 2)[:, shuffle].view_as(maps)

    assert (relative_error(mixer(shuffled(x)), shuffled(mixer(x))) < 1e-12) == keeps


def test_a_token_sees_those_before_it_alone():
    x = torch.randn(1, 3, 4, 12, dtype=torch.float64)
    changed = x.clone()
    changed[0, 1, 2] += 1
    positions = {
        'rows': torch.arange(12).view(3, 4),
        'columns': torch.arange(12).view(4, 3).T,
    }
    for scan_order, position in positions.items():
        mixer = build(forget_gate=True, scan_order=scan_order)
        differs = (mixer(x) != mixer(changed)).any(-1)[0]
        assert torch.equal(differs, position >= position[1, 2])


def test_columns_are_the_rows_of_the_transposed_map():
    rows = build(forget_gate=True)
    columns = build(forget_gate=True, scan_order='columns')
    x = torch.randn(1, 3, 5, 12, dtype=torch.float64)
    expected = rows(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(columns(x), expected)


def test_rotation_leaves_the_normaliser_alone():
    """Weights that sum to one before the rotation: values of 1 show its sum."""
    mixer = build(rope=True)
    torch.nn.init.zeros_(mixer.v.weight)
    torch.nn.init.ones_(mixer.v.bias)
    x = torch.randn(1, 4, 4, 12, dtype=torch.float64)
    y = mixer(x)
    assert (y - 1).abs().max() > 0.1
    plain = build()
    plain.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(plain(x), torch.ones_like(x), rtol=1e-5, atol=0)


def test_initial_values():
    """As Mamba's with a forget gate, and else as other layers'."""
    torch.manual_seed(0)
    mixer = LinearAttention(512, 4, forget_gate=True, input_gate=True, shortcut=True)
    steps = F.softplus(mixer.delta.bias.detach().double())
    assert 1e-3 * 0.999 <= steps.min() <= 1.1e-3
    assert 0.9e-1 <= steps.max() <= 1e-1 * 1.001
    # Log-uniform: the quantiles of the logarithm are evenly spaced.
    share = (steps.log10() + 3) / 2
    uniform = torch.linspace(0, 1, 512, dtype=torch.float64)
    assert (share.sort().values - uniform).abs().max() < 0.08
    bound = 32**-0.5
    weight = mixer.delta.w2.weight.detach()
    assert weight.shape == (512, 32)
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    a = mixer.A_log.exp()
    torch.testing.assert_close(a, torch.arange(1.0, 129).expand(512, 128))
    assert torch.equal(mixer.D, torch.ones(512))

    plain = LinearAttention(64, 4, input_gate=True)
    assert torch.equal(plain.delta.bias, torch.zeros(64))
    for init, expected in (('mamba', True), ('linear', False)):
        for gate in ('input_gate', 'forget_gate'):
            delta = LinearAttention(64, 4, **{gate: True}, gate_init=init).delta
            assert (delta.bias.max() < -2) == expected


@pytest.mark.parametrize('hidden, expected', [(None, 3), (7, 7)])
def test_columns_of_the_steps(hidden, expected):
    assert Delta(40, hidden).w1.out_features == expected


def test_steps_under_autocast():
    """A bias in bfloat16 would be wrong by 1/32, and so would log(Delta)."""
    torch.manual_seed(0)
    delta = Delta(256, mamba_init=True)
    x = 0.02 * torch.randn(8, 256)
    expected = copy.deepcopy(delta).double()(x.double())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = delta(x)
    assert actual.dtype == torch.float32
    assert (actual.log() - expected.log()).abs().max() < 2e-3


def autocast(dtype):
    if dtype is torch.float16 and torch.__version__ < '2.3':
        pytest.skip('no float16 kernels on the CPU')
    return torch.autocast('cpu', dtype=dtype)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', SWITCHES)
def test_autocast_is_close_to_float64(name, dtype):
    torch.manual_seed(0)
    mixer = LinearAttention(**{'embed_dims': 16, 'num_heads': 2, **SWITCHES[name]})
    double = copy.deepcopy(mixer).double()
    x = torch.randn(2, 9, 8, 16)
    images = [x.clone().requires_grad_(), x.double().requires_grad_()]
    with autocast(dtype):
        y = mixer(images[0])
    assert y.dtype == (torch.float32 if mixer.v is None else dtype)
    expected = double(images[1])
    assert relative_error(y, expected) < 3e-2
    # As a scaler does for float16: gradients of the outputs are near 1.
    scale = 8192 if dtype is torch.float16 else 1
    (y.float().square().mean() * scale).backward()
    expected.square().mean().backward()
    assert relative_error(images[0].grad / scale, images[1].grad) < 5e-2
    whole = torch.cat([p.grad.flatten() for p in double.parameters()]).norm()
    for one, other in zip(mixer.parameters(), double.parameters()):
        assert (one.grad / scale - other.grad).norm() < 5e-2 * whole


@pytest.mark.parametrize(
    'dtype, normalization',
    # Without normalisation, float16 has no number for the result itself.
    [(torch.float16, True), (torch.bfloat16, True), (torch.bfloat16, False)],
)
def test_sums_over_many_tokens_are_in_range(dtype, normalization):
    """Without decay the sums are beyond float16's largest number."""
    torch.manual_seed(0)
    mixer = LinearAttention(16, 1, forget_gate=True, normalization=normalization)
    mixer.A_log.data.fill_(-60)
    for bias in (mixer.qk.bias, mixer.v.bias):
        torch.nn.init.constant_(bias, 2)
    with autocast(dtype):
        y = mixer(torch.randn(1, 30, 30, 16))
    if normalization:
        assert relative_error(y, torch.full_like(y, 2)) < 0.5
    else:
        assert y.isfinite().all() and y.max() > 1e5


@pytest.mark.parametrize('name', SWITCHES)
@pytest.mark.parametrize('value', [0.0, -30.0, 30.0])
def test_constant_maps(name, value):
    """Every feature is 0 or alike: nothing is divided by zero."""
    mixer = LinearAttention(**{'embed_dims': 16, 'num_heads': 2, **SWITCHES[name]})
    x = torch.full((1, 5, 4, 16), value, requires_grad=True)
    y = mixer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in (x, *mixer.parameters()))


def test_without_normalisation_the_size_of_the_map_does_not_matter():
    """The sum over all tokens is divided by their number."""
    mixer = build(normalization=False)
    x = torch.randn(1, 2, 3, 12, dtype=torch.float64)
    tiled = x.repeat(1, 4, 5, 1)
    torch.testing.assert_close(mixer(tiled)[:, :2, :3], mixer(x))


def test_a_mixer_in_half_precision_alone():
    """Weights of bfloat16, as in a model that was cast for inference."""
    mixer = build(input_gate=True, forget_gate=True, shortcut=True, lepe=True)
    x = torch.randn(1, 5, 6, 12, dtype=torch.float64)
    expected = mixer(x)
    actual = copy.deepcopy(mixer).bfloat16()(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) < 3e-2


def test_is_registered_and_can_be_saved_whole():
    mixer = MODELS.build(dict(type='LinearAttention', embed_dims=8, num_heads=2))
    copied = pickle.loads(pickle.dumps(mixer))
    x = torch.randn(1, 2, 2, 8)
    assert torch.equal(copied(x), mixer(x))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(num_heads=5), 'num_heads = 5 does not divide the 16 channels'),
        (dict(gate_dims=-1, input_gate=True), 'gate_dims must be an int'),
        (dict(gate_dims=0), 'gate_dims must be an int of at least 1, got 0'),
        (dict(feature_map='gelu'), "feature_map must be one of .*got 'gelu'"),
        (dict(feature_map=['relu']), 'feature_map must be one of'),
        (dict(gate_init='zero'), 'gate_init must be one of'),
        (dict(scan_order='diagonal'), 'scan_order must be one of'),
        (dict(shortcut_of='x'), 'shortcut_of must be one of'),
        (dict(input_gate=1), 'input_gate must be True or False, got 1'),
        (dict(forget_gate='yes'), 'forget_gate must be True or False'),
        (dict(shortcut=None), 'shortcut must be True or False'),
        (dict(normalization=0), 'normalization must be True or False'),
        (dict(lepe=2), 'lepe must be True or False'),
        (dict(rope='2d'), 'rope must be True or False'),
        (dict(gate_bias=0), 'gate_bias must be True or False'),
        (dict(decayed_normalizer=0), 'decayed_normalizer must be True or False'),
        (dict(rope=True, qk_head_dims=3), '2 heads of 3 are no multiple of 4'),
        (dict(gate_dims=4), 'gate_dims is for input_gate or forget_gate.* True'),
        (dict(gate_bias=False, shortcut=True), 'gate_bias is for input_gate or'),
        (dict(gate_init='mamba'), 'gate_init is for input_gate or forget_gate'),
        (dict(scan_order='columns', input_gate=True), 'scan_order is for forget_gate'),
        (dict(decayed_normalizer=True), 'decayed_normalizer is for forget_gate'),
        (
            dict(decayed_normalizer=True, forget_gate=True, normalization=False),
            'decayed_normalizer is for normalization',
        ),
        (dict(shortcut_of='input'), 'shortcut_of is for shortcut'),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(**{'embed_dims': 16, 'num_heads': 2, **options})
