# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What MLLA checkpoints look like, and what tells that one does not fit a model."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from operator import methodcaller
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from torch import Tensor

from ..arch import name_size
from ..compat.pytorch import METADATA
from ..utils.text import printable
from .reader import CheckpointError

EMA_KEY = 'state_dict_ema'
"""Where a checkpoint holds averaged weights beside the plain ones.

The authors' training and ours agree on it. MMEngine's EMAHook has it the other way
round, with the averaged weights in ``state_dict`` and the plain ones in
``ema_state_dict``.
"""

_PLAIN_KEYS = ('state_dict', 'model')
# Of MLLA alone: Swin has 'attn.qkv'.
_BLOCK = re.compile(
    # No more stages than a network has: the highest one says how many there are.
    r'^(?P<prefix>.*?)layers\.(?P<stage>[0-9])\.blocks\.\d+\.attn\.qk\.weight$'
)
# Rotation tables of the authors' files: functions of the image size alone.
_ROTATIONS = re.compile(r'\.rope\.rotations$')
# The authors' classifier, without prefix, and ours.
_CLASSIFIER_NAMES = {'norm.': 'backbone.norm3.', 'head.': 'head.fc.'}
_TASKS = {
    'detector': ('rpn_head.', 'roi_head.', 'bbox_head.'),
    'segmentor': ('decode_head.',),
    'classifier': ('head.',),
}
_CONFIGS = {
    'detector': 'configs/detection',
    'segmentor': 'configs/segmentation',
    'classifier': 'configs/classification',
    'backbone': 'configs/*',
}


class Network(NamedTuple):
    """What the names and shapes of weights tell about an MLLA.

    Attributes:
        prefix (str): What precedes the backbone's own names, '' or 'backbone.'.
        embed_dims (int): Channels of the first stage.
        depths (tuple[int]): Blocks of each stage.
        task (str): 'detector', 'segmentor', 'classifier' or 'backbone'.
    """

    prefix: str
    embed_dims: int
    depths: Tuple[int, ...]
    task: str

    @property
    def size(self) -> Optional[str]:
        """'t', 's' or 'b' of a published network, else None."""
        return name_size(self.embed_dims, self.depths)

    def __str__(self) -> str:
        depths = '-'.join(map(str, self.depths))
        name = f'MLLA-{self.size.upper()}' if self.size else 'an MLLA'
        return f'{name} (embed_dims {self.embed_dims}, depths {depths})'


def describe(weights: Mapping[str, Tensor]) -> Optional[Network]:
    """Recognise an MLLA by its weights; None if there is none."""
    blocks = [match for match in map(_BLOCK.match, weights) if match]
    if not blocks or weights[blocks[0].string].dim() != 2:
        return None
    stages = [int(block['stage']) for block in blocks]
    task = 'backbone'
    for name, prefixes in _TASKS.items():
        if any(key.startswith(prefixes) for key in weights):
            task = name
            break
    return Network(
        prefix=blocks[0]['prefix'],
        embed_dims=weights[blocks[0].string].shape[-1] >> stages[0],
        depths=tuple(stages.count(stage) for stage in range(max(stages) + 1)),
        task=task,
    )


def find_weights(
    checkpoint: Any, source: str, ema: Optional[bool] = None
) -> Mapping[str, Tensor]:
    """The weights of a checkpoint, wherever it holds them.

    Args:
        checkpoint: What the file holds: weights under ``state_dict`` (OpenMMLab and
            this package), ``model`` (the authors' classifiers), or at the top level;
            averaged ones under ``state_dict_ema``.
        source (str): The file, for errors.
        ema (bool, optional): Whether to take the averaged weights. None takes the
            plain ones, but does not choose for a checkpoint of this package that has
            both; the authors' files have a recipe that does. Defaults to None.

    Raises:
        CheckpointError: If there are none, or if a choice is missing.
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else {}
    if ema is None and {'state_dict', EMA_KEY} <= content.keys():
        raise CheckpointError(
            f'{source} holds plain and averaged weights. Choose with ema=False or '
            f"ema=True, as in dict(type='Pretrained', checkpoint='{source}', ema=True)."
        )
    keys = (EMA_KEY,) if ema else _PLAIN_KEYS
    found = [content[key] for key in keys if isinstance(content.get(key), Mapping)]
    if not found and ema:
        raise CheckpointError(
            f"{source} holds no averaged weights ('{EMA_KEY}'): it was saved by a "
            'training without them. Take the plain ones.'
        )
    weights = found[0] if found else content
    are_tensors = all(isinstance(value, Tensor) for value in weights.values())
    if not weights or not are_tensors or not has_names(weights):
        raise CheckpointError(
            f'{source} holds no weights: expected them at the top level, or under '
            "'model' or 'state_dict'."
        )
    return weights


def has_names(weights: Any) -> bool:
    """Whether a value is a mapping whose keys are all text that can be printed."""
    return isinstance(weights, Mapping) and all(
        isinstance(key, str) and key.isprintable() for key in weights
    )


def to_own_names(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Give the weights of an MLLA the names that they have in this package.

    The prefix ``module.`` of distributed training is removed, and so are rotation
    tables. The authors' classifier becomes ours: ``backbone.`` before the names,
    ``norm`` as ``norm3`` and ``head`` as ``head.fc``. Others have our names already.
    """
    if all(key.startswith('module.') for key in weights):
        weights = _renamed(weights, methodcaller('removeprefix', 'module.'))
    if 'backbone.head.weight' in weights:
        weights = _renamed(weights, methodcaller('removeprefix', 'backbone.'))
    weights = _renamed(weights, str)
    for key in [key for key in weights if _ROTATIONS.search(key)]:
        del weights[key]
    network = describe(weights)
    if network and not network.prefix and network.task == 'classifier':
        weights = _renamed(weights, _to_own_classifier)
    return weights


