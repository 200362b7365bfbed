# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch

from benchmarks.plain_mlla import PlainMLLA
from mlla_mm.models import MLLA

from .. import reference
from ..compiler import needs_compiler
from .gpu import ON_GPU

NANO = dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))


def twins(**kwargs):
    """MLLA and its plain assembly, with the same weights."""
    ours = MLLA(NANO, **kwargs)
    plain = PlainMLLA(NANO, **kwargs)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize(
    'arch, size, batch',
    [('t', '96x132', 2), ('t', '75x101', 2), ('s', '64x96', 1), ('b', '64x96', 1)],
)
def test_features_equal_the_authors(arch, size, batch):
    model = PlainMLLA(arch).eval()
    model.load_state_dict(reference.official_weights(f'mlla-{arch}_downstream'))
    with torch.no_grad():
        features = model(reference.image(size, batch))
    for i, feature in enumerate(features):
        expected = reference.recorded(f'feat{i}_mlla-{arch}_{size}')
        assert feature.shape == expected.shape
        assert feature.is_contiguous()
        assert reference.relative_error(feature, expected) < 1e-5


@pytest.mark.parametrize('with_cp', [False, True])
def test_a_training_step_equals_ours(with_cp):
    x = torch.rand(2, 3, 61, 45, dtype=torch.float64)
    results = []
    for model in twins(with_cp=with_cp):
        features = model.double().train()(x)
        sum(feature.square().mean() for feature in features).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((features, gradients, model.state_dict()))
    (ours, our_gradients, our_state), (plain, gradients, state) = results
    torch.testing.assert_close(plain, ours)
    torch.testing.assert_close(gradients, our_gradients)
    # BatchNorm's statistics too.
    torch.testing.assert_close(state, our_state)


def test_some_outputs():
    ours, plain = (model.eval() for model in twins(out_indices=(0, 2)))
    x = torch.rand(1, 3, 40, 56)
    with torch.no_grad():
        features = plain(x)
        torch.testing.assert_close(features, ours(x), rtol=1e-4, atol=1e-5)
    assert len(features) == 2


def test_the_path_of_a_block_is_dropped():
    x = torch.rand(8, 3, 64, 64)
    for rate in (0.0, 0.5):
        model = twins(drop_path_rate=rate)[1].train()
        with torch.no_grad():
            first, second = model(x)[-1], model(x)[-1]
        assert torch.equal(first, second) == (rate == 0)


@pytest.mark.parametrize(
    'device, dtype',
    [
        ('cpu', torch.bfloat16),
        pytest.param('cuda', torch.float16, marks=ON_GPU),
        pytest.param('cuda', torch.bfloat16, marks=ON_GPU),
    ],
)
def test_mixed_precision(device, dtype):
    plain = twins()[1].to(device)
    x = torch.rand(2, 3, 64, 96, device=device)
    expected = plain(x)
    with torch.autocast(device, dtype=dtype):
        features = plain(x)
    for feature, e in zip(features, expected):
        assert reference.relative_error(feature, e) < 5e-2
    sum(feature.float().mean() for feature in features).backward()
    assert all(p.grad.isfinite().all() for p in plain.parameters())


@pytest.mark.slow
@needs_compiler
def test_compiled():
    ours, plain = (model.eval() for model in twins())
    plain.compile()
    with torch.no_grad():
        for size in ((64, 48), (33, 70)):
            x = torch.rand(1, 3, *size)
            torch.testing.assert_close(plain(x), ours(x), rtol=1e-4, atol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match='Expected non-empty images'):
        PlainMLLA(NANO)(torch.rand(1, 1, 32, 32))


def test_weights_lie_in_memory_as_pytorch_makes_them():
    """The authors' do; another layout makes convolutions quicker."""
    for weight in twins()[1].parameters():
        assert weight.stride() == torch.empty(weight.shape).stride()
