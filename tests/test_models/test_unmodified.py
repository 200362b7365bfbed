# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Hooks and replaced layers work, although faster ops read the weights of layers."""

import copy

import pytest
import torch
from torch import nn

from mlla_mm.models import MLLA
from mlla_mm.models.layers import patch_merging

from ..reference import relative_error


class Doubled(nn.Module):
    """Stands for what wraps a layer and shows its weights, as LoRA does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, x):
        return self.layer(x) * 2


@pytest.fixture(autouse=True)
def several_parts(monkeypatch):
    """The hidden map of these small images is taken apart as that of large ones."""
    monkeypatch.setattr(patch_merging, '_MIN_CHANNELS', 16)
    monkeypatch.setattr('mlla_mm.ops.eager._CACHED', 4096)


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


@pytest.mark.parametrize('gradients', [False, True])
def test_hooks_are_called_once(model, gradients):
    calls = []
    for name in leaves(model):
        model.get_submodule(name).register_forward_hook(
            lambda layer, args, output, name=name: calls.append(name)
        )
    with torch.set_grad_enabled(gradients):
        model(torch.randn(1, 3, 64, 64))
    assert sorted(calls) == sorted(leaves(model))


def test_replaced_layers_are_called(model):
    image = torch.randn(1, 3, 64, 64)
    for name in leaves(model):
        hooked, wrapped = copy.deepcopy(model), copy.deepcopy(model)
        hooked.get_submodule(name).register_forward_hook(lambda *args: args[2] * 2)
        parent, _, child = name.rpartition('.')
        parent = wrapped.get_submodule(parent)
        setattr(parent, child, Doubled(getattr(parent, child)))
        with torch.no_grad():
            for actual, expected in zip(wrapped(image), hooked(image)):
                assert relative_error(actual, expected) < 1e-5, name


@torch.no_grad()
def test_parts_change_nothing(model, monkeypatch):
    image = torch.randn(2, 3, 61, 90)
    actual = model(image)
    monkeypatch.setattr('mlla_mm.ops.eager._CACHED', 1 << 30)
    for part, whole in zip(actual, model(image)):
        assert relative_error(part, whole) < 1e-5