def to_own_layout(checkpoint: Any, source: str) -> Any:
    """Turn any checkpoint of an MLLA into one with ``state_dict`` and our names.

    Args:
        checkpoint: What a file holds.
        source (str): The file, for errors.

    Returns:
        A dict with ``state_dict``, maybe ``state_dict_ema``, and whatever else there
        was. A checkpoint of another network is returned as it is.

    Raises:
        CheckpointError: If the averaged weights are none.
    """
    try:
        weights = find_weights(checkpoint, source, ema=False)
    except CheckpointError:
        return checkpoint
    if describe(weights) is None:
        return checkpoint
    if checkpoint is weights:
        return dict(state_dict=to_own_names(weights))
    result = {key: value for key, value in checkpoint.items() if key != 'model'}
    result['state_dict'] = to_own_names(weights)
    averaged = result.pop(EMA_KEY, None)
    if isinstance(averaged, Mapping):
        result[EMA_KEY] = to_own_names(find_weights(checkpoint, source, ema=True))
    return result


def check_fit(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    source: str,
    fresh: Optional[re.Pattern] = None,
) -> None:
    """Refuse weights that do not fit.

    Args:
        own (Mapping[str, Tensor]): The model's state dict.
        weights (Mapping[str, Tensor]): What is to be loaded into it.
        source (str): The file, for the error.
        fresh (re.Pattern, optional): Names that may be missing. BatchNorm's counters
            (``num_batches_tracked``) may be in any case, as in PyTorch.

    Raises:
        CheckpointError: If names or shapes differ. The message lists the first
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
            problems[key] = (
                f'{tuple(value.shape)} in the file, {tuple(own[key].shape)} in the '
                'model'
            )
    if not problems:
        return
    # Shapes tell more than names.
    shown = sorted(problems, key=lambda key: key not in own or key not in weights)[:5]
    lines = '\n'.join(f'    {printable(key)}: {problems[key]}' for key in shown)
    raise CheckpointError(
        f'The weights of {source} do not fit the model ({len(problems)} differences):\n'
        f'{lines}\n{_way_out(own, weights, source, list(problems))}'
    )


def _renamed(
    weights: Mapping[str, Tensor], rename: Callable[[str], str]
) -> Mapping[str, Tensor]:
    result = OrderedDict((rename(key), value) for key, value in weights.items())
    if hasattr(weights, METADATA):
        setattr(result, METADATA, getattr(weights, METADATA))
    return result


def _to_own_classifier(key: str) -> str:
    for theirs, ours in _CLASSIFIER_NAMES.items():
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return f'backbone.{key}'


def _way_out(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    source: str,
    problems: List[str],
) -> str:
    model, file = describe(own), describe(weights)
    if file is None:
        return 'The file holds no MLLA.'
    if (file.embed_dims, file.depths) != (model.embed_dims, model.depths):
        text = f'The file holds {file}; the model is {model}. '
        if file.size is None:
            return text + "Give the backbone's arch the file's numbers."
        return text + (
            f'Use a config of that size, {_CONFIGS[model.task]}/*mlla-{file.size}*.py, '
            f"or set the backbone's arch to '{file.size}'."
        )
    start = (
        'To start from its backbone alone: --cfg-options load_from=None '
        'model.backbone.init_cfg.type=Pretrained '
        f'model.backbone.init_cfg.checkpoint={source}'
    )
    if model.prefix and file.task != model.task:
        return f'The file holds a {file.task}, the model is a {model.task}. {start}'
    if model.prefix and not any(key.startswith(model.prefix) for key in problems):
        return f'The backbone fits; is it another number of classes? {start}'
    return "Check the backbone's arguments against the file's, or fetch it again."
