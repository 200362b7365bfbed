# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Loads weights that fit a model, and says why others do not."""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Dict, List, Optional

from torch import Tensor, nn

from ..utils.text import printable
from .layout import describe, with_metadata
from .reader import CheckpointError

_CONFIGS = {
    'detector': 'configs/detection',
    'segmentor': 'configs/segmentation',
    'classifier': 'configs/classification',
    'backbone': 'configs/*',
}
# Parts that training alone uses. Published files lack them, such as Grounding DINO's.
_OF_TRAINING = ('dn_query_generator.', 'auxiliary_head.')
_STATISTICS = ('.running_mean', '.running_var')
_BACKBONE_ALONE = (
    'To use only its backbone: --cfg-options load_from=None '
    'model.backbone.init_cfg.type=Pretrained '
    'model.backbone.init_cfg.checkpoint={}'
)
_OTHER_CLASSES = (
    'The backbone fits. If the file is of other classes, use a config with these, or '
    'start a training of yours from it: load_from, without --resume.'
)
# In PyTorch's error.
_MISSHAPED = re.compile(r'^\s*size mismatch for (\S+): ', re.MULTILINE)


def check_fit(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    source: str,
    fresh: Optional[re.Pattern] = None,
) -> None:
    """Refuse weights that do not fit a model.

    Args:
        own (Mapping[str, Tensor]): State dict of the model.
        weights (Mapping[str, Tensor]): Weights that are to be loaded.
        source (str): Name of the file, for the error.
        fresh (re.Pattern, optional): Names that the weights may lack. They may always
            lack the counters of BatchNorm (``num_batches_tracked``), as in PyTorch.
            Defaults to None.

    Raises:
        CheckpointError: If names or shapes differ. The message lists the first five
            differences and says what to do.
    """
    problems: Dict[str, str] = {}
    for key in own:
        optional = key.endswith('.num_batches_tracked') or (fresh and fresh.match(key))
        if key not in weights and not optional:
            problems[key] = f'missing in the file, {tuple(own[key].shape)} in the model'
    for key, value in weights.items():
        if key not in own:
            problems[key] = f'{tuple(value.shape)} in the file, not part of the model'
        elif own[key].shape != value.shape:
            problems[key] = _shapes(value, own[key])
    if problems:
        # Different shapes first: they tell more than missing names.
        ordered = sorted(problems, key=lambda key: key not in own or key not in weights)
        way_out = _way_out(own, weights, source, ordered)
        raise _misfit(source, {key: problems[key] for key in ordered}, way_out)


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights into a model, all of them or none.

    Weights of a model with a backbone of ours have to pass :func:`check_fit`. Other
    models may rename and resize weights while they load them, so loading itself has to
    tell: all parameters and statistics of BatchNorm are there, with their shapes. The
    file may lack other buffers, which models compute, and have more than the model.

    Args:
        model (nn.Module): The model. After an error its weights are undefined.
        weights (Mapping[str, Tensor]): The weights.
        source (str): Name of the file, for the error.

    Raises:
        CheckpointError: As :func:`check_fit` does.
    """
    own = model.state_dict()
    if describe(own) is not None:
        check_fit(own, weights, source)
        model.load_state_dict(weights, strict=False)
        return
    problems = {
        key: _shapes(weights.get(key), own[key])
        for key in _misshaped(model, weights, source)
    }
    fitting = OrderedDict((x, y) for x, y in weights.items() if x not in problems)
    with_metadata(fitting, weights)
    missing = model.load_state_dict(fitting, strict=False).missing_keys
    parameters = {name for name, _ in model.named_parameters()}
    for key in missing:
        needed = key in parameters or key.endswith(_STATISTICS)
        if needed and not key.startswith(_OF_TRAINING):
            problems.setdefault(key, _shapes(None, own[key]))
    if problems:
        way_out = _way_out_of_others(model, weights, source, problems)
        raise _misfit(source, problems, way_out)


def _misshaped(
    model: nn.Module, weights: Mapping[str, Tensor], source: str
) -> List[str]:
    """Load weights, and return the names of those that have another shape."""
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        names = _MISSHAPED.findall(str(error))
        # The model may have given them other names.
        if not names or not weights.keys() >= set(names):
            cause = printable(' '.join(str(error).split()), limit=400)
            raise CheckpointError(f'{source} cannot be loaded: {cause}') from error
        return names
    return []


def _shapes(in_file: Any, in_model: Tensor) -> str:
    """Say how a tensor of the model differs from the file's, if it has one."""
    of_model = f'{tuple(in_model.shape)} in the model'
    if not isinstance(in_file, Tensor):
        return f'missing in the file, {of_model}'
    return f'{tuple(in_file.shape)} in the file, {of_model}'


def _misfit(source: str, problems: Dict[str, str], way_out: str) -> CheckpointError:
    lines = [f'    {printable(key)}: {text}' for key, text in problems.items()]
    return CheckpointError(
        f'The weights of {source} do not fit the model ({len(problems)} differences):\n'
        + '\n'.join([*lines[:5], way_out])
    )


def _way_out(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    source: str,
    problems: List[str],
) -> str:
    """Say what the user can do about weights that do not fit."""
    model, file = describe(own), describe(weights)
    if model is None:
        return f'The model has no {file.kind}.' if file else 'The model has no MLLA.'
    if file is None:
        return f'The file holds no {model.kind}.'
    if file.kind != model.kind:
        return (
            f'The file holds {file}; the model is {model}. Use a config whose backbone '
            f'is of the type {file.kind}, or another file.'
        )
    if (file.embed_dims, file.depths) != (model.embed_dims, model.depths):
        text = f'The file holds {file}; the model is {model}. '
        if file.size is None:
            return text + "Set the backbone's arch to the numbers of the file."
        return text + (
            f'Use a config of that size, {_CONFIGS[model.task]}/*mlla-{file.size}*.py, '
            f"or set the backbone's arch to '{file.size}'."
        )
    if all('.attn.' in key for key in problems):
        return (
            "Only the attentions differ. Set the backbone's token_mixer and qkv_bias "
            'as in the file, or train from scratch (init_cfg=None).'
        )
    start = _BACKBONE_ALONE.format(source)
    if model.prefix and file.task != model.task:
        return f'The file holds a {file.task}, the model is a {model.task}. {start}'
    if model.prefix and not any(key.startswith(model.prefix) for key in problems):
        return f'{_OTHER_CLASSES} {start}'
    return "Check the backbone's arguments, or fetch the file again."


def _way_out_of_others(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    problems: Iterable[str],
) -> str:
    """:func:`_way_out` for a model without a backbone of ours."""
    backbone = {
        name for name, _ in model.named_parameters() if name.startswith('backbone.')
    }
    start = _BACKBONE_ALONE.format(source)
    if backbone and backbone.isdisjoint(problems):
        start += ' model.backbone.init_cfg.prefix=backbone.'
        if weights.keys().isdisjoint(problems):
            return f'The backbone fits; the file lacks what is listed. {start}'
        return f'{_OTHER_CLASSES} {start}'
    if backbone and backbone <= {f'backbone.{key}' for key in weights}:
        return f'The file holds a backbone alone. {start}'
    return "Check the arguments of the model's config, or fetch the file again."
