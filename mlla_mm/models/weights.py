# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Published weights: where they are, and how they enter a backbone."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Dict, Union

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

PUBLISHED_WEIGHTS: Dict[str, str] = {
    'MLLA_T.pth': 'https://cloud.tsinghua.edu.cn/f/7a19712877cb4242889c/?dl=1',
    'MLLA_S.pth': 'https://cloud.tsinghua.edu.cn/f/0e5d0b1409d540aaa80c/?dl=1',
    'MLLA_B.pth': 'https://cloud.tsinghua.edu.cn/f/91c85c5a1061496d8796/?dl=1',
}
"""File name and address of the authors' ImageNet-1K classifiers."""

# In the authors' classifiers, but not in a downstream backbone.
_CLASSIFIER_ONLY = re.compile(r'^(norm|head)\.')
# The rotation tables that the authors' files carry: functions of the image size alone.
_ROTATIONS = re.compile(r'\.rope\.rotations$')
_OUTPUT_NORM = re.compile(r'^norm\d\.')


def require_weights(path: Union[str, Path]) -> None:
    """Raise an error that tells where to get a weight file which is not there.

    Args:
        path (str | Path): Local path of a checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    if path.is_file():
        return
    address = PUBLISHED_WEIGHTS.get(path.name)
    if address is None:
        way_out = "Check the path, or set the backbone's init_cfg to None."
    else:
        way_out = (
            f"Download the authors' file:\n    mkdir -p {path.parent} && "
            f"wget -O {path} '{address}'\nor train from scratch with "
            '--cfg-options model.backbone.init_cfg=None'
        )
    raise FileNotFoundError(f'Pretrained weights not found: {path}\n{way_out}')


def load_pretrained(backbone: nn.Module, path: Union[str, Path]) -> None:
    """Start a backbone from a classifier's or a backbone's checkpoint.

    Reads the authors' ImageNet files (weights under ``model``) and checkpoints with
    ``state_dict``, with or without a ``backbone.`` prefix. A classifier's ``norm`` and
    ``head`` are left out and the output norms start fresh, as in the authors' recipe.

    Args:
        backbone (nn.Module): The backbone, its parameters under the official names.
        path (str | Path): Local path of the checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint, or its weights do not fit.
    """
    require_weights(path)
    weights = _backbone_weights(_read(path))
    _check_fit(backbone.state_dict(), weights, path)
    result = backbone.load_state_dict(weights, strict=False)
    fresh = sorted({key.split('.')[0] for key in result.missing_keys})
    note = f'; {", ".join(fresh)} start fresh' if fresh else ''
    print_log(f'Loaded {len(weights)} tensors from {path}{note}.', logger='current')


def _read(path: Union[str, Path]) -> Mapping[str, Tensor]:
    try:
        # Unpickling anything but tensors and plain containers would run its code.
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f'{path} is damaged, or not a checkpoint of tensors alone: {error}'
        ) from error
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, dict) or not all(
        isinstance(value, Tensor) for value in checkpoint.values()
    ):
        raise ValueError(
            f'{path} holds no weights: expected them at the top level, or under '
            "'model' or 'state_dict'."
        )
    return checkpoint


def _backbone_weights(weights: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    prefix = 'backbone.'
    if any(key.startswith(prefix) for key in weights):
        weights = {
            key[len(prefix) :]: value
            for key, value in weights.items()
            if key.startswith(prefix)
        }
    return {
        key: value
        for key, value in weights.items()
        if not _CLASSIFIER_ONLY.match(key) and not _ROTATIONS.search(key)
    }


def _check_fit(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Union[str, Path]
) -> None:
    problems = [
        f'{key}: missing'
        for key in own
        if key not in weights and not _OUTPUT_NORM.match(key)
    ]
    for key, value in weights.items():
        if key not in own:
            if not _OUTPUT_NORM.match(key):
                problems.append(f'{key}: not part of this backbone')
        elif own[key].shape != value.shape:
            problems.append(
                f'{key}: {tuple(value.shape)} in the file, '
                f'{tuple(own[key].shape)} in the backbone'
            )
    if problems:
        shown = '\n    '.join(problems[:5])
        raise ValueError(
            f'The weights of {path} do not fit ({len(problems)} differences):\n'
            f"    {shown}\nCheck the backbone's arch against the file."
        )
