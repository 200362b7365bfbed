# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What the authors' training code computes, and how to compute the same here.

Weights and inputs are functions of their names, as in :mod:`tests.reference`. All is
computed in float64, so that a difference is one of definition, not of rounding.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from ..reference import DATA, array, parameter

CONFIGS = Path(__file__).parents[2] / 'configs'
RTOL = 1e-8


def recorded(name: str) -> Dict[str, np.ndarray]:
    """The arrays of a file in ``tests/data/training``."""
    with np.load(DATA / 'training' / f'{name}.npz') as file:
        return dict(file)


def config(name: str) -> Config:
    """A recipe without its pretrained file and without drop path."""
    cfg = Config.fromfile(CONFIGS / name)
    cfg.model.backbone.update(init_cfg=None, drop_path_rate=0.0)
    return cfg


@contextmanager
def float64(scope: str) -> Iterator[None]:
    """Let models of a scope be built, and compute, in float64.

    Losses and metrics that cast to float32 cast to float64.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, 'float', torch.Tensor.double):
            with DefaultScope.overwrite_default_scope(scope):
                yield
    finally:
        torch.set_default_dtype(before)


def normal(name: str, shape) -> Tensor:
    return torch.from_numpy(array(name, shape)).double()


def uniform(name: str, shape) -> Tensor:
    return torch.from_numpy(np.abs(array(name, shape).astype(np.float64)) * 1000 % 1)


def integers(name: str, shape, n: int) -> Tensor:
    return (uniform(name, shape) * n).long()


def weights(shapes: Dict[str, Any], factors: Dict[str, float]) -> Dict[str, Tensor]:
    """Weights by name, some of them multiplied so that no loss is degenerate."""
    made = {name: torch.as_tensor(parameter(name, s)) for name, s in shapes.items()}
    for name, factor in factors.items():
        made[name] *= factor
    return made


def build(cfg: Config, factors: Dict[str, float]) -> nn.Module:
    """A model with the recorded run's weights, in training mode."""
    # All weights are loaded below. Drawing others before takes seconds.
    with mock.patch.object(torch.Tensor, 'uniform_', lambda self, *_, **__: self):
        model = MODELS.build(cfg.model).double().train()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    model.load_state_dict(weights(shapes, factors))
    return model


class Step:
    """Losses, gradients and statistics of a batch, beside the recorded ones.

    Args:
        model (nn.Module): The model, in training mode.
        losses (dict): What it has returned: a tensor by name, or one for each level.
        expected (dict): The content of the file.
    """

    def __init__(self, model: nn.Module, losses: dict, expected: dict) -> None:
        self._total, log = model.parse_losses(losses)
        self._model = model
        self.expected = expected
        self.losses = {name: value.item() for name, value in log.items()}
        for name, levels in losses.items():
            if isinstance(levels, list):
                for level, value in enumerate(levels):
                    self.losses[f'{name}.{level}'] = value.item()
        self.statistics = {
            name: value.clone()
            for name, value in model.named_buffers()
            if value.is_floating_point()
        }

    def recorded(self, kind: str) -> Dict[str, float]:
        start = f'{kind}/'
        return {
            key[len(start) :]: float(value)
            for key, value in self.expected.items()
            if key.startswith(start)
        }

    def check_losses(self) -> None:
        """Every entry of the losses and of the log."""
        expected = self.recorded('loss')
        assert self.losses.keys() == expected.keys()
        for name, value in expected.items():
            assert self.losses[name] == pytest.approx(value, rel=RTOL, abs=0), name

    def check_gradients(self) -> None:
        """Norms, and projections on fixed directions relative to them."""
        self._total.backward()
        gradients = {name: x.grad for name, x in self._model.named_parameters()}
        norms = self.recorded('gradient_norm')
        whole = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert float(whole) == pytest.approx(norms.pop('all'), rel=RTOL, abs=0)
        projections = self.recorded('gradient_projection')
        assert norms.keys() == projections.keys()
        for name, norm in norms.items():
            gradient = gradients[name]
            found = float(gradient.norm())
            assert found == pytest.approx(norm, rel=RTOL, abs=0), name
            direction = normal(f'gradient/{name}', gradient.shape)
            found = float((gradient * direction).sum())
            assert found == pytest.approx(projections[name], abs=RTOL * norm), name

    def check_statistics(self) -> None:
        """BatchNorm's running means and variances after the step."""
        expected = self.recorded('statistics_norm')
        assert expected
        for name, value in expected.items():
            found = float(self.statistics[name].norm())
            assert found == pytest.approx(value, rel=RTOL, abs=0), name
