# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import os

import pytest
import torch
from torch import nn

from benchmarks.forced_mlla import EagerMLLA, FusedMLLA
from mlla_mm.models import MLLA

from ..compiler import needs_compiler

NANO = dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))


def twins(**kwargs):
    """MLLA and the one of eager ops, with the same weights."""
    ours, eager = MLLA(NANO, **kwargs), EagerMLLA(NANO, **kwargs)
    eager.load_state_dict(ours.state_dict())
    return ours, eager


def set_ops(monkeypatch, value):
    if value is None:
        monkeypatch.delenv('MLLA_OPS', raising=False)
    else:
        monkeypatch.setenv('MLLA_OPS', value)


@pytest.mark.parametrize('kind, ops', [(EagerMLLA, 'eager'), (FusedMLLA, 'fused')])
@pytest.mark.parametrize('before', [None, '', 'naive'])
@pytest.mark.parametrize('fails', [False, True])
def test_the_variable_is_set_meanwhile(before, fails, kind, ops, monkeypatch):
    def record(*_):
        seen.append(os.environ['MLLA_OPS'])
        if fails:
            raise KeyError('in the stem')

    set_ops(monkeypatch, before)
    model = kind(NANO, out_indices=0)
    # On a CPU there are no kernels to take, so no op may run.
    model.patch_embed = nn.Conv2d(3, 16, 4, 4)
    monkeypatch.setattr(model, '_forward', lambda x: (model.patch_embed(x),))
    seen = []
    model.patch_embed.register_forward_hook(record)
    if fails:
        with pytest.raises(KeyError, match='in the stem'):
            model(torch.rand(2, 3, 32, 32))
    else:
        (feature,) = model(torch.rand(2, 3, 32, 32))
        assert feature.shape == (2, 16, 8, 8)
    assert seen == [ops]
    assert os.environ.get('MLLA_OPS') == before


def kept(model, x):
    """The features, and the shapes of what the backward pass will need."""
    shapes = []

    def keep(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return model(x), sorted(shapes)


@pytest.mark.parametrize('ops', [None, 'naive'])
def test_ops_are_eager_whatever_is_set(ops, monkeypatch):
    ours, eager = twins()
    x = torch.rand(2, 3, 64, 48)
    monkeypatch.delenv('MLLA_OPS', raising=False)
    expected, shapes = kept(ours, x)
    set_ops(monkeypatch, ops)
    features, found = kept(eager, x)
    assert found == shapes
    torch.testing.assert_close(features, expected)
    if ops == 'naive':
        assert kept(ours, x)[1] != shapes


@pytest.mark.slow
@needs_compiler
def test_compiled():
    ours, eager = (model.eval() for model in twins(out_indices=0))
    eager.compile()
    x = torch.rand(1, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(eager(x), ours(x), rtol=1e-4, atol=1e-5)
