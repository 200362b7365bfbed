# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Random arguments and images: the backbone works, or tells what is wrong."""

import math

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mlla_mm.models import MLLA
from mlla_mm.models.layers import ConvLayer

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-9, 9),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-9, 9) | st.floats() | st.none(), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@st.composite
def archs(draw):
    embed_dims = draw(st.sampled_from([4, 8, 12, 16]))
    divisors = [
        [n for n in range(1, width + 1) if width % n == 0]
        for width in (embed_dims * 2**i for i in range(4))
    ]
    return dict(
        embed_dims=embed_dims,
        depths=draw(st.lists(st.integers(1, 2), min_size=4, max_size=4)),
        num_heads=[draw(st.sampled_from(numbers)) for numbers in divisors],
    )


OUT_INDICES = st.integers(-4, 3) | st.lists(
    st.integers(-4, 3), min_size=1, max_size=4, unique_by=lambda i: i % 4
)
# The last number rounds to 1 in float32.
RATES = st.floats(0, 1, exclude_max=True) | st.just(1 - 1e-10)
OPTIONS = dict(
    in_channels=st.integers(1, 5),
    mlp_ratio=st.integers(1, 4) | st.floats(0.25, 4),
    qkv_bias=st.booleans(),
    drop_rate=RATES,
    drop_path_rate=RATES,
    out_indices=OUT_INDICES,
    frozen_stages=st.integers(-1, 4),
    norm_eval=st.booleans(),
    with_cp=st.booleans(),
)


def good_arguments():
    return st.fixed_dictionaries({'arch': archs()}, optional=OPTIONS)


@st.composite
def bad_arguments(draw):
    """Arguments. One of them, or one entry of arch, has an arbitrary value."""
    arguments = draw(good_arguments())
    name = draw(st.sampled_from(['arch', *arguments['arch'], *OPTIONS]))
    if name in arguments['arch']:
        arguments['arch'][name] = draw(ANYTHING)
    else:
        arguments[name] = draw(ANYTHING)
    return arguments


@st.composite
def images(draw, channels):
    """Images (N, C, H, W) of any size, magnitude, precision and memory layout."""
    sides = st.integers(1, 40) | st.sampled_from([1, 2, 4, 5, 32, 33, 150])
    shape = (draw(st.integers(1, 2)), channels, draw(sides), draw(sides))
    torch.manual_seed(draw(st.integers(0, 9)))
    x = torch.randn(shape, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    x = x * draw(st.sampled_from([0, 1e-30, 1e-3, 1, 255, 1e3, 1e6]))
    layout = draw(st.sampled_from(['contiguous', 'channels_last', 'flipped axes']))
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == 'flipped axes':
        x = x.transpose(2, 3)
    return x.requires_grad_(draw(st.booleans()))


def norms_of_one_value(model, x):
    """The BatchNorms that get a single value for each channel."""
    found = []

    def look(module, inputs, output):
        if output[:, 0].numel() == 1:
            found.append(module.norm)

    layers = [m for m in model.modules() if isinstance(m, ConvLayer)]
    hooks = [m.register_forward_hook(look) for m in layers if m.norm is not None]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return found


def check_features(model, features, x):
    height, width = (math.ceil(side / 4) for side in x.shape[2:])
    expected = []
    for i in range(4):
        if i in model.out_indices:
            expected.append((len(x), model.num_features[i], height, width))
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    assert [tuple(f.shape) for f in features] == expected
    assert all(f.isfinite().all() for f in features)


def run(model, x, training):
    """Run and check one forward and one backward pass."""
    norms = norms_of_one_value(model.to(x.dtype), x)
    model.train(training)
    if any(norm.training for norm in norms):
        event('a single value per channel')
        with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
            model(x)
        return
    event('ran')
    features = model(x)
    check_features(model, features, x)
    if not any(f.requires_grad for f in features):
        return
    sum(f.square().mean() for f in features).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name


def works(data):
    """With good arguments, the model runs on images of any size."""
    arguments = data.draw(good_arguments())
    x = data.draw(images(arguments.get('in_channels', 3)))
    run(MLLA(**arguments), x, training=data.draw(st.booleans()))


def works_or_refuses(data):
    """With any arguments, it runs, too, or raises a ValueError of one line."""
    arguments = data.draw(bad_arguments())
    try:
        model = MLLA(**arguments)
    except ValueError as error:
        event('refused')
        assert str(error) and '\n' not in str(error)
    else:
        run(model, data.draw(images(model.in_channels)), data.draw(st.booleans()))


FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)
MANY = settings(max_examples=500, deadline=None, database=None)


@pytest.mark.parametrize('amount', [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize('check', [works, works_or_refuses])
def test_arguments(check, amount):
    amount(given(st.data())(check))()
