# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The layouts of MLLA checkpoints, and errors for weights that do not fit a model."""

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
"""The key of the averaged weights in a checkpoint of the authors or of this package.

MMEngine's EMAHook differs: it saves the averaged weights under ``state_dict`` and the
plain ones under ``ema_state_dict``.
"""

_PLAIN_KEYS = ('state_dict', 'model')
# Only MLLA has such names: Swin has 'attn.qkv'. One digit keeps the number of stages,
# which is the highest one plus one, small.
_BLOCK = re.compile(
    r'^(?P<prefix>.*?)layers\.(?P<stage>[0-9])\.blocks\.\d+\.attn\.qk\.weight$'
)
# The authors' files contain rotation tables, which can be computed.
_ROTATIONS = re.compile(r'\.rope\.rotations$')
# Names in the authors' classifier, which has no prefix, and in ours.
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
    """An MLLA, as the names and shapes of its weights describe it.

    Attributes:
        prefix (str): Text before the backbone's own names, '' or 'backbone.'.
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
        """'t', 's' or 'b' if this is a published network, else None."""
        return name_size(self.embed_dims, self.depths)

    def __str__(self) -> str:
        depths = '-'.join(map(str, self.depths))
        name = f'MLLA-{self.size.upper()}' if self.size else 'an MLLA'
        return f'{name} (embed_dims {self.embed_dims}, depths {depths})'


def describe(weights: Mapping[str, Tensor]) -> Optional[Network]:
    """Recognise an MLLA by its weights. Return None for other weights."""
    blocks = [match for match in map(_BLOCK.match, weights) if match]
    if not blocks or weights[blocks[0].string].dim() != 2:
        return None
    stages = [int(block['stage']) for block in blocks]
    tasks = [
        task
        for task, prefixes in _TASKS.items()
        if any(key.startswith(prefixes) for key in weights)
    ]
    return Network(
        prefix=blocks[0]['prefix'],
        # Each stage has twice the channels of the one before.
        embed_dims=weights[blocks[0].string].shape[-1] >> stages[0],
        depths=tuple(stages.count(stage) for stage in range(max(stages) + 1)),
        task=tasks[0] if tasks else 'backbone',
    )


def find_weights(
    checkpoint: Any, source: str, ema: Optional[bool] = None
) -> Mapping[str, Tensor]:
    """Find the weights in a checkpoint.

    OpenMMLab and this package save them under ``state_dict``, the authors' classifiers
    under ``model``, and others at the top level. Averaged weights are under
    ``state_dict_ema``.

    Args:
        checkpoint (Any): Content of the file.
        source (str): Name of the file, for errors.
        ema (bool, optional): Whether to take the averaged weights. None takes the plain
            weights, and is an error if a checkpoint of this package has both. (In the
            authors' files, the plain ones are the published ones.) Defaults to None.

    Returns:
        Mapping[str, Tensor]: Weights by name.

    Raises:
        CheckpointError: If there are no weights, or if ``ema`` has to be given.
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
            f"{source} holds no averaged weights ('{EMA_KEY}'), because its training "
            'made none. Take the plain weights.'
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
    """Whether a value is a mapping and all its keys are printable text."""
    return isinstance(weights, Mapping) and all(
        isinstance(key, str) and key.isprintable() for key in weights
    )


def to_own_names(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Give the weights of an MLLA the names that they have in this package.

    The prefix ``module.`` of distributed training and the rotation tables are removed.
    In the authors' classifier, ``norm`` becomes ``backbone.norm3``, ``head`` becomes
    ``head.fc``, and other names get ``backbone.`` in front. Their detectors and
    segmentors have our names already.

    Args:
        weights (Mapping[str, Tensor]): Weights by name. They are not changed.

    Returns:
        Mapping[str, Tensor]: The same tensors by their new names.
    """
    result = OrderedDict(
        (key, value) for key, value in weights.items() if not _ROTATIONS.search(key)
    )
    if all(key.startswith('module.') for key in result):
        result = _renamed(result, methodcaller('removeprefix', 'module.'))
    if 'backbone.head.weight' in result:
        result = _renamed(result, methodcaller('removeprefix', 'backbone.'))
    network = describe(result)
    if network and not network.prefix and network.task == 'classifier':
        result = _renamed(result, _to_own_classifier)
    if hasattr(weights, METADATA):
        setattr(result, METADATA, getattr(weights, METADATA))
    return result


def to_own_layout(checkpoint: Any, source: str) -> Any:
    """Turn a checkpoint of an MLLA into one with ``state_dict`` and our names.

    Args:
        checkpoint (Any): Content of a file.
        source (str): Name of the file, for errors.

    Returns:
        A dict with ``state_dict``, with ``state_dict_ema`` if there are averaged
        weights, and with all other content. A checkpoint of another network is returned
        unchanged.

    Raises:
        CheckpointError: If ``state_dict_ema`` contains anything but weights.
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
            problems[key] = (
                f'{tuple(value.shape)} in the file, {tuple(own[key].shape)} in the '
                'model'
            )
    if not problems:
        return
    # Different shapes first: they tell more than missing names.
    shown = sorted(problems, key=lambda key: key not in own or key not in weights)[:5]
    lines = '\n'.join(f'    {printable(key)}: {problems[key]}' for key in shown)
    raise CheckpointError(
        f'The weights of {source} do not fit the model ({len(problems)} differences):\n'
        f'{lines}\n{_way_out(own, weights, source, list(problems))}'
    )


def _renamed(
    weights: Mapping[str, Tensor], rename: Callable[[str], str]
) -> 'OrderedDict[str, Tensor]':
    return OrderedDict((rename(key), value) for key, value in weights.items())


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
    """Say what the user can do about weights that do not fit."""
    model, file = describe(own), describe(weights)
    if file is None or model is None:
        return 'The file holds no MLLA.' if file is None else 'The model has no MLLA.'
    if (file.embed_dims, file.depths) != (model.embed_dims, model.depths):
        text = f'The file holds {file}; the model is {model}. '
        if file.size is None:
            return text + "Set the backbone's arch to the numbers of the file."
        return text + (
            f'Use a config of that size, {_CONFIGS[model.task]}/*mlla-{file.size}*.py, '
            f"or set the backbone's arch to '{file.size}'."
        )
    start = (
        'To use only its backbone: --cfg-options load_from=None '
        'model.backbone.init_cfg.type=Pretrained '
        f'model.backbone.init_cfg.checkpoint={source}'
    )
    if model.prefix and file.task != model.task:
        return f'The file holds a {file.task}, the model is a {model.task}. {start}'
    if model.prefix and not any(key.startswith(model.prefix) for key in problems):
        return (
            f'The backbone fits; the file may have another number of classes. {start}'
        )
    return "Check the backbone's arguments, or fetch the file again."
