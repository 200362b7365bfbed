# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The authors' implementation as data: weights, inputs and recorded outputs.

Arrays are functions of their names: a generator seeded with the CRC-32 of the name.
The recorded outputs were computed from exactly these.
"""

import json
import zlib
from pathlib import Path
from typing import Dict

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / 'data'


def array(name: str, shape) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape).astype(np.float32)


def parameter(name: str, shape) -> np.ndarray:
    """Weights that keep activations of order one through a deep network."""
    if name.endswith('num_batches_tracked'):
        return np.zeros((), dtype=np.int64)
    noise = array(name, tuple(shape))
    if name.endswith('running_var'):
        return 1 + 0.1 * np.abs(noise)
    if name.endswith(('running_mean', 'bias')):
        return 0.1 * noise
    if len(shape) == 1:
        return 1 + 0.1 * noise
    return noise / np.float32(np.sqrt(np.prod(shape[1:])))


def official_shapes(model: str) -> Dict[str, list]:
    """Parameter and statistics names with shapes, e.g. of 'mlla-t_downstream'."""
    keys = json.loads((DATA / 'official_checkpoint_keys.json').read_text())
    if model in keys:
        return keys[model]['parameters']
    # Downstream S and B: the classifier's, with norm0..3 for norm and head.
    shapes = dict(keys[model.replace('_downstream', '')]['parameters'])
    channels = shapes['norm.weight'][0]
    for key in [key for key in shapes if key.startswith(('norm.', 'head.'))]:
        del shapes[key]
    for i in range(4):
        shapes[f'norm{i}.weight'] = shapes[f'norm{i}.bias'] = [channels // 2 ** (3 - i)]
    return shapes


def official_rotations(model: str) -> list:
    """Names of the rotation buffers that the authors' files carry besides."""
    keys = json.loads((DATA / 'official_checkpoint_keys.json').read_text())
    return keys[model]['buffers_not_to_load']


def official_weights(model: str) -> Dict[str, Tensor]:
    shapes = official_shapes(model)
    return {k: torch.as_tensor(parameter(k, shape)) for k, shape in shapes.items()}


def image(size: str, batch: int) -> Tensor:
    """The reference input of ``size`` 'HxW'."""
    height, width = map(int, size.split('x'))
    return torch.from_numpy(array(f'input/{size}', (batch, 3, height, width)))


def recorded(name: str) -> Tensor:
    with np.load(DATA / 'mlla_reference_outputs.npz') as outputs:
        return torch.from_numpy(outputs[name])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error, in float64."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())
